"""The pool wait queue: operations wait for a connection, in order, with a limit per lane.

A lane is what operations contend for inside PostgreSQL, such as a row. Only a few operations of a
lane are on connections at a time, however many wait. So contention for one row is a queue in here,
in order and without holding connections, and does not delay other lanes.
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
    """An item in the queue, ordered by priority, then by arrival."""

    rank: tuple[bool, int]
    item: Item = field(compare=False)
    lane: Lane | None = field(compare=False)


@dataclass(slots=True)
class _Lane(Generic[Item]):
    """The number of a lane's items that are taken or may be, and the items parked behind them."""

    admitted: int = 0
    parked: deque[Queued[Item]] = field(default_factory=deque)


class WaitQueue(Generic[Item]):
    """The queue; it keeps no state of a lane without queued or taken items."""

    def __init__(self) -> None:
        self._arrivals = count()
        self._admitted: list[Queued[Item]] = []
        self._lanes: dict[Hashable, _Lane[Item]] = {}
        self._parked = 0

    def __len__(self) -> int:
        return len(self._admitted) + self._parked

    @property
    def ready(self) -> int:
        """The number of items that may be taken now."""
        return len(self._admitted)

    def __iter__(self) -> Iterator[Item]:
        """Yield all queued items, in no order."""
        for queued in self._admitted:
            yield queued.item
        for lane in self._lanes.values():
            for queued in lane.parked:
                yield queued.item

    def put(self, item: Item, *, lane: Lane | None = None, priority: bool = False) -> None:
        """Add an item at the end or, with `priority`, before all items without it."""
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
        """Remove and return the next item, None if none may be taken now; `done` must follow."""
        return heappop(self._admitted) if self._admitted else None

    def done(self, queued: Queued[Item]) -> None:
        """Admit the next parked item of the lane of a taken one; it keeps its order by arrival."""
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
        """Return whether another item of the lane would be admitted at once."""
        used = None if lane is None else self._lanes.get(lane.name)
        return lane is None or used is None or used.admitted < lane.limit

    def clear(self) -> list[Item]:
        """Remove and return all queued items; taken ones are still to be `done`."""
        items = list(self)
        for used in self._lanes.values():
            used.parked.clear()
        self._parked = 0
        while (queued := self.take()) is not None:
            self.done(queued)
        return items
