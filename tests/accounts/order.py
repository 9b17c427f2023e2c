"""The rule on order: one order of all operations explains all answers."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from math import inf

from tests.accounts.index import Index, Node, Step, state_of, states_in
from tests.accounts.kinds import AccountsKind
from tests.accounts.model import (
    Capture,
    Done,
    Ended,
    HoldRead,
    Operation,
    Read,
    Refused,
    State,
    Try,
    Undecided,
    Void,
)
from tests.history import Violation


@dataclass(slots=True)
class _Bounds:
    """The time in which an event or a read took place, and what comes before it."""

    sent: float = -inf
    answered: float = inf


def one_order_explains_all(index: Index) -> Iterator[Violation]:
    """The operations of all accounts have one order, in time and in all timelines."""
    graph = _Graph(index)
    try:
        order = list(TopologicalSorter(graph.before).static_order())
    except CycleError as error:
        yield Violation(
            AccountsKind.NO_ORDER, f"Each of these comes before the next: {error.args[1]}."
        )
        return
    earliest: dict[Node, float] = {}
    for node in order:
        bounds = graph.bounds[node]
        earliest[node] = max(
            [bounds.sent, *(earliest[before] for before in graph.before.get(node, ()))]
        )
        if bounds.answered < earliest[node]:
            yield Violation(
                AccountsKind.NO_ORDER,
                f"{node} was answered at {bounds.answered}, but comes after what was sent at "
                f"{earliest[node]}.",
            )


class _Graph:
    """What comes before what; the halves of a transfer are one node."""

    def __init__(self, index: Index) -> None:
        self.before: defaultdict[Node, set[Node]] = defaultdict(set)
        self.bounds: defaultdict[Node, _Bounds] = defaultdict(_Bounds)
        self._index = index
        self._places = {user_id: _places(line) for user_id, line in index.timelines.items()}
        for line in index.timelines.values():
            for earlier, later in pairwise(line):
                self.before[self._whole(later.node)].add(self._whole(earlier.node))
        self._add_effects()
        for number, op in enumerate(index.operations):
            self._add_sighting(("read", 0, number), op)

    def _whole(self, node: Node) -> Node:
        kind, user_id, version = node
        other = self._index.entries[user_id, version].other if kind == "entry" else None
        return node if other is None else (kind, *min((user_id, version), other))

    def _add_effects(self) -> None:
        """Bound each event by the tries that may have made it."""
        tries: defaultdict[Node, list[Try]] = defaultdict(list)
        for op in self._index.tries:
            if isinstance(op.outcome, Done) or op.outcome is Undecided.UNKNOWN:
                for node in {self._whole(node) for node in self._index.nodes(op.request)}:
                    tries[node].append(op)
        for node, sources in tries.items():
            done = [op for op in sources if isinstance(op.outcome, Done)]
            first = [op for op in done if not op.replayed] or sources
            self.bounds[node] = _Bounds(
                min(op.sent for op in first), min((op.answered for op in done), default=inf)
            )

    def _add_sighting(self, node: Node, op: Operation) -> None:
        """Put a read or a refusal between the events that made and ended what it saw."""
        after, until = [], []
        if isinstance(op, Read) or (isinstance(op, Try) and isinstance(op.outcome, Refused)):
            for seen in states_in(op):
                line = self._index.timelines[seen.user_id]
                first, last = self._places[seen.user_id][state_of(seen)]
                after.append(line[first].node)
                until += [step.node for step in line[last + 1 : last + 2]]
        elif isinstance(op, HoldRead):
            after.append(("placed", op.user_id, op.number))
            end = self._end(op.user_id, op.number)
            if op.state == "open" and end is not None:
                until.append(end)
            elif end is not None:
                after.append(end)
        elif (
            isinstance(op, Try)
            and isinstance(op.outcome, Ended)
            and isinstance(op.request, Capture | Void)
        ):
            end = self._end(op.request.user_id, op.request.number)
            after += [] if end is None else [end]
        if not after:
            return
        replayed = isinstance(op, Try) and op.replayed  # it repeats the state of the first try
        self.bounds[node] = _Bounds(-inf if replayed else op.sent, op.answered)
        self.before[node] |= {self._whole(each) for each in after}
        for each in until:
            self.before[self._whole(each)].add(node)

    def _end(self, user_id: int, number: int) -> Node | None:
        entry = self._index.captures.get((user_id, number))
        if entry is not None:
            return ("entry", user_id, entry.version)
        ended: Node = ("ended", user_id, number)
        return ended if ended in self._index.steps else None


def _places(line: list[Step]) -> dict[State, tuple[int, int]]:
    """Return where each state is in a timeline, first and last."""
    places: dict[State, tuple[int, int]] = {}
    for place, step in enumerate(line):
        first, _ = places.get(step.state, (place, place))
        places[step.state] = first, place
    return places
