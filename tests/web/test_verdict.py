"""The verdict of a snapshot: red is wrong now, amber has healed by itself, history is neither."""

from datetime import UTC, datetime
from typing import Any, Final

import pytest

from balance_app.jobs.api.status import JobStatus, JobSummary, StatusSnapshot
from balance_app.states import State
from balance_app.web.job_list import JobFacts
from balance_app.web.verdict import RECOVERED_SECONDS, Verdict, decide

NOW: Final = datetime(2026, 11, 29, 2, 44, 10, tzinfo=UTC)
SECONDS: Final = NOW.timestamp()
WAITS: Final = JobFacts(
    state="waiting",
    overdue=False,
    reason="not-due",
    ready_at=SECONDS + 60,
    outcome="succeeded",
    ended_at=SECONDS - 100,
    result="all match",
    failures=0,
    losses=0,
)


def instance(server: str, *, live: bool = True, seen: float = 1.0) -> dict[str, Any]:
    return {"id": f"id-{server}", "server": server, "live": live, "seenSecondsAgo": seen}


def run(
    job: str, server: str, ago: float, *, lasted: float = 10, outcome: str | None
) -> dict[str, Any]:
    started = SECONDS - ago
    ended = None if outcome is None else started + lasted
    named = {"id": int(ago), "job": job, "server": server}
    return {**named, "started": started, "ended": ended, "outcome": outcome}


def verdict(
    *jobs: JobFacts,
    instances: list[dict[str, Any]] | None = None,
    runs: tuple[dict[str, Any], ...] = (),
) -> Verdict:
    """Return the verdict of jobs `job-0`, `job-1` and so on, on two instances that are well."""
    facts = {f"job-{number}": job for number, job in enumerate(jobs)}
    summary = JobSummary(State.WAITING, overdue=False, failed=False, holder=None)
    snapshot = StatusSnapshot(
        NOW,
        b"",
        {},
        [instance("app1"), instance("app2")] if instances is None else instances,
        {name: JobStatus(b"", NOW, summary) for name in facts},
    )
    return decide(snapshot, facts, runs)


LOST: Final = run("job-0", "app2", 300, outcome="lost")
RESUMED: Final = run("job-0", "app1", 284, outcome=None)


@pytest.mark.parametrize(
    ("job", "button", "words"),
    [
        (
            WAITS._replace(outcome="failed", result="ValueError: x"),
            "run",
            "job-0 failed: ValueError",
        ),
        (WAITS._replace(outcome="failed", failures=3), "run", "job-0 failed 3 times in a row"),
        (WAITS._replace(outcome="timed_out", result=None), "run", "job-0 timed out"),
        (WAITS._replace(overdue=True, reason="due"), "run", "job-0 is overdue"),
        (WAITS._replace(reason="quarantined", losses=3), "run", "held back after 3 losses"),
        (WAITS._replace(reason="no-code"), None, "No running instance has the code of job-0"),
    ],
)
def test_a_job_that_needs_a_hand_is_red_with_what_mends_it(
    job: JobFacts, button: str | None, words: str
) -> None:
    """One sentence, one cause, and the job is among those that need attention."""
    found = verdict(job, WAITS)
    assert (found.level, found.symbol, found.sentence) == ("red", "✕", "1 job needs you.")
    (cause,) = found.causes
    assert words in cause.text
    assert (cause.button, cause.href) == (button, "/jobs/job-0")
    assert found.attention == {"job-0": 2}
    assert "1 job on time" in found.facts


@pytest.mark.parametrize(
    ("job", "runs"),
    [
        (WAITS, ()),
        # what failed before, and succeeds now
        (WAITS, (run("job-0", "app1", 300, outcome="failed"),)),
        # it runs again: that it failed is history
        (WAITS._replace(state="running", reason=None, outcome="failed"), ()),
        (WAITS._replace(state="paused", reason="paused", outcome="failed"), ()),
        # recovered long ago
        (
            WAITS,
            (
                run("job-0", "app2", RECOVERED_SECONDS + 60, outcome="lost"),
                run("job-0", "app1", RECOVERED_SECONDS, outcome="succeeded"),
            ),
        ),
        (WAITS._replace(outcome=None, ended_at=None, result=None), ()),
    ],
)
def test_history_is_never_red(job: JobFacts, runs: tuple[dict[str, Any], ...]) -> None:
    """Nor amber, once a quarter of an hour is over."""
    found = verdict(job, runs=runs)
    assert (found.level, found.sentence, found.causes) == ("green", "All is well.", ())
    assert found.facts[0] == "2 of 2 instances up"


def test_what_has_healed_by_itself_is_amber() -> None:
    """It says what happened and where the run went on; nothing is to be done."""
    found = verdict(
        WAITS._replace(state="running", reason=None, outcome="lost"), runs=(LOST, RESUMED)
    )
    assert found.level == "amber"
    assert found.sentence == "Recovered: app2 stopped responding; job-0 resumed on app1 after 6 s."
    assert not found.attention


def test_an_instance_that_is_gone_is_red() -> None:
    """Named, however many jobs run elsewhere; the number of instances does not shrink."""
    found = verdict(WAITS, instances=[instance("app1"), instance("app2", live=False, seen=9)])
    assert (found.level, found.sentence) == ("red", "app2 stopped responding.")
    assert found.facts[0] == "1 of 2 instances up"
    # Control: it has started again under the same name.
    back = [instance("app1"), instance("app2", live=False, seen=9), instance("app2")]
    assert verdict(WAITS, instances=back).level == "green"


def test_without_instances_no_job_is_blamed() -> None:
    """That nobody runs jobs is the cause; that each job has no code follows from it."""
    found = verdict(WAITS._replace(reason="no-code"), instances=[])
    assert (found.level, found.sentence) == ("red", "No instance is running jobs.")
    assert (found.causes, found.facts) == ((), ("0 of 0 instances up",))


def test_many_causes_are_counted() -> None:
    """The first ones are shown, the others counted."""
    found = verdict(*[WAITS._replace(overdue=True, reason="due")] * 40)
    assert found.sentence == "40 jobs need you."
    assert len(found.causes) + found.more == 40
