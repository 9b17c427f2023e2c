"""Sessions through a pooler in transaction mode, as PgBouncer has (`DB_POOLER=transaction`).

Such a pooler gives each transaction any session of PostgreSQL, with whatever settings it has then,
and keeps nothing for the next one. So nothing is set for a session here, and no statement is
prepared in one. What `sessions` pins is set for the transaction, in the same message as its
statement:

    SET transaction_isolation           before there is a snapshot
    set_config(name, value, true) ...   so that the statement is parsed under these, too
    the statement, without a name
    Sync                                the commit

PostgreSQL makes all up to the Sync one transaction, and the pooler keeps its session for that long.
So a change is one round trip and its own transaction, as it is without a pooler.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import asyncpg

from balance_app.sessions import PIN_SECONDS, PoolerError, Session, StandbyError, connect

# It must come before the first snapshot, so it can't be one of the settings below. Outside of an
# explicit transaction SET LOCAL warns; this does the same, as each transaction starts with the
# default again.
# ast-grep-ignore: session-state - each transaction starts with the default again
ISOLATION: Final = "SET transaction_isolation TO 'read committed'"

# Sets all for the transaction, and returns no row: the driver expects only those of the statement.
# Names are qualified, as the search path is not yet ours. A pooler may lead to another server than
# before: on a standby, which may lack changes, the last line raises 25001.
#
# $1 the settings, by name
PINS: Final = """
SELECT FROM (
    SELECT key, value, true FROM pg_catalog.json_each_text($1::pg_catalog.json)
    UNION ALL VALUES
        -- AFTER_CONNECTING in `sessions` says why
        ('synchronous_commit', coalesce(nullif(
            pg_catalog.current_setting('synchronous_commit'), 'off'), 'on'), true),
        ('session_replication_role', 'origin', false),
        ('transaction_timeout', '0', false)
    UNION ALL
        SELECT 'transaction_read_only', 'off', pg_catalog.pg_is_in_recovery()
) AS pinned (name, value, always)
WHERE CASE WHEN always OR (
          name OPERATOR(pg_catalog.<>) 'transaction_read_only'
          AND pg_catalog.current_setting(name, true) OPERATOR(pg_catalog.<>) value
      ) THEN pg_catalog.set_config(name, value, true) IS NULL END
"""

PINNED_NOW: Final = "SELECT current_setting('balance_app.pinned', true)"

# Parameters of the connection to the pooler, and not of a transaction.
OF_THE_CONNECTION: Final = tuple(f"tcp_keepalives_{each}" for each in ("idle", "interval", "count"))


class PooledSession(Session):
    """A connection to a pooler, each of whose transactions sets what it depends on."""

    def __init__(self, *arguments: Any) -> None:  # noqa: ANN401 - asyncpg's
        super().__init__(*arguments)
        # the settings of each transaction as JSON, and the messages that set them
        self._settings = "{}"
        self._beginning = b""
        # The driver's descriptions of the statements: which types they take and return.
        self._described: dict[tuple[object, ...], Any] = {}
        # Before the driver reads what a type is, it would turn jit off for the session.
        self._server_caps = self._server_caps._replace(jit=False)  # type: ignore[has-type] # not in the stubs

    async def use(self, settings: dict[str, str]) -> None:
        """Set these for each transaction from now on, and check that it has them.

        Raises:
            PoolerError: a transaction does not have them.
        """
        self._settings = json.dumps(settings)
        self._beginning = _executed(ISOLATION) + _executed(PINS, self._settings)
        found = [await self.fetchval(PINNED_NOW, timeout=PIN_SECONDS)]
        async with self.transaction(isolation="read_committed"):
            found.append(await self.fetchval(PINNED_NOW, timeout=PIN_SECONDS))
        if found != ["yes", "yes"]:
            raise PoolerError("settings of a transaction do not reach PostgreSQL")

    def is_standby(self) -> bool:
        """Return False: each transaction checks it, as what a pooler reports may be old."""
        return False

    def is_read_only(self) -> bool:
        """Return False: a statement that writes finds it out."""
        return False

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:  # noqa: ASYNC109
        """Execute as asyncpg does; a transaction that begins gets its settings."""
        if query == "BEGIN;":  # as `transaction()` without an isolation begins
            query = "BEGIN ISOLATION LEVEL READ COMMITTED;"
        status = await super().execute(query, *args, timeout=timeout)
        if query.startswith("BEGIN"):
            try:
                await self._execute(PINS, (self._settings,), 0, timeout)
            except BaseException:
                self.terminate()  # the transaction is open
                raise
        return status

    async def _execute(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's
        try:
            return await super()._execute(*arguments, **options)  # type: ignore[misc] # not in the stubs
        except asyncpg.ActiveSQLTransactionError as error:
            self.terminate()
            raise StandbyError("is a standby") from error
        except ValueError:  # an argument of the wrong type: the statement is not sent
            await super().execute("SELECT")  # ends the transaction that was begun for it
            raise

    async def _get_statement(
        self,
        query: str,
        timeout: float | None,  # noqa: ASYNC109
        *,
        named: str | bool | None = False,
        **options: Any,  # noqa: ANN401 - asyncpg's
    ) -> Any:  # noqa: ANN401 - asyncpg's
        """Return the description of a statement, after sending what comes before it.

        Nothing is awaited between this and the statement: it is sent in the same message.
        """
        # What was cut off ends first, with its own Sync.
        timeout = await self._protocol._wait_for_cancellation(timeout)  # type: ignore[attr-defined] # noqa: SLF001
        key = (query, named, *options.values())
        statement = self._described.get(key)
        if statement is None:
            self._begin()
            statement = await super()._get_statement(  # type: ignore[misc] # not in the stubs
                query, timeout, named=named, **options
            )
            self._described[key] = statement
        statement.mark_unprepared()  # another session has not parsed it
        self._begin()
        return statement

    def _begin(self) -> None:
        if not self.is_in_transaction():
            self._transport.write(self._beginning)  # type: ignore[attr-defined] # not in the stubs


async def open_pooled(arguments: dict[str, Any]) -> PooledSession:
    """Connect to a pooler with the keyword arguments that `Settings` makes.

    Raises:
        PoolerError: settings of a transaction do not reach PostgreSQL.
        StandbyError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: see
            `sessions.connect` and `outages`.
    """
    settings = dict(arguments["server_settings"])
    # A pooler that does not know a startup parameter refuses the connection. PgBouncer compares
    # these with what PostgreSQL reports, and sends a SET with each transaction if they differ: the
    # driver says 'utf-8'.
    startup = {"application_name": settings.pop("application_name"), "client_encoding": "UTF8"}
    for name in OF_THE_CONNECTION:
        settings.pop(name, None)
    arguments = arguments | {"server_settings": startup, "statement_cache_size": 0}
    session = await connect(session_class=PooledSession, **arguments)
    assert isinstance(session, PooledSession)  # noqa: S101 - as it was asked for
    try:
        await session.use(settings)
    except BaseException:
        session.terminate()
        raise
    return session


def _executed(statement: str, *arguments: str) -> bytes:
    """Return the messages that parse, bind and execute a statement whose results are ignored."""
    parse = _text("") + _text(statement) + struct.pack("!h", 0)
    values = b"".join(struct.pack("!i", len(each.encode())) + each.encode() for each in arguments)
    bind = _text("") * 2 + struct.pack("!hh", 0, len(arguments)) + values + struct.pack("!h", 0)
    execute = _text("") + struct.pack("!i", 0)
    return _message(b"P", parse) + _message(b"B", bind) + _message(b"E", execute)


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!i", len(content) + 4) + content
