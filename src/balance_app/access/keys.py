"""API keys and sessions as text, and the principals that they stand for."""

import base64
import hashlib
import re
import secrets
import zlib
from datetime import datetime
from typing import Final, Literal, NamedTuple, TypeAlias, cast, get_args

from starlette.requests import Request

from balance_app.access.errors import InsufficientScope

Scope: TypeAlias = Literal["read", "withdraw", "change", "open", "operate", "metrics"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

Kind: TypeAlias = Literal["ba", "bs"]  # an API key, a session

# The prefix and the checksum let scanners find keys that were published by mistake.
_TOKEN: Final = re.compile(rb"(ba|bs)_([0-9a-z]{12})_([0-9A-Za-z_-]{43})_([0-9A-Za-z_-]{6})")
_ID_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


class Principal(NamedTuple):
    """Who sends a request; `name` is the key's, None where nobody was asked."""

    name: str | None
    scopes: frozenset[str]
    # of the key; of the session, if it came with one
    key_id: str | None = None
    session_id: str | None = None
    expires_at: datetime | None = None

    def require(self, *scopes: Scope) -> None:
        """Check that it has one of these scopes.

        Raises:
            InsufficientScope: it has none of them.
        """
        if self.scopes.isdisjoint(scopes):
            raise InsufficientScope(scopes)


# Who sends a request where no keys are needed, and who sends one to an open route.
ANONYMOUS: Final = Principal(None, frozenset(SCOPES))
ANYBODY: Final = Principal(None, frozenset())


class Token(NamedTuple):
    """A new key or session: its text, which is shown once, and what is stored of it."""

    text: str
    id: str
    digest: bytes


def new_token(kind: Kind) -> Token:
    """Return a key (`ba`) or session (`bs`): an id, 256 random bits, a CRC-32 of both."""
    token_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(12))
    body = f"{kind}_{token_id}_{secrets.token_urlsafe(32)}"
    text = f"{body}_{_checksum(body.encode())}"
    return Token(text, token_id, digest_of(text.encode()))


def digest_of(token: bytes) -> bytes:
    """Return what is stored of a key: a slow hash is for what people can guess."""
    return hashlib.sha256(token).digest()


def is_token(text: bytes) -> bool:
    """Return whether this may be a key or a session: its form and checksum are right."""
    parts = _TOKEN.fullmatch(text)
    return parts is not None and _checksum(text[:-7]).encode() == parts[4]


def principal(request: Request) -> Principal:
    """Return who sends the request."""
    return cast("Principal", request.scope["principal"])


def _checksum(body: bytes) -> str:
    return base64.urlsafe_b64encode(zlib.crc32(body).to_bytes(4, "big")).decode().rstrip("=")
