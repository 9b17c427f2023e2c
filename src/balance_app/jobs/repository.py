"""The claims, completions, checkpoints and retracted losses of one instance.

Each method runs one of the `statements` and names its parameters and columns.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
from pydantic_core import from_json

from balance_app.db.pool import Connection, Database, end_implicit_transaction, read, write
from balance_app.jobs import statements
from balance_app.jobs.declarations import (
    LIVE,
    LONGEST_QUARANTINE,
    LOST_LIMIT,
    QUARANTINE,
    Capabilities,
    Declared,
    declare,
)
from balance_app.jobs.run_log import WRITE_LOGS, Unwritten, log_arguments
from balance_app.jobs.schedule import TickRange

# The results in the history of runs that reported none.
STOPPED: Final = "its instance was stopped"
GONE: Final = "its instance stopped responding (no heartbeat until its lease expired)"
UNREACHABLE: Final = "its instance could not reach the database until its lease expired"
NOT_BEGUN: Final = "its instance could not reach the database and never started it"
STARTUP_BATCH: Final = 500


class Me(NamedTuple):
    """This instance as the holder of leases: an id for this process, and a name for people."""

    id: UUID
    server: str


class ClaimPolicy(NamedTuple):
    """When this instance may claim a job. It depends on no other instance."""

    # how much later than ready it may claim a job, for the runs that it has
    backoff: timedelta
    # its current round, and how much later it claims for each round it is ahead
    round: int
    tie_break: timedelta
    # whether it has run for longer than the warm-up (JOB_WARM_UP_SECONDS)
    warmed_up: bool
    warm_up: timedelta
    # until when, by PostgreSQL's clock, it may claim a job whose lease has expired; None: not now
    takes_over_until: datetime | None


class Claimed(NamedTuple):
    """A run whose lease this instance now holds."""

    name: str
    fence: int
    due_at: datetime
    attempt: int
    resumed: Any
    cancel_requested_by: str | None
    schedule: str
    anchor_at: datetime
    started_at: datetime
    round: int
    # of this tick: releases in a row for other reasons than the stop of an instance, and retries
    # after a failure
    releases: int = 0
    retries: int = 0
    # how many of the job's latest runs in a row failed or timed out
    failure_streak: int = 0
    # what it was requested with, to replace declared arguments
    requested_args: dict[str, Any] | None = None


class ClaimResult(NamedTuple):
    """The result of a claim: a run, or when to try again."""

    # when the claim was sent (monotonic), and the server's time when it was executed
    sent_at: float
    now: datetime
    claimed: Claimed | None
    # a job that was freed, not started: quarantined after losses, or lost while paused
    freed: str | None
    # until this instance could claim the next job, if there is one
    wait_seconds: float | None
    # whether one of the next jobs is running: it may be released at any moment
    busy: bool
    # the outcome of the job's previous run, if this claim ended it
    ended: str | None
    # jobs whose tick nobody started in time: to be skipped
    late: Sequence[str] = ()


class Skipped(NamedTuple):
    """Ticks that did not run, and why."""

    range: TickRange
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How a run ended, and the next state of its job."""

    outcome: str
    result: str | None
    seconds_ago: float
    # the next tick; None: the same tick runs again
    due_at: datetime | None = None
    # when it may start; None: at once
    ready_at: datetime | None = None
    keeps_checkpoint: bool = False
    skipped: Sequence[Skipped] = ()
    # of the tick that runs again
    releases: int = 0
    retries: int = 0
    # why the job is paused; None: it is not
    pause_reason: str | None = None


class Changed(NamedTuple):
    """By what a completion that was not recorded is to be computed again."""

    schedule: str
    cancel_requested_by: str | None


class LateTick(NamedTuple):
    """A tick that nobody started in time, and its job's row as it was read."""

    name: str
    schedule: str
    anchor_at: datetime
    due_at: datetime
    fence: int
    start_within: timedelta
    now: datetime


class Skip(NamedTuple):
    """What becomes of a job whose tick is late: its next tick, and those that it missed."""

    due_at: datetime
    ready_at: datetime
    skipped: Skipped


class Ahead(NamedTuple):
    """A lease whose last heartbeat is in the future by PostgreSQL's clock, and its length."""

    name: str
    fence: int
    last_heartbeat_at: datetime
    length: timedelta


class Abandoned(NamedTuple):
    """A claim of this instance whose response it did not receive: the run was never started."""

    name: str
    fence: int
    releases: int
    retries: int


class JobRepository:
    """The jobs' rows as one instance reads and writes them; each change is one statement."""

    def __init__(self, database: Database, me: Me, lease: timedelta) -> None:
        self._database = database
        self.me = me
        self.lease = lease
        # jobs of this program whose rows could not be written, with the reason
        self.undeclared: dict[str, str] = {}

    async def declare(
        self,
        jobs: Mapping[str, Declared],
        jitters: Mapping[str, timedelta] | None = None,
        *,
        live: timedelta = LIVE,
    ) -> Capabilities:
        """Declare the code's jobs, by name, and update their rows.

        Repeated calls keep the declarations live; see `declarations`. A job that can't be declared
        keeps its row, if it has one; see `undeclared`.
        """
        capabilities, self.undeclared = await self._database.run(
            lambda con: declare(con, jobs, jitters or {}, live, self.lease), priority=True
        )
        return capabilities

    async def ahead(self) -> list[Ahead]:
        """Return leases with a heartbeat in the future: PostgreSQL's clock was set back."""
        rows = await self._database.run(lambda con: read(con, statements.AHEAD), priority=True)
        return [Ahead(**row) for row in rows]

    async def expire(self, lease: Ahead) -> bool:
        """Expire a lease unrenewed for longer than its length; False: it was renewed meanwhile."""
        row = await self._database.run(
            lambda con: write(
                con, statements.EXPIRE, lease.name, lease.fence, lease.last_heartbeat_at
            ),
            priority=True,
        )
        return row is not None

    async def mark_startup(self, capabilities: Capabilities, warm_up: timedelta) -> None:
        """Mark the jobs that are ready, or will be within the warm-up, at this instance's start."""
        await self._database.run(
            lambda con: write(
                con,
                statements.MARK_STARTUP,
                capabilities.numbers,
                STARTUP_BATCH,
                warm_up,
                capabilities.booted_at,
            ),
            priority=True,
        )

    async def claim_next(self, capabilities: Capabilities, policy: ClaimPolicy) -> ClaimResult:
        """Claim the job that has been ready for longest, if the policy lets this instance."""

        async def send(connection: Connection) -> tuple[float, asyncpg.Record | None]:
            sent_at = monotonic()  # not before: time in the pool's wait queue is no lease time
            arguments = claim_arguments(self.me, self.lease, capabilities, policy)
            return sent_at, await write(connection, statements.CLAIM, *arguments)

        sent_at, row = await self._database.run(send, priority=True)
        assert row is not None  # noqa: S101 - the statement always has one
        claimed = None
        if row["claimable"]:
            fields = {field: row[field] for field in Claimed._fields}
            for field in ("resumed", "requested_args"):
                fields[field] = fields[field] and from_json(fields[field])
            claimed = Claimed(**fields)
        return ClaimResult(
            sent_at=sent_at,
            now=row["now"],
            claimed=claimed,
            freed=row["name"] if claimed is None else None,
            wait_seconds=row["wait_seconds"],
            busy=bool(row["busy"]),
            ended=row["ended"],
            late=row["late"] or (),
        )

    async def late(self, names: Sequence[str]) -> list[LateTick]:
        """Return which of these jobs have a tick that nobody started in time."""
        rows = await self._database.run(
            lambda con: read(con, statements.LATE, names), priority=True
        )
        return [LateTick(**row) for row in rows]

    async def skip(self, tick: LateTick, skip: Skip) -> bool:
        """Move a job from a late tick on to its next; False: somebody else has, or started it."""
        row = await self._database.run(
            lambda con: write(
                con,
                statements.SKIP_LATE,
                tick.name,
                tick.due_at,
                tick.fence,
                skip.due_at,
                skip.ready_at,
                skip.skipped.range.first,
                skip.skipped.range.last,
                skip.skipped.range.ticks,
                skip.skipped.reason,
                tick.schedule,
            ),
            priority=True,
        )
        return row is not None

    async def finish(
        self, name: str, fence: int, completion: Completion, schedule: str | None = None
    ) -> Changed | bool:
        """Record how a run ended and free its job; False: the run had lost its lease.

        The completion was computed by `schedule`. If the job's schedule has changed since, or the
        run is released although somebody has cancelled it, nothing is recorded.
        """
        row = await self._database.run(
            lambda con: write(
                con,
                statements.FINISH,
                name,
                fence,
                self.me.id,
                completion.outcome,
                completion.result,
                timedelta(seconds=completion.seconds_ago),
                completion.due_at,
                completion.ready_at,
                completion.keeps_checkpoint,
                [each.range.first for each in completion.skipped],
                [each.range.last for each in completion.skipped],
                [each.range.ticks for each in completion.skipped],
                [each.reason for each in completion.skipped],
                schedule,
                completion.releases,
                completion.retries,
                completion.pause_reason,
            ),
            priority=True,
        )
        if row is None:
            return False
        return row["freed"] or Changed(row["schedule"], row["cancel_requested_by"])

    async def abandoned(self, runs: Iterable[tuple[str, int]]) -> list[Abandoned]:
        """Return the leases that this instance holds for no run of `runs` (name, fence).

        Not to be called while a claim is in flight, whose response may still arrive.
        """
        pairs = list(runs)
        names, fences = [name for name, _ in pairs], [fence for _, fence in pairs]
        rows = await self._database.run(
            lambda con: read(con, statements.ABANDONED, self.me.id, names, fences), priority=True
        )
        return [Abandoned(**row) for row in rows]

    async def retract_losses(self) -> list[str]:
        """Turn the losses that others recorded for this live instance into releases.

        Returns:
            The names of their jobs.
        """
        row = await self._database.run(
            lambda con: write(con, statements.RETRACT, self.me.id, UNREACHABLE, LOST_LIMIT),
            priority=True,
        )
        return [] if row is None else row["jobs"]

    async def mark_releasing(self, name: str, fence: int, lease: timedelta) -> None:
        """Shorten a lease that the process won't outlive; the run then counts as released."""
        await self._database.run(
            lambda con: write(con, statements.MARK_RELEASING, name, fence, self.me.id, lease),
            priority=True,
        )

    async def end_work(self, name: str, fence: int) -> None:
        """Record that a run's function has returned and the run waits out its minimum duration."""
        await self._database.run(
            lambda con: write(con, statements.END_WORK, name, fence, self.me.id), priority=True
        )

    async def write_log(self, name: str, fence: int, what: Unwritten, *, seconds: float) -> None:
        """Write what a run has said; nothing is written if the job is no longer this run's.

        Raises:
            TimeoutError: it waited, or was under way, for so many seconds.
        """
        arguments = log_arguments(self.me.id, {(name, fence): what})

        async def ask(connection: Connection) -> bool:
            # The connection is needed for the completions that come after it, so what ends here is
            # the wait for a lock, and not an outage of the database.
            try:
                async with asyncio.timeout(seconds):
                    await write(connection, WRITE_LOGS, *arguments)
            except TimeoutError:
                await end_implicit_transaction(connection)
                return False
            return True

        async with asyncio.timeout(seconds):
            in_time = await self._database.run(ask, priority=True)
        if not in_time:
            raise TimeoutError

    async def checkpoint(self, name: str, fence: int, state: str) -> bool:
        """Write a run's checkpoint; False: the run has lost its lease."""
        row = await self._database.run(
            lambda con: write(con, statements.CHECKPOINT, name, fence, self.me.id, state)
        )
        return row is not None


def claim_arguments(
    me: Me, lease: timedelta, capabilities: Capabilities, policy: ClaimPolicy
) -> tuple[object, ...]:
    """Return the parameters of CLAIM, in order."""
    return (
        me.id,
        me.server,
        lease,
        capabilities.booted_at,
        capabilities.numbers,
        LOST_LIMIT,
        policy.backoff,
        policy.round,
        policy.tie_break,
        policy.warmed_up,
        policy.warm_up,
        policy.takes_over_until,
        QUARANTINE,
        LONGEST_QUARANTINE,
        STOPPED,
        GONE,
    )
