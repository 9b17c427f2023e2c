"""What a job gets: its progress, its checkpoint, and writes that count only under its lease."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from math import inf
from time import monotonic
from typing import Any, Final, Literal

import asyncpg
import structlog

from balance_app.db.outages import applied_if_unavailable, is_fatal
from balance_app.db.pool import Connection, Database
from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs import children
from balance_app.jobs.leases import Lease
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

CHECKPOINT_BYTES: Final = 8192
# How much of an error is told in a run's result.
MESSAGE_CHARACTERS: Final = 1900
MOST_CAUSES: Final = 10
DEEPEST_CAUSE: Final = 5
# of a limit: the clocks of the server and of this process, and the way between them
ALMOST: Final = 0.95
NO_ANSWER: Final = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_NUL: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # in JSON; a backslash may be a character itself
# What a run that was told to stop has come to.
Stopped = Literal["cancelled", "interrupted", "timed_out"]


class LeaseLostError(Exception):
    """The run has lost its lease: what it wanted to write was not written."""


class TransactionLimitError(Exception):
    """The server ended a transaction that was idle or lasted too long: nothing was written."""


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
        resumed: the last checkpoint of a run that was lost or released, or None.
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
        # the one that is open
        self._transaction: _Transaction | None = None
        self.lease: Lease | None = None
        # set when it is told to stop: what it is to end as, and why
        self.stopped: tuple[Stopped, str] | None = None
        # does its task go on, as it does when its function is async, or returned an awaitable?
        self.awaited = True
        # what executes for it, once it does
        self.scope: Scope | None = None

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Say how far the run is; the next heartbeat writes it down.

        It is only for show and never raises: where `done` is no number, what was said last stays.
        """
        counted = _count(done)
        if counted is None:
            return
        if self._begun_at is None:
            self._begun_at = 0 if self.resumed is None else counted
        if self.lease is not None:
            self.lease.progress = Progress(counted, _count(total), plain(in_words(note)))

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
        except (DatabaseUnavailable, Overloaded) as problem:
            self.log.debug("the end of the work is not noted", reason=problem.detail)

    async def checkpoint(self, state: object) -> None:
        """Write down what the next owner goes on from after a loss; None forgets it.

        Inside `transaction` it is written with it, and only if it commits.

        Raises:
            CheckpointError: not JSON, or more than 8 KiB of it.
            LeaseLostError: the run has lost its lease.
            DatabaseUnavailable: it can't be reached.
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
        if self._transaction is not None:
            self._transaction.checkpoint = text
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
            TransactionLimitError: the server ended it, as it was idle for a lease's time or lasted
                for three; the job has failed.
            DatabaseUnavailable: the connection was lost; `applied` says what is known of the
                commit.
        """
        if self._transaction is not None:
            raise RuntimeError(f"{self.name} has a transaction open already.")
        self._transaction = transaction = _Transaction(self.name, self.fence, self._jobs)
        scope = CURRENT.get()
        try:
            # The pool and its connections outlive the run.
            with under(None):
                async with self._database.lend() as connection:
                    await transaction.enter(connection)
                    with transaction.watch(connection), under(scope):
                        yield connection
                    await transaction.commit(connection)
        except (asyncpg.PostgresError, *NO_ANSWER) as error:
            problem = transaction.classify(error)
            if problem is None:
                raise
            # A limit says it all; the driver's error adds nothing.
            raise problem from None if isinstance(problem, TransactionLimitError) else error
        finally:
            self._transaction = None


class _Transaction:
    """A transaction of a run: entered and committed under its lease, its errors classified."""

    def __init__(self, name: str, fence: int, jobs: JobRepository) -> None:
        self.name: Final = name
        self.fence: Final = fence
        self._jobs = jobs
        # what it writes as the checkpoint
        self.checkpoint: str | None = None
        self._activity = _Activity()
        # of something else in the body: the connection is well
        self._own: Exception | None = None

    async def enter(self, connection: Connection) -> None:
        """Begin, if the run holds its lease."""
        await connection.execute(self._jobs.begin)
        holder = self._jobs.me.id
        if await connection.fetchrow(ENTER, self.name, self.fence, holder) is None:
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
        idle = f"it was idle for longer than {self._jobs.idle_seconds:g} s"
        long = f"it lasted for longer than {self._jobs.transaction_seconds:g} s"
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
        if ended_at - self._activity.begun_at > self._jobs.transaction_seconds * ALMOST:
            return f"The server ended a transaction: {long}."
        if ended_at - self._activity.last_at > self._jobs.idle_seconds * ALMOST:
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


def _count(number: object) -> int | None:
    """Return a number that PostgreSQL can hold: what one run says may not spoil a heartbeat."""
    try:
        if not -inf < number < inf:  # type: ignore[operator]
            return None
        return int(max(0, min(number, 2**53)))  # type: ignore[call-overload]
    except Exception:  # noqa: BLE001 - whatever it is, it is no number
        return None


def plain(text: str, limit: int = 500) -> str:
    """Return text that PostgreSQL can hold."""
    return text[:limit].replace("\0", "").encode("utf-8", "replace").decode()


def describe(error: BaseException, depth: int = 0) -> str:
    """Return an error in a sentence, with what is in it when it is a group, and what it is from."""
    said = f"{type(error).__name__}: {in_words(error)[:MESSAGE_CHARACTERS]}"
    if depth == DEEPEST_CAUSE:
        return said
    if isinstance(error, BaseExceptionGroup):
        inside = [describe(each, depth + 1) for each in error.exceptions[:MOST_CAUSES]]
        said = f"{said}: {'; '.join(inside)}"
    if error.__cause__ is not None:
        said = f"{said} (from {describe(error.__cause__, depth + 1)})"
    return said


def in_words(value: object) -> str:
    """Return what a value says of itself, whatever it is."""
    try:
        return str.__str__(str(value))
    except Exception as error:  # noqa: BLE001 - a text that can't be had must not lose the run
        return f"a {type(value).__name__} without a text ({type(error).__name__})"
