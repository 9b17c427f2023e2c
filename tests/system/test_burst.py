"""The exercise's burst: 10 000 simultaneous withdrawals of 2 from 10 000, on five instances."""

import asyncio
import json
import resource
import sys
from typing import Any

from tests.processes import Instance, running
from tests.system.sizes import size

BURSTS = size(small=2, full=20)


async def test_exactly_half_succeed(database: dict[str, str], mode: dict[str, str]) -> None:
    """Every time 5000 are accepted, 5000 are refused for insufficient funds, and 0 is left."""
    names = [f"app{number}" for number in range(1, 6)]
    async with running([Instance(database | mode, name) for name in names]) as instances:
        for _ in range(BURSTS):
            code, report = await fire(instances)
            print(json.dumps(report))
            assert (code, report["verdict"]) == (0, "pass"), report


async def test_without_the_condition_too_many_succeed(database: dict[str, str]) -> None:
    """The control: instances that read, decide and then write fail the same burst."""
    mutant = ("-m", "tests.mutants", "condition")
    names = [f"app{number}" for number in range(1, 6)]
    async with running([Instance(database, name, program=mutant) for name in names]) as instances:
        code, report = await fire(instances)
    assert (code, report["verdict"]) == (1, "fail"), report


async def fire(instances: list[Instance]) -> tuple[int, dict[str, Any]]:
    """Run the load test; return its exit code and report."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or hard > 10_100, "ulimit -n is too low for the burst"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--json"),
        *(instance.url for instance in instances),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out)
