"""The commands that read the ledger from the database itself: no service has to run."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from balance_app.cli.remote import Command, Limit, fail, fail_for_database, global_options
from balance_app.settings import Settings, load_settings

if TYPE_CHECKING:
    import asyncpg

    from balance_app.maintenance.verification import Checked, Report, Seal

    Read = Callable[[asyncpg.Connection[Any]], Coroutine[Any, Any, "Result"]]
    Result = TypeVar("Result")

MOST_FAULTS: Final = 50  # that are printed

ledger_commands = typer.Typer()
_ledger = partial(ledger_commands.command, cls=Command, rich_help_panel="The database")

Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@_ledger()
def audit(
    *,
    seal: Annotated[
        str | None,
        typer.Option(
            "--seal",
            metavar="DIGEST",
            help="check that the ledger is still what this seal, noted elsewhere, was made of",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check every entry, balance, hold, key, hash and seal; exit code 1 if any differs.

    It reads the database itself (DB_HOST, DATABASE_URL), and needs to read only. What its owner has
    rewritten together with all hashes and seals is found by a seal that was noted elsewhere.
    """
    from balance_app.cli import output  # noqa: PLC0415 - slow to import
    from balance_app.maintenance.verification import Verification  # noqa: PLC0415

    noted = None if seal is None else _digest(seal)
    with _progress() as report:

        async def check(connection: "asyncpg.Connection[Any]") -> "Checked":
            return await Verification(connection, report).run(noted)

        checked = _read(check)
    if json or global_options.get("json"):
        output.print_as_json(
            {
                "entries": checked.entries,
                "users": checked.users,
                "withoutHash": checked.unhashed,
                "seals": checked.seals,
                "lastSeal": _as_json(checked.last_seal),
                "notedSeal": _as_json(checked.noted_seal),
                "faults": checked.faults,
                "moreFaults": checked.more_faults,
            }
        )
    else:
        _print_checked(checked)
    raise typer.Exit(1 if checked.faults else 0)


@_ledger()
def seals(
    *,
    before: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="only those before seal N")
    ] = None,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """List the seals, the newest first: digests to be noted outside of the database."""
    from balance_app.cli import output  # noqa: PLC0415 - slow to import
    from balance_app.formatting import exact  # noqa: PLC0415
    from balance_app.maintenance.verification import newest_seals  # noqa: PLC0415

    found = _read(partial(newest_seals, before=before or 2**63 - 1, limit=limit))
    if json or global_options.get("json"):
        output.print_as_json([_as_json(each) for each in found])
        return
    if not found:
        typer.echo("There is no seal yet: the job note-daily-balances makes them.")
        return
    on = output.console()
    table = output.make_table(("SEAL", "LEDGERS", "AT (UTC)", "DIGEST"), numbers=2)
    for each in found:
        table.add_row(str(each.number), str(each.heads), exact(each.at), each.digest)
    on.print(table)


# -- shared ------------------------------------------------------------------------------------


def _read(read: "Read[Result]") -> "Result":
    """Return what is read from the database; report in a sentence why it can't be."""
    import asyncpg  # noqa: PLC0415 - slow to import

    from balance_app.db.migrations import UnusableDatabaseError, require_schema  # noqa: PLC0415
    from balance_app.sessions import open_session  # noqa: PLC0415

    settings = _settings()

    async def run() -> "Result":
        connection = await open_session(settings.connect_arguments())
        try:
            await require_schema(connection)
            return await read(connection)
        finally:
            connection.terminate()

    try:
        return asyncio.run(run())
    except UnusableDatabaseError as error:
        fail(str(error))
    except asyncpg.InsufficientPrivilegeError as error:
        fail(f"The role may not read all that is to be checked: {error}.")
    except Exception as error:  # noqa: BLE001 - raised again, unless it is the database's
        fail_for_database(error, settings.database_address)


def _settings() -> Settings:
    """Return the settings, with the embedded database while it runs and none is configured."""
    settings = load_settings()
    if settings.database_is_configured:
        return settings
    from balance_app.local.postgres import (  # noqa: PLC0415 - slow to import
        EmbeddedError,
        EmbeddedPostgres,
        data_directory,
        running_server,
    )

    where = data_directory(settings)
    try:
        if running_server(where) is None:
            fail(
                "No database is configured, and none runs here: set DATABASE_URL or DB_HOST, or "
                "start `balance-app up`.",
                code=2,
            )
        return EmbeddedPostgres(where).settings()
    except EmbeddedError as error:
        fail(str(error))


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:  # noqa: PLR2004 - of SHA-256
        raise typer.BadParameter(
            "a digest has 64 hexadecimal digits, as `balance-app seals` prints it",
            param_hint="--seal",
        )
    return digest


@contextmanager
def _progress() -> "Iterator[Report]":
    """Yield a function that shows progress, if there is a terminal."""
    from rich.progress import Progress  # noqa: PLC0415 - slow to import

    from balance_app.cli import output  # noqa: PLC0415

    console = output.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


def _print_checked(checked: "Checked") -> None:
    from balance_app.formatting import exact, visible  # noqa: PLC0415 - slow to import
    from balance_app.maintenance.batches import count, number  # noqa: PLC0415

    faults = len(checked.faults) + checked.more_faults
    for fault in checked.faults[:MOST_FAULTS]:
        typer.echo(visible(fault))
    if faults > MOST_FAULTS:
        typer.echo(f"and {number(faults - MOST_FAULTS)} more")
    read = (
        f"{count(checked.entries, 'entry', 'entries')} of {count(checked.users, 'user')} and "
        f"{count(checked.seals, 'seal')}"
    )
    if faults:
        typer.echo(f"Checked {read}: {count(faults, 'fault')}.")
    else:
        typer.echo(f"Checked {read}: all agree.")
    if checked.unhashed:
        accounts = count(checked.unhashed, "older account has", "older accounts have")
        typer.echo(f"{accounts} no hash yet: the job audit-ledger gives it.")
    if checked.noted_seal is not None and not faults:
        typer.echo(
            f"All that seal {checked.noted_seal.number} of {exact(checked.noted_seal.at)} UTC "
            "covers is as it was."
        )
    elif checked.last_seal is not None:
        last = checked.last_seal
        typer.echo(f"The last seal is {last.number} of {exact(last.at)} UTC: {last.digest}")


def _as_json(seal: "Seal | None") -> dict[str, Any] | None:
    return None if seal is None else {**seal._asdict(), "at": seal.at.isoformat()}
