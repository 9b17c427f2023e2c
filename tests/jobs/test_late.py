"""What becomes of a tick that no instance has started in time."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from balance_app.jobs import statements
from balance_app.jobs.completion import skip_late
from balance_app.jobs.job import DeclarationError, Job, job
from balance_app.jobs.run import Run
from tests.jobs.support import JobsDatabase, on, until
from tests.mutants import replaced

HOUR = timedelta(hours=1)
WITHIN = timedelta(seconds=60)
REASON = "no instance started it within 60 s"


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


LOST = """
UPDATE jobs SET holder = gen_random_uuid(), server = 'app9', fence = 1, started_at = due_at,
    lease_expires_at = due_at
"""


async def run_it(_run: Run) -> str:
    return "it ran"


MOON: Job = job(name="moon", every=HOUR, late="skip", start_within=WITHIN)(run_it)
SUN: Job = job(name="moon", every=HOUR)(run_it)


async def found_after(jobs_db: JobsDatabase, moon: Job, seconds: float, sql: str = "") -> list[str]:
    """Declare a job, let nobody come for so long, and return what the history then has."""
    async with jobs_db.scheduler([moon], starts=False) as scheduler:
        await scheduler.declare()
    await jobs_db.shift(seconds)
    if sql:
        await jobs_db.admin.execute(sql)
    async with jobs_db.scheduler([moon]):
        runs = await until(lambda: jobs_db.runs("moon"))
        if runs[0]["outcome"] != "skipped":
            await jobs_db.ended("moon")
        runs = await jobs_db.runs("moon")
    return [f"{run['outcome']} {run['ticks']}: {run['result']}" for run in runs]


async def test_a_late_tick_is_skipped_where_its_job_says_so(jobs_db: JobsDatabase) -> None:
    """With all that were missed since, and the reason; its next tick is the schedule's."""
    assert await found_after(jobs_db, MOON, 7500) == [f"skipped 3: {REASON}"]
    row = await jobs_db.row("moon")
    now = await jobs_db.admin.fetchval("SELECT clock_timestamp()")
    assert timedelta(0) < row["due_at"] - now <= HOUR
    assert row["due_at"] == row["ready_at"]
    assert row["fence"] == 0


async def test_without_the_guard_a_late_tick_runs(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that does not look at it takes it."""
    guard = "AND (late_at < (SELECT clock_timestamp())) IS NOT TRUE"
    monkeypatch.setattr(statements, "CLAIM", replaced(statements.CLAIM, guard, ""))
    assert "succeeded 1: it ran" in await found_after(jobs_db, MOON, 7500)


async def test_skipped_ticks_are_counted(jobs_db: JobsDatabase) -> None:
    """In the metric of all ticks that did not run."""
    async with jobs_db.scheduler([MOON], starts=False) as scheduler:
        await scheduler.declare()
        await jobs_db.shift(7500)
        await scheduler.run_once()
        counted = scheduler._metrics.ticks_skipped.labels("moon")._value.get()
    assert counted == 3


async def test_a_late_tick_runs_once_by_default(jobs_db: JobsDatabase) -> None:
    """The ticks that were missed meanwhile are not made up for."""
    assert await found_after(jobs_db, SUN, 7500) == [
        "succeeded 1: it ran",
        "skipped 2: no instance was free to run it",
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE jobs SET attempt = 1",
        "UPDATE jobs SET requested_by = 'ada'",
        "UPDATE jobs SET ready_at = clock_timestamp() - interval '50 s'",
        LOST,
    ],
    ids=["tried before", "requested", "in time, with its jitter", "lost"],
)
async def test_what_is_never_late(jobs_db: JobsDatabase, sql: str) -> None:
    """A tick that had a run, and what somebody has requested, runs however late."""
    found = await found_after(jobs_db, MOON, 7000, sql)
    assert "succeeded 1: it ran" in found
    assert not [each for each in found if REASON in each]


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE jobs SET requested_by = 'ada'",
        "UPDATE jobs SET paused_at = clock_timestamp(), paused_by = 'ada'",
        "UPDATE jobs SET fence = fence + 1",
        "UPDATE jobs SET due_at = due_at + interval '3 h', ready_at = ready_at + interval '3 h'",
        None,
    ],
    ids=["requested", "paused", "ran", "moved", "skipped"],
)
@pytest.mark.parametrize("guarded", [True, False])
async def test_a_late_tick_is_skipped_once(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, sql: str | None, *, guarded: bool
) -> None:
    """Only if nobody has done anything with it since it was read; else it would be lost."""
    if not guarded:
        start, end = (
            statements.SKIP_LATE.index(each) for each in (" AND due_at = $2", "    RETURNING name")
        )
        guard = statements.SKIP_LATE[start:end]
        named = " AND ($2::timestamptz, $3::bigint, $10::text) IS NOT NULL\n"
        unguarded = replaced(statements.SKIP_LATE, guard, named)
        monkeypatch.setattr(statements, "SKIP_LATE", unguarded)
    instance = jobs_db.instance()
    async with jobs_db.scheduler([MOON], starts=False) as scheduler:
        await scheduler.declare()
    await jobs_db.shift(7500)
    (tick,) = await instance.jobs.late(["moon"])
    skip = skip_late(MOON, tick)
    if sql is None:
        assert await instance.jobs.skip(tick, skip)
    else:
        await jobs_db.admin.execute(sql)
    assert await instance.jobs.skip(tick, skip) is not guarded
    assert len(await jobs_db.runs("moon")) == (not guarded) + (sql is None)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({"late": "never"}, "late is 'never'; it must be 'run' or 'skip'"),
        ({"late": "skip"}, "have a meaning only together"),
        ({"start_within": WITHIN}, "have a meaning only together"),
        (
            {"late": "skip", "start_within": timedelta(seconds=1)},
            "start_within is 0:00:01; it must",
        ),
        ({"late": "skip", "start_within": 60}, "write a timedelta, like timedelta"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(arguments: dict[str, object], refused: str) -> None:
    """The sentence names the job and the value."""
    with pytest.raises(DeclarationError, match=refused):
        job(name="moon", every=HOUR, **arguments)(run_it)  # type: ignore[arg-type]
