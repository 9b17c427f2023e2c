"""Statements of an account with a million entries: `PYTHONPATH=. python bench/statements.py`.

(a) What PostgreSQL takes for pages and past balances of it.
(b) An export of all its entries while clients change it and another account at a steady rate: how
    long it takes, how far the instance's memory grows, and how the changes fare; compared with the
    same load without an export, and with a session that keeps a snapshot as long as an export in
    one transaction would.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import psutil

from balance_app.balances.ledger import LedgerRepository, Selection
from balance_app.db.pool import Database
from balance_app.local.postgres import EmbeddedPostgres
from bench.balances import print_machine, running
from tests.balances.ledgers import BEGIN, fill
from tests.explaining import OneConnection, explaining
from tests.processes import connect

ENTRIES = int(os.environ.get("ENTRIES", "1000000"))
RATE = int(os.environ.get("RATE", "500"))
CONNECTIONS = 50
LOAD_SECONDS = 25
MIB = 2**20


async def main() -> None:
    """Measure everything and print it."""
    with tempfile.TemporaryDirectory(prefix="balance-app-bench-") as top:
        Path(top).chmod(0o711)
        postgres = EmbeddedPostgres(Path(top) / "data", options={"max_connections": "200"})
        await postgres.start()
        try:
            print_machine(Path(top))
            async with running("service", postgres) as server:
                admin = await connect(postgres.environment())
                users = [await fill(admin, ENTRIES), await server.open(0)]
                await admin.execute("VACUUM ANALYZE entries, users")
                await pages(postgres, users[0])
                for kind in ("nothing", "snapshot", "export", "nothing", "snapshot", "export"):
                    await measure(kind, postgres, server.url, server.pid, users)
                await admin.close()
        finally:
            await postgres.stop()


async def pages(postgres: EmbeddedPostgres, user: int) -> None:
    """Print the times of statements by EXPLAIN (ANALYZE)."""
    middle = BEGIN + timedelta(seconds=ENTRIES // 20)
    chosen = {
        "first page": Selection(),
        "last page": Selection(),
        "from a time": Selection(begin=middle),
        "before a time, last first": Selection(end=middle),
        "a frequent reference": Selection(reference="often"),
        "a rare reference, last first": Selection(reference="seldom"),
        "an unknown reference": Selection(reference="none"),
    }
    admin = await connect(postgres.environment())
    print(f"\n(a) an account with {ENTRIES} entries, pages of 100: milliseconds at the server")
    for name, selection in chosen.items():
        async with explaining(admin, "force_generic_plan", "entries") as connection:
            repository = LedgerRepository(cast("Database", OneConnection(connection)))
            await repository.entries(
                user, selection, after=None, limit=101, descending="last" in name
            )
        print(f"    {name:30} {milliseconds(connection.touched):.2f}")
    async with explaining(admin, "force_generic_plan", "entries") as connection:
        repository = LedgerRepository(cast("Database", OneConnection(connection)))
        await repository.past(user, at=middle)
    print(f"    {'a past balance':30} {milliseconds(connection.touched):.2f}\n")
    await admin.close()


def milliseconds(touched: list[tuple[str, int, str]]) -> float:
    """Return what explained statements took together."""
    plans = [json.loads(plan)[0] for _, _, plan in touched]
    return float(sum(plan["Planning Time"] + plan["Execution Time"] for plan in plans))


async def measure(
    kind: str, postgres: EmbeddedPostgres, url: str, pid: int, users: list[int]
) -> None:
    """Send changes at a steady rate, and export or hold a snapshot meanwhile."""
    load = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "load", url, *map(str, users)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    await asyncio.sleep(2)
    said = ""
    if kind == "export":
        said = await export(url, pid, users[0])
    elif kind == "snapshot":
        async with snapshot(postgres):
            await load.wait()
    out, _ = await load.communicate()
    result: dict[str, Any] = json.loads(out)
    print(
        f"(b) {kind:9} {result['rate']:.0f} changes/s, median {result['median']:.1f} ms, "
        f"99 % within {result['high']:.1f} ms, slowest {result['most']:.0f} ms{said}"
    )


@asynccontextmanager
async def snapshot(postgres: EmbeddedPostgres) -> AsyncIterator[None]:
    """Hold a snapshot, as a transaction with a cursor would."""
    session = await connect(postgres.environment())
    async with session.transaction(isolation="repeatable_read", readonly=True):
        await session.fetch("SELECT FROM users LIMIT 1")
        yield
    await session.close()


async def export(url: str, pid: int, user: int) -> str:
    """Export everything as JSON lines; return what came of it."""
    process = psutil.Process(pid)
    before = most = process.memory_info().rss
    used = process.cpu_times().user
    tail, size, began = b"", 0, time.perf_counter()
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
        client.stream(
            "GET", f"{url}/api/users/{user}/entries", headers={"Accept": "application/jsonl"}
        ) as answer,
    ):
        async for piece in answer.aiter_raw():
            tail, size = (tail + piece)[-1000:], size + len(piece)
            most = max(most, process.memory_info().rss)
    took = time.perf_counter() - began
    last = json.loads(tail.splitlines()[-1])
    assert last["complete"], last
    assert last["sum"] == last["balance"], last
    return (
        f"\n    {last['entries']} entries, {size / MIB:.0f} MiB in {took:.1f} s "
        f"({process.cpu_times().user - used:.1f} s of CPU, with the changes); resident memory "
        f"{before / MIB:.1f} MiB before, at most {most / MIB:.1f} MiB; sum = balance = "
        f"{last['sum']}"
    )


async def load(url: str, users: list[int]) -> None:
    """Send changes at a steady rate for a while; print the rate and the times as JSON."""
    where = urlsplit(url)
    times: list[float] = []
    began = asyncio.get_running_loop().time()

    async def send(number: int) -> None:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        body = f'{{"userId":{users[number % len(users)]},"amount":1}}'
        request = (
            "POST /api/balance HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        for turn in range(LOAD_SECONDS * RATE // CONNECTIONS):
            due = began + (turn + number / CONNECTIONS) * CONNECTIONS / RATE
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            # from when it was due: waiting for an earlier answer counts, too
            times.append(asyncio.get_running_loop().time() - due)
        writer.close()

    await asyncio.gather(*map(send, range(CONNECTIONS)))
    took = asyncio.get_running_loop().time() - began
    figures = {
        "rate": len(times) / took,
        "median": statistics.median(times) * 1000,
        "high": statistics.quantiles(times, n=100)[98] * 1000,
        "most": max(times) * 1000,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        asyncio.run(load(sys.argv[2], [int(each) for each in sys.argv[3:]]))
    else:
        asyncio.run(main())
