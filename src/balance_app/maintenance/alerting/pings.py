"""Pings: which job's, or the fleet's, state an outside watcher has not been told yet."""

from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Final, NamedTuple

from balance_app.db.pool import Connection
from balance_app.maintenance.alerting.receiver import Phase

AT_ONCE: Final = 200
# What has ended longer ago is not reported any more: a ping tells what is so now.
OLDEST: Final = timedelta(minutes=10)
FLEET: Final = ""
FLEET_EVERY: Final = timedelta(seconds=25)
# After a pause this long the fleet has started again.
FLEET_STARTS_AFTER: Final = timedelta(minutes=5)


class Ping(NamedTuple):
    """What is to be reported of a job, or of the fleet."""

    target: str
    # of the run; 0 for the fleet
    fence: int
    phase: Phase


# The latest run of each job, and the one before, if it has ended since: a job whose next run begins
# at once has both to report. Row comparisons make the planner use the index in that order, as in
# `jobs/api/history.py`. A run that was cancelled or released reports nothing.
#
# `at` is when the job's URL was last tried: so those that do not answer let the others go first.
#
# $1 the jobs, null for all; $2 the job that reports; $3 how old an end may be; $4 how many
UNREPORTED: Final = """
SELECT name AS target, run.fence, run.phase
FROM jobs
CROSS JOIN LATERAL (
    SELECT fence, ended_at,
           CASE WHEN outcome IS NULL THEN 'start' WHEN outcome = 'succeeded' THEN 'success'
                WHEN outcome IN ('failed', 'timed_out', 'lost') THEN 'fail' END AS phase
    FROM job_runs
    WHERE (job, fence) < (name, 9223372036854775807) AND (job, fence) > (name, 0)
    ORDER BY job DESC, fence DESC LIMIT 2
) AS run
LEFT JOIN pings ON target = name
WHERE name <> $2 AND ($1::text[] IS NULL OR name = ANY ($1)) AND forgotten_at IS NULL
  AND run.phase IS NOT NULL
  AND (run.ended_at > clock_timestamp() - $3::interval) IS NOT FALSE
  AND (pings.fence IS NULL OR pings.fence < run.fence
       OR (pings.fence = run.fence AND pings.phase <> run.phase))
ORDER BY pings.at NULLS FIRST, name, run.fence
LIMIT $4
"""

# A ping in the future was sent before the clock was set back.
FLEET_UNREPORTED: Final = """
SELECT at IS NULL OR at < clock_timestamp() - $2::interval AS starts
FROM (SELECT) AS always LEFT JOIN pings ON target = $1
WHERE (at BETWEEN clock_timestamp() - $3::interval AND clock_timestamp()) IS NOT TRUE
"""

REPORTED: Final = """
INSERT INTO pings AS had (target, fence, phase)
SELECT DISTINCT ON (target) target, fence, phase
FROM unnest($1::text[], $2::bigint[], $3::text[]) AS sent (target, fence, phase)
ORDER BY target, fence DESC
ON CONFLICT (target) DO UPDATE
SET fence = excluded.fence, phase = excluded.phase, at = clock_timestamp()
WHERE had.fence <= excluded.fence
"""

# Fence 0 is before each run.
TRIED: Final = """
INSERT INTO pings (target, fence, phase) SELECT target, 0, 'start' FROM unnest($1::text[]) AS target
ON CONFLICT (target) DO UPDATE SET at = clock_timestamp()
"""


async def unreported(connection: Connection, jobs: Collection[str] | None, own: str) -> list[Ping]:
    """Return what to report of jobs (None: of all but this job itself), in order for each."""
    names = None if jobs is None else list(jobs)
    return [Ping(**row) for row in await connection.fetch(UNREPORTED, names, own, OLDEST, AT_ONCE)]


async def fleet(connection: Connection, *, is_well: bool) -> list[Ping]:
    """Return what to report of the fleet, about every half a minute."""
    row = await connection.fetchrow(FLEET_UNREPORTED, FLEET, FLEET_STARTS_AFTER, FLEET_EVERY)
    if row is None:
        return []
    state = Ping(FLEET, 0, "success" if is_well else "fail")
    return [Ping(FLEET, 0, "start"), state] if row["starts"] else [state]


async def reported(connection: Connection, pings: Iterable[Ping]) -> None:
    """Record what was reported."""
    columns = list(zip(*pings, strict=True))
    if columns:
        await connection.execute(REPORTED, *map(list, columns))


async def tried(connection: Connection, jobs: Iterable[str]) -> None:
    """Record that pings of jobs were sent, accepted or not."""
    await connection.execute(TRIED, sorted(jobs))
