"""Which declaration of a job counts, and how its row is brought up to it.

Instances of different versions may declare a job differently. What each version declares is a row
of `job_declarations` that its instances keep alive. Of the declarations that are alive, the one
that was first made last counts: a newer version wins when it comes, an older one that starts once
more changes nothing, and when the last instance of a version has gone, its declaration is no longer
alive, and the one before counts again: going back works as going forward does. As long as versions
disagree about a schedule, the job's row names the others.

Nobody is asked which instances there are: a declaration is alive by its own row's time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import asyncpg

from balance_app.db.outages import applied_if_unavailable
from balance_app.db.pool import Connection, read
from balance_app.jobs.schedule import Every, ScheduleError, parse

DECLARE_LOCK: Final = 0x6A6F6273  # "jobs"; any number no other program here uses
# A declaration that was not made again for so long is not alive; instances make it more often.
LIVE: Final = timedelta(seconds=60)
# So many runs lost in a row quarantine a job, for this long after the first time too many, and
# twice as long after each loss that follows: a job that kills its process must not take down the
# fleet, and one that was lost with its process tries again by itself.
LOST_LIMIT: Final = 3
QUARANTINE: Final = timedelta(minutes=10)
LONGEST_QUARANTINE: Final = timedelta(hours=2)
# What was released waits at most so long.
LONGEST_RELEASE: Final = timedelta(minutes=5)
# ... by a clock that may have been read a little earlier, and lengthened at random
SLACK: Final = 1.5


class Capabilities(NamedTuple):
    """Which jobs an instance can run, as of its start by PostgreSQL's clock; it claims no other."""

    booted_at: datetime
    # jobs are numbered in the order of first declaration: it has those up to this one, but for
    # the missing ones
    highest_number: int
    missing: list[str]
    # the same as ranges of numbers: found in one of them by bisection, however many are missing
    numbers: list["asyncpg.Range[int]"]


# Services in two schemas of one database don't wait for each other.
DECLARE_IN_TURN: Final = """
SELECT pg_advisory_xact_lock(
    $1::bigint # CASE current_schema() WHEN 'public' THEN 0 ELSE hashtext(current_schema()) END
)
"""

# A new row comes with the tick of its declaration (an interval) or its first tick (cron). Instances
# that start together take turns, so that a number below the highest can't appear later.
ROWS: Final = """
SELECT name, schedule, description, other_schedules, anchor_at, due_at, ready_at, lost_streak,
       holder IS NULL AS free, forgotten_at IS NOT NULL AS forgotten
FROM jobs WHERE name = ANY($1)
"""

ADD: Final = """
INSERT INTO jobs (name, schedule, description, anchor_at, due_at, ready_at)
VALUES ($1, $2, $3, $4, $5, $5)
"""

# A job that was forgotten begins anew: nothing of what waited then is made up for. Its fence goes
# on, as the history has its runs.
REVIVE: Final = """
UPDATE jobs SET schedule = $2, description = $3, anchor_at = $4, due_at = $5, ready_at = $5,
    forgotten_at = NULL, forgotten_by = NULL, paused_at = NULL, paused_by = NULL,
    pause_reason = NULL, attempt = 0, requested_by = NULL, checkpoint = NULL, lost_streak = 0,
    releases = 0, retries = 0, failure_streak = 0, other_schedules = '{}', startup_marked_at = NULL
WHERE name = $1 AND holder IS NULL
"""

# Made for the first time, or kept alive.
MAKE: Final = """
INSERT INTO job_declarations (job, digest, schedule, description)
SELECT job, encode(sha256(convert_to(schedule || E'\\n' || description, 'UTF8')), 'hex'),
       schedule, description
FROM unnest($1::text[], $2::text[], $3::text[]) AS declared (job, schedule, description)
ON CONFLICT (job, digest) DO UPDATE SET last_declared_at = clock_timestamp()
"""

# The one that counts for each job, and the other schedules that are alive. What was seen in the
# future was seen before the clock was set back.
COUNTS: Final = """
WITH alive AS (
    SELECT * FROM job_declarations
    WHERE job = ANY ($1)
      AND last_declared_at BETWEEN clock_timestamp() - $2::interval AND clock_timestamp() + $2
), latest AS (
    SELECT DISTINCT ON (job) job, schedule, description FROM alive
    ORDER BY job, first_declared_at DESC, digest
)
SELECT job, latest.schedule, latest.description,
       array(SELECT DISTINCT schedule FROM alive
             WHERE alive.job = latest.job AND schedule <> latest.schedule ORDER BY 1) AS others
FROM latest
"""

# A changed schedule takes effect at its next tick; a tick that is due already stays, and so does
# what a run holds. Only the row as it was looked at is changed.
REDECLARE: Final = """
UPDATE jobs SET schedule = $2, description = $3, other_schedules = $4,
    forgotten_at = NULL, forgotten_by = NULL,
    anchor_at = CASE WHEN holder IS NULL THEN $5 ELSE anchor_at END,
    due_at = CASE WHEN holder IS NULL AND due_at = $8 AND ready_at = $9 THEN $6 ELSE due_at END,
    ready_at = CASE WHEN holder IS NULL AND due_at = $8 AND ready_at = $9 THEN $7
               ELSE ready_at END
WHERE name = $1
"""

# A startup mark, or a sign of life, in the future was written before the clock was set back.
FORGET_FUTURE: Final = """
UPDATE jobs SET startup_marked_at = NULL,
                last_heartbeat_at = least(last_heartbeat_at, clock_timestamp())
WHERE name = ANY ($1) AND holder IS NULL
  AND greatest(startup_marked_at, last_heartbeat_at) > clock_timestamp() + interval '1 s'
"""

CAPABILITIES: Final = """
SELECT clock_timestamp() AS booted_at,
       coalesce(max(number), 0) AS highest_number,
       coalesce(array_agg(name) FILTER (WHERE name <> ALL ($1)), '{}') AS missing,
       coalesce(range_agg(int8range(number, number, '[]')) FILTER (WHERE name = ANY ($1)), '{}')
       AS numbers
FROM jobs
"""


async def declare(
    connection: Connection,
    jobs: Mapping[str, tuple[str, str]],
    jitters: Mapping[str, timedelta],
    live: timedelta,
) -> tuple[Capabilities, dict[str, str]]:
    """Declare jobs (name: schedule, description), and bring their rows up to what counts.

    What makes no declaration for as long as `live` counts no more.

    Returns:
        The capabilities by it, and which jobs could not be declared, with the reasons.
    """
    undeclared: dict[str, str] = {}
    async with connection.transaction(isolation="read_committed"):
        # Who stands still in here must not keep others from coming up.
        await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '5s'")
        await read(connection, DECLARE_IN_TURN, DECLARE_LOCK)
        now = (await read(connection, "SELECT clock_timestamp()"))[0][0]
        found = await read(connection, ROWS, list(jobs))
        rows = {row["name"]: row for row in found}
        for name, row in list(rows.items()):
            if row["forgotten"] and row["free"]:
                del rows[name]
                await _begin(connection, REVIVE, name, jobs[name], now, undeclared)
        for name in sorted(jobs.keys() - {each["name"] for each in found}):
            await _begin(connection, ADD, name, jobs[name], now, undeclared)
        await _make(connection, jobs, undeclared)
        await connection.execute(FORGET_FUTURE, list(rows))
        for counts in await read(connection, COUNTS, list(rows), live):
            name = counts["job"]
            row = rows[name]
            change = _change(row, counts, now, jitters.get(name, timedelta(0)))
            if change is not None:
                with _alone(undeclared, name):
                    async with connection.transaction():
                        arguments = (name, *change, row["due_at"], row["ready_at"])
                        await connection.execute(REDECLARE, *arguments)
        (row,) = await read(connection, CAPABILITIES, list(jobs))
        return Capabilities(**row), undeclared


@contextmanager
def _alone(undeclared: dict[str, str], name: str) -> Iterator[None]:
    """Let what fails harm its own job alone."""
    try:
        yield
    except (asyncpg.PostgresError, ValueError) as error:
        if applied_if_unavailable(error) is not None:
            raise
        undeclared[name] = f"{type(error).__name__}: {error}"


async def _make(
    connection: Connection, jobs: Mapping[str, tuple[str, str]], undeclared: dict[str, str]
) -> None:
    made = [(name, *jobs[name]) for name in jobs if name not in undeclared]
    together: dict[str, str] = {}
    with _alone(together, ""):
        async with connection.transaction():
            await connection.execute(MAKE, *_columns(made))
    for each in made if together else ():  # which of them it is
        with _alone(undeclared, each[0]):
            async with connection.transaction():
                await connection.execute(MAKE, *_columns([each]))


async def _begin(  # noqa: PLR0913, PLR0917 - a job and what is declared
    connection: Connection,
    sql: str,
    name: str,
    declared: tuple[str, str],
    now: datetime,
    undeclared: dict[str, str],
) -> None:
    with _alone(undeclared, name):
        ticks = parse(declared[0])
        first = now if isinstance(ticks, Every) else ticks.next_after(now, now)
        async with connection.transaction():
            await connection.execute(sql, name, *declared, now, first)


def _columns(made: list[tuple[str, str, str]]) -> list[list[str]]:
    return [list(column) for column in zip(*made, strict=True)] or [[], [], []]


def _change(
    row: asyncpg.Record, counts: asyncpg.Record, now: datetime, jitter: timedelta
) -> tuple[Any, ...] | None:
    """Return what REDECLARE makes of a row, $2 to $7; None: it is as it should be.

    No tick is further ahead than the next one, and no start further than the longest wait after
    it: otherwise PostgreSQL's clock was set back, and both are computed anew.
    """
    anchor_at, due_at, ready_at = row["anchor_at"], row["due_at"], row["ready_at"]
    try:
        ticks = parse(counts["schedule"])
    except ScheduleError:  # of a newer program, whose instances see to it
        return None
    if isinstance(ticks, Every) and anchor_at > now:
        anchor_at -= -((now - anchor_at) // ticks.interval) * ticks.interval
    if row["free"]:
        next_at = ticks.next_after(now, anchor_at)
        longest = LONGEST_QUARANTINE if row["lost_streak"] >= LOST_LIMIT else LONGEST_RELEASE
        changed = counts["schedule"] != row["schedule"]
        if due_at > next_at or (changed and due_at > now):
            due_at = ready_at = next_at
        elif ready_at > max(next_at + jitter, now + longest * SLACK):
            ready_at = max(due_at, now)
    change = (
        *(counts["schedule"], counts["description"], counts["others"]),
        *(anchor_at, due_at, ready_at),
    )
    columns = ("schedule", "description", "other_schedules", "anchor_at", "due_at", "ready_at")
    same = change == tuple(row[column] for column in columns)
    return None if same and not row["forgotten"] else change
