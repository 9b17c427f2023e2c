"""PostgreSQL is frozen again and again while all instances stay up: no job stops for good."""

import asyncio
import random
from pathlib import Path
from time import monotonic

import asyncpg

from tests.jobs.fleet import overlaps, read_event_logs
from tests.processes import Instance, connect, running
from tests.system.databases import freeze, own_postgres, thaw
from tests.system.sizes import report_figures, size

INSTANCES = size(small=3, full=5)
JOBS = 4
OUTAGES = size(small=3, full=5)
LONGEST_SECONDS = size(small=6, full=60)
LEASE_SECONDS = size(small=3, full=12) / 2
# From the end of an outage until every job runs again, after a few releases.
BOUND_SECONDS = 30
# As in an earlier version: losses are not refuted, and no takeover is delayed.
MUTANT = {"FLEET_MUTANTS": "outages"}

RUNNING = """
SELECT count(*) = $1 FROM jobs WHERE holder IS NOT NULL AND lease_expires_at > clock_timestamp()
"""
BLAMED = "SELECT max(lost_streak) FROM jobs"
OUTCOMES = """
SELECT coalesce(outcome, 'running') || coalesce(': ' || result, ''), count(*)
FROM job_runs GROUP BY 1 ORDER BY 1
"""


async def test_outages_stop_no_job_for_good(tmp_path: Path) -> None:
    """After each outage all jobs run again without help, and no loss counts against a job."""
    async with own_postgres() as server:
        database = server.environment()
        back: list[str] = []
        async with running(_fleet(database, tmp_path)) as instances:
            await _all_run(database)
            for outage in range(OUTAGES):
                seconds = random.uniform(1, LONGEST_SECONDS) if outage else LONGEST_SECONDS
                await freeze(server)
                await asyncio.sleep(seconds)
                await thaw(server)
                took = await _all_run(database)
                back.append(f"{took:.1f} s after {seconds:.1f} s")
                await asyncio.sleep(random.uniform(0, 2 * LEASE_SECONDS))
            for _ in range(30):  # a starved machine loses leases, too, and refutes the losses
                await asyncio.sleep(LEASE_SECONDS)
                outcomes, blamed = await _history(database)
                if not blamed and not any(each.startswith("lost") for each in outcomes):
                    break
            alive = [each.process.returncode for each in instances if each.process is not None]
    report_figures(f"all {JOBS} jobs ran again {', '.join(back)} of outage; {outcomes}")
    assert overlaps(read_event_logs(tmp_path / "event-logs")) == []
    assert alive == [None] * INSTANCES
    assert blamed == 0
    assert not [each for each in outcomes if each.startswith("lost")]


async def test_without_the_guards_losses_stand(tmp_path: Path) -> None:
    """The control: where losses are not refuted, the same outages count against the jobs."""
    async with own_postgres() as server:
        database = server.environment()
        async with running(_fleet(database, tmp_path, **MUTANT)):
            await _all_run(database)
            for _ in range(OUTAGES):
                await freeze(server)
                await asyncio.sleep(LONGEST_SECONDS)
                await thaw(server)
                await asyncio.sleep(LEASE_SECONDS * 2)
                outcomes, _ = await _history(database)
                if any(each.startswith("lost") for each in outcomes):
                    break
    report_figures(f"{outcomes}")
    assert any(each.startswith("lost") for each in outcomes)


def _fleet(database: dict[str, str], top: Path, **more: str) -> list[Instance]:
    (top / "event-logs").mkdir()
    settings = {
        "FLEET_EVENT_LOGS": str(top / "event-logs"),
        "FLEET_JOBS": str(JOBS),
        "FLEET_SECONDS": "600",
        "JOB_WARM_UP_SECONDS": "1",
        "JOB_LEASE_SECONDS": str(LEASE_SECONDS),
        "JOB_HEARTBEAT_SECONDS": str(LEASE_SECONDS / 3),
        **more,
    }
    program = ("-m", "tests.jobs.fleet")
    return [
        Instance(database, f"app{number}", log=top / "log", program=program, **settings)
        for number in range(1, INSTANCES + 1)
    ]


async def _all_run(database: dict[str, str]) -> float:
    """Wait until all jobs run; return how many seconds it took."""
    since = monotonic()
    connection = await connect(database)
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            while not await connection.fetchval(RUNNING, JOBS):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.1)
    finally:
        await connection.close()
    return monotonic() - since


async def _history(database: dict[str, str]) -> tuple[dict[str, int], int]:
    connection: asyncpg.Connection[asyncpg.Record] = await connect(database)
    outcomes = {row[0]: row[1] for row in await connection.fetch(OUTCOMES)}
    blamed = await connection.fetchval(BLAMED)
    await connection.close()
    return outcomes, blamed
