"""The cost of the key check and the hash chain together: `PYTHONPATH=. python bench/doors.py`.

Two instances of one PostgreSQL, in alternating rounds: `both`, where each request sends a key that
is checked and each change is hashed; and `neither`, with no key and the statement without the hash.
(a) Changes of one account from 100 kept-alive connections. (b) 10 000 requests at one moment.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

from balance_app.db.migrations import migrate
from balance_app.local.postgres import EmbeddedPostgres
from bench.balances import (
    BURST,
    HOT_CONNECTIONS,
    PLENTY,
    ROUNDS,
    Server,
    cpu_of_tree,
    print_machine,
    ratios,
    running,
    spread,
)
from tests.processes import connect

REQUESTS: Final = BURST
LOADS: Final = {
    f"(a) {REQUESTS} changes of one account, {HOT_CONNECTIONS} connections": (
        PLENTY,
        HOT_CONNECTIONS,
    ),
    f"(b) {REQUESTS} requests at one moment": (REQUESTS, REQUESTS),
}
# As accounts are that were opened before there was a chain.
UNCHAIN: Final = """
SET session_replication_role = replica;
UPDATE entries SET hash = NULL WHERE hash IS NOT NULL;
UPDATE users SET hash = NULL WHERE hash IS NOT NULL
"""
KINDS: Final = {"both": "service", "neither": "unchained"}


class Shot(NamedTuple):
    """What one round took, in seconds."""

    wall: Any
    server: Any
    postgres: Any


async def main() -> None:
    """Measure everything and print it."""
    async with AsyncExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="balance-app-bench-")))
        top.chmod(0o711)
        postgres = EmbeddedPostgres(top / "data", options={"max_connections": "200"})
        await postgres.start()
        stack.push_async_callback(postgres.stop)
        print_machine(top)
        connection = await connect(postgres.environment())
        for name in KINDS:
            await connection.execute(f'CREATE DATABASE "{name}"')
        await connection.close()
        await migrate(postgres.settings().model_copy(update={"db_name": "both"}))
        key = await make_key(postgres, "both")
        shots: dict[tuple[str, str], list[Shot]] = {}
        for number in range(ROUNDS + 1):
            # Other processes in each round: some are faster than others, as long as they live.
            async with AsyncExitStack() as instances:
                servers = {
                    name: await instances.enter_async_context(
                        running(kind, postgres, database=name)
                    )
                    for name, kind in KINDS.items()
                }
                servers["both"].key = key
                for title, (balance, connections) in LOADS.items():
                    for name in random.sample([*servers], len(servers)):
                        shot = await measure(servers[name], postgres, balance, connections)
                        if number:  # the first round warms up
                            shots.setdefault((title, name), []).append(shot)
        for title in LOADS:
            print(title)
            print_shots({name: shots[title, name] for name in KINDS})


async def make_key(postgres: EmbeddedPostgres, database: str) -> str:
    """Make the first key of a database,."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", "keys", "create", "bench"),
        *("--scope", "change", "--scope", "open"),
        env={**os.environ, **postgres.environment(), "DB_NAME": database},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await process.communicate()
    return out.decode().strip()


def print_shots(shots: dict[str, list[Shot]]) -> None:
    """Print what each took, and the ratios, round by round."""
    columns = {name: Shot(*zip(*rows, strict=True)) for name, rows in shots.items()}
    for what in Shot._fields:
        each = {name: getattr(column, what) for name, column in columns.items()}
        said = ", ".join(f"{name} {spread(values, '{:.2f}')}" for name, values in each.items())
        both, neither = each.values()
        medians = statistics.median(both) / statistics.median(neither)
        print(f"    {what:8} {said}; of medians {medians:.3f}, of rounds ", end="")
        print(spread(ratios(both, neither), "{:.3f}"))


async def measure(
    server: Server, postgres: EmbeddedPostgres, balance: int, connections: int
) -> Shot:
    """Send all requests to one server, for a new account."""
    user = await server.open(balance)
    if server.key is None:
        connection = await connect({**postgres.environment(), "DB_NAME": "neither"})
        await connection.execute(UNCHAIN)
        await connection.close()
    accepted = min(REQUESTS, balance // 2)
    before = server.cpu_seconds(), cpu_of_tree(postgres.process.pid)
    shot = await server.fire(user, REQUESTS, connections)
    after = server.cpu_seconds(), cpu_of_tree(postgres.process.pid)
    right = {"200": accepted, "409": REQUESTS - accepted}
    assert shot["got"] == {status: n for status, n in right.items() if n}, shot["got"]
    return Shot(shot["wall"], *(now - then for now, then in zip(after, before, strict=True)))


if __name__ == "__main__":
    asyncio.run(main())
