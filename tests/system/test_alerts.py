"""Alerts of real instances: a receiver that is down, and an instance that dies while it sends."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from balance_app.maintenance.alerting.sender import NAME
from tests.maintenance.receiver import PATH, Receiver, receiving
from tests.processes import Instance, query, running

PATIENCE_SECONDS = 60
RUNS_THERE = "SELECT server FROM jobs WHERE name = $1 AND holder IS NOT NULL"
READY = "UPDATE jobs SET ready_at = clock_timestamp() WHERE name = $1"

JOBS = '''
from datetime import timedelta
from pathlib import Path

from balance_app.jobs import Run, job


@job(name="moon", every=timedelta(seconds=5), min_duration=timedelta(0))
async def moon(run: Run) -> None:
    """Fail while a file is there."""
    if Path({file!r}).exists():
        raise ValueError("no light")
'''


@pytest.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiving() as hook:
        yield hook


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    """Poll until something is so in the database, or at the receiver."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await reached():  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(0.05)


async def test_alerts_of_a_fleet(database: dict[str, str], hook: Receiver, tmp_path: Path) -> None:
    """What happens while the receiver is down arrives, once; the URL is in no log and no answer."""
    dark = tmp_path / "dark"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "moons.py").write_text(JOBS.format(file=str(dark)))
    environment = {
        "ALERT_URL": hook.url,
        "JOBS_MODULES": "moons",
        "JOB_LEASE_SECONDS": "3",
        "JOB_WARM_UP_SECONDS": "0",
        "PYTHONPATH": f"{modules}:{Path(__file__).parents[2]}",
    }
    logs = {name: tmp_path / f"{name}.log" for name in ("app1", "app2")}
    instances = [
        Instance(database, name, log=log, program=("balance_app", "serve"), **environment)
        for name, log in logs.items()
    ]
    async with running(instances):
        await hook.stop()
        dark.touch()

        async def sender() -> str | None:
            """Return the instance that sends, which waits while the receiver is down."""
            rows = await query(database, RUNS_THERE, NAME)
            return rows[0]["server"] if rows else None

        async def was_tried() -> bool:
            await query(database, READY, NAME)
            tried = await query(database, "SELECT FROM alerts WHERE tries > 0")
            return bool(tried) and await sender() is not None

        async def told(event: str) -> bool:
            return (event, "job-failing", "moon") in hook.told

        await until(was_tried)
        # The instance that sends is killed, and the other one takes over.
        first = await sender()
        (killed,) = (each for each in instances if each.name == first)
        await killed.kill()

        async def is_taken_over() -> bool:
            return await sender() not in {None, first}

        await until(is_taken_over)
        await hook.start()
        await until(partial(told, "raised"))
        dark.unlink()
        await until(partial(told, "recovered"))
    ids = [each["id"] for each in hook.alerts]
    assert len(ids) == len(set(ids))
    secret = PATH.rpartition("/")[2]
    assert secret not in "".join(log.read_text() for log in logs.values())
    rows = await query(database, "SELECT to_jsonb(job_runs)::text AS row FROM job_runs")
    rows += await query(database, "SELECT to_jsonb(job_run_lines)::text AS row FROM job_run_lines")
    rows += await query(database, "SELECT to_jsonb(alerts)::text AS row FROM alerts")
    assert secret not in json.dumps([row["row"] for row in rows])
