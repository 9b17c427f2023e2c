"""Statements of an account with a million entries.

(a) What PostgreSQL takes for pages and past balances of it.
(b) An export of all its entries while clients change it at a steady rate: how long it takes, how
    far the instance's memory grows, and how the changes fare; compared with the same load without
    an export, and with a session that keeps a snapshot as long as an export in one transaction
    would.
"""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import httpx

from balance_app.balances.ledger import LedgerRepository, Selection
from balance_app.db.pool import Database
from bench.fire import Volley
from bench.loads import SCALE, scaled
from bench.report import Report, percentile
from bench.servers import MIB, Server, postgres_server, running
from tests.balances.ledgers import BEGIN, fill
from tests.explaining import OneConnection, explaining
from tests.processes import connect

ENTRIES = scaled(1_000_000)
RATE = 500
CONNECTIONS = 50
LOAD_SECONDS = max(4, int(25 * min(1, SCALE)))


async def measure(report: Report) -> None:
    """Measure everything."""
    async with postgres_server() as postgres, running("service", postgres) as server:
        admin = await connect(server.database)
        user = await fill(admin, ENTRIES)
        await admin.execute("VACUUM ANALYZE entries, users")
        await pages(report, admin, user)
        for kind in ("nothing", "snapshot", "export", "nothing", "snapshot", "export"):
            await beside_changes(report, kind, server, user)
        await admin.close()


async def pages(report: Report, admin: Any, user: int) -> None:  # noqa: ANN401 - of asyncpg
    """Report the times of statements by EXPLAIN (ANALYZE)."""
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
    report.line(f"(a) an account with {ENTRIES} entries, pages of 100: milliseconds at the server")
    for name, selection in chosen.items():
        async with explaining(admin, "force_generic_plan", "entries") as connection:
            repository = LedgerRepository(cast("Database", OneConnection(connection)))
            await repository.entries(
                user, selection, after=None, limit=101, descending="last" in name
            )
        report.line(f"    {name:30} {milliseconds(connection.touched):.2f}")
    async with explaining(admin, "force_generic_plan", "entries") as connection:
        repository = LedgerRepository(cast("Database", OneConnection(connection)))
        await repository.past(user, at=middle)
    report.line(f"    {'a past balance':30} {milliseconds(connection.touched):.2f}")


def milliseconds(touched: list[tuple[str, int, str]]) -> float:
    """Return what explained statements took together."""
    plans = [json.loads(plan)[0] for _, _, plan in touched]
    return float(sum(plan["Planning Time"] + plan["Execution Time"] for plan in plans))


async def beside_changes(report: Report, kind: str, server: Server, user: int) -> None:
    """Send changes at a steady rate, and export or hold a snapshot meanwhile."""
    # of the account that is exported
    changes = Volley(server.urls, user, 1, RATE * LOAD_SECONDS, CONNECTIONS, 1, RATE)
    load = asyncio.create_task(server.fire(changes))
    await asyncio.sleep(2)
    said = ""
    if kind == "export":
        said = await export(server, user)
    elif kind == "snapshot":
        async with snapshot(server.database):
            await asyncio.wait([load])
    fired = await load
    took = [1000 * seconds for seconds in fired["latencies"]]
    assert fired["got"].keys() == {"200"}, fired["got"]
    report.line(
        f"(b) {kind:9} {len(took) / fired['wall']:.0f} changes/s, median "
        f"{statistics.median(took):.1f} ms, 99 % within {percentile(took, 99):.1f} ms, "
        f"slowest {max(took):.0f} ms"
    )
    if said:
        report.line(f"    {said}")


@asynccontextmanager
async def snapshot(database: dict[str, str]) -> AsyncIterator[None]:
    """Hold a snapshot, as a transaction with a cursor would."""
    session = await connect(database)
    async with session.transaction(isolation="repeatable_read", readonly=True):
        await session.fetch("SELECT FROM users LIMIT 1")
        yield
    await session.close()


async def export(server: Server, user: int) -> str:
    """Export everything as JSON lines; return what came of it."""
    (process,) = server.processes
    before = most = process.memory_info().rss
    used = process.cpu_times().user
    tail, size, began = b"", 0, time.perf_counter()
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
        client.stream(
            "GET", f"{server.url}/api/users/{user}/entries", headers={"Accept": "application/jsonl"}
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
        f"{last['entries']} entries, {size / MIB:.0f} MiB in {took:.1f} s "
        f"({process.cpu_times().user - used:.1f} s of CPU, with the changes); resident memory "
        f"{before / MIB:.1f} MiB before, at most {most / MIB:.1f} MiB; sum = balance = "
        f"{last['sum']}"
    )
