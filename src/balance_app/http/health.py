"""Liveness, readiness and metrics of this instance."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from balance_app.db.migrations import SCHEMA_VERSION, Version
from balance_app.db.outages import Kind
from balance_app.db.pool import Database, read
from balance_app.db.replication import Replication
from balance_app.errors import Problem
from balance_app.http.services import services
from balance_app.metrics import Metrics
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

router = APIRouter(tags=["health"])


class Readiness:
    """Whether this instance should get requests, and further checks for operators."""

    def __init__(
        self,
        database: Database,
        stopping: asyncio.Event,
        *,
        informational: Mapping[str, Callable[[], str]],
        shows_details: Callable[[], bool] = lambda: True,
    ) -> None:
        """Add the `informational` checks: they are reported, and don't make it unready.

        Unless `shows_details`, a fault of the schema is not told, as nobody asks who reads it.
        """
        self._database = database
        self._stopping = stopping
        self._informational = informational
        self._shows_details = shows_details
        self._logged = "ok"
        self._checking: asyncio.Task[dict[str, str]] | None = None

    async def standbys(self) -> dict[str, Any]:
        """Return the primary and its standbys; nothing when they are not known."""
        try:
            found = await self._database.replication()
        except Problem:
            return {}
        return {} if found is None else _replication(found, details=self._shows_details())

    async def check(self) -> tuple[dict[str, str], bool]:
        """Return the checks, each "ok" or a fault, and whether this instance is ready."""
        checks = {"stopping": "This instance is stopping." if self._stopping.is_set() else "ok"}
        found = await self._database_checks()
        if found["database"] == "ok" and found["schema"] != self._logged:
            self._logged = found["schema"]
            log.warning("schema checked", result=self._logged)
        checks |= found if self._shows_details() else without_details(found)
        ready = all(found == "ok" for found in checks.values())
        return checks | {name: check() for name, check in self._informational.items()}, ready

    async def _database_checks(self) -> dict[str, str]:
        """Return the checks of the database; those who ask during a check share its result.

        A check goes before all requests, and anybody may ask for one: however many do, the queue
        has one.
        """
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(_database_checks(self._database))
        return await asyncio.shield(self._checking)


NOT_KNOWN: Final = "not known"
SCHEMA_UNFIT: Final = "The schema does not fit this program; the log says why."

_READY_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Every check holds.",
        "content": {
            "application/json": {
                "example": {
                    "status": "ok",
                    "server": "app1",
                    "checks": {"stopping": "ok", "database": "ok", "schema": "ok"},
                    "primary": "10.0.0.1 port 5432",
                    "standbys": [
                        {
                            "name": "db2",
                            "address": "10.0.0.2",
                            "state": "streaming",
                            "synchronous": True,
                            "behindBytes": 0,
                            "behindSeconds": 0.002,
                        }
                    ],
                    "synchronous": {"required": 1, "present": 1, "waiting": 0},
                }
            }
        },
    },
    503: {
        "description": "At least one check fails; `checks` says which, and why.",
        "content": {
            "application/json": {
                "example": {
                    "status": "unavailable",
                    "server": "app1",
                    "checks": {
                        "stopping": "ok",
                        "database": "The database can't be reached.",
                        "schema": "not known",
                    },
                }
            }
        },
    },
}


@router.get("/livez")
async def livez(request: Request) -> Response:
    """Report that the process answers; nothing else is checked."""
    return JSONResponse({"status": "ok", "server": services(request)[Settings].server_id})


@router.get("/readyz", responses=_READY_ANSWERS)
async def readyz(request: Request) -> Response:
    """Report whether this instance is ready: the database answers, the schema fits, no stop began.

    `jobs` names the jobs that could not be declared here; the instance is ready nevertheless. So it
    is with `warnings`, present only if there are any: a read-only server, fewer connections than
    configured, a server that may lose what it has acknowledged (`fsync`), a role with too many
    rights, commits that wait for a standby that is not there.

    `primary` is the address of the database in use, and `standbys` has those that stream from it:
    whether commits wait for one (`synchronous`), and what it would lack if the primary failed now.
    A commit waits for `synchronous.required` standbys, of which `present` are connected; `waiting`
    commits do at this moment. Without a key, once there are keys, nobody is told addresses.
    """
    parts = services(request)
    checks, ready = await parts[Readiness].check()
    body = {
        "status": "ok" if ready else "unavailable",
        "server": parts[Settings].server_id,
        "checks": checks,
    }
    if ready:
        body |= await parts[Readiness].standbys()
    warnings = parts[Database].warnings()
    return JSONResponse(
        body | {"warnings": warnings} if warnings else body,
        status_code=200 if ready else 503,
        headers={} if ready else {"Retry-After": "1"},
    )


router.add_api_route("/health", readyz, responses=_READY_ANSWERS, name="health")


async def _database_checks(database: Database) -> dict[str, str]:
    try:
        rows = await database.run(lambda con: read(con, SCHEMA_VERSION), priority=True)
    except Problem as problem:
        return {"database": problem.detail, "schema": NOT_KNOWN}
    except Exception as error:  # noqa: BLE001 - a check reports, whatever it is
        log.warning("readiness check failed", error=repr(error))
        return {"database": "The database refused the query.", "schema": NOT_KNOWN}
    if not rows:
        return {"database": "ok", "schema": "The schema has no version."}
    fault = Version(rows[0]["version_num"], rows[0]["compatible_from"]).fault()
    return {"database": "ok", "schema": fault or "ok"}


def _replication(found: Replication, *, details: bool) -> dict[str, Any]:
    """Return the standbys as JSON; without `details` no names and addresses."""
    standbys = [
        {
            **({"name": each.name, "address": each.address} if details else {}),
            "state": each.state,
            "synchronous": each.synchronous,
            "behindBytes": each.behind_bytes,
            "behindSeconds": each.behind_seconds,
        }
        for each in found.standbys
    ]
    return {
        **({"primary": found.primary} if details else {}),
        "standbys": standbys,
        "synchronous": {
            "required": found.required,
            "present": found.present,
            "waiting": found.waiting,
        },
    }


def without_details(checks: dict[str, str]) -> dict[str, str]:
    """Replace sentences that name revisions, roles or tables."""
    schema, database = checks["schema"], checks["database"]
    if schema not in {"ok", NOT_KNOWN}:
        schema = SCHEMA_UNFIT
    general = tuple(str(kind.value).removesuffix(".") for kind in Kind if kind is not Kind.SCHEMA)
    if database != "ok" and not database.startswith(general):
        database = Kind.UNEXPECTED.value
    return {"database": database, "schema": schema}


_OPENMETRICS: Final = "application/openmetrics-text"


@router.get(
    "/metrics",
    response_class=Response,
    response_description="One line for each metric.",
    responses={
        200: {
            "content": {
                kind: {"schema": {"type": "string"}} for kind in ("text/plain", _OPENMETRICS)
            }
        }
    },
)
async def read_metrics(request: Request) -> Response:
    """Return this instance's metrics for Prometheus; also while the database is unavailable."""
    metrics = services(request)[Metrics]
    as_openmetrics = _OPENMETRICS in request.headers.get("accept", "")
    return Response(
        await metrics.render(as_openmetrics=as_openmetrics),
        headers={
            "Content-Type": (
                openmetrics.CONTENT_TYPE_LATEST if as_openmetrics else CONTENT_TYPE_PLAIN_0_0_4
            ),
            "Cache-Control": "no-store",
        },
    )
