"""The forms that control jobs."""

import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast
from urllib.parse import urlencode

from fastapi import APIRouter
from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.errors import DatabaseUnavailable, InvalidRequest, Overloaded, Problem
from balance_app.http.body import parse_json
from balance_app.http.params import name_of
from balance_app.http.services import services
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.errors import JobNotFound
from balance_app.jobs.api.router import wake
from balance_app.jobs.api.schemas import NAME_PATTERN, Pause, RunRequest, ScheduleRequest
from balance_app.web.forms import go_to, read_form, who
from balance_app.web.pages import Message, PageRoute, is_number
from balance_app.web.router import back_to, page_at

_NO_SCHEDULE: Final = "Enter either an interval or a cron expression (the time zone is optional)."
_NO_INTERVAL: Final = "The interval must be a whole number of seconds, 1 or more."


class JobForm(Pause):
    """The fields of the forms that control a job."""

    args: str | None = None
    every: str | None = None
    cron: str | None = None
    tz: str | None = None

    def arguments(self) -> dict[str, Any] | None:
        """Return what to run the job with.

        Raises:
            MalformedRequest: it is not JSON.
            InvalidRequest: it is not a JSON object.
        """
        if self.args is None:
            return None
        return parse_json(b'{"args":%b}' % self.args.encode(), RunRequest).args

    def schedule(self) -> ScheduleRequest:
        """Return the schedule to set.

        Raises:
            InvalidRequest: there is none, or two, or the interval is no number.
        """
        given = {"cron": self.cron, "tz": self.tz}
        fields: dict[str, object] = {name: text for name, text in given.items() if text}
        if (self.every is None) == (self.cron is None) or (self.tz and not self.cron):
            raise InvalidRequest(("", "not-one-schedule"), sentence=_NO_SCHEDULE)
        if self.every is not None:
            seconds = re.sub(r"\s", "", self.every)
            if not is_number(seconds):
                raise InvalidRequest(("/every", "not-an-integer"), sentence=_NO_INTERVAL)
            fields["everySeconds"] = int(seconds)
        return parse_json(to_json(fields), ScheduleRequest)


Action = Callable[[Controls, JobForm], Coroutine[Any, Any, object]]

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.post("/jobs/{name}/run")
async def run_job(request: Request, name: str) -> Response:
    """Make a job ready now."""
    return await _control(
        request, name, "run", lambda on, form: on.run(name, form.by, form.arguments())
    )


@router.post("/jobs/{name}/pause")
async def pause_job(request: Request, name: str) -> Response:
    """Keep a job from starting."""
    return await _control(
        request, name, "pause", lambda on, form: on.pause(name, form.by, form.reason)
    )


@router.post("/jobs/{name}/resume")
async def resume_job(request: Request, name: str) -> Response:
    """Resume a paused job."""
    return await _control(request, name, "resume", lambda on, form: on.resume(name, form.by))


@router.post("/jobs/{name}/cancel")
async def cancel_job(request: Request, name: str) -> Response:
    """End a job's run."""
    return await _control(request, name, "cancel", lambda on, form: on.cancel(name, form.by))


@router.post("/jobs/{name}/schedule")
async def set_schedule(request: Request, name: str) -> Response:
    """Override a job's schedule."""
    return await _control(
        request, name, "schedule", lambda on, form: on.set_schedule(name, form.by, form.schedule())
    )


@router.post("/jobs/{name}/schedule/reset")
async def reset_schedule(request: Request, name: str) -> Response:
    """Reset a job's schedule to what its code declares."""
    return await _control(
        request, name, "reset", lambda on, form: on.set_schedule(name, form.by, None)
    )


@router.post("/jobs/{name}/forget")
async def forget_job(request: Request, name: str) -> Response:
    """Take a job off all lists, and go to its page, which has its history."""
    return await _control(request, name, "forget", lambda on, form: on.forget(name, form.by))


@router.post("/instances/{instance}/dismiss")
async def dismiss_instance(request: Request, instance: str) -> Response:
    """Take an instance that is gone off the page."""
    return await _dismiss(request, "gone", lambda on, by: on.dismiss(instance, by))


@router.post("/verdict/dismiss")
async def dismiss_recovered(request: Request) -> Response:
    """Take what has recovered off the verdict."""
    return await _dismiss(request, "recovered", lambda on, by: on.dismiss_recovered(by))


async def _dismiss(
    request: Request, what: str, action: Callable[[Controls, str], Coroutine[Any, Any, object]]
) -> Response:
    by = name_of(request, who(await read_form(request)))
    await action(services(request)[Controls], by)
    wake(request)
    return _go_back(back_to(request), did=what)


def _go_back(place: str, *, anchor: str = "", **did: str) -> Response:
    """Lead to a page of jobs, which reports what was done."""
    return go_to(f"{place}{'&' if '?' in place else '?'}{urlencode(did)}{anchor}")


async def _control(request: Request, name: str, what: str, action: Action) -> Response:
    """Do something to a job, and go back to the page that has the button."""
    form = await read_form(request)
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise JobNotFound(name)
    given = form.pop("back", "")
    if given == "job":  # a page of the release before
        given = f"/jobs/{name}"
    place = given if is_place(given, name) else back_to(request)
    try:
        fields = JobForm.model_validate({field: text for field, text in form.items() if text})
    except ValidationError as error:
        field = error.errors(include_url=False, include_input=False)[0]["loc"][0]
        raise InvalidRequest((f"/{field}", "not-printable")) from None
    fields.by = name_of(request, fields.by)
    try:
        done = await action(services(request)[Controls], fields)
    except (DatabaseUnavailable, Overloaded, JobNotFound):
        raise
    except Problem as problem:
        message = Message("bad", f"Not done. {problem.detail}", toast=f"{name}:")
        return await page_at(request, place, message=message, status=problem.status)
    wake(request)
    if what == "cancel" and from_json(cast("bytes", done))["workEndedAt"] is not None:
        what = "cancel-late"
    return _go_back(place, did=what, job=name, anchor=f"#job-{name}")


def is_place(place: str, name: str) -> bool:
    """Say whether a form may lead there: to the overview, to a list of jobs, to its job's page."""
    return re.fullmatch(rf"/(jobs(/{re.escape(name)})?)?(\?[!-~]*)?", place) is not None
