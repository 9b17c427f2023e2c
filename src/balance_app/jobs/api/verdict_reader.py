"""The verdict as of now: the status, and one statement more for what has recovered lately."""

from datetime import datetime, timedelta
from time import monotonic
from typing import Final

from balance_app.db.pool import Database, read
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.api.verdict import RECENT, Recent, Resumed, Verdict, decide, unavailable

# What amber causes were dismissed: the subject of the action.
RECOVERED: Final = "recovered"


class VerdictReader:
    """Reads the verdict; it has one also while the database is unavailable."""

    def __init__(self, status_reader: StatusReader, database: Database) -> None:
        self._status_reader = status_reader
        self._database = database
        # the database's time at the last verdict, and the moment of that (monotonic)
        self._read_at: tuple[datetime, float] | None = None
        # since when the database is unavailable; as it was last seen before that, if ever
        self._unavailable_since: datetime | None = None

    async def read(self) -> Verdict:
        """Return the verdict."""
        try:
            snapshot = await self._status_reader.read()
            recent = await self.recent()
        except DatabaseUnavailable:
            now = None
            if self._read_at is not None:
                then, at = self._read_at
                now = then + timedelta(seconds=monotonic() - at)
            self._unavailable_since = self._unavailable_since or now
            return unavailable(self._unavailable_since, now)
        self._unavailable_since = None
        self._read_at = snapshot.now, monotonic()
        return decide(snapshot, recent)

    async def recent(self) -> Recent:
        """Return what has recovered lately."""
        rows = await self._database.run(
            lambda con: read(con, RESUMED, RECENT, RECOVERED), priority=True
        )
        return Recent(
            tuple(
                Resumed(**{field: row[field] for field in Resumed._fields})
                for row in rows
                if row["id"] is not None
            ),
            rows[0]["dismissed_at"],
        )


# A bounded number of rows, by an index, as in `history.py`: the latest losses, and the run of each
# job that came after (each claim raises the fence by one).
#
# $1 for how long something is recent, $2 the subject of the actions that dismiss
RESUMED: Final = """
WITH dismissed AS (
    SELECT at FROM actions
    WHERE (subject, id) < ($2, 9223372036854775807) AND (subject, id) > ($2, 0)
    ORDER BY subject DESC, id DESC LIMIT 1
), lost AS (
    SELECT id, job, fence, server, ended_at FROM job_runs
    WHERE (outcome, id) < ('lost', 9223372036854775807) AND (outcome, id) > ('lost', 0)
    ORDER BY outcome DESC, id DESC LIMIT 100
), resumed AS (
    SELECT lost.id, lost.job, lost.server, lost.ended_at AS lost_at,
           next.server AS resumed_on, next.started_at AS resumed_at
    FROM lost JOIN job_runs AS next ON next.job = lost.job AND next.fence = lost.fence + 1
    WHERE next.started_at > clock_timestamp() - $1::interval
      AND next.outcome IS DISTINCT FROM 'lost'
)
SELECT (SELECT at FROM dismissed) AS dismissed_at, resumed.*
FROM (SELECT) AS always LEFT JOIN resumed ON true
ORDER BY resumed_at DESC
"""
