"""How often somebody may do something: token buckets by name, in bounded memory."""

from typing import Final

# A wait that rounding made, and that nobody could sleep.
_ROUNDING: Final = 1e-9


class TokenBuckets:
    """A bucket of `burst` tokens for each name, filled at `rate` tokens a second.

    At most `most` names are remembered, the ones that took last. One that is forgotten has a full
    bucket again.
    """

    __slots__ = ("_full_at", "_most", "_patience", "_seconds")

    def __init__(self, rate: float, burst: float, most: int) -> None:
        self._seconds = 1 / rate  # until the next token
        self._patience = (max(burst, 1.0) - 1) * self._seconds
        self._most = most
        # When each bucket will be full: all that has to be known of it (GCRA, ITU-T I.371).
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        """Return how many names are remembered."""
        return len(self._full_at)

    def take(self, name: str, now: float) -> float:
        """Take a token at `now` (monotonic seconds), if there is one.

        Returns:
            0.0: it is taken. Otherwise the seconds until there is one; nothing was taken.
        """
        full_at = max(self._full_at.pop(name, now), now)
        wait = full_at - now - self._patience
        if wait <= _ROUNDING:
            wait = 0.0
            full_at += self._seconds
        self._full_at[name] = full_at
        if len(self._full_at) > self._most:
            del self._full_at[next(iter(self._full_at))]
        return wait
