"""The rows and operations of several accounts, indexed for the rules."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tests import history
from tests.accounts.model import (
    Account,
    Capture,
    Change,
    Done,
    Entry,
    Hold,
    HoldRead,
    Operation,
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

Node = tuple[str, int, int]  # an entry, a placed or an ended hold; or a read


@dataclass(frozen=True, slots=True)
class Step:
    """An event of an account, and the state after it."""

    node: Node
    at: datetime
    state: State


@dataclass(frozen=True, slots=True)
class Half:
    """The change of one account that a request asks for."""

    user_id: int
    amount: int
    key: str


class Index:
    """The accounts and the operations, indexed for the rules."""

    def __init__(self, accounts: Mapping[int, Account], operations: tuple[Operation, ...]) -> None:
        self.accounts = accounts
        self.operations = operations
        self.entries = {
            (user_id, entry.version): entry
            for user_id, account in accounts.items()
            for entry in account.entries
        }
        self.holds = {
            (user_id, hold.number): hold
            for user_id, account in accounts.items()
            for hold in account.holds
        }
        self.captures: dict[tuple[int, int], Entry] = {}
        for (user_id, _), entry in self.entries.items():
            if entry.hold is not None:
                self.captures.setdefault((user_id, entry.hold), entry)
        self.placed: defaultdict[tuple[int, str], list[Hold]] = defaultdict(list)
        for (user_id, _), hold in self.holds.items():
            if hold.key is not None:
                self.placed[user_id, hold.key].append(hold)
        self.by_name: dict[tuple[int, str | None], Entry] = {}
        for (user_id, _), entry in self.entries.items():
            self.by_name.setdefault((user_id, self.name(entry)), entry)
        self.timelines = {user_id: _timeline(user_id, each) for user_id, each in accounts.items()}
        self.steps = {step.node: step for line in self.timelines.values() for step in line}

        self.tries = [op for op in operations if isinstance(op, Try)]
        self.reads = [op for op in operations if isinstance(op, Read)]
        self.hold_reads = [op for op in operations if isinstance(op, HoldRead)]
        self.places: defaultdict[tuple[int, str | None], list[Try]] = defaultdict(list)
        self.voids: set[tuple[int, int]] = set()
        for op in self.tries:
            if isinstance(op.request, Place):
                self.places[op.request.user_id, op.request.key].append(op)
            elif isinstance(op.request, Void) and (
                isinstance(op.outcome, Done) or op.outcome is Undecided.UNKNOWN
            ):
                self.voids.add((op.request.user_id, op.request.number))
        self.past_reads = [op for op in operations if isinstance(op, PastRead)]

    def name(self, entry: Entry) -> str | None:
        """Return what makes an entry the only one of its request, for its account."""
        if entry.reverses is not None:
            return f"reversal of {entry.reverses}"
        if entry.hold is not None:
            return f"capture of {entry.hold}"
        if entry.other is not None and entry.amount > 0:
            payers = self.entries.get(entry.other)
            return None if payers is None else f"{entry.other[0]}:{payers.key}"
        return entry.key

    def halves(self, request: Request) -> list[Half]:
        """Return the changes that a request asks for."""
        match request:
            case Change(user_id, amount, key):
                return [Half(user_id, amount, key)]
            case Transfer(payer, payee, amount, key):
                return [Half(payer, -amount, key), Half(payee, amount, f"{payer}:{key}")]
            case Capture(user_id, number, amount):
                hold = self.holds.get((user_id, number))
                taken = amount if amount is not None or hold is None else hold.amount
                return [Half(user_id, -(taken or 0), f"capture of {number}")]
            case Reverse(user_id, version):
                first = self.entries.get((user_id, version))
                sides = [] if first is None else [(user_id, version)]
                if first is not None and first.other in self.entries:
                    sides.append(first.other)
                return [
                    Half(side[0], -self.entries[side].amount, f"reversal of {side[1]}")
                    for side in sides
                ]
            case _:
                return []

    def nodes(self, request: Request) -> list[Node]:
        """Return the events in which a request took effect."""
        match request:
            case Place(user_id, _, key):
                return [("placed", user_id, hold.number) for hold in self.placed[user_id, key][:1]]
            case Void(user_id, number):
                hold = self.holds.get((user_id, number))
                ended = hold is not None and hold.state == "voided"
                return [("ended", user_id, number)] if ended else []
            case _:
                names = [(half.user_id, half.key) for half in self.halves(request)]
                return [
                    ("entry", name[0], self.by_name[name].version)
                    for name in names
                    if name in self.by_name
                ]

    def ledger(self, user_id: int) -> history.Ledger:
        """Return the ledger of one account, in the form that `tests.history` checks."""
        account = self.accounts[user_id]
        return history.Ledger(
            tuple(
                history.Entry(each.version, each.amount, each.balance, self.name(each))
                for each in account.entries
            ),
            history.State(account.final.version, account.final.balance),
            account.opening_version,
            account.floor,
        )

    def projected(self) -> defaultdict[int, list[history.Operation]]:
        """Return the changes and reads of each account, in the form that `tests.history` checks."""
        operations: defaultdict[int, list[history.Operation]] = defaultdict(list)
        for number, op in enumerate(self.tries):
            for half in self.sides(op.request):
                projected = self._projection(op, half, number)
                if projected is not None:
                    operations[half.user_id].append(projected)
        for read in self.reads:
            for seen in read.states:
                operations[seen.user_id].append(
                    history.Read(seen.version, seen.balance, read.sent, read.answered)
                )
        return operations

    def sides(self, request: Request) -> list[Half]:
        """Return the amounts that the state of an account may refuse."""
        if isinstance(request, Place):
            return [Half(request.user_id, -request.amount, request.key)]
        return self.halves(request)

    def _projection(self, op: Try, half: Half, number: int) -> history.Operation | None:
        key, amount, sent, answered = half.key, half.amount, op.sent, op.answered
        if isinstance(op.outcome, Refused) and op.outcome.state.user_id == half.user_id:
            seen = op.outcome.state
            lowest = seen.held + self.accounts[half.user_id].floor
            if isinstance(op.request, Reverse | Capture):
                key = f"{key}, try {number}"  # it has no key to remember: the next try may succeed
            return history.Refused(
                key, amount, seen.version, seen.balance, sent, answered, op.replayed, lowest
            )
        if isinstance(op.request, Place):
            return None  # a hold is no entry
        if op.outcome is Undecided.UNKNOWN:
            return history.Unknown(key, amount, sent, answered)
        if op.outcome is Undecided.NOT_APPLIED:
            return history.NotApplied(key, amount, sent, answered)
        if isinstance(op.outcome, Done):
            for seen in op.outcome.states:
                if seen.user_id == half.user_id:
                    return history.Accepted(
                        key, amount, seen.version, seen.balance, sent, answered, op.replayed
                    )
        return None


def _timeline(user_id: int, account: Account) -> list[Step]:
    """Return all events of an account with the states after them, in the order of their times.

    What is overdue ends before anything else that happens at this time.
    """
    amounts = {hold.number: hold.amount for hold in account.holds}
    events: list[tuple[datetime, int, int, Node, int, int]] = []  # ..., amount, held
    for entry in account.entries:
        released = -amounts.get(entry.hold or 0, 0)
        node = ("entry", user_id, entry.version)
        events.append((entry.at, 1, entry.version, node, entry.amount, released))
    for hold in account.holds:
        node = ("placed", user_id, hold.number)
        events.append((hold.at, 2, hold.number, node, 0, hold.amount))
        if hold.state in {"voided", "expired"} and hold.ended_at is not None:
            node = ("ended", user_id, hold.number)
            rank = 0 if hold.state == "expired" else 3
            events.append((hold.ended_at, rank, hold.number, node, 0, -hold.amount))
    steps, version, balance, held = [], 0, 0, 0
    for at, _, number, node, amount, more in sorted(events):
        version = number if node[0] == "entry" else version
        balance, held = balance + amount, held + more
        steps.append(Step(node, at, State(version, balance, held)))
    return steps


def states_in(op: Operation) -> tuple[Seen, ...]:
    """Return the states in an answer."""
    match op:
        case Read(states):
            return states
        case Try(outcome=Done(states)):
            return states
        case Try(outcome=Refused(state)):
            return (state,)
        case _:
            return ()


def state_of(seen: Seen) -> State:
    return State(seen.version, seen.balance, seen.held)


def past_of(entry: Entry) -> Past:
    return Past(entry.version, entry.balance, entry.held, entry.at)
