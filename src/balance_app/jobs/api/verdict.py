"""The verdict: whether all is well, in one sentence, with what is wrong and what mends it.

Red is wrong now and needs a hand. Amber has healed by itself, within the last quarter of an hour.
What is only history is neither. `decide` is pure: the page, the API, the command line, the metric
and the alerts use it.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol

from balance_app.db.replication import Replication
from balance_app.formatting import duration, exact
from balance_app.jobs.api.fleet import Outage
from balance_app.states import FAILURES, Outcome, Reason, State, outcome_predicate

RECENT: Final = timedelta(minutes=15)
# Who pauses a job that failed too often.
BY_ITSELF: Final = "balance_app"
NAMED: Final = 3  # instances in a sentence
LONGEST_RESULT: Final = 120  # characters of an error in a sentence
CAUSES_SHOWN: Final = 100


class Level(StrEnum):
    """How urgent something is."""

    GREEN = "green"
    AMBER = "amber"
    RED = "red"


SYMBOLS: Final = {Level.GREEN: "✓", Level.AMBER: "!", Level.RED: "✕"}


class Code(StrEnum):
    """What is wrong, or has recovered."""

    DATABASE_UNAVAILABLE = "database-unavailable"
    STANDBY_MISSING = "standby-missing"
    NO_INSTANCES = "no-instances"
    INSTANCE_GONE = "instance-gone"
    AUDIT_DIFFERS = "audit-differs"
    JOB_PAUSED = "job-paused"
    JOB_LOST = "job-lost"
    NO_CODE = "no-code"
    JOB_OVERDUE = "job-overdue"
    JOB_FAILING = "job-failing"
    RUN_RESUMED = "run-resumed"
    INSTANCE_BACK = "instance-back"
    DATABASE_BACK = "database-back"


# What concerns all instances.
_OF_ALL: Final = {Code.NO_INSTANCES, Code.STANDBY_MISSING}
# What follows from it that no instance is there, or was, until the database was back just now.
_FOR_WANT_OF_INSTANCES: Final = {Code.NO_CODE, Code.JOB_OVERDUE, Code.JOB_LOST}


class Action(NamedTuple):
    """What mends a cause: `resume` or `run` a job, `open` its runs, `dismiss` an instance."""

    kind: str
    # the name of the job, or the id of the instance
    target: str


class Cause(NamedTuple):
    """Why the verdict is not green; `subject` is the job or the instance's name."""

    level: Level
    code: Code
    subject: str
    text: str
    since: datetime | None = None
    action: Action | None = None


class Resumed(NamedTuple):
    """A run that was lost, and the run of its job that came after it."""

    job: str
    server: str
    resumed_on: str
    resumed_at: datetime


class Difference(NamedTuple):
    """An audit whose last result is that it found a difference."""

    audit: str
    result: str
    at: datetime


class Recent(NamedTuple):
    """What is read beside the status: what has recovered lately, and what audits found last.

    `dismissed_at` is until when somebody has dismissed what had recovered. `commits_wait` says why
    no commit is acknowledged, not even a heartbeat's; None: they are.
    """

    resumed: tuple[Resumed, ...] = ()
    dismissed_at: datetime | None = None
    differences: tuple[Difference, ...] = ()
    commits_wait: str | None = None

    def on(self, replication: Replication | None) -> "Recent":
        """Return the same on a primary with these standbys; None: not known."""
        wait = None if replication is None else replication.shortage()
        return self._replace(commits_wait=wait)


class Verdict(NamedTuple):
    """Whether all is well; the red causes come first."""

    level: Level
    sentence: str
    causes: tuple[Cause, ...] = ()
    now: datetime | None = None

    @property
    def symbol(self) -> str:
        """The symbol of the level."""
        return SYMBOLS[self.level]

    def body(self) -> dict[str, Any]:
        """Return the JSON of a `VerdictAnswer`."""
        shown = self.causes[:CAUSES_SHOWN]
        return {
            "now": self.now,
            "level": self.level,
            "symbol": self.symbol,
            "sentence": self.sentence,
            "causes": [
                each._asdict() | {"action": each.action and each.action._asdict()} for each in shown
            ],
            "more": len(self.causes) - len(shown),
        }


class Situation(Protocol):
    """What the verdict is on: a `StatusSnapshot`."""

    @property
    def now(self) -> datetime:
        """The database's time."""

    @property
    def instances(self) -> list[dict[str, Any]]:
        """The instances, an `InstanceAnswer` with its times each."""

    @property
    def jobs(self) -> Mapping[str, object]:
        """The jobs by their names."""

    @property
    def causes(self) -> Mapping[str, Cause]:
        """Why jobs need a hand, by their names."""

    @property
    def outages(self) -> tuple[Outage, ...]:
        """When no instance reached the database, the latest first."""

    @property
    def settling(self) -> bool:
        """Whether that was just now."""


def decide(snapshot: Situation, recent: Recent | None = None) -> Verdict:
    """Return the verdict on a snapshot, and on what has recovered lately."""
    recent = recent or Recent()
    if recent.commits_wait is None:
        red = list(_of_instances(snapshot))
    else:  # so instances seem to be gone
        red = [Cause(Level.RED, Code.STANDBY_MISSING, "", recent.commits_wait)]
    nobody = not any(each["state"] == "live" for each in snapshot.instances)
    # What an audit has found stays, whatever became of its runs since.
    found = {each.audit: _differs(each) for each in recent.differences}
    jobs = {**snapshot.causes, **{job: each for job, each in found.items() if job in snapshot.jobs}}
    red += [
        cause
        for _, cause in sorted(jobs.items())
        if not ((nobody or snapshot.settling) and cause.code in _FOR_WANT_OF_INSTANCES)
    ]
    amber = sorted(
        _recovered(snapshot, recent, jobs),
        key=lambda cause: cause.since or snapshot.now,
        reverse=True,
    )
    causes = (*red, *amber)
    if red:
        return Verdict(Level.RED, _red_sentence(red), causes, snapshot.now)
    if amber:
        more = f" (and {len(amber) - 1} more)" if len(amber) > 1 else ""
        return Verdict(Level.AMBER, f"Recovered: {amber[0].text}{more}.", causes, snapshot.now)
    return Verdict(Level.GREEN, "All is well.", (), snapshot.now)


def unavailable(since: datetime | None, now: datetime | None) -> Verdict:
    """Return the verdict while the database can't be read; None: it never was."""
    text = "Database unavailable"
    cause = Cause(Level.RED, Code.DATABASE_UNAVAILABLE, "", text, since)
    when = "" if since is None else f" since {exact(since)} UTC"
    return Verdict(Level.RED, f"{text}{when}.", (cause,), now)


def _differs(found: Difference) -> Cause:
    text = f"{found.audit} found a difference: {_cut(found.result)}"
    return _red(Code.AUDIT_DIFFERS, found.audit, text, found.at, "open")


def cause_of_job(job: Mapping[str, Any]) -> Cause | None:
    """Return why a job (a `JobAnswer` with its times) needs a hand; None: it needs none."""
    name, last, paused = job["name"], job["lastRun"], job["paused"]
    failures = job["failuresInARow"]
    result = (last and last["result"]) or ""
    if paused is not None:
        if paused["by"] != BY_ITSELF:
            return None
        why = f": {paused['reason']}" if paused["reason"] else ""
        return _red(Code.JOB_PAUSED, name, f"{name} was paused{why}", paused["at"], "resume")
    if job["waiting"] is not None and (cause := _of_wait(job)) is not None:
        return cause
    if last is None or not failures:
        return None
    times = f" {failures} times in a row" if failures > 1 else ""
    # A later run may have been cancelled or released.
    failed = last["outcome"] in FAILURES and last["outcome"] != Outcome.LOST
    ended = outcome_predicate(last["outcome"]) if failed else "failed"
    why = f": {_cut(result)}" if failed and result else ""
    action = "open" if job["state"] == State.RUNNING else "run"
    return _red(Code.JOB_FAILING, name, f"{name} {ended}{times}{why}", last["endedAt"], action)


def _of_wait(job: Mapping[str, Any]) -> Cause | None:
    name, last, waiting = job["name"], job["lastRun"], job["waiting"]
    match waiting["reason"]:
        case Reason.QUARANTINED:
            losses = job["lossesInARow"]
            text = f"{name} was lost {losses} times in a row and is not retried before "
            text += f"{exact(job['readyAt'])} UTC"
            return _red(Code.JOB_LOST, name, text, last and last["endedAt"], "run")
        case Reason.NO_CODE:
            text = f"No running instance has the code of {name}"
            return _red(Code.NO_CODE, name, text, None, "open")
        case Reason.LOST if waiting["overdue"]:
            text = f"The run of {name} was lost and is not resumed"
            return _red(Code.JOB_LOST, name, text, job["readyAt"], "open")
        case Reason.NO_CAPACITY if waiting["overdue"]:
            text = f"{name} is overdue: the instances with its code run as many jobs as they may"
            return _red(Code.JOB_OVERDUE, name, text, job["readyAt"], "open")
        case _ if waiting["overdue"]:
            text = f"{name} is overdue: no instance has started it"
            return _red(Code.JOB_OVERDUE, name, text, job["readyAt"], "run")
    return None


def _red(code: Code, name: str, text: str, since: datetime | None, action: str) -> Cause:
    return Cause(Level.RED, code, name, text, since, Action(action, name))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_RESULT else f"{text[: LONGEST_RESULT - 1]}…"


def _of_instances(snapshot: Situation) -> Iterable[Cause]:
    live = any(each["state"] == "live" for each in snapshot.instances)
    if snapshot.jobs and not live and not snapshot.settling:
        seen = min((each["seenSecondsAgo"] for each in snapshot.instances), default=None)
        since = None if seen is None else snapshot.now - timedelta(seconds=seen)
        yield Cause(Level.RED, Code.NO_INSTANCES, "", "No instance is running jobs", since)
    for each in snapshot.instances:
        if each["state"] == "gone":
            since = snapshot.now - timedelta(seconds=each["seenSecondsAgo"])
            text = f"{each['server']} stopped responding (last heartbeat at {exact(since)} UTC)"
            action = Action("dismiss", each["id"])
            yield Cause(Level.RED, Code.INSTANCE_GONE, each["server"], text, since, action)


def _red_sentence(red: list[Cause]) -> str:
    """Return the only cause, or what is wrong with instances and how many jobs need a hand."""
    if len(red) == 1:
        return f"{red[0].text}."
    gone = [cause.subject for cause in red if cause.code == Code.INSTANCE_GONE]
    jobs = sum(cause.action is not None and cause.action.kind != "dismiss" for cause in red)
    parts = [cause.text for cause in red if cause.code in _OF_ALL]
    if gone and not parts:
        more = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        parts.append(f"{', '.join(gone[:NAMED])}{more} stopped responding")
    if jobs:
        parts.append(f"{jobs} {'job needs' if jobs == 1 else 'jobs need'} you")
    return f"{'; '.join(parts)}."


def _recovered(snapshot: Situation, recent: Recent, red: Mapping[str, Cause]) -> Iterable[Cause]:
    """Yield what has healed by itself within the last quarter of an hour."""
    after = snapshot.now - RECENT
    if recent.dismissed_at is not None:
        after = max(after, recent.dismissed_at)
    if snapshot.settling and not any(each["state"] == "live" for each in snapshot.instances):
        text = "the database is back, and instances are reconnecting"
        yield Cause(Level.AMBER, Code.DATABASE_BACK, "", text, snapshot.now)
    for outage in snapshot.outages:
        if outage.until > after:
            lasted = duration((outage.until - outage.since).total_seconds())
            text = f"no instance reached the database for {lasted}"
            yield Cause(Level.AMBER, Code.DATABASE_BACK, "", text, outage.until)
    for each in snapshot.instances:
        back_at = each["startedAt"]
        gone_at = each["replacesSeenAt"]
        # Of two at a time with one name neither is gone.
        took_place = gone_at is not None and gone_at < back_at
        if each["state"] == "live" and took_place and back_at > after:
            away = duration((back_at - gone_at).total_seconds())
            text = f"{each['server']} is back after {away}"
            yield Cause(Level.AMBER, Code.INSTANCE_BACK, each["server"], text, back_at)
    for run in recent.resumed:
        # What is red is not healed.
        if run.resumed_at > after and run.job not in red:
            # A lost run ends with its lease: how long nobody worked is not known.
            text = f"the run of {run.job} on {run.server} was lost and resumed on {run.resumed_on}"
            action = Action("open", run.job)
            yield Cause(Level.AMBER, Code.RUN_RESUMED, run.job, text, run.resumed_at, action)
