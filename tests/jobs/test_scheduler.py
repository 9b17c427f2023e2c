"""How runs end and how that is recorded, with real schedulers on a real database."""

import asyncio
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from random import Random
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import pytest

from balance_app.errors import DatabaseUnavailable
from balance_app.jobs import completion, heartbeat, leases, statements
from balance_app.jobs import scheduler as scheduling
from balance_app.jobs.api.controls import RUN
from balance_app.jobs.api.status import AHEAD
from balance_app.jobs.declarations import LOST_LIMIT, QUARANTINE
from balance_app.jobs.job import Job, job
from balance_app.jobs.repository import GONE, NOT_BEGUN, STOPPED, Completion
from balance_app.jobs.run import Run
from balance_app.jobs.runner import stop
from balance_app.jobs.scheduler import Scheduler, backoff
from balance_app.jobs.threads import ThreadRun
from balance_app.jobs.transaction import LeaseLostError
from tests.jobs.support import AT_ONCE, JobsDatabase, on, until
from tests.mutants import replaced
from tests.system.sizes import report_figures, size

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
HEARTBEAT_SECONDS = 0.5


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres, job_heartbeat_seconds=HEARTBEAT_SECONDS) as jobs_db:
        yield jobs_db


def declare(function: Callable[[Any], Any], name: str = "moon", **arguments: object) -> Job:
    return job(**cast("Any", {"name": name, "every": HOUR, **arguments}))(function)


# -- ways to end -----------------------------------------------------------------------------------


class OddError(BaseException):
    """Not an Exception."""


class Odd:
    """An object that can't be converted to text."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class TextlessError(Exception):
    """An error that can't be converted to text."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def returns(value: object) -> Callable[[Run], Any]:
    async def function(_run: Run) -> object:
        return value

    return function


def raises(error: BaseException) -> Callable[[Run], Any]:
    async def function(_run: Run) -> None:
        raise error

    return function


def raises_in_thread(error: BaseException) -> Callable[[ThreadRun], Any]:
    def function(_run: ThreadRun) -> None:
        raise error

    return function


async def sleeps(_run: Run) -> None:
    await asyncio.sleep(600)


async def swallows(_run: Run) -> str:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        return "as if nothing had happened"
    raise AssertionError


async def fails_when_stopped(_run: Run) -> None:
    try:
        await asyncio.sleep(600)
    finally:
        raise ValueError("while it was stopped")


async def fails_oddly_when_stopped(_run: Run) -> None:
    try:
        await asyncio.sleep(600)
    finally:
        raise TextlessError


async def cancels_itself(_run: Run) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(600)


async def times_a_part(_run: Run) -> str:
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(600)
    except TimeoutError:
        return "a part took too long"
    raise AssertionError


def waits_in_thread(run: ThreadRun) -> None:
    while True:
        run.progress(1)
        threading.Event().wait(0.02)


def paces_in_thread(run: ThreadRun) -> None:
    run.progress(1, 2)
    run.pace()


def queries_in_thread(run: ThreadRun) -> None:
    with run.transaction() as connection:
        connection.execute("SELECT pg_sleep(600)")


def ignores_in_thread(_run: ThreadRun) -> str:
    threading.Event().wait(0.5)
    return "done all the same"


class Case(NamedTuple):
    function: Callable[[Any], Any]
    outcome: str
    result: str | None
    arguments: Mapping[str, Any] = MappingProxyType({})


TIMED = {"timeout": timedelta(seconds=0.2), "min_duration": timedelta(seconds=0.1)}
OVER = "it took longer than its timeout of 0.2 s"

ENDINGS = {
    "sentence": Case(returns("checked 3 users"), "succeeded", "checked 3 users"),
    "nothing": Case(returns(None), "succeeded", None),
    "empty": Case(returns(""), "succeeded", ""),
    "number": Case(returns(7), "succeeded", "7"),
    "odd-text": Case(returns("a\0b\ud800c"), "succeeded", "ab?c"),
    "long-text": Case(returns("\u00e9" * 9000), "succeeded", "\u00e9" * 2000),
    "times-a-part": Case(times_a_part, "succeeded", "a part took too long"),
    "thread": Case(lambda run: f"{run.name} {run.fence}", "succeeded", "thread 1"),
    "error": Case(raises(ValueError("no luck")), "failed", "ValueError: no luck"),
    "odd-error": Case(raises(ValueError("a\0b\ud800c")), "failed", "ValueError: ab?c"),
    "bare-error": Case(raises(KeyError()), "failed", "KeyError: "),
    "stop-iteration": Case(
        raises(StopIteration(1)),
        "failed",
        "RuntimeError: coroutine raised StopIteration (from StopIteration: 1)",
    ),
    "no-exception": Case(raises(OddError("odd")), "failed", "OddError: odd"),
    "generator-exit": Case(raises(GeneratorExit()), "failed", "GeneratorExit: "),
    "cancelled-error": Case(raises(asyncio.CancelledError()), "failed", "it cancelled itself"),
    "cancels-itself": Case(cancels_itself, "failed", "it cancelled itself"),
    "thread-error": Case(raises_in_thread(ValueError("no luck")), "failed", "ValueError: no luck"),
    "thread-stop-iteration": Case(
        raises_in_thread(StopIteration(1)), "failed", "RuntimeError: StopIteration(1)"
    ),
    "thread-no-exception": Case(raises_in_thread(OddError("odd")), "failed", "OddError: odd"),
    "thread-cancelled": Case(
        raises_in_thread(asyncio.CancelledError()), "failed", "it cancelled itself"
    ),
    "timeout": Case(sleeps, "timed_out", OVER, TIMED),
    "timeout-swallowed": Case(swallows, "timed_out", OVER, TIMED),
    "timeout-error": Case(fails_when_stopped, "timed_out", OVER, TIMED),
    "timeout-thread": Case(waits_in_thread, "timed_out", OVER, TIMED),
    "timeout-ignored": Case(ignores_in_thread, "succeeded", "done all the same", TIMED),
    # A result without a text must not keep the job held.
    "no-text": Case(returns(Odd()), "succeeded", "a Odd without a text (ValueError)"),
    "too-long-a-number": Case(returns(10**5000), "succeeded", "a int without a text (ValueError)"),
    "error-without-text": Case(
        raises(TextlessError()),
        "failed",
        "TextlessError: a TextlessError without a text (ValueError)",
    ),
    "timeout-error-without-text": Case(fails_oddly_when_stopped, "timed_out", OVER, TIMED),
}


async def test_every_way_to_end_is_recorded(jobs_db: JobsDatabase) -> None:
    """Outcome and result show how each run ended; the job waits for its next tick."""
    jobs = [declare(each.function, name, **each.arguments) for name, each in ENDINGS.items()]
    async with jobs_db.scheduler(jobs):
        for name in ENDINGS:
            await jobs_db.ended(name)
    for name, each in ENDINGS.items():
        assert await jobs_db.outcomes(name) == [(each.outcome, each.result)], name
        row = await jobs_db.row(name)
        assert (row["last_outcome"], row["last_result"]) == (each.outcome, each.result)
        assert (row["holder"], row["attempt"], row["checkpoint"]) == (None, 0, None)
        assert row["due_at"] == row["ready_at"] == row["anchor_at"] + HOUR


EXITS: dict[str, Callable[[Any], Any]] = {
    "exit": raises(SystemExit(3)),
    "interrupt": raises(KeyboardInterrupt()),
    "thread-exit": raises_in_thread(SystemExit(3)),
    "thread-interrupt": raises_in_thread(KeyboardInterrupt()),
    "sys-exit": lambda _run: sys.exit("bye"),
}


async def test_a_job_cannot_end_its_instance(jobs_db: JobsDatabase) -> None:
    """An exception that would end a program fails the run; the instance goes on."""

    async def instance(jobs_db: JobsDatabase) -> None:
        jobs = [declare(function, name) for name, function in EXITS.items()]
        async with jobs_db.scheduler([*jobs, declare(returns("well"), "well")]):
            for name in [*EXITS, "well"]:
                await jobs_db.ended(name)

    def apart() -> str:
        """Run it in an event loop of its own."""

        async def live() -> None:
            async with on(jobs_db.variables) as other:
                await instance(other)
                for name in EXITS:
                    ((outcome, result),) = await other.outcomes(name)
                    assert outcome == "failed"
                    assert "tried to end its instance" in str(result)
                assert await other.outcomes("well") == [("succeeded", "well")]

        try:
            asyncio.run(live())
        except BaseException as error:  # noqa: BLE001 - whatever ended the loop
            return repr(error)
        return "went on"

    assert await asyncio.to_thread(apart) == "went on"


async def test_the_longest_wait_for_a_cancel_is_a_heartbeat(jobs_db: JobsDatabase) -> None:
    """A cancel request in the row ends that run alone, as `cancelled`, however it ends."""
    functions: dict[str, Callable[[Any], Any]] = {
        "sleeps": sleeps,
        "swallows": swallows,
        "fails": fails_when_stopped,
        "thread": waits_in_thread,
        "pace": paces_in_thread,
        "query": queries_in_thread,
    }
    least = timedelta(minutes=9)
    jobs = [declare(function, name, min_duration=least) for name, function in functions.items()]
    async with jobs_db.scheduler([*jobs, declare(sleeps, "other")]):
        await _run_all(jobs_db, 7)
        started = monotonic()
        await jobs_db.admin.execute(
            "UPDATE jobs SET cancel_requested_by = 'ada' WHERE name <> 'other'"
        )
        for name in functions:
            await jobs_db.ended(name)
        took = monotonic() - started
        assert (await jobs_db.row("other"))["holder"] is not None
    report_figures(f"cancelled after {took:.2f} s")
    assert took < HEARTBEAT_SECONDS + 5
    for name in functions:
        assert await jobs_db.outcomes(name) == [("cancelled", "cancelled by ada")], name
        row = await jobs_db.row(name)
        assert (row["due_at"], row["cancel_requested_by"]) == (row["anchor_at"] + HOUR, None)
    assert await jobs_db.outcomes("other") == [("released", "its instance was stopped")]


async def test_a_cancel_request_outlives_its_instance(jobs_db: JobsDatabase) -> None:
    """An instance that takes over a run with a cancel request does not begin it."""
    lost = jobs_db.instance("lost")
    await lost.declare("moon")
    await lost.claim()
    await jobs_db.admin.execute("UPDATE jobs SET cancel_requested_by = 'ada'")
    await jobs_db.expire("moon")
    begun = []
    async with jobs_db.scheduler([declare(lambda _run: begun.append(1))]):
        await jobs_db.ended("moon", runs=2)
    assert begun == []
    assert [outcome for outcome, _ in await jobs_db.outcomes("moon")] == ["lost", "cancelled"]


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_cancel_request_outlives_a_release(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """A run that is cancelled while its instance stops does not run again on another."""
    if not guarded:
        guard = "AND ($4 <> 'released' OR cancel_requested_by IS NULL)"
        monkeypatch.setattr(statements, "FINISH", replaced(statements.FINISH, guard, ""))
    go = asyncio.Event()

    async def lingers(run: Run) -> None:
        await run.checkpoint({"done": 5})
        try:
            await asyncio.sleep(600)
        finally:
            await go.wait()

    async with jobs_db.scheduler([declare(lingers)]) as scheduler:
        await _run_all(jobs_db, 1)
        scheduler._draining = True  # it takes no other run
        (run,) = scheduler._runs
        stop(run, "released", STOPPED)
        await jobs_db.admin.execute("UPDATE jobs SET cancel_requested_by = 'ada'")
        go.set()
        await jobs_db.ended("moon")
    (end,) = await jobs_db.outcomes("moon")
    row = await jobs_db.row("moon")
    assert row["cancel_requested_by"] is None
    assert (row["due_at"] == row["anchor_at"] + HOUR) is guarded
    assert (row["checkpoint"] is None) is guarded
    assert end == (("cancelled", "cancelled by ada") if guarded else ("released", STOPPED))


async def _run_all(jobs_db: JobsDatabase, jobs: int) -> None:
    """Wait until this many jobs run."""

    async def check() -> bool:
        held = await jobs_db.admin.fetchval("SELECT count(*) FROM jobs WHERE holder IS NOT NULL")
        return bool(held == jobs)

    await until(check)
    await asyncio.sleep(0.1)


async def test_an_instance_that_stops_releases_its_runs(jobs_db: JobsDatabase) -> None:
    """Unfinished runs are claimable elsewhere at once, with their checkpoints; nothing is left."""

    async def goes_on(run: Run) -> str:
        if run.resumed is None:
            await run.checkpoint({"done": 5})
            await asyncio.sleep(600)
        return f"went on from {run.resumed['done']} in attempt {run.attempt}"

    functions: dict[str, Callable[[Any], Any]] = {
        "goes-on": goes_on,
        "sleeps": sleeps,
        "swallows": swallows,
        "fails": fails_when_stopped,
        "thread": waits_in_thread,
    }
    jobs = [declare(function, name) for name, function in functions.items()]
    async with jobs_db.scheduler(jobs):
        await _run_all(jobs_db, 5)
        stopping = monotonic()
    took = monotonic() - stopping
    report_figures(f"stopped after {took:.2f} s")
    assert took < 5
    for name in functions:
        assert await jobs_db.outcomes(name) == [("released", "its instance was stopped")], name
        row = await jobs_db.row(name)
        assert (row["holder"], row["attempt"], row["due_at"]) == (None, 1, row["anchor_at"])
        assert (
            row["ready_at"] == row["last_heartbeat_at"]
            or row["ready_at"] <= row["last_heartbeat_at"] + SECOND
        )
    async with jobs_db.scheduler(jobs[:1]):
        await jobs_db.ended("goes-on", runs=2)
    assert (await jobs_db.outcomes("goes-on"))[-1] == (
        "succeeded",
        "went on from 5 in attempt 1",
    )
    assert await jobs_db.admin.fetchval("SELECT count(*) FROM instances") == 0


async def test_a_claim_under_way_when_the_instance_stops_is_released(jobs_db: JobsDatabase) -> None:
    """A job that is claimed while the instance stops is released at once, and never begins."""
    begun = []
    jobs = [declare(lambda _run: begun.append(1))]
    blocker = await jobs_db.connect()
    async with jobs_db.scheduler(jobs, starts=False) as scheduler:
        await jobs_db.instance().declare("moon")
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE job_runs IN EXCLUSIVE MODE")  # a claim writes here
        scheduler.start()
        await _waits(jobs_db)
        stopping = asyncio.create_task(scheduler.stop())
        await asyncio.sleep(0.1)
        assert not stopping.done()
        await transaction.rollback()
        await stopping
    assert begun == []
    assert await jobs_db.outcomes("moon") == [("released", "its instance was stopped")]
    row = await jobs_db.row("moon")
    assert (row["holder"], row["fence"], row["attempt"]) == (None, 1, 1)


async def _waits(jobs_db: JobsDatabase) -> None:
    """Wait until a session waits for a lock."""

    async def check() -> bool:
        return bool(
            await jobs_db.admin.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )

    await until(check)


# -- the minimum duration -------------------------------------------------------------------------


async def test_a_run_lasts_for_its_least_duration(jobs_db: JobsDatabase) -> None:
    """A run that is done sooner lasts until the job's or settings' minimum, unless it fails."""
    jobs = [
        declare(returns("done"), "own", min_duration=timedelta(seconds=0.6)),
        declare(returns("done"), "by-settings"),
        declare(raises(ValueError("no")), "fails"),
        declare(ignores_in_thread, "thread", min_duration=timedelta(seconds=0.6)),
    ]
    async with jobs_db.scheduler(jobs, job_min_seconds=0.3):
        runs = {each.name: (await jobs_db.ended(each.name))[0] for each in jobs}
    lasted = {
        name: (run["ended_at"] - run["started_at"]).total_seconds() for name, run in runs.items()
    }
    report_figures(f"lasted {lasted}")
    assert lasted["own"] >= 0.55
    assert lasted["by-settings"] >= 0.28
    assert lasted["thread"] >= 0.55
    assert lasted["fails"] < lasted["own"]


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_work_that_is_done_is_not_undone(jobs_db: JobsDatabase, how: str) -> None:
    """A run that is stopped while it only waits for its minimum duration has succeeded."""
    async with jobs_db.scheduler([declare(returns("done"), min_duration=HOUR)]):
        await _run_all(jobs_db, 1)
        if how == "cancel":
            await jobs_db.admin.execute("UPDATE jobs SET cancel_requested_by = 'ada'")
            await jobs_db.ended("moon")
    assert await jobs_db.outcomes("moon") == [("succeeded", "done")]
    row = await jobs_db.row("moon")
    assert row["due_at"] == row["anchor_at"] + HOUR


# -- the next tick ---------------------------------------------------------------------------------


async def test_a_failure_is_tried_again(jobs_db: JobsDatabase) -> None:
    """The same tick runs again after `retry_after`, with a higher attempt, until it succeeds."""
    seen = []

    async def fails_twice(run: Run) -> str:
        seen.append((run.due_at, run.attempt, run.fence))
        if run.attempt < 2:
            raise ValueError("not yet")
        return "at last"

    async with jobs_db.scheduler([declare(fails_twice, retry_after=timedelta(seconds=0.2))]):
        await jobs_db.ended("moon", runs=3)
    row = await jobs_db.row("moon")
    assert seen == [(row["anchor_at"], attempt, attempt + 1) for attempt in range(3)]
    first, second, third = await jobs_db.runs("moon")
    assert [run["outcome"] for run in (first, second, third)] == ["failed", "failed", "succeeded"]
    assert second["started_at"] - first["ended_at"] >= timedelta(seconds=0.1)
    assert (row["attempt"], row["due_at"]) == (0, row["anchor_at"] + HOUR)


async def test_failures_in_a_row_are_counted_and_may_pause_a_job(jobs_db: JobsDatabase) -> None:
    """Over all ticks, until a success; `pause_after` of them pause the job, with the reason."""
    ends = iter([ValueError("1"), ValueError("2"), None, ValueError("3"), ValueError("4")])
    streaks = []

    async def fails_mostly(_run: Run) -> None:
        streaks.append((await jobs_db.row("moon"))["failure_streak"])
        error = next(ends)
        if error is not None:
            raise error

    moon = declare(fails_mostly, every=SECOND, pause_after_failures=3)
    async with jobs_db.scheduler([moon], starts=False) as scheduler:
        for end in range(5):
            if end:
                await jobs_db.ready("moon")
            await until(lambda: _claims(scheduler))
            await asyncio.wait(set(scheduler._runs.values()))
    assert streaks == [0, 1, 2, 0, 1]
    row = await jobs_db.row("moon")
    assert (row["failure_streak"], row["paused_at"]) == (2, None)
    once_more = declare(raises(ValueError("5")), every=SECOND, pause_after_failures=3)
    async with jobs_db.scheduler([once_more], starts=False) as scheduler:
        await jobs_db.ready("moon")
        await until(lambda: _claims(scheduler))
        await asyncio.wait(set(scheduler._runs.values()))
    row = await jobs_db.row("moon")
    assert (row["failure_streak"], row["paused_by"]) == (3, "balance_app")
    assert row["pause_reason"] == "its last 3 runs failed"


async def test_a_job_that_is_always_released_runs_a_few_times_a_minute(
    jobs_db: JobsDatabase,
) -> None:
    """It raises DatabaseUnavailable itself; without a backoff it ran 600 times in ten seconds."""
    runs = []

    async def unavailable(_run: Run) -> None:
        runs.append(monotonic())
        raise DatabaseUnavailable("no", applied="no")

    seconds = size(3, 60)
    async with jobs_db.scheduler([declare(unavailable)]):
        await asyncio.sleep(seconds)
    print(f"{len(runs)} runs in the first {seconds} s")
    least, most = size(2, 5), size(3, 6)  # the pauses double, from a second on
    assert least <= len(runs) <= most


async def test_what_comes_first_after_a_failure(jobs_db: JobsDatabase) -> None:
    """The next tick if it is sooner than a retry; timeouts are retried, cancelled runs are not."""
    retry = {"retry_after": timedelta(minutes=30)}
    jobs = [
        declare(raises(ValueError("no")), "retry", **retry),
        declare(raises(ValueError("no")), "tick", every=timedelta(minutes=29), **retry),
        declare(sleeps, "timeout", **TIMED, **retry),
        declare(sleeps, "cancel", **retry),
        declare(raises(ValueError("no")), "never"),
    ]
    async with jobs_db.scheduler(jobs):
        await until(lambda: _held(jobs_db, "cancel"))
        await jobs_db.admin.execute(
            "UPDATE jobs SET cancel_requested_by = 'ada' WHERE name = 'cancel'"
        )
        for each in jobs:
            await jobs_db.ended(each.name)
    for name, attempt in {"retry": 1, "timeout": 1, "tick": 0, "cancel": 0, "never": 0}.items():
        row = await jobs_db.row(name)
        (run,) = await jobs_db.runs(name)
        assert row["attempt"] == attempt, name
        if attempt:
            assert row["due_at"] == run["due_at"] == row["anchor_at"]
            after = row["ready_at"] - run["ended_at"]
            assert timedelta(minutes=30) <= after < timedelta(minutes=34)
        else:
            every = timedelta(minutes=29) if name == "tick" else HOUR
            assert row["due_at"] == row["ready_at"] == row["anchor_at"] + every


async def _held(jobs_db: JobsDatabase, name: str) -> bool:
    row = await jobs_db.admin.fetchrow("SELECT holder FROM jobs WHERE name = $1", name)
    return row is not None and row["holder"] is not None


async def test_jitter_delays_the_start_not_the_tick(jobs_db: JobsDatabase) -> None:
    """The tick is unchanged; the start is later by less than the jitter."""
    names = [f"job-{number}" for number in range(10)]
    jitter = timedelta(minutes=30)
    async with jobs_db.scheduler([declare(returns(None), name, jitter=jitter) for name in names]):
        for name in names:
            await jobs_db.ended(name)
    rows = [await jobs_db.row(name) for name in names]
    assert all(row["due_at"] == row["anchor_at"] + HOUR for row in rows)
    delays = {row["ready_at"] - row["due_at"] for row in rows}
    assert len(delays) > 1
    assert all(timedelta(0) <= delay <= jitter for delay in delays)


async def test_a_schedule_that_changes_under_a_run_takes_effect_at_its_end(
    jobs_db: JobsDatabase,
) -> None:
    """During a rolling deploy, the last run of the old schedule is followed by a new tick."""
    go = asyncio.Event()

    async def waits(_run: Run) -> None:
        await go.wait()

    async with jobs_db.scheduler([declare(waits, every=timedelta(days=366))]) as scheduler:
        await _run_all(jobs_db, 1)
        await jobs_db.instance("new").declare("moon", schedule="every 60 s")
        scheduler._draining = True  # it takes no other run
        go.set()
        await jobs_db.ended("moon")
    row = await jobs_db.row("moon")
    assert row["due_at"] == row["anchor_at"] + timedelta(seconds=60)


# -- every tick is accounted for -------------------------------------------------------------------


# So rare that no heartbeat corrects the server time that the test sets.
SELDOM: dict[str, Any] = {"job_lease_seconds": 900, "job_heartbeat_seconds": 300}


class SteppedJob:
    """A job whose every step the test decides, on an instance whose claims the test makes."""

    def __init__(self, jobs_db: JobsDatabase, random: Random) -> None:
        self.jobs_db = jobs_db
        self.random = random
        self.orders: asyncio.Queue[BaseException | None] = asyncio.Queue()
        self.steps: list[str] = []

    def job(self) -> Job:
        async def obeys(_run: Run) -> None:
            order = await self.orders.get()
            if order is not None:
                raise order

        return declare(
            obeys,
            every=SECOND,
            retry_after=timedelta(seconds=0.4),
            jitter=timedelta(seconds=0.3),
        )

    async def live(self, scheduler: Scheduler, steps: int) -> None:
        await scheduler.run_once()
        await until(lambda: self.jobs_db.admin.fetchval("SELECT count(*) FROM instances"))
        await self.end(scheduler)
        for _ in range(steps):
            await self.wait_or_ask()
            await scheduler.run_once()
            if scheduler._runs:
                await self.end(scheduler)
        while not scheduler._runs:  # one more tick, so that the row has the next one
            await self.jobs_db.shift(1)
            await scheduler.run_once()
        self.orders.put_nowait(None)
        await self.ended(scheduler)

    async def wait_or_ask(self) -> None:
        what = self.random.choices(["wait", "outage", "ask", "now"], [6, 1, 2, 1])[0]
        self.steps.append(what)
        if what == "wait":
            await self.jobs_db.shift(self.random.uniform(0, 1.5))
        elif what == "outage":
            await self.jobs_db.shift(self.random.uniform(2, 500))
        elif what == "ask":
            await self.jobs_db.admin.execute(RUN, "moon", "ada", timedelta(seconds=60), None, AHEAD)

    async def end(self, scheduler: Scheduler) -> None:
        what = self.random.choices(["succeed", "fail", "lose", "outage", "lost"], [5, 4, 1, 1, 1])[
            0
        ]
        self.steps.append(what)
        seconds = self.random.choice([0, 0, 0.7, self.random.uniform(0, 9)])
        if what == "lost":
            seconds = 0
            if (await self.jobs_db.row("moon"))["lost_streak"] == 0:
                other = self.jobs_db.instance("other")
                await other.declare("moon", schedule="every 1 s")
                await self.jobs_db.expire("moon")
                await other.claim()
                await self.jobs_db.expire("moon")
        # The times in the run's memory can't be shifted: it ends later, then the rows are shifted.
        heartbeat = scheduler._heartbeat
        heartbeat.set_clock(heartbeat.server_time() + timedelta(seconds=seconds), monotonic())
        self.orders.put_nowait(
            {
                "fail": ValueError("no"),
                "lose": LeaseLostError("lost"),
                "outage": DatabaseUnavailable("unavailable", applied="no"),
            }.get(what)
        )
        await self.ended(scheduler)
        await self.jobs_db.shift(seconds)

    async def ended(self, scheduler: Scheduler) -> None:
        await asyncio.wait(set(scheduler._runs.values()))


async def account(jobs_db: JobsDatabase) -> tuple[int, list[str]]:
    """Return the number of ticks, and the faults of their record."""
    row = await jobs_db.row("moon")
    interval = SECOND
    faults = []
    ran: set[int] = set()
    skipped: list[int] = []
    for run in await jobs_db.runs("moon"):
        number, rest = divmod(run["due_at"] - row["anchor_at"], interval)
        if run["outcome"] != "skipped":
            if not rest:
                ran.add(number)
            continue
        last, rest_of_last = divmod(run["last_due_at"] - row["anchor_at"], interval)
        if rest or rest_of_last or last - number + 1 != run["ticks"]:
            faults.append(f"a range is no range: {dict(run)}")
        skipped += range(number, last + 1)
    due, rest = divmod(row["due_at"] - row["anchor_at"], interval)
    if rest:
        faults.append(f"the next tick is none: {row['due_at']}")
    if len(set(skipped)) != len(skipped):
        faults.append("a tick was skipped twice")
    if ran & set(skipped):
        faults.append(f"ticks ran and were skipped: {sorted(ran & set(skipped))}")
    missing = set(range(due)) - ran - set(skipped)
    if missing:
        faults.append(f"ticks are missing: {sorted(missing)}")
    if ran | set(skipped) != set(range(due)) | ran:
        faults.append("ticks were skipped that have not come")
    return due, faults


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released runs are retried soon, and fail after three releases."""
    monkeypatch.setattr(scheduling, "OWNERS_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(completion, "RELEASE_SECONDS", 0.2)
    monkeypatch.setattr(completion, "LONGEST_RELEASE_SECONDS", 0.4)
    monkeypatch.setattr(completion, "MOST_RELEASES", 3)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("seed", range(size(small=3, full=30)))
async def test_every_tick_is_accounted_for(jobs_db: JobsDatabase, seed: int) -> None:
    """Each tick has a run or is in one skipped range; none is missing or counted twice."""
    life = SteppedJob(jobs_db, Random(seed))
    moon = life.job()
    async with jobs_db.scheduler([moon], starts=False, **SELDOM) as scheduler:
        await life.live(scheduler, steps=size(small=60, full=300))
    ticks, faults = await account(jobs_db)
    outcomes = await jobs_db.admin.fetch(
        "SELECT outcome, count(*), sum(ticks) AS ticks FROM job_runs GROUP BY 1 ORDER BY 1"
    )
    report_figures(f"seed {seed}: {ticks} ticks: {[tuple(map(str, row)) for row in outcomes]}")
    assert faults == [], " ".join(life.steps)
    assert ticks > 60
    assert {row["outcome"] for row in outcomes} >= {"succeeded", "failed", "skipped"}


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("kept", [0, 1, None], ids=["one reason", "the other", "none"])
async def test_an_account_that_leaves_out_skipped_ticks_is_wrong(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, kept: int | None
) -> None:
    """The control: a program that records fewer ranges is found faulty."""
    guarded = completion.complete
    reasons = ["no instance was free to run it", "the previous run was still executing"]

    def forgetful(*arguments: Any, seconds_ago: float) -> Completion:  # noqa: ANN401 - as they are
        whole = guarded(*arguments, seconds_ago=seconds_ago)
        kept_reason = None if kept is None else reasons[kept]
        return replace(whole, skipped=[s for s in whole.skipped if s.reason == kept_reason])

    monkeypatch.setattr(scheduling, "complete", forgetful)
    life = SteppedJob(jobs_db, Random(7))
    async with jobs_db.scheduler([life.job()], starts=False, **SELDOM) as scheduler:
        await life.live(scheduler, steps=40)
    _, faults = await account(jobs_db)
    assert any("missing" in fault for fault in faults)


# -- claims ----------------------------------------------------------------------------------------


async def test_a_claim_says_how_long_to_wait(jobs_db: JobsDatabase) -> None:
    """Not at all after a claim; else until the next job is claimable, but never for long."""
    go = asyncio.Event()

    async def waits(_run: Run) -> None:
        await go.wait()

    jobs = [declare(waits), declare(waits, "sun", every=2 * HOUR)]
    async with jobs_db.scheduler(jobs, starts=False) as scheduler:
        for number in (1, 2):
            while (seconds := await scheduler.run_once()) > 0:
                assert seconds <= scheduling.TIE_BREAK.total_seconds()
            assert len(scheduler._runs) == number
        assert 0 < await scheduler.run_once() <= scheduling.BUSY_POLL_SECONDS
        go.set()
        await asyncio.wait(set(scheduler._runs.values()))
        assert await scheduler.run_once() == scheduling.IDLE_POLL_SECONDS
        await jobs_db.admin.execute("UPDATE jobs SET ready_at = clock_timestamp() + interval '2 s'")
        assert 0 < await scheduler.run_once() <= 2.1
        await jobs_db.ready("moon", seconds_ago=1)
        locker = await jobs_db.connect()
        async with locker.transaction():
            await locker.execute("SELECT FROM jobs WHERE name = 'moon' FOR UPDATE")
            assert await scheduler.run_once() == scheduling.RACE_SECONDS
        await until(lambda: _claims(scheduler))
        await asyncio.wait(set(scheduler._runs.values()))


async def _claims(scheduler: Scheduler) -> bool:
    return await scheduler.run_once() == 0


async def test_a_quarantined_job_is_passed_over(jobs_db: JobsDatabase) -> None:
    """A quarantined job waits, and the next job is claimed without delay."""
    lost = jobs_db.instance("lost")
    await lost.declare("moon")
    await lost.claim()
    await jobs_db.admin.execute("UPDATE jobs SET lost_streak = $1", LOST_LIMIT - 1)
    await jobs_db.expire("moon")
    begun = []
    async with jobs_db.scheduler(
        [declare(lambda _run: begun.append(1))], starts=False
    ) as scheduler:
        assert await scheduler.run_once() == 0
        assert await scheduler.run_once() > 0
    assert begun == []
    row = await jobs_db.row("moon")
    assert row["ready_at"] - row["last_ended_at"] >= QUARANTINE
    assert row["lost_streak"] == LOST_LIMIT


def test_the_backoff_grows_ever_more_slowly_with_each_run() -> None:
    """An instance with more runs backs off for longer, up to ten steps."""
    waits = [backoff(runs, 0.5) for runs in range(200)]
    assert waits[0] == timedelta(0)
    steps = [later - sooner for sooner, later in pairwise(waits)]
    assert all(step > timedelta(0) for step in steps)
    assert all(sooner >= later for sooner, later in pairwise(steps))
    assert waits[-1] < timedelta(seconds=5)


async def _shares(jobs_db: JobsDatabase, *, instances: int, jobs: int, step: float) -> list[int]:
    """Start instances together; return how many jobs each runs."""
    names = [f"job-{number}" for number in range(jobs)]
    async with AsyncExitStack() as stack:
        schedulers = [
            await stack.enter_async_context(
                jobs_db.scheduler(
                    [declare(sleeps, name) for name in names],
                    server_id=f"app{number}",
                    job_warm_up_seconds=0.7,
                    job_step_seconds=step,
                )
            )
            for number in range(instances)
        ]
        await _run_all(jobs_db, jobs)
        return sorted(len(scheduler._runs) for scheduler in schedulers)


async def test_instances_that_start_together_share_evenly(jobs_db: JobsDatabase) -> None:
    """Loads differ by at most one; in the control, without the backoff, by more."""
    shares = await _shares(jobs_db, instances=4, jobs=10, step=0.3)
    await jobs_db.forget()
    control = await _shares(jobs_db, instances=4, jobs=30, step=0)
    report_figures(f"10 jobs on 4 instances: {shares}; 30 without steps: {control}")
    assert shares == [2, 2, 3, 3]


# -- outages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["async", "thread"])
async def test_an_end_is_recorded_when_the_database_is_back(
    jobs_db: JobsDatabase, function: str
) -> None:
    """A run that ends during an outage has succeeded, and is recorded once."""
    go, ended = threading.Event(), threading.Event()

    async def waits(_run: Run) -> str:
        await asyncio.to_thread(go.wait)
        ended.set()
        return "meanwhile"

    def waits_too(_run: ThreadRun) -> str:
        go.wait()
        ended.set()
        return "meanwhile"

    moon = declare(waits if function == "async" else waits_too)
    async with jobs_db.scheduler([moon], job_lease_seconds=10) as scheduler:
        await _run_all(jobs_db, 1)
        await jobs_db.begin_outage()
        try:
            go.set()
            await asyncio.to_thread(ended.wait, 10)
            await asyncio.sleep(0.7)
            assert scheduler._runs
        finally:
            await jobs_db.end_outage()
        (run,) = await jobs_db.ended("moon")
    assert await jobs_db.outcomes("moon") == [("succeeded", "meanwhile")]
    moment = await jobs_db.admin.fetchval("SELECT clock_timestamp()")
    assert moment - run["ended_at"] > timedelta(seconds=0.6)  # it ended before it was recorded


async def test_claiming_goes_on_when_the_database_is_back(jobs_db: JobsDatabase) -> None:
    """An instance that lost its database, or started without it, claims jobs when it is back."""
    count = []
    async with jobs_db.scheduler([declare(lambda _run: count.append(1), every=SECOND)]):
        await jobs_db.ended("moon")
        await jobs_db.begin_outage()
        await asyncio.sleep(0.5)
        await jobs_db.end_outage()
        before = len(count)
        await jobs_db.ended("moon", runs=before + 1)
    await jobs_db.forget()
    await jobs_db.begin_outage()
    async with jobs_db.scheduler([declare(returns(None), "sun")]):
        await asyncio.sleep(0.5)
        await jobs_db.end_outage()
        await jobs_db.ended("sun")


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_an_outage_lasts_until_a_heartbeat_is_answered(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """Owners come first after it, and what was never begun is released, however long it was.

    The control notes an outage by the claims alone, which are not tried without heartbeats.
    """
    prepare, renew = Scheduler._prepare, leases.renew_leases
    silent = threading.Event()

    async def by_claims_alone(scheduler: Scheduler) -> float:
        outage_at = scheduler._outage_at
        wait_seconds = await prepare(scheduler)
        scheduler._outage_at = outage_at
        return wait_seconds

    async def unanswered(*heartbeat_: Any) -> Any:  # noqa: ANN401 - passed on
        if silent.is_set():
            raise TimeoutError
        return await renew(*heartbeat_)

    monkeypatch.setattr(heartbeat, "renew_leases", unanswered)
    monkeypatch.setattr(scheduling, "OWNERS_FIRST_SECONDS", 20.0)
    if not guarded:
        monkeypatch.setattr(Scheduler, "_prepare", by_claims_alone)
    owner = jobs_db.instance("owner")
    await owner.declare("theirs", "mine")
    await jobs_db.admin.execute(
        "UPDATE jobs SET ready_at = ready_at + interval '30 min' WHERE name = 'mine'"
    )
    claimed = await owner.claim()
    assert claimed.name == "theirs"
    async with jobs_db.scheduler(
        [declare(returns(None), name) for name in ("theirs", "mine")]
    ) as scheduler:
        silent.set()

        async def has_fault() -> bool:
            return scheduler.fault is not None

        await until(has_fault)
        scheduler._outage_at = -math.inf  # as if it had begun long ago
        capabilities = scheduler._capabilities
        assert capabilities is not None
        await jobs_db.ready("mine")
        lost_response = await scheduler._jobs.claim_next(capabilities, AT_ONCE)
        assert lost_response.claimed is not None
        assert lost_response.claimed.name == "mine"
        await jobs_db.expire("theirs")
        await jobs_db.expire("mine")
        await asyncio.sleep(0.5)
        silent.clear()
        scheduler.wake()
        await jobs_db.ended("mine")
        (first, *_) = await jobs_db.outcomes("mine")
        done = Completion(outcome="succeeded", result="in time", seconds_ago=0)
        assert await owner.jobs.finish("theirs", claimed.fence, done) is guarded
    assert first == (("released", NOT_BEGUN) if guarded else ("lost", GONE))


async def test_a_run_that_loses_its_lease_is_stopped(jobs_db: JobsDatabase) -> None:
    """An instance whose renewal is refused stops its run, and does not affect the new one."""
    begun: list[int] = []

    async def waits(run: Run) -> None:
        begun.append(run.fence)
        try:
            await asyncio.sleep(600)
        finally:
            begun.append(-run.fence)

    async with jobs_db.scheduler([declare(waits)]):
        await _run_all(jobs_db, 1)
        other = jobs_db.instance("other")
        await other.declare("moon")
        await jobs_db.admin.execute(
            "UPDATE jobs SET holder = $1, server = 'other', fence = fence + 1,"
            " lease_expires_at = clock_timestamp() + interval '1 min'",
            other.me.id,
        )

        async def stopped() -> bool:
            return begun == [1, -1]

        await until(stopped)
    row = await jobs_db.row("moon")
    assert (row["holder"], row["fence"], row["last_outcome"]) == (other.me.id, 2, None)


async def test_that_the_work_of_a_run_is_done_is_noted(jobs_db: JobsDatabase) -> None:
    """While it lasts on to its minimum duration; cancelled then, it has succeeded all the same."""

    async def quick(_run: Run) -> str:
        return "all is done"

    async with jobs_db.scheduler([declare(quick, min_duration=timedelta(minutes=1))]) as scheduler:

        async def noted() -> bool | None:
            row = await jobs_db.admin.fetchrow(
                "SELECT * FROM jobs WHERE work_ended_at >= started_at"
            )
            return row is not None or None

        await until(noted)
        await jobs_db.admin.execute("UPDATE jobs SET cancel_requested_by = 'ada'")
        scheduler.wake()
        (run,) = await jobs_db.ended("moon")
    assert (run["outcome"], run["result"]) == ("succeeded", "all is done")


async def test_nothing_is_claimed_without_heartbeats(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the heartbeat thread can't be started no run begins; if it has ended it is restarted."""
    started = threading.Thread.start
    begun: list[int] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "heartbeat":
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr("threading.Thread.start", refuse)

    async def runs(_run: Run) -> None:
        begun.append(1)

    async with jobs_db.scheduler([declare(runs)]) as scheduler:

        async def refused() -> bool:
            return scheduler.fault is not None

        await until(refused)
        await asyncio.sleep(0.5)
        assert begun == []
        assert scheduler.fault == ("The heartbeat thread can't be started: can't start new thread.")
        monkeypatch.undo()
        await jobs_db.ended("moon")
        assert scheduler.fault is None
        # It ends by an unforeseen error.
        thread = scheduler._heartbeat._thread
        assert thread is not None
        monkeypatch.setattr("balance_app.jobs.heartbeat.RETRY_SECONDS", "not a number")
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        monkeypatch.undo()
        await jobs_db.ready("moon")
        await jobs_db.ended("moon", runs=2)
    assert begun == [1, 1]
