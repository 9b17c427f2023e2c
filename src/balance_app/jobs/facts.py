"""What PostgreSQL knows of the jobs, for the metrics: the same from whichever copy it is asked."""

from typing import Final

import structlog

from balance_app.database import Database, read
from balance_app.errors import Problem
from balance_app.jobs.audits import (
    LedgerMismatchError,
    audit_daily_balances,
    audit_keys,
    audit_ledger,
)
from balance_app.jobs.registry import Registry
from balance_app.metrics import JobFacts

log = structlog.get_logger(__name__)

_AUDITS: Final = [each.name for each in (audit_ledger, audit_keys, audit_daily_balances)]


class Facts:
    """The jobs that this copy's code declares, as their rows and runs are."""

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._names = list(registry)

    async def look(self) -> list[JobFacts]:
        """Return what is known now; nothing while the database can't be asked."""
        try:
            rows = await self._database.run(
                lambda con: read(con, FACTS, self._names, _AUDITS, LedgerMismatchError.__name__),
                urgent=True,
            )
        except Problem:
            return []
        except Exception as error:  # noqa: BLE001 - the other metrics are to be told all the same
            log.warning("no facts for the metrics", error=repr(error))
            return []
        return [JobFacts(*row) for row in rows]


# A job's runs begin one after the other, so the latest of a kind is found from the end, and what
# is kept of the history bounds the search. An audit that could not be carried through has no
# result: the one before stands.
#
# $1 the jobs, $2 those of them that are audits, $3 the error that an audit fails with
FACTS: Final = """
SELECT name,
       (SELECT extract(epoch FROM ended_at)::float8 FROM job_runs
        WHERE job = name AND outcome = 'succeeded' ORDER BY id DESC LIMIT 1) AS last_success_at,
       CASE WHEN paused_at IS NULL AND claimable_at < moment
            THEN extract(epoch FROM moment - claimable_at)::float8 ELSE 0 END AS overdue_seconds,
       paused_at IS NOT NULL AS paused,
       coalesce(last_outcome IN ('failed', 'timed_out', 'lost'), false) AS last_run_failed,
       (SELECT outcome = 'failed' FROM job_runs
        WHERE name = ANY ($2) AND job = name
          AND (outcome = 'succeeded' OR (outcome = 'failed' AND starts_with(result, $3 || ':')))
        ORDER BY id DESC LIMIT 1) AS mismatch
FROM jobs, (SELECT clock_timestamp() AS moment) AS clock
WHERE name = ANY ($1)
ORDER BY name
"""
