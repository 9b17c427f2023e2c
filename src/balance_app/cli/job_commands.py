"""The commands for the jobs of a running service; `job_session` executes them."""

from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from balance_app.cli.remote import (
    By,
    Command,
    Json,
    Limit,
    Url,
    credential_for,
    fail,
    login_name,
    open_session,
    service_url,
)
from balance_app.states import Outcome

if TYPE_CHECKING:
    from balance_app.cli.job_session import JobSession

job_commands = typer.Typer()
_job = partial(job_commands.command, cls=Command, rich_help_panel="Jobs of a running service")


def _complete_job(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the jobs of the service; none when it is unavailable."""
    from balance_app.cli.job_session import job_names  # noqa: PLC0415 - slow to import

    with suppress(Exception):
        url = ctx.params.get("url") or ctx.find_root().params.get("url")
        names = job_names(service_url(url), credential_for(url))
        return [(name, summary) for name, summary in names if name.startswith(incomplete)]
    return []


JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="as `status` shows it", autocompletion=_complete_job)
]


@_job()
def status(
    *,
    search: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="only jobs whose name contains this"),
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention", "-a", help="only jobs that need attention")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="keep it up to date, until Ctrl-C")
    ] = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show whether all is well, what every job is doing, where, and why the rest waits.

    The first line is the verdict. Exit code 0: all is well; 6: something has recovered by itself
    within 15 minutes; 7: something needs a hand, also if it is the database.
    """
    if watch and (search is not None or attention):
        raise typer.BadParameter("it shows all jobs.", param_hint="--watch")
    with _open(url, as_json=json) as session:
        if watch:
            session.watch()
        else:
            raise typer.Exit(session.status(search, attention=attention))


@_job()
def history(  # noqa: PLR0913 - each is an option
    *,
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="runs of this job", autocompletion=_complete_job),
    ] = None,
    outcome: Annotated[Outcome | None, typer.Option(help="runs with this outcome")] = None,
    before: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="runs before N, which the page before prints"),
    ] = None,
    limit: Limit = 20,
    log: Annotated[
        bool, typer.Option("--log", help="show the log and the error of the latest of them")
    ] = False,
    run: Annotated[
        int | None, typer.Option("--run", min=1, metavar="ID", help="with --log: of this run")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show every run and its outcome, the latest first; or the log of one."""
    if run is not None and not log:
        raise typer.BadParameter("it needs --log.", param_hint="--run")
    with _open(url, as_json=json) as session:
        if log:
            session.log(job, outcome, before, run)
        else:
            session.history(job, outcome, before, limit)


@_job()
def run(  # noqa: PLR0913 - each is an option
    job: JobName,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="wait until it ends; exit code 1 unless it succeeds")
    ] = False,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="replace a declared argument for this run: JSON, otherwise text; repeatable",
        ),
    ] = None,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Run a job now."""
    args = dict(_argument(each) for each in arg or ())
    with _open(url, as_json=json) as session:
        if wait:
            raise typer.Exit(session.run_and_wait(job, by=by or login_name(), args=args))
        session.control("run", job, by=by or login_name(), args=args)


@_job()
def pause(
    job: JobName,
    *,
    reason: Annotated[
        str | None, typer.Option(metavar="WHY", help="why, for people to read")
    ] = None,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Keep a job from starting; a run under way goes on to its end."""
    with _open(url, as_json=json) as session:
        session.control("pause", job, by=by or login_name(), reason=reason)


@_job()
def resume(job: JobName, *, by: By = None, json: Json = False, url: Url = None) -> None:
    """Resume a paused job: it runs at its next tick."""
    with _open(url, as_json=json) as session:
        session.control("resume", job, by=by or login_name())


@_job()
def cancel(job: JobName, *, by: By = None, json: Json = False, url: Url = None) -> None:
    """End a job's run, whichever instance it is on."""
    with _open(url, as_json=json) as session:
        session.control("cancel", job, by=by or login_name())


@_job()
def schedule(  # noqa: PLR0913 - each is an option
    job: JobName,
    *,
    every: Annotated[
        int | None, typer.Option(metavar="SECONDS", help="set it to this interval")
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(metavar="EXPRESSION", help="set it to five fields as in crontab(5)"),
    ] = None,
    tz: Annotated[
        str | None, typer.Option(metavar="ZONE", help="of --cron, if not UTC: Europe/Berlin")
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="go back to the schedule in the code")
    ] = False,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show when a job is due, or set it: at once, on all instances, until it is reset."""
    if sum((every is not None, cron is not None, reset)) > 1:
        raise typer.BadParameter("give only one of --every, --cron and --reset")
    if tz is not None and cron is None:
        raise typer.BadParameter("--tz has a meaning only with --cron")
    request: dict[str, object] = {"everySeconds": every, "cron": cron, "tz": tz}
    given = {name: value for name, value in request.items() if value is not None}
    with _open(url, as_json=json) as session:
        if given or reset:
            session.set_schedule(job, None if reset else given, by=by or login_name())
        else:
            session.show_schedule(job)


@_job()
def dismiss(
    server: Annotated[
        str, typer.Argument(metavar="INSTANCE", help="its name, or `recovered` for what is amber")
    ],
    *,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Stop listing an instance that is gone against its will; its runs stay in the history."""
    with _open(url, as_json=json) as session:
        session.dismiss(server, by=by or login_name())


@_job()
def forget(
    job: JobName,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask for confirmation")] = False,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Remove a job without code from all lists; its history stays."""
    if not yes and not typer.confirm(
        f"Forget {job}? It is removed from all lists; its history stays.", err=True
    ):
        fail("Not done.")
    with _open(url, as_json=json) as session:
        session.forget(job, by=by or login_name())


# -- shared ------------------------------------------------------------------------------------


def _open(url: str | None, *, as_json: bool) -> "AbstractContextManager[JobSession]":
    from balance_app.cli.job_session import JobSession  # noqa: PLC0415 - slow to import

    return open_session(JobSession, url, as_json=as_json)


def _argument(text: str) -> tuple[str, Any]:
    from pydantic_core import from_json  # noqa: PLC0415 - nothing else waits for it

    name, equals, value = text.partition("=")
    if not (name and equals):
        fail(f"--arg {text}: write NAME=VALUE.", code=2)
    try:
        return name, from_json(value, allow_inf_nan=False)
    except ValueError:
        return name, value
