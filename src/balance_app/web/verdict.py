"""Whether all is well, as the page says it: one sentence, its causes, and what mends each of them.

Red is what is wrong now and needs a hand; amber is what has healed by itself, for a quarter of an
hour. What is only history is neither.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from balance_app.formatting import duration
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.states import Outcome, Reason, State, outcome_predicate
from balance_app.web.job_list import JobFacts

RED: Final = "red"
AMBER: Final = "amber"
GREEN: Final = "green"
CAUSES_SHOWN: Final = 6
RECOVERED_SECONDS: Final = 900.0
LONGEST_REASON: Final = 120  # characters of an error
NAMED: Final = 3  # instances in one cause
NOBODY: Final = "No instance is running jobs"
_FAILED: Final = (Outcome.FAILED, Outcome.TIMED_OUT)


class Cause(NamedTuple):
    """Why the verdict is not green, and what mends it: a button for `target`, or a page."""

    level: str
    text: str
    since: float | None = None
    button: str | None = None
    target: str = ""
    href: str | None = None
    job: str | None = None


class Verdict(NamedTuple):
    """Whether all is well, in one sentence."""

    level: str
    symbol: str
    sentence: str
    facts: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    # causes that are not among them
    more: int = 0
    # how much each job needs attention: 2 is red, 1 amber
    attention: Mapping[str, int] = {}

    @property
    def title(self) -> str:
        """What the browser's tab says."""
        return f"{self.symbol} {self.sentence.rstrip('.')}"


NO_VERDICT: Final = Verdict("none", "…", "No data yet.")
UNAVAILABLE: Final = Verdict(RED, "✕", "Database unavailable.")


def decide(
    snapshot: StatusSnapshot, jobs: Mapping[str, JobFacts], runs: Iterable[Mapping[str, Any]]
) -> Verdict:
    """Return the verdict.

    Args:
        snapshot: the status of jobs and instances.
        jobs: what is known of each job of the snapshot.
        runs: the latest runs of all jobs, the oldest first, for what has recovered.
    """
    now = snapshot.now.timestamp()
    causes = [*_of_instances(snapshot, now)]
    nobody = any(cause.text == NOBODY for cause in causes)
    for name, job in jobs.items():
        cause = None if nobody else _of_job(name, job)
        if cause is not None:
            causes.append(cause)
    red = [cause for cause in causes if cause.level == RED]
    recovered = _recovered(runs, now)
    shown = [*red, *recovered][:CAUSES_SHOWN]
    attention = {cause.job: 2 for cause in red if cause.job is not None}
    more = len(red) + len(recovered) - len(shown)
    facts = _facts(snapshot, jobs, attention, now)
    if red:
        # What the sentence says in full is not said again.
        told = Cause(RED, _sentence(red).rstrip("."))
        shown = [cause for cause in shown if cause != told]
        return Verdict(RED, "✕", _sentence(red), facts, tuple(shown), more, attention)
    if recovered:
        sentence = f"Recovered: {recovered[0].text}."
        return Verdict(AMBER, "!", sentence, facts, tuple(shown[1:]), more, attention)
    return Verdict(GREEN, "✓", "All is well.", facts)


def _sentence(red: list[Cause]) -> str:
    """Return what is wrong: the only cause itself, or how many there are of what."""
    jobs = sum(cause.job is not None for cause in red)
    others = [cause for cause in red if cause.job is None]
    need = f"{jobs} {'job needs' if jobs == 1 else 'jobs need'} you"
    if not others:
        return f"{need}."
    return f"{others[0].text}; {need}." if jobs else f"{others[0].text}."


def _of_instances(snapshot: StatusSnapshot, now: float) -> Iterable[Cause]:
    live = {each["server"] for each in snapshot.instances if each["live"]}
    if not live and snapshot.jobs:
        yield Cause(RED, NOBODY)
    gone = {each["server"]: each for each in snapshot.instances if each["server"] not in live}
    if gone:
        names = sorted(gone)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        seen = max(round(now - each["seenSecondsAgo"], 1) for each in gone.values())
        yield Cause(RED, f"{', '.join(names[:NAMED])}{more} stopped responding", seen)


def _of_job(name: str, job: JobFacts) -> Cause | None:
    """Return why a job needs a hand; None: it needs none."""
    if job.state != State.WAITING:
        return None
    place = f"/jobs/{name}"
    if job.reason == Reason.NO_CODE:
        return Cause(
            RED, f"No running instance has the code of {name}", None, None, name, place, name
        )
    if job.reason == Reason.QUARANTINED:
        text = f"{name} is held back after {job.losses} losses"
        return Cause(RED, text, job.ended_at, "run", name, place, name)
    if job.overdue:
        return Cause(RED, f"{name} is overdue", job.ready_at, "run", name, place, name)
    return _of_failure(name, job) if job.outcome in _FAILED else None


def _of_failure(name: str, job: JobFacts) -> Cause:
    times = f" {job.failures} times in a row" if job.failures > 1 else ""
    why = f": {job.result[:LONGEST_REASON]}" if job.result else ""
    assert job.outcome is not None  # noqa: S101 - it failed
    text = f"{name} {outcome_predicate(job.outcome)}{times}{why}"
    return Cause(RED, text, job.ended_at, "run", name, f"/jobs/{name}", name)


def _recovered(runs: Iterable[Mapping[str, Any]], now: float) -> list[Cause]:
    """Return the runs that were lost lately and resumed since, the latest first."""
    lost: dict[str, Mapping[str, Any]] = {}
    found = []
    for run in runs:
        before = lost.pop(run["job"], None)
        if before is not None and before["ended"] > now - RECOVERED_SECONDS:
            took = duration(run["started"] - before["ended"])
            text = (
                f"{before['server']} stopped responding; {run['job']} resumed on {run['server']} "
                f"after {took}"
            )
            found.append(Cause(AMBER, text, before["ended"], None, "", f"/runs/{before['id']}"))
        if run["outcome"] == Outcome.LOST:
            lost[run["job"]] = run
    return found[::-1]


def _facts(
    snapshot: StatusSnapshot,
    jobs: Mapping[str, JobFacts],
    attention: Mapping[str, int],
    now: float,
) -> tuple[str, ...]:
    live = {each["server"] for each in snapshot.instances if each["live"]}
    known = live | {each["server"] for each in snapshot.instances}
    paused = sum(job.state == State.PAUSED for job in jobs.values())
    on_time = len(jobs) - len(attention) - paused
    facts = [f"{len(live)} of {len(known)} {'instance' if len(known) == 1 else 'instances'} up"]
    if live:
        facts.append(f"{on_time} {'job' if on_time == 1 else 'jobs'} on time")
    if paused:
        facts.append(f"{paused} paused")
    audit = jobs.get("audit-ledger")
    if audit is not None and audit.outcome == Outcome.SUCCEEDED and audit.ended_at:
        facts.append(f"ledger verified {rough_ago(now - audit.ended_at)}")
    return tuple(facts)


def rough_ago(seconds: float) -> str:
    """Return how long ago something was, in minutes, so that it rarely changes."""
    minutes = int(seconds // 60)
    return "less than a minute ago" if minutes < 1 else f"{minutes} min ago"
