from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.accounts.check import check_accounts
from tests.accounts.kinds import AccountsKind as K
from tests.accounts.model import (
    Account,
    Capture,
    Change,
    Done,
    Ended,
    Entry,
    Exceeded,
    Hold,
    HoldRead,
    Operation,
    Outcome,
    Past,
    PastRead,
    Place,
    Read,
    Refused,
    Request,
    Reverse,
    Seen,
    State,
    Transfer,
    Try,
    Undecided,
    Void,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


class Simulation:
    """Three honest accounts, whose clients overlap, try again, and lose answers.

    PostgreSQL's clock has a time of its own for each event; that of the clients has whole ticks.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.clock = 0
        self.time = START
        self.accounts = {
            user_id: Account((Entry(1, 60, 60, None, START),), (), State(1, 60), floor)
            for user_id, floor in ((1, 0), (2, 0), (3, -50))
        }
        self.changed = 0  # what the changes and captures add to the total of all balances
        self.decided: dict[Request, Outcome] = {}
        self.operations: list[Operation] = []

    def run(self, steps: int) -> "Simulation":
        for _ in range(steps):
            self.clock += self.random.randint(0, 3)
            self.time += timedelta(seconds=1)
            self.operations.append(self.step())
            assert sum(each.final.balance for each in self.accounts.values()) == 180 + self.changed
        self.random.shuffle(self.operations)
        return self

    def step(self) -> Operation:
        """Do one operation now; its client sent it earlier and gets the answer later."""
        sent = self.clock - self.random.randint(0, 9)
        answered = self.clock + self.random.randint(0, 9)
        user_id = self.random.choice(list(self.accounts))
        for each in self.accounts:
            self.expire(each)
        account = self.accounts[user_id]
        match self.random.choices(["try", "read", "hold", "past", "lose"], [8, 2, 2, 1, 1])[0]:
            case "read":
                users = self.random.sample(list(self.accounts), self.random.randint(1, 3))
                return Read(tuple(self.seen(each) for each in users), sent, answered)
            case "hold" if account.holds:
                hold = self.random.choice(account.holds)
                return HoldRead(user_id, hold.number, hold.state, sent, answered)
            case "past":
                made = self.random.choice(account.entries)
                past = Past(made.version, made.balance, made.held, made.at)
                asked = made.at if self.random.random() < 0.5 else made.version
                return PastRead(user_id, asked, past, sent, answered)
            case "lose":
                request = self.request(user_id)
                if self.random.random() < 0.5:
                    self.decide(request)
                return Try(request, Undecided.UNKNOWN, sent, answered)
        request = self.request(user_id)
        outcome, replayed = self.decide(request)
        return Try(request, outcome, sent, answered, replayed)

    def request(self, user_id: int) -> Request:
        if self.decided and self.random.random() < 0.2:
            return self.random.choice(list(self.decided))
        account, amount = self.accounts[user_id], self.random.randint(1, 40)
        key = f"key-{len(self.decided)}"
        choices: list[Request] = [
            Change(user_id, self.random.choice([amount, -amount]), key),
            Transfer(user_id, user_id % 3 + 1, amount, key),
            Place(user_id, amount, key),
        ]
        open_holds = [hold for hold in account.holds if hold.state == "open"]
        for hold in self.random.sample(open_holds, min(1, len(open_holds))):
            taken = self.random.choice([None, amount])
            choices += [Capture(user_id, hold.number, taken), Void(user_id, hold.number)]
        reversible = [each for each in account.entries if each.reverses is None]
        choices.append(Reverse(user_id, self.random.choice(reversible).version))
        return self.random.choice(choices)

    def decide(self, request: Request) -> tuple[Outcome, bool]:
        """Do a request, or repeat the first answer; return it, and whether it is repeated."""
        one = self.one_of_both(request)
        if one in self.decided:
            return self.decided[one], True
        outcome = self.do(request)
        if not (isinstance(outcome, Refused) and isinstance(request, Reverse)):  # it has no key
            self.decided[one] = outcome
        return outcome, False

    def one_of_both(self, request: Request) -> Request:
        """Return the same request for the reversal of a transfer by either half."""
        if isinstance(request, Reverse):
            half = request.user_id, request.version
            other = self.accounts[half[0]].entries[half[1] - 1].other
            return Reverse(*min(half, other or half))
        return request

    def do(self, request: Request) -> Outcome:
        match request:
            case Change(user_id, amount, key):
                return self.move((user_id, amount, key, None))
            case Transfer(payer, payee, amount, key):
                return self.move((payer, -amount, key, None), (payee, amount, None, None))
            case Reverse(user_id, version):
                return self.reverse(user_id, version)
            case Place(user_id, amount, key):
                return self.place(user_id, amount, key)
            case Capture() | Void():
                return self.end_hold(request)

    def end_hold(self, request: Capture | Void) -> Outcome:
        user_id, number = request.user_id, request.number
        (hold,) = [each for each in self.accounts[user_id].holds if each.number == number]
        if hold.ended_at is not None:
            return Ended(hold.state, hold.ended_at)
        if isinstance(request, Void):
            self.end(user_id, hold, "voided")
            return Done((self.seen(user_id),), self.time)
        captured = request.amount or hold.amount
        if captured > hold.amount:
            return Exceeded(hold.amount)
        self.end(user_id, hold, "captured", captured)
        return self.move((user_id, -captured, None, None), hold=number)

    def reverse(self, user_id: int, version: int) -> Outcome:
        first = self.accounts[user_id].entries[version - 1]
        sides = [(user_id, version)] + ([] if first.other is None else [first.other])
        moves = [
            (side, -self.accounts[side].entries[number - 1].amount, None, number)
            for side, number in sides
        ]
        return self.move(*moves)

    def place(self, user_id: int, amount: int, key: str) -> Outcome:
        account = self.accounts[user_id]
        if self.seen(user_id).available - amount < account.floor:
            return Refused(self.seen(user_id), -amount)
        ends = sum(hold.state != "open" for hold in account.holds)
        number = len(account.holds) + ends + 1
        until = self.time + timedelta(seconds=self.random.choice([3, 30, 999]))
        hold = Hold(number, amount, key, self.time, until)
        held = account.final.held + amount
        self.accounts[user_id] = replace(
            account, holds=(*account.holds, hold), final=replace(account.final, held=held)
        )
        return Done((self.seen(user_id),), self.time, number)

    def move(
        self, *moves: tuple[int, int, str | None, int | None], hold: int | None = None
    ) -> Outcome:
        for user_id, amount, _, _ in sorted(moves, key=lambda move: move[0]):
            if self.seen(user_id).available + amount < self.accounts[user_id].floor:
                return Refused(self.seen(user_id), amount)
        made = {user_id: self.accounts[user_id].final.version + 1 for user_id, *_ in moves}
        for user_id, amount, key, reverses in moves:
            account = self.accounts[user_id]
            others = [(other, version) for other, version in made.items() if other != user_id]
            final = replace(
                account.final, version=made[user_id], balance=account.final.balance + amount
            )
            entry = Entry(
                final.version,
                amount,
                final.balance,
                key,
                self.time,
                final.held,
                others[0] if others else None,
                reverses,
                hold,
            )
            self.accounts[user_id] = replace(
                account, entries=(*account.entries, entry), final=final
            )
            self.changed += 0 if others else amount
        return Done(tuple(self.seen(user_id) for user_id, *_ in moves), self.time)

    def expire(self, user_id: int) -> None:
        for hold in self.accounts[user_id].holds:
            if hold.state == "open" and hold.expires_at <= self.time:
                self.end(user_id, hold, "expired")

    def end(self, user_id: int, hold: Hold, state: str, captured: int | None = None) -> None:
        account = self.accounts[user_id]
        ended = replace(hold, state=state, ended_at=self.time, captured=captured)
        held = account.final.held - hold.amount
        self.accounts[user_id] = replace(
            account,
            holds=tuple(ended if each is hold else each for each in account.holds),
            final=replace(account.final, held=held),
        )

    def seen(self, user_id: int) -> Seen:
        state = self.accounts[user_id].final
        return seen(user_id, state)


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=0), st.integers(0, 600))
def test_honest_accounts_pass(seed: int, steps: int) -> None:
    """Simulated correct accounts have no violation, and transfers leave the total as it is."""
    simulation = Simulation(seed).run(steps)
    assert check_accounts(simulation.accounts, simulation.operations) == []


@pytest.mark.parametrize("seed", range(20))
def test_one_fault_among_a_thousand_operations_is_found(seed: int) -> None:
    """A single fault is found at any place."""
    simulation = Simulation(seed).run(1000)
    for accounts, operations, kind in faults(simulation):
        assert kind in {each.kind for each in check_accounts(accounts, operations)}


def faults(
    simulation: Simulation,
) -> Iterator[tuple[dict[int, Account], list[Operation], StrEnum]]:
    """Make one fault after another, each in the correct history."""
    accounts, operations = simulation.accounts, simulation.operations
    choice = simulation.random.choice
    entries = [(user_id, row) for user_id, each in accounts.items() for row in each.entries]
    holds = [(user_id, row) for user_id, each in accounts.items() for row in each.holds]

    user_id, half = choice([row for row in entries if row[1].other is not None])
    assert half.other is not None
    other = half.other[0], half.other[1] + 999
    yield changed(accounts, user_id, half, replace(half, other=other)), operations, K.HALF_MISSING
    late = replace(half, at=half.at + timedelta(microseconds=1))
    yield changed(accounts, user_id, half, late), operations, K.HALVES_DIFFER
    held = replace(half, held=half.held + 1)
    yield changed(accounts, user_id, half, held), operations, K.HELD_DIFFERS

    before = accounts[half.other[0]].entries[half.other[1] - 2]
    torn = Read(
        (
            seen(user_id, half),
            seen(half.other[0], before),
        ),
        -inf,
        inf,
    )
    yield accounts, [*operations, torn], K.TORN_SNAPSHOT

    user_id, reversal = choice([row for row in entries if row[1].reverses is not None])
    itself = replace(reversal, reverses=reversal.version)
    yield changed(accounts, user_id, reversal, itself), operations, K.REVERSAL_DIFFERS

    user_id, voided = choice([row for row in holds if row[1].state == "voided"])
    expired = replace(voided, state="expired")
    yield changed(accounts, user_id, voided, expired), operations, K.EXPIRED_EARLY
    user_id, captured = choice([row for row in holds if row[1].state == "captured"])
    freed = replace(captured, state="voided", captured=None)
    yield changed(accounts, user_id, captured, freed), operations, K.CAPTURE_DIFFERS

    done = choice([op for op in operations if isinstance(op, Try) and isinstance(op.outcome, Done)])
    assert isinstance(done.outcome, Done)
    moved = replace(done, outcome=replace(done.outcome, at=START - timedelta(seconds=1)))
    others = [op for op in operations if op is not done]
    yield accounts, [*others, moved], K.ANSWER_DIFFERS

    past = choice([op for op in operations if isinstance(op, PastRead) and op.found is not None])
    assert past.found is not None
    wrong = replace(past, found=replace(past.found, balance=past.found.balance + 1))
    yield accounts, [*operations, wrong], K.PAST_DIFFERS

    user_id, ended = choice([row for row in holds if row[1].state in {"captured", "voided"}])
    seen_end = HoldRead(user_id, ended.number, ended.state, simulation.clock, simulation.clock + 90)
    stale = HoldRead(user_id, ended.number, "open", simulation.clock + 99, simulation.clock + 100)
    kind = K.NO_ORDER if ended.expires_at > simulation.time else K.OVERDUE
    yield accounts, [*operations, seen_end, stale], kind


def changed(
    accounts: dict[int, Account], user_id: int, old: Entry | Hold, new: Entry | Hold
) -> dict[int, Account]:
    """Return the accounts with one row changed."""
    account = accounts[user_id]
    if isinstance(new, Entry):
        entries = tuple(new if row is old else row for row in account.entries)
        return {**accounts, user_id: replace(account, entries=entries)}
    holds = tuple(new if row is old else row for row in account.holds)
    return {**accounts, user_id: replace(account, holds=holds)}


def seen(user_id: int, state: State | Entry) -> Seen:
    return Seen(user_id, state.version, state.balance, state.held, state.balance - state.held)
