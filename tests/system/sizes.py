"""The size of the system tests: small by default, full with BALANCE_APP_FULL=1."""

import os
import sys

FULL = os.environ.get("BALANCE_APP_FULL") == "1"


def size(small: int, full: int) -> int:
    """Return the size of this run."""
    return full if FULL else small


def report_figures(figures: str) -> None:
    """Print a test's measurements (`pytest -rP` shows them for passed tests)."""
    sys.stdout.write(f"{figures}\n")
