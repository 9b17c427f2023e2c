"""Keys and sessions of tests, made by the statements of the command line and of the login."""

import asyncio
from datetime import timedelta
from uuid import uuid4

from balance_app.access.keys import SCOPES, Kind, Token, new_token
from balance_app.access.owner import CREATE, REVOKE
from balance_app.access.repository import LOG_IN, LOG_OUT, SESSIONS_KEPT, SESSIONS_OF_KEY
from tests.processes import http_client, query


async def make_key(
    database: dict[str, str], *scopes: str, name: str | None = None, seconds: float | None = None
) -> Token:
    """Make a key, by default with all scopes and for ever."""
    token = new_token("ba")
    name = name or f"key-{uuid4().hex}"
    lasts = None if seconds is None else timedelta(seconds=seconds)
    given = list(scopes or SCOPES)
    await query(database, CREATE, token.id, token.digest, name, given, "test", None, lasts)
    return token


async def revoke(database: dict[str, str], key: Token) -> None:
    """Revoke a key."""
    [known] = await query(database, "SELECT name FROM api_keys WHERE id = $1", key.id)
    await query(database, REVOKE, known["name"], "test")


async def log_in(database: dict[str, str], key: Token, seconds: float = 3600) -> Token:
    """Begin a session."""
    token = new_token("bs")
    lasts = timedelta(seconds=seconds)
    await query(
        database, LOG_IN, token.id, token.digest, key.id, lasts, SESSIONS_KEPT, SESSIONS_OF_KEY
    )
    return token


async def log_out(database: dict[str, str], session: Token) -> None:
    """End a session."""
    await query(database, LOG_OUT, session.id)


def unknown(kind: Kind = "ba") -> Token:
    """Return a key that is well formed, and was never made."""
    return new_token(kind)


def bearer(key: Token) -> dict[str, str]:
    """Return the header field of a key."""
    return {"Authorization": f"Bearer {key.text}"}


def cookie(session: Token) -> dict[str, str]:
    """Return the header field of a session."""
    return {"Cookie": f"ba={session.text}"}


async def keys_are_needed(url: str) -> None:
    """Wait until an instance has noticed that there is a key."""
    async with http_client(url) as client:
        while (await client.get("/api/users")).status_code != 401:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)
