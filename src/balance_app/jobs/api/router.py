"""The routes of jobs; an instance that runs no jobs has them too."""

from typing import Any, Final

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from balance_app.access.errors import TooManyRequests
from balance_app.errors import InvalidRequest
from balance_app.http.body import BODY_PROBLEMS, has_body, read_json
from balance_app.http.openapi import json_request, problems
from balance_app.http.params import ONCE, WhoQuery, name_of
from balance_app.http.services import services
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.errors import (
    InstanceLive,
    InstanceNotFound,
    InvalidArguments,
    JobHasCode,
    JobNotFound,
    JobNotRunning,
    JobPaused,
    JobRequested,
    JobRunning,
    JobWithoutCode,
    RunNotFound,
)
from balance_app.jobs.api.events import EventBroadcaster, EventStreamResponse
from balance_app.jobs.api.history import History
from balance_app.jobs.api.schemas import (
    DismissedAnswer,
    ForgottenAnswer,
    HistoryAnswer,
    InstancePath,
    JobAnswer,
    PageQuery,
    PathName,
    PauseQuery,
    RunId,
    RunLogAnswer,
    RunRequest,
    ScheduleRequest,
    StatusAnswer,
    VerdictAnswer,
)
from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.api.verdict_reader import RECOVERED, VerdictReader
from balance_app.jobs.scheduler import Scheduler

router = APIRouter(prefix="/api/cron", tags=["jobs"])
verdict_router = APIRouter(prefix="/api/verdict", tags=["jobs"])

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
    summary="List all jobs",
    response_description="Every job and every instance.",
    response_model=StatusAnswer,
    responses=problems(),
)
async def read_status(request: Request) -> Response:
    """Show the state of every job: where it runs and for how long, or why it waits.

    The answer is one snapshot; durations are by the database's clock.
    """
    status_reader = services(request)[StatusReader]
    return _json((await status_reader.read()).text)


@router.get(
    "/events",
    summary="Stream the status",
    response_description="Events (Server-Sent Events), until the client disconnects.",
    response_class=StreamingResponse,
    responses={**problems(TooManyRequests), **_EVENTS},
)
async def watch_status(request: Request) -> Response:
    """Send the status now and every second, as events.

    `status` carries the answer of `/api/cron/status`. `unavailable` carries a problem while the
    database can't be queried; the stream stays open and recovers by itself.
    """
    return EventStreamResponse(services(request)[EventBroadcaster])


@router.get(
    "/history",
    summary="List runs",
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


@router.get(
    "/runs/{run}/log",
    summary="Read the log of a run",
    response_description="Its lines, and the traceback of its failure.",
    response_model=RunLogAnswer,
    responses=problems(RunNotFound, InvalidRequest),
)
async def read_log(request: Request, run: RunId) -> Response:
    """Show the last lines of a run's log, and the traceback if it failed.

    They are written with each heartbeat: of a run that goes on there are those up to the last one,
    and of one whose process was killed as well. Ticks that did not run have no lines.
    """
    found = await services(request)[History].log(run)
    return _json(found.model_dump_json(by_alias=True).encode())


@router.post(
    "/jobs/{name}/run",
    summary="Run a job now",
    response_description="The run is queued; an instance starts it within 2 seconds.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(
        *(JobNotFound, JobRunning, JobPaused, JobRequested, JobWithoutCode),
        *(InvalidArguments, *BODY_PROBLEMS),
    ),
    dependencies=[ONCE],
    openapi_extra=json_request(RunRequest, required=False),
)
async def run_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Make a job ready now; after the run its schedule continues with the next tick.

    If a tick is due already, or waits for a retry, the run is of that tick. A body with `args`
    replaces declared arguments for this run.
    """
    args = (await read_json(request, RunRequest, key=None)).args if has_body(request) else None
    return _steered(request, await _controls(request).run(name, name_of(request, who.by), args))


@router.post(
    "/jobs/{name}/pause",
    summary="Pause a job",
    response_description="The job is paused.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(JobNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def pause_job(request: Request, name: PathName, pause: PauseQuery) -> Response:
    """Keep a job from starting; a run in progress continues to its end.

    Pausing a paused job changes nothing.
    """
    return _steered(
        request, await _controls(request).pause(name, name_of(request, pause.by), pause.reason)
    )


@router.post(
    "/jobs/{name}/resume",
    summary="Resume a job",
    response_description="The job is not paused.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(JobNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def resume_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Let a paused job run again from its next tick; missed ticks are in the history.

    Resuming a job that is not paused changes nothing.
    """
    return _steered(request, await _controls(request).resume(name, name_of(request, who.by)))


@router.post(
    "/jobs/{name}/cancel",
    summary="Cancel a run",
    response_description="The instance that runs the job gets the request with its next heartbeat.",
    status_code=202,
    response_model=JobAnswer,
    responses=problems(JobNotFound, JobNotRunning, InvalidRequest),
    dependencies=[ONCE],
)
async def cancel_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Request a job's run to stop; its instance receives the request within one heartbeat.

    If the answer has a `workEndedAt`, the run's work is done: the run still succeeds, and ends now
    instead of after its minimum duration.
    """
    return _steered(request, await _controls(request).cancel(name, name_of(request, who.by)))


@router.put(
    "/jobs/{name}/schedule",
    summary="Set a job's schedule",
    response_description="The job has this schedule.",
    response_model=JobAnswer,
    responses=problems(JobNotFound, *BODY_PROBLEMS),
    openapi_extra=json_request(ScheduleRequest),
    dependencies=[ONCE],
)
async def set_schedule(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Let a job have another schedule than its code declares: an interval, or a cron expression.

    It takes effect at once, on all instances, and stays through restarts and deploys. A tick ahead
    gives way to the first one of the new schedule; a tick that is due already, or runs, stays.
    Setting the schedule that was set already changes nothing.
    """
    body = await read_json(request, ScheduleRequest, key=None)
    return _steered(
        request,
        await _controls(request).set_schedule(name, name_of(request, who.by), body),
        status=200,
    )


@router.delete(
    "/jobs/{name}/schedule",
    summary="Reset a job's schedule",
    response_description="The job has the schedule that its code declares.",
    response_model=JobAnswer,
    responses=problems(JobNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def reset_schedule(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Let a job have the schedule again that its code declares, in the same way.

    Resetting a schedule that was not set changes nothing.
    """
    return _steered(
        request,
        await _controls(request).set_schedule(name, name_of(request, who.by), None),
        status=200,
    )


@router.post(
    "/jobs/{name}/forget",
    summary="Forget a job",
    response_description="The job is no longer listed.",
    response_model=ForgottenAnswer,
    responses=problems(JobNotFound, JobRunning, JobHasCode, InvalidRequest),
    dependencies=[ONCE],
)
async def forget_job(request: Request, name: PathName, who: WhoQuery) -> Response:
    """Stop listing a job whose code no running instance has; its history can still be read.

    Forgetting a forgotten job changes nothing. If code declares it again, it starts fresh.
    """
    forgotten = await _controls(request).forget(name, name_of(request, who.by))
    answer = {"name": name, "forgottenAt": forgotten.at, "forgottenBy": forgotten.by}
    return _json(to_json(answer))


@router.post(
    "/instances/{instance}/dismiss",
    summary="Dismiss an instance",
    response_description="The instance is no longer listed.",
    response_model=DismissedAnswer,
    responses=problems(InstanceNotFound, InstanceLive, InvalidRequest),
    dependencies=[ONCE],
)
async def dismiss_instance(request: Request, instance: InstancePath, who: WhoQuery) -> Response:
    """Stop listing an instance that is gone against its will; its runs stay in the history.

    If it sends a heartbeat again, it is listed again.
    """
    server = await _controls(request).dismiss(instance, name_of(request, who.by))
    return _json(to_json({"dismissed": server}))


@verdict_router.get(
    "",
    summary="Read the verdict",
    response_description="Whether all is well.",
    response_model=VerdictAnswer,
    responses=problems(),
)
async def read_verdict(request: Request) -> Response:
    """Show whether all is well, in one sentence, and what mends what is not.

    Red is wrong now and needs a hand; amber has healed by itself within 15 minutes. While the
    database is unavailable the verdict is red, too.
    """
    return _json(to_json((await services(request)[VerdictReader].read()).body()))


@verdict_router.post(
    "/dismiss",
    summary="Dismiss what has recovered",
    response_description="The verdict no longer names it.",
    response_model=DismissedAnswer,
    responses=problems(InvalidRequest),
    dependencies=[ONCE],
)
async def dismiss_recovered(request: Request, who: WhoQuery) -> Response:
    """Dismiss the amber causes so far; those that come later are named."""
    await _controls(request).dismiss_recovered(name_of(request, who.by))
    return _json(to_json({"dismissed": RECOVERED}))


def wake(request: Request) -> None:
    """Let this instance's scheduler try to claim a job now."""
    if (scheduler := services(request).get(Scheduler)) is not None:
        scheduler.wake()


def _controls(request: Request) -> Controls:
    return services(request)[Controls]


def _steered(request: Request, job: bytes, *, status: int = 202) -> Response:
    """Respond with the job; this instance tries a claim at once, others by polling."""
    wake(request)
    return _json(job, status=status)


def _json(text: bytes, *, status: int = 200) -> Response:
    return Response(
        text,
        status_code=status,
        headers={"Cache-Control": "no-store"},
        media_type="application/json",
    )
