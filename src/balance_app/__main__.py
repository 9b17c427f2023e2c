"""The command line: `balance-app --help`."""

import asyncio
import os
import sys
from typing import Annotated, NoReturn

import typer

from balance_app.settings import BadSettingsError, load_settings

cli = typer.Typer(
    name="balance-app",
    help="Exact balances in real time, served by any number of equal copies.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@cli.command()
def serve() -> None:
    """Run one copy of the service; it is configured by the environment (see .env.example)."""
    from balance_app.jobs.housekeeping import JOBS
    from balance_app.jobs.registry import DeclarationError, Registry
    from balance_app.logs import configure_logs
    from balance_app.server import PortTakenError
    from balance_app.server import serve as run

    settings = load_settings()
    if settings.jobs_enabled and os.getpid() == 1:
        _fail(
            "As process 1 this copy could not be ended by the kernel when it stands still, and a "
            "job might run twice: start the container with an init (`docker run --init`), or "
            "without jobs (JOBS_ENABLED=false)."
        )
    if not settings.database_is_configured:
        _fail("No database is configured: set DATABASE_URL or DB_HOST, or use `balance-app up`.")
    configure_logs(settings)
    try:
        run(settings, Registry(JOBS))
    except (PortTakenError, DeclarationError) as error:
        _fail(str(error))


@cli.command()
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
        _fail(str(error))
    raise typer.Exit(code)


@cli.command()
def migrate() -> None:
    """Bring the database's schema to this program's version."""
    from balance_app.database import alembic_head, is_away
    from balance_app.database import migrate as run

    try:
        asyncio.run(run(load_settings()))
    except Exception as error:
        if is_away(error) is None:
            raise
        _fail(f"The database can't be reached: {error or type(error).__name__}")
    typer.echo(f"The schema is at {alembic_head()}.")


@cli.command()
def healthcheck() -> None:
    """Ask the copy that runs here (HOST, PORT) whether it is ready; exit code 0 when it is."""
    import httpx

    settings = load_settings()
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
    url = f"http://{host}:{settings.port}/readyz"
    try:
        answer = httpx.get(url, timeout=4, trust_env=False)
    except httpx.HTTPError as error:
        _fail(f"Nobody answers at {url}: {error or type(error).__name__}")
    typer.echo(answer.text)
    raise typer.Exit(0 if answer.is_success else 1)


@cli.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="keep it up to date")] = False,  # noqa: FBT002
) -> None:
    """Show what every job is doing, where, and why the rest waits (BALANCE_APP_URL)."""
    from balance_app.terminal import NoAnswerError, show
    from balance_app.terminal import watch as follow

    url = os.environ.get("BALANCE_APP_URL") or f"http://127.0.0.1:{load_settings().port}"
    try:
        (follow if watch else show)(url)
    except NoAnswerError as error:
        _fail(str(error))


@cli.command()
def reset(
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,  # noqa: FBT002
) -> None:
    """Delete the data of the embedded database, so that the next `up` starts over."""
    from balance_app.embedded import EmbeddedError, data_directory, remove

    where = data_directory()
    if not yes and where.exists():
        typer.confirm(f"Delete all balances in {where}?", abort=True)
    try:
        removed = remove(where)
    except EmbeddedError as error:
        _fail(str(error))
    typer.echo(f"Deleted {where}." if removed else f"There is nothing at {where}.")


@cli.command()
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
            _fail(f"No PostgreSQL runs on {where}: start it with `balance-app up`.")
        socket_directory = EmbeddedPostgres(where).socket_directory
        program = str(binaries() / "psql")
    except EmbeddedError as error:
        _fail(str(error))
    os.execv(program, ["psql", f"--host={socket_directory}", "--username=postgres"])  # noqa: S606


def _fail(sentence: str) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(1)


def main() -> None:
    """Run the command line; wrong settings are told in sentences."""
    try:
        cli()
    except BadSettingsError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
