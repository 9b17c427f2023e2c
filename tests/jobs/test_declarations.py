"""Which declaration of a job counts when versions differ; and a clock that is set back."""

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
async def land(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


async def ages(jobs_db: JobsDatabase, schedule: str, by: timedelta = 2 * LIVE) -> None:
    """Let nobody have made a declaration for a while."""
    await jobs_db.admin.execute(
        "UPDATE job_declarations SET last_declared_at = last_declared_at - $2::interval"
        " WHERE schedule = $1",
        schedule,
        by,
    )


async def shows(jobs_db: JobsDatabase) -> tuple[str, list[str], int]:
    row = await jobs_db.row("moon")
    return row["schedule"], row["other_schedules"], row["due_at"].hour


async def test_the_code_that_lives_decides_the_schedule(jobs_db: JobsDatabase) -> None:
    """An older version that starts once more changes nothing, and who goes counts no more."""
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon", schedule=OLD)
    await new.declare("moon", schedule=NEW)
    assert await shows(jobs_db) == (NEW, [OLD], 4)
    await old.declare("moon", schedule=OLD)  # started again: it is not newer by that
    assert await shows(jobs_db) == (NEW, [OLD], 4)
    await ages(jobs_db, OLD)  # and stopped
    await new.declare("moon", schedule=NEW)
    assert await shows(jobs_db) == (NEW, [], 4)
    await old.declare("moon", schedule=OLD)  # going back on purpose
    await ages(jobs_db, NEW)
    await old.declare("moon", schedule=OLD)
    assert await shows(jobs_db) == (OLD, [], 3)


async def test_where_the_last_to_start_decides_the_old_schedule_stays(
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
    """The release before writes its schedule into the row when it starts; it does not stay."""
    new = jobs_db.instance("new")
    await new.declare("moon", schedule=NEW)
    due_at = (await jobs_db.row("moon"))["due_at"]
    await jobs_db.admin.execute(OLD_REDECLARE, "moon", OLD, "", due_at + HOUR)
    await new.declare("moon", schedule=NEW)
    row = await jobs_db.row("moon")
    assert (row["schedule"], row["due_at"], row["ready_at"]) == (NEW, due_at, due_at)


async def test_who_was_cut_off_takes_nobody_for_gone(jobs_db: JobsDatabase) -> None:
    """After an outage the first to come back gives the others as long as it was away itself."""
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon", schedule=OLD)
    await new.declare("moon", schedule=NEW)
    await ages(jobs_db, NEW, 10 * MINUTE)
    await old.jobs.declare({"moon": Declared(OLD)}, live=11 * MINUTE)
    assert (await shows(jobs_db))[0] == NEW


async def test_a_schedule_of_a_newer_program_stays(jobs_db: JobsDatabase) -> None:
    """Who can't read the schedule that counts leaves the row to those who can, and is at peace."""
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
    """20 000 jobs of others among 20 000 of its own: a claim took four seconds, a note two."""
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
    report_figures(f"a note and a claim: {', '.join(f'{each * 1000:.0f}' for each in took)} ms")
    assert 4 * STARTUP_BATCH <= marked <= 5 * STARTUP_BATCH
    assert min(took) < 1


# -- a clock that was set back ---------------------------------------------------------------------


async def set_back(jobs_db: JobsDatabase, by: timedelta) -> None:
    """Let PostgreSQL's clock be set back: all that was lies further ahead."""
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
    """Its next start is at most as far ahead as if the clock had always been right."""
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
    assert {**await jobs_db.row("moon")} == {**before}  # nothing is amiss
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


async def test_a_dead_lease_does_not_stand_for_as_long_as_the_clock_was_set_back(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has seen for longer than it lasts that nobody renews it ends it; not what is renewed."""
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
    """What is ended is the very lease that was seen, and only if nobody has renewed it since."""
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
