"""Runs of the ten jobs on a real database, started by the test."""

import json
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
from typing_extensions import override

from balance_app.balances.accounts import AccountRepository, Opening, Patch
from balance_app.balances.chain import entry_hash, first_format_hash
from balance_app.balances.guard import Guard
from balance_app.balances.holds import HoldRepository
from balance_app.balances.model import Accepted, Movement, Refused
from balance_app.balances.repository import BalanceRepository
from balance_app.db.pool import Database
from balance_app.jobs.declarations import Declared
from balance_app.jobs.job import Registry
from balance_app.jobs.repository import Claimed, JobRepository, Me
from balance_app.jobs.run import Run
from balance_app.jobs.transaction import LeaseLostError
from balance_app.main import LOCKING
from tests.processes import unguarded

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

REGISTRY = Registry.load("balance_app.maintenance")
JOBS = tuple(REGISTRY.values())

CLAIM = """
UPDATE jobs SET holder = $2, server = 'test', started_at = clock_timestamp(), fence = fence + 1,
    lease_expires_at = clock_timestamp() + interval '1 hour'
WHERE name = $1
RETURNING fence, due_at, checkpoint, schedule, anchor_at, started_at
"""

FREE = """
UPDATE jobs SET holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL,
    checkpoint = CASE WHEN $2 THEN checkpoint END
WHERE name = $1
"""


class CutError(BaseException):
    """The run ends here, as when its instance is killed."""


class TracedRun(Run):
    """A run that does not sleep, records its progress, and can be cut after some batches."""

    cut_after: int | None = None
    loses_lease: bool = False
    seen: tuple[tuple[int, int | None, str], ...] = ()

    @override
    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        self.seen += ((done, total, note),)

    @override
    async def pace(self) -> None:
        if len(self.seen) == self.cut_after:
            raise CutError

    @override
    async def checkpoint(self, state: object) -> None:
        if self.loses_lease:
            raise LeaseLostError("cut between its effect and its commit")
        await super().checkpoint(state)


class JobRunner:
    """A migrated database, and jobs that are run by the test."""

    def __init__(self, database: Database, connection: Connection) -> None:
        self.connection = connection
        self._database = database
        self._me = Me(uuid4(), "test")
        self._jobs = JobRepository(database, self._me, timedelta(hours=1))
        self.last: TracedRun | None = None
        guard = Guard(database, LOCKING)
        self.balances = BalanceRepository(database, guard)
        self.holds = HoldRepository(database, guard)
        self.accounts = AccountRepository(database, guard)

    def set_lease(self, lease: timedelta) -> None:
        """Run the jobs under leases of this length, which limit their transactions."""
        self._jobs = JobRepository(self._database, self._me, lease)

    async def declare(self) -> None:
        await self._jobs.declare({each.name: Declared(str(each.schedule)) for each in JOBS})

    async def run(
        self, name: str, *, cut_after: int | None = None, loses_lease: bool = False
    ) -> str:
        """Run a job and return its result; a cut run leaves its checkpoint."""
        row = await self.connection.fetchrow(CLAIM, name, self._me.id)
        assert row is not None
        checkpoint = row["checkpoint"]
        claimed = Claimed(
            name=name,
            fence=row["fence"],
            due_at=row["due_at"],
            attempt=0,
            resumed=None if checkpoint is None else json.loads(checkpoint),
            cancel_requested_by=None,
            schedule=row["schedule"],
            anchor_at=row["anchor_at"],
            started_at=row["started_at"],
            round=0,
        )
        run = self.last = TracedRun(claimed, self._database, self._jobs, min_seconds=0)
        run.cut_after, run.loses_lease = cut_after, loses_lease
        was_cut = False
        try:
            result = await REGISTRY[name].function(run)
        except (CutError, LeaseLostError):
            was_cut = True
            raise
        finally:
            await self.connection.execute(FREE, name, was_cut)
        assert isinstance(result, str)
        return result

    async def rewrite(self, *statements: str) -> None:
        """Change rows with the ledger's triggers off, and the hash chain with them."""
        async with unguarded(self.connection):
            for statement in statements:
                await self.connection.execute(statement)
            await chain_again(self.connection)

    async def populate(self, users: int, entries: int) -> None:
        """Give users 1 to `users` this many entries each; every second one has a key.

        They are older than the hash chain.
        """
        await self.connection.execute("UPDATE balance_app_version SET chained_from = 'infinity'")
        async with unguarded(self.connection):
            for statement in POPULATE:
                await self.connection.execute(statement, users, entries)
        await self.connection.execute(
            "SELECT setval(pg_get_serial_sequence('users', 'id'), max(id)) FROM users"
        )

    async def move_money(self) -> None:
        """After `populate(30, 4)`, leave rows of each kind on users 3, 4, 30, and 31.

        ```
        user 3 | 5 transfer to 4 | 6 capture of hold 1 | 7 change | 8 reversal of 7
               | 9 transfer to 4 | 10 reversal of 9
        user 4 | 5 transfer from 3 | 6 transfer from 3 | 7 reversal of 6
        holds of 3 | 1 captured | 3 voided | 5 expired | 7 open | 8 open
        ```
        """
        await self.transfer(7, key="paid", reference="r-1", note='a "note"')
        await self.hold(10, key="held", reference="r-2")
        await self.holds.capture(3, 1, amount=6, reference="r-2", note=None)
        await self.hold(5)
        await self.holds.void(3, 3)
        await self.hold(2)
        await self.let_expire(3, 5)
        await self.hold(8, key="open")
        await self.hold(1)
        change = await self.balances.change(Movement(3, 20, "added", reference="r-3"))
        assert isinstance(change, Accepted)
        await self.balances.reverse(3, 7, reference=None, note="undone")
        await self.transfer(4)
        await self.balances.reverse(3, 9, reference=None, note=None)
        await self.set(3, Patch(floor=-50, external_id="three", names=True))
        await self.set(30, Patch(frozen=True))
        await self.accounts.open(Opening(5, -3, 'new "one"'), "created")
        for outcome in (
            await self.balances.change(Movement(3, -2000, "no-change", reference="r-4")),
            await self.balances.hold(Movement(3, -2000, "no-hold", seconds=60)),
            await self.balances.transfer(Movement(3, -5, "frozen", to_user_id=30)),
            await self.balances.change(Movement(30, 5, "frozen")),
        ):
            assert isinstance(outcome, Refused)

    async def transfer(
        self,
        amount: int,
        key: str | None = None,
        reference: str | None = None,
        note: str | None = None,
    ) -> None:
        """Let user 3 pay user 4."""
        movement = Movement(3, -amount, key, reference, note, to_user_id=4)
        assert isinstance(await self.balances.transfer(movement), Accepted)

    async def hold(
        self,
        amount: int,
        key: str | None = None,
        reference: str | None = None,
        *,
        user_id: int = 3,
    ) -> None:
        """Hold an amount of a user for an hour."""
        movement = Movement(user_id, -amount, key, reference, seconds=3600)
        assert isinstance(await self.balances.hold(movement), Accepted)

    async def let_expire(self, user_id: int, number: int) -> None:
        """Make a hold overdue."""
        await self.connection.execute(
            """
            WITH due AS (
                UPDATE holds SET expires_at = clock_timestamp() WHERE (user_id, number) = ($1, $2)
            )
            UPDATE users SET holds_due_at = clock_timestamp() WHERE id = $1
            """,
            user_id,
            number,
        )

    async def set(self, user_id: int, patch: Patch) -> None:
        """Change settings of an account."""
        await self.accounts.change_settings(user_id, patch, "test")

    async def rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.connection.fetch(sql, *arguments)]


async def hashes_of(connection: Connection) -> dict[tuple[int, int], bytes]:
    """Return the hash of each entry, by user and version."""
    hashes: dict[tuple[int, int], bytes] = {}
    user, last = 0, b""
    for entry in await connection.fetch("SELECT * FROM entries ORDER BY user_id, version"):
        made = first_format_hash if entry["hash"] is None else entry_hash
        last = made(last if entry["user_id"] == user else b"", entry)
        user = entry["user_id"]
        hashes[user, entry["version"]] = last
    return hashes


async def chain_again(connection: Connection) -> None:
    """Compute every hash of the ledgers anew; entries and accounts without one stay so."""
    hashes = await hashes_of(connection)
    await connection.executemany(
        "UPDATE entries SET hash = $3 WHERE (user_id, version) = ($1, $2) AND hash <> $3",
        [(user, version, hashed) for (user, version), hashed in hashes.items()],
    )
    await connection.executemany(
        "UPDATE users SET hash = $2 WHERE id = $1 AND hash <> $2",
        list({user: hashed for (user, _), hashed in hashes.items()}.items()),
    )


POPULATE = (
    """
    INSERT INTO users (id, balance, version)
    SELECT id, 1000 - $2::bigint + 1, $2 FROM generate_series(2, $1::bigint) AS id
    """,
    """
    INSERT INTO entries (user_id, version, amount, balance, key)
    SELECT id, version, CASE version WHEN 1 THEN 1000 ELSE -1 END,
           CASE id WHEN 1 THEN 10000 ELSE 1000 END - version + 1,
           CASE version % 2 WHEN 0 THEN format('key-%s-%s', id, version) END
    FROM generate_series(1, $1::bigint) AS id, generate_series(1, $2::bigint) AS version
    WHERE id > 1 OR version > 1
    """,
    """
    UPDATE users SET balance = balance - $2 + 1, version = $2 + 0 * $1, hash = NULL WHERE id = 1
    """,
    """
    INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
    SELECT key, 'accepted', user_id, amount, balance, version, at FROM entries
    WHERE key IS NOT NULL AND user_id <= $1 AND version <= $2
    """,
)


async def days_as_counted(runner: JobRunner) -> list[tuple[Any, ...]]:
    return await runner.rows("SELECT * FROM daily_totals ORDER BY day")


async def days_as_they_were(runner: JobRunner) -> list[tuple[Any, ...]]:
    return await runner.rows("""
        SELECT (at AT TIME ZONE 'UTC')::date,
               count(*) FILTER (WHERE version = 1),
               coalesce(sum(amount) FILTER (WHERE version = 1), 0),
               count(*) FILTER (WHERE version > 1 AND other_user_id IS NULL),
               coalesce(sum(amount) FILTER (
                   WHERE version > 1 AND amount > 0 AND other_user_id IS NULL
               ), 0),
               coalesce(-sum(amount) FILTER (WHERE amount < 0 AND other_user_id IS NULL), 0),
               count(DISTINCT user_id),
               count(*) FILTER (WHERE other_user_id IS NOT NULL) / 2,
               coalesce(sum(abs(amount)) FILTER (WHERE other_user_id IS NOT NULL), 0) / 2
        FROM entries GROUP BY 1 ORDER BY 1
    """)
