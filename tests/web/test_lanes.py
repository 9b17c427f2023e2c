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
    for lane in lanes:
        (gap,) = lane.gaps
        assert gap.label == "database unavailable from 02:42:20 to 02:43:00 UTC (40 s)"
        assert not lane.marks
        assert not lane.gone
    drawn = str(charts.lane([], {}, ago(300).timestamp(), 300, by_job=False, gaps=lanes[0].gaps))
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
