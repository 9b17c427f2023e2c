"""Tests of one's own jobs need a database and nothing else."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from balance_app.jobs import Run, job
from balance_app.jobs.testing import run_once
from balance_app.jobs.threads import ThreadRun
from tests.processes import empty_database, query

DUE_AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
async def database(
    postgres: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, str]]:
    async with empty_database(postgres) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield variables


async def value(database: dict[str, str], sql: str) -> object:
    return (await query(database, sql))[0][0]


@job(name="add-up", every=timedelta(hours=1), timeout=timedelta(seconds=20))
async def add_up(run: Run) -> str:
    state = run.resumed or {"sum": 0, "next": 1}
    while state["next"] <= 4:
        async with run.transaction() as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS sums (number int)")
            await connection.execute("INSERT INTO sums VALUES ($1)", state["next"])
            state = {"sum": state["sum"] + state["next"], "next": state["next"] + 1}
            await run.checkpoint(state)
    return f"{state['sum']} at {run.due_at:%Y-%m-%d}"


@job(name="fail", cron="0 3 * * *", tz="Europe/Berlin")
def fail(run: ThreadRun) -> None:
    run.log.warning("odd", attempt=run.attempt)
    raise ValueError(f"attempt {run.attempt}")


async def test_a_job_runs_to_its_end(database: dict[str, str]) -> None:
    """On an empty database, which is migrated; with its transactions, at the tick that is given."""
    record = await run_once(add_up, due_at=DUE_AT)
    assert record == ("succeeded", "10 at 2026-01-01", [], None)
    assert await value(database, "SELECT count(*) FROM sums") == 4
    assert await value(database, "SELECT count(*) FROM instances") == 0


async def test_a_run_goes_on_from_a_checkpoint(database: dict[str, str]) -> None:
    """As after a loss; and again from the start without one."""
    record = await run_once(add_up, resumed={"sum": 6, "next": 4}, due_at=DUE_AT)
    assert record[:2] == ("succeeded", "10 at 2026-01-01")
    assert (await run_once(add_up, due_at=DUE_AT)).result == "10 at 2026-01-01"
    assert await value(database, "SELECT count(*) FROM sums") == 5


async def test_a_failure_is_reported(database: dict[str, str]) -> None:
    """Each time, whatever the schedule says of when it would be tried again."""
    for _ in range(2):
        record = await run_once(fail)
        assert record[:2] == ("failed", "ValueError: attempt 0")
        assert [(line.level, line.text) for line in record.lines] == [("warning", "odd attempt=0")]
        assert record.traceback is not None
        assert record.traceback.endswith("ValueError: attempt 0")
    assert await value(database, "SELECT count(*) FROM job_runs") == 2


async def test_a_database_that_a_service_uses_is_refused(database: dict[str, str]) -> None:
    """What a test's job does is nothing that a service's database should have."""
    assert (await run_once(fail)).outcome == "failed"
    await query(
        database,
        "INSERT INTO instances (id, server, highest_number, missing)"
        " VALUES (gen_random_uuid(), 'app7', 0, '{}')",
    )
    with pytest.raises(RuntimeError, match="The instance app7 uses this database"):
        await run_once(add_up)
    assert await value(database, "SELECT to_regclass('sums')") is None
