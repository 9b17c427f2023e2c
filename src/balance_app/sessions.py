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

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import asyncpg

if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection

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
    # Where the planner expects more rows than there are, as without fresh statistics, compiling an
    # audit's statement takes seconds, and running it milliseconds.
    "jit": "off",
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


# The oldest PostgreSQL that this program works with; docs/production.md has what differs.
OLDEST_SERVER: Final = 14

# a host and its port
Host: TypeAlias = tuple[str, int]


class SessionError(Exception):
    """The connection is no session of the primary, or it does not keep what it confirms."""


class PoolerError(SessionError):
    """A pooler between this program and PostgreSQL breaks sessions."""


class OldServerError(SessionError):
    """The server's PostgreSQL is older than `OLDEST_SERVER`."""


class StandbyError(SessionError):
    """The server is a standby: it may lack changes that were acknowledged."""


class CertificateRefusedError(SessionError):
    """The server ended the connection when it had this service's certificate."""


class NotReplicatedError(SessionError):
    """A commit is on the primary alone: its wait for a synchronous standby was cancelled."""


class Session(_Connection):
    """A connection that knows which of several hosts it leads to."""

    __slots__ = ("hosts", "primary")
    hosts: tuple[Host, ...]
    # the one of several that it leads to
    primary: _Primary | None

    @property
    def address(self) -> str:
        """Host and port, for people."""
        return shown(self.hosts if self.primary is None else [self.primary.host])

    def is_current(self) -> bool:
        """Return whether no later connection of this program has found another primary."""
        last = _primaries.get(self.hosts)
        return last is None or self.primary is None or last.host == self.primary.host

    def is_standby(self) -> bool:
        """Return whether its server was a standby when it last reported that (no round trip)."""
        return getattr(self.get_settings(), "in_hot_standby", "off") == "on"

    def is_read_only(self) -> bool:
        """Return whether it can't be written to by default, as last reported (no round trip)."""
        return getattr(self.get_settings(), "default_transaction_read_only", "off") == "on"

    async def fetch(  # type: ignore[override] # one signature instead of three
        self,
        query: str,
        *args: Any,  # noqa: ANN401 - asyncpg's
        timeout: float | None = None,  # noqa: ASYNC109
        record_class: Any = None,  # noqa: ANN401
    ) -> list[asyncpg.Record]:
        """Fetch as asyncpg does; a statement that is prepared already is bound without its checks.

        They take up to a third of what the driver costs a change.
        """
        self._check_open()  # type: ignore[attr-defined] # not in the stubs
        statement = None
        if record_class is None and not self._query_loggers:  # type: ignore[attr-defined]
            key = (query, self._protocol.get_record_class(), False)  # type: ignore[attr-defined]
            statement = self._stmt_cache.get(key)  # type: ignore[attr-defined]
        if statement is not None:
            try:
                rows: list[asyncpg.Record] = await self._protocol.bind_execute(  # type: ignore[attr-defined]
                    statement, args, portal_name="", limit=0, return_extra=False, timeout=timeout
                )
            except asyncpg.InvalidCachedStatementError:
                # Since a migration its result has other columns. Nothing of it was executed, and
                # below asyncpg prepares it again.
                if self.is_in_transaction():
                    raise
            except asyncpg.OutdatedSchemaCacheError:
                await self.reload_schema_state()
                raise
            else:
                return rows
        return await super().fetch(query, *args, timeout=timeout, record_class=record_class)

    def _process_log_message(self, fields: dict[str, str], last_query: str) -> None:
        # After `pg_cancel_backend` PostgreSQL reports a commit that the standby may lack as made,
        # with a warning. An error here becomes the error of the statement. The function's name is
        # not translated.
        if fields.get("R") == "SyncRepWaitForLSN":
            raise NotReplicatedError(fields.get("M", ""))
        super()._process_log_message(fields, last_query)  # type: ignore[misc] # not in the stubs


class _Primary(NamedTuple):
    """A host that was a primary, and when it became one: each promotion begins a timeline."""

    host: Host
    system: int
    timeline: int


# The primary that was found last, of each list of hosts.
_primaries: Final[dict[tuple[Host, ...], _Primary]] = {}

IDENTITY: Final = """
SELECT system_identifier AS system,
       ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer AS timeline
FROM pg_control_system()
"""


async def connect(
    dsn: str | None = None,
    session_class: type[Session] = Session,
    **arguments: Any,  # noqa: ANN401 - asyncpg's
) -> Session:
    """Connect to the one of several hosts that is a primary; the arguments are `asyncpg.connect`'s.

    The last primary is tried first, and each host has the whole `timeout` (asyncpg's own search
    shares it among them, so a frozen host hides the next). A former primary that has come back as
    one is none. Of two primaries the one that can be written to counts: another one may be about to
    become a standby. A single host may be a standby.

    Raises:
        StandbyError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: of
            several hosts the most telling error, with a note on each.
    """
    arguments["connection_class"] = session_class
    hosts = tuple(addresses(arguments))
    if len(hosts) <= 1:
        connection = await _connect(dsn, arguments)
        connection.hosts, connection.primary = hosts, None
        return connection
    if arguments["target_session_attrs"] == "any":
        arguments["target_session_attrs"] = "primary"
    connection = await _find_primary(hosts, dsn, arguments)
    assert connection.primary is not None  # noqa: S101 - of several
    _primaries[hosts] = connection.primary
    return connection


async def _find_primary(
    hosts: tuple[Host, ...], dsn: str | None, arguments: dict[str, Any]
) -> Session:
    errors: list[Exception] = []
    notes = []
    # Primaries that can't be written to: one of them, unless the next host is one that can be.
    read_only: list[Session] = []
    try:
        last = _primaries.get(hosts)
        for host in sorted(hosts, key=lambda host: last is None or host != last.host):
            try:
                session = await _connect_to(host, dsn, arguments)
                session.hosts = hosts
                session.primary = await _identify(session, host)
            except Exception as error:  # noqa: BLE001 - the next host may be the primary
                errors.append(error)
                notes.append(f"{shown([host])}: {str(error) or 'no answer in time'}")
                continue
            if not session.is_read_only():
                return session
            read_only.append(session)
        if read_only:
            return read_only.pop(0)
    finally:
        for session in read_only:
            session.terminate()
    telling = max(errors, key=_telling)
    for note in notes:
        telling.add_note(note)
    raise telling


async def _connect_to(host: Host, dsn: str | None, arguments: dict[str, Any]) -> Session:
    try:
        return await _connect(dsn, arguments | {"host": host[0], "port": host[1]})
    except asyncpg.TargetServerAttributeNotMatched as error:
        if arguments["target_session_attrs"] == "primary":
            raise StandbyError("is a standby") from error
        raise


async def _identify(session: Session, host: Host) -> _Primary:
    """Return what a session leads to.

    Raises:
        StandbyError: it is a former primary: another host has been promoted since.
    """
    last = _primaries.get(session.hosts)
    if last is not None and last.host == host:
        return last
    try:
        row = await session.fetchrow(IDENTITY, timeout=PIN_SECONDS)
        assert row is not None  # noqa: S101 - it always has a row
        found = _Primary(host, row["system"], row["timeline"])
        last = _primaries.get(session.hosts)  # another task may have found it meanwhile
        if last is not None and last.system == found.system and last.timeline > found.timeline:
            raise StandbyError("is a former primary")  # noqa: TRY301 - ended as for other errors
    except BaseException:
        session.terminate()
        raise
    return found


async def _connect(dsn: str | None, arguments: dict[str, Any]) -> Session:
    try:
        connection: Session = await asyncpg.connect(dsn, **arguments)
    except asyncpg.ConnectionDoesNotExistError as error:
        # With TLS 1.3 the server refuses a certificate after the handshake, and its alert may be
        # lost when it resets the connection.
        if "sslcert=" in (dsn or "") and isinstance(error.__cause__, OSError):
            raise CertificateRefusedError(str(error.__cause__)) from error
        raise
    return connection


def addresses(arguments: Mapping[str, Any]) -> list[Host]:
    """Return hosts and ports of the arguments of a connection; none: the local sockets."""
    hosts, ports = arguments["host"] or [], arguments["port"]
    hosts = hosts if isinstance(hosts, list) else [hosts]
    ports = ports if isinstance(ports, list) else [ports]
    return list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=True))


def shown(hosts: Iterable[Host]) -> str:
    """Return hosts and ports for people."""
    return ", ".join(f"{host} port {port}" for host, port in hosts) or "the local sockets"


def _telling(error: Exception) -> int:
    """Rank an error by what it says about the absence of a primary.

    A server that answers may be the primary; one that is a standby is none.
    """
    if isinstance(error, TimeoutError):
        return 0
    if isinstance(error, OSError) and "SSL" not in str(error):
        return 1
    if isinstance(error, StandbyError | asyncpg.TargetServerAttributeNotMatched):
        return 2
    return 3 if isinstance(error, asyncpg.CannotConnectNowError) else 4


async def open_session(arguments: dict[str, Any]) -> Session:
    """Connect to PostgreSQL with the keyword arguments that `Settings` makes.

    Raises:
        OldServerError: the server is too old.
        PoolerError: the pinned parameters have not reached PostgreSQL.
        StandbyError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: see
            `connect` and `outages`.
    """
    connection = await connect(**arguments)
    try:
        require_version(connection)
        await pin(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def require_version(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Check what the server has told of its version at the start of the session.

    Raises:
        OldServerError: it is too old.
    """
    version = connection.get_server_version()
    if version.major < OLDEST_SERVER:
        raise OldServerError(f"It is PostgreSQL {version.major}.{version.minor}.")


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
