"""The next state of a job whose run has ended: its next tick, a retry, or a pause."""

import random
from datetime import datetime, timedelta
from typing import Final

from balance_app.jobs.declarations import LONGEST_RELEASE
from balance_app.jobs.job import Job
from balance_app.jobs.repository import STOPPED, Claimed, Completion, LateTick, Skip, Skipped
from balance_app.jobs.runner import RunResult
from balance_app.jobs.schedule import RESOLUTION, Schedule, ScheduleError, TickRange, parse

# A tick released for any reason but the stop of its instance waits a second, and after each further
# release twice as long, up to five minutes. After MOST_RELEASES in a row it has failed. A run that
# lasted longer than the longest pause resets the count.
RELEASE_SECONDS: Final = 1.0
LONGEST_RELEASE_SECONDS: Final = LONGEST_RELEASE.total_seconds()
MOST_RELEASES: Final = 10
LONGEST_RETRY_SECONDS: Final = 3600.0


def complete(
    job: Job, claimed: Claimed, run_result: RunResult, now: datetime, *, seconds_ago: float
) -> Completion:
    """Return the completion of a run that ended `seconds_ago`; `now` is the server's time.

    A run that was released because its instance stops frees its tick for another at once. Released
    for any other reason, the tick waits longer each time, and has failed after `MOST_RELEASES`.
    Otherwise the job waits for its next tick in the future, or for an earlier retry of the same
    tick if it failed. Ticks that passed meanwhile are not made up for: they are recorded as ranges.
    """
    outcome, result = run_result
    if outcome == "released":
        lasted_seconds = (now - claimed.started_at).total_seconds() - seconds_ago
        releases = 0 if lasted_seconds > LONGEST_RELEASE_SECONDS else claimed.releases
        at_once = result == STOPPED
        if at_once or releases < MOST_RELEASES:
            return Completion(
                outcome=outcome,
                result=result,
                seconds_ago=seconds_ago,
                ready_at=None if at_once else now + release_pause(releases),
                keeps_checkpoint=True,
                releases=releases + (not at_once),
                retries=claimed.retries,
            )
        outcome, result = "failed", f"released {releases + 1} times in a row, the last: {result}"
    schedule = _schedule(job, claimed.schedule)
    # The estimate of the server's time may be behind by a response's time on the network.
    now = max(now, claimed.started_at)
    due_at = schedule.next_after(now, claimed.anchor_at)
    pause_reason = None
    if outcome in {"failed", "timed_out"}:
        failures = claimed.failure_streak + 1
        if job.pause_after_failures and failures % job.pause_after_failures == 0:
            pause_reason = f"its last {failures} runs failed"
        retry_at = _retry_at(job, claimed.retries, now)
        if retry_at is not None and retry_at < due_at:
            return Completion(
                outcome=outcome,
                result=result,
                seconds_ago=seconds_ago,
                ready_at=retry_at,
                retries=claimed.retries + 1,
                pause_reason=pause_reason,
            )
    spans = (
        (claimed.due_at, max(claimed.started_at, claimed.due_at), "no instance was free to run it"),
        (max(claimed.started_at, claimed.due_at), now, "the previous run was still executing"),
    )
    skipped = [
        Skipped(range_, reason)
        for after, until, reason in spans
        if until > after
        and (range_ := schedule.count_between(after, until, claimed.anchor_at)) is not None
    ]
    return Completion(
        outcome=outcome,
        result=result,
        seconds_ago=seconds_ago,
        due_at=due_at,
        ready_at=due_at + _jitter(job, schedule, due_at, claimed.anchor_at),
        skipped=skipped,
        pause_reason=pause_reason,
    )


def skip_late(job: Job, tick: LateTick) -> Skip:
    """Return what becomes of a job whose tick nobody started in time."""
    schedule = _schedule(job, tick.schedule)
    due_at = schedule.next_after(tick.now, tick.anchor_at)
    missed = schedule.count_between(tick.due_at - RESOLUTION, tick.now, tick.anchor_at)
    seconds = tick.start_within.total_seconds()
    return Skip(
        due_at,
        due_at + _jitter(job, schedule, due_at, tick.anchor_at),
        Skipped(
            # of another schedule than the row's: the tick itself, at least
            missed or TickRange(tick.due_at, tick.due_at, 1),
            f"no instance started it within {seconds:g} s",
        ),
    )


def _schedule(job: Job, text: str) -> Schedule:
    try:
        return parse(text)
    except ScheduleError:  # a newer version wrote it
        return job.schedule


def _jitter(job: Job, schedule: Schedule, due_at: datetime, anchor_at: datetime) -> timedelta:
    if not job.jitter_seconds:
        return timedelta(0)
    # An override may leave less time between two ticks than the code expects.
    seconds_to_next = (schedule.next_after(due_at, anchor_at) - due_at).total_seconds()
    return timedelta(seconds=random.uniform(0, min(job.jitter_seconds, seconds_to_next)))


def release_pause(releases: int) -> timedelta:
    """Return how long a tick waits that was released `releases` times before."""
    seconds = min(RELEASE_SECONDS * 2**releases, LONGEST_RELEASE_SECONDS)
    return timedelta(seconds=seconds * random.uniform(1, 1.25))


def _retry_at(job: Job, retries: int, now: datetime) -> datetime | None:
    """Return when a tick that failed after `retries` retries is retried; None: never."""
    if job.retry_after_seconds is None:
        return None
    if job.max_retries is not None and retries >= job.max_retries:
        return None
    grown = job.retry_after_seconds * job.retry_backoff ** min(retries, 30)
    seconds = max(job.retry_after_seconds, min(grown, LONGEST_RETRY_SECONDS))
    return now + timedelta(seconds=seconds * random.uniform(1, 1.1))
