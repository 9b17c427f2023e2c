"""Which declaration of a job is in effect, and how the job's row is updated to it.

Instances of different versions may declare a job differently. Each version's declaration is a row
of `job_declarations`, which its instances keep live by declaring again. Of the live declarations of
a job, the one whose first declaration is latest is in effect. So a new version takes effect when it
starts, and an old version that restarts changes nothing. When the last instance of a version has
stopped, its declaration expires and the previous one is in effect again: a rollback works as an
upgrade does. While live declarations disagree about a schedule, the job's row names the others.

No instance has to know which others exist: a declaration is live by the time in its own row.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import asyncpg

from balance_app.db.outages import applied_if_unavailable
from balance_app.db.pool import Connection, read
from balance_app.jobs.schedule import Every, ScheduleError, parse

DECLARE_LOCK: Final = 0x6A6F6273  # "jobs"; no other lock of this database may use the number
# A declaration not repeated for this long is no longer live; instances repeat it more often.
LIVE: Final = timedelta(seconds=60)
# This many losses in a row quarantine a job, and each further loss doubles the time. A job that
# kills its process must not take down all instances, and a job lost by accident must run again
# without an operator.
LOST_LIMIT: Final = 3
QUARANTINE: Final = timedelta(minutes=10)
LONGEST_QUARANTINE: Final = timedelta(hours=2)
# The longest wait after a release.
LONGEST_RELEASE: Final = timedelta(minutes=5)
# the factor by which a stored wait may exceed it: random growth and a clock read earlier
SLACK: Final = 1.5


class Capabilities(NamedTuple):
    """The jobs that an instance can run, as of its start; it claims no others."""

    # by PostgreSQL's clock
    booted_at: datetime
    # jobs are numbered in the order of first declaration: it has all up to this number except
    # the missing ones
    highest_number: int
    missing: list[str]
    # the same as ranges of numbers, which PostgreSQL searches by bisection
    numbers: list["asyncpg.Range[int]"]
    # how many runs it takes at once at most; None: any number
    max_running: int | None = None


class Declared(NamedTuple):
    """What a version of the code declares of a job, as its row holds it."""

    schedule: str
    description: str = ""
    # JSON
    args: str = "{}"
    start_within: timedelta | None = None


# Services in two schemas of one database don't block each other.
LOCK_DECLARATIONS: Final = """
SELECT pg_advisory_xact_lock(
    $1::bigint # CASE current_schema() WHEN 'public' THEN 0 ELSE hashtext(current_schema()) END
)
"""

# A new row is due at its declaration (an interval) or at its first tick (cron). Declarations hold a
# lock, so that a number below the highest can't appear later.
ROWS: Final = """
SELECT name, schedule, schedule_override, description, args, start_within, other_schedules,
       anchor_at, due_at, ready_at, lost_streak, holder IS NULL AS free,
       forgotten_at IS NOT NULL AS forgotten
FROM jobs WHERE name = ANY($1)
"""

ADD: Final = """
INSERT INTO jobs (name, schedule, description, args, start_within, anchor_at, due_at, ready_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $7)
"""

# A forgotten job that is declared again starts fresh: no missed tick is made up for. Its fence is
# kept, as the history still has its runs.
REVIVE: Final = """
UPDATE jobs SET schedule = $2, description = $3, args = $4, start_within = $5,
    anchor_at = $6, due_at = $7, ready_at = $7,
    forgotten_at = NULL, forgotten_by = NULL, paused_at = NULL, paused_by = NULL,
    pause_reason = NULL, attempt = 0, requested_by = NULL, requested_args = NULL,
    checkpoint = NULL, lost_streak = 0,
    releases = 0, retries = 0, failure_streak = 0, other_schedules = '{}', startup_marked_at = NULL,
    schedule_override = NULL, overridden_by = NULL, overridden_at = NULL
WHERE name = $1 AND holder IS NULL
"""

# Inserts a declaration, or keeps it live. The digest leaves out what a job does not declare: a
# release which adds an option has the same declarations of the jobs that do not use it.
UPSERT_DECLARATIONS: Final = """
INSERT INTO job_declarations (job, digest, schedule, description, args, start_within)
SELECT job, encode(sha256(convert_to(
           concat_ws(E'\\n', schedule, description, nullif(args, '{}'), start_within), 'UTF8'
       )), 'hex'), schedule, description, args, start_within
FROM unnest($1::text[], $2::text[], $3::text[], $4::jsonb[], $5::interval[])
     AS declared (job, schedule, description, args, start_within)
ON CONFLICT (job, digest) DO UPDATE SET last_declared_at = clock_timestamp()
"""

# For each job the declaration in effect, and the other live schedules. A declaration dated further
# ahead than a live one may be old was written before the clock was set back. Each is read once,
# without a join: with old statistics the planner would expect few, and compare each with all.
IN_EFFECT: Final = """
WITH live AS (
    SELECT job, array_agg(DISTINCT schedule ORDER BY schedule) AS schedules,
           (array_agg(job_declarations ORDER BY first_declared_at DESC, digest))[1] AS latest
    FROM job_declarations
    WHERE job = ANY ($1)
      AND last_declared_at BETWEEN clock_timestamp() - $2::interval AND clock_timestamp() + $2
    GROUP BY job
)
SELECT job, (latest).schedule, (latest).description, (latest).args, (latest).start_within,
       array_remove(schedules, (latest).schedule) AS others
FROM live
"""

# A changed schedule takes effect at its next tick. A tick that is due already stays, and so do the
# times of a job that is running. Times that changed since the row was read are left alone; a row
# whose override did is left to the next declaration.
REDECLARE: Final = """
UPDATE jobs SET schedule = $2, description = $3, args = $4, start_within = $5,
    other_schedules = $6, forgotten_at = NULL, forgotten_by = NULL,
    anchor_at = CASE WHEN holder IS NULL THEN $7 ELSE anchor_at END,
    due_at = CASE WHEN holder IS NULL AND due_at = $10 AND ready_at = $11 THEN $8 ELSE due_at END,
    ready_at = CASE WHEN holder IS NULL AND due_at = $10 AND ready_at = $11 THEN $9
               ELSE ready_at END
WHERE name = $1 AND schedule_override IS NOT DISTINCT FROM $12
"""

# A startup mark or a heartbeat in the future was written before the clock was set back.
RESET_FUTURE: Final = """
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
    jobs: Mapping[str, Declared],
    jitters: Mapping[str, timedelta],
    live: timedelta,
    lease: timedelta,
) -> tuple[Capabilities, dict[str, str]]:
    """Declare jobs, by name, and update their rows to what is in effect.

    A declaration that was not repeated for `live` is not in effect. `lease` is the length of the
    instances' leases.

    Returns:
        The capabilities, and the jobs that could not be declared, each with the reason.
    """
    undeclared: dict[str, str] = {}
    async with connection.transaction(isolation="read_committed"):
        # An instance that freezes while it holds the lock must not block the start of others.
        await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '5s'")
        await read(connection, LOCK_DECLARATIONS, DECLARE_LOCK)
        now = (await read(connection, "SELECT clock_timestamp()"))[0][0]
        found = await read(connection, ROWS, list(jobs))
        rows = {row["name"]: row for row in found}
        for name, row in list(rows.items()):
            if row["forgotten"] and row["free"]:
                del rows[name]
                await _create_row(connection, REVIVE, name, jobs[name], now, undeclared)
        for name in sorted(jobs.keys() - {each["name"] for each in found}):
            await _create_row(connection, ADD, name, jobs[name], now, undeclared)
        await _upsert(connection, jobs, undeclared)
        await connection.execute(RESET_FUTURE, list(rows))
        for in_effect in await read(connection, IN_EFFECT, list(rows), live):
            name = in_effect["job"]
            row = rows[name]
            jitter = jitters.get(name, timedelta(0))
            change = _change(row, in_effect, now, jitter=jitter, lease=lease)
            if change is not None:
                with _isolated(undeclared, name):
                    async with connection.transaction():
                        seen = (row["due_at"], row["ready_at"], row["schedule_override"])
                        await connection.execute(REDECLARE, name, *change, *seen)
        (row,) = await read(connection, CAPABILITIES, list(jobs))
        return Capabilities(**row), undeclared


@contextmanager
def _isolated(undeclared: dict[str, str], name: str) -> Iterator[None]:
    """Let a failure concern this job only, unless the database is unavailable."""
    try:
        yield
    except (asyncpg.PostgresError, ValueError) as error:
        if applied_if_unavailable(error) is not None:
            raise
        undeclared[name] = f"{type(error).__name__}: {error}"


async def _upsert(
    connection: Connection, jobs: Mapping[str, Declared], undeclared: dict[str, str]
) -> None:
    declared = [(name, jobs[name]) for name in jobs if name not in undeclared]
    failure: dict[str, str] = {}
    with _isolated(failure, ""):
        async with connection.transaction():
            await connection.execute(UPSERT_DECLARATIONS, *_columns(declared))
    for each in declared if failure else ():  # one by one, to find those that fail
        with _isolated(undeclared, each[0]):
            async with connection.transaction():
                await connection.execute(UPSERT_DECLARATIONS, *_columns([each]))


async def _create_row(  # noqa: PLR0913, PLR0917 - a job and its declaration
    connection: Connection,
    sql: str,
    name: str,
    declared: Declared,
    now: datetime,
    undeclared: dict[str, str],
) -> None:
    with _isolated(undeclared, name):
        ticks = parse(declared.schedule)
        first = now if isinstance(ticks, Every) else ticks.next_after(now, now)
        async with connection.transaction():
            await connection.execute(
                sql,
                name,
                declared.schedule,
                declared.description,
                declared.args,
                declared.start_within,
                now,
                first,
            )


def _columns(rows: list[tuple[str, Declared]]) -> list[list[Any]]:
    return [
        [name for name, _ in rows],
        [each.schedule for _, each in rows],
        [each.description for _, each in rows],
        [each.args for _, each in rows],
        [each.start_within for _, each in rows],
    ]


def _change(
    row: asyncpg.Record,
    in_effect: asyncpg.Record,
    now: datetime,
    *,
    jitter: timedelta,
    lease: timedelta,
) -> tuple[Any, ...] | None:
    """Return the parameters $2 to $9 of REDECLARE for a row; None: it is up to date.

    A row's tick is at most one tick ahead, and its start at most the longest wait after that, or a
    lease: for so long each job waits after a restore from a backup (`maintenance/restoration.py`).
    If either is later, PostgreSQL's clock was set back, and they are computed again. An override
    determines the ticks, if there is one.
    """
    override = row["schedule_override"]
    anchor_at, due_at, ready_at = row["anchor_at"], row["due_at"], row["ready_at"]
    try:
        ticks = parse(in_effect["schedule"] if override is None else override)
    except ScheduleError:  # of a newer version, whose instances update the row
        return None
    if isinstance(ticks, Every) and anchor_at > now:
        anchor_at -= -((now - anchor_at) // ticks.interval) * ticks.interval
    if row["free"]:
        next_at = ticks.next_after(now, anchor_at)
        longest = LONGEST_QUARANTINE if row["lost_streak"] >= LOST_LIMIT else LONGEST_RELEASE
        longest = max(longest, lease)
        changed = override is None and in_effect["schedule"] != row["schedule"]
        if due_at > next_at or (changed and due_at > now):
            due_at = ready_at = next_at
        elif ready_at > max(next_at + jitter, now + longest * SLACK):
            ready_at = max(due_at, now)
    change = {
        "schedule": in_effect["schedule"],
        "description": in_effect["description"],
        "args": in_effect["args"],
        "start_within": in_effect["start_within"],
        "other_schedules": in_effect["others"],
        "anchor_at": anchor_at,
        "due_at": due_at,
        "ready_at": ready_at,
    }
    same = all(row[column] == value for column, value in change.items())
    return None if same and not row["forgotten"] else tuple(change.values())
