"""How many runs one instance takes at once at most (JOB_MAX_RUNNING)."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from pydantic_core import from_json

from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.job import Job, job
from balance_app.jobs.run import Run
from tests.jobs.support import JobsDatabase, on, until

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


class Gate:
    """Jobs that run until they are let go."""

    def __init__(self, number: int) -> None:
        self.open = {f"job-{each}": asyncio.Event() for each in range(number)}
        self.jobs: list[Job] = [job(name=name, every=HOUR)(self._run) for name in self.open]

    async def _run(self, run: Run) -> None:
        await self.open[run.name].wait()


async def running(jobs_db: JobsDatabase) -> Counter[str]:
    rows = await jobs_db.admin.fetch("SELECT server FROM jobs WHERE holder IS NOT NULL")
    return Counter(row["server"] for row in rows)


async def waits(jobs_db: JobsDatabase) -> list[str]:
    snapshot = await StatusReader(jobs_db.database, jobs_db.settings).read()
    jobs = from_json(snapshot.text)["jobs"]
    return [each["waiting"]["reason"] for each in jobs if each["waiting"] is not None]


@pytest.mark.parametrize(("limit", "taken"), [(2, 2), (None, 4)])
async def test_an_instance_takes_no_more_runs_than_it_may(
    jobs_db: JobsDatabase, limit: int | None, taken: int
) -> None:
    """The rest waits for capacity, and is taken as soon as a run has ended; without it, all run."""
    gate = Gate(4)
    async with jobs_db.scheduler(gate.jobs, job_max_running=limit, server_id="small"):

        async def full() -> bool:
            return (await running(jobs_db))["small"] == taken

        await until(full)
        await asyncio.sleep(1)
        assert await full()
        if limit is None:
            assert await waits(jobs_db) == []
            return
        assert await until(lambda: waits(jobs_db)) == ["no-capacity"] * 2
        (first, *_) = await jobs_db.admin.fetch("SELECT name FROM jobs WHERE holder IS NOT NULL")
        gate.open[first["name"]].set()
        await jobs_db.ended(first["name"])

        async def replaced() -> bool:
            return len(await waits(jobs_db)) == 2 and await full()

        await until(replaced)
        assert sorted(await waits(jobs_db)) == ["no-capacity", "not-due"]


async def test_others_take_what_one_instance_may_not(jobs_db: JobsDatabase) -> None:
    """Nothing waits for capacity while a live instance has some; a lost run is taken over, too."""
    gate = Gate(5)
    async with jobs_db.scheduler(gate.jobs, job_max_running=1, server_id="small"):
        await until(lambda: waits(jobs_db))
        async with jobs_db.scheduler(gate.jobs, job_max_running=4, server_id="large"):

            async def shared() -> bool:
                return await running(jobs_db) == {"small": 1, "large": 4}

            await until(shared)
            assert await waits(jobs_db) == []
