"""The lanes: what is drawn of instances beside their runs."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from balance_app.jobs.api.fleet import Outage
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.web import charts
from balance_app.web.view_models import lanes_of_instances, lanes_of_jobs

NOW: Final = datetime(2026, 11, 29, 2, 44, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def instance(server: str, *silences: tuple[float, float], **members: object) -> dict[str, Any]:
    """An instance; each silence is from so many seconds ago to so many."""
    return {
        "id": f"id-{server}",
        "server": server,
        "live": True,
        "state": "live",
        "seenSecondsAgo": 1.0,
        "running": 0,
        "silences": [{"from": ago(since), "until": ago(until)} for since, until in silences],
        **members,
    }


def snapshot(*instances: dict[str, Any], outages: tuple[Outage, ...] = ()) -> StatusSnapshot:
    jobs: Any = {"moon": None}
    return StatusSnapshot(NOW, b"", {}, list(instances), jobs, {}, outages, settling=False)


def test_an_outage_of_the_database_is_drawn_as_that_in_every_lane() -> None:
    """Not as deaths, and not as silences of each instance."""
    outage = Outage(ago(100), ago(60))
    shot = snapshot(instance("app1", (101, 60)), instance("app2", (100, 59)), outages=(outage,))
    lanes = [
        *lanes_of_instances(shot, [], NOW.timestamp(), "lane"),
        *lanes_of_jobs(shot, ["moon"], [], "lane"),
    ]
    gaps = lanes[0].gaps
    for lane in lanes:
        (gap,) = lane.gaps
        assert gap.label == "database unavailable from 02:42:20 to 02:43:00 UTC (40 s)"
        assert not lane.marks
        assert not lane.gone
    times: Any = {"origin": ago(300).timestamp(), "span": 300.0, "now": NOW.timestamp()}
    drawn = str(charts.lane([], {}, by_job=False, gaps=gaps, **times))
    assert '<rect x="66.67%" width="13.33%"' in drawn
    assert "database unavailable from" in drawn


def test_a_silence_of_one_instance_is_its_own() -> None:
    """As of a process that was frozen: the others went on."""
    frozen, other = lanes_of_instances(
        snapshot(instance("app1", (30, 20)), instance("app2")), [], NOW.timestamp(), "lane"
    )
    assert [gap.label for gap in frozen.gaps] == [
        "app1 sent no heartbeat from 02:43:30 to 02:43:40 UTC (10 s)"
    ]
    assert other.gaps == ()


def test_an_instance_that_is_silent_for_a_moment_is_not_shown_as_gone() -> None:
    """As all are after an outage; nobody can dismiss it."""
    silent = instance("app1", live=False, state="silent", seenSecondsAgo=9.0)
    gone = instance("app2", live=False, state="gone", seenSecondsAgo=30.0)
    first, second = lanes_of_instances(snapshot(silent, gone), [], NOW.timestamp(), "lane")
    assert (first.gone, first.silent, first.dismiss, first.marks) == (False, True, None, ())
    # Control: one that is gone, and was idle, has a mark where it was seen last.
    assert (second.gone, second.silent, second.dismiss) == (True, False, "id-app2")
    assert [mark.at for mark in second.marks] == [ago(30).timestamp()]


def test_a_loss_has_one_mark() -> None:
    """Where its lease ended; that the instance is gone adds none."""
    run = {"id": 1, "job": "moon", "server": "app2", "outcome": "lost", "due": 0.0}
    run |= {"started": ago(60).timestamp(), "ended": ago(24).timestamp()}
    gone = instance("app2", live=False, state="gone", seenSecondsAgo=30.0)
    (lane,) = lanes_of_instances(snapshot(gone), [run], NOW.timestamp(), "lane")
    (mark,) = lane.marks
    assert mark.at == ago(24).timestamp()
    assert "lost: moon" in mark.label


def test_a_run_under_way_is_drawn_until_now_in_parts_of_a_day() -> None:
    """Six hours are six hours, not the moment of their start."""
    run = {"id": 1, "job": "moon", "server": "app2", "outcome": None, "ended": None}
    run["started"] = ago(6 * 3600).timestamp()
    times: Any = {"origin": ago(86400).timestamp(), "span": 86400.0, "now": NOW.timestamp()}
    drawn = str(charts.lane([run], {1: 0}, by_job=False, **times))
    assert drawn.count("15 min 0 s of runs") >= 6 * 4 - 1
