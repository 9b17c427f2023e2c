"""The picture of the last minutes' changes, from counters of all instances."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from balance_app.jobs.api.status import StatusSnapshot
from balance_app.web import charts
from balance_app.web.queries import Activity, Totals
from balance_app.web.view_models import LONGEST_GAP_SECONDS, Series, progress_of, share

BEGAN: Final = datetime(2026, 11, 29, 2, 44, tzinfo=UTC)


def snapshot(second: float, *instances: tuple[str, int, int]) -> StatusSnapshot:
    """A snapshot with counters of instances: id, accepted, refused; b starts at second 5."""
    rows: list[dict[str, Any]] = [
        {
            "id": id_,
            "startedAt": BEGAN + timedelta(seconds=5 if id_ == "b" else -60),
            "accepted": accepted,
            "refused": refused,
        }
        for id_, accepted, refused in instances
    ]
    return StatusSnapshot(BEGAN + timedelta(seconds=second), b"", {}, rows, {})


def activity(second: float, *changed: tuple[int, int, int]) -> Activity:
    now = BEGAN.timestamp() + second
    totals = Totals(users=1, balance=1, exact=True)
    return Activity(now, {}, [], totals, list(changed), [])


def drawn(series: Series, second: float) -> tuple[int, int]:
    shown = series.shown(BEGAN.timestamp() + second)
    return sum(bar.accepted for bar in shown.bars), sum(bar.refused for bar in shown.bars)


def test_changes_are_those_since_one_looks_by_all_instances() -> None:
    """What was counted before is not drawn; a new instance counts from its start."""
    series = Series()
    series.add(snapshot(0, ("a", 1000, 7)), None)
    assert drawn(series, 0) == (0, 0)
    series.add(snapshot(4, ("a", 1010, 8)), None)
    series.add(snapshot(8, ("a", 1010, 8), ("b", 3, 2)), None)
    assert drawn(series, 8) == (13, 3)


def test_a_time_without_viewers_is_not_drawn_as_one_moment() -> None:
    """Nobody knows when it was."""
    series = Series()
    series.add(snapshot(0, ("a", 0, 0)), None)
    series.add(snapshot(LONGEST_GAP_SECONDS + 1, ("a", 5000, 5000)), None)
    assert drawn(series, LONGEST_GAP_SECONDS + 1) == (0, 0)
    # Control: within that time it is.
    series.add(snapshot(LONGEST_GAP_SECONDS + 3, ("a", 5001, 5000)), None)
    assert drawn(series, LONGEST_GAP_SECONDS + 3) == (1, 0)


def test_what_a_new_instance_changed_while_nobody_looked_is_not_drawn() -> None:
    """It started after one looked, but when it changed what is not known."""
    series = Series()
    series.add(snapshot(0, ("a", 0, 0)), None)
    later = LONGEST_GAP_SECONDS + 10
    series.add(snapshot(later, ("a", 0, 0), ("b", 900_000, 7)), None)
    assert drawn(series, later) == (0, 0)
    series.add(snapshot(later + 2, ("a", 0, 0), ("b", 900_003, 7)), None)
    assert drawn(series, later + 2) == (3, 0)


def test_the_line_is_of_the_account_that_changes_most() -> None:
    """By its versions, as steps."""
    series = Series()
    for second, busy, calm in ((0, (2, 10, 100), (1, 900, 7)), (4, (2, 60, 0), (1, 901, 8))):
        series.add(snapshot(second), activity(second, busy, calm))
    shown = series.shown(BEGAN.timestamp() + 4)
    assert shown.user == 2
    assert [balance for _, balance in shown.line] == [100, 0]
    html = str(charts.changes(shown))
    assert "user 2: 100" in html
    assert 'href="/users/2"' in html


def test_work_that_is_done_says_how_long_its_run_still_holds() -> None:
    """To the minimum duration, from the start of the run, and not how much of it is done."""
    for least, words in ((120.0, "to 2 min."), (90.0, "to 1 min 30 s."), (None, "Work done.")):
        until = None if least is None else (BEGAN + timedelta(seconds=least)).isoformat()
        started = BEGAN.isoformat()
        done = {"done": 9, "total": 9, "note": "users"}
        job = {"startedAt": started, "holdingUntil": until, "progress": done}
        for ended in (started, None) if until else (started,):
            assert progress_of({**job, "workEndedAt": ended}).endswith(words)
            assert share({**job, "workEndedAt": ended}) is None
