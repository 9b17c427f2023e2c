"""What a job gets: its progress, its checkpoint, and writes that count only under its lease."""

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
import structlog
from pydantic_core import from_json, to_json

from balance_app.db.pool import Connection, Database
from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs import children
from balance_app.jobs.leases import Lease, Progress
from balance_app.jobs.repository import Claimed, JobRepository
from balance_app.jobs.scope import CURRENT, Scope, under
from balance_app.jobs.transaction import (
    NO_ANSWER,
    LeaseLostError,
    RunTransaction,
    TransactionLimitError,
)

CHECKPOINT_BYTES: Final = 8192
# How much of an error is kept in a run's result.
MESSAGE_CHARACTERS: Final = 1900
MOST_CAUSES: Final = 10
DEEPEST_CAUSE: Final = 5
_NUL: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # in JSON; a backslash may be a character itself
# What a run that was requested to stop has come to.
Stopped = Literal["cancelled", "released", "timed_out"]


class CheckpointError(ValueError):
    """The state can't be a checkpoint; the message says why."""


class RunStoppedError(Exception):
    """The run was requested to stop (raised in functions that run in a thread)."""


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
        # what was done already when a resumed run first reported how far it is
        self._begun_at: int | None = None
        # the one that is open
        self._transaction: RunTransaction | None = None
        self.lease: Lease | None = None
        # set when it is requested to stop: what it is to end as, and why
        self.stopped: tuple[Stopped, str] | None = None
        # does its task go on, as it does when its function is async, or returned an awaitable?
        self.awaited = True
        # what executes for it, once it does
        self.scope: Scope | None = None

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Say how far the run is; the next heartbeat writes it down.

        It is only for show and never raises: where `done` is no number, the last report stays.
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
        the run is requested to stop the child gets SIGTERM,
            and half a second later it is killed. Its
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
        except (asyncpg.PostgresError, *NO_ANSWER) as error:
            problem = transaction.classify(error)
            if problem is None:
                raise
            # A limit says it all; the driver's error adds nothing.
            raise problem from None if isinstance(problem, TransactionLimitError) else error
        finally:
            self._transaction = None


def encode(state: object) -> str:
    """Return a checkpoint as JSON that can be read back.

    Raises:
        ValueError: there is none: not JSON, too deep, or a number that JSON or Python can't read.
    """
    encoded = to_json(state)
    from_json(encoded, allow_inf_nan=False)  # what can't be read would be the end of each owner
    return encoded.decode()


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
    text = f"{type(error).__name__}: {in_words(error)[:MESSAGE_CHARACTERS]}"
    if depth == DEEPEST_CAUSE:
        return text
    if isinstance(error, BaseExceptionGroup):
        inside = [describe(each, depth + 1) for each in error.exceptions[:MOST_CAUSES]]
        text = f"{text}: {'; '.join(inside)}"
    if error.__cause__ is not None:
        text = f"{text} (from {describe(error.__cause__, depth + 1)})"
    return text


def in_words(value: object) -> str:
    """Return what a value says of itself, whatever it is."""
    try:
        return str.__str__(str(value))
    except Exception as error:  # noqa: BLE001 - a text that can't be had must not lose the run
        return f"a {type(value).__name__} without a text ({type(error).__name__})"
