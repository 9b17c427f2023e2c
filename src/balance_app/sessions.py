"""Opening sessions in PostgreSQL that mean the same whatever their defaults are.

The server's file, `ALTER DATABASE`, `ALTER ROLE` and `ALTER ROLE ... IN DATABASE` all give defaults
to a session. A parameter of the startup packet wins over each of them, survives `RESET ALL` and a
reload of the file, and needs no round trip: what changes the meaning of our statements is pinned
there. A few can't be, as they depend on what they are or on the server's version:
`AFTER_CONNECTING` sets these.

Looked at was all of "Client Connection Defaults", "Version and Platform Compatibility" and "Error
Handling" of the manual. Left alone, as they change no meaning here or are the operator's to say:

- `default_transaction_read_only`: a managed service turns it on when its disk is full; `Database`
  distinguishes such a server from one that is unavailable.
- `default_tablespace`, `temp_tablespaces`, `default_table_access_method`,
  `default_toast_compression`: where and how tables are stored.
- `lc_*`, `default_text_search_config`, `timezone_abbreviations`: texts for people. Errors are known
  by SQLSTATE and by the severity that is never translated.
- `client_encoding`: asyncpg sends UTF8 itself.
- `fsync`, `full_page_writes`: the server's alone; `/readyz` says when they are off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import asyncpg

PINNED: Final[Mapping[str, str]] = {
    # what a transaction sees and keeps
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "row_security": "on",
    # how long it may last; the kinds of sessions that have limits set their own
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    # how texts are read and written
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "xmloption": "content",
    "quote_all_identifiers": "off",
    "check_function_bodies": "on",
    "gin_fuzzy_search_limit": "0",
    # that an error ends a statement and not the session, and that notices stay few
    "exit_on_error": "off",
    "client_min_messages": "notice",
    # Arrives only where startup parameters do; see `open_session`.
    "balance_app.pinned": "yes",
}
# One schema alone: what is missing there must not be found in another program's. Temporary tables
# come last: one that is called like ours must not be found in its place. Functions and operators of
# pg_catalog come before everything.
SEARCH_PATH: Final = '"{schema}", pg_temp'

# Durability is raised when it is off: "200" means that the change is in the log on disk. A value
# that waits for more or less of a standby stays, as that is the operator's promise. It is set even
# when it is right, so that a reload of the server's file can't take it away.
# Triggers keep the ledger append-only, but don't fire under another session_replication_role. It
# takes a superuser to change that: where somebody has, setting it fails (42501).
AFTER_CONNECTING: Final = """
SELECT name, set_config(name, value, false), current_setting('balance_app.pinned', true)
FROM (VALUES
    ('synchronous_commit',
     coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), true),
    ('session_replication_role', 'origin', false),
    ('transaction_timeout', '0', false),
    ('idle_session_timeout', '0', false)
) AS wanted (name, value, always)
WHERE always OR current_setting(name, true) <> value
"""


class PoolerError(Exception):
    """Between this program and PostgreSQL stands a pooler that breaks sessions."""


async def open_session(arguments: dict[str, Any]) -> asyncpg.Connection[asyncpg.Record]:
    """Connect to PostgreSQL with the keyword arguments that `Settings` makes.

    Raises:
        PoolerError: what this session pinned has not arrived at PostgreSQL.
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: see `outages`.
    """
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(**arguments)
    try:
        await pin(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def pin(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Set what the startup packet can't; again after each `RESET ALL`."""
    try:
        rows = await connection.fetch(AFTER_CONNECTING, timeout=PIN_SECONDS)
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError) as error:
        raise PoolerError("statements reach different sessions") from error
    if rows[0][2] != "yes":
        raise PoolerError("startup parameters do not reach PostgreSQL")


PIN_SECONDS: Final = 2.5


async def reset(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Take back what a job may have done to its session: the reset of a pool."""
    authorization = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE"
    await connection.execute(f"{authorization}; {connection.get_reset_query()}; DISCARD TEMP")
    await pin(connection)
