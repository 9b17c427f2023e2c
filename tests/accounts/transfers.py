"""The rules on entries, transfers, reversals, and the states that were seen."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise, permutations

from tests import history
from tests.accounts.index import Index, past_of, state_of, states_in
from tests.accounts.kinds import AccountsKind
from tests.accounts.model import (
    Done,
    Place,
    Refused,
    Request,
    Transfer,
    Try,
    Void,
)
from tests.history import Highest, Kind, Violation


def _each_account_alone_is_right(index: Index) -> Iterator[Violation]:
    """The entries and answers of each account keep the rules of `tests.history`."""
    projected = index.projected()
    for user_id in index.accounts:
        for violation in history.check(index.ledger(user_id), projected[user_id]):
            yield Violation(violation.kind, f"User {user_id}: {violation.text}")


def _transfers_are_whole(index: Index) -> Iterator[Violation]:
    """An entry that names another is named by it, with the opposite amount and the same time."""
    for (user_id, version), entry in index.entries.items():
        if entry.other is None:
            continue
        other = index.entries.get(entry.other)
        if other is None:
            yield Violation(
                AccountsKind.HALF_MISSING, f"{entry} of user {user_id} has no other half."
            )
        elif (
            (other.other, other.amount, other.at) != ((user_id, version), -entry.amount, entry.at)
            or entry.other[0] == user_id
            or entry.amount == 0
        ):
            yield Violation(
                AccountsKind.HALVES_DIFFER, f"{entry} of user {user_id} and {other} do not match."
            )


def _answers_tell_what_was_made(index: Index) -> Iterator[Violation]:
    """An acknowledged request has the states and the time of its event, a transfer's of both."""
    for op in index.tries:
        if not isinstance(op.outcome, Done):
            continue
        steps = [index.steps[node] for node in index.nodes(op.request)]
        if not steps:
            continue  # what was acknowledged is lost, which other rules report
        made = {(step.node[1], step.state.held): step for step in steps}
        seen = {(state.user_id, state.held): state for state in op.outcome.states}
        right = made.keys() == seen.keys() and {step.at for step in steps} == {op.outcome.at}
        if right and isinstance(op.request, Place | Void):  # the others are compared as changes
            right = all(state_of(seen[side]) == made[side].state for side in made)
        if right and isinstance(op.request, Transfer):
            halves = {step.node[1:] for step in steps}
            right = halves == {index.entries[half].other for half in halves}
        if not right:
            yield Violation(AccountsKind.ANSWER_DIFFERS, f"{op} made {steps}.")


def _available_is_what_is_not_held(index: Index) -> Iterator[Violation]:
    """In each answer, the balance is what is available and what is held."""
    for op in index.operations:
        for seen in states_in(op):
            if seen.balance != seen.available + seen.held:
                yield Violation(AccountsKind.AVAILABLE_DIFFERS, f"{seen} does not add up.")


def _refusals_blame_who_refused(index: Index) -> Iterator[Violation]:
    """A refusal has the account and the amount of one of the request's sides."""
    for op in index.tries:
        if isinstance(op.outcome, Refused):
            blamed = op.outcome.state.user_id, op.outcome.amount
            sides = [(side.user_id, side.amount) for side in index.sides(op.request)]
            if blamed not in sides:
                yield Violation(AccountsKind.WRONG_SIDE, f"{op} can be refused only by {sides}.")


def _keys_are_refused_by_one_side(index: Index) -> Iterator[Violation]:
    """All refusals of one transfer have the same side."""
    blamed: dict[Request, int] = {}
    for op in index.tries:
        if isinstance(op.outcome, Refused) and isinstance(op.request, Transfer):
            side = op.outcome.state.user_id
            if blamed.setdefault(op.request, side) != side:
                yield Violation(Kind.REPLAY_DIFFERS, f"{op} was also refused by another side.")


def _states_existed(index: Index) -> Iterator[Violation]:
    """Each state of an account that was seen, with what is held, is in its timeline."""
    states = {user_id: {step.state for step in line} for user_id, line in index.timelines.items()}
    for op in index.operations:
        if isinstance(op, Try) and not isinstance(op.outcome, Refused):
            continue
        for seen in states_in(op):
            if state_of(seen) not in states[seen.user_id]:
                yield Violation(Kind.NO_SUCH_STATE, f"{seen} never existed.")


def _available_keeps_the_floor(index: Index) -> Iterator[Violation]:
    """What is available is never below the floor."""
    for user_id, line in index.timelines.items():
        for step in line:
            if step.state.balance - step.state.held < index.accounts[user_id].floor:
                yield Violation(Kind.BELOW_FLOOR, f"{step} is below the floor.")


def _times_rise(index: Index) -> Iterator[Violation]:
    """Times rise with versions and numbers, and a hold ends after it was placed."""
    for user_id, account in index.accounts.items():
        for times in (
            sorted((entry.version, entry.at) for entry in account.entries),
            sorted((hold.number, hold.at) for hold in account.holds),
        ):
            for before, after in pairwise(times):
                if after[1] < before[1]:
                    yield Violation(
                        AccountsKind.TIME_WENT_BACK, f"User {user_id}: {after} follows {before}."
                    )
        for hold in account.holds:
            if hold.ended_at is not None and hold.ended_at < hold.at:
                yield Violation(AccountsKind.TIME_WENT_BACK, f"User {user_id}: {hold} ended first.")


def _held_is_the_sum_of_open_holds(index: Index) -> Iterator[Violation]:
    """Each entry and the final state have the sum of the holds that were open then."""
    for (user_id, version), entry in index.entries.items():
        held = index.steps["entry", user_id, version].state.held
        if entry.held != held:
            yield Violation(
                AccountsKind.HELD_DIFFERS, f"{entry} of user {user_id} was made with {held} held."
            )
    for user_id, account in index.accounts.items():
        held = sum(hold.amount for hold in account.holds if hold.state == "open")
        if account.final.held != held:
            yield Violation(
                AccountsKind.HELD_DIFFERS,
                f"User {user_id} has {account.final}, its open holds are {held}.",
            )


def _snapshots_have_whole_transfers(index: Index) -> Iterator[Violation]:
    """No snapshot of two accounts has one half of a transfer only."""
    halves: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for (user_id, version), entry in index.entries.items():
        if entry.other is not None:
            halves[user_id, entry.other[0]].append((version, entry.other[1]))
    highest = {pair: Highest(versions) for pair, versions in halves.items()}
    for read in index.reads:
        for one, other in permutations(read.states, 2):
            pair = one.user_id, other.user_id
            if pair in highest and highest[pair].before(one.version + 1) > other.version:
                yield Violation(AccountsKind.TORN_SNAPSHOT, f"{one} and {other} were read at once.")


def _reversals_undo_what_they_name(index: Index) -> Iterator[Violation]:
    """A reversal is the opposite of an earlier entry that is none itself, of a transfer of both."""
    for (user_id, version), entry in index.entries.items():
        if entry.reverses is None:
            continue
        first = index.entries.get((user_id, entry.reverses))
        right = (
            first is not None
            and entry.reverses < version
            and first.reverses is None
            and first.amount == -entry.amount != 0
            and (first.other is None) == (entry.other is None)
        )
        if right and first is not None and first.other is not None and entry.other is not None:
            other = index.entries.get(entry.other)
            undone = None if other is None else (entry.other[0], other.reverses)
            right = other is None or undone == first.other
        if not right:
            yield Violation(AccountsKind.REVERSAL_DIFFERS, f"{entry} does not undo {first}.")


def _past_is_a_replay(index: Index) -> Iterator[Violation]:
    """A past state is that of the last entry up to the time, as far as it was acknowledged."""
    acknowledged = {
        user_id: Highest(
            (op.answered, seen.version)
            for op in index.tries
            for seen in states_in(op)
            if seen.user_id == user_id
        )
        for user_id in {read.user_id for read in index.past_reads}
    }
    for read in index.past_reads:
        entries = index.accounts[read.user_id].entries
        known = acknowledged[read.user_id].before(read.sent)
        if isinstance(read.asked, datetime):
            before = [entry for entry in entries if entry.at <= read.asked]
        else:
            before = [entry for entry in entries if entry.version == read.asked]
        # An entry that was not acknowledged yet may have got its time, but not have been made.
        earliest = max((entry.version for entry in before if entry.version <= known), default=0)
        right = [past_of(entry) for entry in before if entry.version >= earliest]
        if read.found not in (right if earliest else [None, *right]):
            yield Violation(AccountsKind.PAST_DIFFERS, f"{read} is not among {right}.")


RULES: tuple[Callable[[Index], Iterator[Violation]], ...] = (
    _each_account_alone_is_right,
    _transfers_are_whole,
    _answers_tell_what_was_made,
    _available_is_what_is_not_held,
    _refusals_blame_who_refused,
    _keys_are_refused_by_one_side,
    _states_existed,
    _available_keeps_the_floor,
    _times_rise,
    _held_is_the_sum_of_open_holds,
    _snapshots_have_whole_transfers,
    _reversals_undo_what_they_name,
    _past_is_a_replay,
)
