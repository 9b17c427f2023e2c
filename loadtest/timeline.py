"""The answers in the order in which they came: who gave them, how each ended, what it showed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.accounts import Account
from loadtest.burst import Answer, Outcome
from loadtest.verdict import Refusal, classify

ACCEPTED: Final = "accepted"
REFUSED: Final = "refused: insufficient funds"


@dataclass(frozen=True, slots=True)
class Point:
    """One answer; times are seconds.

    `request` numbers the requests from 0, `after` runs from the release, `latency` as in `Answer`.
    `ending` is ACCEPTED, REFUSED, or names what else it was. `state` is what an accepted or refused
    answer says of the account.
    """

    request: int
    after: float
    latency: float
    server_id: str
    ending: str
    state: Account | Refusal | None


def timeline(outcomes: Sequence[Outcome]) -> list[Point]:
    """Return the answers by time; a request without one has no time, and is left out."""
    points = [
        Point(request, outcome.after_seconds, outcome.seconds, outcome.server_id, *_ending(outcome))
        for request, outcome in enumerate(outcomes)
        if isinstance(outcome, Answer)
    ]
    return sorted(points, key=lambda point: point.after)


def _ending(answer: Answer) -> tuple[str, Account | Refusal | None]:
    match classify(answer):
        case Account() as state:
            return ACCEPTED, state
        case Refusal() as state:
            return REFUSED, state
        case str() as ending:
            return ending, None
