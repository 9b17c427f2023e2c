"""Token buckets by name: their rate, their burst, and their bounded memory."""

from hypothesis import given
from hypothesis import strategies as st

from balance_app.access.rates import TokenBuckets


def test_a_burst_passes_then_one_at_each_interval() -> None:
    buckets = TokenBuckets(rate=10, burst=3, most=10)

    assert [buckets.take("a", 5.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert round(buckets.take("a", 5.0), 6) == 0.1
    assert round(buckets.take("a", 5.04), 6) == 0.06
    assert buckets.take("a", 5.1) == 0.0
    assert buckets.take("a", 5.1) > 0


def test_a_refusal_takes_nothing() -> None:
    buckets = TokenBuckets(rate=1, burst=1, most=10)
    assert buckets.take("a", 0.0) == 0.0
    for tries in range(100):
        assert buckets.take("a", tries / 101) > 0

    assert buckets.take("a", 1.0) == 0.0


def test_names_do_not_share_a_bucket() -> None:
    buckets = TokenBuckets(rate=1, burst=1, most=10)

    assert [buckets.take(name, 0.0) for name in "aabbc"] == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_the_ones_that_took_longest_ago_are_forgotten() -> None:
    buckets = TokenBuckets(rate=1, burst=1, most=3)
    for name in "abc":
        buckets.take(name, 0.0)
    assert buckets.take("a", 0.0) > 0  # refused, and used last

    buckets.take("d", 0.0)

    assert len(buckets) == 3
    assert buckets.take("a", 0.0) > 0
    assert buckets.take("b", 0.0) == 0.0  # it was forgotten


@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_no_window_has_more_than_the_burst_and_the_rate(
    rate: float, burst: int, pauses: list[float]
) -> None:
    buckets = TokenBuckets(rate, burst, most=1)
    now, taken = 100.0, []
    for pause in pauses:
        now += pause
        wait = buckets.take("a", now)
        if wait == 0.0:
            taken.append(now)
        else:
            now += wait
            assert buckets.take("a", now) == 0.0, "the wait it named was too short"
            taken.append(now)

    for first, start in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - start) * rate + 1e-3
