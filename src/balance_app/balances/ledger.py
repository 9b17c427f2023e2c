"""The entries of users, and past balances, which are read from them.

Versions are dense, and times never go back from one version to the next. So the last entry up to a
time is found by bisection along the primary key, in some twenty look-ups for a million entries; a
further index would cost each change its upkeep.
"""

from dataclasses import dataclass
from datetime import date, datetime
from typing import Final

from balance_app.balances.errors import EntryNotFound
from balance_app.balances.model import Entry
from balance_app.balances.state import read_state
from balance_app.db.pool import Connection, Database, read
from balance_app.http.body import MAX_INTEGER


@dataclass(frozen=True, slots=True)
class DailyBalance:
    """A user's balance on a UTC day, as last read on that day: at `at`."""

    day: date
    balance: int
    version: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Selection:
    """Which entries: made from `begin` on and before `end`, with this reference; None: all."""

    begin: datetime | None = None
    end: datetime | None = None
    reference: str | None = None


class LedgerRepository:
    """The entries of users; nothing here changes anything."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def entries(
        self,
        user_id: int,
        selection: Selection,
        *,
        after: int | None,
        limit: int,
        descending: bool = False,
    ) -> list[Entry]:
        """Return up to `limit` entries in the order of versions, those beyond `after` alone.

        Raises:
            UserNotFound: there is no such user.
        """

        async def find(connection: Connection) -> list[Entry]:
            first, last = await versions(connection, user_id, selection)
            if after is not None and descending:
                last = min(last, after - 1)
            elif after is not None:
                first = max(first, after + 1)
            if selection.reference is not None:
                sql = BY_REFERENCE_BACKWARDS if descending else BY_REFERENCE
                rows = await read(connection, sql, user_id, first, last, limit, selection.reference)
            else:
                sql = ENTRIES_BACKWARDS if descending else ENTRIES
                rows = await read(connection, sql, user_id, first, last, limit)
            if not rows:
                await read_state(connection, user_id)
            return [Entry(**row) for row in rows]

        return await self._database.run(find)

    async def reversals(self, user_id: int, versions: list[int]) -> dict[int, int]:
        """Return which of these entries are reversed, and by which entry each."""
        rows = await self._database.run(lambda con: read(con, REVERSALS, user_id, versions))
        return {row["reverses"]: row["version"] for row in rows}

    async def past(
        self, user_id: int, *, at: datetime | None = None, version: int | None = None
    ) -> Entry:
        """Return the entry that was the last one at a time, or the one of a version.

        Raises:
            UserNotFound: there is no such user.
            EntryNotFound: the user had no entry yet, or has none of this version.
        """

        async def find(connection: Connection) -> Entry:
            found = version
            if at is not None:
                found = (await read(connection, VERSION_AT, user_id, at))[0]["version"]
            rows = await read(connection, ENTRIES, user_id, found, found, 1)
            if rows:
                return Entry(**rows[0])
            await read_state(connection, user_id)
            detail = (
                f"User {user_id} has no entry {version}."
                if at is None
                else f"User {user_id} had no entry at {at.isoformat()}."
            )
            raise EntryNotFound(detail, user_id=user_id)

        return await self._database.run(find)

    async def daily_balances(self, user_id: int, *, before: date, limit: int) -> list[DailyBalance]:
        """Return up to `limit` daily balances of days before `before`, the latest first.

        A day without one ended with the balance of the day before it.

        Raises:
            UserNotFound: there is no such user.
        """

        async def find(connection: Connection) -> list[DailyBalance]:
            rows = await read(connection, DAILY_BALANCES, user_id, before, limit)
            if not rows:
                await read_state(connection, user_id)
            return [DailyBalance(**row) for row in rows]

        return await self._database.run(find)


async def versions(connection: Connection, user_id: int, selection: Selection) -> tuple[int, int]:
    """Return the first and the last version that a selection's times include."""
    first, last = 1, MAX_INTEGER
    if selection.begin is not None:
        first = (await read(connection, VERSION_BEFORE, user_id, selection.begin))[0]["version"] + 1
    if selection.end is not None:
        last = (await read(connection, VERSION_BEFORE, user_id, selection.end))[0]["version"]
    return first, last


# Invariant: entry `low` is at or before the time (0: none needs to be), `high` + 1 is after it.
#
# $1 user, $2 time
VERSION_AT: Final = """
WITH RECURSIVE bisection (low, high) AS (
    SELECT 0::bigint, coalesce((SELECT version FROM users WHERE id = $1), 0)
    UNION ALL
    SELECT CASE WHEN at <= $2 THEN middle ELSE low END,
           CASE WHEN at <= $2 THEN high ELSE middle - 1 END
    FROM bisection
    CROSS JOIN LATERAL (SELECT (low + high + 1) / 2 AS middle) AS half
    JOIN entries ON user_id = $1 AND version = middle
    WHERE low < high
)
SELECT low AS version FROM bisection WHERE low = high
"""

# As VERSION_AT, for the last entry before the time.
VERSION_BEFORE: Final = """
WITH RECURSIVE bisection (low, high) AS (
    SELECT 0::bigint, coalesce((SELECT version FROM users WHERE id = $1), 0)
    UNION ALL
    SELECT CASE WHEN at < $2 THEN middle ELSE low END,
           CASE WHEN at < $2 THEN high ELSE middle - 1 END
    FROM bisection
    CROSS JOIN LATERAL (SELECT (low + high + 1) / 2 AS middle) AS half
    JOIN entries ON user_id = $1 AND version = middle
    WHERE low < high
)
SELECT low AS version FROM bisection WHERE low = high
"""

# $1 user, $2 first version, $3 last version, $4 limit
ENTRIES: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note
FROM entries WHERE user_id = $1 AND version BETWEEN $2 AND $3 ORDER BY version LIMIT $4
"""

ENTRIES_BACKWARDS: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note
FROM entries WHERE user_id = $1 AND version BETWEEN $2 AND $3 ORDER BY version DESC LIMIT $4
"""

# As ENTRIES, along the index of references; $5 the reference
BY_REFERENCE: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note
FROM entries WHERE user_id = $1 AND version BETWEEN $2 AND $3 AND reference = $5
ORDER BY version LIMIT $4
"""

BY_REFERENCE_BACKWARDS: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note
FROM entries WHERE user_id = $1 AND version BETWEEN $2 AND $3 AND reference = $5
ORDER BY version DESC LIMIT $4
"""

REVERSALS: Final = """
SELECT reverses, version FROM entries WHERE user_id = $1 AND reverses = ANY ($2::bigint[])
"""

DAILY_BALANCES: Final = """
SELECT day, balance, version, at FROM daily_balances
WHERE user_id = $1 AND day < $2 ORDER BY day DESC LIMIT $3
"""
