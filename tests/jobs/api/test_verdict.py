"""The verdict: what is red, amber and green, and what it is not."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from balance_app.db.replication import Replication
from balance_app.jobs.api.fleet import Outage, judge
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.jobs.api.verdict import (
    Cause,
    Code,
    Difference,
    Level,
    Recent,
    Resumed,
    cause_of_job,
    decide,
    unavailable,
)

NOW = datetime(2026, 11, 29, 2, 44, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LEASE = 6 * SECOND


def last(outcome: str, result: str | None = None) -> dict[str, Any]:
    return {"outcome": outcome, "result": result, "endedAt": NOW - 60 * SECOND, "server": "app1"}


def job(name: str = "moon", **members: object) -> dict[str, Any]:
    """A job that waits for its next tick, and succeeded the last time."""
    return {
        "name": name,
        "state": "waiting",
        "paused": None,
        "waiting": waits("not-due"),
        "lastRun": last("succeeded"),
        "failuresInARow": 0,
        "lossesInARow": 0,
        "readyAt": NOW + 60 * SECOND,
    } | members


def waits(reason: str, *, overdue: bool = False) -> dict[str, Any]:
    return {"reason": reason, "overdue": overdue, "until": None, "sentence": ""}


def paused(by: str, reason: str | None = "it failed 5 times in a row") -> dict[str, Any]:
    return {
        "state": "paused",
        "paused": {"by": by, "at": NOW, "reason": reason},
        "waiting": waits("paused"),
    }


RUNNING: dict[str, Any] = {"state": "running", "waiting": None}
# job, code, what mends it
JOBS: dict[str, tuple[dict[str, Any], Code | None, str]] = {
    "on time": (job(), None, ""),
    "never run": (job(lastRun=None), None, ""),
    "running": (job(**RUNNING), None, ""),
    "paused by itself": (job(**paused("balance_app")), Code.JOB_PAUSED, "resume"),
    "paused by itself, no reason": (job(**paused("balance_app", None)), Code.JOB_PAUSED, "resume"),
    "paused by a person": (job(**paused("ada")), None, ""),
    "paused by a person while it fails": (
        job(**paused("ada"), failuresInARow=2, lastRun=last("failed", "no")),
        None,
        "",
    ),
    "fails": (job(failuresInARow=1, lastRun=last("failed", "no")), Code.JOB_FAILING, "run"),
    "timed out": (job(failuresInARow=3, lastRun=last("timed_out")), Code.JOB_FAILING, "run"),
    "fails, and runs again": (
        job(**RUNNING, failuresInARow=1, lastRun=last("failed", "no")),
        Code.JOB_FAILING,
        "open",
    ),
    "failed, then released": (
        job(failuresInARow=1, lastRun=last("released", "stopped")),
        Code.JOB_FAILING,
        "run",
    ),
    "failed once, has succeeded since": (job(lastRun=last("succeeded")), None, ""),
    "lost once, taken over": (job(**RUNNING, lastRun=last("lost"), lossesInARow=1), None, ""),
    "lost, not yet taken over": (job(waiting=waits("lost")), None, ""),
    "lost and not resumed": (job(waiting=waits("lost", overdue=True)), Code.JOB_LOST, "open"),
    "quarantined": (
        job(waiting=waits("quarantined"), lossesInARow=3, lastRun=last("lost")),
        Code.JOB_LOST,
        "run",
    ),
    "retried, and not overdue": (job(waiting=waits("retry")), None, ""),
    "due": (job(waiting=waits("due")), None, ""),
    "overdue": (job(waiting=waits("due", overdue=True)), Code.JOB_OVERDUE, "run"),
    "overdue for want of room": (
        job(waiting=waits("no-capacity", overdue=True)),
        Code.JOB_OVERDUE,
        "open",
    ),
    "no room yet": (job(waiting=waits("no-capacity")), None, ""),
    "nobody has the code": (job(waiting=waits("no-code")), Code.NO_CODE, "open"),
    "cancelled": (job(lastRun=last("cancelled")), None, ""),
    "an audit that failed otherwise": (
        job("audit-ledger", failuresInARow=1, lastRun=last("failed", "OSError: no")),
        Code.JOB_FAILING,
        "run",
    ),
}


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_needs_a_hand_or_does_not(kind: str) -> None:
    """What is wrong now has a code and an action; what is history, or wanted, has none."""
    state, code, action = JOBS[kind]
    cause = cause_of_job(state)
    assert (cause and cause.code) == code
    if cause is not None:
        assert cause.level is Level.RED
        assert cause.action is not None
        assert cause.action == (action, state["name"])
        assert cause.text[-1] != "."


def instance(
    server: str,
    *,
    seen: float = 1,
    up: float = 600,
    silences: tuple[tuple[float, float], ...] = (),
    replaces: float | None = None,
) -> dict[str, Any]:
    """A row; all times are seconds ago."""
    return {
        "id": str(uuid4()),
        "server": server,
        "seenSecondsAgo": seen,
        "live": seen < LEASE.total_seconds(),
        "startedAt": NOW - timedelta(seconds=up),
        "silences": [
            {"from": NOW - timedelta(seconds=since), "until": NOW - timedelta(seconds=until)}
            for since, until in silences
        ],
        "replacesSeenAt": None if replaces is None else NOW - timedelta(seconds=replaces),
    }


def snapshot(
    *instances: dict[str, Any],
    causes: Mapping[str, Cause] | None = None,
    back: float | None = None,
) -> StatusSnapshot:
    back_at = None if back is None else NOW - timedelta(seconds=back)
    fleet = judge(instances, NOW, LEASE, back_at)
    jobs: Any = {"moon": None}
    return StatusSnapshot(
        NOW, b"", {}, list(instances), jobs, causes or {}, fleet.outages, fleet.settling
    )


def codes(shot: StatusSnapshot, recent: Recent | None = None) -> tuple[str, list[str]]:
    verdict = decide(shot, recent)
    return verdict.level, [cause.code for cause in verdict.causes]


def cause(code: Code, name: str = "moon") -> dict[str, Cause]:
    return {name: Cause(Level.RED, code, name, f"{name} is so", NOW, None)}


def test_all_is_well() -> None:
    """Green has no causes."""
    verdict = decide(snapshot(instance("app1"), instance("app2")))
    assert (verdict.level, verdict.symbol, verdict.sentence) == ("green", "✓", "All is well.")
    assert verdict.body()["causes"] == []


def test_an_instance_that_is_gone_stays_red_and_can_be_dismissed() -> None:
    """However long ago it was: nobody has looked at it yet."""
    gone = instance("app4", seen=7200)
    verdict = decide(snapshot(instance("app1"), gone))
    (cause,) = verdict.causes
    assert (verdict.level, cause.code, cause.subject) == ("red", "instance-gone", "app4")
    assert cause.action == ("dismiss", gone["id"])
    assert (
        verdict.sentence == "app4 stopped responding (last heartbeat at 2026-11-29 00:44:00 UTC)."
    )


def test_without_instances_nothing_more_is_said_of_their_jobs() -> None:
    """That nobody has the code, or starts a job, follows from it; that a job fails does not."""
    assert codes(snapshot(causes=cause(Code.NO_CODE))) == ("red", ["no-instances"])
    both = {**cause(Code.JOB_OVERDUE), **cause(Code.JOB_FAILING, "sun")}
    assert codes(snapshot(causes=both)) == ("red", ["no-instances", "job-failing"])
    # The control: with one, they are told.
    assert codes(snapshot(instance("app1"), causes=cause(Code.NO_CODE))) == ("red", ["no-code"])


def test_a_missing_standby_is_the_cause_of_all_that_seems_to_be_gone() -> None:
    """No heartbeat is committed without it: instances only seem to have stopped responding.

    The control: where nothing is missing they are gone.
    """
    short = Recent().on(Replication("a port 1", (), 1, 3, 0))
    enough = Recent().on(Replication("a port 1", (), 0, 0, 0))
    silent = snapshot(instance("app1", seen=30), instance("app2", seen=31))
    assert codes(silent, short) == ("red", ["standby-missing"])
    assert codes(silent, enough) == ("red", ["no-instances"])
    assert codes(snapshot(instance("app1")), short) == ("red", ["standby-missing"])
    assert decide(silent, short).sentence == (
        "No change is acknowledged: each commit waits for 1 standby, and none of them is connected."
    )
    failing = snapshot(instance("app1"), causes=cause(Code.JOB_FAILING))
    assert codes(failing, short)[1] == ["standby-missing", "job-failing"]


def test_all_silent_at_once_is_no_death_of_each() -> None:
    """As long as it lasts: one cause, not five; those that died one after another are gone."""
    at_once = [instance(f"app{n}", seen=20 + n / 2) for n in range(5)]
    assert codes(snapshot(*at_once)) == ("red", ["no-instances"])
    # The control
    one_by_one = [instance("app1", seen=20), instance("app2", seen=90)]
    assert codes(snapshot(*one_by_one))[1] == ["no-instances", "instance-gone"]
    # One that died long before is no reason to count the others as dead.
    day_ago = instance("app6", seen=86_400)
    assert codes(snapshot(*at_once, day_ago))[1] == ["no-instances", "instance-gone"]


def test_an_outage_of_the_database_is_told_as_that() -> None:
    """What all instances' silences have in common; who is not back yet is given a lease more."""
    shots = [
        instance("app1", silences=((30.0, 3.0),)),
        instance("app2", silences=((29.0, 2.5),)),
        instance("app3", seen=28),
    ]
    shot = snapshot(*shots, causes=cause(Code.JOB_OVERDUE))
    assert shot.outages == (Outage(NOW - 29 * SECOND, NOW - 3 * SECOND),)
    assert [each["state"] for each in shots] == ["live", "live", "silent"]
    verdict = decide(shot)
    assert verdict.sentence == "Recovered: no instance reached the database for 26 s."
    assert [cause.code for cause in verdict.causes] == ["database-back"]
    # The control: it is gone if that was longer ago, and so is one that died before.
    late = [
        instance("app1", silences=((60.0, 30.0),)),
        instance("app2", silences=((60.0, 31.0),)),
        instance("app3", seen=59),
    ]
    assert codes(snapshot(*late)) == ("red", ["instance-gone", "database-back"])
    dead = [*shots[:2], instance("app3", seen=300)]
    assert codes(snapshot(*dead))[1] == ["instance-gone", "database-back"]


def test_a_frozen_instance_is_no_outage_of_the_database() -> None:
    """The others have sent heartbeats meanwhile; one that started later says nothing about it."""
    frozen = instance("app1", silences=((60.0, 30.0),), up=900)
    assert snapshot(frozen, instance("app2")).outages == ()
    assert snapshot(frozen, instance("app2", silences=((90.0, 70.0),))).outages == ()
    # Nobody who is there has seen it, as the others were started again since.
    assert snapshot(frozen, instance("app2", up=20)).outages == ()
    assert snapshot(frozen, instance("app2", seen=300)).outages == ()
    # Controls: it is the only one; the other fell silent with it, and is not back yet.
    assert len(snapshot(frozen).outages) == 1
    assert len(snapshot(frozen, instance("app2", seen=58)).outages) == 1


def test_two_outages_are_two() -> None:
    """Each silence that is common to all."""
    twice = ((60.0, 30.0), (200.0, 180.0))
    shot = snapshot(instance("app1", silences=twice), instance("app2", silences=twice))
    assert [NOW - outage.until for outage in shot.outages] == [30 * SECOND, 180 * SECOND]


def test_what_ended_ahead_of_the_clock_is_over() -> None:
    """It was before the clock was set back, and hides nobody who is gone, nor an overdue job."""
    gone = instance("app3", seen=28)
    ahead = ((-3600.0, -3630.0),)  # as seconds ago
    both = [instance("app1", silences=ahead), instance("app2", silences=ahead)]
    overdue = cause(Code.JOB_OVERDUE)
    red = ("red", ["instance-gone", "job-overdue"])
    assert codes(snapshot(*both, gone, causes=overdue)) == red
    assert codes(snapshot(instance("app1"), gone, causes=overdue, back=-3600)) == red


def test_the_reader_knows_that_its_connection_was_back_just_now() -> None:
    """No heartbeat has arrived yet: nothing is red, nor is all well."""
    silent = [instance("app1", seen=20), instance("app2", seen=90)]
    shot = snapshot(*silent, causes=cause(Code.NO_CODE), back=1)
    assert codes(shot) == ("amber", ["database-back"])
    # The control
    assert codes(snapshot(*silent, back=10))[0] == "red"


def test_an_instance_that_was_started_again_is_amber_for_a_quarter_of_an_hour() -> None:
    """Restarted under its name it is back; then it is history."""
    back = instance("app4", up=60, replaces=69)
    verdict = decide(snapshot(instance("app1"), back))
    assert (verdict.level, verdict.sentence) == ("amber", "Recovered: app4 is back after 9 s.")
    assert codes(snapshot(instance("app4", up=901, replaces=910))) == ("green", [])
    # Two of one name at a time: the other is not gone.
    assert codes(snapshot(instance("app4", up=60, replaces=1))) == ("green", [])


def resumed(seconds: float, name: str = "moon") -> Resumed:
    at = NOW - timedelta(seconds=seconds)
    return Resumed(name, "app4", "app1", at)


def test_a_run_that_was_lost_and_resumed_is_amber_for_a_quarter_of_an_hour() -> None:
    """Unless it was dismissed, or its job is red."""
    up = snapshot(instance("app1"))
    verdict = decide(up, Recent((resumed(60),)))
    assert verdict.sentence == "Recovered: the run of moon on app4 was lost and resumed on app1."
    assert codes(up, Recent((resumed(60),))) == ("amber", ["run-resumed"])
    assert codes(up, Recent((resumed(901),))) == ("green", [])
    assert codes(up, Recent((resumed(60),), dismissed_at=NOW - SECOND)) == ("green", [])
    assert codes(up, Recent((resumed(1),), dismissed_at=NOW - 60 * SECOND))[0] == "amber"
    red = snapshot(instance("app1"), causes=cause(Code.JOB_LOST))
    assert codes(red, Recent((resumed(60),))) == ("red", ["job-lost"])
    assert codes(red, Recent((resumed(60, "sun"),))) == ("red", ["job-lost", "run-resumed"])


def test_what_an_audit_has_found_stays_until_it_finds_nothing() -> None:
    """Whatever became of its runs since, and also while somebody has paused it."""
    found = Recent(differences=(Difference("audit-ledger", " user 7 differs", NOW),))
    runs = ("timed_out", "lost", "released", "failed")
    jobs = [job("audit-ledger", lastRun=last(each, "OSError"), failuresInARow=2) for each in runs]
    jobs.append(job("audit-ledger", **paused("ada"), failuresInARow=2, lastRun=last("failed")))
    for each in jobs:
        cause_now = cause_of_job(each)
        causes = {} if cause_now is None else {"audit-ledger": cause_now}
        listed: Any = {"audit-ledger": None}
        shot = snapshot(instance("app1"), causes=causes)._replace(jobs=listed)
        (cause,) = decide(shot, found).causes
        assert (cause.code, cause.subject) == ("audit-differs", "audit-ledger")
        assert cause.text == "audit-ledger found a difference: user 7 differs"
        # Control: without the history only what became of its last run is known.
        assert Code.AUDIT_DIFFERS not in codes(shot)[1]


def test_the_sentence_counts_what_it_does_not_name() -> None:
    """One cause is the sentence; of several the instances are named, and the jobs counted."""
    jobs = {name: cause_of_job(job(name, **paused("balance_app"))) for name in ("moon", "sun")}
    causes: Any = jobs
    gone = [instance(f"app{n}", seen=100 * n) for n in range(2, 7)]
    verdict = decide(snapshot(instance("app1"), *gone, causes=causes))
    assert verdict.sentence == "app2, app3, app4 and 2 more stopped responding; 2 jobs need you."
    causes.pop("sun")
    verdict = decide(snapshot(instance("app1"), causes=causes))
    assert verdict.sentence == "moon was paused: it failed 5 times in a row."


def test_without_the_database_the_verdict_is_red() -> None:
    """It says since when."""
    verdict = unavailable(NOW - 60 * SECOND, NOW)
    assert verdict.sentence == "Database unavailable since 2026-11-29 02:43:00 UTC."
    assert [cause.code for cause in verdict.causes] == ["database-unavailable"]
