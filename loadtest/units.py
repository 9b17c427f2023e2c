"""How numbers are rounded and written, in the table as in the picture."""

import math


def round_up(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least or 1e-6))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def decimals(step: float) -> int:
    """Return how many decimals multiples of a round step need."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def in_seconds(seconds: float) -> str:
    """Write a duration in seconds: 12.34 s, 0.123 s, 0.0012 s."""
    places = 2 if seconds >= 1 else 3 if seconds >= 0.01 else 4  # noqa: PLR2004 - as above
    return f"{seconds:.{places}f} s"
