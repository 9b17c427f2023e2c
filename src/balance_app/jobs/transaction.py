"""The transactions of a run: entered and committed only while it holds its lease."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

import asyncpg

from balance_app.db.outages import applied_if_unavailable, is_fatal
from balance_app.db.pool import Connection
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.repository import JobRepository

# of a limit: the clocks of the server and of this process, and the way between them
ALMOST: Final = 0.95
NO_ANSWER: Final = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# A transaction whose instance has fallen silent is ended by the server: see
# `Settings.job_arguments`. Half-way through a statement (asyncpg sends a new one in two parts) it
# is not idle to the server; since version 17 this limit ends it there too.
BEGIN: Final = """
BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE;
SELECT set_config('transaction_timeout', '{milliseconds}ms', true)
WHERE current_setting('server_version_num')::integer >= 170000
"""
LONGEST_LEASES: Final = 3

# The run is named inside the transaction; nothing is locked before its last message.
ENTER: Final = """
SELECT set_config('balance_app.job', name, true),
       set_config('balance_app.fence', fence::text, true),
       set_config('balance_app.holder', holder::text, true)
FROM jobs
WHERE name = $1 AND fence = $2 AND holder = $3 AND lease_expires_at > clock_timestamp()
"""

REMEMBER: Final = "SELECT set_config('balance_app.checkpoint', $1, true)"

# Checked and committed in one message: an instance that is frozen in between holds no lock, and
# nobody can take the job between the check and the commit. What the job has set meanwhile (its
# search path, its role) must not hide the function, nor put other tables in the place of ours.
COMMIT: Final = """
SET LOCAL search_path TO DEFAULT; SET LOCAL ROLE NONE; SELECT hold_lease(); COMMIT
"""
LEASE_LOST: Final = "BL001"  # what hold_lease() raises


class LeaseLostError(Exception):
    """The run has lost its lease: what it wanted to write was not written."""


class TransactionLimitError(Exception):
    """The server ended a transaction that was idle or lasted too long: nothing was written."""


class RunTransaction:
    """A transaction of a run: entered and committed under its lease, its errors classified."""

    def __init__(self, name: str, fence: int, jobs: JobRepository) -> None:
        self.name: Final = name
        self.fence: Final = fence
        self._holder = jobs.me.id
        self._idle_seconds = jobs.lease.total_seconds()
        self._longest_seconds = jobs.lease.total_seconds() * LONGEST_LEASES
        # what it writes as the checkpoint
        self.checkpoint: str | None = None
        self._activity = _Activity()
        # of something else in the body: the connection is well
        self._own: Exception | None = None

    async def enter(self, connection: Connection) -> None:
        """Begin, if the run holds its lease."""
        milliseconds = round(self._longest_seconds * 1000)
        await connection.execute(BEGIN.format(milliseconds=milliseconds))
        if await connection.fetchrow(ENTER, self.name, self.fence, self._holder) is None:
            raise LeaseLostError(f"{self.name} has lost its lease.")

    @contextmanager
    def watch(self, connection: Connection) -> Iterator[None]:
        """Note what happens to the connection while the job has it."""
        try:
            with self._activity.of(connection):
                yield
        except NO_ANSWER as error:
            self._own = None if self._activity.ended_at is not None else error
            raise

    async def commit(self, connection: Connection) -> None:
        """Check the lease and commit, in one message."""
        if self.checkpoint is not None:
            await connection.execute(REMEMBER, self.checkpoint)
        await connection.execute(COMMIT)

    def classify(self, error: Exception) -> Exception | None:
        """Return what an error of the driver means to the run, if it is not the statement's."""
        if error is self._own:
            return None
        state = error.sqlstate if isinstance(error, asyncpg.PostgresError) else None
        if state == LEASE_LOST:
            return LeaseLostError(f"{self.name} has lost its lease.")
        limit = self._limit(error)
        if limit is not None:
            return TransactionLimitError(limit)
        applied = applied_if_unavailable(error)
        # A statement that was rolled back is the job's affair; a refused connection is an outage.
        if applied is None or (state is not None and applied == "no" and not is_fatal(error)):
            return None
        return DatabaseUnavailable(
            "The database became unavailable in a transaction.", applied=applied
        )

    def _limit(self, error: Exception) -> str | None:
        """Say which limit of the server a transaction has met, if one ended it."""
        idle = f"it was idle for longer than {self._idle_seconds:g} s"
        long = f"it lasted for longer than {self._longest_seconds:g} s"
        for each in (error, error.__cause__):
            match getattr(each, "sqlstate", None):
                case "25P03":
                    return f"The server ended a transaction: {idle} (SQLSTATE 25P03)."
                case "25P04":
                    return f"The server ended a transaction: {long} (SQLSTATE 25P04)."
        # The driver does not pass on what the server says while nothing is under way.
        ended_at = self._activity.ended_at
        if ended_at is None and isinstance(error, NO_ANSWER):
            ended_at = monotonic()  # it has ended, but its end has not been seen yet
        if ended_at is None:
            return None
        if ended_at - self._activity.begun_at > self._longest_seconds * ALMOST:
            return f"The server ended a transaction: {long}."
        if ended_at - self._activity.last_at > self._idle_seconds * ALMOST:
            return f"The server ended a transaction: {idle}."
        return None


class _Activity:
    """When a transaction began, when its last statement ended, and when its connection did."""

    def __init__(self) -> None:
        self.begun_at = self.last_at = monotonic()
        self.ended_at: float | None = None

    @contextmanager
    def of(self, connection: Connection) -> Iterator[None]:
        """Watch a connection."""
        self.begun_at = self.last_at = monotonic()
        connection.add_query_logger(self._note_statement)
        connection.add_termination_listener(self._note_end)
        try:
            yield
        finally:
            try:
                if connection.is_closed():
                    self._note_end()
                connection.remove_query_logger(self._note_statement)
                connection.remove_termination_listener(self._note_end)
            except asyncpg.InterfaceError:  # it was closed, and the pool has taken it back already
                self._note_end()

    def _note_statement(self, _statement: object) -> None:
        self.last_at = monotonic()

    def _note_end(self, _connection: object = None) -> None:
        if self.ended_at is None:
            self.ended_at = monotonic()
