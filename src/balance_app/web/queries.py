"""Queries of the page beside the status: recent runs, failures, totals; each is cheap.

They are for people alone: no decision depends on their results.
"""

from collections import deque
from collections.abc import Iterable
from time import monotonic
from typing import Any, Final, NamedTuple

from pydantic_core import from_json

from balance_app.db.pool import Database, read, read_in_order
from balance_app.db.replication import Replication
from balance_app.metrics import Metrics

RUNS_KEPT: Final = 40  # of each job that is shown
USERS_COUNTED: Final = 10_000  # summed up by each query; above it, the job `total-days` did that
RATE_SECONDS: Final = 10.0

Runs = list[dict[str, Any]]


class Totals(NamedTuple):
    """All balances together; `exact` as of now, else as the job `total-days` last counted."""

    users: int
    balance: int
    exact: bool
    # changes per second by all instances, and refusals by this one; None: not known yet
    changes: float | None
    refusals: float | None


class Activity(NamedTuple):
    """Recent runs, failures and totals at one moment; times are seconds since 1970."""

    now: float
    # the last runs of each job that is shown, the oldest first
    runs: dict[str, Runs]
    failed: int
    failures: Runs
    # lost runs of the last quarter of an hour, the latest first
    lost: Runs
    totals: Totals


class PageQueries:
    """What the page shows beside the status, each by one statement."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._runs: dict[str, Runs] = {}
        # moment, changes so far, refusals so far
        self._counted: deque[tuple[float, int, int]] = deque()

    async def activity(self, shown: Iterable[str], changed: Iterable[str]) -> Activity:
        """Return the recent activity; runs are read again only of the jobs in `changed`."""
        names = set(shown)
        stale = sorted(names & set(changed) | (names - self._runs.keys()))
        # With priority, as the status: there is one such query at a time.
        (row,) = await self._database.run(
            lambda con: read_in_order(con, ACTIVITY, stale, RUNS_KEPT), priority=True
        )
        self._runs = {name: runs for name, runs in self._runs.items() if name in names}
        self._runs.update((name, []) for name in stale)
        for run in from_json(row["runs"]):
            self._runs[run["job"]].append(run)
        exact = row["users"] <= USERS_COUNTED
        changes, refusals = self._rates(row["changes"], self._metrics.changes.count("refused"))
        return Activity(
            now=row["now"].timestamp(),
            runs=dict(self._runs),
            failed=row["failed"],
            failures=from_json(row["failures"]),
            lost=from_json(row["lost"]),
            totals=Totals(
                users=row["users"] if exact else row["counted_users"],
                balance=int(row["balance"] if exact else row["counted_balance"]),
                exact=exact,
                changes=changes,
                refusals=refusals,
            ),
        )

    async def replication(self) -> Replication | None:
        """Return the primary and its standbys; None: not known."""
        return await self._database.replication()

    async def checkpoint(self, job: str) -> str | None:
        """Return the checkpoint from which the next run of a job resumes, as JSON."""
        rows = await self._database.run(lambda con: read(con, CHECKPOINT, job))
        return rows[0]["checkpoint"] if rows else None

    async def last_runs(self, job: str, limit: int) -> Runs:
        """Return the last runs of a job, the oldest first, as `Activity.runs` has them."""
        (row,) = await self._database.run(lambda con: read_in_order(con, LAST_RUNS, [job], limit))
        return list(from_json(row["runs"]))

    def _rates(self, changes: int, refusals: int) -> tuple[float | None, float | None]:
        now = monotonic()
        self._counted.append((now, changes, refusals))
        # Counts from before a time without viewers do not give the present rate.
        while now - self._counted[0][0] > 2 * RATE_SECONDS or (
            len(self._counted) > 2 and now - self._counted[1][0] >= RATE_SECONDS  # noqa: PLR2004
        ):
            self._counted.popleft()
        then, changes_then, refusals_then = self._counted[0]
        if now - then < 1:
            return None, None
        # A crash of the server resets its statistics.
        return (
            max(0, changes - changes_then) / (now - then),
            (refusals - refusals_then) / (now - then),
        )


# Each CTE reads a bounded number of rows by an index, however long the history is: a job's runs
# begin in the order of their fences (skipped ticks have none), the row comparisons keep the plan to
# the index with this order (see `jobs/api/history.py`), and at most 10 001 users are summed up. The
# number of changes is from PostgreSQL's statistics, some seconds late.
#
# $1 the jobs whose runs are read, $2 how many of each
ACTIVITY: Final = """
WITH moment AS (
    SELECT clock_timestamp() AS now
), runs AS (
    SELECT run.* FROM unnest($1::text[]) AS shown(name) CROSS JOIN LATERAL (
        SELECT * FROM job_runs
        WHERE (job, fence) < (shown.name, 9223372036854775807) AND (job, fence) > (shown.name, 0)
        ORDER BY job DESC, fence DESC LIMIT $2
    ) AS run
), failed AS MATERIALIZED (
    SELECT run.* FROM unnest(ARRAY['failed', 'timed_out', 'lost']) AS kind CROSS JOIN LATERAL (
        SELECT * FROM job_runs
        WHERE (outcome, id) < (kind, 9223372036854775807) AND (outcome, id) > (kind, 0)
        ORDER BY outcome DESC, id DESC LIMIT 1000
    ) AS run, moment
    WHERE ended_at > now - interval '24 hours'
), first_users AS (
    SELECT count(*) AS users, coalesce(sum(balance), 0)::text AS balance
    FROM (SELECT balance FROM users LIMIT 10001) AS few
), counted AS (
    SELECT coalesce(sum(opened), 0)::bigint AS counted_users,
           coalesce(sum(opening + deposited - withdrawn), 0)::bigint::text AS counted_balance
    FROM daily_totals
)
SELECT now, first_users.*, counted.*,
    pg_stat_get_tuples_inserted('entries'::regclass)
        - pg_stat_get_tuples_inserted('users'::regclass) AS changes,
    (SELECT count(*) FROM failed) AS failed,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'job', job, 'server', server, 'outcome', outcome,
        'result', left(result, 200),
        'started', extract(epoch FROM started_at)::float8,
        'ended', extract(epoch FROM ended_at)::float8
    ) ORDER BY id), '[]')::text FROM runs) AS runs,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'job', job, 'server', server, 'outcome', outcome, 'result', left(result, 500),
        'started', extract(epoch FROM started_at)::float8,
        'ended', extract(epoch FROM ended_at)::float8
    ) ORDER BY ended_at DESC), '[]')::text
    FROM (SELECT * FROM failed ORDER BY ended_at DESC LIMIT 5) AS latest) AS failures,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'job', job, 'server', server, 'instance', holder,
        'started', extract(epoch FROM started_at)::float8,
        'ended', extract(epoch FROM ended_at)::float8
    ) ORDER BY ended_at DESC), '[]')::text
    FROM (
        SELECT * FROM failed WHERE outcome = 'lost' AND ended_at > now - interval '15 minutes'
        ORDER BY ended_at DESC LIMIT 100
    ) AS lately) AS lost
FROM moment CROSS JOIN first_users CROSS JOIN counted
"""

# $1 jobs, $2 how many runs of each
LAST_RUNS: Final = """
SELECT coalesce(json_agg(json_build_object(
    'id', id, 'job', job, 'server', server, 'outcome', outcome,
    'result', left(result, 200),
    'started', extract(epoch FROM started_at)::float8,
    'ended', extract(epoch FROM ended_at)::float8
) ORDER BY id), '[]')::text AS runs
FROM unnest($1::text[]) AS shown(name) CROSS JOIN LATERAL (
    SELECT * FROM job_runs
    WHERE (job, fence) < (shown.name, 9223372036854775807) AND (job, fence) > (shown.name, 0)
    ORDER BY job DESC, fence DESC LIMIT $2
) AS run
"""

CHECKPOINT: Final = "SELECT checkpoint::text FROM jobs WHERE name = $1"
