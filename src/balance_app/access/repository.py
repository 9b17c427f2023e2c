"""The keys and sessions in the database."""

from datetime import datetime, timedelta
from typing import Final, NamedTuple

from balance_app.access.keys import Principal, Token, new_token
from balance_app.db.pool import Connection, Database, read, write

SESSION_TIME: Final = timedelta(hours=12)
SESSIONS_KEPT: Final = timedelta(days=30)
# A key that only reads could fill the table, and the memory of all instances, by logins.
SESSIONS_OF_KEY: Final = 100

STATE: Final = "SELECT generation, keys_required FROM access_state"

# In one snapshot: what is missing in it was changed later, so that the next generation is another.
# A session is valid as long as its key, and has its scopes. How long a key is valid is told in
# seconds, as the instance's clock may be wrong.
#
# $1 the present generation, which is returned in each row
VALID: Final = """
WITH valid AS (
    SELECT id, digest, name, scopes, expires_at FROM api_keys
    WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())
)
SELECT digest, name, scopes, id AS key_id, NULL AS session_id, expires_at,
       extract(epoch FROM expires_at - clock_timestamp())::float8 AS seconds
FROM valid
UNION ALL
SELECT sessions.digest, name, scopes, valid.id, sessions.id, until,
       extract(epoch FROM until - clock_timestamp())::float8
FROM sessions JOIN valid ON key_id = valid.id
CROSS JOIN LATERAL (SELECT least(sessions.expires_at, valid.expires_at) AS until) AS ends
WHERE revoked_at IS NULL AND sessions.expires_at > clock_timestamp()
"""

# Locks the row of the generation, so that generations rise in the order of the commits.
#
# $1 id, $2 digest, $3 id of the key, $4 how long it lasts, $5 for how long ended ones are kept,
# $6 how many other sessions the key keeps, the latest
LOG_IN: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1
), pruned AS (
    DELETE FROM sessions
    WHERE expires_at < clock_timestamp() - $5::interval
       OR id IN (SELECT id FROM sessions WHERE key_id = $3 ORDER BY created_at DESC OFFSET $6)
), begun AS (
    INSERT INTO sessions (id, digest, key_id, expires_at)
    SELECT $1, $2, id, clock_timestamp() + $4 FROM api_keys WHERE id = $3
    RETURNING id, key_id, expires_at
), action AS (
    INSERT INTO actions (by, action, subject, after)
    SELECT name, 'logged in', 'key ' || name,
           jsonb_build_object('session', begun.id, 'expiresAt', begun.expires_at)
    FROM begun JOIN api_keys ON api_keys.id = key_id
)
SELECT expires_at FROM begun
"""

LOG_OUT: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1
), ended AS (
    UPDATE sessions SET revoked_at = clock_timestamp() WHERE id = $1 AND revoked_at IS NULL
    RETURNING id, key_id
), action AS (
    INSERT INTO actions (by, action, subject, before)
    SELECT name, 'logged out', 'key ' || name, jsonb_build_object('session', ended.id)
    FROM ended JOIN api_keys ON api_keys.id = key_id
)
SELECT id FROM ended
"""

USED: Final = """
UPDATE api_keys SET last_used_on = current_date
WHERE id = ANY ($1) AND last_used_on IS DISTINCT FROM current_date
RETURNING id
"""


class Valid(NamedTuple):
    """A key or session that is valid: for so many seconds, None for ever."""

    digest: bytes
    principal: Principal
    seconds: float | None


class KeyRepository:
    """What instances read of keys, and what they write: sessions, and when a key was used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def state(self) -> tuple[int, bool]:
        """Return the generation of the keys, and whether requests need one."""
        rows = await self._database.run(lambda con: read(con, STATE), priority=True)
        return rows[0]["generation"], rows[0]["keys_required"]

    async def valid(self) -> list[Valid]:
        """Return all keys and sessions that are valid now."""
        rows = await self._database.run(lambda con: read(con, VALID), priority=True)
        return [
            Valid(
                row["digest"],
                Principal(
                    row["name"],
                    frozenset(row["scopes"]),
                    row["key_id"],
                    row["session_id"],
                    row["expires_at"],
                ),
                row["seconds"],
            )
            for row in rows
        ]

    async def log_in(self, key: Principal) -> tuple[Token, datetime]:
        """Begin a session with a key; return it, and when it ends at the latest."""
        token = new_token("bs")

        async def insert(connection: Connection) -> datetime:
            row = await write(
                connection,
                LOG_IN,
                token.id,
                token.digest,
                key.key_id,
                SESSION_TIME,
                SESSIONS_KEPT,
                SESSIONS_OF_KEY - 1,
            )
            assert row is not None  # noqa: S101 - keys are never deleted
            ends: datetime = row["expires_at"]
            return ends

        return token, await self._database.run(insert)

    async def log_out(self, session_id: str) -> None:
        """End a session; it may have ended before."""
        await self._database.run(lambda con: write(con, LOG_OUT, session_id))

    async def note_use(self, key_ids: list[str]) -> None:
        """Keep that these keys were used today (UTC)."""
        await self._database.run(lambda con: write(con, USED, key_ids), priority=True)
