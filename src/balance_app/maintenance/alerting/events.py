"""The events to send: the difference between what is wrong and what was reported, as rows."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, NamedTuple
from uuid import UUID

from balance_app.db.pool import Connection
from balance_app.jobs.run_log import storable

# So many events may wait for a receiver. What is wrong when there is room again is recorded then.
MOST_WAITING: Final = 1000
# So many are kept when they are done.
KEPT: Final = 1000
DELETED_AT_ONCE: Final = 200
LONGEST_SENTENCE: Final = 500
FIRST_PAUSE: Final = timedelta(seconds=5)
LONGEST_PAUSE: Final = timedelta(minutes=2)


class Cause(NamedTuple):
    """One thing that is wrong now."""

    # what kind of thing, like `job-failing`
    code: str
    # the job or the instance; empty where it is neither
    subject: str
    sentence: str
    since: datetime


class Event(NamedTuple):
    """A cause that is there, or is gone: what one POST reports."""

    number: int
    # the same for each try
    id: UUID
    code: str
    subject: str
    # raised or recovered
    status: str
    sentence: str
    since: datetime
    at: datetime
    # this one included
    tries: int
    # how many of the others the receiver refused because of the event itself
    refusals: int = 0


class Waiting(NamedTuple):
    """The events that were not accepted yet."""

    events: int
    # of the oldest: how often it was sent, when it may be sent again, and what came of it
    tries: int
    seconds: float
    error: str | None


# A cause is open from its event `raised` until its event `recovered`; the unique index allows one
# of both. What does not fit is left for later: it is still the difference then.
#
# A job has one cause at a time. When it has another one, as a failing job that is paused, nothing
# has recovered: the one before ends without an event, once the other is open. (An instance may
# have the name of a job.)
#
# $1 to $4 the causes, $5 how many events may wait
RECORD: Final = """
WITH wrong AS (  -- each kind of thing once for each subject
    SELECT DISTINCT ON (code, subject) code, subject, sentence, since
    FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[])
         AS cause (code, subject, sentence, since)
    ORDER BY code, subject, since
), open AS (
    SELECT id, code, subject, sentence, since FROM alerts
    WHERE status = 'raised' AND ended_at IS NULL
), gone AS (
    SELECT open.* FROM open LEFT JOIN wrong USING (code, subject) WHERE wrong.code IS NULL
), replaced AS (
    SELECT gone.id, wrong.code, wrong.subject FROM gone JOIN wrong USING (subject)
    WHERE 'instance-gone' NOT IN (gone.code, wrong.code)
), change AS (
    SELECT id, code, subject, 'recovered' AS status, sentence, since
    FROM gone WHERE id NOT IN (SELECT id FROM replaced)
    UNION ALL
    SELECT NULL, code, subject, 'raised', wrong.sentence, wrong.since
    FROM wrong LEFT JOIN open USING (code, subject) WHERE open.id IS NULL
), fitting AS MATERIALIZED (
    SELECT * FROM change ORDER BY id NULLS LAST, since, code, subject
    LIMIT greatest(0, $5::bigint - (SELECT count(*) FROM alerts WHERE done_at IS NULL))
), ended AS (
    UPDATE alerts SET ended_at = clock_timestamp()
    WHERE id IN (SELECT id FROM fitting)
       OR id IN (
           SELECT replaced.id
           FROM replaced JOIN (
               SELECT code, subject FROM open
               UNION ALL
               SELECT code, subject FROM fitting WHERE status = 'raised'
           ) AS others USING (code, subject)
       )
)
INSERT INTO alerts (code, subject, status, sentence, since)
SELECT code, subject, status, sentence, since FROM fitting
ORDER BY id NULLS LAST, since, code, subject
ON CONFLICT DO NOTHING
"""

DELETE_OLD: Final = """
DELETE FROM alerts WHERE id IN (
    SELECT id FROM alerts
    WHERE done_at IS NOT NULL AND (status = 'recovered' OR ended_at IS NOT NULL)
      AND id <= (SELECT id FROM alerts ORDER BY id DESC OFFSET $1 LIMIT 1)
    ORDER BY id LIMIT $2
)
"""

# Only the oldest is sent, so they arrive in order. The row is locked and compared again: whoever
# tries the same event at the same time finds that it may not be sent yet. A time further ahead than
# the longest pause was written before PostgreSQL's clock was set back.
#
# $1 the first pause, $2 the longest
TRY: Final = """
WITH oldest AS (
    SELECT id FROM alerts WHERE done_at IS NULL ORDER BY id LIMIT 1
)
UPDATE alerts
SET tries = tries + 1,
    next_try_at = clock_timestamp() + least($2::interval, $1::interval * power(2, least(tries, 20)))
FROM oldest
WHERE alerts.id = oldest.id AND done_at IS NULL
  AND next_try_at NOT BETWEEN clock_timestamp() AND clock_timestamp() + $2::interval
RETURNING alerts.id AS number, event AS id, code, subject, status, sentence, since, at, tries,
          refusals
"""

DONE: Final = "UPDATE alerts SET done_at = clock_timestamp(), error = $2 WHERE id = $1"

FAILED: Final = """
UPDATE alerts SET error = $2, refusals = refusals + $3::boolean::integer
WHERE id = $1 AND done_at IS NULL
"""

OPEN: Final = """
SELECT code, subject, sentence, since FROM alerts WHERE status = 'raised' AND ended_at IS NULL
"""

# $1 the longest pause
WAITING: Final = """
SELECT (SELECT count(*) FROM alerts WHERE done_at IS NULL) AS events, tries,
       CASE WHEN next_try_at BETWEEN moment AND moment + $1::interval
            THEN extract(epoch FROM next_try_at - moment)::float8 ELSE 0 END AS seconds, error
FROM (SELECT clock_timestamp() AS moment) AS clock CROSS JOIN alerts
WHERE done_at IS NULL ORDER BY id LIMIT 1
"""


async def open_causes(connection: Connection) -> list[Cause]:
    """Return what was reported, or waits for that, and has not recovered."""
    return [Cause(**row) for row in await connection.fetch(OPEN)]


async def record(connection: Connection, causes: Iterable[Cause]) -> None:
    """Record what has changed since the last time, and delete the oldest events that are done."""
    columns = list(zip(*causes, strict=True)) or [(), (), (), ()]
    sentences = [storable(sentence, LONGEST_SENTENCE) for sentence in columns[2]]
    await connection.execute(
        RECORD, list(columns[0]), list(columns[1]), sentences, list(columns[3]), MOST_WAITING
    )
    await connection.execute(DELETE_OLD, KEPT, DELETED_AT_ONCE)


async def next_to_try(connection: Connection) -> Event | None:
    """Return the oldest event, which counts as tried then; None: none may be sent now."""
    row = await connection.fetchrow(TRY, FIRST_PAUSE, LONGEST_PAUSE)
    return None if row is None else Event(**row)


async def end(connection: Connection, event: Event, error: str | None = None) -> None:
    """Record that an event is done: accepted, or given up because of an error."""
    await connection.execute(DONE, event.number, error)


async def fail(connection: Connection, event: Event, error: str, *, refused: bool) -> None:
    """Record why an event was not accepted, or that it was refused itself; it is sent again."""
    await connection.execute(FAILED, event.number, error, refused)


async def waiting(connection: Connection) -> Waiting | None:
    """Return what waits to be sent; None: nothing does."""
    row = await connection.fetchrow(WAITING, LONGEST_PAUSE)
    return None if row is None else Waiting(**row)
