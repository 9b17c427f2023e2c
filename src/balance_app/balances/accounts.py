"""Users: creating them, finding them, and the settings of their accounts."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg

from balance_app.balances.errors import (
    ExternalIdTaken,
    FloorNotCovered,
    IdempotencyKeyReused,
    UserIdTaken,
    VersionConflict,
)
from balance_app.balances.guard import Guard
from balance_app.balances.state import MAX_RACES, is_up_to_date, lost_every_race
from balance_app.db.pool import Connection, Database, read, write
from balance_app.errors import Problem

KEYS_PKEY: Final = "opening_keys_pkey"
EXTERNAL_IDS: Final = frozenset({"external_ids_pkey"})


@dataclass(frozen=True, slots=True)
class Account:
    """A user's account; `hold_events` counts how often a hold was placed or ended."""

    user_id: int
    balance: int
    held: int
    floor: int
    frozen: bool
    version: int
    settings_version: int
    hold_events: int
    external_id: str | None
    created_at: datetime

    @property
    def available(self) -> int:
        """The balance without what is held."""
        return self.balance - self.held

    @property
    def tag(self) -> str:
        """Its entity tag, as `State.tag`."""
        return f"{self.version}.{self.settings_version}.{self.hold_events}"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of an account as one request left them."""

    settings_version: int
    floor: int
    frozen: bool
    external_id: str | None
    at: datetime
    by: str | None


class Opening(NamedTuple):
    """What a request to create a user asks for."""

    balance: int = 0
    floor: int = 0
    external_id: str | None = None

    @property
    def request(self) -> str:
        """It as JSON, for comparison with another request of its key."""
        default = Opening()
        given = {
            name: value
            for name, value in self._asdict().items()
            if name == "balance" or value != getattr(default, name)
        }
        return json.dumps(given, separators=(",", ":"), ensure_ascii=False)


class Opened(NamedTuple):
    """A user who was created, as of that moment."""

    account: Account
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Patch:
    """Which settings to change, and from which `settings_versions` (None: from any)."""

    floor: int | None = None
    frozen: bool | None = None
    external_id: str | None = None
    # whether `external_id` is changed; None removes it
    names: bool = False
    settings_versions: list[int] | None = None


class AccountRepository:
    """Users and their settings; every call is one transaction or none."""

    def __init__(self, database: Database, guard: Guard) -> None:
        self._database = database
        self._guard = guard

    async def open(self, opening: Opening, key: str | None, by: str | None = None) -> Opened:
        """Create a user with an opening balance, at most once per `key`.

        Raises:
            IdempotencyKeyReused: the key belongs to another request.
            ExternalIdTaken: the external id belongs to another user.
            FloorNotCovered: the opening balance is below the floor.
            UserIdTaken: the next id belongs to an existing user.
            DatabaseUnavailable, Overloaded: as for `BalanceRepository.change`.
        """
        try:
            if key is None:
                return await self._database.run(lambda con: _open(con, opening, None, by))
            return await self._guard.run(lambda con: _open(con, opening, key, by), key=key)
        except Problem as problem:
            problem.under(key)
            raise

    async def open_once(self, opening: Opening, by: str | None = None) -> tuple[Account, bool]:
        """Return the account with an external id, and whether it was created for this."""

        async def find_or_open(connection: Connection) -> tuple[Account, bool]:
            for _ in range(MAX_RACES):
                row = await write(connection, MADE, opening.external_id)
                if row is not None:
                    return await _account(connection, row["user_id"]), False
                try:
                    return (await _open(connection, opening, None, by)).account, True
                except ExternalIdTaken:
                    continue  # another request created it meanwhile
            raise lost_every_race()

        return await self._database.run(find_or_open)

    async def account(self, user_id: int) -> Account:
        """Return a user's account.

        Raises:
            UserNotFound: there is no such user.
        """
        return await self._database.run(lambda con: _account(con, user_id))

    async def accounts(self, *, after: int, limit: int) -> list[Account]:
        """Return up to `limit` accounts with ids above `after`, in order."""

        async def find(connection: Connection) -> list[Account]:
            for user in await read(connection, OVERDUE, after, limit):
                await is_up_to_date(connection, user["id"])
            rows = await read(connection, ACCOUNTS, after, limit)
            return [Account(**row) for row in rows]

        return await self._database.run(find)

    async def by_external_id(self, external_id: str) -> Account | None:
        """Return the account of the user with this external id, if there is one."""
        return await self._database.run(lambda con: _by_external_id(con, external_id))

    async def change_settings(self, user_id: int, patch: Patch, by: str | None) -> Account:
        """Change settings of an account; the change itself is kept, too.

        Raises:
            UserNotFound: there is no such user.
            VersionConflict: its settings have another version.
            FloorNotCovered: it has less available than the new floor.
            ExternalIdTaken: the external id belongs to another user.
            DatabaseUnavailable, Overloaded: as for `BalanceRepository.change`.
        """
        return await self._guard.run(lambda con: _change_settings(con, user_id, patch, by), user_id)

    async def settings(self, user_id: int, *, after: int, limit: int) -> list[Settings]:
        """Return up to `limit` changes of settings with versions above `after`, in order.

        Raises:
            UserNotFound: there is no such user.
        """
        rows = await self._database.run(lambda con: read(con, SETTINGS, user_id, after, limit))
        if not rows:
            await self.account(user_id)
        return [Settings(**row) for row in rows]


# The opening balance is entry 1, so that a user's entries always sum to the balance. No row means:
# the next id belongs to an existing user. A key, or an external id, that another transaction has
# written meanwhile makes the whole statement fail by its uniqueness.
#
# $1 balance, $2 floor, $3 external id, $4 key, $5 request, $6 who
OPEN: Final = """
WITH new AS MATERIALIZED (
    -- the id is drawn first, as the hash covers it
    SELECT nextval(pg_get_serial_sequence('users', 'id')) AS id, clock_timestamp() AS at
), opened AS (
    INSERT INTO users (id, balance, version, floor, created_at, changed_at, hash)
    SELECT id, $1::bigint, 1, $2::bigint, at, at,
           chain_hash('', entry_content(id, $1, $4, $6, NULL, NULL, NULL, NULL, NULL, NULL),
                      1, $1, 0, at)
    FROM new
    ON CONFLICT (id) DO NOTHING
    RETURNING id, created_at, hash
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance, key, at, by, hash)
    SELECT id, 1, $1, $1, $4::text, created_at, $6, hash FROM opened
), named AS (
    INSERT INTO external_ids (external_id, user_id) SELECT $3, id FROM opened
    WHERE $3::text IS NOT NULL
), set AS (
    INSERT INTO user_settings (user_id, settings_version, floor, frozen, external_id, at, by)
    SELECT id, 1, $2, false, $3, created_at, $6 FROM opened
    WHERE $2 <> 0 OR $3 IS NOT NULL
), recorded AS (
    INSERT INTO opening_keys (key, user_id, request, by) SELECT $4, id, $5, $6 FROM opened
    WHERE $4 IS NOT NULL
), action AS (
    INSERT INTO actions (by, action, subject, after)
    SELECT $6, 'user created', 'user ' || id,
           jsonb_build_object('balance', $1::bigint, 'floor', $2::bigint, 'externalId', $3::text)
    FROM opened
)
SELECT id, created_at FROM opened
"""

# As durable as `repository.RECALL`.
RECALL: Final = """
SELECT user_id, request, opening_keys.by, entries.at,
       pg_logical_emit_message(true, 'balance_app', '')
FROM opening_keys JOIN entries USING (user_id)
WHERE opening_keys.key = $1 AND version = 1
"""


async def _open(
    connection: Connection, opening: Opening, key: str | None, by: str | None
) -> Opened:
    if opening.balance < opening.floor:
        raise FloorNotCovered(
            user_id=None, balance=opening.balance, held=0, version=1, floor=opening.floor
        )
    for _ in range(MAX_RACES):
        first = None if key is None else await write(connection, RECALL, key)
        if first is not None:
            if first["request"] != opening.request or first["by"] not in {None, by}:
                raise IdempotencyKeyReused
            return Opened(_new(first["user_id"], first["at"], opening), replayed=True)
        try:
            row = await write(connection, OPEN, *opening, key, opening.request, by)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name in EXTERNAL_IDS:
                raise ExternalIdTaken from None
            if error.constraint_name != KEYS_PKEY:
                raise
            continue  # another request with this key was faster: recall its outcome
        if row is None:
            (ids,) = await read(connection, IDS)
            raise UserIdTaken(ids["next"], highest=ids["highest"])
        return Opened(_new(row["id"], row["created_at"], opening))
    raise lost_every_race()


def _new(user_id: int, created_at: datetime, opening: Opening) -> Account:
    return Account(
        user_id,
        balance=opening.balance,
        held=0,
        floor=opening.floor,
        frozen=False,
        version=1,
        settings_version=1,
        hold_events=0,
        external_id=opening.external_id,
        created_at=created_at,
    )


# The next id of the sequence, and the highest id of a user.
IDS: Final = """
SELECT pg_sequence_last_value(pg_get_serial_sequence('users', 'id')::regclass) + 1 AS next,
       (SELECT max(id) FROM users) AS highest
"""

# No row means: there is no such user, or a hold has to be ended first.
ACCOUNT: Final = """
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       external_id, created_at
FROM users LEFT JOIN external_ids ON user_id = id
WHERE id = $1 AND holds_due_at > clock_timestamp()
"""

ACCOUNTS: Final = """
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       external_id, created_at
FROM (SELECT * FROM users WHERE id > $1 ORDER BY id LIMIT $2) AS page
LEFT JOIN external_ids ON user_id = id ORDER BY id
"""

OVERDUE: Final = """
SELECT id FROM (SELECT id, holds_due_at FROM users WHERE id > $1 ORDER BY id LIMIT $2) AS page
WHERE holds_due_at <= clock_timestamp()
"""

EXTERNAL_ID: Final = "SELECT user_id FROM external_ids WHERE external_id = $1"

# As durable as `repository.RECALL`, to be answered in place of a second opening.
MADE: Final = """
SELECT user_id, pg_logical_emit_message(true, 'balance_app', '') FROM external_ids
WHERE external_id = $1
"""


async def _account(connection: Connection, user_id: int) -> Account:
    for _ in range(MAX_RACES):
        rows = await read(connection, ACCOUNT, user_id)
        if rows:
            return Account(**rows[0])
        if not await is_up_to_date(connection, user_id):
            (row,) = await read(connection, ACCOUNTS, user_id - 1, 1)
            return Account(**row)
    raise lost_every_race()


async def _by_external_id(connection: Connection, external_id: str) -> Account | None:
    rows = await read(connection, EXTERNAL_ID, external_id)
    return await _account(connection, rows[0]["user_id"]) if rows else None


# What is available is never below the floor, the new one included. The external id changes with the
# settings or not at all: its uniqueness makes the whole statement fail. The one that is kept in the
# history is read in the snapshot, and is the present one if the settings' version still is; so are
# the settings before. A request that finds them as it wants them is in the history, and no action.
#
# $1 user, $2 floor, $3 frozen (NULL: as it is), $4 whether the external id changes, $5 to what,
# $6 settings versions that may be changed (NULL: any), $7 who
SET: Final = """
WITH seen AS MATERIALIZED (
    SELECT id, settings_version, external_id,
           jsonb_build_object('floor', floor, 'frozen', frozen, 'externalId', external_id) AS before
    FROM users LEFT JOIN external_ids ON user_id = id WHERE id = $1
), account AS (
    UPDATE users SET floor = coalesce($2, floor), frozen = coalesce($3, frozen),
                     settings_version = users.settings_version + 1,
                     changed_at = greatest(changed_at + interval '1 microsecond', clock_timestamp())
    FROM seen
    WHERE users.id = seen.id AND users.settings_version = seen.settings_version
      AND balance - held >= coalesce($2, floor)
      AND ($6::bigint[] IS NULL OR users.settings_version = ANY ($6))
      AND holds_due_at > clock_timestamp()
    RETURNING users.id, balance, held, floor, frozen, version, users.settings_version, hold_events,
              CASE WHEN $4 THEN $5 ELSE external_id END AS external_id, created_at,
              changed_at AS at, before
), named AS (
    INSERT INTO external_ids (external_id, user_id) SELECT $5, id FROM account
    WHERE $4 AND $5::text IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET external_id = excluded.external_id
), unnamed AS (
    DELETE FROM external_ids USING account WHERE user_id = id AND $4 AND $5 IS NULL
), kept AS (
    INSERT INTO user_settings (user_id, settings_version, floor, frozen, external_id, at, by)
    SELECT id, settings_version, floor, frozen, external_id, at, $7 FROM account
    RETURNING *
), action AS (
    INSERT INTO actions (by, action, subject, before, after)
    SELECT $7, 'user settings changed', 'user ' || user_id, before, after
    FROM kept JOIN account ON account.id = user_id
    CROSS JOIN LATERAL (
        SELECT jsonb_build_object('floor', kept.floor, 'frozen', kept.frozen,
                                  'externalId', kept.external_id) AS after
    ) AS settings
    WHERE before <> after
)
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       external_id, created_at
FROM account
"""

SETTINGS: Final = """
SELECT settings_version, floor, frozen, external_id, at, by FROM user_settings
WHERE user_id = $1 AND settings_version > $2 ORDER BY settings_version LIMIT $3
"""


async def _change_settings(
    connection: Connection, user_id: int, patch: Patch, by: str | None
) -> Account:
    for _ in range(MAX_RACES):
        try:
            row = await write(
                connection,
                SET,
                user_id,
                patch.floor,
                patch.frozen,
                patch.names,
                patch.external_id,
                patch.settings_versions,
                by,
            )
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name not in EXTERNAL_IDS:
                raise
            raise ExternalIdTaken from None
        if row is not None:
            return Account(**row)
        account = await _account(connection, user_id)
        members = {
            "user_id": user_id,
            "balance": account.balance,
            "held": account.held,
            "version": account.version,
        }
        versions = patch.settings_versions
        if versions is not None and account.settings_version not in versions:
            raise VersionConflict(**members, tag=account.tag)
        if patch.floor is not None and account.available < patch.floor:
            raise FloorNotCovered(**members, floor=patch.floor)
    raise lost_every_race()
