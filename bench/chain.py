"""The cost of the hash chain.

(a) The hash alone, in SQL and in Python.
(b) A change by the statement of the service, and by that without the hash, in alternating rounds on
    one connection; once with commits that wait for the disk, once without. With the bytes of WAL
    per change, and of an entry.
(c) How fast a ledger is checked: by the statements of `audit-ledger`, and by `balance-app audit`.
(d) The bytes that a seal keeps of each head.
"""

import time
from typing import Any, Final, TypeAlias

import asyncpg

from balance_app.balances.chain import entry_hash
from balance_app.balances.model import Movement
from balance_app.balances.repository import CHANGE
from balance_app.http.body import MAX_INTEGER
from balance_app.maintenance import seals
from balance_app.maintenance.audits.ledger import check_ledger
from balance_app.maintenance.verification import ReadOnly, Verification
from bench.loads import ROUNDS, scaled
from bench.report import Report, spread
from bench.servers import postgres_server, scheduled_seconds
from bench.stand_ins import unchained
from tests.processes import connect

Connection: TypeAlias = "asyncpg.Connection[Any]"

CHANGES: Final = scaled(4000)
HASHED: Final = scaled(200_000)
ENTRIES: Final = scaled(200_000)
DEPTH: Final = 20

HASHES: Final = """
SELECT count({}) FROM (
    SELECT n, chain_hash('\\x{}'::bytea, entry_content(
                  n, n, 'key', 'till-1', NULL, NULL, NULL, NULL, 'reference', NULL
              ), n, n, 0, now()) AS hash
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

# Ledgers, with their chains.
#
# $1 how many, $2 the id of the first one, $3 entries of each
FILL: Final = """
WITH RECURSIVE entry AS (
    SELECT id, 1::bigint AS version, at, chain_hash('', entry_content(
        id, 5, NULL, 'till-1', NULL, NULL, NULL, NULL, NULL, NULL), 1, 5, 0, at) AS hash
    FROM generate_series($2::bigint, $2 + $1::bigint - 1) AS id, clock_timestamp() AS at
    UNION ALL
    SELECT id, version + 1, at, chain_hash(hash, entry_content(
        id, 5, NULL, 'till-1', NULL, NULL, NULL, NULL, NULL, NULL
    ), version + 1, 5 * (version + 1), 0, at)
    FROM entry WHERE version < $3::bigint
), account AS (
    INSERT INTO users (id, balance, version, hash)
    SELECT id, 5 * $3, $3, hash FROM entry WHERE version = $3
)
INSERT INTO entries (user_id, version, amount, balance, at, by, hash)
SELECT id, version, 5, 5 * version, at, 'till-1', hash FROM entry ORDER BY version, id
"""


async def measure(report: Report) -> None:
    """Measure everything."""
    async with postgres_server(full_page_writes="off") as postgres:
        connection = await connect({**postgres.environment(), "DB_NAME": "service"})
        # as the sessions of the service: `settings.statement_arguments`
        await connection.execute("SET enable_seqscan = off; SET jit = off")
        await hashes(report, connection)
        for waits in (True, False):
            await changes(report, connection, waits=waits)
        await checks(report, connection)
        await connection.close()


async def hashes(report: Report, connection: Connection) -> None:
    """Report what a hash takes, without what the rows around it take."""
    number, sql, python = HASHED, [], []
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
    report.line(f"(a) a hash, µs of CPU: in SQL {spread(sql)}, in Python {spread(python)}")


async def cpu_seconds(connection: Connection) -> float:
    """Return the CPU time that the server's process of a connection has used."""
    return scheduled_seconds(await connection.fetchval("SELECT pg_backend_pid()"))


async def changes(report: Report, connection: Connection, *, waits: bool) -> None:
    """Report what changes of an account take, by both statements."""
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
            content = Movement(accounts[hashed], -1, by="till-1").content() if hashed else None
            await statement.fetch(
                accounts[hashed], -1, MAX_INTEGER, None, None, None, None, "till-1", content
            )
        cpu[hashed].append((await cpu_seconds(connection) - before) / CHANGES * 1e6)
        since = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1)::float8"
        wal[hashed].append(await connection.fetchval(since, begin) / CHANGES)
    kind = "waits for the disk" if waits else "does not wait for the disk"
    report.line(f"(b) a change on one connection, whose commit {kind}")
    for hashed in (False, True):
        size = await connection.fetchval(
            "SELECT avg(pg_column_size(entries)) FROM entries WHERE user_id = $1 AND version > 1",
            accounts[hashed],
        )
        report.line(
            f"    {'with' if hashed else 'without'} a hash: {spread(cpu[hashed])} µs of the "
            f"server's CPU, WAL {spread(wal[hashed])} bytes, an entry has {size:.0f} bytes"
        )
    pairs = zip(cpu[True], cpu[False], strict=True)
    report.line(f"    with / without, CPU: {spread([one / other for one, other in pairs])}")


async def checks(report: Report, connection: Connection) -> None:
    """Report how fast ledgers are checked, and how large a seal is."""
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("DELETE FROM entries; DELETE FROM users")
    await connection.execute("SET session_replication_role = origin")
    await connection.execute(FILL, ENTRIES // DEPTH, 10, DEPTH, timeout=300)
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
    report.line(f"(c) µs per entry: audit-ledger {spread(by_job)}, the chain alone {spread(alone)}")
    report.line(f"(d) a part of a seal with 1000 heads: {size} bytes")


def _quiet(_what: str, _done: int, _total: int | None) -> None:
    """Report nothing."""
