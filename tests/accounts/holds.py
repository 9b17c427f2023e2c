"""The rules on holds: each ends once, as it was acknowledged."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain
from math import inf

from tests.accounts.index import Index
from tests.accounts.kinds import AccountsKind
from tests.accounts.model import (
    Capture,
    Done,
    Ended,
    Exceeded,
    HoldRead,
    Operation,
    Place,
    Refused,
    Request,
    Try,
    Undecided,
    Void,
)
from tests.history import Highest, Kind, Violation


def _holds_are_as_placed(index: Index) -> Iterator[Violation]:
    """Each acknowledged hold is there as it was placed; no refused one is."""
    for op in index.tries:
        if not isinstance(op.request, Place):
            continue
        holds = index.placed.get((op.request.user_id, op.request.key), [])
        if isinstance(op.outcome, Done):
            expected = (op.outcome.number, op.request.amount)
            if not holds:
                yield Violation(AccountsKind.HOLD_LOST, f"{op} is not there.")
            elif expected not in [(hold.number, hold.amount) for hold in holds]:
                yield Violation(AccountsKind.HOLD_ALTERED, f"{op} is there as {holds}.")
        elif isinstance(op.outcome, Refused) and holds:
            yield Violation(Kind.REFUSED_IN_LEDGER, f"{op} is there as {holds}.")


def _holds_have_a_source(index: Index) -> Iterator[Violation]:
    """Each hold was placed by a try, and each voided one ended by a try; a key places one hold."""
    for (user_id, number), hold in index.holds.items():
        place = Place(user_id, hold.amount, hold.key or "")
        if not any(
            isinstance(op.outcome, Done | Refused)  # other rules compare them with the hold
            or (op.outcome is Undecided.UNKNOWN and op.request == place)
            for op in index.places[user_id, hold.key]
        ):
            yield Violation(AccountsKind.HOLD_PHANTOM, f"No try can have placed {hold}.")
        if hold.state == "voided" and (user_id, number) not in index.voids:
            yield Violation(AccountsKind.END_PHANTOM, f"No try can have voided {hold}.")
    for (user_id, key), holds in index.placed.items():
        if len(holds) > 1:
            yield Violation(Kind.KEY_TWICE, f"Key {key!r} of user {user_id} placed {holds}.")


def _holds_end_once_and_as_acknowledged(index: Index) -> Iterator[Violation]:
    """All answers that a hold has ended agree with how and when it did."""
    for op in index.operations:
        told = told_state(op)
        if told is None:
            continue
        user_id, number, state, ended_at = told
        hold = index.holds.get((user_id, number))
        if hold is None:
            yield Violation(AccountsKind.HOLD_LOST, f"{op} is of a hold that is not there.")
        elif state == "open":
            pass  # it may have ended later
        elif hold.state == "open":
            yield Violation(AccountsKind.END_LOST, f"{op} is of a hold that is open: {hold}.")
        elif hold.state != state:
            yield Violation(AccountsKind.ENDED_TWICE, f"{op} is of a hold that was {hold.state}.")
        elif ended_at is not None and ended_at != hold.ended_at:
            yield Violation(AccountsKind.ANSWER_DIFFERS, f"{op} is of {hold}.")


def _holds_expire_when_due(index: Index) -> Iterator[Violation]:
    """No hold expires before its time."""
    for hold in index.holds.values():
        if (
            hold.state == "expired"
            and hold.ended_at is not None
            and hold.ended_at < hold.expires_at
        ):
            yield Violation(AccountsKind.EXPIRED_EARLY, f"{hold} expired before its time.")


def _not_applied_holds_are_as_before(index: Index) -> Iterator[Violation]:
    """No hold is placed or voided by a key or an address that was answered "not applied".

    As for changes, unless by a later try.
    """
    later: defaultdict[Request, float] = defaultdict(lambda: -inf)
    for op in index.tries:
        if isinstance(op.outcome, Done) or op.outcome is Undecided.UNKNOWN:
            later[op.request] = max(later[op.request], op.sent)
    for op in index.tries:
        if op.outcome is Undecided.NOT_APPLIED and isinstance(op.request, Place | Void):
            nodes = index.nodes(op.request)
            if nodes and later[op.request] < op.answered:
                yield Violation(Kind.NOT_APPLIED_IN_LEDGER, f"{op} made {nodes}.")


def _captures_are_entries(index: Index) -> Iterator[Violation]:
    """A captured hold has the entry of what was captured, at the same time; others have none."""
    for place, hold in index.holds.items():
        entry = index.captures.get(place)
        made = None if entry is None else (-entry.amount, entry.at)
        captured = hold.captured or 0
        expected = (captured, hold.ended_at) if hold.state == "captured" else None
        if (
            made != expected
            or captured > hold.amount
            or (hold.state == "captured" and captured < 1)
        ):
            yield Violation(AccountsKind.CAPTURE_DIFFERS, f"{hold} and {entry} do not match.")
    for place, entry in index.captures.items():
        if place not in index.holds:
            yield Violation(
                AccountsKind.CAPTURE_DIFFERS, f"{entry} is of a hold that is not there."
            )


def _refused_captures_have_grounds(index: Index) -> Iterator[Violation]:
    """A capture is too large only for a hold that is smaller."""
    for op in index.tries:
        if isinstance(op.outcome, Exceeded) and isinstance(op.request, Capture):
            hold = index.holds.get((op.request.user_id, op.request.number))
            amount = 0 if hold is None else hold.amount
            if (op.request.amount or 0) <= amount or op.outcome.amount != amount:
                yield Violation(Kind.GROUNDLESS_REFUSAL, f"{op} was refused by {hold}.")


def _overdue_holds_are_open_to_nobody(index: Index) -> Iterator[Violation]:
    """No request is sent after the hold's end was known to have come, and finds it open."""
    now = Highest(
        (op.answered, op.outcome.at.timestamp())
        for op in index.tries
        if isinstance(op.outcome, Done) and not op.replayed
    )
    for op in chain(index.tries, index.hold_reads):
        match op:
            case Try(Capture(user_id, number) | Void(user_id, number), Done(), replayed=False):
                pass
            case HoldRead(user_id, number, "open"):
                pass
            case _:
                continue
        hold = index.holds.get((user_id, number))
        if hold is not None and hold.expires_at.timestamp() <= now.before(op.sent):
            yield Violation(AccountsKind.OVERDUE, f"{op} was sent when {hold} was overdue.")


RULES: tuple[Callable[[Index], Iterator[Violation]], ...] = (
    _holds_are_as_placed,
    _holds_have_a_source,
    _not_applied_holds_are_as_before,
    _holds_end_once_and_as_acknowledged,
    _holds_expire_when_due,
    _captures_are_entries,
    _refused_captures_have_grounds,
    _overdue_holds_are_open_to_nobody,
)


def told_state(op: Operation) -> tuple[int, int, str, datetime | None] | None:
    """Return the hold that an answer is of, its state, and when it ended if it tells."""
    match op:
        case HoldRead(user_id, number, state):
            return user_id, number, state, None
        case Try(Capture(user_id, number) | Void(user_id, number), Ended(state, ended_at)):
            return user_id, number, state, ended_at
        case Try(Capture(user_id, number), Done()):
            return user_id, number, "captured", None
        case Try(Void(user_id, number), Done()):
            return user_id, number, "voided", None
        case _:
            return None
