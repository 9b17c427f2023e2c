"""The transactions of a run: they begin and commit only while it holds its lease."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

import asyncpg

from balance_app.db.outages import applied_if_unavailable, is_fatal
from balance_app.db.pool import Connection
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.repository import JobRepository

# The share of a limit from which it counts as reached: this process and the server measure apart.
LIMIT_SHARE: Final = 0.95
NO_ANSWER: Final = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# The server ends a transaction that is idle for too long, as its instance may be frozen: see
# `Settings.job_arguments`. Between the two messages in which asyncpg sends a new statement the
# transaction is not idle; there `transaction_timeout` ends it, from version 17 on.
BEGIN: Final = """
BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE;
SELECT set_config('transaction_timeout', '{milliseconds}ms', true)
WHERE current_setting('server_version_num')::integer >= 170000
"""
LONGEST_LEASES: Final = 3

# Names the run to `hold_lease()` by settings of the transaction; only the commit locks its row.
ENTER: Final = """
SELECT set_config('balance_app.job', name, true),
       set_config('balance_app.fence', fence::text, true),
       set_config('balance_app.holder', holder::text, true)
FROM jobs
WHERE name = $1 AND fence = $2 AND holder = $3 AND lease_expires_at > clock_timestamp()
"""

SET_CHECKPOINT: Final = "SELECT set_config('balance_app.checkpoint', $1, true)"

# Checked and committed in one message: an instance can't freeze in between with the row locked, and
# no other instance can claim the job between the check and the commit. A search path or role that
# the job has set must not replace the function or the tables that it uses.
COMMIT: Final = """
SET LOCAL search_path TO DEFAULT; SET LOCAL ROLE NONE; SELECT hold_lease(); COMMIT
"""
LEASE_LOST: Final = "BL001"  # what hold_lease() raises


class LeaseLostError(Exception):
    """The run has lost its lease: nothing was written."""


class TransactionLimitError(Exception):
    """The server ended a transaction that was idle or lasted too long: nothing was written."""


class RunTransaction:
    """A transaction of a run: begun and committed under its lease, its errors classified."""

    def __init__(self, name: str, fence: int, jobs: JobRepository) -> None:
        self.name: Final = name
        self.fence: Final = fence
        self._holder = jobs.me.id
        self._idle_seconds = jobs.lease.total_seconds()
        self._longest_seconds = jobs.lease.total_seconds() * LONGEST_LEASES
        # the checkpoint to commit with it
        self.checkpoint: str | None = None
        self._activity = _Activity()
        # an error of the job's own, while the connection was open
        self._job_error: Exception | None = None

    async def enter(self, connection: Connection) -> None:
        """Begin, while the run holds its lease; longer than that it waits for no answer."""
        # Several statements have no parameters.
        begin = BEGIN.format(milliseconds=round(self._longest_seconds * 1000))
        await connection.execute(begin, timeout=self._idle_seconds)
        run = self.name, self.fence, self._holder
        if await connection.fetchrow(ENTER, *run, timeout=self._idle_seconds) is None:
            raise LeaseLostError(f"{self.name} has lost its lease.")

    @contextmanager
    def watch(self, connection: Connection) -> Iterator[None]:
        """Record the connection's activity while the job uses it."""
        try:
            with self._activity.of(connection):
                yield
        except NO_ANSWER as error:
            self._job_error = None if self._activity.ended_at is not None else error
            raise

    async def commit(self, connection: Connection) -> None:
        """Check the lease and commit, in one message."""
        if self.checkpoint is not None:
            await connection.execute(SET_CHECKPOINT, self.checkpoint)
        await connection.execute(COMMIT)

    def classify(self, error: Exception) -> Exception | None:
        """Return the error of the run that a driver's error means; None: it is the statement's."""
        if error is self._job_error:
            return None
        state = error.sqlstate if isinstance(error, asyncpg.PostgresError) else None
        if state == LEASE_LOST:
            return LeaseLostError(f"{self.name} has lost its lease.")
        limit = self._limit(error)
        if limit is not None:
            return TransactionLimitError(limit)
        applied = applied_if_unavailable(error)
        # A statement's error that was rolled back is the job's; a fatal one is an outage.
        if applied is None or (state is not None and applied == "no" and not is_fatal(error)):
            return None
        return DatabaseUnavailable(
            "The database became unavailable in a transaction.", applied=applied
        )

    def _limit(self, error: Exception) -> str | None:
        """Return which limit of the server ended the transaction, if one did."""
        idle = f"it was idle for longer than {self._idle_seconds:g} s"
        long = f"it lasted for longer than {self._longest_seconds:g} s"
        for each in (error, error.__cause__):
            match getattr(each, "sqlstate", None):
                case "25P03":
                    return f"The server ended a transaction: {idle} (SQLSTATE 25P03)."
                case "25P04":
                    return f"The server ended a transaction: {long} (SQLSTATE 25P04)."
        # The driver drops an error that the server sends while no statement is executing.
        ended_at = self._activity.ended_at
        if ended_at is None and isinstance(error, NO_ANSWER):
            ended_at = monotonic()  # the listener has not been called yet
        if ended_at is None:
            return None
        if ended_at - self._activity.begun_at > self._longest_seconds * LIMIT_SHARE:
            return f"The server ended a transaction: {long}."
        if ended_at - self._activity.last_at > self._idle_seconds * LIMIT_SHARE:
            return f"The server ended a transaction: {idle}."
        return None


class _Activity:
    """The times of a transaction's begin, of its last statement, and of its connection's end."""

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
            except asyncpg.InterfaceError:  # closed, and already released to the pool
                self._note_end()

    def _note_statement(self, _statement: object) -> None:
        self.last_at = monotonic()

    def _note_end(self, _connection: object = None) -> None:
        if self.ended_at is None:
            self.ended_at = monotonic()
