"""Statistics from PostgreSQL, for the metrics: the same from every instance."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import structlog

from balance_app.db.pool import Connection, Database, read_in_order
from balance_app.errors import Problem
from balance_app.jobs.api.verdict import Level, Verdict
from balance_app.jobs.job import Job, Registry
from balance_app.metrics import FleetStats, JobStats

log = structlog.get_logger(__name__)


class StatsReader:
    """Reads the statistics of the jobs that this instance's code declares, and tables' sizes."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it reads with
        self,
        database: Database,
        registry: Registry,
        audits: Iterable[Job],
        mismatch: type[Exception],
        read_table_bytes: Callable[[Connection], Awaitable[Mapping[str, int]]],
        read_verdict: Callable[[], Awaitable[Verdict]] | None = None,
    ) -> None:
        """Read statistics of the jobs of `registry`.

        `audits` are those of them whose failures with `mismatch` count as mismatches.
        """
        self._database = database
        self._names = list(registry)
        self._audits = [each.name for each in audits]
        self._mismatch = mismatch.__name__
        self._read_table_bytes = read_table_bytes
        self._read_verdict = read_verdict

    async def read(self) -> FleetStats | None:
        """Return the statistics as of now; None while the database can't be queried."""
        try:
            stats = await self._database.run(self._read, priority=True)
            verdict = None if self._read_verdict is None else await self._read_verdict()
        except Problem:
            return None
        except Exception as error:  # noqa: BLE001 - the other metrics are still served
            log.warning("the statistics for the metrics can't be read", error=repr(error))
            return None
        if verdict is None:
            return stats
        causes = Counter(str(cause.code) for cause in verdict.causes)
        return stats._replace(verdict=list(Level).index(verdict.level), causes=causes)

    async def _read(self, connection: Connection) -> FleetStats:
        rows = await read_in_order(connection, STATS, self._names, self._audits, self._mismatch)
        jobs = [JobStats(**row) for row in rows]
        return FleetStats(jobs, await self._read_table_bytes(connection))


# A job's runs never overlap, so the latest with an outcome has the highest id. Row comparisons make
# the planner use the index in that order, and a limit ends its scan, as in `history.py`. An audit
# that failed otherwise has no result: the result before it counts, searched through up to 1000
# failures.
#
# $1 the jobs, $2 those of them that are audits, $3 the error that an audit fails with
STATS: Final = """
SELECT name,
       extract(epoch FROM success.ended_at)::float8 AS last_success_at,
       CASE WHEN paused_at IS NULL AND claimable_at < moment
            THEN extract(epoch FROM moment - claimable_at)::float8 ELSE 0 END AS overdue_seconds,
       paused_at IS NOT NULL AS paused,
       coalesce(last_outcome IN ('failed', 'timed_out', 'lost'), false) AS last_run_failed,
       CASE WHEN since.mismatch THEN true WHEN name = ANY ($2) AND success.id > 0 THEN false END
       AS mismatch,
       failure_streak AS failures_in_a_row, lost_streak AS losses_in_a_row,
       schedule_override IS NOT NULL AS schedule_overridden
FROM (SELECT clock_timestamp() AS moment) AS clock CROSS JOIN jobs
LEFT JOIN LATERAL (
    SELECT id, ended_at, outcome FROM job_runs
    WHERE (job, outcome, id) < (name, 'succeeded', 9223372036854775807)
      AND (job, outcome, id) > (name, '', 0)
    ORDER BY job DESC, outcome DESC, id DESC LIMIT 1
) AS success ON success.outcome = 'succeeded'
LEFT JOIN LATERAL (
    SELECT bool_or(starts_with(result, $3 || ':')) AS mismatch
    FROM (
        SELECT id, outcome, result FROM job_runs
        WHERE name = ANY ($2)
          AND (job, outcome, id) < (name, 'failed', 9223372036854775807)
          AND (job, outcome, id) > (name, '', 0)
        ORDER BY job DESC, outcome DESC, id DESC LIMIT 1000
    ) AS last
    WHERE outcome = 'failed' AND last.id > coalesce(success.id, 0)
) AS since ON true
WHERE name = ANY ($1)
ORDER BY name
"""
