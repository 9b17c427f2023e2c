"""Ledgers of many entries, written straight into the database, and a replay of them."""

import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from balance_app.balances.ledger import Selection
from balance_app.balances.model import Entry
from tests.jobs.support import Connection
from tests.processes import unguarded

BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
TICK: Final = timedelta(microseconds=1)
# Times between one entry and the next: many have the same.
STEPS: Final = (*(0 * TICK,) * 4, TICK, 2 * TICK, timedelta(seconds=1), timedelta(days=1))
REFERENCES: Final = (None, None, "rent", "Rent", "rent ", "=1+1", "ß")
COLUMNS: Final = (
    "user_id",
    "version",
    "amount",
    "balance",
    "held",
    "at",
    "key",
    "reference",
    "note",
)

# Every tenth entry has a reference that many have, three have one of their own. The rows lie in the
# table in another order than that of versions, as between the entries of other users.
FILL: Final = """
INSERT INTO entries (user_id, version, amount, balance, at, reference)
SELECT $1, n, 1, n, '2026-01-01Z'::timestamptz + n / 10 * interval '1 s',
       CASE WHEN n IN (1, $2 / 2, $2) THEN 'seldom' WHEN n % 10 = 0 THEN 'often' END
FROM (SELECT number * 7919 % $2 + 1 AS n FROM generate_series(1, $2::bigint) AS number) AS entry
"""


async def add_user(admin: Connection, *, balance: int, version: int) -> int:
    """Insert a user without entries; return the id."""
    sql = "INSERT INTO users (balance, version) VALUES ($1, $2) RETURNING id"
    async with unguarded(admin):
        return int(await admin.fetchval(sql, balance, version))


async def add_ledger(admin: Connection, seed: int, entries: int) -> list[Entry]:
    """Add a user with random entries; return them."""
    source = random.Random(seed)
    amounts = [source.choice((-1, 1, 2, 3)) for _ in range(entries)]
    user_id = await add_user(admin, balance=10 + sum(amounts), version=entries)
    ledger, balance, at = [], 10, BEGIN
    for version, amount in enumerate(amounts, 1):
        balance += amount
        at += source.choice(STEPS)
        reference = source.choice(REFERENCES)
        ledger.append(
            Entry(user_id, version, amount, balance, 0, at, f"key-{version}", reference=reference)
        )
    await admin.copy_records_to_table(
        "entries",
        records=[[getattr(entry, name) for name in COLUMNS] for entry in ledger],
        columns=COLUMNS,
    )
    return ledger


async def fill(admin: Connection, entries: int) -> int:
    """Add a user with very many entries; return the id."""
    user_id = await add_user(admin, balance=entries, version=entries)
    await admin.execute(FILL, user_id, entries, timeout=120)
    return user_id


def replay(ledger: Iterable[Entry], at: datetime) -> Entry | None:
    """Return the last entry up to a time."""
    last = None
    for entry in ledger:
        if entry.at <= at:
            last = entry
    return last


def select(
    ledger: Sequence[Entry], selection: Selection, *, descending: bool = False
) -> list[Entry]:
    """Return what a selection includes, in an order."""
    found = [
        entry
        for entry in ledger
        if (selection.begin is None or entry.at >= selection.begin)
        and (selection.end is None or entry.at < selection.end)
        and selection.reference in {None, entry.reference}
    ]
    return found[::-1] if descending else found


def moments(ledger: Sequence[Entry], seed: int, number: int) -> list[datetime]:
    """Return random times: before, between, after the entries, and at an entry's very time."""
    source = random.Random(seed)
    first, last = ledger[0].at, ledger[-1].at
    span = (last - first) / TICK
    return [
        source.choice(
            (
                first + source.uniform(-0.1, 1.1) * span * TICK,
                source.choice(ledger).at + source.choice((-1, 0, 0, 1)) * TICK,
                source.choice((first - TICK, last + TICK, datetime(2999, 1, 1, tzinfo=UTC))),
            )
        )
        for _ in range(number)
    ]
