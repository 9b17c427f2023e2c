"""The pages of runs: those of all jobs, and one run with its attempts, log and traceback."""

import re
from datetime import datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from balance_app.errors import InvalidRequest
from balance_app.formatting import typed_moment
from balance_app.http.params import PRINTABLE_PATTERN
from balance_app.http.services import services
from balance_app.jobs.api.errors import RunNotFound
from balance_app.jobs.api.history import History
from balance_app.jobs.api.schemas import NAME_PATTERN
from balance_app.states import Outcome
from balance_app.web.forms import go_to
from balance_app.web.pages import PageRoute, is_number, respond, stream_of
from balance_app.web.queries import ATTEMPTS_SHOWN, PageQueries, RunFilter

RUNS_ON_PAGE: Final = 50
REFRESH_SECONDS: Final = 2  # how often the page of a run under way is loaded again
LIST_REFRESH_SECONDS: Final = 5
LONGEST_SERVER: Final = 200

_NO_TIME: Final = "A time is written as 2026-11-29 02:40, in UTC."

router = APIRouter(route_class=PageRoute, include_in_schema=False)


class Filters(NamedTuple):
    """The filters of the list as they are written in the address; an empty one filters nothing."""

    job: str = ""
    outcome: str = ""
    server: str = ""
    since: str = ""
    until: str = ""

    def query(self, **more: object) -> str:
        """Return the query of the list with these filters."""
        given = {name: text for name, text in self._asdict().items() if text}
        return urlencode({**given, **more})


@router.get("/runs")
async def list_runs(request: Request) -> Response:
    """List the runs of all jobs, the latest first, by outcome, instance, job and time."""
    filters = _filters(request)
    before = request.query_params.get("before", "")
    if before and not is_number(before):
        raise InvalidRequest(
            ("query:before", "not-an-integer"),
            sentence='Wrong address: "before" must be a whole number, 1 or more.',
        )
    snapshot = await stream_of(request).refresh()
    found = await services(request)[PageQueries].runs(
        RunFilter(
            job=filters.job or None,
            outcome=filters.outcome or None,
            server=filters.server or None,
            since=_moment("since", filters.since),
            until=_moment("until", filters.until),
        ),
        before=int(before) if before else None,
        limit=RUNS_ON_PAGE,
    )
    view = {
        **{name: text for name, text in filters._asdict().items() if name != "server"},
        "ran_on": filters.server,
        "runs": found.runs,
        "outcomes": list(Outcome),
        "servers": sorted({each["server"] for each in snapshot.instances} | found.servers()),
        "first": filters.query() if before else None,
        "next": None if found.next is None else filters.query(before=found.next),
        "searched": found.searched,
        "filtered": any(filters),
        "with_": lambda **more: filters._replace(**more).query(),
        "refresh_seconds": "" if before else LIST_REFRESH_SECONDS,
    }
    return respond(request, "run_list.html", view)


def _filters(request: Request) -> Filters:
    given = {name: request.query_params.get(name, "").strip() for name in Filters._fields}
    if given["job"] and not re.fullmatch(NAME_PATTERN, given["job"], re.ASCII):
        raise InvalidRequest(
            ("query:job", "not-a-name"), sentence='Wrong address: "job" must be the name of a job.'
        )
    if given["outcome"] and given["outcome"] not in {*Outcome, "running"}:
        raise InvalidRequest(("query:outcome", "not-an-outcome"))
    server = given["server"]
    if server and (len(server) > LONGEST_SERVER or not re.fullmatch(PRINTABLE_PATTERN, server)):
        raise InvalidRequest(
            ("query:server", "not-printable"),
            sentence="The name of an instance has at most 200 printable characters.",
        )
    return Filters(**given)


def _moment(name: str, text: str) -> datetime | None:
    """Return a moment in UTC, as it is written by people or by a browser's field."""
    if not text:
        return None
    try:
        return typed_moment(text)
    except ValueError:
        raise InvalidRequest((f"query:{name}", "not-a-time"), sentence=_NO_TIME) from None


@router.get("/runs/{run}")
async def show_run(request: Request, run: str) -> Response:
    """Show a run: when and why it ran, what it said, why it ended, and what came of its job."""
    run_id = _id(run)
    found = await services(request)[History].log(run_id)
    snapshot = await stream_of(request).refresh()
    attempts: list[dict[str, Any]] = await services(request)[PageQueries].attempts(run_id)
    place = next((index for index, each in enumerate(attempts) if each["id"] == run_id), None)
    if place is None:  # it was pruned just now
        raise RunNotFound(run_id)
    status = snapshot.jobs.get(found.run.job)
    under_way = found.run.outcome is None
    job = None if status is None else stream_of(request).fragments.job(found.run.job)
    is_latest = job is not None and job["fence"] == found.run.fence
    view = {
        **dict(found),
        "attempts": attempts,
        "number": found.run.attempt + 1,
        "of": attempts[-1]["attempt"] + 1 if len(attempts) - place <= ATTEMPTS_SHOWN else None,
        "resumed": attempts[place + 1] if place + 1 < len(attempts) else None,
        "before": attempts[place - 1] if place else None,
        "job": job,
        "checkpoint": (
            await services(request)[PageQueries].checkpoint(found.run.job)
            if under_way or is_latest
            else None
        ),
        "refresh_seconds": REFRESH_SECONDS if under_way else "",
    }
    return respond(request, "run.html", view)


@router.get("/jobs/{name}/runs/{run}")
async def show_run_of_job(request: Request, name: str, run: str) -> Response:
    """Lead to the run's own address."""
    found = await services(request)[History].log(_id(run))
    if found.run.job != name:
        raise RunNotFound(_id(run))
    return go_to(f"/runs/{found.run.id}")


def _id(run: str) -> int:
    if not is_number(run):
        raise InvalidRequest(("path:run", "not-an-integer"))
    return int(run)
