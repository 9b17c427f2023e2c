"""A job that can't be declared stops no other, and `/readyz` names it."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request
from typing_extensions import override

from balance_app.http.health import Readiness, readyz
from balance_app.http.services import Services
from balance_app.jobs import declarations
from balance_app.jobs.job import Job, job
from balance_app.jobs.run import Run
from balance_app.jobs.schedule import Every
from balance_app.jobs.scheduler import Scheduler
from tests.jobs.support import JobsDatabase, on


@pytest.fixture
async def jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


@job(name="good", every=timedelta(hours=1))
async def good(_run: Run) -> str:
    """Run."""
    return "ran"


@dataclass(frozen=True, slots=True)
class Odd(Every):
    """A schedule whose text no program can read."""

    @override
    def __str__(self) -> str:
        return "when the moon is full"


def invalid_job(name: str, description: str, schedule: Every | None = None) -> Job:
    """Return a job that the decorator `job` would have refused."""

    async def function(run: Run) -> None:
        raise AssertionError(run)

    function.__doc__ = description
    return replace(good, name=name, function=function, schedule=schedule or good.schedule)


BAD = (
    invalid_job("a-nul", "Watch\0."),
    invalid_job("a-surrogate", "Watch\ud800."),
    invalid_job("z-schedule", "Watch.", Odd(timedelta(hours=1))),
)


async def ready(jobs_db: JobsDatabase, scheduler: Scheduler) -> tuple[int, dict[str, Any]]:
    database = jobs_db.database
    readiness = Readiness(database, asyncio.Event(), informational={"jobs": scheduler.condition})
    state = SimpleNamespace(services=Services(jobs_db.settings, database, readiness))
    answer = await readyz(Request({"type": "http", "app": SimpleNamespace(state=state)}))
    return answer.status_code, cast("dict[str, Any]", json.loads(bytes(answer.body)))


async def test_a_job_that_can_t_be_declared_stops_no_other(jobs_db: JobsDatabase) -> None:
    """The others run; each faulty one is named with the reason, and keeps its row."""
    await jobs_db.instance().declare("a-nul", schedule="every 7200 s")
    async with jobs_db.scheduler([*BAD, good]) as scheduler:
        await jobs_db.ended("good")
        assert sorted(scheduler.undeclared) == sorted(each.name for each in BAD)
        status, body = await ready(jobs_db, scheduler)
    assert status == 200
    assert "a-nul: " in body["checks"]["jobs"]
    assert "z-schedule: ScheduleError: 'when the moon is full' is" in body["checks"]["jobs"]
    assert body["checks"]["schema"] == "ok"
    assert (await jobs_db.row("a-nul"))["schedule"] == "every 7200 s"
    assert await jobs_db.admin.fetchval("SELECT count(*) FROM jobs") == 2
    async with jobs_db.scheduler([good]) as scheduler:
        await asyncio.wait_for(_declared(scheduler), 10)
        assert (await ready(jobs_db, scheduler))[1]["checks"]["jobs"] == "ok"


async def test_declared_in_one_statement_no_job_runs(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: declared all together, none is declared, none runs, and all are named."""
    monkeypatch.setattr(declarations, "applied_if_unavailable", lambda _error: "no")
    async with jobs_db.scheduler([*BAD, good]) as scheduler:
        async with asyncio.timeout(10):
            while not scheduler.undeclared:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.02)
        assert sorted(scheduler.undeclared) == sorted(each.name for each in (*BAD, good))
        assert "good: " in (await ready(jobs_db, scheduler))[1]["checks"]["jobs"]
    assert await jobs_db.admin.fetchval("SELECT count(*) FROM jobs") == 0


async def _declared(scheduler: Scheduler) -> datetime:
    while scheduler._capabilities is None:  # noqa: ASYNC110 - the same
        await asyncio.sleep(0.02)
    return scheduler._capabilities.booted_at


async def test_a_forgotten_job_starts_afresh_when_it_is_declared_again(
    jobs_db: JobsDatabase,
) -> None:
    """Ticks missed meanwhile are not made up for; the fence continues, and so does the history."""
    instance = jobs_db.instance()
    await instance.declare("good")
    claimed = await instance.claim()
    await jobs_db.admin.execute(
        "UPDATE jobs SET holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL,"
        " paused_at = now(), paused_by = 'ada', attempt = 3, checkpoint = '1',"
        " due_at = now() - interval '9 days', ready_at = now() - interval '9 days',"
        " forgotten_at = clock_timestamp(), forgotten_by = 'ada'"
    )
    capabilities = await jobs_db.instance("app2").declare("good")
    assert capabilities.missing == []
    row = await jobs_db.row("good")
    assert (row["forgotten_at"], row["paused_at"], row["checkpoint"]) == (None, None, None)
    assert (row["attempt"], row["fence"]) == (0, claimed.fence)
    assert row["due_at"] == row["anchor_at"] > claimed.started_at
    assert (await instance.claim()).fence == claimed.fence + 1
