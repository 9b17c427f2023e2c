"""How much the system tests do: little by default, everything with BALANCE_APP_FULL=1."""

import os
import sys

FULL = os.environ.get("BALANCE_APP_FULL") == "1"


def size(small: int, full: int) -> int:
    """Return the size of this run."""
    return full if FULL else small


def report_figures(figures: str) -> None:
    """Show what a test measured (`pytest -rP` prints it for tests that passed)."""
    sys.stdout.write(f"{figures}\n")
