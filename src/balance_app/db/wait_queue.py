"""The pool wait queue: operations wait for a connection, in order, few at once of one lane.

A lane is what operations would wait for inside PostgreSQL, as a row: of one lane only a few are on
connections at a time, however many wait. So a crowd at one row is a queue in here, where it is in
order and holds no connection, and all other lanes go on beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class Lane(NamedTuple):
    """What operations contend for, and how many of them may be on connections at once."""

    name: Hashable
    limit: int = 1


@dataclass(order=True, slots=True)
class Queued(Generic[Item]):
    """An item in the queue; in order by priority, then by arrival."""

    rank: tuple[bool, int]
    item: Item = field(compare=False)
    lane: Lane | None = field(compare=False)


@dataclass(slots=True)
class _Lane(Generic[Item]):
    """How many of a lane may be taken or are, and what waits for one of them to be done."""

    admitted: int = 0
    parked: deque[Queued[Item]] = field(default_factory=deque)


class WaitQueue(Generic[Item]):
    """The queue; it holds nothing of a lane of which nothing waits or works."""

    def __init__(self) -> None:
        self._arrivals = count()
        self._admitted: list[Queued[Item]] = []
        self._lanes: dict[Hashable, _Lane[Item]] = {}
        self._parked = 0

    def __len__(self) -> int:
        return len(self._admitted) + self._parked

    @property
    def ready(self) -> int:
        """How many may be taken now."""
        return len(self._admitted)

    def __iter__(self) -> Iterator[Item]:
        """Yield all that waits, in no order."""
        for queued in self._admitted:
            yield queued.item
        for lane in self._lanes.values():
            for queued in lane.parked:
                yield queued.item

    def put(self, item: Item, *, lane: Lane | None = None, priority: bool = False) -> None:
        """Add an item at the end, or, with `priority`, before all without."""
        queued = Queued((not priority, next(self._arrivals)), item, lane)
        if lane is not None:
            used = self._lanes.get(lane.name)
            if used is None:
                used = self._lanes[lane.name] = _Lane()
            if used.admitted >= lane.limit:
                used.parked.append(queued)
                self._parked += 1
                return
            used.admitted += 1
        heappush(self._admitted, queued)

    def take(self) -> Queued[Item] | None:
        """Remove and return what is next, None if nothing may go now; `done` must follow."""
        return heappop(self._admitted) if self._admitted else None

    def done(self, queued: Queued[Item]) -> None:
        """Let the next of the lane of what was taken go; it keeps its place by arrival."""
        if queued.lane is None:
            return
        used = self._lanes[queued.lane.name]
        if used.parked:
            self._parked -= 1
            heappush(self._admitted, used.parked.popleft())
        else:
            used.admitted -= 1
            if not used.admitted:
                del self._lanes[queued.lane.name]

    def admits(self, lane: Lane | None) -> bool:
        """Return whether another operation of the lane would go at once, but for connections."""
        used = None if lane is None else self._lanes.get(lane.name)
        return lane is None or used is None or used.admitted < lane.limit

    def clear(self) -> list[Item]:
        """Remove and return all that waits; what was taken is still to be `done`."""
        items = list(self)
        for used in self._lanes.values():
            used.parked.clear()
        self._parked = 0
        while (queued := self.take()) is not None:
            self.done(queued)
        return items
