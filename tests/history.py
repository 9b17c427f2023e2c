"""An exact check of the answers that an account's clients got against its ledger.

Every answer has the version that it made or saw, so the versions order all changes, and each read
or refusal comes between the change that made its state and the next. A history is linearizable
(Herlihy and Wing, 1990) if this order contradicts no answer and keeps the real-time order: an
operation answered before another was sent comes before it. If the order has to be guessed, the
decision is NP-complete (Gibbons and Korach, 1997). Here it is given: each operation only has to be
compared with the highest version known before it was sent, by sorting and bisection in O(n log n).

The rules on time are complete: of two operations in the wrong order, the one sent later is a read
or a refusal (`STALE_READ`, `STALE_REFUSAL`) or a change; in that case the one answered earlier is
a change too (`ORDER_BROKEN`) or saw a state (`FUTURE_READ`). An answer that contradicts the ledger
is reported for that only, and is ignored by all other rules.

Times are monotonic seconds of one clock; equal times count as simultaneous.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum, unique
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf

LARGEST = 2**53 - 1  # no balance is larger


@dataclass(frozen=True, slots=True)
class Accepted:
    """An acknowledged change; `replayed` if the answer repeats that of an earlier try."""

    key: str
    amount: int
    version: int
    balance: int
    sent: float
    answered: float
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A change refused for its balance, with the state that refused it.

    `lowest` is the lowest balance that this state allows: the floor and what is held above it.
    """

    key: str
    amount: int
    version: int
    balance: int
    sent: float
    answered: float
    replayed: bool = False
    lowest: int = 0


@dataclass(frozen=True, slots=True)
class Unknown:
    """A change that may have taken effect at any time after it was sent, or never."""

    key: str
    amount: int
    sent: float
    answered: float | None = None


@dataclass(frozen=True, slots=True)
class NotApplied:
    """A try answered with "no effect of this key"; a later try may still have one."""

    key: str
    amount: int
    sent: float
    answered: float


@dataclass(frozen=True, slots=True)
class Read:
    """A state of the account that was read."""

    version: int
    balance: int
    sent: float
    answered: float


Operation = Accepted | Refused | Unknown | NotApplied | Read


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the ledger: the change that made `version`, and the balance after it."""

    version: int
    amount: int
    balance: int
    key: str | None


@dataclass(frozen=True, slots=True)
class State:
    """The account's row."""

    version: int
    balance: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """The whole ledger and the account's state, read together after all operations.

    Entries up to `opening_version` existed before the first operation was sent. The floor is the
    same in all states.
    """

    entries: tuple[Entry, ...]
    final: State
    opening_version: int = 1
    floor: int = 0


@unique
class Kind(StrEnum):
    """The kind of a violation."""

    VERSION_GAP = "version gap"
    VERSION_DUPLICATE = "version duplicate"
    CHAIN_BROKEN = "chain broken"
    BELOW_FLOOR = "below the floor"
    FINAL_STATE = "final state differs"
    KEY_TWICE = "key twice"
    PHANTOM = "phantom entry"
    LOST_CHANGE = "lost change"
    ALTERED_CHANGE = "altered change"
    VERSION_SHARED = "version shared"
    REPLAY_DIFFERS = "replay differs"
    REFUSED_IN_LEDGER = "refused in ledger"
    NOT_APPLIED_IN_LEDGER = "not applied in ledger"
    NO_SUCH_STATE = "no such state"
    GROUNDLESS_REFUSAL = "groundless refusal"
    STALE_READ = "stale read"
    STALE_REFUSAL = "stale refusal"
    FUTURE_READ = "future read"
    ORDER_BROKEN = "order broken"


@dataclass(frozen=True, slots=True)
class Violation:
    """One violation, described in one sentence."""

    kind: StrEnum
    text: str


def check(ledger: Ledger, operations: Iterable[Operation]) -> list[Violation]:
    """Return the violations in the operations of one account.

    `operations` must hold every try that was sent to the account between the opening version and
    the reading of the ledger, in any order.
    """
    history = _History(ledger, tuple(operations))
    return [violation for rule in _RULES for violation in rule(history)]


@dataclass(frozen=True, slots=True)
class _Effect:
    """A change in the ledger, and the earliest time at which it can have taken effect."""

    version: int
    key: str
    sent: float


class Highest:
    """The highest value of the marks before a position."""

    def __init__(self, marks: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(marks)
        self._positions = [position for position, _ in ordered]
        self._highest = list(accumulate((value for _, value in ordered), max))

    def before(self, position: float) -> float:
        """Return the highest value strictly before the position, or minus infinity."""
        count = bisect_left(self._positions, position)
        return self._highest[count - 1] if count else -inf


class _History:
    """The ledger and the operations, indexed for the rules."""

    def __init__(self, ledger: Ledger, operations: tuple[Operation, ...]) -> None:
        self.final = ledger.final
        self.floor = ledger.floor
        self.opening_version = ledger.opening_version
        self.entries = sorted(ledger.entries, key=lambda entry: entry.version)
        self.rows = frozenset(ledger.entries)
        self.states = {State(entry.version, entry.balance) for entry in ledger.entries}
        self.by_key: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.key is not None:
                self.by_key[entry.key].append(entry)

        self.accepted = [op for op in operations if isinstance(op, Accepted)]
        self.refused = [op for op in operations if isinstance(op, Refused)]
        self.not_applied = [op for op in operations if isinstance(op, NotApplied)]
        self.decided = [op for op in operations if isinstance(op, Accepted | Refused)]
        self.sightings = [op for op in operations if isinstance(op, Read | Refused)]
        self.sources: defaultdict[str, list[Accepted | Unknown]] = defaultdict(list)
        for op in operations:
            if isinstance(op, Accepted | Unknown):
                self.sources[op.key].append(op)

    @cached_property
    def true_accepted(self) -> list[Accepted]:
        """The acknowledged changes that the ledger contains as acknowledged."""
        return [op for op in self.accepted if _entry_of(op) in self.rows]

    @cached_property
    def true_sightings(self) -> list[Read | Refused]:
        """The reads and refusals of states that existed."""
        return [op for op in self.sightings if _state_of(op) in self.states]

    @cached_property
    def effects(self) -> list[_Effect]:
        """The changes of this run, each with its bounds in time.

        An answer that is no replay means that this try took effect. With replays only, it may have
        been any try of the key: one whose answer was lost, but also a replayed one (a service that
        lost its database during the change retries and finds its own change).
        """
        first = [op for op in self.true_accepted if not op.replayed]
        known = {op.key for op in first}
        effects = [_Effect(op.version, op.key, op.sent) for op in first]
        for key, entries in self.by_key.items():
            if key in known or key not in self.sources:
                continue
            sent = min(op.sent for op in self.sources[key])
            effects += [
                _Effect(entry.version, key, sent)
                for entry in entries
                if entry.version > self.opening_version
            ]
        return effects

    def could_have_made(self, entry: Entry) -> list[float]:
        """Return the sending times of all tries that may have made an entry of a key.

        An answer that is no replay means that this try took effect, a replay that another one did.
        A try that was sent when the entry was already known did not make it.
        """
        if entry.version <= self.opening_version:
            return []
        sources = self.sources.get(entry.key or "", [])
        first = [op for op in sources if isinstance(op, Accepted) and not op.replayed]
        unknown = [op for op in sources if isinstance(op, Unknown)]
        return [op.sent for op in first or unknown if self.known.before(op.sent) < entry.version]

    @cached_property
    def acknowledged(self) -> Highest:
        """The highest version that was acknowledged before a time."""
        marks = [(op.answered, op.version) for op in self.true_accepted]
        return Highest([(-inf, self.opening_version), *marks])

    @cached_property
    def known(self) -> Highest:
        """The highest version that any client knew before a time."""
        answers = [*self.true_accepted, *self.true_sightings]
        marks = [(op.answered, op.version) for op in answers]
        return Highest([(-inf, self.opening_version), *marks])


def _versions_are_dense(history: _History) -> Iterator[Violation]:
    """The ledger has the versions 1..n, each once."""
    previous = 0
    for entry in history.entries:
        if entry.version == previous:
            yield Violation(Kind.VERSION_DUPLICATE, f"{entry} has a version that is already taken.")
        elif entry.version != previous + 1:
            yield Violation(Kind.VERSION_GAP, f"{entry} follows version {previous}.")
        previous = entry.version
    if not history.entries:
        yield Violation(Kind.VERSION_GAP, "The ledger has no opening entry.")


def _balances_chain(history: _History) -> Iterator[Violation]:
    """Each balance is the one before it plus the amount."""
    for before, after in pairwise([Entry(0, 0, 0, None), *history.entries]):
        follows = after.version == before.version + 1
        if follows and after.balance != before.balance + after.amount:
            yield Violation(
                Kind.CHAIN_BROKEN, f"{after} does not follow from the balance {before.balance}."
            )


def _balances_keep_the_floor(history: _History) -> Iterator[Violation]:
    """No balance is below the floor."""
    for entry in history.entries:
        if entry.balance < history.floor:
            yield Violation(Kind.BELOW_FLOOR, f"{entry} is below the floor {history.floor}.")


def _final_state_is_the_sum(history: _History) -> Iterator[Violation]:
    """The account has the version of the last entry and the sum of all."""
    version = max((entry.version for entry in history.entries), default=0)
    expected = State(version, sum(entry.amount for entry in history.entries))
    if history.final != expected:
        yield Violation(
            Kind.FINAL_STATE, f"The account has {history.final}, its ledger {expected}."
        )


def _keys_have_one_effect(history: _History) -> Iterator[Violation]:
    """Each key is in the ledger at most once."""
    for key, entries in history.by_key.items():
        if len(entries) > 1:
            versions = ", ".join(str(entry.version) for entry in entries)
            yield Violation(Kind.KEY_TWICE, f"Key {key!r} made the versions {versions}.")


def _entries_have_a_source(history: _History) -> Iterator[Violation]:
    """Each entry of the run has a try that may have made it."""
    denied = {op.key for op in history.refused} | {op.key for op in history.not_applied}
    for entry in history.entries:
        if entry.version <= history.opening_version:
            continue
        sources = history.sources.get(entry.key, []) if entry.key is not None else []
        if not sources and entry.key in denied:
            continue  # reported by the rules on refused and not applied keys
        # An acknowledged source with another amount is reported as an altered change.
        if not any(isinstance(op, Accepted) or op.amount == entry.amount for op in sources):
            yield Violation(Kind.PHANTOM, f"No try can have made {entry}.")


def _accepted_are_in_the_ledger(history: _History) -> Iterator[Violation]:
    """Each acknowledged change is in the ledger as it was acknowledged."""
    for op in history.accepted:
        if op.key not in history.by_key:
            yield Violation(Kind.LOST_CHANGE, f"{op} is not in the ledger.")
        elif _entry_of(op) not in history.rows:
            yield Violation(
                Kind.ALTERED_CHANGE, f"{op} is in the ledger as {history.by_key[op.key][0]}."
            )


def _accepted_versions_differ(history: _History) -> Iterator[Violation]:
    """Two acknowledged changes never share a version."""
    keys = Counter(version for version, _ in {(op.version, op.key) for op in history.accepted})
    for version, count in keys.items():
        if count > 1:
            yield Violation(
                Kind.VERSION_SHARED, f"Version {version} was acknowledged to {count} keys."
            )


def _keys_have_one_answer(history: _History) -> Iterator[Violation]:
    """All answers to one key have the same outcome."""
    answers: defaultdict[str, set[tuple[str, int, int, int]]] = defaultdict(set)
    for op in history.decided:
        answers[op.key].add((type(op).__name__, op.amount, op.version, op.balance))
    for key, different in answers.items():
        if len(different) > 1:
            yield Violation(Kind.REPLAY_DIFFERS, f"Key {key!r} was answered {sorted(different)}.")


def _refused_left_no_trace(history: _History) -> Iterator[Violation]:
    """No refused key is in the ledger."""
    for op in history.refused:
        if op.key in history.by_key:
            yield Violation(
                Kind.REFUSED_IN_LEDGER, f"{op} is in the ledger as {history.by_key[op.key][0]}."
            )


def _not_applied_left_no_trace(history: _History) -> Iterator[Violation]:
    """No key that was answered "not applied" is in the ledger, unless by a later try.

    "No" holds for the key, not for one try: a try that took effect before, or that was under way
    and took effect afterwards, contradicts it. A try sent after the "no" was answered does not.
    """
    for op in history.not_applied:
        for entry in history.by_key.get(op.key, ()):
            if not any(sent >= op.answered for sent in history.could_have_made(entry)):
                yield Violation(Kind.NOT_APPLIED_IN_LEDGER, f"{op} is in the ledger as {entry}.")


def _sightings_are_real(history: _History) -> Iterator[Violation]:
    """Each state in an answer existed."""
    for op in history.sightings:
        if _state_of(op) not in history.states:
            yield Violation(Kind.NO_SUCH_STATE, f"{op} has a state that never existed.")


def _refusals_have_grounds(history: _History) -> Iterator[Violation]:
    """Each refusal has a balance that is too small, or too large."""
    for op in history.refused:
        if op.lowest <= op.balance + op.amount <= LARGEST:
            yield Violation(Kind.GROUNDLESS_REFUSAL, f"{op} was possible.")


def _sightings_are_fresh(history: _History) -> Iterator[Violation]:
    """No answer has a state older than one known before the request was sent."""
    for op in history.true_sightings:
        if isinstance(op, Refused) and op.replayed:
            continue  # it repeats the state of the first try
        known = history.known.before(op.sent)
        if op.version < known:
            kind = Kind.STALE_READ if isinstance(op, Read) else Kind.STALE_REFUSAL
            yield Violation(kind, f"{op} was sent when version {known} was already known.")


def _sightings_are_not_ahead(history: _History) -> Iterator[Violation]:
    """No answer has a state before all changes up to it were sent."""
    sent = Highest((effect.version, effect.sent) for effect in history.effects)
    for op in history.true_sightings:
        latest = sent.before(op.version + 1)
        if op.answered < latest:
            yield Violation(
                Kind.FUTURE_READ, f"{op} saw the effect of a change that was sent at {latest}."
            )


def _changes_keep_real_time_order(history: _History) -> Iterator[Violation]:
    """A change sent after another was acknowledged has a higher version."""
    for effect in history.effects:
        acknowledged = history.acknowledged.before(effect.sent)
        if effect.version <= acknowledged:
            yield Violation(
                Kind.ORDER_BROKEN,
                f"{effect} was sent when version {acknowledged} was already acknowledged.",
            )


_RULES: tuple[Callable[[_History], Iterator[Violation]], ...] = (
    _versions_are_dense,
    _balances_chain,
    _balances_keep_the_floor,
    _final_state_is_the_sum,
    _keys_have_one_effect,
    _entries_have_a_source,
    _accepted_are_in_the_ledger,
    _accepted_versions_differ,
    _keys_have_one_answer,
    _refused_left_no_trace,
    _not_applied_left_no_trace,
    _sightings_are_real,
    _refusals_have_grounds,
    _sightings_are_fresh,
    _sightings_are_not_ahead,
    _changes_keep_real_time_order,
)


def _entry_of(op: Accepted) -> Entry:
    return Entry(op.version, op.amount, op.balance, op.key)


def _state_of(op: Read | Refused) -> State:
    return State(op.version, op.balance)
