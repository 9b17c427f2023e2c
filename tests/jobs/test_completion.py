"""The next state of a job whose run has ended, by result and time of the end."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, cast

from balance_app.jobs.completion import MOST_RELEASES, complete
from balance_app.jobs.job import Job, job
from balance_app.jobs.repository import STOPPED, Claimed
from balance_app.jobs.runner import RunResult
from tests.system.sizes import report_figures

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def declare(**arguments: object) -> Job:
    return job(**cast("Any", {"name": "moon", "every": HOUR, **arguments}))(print)


def claimed(started_at: datetime, due_at: datetime, anchor_at: datetime) -> Claimed:
    return Claimed(
        name="moon",
        fence=1,
        due_at=due_at,
        attempt=0,
        resumed=None,
        cancel_requested_by=None,
        schedule="every 1 s",
        anchor_at=anchor_at,
        started_at=started_at,
        round=0,
    )


def test_retries_wait_longer_each_time_and_end() -> None:
    """The first waits `retry_after`, each next twice as long; there are at most `max_retries`."""
    moon = declare(retry_after=SECOND, max_retries=3)
    waits = []
    for retries in range(4):
        run = claimed(NOW, NOW, NOW)._replace(schedule="every 3600 s", retries=retries)
        completion = complete(moon, run, RunResult("failed", "no"), NOW, seconds_ago=0)
        assert completion.ready_at is not None
        waits.append((completion.ready_at - NOW).total_seconds())
        assert (completion.due_at is None, completion.retries) == ((True, retries + 1), (False, 0))[
            retries == 3
        ]
    assert 1 <= waits[0] < 2 <= waits[1] < 4 <= waits[2] < 5
    assert waits[3] == 3600  # its next tick
    often = claimed(NOW, NOW, NOW)._replace(schedule="every 31622400 s", retries=10**6)
    moon = declare(retry_after=SECOND, retry_backoff=10.0)
    again_at = complete(moon, often, RunResult("timed_out", ""), NOW, seconds_ago=0).ready_at
    assert again_at is not None
    assert HOUR <= again_at - NOW <= 1.1 * HOUR


def test_repeated_releases_back_off_and_fail() -> None:
    """Only an instance's stop frees a job at once; other releases back off, and finally fail."""
    moon = declare(every=HOUR)
    run = claimed(NOW, NOW, NOW)._replace(schedule="every 3600 s")
    stops = RunResult("released", STOPPED)
    unavailable = RunResult("released", "The database does not answer.")
    stopped = complete(moon, run._replace(releases=4), stops, NOW, seconds_ago=0)
    assert (stopped.ready_at, stopped.outcome, stopped.releases) == (None, "released", 4)
    waited = timedelta(0)
    waits = []
    for releases in range(MOST_RELEASES):
        completion = complete(
            moon, run._replace(releases=releases), unavailable, NOW, seconds_ago=0
        )
        assert (completion.outcome, completion.releases) == ("released", releases + 1)
        assert completion.keeps_checkpoint
        assert completion.ready_at is not None
        waits.append(completion.ready_at - NOW)
        waited += waits[-1]
    assert SECOND <= waits[0] < 2 * SECOND
    assert all(later > sooner for sooner, later in pairwise(waits[:8]))
    report_figures(
        f"released {len(waits)} times in {waited}: {len([w for w in waits if w < 30 * SECOND])}"
    )
    last = complete(moon, run._replace(releases=MOST_RELEASES), unavailable, NOW, seconds_ago=0)
    assert last.outcome == "failed"
    assert last.result == "released 11 times in a row, the last: The database does not answer."
    later = NOW + timedelta(minutes=6)  # a long run resets the count
    fresh = complete(moon, run._replace(releases=9), unavailable, later, seconds_ago=0)
    assert (fresh.outcome, fresh.releases) == ("released", 1)


def test_a_clock_that_lags_repeats_no_tick() -> None:
    """A late answer carries an old time: the next tick is after the current one all the same."""
    due_at = NOW + 10 * SECOND
    moon = declare(every=SECOND)
    for lag in (0.0, 0.5, 1.0, 2.0):
        completion = complete(
            moon,
            claimed(due_at + timedelta(seconds=0.1), due_at, NOW),
            RunResult("succeeded", None),
            due_at + timedelta(seconds=0.2 - lag),
            seconds_ago=0,
        )
        assert (completion.due_at, completion.skipped) == (due_at + SECOND, [])


def test_a_schedule_of_a_newer_program_does_not_lose_the_run() -> None:
    """A program that can't read the row's schedule uses the declared one."""
    newer = claimed(NOW, NOW, NOW)._replace(schedule="every full moon")
    moon = declare(every=2 * SECOND)
    completion = complete(moon, newer, RunResult("succeeded", None), NOW, seconds_ago=0)
    assert completion.due_at == NOW + 2 * SECOND
