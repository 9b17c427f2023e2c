"""The operator's page, at `/`: what every instance and job does, and users' balances.

It uses both features, which do not import it, and is complete without scripts: each button is
a form (`actions.py`, `movements.py`), each answer a page.
"""

import re
from collections.abc import Mapping
from secrets import token_urlsafe
from typing import Any, Final, NamedTuple, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import APIRouter
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.routes import CHANGE, OPERATE
from balance_app.balances.ledger import LedgerRepository
from balance_app.errors import DatabaseUnavailable, InvalidRequest, NotFound, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.http.services import services
from balance_app.jobs.api.errors import JobNotFound
from balance_app.jobs.api.history import History
from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.states import Outcome
from balance_app.web import charts, view_models
from balance_app.web.fragments import View
from balance_app.web.job_list import STATES
from balance_app.web.pages import (
    Message,
    PageRoute,
    came_from,
    is_number,
    may,
    respond,
    sentence,
    stream_of,
)
from balance_app.web.queries import PageQueries
from balance_app.web.rendering import accepts_gzip, file
from balance_app.web.stream import PageStreamResponse
from balance_app.web.verdict import UNAVAILABLE

RUNS_ON_PAGE: Final = 25
DURATIONS_SHOWN: Final = 60
FIRST_USER: Final = "1"
# Parameters of an address that report what a form did.
_OF_MESSAGES: Final = frozenset({"did", "job", "entry", "user", "by", "back"})


class ChangeAttempt(NamedTuple):
    """A change of a balance that the form requested, and its outcome."""

    form: Mapping[str, str]
    message: Message
    status: int
    # its outcome is unknown: the form keeps its key, so that it is safe to send it again
    keep_key: bool = False


router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/")
async def show_overview(request: Request) -> Response:
    """Show the overview."""
    return await overview_page(request)


@router.get("/live")
async def watch(request: Request) -> Response:
    """Send changes of the page, as events; its query has what the page shows."""
    return PageStreamResponse(
        stream_of(request),
        since=request.headers.get("last-event-id") or request.query_params.get("since"),
        view=View.of(request.query_params),
        buttons=may(request, OPERATE),
        compress=accepts_gzip(request),
    )


@router.get("/static/{name}")
async def read_file(request: Request, name: str) -> Response:
    """Serve a file of the page."""
    found = file(request, name)
    if found is None:
        raise NotFound("There is no such file.")
    return found


@router.get("/jobs")
async def list_jobs(request: Request) -> Response:
    """List jobs by name and state, page by page."""
    return await jobs_page(request)


@router.get("/jobs/{name}")
async def show_job(request: Request, name: str) -> Response:
    """Show a job: what it does, what it did, how long it took, why it failed."""
    return await job_page(request, name)


@router.get("/jobs/{name}/cancel")
async def confirm_cancel(request: Request, name: str) -> Response:
    """Ask for confirmation before a run is cancelled: its work is lost."""
    job = _job(await stream_of(request).refresh(), name)
    view = {
        "job": job,
        "checkpoint": await _queries(request).checkpoint(name),
        "back": back_to(request),
    }
    return respond(request, "cancel.html", view)


@router.get("/jobs/{name}/forget")
async def confirm_forget(request: Request, name: str) -> Response:
    """Ask for confirmation before a job is forgotten."""
    job = _job(await stream_of(request).refresh(), name)
    return respond(request, "forget.html", {"job": job})


# -- the overview ----------------------------------------------------------------------------


async def overview_page(
    request: Request,
    *,
    message: Message | None = None,
    attempt: ChangeAttempt | None = None,
    status: int = 200,
    query: Mapping[str, str] | None = None,
) -> Response:
    """Return the page at `/`, also with the outcome of an action."""
    query = request.query_params if query is None else query
    view = View.of({**query, "page": "overview"})
    status, headers = (attempt.status if attempt else status), None
    try:
        shown = await _shown(request, view)
    except (DatabaseUnavailable, Overloaded) as problem:
        with stream_of(request).keeping(view):
            if not stream_of(request).keep_last():
                raise
            shown = _sections(request, view)
        # All of it is sent anew when the page is live.
        shown["stream"] = f"/live?{view.query()}"
        shown["sections"]["verdict"] = stream_of(request).fragments.unavailable()
        shown |= {"icon": UNAVAILABLE.level, "title": f"{UNAVAILABLE.title} · balance_app"}
        status, headers = problem.status, problem.headers
        message = Message(
            "bad",
            f"{sentence(problem, 'GET')} This page reconnects by itself. "
            "The last known state is below.",
            ends="live",
        )
    form = attempt.form if attempt else query
    user = form.get("user", FIRST_USER)
    return respond(
        request,
        "overview.html",
        {
            **shown,
            "message": message or _job_message(request),
            "span": view.span,
            "by_job": view.by_job,
            "changed": attempt.message if attempt else await _entry_message(request, user),
            "change": {
                "user": user,
                "amount": form.get("amount", "") if attempt else "",
                "key": form["key"] if attempt and attempt.keep_key else f"page-{token_urlsafe(16)}",
            },
        },
        status=status,
        headers=headers,
    )


async def _shown(request: Request, view: View) -> dict[str, Any]:
    """Return the lists of a view as they are now.

    Raises:
        DatabaseUnavailable: it can't be reached.
    """
    with stream_of(request).keeping(view):
        await stream_of(request).refresh()
        return _sections(request, view)


def _sections(request: Request, view: View) -> dict[str, Any]:
    stream = stream_of(request)
    snapshot, found = stream.fragments.snapshot, stream.fragments.job_list(view)
    assert snapshot is not None  # noqa: S101 - it was read
    now = snapshot.now.timestamp()
    return {
        "stream": f"/live?{view.query()}&since={stream.version}",
        "sections": stream.fragments.sections(view, now, buttons=may(request, OPERATE)),
        "jobs": view.jobs,
        "found": found,
        "known": len(snapshot.jobs),
        "states": STATES,
    }


async def jobs_page(
    request: Request,
    *,
    message: Message | None = None,
    status: int = 200,
    query: Mapping[str, str] | None = None,
) -> Response:
    """Return a page of the list of jobs, also with the outcome of an action."""
    query = request.query_params if query is None else query
    shown = await _shown(request, View.of({**query, "page": "jobs"}))
    view = {**shown, "message": message or _job_message(request)}
    return respond(request, "jobs.html", view, status=status)


def back_to(request: Request) -> str:
    """Return the page of jobs that a form was sent from: its path and query; else the overview."""
    path = came_from(request)
    if not re.fullmatch(r"/(jobs(/[a-z0-9-]+)?)?", path):
        return "/"
    sent = urlsplit(request.headers.get("referer", ""))
    kept = [(name, text) for name, text in parse_qsl(sent.query) if name not in _OF_MESSAGES]
    return path + (f"?{urlencode(kept)}" if kept else "")


async def page_at(
    request: Request, place: str, *, message: Message | None = None, status: int = 200
) -> Response:
    """Return the page of jobs at a place that `back_to` has returned, with a message."""
    path, _, query = place.partition("?")
    if path.startswith("/jobs/"):
        name = path.split("/")[2]
        return await job_page(request, name, message=message, status=status)
    page = jobs_page if path == "/jobs" else overview_page
    return await page(request, message=message, status=status, query=dict(parse_qsl(query)))


async def _entry_message(request: Request, user: str) -> Message | None:
    """Report a change that was made, as the ledger has it."""
    version = request.query_params.get("entry", "")
    if not is_number(user) or not is_number(version):
        return None
    try:
        entry = await services(request)[LedgerRepository].past(int(user), version=int(version))
    except Problem:
        return None
    did = "Added" if entry.amount > 0 else "Withdrew"
    return Message(
        "good",
        f"{did} {view_models.number(abs(entry.amount))}. "
        f"User {user} then had {view_models.number(entry.balance)}.",
        undo=(f"/users/{user}", {"do": "reverse", "entry": version})
        if may(request, CHANGE)
        else None,
    )


# What a form did, what the job's row then shows, and the form that undoes it.
_MESSAGES: Final = {
    "run": ("Queued {}. It starts within 2 seconds.", "running", None),
    "pause": ("Paused {}. It does not run until you resume it.", "paused", "resume"),
    "resume": ("Resumed {}. {}", "resumed", "pause"),
    "schedule": ("{} now runs {}, on all instances.", "", None),
    "reset": ("{} is back on its own schedule: {}.", "", None),
    "cancel": ("Cancelling {}. It stops within a few seconds.", "cancelled", None),
    "cancel-late": (
        "{} had already finished its work: the run succeeded and ends now. Nothing was lost.",
        "cancelled",
        None,
    ),
}


_DISMISSED: Final = {
    "gone": "The instance is off the list. Its runs stay in the history.",
    "recovered": "What has recovered is off the page.",
}


def _job_message(request: Request) -> Message | None:
    did, name = request.query_params.get("did"), request.query_params.get("job", "")
    if did in _DISMISSED:
        return Message("good", _DISMISSED[did], toast=":")
    fragments = stream_of(request).fragments
    job = fragments.job(name)
    if did not in _MESSAGES or job is None:
        return None
    text, expected, undo = _MESSAGES[did]
    more = job["schedule"]["words"]
    if did == "resume":
        more = f"The next run is at {view_models.exact(job['readyAt'])}."
    return Message(
        "good",
        text.format(name, more),
        toast=f"{name}:{expected}",
        undo=None if undo is None else (f"/jobs/{name}/{undo}", {"by": "page"}),
    )


# -- one job ---------------------------------------------------------------------------------


async def job_page(
    request: Request, name: str, *, message: Message | None = None, status: int = 200
) -> Response:
    """Return a job's own page.

    Raises:
        JobNotFound: there is no such job.
        InvalidRequest: `outcome` or `before` in the query is invalid.
    """
    stream, queries = stream_of(request), _queries(request)
    history = services(request)[History]
    outcome, before = (request.query_params.get(field) for field in ("outcome", "before"))
    if outcome is not None and outcome not in set(Outcome):
        raise InvalidRequest(("query:outcome", "not-an-outcome"))
    if before is not None and not is_number(before):
        raise InvalidRequest(("query:before", "not-an-integer"))
    with stream.keeping(View("job", job=name)):
        snapshot = await stream.refresh()
        now = snapshot.now.timestamp()
        forgotten = services(request)[StatusReader].forgotten(name)
        if forgotten is None:
            job = _job(snapshot, name)
            row = stream.fragments.row(name, now, buttons=may(request, OPERATE))
            version = stream.version
    page = await history.page(
        job=name,
        outcome=outcome,
        before=int(before) if before else MAX_INTEGER,
        limit=RUNS_ON_PAGE,
    )
    view: dict[str, object] = {
        "name": name,
        "durations": charts.durations(await queries.last_runs(name, DURATIONS_SHOWN), now),
        "outcomes": list(Outcome),
        "outcome": Outcome(outcome) if outcome else None,
        "before": before,
        "runs": page.runs,
        "next": page.next,
    }
    if forgotten is not None:
        return respond(request, "forgotten.html", {**view, "forgotten": forgotten})
    view |= {
        "message": message or _job_message(request),
        "stream": f"/live?job={name}&since={version}",
        "job": job,
        "row": row,
        "checkpoint": await queries.checkpoint(name),
    }
    return respond(request, "job.html", view, status=status)


def _job(snapshot: StatusSnapshot, name: str) -> view_models.Job:
    status = snapshot.jobs.get(name)
    if status is None:
        raise JobNotFound(name)
    return cast("view_models.Job", from_json(status.text))


def _queries(request: Request) -> PageQueries:
    return services(request)[PageQueries]
