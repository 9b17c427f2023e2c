"""The whole check of the stored data at once: chain, seals, and what the jobs audit.

Entries and seals are read, and every hash is computed here, so that nobody who can change the
database's functions can make them agree. It reads in short transactions and writes nothing: a
role that may only read can do it, also on a standby.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg

from balance_app.balances.chain import (
    first_format_hash,
    is_hash,
    moment,
    part_digest,
    seal_digest,
)
from balance_app.db.pool import Connection
from balance_app.maintenance.audits.daily_balances import check_daily_balances
from balance_app.maintenance.audits.faults import LedgerMismatchError
from balance_app.maintenance.audits.keys import check_keys
from balance_app.maintenance.audits.ledger import check_ledger
from balance_app.maintenance.batches import FIRST_ID

ROWS_AT_ONCE: Final = 5000
PARTS_AT_ONCE: Final = 10  # of up to 1000 heads each
MOST_FAULTS: Final = 1000  # that are kept
LAST_ID: Final = 2**63 - 1

# What is checked, how far it is, and of how many.
Report = Callable[[str, int, int | None], None]

ENTRIES_ABOUT: Final = """
SELECT greatest(
    (SELECT count(*) FROM (SELECT FROM entries LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'entries'::regclass)
)::bigint
"""

CHAINED_FROM: Final = "SELECT chained_from FROM balance_app_version"

ACCOUNTS: Final = """
SELECT id, version, balance, hash, created_at FROM users WHERE id >= $1 ORDER BY id LIMIT $2
"""

# $1 and $2 the user and version before, $3 the last user, $4 how many
ENTRIES: Final = """
SELECT user_id, version, amount, balance, held, at, key, by, other_user_id, other_version, reverses,
       hold, reference, note, hash
FROM entries WHERE (user_id, version) > ($1, $2) AND user_id <= $3
ORDER BY user_id, version LIMIT $4
"""

SEALS: Final = """
SELECT number, at, heads, digest FROM seals WHERE number > $1 ORDER BY number LIMIT 1000
"""

# $1 the number of a seal, $2 the part before, $3 how many
PARTS: Final = """
SELECT part, user_ids, versions, digest FROM seal_parts
WHERE seal = $1 AND part > $2 ORDER BY part LIMIT $3
"""

PARTS_BEYOND: Final = "SELECT min(seal) FROM seal_parts WHERE seal > $1"
SEALED_BALANCES: Final = "SELECT EXISTS (SELECT FROM daily_balances WHERE sealed)"

# $1 users, $2 versions
HEADS: Final = """
SELECT head.user_id, head.version, entry.user_id IS NOT NULL AS is_there, hash
FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS head (user_id, version, place)
LEFT JOIN LATERAL (
    SELECT user_id, hash FROM entries
    WHERE user_id = head.user_id AND version = head.version LIMIT 1
) AS entry ON true
ORDER BY place
"""

NEWEST_SEALS: Final = """
SELECT number, at, heads, digest FROM seals WHERE number < $1 ORDER BY number DESC LIMIT $2
"""


class Seal(NamedTuple):
    """A seal: a digest over the ledgers as they were at `at`, and the seal before."""

    number: int
    at: datetime
    # how many ledgers had changed since the seal before
    heads: int
    digest: str


@dataclass
class Checked:
    """What was checked, and what was found."""

    entries: int = 0
    users: int = 0
    # older accounts that have no hash yet
    unhashed: int = 0
    seals: int = 0
    # the last seal, and the one that has the digest of a witness
    last_seal: Seal | None = None
    noted_seal: Seal | None = None
    # the first ones, as sentences, and how many more there are
    faults: list[str] = field(default_factory=list)
    more_faults: int = 0

    def add(self, fault: str) -> None:
        """Add a fault; its sentence is kept if it is one of the first `MOST_FAULTS`."""
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)
        else:
            self.more_faults += 1


@dataclass
class _Ledger:
    """A user's entries as far as they were read."""

    version: int = 0
    balance: int = 0
    at: int | None = None
    # of the last entry, and whether it is stored there
    hash: bytes = b""
    is_stored: bool = False
    fault: str | None = None

    def add(self, entry: Any) -> None:  # noqa: ANN401 - a row
        version, stored = entry["version"], entry["hash"]
        if self.fault is not None:
            pass
        elif version != self.version + 1:
            self.fault = f"entry {self.version + 1} is missing"
        elif entry["balance"] != self.balance + entry["amount"]:
            self.fault = (
                f"entry {version} adds {entry['amount']} to {self.balance} and leaves "
                f"{entry['balance']}"
            )
        elif stored is None and self.is_stored:
            self.fault = f"entry {version} has no hash, but entry {version - 1} has"
        elif stored is not None and not is_hash(stored, self.hash, entry):
            self.fault = f"entry {version} does not match its hash"
        self.version, self.balance = version, entry["balance"]
        self.hash = stored or first_format_hash(self.hash, entry)
        self.is_stored = stored is not None

    def end(self, account: Any, chained_from: int) -> str | None:  # noqa: ANN401 - a row
        """Return the first fault of a user whose entries were all read."""
        if self.fault is not None:
            return self.fault
        if not self.version:
            return "there are no entries"
        if (account["version"], account["balance"]) != (self.version, self.balance):
            return (
                f"the balance is {account['balance']} at version {account['version']}, but entry "
                f"{self.version}, the last, left {self.balance}"
            )
        return self._head_fault(account, chained_from)

    def _head_fault(self, account: Any, chained_from: int) -> str | None:  # noqa: ANN401 - a row
        if account["hash"] is not None:
            if account["hash"] != self.hash:
                return f"the hash of the account is not that of entry {self.version}, the last"
        elif self.is_stored:
            return f"the account has no hash, but entry {self.version} has"
        elif account["created_at"] >= chained_from:
            return "the account has no hash, but was created with one"
        return None


class Verification:
    """One check, on a connection of its own."""

    def __init__(self, connection: "asyncpg.Connection[Any]", report: Report) -> None:
        self._connection = connection
        self._report = report
        self.checked = Checked()

    async def run(self, noted: bytes | None = None) -> Checked:
        """Check everything; `noted` is the digest of a seal that was noted elsewhere."""
        await self.check_ledgers()
        await self._check_seals(noted)
        await self._check_as_jobs()
        return self.checked

    # -- the chain -----------------------------------------------------------------------------

    async def check_ledgers(self) -> None:
        """Check the entries of each user, their hashes, and what the account has of them."""
        await _read_times_as_numbers(self._connection)
        chained_from = await self._connection.fetchval(CHAINED_FROM)
        total = await self._connection.fetchval(ENTRIES_ABOUT)
        user, version, open_one = FIRST_ID, 0, _Ledger()
        ended = False
        while not ended:
            # Both in one snapshot: a change writes the account and its entry together.
            async with self._connection.transaction(isolation="repeatable_read", readonly=True):
                accounts = await self._connection.fetch(ACCOUNTS, user, ROWS_AT_ONCE)
                ended = len(accounts) < ROWS_AT_ONCE
                last = LAST_ID if ended else accounts[-1]["id"]
                entries = await self._connection.fetch(ENTRIES, user, version, last, ROWS_AT_ONCE)
            ledgers = {user: open_one} if version else {}
            for entry in entries:
                ledgers.setdefault(entry["user_id"], _Ledger()).add(entry)
            cut = entries[-1]["user_id"] if len(entries) == ROWS_AT_ONCE else None
            for account in accounts:
                if cut is None or account["id"] < cut:
                    fault = ledgers.pop(account["id"], _Ledger()).end(account, chained_from)
                    self._end_user(account, fault)
            if cut is not None:
                user, version, open_one, ended = (
                    cut, entries[-1]["version"], ledgers.pop(cut), False
                )  # fmt: skip
            elif not ended:
                user, version = last + 1, 0
            for stray in ledgers:
                self.checked.add(f"user {stray}: there are entries, but no account")
            self.checked.entries += len(entries)
            self._report("entries", self.checked.entries, max(total, self.checked.entries))

    def _end_user(self, account: Any, fault: str | None) -> None:  # noqa: ANN401 - a row
        self.checked.users += 1
        if fault is not None:
            self.checked.add(f"user {account['id']}: {fault}")
        elif account["hash"] is None:
            self.checked.unhashed += 1

    # -- the seals -----------------------------------------------------------------------------

    async def _check_seals(self, noted: bytes | None) -> None:
        digest, number = b"", 0
        add = self.checked.add
        while seals := await self._connection.fetch(SEALS, number):
            for seal in seals:
                number += 1
                if seal["number"] != number:
                    add(f"seal {number} is missing")
                    number = seal["number"]
                digest, heads = await self._check_parts(number, digest)
                computed = seal_digest(digest, number, heads, seal["at"])
                if (computed, heads) != (seal["digest"], seal["heads"]):
                    add(f"seal {number} does not match its digest")
                if computed == noted:
                    self.checked.noted_seal = _seal(seal)
                # Each seal is compared by itself: a fault of one is none of those after it.
                digest = seal["digest"]
                self.checked.last_seal = _seal(seal)
                self.checked.seals += 1
                self._report("seals", self.checked.seals, None)
        # Those of a run that was cut off before it made a seal.
        await self._check_parts(number + 1, digest)
        beyond = await self._connection.fetchval(PARTS_BEYOND, number)
        if beyond is None and not number and await self._connection.fetchval(SEALED_BALANCES):
            add("there are no seals, but balances that were sealed")
        if beyond is not None and beyond > number + 1:
            add(f"seal {number + 1} is missing, but there are parts of seal {beyond}")
        if noted is not None and self.checked.noted_seal is None:
            add(
                f"no seal has the digest {noted.hex()}: what it covers was rewritten, or the seal "
                "was deleted, or it is one of another database"
            )

    async def _check_parts(self, seal: int, digest: bytes) -> tuple[bytes, int]:
        """Return the digest of a seal's last part, from that of the seal before, and its heads."""
        number, expected, total = FIRST_ID, 1, 0
        while parts := await self._connection.fetch(PARTS, seal, number, PARTS_AT_ONCE):
            for part in parts:
                number = part["part"]
                rows = await self._connection.fetch(HEADS, part["user_ids"], part["versions"])
                heads = [(row["user_id"], row["version"], await self._hash_of(row)) for row in rows]
                total += len(heads)
                missing = [(user, version) for user, version, hashed in heads if not hashed]
                for user, version in missing:
                    self.checked.add(
                        f"user {user}: entry {version} is missing, which seal {seal} covers"
                    )
                if number != expected:
                    self.checked.add(f"seal {seal}: part {expected} is missing")
                elif not missing and part_digest(digest, heads) != part["digest"]:
                    self.checked.add(
                        f"seal {seal}: entries that it covers were rewritten: {_named(heads)}"
                    )
                digest, expected = part["digest"], number + 1
        return digest, total

    async def _hash_of(self, head: Any) -> bytes:  # noqa: ANN401 - a row
        """Return the hash of an entry; of one that has none, that up to it; b"": it is missing."""
        if head["hash"] is not None or not head["is_there"]:
            return head["hash"] or b""
        hashed, version = b"", 0
        while version < head["version"]:
            entries = await self._connection.fetch(
                ENTRIES, head["user_id"], version, head["user_id"], ROWS_AT_ONCE
            )
            for entry in entries:
                version = entry["version"]
                if version <= head["version"]:
                    hashed = first_format_hash(hashed, entry)
        return hashed

    # -- what the jobs audit -------------------------------------------------------------------

    async def _check_as_jobs(self) -> None:
        steps = ReadOnly(self._connection, self._report)
        for name, check in (
            ("audit-ledger", check_ledger(steps, folds=False)),
            ("audit-keys", check_keys(steps)),
            ("audit-daily-balances", check_daily_balances(steps)),
        ):
            try:
                await check
            except LedgerMismatchError as error:
                self.checked.add(f"{name}: {error}")


class ReadOnly:
    """The steps of an audit outside of a job's run."""

    resumed = None

    def __init__(self, connection: Connection, report: Report) -> None:
        self._connection = connection
        self._report = report

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Begin one that writes nothing."""
        async with self._connection.transaction(readonly=True):
            yield self._connection

    async def checkpoint(self, state: object) -> None:
        """Keep nothing."""

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report it."""
        self._report(note, done, total)

    async def pace(self) -> None:
        """Go on at once."""


async def newest_seals(
    connection: "asyncpg.Connection[Any]", *, before: int, limit: int
) -> list[Seal]:
    """Return seals with numbers below `before`, the newest first."""
    await _read_times_as_numbers(connection)
    return [_seal(row) for row in await connection.fetch(NEWEST_SEALS, before, limit)]


def _seal(row: Any) -> Seal:  # noqa: ANN401 - a row
    return Seal(row["number"], moment(row["at"]), row["heads"], row["digest"].hex())


def _named(heads: list[tuple[int, int, bytes]]) -> str:
    if len(heads) == 1:
        return f"of user {heads[0][0]} up to {heads[0][1]}"
    return f"of one of {len(heads)} users, from {heads[0][0]} to {heads[-1][0]}"


async def _read_times_as_numbers(connection: "asyncpg.Connection[Any]") -> None:
    """Read times as PostgreSQL sends them, also those that `datetime` does not have."""
    await connection.set_type_codec(
        "timestamptz",
        schema="pg_catalog",
        format="tuple",
        encoder=lambda microseconds: (microseconds,),
        decoder=lambda sent: sent[0],
    )
