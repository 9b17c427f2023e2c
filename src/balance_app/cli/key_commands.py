"""The commands for keys: they connect to the database as its owner, and not to the service."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from balance_app.cli.remote import (
    Command,
    Group,
    fail,
    fail_for_database,
    global_options,
    login_name,
    read_moment,
)
from balance_app.formatting import exact, visible
from balance_app.settings import Settings, load_settings

if TYPE_CHECKING:
    from balance_app.access.keys import Scope
    from balance_app.access.owner import Known, Owner

T = TypeVar("T")

PANEL: Final = "The database"

key_commands = typer.Typer()
keys_commands = typer.Typer(cls=Group, no_args_is_help=True)
key_commands.add_typer(keys_commands, name="keys", rich_help_panel=PANEL)
_keys = partial(keys_commands.command, cls=Command)

# A name is the principal in ledgers and logs: none can be taken for `cli:ada`, or for two words.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_DURATION: Final = re.compile(r"([0-9]{1,9}) ?(d|h|min|s)", re.ASCII)
_UNITS: Final = {"d": "days", "h": "hours", "min": "minutes", "s": "seconds"}
_LONGEST: Final = timedelta(days=36_500)


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise typer.BadParameter(
            f"{text!r} is not a valid name for a key: up to 63 letters, digits and . _ @ -, "
            "a letter or digit first."
        )
    return text


def _scope(text: str) -> str:
    from balance_app.access.keys import SCOPES  # noqa: PLC0415 - slow to import

    if text in SCOPES:
        return text
    near = get_close_matches(text.lower(), SCOPES, 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise typer.BadParameter(
        f"{text!r} is not a scope.{hint} There are {', '.join(SCOPES)}; repeat --scope for each."
    )


def _expiry(text: str) -> datetime | timedelta:
    """Read how long a key lasts ("90d"), or the moment at which it ends."""
    found = _DURATION.fullmatch(text)
    if found is None:
        try:
            moment = read_moment(text)
        except typer.BadParameter:
            raise typer.BadParameter(
                f"{text!r} is neither a time from now, such as 90d, 12h, 30min or 45s, nor a "
                "moment such as 2026-11-21 or 2026-11-21T21:49:33Z."
            ) from None
        if moment <= datetime.now(UTC):
            raise typer.BadParameter(f"{text!r} is in the past.")
        return moment
    lasts = timedelta(**{_UNITS[found[2]]: int(found[1])}) if len(found[1]) < 8 else timedelta.max  # noqa: PLR2004 - below timedelta's own limit
    if not timedelta(0) < lasts <= _LONGEST:
        raise typer.BadParameter(f"{text!r} is not between 1s and {_LONGEST.days}d.")
    return lasts


Name = Annotated[str, typer.Argument(metavar="NAME", callback=_name, help="of the key")]


@keys_commands.callback()
def before_the_command() -> None:
    """Make, list and revoke keys, as the database's owner (MIGRATE_DATABASE_URL)."""


@_keys()
def create(
    name: Name,
    scope: Annotated[
        list[str],
        typer.Option(
            parser=_scope,
            metavar="SCOPE",
            help="what it may do: read, withdraw (change without deposits and transfers), change, "
            "open (accounts and floors: it makes money), operate (jobs), metrics; repeatable",
        ),
    ],
    *,
    expires: Annotated[
        datetime | None,
        typer.Option(
            parser=_expiry,
            metavar="WHEN",
            help="when it ends: 90d, 12h, 30min, or a moment in UTC; by default never",
        ),
    ] = None,
) -> None:
    """Make a key and print it, once; from the first one on every request needs a key.

    Only the key goes to the standard output: `KEY=$(balance-app keys create ...)`.
    """
    from balance_app.access.owner import NameTakenError  # noqa: PLC0415 - slow to import

    scopes: list[Scope] = sorted(set(scope))  # type: ignore[arg-type] # `_scope` has checked them

    async def work(owner: "Owner") -> None:
        try:
            made = await owner.create_key(
                name, scopes, by=principal(), expires=expires, deliver=_print_key
            )
        except NameTakenError:
            fail(
                f"There was a key {name} already, and a name is used only once: it stands for "
                "whoever had that key. Choose another, such as "
                f"{name[:58]}-2."
            )
        ends = "until it is revoked" if made.expires_at is None else _until(made.expires_at)
        typer.echo(
            f"The key {name} ({', '.join(scopes)}) is valid {ends}. It can't be shown again: keep "
            "it where only its user can read it.",
            err=True,
        )
        if made.is_first:
            typer.echo("From now on every request to the service needs a key.", err=True)

    _run(work, makes_database=True)


@_keys("list")
def list_keys(*, json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List all keys that were ever made, without their secrets."""

    async def work(owner: "Owner") -> None:
        from balance_app.cli import output  # noqa: PLC0415 - slow to import

        known = await owner.list_keys()
        on = output.console()
        if json or global_options.get("json"):
            output.print_as_json([_as_json(each) for each in known])
        elif known:
            on.print(output.keys_table([_as_json(each) for each in known], on))
        else:
            typer.echo("There are no keys: `balance-app keys create` creates one.", err=True)

    _run(work)


@_keys()
def revoke(name: Name) -> None:
    """Revoke a key, and with it all sessions that were begun with it."""
    from balance_app.access.owner import NoSuchKeyError  # noqa: PLC0415 - slow to import

    async def work(owner: "Owner") -> None:
        try:
            revoked_at = await owner.revoke_key(name, by=principal())
        except NoSuchKeyError as error:
            near = get_close_matches(name, error.names, 1)
            fail(f"There is no key {name}.{f' Did you mean {near[0]}?' if near else ''}")
        if revoked_at is None:
            typer.echo(f"The key {name} was already revoked.")
        else:
            typer.echo(
                f"The key {name} is revoked: within two seconds every instance refuses it, and its "
                "sessions."
            )

    _run(work)


# -- shared ------------------------------------------------------------------------------------


def principal() -> str:
    """Return who uses the command line, as lists of actions name them."""
    return f"cli:{visible(login_name())}"


def _until(moment: datetime) -> str:
    return f"until {exact(moment)} UTC"


def _print_key(key: str) -> None:
    try:
        # Nothing of it may stay in a buffer, whose failure would come too late.
        os.write(sys.stdout.fileno(), f"{key}\n".encode())
    except OSError as error:
        fail(f"The key was not created: it can't be printed: {error.strerror}.")


def _as_json(key: "Known") -> dict[str, object]:
    def moment(at: datetime | None) -> str | None:
        return None if at is None else at.isoformat().replace("+00:00", "Z")

    return {
        "name": key.name,
        "id": key.id,
        "scopes": key.scopes,
        "state": key.state,
        "createdAt": moment(key.created_at),
        "createdBy": key.created_by,
        "expiresAt": moment(key.expires_at),
        "revokedAt": moment(key.revoked_at),
        "lastUsedOn": None if key.last_used_on is None else key.last_used_on.isoformat(),
        "sessions": key.sessions,
    }


def _run(work: "Callable[[Owner], Awaitable[None]]", *, makes_database: bool = False) -> None:
    """Do something with keys, as the database's owner."""
    from balance_app.access.owner import NotTheOwnerError, Owner  # noqa: PLC0415 - slow to import

    async def connected(settings: Settings) -> None:
        async with Owner(settings) as owner:
            await work(owner)

    try:
        run_as_owner(connected, makes_database=makes_database)
    except NotTheOwnerError as error:
        fail(str(error))


def run_as_owner(
    work: "Callable[[Settings], Awaitable[None]]", *, makes_database: bool = False
) -> None:
    """Do something with the settings of the database's owner; report why it can't be used."""
    from balance_app.access.owner import NotTheOwnerError  # noqa: PLC0415 - slow to import
    from balance_app.db.migrations import UnusableDatabaseError  # noqa: PLC0415 - the same

    async def with_database(settings: Settings) -> None:
        async with _database(settings, makes=makes_database) as found:
            await work(found.as_owner())

    settings = load_settings()
    try:
        asyncio.run(with_database(settings))
    except UnusableDatabaseError as error:
        fail(f"{error} `balance-app migrate` creates it, or updates an older one.")
    except (typer.Exit, NotTheOwnerError):
        raise
    except Exception as error:  # noqa: BLE001 - raised again, unless it is the database's
        fail_for_database(error)


@asynccontextmanager
async def _database(settings: Settings, *, makes: bool) -> AsyncIterator[Settings]:
    """Yield the settings of the configured database, or of the embedded one, which is started.

    It runs already where `balance-app up` does.
    """
    if settings.database_is_configured or settings.migrate_database_url is not None:
        yield settings
        return
    from balance_app.db.migrations import migrate  # noqa: PLC0415 - slow to import
    from balance_app.local.postgres import (  # noqa: PLC0415 - the same
        EmbeddedError,
        EmbeddedPostgres,
        data_directory,
        running_server,
    )

    where = data_directory(settings)
    try:
        if not (makes or where.exists()):
            fail(
                f"There is no database: none is configured (DATABASE_URL or DB_HOST), and `up` has "
                f"made none in {where.parent}."
            )
        server = EmbeddedPostgres(where)
        found = server.settings()
        if running_server(where) is not None:
            await migrate(found)  # `up` may just have started it
            yield found
            return
        typer.echo(f"Starting PostgreSQL on {where} for this command.", err=True)
        await server.start()
        try:
            await migrate(found, partial(typer.echo, err=True))
            yield found
        finally:
            await server.stop()
    except EmbeddedError as error:
        fail(str(error))
