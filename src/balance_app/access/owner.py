"""The keys as the database's owner makes and revokes them: the command line, never an instance.

Each statement records what it does in `actions`, and raises the generation by which the instances
see that a key has changed.
"""

from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Final, NamedTuple, Self

import asyncpg

from balance_app.access.keys import Scope, new_token
from balance_app.db.migrations import require_schema
from balance_app.sessions import open_session
from balance_app.settings import Settings

# Locks the row of the generation first, so that generations rise in the order of the commits. From
# the first key on requests need one.
#
# $1 id, $2 digest, $3 name, $4 scopes, $5 who makes it, $6 when it ends, or $7 how long it lasts
CREATE: Final = """
WITH before AS (
    SELECT keys_required FROM access_state
),
changed AS (
    UPDATE access_state SET generation = generation + 1, keys_required = true RETURNING one
),
made AS (
    INSERT INTO api_keys (id, digest, name, scopes, created_by, expires_at)
    SELECT $1, $2, $3, $4, $5, coalesce($6::timestamptz, clock_timestamp() + $7::interval)
    FROM changed
    RETURNING id, name, scopes, expires_at
),
recorded AS (
    INSERT INTO actions (by, action, subject, after)
    SELECT $5, 'key created', 'key ' || name,
           jsonb_build_object('id', id, 'scopes', scopes, 'expiresAt', expires_at)
    FROM made
)
SELECT expires_at, NOT keys_required AS is_first FROM made, before
"""

# The sessions of a key end with it: they are valid only as long as it is.
#
# $1 name, $2 who revokes it
REVOKE: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1
    WHERE EXISTS (SELECT FROM api_keys WHERE name = $1 AND revoked_at IS NULL)
    RETURNING one
),
revoked AS (
    UPDATE api_keys SET revoked_at = clock_timestamp() FROM changed
    WHERE name = $1 AND revoked_at IS NULL
    RETURNING id, name, revoked_at
),
recorded AS (
    INSERT INTO actions (by, action, subject, before, after)
    SELECT $2, 'key revoked', 'key ' || name,
           jsonb_build_object('revokedAt', NULL), jsonb_build_object('revokedAt', revoked_at)
    FROM revoked
)
SELECT revoked_at FROM revoked
"""

# `sessions`: how many are valid.
LIST: Final = """
SELECT id, name, scopes, created_at, created_by, expires_at, revoked_at, last_used_on,
       CASE WHEN revoked_at IS NOT NULL THEN 'revoked'
            WHEN expires_at <= clock_timestamp() THEN 'expired'
            ELSE 'valid' END AS state,
       (SELECT count(*) FROM sessions
        WHERE key_id = api_keys.id AND sessions.revoked_at IS NULL
          AND sessions.expires_at > clock_timestamp()
          AND api_keys.revoked_at IS NULL
          AND coalesce(api_keys.expires_at > clock_timestamp(), true)) AS sessions
FROM api_keys ORDER BY created_at, id
"""

# In a schema of before migration 0013 there is no such table, and there are no keys.
REQUIRED: Final = "SELECT keys_required FROM access_state"


class NotTheOwnerError(Exception):
    """The role may not make or revoke keys; the message says what to do."""


class NameTakenError(Exception):
    """A key has had this name: it stands in the ledger for whoever had that key."""


class NoSuchKeyError(Exception):
    """No key has this name; `names` are those that have not been revoked."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names


class Made(NamedTuple):
    """A new key: until when it is valid, and whether requests need one only since it was made."""

    expires_at: datetime | None
    is_first: bool


class Known(NamedTuple):
    """A key in the list; `state` is valid, expired or revoked."""

    id: str
    name: str
    scopes: list[str]
    created_at: datetime
    created_by: str | None
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_on: date | None
    state: str
    sessions: int


class Owner:
    """The owner's connection; use it as `async with Owner(settings) as owner`.

    Every method raises NotTheOwnerError, UnusableDatabaseError (the schema is not this program's),
    or what the driver raises.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.as_owner()

    async def __aenter__(self) -> Self:
        self._connection = await open_session(self._settings.connect_arguments())
        try:
            await require_schema(self._connection)
        except BaseException:
            self._connection.terminate()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._connection.terminate()

    async def create_key(
        self,
        name: str,
        scopes: list[Scope],
        *,
        by: str,
        expires: datetime | timedelta | None,
        deliver: Callable[[str], None],
    ) -> Made:
        """Make a key, and deliver its text: what can't be delivered is not made.

        Raises:
            NameTakenError: a key has had this name.
        """
        token = new_token("ba")
        at, lasts = (expires, None) if isinstance(expires, datetime) else (None, expires)
        try:
            async with self._connection.transaction():
                row = await self._row(CREATE, token.id, token.digest, name, scopes, by, at, lasts)
                assert row is not None  # noqa: S101 - the row of the generation is always there
                deliver(token.text)
        except asyncpg.UniqueViolationError:
            raise NameTakenError(name) from None
        return Made(row["expires_at"], row["is_first"])

    async def revoke_key(self, name: str, *, by: str) -> datetime | None:
        """Revoke a key; return when that was; None: it was already revoked.

        Raises:
            NoSuchKeyError: no key has this name.
        """
        row = await self._row(REVOKE, name, by)
        if row is not None:
            revoked_at: datetime = row["revoked_at"]
            return revoked_at
        known = await self.list_keys()
        if name not in {each.name for each in known}:
            raise NoSuchKeyError([each.name for each in known if each.state != "revoked"])
        return None

    async def list_keys(self) -> list[Known]:
        """Return all keys that were ever made, the oldest first."""
        try:
            rows = await self._connection.fetch(LIST)
        except asyncpg.InsufficientPrivilegeError as error:
            raise _not_the_owner(error) from error
        return [Known(**dict(row)) for row in rows]

    async def _row(self, statement: str, *arguments: object) -> asyncpg.Record | None:
        try:
            return await self._connection.fetchrow(statement, *arguments)
        except asyncpg.InsufficientPrivilegeError as error:
            raise _not_the_owner(error) from error


def _not_the_owner(error: asyncpg.InsufficientPrivilegeError) -> NotTheOwnerError:
    return NotTheOwnerError(
        f"The role of this connection may not do that ({error.args[0]}): only the owner of the "
        "tables makes and revokes keys. MIGRATE_DATABASE_URL names the database with the owner's "
        "name and password."
    )


async def keys_are_required(settings: Settings) -> bool:
    """Return whether a key was ever made in a database.

    Raises:
        what the driver raises.
    """
    connection = await open_session(settings.connect_arguments())
    try:
        return bool(await connection.fetchval(REQUIRED))
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return False
    finally:
        connection.terminate()
