"""Headers of answers, whichever part of the service they come from."""

from collections.abc import Iterable
from typing import Final

# All answers have them, those of the protocol itself, too: nobody guesses what they are by content,
# and no page of another site takes it in.
ALWAYS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)

# Those about money, and problems, unless they say otherwise: no cache keeps them.
NO_STORE: Final = (b"cache-control", b"no-store")


def is_event_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the answer with these headers is a stream of events, which has no end."""
    return any(value.startswith(b"text/event-stream") for _, value in headers)
