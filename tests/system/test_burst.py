"""The trial: 10 000 withdrawals of 2 from 10 000, at one moment, over five copies."""

import asyncio
import json
import resource
import sys
from typing import Any

from tests.processes import Copy, running
from tests.system.sizes import size

BURSTS = size(small=2, full=20)


async def test_exactly_half_succeed(database: dict[str, str]) -> None:
    """5000 are accepted, 5000 refused for insufficient funds, 0 is left: every time."""
    async with running([Copy(database, f"app{number}") for number in range(1, 6)]) as copies:
        for _ in range(BURSTS):
            code, report = await fire(copies)
            print(json.dumps(report))
            assert (code, report["verdict"]) == (0, "pass"), report


async def test_without_the_condition_too_many_succeed(database: dict[str, str]) -> None:
    """The control: a copy that reads, decides and then writes fails the same trial."""
    unguarded = ("-m", "tests.unguarded", "condition")
    names = [f"app{number}" for number in range(1, 6)]
    async with running([Copy(database, name, program=unguarded) for name in names]) as copies:
        code, report = await fire(copies)
    assert (code, report["verdict"]) == (1, "fail"), report


async def fire(copies: list[Copy]) -> tuple[int, dict[str, Any]]:
    """Run the load test; return its exit code and report."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or hard > 10_100, "ulimit -n is too low for the burst"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--json"),
        *(copy.url for copy in copies),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out)
