"""PostgreSQL's clock steps ahead while an instance can't renew its leases."""

import asyncio
from pathlib import Path

from tests.jobs.fleet import overlaps, read_event_logs
from tests.jobs.proxy import Proxy
from tests.processes import Instance, connect, empty_database, running
from tests.system.sizes import report_figures

LEASE_SECONDS = 4.5
STEP_SECONDS = 1.5
ATTEMPTS = 3

# For a lease, a clock that steps ahead is the same as an earlier end of the lease.
STEP = """
UPDATE jobs SET lease_expires_at = lease_expires_at - $1::float8 * interval '1 s'
WHERE server = 'app1'
"""


async def _step(postgres: dict[str, str], event_logs: Path, reserve: float) -> tuple[int, int]:
    """Cut an instance off, then step the clock; return how many runs moved and overlapped."""
    event_logs.mkdir()
    env = {
        "FLEET_EVENT_LOGS": str(event_logs),
        "FLEET_JOBS": "4",
        "FLEET_KIND": "quiet",
        "FLEET_SECONDS": "60",
        "JOB_LEASE_SECONDS": str(LEASE_SECONDS),
        "JOB_HEARTBEAT_SECONDS": "0.5",
        "JOB_CLOCK_RESERVE_SECONDS": str(reserve),
        "JOB_WARM_UP_SECONDS": "1",
    }
    program = ("-m", "tests.jobs.fleet")
    async with empty_database(postgres) as database, Proxy(database) as proxy:
        instances = [
            Instance(proxy.environment(), "app1", log=None, program=program, **env),
            Instance(database, "app2", log=None, program=program, **env),
        ]
        connection = await connect(database)
        async with running(instances):
            async with asyncio.timeout(60):
                while len(read_event_logs(event_logs)) < 4:  # noqa: ASYNC110 - of other processes
                    await asyncio.sleep(0.05)
            proxy.freeze()
            await asyncio.sleep(0.2)  # messages under way have arrived, or never will
            moved = await connection.execute(STEP, STEP_SECONDS)
            await asyncio.sleep(LEASE_SECONDS + 1)
            spans = read_event_logs(event_logs)
        await connection.close()
    taken = {span.job for span in spans if span.server == "app2" and span.fence > 1}
    assert len(taken) == int(moved.split()[-1])
    return len(taken), len(overlaps(spans))


async def test_a_step_as_large_as_the_reserve_is_survived(
    postgres: dict[str, str], tmp_path: Path
) -> None:
    """Runs end before others take their jobs; the control without a reserve overlaps."""
    reserved, control = (0, 0), (0, 0)
    for attempt in range(ATTEMPTS):
        reserved, control = await asyncio.gather(
            _step(postgres, tmp_path / f"{attempt}-1", STEP_SECONDS),
            _step(postgres, tmp_path / f"{attempt}-2", 0),
        )
        if reserved[0] and control[0]:
            break  # else app1, which was cut off, had no job to lose
    report_figures(
        f"moved and overlapping after a step of {STEP_SECONDS} s: {reserved}, control {control}"
    )
    assert reserved[0] > 0
    assert reserved[1] == 0
    assert control[1] > 0
