"""The commands for a running service; `session` executes them."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand
from typing_extensions import override

from balance_app.formatting import url as address
from balance_app.settings import Settings, load_settings
from balance_app.states import Outcome

if TYPE_CHECKING:
    from balance_app.cli.session import Terminal


def without_types(params: list[Any]) -> list[Any]:
    """Return parameters; the help shows flags without a type."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help shows flags without a type."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))


remote_commands = typer.Typer()
# the options that were given before the command's name
global_options: dict[str, Any] = {}
_jobs = partial(remote_commands.command, cls=Command, rich_help_panel="Jobs of a running service")
_balances = partial(
    remote_commands.command, cls=Command, rich_help_panel="Balances of a running service"
)


def _complete_job(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the jobs of the service; none when it is unavailable."""
    from balance_app.cli.session import job_names  # noqa: PLC0415 - slow, and only needed here

    with suppress(Exception):
        names = job_names(_service_url(ctx.params.get("url") or ctx.find_root().params.get("url")))
        return [(name, summary) for name, summary in names if name.startswith(incomplete)]
    return []


Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="where the service is; by default BALANCE_APP_URL, or this machine (HOST, PORT)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print the service's own JSON")]
JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="as `status` shows it", autocompletion=_complete_job)
]
UserId = Annotated[int, typer.Argument(metavar="USER", help="the user's id")]
By = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="who requests it, for people to read; by default your login"),
]
Limit = Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="at most so many")]


# -- jobs --------------------------------------------------------------------------------------


@_jobs()
def status(
    *,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="keep it up to date, until Ctrl-C")
    ] = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show what every job is doing, where, and why the rest waits."""
    with _open_terminal(url, as_json=json) as terminal:
        (terminal.watch if watch else terminal.status)()


@_jobs()
def history(  # noqa: PLR0913 - each is an option
    *,
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="only of this job", autocompletion=_complete_job),
    ] = None,
    outcome: Annotated[Outcome | None, typer.Option(help="only with this outcome")] = None,
    before: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="only runs before N, as the last page prints it"),
    ] = None,
    limit: Limit = 20,
    log: Annotated[
        bool, typer.Option("--log", help="show what the last of them said instead, and its error")
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
    with _open_terminal(url, as_json=json) as terminal:
        if log:
            terminal.log(job, outcome, before, run)
        else:
            terminal.history(job, outcome, before, limit)


@_jobs()
def run(  # noqa: PLR0913 - each is an option
    job: JobName,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="wait for its end; exit code 1 unless it succeeds")
    ] = False,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="replace a declared argument for this run; JSON, or text that is none; repeatable",
        ),
    ] = None,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Run a job now."""
    args = dict(_argument(each) for each in arg or ())
    with _open_terminal(url, as_json=json) as terminal:
        if wait:
            raise typer.Exit(terminal.run_and_wait(job, by=by or _login_name(), args=args))
        terminal.control("run", job, by=by or _login_name(), args=args)


@_jobs()
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
    with _open_terminal(url, as_json=json) as terminal:
        terminal.control("pause", job, by=by or _login_name(), reason=reason)


@_jobs()
def resume(job: JobName, *, by: By = None, json: Json = False, url: Url = None) -> None:
    """Resume a paused job: it runs at its next tick."""
    with _open_terminal(url, as_json=json) as terminal:
        terminal.control("resume", job, by=by or _login_name())


@_jobs()
def cancel(job: JobName, *, by: By = None, json: Json = False, url: Url = None) -> None:
    """End a job's run, whichever instance it is on."""
    with _open_terminal(url, as_json=json) as terminal:
        terminal.control("cancel", job, by=by or _login_name())


@_jobs()
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
        bool, typer.Option("--reset", help="set it back to what its code declares")
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
    with _open_terminal(url, as_json=json) as terminal:
        if given or reset:
            terminal.set_schedule(job, None if reset else given, by=by or _login_name())
        else:
            terminal.show_schedule(job)


@_jobs()
def forget(
    job: JobName,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask for confirmation")] = False,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Take a job whose code no live instance has off all lists; its history stays."""
    if not yes and not typer.confirm(
        f"Forget {job}? It is taken off all lists, its history stays.", err=True
    ):
        fail("Not done.")
    with _open_terminal(url, as_json=json) as terminal:
        terminal.forget(job, by=by or _login_name())


# -- balances ----------------------------------------------------------------------------------


@_balances()
def balance(
    user: UserId,
    *,
    entries: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="how many entries (default: 5); with --json, print only these",
        ),
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show a user's balance and latest entries."""
    with _open_terminal(url, as_json=json) as terminal:
        terminal.balance(user, entries)


@_balances()
def daily_balances(
    user: UserId,
    *,
    before: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="before this day")
    ] = None,
    limit: Limit = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show a user's balance at the end of each day (UTC) that it changed on, the latest first."""
    with _open_terminal(url, as_json=json) as terminal:
        terminal.daily_balances(user, before, limit)


@_balances(context_settings={"ignore_unknown_options": True})  # -2 is an amount, not an option
def change(  # noqa: PLR0913 - the same
    user: UserId,
    amount: Annotated[
        int, typer.Argument(metavar="AMOUNT", help="what is added; negative withdraws")
    ],
    *,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="idempotency key: a change sent again with it is made once"
        ),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="how long to retry while the outcome is unknown"
        ),
    ] = 15,
    json: Json = False,
    url: Url = None,
) -> None:
    """Change a user's balance, once: `balance-app change 1 -2`.

    It is sent with an idempotency key, and again with the same key while its outcome is unknown.
    If it is still unknown when --patience ends, the exit code is 5, and the message has the command
    that sends it again. The exit code is 4 when the balance does not allow the change.
    """
    with _open_terminal(url, as_json=json) as terminal:
        terminal.change(user, amount, key, patience)


@_balances()
def users(
    *,
    after: Annotated[int, typer.Option(min=0, metavar="ID", help="only ids above this one")] = 0,
    limit: Limit = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """List users by id."""
    with _open_terminal(url, as_json=json) as terminal:
        terminal.users(after, limit)


@_balances()
def audit(
    *,
    now: Annotated[
        bool, typer.Option("--now", help="request an audit and wait for its result")
    ] = False,
    by: By = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show what the last audit of the ledger found.

    The exit code is 0 only if it found no fault.
    """
    with _open_terminal(url, as_json=json) as terminal:
        raise typer.Exit(terminal.audit_now(by=by or _login_name()) if now else terminal.audit())


# -- shared ------------------------------------------------------------------------------------


@contextmanager
def _open_terminal(url: str | None, *, as_json: bool) -> Iterator["Terminal"]:
    """Yield a terminal for a service; a refusal is reported, and ends the program."""
    from balance_app.cli.client import Code, RemoteError, Service  # noqa: PLC0415 - the same
    from balance_app.cli.session import Terminal  # noqa: PLC0415 - the same

    url = url or global_options.get("url")
    as_json = as_json or bool(global_options.get("json"))
    settings = None if url else load_settings()
    try:
        yield Terminal(
            Service(_service_url(url)),
            as_json=as_json,
            reached_by=(f"--url={url}",) if url else (),
        )
    except RemoteError as error:
        if as_json and error.answer is not None:
            typer.echo(error.answer)
        guessed = settings is not None and settings.balance_app_url is None
        guessed = guessed and error.code is Code.UNAVAILABLE and error.answer is None
        hint = " --url (or BALANCE_APP_URL) says where the service is." if guessed else ""
        fail(f"{error}{hint}", code=error.code)


def own_url(settings: Settings) -> str:
    """Return where the instance that is configured here answers."""
    return address(settings.host, settings.port)


def _service_url(given: str | None) -> str:
    """Return the service's URL: an option's, BALANCE_APP_URL, or this machine's instance."""
    if given:
        return given
    settings = load_settings()
    return settings.balance_app_url or own_url(settings)


def _argument(text: str) -> tuple[str, Any]:
    from pydantic_core import from_json  # noqa: PLC0415 - nothing else waits for it

    name, equals, value = text.partition("=")
    if not (name and equals):
        fail(f"--arg {text}: write NAME=VALUE.", code=2)
    try:
        return name, from_json(value, allow_inf_nan=False)
    except ValueError:
        return name, value


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as containers have
        return "command line"


def fail(sentence: str, *, code: int = 1) -> NoReturn:
    """Report why the program ends, and end it."""
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
