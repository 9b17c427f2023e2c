"""How far one server goes, and the first steps past it.

(a) Changes per second by the statement of the service (pgbench, no HTTP): of one account, and of
    many, by few and by many connections.
(b) `entries` partitioned by user, with the commands of docs/scaling.md: the time it takes, changes
    per second before and after, and a page of a ledger.
(c) A streaming standby: what an instance on it answers, and the audit there. Then that standby as a
    logical subscriber whose instance may only read: what it answers, and how late it is.
"""

import asyncio
import os
import shutil
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final

import httpx

from balance_app.db.migrations import migrate
from balance_app.local.postgres import SYSTEM_USER
from bench.loads import ROUNDS, scaled
from bench.report import Report, spread
from bench.servers import OPEN, pgbench, settings_of
from drills.documented import Commands, run
from drills.restore import Server
from tests.processes import (
    RUN_ROLE,
    Instance,
    as_instance,
    connect,
    empty_database,
    http_client,
    query,
)

ACCOUNTS: Final = 10_000
QUIET: Final = ACCOUNTS + 2  # the first of a thousand more
ENTRIES: Final = scaled(1_000_000, 1000)
CLIENTS: Final = (1, 4, 16, 64)
OPTIONS: Final = {"wal_level": "logical"}
PAGE: Final = Path(__file__).parents[1] / "docs" / "scaling.md"
JOBS: Final = 10  # of the service
BALANCE: Final = 10**9

# Entries of users whom nobody changes meanwhile.
#
# $1 how many, $2 the first of a thousand users
FILL: Final = """
INSERT INTO entries (user_id, version, amount, balance)
SELECT $2::bigint + n % 1000, 2 + n / 1000, 1, 1 FROM generate_series(0, $1::bigint - 1) AS n
"""
A_PAGE: Final = """
SELECT * FROM entries WHERE user_id = $1 AND version > 500 ORDER BY version LIMIT 101
"""


async def measure(report: Report) -> None:
    """Measure everything."""
    with tempfile.TemporaryDirectory(prefix="balance-app-bench-") as top:
        Path(top).chmod(0o711)
        (Path(top) / "first").mkdir()
        server = Server(Path(top) / "first" / "data", options=OPTIONS)
        await server.start()
        try:
            for part in (accounts, partitions, replica):
                async with empty_database(server.environment()) as database:
                    await part(report, server, database)
        finally:
            await server.stop()


async def accounts(report: Report, server: Server, database: dict[str, str]) -> None:
    """Measure (a)."""
    await _open(database)
    report.line(f"(a) changes per second at the server, of one account and of {ACCOUNTS}")
    for many in (1, ACCOUNTS):
        for clients in CLIENTS:
            rates = [await change_rate(server, database, many, clients) for _ in range(ROUNDS)]
            report.line(
                f"    {many:6} accounts, {clients:2} connections: {spread(rates, '{:6.0f}')}"
            )


async def partitions(report: Report, server: Server, database: dict[str, str]) -> None:
    """Measure (b)."""
    await _open(database)
    connection = await connect(database)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(FILL, ENTRIES, QUIET)
    await connection.execute("RESET session_replication_role")
    await connection.execute("VACUUM ANALYZE entries")
    rates: dict[str, list[float]] = {"whole": [], "partitioned": []}
    pages: dict[str, float] = {}
    for name, measured in rates.items():
        if name == "partitioned":
            began = monotonic()
            await connection.execute(Commands(PAGE).text("partitions", {}))
            seconds = monotonic() - began
            await connection.execute("ANALYZE entries")
        measured += [await change_rate(server, database, ACCOUNTS, 16) for _ in range(ROUNDS)]
        pages[name] = await _milliseconds(connection)
    await connection.close()
    report.line(f"(b) `entries` with {ENTRIES} rows, partitioned in {seconds:.1f} s")
    for name, measured in rates.items():
        report.line(
            f"    {name:12} {spread(measured, '{:6.0f}')} changes/s, a page {pages[name]:.2f} ms"
        )
    async with empty_database(server.environment()) as other:
        report.line(f"    the service on it: {await _serve_partitioned(server, other)}")


async def _serve_partitioned(server: Server, database: dict[str, str]) -> str:
    """Run an instance on partitioned entries; return what was done, and what the audit says."""
    await migrate(settings_of(database))
    connection = await connect(database)
    await connection.execute(Commands(PAGE).text("partitions", {}))
    await connection.close()
    one = Instance(database, JOB_MIN_SECONDS="0", JOB_WARM_UP_SECONDS="0")
    async with one as instance, http_client(instance.url) as http:
        users = [await _new_user(http) for _ in range(20)]
        statuses = set()
        for user, other in zip(users, [*users[1:], users[0]], strict=True):
            for path, body in (
                ("balance", {"userId": user, "amount": -7}),
                ("transfers", {"fromUserId": user, "toUserId": other, "amount": 5}),
                ("holds", {"userId": user, "amount": 3, "expiresInSeconds": 60}),
                (f"users/{user}/entries/2/reverse", {}),
            ):
                statuses.add((await http.post(f"/api/{path}", json=body)).status_code)
            page = await http.get(f"/api/users/{user}/entries")
            statuses.add(page.status_code)
            assert page.json()["entries"][0]["version"] == 1, page.text
        await _each_job_succeeds(database)
    refused = []
    for sql in ("UPDATE entries SET amount = 1", "DELETE FROM entries_3", "TRUNCATE entries_5"):
        try:
            await query(database, sql)
        except Exception as error:  # noqa: BLE001 - it is shown
            refused.append(type(error).__name__)
    found = await run("balance-app audit", _shell(server, database))
    return (
        f"statuses {sorted(statuses)}, ten jobs succeeded, {len(refused)} of 3 rewrites refused, "
        f"audit: {found.output.splitlines()[0]}"
    )


async def _each_job_succeeds(database: dict[str, str]) -> None:
    outcomes = "SELECT count(*) FROM jobs WHERE last_outcome = 'succeeded'"
    async with asyncio.timeout(120):
        while (await query(database, outcomes))[0][0] < JOBS:  # noqa: ASYNC110 - of a database
            await asyncio.sleep(0.5)


async def replica(report: Report, server: Server, database: dict[str, str]) -> None:
    """Measure (c)."""
    await migrate(settings_of(database))
    second = server.data.parents[1] / "second"
    second.mkdir()
    if os.geteuid() == 0:
        shutil.chown(second, SYSTEM_USER, SYSTEM_USER)
    standby = Server(second / "data", options=OPTIONS)
    places: dict[str, Path | str] = {
        "/var/lib/postgresql/replica": standby.data,
        "balances": database["DB_NAME"],
    }
    environment = {
        "PGHOST": str(server.socket_directory),
        "PGUSER": "postgres",
        "REPLICA": str(standby.socket_directory),
    }
    commands = Commands(PAGE)
    await commands.expect("standby", places, environment)
    await standby.start()
    there = {**standby.environment(), "DB_NAME": database["DB_NAME"]}
    try:
        report.line("\n(c) a streaming standby")
        await _on_standby(report, standby, there)
        await standby.stop()
        await commands.expect("subscriber", places, environment)
        await standby.start()
        report.line("    the same as a logical subscriber")
        await _on_subscriber(report, database, there)
    finally:
        await standby.stop()


async def _on_standby(report: Report, standby: Server, there: dict[str, str]) -> None:
    found = await run("balance-app audit", _shell(standby, there))
    report.line(f"    balance-app audit: {found.output.splitlines()[0]}")
    instance = Instance(there, "standby", JOBS_ENABLED="false")
    await instance.launch()
    try:
        async with http_client(instance.url) as http:
            answer = None
            while answer is None:
                with suppress(httpx.TransportError):
                    answer = await http.get("/api/users/1")
                await asyncio.sleep(0.1)
        report.line(
            f"    an instance: GET /api/users/1: {answer.status_code} {answer.json()['detail']}"
        )
    finally:
        await instance.stop()


async def _on_subscriber(report: Report, database: dict[str, str], there: dict[str, str]) -> None:
    role = {**there, "DB_NAME": "postgres"}
    await query(role, f"ALTER ROLE {RUN_ROLE} SET default_transaction_read_only = on")
    reader = {name: value for name, value in as_instance(there).items() if name in there}
    async with (
        Instance(database, "writer") as writer,
        Instance(reader, "reader", JOBS_ENABLED="false") as reading,
        http_client(writer.url) as at_writer,
        http_client(reading.url) as at_reader,
    ):
        delays = []
        for _ in range(100):
            change = {"userId": 1, "amount": -1}
            done = await at_writer.post("/api/balance", json=change)
            version, began = done.raise_for_status().json()["version"], monotonic()
            seen = 0
            while seen < version:
                seen = (await at_reader.get("/api/users/1")).json()["version"]
            delays.append(1000 * (monotonic() - began))
        report.line(f"    a change is there after {spread(delays, '{:.1f}')} ms")
        paths = ("/api/users/1/entries", "/api/users/1?version=7", "/api/users", "/users/1", "/")
        found = [f"{path} {(await at_reader.get(path)).status_code}" for path in paths]
        refused = await at_reader.post("/api/balance", json={"userId": 1, "amount": -1})
        report.line(f"    reads: {', '.join(found)}")
        report.line(f"    a change: {refused.status_code} {refused.json()['detail']}")


async def _open(database: dict[str, str]) -> None:
    await migrate(settings_of(database))
    await query(database, OPEN, BALANCE, ACCOUNTS + 1000)
    await query(database, "ANALYZE")


async def _new_user(http: httpx.AsyncClient) -> int:
    answer = await http.post("/api/users", json={"balance": 1000})
    return int(answer.raise_for_status().json()["userId"])


def _shell(server: Server, database: dict[str, str]) -> dict[str, str]:
    url = f"postgresql://postgres@/{database['DB_NAME']}?host={server.socket_directory}&port=5432"
    return {"DATABASE_URL": url}


async def _milliseconds(connection: Any) -> float:  # noqa: ANN401 - of asyncpg
    times = []
    for _ in range(20):
        began = monotonic()
        await connection.fetch(A_PAGE, QUIET)
        times.append(1000 * (monotonic() - began))
    return statistics.median(times)


async def change_rate(
    server: Server, database: dict[str, str], accounts: int, clients: int
) -> float:
    """Return how many changes of accounts drawn by chance pgbench makes a second."""
    return await pgbench(
        server.socket_directory,
        clients,
        ":account",
        database=database["DB_NAME"],
        setup=f"\\set account random(2, {accounts + 1})\n",
    )
