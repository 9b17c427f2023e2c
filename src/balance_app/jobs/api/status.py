"""The status snapshot: the state of every job and every instance at one moment, for display.

An instance caches each job's rendered status and reads from PostgreSQL only the rows that have
changed since its last read, so ten thousand jobs cost little more than ten. Each read is one
statement and so one snapshot; all durations are up to that statement's time.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

import asyncpg
from pydantic_core import from_json, to_json

from balance_app.db.pool import Database, read
from balance_app.errors import Problem
from balance_app.formatting import exact
from balance_app.jobs.api.fleet import Outage, judge
from balance_app.jobs.api.fleet import parse as parse_instance
from balance_app.jobs.api.verdict import Cause, cause_of_job
from balance_app.jobs.declarations import LOST_LIMIT
from balance_app.jobs.schedule import ScheduleError, parse
from balance_app.settings import Settings
from balance_app.states import FAILURES, Outcome, Reason, State, outcome_predicate

_LOST: Final = "{} stopped responding, or can't reach the database (no heartbeat). "
_RESUMES: Final = "Another instance resumes the run."
_NOBODY: Final = "No instance has started it."
_SOON: Final = "It starts within 2 seconds."
_QUARANTINED: Final = (
    "The last {} runs were lost with their processes. The next try is at {}, or on request."
)
# A heartbeat further ahead was sent before PostgreSQL's clock was set back, by an instance that is
# dead: a live one sends the next within a moment.
AHEAD: Final = timedelta(seconds=1)
_NEVER: Final = datetime.max.replace(tzinfo=UTC)
_YIELD_EVERY: Final = 200  # jobs rendered before the event loop's other tasks run
_XIDS: Final = 2**32


class Limits(NamedTuple):
    """The durations that a reason to wait depends on."""

    warm_up: timedelta
    # how long a job may be ready before it is overdue
    overdue: timedelta
    # how long a run lasts at least, and of jobs that declare it
    least: timedelta = timedelta()
    least_of: Mapping[str, timedelta] = {}


class Fleet(NamedTuple):
    """The jobs that the live instances can run, and the start of the eldest of them."""

    # the highest number of a job, the names that are missing below it, and whether the instance
    # runs as many jobs as it may
    capabilities: frozenset[tuple[int, frozenset[str], bool]]
    since: datetime | None

    def can_run(self, number: int, name: str) -> bool:
        """Return whether a live instance has the code of a job."""
        return bool(self._full(number, name))

    def has_capacity(self, number: int, name: str) -> bool:
        """Return whether a live instance that has the code of a job may run one more."""
        return not all(self._full(number, name))

    def _full(self, number: int, name: str) -> list[bool]:
        """Return, for each that has the code of a job, whether it is at its limit."""
        return [
            full
            for highest_number, missing, full in self.capabilities
            if number <= highest_number and name not in missing
        ]


class Forgotten(NamedTuple):
    """When a job was forgotten, and by whom."""

    at: datetime
    by: str


class JobSummary(NamedTuple):
    """What a job contributes to the counts."""

    state: State
    overdue: bool
    # whether its last run failed, timed out or was lost
    failed: bool
    # the instance that runs it
    holder: str | None


class JobStatus(NamedTuple):
    """One job as JSON (a `JobAnswer`), and until when it is valid if the row does not change."""

    text: bytes
    valid_until: datetime
    summary: JobSummary
    # why it needs a hand; None: it needs none
    cause: Cause | None = None


class StatusSnapshot(NamedTuple):
    """The whole status as JSON (a `StatusAnswer`), and its members for callers that need few."""

    now: datetime
    text: bytes
    counts: dict[str, int]
    instances: list[dict[str, Any]]
    # each a `JobAnswer`, in order of the names
    jobs: dict[str, JobStatus]
    # of the jobs that need a hand
    causes: Mapping[str, Cause] = {}
    # when no instance reached the database, the latest first, and whether that was just now
    outages: tuple[Outage, ...] = ()
    settling: bool = False


class StatusReader:
    """Reads the current status of jobs and instances."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        least_seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Read the status.

        Args:
            database: where it is.
            settings: for the lease, and how long jobs last at least.
            least_seconds: how long runs of jobs last at least that declare that themselves.
        """
        self._database = database
        # whether a read failed, and when by PostgreSQL's clock the next one succeeded
        self._was_unavailable = False
        self._back_at: datetime | None = None
        # how long after its last heartbeat an instance counts as live
        self.lease: Final = timedelta(seconds=settings.job_lease_seconds)
        # how far ahead that may lie
        self.ahead: Final = AHEAD
        warm_up = timedelta(seconds=settings.job_warm_up_seconds)
        self._limits = Limits(
            warm_up,
            overdue=self.lease + warm_up,
            least=timedelta(seconds=settings.job_min_seconds),
            least_of={
                name: timedelta(seconds=seconds) for name, seconds in (least_seconds or {}).items()
            },
        )
        self._lock = asyncio.Lock()
        self._reads = 0
        self._last: StatusSnapshot | Problem | None = None
        # of the last read: its oldest running transaction, and the start of the server
        self._horizon: str | None = None
        self._booted_at: datetime | None = None
        self._rows: dict[str, asyncpg.Record] = {}
        # the rendered jobs, the names to render again, and the summaries
        self._jobs: dict[str, JobStatus] = {}
        self._in_order = True
        self._stale: set[str] = set()
        self._summaries: Counter[JobSummary] = Counter()
        self._causes: dict[str, Cause] = {}
        self._missing: dict[str, frozenset[str]] = {}
        self._fleet: Fleet | None = None

    async def read(self) -> StatusSnapshot:
        """Return the current status; concurrent callers share one read.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        reads = self._reads
        async with self._lock:
            # A read that started before this call may not see the caller's own change.
            if self._reads == reads or self._last is None:
                self._reads += 1
                self._last = None
                try:
                    self._last = await self._read()
                except Problem as problem:
                    self._was_unavailable = True
                    self._last = problem
            if isinstance(self._last, Problem):
                raise self._last
            return self._last

    def job(self, name: str) -> bytes | None:
        """Return one job of the newest read as JSON; None: there is no such job."""
        status = self._jobs.get(name)
        return None if status is None else status.text

    def forgotten(self, name: str) -> Forgotten | None:
        """Return when a job was forgotten, by the newest read; None: it was not."""
        row = self._rows.get(name)
        if row is None or not _is_forgotten(row):
            return None
        return Forgotten(row["forgotten_at"], row["forgotten_by"])

    async def _read(self) -> StatusSnapshot:
        header = await self._fetch()
        if header["jobs"] != len(self._rows):  # a row was deleted
            self._horizon = None
            header = await self._fetch()
        now: datetime = header["now"]
        if self._was_unavailable:
            self._was_unavailable, self._back_at = False, now
        instances = from_json(header["instances"])
        fleet = self._live_fleet(instances)
        presence = judge(instances, now, self.lease, self._back_at)
        if fleet != self._fleet:
            self._fleet = fleet
            self._stale.update(self._rows)
        await self._update_jobs(now, fleet)
        counts = {"running": 0, "waiting": 0, "paused": 0, "overdue": 0}
        runs: Counter[str | None] = Counter()
        for (state, overdue, _, holder), number in self._summaries.items():
            counts[state] += number
            counts["overdue"] += number * overdue
            runs[holder] += number
        for instance in instances:
            instance["running"] = runs[instance["id"]]
        outages = [{"from": each.since, "until": each.until} for each in presence.outages]
        head = to_json({"now": now, "counts": counts, "instances": instances, "outages": outages})[
            :-1
        ]
        await asyncio.sleep(0)
        jobs = [status.text for status in self._jobs.values()] or [b""]
        # The whole may be many megabytes, so it is joined only once.
        jobs[0] = head + b',"jobs":[' + jobs[0]
        jobs[-1] += b"]}"
        return StatusSnapshot(
            now,
            b",".join(jobs),
            counts,
            instances,
            dict(self._jobs),
            dict(sorted(self._causes.items())),
            presence.outages,
            presence.settling,
        )

    async def _fetch(self) -> asyncpg.Record:
        """Update the rows to the current ones; return the statement's header row."""
        rows = await self._database.run(
            lambda con: read(
                con,
                CHANGED,
                self._horizon,
                self._booted_at,
                self.lease,
                list(self._missing),
                self.ahead,
            ),
            # There is one at a time, and a burst's requests must not delay it.
            priority=True,
        )
        (header,) = (row for row in rows if row["now"] is not None)
        if self._horizon is None or header["booted_at"] != self._booted_at:
            for cache in (self._rows, self._jobs, self._stale, self._summaries, self._causes):
                cache.clear()
        for row in rows:
            if row["name"] is not None:
                self._rows[row["name"]] = row
                self._stale.add(row["name"])
        self._horizon = str(int(header["horizon"]) % _XIDS)
        self._booted_at = header["booted_at"]
        return header

    def _live_fleet(self, instances: Iterable[dict[str, Any]]) -> Fleet:
        """Return the live instances' capabilities, and remove them from `instances`."""
        missing: dict[str, frozenset[str]] = {}
        capabilities = set()
        since = []
        for instance in instances:
            sent, highest_number = instance.pop("missing"), instance.pop("highestNumber")
            full = instance.pop("full")
            parse_instance(instance)
            names = self._missing[instance["id"]] if sent is None else frozenset(sent)
            missing[instance["id"]] = names
            if instance["live"]:
                capabilities.add((highest_number, names, full))
                since.append(instance["startedAt"])
        self._missing = missing
        return Fleet(frozenset(capabilities), min(since, default=None))

    async def _update_jobs(self, now: datetime, fleet: Fleet) -> None:
        """Render the jobs whose status is no longer valid, a few at a time."""
        self._stale.update(name for name, status in self._jobs.items() if status.valid_until <= now)
        for number, name in enumerate(list(self._stale), start=1):
            self._stale.discard(name)
            previous = self._jobs.get(name)
            if previous is not None:
                self._summaries[previous.summary] -= 1
            self._causes.pop(name, None)
            if _is_forgotten(self._rows[name]):
                self._jobs.pop(name, None)
                continue
            status = _job_status(self._rows[name], now, fleet, self._limits)
            if status.cause is not None:
                self._causes[name] = status.cause
            self._in_order = self._in_order and previous is not None
            self._jobs[name] = status
            self._summaries[status.summary] += 1
            if number % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        if not self._in_order:
            self._jobs = dict(sorted(self._jobs.items()))
            self._in_order = True
        self._summaries = +self._summaries


# The last read has seen each row that was written by a transaction older than all that ran during
# it; this reads all others. The rows and the header are one snapshot. The missing jobs of an
# instance never change, so they are read once. A dead instance whose heartbeat lies ahead is listed
# as long as none that is live has its name: which of the two was there later is not known.
#
# $1 the last read's oldest transaction (null: read all rows), $2 the start of its server,
# $3 the lease, $4 the instances whose missing jobs were read, $5 how far ahead a heartbeat may lie
CHANGED: Final = """
WITH header AS (
    SELECT clock_timestamp() AS now, pg_postmaster_start_time() AS booted_at,
           pg_snapshot_xmin(pg_current_snapshot())::text AS horizon
), changed AS (
    SELECT name, number, coalesce(schedule_override, schedule) AS schedule,
           schedule AS declared_schedule, overridden_by, overridden_at,
           description, args, due_at, ready_at, attempt, requested_by, requested_args,
           startup_marked_at, paused_at, paused_by, pause_reason, fence, holder, server, started_at,
           lease_expires_at, cancel_requested_by, done, total, note, last_heartbeat_at,
           lost_streak, failure_streak, other_schedules,
           last_outcome, last_server, last_started_at, last_ended_at, last_result,
           forgotten_at, forgotten_by, work_ended_at, stop_requested_at
    FROM jobs
    WHERE $1::text IS NULL OR $2::timestamptz IS DISTINCT FROM pg_postmaster_start_time()
       OR age(jobs.xmin) <= age($1::text::xid)
)
SELECT header.*, changed.*
FROM (
    SELECT header.*, (SELECT count(*) FROM jobs) AS jobs,
           (SELECT coalesce(json_agg(json_build_object(
                'id', id,
                'server', server,
                'startedAt', started_at,
                'seenSecondsAgo',
                greatest(round(extract(epoch FROM now - last_heartbeat_at), 3), 0)::float8,
                'live', live,
                'running', 0,
                'maxRunning', max_running,
                'full', max_running IS NOT NULL AND max_running <= (
                    SELECT count(*) FROM jobs WHERE holder = id AND lease_expires_at > now
                ),
                'accepted', accepted,
                'refused', refused,
                'silences', silences,
                'replacesSeenAt', replaces_seen_at,
                'highestNumber', highest_number,
                'missing', CASE WHEN id <> ALL ($4::uuid[]) THEN missing END
            ) ORDER BY server, started_at), '[]')::text
            FROM (
                SELECT id, live, lag(seen_at) OVER name_of AS replaces_seen_at,
                       CASE WHEN seen_at > now THEN bool_or(live) OVER (PARTITION BY server)
                       ELSE max(started_at) OVER (PARTITION BY server) > seen_at END AS replaced
                FROM (
                    SELECT id, server, started_at, last_heartbeat_at AS seen_at,
                           last_heartbeat_at BETWEEN now - $3::interval AND now + $5::interval
                           AS live
                    FROM instances
                ) AS seen WINDOW name_of AS (PARTITION BY server ORDER BY started_at)
            ) AS boot JOIN instances USING (id)
            WHERE live OR NOT replaced) AS instances
    FROM header
) AS header
FULL JOIN changed ON false
"""


def _is_forgotten(row: asyncpg.Record) -> bool:
    """Return whether a job is forgotten; a heartbeat of an older version's run lists it again."""
    return row["forgotten_at"] is not None and (
        row["last_heartbeat_at"] is None or row["last_heartbeat_at"] <= row["forgotten_at"]
    )


def _job_status(row: asyncpg.Record, now: datetime, fleet: Fleet, limits: Limits) -> JobStatus:
    """Return a job's status as of `now`."""
    state = State.WAITING
    if row["holder"] is not None and row["lease_expires_at"] > now:
        state = State.RUNNING
    elif row["paused_at"] is not None:
        state = State.PAUSED
    running = state is State.RUNNING
    holder = str(row["holder"]) if running else None
    waiting = None
    valid_until = now if running else _NEVER
    if state is State.PAUSED:
        waiting = _waiting(Reason.PAUSED, _paused(row))
    elif state is State.WAITING:
        waiting, valid_until = _waiting_reason(row, now, fleet, limits)
    work_ended_at = _of_this_run(row, "work_ended_at") if running else None
    holding_until = None
    all_done = running and row["total"] and row["done"] is not None and row["done"] >= row["total"]
    if work_ended_at is not None or all_done:
        holding_until = row["started_at"] + limits.least_of.get(row["name"], limits.least)
    body = {
        "name": row["name"],
        "state": state,
        "description": row["description"],
        "schedule": _schedule(row["schedule"]),
        "declaredSchedule": _schedule(row["declared_schedule"]),
        "scheduleOverride": (
            {"by": row["overridden_by"], "at": row["overridden_at"]}
            if row["overridden_at"] is not None
            else None
        ),
        "otherSchedules": [_schedule(text) for text in row["other_schedules"]],
        "server": row["server"] if running else None,
        "instanceId": holder,
        "startedAt": row["started_at"] if running else None,
        "elapsedSeconds": _seconds(row["started_at"], now) if running else None,
        "progress": (
            {"done": row["done"], "total": row["total"], "note": row["note"] or ""}
            if running and row["done"] is not None
            else None
        ),
        "workEndedAt": work_ended_at,
        "holdingUntil": holding_until if holding_until and holding_until > now else None,
        "stopRequestedAt": _of_this_run(row, "stop_requested_at") if running else None,
        "cancelRequestedBy": row["cancel_requested_by"] if running else None,
        "dueAt": row["due_at"],
        "readyAt": row["ready_at"],
        "attempt": row["attempt"],
        "failuresInARow": row["failure_streak"],
        "lossesInARow": row["lost_streak"],
        "fence": row["fence"],
        "requestedBy": row["requested_by"],
        "args": from_json(row["args"]),
        "requestedArgs": row["requested_args"] and from_json(row["requested_args"]),
        "hasCode": running or fleet.can_run(row["number"], row["name"]),
        "paused": (
            {"by": row["paused_by"], "at": row["paused_at"], "reason": row["pause_reason"]}
            if row["paused_at"] is not None
            else None
        ),
        "waiting": waiting,
        "lastRun": (
            {
                "outcome": row["last_outcome"],
                "server": row["last_server"],
                "startedAt": row["last_started_at"],
                "endedAt": row["last_ended_at"],
                "seconds": _seconds(row["last_started_at"], row["last_ended_at"]),
                "result": row["last_result"],
            }
            if row["last_outcome"] is not None
            else None
        ),
    }
    failed = row["last_outcome"] in FAILURES
    summary = JobSummary(state, bool(waiting and waiting["overdue"]), failed, holder)
    return JobStatus(to_json(body), valid_until, summary, cause_of_job(body))


def _waiting_reason(
    row: asyncpg.Record, now: datetime, fleet: Fleet, limits: Limits
) -> tuple[dict[str, Any], datetime]:
    """Return why a job waits, and until when that answer is valid."""
    lost = row["holder"] is not None
    ready_at: datetime = row["lease_expires_at"] if lost else row["ready_at"]
    overdue_at = ready_at + limits.overdue
    warm_up_ends_at = _warm_up_ends_at(row, fleet, limits)
    valid_until = min(
        (at for at in (ready_at, overdue_at, warm_up_ends_at) if at is not None and at > now),
        default=_NEVER,
    )
    outcome = row["last_outcome"]
    ended = outcome and outcome_predicate(outcome)
    failures = row["failure_streak"]
    overdue = overdue_at <= now
    starts = _NOBODY if overdue else _SOON
    many = f" The last {failures} runs failed." if failures > 1 else ""
    until = None
    if not fleet.can_run(row["number"], row["name"]):
        reason, sentence = Reason.NO_CODE, "No running instance has the code of this job."
    elif lost:
        resumes = "No instance has resumed the run." if overdue else _RESUMES
        reason, sentence = Reason.LOST, _LOST.format(row["server"]) + resumes
    elif row["lost_streak"] >= LOST_LIMIT and ready_at > now:
        until = ready_at
        reason = Reason.QUARANTINED
        sentence = _QUARANTINED.format(row["lost_streak"], _utc(ready_at))
    elif ready_at > now:
        until = ready_at
        reason, sentence = (
            (Reason.RETRY, f"The last run {ended}. The next try is at {_utc(ready_at)}.{many}")
            if row["attempt"]
            else (Reason.NOT_DUE, f"The next run is at {_utc(ready_at)}.{many}")
        )
    elif warm_up_ends_at is not None and warm_up_ends_at > now:
        until = warm_up_ends_at
        reason, sentence = (
            Reason.WARM_UP,
            f"Due. Instances are starting, and share the due jobs at {_utc(warm_up_ends_at)}.",
        )
    elif not fleet.has_capacity(row["number"], row["name"]):
        reason = Reason.NO_CAPACITY
        sentence = (
            f"Due since {_utc(ready_at)}. The instances with its code run as many jobs as they may."
        )
    elif row["requested_by"] is not None:
        reason, sentence = (
            Reason.REQUESTED,
            f"Queued by {row['requested_by']}. {starts}",
        )
    elif row["attempt"] and outcome == Outcome.RELEASED:
        reason, sentence = (
            Reason.RELEASED,
            f"{row['last_server']} released it. {_NOBODY if overdue else _RESUMES}",
        )
    elif row["attempt"]:
        reason, sentence = Reason.RETRY, f"The last run {ended}. {starts}{many}"
    else:
        reason, sentence = Reason.DUE, f"Due since {_utc(ready_at)}. {starts}"
    return _waiting(reason, sentence, until, overdue=overdue_at <= now), valid_until


def _of_this_run(row: asyncpg.Record, column: str) -> datetime | None:
    """Return a time of the current run; a time before its start is of a previous run."""
    moment: datetime | None = row[column]
    return moment if moment is not None and moment >= row["started_at"] else None


def _warm_up_ends_at(row: asyncpg.Record, fleet: Fleet, limits: Limits) -> datetime | None:
    """Return when the warm-up that delays a ready job ends; None: it is not delayed."""
    if row["startup_marked_at"] is None or fleet.since is None:
        return None
    if row["last_heartbeat_at"] is not None and row["last_heartbeat_at"] > fleet.since:
        return None
    return min(row["startup_marked_at"], fleet.since) + limits.warm_up  # type: ignore[no-any-return]


def _waiting(
    reason: str, sentence: str, until: datetime | None = None, *, overdue: bool = False
) -> dict[str, Any]:
    return {"reason": reason, "until": until, "overdue": overdue, "sentence": sentence}


def _paused(row: asyncpg.Record) -> str:
    because = f": {row['pause_reason']}" if row["pause_reason"] else "."
    return f"Paused by {row['paused_by']} at {_utc(row['paused_at'])}{because}"


def _utc(moment: datetime) -> str:
    return f"{exact(moment)} UTC"


def _seconds(start: datetime, end: datetime) -> float:
    return round(max((end - start).total_seconds(), 0.0), 3)


def _schedule(text: str) -> dict[str, str]:
    return {"text": text, "words": _describe(text)}


@lru_cache(maxsize=1000)
def _describe(schedule: str) -> str:
    try:
        return parse(schedule).describe()
    except ScheduleError:  # a newer version wrote it
        return schedule
