"""What a job gets: its progress, its checkpoint, and writes that count only under its lease."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from datetime import datetime
from time import monotonic
from typing import Any, Final, Literal

import asyncpg
import structlog

from balance_app.database import Connection, Database
from balance_app.errors import DatabaseAway, Overloaded
from balance_app.jobs import children
from balance_app.jobs.lease import Lease
from balance_app.jobs.repository import (
    COMMIT,
    ENTER,
    LEASE_LOST,
    REMEMBER,
    Claimed,
    JobRepository,
    Progress,
    encode,
)
from balance_app.jobs.scope import CURRENT, Scope, under
from balance_app.outages import is_away, is_fatal

CHECKPOINT_BYTES: Final = 8192
NO_ANSWER: Final = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_NUL: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # in JSON; a backslash may be a character itself
# What a run that was told to stop has come to.
Stopped = Literal["cancelled", "interrupted", "timed_out"]


class LeaseLostError(Exception):
    """The run has lost its lease: what it wanted to write was not written."""


class CheckpointError(ValueError):
    """The state can't be a checkpoint; the message says why."""


class RunStoppedError(Exception):
    """The run was told to stop (raised in functions that run in a thread)."""


class Run:
    """One run of a job, for its function. Nothing it writes takes effect once its lease is lost.

    Attributes:
        name: the job's.
        fence: higher in each run of the job; who gets writes from outside can refuse lower ones.
        due_at: the tick; the same when it is tried again or taken over: an idempotency key for
            effects outside of the database.
        attempt: how many runs this tick had before.
        resumed: the last checkpoint of a run that was lost or handed back, or None.
        log: a logger that names job and fence.
    """

    def __init__(
        self, claimed: Claimed, database: Database, jobs: JobRepository, *, min_seconds: float
    ) -> None:
        self.name: Final = claimed.name
        self.fence: Final = claimed.fence
        self.due_at: Final[datetime] = claimed.due_at
        self.attempt: Final = claimed.attempt
        self.resumed: Final[Any] = claimed.resumed
        self.log: Final = structlog.get_logger("balance_app.jobs.run").bind(
            job=claimed.name, fence=claimed.fence
        )
        self._database = database
        self._jobs = jobs
        self._min_seconds = min_seconds
        self._started = monotonic()
        # what was done already when a resumed run first said how far it is
        self._begun_at: int | None = None
        # what the transaction that is open writes as the checkpoint
        self._inside: list[str] | None = None
        self.lease: Lease | None = None
        # set when it is told to stop: what it is to end as, and why
        self.stopped: tuple[Stopped, str] | None = None
        # what executes for it, once it does
        self.scope: Scope | None = None

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Say how far the run is; the next heartbeat writes it down."""
        if self._begun_at is None:
            self._begun_at = 0 if self.resumed is None else _count(done)
        if self.lease is not None:
            self.lease.progress = Progress(
                _count(done), None if total is None else _count(total), plain(note)
            )

    async def pace(self) -> None:
        """Sleep until as much of the job's minimum duration is over as is done of its total.

        A run that was resumed spreads what it found left.
        """
        done, total, _ = self.lease.progress if self.lease is not None else (None, None, None)
        if done is None or not total or self._begun_at is None:
            return
        rest = max(1, total - self._begun_at)
        share = min(1.0, max(0.0, (done - self._begun_at) / rest))
        await asyncio.sleep(self._started + self._min_seconds * share - monotonic())

    async def end_work(self) -> None:
        """Note, for people, that the function has returned and the run only lasts on."""
        try:
            await self._jobs.end_work(self.name, self.fence)
        except (DatabaseAway, Overloaded) as problem:
            self.log.debug("the end of the work is not noted", reason=problem.detail)

    async def checkpoint(self, state: object) -> None:
        """Write down what the next owner goes on from after a loss; None forgets it.

        Inside `transaction` it is written with it, and only if it commits.

        Raises:
            CheckpointError: not JSON, or more than 8 KiB of it.
            LeaseLostError: the run has lost its lease.
            DatabaseAway: it can't be reached.
        """
        try:
            text = encode(state)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"A checkpoint must be JSON: {error}") from None
        if len(text.encode()) > CHECKPOINT_BYTES or _NUL.search(text):
            raise CheckpointError(
                f"A checkpoint has at most {CHECKPOINT_BYTES} bytes of JSON and no NUL; "
                f"this one has {len(text.encode())} bytes."
            )
        if self._inside is not None:
            self._inside[:] = [text]
        elif not await self._jobs.checkpoint(self.name, self.fence, text):
            raise LeaseLostError(f"{self.name} has lost its lease.")

    @property
    def executor(self) -> Executor:
        """An executor whose threads belong to the run, for libraries that want one."""
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
        the run is told to stop the child gets SIGTERM, and half a second later it is killed. Its
        descendants are killed with it, also those in sessions of their own, as soon as the
        command ends. Not covered are processes that it asks another daemon to start.

        Raises:
            FileNotFoundError: there is no such program.
        """
        assert self.scope is not None  # noqa: S101 - it executes
        return await children.start(self.scope, command, env, options)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Open a transaction that commits only while this run holds its lease (READ COMMITTED).

        The check and the commit are one message, and the job's row is locked from one to the other:
        nobody can take the job over in between. Keep transactions short: few run at once, and the
        server ends one that lasts for three leases. A run has one at a time.

        Raises:
            LeaseLostError: at either end; nothing was written.
            DatabaseAway: the connection was lost; `applied` says what is known of the commit.
        """
        if self._inside is not None:
            raise RuntimeError(f"{self.name} has a transaction open already.")
        remembered: list[str] = []
        self._inside = remembered
        own: Exception | None = None  # of something else in the body: the connection is well
        scope = CURRENT.get()
        try:
            # The pool and its connections outlive the run.
            with under(None):
                async with self._database.lend() as connection:
                    await connection.execute(self._jobs.begin)
                    holder = self._jobs.me.id
                    if await connection.fetchrow(ENTER, self.name, self.fence, holder) is None:
                        raise LeaseLostError(f"{self.name} has lost its lease.")
                    try:
                        with under(scope):
                            yield connection
                    except NO_ANSWER as error:
                        own = None if connection.is_closed() else error
                        raise
                    if remembered:
                        await connection.execute(REMEMBER, remembered[0])
                    await connection.execute(COMMIT)
        except (asyncpg.PostgresError, *NO_ANSWER) as error:
            problem = None if error is own else self._problem(error)
            if problem is None:
                raise
            raise problem from error
        finally:
            self._inside = None

    def _problem(self, error: Exception) -> Exception | None:
        """Return what an error of the driver means to the run, if it is not the statement's."""
        state = error.sqlstate if isinstance(error, asyncpg.PostgresError) else None
        if state == LEASE_LOST:
            return LeaseLostError(f"{self.name} has lost its lease.")
        applied = is_away(error)
        # A statement that was rolled back is the job's affair; a refused connection is an outage.
        if applied is None or (state is not None and applied == "no" and not is_fatal(error)):
            return None
        return DatabaseAway("The database went away in a transaction.", applied=applied)


def _count(number: int) -> int:
    """Return a number that PostgreSQL can hold: what one run says may not spoil a heartbeat."""
    return max(0, min(int(number), 2**53))


def plain(text: str, limit: int = 500) -> str:
    """Return text that PostgreSQL can hold."""
    return text[:limit].replace("\0", "").encode("utf-8", "replace").decode()


def in_words(value: object) -> str:
    """Return what a value says of itself, whatever it is."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - a text that can't be had must not lose the run
        return f"a {type(value).__name__} without a text ({type(error).__name__})"
