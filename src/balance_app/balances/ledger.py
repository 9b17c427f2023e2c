"""The entries of users, and past balances, which are read from them.

Versions are dense, so a page is a range of versions: whatever plan PostgreSQL makes, it reads no
more rows than the page has. Times never go back from one version to the next, so the last entry up
to a time is found by bisection along the primary key, in some twenty look-ups for a million
entries; a further index would cost each change its upkeep.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import partial
from typing import Final

from balance_app.balances.errors import EntryNotFound, UserNotFound
from balance_app.balances.model import Entry
from balance_app.db.pool import Connection, Database, read, read_in_order
from balance_app.db.wait_queue import Lane
from balance_app.errors import DatabaseUnavailable

# Of all exports of an instance one reads at a time, so that the others' connections are free for
# changes.
EXPORTS: Final = Lane(("exports",))
EXPORT_PAGE: Final = 250


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


@dataclass(frozen=True, slots=True)
class _Rest:
    """Entries that are still to be read: of these versions, none if `first` is greater."""

    user_id: int
    first: int
    last: int
    reference: str | None = None
    descending: bool = False


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
            rest = await _begin(connection, user_id, selection, after, descending=descending)
            return (await _read_page(connection, rest, limit))[0]

        return await self._database.run(find)

    async def export(
        self, user_id: int, selection: Selection, *, after: int | None, descending: bool = False
    ) -> AsyncGenerator[list[Entry], None]:
        """Yield, page by page, all the entries that `entries` would return when this begins.

        Together the pages are what one snapshot would have shown, as entries are never changed and
        new ones only come after the last. No snapshot is held meanwhile: PostgreSQL would keep
        every version of an account's row since then, and each change would have to pass them.

        Raises:
            UserNotFound: there is no such user.
            DatabaseUnavailable: also when it was restored, or lost commits in a failover.
        """

        async def begin(connection: Connection) -> tuple[_Rest, list[Entry]]:
            rest = await _begin(connection, user_id, selection, after, descending=descending)
            return rest, await _read_entries(connection, _newest_of(rest))

        selected, newest = await self._database.run(begin, lane=EXPORTS)
        rest = selected
        while rest.first <= rest.last:
            read_page = partial(_read_page, rest=rest, limit=EXPORT_PAGE)
            page, rest = await self._database.run(read_page, lane=EXPORTS)
            yield page
        # What loses an entry also loses all after it: with the newest, every other one is there.
        read_newest = partial(_read_entries, wanted=_newest_of(selected))
        if newest != await self._database.run(read_newest, lane=EXPORTS):
            raise DatabaseUnavailable("The database lost entries meanwhile.", applied="no")

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
            found = version or 0
            if at is not None:
                found = await _bisect(connection, user_id, at, inclusive=True)
            entries = await _read_entries(connection, _Rest(user_id, found, found))
            if entries:
                return entries[0]
            await _newest_version(connection, user_id)
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
                await _newest_version(connection, user_id)
            return [DailyBalance(**row) for row in rows]

        return await self._database.run(find)


async def _begin(
    connection: Connection,
    user_id: int,
    selection: Selection,
    after: int | None,
    *,
    descending: bool,
) -> _Rest:
    """Return what a selection includes at this moment.

    Raises:
        UserNotFound: there is no such user.
    """
    first, last = 1, await _newest_version(connection, user_id)
    if selection.begin is not None:
        first = 1 + await _bisect(connection, user_id, selection.begin, inclusive=False)
    if selection.end is not None:
        last = min(last, await _bisect(connection, user_id, selection.end, inclusive=False))
    if after is not None and descending:
        last = min(last, after - 1)
    elif after is not None:
        first = max(first, after + 1)
    return _Rest(user_id, first, last, selection.reference, descending)


async def _newest_version(connection: Connection, user_id: int) -> int:
    rows = await read(connection, NEWEST_VERSION, user_id)
    if not rows:
        raise UserNotFound(user_id)
    return int(rows[0]["version"])


async def _bisect(connection: Connection, user_id: int, at: datetime, *, inclusive: bool) -> int:
    """Return the version of the last entry before a time (or at it), 0 if there is none."""
    rows = await read(connection, BISECT, user_id, at, inclusive)
    return int(rows[0]["version"])


def _newest_of(rest: _Rest) -> _Rest:
    return replace(rest, first=rest.last)


async def _read_entries(connection: Connection, wanted: _Rest) -> list[Entry]:
    """Return all entries of some versions, whatever their references."""
    rows = await read(connection, ENTRIES, wanted.user_id, wanted.first, wanted.last)
    return [Entry(**row) for row in rows]


async def _read_page(connection: Connection, rest: _Rest, limit: int) -> tuple[list[Entry], _Rest]:
    """Return the first entries of `rest`, up to `limit`, and what is still to be read then."""
    if rest.reference is not None:
        sql = BY_REFERENCE_BACKWARDS if rest.descending else BY_REFERENCE
        rows = await read_in_order(
            connection, sql, rest.user_id, rest.first, rest.last, limit, rest.reference
        )
        entries = [Entry(**row) for row in rows]
        if len(entries) < limit:
            return entries, replace(rest, first=rest.last + 1)
        reached = entries[-1].version
    elif rest.descending:
        reached = max(rest.first, rest.last - limit + 1)
        entries = (await _read_entries(connection, replace(rest, first=reached)))[::-1]
    else:
        reached = min(rest.last, rest.first + limit - 1)
        entries = await _read_entries(connection, replace(rest, last=reached))
    if rest.descending:
        return entries, replace(rest, last=reached - 1)
    return entries, replace(rest, first=reached + 1)


NEWEST_VERSION: Final = "SELECT version FROM users WHERE id = $1"

# Invariant: entry `low` is before the time (0: none needs to be), `high` + 1 is not. With LIMIT the
# entry in the middle is looked up by its key: joined, outdated statistics can make the planner read
# all of the user's entries at each step.
#
# $1 user, $2 time, $3 whether an entry of just this time is before it
BISECT: Final = """
WITH RECURSIVE bisection (low, high) AS (
    SELECT 0::bigint, coalesce((SELECT version FROM users WHERE id = $1), 0)
    UNION ALL
    SELECT CASE WHEN is_before THEN middle ELSE low END,
           CASE WHEN is_before THEN high ELSE middle - 1 END
    FROM bisection
    CROSS JOIN LATERAL (SELECT (low + high + 1) / 2 AS middle) AS half
    CROSS JOIN LATERAL (
        SELECT at < $2 OR (at = $2 AND $3) AS is_before
        FROM entries WHERE user_id = $1 AND version = middle LIMIT 1
    ) AS entry
    WHERE low < high
)
SELECT low AS version FROM bisection WHERE low = high
"""

# $1 user, $2 first version, $3 last version
ENTRIES: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note, by
FROM entries WHERE user_id = $1 AND version BETWEEN $2 AND $3 ORDER BY version
"""

# The index of references has these in order. It is read in this order (`read_in_order`): without
# good statistics the planner may read and sort all entries with a reference to find the first few.
#
# $1 user, $2 first version, $3 last version, $4 limit, $5 reference
BY_REFERENCE: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note, by
FROM entries WHERE user_id = $1 AND version BETWEEN $2 AND $3 AND reference = $5
ORDER BY version LIMIT $4
"""

BY_REFERENCE_BACKWARDS: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note, by
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
