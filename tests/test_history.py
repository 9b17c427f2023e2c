from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history import (
    LARGEST,
    Accepted,
    Entry,
    Kind,
    Ledger,
    NotApplied,
    Operation,
    Read,
    Refused,
    State,
    Unknown,
    check,
)

ENTRIES = (
    Entry(1, 100, 100, None),
    Entry(2, -30, 70, "a"),
    Entry(3, -50, 20, "b"),
    Entry(4, 5, 25, "c"),
)
LEDGER = Ledger(ENTRIES, State(4, 25))

A = Accepted("a", -30, 2, 70, sent=1, answered=2)
B = Accepted("b", -50, 3, 20, sent=3, answered=4)
R = Refused("r", -30, 3, 20, sent=5, answered=6)
C = Unknown("c", 5, sent=7, answered=8)
READ = Read(4, 25, sent=9, answered=10)
B_AGAIN = replace(B, sent=11, answered=12, replayed=True)
R_AGAIN = replace(R, sent=13, answered=14, replayed=True)
N = NotApplied("n", -5, sent=3, answered=4)
OPERATIONS: tuple[Operation, ...] = (A, B, R, C, READ, B_AGAIN, R_AGAIN, N)

Changed = tuple[Operation, Operation | None]


def operations(*changed: Changed, more: tuple[Operation, ...] = ()) -> list[Operation]:
    """Return the example with some operations changed (or removed: None) and some more."""
    new = dict(changed)
    kept = [new.get(op, op) for op in OPERATIONS]
    return [op for op in kept if op is not None] + list(more)


def ledger(changed: Entry, final: State = LEDGER.final) -> Ledger:
    """Return the example's ledger with the entry of the same version replaced."""
    place = min(changed.version, len(ENTRIES))
    return Ledger((*ENTRIES[: place - 1], changed, *ENTRIES[place:]), final)


def kinds(ledger: Ledger, operations: list[Operation]) -> set[StrEnum]:
    return {violation.kind for violation in check(ledger, operations)}


WRONG: dict[str, tuple[Ledger, list[Operation], set[Kind]]] = {
    "an acknowledged change is not in the ledger": (
        LEDGER,
        operations(more=(Accepted("d", 5, 5, 30, 15, 16),)),
        {Kind.LOST_CHANGE},
    ),
    "an acknowledged balance differs": (
        LEDGER,
        operations((A, replace(A, balance=71))),
        {Kind.ALTERED_CHANGE},
    ),
    "an acknowledged amount differs": (
        LEDGER,
        operations((A, replace(A, amount=-29))),
        {Kind.ALTERED_CHANGE},
    ),
    "a balance in the ledger was changed": (
        ledger(Entry(2, -30, 71, "a")),
        operations(),
        {Kind.CHAIN_BROKEN, Kind.ALTERED_CHANGE},
    ),
    "a version is twice in the ledger": (
        Ledger((*ENTRIES, Entry(4, 0, 25, "d")), LEDGER.final),
        operations(more=(Unknown("d", 0, 5),)),
        {Kind.VERSION_DUPLICATE},
    ),
    "a version is missing in the ledger": (
        ledger(Entry(5, 5, 25, "c"), State(5, 25)),
        operations((READ, replace(READ, version=5))),
        {Kind.VERSION_GAP},
    ),
    "the ledger is empty": (Ledger((), State(0, 0)), [], {Kind.VERSION_GAP}),
    "a balance is below the floor": (
        ledger(Entry(4, -30, -10, "c"), State(4, -10)),
        operations((C, replace(C, amount=-30)), (READ, replace(READ, balance=-10))),
        {Kind.BELOW_FLOOR},
    ),
    "the account has another balance than its ledger": (
        replace(LEDGER, final=State(4, 26)),
        operations(),
        {Kind.FINAL_STATE},
    ),
    "the account has another version than its ledger": (
        replace(LEDGER, final=State(5, 25)),
        operations(),
        {Kind.FINAL_STATE},
    ),
    "two changes were answered with the same version": (
        LEDGER,
        operations(more=(Accepted("d", 5, 2, 70, 1, 2),)),
        {Kind.VERSION_SHARED, Kind.LOST_CHANGE},
    ),
    "no try can have made an entry": (LEDGER, operations((C, None)), {Kind.PHANTOM}),
    "an entry has no key": (ledger(Entry(4, 5, 25, None)), operations(), {Kind.PHANTOM}),
    "an unknown change took effect with another amount": (
        LEDGER,
        operations((C, replace(C, amount=6))),
        {Kind.PHANTOM},
    ),
    "a key took effect twice": (
        ledger(Entry(4, 5, 25, "b")),
        operations((C, None)),
        {Kind.KEY_TWICE},
    ),
    "a change that was not applied took effect": (
        LEDGER,
        operations((C, None), (N, replace(N, key="c"))),
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a key was denied by a try after it had taken effect": (
        LEDGER,
        operations(more=(NotApplied("a", -30, 5, 6),)),
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a key was denied while a try that took effect was under way": (
        LEDGER,
        operations(more=(NotApplied("b", -50, 3, 3.5),)),
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a key was denied after an unknown try, and a replay shows that this took effect": (
        LEDGER,
        operations(more=(NotApplied("c", 5, 8, 9), Accepted("c", 5, 4, 25, 11, 12, replayed=True))),
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a key was denied after an unknown try whose effect was seen before the next": (
        LEDGER,
        operations(more=(NotApplied("c", 5, 11, 12), Unknown("c", 5, 13, 14))),
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a key from before the run was denied": (
        replace(LEDGER, opening_version=3),
        [C, READ, replace(N, key="b")],
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a refused change took effect": (
        LEDGER,
        operations((C, None), (R, replace(R, key="c"))),
        {Kind.REFUSED_IN_LEDGER},
    ),
    "an accepted key is refused later": (
        LEDGER,
        operations(more=(Refused("b", -50, 3, 20, 5, 6),)),
        {Kind.REFUSED_IN_LEDGER, Kind.REPLAY_DIFFERS},
    ),
    "a replay acknowledges another balance": (
        LEDGER,
        operations((B_AGAIN, replace(B_AGAIN, balance=21))),
        {Kind.REPLAY_DIFFERS, Kind.ALTERED_CHANGE},
    ),
    "a replay refuses with another state": (
        LEDGER,
        operations((R_AGAIN, replace(R_AGAIN, version=4, balance=25))),
        {Kind.REPLAY_DIFFERS},
    ),
    "a refusal had enough funds": (
        LEDGER,
        operations((R, replace(R, amount=-20)), (R_AGAIN, None)),
        {Kind.GROUNDLESS_REFUSAL},
    ),
    "a refusal took what is held for something that is free": (
        LEDGER,
        operations((R, replace(R, amount=-10, lowest=10)), (R_AGAIN, None)),
        {Kind.GROUNDLESS_REFUSAL},
    ),
    "a refusal names a state that never was": (
        LEDGER,
        operations((R, replace(R, balance=19)), (R_AGAIN, None)),
        {Kind.NO_SUCH_STATE},
    ),
    "a replayed refusal names a state that never was": (
        LEDGER,
        operations((R, None), (R_AGAIN, replace(R_AGAIN, balance=19))),
        {Kind.NO_SUCH_STATE},
    ),
    "a read names a version that never was": (
        LEDGER,
        operations((READ, replace(READ, version=5))),
        {Kind.NO_SUCH_STATE},
    ),
    "a read is older than an acknowledged change": (
        LEDGER,
        operations((READ, None), more=(Read(2, 70, 5, 6),)),
        {Kind.STALE_READ},
    ),
    "a read is older than a read": (
        LEDGER,
        operations(more=(Read(3, 20, 11, 12),)),
        {Kind.STALE_READ},
    ),
    "a read is older than the run": (
        replace(LEDGER, opening_version=2),
        operations((A, None), more=(Read(1, 100, 0, 1),)),
        {Kind.STALE_READ},
    ),
    "a refusal is older than a read": (
        LEDGER,
        operations((R, replace(R, sent=11, answered=12))),
        {Kind.STALE_REFUSAL},
    ),
    "a read saw a change that was sent later": (
        LEDGER,
        operations(more=(Read(3, 20, 1, 2),)),
        {Kind.FUTURE_READ},
    ),
    "a read saw an unknown change that was sent later": (
        LEDGER,
        operations(more=(Read(4, 25, 5, 6),)),
        {Kind.FUTURE_READ},
    ),
    "a refusal saw a change that was sent later": (
        LEDGER,
        operations((R_AGAIN, replace(R_AGAIN, sent=1, answered=2))),
        {Kind.FUTURE_READ},
    ),
    "a change came before one acknowledged earlier": (
        LEDGER,
        operations((A, replace(A, sent=5, answered=6))),
        {Kind.ORDER_BROKEN},
    ),
    "a change came before the run": (
        replace(LEDGER, opening_version=2),
        operations(),
        {Kind.ORDER_BROKEN},
    ),
    "an unknown change came before one acknowledged earlier": (
        Ledger((*ENTRIES, Entry(5, 1, 26, "d")), State(5, 26)),
        operations((READ, None), more=(Accepted("d", 1, 5, 26, 5, 6),)),
        {Kind.ORDER_BROKEN},
    ),
    "a replay was answered before its first try was sent": (
        LEDGER,
        operations((B_AGAIN, replace(B_AGAIN, sent=1, answered=2))),
        {Kind.ORDER_BROKEN},
    ),
    "a second try says that it was the first": (
        LEDGER,
        operations((B_AGAIN, replace(B, sent=5, answered=6))),
        {Kind.ORDER_BROKEN},
    ),
}

RIGHT: dict[str, tuple[Ledger, list[Operation]]] = {
    "the example": (LEDGER, operations()),
    "a balance above a floor below zero, and a refusal that keeps it": (
        Ledger((*ENTRIES, Entry(5, -30, -5, "d")), State(5, -5), floor=-10),
        operations(
            more=(
                Accepted("d", -30, 5, -5, 14, 15),
                Refused("e", -6, 5, -5, 16, 17, lowest=-10),
            )
        ),
    ),
    "refusals for what is held, and for a balance that would be too large": (
        LEDGER,
        operations(
            (R, replace(R, amount=-10, lowest=15)),
            (R_AGAIN, None),
            more=(Refused("l", LARGEST, 4, 25, 14, 15),),
        ),
    ),
    "the operations in another order": (LEDGER, operations()[::-1]),
    "an account nobody touched": (Ledger(ENTRIES[:1], State(1, 100)), []),
    "entries made before the run": (replace(LEDGER, opening_version=4), [READ]),
    "a replay of a key from before the run": (
        replace(LEDGER, opening_version=3),
        [C, READ, B_AGAIN, R_AGAIN],
    ),
    "a key that was denied before the try that took effect, though another was unknown": (
        LEDGER,
        operations(more=(NotApplied("c", 5, 3, 4), Unknown("c", 5, 0, 1))),
    ),
    "an unknown change that never took effect": (
        LEDGER,
        operations(more=(Unknown("d", -1, 0), Unknown("r", -30, 0, 1))),
    ),
    "a change whose only answer is a replay": (
        LEDGER,
        operations((B, replace(B, replayed=True)), (R, replace(R, replayed=True))),
    ),
    "a key that was not applied at first": (
        LEDGER,
        operations(more=(NotApplied("b", -50, 1, 2), NotApplied("c", 5, 5, 6))),
    ),
    "an unknown change that took effect after it was given up": (
        LEDGER,
        operations((C, Unknown("c", 5, 0, 1)), more=(Read(3, 20, 7, 8),)),
    ),
    "answered at the very time the other was sent": (
        LEDGER,
        operations(more=(Read(2, 70, 4, 5), Read(3, 20, 10, 10))),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_has_one_kind_of_violation(name: str) -> None:
    """Each fault is found, and no other kind is reported with it."""
    ledger, operations, expected = WRONG[name]
    assert kinds(ledger, operations) == expected


@pytest.mark.parametrize("name", RIGHT)
def test_right_history_passes(name: str) -> None:
    """A correct history of any shape has no violation."""
    assert check(*RIGHT[name]) == []


def test_every_kind_has_an_example() -> None:
    """No kind of violation is left without a history that shows it."""
    assert set().union(*(expected for _, _, expected in WRONG.values())) == set(Kind)


def test_violation_is_one_sentence() -> None:
    """A violation names the operation and what contradicts it."""
    stale = Read(3, 20, 11, 12)
    (violation,) = check(LEDGER, operations(more=(stale,)))
    assert violation.text == f"{stale} was sent when version 4 was already known."


class Simulation:
    """One honest account whose clients overlap, try again, and lose answers.

    The clock has whole ticks, so that many operations share a time.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.clock = 0
        self.entries = [Entry(1, 100, 100, None)]
        self.operations: list[Operation] = []
        self.amounts: dict[str, int] = {}
        self.decided: dict[str, Accepted | Refused] = {}
        self.denied: dict[str, int] = {}

    @property
    def state(self) -> State:
        return State(self.entries[-1].version, self.entries[-1].balance)

    @property
    def ledger(self) -> Ledger:
        return Ledger(tuple(self.entries), self.state)

    def run(self, steps: int, *, again: float = 0.3) -> "Simulation":
        for _ in range(steps):
            self.clock += self.random.randint(0, 3)
            self.operations.append(self.step(again))
        self.random.shuffle(self.operations)
        return self

    def step(self, again: float) -> Operation:
        """Do one operation now; its client sent it earlier and gets the answer later."""
        sent = self.clock - self.random.randint(0, 9)
        answered = self.clock + self.random.randint(0, 9)
        doing = self.random.choices(["change", "read", "lose", "deny"], [6, 2, 1, 1])[0]
        if doing == "read":
            return Read(self.state.version, self.state.balance, sent, answered)
        key = self.key(0 if doing == "deny" else again)
        amount = self.amounts[key]
        if doing == "deny":  # no client has sent the key before, nor does before this is answered
            self.denied[key] = answered
            return NotApplied(key, amount, sent, answered)
        sent = max(sent, self.denied.get(key, sent))
        if doing == "change":
            return self.decide(key, sent, answered)
        if self.random.random() < 0.5:
            self.decide(key, sent, answered)
        given_up = self.random.choice([None, sent + self.random.randint(0, 9)])
        return Unknown(key, amount, sent, given_up)

    def key(self, again: float) -> str:
        known = [key for key in self.amounts if self.denied.get(key, 0) <= self.clock]
        if known and self.random.random() < again:
            return self.random.choice(known)
        key = f"key-{len(self.amounts)}"
        self.amounts[key] = self.random.choice([-40, -30, -20, -10, 10, 20, 30])
        return key

    def decide(self, key: str, sent: float, answered: float) -> Accepted | Refused:
        if key in self.decided:
            return replace(self.decided[key], sent=sent, answered=answered, replayed=True)
        amount, (version, balance) = self.amounts[key], (self.state.version, self.state.balance)
        if balance + amount < 0:
            self.decided[key] = Refused(key, amount, version, balance, sent, answered)
        else:
            self.entries.append(Entry(version + 1, amount, balance + amount, key))
            self.decided[key] = Accepted(key, amount, version + 1, balance + amount, sent, answered)
        return self.decided[key]


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=0), st.integers(0, 1000))
def test_honest_account_passes(seed: int, steps: int) -> None:
    """A simulated correct account has no violation."""
    simulation = Simulation(seed).run(steps)
    assert check(simulation.ledger, simulation.operations) == []


@pytest.mark.parametrize("seed", range(20))
def test_one_fault_among_a_thousand_operations_is_found(seed: int) -> None:
    """A single fault is found at any place."""
    simulation = Simulation(seed).run(1000)
    for ledger, operations, kind in faults(simulation):
        assert kind in kinds(ledger, operations)


def faults(simulation: Simulation) -> Iterator[tuple[Ledger, list[Operation], Kind]]:
    """Make one fault after another, each in the correct history."""
    choice, operations = simulation.random.choice, simulation.operations
    late = simulation.clock + 100

    first = [op for op in operations if isinstance(op, Accepted) and not op.replayed]
    lost = choice(first)
    yield without(simulation.entries, lost.key), operations, Kind.LOST_CHANGE

    denied = NotApplied(lost.key, lost.amount, late, late + 1)
    yield simulation.ledger, [*operations, denied], Kind.NOT_APPLIED_IN_LEDGER

    newest = max(op.version for op in first)
    moved = choice([op for op in first if op.version < newest])
    others = [op for op in operations if op is not moved]
    again = replace(moved, sent=late, answered=late)
    yield simulation.ledger, [*others, again], Kind.ORDER_BROKEN

    old = choice(simulation.entries[: lost.version - 1])
    stale = Read(old.version, old.balance, lost.answered + 1, lost.answered + 2)
    yield simulation.ledger, [*operations, stale], Kind.STALE_READ

    early = Read(lost.version, lost.balance, lost.sent - 2, lost.sent - 1)
    yield simulation.ledger, [*operations, early], Kind.FUTURE_READ


def without(entries: list[Entry], key: str) -> Ledger:
    """Return the ledger without the key's entry, as if it had never existed."""
    kept: list[Entry] = []
    for entry in entries:
        if entry.key != key:
            balance = entry.amount + (kept[-1].balance if kept else 0)
            kept.append(Entry(len(kept) + 1, entry.amount, balance, entry.key))
    return Ledger(tuple(kept), State(kept[-1].version, kept[-1].balance))


def test_the_check_agrees_with_an_exhaustive_search() -> None:
    """On small histories, correct or disturbed."""
    verdicts = {True: 0, False: 0}
    for seed in range(4000):
        simulation = Simulation(seed).run(2 + seed % 7, again=0)
        operations = disturbed(simulation)
        right = explainable(operations, simulation.ledger.entries)
        assert (check(simulation.ledger, operations) == []) == right, seed
        verdicts[right] += 1
    assert min(verdicts.values()) > 1000


def disturbed(simulation: Simulation) -> list[Operation]:
    """Move some operations in time, and give some another state."""
    random = simulation.random
    operations: list[Operation] = []
    for honest in simulation.operations:
        op = honest
        if random.random() < 0.4 and op.answered is not None:
            shift = random.randint(-12, 12)
            op = replace(op, sent=op.sent + shift, answered=op.answered + shift)
        if random.random() < 0.2 and isinstance(op, Read | Refused):
            row = random.choice(simulation.entries)
            op = replace(op, version=row.version, balance=row.balance)
        operations.append(op)
    return operations


def explainable(operations: list[Operation], entries: tuple[Entry, ...]) -> bool:
    """Search for a sequential order with the same answers."""
    answers = [op for op in operations if not isinstance(op, NotApplied)]
    return _explainable(answers, entries[0], entries[1:])


def _explainable(left: Sequence[Operation], now: Entry, coming: tuple[Entry, ...]) -> bool:
    if not coming and all(isinstance(op, Unknown) for op in left):
        return True
    first_answer = min((_end(op) for op in left), default=inf)
    for op in left:
        if op.sent > first_answer:
            continue
        others = [other for other in left if other is not op]
        if isinstance(op, Read | Refused):
            seen = (op.version, op.balance) == (now.version, now.balance)
            grounds = isinstance(op, Read) or op.balance + op.amount < 0
            if seen and grounds and _explainable(others, now, coming):
                return True
        elif coming and _makes(op, coming[0]) and _explainable(others, coming[0], coming[1:]):
            return True
    return False


def _end(op: Operation) -> float:
    return inf if isinstance(op, Unknown) or op.answered is None else op.answered


def _makes(op: Operation, entry: Entry) -> bool:
    if isinstance(op, Accepted):
        return entry == Entry(op.version, op.amount, op.balance, op.key)
    return isinstance(op, Unknown) and (op.key, op.amount) == (entry.key, entry.amount)
