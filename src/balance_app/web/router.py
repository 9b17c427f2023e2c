"""The operator's page, at `/`: what every instance and job does, and users' balances.

It uses both features, which do not import it, and is complete without scripts: each button is
a form (`actions.py`, `movements.py`), each answer a page.
"""

from collections.abc import Mapping
from datetime import date
from secrets import token_urlsafe
from typing import Any, Final, NamedTuple, cast

from fastapi import APIRouter
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.routes import OPERATE
from balance_app.balances.accounts import AccountRepository
from balance_app.balances.ledger import LedgerRepository, Selection
from balance_app.errors import DatabaseUnavailable, InvalidRequest, NotFound, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.http.paging import cut_page
from balance_app.http.services import services
from balance_app.jobs.api.errors import JobNotFound, RunNotFound
from balance_app.jobs.api.history import History
from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.states import Outcome, State
from balance_app.web import charts, view_models
from balance_app.web.pages import (
    NO_USER,
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

RUNS_ON_PAGE: Final = 25
JOBS_ON_PAGE: Final = 100
ENTRIES_SHOWN: Final = 8
DAYS_SHOWN: Final = 5
DURATIONS_SHOWN: Final = 60
FIRST_USER: Final = "1"
STATES: Final = ("", *State, "overdue", "failed")


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
    """Send changes of the page, as events; `job` is for that job's own page."""
    return PageStreamResponse(
        stream_of(request),
        since=request.headers.get("last-event-id") or request.query_params.get("since"),
        job=request.query_params.get("job"),
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
    snapshot = await stream_of(request).refresh()
    query = request.query_params
    begin, after = query.get("name", "")[:63], query.get("after", "")
    state = query.get("state", "")
    names = [
        name
        for name, status in snapshot.jobs.items()
        if name > after
        and name.startswith(begin)
        and (
            state == status.summary.state
            or state not in STATES[1:]
            or (state == "overdue" and status.summary.overdue)
            or (state == "failed" and status.summary.failed)
        )
    ]
    shown, last = cut_page(names, JOBS_ON_PAGE)
    view = {
        "jobs": [_job(snapshot, name) for name in shown],
        "next": last,
        "name": begin,
        "state_is": state,
        "states": STATES,
    }
    return respond(request, "jobs.html", view)


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
        "back": "job" if came_from(request) == f"/jobs/{name}" else "",
    }
    return respond(request, "cancel.html", view)


@router.get("/jobs/{name}/forget")
async def confirm_forget(request: Request, name: str) -> Response:
    """Ask for confirmation before a job is forgotten."""
    job = _job(await stream_of(request).refresh(), name)
    return respond(request, "forget.html", {"job": job})


@router.get("/jobs/{name}/runs/{run}")
async def show_run(request: Request, name: str, run: str) -> Response:
    """Show what a run of a job said, and why it failed."""
    if not is_number(run):
        raise InvalidRequest(("path:run", "not-an-integer"))
    found = await services(request)[History].log(int(run))
    if found.run.job != name:
        raise RunNotFound(int(run))
    await stream_of(request).refresh()
    return respond(request, "run.html", dict(found))


# -- the overview ----------------------------------------------------------------------------


async def overview_page(
    request: Request,
    *,
    message: Message | None = None,
    attempt: ChangeAttempt | None = None,
    status: int = 200,
) -> Response:
    """Return the page at `/`, also with the outcome of an action."""
    stream = stream_of(request)
    status, headers = (attempt.status if attempt else status), None
    try:
        await stream.refresh()
    except (DatabaseUnavailable, Overloaded) as problem:
        if stream.fragments.snapshot is None:
            raise
        status, headers = problem.status, problem.headers
        message = Message(
            "bad",
            f"{sentence(problem, 'GET')} This page reconnects by itself. "
            "The last known state is below.",
        )
    snapshot = stream.fragments.snapshot
    assert snapshot is not None  # noqa: S101 - else it was raised
    now = snapshot.now.timestamp()
    form = attempt.form if attempt else request.query_params
    user = form.get("user", FIRST_USER)
    view = {
        "message": message or _job_message(request),
        "version": stream.version,
        "sections": stream.fragments.sections(now, buttons=may(request, OPERATE)),
        "shown": len(stream.fragments.shown),
        "hidden": len(snapshot.jobs) - len(stream.fragments.shown),
        "account": await _account(request, user),
        "changed": attempt.message if attempt else await _entry_message(request, user),
        "change": {
            "user": user,
            "what": form.get("what", "withdraw"),
            "amount": form.get("amount", ""),
            "key": form["key"] if attempt and attempt.keep_key else f"page-{token_urlsafe(16)}",
        },
    }
    return respond(request, "overview.html", view, status=status, headers=headers)


async def _account(request: Request, user: str) -> dict[str, Any]:
    """Return a user's balance, latest entries and days, or the sentence that says why not."""
    if not is_number(user):
        return {"requested": user[:20], "problem": NO_USER}
    before = request.query_params.get("before", "")
    upto = int(before) if is_number(before) else MAX_INTEGER
    try:
        account = await services(request)[AccountRepository].account(int(user))
        ledger = services(request)[LedgerRepository]
        entries = await ledger.entries(
            int(user), Selection(), after=upto, limit=ENTRIES_SHOWN + 1, descending=True
        )
        days = await ledger.daily_balances(int(user), before=date.max, limit=DAYS_SHOWN)
    except Problem as problem:
        return {"requested": user, "problem": sentence(problem, "GET")}
    shown, last = cut_page(entries, ENTRIES_SHOWN)
    return {
        "requested": user,
        "problem": None,
        "user": account.user_id,
        "balance": account.balance,
        "held": account.held,
        "available": account.available,
        "version": account.version,
        "entries": shown,
        "days": days,
        "older": None if last is None else last.version,
    }


async def _entry_message(request: Request, user: str) -> Message | None:
    """Report a change that was made, as the ledger has it."""
    version = request.query_params.get("entry", "")
    if not is_number(user) or not is_number(version):
        return None
    try:
        entry = await services(request)[LedgerRepository].past(int(user), version=int(version))
    except Problem:
        return None
    did = "added" if entry.amount > 0 else "withdrew"
    return Message(
        "good",
        f"Done: {did} {view_models.number(abs(entry.amount))}. "
        f"User {user} then had {view_models.number(entry.balance)}.",
    )


_MESSAGES: Final = {
    "run": "{} is ready to run: an instance claims it within a second or two.",
    "pause": "{} is paused: nothing starts it until it is resumed.",
    "resume": "{} is resumed: it runs at its next tick.",
    "schedule": "{} has the schedule that was set, on all instances.",
    "reset": "{} has the schedule that its code declares.",
    "cancel": "The run of {} is being cancelled: its instance reads that at its next heartbeat.",
    "cancel-late": (
        "Nothing was cancelled: the work of {} was done already. Its run has succeeded, and ends "
        "now."
    ),
}


def _job_message(request: Request) -> Message | None:
    did, job = request.query_params.get("did"), request.query_params.get("job", "")
    snapshot = stream_of(request).fragments.snapshot
    if did not in _MESSAGES or snapshot is None or job not in snapshot.jobs:
        return None
    return Message("good", _MESSAGES[did].format(job))


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
    with stream.keeping(name):
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
        "version": version,
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
