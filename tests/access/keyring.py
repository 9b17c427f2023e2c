"""Keys and sessions of tests, made as the database's owner makes them."""

import asyncio
from typing import Final
from uuid import uuid4

from balance_app.access.keys import SCOPES, Kind, Token, new_token
from tests.processes import http_client, query

MAKE: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1, keys_required = true
)
INSERT INTO api_keys (id, digest, name, scopes, expires_at)
VALUES ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5))
"""

REVOKE: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1
)
UPDATE api_keys SET revoked_at = clock_timestamp() WHERE id = $1
"""

LOG_IN: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1
)
INSERT INTO sessions (id, digest, key_id, expires_at)
VALUES ($1, $2, $3, clock_timestamp() + make_interval(secs => $4))
"""

LOG_OUT: Final = """
WITH changed AS (
    UPDATE access_state SET generation = generation + 1
)
UPDATE sessions SET revoked_at = clock_timestamp() WHERE id = $1
"""


async def make_key(
    database: dict[str, str], *scopes: str, name: str | None = None, seconds: float | None = None
) -> Token:
    """Make a key, by default with all scopes and for ever."""
    token = new_token("ba")
    name = name or f"key-{uuid4().hex}"
    await query(database, MAKE, token.id, token.digest, name, list(scopes or SCOPES), seconds)
    return token


async def keys_are_needed(url: str) -> None:
    """Wait until an instance has noticed that there is a key."""
    async with http_client(url) as client:
        while (await client.get("/api/users")).status_code != 401:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)


async def revoke(database: dict[str, str], token: Token) -> None:
    """Revoke a key."""
    await query(database, REVOKE, token.id)


async def log_in(database: dict[str, str], key: Token, seconds: float = 3600) -> Token:
    """Begin a session."""
    token = new_token("bs")
    await query(database, LOG_IN, token.id, token.digest, key.id, seconds)
    return token


async def log_out(database: dict[str, str], session: Token) -> None:
    """End a session."""
    await query(database, LOG_OUT, session.id)


def unknown(kind: Kind = "ba") -> Token:
    """Return a key that is well formed, and was never made."""
    return new_token(kind)


def bearer(token: Token) -> dict[str, str]:
    """Return the header field of a key."""
    return {"Authorization": f"Bearer {token.text}"}


def cookie(token: Token) -> dict[str, str]:
    """Return the header field of a session."""
    return {"Cookie": f"ba={token.text}"}
