"""The order in which queued operations get a connection."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from balance_app.db.wait_queue import Lane, Queued, WaitQueue

A, B = Lane("a", 1), Lane("b", 2)


def test_first_come_first_served() -> None:
    """Operations without a lane run in order of arrival, after those with priority."""
    queue = WaitQueue[str]()
    queue.put("first")
    queue.put("second")
    queue.put("priority", priority=True)
    assert len(queue) == 3
    assert [taken.item for taken in iter(queue.take, None)] == ["priority", "first", "second"]
    assert len(queue) == 0


def test_a_full_lane_lets_others_pass() -> None:
    """A lane has a limit of concurrent operations; those that wait for it block no others."""
    queue = WaitQueue[str]()
    for name in ("a1", "a2", "a3"):
        queue.put(name, lane=A)
    queue.put("other")
    first, other = queue.take(), queue.take()
    assert first is not None
    assert other is not None
    assert (first.item, other.item) == ("a1", "other")
    assert queue.take() is None
    assert not queue.admits(A)
    assert queue.admits(B)
    queue.put("later")
    queue.done(first)
    following = queue.take()
    assert following is not None
    assert following.item == "a2"  # it came before "later"


def test_clearing_empties_the_queue() -> None:
    """Operations that wait for their lane are removed too; running ones free it when they end."""
    queue = WaitQueue[str]()
    for name in ("a1", "a2", "a3"):
        queue.put(name, lane=A)
    first = queue.take()
    assert first is not None
    assert sorted(queue.clear()) == ["a2", "a3"]
    assert len(queue) == 0
    queue.put("a4", lane=A)
    assert queue.take() is None
    queue.done(first)
    following = queue.take()
    assert following is not None
    assert following.item == "a4"
    queue.done(following)
    assert queue._lanes == {}


@given(st.lists(st.sampled_from(["put a", "put b", "put", "take", "done"]), max_size=60))
def test_order_and_limit_hold_in_every_sequence(steps: list[str]) -> None:
    """In any sequence: order within a lane, its limit, and no operation is left in the queue."""
    queue = WaitQueue[tuple[str, int]]()
    under_way: list[Queued[tuple[str, int]]] = []
    came, went = Counter[str](), Counter[str]()

    def take() -> bool:
        queued = queue.take()
        if queued is None:
            return False
        lane, number = queued.item
        assert number == went[lane]
        went[lane] += 1
        under_way.append(queued)
        busy = Counter(each.item[0] for each in under_way)
        assert busy["a"] <= A.limit
        assert busy["b"] <= B.limit
        return True

    for step in steps:
        match step.split():
            case ["put", *lane]:
                name = lane[0] if lane else ""
                queue.put((name, came[name]), lane={"a": A, "b": B}.get(name))
                came[name] += 1
            case ["take"]:
                take()
            case ["done"] if under_way:
                queue.done(under_way.pop(0))
        assert len(queue) == came.total() - went.total()
        assert len(list(queue)) == len(queue)
    while take() or under_way:
        if under_way:
            queue.done(under_way.pop(0))
    assert came == went
    assert queue._lanes == {}
