"""What one instance asks of the jobs' rows: claims, completions, checkpoints, losses.

Each method is one of the `statements`, with its parameters and columns named.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
from pydantic_core import from_json

from balance_app.db.pool import Connection, Database, read, write
from balance_app.jobs import statements
from balance_app.jobs.declarations import (
    LIVE,
    LONGEST_QUARANTINE,
    LOST_LIMIT,
    QUARANTINE,
    Capabilities,
    declare,
)
from balance_app.jobs.schedule import TickRange

# What the history says of runs that ended without a word of their own.
STOPPED: Final = "its instance was stopped"
GONE: Final = "its instance sent no heartbeat until its lease was over"
UNREACHABLE: Final = "its instance could not reach the database until its lease was over"
NOT_BEGUN: Final = "its instance could not reach the database, and never began it"
STARTUP_BATCH: Final = 500


class Me(NamedTuple):
    """This instance, as it signs its leases: an id of this boot, and a name for people."""

    id: UUID
    server: str


class ClaimPolicy(NamedTuple):
    """What decides when an instance may claim a job; all of it is about this instance alone."""

    # how long it waits because of what it runs already
    backoff: timedelta
    # the round it is in, and how long it waits for those who are in an earlier one
    round: int
    tie_break: timedelta
    # up for longer than the warm-up (JOB_WARM_UP_SECONDS)?
    warmed_up: bool
    warm_up: timedelta
    # until when, by PostgreSQL's clock, it may take a job whose lease is over; None: not now
    takes_over_until: datetime | None


class Claimed(NamedTuple):
    """A run that this instance now holds the lease of."""

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
    # of this tick: releases in a row that were not this or another instance's stop, and how often
    # it was tried again after a failure
    releases: int = 0
    retries: int = 0
    # the job's runs in a row that failed or timed out
    failure_streak: int = 0


class ClaimResult(NamedTuple):
    """What a claim got: a run, or when to try again."""

    # this instance's own clock (monotonic) when it asked, and the server's when it answered
    sent_at: float
    now: datetime
    claimed: Claimed | None
    # a job that was lost once too often (quarantined) or while it was paused: freed, not started
    freed: str | None
    # until the next job could be this instance's, if one is known
    wait_seconds: float | None
    # something runs somewhere: it may be released at any moment
    busy: bool
    # how the job's run before ended, if this claim is what ended it
    ended: str | None


class Skipped(NamedTuple):
    """Ticks that did not run, and why."""

    range: TickRange
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How a run ended, and what becomes of its job."""

    outcome: str
    result: str | None
    seconds_ago: float
    # of its next tick; without one the same tick goes on
    due_at: datetime | None = None
    # when it may start; without one at once
    ready_at: datetime | None = None
    keeps_checkpoint: bool = False
    skipped: Sequence[Skipped] = ()
    # of the tick that goes on
    releases: int = 0
    retries: int = 0
    # the job is paused, and why
    pause_reason: str | None = None


class Ahead(NamedTuple):
    """A lease whose last renewal lies in the future, by PostgreSQL's clock, and how long it is."""

    name: str
    fence: int
    last_heartbeat_at: datetime
    length: timedelta


class Abandoned(NamedTuple):
    """A claim of this instance whose answer it never took: the run did not begin."""

    name: str
    fence: int
    releases: int
    retries: int


class JobRepository:
    """Claims, completions and checkpoints of one instance's runs; each is one statement."""

    def __init__(self, database: Database, me: Me, lease: timedelta) -> None:
        self._database = database
        self.me = me
        self.lease = lease
        # jobs of this program whose rows could not be written, with the reason
        self.undeclared: dict[str, str] = {}

    async def declare(
        self,
        jobs: Mapping[str, tuple[str, str]],
        jitters: Mapping[str, timedelta] | None = None,
        *,
        live: timedelta = LIVE,
    ) -> Capabilities:
        """Bring the rows up to the jobs (name: schedule, description) that the code declares.

        Repeated, it keeps the declarations alive; see `declarations`. A job that can't
        be declared keeps the row that it has, if any; see `undeclared`.
        """
        capabilities, self.undeclared = await self._database.run(
            lambda con: declare(con, jobs, jitters or {}, live), priority=True
        )
        return capabilities

    async def ahead(self) -> list[Ahead]:
        """Return the leases that were renewed in the future: PostgreSQL's clock was set back."""
        rows = await self._database.run(lambda con: read(con, statements.AHEAD), priority=True)
        return [Ahead(**row) for row in rows]

    async def expire(self, lease: Ahead) -> bool:
        """End a lease that was not renewed for longer than it lasts; False: it was meanwhile."""
        row = await self._database.run(
            lambda con: write(
                con, statements.EXPIRE, lease.name, lease.fence, lease.last_heartbeat_at
            ),
            priority=True,
        )
        return row is not None

    async def mark_startup(self, capabilities: Capabilities, warm_up: timedelta) -> None:
        """Write down when this instance, which has just started, saw which jobs are soon ready."""
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

        async def ask(connection: Connection) -> tuple[float, asyncpg.Record | None]:
            sent_at = monotonic()  # what waited in line, or behind a run that blocks, was not sent
            arguments = claim_arguments(self.me, self.lease, capabilities, policy)
            return sent_at, await write(connection, statements.CLAIM, *arguments)

        sent_at, row = await self._database.run(ask, priority=True)
        assert row is not None  # noqa: S101 - the statement always has one
        claimed = None
        if row["claimable"]:
            claimed = Claimed(**{field: row[field] for field in Claimed._fields})
            if claimed.resumed is not None:
                claimed = claimed._replace(resumed=from_json(claimed.resumed))
        return ClaimResult(
            sent_at=sent_at,
            now=row["now"],
            claimed=claimed,
            freed=row["name"] if claimed is None else None,
            wait_seconds=row["wait_seconds"],
            busy=bool(row["busy"]),
            ended=row["ended"],
        )

    async def finish(
        self, name: str, fence: int, completion: Completion, schedule: str | None = None
    ) -> str | bool:
        """Record how a run ended and free its job; False: the job was no longer this run's.

        Its next tick is one of `schedule`: if that has changed, nothing is recorded, and the new
        one is returned.
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
        return row is not None and (row["freed"] or row["schedule"])

    async def abandoned(self, runs: Iterable[tuple[str, int]]) -> list[Abandoned]:
        """Return what this instance holds, but for its `runs` (name, fence).

        Only to be asked while no claim is under way: its answer may still be taken.
        """
        pairs = list(runs)
        names, fences = [name for name, _ in pairs], [fence for _, fence in pairs]
        rows = await self._database.run(
            lambda con: read(con, statements.ABANDONED, self.me.id, names, fences), priority=True
        )
        return [Abandoned(**row) for row in rows]

    async def refute_losses(self) -> list[str]:
        """Take back the losses recorded against this instance, which lives; return their jobs."""
        row = await self._database.run(
            lambda con: write(con, statements.REFUTE, self.me.id, UNREACHABLE, LOST_LIMIT),
            priority=True,
        )
        return [] if row is None else row["jobs"]

    async def mark_releasing(self, name: str, fence: int, lease: timedelta) -> None:
        """Shorten a lease: this process ends before it does, and its run is released with it."""
        await self._database.run(
            lambda con: write(con, statements.MARK_RELEASING, name, fence, self.me.id, lease),
            priority=True,
        )

    async def end_work(self, name: str, fence: int) -> None:
        """Note that the function of a run has returned, and its run only lasts on."""
        await self._database.run(
            lambda con: write(con, statements.END_WORK, name, fence, self.me.id), priority=True
        )

    async def checkpoint(self, name: str, fence: int, state: str) -> bool:
        """Write a run's checkpoint; False: the run has lost its lease."""
        row = await self._database.run(
            lambda con: write(con, statements.CHECKPOINT, name, fence, self.me.id, state)
        )
        return row is not None


def claim_arguments(
    me: Me, lease: timedelta, capabilities: Capabilities, policy: ClaimPolicy
) -> tuple[object, ...]:
    """Return the parameters of CLAIM, in its order."""
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
