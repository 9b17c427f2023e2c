"""The routes of jobs; an instance that runs none itself has them all the same."""

from typing import Any, Final

from fastapi import APIRouter, Depends
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from balance_app.errors import InvalidRequest
from balance_app.http.openapi import problems
from balance_app.http.params import ONCE
from balance_app.http.services import services
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.errors import (
    CrossSiteRequest,
    JobHasCode,
    JobNotFound,
    JobNotRunning,
    JobPaused,
    JobRunning,
    JobWithoutCode,
)
from balance_app.jobs.api.events import EventBroadcaster, EventStreamResponse
from balance_app.jobs.api.history import History
from balance_app.jobs.api.schemas import (
    ForgottenAnswer,
    HistoryAnswer,
    JobAnswer,
    PageQuery,
    PathName,
    PauseQuery,
    StatusAnswer,
    WhoQuery,
)
from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.scheduler import Scheduler

router = APIRouter(prefix="/api/cron", tags=["jobs"])

_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "required": ["event", "data"],
                    "properties": {
                        "event": {"type": "string", "enum": ["status", "unavailable"]},
                        "id": {"type": "string"},
                        "retry": {"type": "integer", "minimum": 0},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {
                                "anyOf": [
                                    {"$ref": "#/components/schemas/StatusAnswer"},
                                    {"$ref": "#/components/schemas/Problem"},
                                ]
                            },
                        },
                    },
                },
                "example": (
                    'event: status\ndata: {"now":"2026-11-21T21:49:33.940623Z","counts":'
                    '{"running":4,"waiting":5,"paused":1,"overdue":0},"instances":[],"jobs":[]}\n'
                    "id: 2026-11-21T21:49:33.940623+00:00\n\n"
                ),
            }
        }
    }
}


@router.get(
    "/status",
    summary="See every job",
    response_description="Every job and every instance.",
    response_model=StatusAnswer,
    responses=problems(),
)
async def read_status(request: Request) -> Response:
    """Show what every job is doing, where, for how long, and why it waits if it does.

    All of it is one snapshot; durations are by the database's clock.
    """
    status_reader = services(request)[StatusReader]
    return _json((await status_reader.read()).text)


@router.get(
    "/events",
    summary="Watch every job",
    response_description="Events (Server-Sent Events), until the client has seen enough.",
    response_class=StreamingResponse,
    responses={**problems(), **_EVENTS},
)
async def watch_status(request: Request) -> Response:
    """Send the status now and every second, as events.

    `status` carries what `/api/cron/status` answers. `unavailable` carries a problem while the
    database can't be asked; the stream goes on by itself.
    """
    return EventStreamResponse(services(request)[EventBroadcaster])


@router.get(
    "/history",
    summary="Read the history",
    response_description="One page of runs.",
    response_model=HistoryAnswer,
    responses=problems(JobNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def read_history(request: Request, page: PageQuery) -> Response:
    """List runs, the latest first; `next` is the `before` of the following page."""
    history = services(request)[History]
    found = await history.page(
        job=page.job, outcome=page.outcome, before=page.before, limit=page.limit
    )
    return _json(found.model_dump_json(by_alias=True).encode())


async def refuse_other_sites(request: Request) -> None:
    """Refuse what a page of another site sends: a request without a body needs no leave to go."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    # Browsers say nothing of the site where there is no TLS, but of the origin.
    own = f"://{request.headers.get('host')}"
    if (
        site not in {"same-origin", "none"}
        if site is not None
        else origin is not None and not origin.endswith(own)
    ):
        raise CrossSiteRequest


_own_site = Depends(refuse_other_sites)


@router.post(
    "/jobs/{name}/run",
    summary="Run a job now",
    response_description="The job is ready; an instance takes it.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(
        CrossSiteRequest, JobNotFound, JobRunning, JobPaused, JobWithoutCode, InvalidRequest
    ),
    dependencies=[_own_site, ONCE],
)
async def run_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Make a job ready now; its schedule goes on with the next tick after the run.

    A tick that is due already is what runs then, also if it was to be tried again later.
    """
    return _steered(request, await _controls(request).run(name, who.by))


@router.post(
    "/jobs/{name}/pause",
    summary="Pause a job",
    response_description="The job is paused.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(CrossSiteRequest, JobNotFound, InvalidRequest),
    dependencies=[_own_site, ONCE],
)
async def pause_job(request: Request, name: PathName, pause: PauseQuery) -> Response:
    """Keep a job from starting; a run under way goes on to its end.

    Pausing a paused job changes nothing.
    """
    return _steered(request, await _controls(request).pause(name, pause.by, pause.reason))


@router.post(
    "/jobs/{name}/resume",
    summary="Resume a job",
    response_description="The job is not paused.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(CrossSiteRequest, JobNotFound, InvalidRequest),
    dependencies=[_own_site, ONCE],
)
async def resume_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Let a paused job go on with its next tick; those that it missed are in the history.

    Resuming a job that is not paused changes nothing.
    """
    return _steered(request, await _controls(request).resume(name, who.by))


@router.post(
    "/jobs/{name}/cancel",
    summary="Cancel a run",
    response_description="The instance that runs the job gets the request with its next heartbeat.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(CrossSiteRequest, JobNotFound, JobNotRunning, InvalidRequest),
    dependencies=[_own_site, ONCE],
)
async def cancel_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """End a job's run on whichever instance it is, within one heartbeat.

    If the answer has a `workEndedAt`, the run's work was done already: it has succeeded, and only
    ends now, before its minimum duration is over.
    """
    return _steered(request, await _controls(request).cancel(name, who.by))


@router.post(
    "/jobs/{name}/forget",
    summary="Forget a job",
    response_description="The job is off all lists.",
    response_model=ForgottenAnswer,
    responses=problems(CrossSiteRequest, JobNotFound, JobRunning, JobHasCode, InvalidRequest),
    dependencies=[_own_site, ONCE],
)
async def forget_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Take a job off all lists whose code no live instance has; its history can still be read.

    Forgetting a forgotten job changes nothing. Code that declares it again begins it anew.
    """
    forgotten = await _controls(request).forget(name, who.by)
    answer = {"name": name, "forgottenAt": forgotten.at, "forgottenBy": forgotten.by}
    return _json(to_json(answer))


def wake(request: Request) -> None:
    """Let this instance's scheduler try to claim a job now."""
    if (scheduler := services(request).get(Scheduler)) is not None:
        scheduler.wake()


def _controls(request: Request) -> Controls:
    return services(request)[Controls]


def _steered(request: Request, job: bytes) -> Response:
    """Answer with the job; this instance tries to claim at once, others soon."""
    wake(request)
    return _json(job, status=202)


def _json(text: bytes, *, status: int = 200) -> Response:
    return Response(
        text,
        status_code=status,
        headers={"Cache-Control": "no-store"},
        media_type="application/json",
    )
