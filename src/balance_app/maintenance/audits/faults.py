"""What an audit has found so far, and the error that reports it."""

from collections.abc import Iterable
from typing import Final

from balance_app.maintenance.batches import State, number

MOST_FAULTS: Final = 5  # that are reported in full
# of the state of a run
NONE: Final[State] = {"wrong": 0, "named": []}


class LedgerMismatchError(Exception):
    """The ledger contradicts itself or data derived from it."""


def add(state: State, faults: Iterable[str]) -> State:
    """Return the members of the state with these faults added."""
    found = list(faults)
    return {
        "wrong": state["wrong"] + len(found),
        "named": [*state["named"], *found][:MOST_FAULTS],
    }


def differ(state: State, checked: str) -> LedgerMismatchError:
    """Return the error that names the first faults and counts the others."""
    named = "; ".join(state["named"])
    rest = state["wrong"] - MOST_FAULTS
    more = f"; and {number(rest)} more" if rest > 0 else ""
    verb = "differs" if state["wrong"] == 1 else "differ"
    return LedgerMismatchError(f"{number(state['wrong'])} of {checked} {verb}: {named}{more}")
