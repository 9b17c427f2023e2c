"""Which declaration of a job applies when versions differ; and a clock that is set back."""

from collections.abc import AsyncIterator
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest

from balance_app.jobs import declarations
from balance_app.jobs import scheduler as scheduling
from balance_app.jobs.declarations import LIVE, Capabilities, Declared
from balance_app.jobs.job import Job, job
from balance_app.jobs.repository import STARTUP_BATCH, Completion
from balance_app.jobs.run import Run
from tests.jobs.support import Instance, JobsDatabase, on, until
from tests.mutants import replaced
from tests.system.sizes import report_figures

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
OLD, NEW = "cron 0 3 * * * UTC", "cron 30 4 * * * UTC"

# As f2f4455 does when it starts.
OLD_REDECLARE = """
UPDATE jobs SET schedule = $2, description = $3,
    due_at = CASE WHEN holder IS NULL AND due_at > clock_timestamp() AND schedule <> $2
             THEN $4 ELSE due_at END,
    ready_at = CASE WHEN holder IS NULL AND due_at > clock_timestamp() AND schedule <> $2
               THEN $4 ELSE ready_at END
WHERE name = $1
"""


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


async def ages(jobs_db: JobsDatabase, schedule: str, by: timedelta = 2 * LIVE) -> None:
    """Let the last declaration with this schedule be older."""
    await jobs_db.admin.execute(
        "UPDATE job_declarations SET last_declared_at = last_declared_at - $2::interval"
        " WHERE schedule = $1",
        schedule,
        by,
    )


async def shows(jobs_db: JobsDatabase) -> tuple[str, list[str], int]:
    row = await jobs_db.row("moon")
    return row["schedule"], row["other_schedules"], row["due_at"].hour


async def test_the_newest_live_declaration_decides_the_schedule(jobs_db: JobsDatabase) -> None:
    """A restart of an older version changes nothing; a stopped version no longer counts."""
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon", schedule=OLD)
    await new.declare("moon", schedule=NEW)
    assert await shows(jobs_db) == (NEW, [OLD], 4)
    await old.declare("moon", schedule=OLD)  # a restart does not make it newer
    assert await shows(jobs_db) == (NEW, [OLD], 4)
    await ages(jobs_db, OLD)  # it has stopped
    await new.declare("moon", schedule=NEW)
    assert await shows(jobs_db) == (NEW, [], 4)
    await old.declare("moon", schedule=OLD)  # an intended downgrade
    await ages(jobs_db, NEW)
    await old.declare("moon", schedule=OLD)
    assert await shows(jobs_db) == (OLD, [], 3)


async def test_without_the_first_declarations_the_last_start_decides(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without the order of first declarations an old instance that starts wins."""
    last_seen = replaced(declarations.IN_EFFECT, "first_declared_at DESC", "last_declared_at DESC")
    monkeypatch.setattr(declarations, "IN_EFFECT", last_seen)
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon", schedule=OLD)
    await new.declare("moon", schedule=NEW)
    await old.declare("moon", schedule=OLD)
    assert (await shows(jobs_db))[0] == OLD


async def test_a_program_that_makes_no_declarations_is_overruled(jobs_db: JobsDatabase) -> None:
    """The previous release writes its schedule into the row when it starts; it is replaced."""
    new = jobs_db.instance("new")
    await new.declare("moon", schedule=NEW)
    due_at = (await jobs_db.row("moon"))["due_at"]
    await jobs_db.admin.execute(OLD_REDECLARE, "moon", OLD, "", due_at + HOUR)
    await new.declare("moon", schedule=NEW)
    row = await jobs_db.row("moon")
    assert (row["schedule"], row["due_at"], row["ready_at"]) == (NEW, due_at, due_at)


async def test_after_an_outage_other_declarations_still_count(jobs_db: JobsDatabase) -> None:
    """The first instance to return waits for the others for as long as it was cut off itself."""
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon", schedule=OLD)
    await new.declare("moon", schedule=NEW)
    await ages(jobs_db, NEW, 10 * MINUTE)
    await old.jobs.declare({"moon": Declared(OLD)}, live=11 * MINUTE)
    assert (await shows(jobs_db))[0] == NEW


async def test_a_schedule_of_a_newer_program_stays(jobs_db: JobsDatabase) -> None:
    """A program that can't read the valid schedule leaves the row alone, and reports no fault."""
    old = jobs_db.instance("old")
    await old.declare("moon", schedule=OLD)
    await jobs_db.admin.execute("UPDATE jobs SET schedule = 'every full moon'")
    await jobs_db.admin.execute(
        "INSERT INTO job_declarations (job, digest, schedule, description)"
        " VALUES ('moon', 'x', 'every full moon', '')"
    )
    before = await jobs_db.row("moon")
    await old.declare("moon", schedule=OLD)
    assert await jobs_db.row("moon") == before
    assert old.jobs.undeclared == {}


async def test_many_jobs_make_no_claim_slow(jobs_db: JobsDatabase) -> None:
    """20 000 jobs of others among 20 000 of its own: a claim once took 4 s, a mark 2 s."""
    await jobs_db.admin.execute(
        "INSERT INTO jobs (name, schedule, description, due_at, ready_at)"
        " SELECT CASE i % 2 WHEN 0 THEN 'own-' ELSE 'other-' END || i, 'every 60 s', '',"
        " now(), now() - i * interval '1 ms' FROM generate_series(1, 40000) AS i"
    )
    await jobs_db.admin.execute("ANALYZE jobs")
    names = await jobs_db.admin.fetch("SELECT name FROM jobs WHERE name LIKE 'own-%'")
    instance = jobs_db.instance()
    (row,) = await jobs_db.admin.fetch(declarations.CAPABILITIES, [name for (name,) in names])
    capabilities = Capabilities(**row)
    assert (capabilities.highest_number, len(capabilities.missing), len(capabilities.numbers)) == (
        40000,
        20000,
        20000,
    )
    instance.capabilities = capabilities
    took = []
    for _ in range(5):
        since = monotonic()
        await instance.jobs.mark_startup(capabilities, MINUTE)
        assert (await instance.claim()).name.startswith("own-")
        took.append(monotonic() - since)
    marked = await jobs_db.admin.fetchval(
        "SELECT count(*) FROM jobs WHERE startup_marked_at IS NOT NULL"
    )
    report_figures(
        f"a startup mark and a claim: {', '.join(f'{each * 1000:.0f}' for each in took)} ms"
    )
    assert 4 * STARTUP_BATCH <= marked <= 5 * STARTUP_BATCH
    assert min(took) < 1


async def test_a_lock_on_the_declarations_stops_no_claim(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a foreign session holds their table no job is declared again; all run all the same."""
    monkeypatch.setattr(scheduling, "DECLARE_SECONDS", 0.2)
    blocker = await jobs_db.connect()

    async def runs(_run: Run) -> None:
        pass

    async with jobs_db.scheduler([job(name="moon", every=timedelta(seconds=1))(runs)]) as scheduler:

        async def held_up() -> bool:
            return scheduler._held_up

        async def declared() -> bool:
            return not scheduler._held_up

        await jobs_db.ended("moon")
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE job_declarations IN EXCLUSIVE MODE")
        await until(held_up)
        before = len(await jobs_db.ended("moon"))
        await jobs_db.ended("moon", runs=before + 2)
        assert scheduler._held_up
        await transaction.rollback()
        await until(declared)


async def test_a_job_whose_row_is_added_later_is_claimed(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is none of those that the instance found at its start; its presence has it too."""
    monkeypatch.setattr(scheduling, "DECLARE_SECONDS", 0.2)

    async def runs(_run: Run) -> None:
        pass

    async with jobs_db.scheduler([_job(runs)]) as scheduler:
        await jobs_db.ended("moon")
        async with jobs_db.admin.transaction():
            await jobs_db.admin.execute("DELETE FROM job_runs")
            await jobs_db.admin.execute("DELETE FROM jobs")
        await jobs_db.ended("moon")
        number = (await jobs_db.row("moon"))["number"]

        async def presence_is_right() -> bool | None:
            rows = await jobs_db.admin.fetch("SELECT id, highest_number FROM instances")
            return [tuple(row) for row in rows] == [(scheduler.me.id, number)]

        await until(presence_is_right)
        # after the tables were replaced, an old row may be in the new ones
        await jobs_db.admin.execute("UPDATE instances SET highest_number = 99")
        assert scheduler._capabilities is not None
        scheduler._heartbeat.start(scheduler._capabilities)
        await until(presence_is_right)


# -- a clock that was set back ---------------------------------------------------------------------


async def set_back(jobs_db: JobsDatabase, by: timedelta) -> None:
    """Set PostgreSQL's clock back: move all recorded times ahead."""
    await jobs_db.shift(-by.total_seconds())
    await jobs_db.admin.execute(
        "UPDATE jobs SET lease_expires_at = lease_expires_at + $1::interval"
        " WHERE holder IS NOT NULL",
        by,
    )


WAITS: dict[str, tuple[str, dict[str, object]]] = {
    "an interval": ("every 300 s", {}),
    "a cron schedule": ("cron */5 * * * * UTC", {}),
    "a retry": ("every 300 s", {"attempt": 1, "retries": 1}),
    "a quarantine": ("every 300 s", {"attempt": 3, "lost_streak": 3}),
}


@pytest.mark.parametrize("what", WAITS)
async def test_no_job_waits_for_a_clock_that_was_set_back(jobs_db: JobsDatabase, what: str) -> None:
    """The next start is at most as far ahead as with a clock that was always right."""
    schedule, columns = WAITS[what]
    instance = jobs_db.instance()
    await instance.declare("moon", schedule=schedule)
    claimed = await instance.claim() if what != "a cron schedule" else None
    if claimed is not None:
        next_at = claimed.due_at + 5 * MINUTE
        completion = Completion(
            outcome="succeeded", result="", seconds_ago=0, due_at=next_at, ready_at=next_at
        )
        await instance.jobs.finish("moon", 1, completion)
    for column, value in columns.items():
        await jobs_db.admin.execute(f"UPDATE jobs SET {column} = $1", value)  # noqa: S608 - ours
    if "attempt" in columns:
        await jobs_db.admin.execute(
            "UPDATE jobs SET ready_at = clock_timestamp() + interval '1 min'"
        )
    before = await jobs_db.row("moon")
    await instance.declare("moon", schedule=schedule)
    assert {**await jobs_db.row("moon")} == {**before}  # nothing to correct
    await set_back(jobs_db, 3 * HOUR)
    await instance.declare("moon", schedule=schedule)
    row = await jobs_db.row("moon")
    now = await jobs_db.admin.fetchval("SELECT clock_timestamp()")
    assert row["due_at"] <= now + 5 * MINUTE
    assert row["ready_at"] <= now + 5 * MINUTE
    assert row["anchor_at"] <= now or what == "a cron schedule"
    assert row["last_heartbeat_at"] is None or row["last_heartbeat_at"] <= now


def _job(function: Any) -> Job:  # noqa: ANN401 - what a job may be
    return job(name="moon", every=timedelta(hours=1))(function)


async def test_a_lease_of_a_dead_instance_ends_despite_a_clock_set_back(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance ends a lease that was not renewed for its whole length; not a renewed one."""
    monkeypatch.setattr(scheduling, "DECLARE_SECONDS", 0.2)
    dead = jobs_db.instance("dead", lease=timedelta(seconds=2))
    await dead.declare("moon")
    await dead.claim()
    await set_back(jobs_db, HOUR)

    async def runs(_run: Run) -> str:
        return "at last"

    async with jobs_db.scheduler([_job(runs)]) as scheduler:
        await until(lambda: _sees(scheduler))
        assert (await jobs_db.row("moon"))["server"] == "dead"
        await jobs_db.ended("moon", runs=2)
    assert [outcome for outcome, _ in await jobs_db.outcomes("moon")][:2] == ["lost", "succeeded"]


async def _sees(scheduler: scheduling.Scheduler) -> bool:
    return bool(scheduler._ahead)


async def test_a_lease_that_is_renewed_is_left_alone(jobs_db: JobsDatabase) -> None:
    """Only the observed lease is ended, and only if it has not been renewed since."""
    instance: Instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    assert await instance.jobs.ahead() == []
    await set_back(jobs_db, HOUR)
    (lease,) = await instance.jobs.ahead()
    assert (lease.name, lease.fence) == ("moon", 1)
    assert abs(lease.length - instance.lease) < timedelta(seconds=1)  # the clock is read twice
    await instance.renew(jobs_db.admin, ("moon", 1))
    assert not await instance.jobs.expire(lease)
    assert await instance.jobs.ahead() == []
    row = await jobs_db.row("moon")
    assert row["lease_expires_at"] > await jobs_db.admin.fetchval("SELECT clock_timestamp()")
