"""The command line: `balance-app --help`."""

import asyncio
import os
import sys
from functools import partial
from io import TextIOWrapper
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typing_extensions import override

from balance_app.asking import Command, asking, fail, own_url, without_types
from balance_app.settings import BadSettingsError, Settings, load_settings

EXIT_CODES: Final = """
Exit codes:

- 0: done
- 1: refused or failed, or what was looked at is not as it should be
- 2: wrong usage or settings
- 3: nobody answers, or the service can't at this moment; nothing was changed
- 4: a change that the balance does not allow; nothing was changed
- 5: it is not known whether it was done
- 130: Ctrl-C
"""


class _Group(TyperGroup):
    @override
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))


cli = typer.Typer(
    name="balance-app",
    cls=_Group,
    help="Exact balances in real time and jobs without a master, by any number of equal copies.",
    epilog=EXIT_CODES,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
service, database = typer.Typer(), typer.Typer()
for part in (service, asking, database):
    cli.add_typer(part)
_service = partial(service.command, cls=Command, rich_help_panel="The service")
_database = partial(database.command, cls=Command, rich_help_panel="The database")


# -- the service -------------------------------------------------------------------------------


@_service()
def up(
    copies: Annotated[int, typer.Option(min=1, max=50, help="how many copies to run")] = 5,
    port: Annotated[
        int, typer.Option(min=1, max=32000, help="shared by all; the copies take those above")
    ] = 3000,
) -> None:
    """Run the whole thing on this machine: a database if none is configured, and the copies."""
    from balance_app.launcher import LaunchError, launch

    try:
        code = asyncio.run(launch(load_settings(), copies=copies, shared_port=port))
    except LaunchError as error:
        fail(str(error))
    raise typer.Exit(code)


@_service()
def serve() -> None:
    """Run one copy of the service; it is configured by the environment (see .env.example)."""
    from balance_app.jobs.housekeeping import JOBS
    from balance_app.jobs.registry import DeclarationError, Registry
    from balance_app.logs import configure_logs
    from balance_app.server import PortTakenError
    from balance_app.server import serve as run

    settings = load_settings()
    if settings.jobs_enabled and os.getpid() == 1:
        fail(
            "As process 1 this copy could not be ended by the kernel when it stands still, and a "
            "job might run twice: start the container with an init (`docker run --init`), or "
            "without jobs (JOBS_ENABLED=false)."
        )
    _require_database(settings)
    configure_logs(settings)
    try:
        run(settings, Registry(JOBS))
    except (PortTakenError, DeclarationError) as error:
        fail(str(error))


@_service()
def healthcheck(
    url: Annotated[str | None, typer.Option(metavar="URL", help="another one")] = None,
) -> None:
    """Ask the copy that runs here (HOST, PORT) whether it is ready.

    The exit code is 0 when it is, 1 when it is not, 3 when nobody answers.
    """
    import httpx

    where = f"{(url or own_url(load_settings())).rstrip('/')}/readyz"
    try:
        answer = httpx.get(where, timeout=4, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"Nobody answers at {where}: {error or type(error).__name__}", code=3)
    typer.echo(answer.text)
    raise typer.Exit(0 if answer.is_success else 1)


# -- the database ------------------------------------------------------------------------------


@_database()
def migrate() -> None:
    """Bring the database's schema to this program's version."""
    from balance_app.migrations import UnusableDatabaseError
    from balance_app.migrations import migrate as run
    from balance_app.outages import HOPELESS, classify

    settings = load_settings()
    _require_database(settings)
    try:
        schema = asyncio.run(run(settings, partial(typer.echo, err=True)))
    except UnusableDatabaseError as error:
        fail(str(error))
    except Exception as error:
        cause = classify(error)
        if cause is None:
            raise
        if cause.kind in HOPELESS:
            fail(f"{cause.sentence} {error}")
        fail(f"The database can't be reached: {error or type(error).__name__}", code=3)
    typer.echo(f"The schema is at {schema.revision}.")


@_database()
def psql() -> None:
    """Open a prompt in the embedded database, while `up` runs."""
    from balance_app.embedded import (
        EmbeddedError,
        EmbeddedPostgres,
        binaries,
        data_directory,
        running_server,
    )

    where = data_directory()
    try:
        if running_server(where) is None:
            fail(f"No PostgreSQL runs on {where}: start it with `balance-app up`.")
        socket_directory = EmbeddedPostgres(where).socket_directory
        program = str(binaries() / "psql")
    except EmbeddedError as error:
        fail(str(error))
    os.execv(program, ["psql", f"--host={socket_directory}", "--username=postgres"])  # noqa: S606


@_database()
def reset(*, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Delete the data of the embedded database, so that the next `up` starts over."""
    from balance_app.embedded import EmbeddedError, data_directory, remove

    where = data_directory()
    if not yes and where.exists():
        typer.confirm(f"Delete all balances in {where}?", abort=True)
    try:
        removed = remove(where)
    except EmbeddedError as error:
        fail(str(error))
    typer.echo(f"Deleted {where}." if removed else f"There is nothing at {where}.")


# -- parts -------------------------------------------------------------------------------------


def _require_database(settings: Settings) -> None:
    if not settings.database_is_configured:
        fail(
            "No database is configured: set DATABASE_URL or DB_HOST, or use `balance-app up`.",
            code=2,
        )


def main() -> None:
    """Run the command line; wrong settings are told in sentences."""
    # What can't be encoded for this terminal is replaced, never raised.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        cli(prog_name="balance-app")
    except BadSettingsError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
