"""A schedule that is set at run time counts instead of the declared one, until it is reset."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from balance_app.db import pool
from balance_app.db.pool import Connection
from balance_app.jobs import completion, declarations, statements
from balance_app.jobs.api import controls
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.schemas import ScheduleRequest
from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.declarations import Declared
from balance_app.jobs.job import job
from balance_app.jobs.repository import Changed, Claimed, Completion
from balance_app.jobs.runner import RunResult
from tests.jobs.support import JobsDatabase, on, until
from tests.mutants import replaced

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
EVERY_MINUTE = ScheduleRequest.model_validate({"everySeconds": 60})
DECLARED, LATER, OVERRIDE = "every 3600 s", "every 7200 s", "every 60 s"

SET = """
UPDATE jobs SET schedule_override = $2, overridden_by = 'ada', overridden_at = clock_timestamp()
WHERE name = $1
"""


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


def ended(at: datetime) -> Completion:
    return Completion(outcome="succeeded", result="", seconds_ago=0, due_at=at, ready_at=at)


async def run_until_override(jobs_db: JobsDatabase) -> tuple[Claimed, Changed | bool]:
    """Run a job whose schedule is set while it runs; return the claim, and its completion."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule=DECLARED)
    claimed = await instance.claim()
    await jobs_db.admin.execute(SET, "moon", OVERRIDE)
    done = await instance.jobs.finish(
        "moon", claimed.fence, ended(claimed.due_at + HOUR), claimed.schedule
    )
    return claimed, done


async def test_a_run_ends_by_the_schedule_that_was_set_meanwhile(jobs_db: JobsDatabase) -> None:
    """Its completion is refused with the new schedule; the next claim begins with it."""
    claimed, done = await run_until_override(jobs_db)
    assert (claimed.schedule, done) == (DECLARED, Changed(OVERRIDE, None))
    instance = jobs_db.instance()
    await jobs_db.expire("moon")
    await instance.declare("moon", schedule=DECLARED)
    claimed = await instance.claim()
    assert claimed.schedule == OVERRIDE
    next_at = claimed.due_at + MINUTE
    assert await instance.jobs.finish("moon", claimed.fence, ended(next_at), OVERRIDE) is True
    assert (await jobs_db.row("moon"))["due_at"] == next_at


async def test_where_the_schedule_is_not_compared_the_run_ends_by_the_old_one(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the next tick is an hour later, whatever was set."""
    guard = "AND (coalesce(schedule_override, schedule) <> $14) IS NOT TRUE"
    unguarded = replaced(statements.FINISH, guard, "AND $14::text IS NOT NULL")
    monkeypatch.setattr(statements, "FINISH", unguarded)
    claimed, done = await run_until_override(jobs_db)
    assert done is True
    assert (await jobs_db.row("moon"))["due_at"] == claimed.due_at + HOUR


async def override_then_deploy(jobs_db: JobsDatabase) -> tuple[str, str | None, timedelta]:
    """Return what a job has after its schedule was set, and a program declared another one."""
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon", schedule=DECLARED)
    claimed = await old.claim()
    await old.jobs.finish("moon", claimed.fence, ended(claimed.due_at + MINUTE))
    await jobs_db.admin.execute(SET, "moon", OVERRIDE)
    for instance, schedule in ((old, DECLARED), (new, LATER), (new, LATER)):
        await instance.declare("moon", schedule=schedule)
    row = await jobs_db.row("moon")
    return row["schedule"], row["schedule_override"], row["due_at"] - claimed.due_at


async def test_it_outlasts_restarts_and_another_declared_schedule(jobs_db: JobsDatabase) -> None:
    """The row names what code declares beside it; the tick is that of what was set."""
    assert await override_then_deploy(jobs_db) == (LATER, OVERRIDE, MINUTE)


async def test_a_declaration_that_ignores_it_moves_the_tick(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    seen = "SELECT name, schedule, NULL AS schedule_override, description"
    guard = "AND schedule_override IS NOT DISTINCT FROM $12"
    monkeypatch.setattr(
        declarations,
        "ROWS",
        replaced(declarations.ROWS, "SELECT name, schedule, schedule_override, description", seen),
    )
    unguarded = replaced(declarations.REDECLARE, guard, "AND $12::text IS NULL")
    monkeypatch.setattr(declarations, "REDECLARE", unguarded)
    assert await override_then_deploy(jobs_db) == (LATER, OVERRIDE, 2 * HOUR)


async def declare_meanwhile(jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Set a schedule while another is declared; say whether the declaration moved the tick."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule=DECLARED)
    claimed = await instance.claim()
    next_at = claimed.due_at + MINUTE
    await instance.jobs.finish("moon", claimed.fence, ended(next_at))
    meanwhile = SET.replace("$2", f"'{OVERRIDE}'").replace("name = $1", "name = ANY ($1)")
    monkeypatch.setattr(declarations, "RESET_FUTURE", meanwhile)  # between look and change
    await instance.declare("moon", schedule=LATER)
    return bool((await jobs_db.row("moon"))["due_at"] != next_at)


async def test_a_declaration_changes_only_what_it_saw(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that is set between its look and its change keeps its tick."""
    assert not await declare_meanwhile(jobs_db, monkeypatch)


async def test_a_declaration_that_changes_what_it_did_not_see_moves_the_tick(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    guard = "AND schedule_override IS NOT DISTINCT FROM $12"
    unguarded = replaced(declarations.REDECLARE, guard, "AND $12::text IS NULL")
    monkeypatch.setattr(declarations, "REDECLARE", unguarded)
    assert await declare_meanwhile(jobs_db, monkeypatch)


async def test_no_job_waits_for_a_clock_that_was_set_back(jobs_db: JobsDatabase) -> None:
    """A tick further ahead than the next one of what was set is computed again, by that."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule=DECLARED)
    await jobs_db.admin.execute(SET, "moon", OVERRIDE)
    await jobs_db.shift(-3 * HOUR.total_seconds())
    await instance.declare("moon", schedule=DECLARED)
    left = await jobs_db.admin.fetchval("SELECT due_at - clock_timestamp() FROM jobs")
    assert timedelta(0) < left <= MINUTE


async def skip_while_set(jobs_db: JobsDatabase) -> bool:
    """Skip a late tick whose schedule was set since it was found; say whether it was skipped."""
    moon = job(name="moon", every=HOUR, late="skip", start_within=MINUTE)(print)
    instance = jobs_db.instance()
    await instance.jobs.declare({"moon": Declared(DECLARED, start_within=MINUTE)})
    await jobs_db.shift(120)
    (tick,) = await instance.jobs.late(["moon"])
    await jobs_db.admin.execute(SET, "moon", OVERRIDE)
    return await instance.jobs.skip(tick, completion.skip_late(moon, tick))


async def test_a_late_tick_is_skipped_by_the_schedule_that_was_set_meanwhile(
    jobs_db: JobsDatabase,
) -> None:
    """What was computed by the old one is not written; the next look finds the new one."""
    assert not await skip_while_set(jobs_db)
    (tick,) = await jobs_db.instance().jobs.late(["moon"])
    assert tick.schedule == OVERRIDE


async def test_who_does_not_compare_skips_to_a_tick_of_the_old_one(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    guard = "coalesce(schedule_override, schedule) = $10"
    unguarded = replaced(statements.SKIP_LATE, guard, "$10::text <> ''")
    monkeypatch.setattr(statements, "SKIP_LATE", unguarded)
    assert await skip_while_set(jobs_db)


async def test_a_job_that_begins_anew_has_its_declared_schedule(jobs_db: JobsDatabase) -> None:
    """What was set before it was forgotten is forgotten too."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule=DECLARED)
    await jobs_db.admin.execute(SET, "moon", OVERRIDE)
    await jobs_db.admin.execute(
        "UPDATE jobs SET forgotten_at = clock_timestamp(), forgotten_by = 'ada'"
    )
    await instance.declare("moon", schedule=DECLARED)
    row = await jobs_db.row("moon")
    assert (row["schedule"], row["schedule_override"], row["overridden_by"]) == (
        DECLARED,
        None,
        None,
    )


# -- two who change a row at once ----------------------------------------------------------------


def steered(
    jobs_db: JobsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[], Awaitable[object]],
) -> Controls:
    """Return controls where something happens between their first look and their change."""
    todo = [meanwhile]

    async def write(connection: Connection, sql: str, *arguments: object) -> asyncpg.Record | None:
        while todo:
            await todo.pop()()
        return await pool.write(connection, sql, *arguments)

    monkeypatch.setattr(controls, "write", write)
    return Controls(jobs_db.database, StatusReader(jobs_db.database, jobs_db.settings), {})


async def set_while_claimed(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> tuple[datetime, datetime]:
    """Set a schedule just as the tick comes; return the tick of the run, and that of the row."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule=DECLARED)
    await jobs_db.admin.execute("UPDATE jobs SET due_at = clock_timestamp() + interval '0.3 s'")
    await jobs_db.admin.execute("UPDATE jobs SET ready_at = due_at")
    claims: list[Claimed] = []

    async def take() -> Claimed | None:
        return (await instance.claim_next()).claimed

    async def claim() -> None:
        claims.append(await until(take))

    await steered(jobs_db, monkeypatch, claim).set_schedule("moon", "ada", EVERY_MINUTE)
    row = await jobs_db.row("moon")
    assert (row["schedule_override"], row["fence"]) == (OVERRIDE, 1)
    return claims[0].due_at, row["due_at"]


async def test_a_run_that_begins_meanwhile_keeps_its_tick(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tick is moved only as long as nobody runs it."""
    of_run, of_row = await set_while_claimed(jobs_db, monkeypatch)
    assert of_row == of_run


async def test_who_does_not_look_moves_the_tick_of_a_run(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    unguarded = replaced(controls.OVERRIDE, "(holder IS NOT NULL) = $6", "$6::boolean IS NOT NULL")
    unguarded = replaced(unguarded, "OR due_at > clock_timestamp()", "OR true")
    monkeypatch.setattr(controls, "OVERRIDE", unguarded)
    of_run, of_row = await set_while_claimed(jobs_db, monkeypatch)
    assert of_row > of_run


async def resume_while_set(jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch) -> timedelta:
    """Resume a job while its schedule is set; return how far the next tick is from the anchor."""
    await jobs_db.instance().declare("moon", schedule=DECLARED)
    await jobs_db.admin.execute("UPDATE jobs SET paused_at = clock_timestamp(), paused_by = 'ada'")

    async def set_schedule() -> None:
        await jobs_db.admin.execute(SET, "moon", OVERRIDE)

    await steered(jobs_db, monkeypatch, set_schedule).resume("moon", "eve")
    row = await jobs_db.row("moon")
    assert row["paused_at"] is None
    return timedelta(seconds=(row["due_at"] - row["anchor_at"]).total_seconds())


async def test_a_job_resumes_by_the_schedule_that_was_set_meanwhile(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next tick is computed again."""
    assert await resume_while_set(jobs_db, monkeypatch) == MINUTE


async def test_who_does_not_compare_resumes_by_the_old_one(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    guard = "coalesce(schedule_override, schedule) = $11"
    monkeypatch.setattr(controls, "RESUME", replaced(controls.RESUME, guard, "$11::text <> ''"))
    assert await resume_while_set(jobs_db, monkeypatch) == HOUR


def test_jitter_ends_before_the_next_tick() -> None:
    """A schedule of a minute has at most a minute of jitter, whatever the code declares."""
    moon = job(name="moon", every=HOUR, jitter=30 * MINUTE)(print)
    for schedule, longest in ((DECLARED, 30 * MINUTE), (OVERRIDE, MINUTE)):
        run = Claimed("moon", 1, NOW, 0, None, None, schedule, NOW, NOW, 0)
        waits = []
        for _ in range(200):
            done = completion.complete(moon, run, RunResult("succeeded", ""), NOW, seconds_ago=0)
            assert done.due_at is not None
            assert done.ready_at is not None
            waits.append(done.ready_at - done.due_at)
        assert longest / 2 < max(waits) <= longest
