"""Sessions of PostgreSQL in which statements mean the same whatever the defaults are.

The configuration file, `ALTER DATABASE`, `ALTER ROLE` and `ALTER ROLE ... IN DATABASE` all set a
session's defaults. A parameter of the startup packet wins over each of them, survives `RESET ALL`
and a reload of the file, and needs no round trip: parameters that change the meaning of our
statements are pinned there. A few can't be, as they depend on their present value or on the
server's version: `AFTER_CONNECTING` sets these.

This covers all of "Client Connection Defaults", "Version and Platform Compatibility" and "Error
Handling" of the manual. Not pinned, as they change no meaning here or are the operator's choice:

- `default_transaction_read_only`: a managed service turns it on when its disk is full; `Database`
  distinguishes such a server from one that is unavailable.
- `default_tablespace`, `temp_tablespaces`, `default_table_access_method`,
  `default_toast_compression`: where and how tables are stored.
- `lc_*`, `default_text_search_config`, `timezone_abbreviations`: texts for people. Errors are
  classified by SQLSTATE and by the severity that is never translated.
- `client_encoding`: asyncpg sets UTF8 itself.
- `fsync`, `full_page_writes`: no session can set them; `/readyz` warns when they are off.
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
    # no time limits; the kinds of sessions that need some set their own
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
    # an error ends the statement and not the session; few notices
    "exit_on_error": "off",
    "client_min_messages": "notice",
    # Shows that startup parameters reach PostgreSQL; see `pin`.
    "balance_app.pinned": "yes",
}
# One schema only: a table that is missing there must not be found in another program's schema.
# Temporary tables come last: one with the name of ours must not shadow it. pg_catalog comes before
# everything.
SEARCH_PATH: Final = '"{schema}", pg_temp'

# synchronous_commit is raised when it is off: a 200 means that the change is in the log on disk.
# Every other value stays, as how much to wait for a standby is the operator's choice. It is set
# even when it is right, so that a reload of the configuration file can't change it.
# Triggers keep the ledger append-only, but don't fire under another session_replication_role. Only
# a superuser can set that: where another default was set for this role, this fails (42501).
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
    """A pooler between this program and PostgreSQL breaks sessions."""


async def open_session(arguments: dict[str, Any]) -> asyncpg.Connection[asyncpg.Record]:
    """Connect to PostgreSQL with the keyword arguments that `Settings` makes.

    Raises:
        PoolerError: the pinned parameters have not reached PostgreSQL.
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
    """Undo what a job may have changed in its session; a pool calls it at each release."""
    authorization = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE"
    # ast-grep-ignore: sql-from-pieces - all of it is constant
    await connection.execute(f"{authorization}; {connection.get_reset_query()}; DISCARD TEMP")
    await pin(connection)
