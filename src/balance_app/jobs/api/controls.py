"""What people can do to a job: run it now, pause it, resume it, cancel its run, forget it.

Each is one conditional statement, so any number of people may press any button at once. An instance
that runs the job learns of it with its next heartbeat, all others with their next claim.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import structlog
from pydantic_core import from_json

from balance_app.db.pool import Database, read, write
from balance_app.db.wait_queue import Lane
from balance_app.errors import DatabaseUnavailable, Overloaded, Problem
from balance_app.jobs.api.errors import (
    JobHasCode,
    JobNotFound,
    JobNotRunning,
    JobPaused,
    JobRunning,
    JobWithoutCode,
)
from balance_app.jobs.api.status import Forgotten, StatusReader
from balance_app.jobs.schedule import ScheduleError, TickRange, parse

log = structlog.get_logger(__name__)

MAX_RACES: Final = 100
# What the history says of a run whose job was forgotten.
NOBODY_LEFT: Final = "its instance is gone, and no other has its code"


class Controls:
    """Steers jobs; each call returns the job as it is afterwards, a `JobAnswer` as JSON.

    Raises (all of them):
        JobNotFound: there is no such job.
        DatabaseUnavailable: see `balance_app.db.pool`.
    """

    def __init__(self, database: Database, status_reader: StatusReader) -> None:
        self._database = database
        self._status_reader = status_reader

    async def run(self, name: str, by: str) -> bytes:
        """Make a job ready now.

        Raises:
            JobRunning: it runs.
            JobPaused: it is paused.
            JobWithoutCode: no live instance could run it.
        """
        return await self._steer(
            "run", RUN, name, by, self._status_reader.lease, refusal=_refuses_run
        )

    async def pause(self, name: str, by: str, reason: str | None) -> bytes:
        """Keep a job from starting; a run under way goes on. Who paused it first stays."""
        return await self._steer("pause", PAUSE, name, by, reason)

    async def cancel(self, name: str, by: str) -> bytes:
        """Ask the instance that runs a job to end the run. Who asked first stays.

        A run whose work is done (`workEndedAt` in the answer) has succeeded, and only ends now.

        Raises:
            JobNotRunning: there is no run.
        """
        return await self._steer("cancel", CANCEL, name, by, refusal=_refuses_cancel)

    async def forget(self, name: str, by: str) -> Forgotten:
        """Take a job off all lists that nobody has the code of; its history stays.

        Who forgot it first stays. When code declares it again, it begins anew.

        Raises:
            JobRunning: it runs.
            JobHasCode: a live instance has its code.
        """
        for _ in range(MAX_RACES):
            row = await self._database.run(
                lambda con: write(con, FORGET, name, by, self._status_reader.lease, NOBODY_LEFT),
                lane=_lane(name),
            )
            if row is not None:
                log.info("job steered", what="forget", job=name, by=by)
                return Forgotten(row["forgotten_at"], row["forgotten_by"])
            await self._status_reader.read()
            forgotten = self._status_reader.forgotten(name)
            if forgotten is not None:
                return forgotten
            problem = _refuses_forget(from_json(await self._job(name)))
            if problem is not None:
                raise problem
        raise _lost_every_race(name)

    async def resume(self, name: str, by: str) -> bytes:
        """Let a job go on with its next tick; ticks that were missed are recorded as skipped."""
        for _ in range(MAX_RACES):
            rows = await self._database.run(lambda con: read(con, PAUSED, name))
            if not rows:
                raise JobNotFound(name)
            (row,) = rows
            if row["paused_at"] is None:
                return await self._report(name)
            due_at, skipped = None, None
            if not row["held"]:
                due_at, skipped = _next_tick(row)
            because = f": {row['pause_reason']}" if row["pause_reason"] else ""
            arguments = (
                name,
                row["paused_at"],
                row["due_at"],
                row["fence"],
                row["held"],
                due_at,
                skipped and skipped.first,
                skipped and skipped.last,
                skipped and skipped.ticks,
                f"paused by {row['paused_by']}{because}",
            )
            done = await self._database.run(
                lambda con, arguments=arguments: write(con, RESUME, *arguments),  # type: ignore[misc]
                lane=_lane(name),
            )
            if done is not None:
                log.info("job steered", what="resume", job=name, by=by)
                return await self._report(name)
        raise _lost_every_race(name)

    async def _steer(
        self,
        what: str,
        sql: str,
        name: str,
        *arguments: object,
        refusal: Callable[[dict[str, Any]], Problem | None] | None = None,
    ) -> bytes:
        for _ in range(MAX_RACES):
            row = await self._database.run(
                lambda con: write(con, sql, name, *arguments), lane=_lane(name)
            )
            if row is not None:
                log.info("job steered", what=what, job=name, by=arguments[0])
                return await self._report(name)
            # The cause of the refusal is read afresh; if there is none any more, it raced.
            job = from_json(await self._job(name))
            problem = refusal(job) if refusal else None
            if problem is not None:
                raise problem
        raise _lost_every_race(name)

    async def _report(self, name: str) -> bytes:
        """Return a job that was just changed."""
        try:
            return await self._job(name)
        except (DatabaseUnavailable, Overloaded) as problem:
            raise DatabaseUnavailable(
                "The job can't be read, to report its state.", applied="unknown"
            ) from problem

    async def _job(self, name: str) -> bytes:
        await self._status_reader.read()
        job = self._status_reader.job(name)
        if job is None:
            raise JobNotFound(name)
        return job


def _lane(name: str) -> Lane:
    """Return the lane of those who steer a job: of all that wait for its row, one is connected."""
    return Lane(("job", name))


def _refuses_run(job: dict[str, Any]) -> Problem | None:
    if job["paused"] is not None and job["state"] != "running":
        return JobPaused(job["name"], by=job["paused"]["by"], at=job["paused"]["at"])
    if job["state"] == "running":
        return JobRunning(job["name"], server=job["server"], started_at=job["startedAt"])
    return None if job["hasCode"] else JobWithoutCode(job["name"])


def _refuses_forget(job: dict[str, Any]) -> Problem | None:
    if job["state"] == "running":
        return JobRunning(
            job["name"], server=job["server"], started_at=job["startedAt"], what="forgotten"
        )
    return JobHasCode(job["name"]) if job["hasCode"] else None


def _refuses_cancel(job: dict[str, Any]) -> Problem | None:
    if job["state"] != "running":
        return JobNotRunning(job["name"], state=job["state"])
    return None


# A tick that is due already is what runs; one in the future gives way to a new one, of this
# moment, so that its key for effects outside is new. Nothing is taken from a run under way, and
# nobody is left to wait for a run that can't come: some live instance ($3: a lease) has the code.
RUN: Final = """
UPDATE jobs
SET due_at = least(due_at, moment), ready_at = least(ready_at, moment),
    requested_by = coalesce(requested_by, $2)
FROM (SELECT clock_timestamp() AS moment) AS request
WHERE name = $1 AND paused_at IS NULL AND (holder IS NULL OR lease_expires_at <= clock_timestamp())
  AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
  AND EXISTS (SELECT FROM instances WHERE last_heartbeat_at + $3::interval > clock_timestamp()
              AND number <= highest_number AND name <> ALL (missing))
RETURNING name
"""

# Only what nobody runs or could run. A run whose instance is gone will be taken over by nobody: it
# is lost. The row stays, with its fence: a later run of this name must have a higher one.
FORGET: Final = """
WITH candidate AS MATERIALIZED (
    SELECT name, fence, holder, server, started_at, lease_expires_at FROM jobs
    WHERE name = $1 AND (holder IS NULL OR lease_expires_at <= clock_timestamp())
      AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
      AND NOT EXISTS (SELECT FROM instances
                      WHERE last_heartbeat_at + $3::interval > clock_timestamp()
                      AND number <= highest_number AND name <> ALL (missing))
    FOR UPDATE
), lost AS (
    UPDATE job_runs SET outcome = 'lost', ended_at = candidate.lease_expires_at,
                        result = $4
    FROM candidate
    WHERE candidate.holder IS NOT NULL AND job = candidate.name
      AND job_runs.fence = candidate.fence AND job_runs.outcome IS NULL
)
UPDATE jobs SET
    forgotten_at = clock_timestamp(), forgotten_by = $2,
    holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL,
    cancel_requested_by = NULL, releasing = false, done = NULL, total = NULL, note = NULL,
    requested_by = NULL
FROM candidate WHERE jobs.name = candidate.name
RETURNING forgotten_at, forgotten_by
"""

# A run under way keeps its lease. Who paused the job first stays.
PAUSE: Final = """
UPDATE jobs
SET paused_at = coalesce(paused_at, clock_timestamp()), paused_by = coalesce(paused_by, $2),
    pause_reason = CASE WHEN paused_at IS NULL THEN $3 ELSE pause_reason END
WHERE name = $1 AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
RETURNING name
"""

# Only a run that holds its lease can obey.
CANCEL: Final = """
UPDATE jobs SET cancel_requested_by = coalesce(cancel_requested_by, $2)
WHERE name = $1 AND holder IS NOT NULL AND lease_expires_at > clock_timestamp()
RETURNING name
"""

PAUSED: Final = """
SELECT schedule, anchor_at, due_at, attempt, holder IS NOT NULL AS held, fence,
       paused_at, paused_by, pause_reason, clock_timestamp() AS now
FROM jobs WHERE name = $1 AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
"""

# Only the row that was read is resumed: ticks are counted from the row as it was. Who runs or was
# lost settles the tick by itself; otherwise the next tick is a new one, and what an unfinished run
# of the old one left behind is forgotten.
#
# $2 to $5 the row as it was, $6 the next tick, $7 to $9 the ticks that were missed, $10 why
RESUME: Final = """
WITH resumed AS (
    UPDATE jobs
    SET paused_at = NULL, paused_by = NULL, pause_reason = NULL, lost_streak = 0,
        due_at = coalesce($6, due_at), ready_at = coalesce($6, ready_at),
        attempt = CASE WHEN $6::timestamptz IS NULL THEN attempt ELSE 0 END,
        checkpoint = CASE WHEN $6::timestamptz IS NULL THEN checkpoint END,
        requested_by = CASE WHEN $6::timestamptz IS NULL THEN requested_by END,
        startup_marked_at = NULL
    WHERE name = $1 AND paused_at = $2 AND due_at = $3 AND fence = $4
      AND (holder IS NOT NULL) = $5
    RETURNING name
), skipped AS (
    INSERT INTO job_runs (job, due_at, last_due_at, ticks, started_at, ended_at, outcome, result)
    SELECT name, $7::timestamptz, $8::timestamptz, $9, clock_timestamp(), clock_timestamp(),
           'skipped', $10::text
    FROM resumed WHERE $9::bigint IS NOT NULL
)
SELECT name FROM resumed
"""


def _next_tick(row: Any) -> tuple[Any, TickRange | None]:  # noqa: ANN401 - a row of PAUSED
    """Return a paused job's next tick and those that were missed; None: it stays as it is."""
    try:
        schedule = parse(row["schedule"])
    except ScheduleError:  # of a newer program: who has its code runs the tick that it has
        return None, None
    # A tick that had a run is in the history; one that had none is missed itself.
    after = row["due_at"] - timedelta(microseconds=0 if row["attempt"] else 1)
    now, anchor_at = row["now"], row["anchor_at"]
    skipped = schedule.count_between(after, now, anchor_at) if after < now else None
    return schedule.next_after(now, anchor_at), skipped


def _lost_every_race(name: str) -> Overloaded:
    return Overloaded(f"Job {name} changed under each of {MAX_RACES} tries.")
