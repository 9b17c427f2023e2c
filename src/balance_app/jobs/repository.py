"""Every statement that moves a job from one state to another, each with the invariant it keeps.

PostgreSQL's clock decides, read where it counts (`clock_timestamp()`): `now()` is the time at which
a transaction began, and one that was delayed could take or revive a lease by it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
from pydantic_core import from_json, to_json

from balance_app.db.pool import Connection, Database, read, write
from balance_app.jobs.declarations import (
    LIVE,
    LONGEST_QUARANTINE,
    LOST_LIMIT,
    QUARANTINE,
    Capabilities,
    declare,
)

# What the history says of runs that ended without a word of their own.
STOPPED: Final = "its instance was stopped"
GONE: Final = "its instance sent no heartbeat until its lease was over"
UNREACHABLE: Final = "its instance could not reach the database until its lease was over"
NOT_BEGUN: Final = "its instance could not reach the database, and never began it"
LIMITS: Final = (QUARANTINE, LONGEST_QUARANTINE, STOPPED, GONE)
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
    # up for longer than the warm-up (JOB_SETTLING_SECONDS)?
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
    cancel_by: str | None
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

    first: datetime
    last: datetime
    ticks: int
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
    alive_at: datetime
    length: timedelta


class Abandoned(NamedTuple):
    """A claim of this instance whose answer it never took: the run did not begin."""

    name: str
    fence: int
    releases: int
    retries: int


class Progress(NamedTuple):
    """How far a run says it is."""

    done: int | None
    total: int | None
    note: str | None


class Renewal(NamedTuple):
    """The renewal of one run's lease, and what is written down with it."""

    name: str
    fence: int
    progress: Progress
    stopping: bool = False


class RenewalResult(NamedTuple):
    """What became of one renewal."""

    name: str
    fence: int
    renewed: bool
    # not renewed, but not lost either: somebody held the row locked
    still_held: bool
    cancel_by: str | None


class JobRepository:
    """Claims, completions and checkpoints of one instance's runs; each is one statement."""

    def __init__(self, database: Database, me: Me, lease: timedelta) -> None:
        self._database = database
        self.me = me
        self._lease = lease
        # the server ends a transaction of a job that is idle for longer, or that lasts for longer
        self.idle_seconds: Final = lease.total_seconds()
        self.transaction_seconds: Final = lease.total_seconds() * LONGEST_LEASES
        milliseconds = round(lease.total_seconds() * 1000 * LONGEST_LEASES)
        self.begin: Final = BEGIN.format(milliseconds=milliseconds)
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

        Said again and again, it keeps the declarations alive; see `declarations`. A job that can't
        be declared keeps the row that it has, if any; see `undeclared`.
        """
        capabilities, self.undeclared = await self._database.run(
            lambda con: declare(con, jobs, jitters or {}, live), priority=True
        )
        return capabilities

    async def ahead(self) -> list[Ahead]:
        """Return the leases that were renewed in the future: PostgreSQL's clock was set back."""
        rows = await self._database.run(lambda con: read(con, AHEAD), priority=True)
        return [Ahead(*row) for row in rows]

    async def expire(self, lease: Ahead) -> bool:
        """End a lease that was not renewed for longer than it lasts; False: it was meanwhile."""
        row = await self._database.run(
            lambda con: write(con, EXPIRE, lease.name, lease.fence, lease.alive_at), priority=True
        )
        return row is not None

    async def mark_startup(self, capabilities: Capabilities, warm_up: timedelta) -> None:
        """Write down when this instance, which has just started, saw which jobs are soon ready."""
        await self._database.run(
            lambda con: write(
                con,
                MARK_STARTUP,
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
            arguments = claim_arguments(self.me, self._lease, capabilities, policy)
            return sent_at, await write(connection, CLAIM, *arguments)

        sent_at, row = await self._database.run(ask, priority=True)
        assert row is not None  # noqa: S101 - the statement always has one
        now, wait_seconds, busy, name, claimable, *rest, ended = row
        claimed = None
        if claimable:
            claimed = Claimed(name, *rest)
            if claimed.resumed is not None:
                claimed = claimed._replace(resumed=from_json(claimed.resumed))
        freed = name if name and not claimable else None
        return ClaimResult(sent_at, now, claimed, freed, wait_seconds, bool(busy), ended)

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
                FINISH,
                *(name, fence, self.me.id, completion.outcome, completion.result),
                timedelta(seconds=completion.seconds_ago),
                *(completion.due_at, completion.ready_at, completion.keeps_checkpoint),
                [each.first for each in completion.skipped],
                [each.last for each in completion.skipped],
                [each.ticks for each in completion.skipped],
                [each.reason for each in completion.skipped],
                schedule,
                *(completion.releases, completion.retries, completion.pause_reason),
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
            lambda con: read(con, ABANDONED, self.me.id, names, fences), priority=True
        )
        return [Abandoned(*row) for row in rows]

    async def refute_losses(self) -> list[str]:
        """Take back the losses recorded against this instance, which lives; return their jobs."""
        row = await self._database.run(
            lambda con: write(con, REFUTE, self.me.id, UNREACHABLE, LOST_LIMIT), priority=True
        )
        return [] if row is None else row["jobs"]

    async def mark_releasing(self, name: str, fence: int, lease: timedelta) -> None:
        """Shorten a lease: this process ends before it does, and its run is released with it."""
        await self._database.run(
            lambda con: write(con, MARK_RELEASING, name, fence, self.me.id, lease), priority=True
        )

    async def end_work(self, name: str, fence: int) -> None:
        """Note that the function of a run has returned, and its run only lasts on."""
        await self._database.run(
            lambda con: write(con, END_WORK, name, fence, self.me.id), priority=True
        )

    async def checkpoint(self, name: str, fence: int, state: str) -> bool:
        """Write a run's checkpoint; False: the run has lost its lease."""
        row = await self._database.run(
            lambda con: write(con, CHECKPOINT, name, fence, self.me.id, state)
        )
        return row is not None


# The startup mark: written once for each time that a job is ready, by the first of the instances
# that come up: the next can't push it on. Instances that come up at least a warm-up after a mark
# have no use for it, so one that is twice as old concerns nobody any more, and is replaced; so is
# one that a run has outlived. Nothing is written about a run that gave a sign of life after this
# instance's boot: the mark would outlive the fleet, and the next fleet would take it for its own.
# Of many, the longest ready come first, a batch at each try; nobody takes a job before it is
# marked, or all are warmed up.
MARK_STARTUP: Final = """
WITH ready AS (
    SELECT name FROM jobs
    WHERE claimable_at <= (SELECT clock_timestamp() + $3::interval)
      AND (alive_at <= $4) IS NOT FALSE
      AND (seen_at IS NULL OR seen_at <= clock_timestamp() - 2 * $3::interval
           OR seen_at <= alive_at)
      AND number <@ $1::int8multirange
    ORDER BY claimable_at LIMIT $2
    FOR UPDATE SKIP LOCKED
)
UPDATE jobs SET seen_at = clock_timestamp() FROM ready WHERE jobs.name = ready.name
"""

# One job at most, and only one that nobody runs: it waits, or its lease is over by the server's
# clock. The row is locked before it is checked again, and a row that is locked belongs to
# somebody. The fence rises with the claim, so whatever the run before still sends is refused.
#
# The claim policy: a job may be taken at `claimable_at` plus this instance's own backoff. What was
# marked at startup waits until `seen_at` plus the warm-up, so that those that come up together
# share it: all go by what the first of them wrote, and none by its own boot, as they differ. Not so
# for an instance that was warmed up before (`seen_at` is not about it), nor when a run gave a sign
# of life after the instance's boot: the fleet is up already. The tie break: among equals, an
# instance that has claimed in this round lets the others go first. Rounds are the virtual time of
# start-time fair queueing (Goyal, Vin, Cheng 1996), so that light load goes round without anybody
# being counted.
#
# $1 id, $2 server, $3 lease, $4 booted_at, $5 numbers, $6 the limit of losses,
# $7 backoff, $8 round, $9 tie break, $10 warmed up, $11 warm-up, $12 takes_over_until,
# $13 quarantine, $14 the longest, $15 and $16 what is said of who stopped, or is gone
CLAIM: Final = """
WITH own AS (
    SELECT $7::interval
         + $9::interval * greatest(0, $8::bigint - (SELECT coalesce(max(round), 0) FROM jobs))
           AS backoff
), candidate AS MATERIALIZED (
    SELECT name, fence, server, started_at, lease_until,
           holder IS NOT NULL AS held,
           holder IS NOT NULL AND NOT parts AS lost,
           CASE WHEN parts THEN 'interrupted' ELSE 'lost' END AS outcome,
           CASE WHEN parts THEN $15 ELSE $16 END AS result,
           holder IS NOT NULL AND NOT parts AND lost_streak + 1 >= $6 AS quarantined,
           holder IS NULL
           OR (paused_at IS NULL AND (parts OR lost_streak + 1 < $6)) AS claimable
    FROM jobs
    WHERE claimable_at <= (SELECT clock_timestamp())
      AND number <@ $5::int8multirange
      AND (holder IS NULL OR clock_timestamp() <= $12::timestamptz)
      AND (SELECT clock_timestamp() - backoff FROM own) >=
          CASE WHEN alive_at > $4 THEN claimable_at
               WHEN seen_at <= $4 + $11::interval THEN greatest(claimable_at, seen_at + $11)
               WHEN $10 THEN claimable_at END
    ORDER BY claimable_at
    LIMIT 1
    FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE jobs SET
        holder = CASE WHEN claimable THEN $1::uuid END,
        server = CASE WHEN claimable THEN $2::text END,
        started_at = CASE WHEN claimable THEN clock_timestamp() END,
        lease_until = CASE WHEN claimable THEN clock_timestamp() + $3::interval END,
        fence = jobs.fence + claimable::integer,
        attempt = attempt + held::integer,
        parts = false,
        cancel_by = CASE WHEN claimable THEN cancel_by END,
        done = NULL, total = NULL, note = NULL, seen_at = NULL,
        alive_at = CASE WHEN claimable THEN clock_timestamp() ELSE alive_at END,
        lost_streak = lost_streak + lost::integer,
        round = greatest($8, (SELECT coalesce(max(round), 0) FROM jobs)),
        ready_at = CASE WHEN quarantined THEN clock_timestamp() + least(
            $14::interval, $13::interval * power(2, least(lost_streak + 1 - $6, 30)))
            ELSE ready_at END,
        last_outcome = CASE WHEN held THEN candidate.outcome ELSE last_outcome END,
        last_server = CASE WHEN held THEN candidate.server ELSE last_server END,
        last_started_at = CASE WHEN held THEN candidate.started_at ELSE last_started_at END,
        last_ended_at = CASE WHEN held THEN candidate.lease_until ELSE last_ended_at END,
        last_result = CASE WHEN held THEN candidate.result ELSE last_result END
    FROM candidate WHERE jobs.name = candidate.name
    RETURNING jobs.name, claimable, jobs.fence, due_at, attempt, checkpoint, cancel_by, schedule,
              anchor_at, jobs.started_at, round, releases, retries, failure_streak,
              CASE WHEN held THEN outcome END
), ended AS (
    UPDATE job_runs SET outcome = candidate.outcome, ended_at = candidate.lease_until,
                        result = candidate.result
    FROM candidate
    WHERE held AND job = candidate.name AND job_runs.fence = candidate.fence
      AND job_runs.outcome IS NULL
), begun AS (
    INSERT INTO job_runs (job, fence, due_at, attempt, holder, server, started_at)
    SELECT name, fence, due_at, attempt, $1, $2, started_at FROM taken WHERE claimable
), head AS (
    SELECT claimable_at, alive_at, seen_at, holder FROM jobs
    WHERE claimable_at IS NOT NULL AND number <@ $5::int8multirange
    ORDER BY claimable_at LIMIT 20
), next AS (
    SELECT min(CASE WHEN seen_at <= $4 + $11 AND (alive_at > $4) IS NOT TRUE
                    THEN greatest(claimable_at, seen_at + $11) + own.backoff
                    WHEN $10 OR alive_at > $4 THEN claimable_at + own.backoff
                    ELSE claimable_at END) AS at,
           bool_or(holder IS NOT NULL) AS busy
    FROM head, own
)
SELECT clock_timestamp(), extract(epoch FROM next.at - clock_timestamp())::float8, next.busy,
       taken.*
FROM next LEFT JOIN taken ON true
"""


def claim_arguments(
    me: Me, lease: timedelta, capabilities: Capabilities, policy: ClaimPolicy
) -> tuple[object, ...]:
    """Return what CLAIM asks for, in its order."""
    return (*me, lease, capabilities.booted_at, capabilities.numbers, LOST_LIMIT, *policy, *LIMITS)


# Nothing but the run's own lease is freed: its fence and its holder must still stand. Once freed,
# a job is ready for its next tick, for the same tick later, or for the same tick at once.
FINISH: Final = """
WITH freed AS (
    UPDATE jobs SET
        holder = NULL, server = NULL, started_at = NULL, lease_until = NULL, cancel_by = NULL,
        parts = false, done = NULL, total = NULL, note = NULL, seen_at = NULL,
        due_at = coalesce($7, due_at),
        ready_at = coalesce($8, clock_timestamp()),
        attempt = CASE WHEN $7::timestamptz IS NULL THEN attempt + 1 ELSE 0 END,
        requested_by = CASE WHEN $7::timestamptz IS NULL THEN requested_by END,
        checkpoint = CASE WHEN $9 THEN checkpoint END,
        alive_at = clock_timestamp(),
        lost_streak = 0, releases = $15, retries = $16,
        failure_streak = CASE WHEN $4 IN ('failed', 'timed_out') THEN failure_streak + 1
                         WHEN $4 = 'succeeded' THEN 0 ELSE failure_streak END,
        paused_at = CASE WHEN $17::text IS NULL THEN paused_at
                    ELSE coalesce(paused_at, clock_timestamp()) END,
        paused_by = CASE WHEN $17::text IS NULL THEN paused_by
                    ELSE coalesce(paused_by, 'balance_app') END,
        pause_reason = CASE WHEN paused_at IS NULL THEN coalesce($17::text, pause_reason)
                       ELSE pause_reason END,
        last_outcome = $4, last_server = server, last_started_at = started_at,
        last_ended_at = clock_timestamp() - $6::interval, last_result = $5
    WHERE name = $1 AND fence = $2 AND holder = $3 AND schedule = coalesce($14, schedule)
    RETURNING last_ended_at
), ended AS (
    UPDATE job_runs SET outcome = $4, ended_at = freed.last_ended_at, result = $5
    FROM freed WHERE job = $1 AND fence = $2
), skipped AS (
    INSERT INTO job_runs (job, due_at, last_due_at, ticks, started_at, ended_at, outcome, result)
    SELECT $1, first, last, ticks, clock_timestamp(), clock_timestamp(), 'skipped', reason
    FROM freed, unnest($10::timestamptz[], $11::timestamptz[], $12::bigint[], $13::text[])
         AS range (first, last, ticks, reason)
)
SELECT freed.last_ended_at IS NOT NULL AS freed, schedule
FROM jobs LEFT JOIN freed ON true
WHERE name = $1 AND fence = $2 AND holder = $3
"""

# A renewal can't be later than now, unless the clock was set back since. Such a lease would stand
# for as long as that. Its holder, if it lives, renews it by the new time; so it is only ended when
# somebody has seen it not renewed for longer than it lasts, by a clock that is not set.
AHEAD: Final = """
SELECT name, fence, alive_at, lease_until - alive_at FROM jobs
WHERE holder IS NOT NULL AND alive_at > clock_timestamp() + interval '1 s'
"""

EXPIRE: Final = """
UPDATE jobs SET lease_until = least(lease_until, clock_timestamp())
WHERE name = $1 AND fence = $2 AND alive_at = $3 AND holder IS NOT NULL
RETURNING name
"""

# A claim may be carried out for an instance that has stopped waiting for it. It names itself as the
# holder, so it can release what it never began.
ABANDONED: Final = """
SELECT name, fence, releases, retries FROM jobs
WHERE holder = $1
  AND (name, fence) NOT IN (SELECT * FROM unnest($2::text[], $3::bigint[]) AS run (name, fence))
"""

# Who takes over an expired lease can't know whether its instance stopped, or could not reach the
# database: it records a loss, and the instance, if it lives, takes it back. The row of the history
# is what it is taken back by, so that it is taken back once. A quarantine that is no longer
# deserved ends at once. Losses further back than the last thousand are nobody's concern any more.
REFUTE: Final = """
WITH refuted AS (
    UPDATE job_runs SET outcome = 'interrupted', result = $2
    WHERE outcome = 'lost' AND id IN (
        SELECT id FROM (
            SELECT id, holder FROM job_runs
            WHERE (outcome, id) < ('lost', 9223372036854775807) AND (outcome, id) > ('lost', 0)
            ORDER BY outcome DESC, id DESC LIMIT 1000
        ) AS latest
        WHERE holder = $1
    )
    RETURNING job, started_at
), blamed AS (
    SELECT job, count(*)::integer AS losses, max(started_at) AS started_at
    FROM refuted GROUP BY job
), acquitted AS (
    UPDATE jobs SET
        lost_streak = greatest(lost_streak - losses, 0),
        ready_at = CASE WHEN holder IS NULL AND lost_streak >= $3 AND lost_streak - losses < $3
                   THEN least(ready_at, clock_timestamp()) ELSE ready_at END,
        last_outcome = CASE WHEN last_outcome = 'lost' AND last_started_at = blamed.started_at
                       THEN 'interrupted' ELSE last_outcome END,
        last_result = CASE WHEN last_outcome = 'lost' AND last_started_at = blamed.started_at
                      THEN $2 ELSE last_result END
    FROM blamed WHERE name = job
    RETURNING name
)
SELECT array_agg(name) AS jobs FROM acquitted HAVING count(*) > 0
"""

# The run may still execute, so its job is not freed; only its lease gets shorter, never longer.
MARK_RELEASING: Final = """
UPDATE jobs SET parts = true, lease_until = least(lease_until, clock_timestamp() + $4::interval)
WHERE name = $1 AND fence = $2 AND holder = $3
"""

# For people alone: who cancels such a run is told that there is nothing left to cancel. It belongs
# to the run that began before it, so no claim has to take it back.
END_WORK: Final = """
UPDATE jobs SET work_ended_at = clock_timestamp() WHERE name = $1 AND fence = $2 AND holder = $3
"""

# A run that has lost its lease writes nothing more.
CHECKPOINT: Final = """
UPDATE jobs SET checkpoint = $4
WHERE name = $1 AND fence = $2 AND holder = $3 AND lease_until > clock_timestamp()
RETURNING true
"""

# Renews what this instance holds, and only that: the fence and the holder must still stand, and a
# lease that is over stays over. A row that somebody holds locked is left out this time: waiting for
# it would let all the other leases run out.
#
# $1 id, $2 server, $3 lease, $4 knows_to, $5 lacks, $6 to $11 the renewals
HEARTBEAT: Final = """
WITH renewal AS (
    SELECT * FROM unnest($6::text[], $7::bigint[], $8::boolean[],
                         $9::bigint[], $10::bigint[], $11::text[])
                  AS renewal (name, fence, stopping, done, total, note)
), held AS MATERIALIZED (
    SELECT name, fence FROM jobs JOIN renewal USING (name, fence)
    WHERE holder = $1 AND lease_until > clock_timestamp()
    FOR NO KEY UPDATE OF jobs SKIP LOCKED
), renewed AS (
    UPDATE jobs SET lease_until = clock_timestamp() + $3::interval, alive_at = clock_timestamp(),
                    done = renewal.done, total = renewal.total, note = renewal.note,
                    stopping_at = CASE WHEN NOT renewal.stopping OR stopping_at >= started_at
                                  THEN stopping_at ELSE clock_timestamp() END
    FROM held JOIN renewal USING (name, fence)
    WHERE jobs.name = held.name
    RETURNING jobs.name, jobs.fence, cancel_by
), seen AS (
    INSERT INTO copies (id, server, knows_to, lacks) VALUES ($1, $2, $4, $5)
    ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp()
)
SELECT clock_timestamp() AS now, renewal.name, renewal.fence, renewed.name IS NOT NULL AS renewed,
       jobs.fence = renewal.fence AND jobs.holder = $1 AND jobs.lease_until > clock_timestamp()
       AS still_held, renewed.cancel_by
FROM (SELECT) AS always LEFT JOIN renewal ON true
LEFT JOIN renewed USING (name, fence) LEFT JOIN jobs ON jobs.name = renewal.name
"""

# An instance that has ended its runs is no longer seen.
LEAVE: Final = "DELETE FROM copies WHERE id = $1"


async def renew_leases(
    connection: "asyncpg.Connection[asyncpg.Record]",
    me: Me,
    lease: timedelta,
    capabilities: Capabilities,
    renewals: Iterable[Renewal],
) -> tuple[datetime, list[RenewalResult]]:
    """Renew leases on the heartbeat's own connection; return the server's time and the results."""
    rows_sent = [(each.name, each.fence, each.stopping, *each.progress) for each in renewals]
    columns = [list(column) for column in zip(*rows_sent, strict=True)] or [[] for _ in range(6)]
    rows = await connection.fetch(
        HEARTBEAT, *me, lease, capabilities.highest_number, capabilities.missing, *columns
    )
    results = [
        RenewalResult(
            row["name"], row["fence"], row["renewed"], bool(row["still_held"]), row["cancel_by"]
        )
        for row in rows
        if row["name"] is not None
    ]
    return rows[0]["now"], results


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
WHERE name = $1 AND fence = $2 AND holder = $3 AND lease_until > clock_timestamp()
"""

REMEMBER: Final = "SELECT set_config('balance_app.checkpoint', $1, true)"

# Checked and committed in one message: an instance that is frozen in between holds no lock, and
# nobody can take the job between the check and the commit. What the job has set meanwhile (its
# search path, its role) must not hide the function, nor put other tables in the place of ours.
COMMIT: Final = """
SET LOCAL search_path TO DEFAULT; SET LOCAL ROLE NONE; SELECT hold_lease(); COMMIT
"""
LEASE_LOST: Final = "BL001"  # what hold_lease() raises


def encode(state: object) -> str:
    """Return a checkpoint as JSON that can be read back.

    Raises:
        ValueError: there is none: not JSON, too deep, or a number that JSON or Python can't read.
    """
    encoded = to_json(state)
    from_json(encoded, allow_inf_nan=False)  # what can't be read would be the end of each owner
    return encoded.decode()
