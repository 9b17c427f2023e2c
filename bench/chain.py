"""The cost of the hash chain: `PYTHONPATH=. python bench/chain.py`.

(a) The hash alone, in SQL and in Python.
(b) A change by the statement of the service, and by that without the hash, in alternating rounds on
    one connection; once with commits that wait for the disk, once without. With the bytes of WAL
    per change, and of an entry.
(c) How fast a ledger is checked: by the statements of `audit-ledger`, and by `balance-app audit`.
(d) The bytes that a seal keeps of each head.
"""

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncpg
import psutil

from balance_app.balances.chain import entry_hash
from balance_app.balances.repository import CHANGE
from balance_app.db.migrations import migrate
from balance_app.http.body import MAX_INTEGER
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.maintenance import seals
from balance_app.maintenance.audits.ledger import check_ledger
from balance_app.maintenance.verification import ReadOnly, Verification
from balance_app.settings import load_settings
from bench.balances import print_machine
from bench.stand_ins import unchained
from tests.processes import connect

Connection: TypeAlias = "asyncpg.Connection[Any]"

CHANGES: Final = int(os.environ.get("CHANGES", "4000"))
ROUNDS: Final = int(os.environ.get("ROUNDS", "9"))
ENTRIES: Final = int(os.environ.get("ENTRIES", "200000"))

HASHES: Final = """
SELECT count({}) FROM (
    SELECT n, entry_hash('\\x{}'::bytea, n, n, n, n, 0, now(), 'key', 'till-1', NULL,
                         NULL, NULL, NULL, 'reference', NULL) AS hash
    FROM generate_series(1, $1::bigint) AS n OFFSET 0
) AS each
"""

OPEN: Final = """
WITH opened AS (
    INSERT INTO users (balance, version, hash) VALUES (1000000, 1, $1) RETURNING id
)
INSERT INTO entries (user_id, version, amount, balance, hash)
SELECT id, 1, 1000000, 1000000, $1 FROM opened RETURNING user_id
"""

# Many ledgers of 20 entries, with their chains.
FILL: Final = """
WITH RECURSIVE entry AS (
    SELECT id, 1::bigint AS version, at, entry_hash(
        '', id, 1, 5, 5, 0, at, NULL, 'till-1', NULL, NULL, NULL, NULL, NULL, NULL) AS hash
    FROM generate_series(10, 10 + $1::bigint / 20 - 1) AS id, clock_timestamp() AS at
    UNION ALL
    SELECT id, version + 1, at, entry_hash(
        hash, id, version + 1, 5, 5 * (version + 1), 0, at, NULL, 'till-1', NULL, NULL, NULL, NULL,
        NULL, NULL)
    FROM entry WHERE version < 20
), account AS (
    INSERT INTO users (id, balance, version, hash)
    SELECT id, 100, 20, hash FROM entry WHERE version = 20
)
INSERT INTO entries (user_id, version, amount, balance, at, by, hash)
SELECT id, version, 5, 5 * version, at, 'till-1', hash FROM entry ORDER BY version, id
"""


async def main() -> None:
    """Measure everything and print it."""
    with tempfile.TemporaryDirectory(prefix="balance-app-bench-") as top:
        Path(top).chmod(0o711)
        postgres = EmbeddedPostgres(Path(top) / "data", options={"full_page_writes": "off"})
        await postgres.start()
        try:
            print_machine(Path(top))
            variables = postgres.environment()
            await migrate(load_settings(**{name.lower(): v for name, v in variables.items()}))
            connection = await connect(variables)
            # as the sessions of the service: `settings.statement_arguments`
            await connection.execute("SET enable_seqscan = off; SET jit = off")
            await hashes(connection)
            for waits in (True, False):
                await changes(connection, waits=waits)
            await checks(connection)
            await connection.close()
        finally:
            await postgres.stop()


async def hashes(connection: Connection) -> None:
    """Print what a hash takes, without what the rows around it take."""
    number, sql, python = 200_000, [], []
    row = {
        **dict.fromkeys(("user_id", "version", "amount", "balance", "held"), 12345),
        **dict.fromkeys(("other_user_id", "other_version", "reverses", "hold", "note")),
        "at": 800_000_000_000_000,
        **{name: name for name in ("key", "by", "reference")},
    }
    for _ in range(ROUNDS):
        took = []
        for what in ("n", "hash"):
            before = await cpu_seconds(connection)
            await connection.fetchval(HASHES.format(what, "ab" * 32), number, timeout=120)
            took.append(await cpu_seconds(connection) - before)
        sql.append((took[1] - took[0]) / number * 1e6)
        begin, hashed = time.process_time(), b""
        for _ in range(number // 10):
            hashed = entry_hash(hashed, row)
        python.append((time.process_time() - begin) / number * 1e7)
    print(f"\n(a) a hash, µs of CPU: in SQL {_middle(sql)}, in Python {_middle(python)}")


async def cpu_seconds(connection: Connection) -> float:
    """Return the CPU time that the server's process of a connection has used."""
    times = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()")).cpu_times()
    return float(times.user + times.system)


async def changes(connection: Connection, *, waits: bool) -> None:
    """Print what changes of an account take, by both statements."""
    await connection.execute(f"SET synchronous_commit = {'on' if waits else 'off'}")
    accounts = {
        hashed: await connection.fetchval(OPEN, bytes(32) if hashed else None)
        for hashed in (True, False)
    }
    cpu: dict[bool, list[float]] = {True: [], False: []}
    wal: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * ROUNDS):
        hashed = bool(number % 2)
        statement = await connection.prepare(CHANGE if hashed else unchained())
        begin = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
        before = await cpu_seconds(connection)
        for _ in range(CHANGES):
            await statement.fetch(
                accounts[hashed], -1, MAX_INTEGER, None, None, None, None, "till-1"
            )
        cpu[hashed].append((await cpu_seconds(connection) - before) / CHANGES * 1e6)
        since = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1)::float8"
        wal[hashed].append(await connection.fetchval(since, begin) / CHANGES)
    kind = "waits for the disk" if waits else "does not wait for the disk"
    print(f"(b) a change on one connection, whose commit {kind}")
    for hashed in (False, True):
        size = await connection.fetchval(
            "SELECT avg(pg_column_size(entries)) FROM entries WHERE user_id = $1 AND version > 1",
            accounts[hashed],
        )
        print(
            f"    {'with' if hashed else 'without'} a hash: {_middle(cpu[hashed])} µs of the "
            f"server's CPU, WAL {_middle(wal[hashed])} bytes, an entry has {size:.0f} bytes"
        )
    pairs = zip(cpu[True], cpu[False], strict=True)
    print(f"    with / without, CPU: {_middle([one / other for one, other in pairs])}")


async def checks(connection: Connection) -> None:
    """Print how fast ledgers are checked, and how large a seal is."""
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("DELETE FROM entries; DELETE FROM users")
    await connection.execute("SET session_replication_role = origin")
    await connection.execute(FILL, ENTRIES, timeout=300)
    await connection.execute("VACUUM ANALYZE entries, users")
    by_job, alone = [], []
    for _ in range(3):
        begin = time.perf_counter()
        await check_ledger(ReadOnly(connection, _quiet), folds=False)
        by_job.append((time.perf_counter() - begin) / ENTRIES * 1e6)
    rows = await connection.fetch("SELECT id, version, hash FROM users ORDER BY id")
    heads = [[row[name] for row in rows[:1000]] for name in ("id", "version", "hash")]
    await seals.add_part(connection, *heads)
    await seals.seal(connection)
    verification = Verification(connection, _quiet)
    begin = time.perf_counter()
    await verification.check_ledgers()
    alone.append((time.perf_counter() - begin) / ENTRIES * 1e6)
    assert not verification.checked.faults
    size = await connection.fetchval("SELECT max(pg_column_size(seal_parts)) FROM seal_parts")
    print(f"(c) µs per entry: audit-ledger {_middle(by_job)}, the chain alone {_middle(alone)}")
    print(f"(d) a part of a seal with 1000 heads: {size} bytes")


def _quiet(_what: str, _done: int, _total: int | None) -> None:
    """Report nothing."""


def _middle(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.4g} ({low:.4g} to {high:.4g})"


if __name__ == "__main__":
    asyncio.run(main())
