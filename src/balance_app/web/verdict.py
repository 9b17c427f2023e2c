"""The verdict as the page shows it: the same as everywhere, with facts, buttons and links."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from balance_app.jobs.api import verdict as decided
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.states import Outcome, State
from balance_app.web.queries import AUDIT, Activity
from balance_app.web.view_models import RESULTS, last_result

RED: Final = decided.Level.RED
CAUSES_SHOWN: Final = 6
RECENT_SECONDS: Final = decided.RECENT.total_seconds()


class Cause(NamedTuple):
    """Why the verdict is not green, and what mends it: a button for `target`, or a page."""

    level: str
    text: str
    since: float | None = None
    button: str | None = None
    target: str = ""
    href: str | None = None


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


def decide(snapshot: StatusSnapshot, activity: Activity | None) -> Verdict:
    """Return the verdict.

    Args:
        snapshot: the status of jobs and instances.
        activity: the latest runs, for what has recovered, and the last audit; None: not known.
    """
    recent = decided.Recent()
    if activity is not None:
        resumed = tuple(_resumed(activity.fleet, snapshot.now))
        recent = decided.Recent(resumed, activity.dismissed_at)
    verdict = decided.decide(snapshot, recent)
    # Of a job; without instances no job is blamed.
    attention = {
        each.subject: 2
        for each in verdict.causes
        if each.level == RED and each.subject in snapshot.causes
    }
    # What the sentence says in full is not said again.
    causes = [each for each in map(_cause, verdict.causes) if not _is_told(each, verdict.sentence)]
    facts = _facts(snapshot, attention, last_result(snapshot, activity, AUDIT, RESULTS))
    shown, more = tuple(causes[:CAUSES_SHOWN]), max(0, len(causes) - CAUSES_SHOWN)
    level, symbol, sentence = verdict.level, verdict.symbol, verdict.sentence
    return Verdict(level, symbol, sentence, facts, shown, more, attention)


def _is_told(cause: Cause, sentence: str) -> bool:
    return cause.text in sentence and cause.button is None and cause.href is None


def _cause(cause: decided.Cause) -> Cause:
    action = cause.action
    opens = action is not None and action.kind == "open"
    return Cause(
        cause.level,
        cause.text,
        None if cause.since is None else cause.since.timestamp(),
        None if action is None or opens else action.kind,
        "" if action is None else action.target,
        f"/jobs/{action.target}" if action is not None and action.kind != "dismiss" else None,
    )


def _resumed(runs: Iterable[Mapping[str, Any]], now: datetime) -> Iterable[decided.Resumed]:
    """Yield the lost runs that were resumed lately, with the runs that resumed them."""
    lost: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        before = lost.pop(run["job"], None)
        if run["outcome"] == Outcome.LOST:
            lost[run["job"]] = run
        elif before is not None and now.timestamp() - run["started"] < RECENT_SECONDS:
            yield decided.Resumed(
                before["id"],
                before["job"],
                before["server"],
                datetime.fromtimestamp(before["ended"], UTC),
                run["server"],
                datetime.fromtimestamp(run["started"], UTC),
            )


def _facts(
    snapshot: StatusSnapshot,
    attention: Mapping[str, int],
    audit: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    live = {each["server"] for each in snapshot.instances if each["live"]}
    known = live | {each["server"] for each in snapshot.instances}
    paused = sum(
        job.summary.state == State.PAUSED
        for name, job in snapshot.jobs.items()
        if name not in attention
    )
    on_time = len(snapshot.jobs) - len(attention) - paused
    facts = [f"{len(live)} of {len(known)} {'instance' if len(known) == 1 else 'instances'} up"]
    if live:
        facts.append(f"{on_time} {'job' if on_time == 1 else 'jobs'} on time")
    if paused:
        facts.append(f"{paused} paused")
    if audit is not None and audit["outcome"] == Outcome.SUCCEEDED:
        facts.append(f"ledger verified {_ago(snapshot.now.timestamp() - audit['ended'])}")
    return tuple(facts)


def _ago(seconds: float) -> str:
    """Return how long ago something was, in minutes, so that it rarely changes."""
    minutes = int(seconds // 60)
    return "less than a minute ago" if minutes < 1 else f"{minutes} min ago"
