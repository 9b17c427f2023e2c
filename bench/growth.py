"""What grows, and what a user feels of it: entries, users, instances, jobs, history.

Each state is a database with so much in it, and a number of instances. All states are filled once
(by SQL, with valid hash chains) and measured in alternating rounds; with BENCH_DATA=DIRECTORY the
filled databases are kept there for the next run.
"""

import asyncio
import os
import random
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Final, NamedTuple

import httpx
import psutil

from balance_app.db.migrations import migrate
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.maintenance.audits.ledger import check_ledger
from balance_app.maintenance.verification import ReadOnly
from bench.chain import FILL
from bench.jobs import FILL as FILL_JOBS
from bench.loads import ROUNDS, SCALE
from bench.report import Report, percentile, spread
from bench.servers import READY_SECONDS, postgres_server, scheduled_seconds, settings_of
from tests.processes import Instance, connect, http_client, query

CHANGES: Final = max(10, int(200 * min(1, SCALE)))
CALLS: Final = max(3, int(20 * min(1, SCALE)))
IDLE_SECONDS: Final = max(2, int(30 * min(1, SCALE)))
FILL_SECONDS: Final = 3600
INSTANCES: Final = (1, 5, 20) if SCALE >= 1 else (1, 2)
DEEP: Final = 10_000_000  # the account of many entries: the first of those that are filled
SMALL: Final = 20  # entries of each other account
CREATE: Final = 'CREATE DATABASE "{}"'

# $1 how many: each of the service's jobs has its share
FILL_HISTORY: Final = """
INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome, result)
SELECT name, n / 10, at, at, at + interval '2 min', 'succeeded', 'done'
FROM generate_series(1, $1::bigint) AS n,
     LATERAL (SELECT clock_timestamp() - n * interval '1 s') AS due (at),
     LATERAL (SELECT (array_agg(jobs.name ORDER BY jobs.name))[n % 10 + 1] AS name FROM jobs) AS job
"""


DECLARED: Final = "SELECT count(*) = 10 FROM jobs"  # the service's
NOTHING_DUE: Final = """
UPDATE jobs SET anchor_at = at, due_at = at, ready_at = at
FROM (SELECT clock_timestamp() + interval '1 day') AS tomorrow (at)
"""
TRANSACTIONS: Final = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


class State(NamedTuple):
    """What is there."""

    dimension: str
    size: int
    instances: int = 1
    accounts: int = 0
    deep: int = 0
    jobs: int = 0
    runs: int = 0

    @property
    def database(self) -> str:
        """The name of its database; states that differ in instances alone share one."""
        filled = (self.accounts, self.deep, self.jobs, self.runs)
        return "growth_" + "_".join(map(str, filled))

    def place(self, postgres: EmbeddedPostgres) -> dict[str, str]:
        """Return the variables that lead to its database."""
        return {**postgres.environment(), "DB_NAME": self.database}


def states() -> list[State]:
    """Return all states at the scale of this run."""

    def of(number: int) -> int:
        return int(number * SCALE)

    def entries(number: int) -> State:
        # a tenth of all entries is one account's
        deep = of(number) // 10
        others = (of(number) - deep) // SMALL
        return State("entries", of(number), accounts=others, deep=deep)

    return [
        State("entries", 0),
        entries(1_000_000),
        entries(10_000_000),
        State("users", 1),
        State("users", of(1_000_000), accounts=-of(1_000_000)),
        *(State("instances", number, number) for number in INSTANCES),
        State("jobs", 10),
        State("jobs", of(10_000), jobs=of(10_000)),
        State("runs of history", 0),
        State("runs of history", of(3_000_000), runs=of(3_000_000)),
    ]


async def measure(report: Report) -> None:
    """Measure all states."""
    kept = os.environ.get("BENCH_DATA")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
    data = Path(kept) / "postgres" if kept else None
    all_states = states()
    # States of several dimensions that are the same are measured once.
    measured: dict[tuple[str, int], dict[str, list[float]]] = {}
    found = {
        state: measured.setdefault((state.database, state.instances), {}) for state in all_states
    }
    different = [*{(state.database, state.instances): state for state in all_states}.values()]
    async with postgres_server(data, max_wal_size="8GB") as postgres:
        for state in {each.database: each for each in different}.values():
            await _fill(postgres, state)
        # All states by turns: what the machine does meanwhile is spread over them.
        for _ in range(ROUNDS):
            for state in random.sample(different, len(different)):
                await _observe(postgres, state, found[state])
        for state in all_states:
            if state.dimension == "entries":
                await _audit(postgres, state, found[state])
            if state.dimension == "instances":
                await _idle(postgres, state, found[state])
    _present(report, found)


async def _fill(postgres: EmbeddedPostgres, state: State) -> None:
    place = state.place(postgres)
    there = "SELECT count(*) FROM pg_database WHERE datname = $1"
    if (await query(postgres.environment(), there, state.database))[0][0]:
        return
    # Filled under another name first: what is there under its own is complete.
    unfinished = {**place, "DB_NAME": "filling"}
    await query(postgres.environment(), 'DROP DATABASE IF EXISTS "filling"')
    await query(postgres.environment(), CREATE.format("filling"))
    await migrate(settings_of(unfinished))
    async with _running([Instance(unfinished, JOB_WARM_UP_SECONDS="3600")]):
        while not (await query(unfinished, DECLARED))[0][0]:  # noqa: ASYNC110 - of a database
            await asyncio.sleep(0.1)
    began = perf_counter()
    connection = await connect(unfinished)
    await connection.execute("SET session_replication_role = replica; SET synchronous_commit = off")
    for first, accounts, depth in (
        (DEEP, min(1, state.deep), max(1, state.deep)),
        (DEEP + 1, max(0, state.accounts), SMALL),
        (DEEP + 1, max(0, -state.accounts), 1),
    ):
        if accounts:
            await connection.execute(FILL, accounts, first, depth, timeout=FILL_SECONDS)
    if state.jobs:
        await connection.execute(FILL_JOBS, state.jobs - 10, 36000, timeout=FILL_SECONDS)
    if state.runs:
        await connection.execute(FILL_HISTORY, state.runs, timeout=FILL_SECONDS)
    await connection.execute("VACUUM ANALYZE", timeout=FILL_SECONDS)
    await connection.close()
    rename = f'ALTER DATABASE "filling" RENAME TO "{state.database}"'
    await query(postgres.environment(), rename)
    print(f"    filled {state.database} in {perf_counter() - began:.0f} s", flush=True)


@asynccontextmanager
async def _running(instances: list[Instance]) -> AsyncIterator[None]:
    """Run instances, however long their start takes: many at once on few processors."""
    async with AsyncExitStack() as stack:
        for each in instances:
            await each.launch()
            stack.push_async_callback(each.stop)
        await asyncio.gather(*(each.ready(READY_SECONDS) for each in instances))
        yield


@asynccontextmanager
async def _started(
    postgres: EmbeddedPostgres,
    state: State,
    into: dict[str, list[float]],
    *,
    warm_up_seconds: int = 3600,
) -> AsyncIterator[tuple[dict[str, str], list[Instance]]]:
    """Run the instances of a state; note how long the start took, and their memory."""
    place = state.place(postgres)
    # While they warm up no job runs: each would last two minutes and disturb the rest.
    warm_up = str(warm_up_seconds)
    instances = [
        Instance(place, f"app{number}", JOB_WARM_UP_SECONDS=warm_up, LOG_LEVEL="warning")
        for number in range(state.instances)
    ]
    began = perf_counter()
    async with _running(instances):
        into.setdefault("start-up, s", []).append(perf_counter() - began)
        yield place, instances
        memory = max(psutil.Process(each.pid).memory_info().rss for each in instances) / 1e6
        into.setdefault("memory of an instance, MB", []).append(memory)


async def _observe(postgres: EmbeddedPostgres, state: State, into: dict[str, list[float]]) -> None:
    """Measure what a user of a state feels."""
    async with (
        _started(postgres, state, into) as (_, instances),
        http_client(instances[0].url, timeout=120) as http,
    ):
        opened = await http.post("/api/users", json={"balance": 10**9})
        user = DEEP if state.deep else opened.json()["userId"]
        body = {"userId": user, "amount": 1}
        calls: dict[str, tuple[int, Callable[[], Awaitable[httpx.Response]]]] = {
            "a change, ms": (CHANGES, lambda: http.post("/api/balance", json=body)),
            "first page of a statement, ms": (
                CALLS,
                lambda: http.get(f"/api/users/{user}/entries?limit=100"),
            ),
            "last page of a statement, ms": (
                CALLS,
                lambda: http.get(f"/api/users/{user}/entries?limit=100&order=desc"),
            ),
            "status, ms": (CALLS, lambda: http.get("/api/cron/status")),
            "the page, ms": (CALLS, lambda: http.get("/")),
            "metrics, ms": (CALLS, lambda: http.get("/metrics")),
        }
        print(f"    {state.dimension} {state.size}: {into['start-up, s'][-1]:.1f} s", flush=True)
        for name, (times, call) in calls.items():
            before = _server_seconds(postgres, state)
            taken = await _times(call, times)
            into.setdefault(name, []).append(statistics.median(taken))
            if name == "a change, ms":
                used = _server_seconds(postgres, state) - before
                into.setdefault("a change, 99 %, ms", []).append(percentile(taken, 99))
                into.setdefault("a change, CPU of PostgreSQL, µs", []).append(1e6 * used / times)


def _server_seconds(postgres: EmbeddedPostgres, state: State) -> float:
    """Return the CPU seconds of PostgreSQL's sessions of a state's database."""
    sessions = psutil.Process(postgres.process.pid).children()
    mine = [each for each in sessions if f" {state.database} " in " ".join(each.cmdline())]
    return sum(scheduled_seconds(each.pid) for each in mine)


async def _times(call: Callable[[], Awaitable[httpx.Response]], times: int) -> list[float]:
    """Return milliseconds of calls, one after another; the first two are not counted."""
    taken = []
    for number in range(times + 2):
        began = perf_counter()
        answer = await call()
        if number > 1:
            taken.append((perf_counter() - began) * 1000)
        assert answer.is_success, answer.text
    return taken


async def _audit(postgres: EmbeddedPostgres, state: State, into: dict[str, list[float]]) -> None:
    """Measure the whole check of the ledger."""
    connection = await connect(state.place(postgres))
    await connection.execute("SET enable_seqscan = off; SET jit = off")
    began = perf_counter()
    await check_ledger(ReadOnly(connection, _quiet), folds=False)
    into["audit, s"] = [perf_counter() - began]
    await connection.close()


async def _idle(postgres: EmbeddedPostgres, state: State, into: dict[str, list[float]]) -> None:
    """Measure what idle instances ask of the database, while no job is due."""
    await query(state.place(postgres), NOTHING_DUE)
    async with _started(postgres, state, {}, warm_up_seconds=0) as (place, instances):
        await asyncio.sleep(5)
        processes = [psutil.Process(each.pid) for each in instances]
        connection = await connect(place)
        cpu = sum(sum(each.cpu_times()[:2]) for each in processes)
        before = await connection.fetchval(TRANSACTIONS)
        await asyncio.sleep(IDLE_SECONDS)
        after = await connection.fetchval(TRANSACTIONS)
        used = sum(sum(each.cpu_times()[:2]) for each in processes) - cpu
        await connection.close()
    share = IDLE_SECONDS * len(instances)
    into["idle: transactions/s of an instance"] = [(after - before) / share]
    into["idle: CPU of an instance, %"] = [100 * used / share]


def _quiet(_what: str, _done: int, _total: int | None) -> None:
    """Report nothing."""


def _present(report: Report, found: dict[State, dict[str, list[float]]]) -> None:
    """Add a table and a chart for each dimension."""
    for dimension in dict.fromkeys(state.dimension for state in found):
        steps = {state: each for state, each in found.items() if state.dimension == dimension}
        # what is measured in each of them
        names = [
            name
            for name in next(iter(steps.values()))
            if all(name in each for each in steps.values())
        ]
        report.text(f"**{dimension.capitalize()}**: {', '.join(_size(s.size) for s in steps)}")
        rows = [[name, *(spread(each[name]) for each in steps.values())] for name in names]
        report.table(["", *(_size(state.size) for state in steps)], rows)
        report.chart(
            kind="panels",
            name=f"growth-{dimension.split()[0]}",
            title=f"{dimension.capitalize()} grow: medians",
            panels=[
                {
                    "title": name,
                    "points": [
                        [_size(state.size), statistics.median(each[name])]
                        for state, each in steps.items()
                    ],
                }
                for name in names
            ],
        )
        for number, each in enumerate(steps.values()):
            for name, values in each.items():
                report.add(f"{dimension} {number}: {name}", *values)


def _size(number: int) -> str:
    return f"{number:,}".replace(",", " ")
