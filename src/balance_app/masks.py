"""What nobody may read in a text that is kept or shown: it is replaced by `***`."""

import re
from collections.abc import Callable
from typing import Final, TypeAlias
from urllib.parse import quote

from pydantic_core import to_json

from balance_app.settings import Settings

Mask: TypeAlias = Callable[[str], str]

SHORTEST: Final = 3
# Headers and fields whose values are secrets, whatever they look like.
SECRET_FIELDS: Final = frozenset({"authorization", "cookie", "set-cookie", "password"})
# A key or a session; its id is none of the secret, and tells which one it was.
_KEY: Final = re.compile(r"(b[as]_[0-9a-z]{12}_)[0-9A-Za-z_-]{16,}")
_AUTHORIZATION: Final = re.compile(
    r"""(authorization["']?\s*[:=,]\s*b?["']?)[^\s"',;)\]}]+(?:\s+[^\s"',;)\]}]+)?""", re.IGNORECASE
)
_CREDENTIALS: Final = re.compile(r"\b(bearer|basic)\s+[0-9A-Za-z._~+/=-]{16,}", re.IGNORECASE)
# Each with the words of which one is in whatever it matches.
_PATTERNS: Final = (
    (("ba_", "bs_"), _KEY, r"\1***"),
    (("authorization",), _AUTHORIZATION, r"\1***"),
    (("bearer", "basic"), _CREDENTIALS, r"\1 ***"),
)


def mask_of(settings: Settings) -> Mask:
    """Return what masks the settings' secrets, however they are written, and what `mask_keys` does.

    A password of one or two characters is in every text.
    """
    forms = {
        form
        for secret in settings.secrets
        if len(secret) >= SHORTEST
        for form in (
            secret,
            quote(secret, safe=""),
            repr(secret)[1:-1],
            to_json(secret)[1:-1].decode(),
        )
    }
    if not forms:
        return mask_keys
    # The longest first: one may be a part of another.
    longest_first = sorted(forms, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(form) for form in longest_first))
    return lambda text: mask_keys(pattern.sub("***", text))


def mask_keys(text: str) -> str:
    """Mask keys, sessions and what a client authorizes itself with."""
    # Most texts have none. To look for the words first is ten times as fast as the patterns, which
    # would stop all threads for a second with a text of megabytes.
    lowered = text.lower() if text.isascii() else None
    for words, pattern, masked in _PATTERNS:
        if lowered is None or any(word in lowered for word in words):
            text = pattern.sub(masked, text)
    return text
