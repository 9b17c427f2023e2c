"""Whether this copy lives, and whether it should be sent requests."""

from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

import structlog
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from balance_app.database import Database, read
from balance_app.errors import Problem
from balance_app.migrations import SCHEMA_VERSION, Version

log = structlog.get_logger(__name__)

NAMED: Final = 5  # so many jobs are told with their reasons

router = APIRouter(tags=["health"])

_READY_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Every check holds.",
        "content": {
            "application/json": {
                "example": {"status": "ok", "server": "app1", "checks": {"database": "ok"}}
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
    """Say that the process runs and answers; nothing else is looked at."""
    return JSONResponse({"status": "ok", "server": request.app.state.settings.server_id})


@router.get("/readyz", responses=_READY_ANSWERS)
async def readyz(request: Request) -> Response:
    """Say whether requests should come here: database reachable, schema right, not stopping.

    `jobs` tells what could not be declared here, and does not count: requests may come. Nor do
    `warnings`, of which there are none as a rule: a read-only server, fewer connections than
    configured, a server that does not keep what it has acknowledged (`fsync`).
    """
    state = request.app.state
    checks = {"stopping": "This copy is stopping." if state.stopping.is_set() else "ok"}
    checks |= await _database_checks(state.database)
    ready = all(said == "ok" for said in checks.values())
    # What jobs lack is no reason to send requests elsewhere.
    if state.scheduler is not None:
        checks["jobs"] = _jobs_check(state.scheduler.fault, state.scheduler.undeclared)
    body = {
        "status": "ok" if ready else "unavailable",
        "server": state.settings.server_id,
        "checks": checks,
    }
    warnings = state.database.warnings()
    return JSONResponse(
        body | {"warnings": warnings} if warnings else body,
        status_code=200 if ready else 503,
        headers={} if ready else {"Retry-After": "1"},
    )


router.add_api_route("/health", readyz, responses=_READY_ANSWERS, name="health")


def _jobs_check(fault: str | None, jobs: Mapping[str, str]) -> str:
    if fault is not None:
        return f"No jobs are claimed here. {fault}"
    if not jobs:
        return "ok"
    named = "; ".join(f"{name}: {reason}" for name, reason in islice(jobs.items(), NAMED))
    more = f"; and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    return f"Not declared, so not run as this program says: {named}{more}."


async def _database_checks(database: Database) -> dict[str, str]:
    try:
        rows = await database.run(lambda con: read(con, SCHEMA_VERSION), urgent=True)
    except Problem as problem:
        return {"database": problem.detail, "schema": "not known"}
    except Exception as error:  # noqa: BLE001 - a check reports, whatever it is
        log.warning("readiness check failed", error=repr(error))
        return {"database": "The database refused the question.", "schema": "not known"}
    fault = Version(*rows[0]).fault() if rows else "The schema has no version."
    return {"database": "ok", "schema": fault or "ok"}
