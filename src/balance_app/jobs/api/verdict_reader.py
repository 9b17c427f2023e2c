"""The verdict as of now: the status, and one statement more for what has recovered lately."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final

from pydantic_core import from_json

from balance_app.db.pool import Connection, Database, reading_in_order
from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.jobs.api.verdict import (
    RECENT,
    Difference,
    Recent,
    Resumed,
    Verdict,
    decide,
    unavailable,
)

# What amber causes were dismissed: the subject of the action.
RECOVERED: Final = "recovered"


class VerdictReader:
    """Reads the verdict; it has one also while the database is unavailable."""

    def __init__(
        self,
        status_reader: StatusReader,
        database: Database,
        audits: Iterable[str] = (),
        mismatch: str = "",
    ) -> None:
        """Read with these; `audits` fail with the error `mismatch` when they find a difference."""
        self._status_reader = status_reader
        self._database = database
        self._audits = list(audits)
        self._mismatch = f"{mismatch}:"
        self._last: Verdict | None = None
        # the database's time at the last verdict, and the moment of that (monotonic)
        self._read_at: tuple[datetime, float] | None = None
        # since when the database is unavailable; as it was last seen before that, if ever
        self._unavailable_since: datetime | None = None

    async def read(self) -> Verdict:
        """Return the verdict; while there are too many requests, the last one.

        Raises:
            Overloaded: there was none before.
        """
        try:
            snapshot, recent = await self.look()
        except DatabaseUnavailable:
            now = None
            if self._read_at is not None:
                then, at = self._read_at
                now = then + timedelta(seconds=monotonic() - at)
            self._unavailable_since = self._unavailable_since or now
            self._last = unavailable(self._unavailable_since, now)
            return self._last
        except Overloaded:
            if self._last is None:
                raise
            return self._last
        self._unavailable_since = None
        self._read_at = snapshot.now, monotonic()
        self._last = decide(snapshot, recent)
        return self._last

    async def look(self) -> tuple[StatusSnapshot, Recent]:
        """Return what the verdict is decided on.

        Raises:
            DatabaseUnavailable: it can't be read.
        """
        return await self._status_reader.read(), await self.recent()

    async def recent(self) -> Recent:
        """Return what has recovered lately, and what the audits found last.

        Raises:
            DatabaseUnavailable: it can't be read.
        """

        async def find(connection: Connection) -> Recent:
            async with reading_in_order(connection):
                return await self.fetch_recent(connection)

        recent = await self._database.run(find, priority=True)
        return recent.on(await self._database.replication())

    async def fetch_recent(self, connection: Connection) -> Recent:
        """Return the same but for replication, within a transaction that reads in order."""
        rows = await connection.fetch(RECENTLY, RECENT, RECOVERED, self._audits, self._mismatch)
        return Recent(
            tuple(
                Resumed(**{field: row[field] for field in Resumed._fields})
                for row in rows
                if row["job"] is not None
            ),
            rows[0]["dismissed_at"],
            tuple(
                Difference(
                    found["audit"],
                    found["result"].removeprefix(self._mismatch),
                    datetime.fromisoformat(found["at"]).astimezone(UTC),
                )
                for found in from_json(rows[0]["differences"])
            ),
        )


# A bounded number of rows, by an index, as in `history.py`: the latest losses, and the run of each
# job that came after (each claim raises the fence by one).
#
# An audit that failed otherwise has no result: the result before it counts, searched through up to
# 1000 failures.
#
# $1 for how long something is recent, $2 the subject of the actions that dismiss, $3 the audits,
# $4 how a result begins that is a difference
RECENTLY: Final = """
WITH dismissed AS (
    SELECT at FROM actions
    WHERE (subject, id) < ($2, 9223372036854775807) AND (subject, id) > ($2, 0)
    ORDER BY subject DESC, id DESC LIMIT 1
), lost AS (
    SELECT job, fence, server FROM job_runs
    WHERE (outcome, id) < ('lost', 9223372036854775807) AND (outcome, id) > ('lost', 0)
    ORDER BY outcome DESC, id DESC LIMIT 100
), resumed AS (
    SELECT lost.job, lost.server,
           next.server AS resumed_on, next.started_at AS resumed_at
    FROM lost JOIN job_runs AS next ON next.job = lost.job AND next.fence = lost.fence + 1
    WHERE next.started_at > clock_timestamp() - $1::interval
      AND next.outcome IS DISTINCT FROM 'lost'
), difference AS (
    SELECT audit.name, found.result, found.ended_at
    FROM unnest($3::text[]) AS audit(name)
    LEFT JOIN LATERAL (
        SELECT id, outcome FROM job_runs
        WHERE (job, outcome, id) < (audit.name, 'succeeded', 9223372036854775807)
          AND (job, outcome, id) > (audit.name, '', 0)
        ORDER BY job DESC, outcome DESC, id DESC LIMIT 1
    ) AS success ON success.outcome = 'succeeded'
    CROSS JOIN LATERAL (
        SELECT id, result, ended_at FROM (
            SELECT id, outcome, result, ended_at FROM job_runs
            WHERE (job, outcome, id) < (audit.name, 'failed', 9223372036854775807)
              AND (job, outcome, id) > (audit.name, '', 0)
            ORDER BY job DESC, outcome DESC, id DESC LIMIT 1000
        ) AS failure
        WHERE outcome = 'failed' AND id > coalesce(success.id, 0) AND starts_with(result, $4)
        ORDER BY id DESC LIMIT 1
    ) AS found
)
SELECT (SELECT at FROM dismissed) AS dismissed_at,
    (SELECT coalesce(json_agg(json_build_object(
        'audit', name, 'result', result, 'at', ended_at
     )), '[]')::text FROM difference) AS differences,
    resumed.*
FROM (SELECT) AS always LEFT JOIN resumed ON true
ORDER BY resumed_at DESC
"""
