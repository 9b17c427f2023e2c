"""The command line: `balance-app --help`."""

import asyncio
import os
import sys
from contextlib import suppress
from datetime import timedelta
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balance_app import __version__
from balance_app.cli.action_commands import action_commands
from balance_app.cli.balance_commands import balance_commands
from balance_app.cli.job_commands import job_commands
from balance_app.cli.key_commands import key_commands
from balance_app.cli.ledger_commands import ledger_commands
from balance_app.cli.remote import (
    Command,
    Group,
    Json,
    KeyFile,
    Url,
    fail,
    fail_for_database,
    global_options,
    own_url,
    service_url,
)
from balance_app.formatting import visible
from balance_app.settings import (
    BadSettingsError,
    Settings,
    exposed_secrets,
    load_settings,
    unknown_names,
)

if TYPE_CHECKING:
    from balance_app.jobs.job import Registry

EXIT_CODES: Final = """
Exit codes:

- 0: done, also if it moved money and that can't be printed (it says so on stderr)
- 1: refused or failed, or a check found a fault
- 2: wrong usage or settings
- 3: no answer, the service is unavailable, or an export broke off; nothing was changed
- 4: what the account or the hold does not allow; nothing was changed
- 5: it is not known whether it was done
- 6: `status`: something has recovered by itself, within 15 minutes
- 7: `status`: something needs a hand
- 130: Ctrl-C
"""


MAX_SHARED_PORT: Final = 32_000  # from 32768 on, clients of the burst may have the ports


cli = typer.Typer(
    name="balance-app",
    cls=Group,
    help="Exact balances in real time and jobs without a master, by any number of equal instances.",
    epilog=EXIT_CODES,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
service, database = typer.Typer(), typer.Typer()
for commands in (
    *(service, job_commands, balance_commands, action_commands),
    *(ledger_commands, key_commands, database),
):
    cli.add_typer(commands)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - the library's call
    if wanted:
        typer.echo(f"balance-app {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="print it and end"),
]


@cli.callback()
def before_the_command(
    context: typer.Context,
    *,
    json: Json = False,
    url: Url = None,
    key_file: KeyFile = None,
    version: Version = False,
) -> None:
    """Accept `--url`, `--key-file` and `--json` before the command, too."""
    del version
    given = {"url": url, "key-file": key_file, "json": json or None}
    remote = {"users"} | {
        each.callback.__name__.replace("_", "-")
        for commands in (job_commands, balance_commands, action_commands)
        for each in commands.registered_commands
        if each.callback
    }
    # What takes some of them only.
    others = {"url": {"healthcheck", "open"}, "json": {"audit", "jobs", "keys", "seals"}}
    command = context.invoked_subcommand or ""
    for name, value in given.items():
        if value is not None and command not in remote | others.get(name, set()):
            fail(f"`{command}` takes no --{name}.", code=2)
    global_options.update(json=json, url=url, key_file=key_file)


LogDirectory = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        file_okay=False,
        help="where the instances' logs are, by default `logs` in BALANCE_APP_DATA",
    ),
]

_service = partial(service.command, cls=Command, rich_help_panel="The service")
_database = partial(database.command, cls=Command, rich_help_panel="The database")


# -- the service -------------------------------------------------------------------------------


@_service()
def up(
    instances: Annotated[int, typer.Option(min=1, max=50, help="how many instances to run")] = 5,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_SHARED_PORT,
            help="shared by all, by default PORT; each instance also has one above it",
        ),
    ] = None,
    *,
    reload: Annotated[
        bool, typer.Option("--reload", help="restart them when their code or a job's changes")
    ] = False,
    log_dir: LogDirectory = None,
) -> None:
    """Run instances on this machine, and a database if none is configured."""
    from balance_app.access.gate import OpenToNetworkError
    from balance_app.local.launcher import LaunchError, Options, launch
    from balance_app.local.reloading import ReloadError, places

    settings = load_settings()
    if settings.migrate_database_url is not None and not settings.database_is_configured:
        fail(
            "MIGRATE_DATABASE_URL is set, but neither DATABASE_URL nor DB_HOST: the instances "
            "would migrate that database, and serve the embedded one. Set both, or neither.",
            code=2,
        )
    registry = _load_jobs(settings)
    port = port or settings.port
    if port > MAX_SHARED_PORT:
        fail(f"PORT is {port}: `up` needs one up to {MAX_SHARED_PORT}, and those above.", code=2)
    for sentence in _warnings(settings):
        typer.echo(sentence, err=True)
    try:
        options = Options(instances, port, log_dir, places(registry) if reload else None)
        code = asyncio.run(launch(settings, options))
    except (LaunchError, ReloadError) as error:
        fail(str(error))
    except OpenToNetworkError as error:
        fail(str(error), code=2)
    raise typer.Exit(code)


@_service()
def serve(
    *,
    launched: Annotated[bool, typer.Option(hidden=True, help="by `up`, which has warned")] = False,
    check: Annotated[bool, typer.Option(hidden=True, help="end before anything starts")] = False,
) -> None:
    """Run one instance of the service; it is configured by the environment (see .env.example)."""
    if os.getpid() == 1:
        _leave_process_1()  # before this process is large
    import structlog

    from balance_app.access.gate import OpenToNetworkError
    from balance_app.logs import configure_logs
    from balance_app.server import ListenError
    from balance_app.server import serve as run

    settings = load_settings()
    if check:
        _load_jobs(settings)
        return
    _require_database(settings)
    configure_logs(settings)
    warnings = _warnings(settings)
    if not launched:
        for sentence in warnings:
            structlog.get_logger(__name__).warning("check the settings", reason=sentence)
    registry = _load_jobs(settings)
    try:
        run(settings, registry)
    except ListenError as error:
        fail(str(error))
    except OpenToNetworkError as error:
        fail(str(error), code=2)


def _leave_process_1() -> None:
    from balance_app.minimal_init import become_child

    try:
        become_child()
    except OSError as error:
        fail(
            "As process 1 this instance could not be ended by the kernel when it is frozen, and a "
            "job might run twice; and a child process, to run in instead, can't be started "
            f"({error.strerror}): start the container with an init (`docker run --init`)."
        )


@_service()
def logs(
    instance: Annotated[
        str | None, typer.Argument(metavar="[INSTANCE]", help="as app3; by default all")
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="show new lines, too")] = False,
    lines: Annotated[int, typer.Option(min=0, metavar="N", help="maximum lines")] = 100,
    log_dir: LogDirectory = None,
) -> None:
    """Show what the instances of `up` have printed, of one or of each, while it runs or after.

    They log more than the console shows: all from LOG_LEVEL on, by default `info`.
    """
    from balance_app.local.instance_logs import Tail, find_directory, names
    from balance_app.local.instance_logs import follow as new_lines

    directory = log_dir or find_directory(load_settings())
    found = names(directory)
    if not found:
        fail(
            f"There are no logs in {directory}: `balance-app up` writes them (with --log-dir into "
            "another directory)."
        )
    if instance is not None and instance not in found:
        known = ", ".join(found)
        fail(f"There is no log of {visible(instance)} in {directory}; there are {known}.")
    tails = {name: Tail(directory, name) for name in found if instance in {None, name}}
    width = 0 if instance else max(len(name) for name in tails)

    def show(name: str, line: str) -> None:
        typer.echo(visible(line) if instance else f"{name:{width}} | {visible(line)}")

    for name, tail in tails.items():
        for line in tail.last(lines):
            show(name, line)
    if follow:
        with suppress(KeyboardInterrupt):
            for name, line in new_lines(directory, tails, others=instance is None):
                show(name, line)


@_service()
def jobs(*, json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the jobs that an instance started here would run, and where each comes from.

    It reads JOBS_MODULES and the entry points of installed packages; no database is needed.
    """
    from balance_app.cli import output

    registry = _load_jobs(load_settings())
    found = [
        {
            "name": name,
            "schedule": {"text": str(job.schedule), "words": job.schedule.describe()},
            "description": job.description,
            "origin": registry.origins[name],
        }
        for name, job in sorted(registry.items())
    ]
    on = output.console()
    if json or global_options["json"]:
        output.print_as_json(found)
    else:
        on.print(output.jobs_table(found, on))


@_service(name="open")
def open_page(url: Url = None) -> None:
    """Open the page of the running service in a browser, and print its address.

    It is the service at BALANCE_APP_URL, or the one that is configured here (HOST, PORT).
    """
    where, auth = _split_url(service_url(url or global_options.get("url")))
    try:
        _probe_url(where, auth)
    except ValueError as error:
        fail(f"No answer from {where}: {error}. `balance-app up` starts it.", code=3)
    typer.echo(where)
    if not _open_browser(where):
        typer.echo("There is no browser here that can be started: open it yourself.", err=True)


def _open_browser(where: str) -> bool:
    """Open a browser of this user's desktop, or of BROWSER; return whether there is one."""
    import webbrowser

    named = any(map(os.environ.get, ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")))
    # Without a desktop, one for terminals would be started, and waited for.
    if sys.platform == "linux" and not named:
        return False
    try:
        return webbrowser.open(where)
    except webbrowser.Error:
        return False


@_service()
def healthcheck(
    url: Annotated[str | None, typer.Option(metavar="URL", help="another instance")] = None,
) -> None:
    """Check whether the instance that runs here (HOST, PORT) is ready.

    The exit code is 0 when it is, 1 when it is not, 3 when there is no answer.
    """
    from balance_app.http.probe import READY, probe

    url = url or global_options.get("url")
    settings = load_settings() if url is None else None
    where, auth = (own_url(settings), None) if settings else _split_url(str(url))
    try:
        if settings is None:
            status, body = _probe_url(where, auth)
        else:
            status, body = probe(settings.host, settings.port)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        fail(f"No answer from {where}: {reason}", code=3)
    typer.echo(body.encode())
    raise typer.Exit(0 if status == READY else 1)


def _split_url(url: str) -> tuple[str, Any]:
    """Return a service's URL, and apart from it its user and password; end where it is none."""
    from balance_app.client import InvalidURL
    from balance_app.client.transport import split_url

    try:
        return split_url(url)
    except InvalidURL as error:
        fail(str(error), code=2)


def _probe_url(url: str, auth: Any) -> tuple[int, str]:  # noqa: ANN401 - of the library
    import httpx

    try:
        answer = httpx.get(f"{url}/readyz", auth=auth, timeout=4, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return answer.status_code, answer.text


# -- the database ------------------------------------------------------------------------------


@_database()
def migrate() -> None:
    """Migrate the database's schema to this program's version, as the owner of its tables.

    It connects by MIGRATE_DATABASE_URL, if that is set, and grants what instances need to
    DB_RUN_ROLE.
    """
    from balance_app.db.migrations import Schema, UnusableDatabaseError, grant
    from balance_app.db.migrations import migrate as run

    settings = load_settings().as_owner()
    _require_database(settings)
    for sentence in (*unknown_names(), *exposed_secrets()):
        typer.echo(sentence, err=True)

    async def migrate_and_grant() -> Schema:
        report = partial(typer.echo, err=True)
        migrated = await run(settings, report)
        await grant(settings, report)
        return migrated

    try:
        schema = asyncio.run(migrate_and_grant())
    except UnusableDatabaseError as error:
        fail(str(error))
    except Exception as error:  # noqa: BLE001 - raised again, unless it is the database's
        fail_for_database(error, settings.database_address)
    typer.echo(f"The schema is at {schema.revision}.")


@_database()
def restored(*, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Make a database that was restored from a backup safe against all that is older.

    Fences, ids and generations go on far above what can have been given since the backup's moment;
    leases and logins end. Run it as the owner, before instances start; see docs/backup.md.
    """
    import asyncpg

    from balance_app.cli.key_commands import principal, run_as_owner
    from balance_app.maintenance.batches import count
    from balance_app.maintenance.restoration import make_safe

    async def work(owner: Settings) -> None:
        from balance_app.db.migrations import require_schema
        from balance_app.db.replication import shortage_on
        from balance_app.sessions import open_session

        connection = await open_session(owner.connect_arguments())
        try:
            await require_schema(connection)
            if not yes:
                typer.confirm(
                    f"Was {owner.database_address} restored from a backup? Its running jobs will "
                    "count as lost, and everybody has to log in again",
                    abort=True,
                )
            if (shortage := await shortage_on(connection)) is not None:
                typer.echo(shortage, err=True)
            lease = timedelta(seconds=owner.job_lease_seconds)
            made = await make_safe(connection, by=principal(), lease=lease)
        except asyncpg.InsufficientPrivilegeError as error:
            fail(
                f"The role of this connection may not do that ({error.args[0]}): it is for the "
                "owner of the tables (MIGRATE_DATABASE_URL)."
            )
        finally:
            connection.terminate()
        for job, server in made.runs:
            typer.echo(f"The run of {job} on {server} is lost.")
        typer.echo(
            f"Nothing older can write to it: {count(len(made.runs), 'run')} lost, "
            f"{count(made.sessions, 'login')} ended, fences and ids raised. Keys that were revoked "
            "since the backup's moment are valid again: `balance-app keys list`."
        )

    run_as_owner(work)


@_database()
def psql() -> None:
    """Open a prompt in the embedded database, while `up` runs."""
    from balance_app.local.postgres import (
        EmbeddedError,
        EmbeddedPostgres,
        binaries,
        data_directory,
        running_server,
    )

    where = data_directory(load_settings())
    try:
        if running_server(where) is None:
            fail(f"No PostgreSQL runs on {where}: start it with `balance-app up`.")
        socket_directory = EmbeddedPostgres(where).socket_directory
        program = str(binaries() / "psql")
    except EmbeddedError as error:
        fail(str(error))
    # psql finds its libraries and files by the path it is started with.
    os.execv(program, [program, f"--host={socket_directory}", "--username=postgres"])  # noqa: S606


@_database()
def reset(*, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Delete the data of the embedded database; the next `up` starts with an empty one."""
    from balance_app.local.postgres import EmbeddedError, data_directory, describe, remove

    settings = load_settings()
    where = data_directory(settings)
    if settings.database_is_configured:
        typer.echo(
            f"The configured database ({settings.database_address}) stays as it is: `reset` "
            "deletes the embedded one.",
            err=True,
        )
    try:
        if not yes and where.exists():
            typer.confirm(
                f"Delete all balances and jobs' histories in {describe(where)}?", abort=True
            )
        removed = remove(where)
    except EmbeddedError as error:
        fail(str(error))
    typer.echo(f"Deleted {where}." if removed else f"There is nothing at {where}.")


# -- shared ------------------------------------------------------------------------------------


def _load_jobs(settings: Settings) -> "Registry":
    """Return the jobs that an instance with these settings runs; end where one can't work."""
    from balance_app.jobs.job import DeclarationError, Registry
    from balance_app.maintenance.alerting import Alerting

    try:
        registry = Registry.load(settings.jobs_modules, installed=settings.jobs_entry_points)
        registry = Alerting(settings).added_to(registry)
        registry.check(min_seconds=settings.job_min_seconds)
    except DeclarationError as error:
        fail(str(error), code=2)
    return registry


def _require_database(settings: Settings) -> None:
    if not settings.database_is_configured:
        fail(
            "No database is configured: set DATABASE_URL or DB_HOST, or use `balance-app up`.",
            code=2,
        )


def _warnings(settings: Settings) -> list[str]:
    """Raise the limit of open files; return warnings about it and about the settings."""
    from balance_app import open_files

    shortage = open_files.shortage(settings, open_files.raise_limit())
    return [*unknown_names(), *exposed_secrets(), *([] if shortage is None else [shortage])]


def main() -> None:
    """Run the command line; report wrong settings, and what the system refuses, in sentences."""
    # A character that this terminal's encoding does not have is replaced (not in JSON, nor in CSV).
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        cli(prog_name="balance-app")
    except BadSettingsError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except (OSError, UnicodeError) as error:
        if os.environ.get("BALANCE_APP_TRACEBACK"):
            raise
        sys.exit(_sentence(error))
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Drop what can't be written: the interpreter would try again, and end with code 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _sentence(error: OSError | UnicodeError) -> str:
    """Return what the system refused, and of which file or name."""
    reason = str(error)
    if isinstance(error, FileNotFoundError) and error.filename is None:
        reason = "the current directory does not exist any more"
    elif isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
        reason = ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])
    return f"balance-app failed: {reason}. (BALANCE_APP_TRACEBACK=1 shows where in the program.)"
