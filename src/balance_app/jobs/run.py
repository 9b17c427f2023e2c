"""What a job's function gets: progress, checkpoints, and transactions under the run's lease."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from datetime import datetime
from math import inf
from time import monotonic
from typing import Any, Final, Literal

import asyncpg

from balance_app.db.pool import Connection, Database
from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs import children
from balance_app.jobs.leases import Lease, Progress
from balance_app.jobs.repository import Claimed, JobRepository
from balance_app.jobs.run_log import RunLog, safe_str, storable
from balance_app.jobs.scope import CURRENT, Scope, under
from balance_app.jobs.stored_json import as_json
from balance_app.jobs.transaction import (
    NO_ANSWER,
    LeaseLostError,
    RunTransaction,
    TransactionLimitError,
)
from balance_app.sessions import SessionError

CHECKPOINT_BYTES: Final = 8192
# in JSON, where an even number of backslashes is no escape
_NUL: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")
# The outcomes of a run that was requested to stop.
Stopped = Literal["cancelled", "released", "timed_out"]


class CheckpointError(ValueError):
    """The state can't be a checkpoint; the message says why."""


class RunStoppedError(Exception):
    """The run was requested to stop (raised in functions that run in a thread)."""


class Run:
    """One run of a job, for its function. Nothing it writes takes effect once its lease is lost.

    Attributes:
        name: the job's.
        fence: higher in each run of the job; another system can refuse writes with a lower one.
        due_at: the tick. Retries and takeovers of a tick have the same one, so it can be an
            idempotency key for effects outside of the database.
        attempt: how many runs this tick had before.
        resumed: the last checkpoint of this tick's lost or released runs, or None.
        args: what its function is called with, as JSON: declared, or given with the request to run.
        log: a logger of structlog: `run.log.info("sent", mails=3)`. Its last 200 lines (64 KiB) are
            kept with the run, and go to the instance's log with job and fence.
    """

    def __init__(  # noqa: PLR0913 - what a run is made of
        self,
        claimed: Claimed,
        database: Database,
        jobs: JobRepository,
        *,
        min_seconds: float,
        args: Mapping[str, Any] | None = None,
        kept_log: RunLog | None = None,
    ) -> None:
        self.name: Final = claimed.name
        self.fence: Final = claimed.fence
        self.due_at: Final[datetime] = claimed.due_at
        self.attempt: Final = claimed.attempt
        self.resumed: Final[Any] = claimed.resumed
        self.args: Final[Mapping[str, Any]] = args or {}
        self.kept_log: Final = kept_log or RunLog(claimed.name, claimed.fence)
        self.log: Final = self.kept_log.log
        self._database = database
        self._jobs = jobs
        self._min_seconds = min_seconds
        self._started = monotonic()
        # the `done` of the first progress report, if the run was resumed
        self._begun_at: int | None = None
        # the open one
        self._transaction: RunTransaction | None = None
        self.lease: Lease | None = None
        # set by a request to stop: the outcome to end with, and the reason
        self.stopped: tuple[Stopped, str] | None = None
        # whether its function is async or has returned an awaitable
        self.awaited = True
        # all that executes for it; None before it starts
        self.scope: Scope | None = None

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report how far the run is; the next heartbeat writes it to the job's row.

        For display only. It never raises: if `done` is no number, the report is ignored.
        """
        counted = _count(done)
        if counted is None:
            return
        if self._begun_at is None:
            self._begun_at = 0 if self.resumed is None else counted
        if self.lease is not None:
            text = storable(self.kept_log.mask(safe_str(note)))
            self.lease.progress = Progress(counted, _count(total), text)

    async def pace(self) -> None:
        """Sleep until the elapsed share of the minimum duration is the share that is done.

        A resumed run spreads the work that was left over the whole duration.
        """
        done, total, _ = self.lease.progress if self.lease is not None else (None, None, None)
        if done is None or not total or self._begun_at is None:
            return
        rest = max(1, total - self._begun_at)
        share = min(1.0, max(0.0, (done - self._begun_at) / rest))
        await asyncio.sleep(self._started + self._min_seconds * share - monotonic())

    async def end_work(self) -> None:
        """Record, for display, that the function has returned and the run waits."""
        try:
            await self._jobs.end_work(self.name, self.fence)
        except (DatabaseUnavailable, Overloaded) as problem:
            self.kept_log.instance_logger.debug(
                "the end of the work is not recorded", reason=problem.detail
            )

    async def checkpoint(self, state: object) -> None:
        """Store the state from which the next run continues after a loss or a release.

        None clears it. Inside `transaction` it is written by that transaction's commit.

        Raises:
            CheckpointError: it is not JSON, has more than 8 KiB, or contains a NUL.
            LeaseLostError: the run has lost its lease.
            DatabaseUnavailable: the database can't be reached.
            Overloaded: no connection was free in time.
        """
        try:
            text = as_json(state)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"A checkpoint must be JSON: {error}") from None
        if len(text.encode()) > CHECKPOINT_BYTES or _NUL.search(text):
            raise CheckpointError(
                f"A checkpoint has at most {CHECKPOINT_BYTES} bytes of JSON and no NUL; "
                f"this one has {len(text.encode())} bytes."
            )
        if self._transaction is not None:
            self._transaction.checkpoint = text
        elif not await self._jobs.checkpoint(self.name, self.fence, text):
            raise LeaseLostError(f"{self.name} has lost its lease.")

    @property
    def executor(self) -> Executor:
        """An executor whose threads belong to the run, for libraries that take one."""
        assert self.scope is not None  # noqa: S101 - it executes
        return self.scope

    async def subprocess(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        **options: Any,  # noqa: ANN401 - passed on
    ) -> asyncio.subprocess.Process:
        """Start a child process that ends with the run, and however the instance's process ends.

        Takes what `asyncio.create_subprocess_exec` takes: stdin, stdout, stderr, cwd, limit. When
        the run is requested to stop, the child gets SIGTERM, and half a second later it is killed.
        As soon as the command ends, its descendants are killed, also those in other sessions.
        Processes that another daemon starts at its request are not covered.

        Raises:
            FileNotFoundError: there is no such program.
        """
        assert self.scope is not None  # noqa: S101 - it executes
        return await children.start(self.scope, command, env, options)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Open a transaction that commits only while this run holds its lease (READ COMMITTED).

        The lease is checked and the transaction committed in one message, with the job's row locked
        in between, so no other instance can claim the job before the commit. Keep transactions
        short: the pool allows few at once, and the server ends one that lasts for three leases. A
        run has at most one open.

        Raises:
            LeaseLostError: when it begins or commits; nothing was written.
            TransactionLimitError: the server ended it, as it was idle for a lease's length or
                lasted for three; the run has failed.
            DatabaseUnavailable: the connection was lost; `applied` says whether the commit may have
                taken effect.
        """
        if self._transaction is not None:
            raise RuntimeError(f"{self.name} has a transaction open already.")
        self._transaction = transaction = RunTransaction(self.name, self.fence, self._jobs)
        scope = CURRENT.get()
        try:
            # The pool and its connections outlive the run.
            with under(None):
                async with self._database.lend() as connection:
                    await transaction.enter(connection)
                    with transaction.watch(connection), under(scope):
                        yield connection
                    await transaction.commit(connection)
        except (asyncpg.PostgresError, SessionError, *NO_ANSWER) as error:
            problem = transaction.classify(error)
            if problem is None:
                raise
            # The driver's error would add nothing to a limit.
            raise problem from None if isinstance(problem, TransactionLimitError) else error
        finally:
            self._transaction = None


def _count(number: object) -> int | None:
    """Return a number that PostgreSQL can store, so that no report can fail a heartbeat."""
    try:
        if not -inf < number < inf:  # type: ignore[operator]
            return None
        return int(max(0, min(number, 2**53)))  # type: ignore[call-overload]
    except Exception:  # noqa: BLE001 - an object that is no number
        return None
