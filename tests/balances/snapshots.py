"""What every snapshot of the accounts must show, whatever goes on meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg

from tests.processes import connect

# The total of the balances, who is below the floor, and whose columns are not what the rows say.
ACCOUNTS = """
SELECT sum(balance)::bigint AS total,
       count(*) FILTER (WHERE balance - held < floor) AS below_the_floor,
       count(*) FILTER (WHERE held <> (
           SELECT coalesce(sum(amount), 0) FROM holds WHERE user_id = id AND state = 'open'
       )) AS held_differs
FROM users
"""
# Entries of transfers whose other half is missing, or is not the opposite.
HALVES = """
SELECT count(*) FROM entries AS own LEFT JOIN entries AS other
    ON other.user_id = own.other_user_id AND other.version = own.other_version
WHERE own.other_user_id IS NOT NULL
  AND (other.amount, other.other_user_id, other.other_version)
      IS DISTINCT FROM (-own.amount, own.user_id, own.version)
"""
# Users whose entries are not dense, or do not add up to the balances in them and in the account.
LEDGERS = """
SELECT count(*) FROM (
    SELECT user_id, version, balance, at, row_number() OVER earlier AS row,
           sum(amount) OVER earlier AS sum, lag(at) OVER earlier AS before
    FROM entries WINDOW earlier AS (PARTITION BY user_id ORDER BY version)
) AS entry
JOIN users ON id = user_id
WHERE entry.version <> row OR entry.balance <> sum OR at < before
   OR entry.version = users.version AND entry.balance <> users.balance
   OR entry.version > users.version
"""
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


@dataclass(slots=True)
class Snapshots:
    """The faults that were found, and how many snapshots were taken."""

    taken: int = 0
    totals: set[int] = field(default_factory=set)
    below_the_floor: int = 0
    held_differs: int = 0
    halves: int = 0

    async def take(self, connection: "asyncpg.Connection[asyncpg.Record]", *, halves: bool) -> None:
        """Take one snapshot; with `halves` compare all entries of transfers too, which is slow."""
        row = await connection.fetchrow(ACCOUNTS)  # one statement: one snapshot
        if halves:
            self.halves += await connection.fetchval(HALVES)
        assert row is not None
        self.taken += 1
        self.totals.add(row["total"])
        self.below_the_floor += row["below_the_floor"]
        self.held_differs += row["held_differs"]

    @property
    def faults(self) -> int:
        """How many there are beside totals."""
        return self.below_the_floor + self.held_differs + self.halves


@asynccontextmanager
async def snapshots(database: dict[str, str], *, pause: float = 0.0) -> AsyncIterator[Snapshots]:
    """Take one snapshot after another; at the end check all ledgers."""
    found = Snapshots()
    stopping = asyncio.Event()

    async def go_on() -> None:
        connection = await connect(database)
        await connection.execute("SET default_transaction_isolation TO 'repeatable read'")
        while not stopping.is_set():
            await found.take(connection, halves=found.taken % 20 == 0)
            await asyncio.sleep(pause)
        await found.take(connection, halves=True)
        found.halves += await connection.fetchval(LEDGERS)
        await connection.close()

    task = asyncio.create_task(go_on())
    try:
        yield found
    finally:
        stopping.set()
        await task
