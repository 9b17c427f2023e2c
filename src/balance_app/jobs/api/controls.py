"""The controls of a job: run, pause, resume, cancel and forget it, and override its schedule.

Each is one conditional statement, so concurrent requests are safe; one that changes the job also
records who did (`actions`), one that changes nothing does not. The instance that runs the job
receives a request with its next heartbeat, all others with their next claim.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from pydantic_core import from_json

from balance_app.db.pool import Database, read, write
from balance_app.db.wait_queue import Lane
from balance_app.errors import DatabaseUnavailable, Overloaded, Problem
from balance_app.jobs.api.errors import (
    InstanceLive,
    InstanceNotFound,
    InvalidArguments,
    JobHasCode,
    JobNotFound,
    JobNotRunning,
    JobPaused,
    JobRequested,
    JobRunning,
    JobWithoutCode,
)
from balance_app.jobs.api.schemas import ScheduleRequest
from balance_app.jobs.api.status import Forgotten, StatusReader
from balance_app.jobs.api.verdict_reader import RECOVERED
from balance_app.jobs.arguments import ArgumentsError, encode
from balance_app.jobs.job import Job
from balance_app.jobs.schedule import ScheduleError, TickRange, parse

log = structlog.get_logger(__name__)

MAX_RACES: Final = 100
# The result in the history of a run whose job was forgotten.
NO_INSTANCE: Final = "its instance stopped, and no other has its code"


class Controls:
    """Controls jobs; each call but `forget` returns the job afterwards, a `JobAnswer` as JSON.

    Raises (each call):
        JobNotFound: there is no such job.
        DatabaseUnavailable: see `balance_app.db.pool`.
    """

    def __init__(
        self, database: Database, status_reader: StatusReader, registry: Mapping[str, Job]
    ) -> None:
        self._database = database
        self._status_reader = status_reader
        self._registry = registry

    async def run(self, name: str, by: str, args: Mapping[str, object] | None = None) -> bytes:
        """Make a job ready now, to run with its declared arguments or with some replaced by `args`.

        They are checked here if this instance has the job's code, and by the instance that runs it.

        Raises:
            InvalidArguments: its function can't be called with these.
            JobRunning: the job is running.
            JobPaused: it is paused.
            JobRequested: it is to run with other arguments.
            JobWithoutCode: no live instance has its code.
        """
        encoded = None
        if args:
            try:
                encoded = encode(args)
                if (job := self._registry.get(name)) is not None:
                    job.parameters.check(job.args_with(args))
            except ArgumentsError as error:
                raise InvalidArguments(name, str(error), error.names) from None
        return await self._apply(
            "run",
            RUN,
            name,
            by,
            self._status_reader.lease,
            encoded,
            self._status_reader.ahead,
            refusal=partial(_refuses_run, args=args),
        )

    async def pause(self, name: str, by: str, reason: str | None) -> bytes:
        """Keep a job from starting; a run in progress continues. The first pause is kept."""
        return await self._apply("pause", PAUSE, name, by, reason)

    async def cancel(self, name: str, by: str) -> bytes:
        """Request a job's run to stop. The first request is kept.

        A run whose work is done (`workEndedAt` in the answer) still succeeds, and ends now.

        Raises:
            JobNotRunning: there is no run.
        """
        return await self._apply("cancel", CANCEL, name, by, refusal=_refuses_cancel)

    async def forget(self, name: str, by: str) -> Forgotten:
        """Stop listing a job whose code no live instance has; its history stays.

        The first request is kept. When code declares the job again, it starts fresh.

        Raises:
            JobRunning: the job is running.
            JobHasCode: a live instance has its code.
        """
        lease, ahead = self._status_reader.lease, self._status_reader.ahead
        for _ in range(MAX_RACES):
            row = await self._database.run(
                lambda con: write(con, FORGET, name, by, lease, NO_INSTANCE, ahead),
                lane=_lane(name),
            )
            if row is not None:
                log.info("job control", action="forget", job=name, by=by)
                return Forgotten(row["forgotten_at"], row["forgotten_by"])
            await self._status_reader.read()
            forgotten = self._status_reader.forgotten(name)
            if forgotten is not None:
                return forgotten
            problem = _refuses_forget(from_json(await self._job(name)))
            if problem is not None:
                raise problem
        raise _overloaded(name)

    async def resume(self, name: str, by: str) -> bytes:
        """Let a job run again from its next tick; missed ticks are recorded as skipped."""
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
                row["schedule"],
                by,
            )
            done = await self._database.run(
                lambda con, arguments=arguments: write(con, RESUME, *arguments),  # type: ignore[misc]
                lane=_lane(name),
            )
            if done is not None:
                log.info("job control", action="resume", job=name, by=by)
                return await self._report(name)
        raise _overloaded(name)

    async def set_schedule(self, name: str, by: str, request: ScheduleRequest | None) -> bytes:
        """Override the schedule that code declares; None: reset it to that.

        The next tick in the future becomes one of the new schedule; a tick that is due, or runs,
        stays. The override persists whatever code declares later. The same one again changes
        nothing.

        Raises:
            InvalidRequest: there is no such schedule.
        """
        for _ in range(MAX_RACES):
            rows = await self._database.run(lambda con: read(con, SCHEDULE, name))
            if not rows:
                raise JobNotFound(name)
            (row,) = rows
            schedule = None if request is None else str(request.schedule())
            if schedule == row["schedule_override"]:
                return await self._report(name)
            arguments = (
                name,
                row["schedule"],
                row["schedule_override"],
                row["due_at"],
                row["ready_at"],
                row["held"],
                _tick_ahead(row, schedule or row["schedule"]),
                schedule,
                by,
            )
            done = await self._database.run(
                lambda con, arguments=arguments: write(con, OVERRIDE, *arguments),  # type: ignore[misc]
                lane=_lane(name),
            )
            if done is not None:
                log.info("job control", action="schedule", job=name, by=by, schedule=schedule)
                return await self._report(name)
        raise _overloaded(name)

    async def dismiss(self, instance: str, by: str) -> str:
        """Stop listing an instance that is gone against its will; return its name.

        One that sends a heartbeat again is listed again.

        Raises:
            InstanceNotFound: there is no such instance.
            InstanceLive: its last heartbeat is younger than the lease.
        """
        try:
            id_ = UUID(instance)
        except ValueError:
            raise InstanceNotFound from None
        lease, ahead = self._status_reader.lease, self._status_reader.ahead
        row = await self._database.run(lambda con: write(con, DISMISS, id_, by, lease, ahead))
        if row is None or (row["gone"] and not row["dismissed"]):  # by somebody else
            raise InstanceNotFound
        if not row["dismissed"]:
            raise InstanceLive(row["server"])
        log.info("instance dismissed", instance=row["server"], by=by)
        server: str = row["server"]
        return server

    async def dismiss_recovered(self, by: str) -> None:
        """Dismiss what has recovered so far: the verdict no longer names it."""
        await self._database.run(lambda con: write(con, DISMISS_RECOVERED, by, RECOVERED))

    async def _apply(
        self,
        action: str,
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
                log.info("job control", action=action, job=name, by=arguments[0])
                return await self._report(name)
            # The state is read again; if it does not refuse the request, the statement lost a race.
            job = from_json(await self._job(name))
            problem = refusal(job) if refusal else None
            if problem is not None:
                raise problem
        raise _overloaded(name)

    async def _report(self, name: str) -> bytes:
        """Return a job after its change."""
        try:
            return await self._job(name)
        except (DatabaseUnavailable, Overloaded) as problem:
            raise DatabaseUnavailable(
                "The job was changed, but its new state can't be read.", applied="unknown"
            ) from problem

    async def _job(self, name: str) -> bytes:
        await self._status_reader.read()
        job = self._status_reader.job(name)
        if job is None:
            raise JobNotFound(name)
        return job


def _lane(name: str) -> Lane:
    """Return the lane of a job's controls: of those that wait for its row one has a connection."""
    return Lane(("job", name))


def _refuses_run(job: dict[str, Any], args: Mapping[str, object] | None) -> Problem | None:
    if job["paused"] is not None and job["state"] != "running":
        return JobPaused(job["name"], by=job["paused"]["by"], at=job["paused"]["at"])
    if job["state"] == "running":
        return JobRunning(job["name"], server=job["server"], started_at=job["startedAt"])
    if args and job["requestedBy"] is not None and job["requestedArgs"] != args:
        return JobRequested(job["name"], by=job["requestedBy"])
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


# A tick that is due already runs. One in the future is replaced by a new tick at this moment, so
# its idempotency key for effects outside is new. A running job is left alone, and so is one whose
# code no live instance has ($3: the lease, $5: how far ahead a heartbeat may lie), as its run would
# never start. Of two requests with different arguments ($4) for one run the first is kept. A
# checkpoint belongs to other arguments.
RUN: Final = """
WITH before AS MATERIALIZED (
    SELECT due_at, ready_at, requested_by, clock_timestamp() AS moment FROM jobs
    WHERE name = $1 FOR NO KEY UPDATE
), requested AS (
    UPDATE jobs
    SET due_at = least(jobs.due_at, moment), ready_at = least(jobs.ready_at, moment),
        requested_by = coalesce(jobs.requested_by, $2),
        requested_args = coalesce(requested_args, $4),
        checkpoint = CASE WHEN $4::jsonb IS NULL THEN checkpoint END
    FROM before
    WHERE name = $1 AND paused_at IS NULL
      AND (holder IS NULL OR lease_expires_at <= clock_timestamp())
      AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
      AND EXISTS (SELECT FROM instances
                  WHERE last_heartbeat_at BETWEEN clock_timestamp() - $3::interval
                                              AND clock_timestamp() + $5::interval
                  AND number <= highest_number AND name <> ALL (missing))
      AND (jobs.requested_by IS NULL OR $4::jsonb IS NULL OR requested_args = $4)
    RETURNING name, jobs.due_at
), action AS (
    -- a run that is requested already, and ready, stays as it is
    INSERT INTO actions (by, action, subject, before, after)
    SELECT $2, 'job run requested', 'job ' || name, jsonb_build_object('dueAt', before.due_at),
           jsonb_build_object('dueAt', requested.due_at)
           || CASE WHEN $4::jsonb IS NULL THEN '{}' ELSE jsonb_build_object('args', $4::jsonb) END
    FROM requested CROSS JOIN before
    WHERE before.requested_by IS NULL OR ready_at > moment
)
SELECT name FROM requested
"""

# Only a job that no instance runs or could run. A run whose lease has expired is recorded as lost,
# as none will take it over. The row stays, with its fence: later runs of this name must have higher
# ones.
FORGET: Final = """
WITH candidate AS MATERIALIZED (
    SELECT name, fence, holder, server, started_at, lease_expires_at FROM jobs
    WHERE name = $1 AND (holder IS NULL OR lease_expires_at <= clock_timestamp())
      AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
      AND NOT EXISTS (SELECT FROM instances
                      WHERE last_heartbeat_at BETWEEN clock_timestamp() - $3::interval
                                                  AND clock_timestamp() + $5::interval
                      AND number <= highest_number AND name <> ALL (missing))
    FOR UPDATE
), lost AS (
    UPDATE job_runs SET outcome = 'lost', ended_at = candidate.lease_expires_at,
                        result = $4
    FROM candidate
    WHERE candidate.holder IS NOT NULL AND job = candidate.name
      AND job_runs.fence = candidate.fence AND job_runs.outcome IS NULL
), forgotten AS (
    UPDATE jobs SET
        forgotten_at = clock_timestamp(), forgotten_by = $2,
        holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL,
        cancel_requested_by = NULL, releasing = false, done = NULL, total = NULL, note = NULL,
        requested_by = NULL, requested_args = NULL
    FROM candidate WHERE jobs.name = candidate.name
    RETURNING jobs.name, forgotten_at, forgotten_by
), action AS (
    INSERT INTO actions (by, action, subject)
    SELECT $2, 'job forgotten', 'job ' || name FROM forgotten
)
SELECT forgotten_at, forgotten_by FROM forgotten
"""

# A run in progress keeps its lease. The first pause is kept.
PAUSE: Final = """
WITH before AS MATERIALIZED (
    SELECT paused_at FROM jobs WHERE name = $1 FOR NO KEY UPDATE
), paused AS (
    UPDATE jobs
    SET paused_at = coalesce(jobs.paused_at, clock_timestamp()),
        paused_by = coalesce(paused_by, $2),
        pause_reason = CASE WHEN jobs.paused_at IS NULL THEN $3 ELSE pause_reason END
    FROM before
    WHERE name = $1 AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
    RETURNING name
), action AS (
    INSERT INTO actions (by, action, subject, after)
    SELECT $2, 'job paused', 'job ' || name, jsonb_build_object('reason', $3::text)
    FROM paused CROSS JOIN before WHERE paused_at IS NULL
)
SELECT name FROM paused
"""

# Only a run that holds its lease can be cancelled.
CANCEL: Final = """
WITH before AS MATERIALIZED (
    SELECT cancel_requested_by FROM jobs WHERE name = $1 FOR NO KEY UPDATE
), cancelled AS (
    UPDATE jobs SET cancel_requested_by = coalesce(jobs.cancel_requested_by, $2)
    FROM before
    WHERE name = $1 AND holder IS NOT NULL AND lease_expires_at > clock_timestamp()
    RETURNING name, server, started_at
), action AS (
    INSERT INTO actions (by, action, subject, before)
    SELECT $2, 'job run cancelled', 'job ' || name,
           jsonb_build_object('server', server, 'startedAt', started_at)
    FROM cancelled CROSS JOIN before WHERE cancel_requested_by IS NULL
)
SELECT name FROM cancelled
"""

# Only an instance that is gone, with those of its name that were gone before it started: the later
# one had taken their place.
#
# $1 id, $2 who, $3 lease, $4 how far ahead a heartbeat may lie
DISMISS: Final = """
WITH found AS (
    SELECT id, server, started_at, last_heartbeat_at,
           last_heartbeat_at NOT BETWEEN clock_timestamp() - $3::interval
                                     AND clock_timestamp() + $4::interval AS gone
    FROM instances WHERE id = $1
), removed AS (
    DELETE FROM instances USING found
    WHERE gone AND instances.server = found.server
      AND (instances.id = found.id OR instances.last_heartbeat_at < found.started_at)
    RETURNING instances.id
), action AS (
    INSERT INTO actions (by, action, subject, before)
    SELECT $2, 'instance dismissed', 'instance ' || server,
           jsonb_build_object('id', found.id, 'lastHeartbeatAt', last_heartbeat_at)
    FROM found JOIN removed USING (id)
)
SELECT server, gone, id IN (SELECT id FROM removed) AS dismissed FROM found
"""

DISMISS_RECOVERED: Final = """
INSERT INTO actions (by, action, subject) VALUES ($1, 'recovery dismissed', $2) RETURNING id
"""

PAUSED: Final = """
SELECT coalesce(schedule_override, schedule) AS schedule, anchor_at, due_at, attempt,
       holder IS NOT NULL AS held, fence, paused_at, paused_by, pause_reason,
       clock_timestamp() AS now
FROM jobs WHERE name = $1 AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
"""

# Only the row that was read is resumed, as the missed ticks were counted from it. A run or its
# takeover completes the current tick. Without one the next tick is new, and the checkpoint of the
# old one is cleared.
#
# $2 to $5 and $11 the row as it was read, $6 the next tick, $7 to $9 the missed ticks, $10 the
# reason, $12 who
RESUME: Final = """
WITH pause AS MATERIALIZED (
    -- `paused_at` tells this pause from others
    SELECT paused_by, pause_reason FROM jobs WHERE name = $1 AND paused_at = $2
), resumed AS (
    UPDATE jobs
    SET paused_at = NULL, paused_by = NULL, pause_reason = NULL, lost_streak = 0,
        due_at = coalesce($6, due_at), ready_at = coalesce($6, ready_at),
        attempt = CASE WHEN $6::timestamptz IS NULL THEN attempt ELSE 0 END,
        checkpoint = CASE WHEN $6::timestamptz IS NULL THEN checkpoint END,
        requested_by = CASE WHEN $6::timestamptz IS NULL THEN requested_by END,
        requested_args = CASE WHEN $6::timestamptz IS NULL THEN requested_args END,
        startup_marked_at = NULL
    WHERE name = $1 AND paused_at = $2 AND due_at = $3 AND fence = $4
      AND (holder IS NOT NULL) = $5 AND coalesce(schedule_override, schedule) = $11
    RETURNING name
), skipped AS (
    INSERT INTO job_runs (job, due_at, last_due_at, ticks, started_at, ended_at, outcome, result)
    SELECT name, $7::timestamptz, $8::timestamptz, $9, clock_timestamp(), clock_timestamp(),
           'skipped', $10::text
    FROM resumed WHERE $9::bigint IS NOT NULL
), action AS (
    INSERT INTO actions (by, action, subject, before)
    SELECT $12, 'job resumed', 'job ' || name,
           jsonb_build_object('pausedBy', paused_by, 'pausedAt', $2::timestamptz,
                              'reason', pause_reason)
    FROM resumed CROSS JOIN pause
)
SELECT name FROM resumed
"""


SCHEDULE: Final = """
SELECT schedule, schedule_override, anchor_at, due_at, ready_at, holder IS NOT NULL AS held,
       clock_timestamp() AS now
FROM jobs WHERE name = $1 AND (forgotten_at IS NULL OR last_heartbeat_at > forgotten_at)
"""

# Only the row that was read is changed, as its next tick was computed from it: a tick in the future
# is moved while it is in the future and the job does not run. The completion of a run computes the
# next tick by the schedule of that time.
#
# $2 to $6 the row as it was read, $7 the next tick (null: the tick stays), $8 the override (null:
# none), $9 who requested it
OVERRIDE: Final = """
WITH changed AS (
    UPDATE jobs
    SET schedule_override = $8, overridden_by = CASE WHEN $8::text IS NOT NULL THEN $9::text END,
        overridden_at = CASE WHEN $8::text IS NOT NULL THEN clock_timestamp() END,
        due_at = coalesce($7, due_at), ready_at = coalesce($7, ready_at),
        startup_marked_at = CASE WHEN $7::timestamptz IS NULL THEN startup_marked_at END
    WHERE name = $1 AND schedule = $2 AND schedule_override IS NOT DISTINCT FROM $3
      AND due_at = $4 AND ready_at = $5 AND (holder IS NOT NULL) = $6
      AND ($7::timestamptz IS NULL OR due_at > clock_timestamp())
    RETURNING name
), action AS (
    INSERT INTO actions (by, action, subject, before, after)
    SELECT $9, CASE WHEN $8::text IS NULL THEN 'job schedule reset' ELSE 'job schedule set' END,
           'job ' || name, jsonb_build_object('schedule', coalesce($3::text, $2::text)),
           jsonb_build_object('schedule', coalesce($8::text, $2::text))
    FROM changed
)
SELECT name FROM changed
"""


def _tick_ahead(row: Any, schedule: str) -> Any:  # noqa: ANN401 - a row of SCHEDULE, a moment
    """Return the next tick by a schedule; None: the job's tick stays."""
    if row["held"] or row["due_at"] <= row["now"]:
        return None
    try:
        return parse(schedule).next_after(row["now"], row["anchor_at"])
    except ScheduleError:  # a newer version declares it
        return None


def _next_tick(row: Any) -> tuple[Any, TickRange | None]:  # noqa: ANN401 - a row of PAUSED
    """Return a paused job's next tick and the missed ticks; None: the tick stays."""
    try:
        schedule = parse(row["schedule"])
    except ScheduleError:  # a newer version wrote it, whose instances run the current tick
        return None, None
    # A tick that had a run is in the history; a tick without one counts as missed.
    after = row["due_at"] - timedelta(microseconds=0 if row["attempt"] else 1)
    now, anchor_at = row["now"], row["anchor_at"]
    skipped = schedule.count_between(after, now, anchor_at) if after < now else None
    return schedule.next_after(now, anchor_at), skipped


def _overloaded(name: str) -> Overloaded:
    return Overloaded(f"{name} was changed by others at the same time, {MAX_RACES} times in a row.")
