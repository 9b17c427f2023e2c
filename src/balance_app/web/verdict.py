"""The verdict as the page shows it: the same as everywhere, with facts, buttons and links."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from balance_app.formatting import MINUTE, ago
from balance_app.jobs.api import verdict as decided
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.states import Outcome, State
from balance_app.web.view_models import number

RED: Final = decided.Level.RED
CAUSES_SHOWN: Final = 6


class Cause(NamedTuple):
    """Why the verdict is not green, and what mends it: a button for `target`, or a page.

    Its text is empty where the sentence has it.
    """

    level: str
    # a job, or the name of an instance
    subject: str
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
    # whether something of it has healed by itself, and can be dismissed
    recovered: bool = False
    # the jobs that need a hand
    attention: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """What the browser's tab says."""
        return f"{self.symbol} {self.sentence.rstrip('.')}"


NO_VERDICT: Final = Verdict("none", "…", "No data yet.")
UNAVAILABLE: Final = Verdict(RED, "✕", "Database unavailable.")


def decide(
    snapshot: StatusSnapshot, recent: decided.Recent, audit: Mapping[str, Any] | None
) -> Verdict:
    """Return the verdict.

    Args:
        snapshot: the status of jobs and instances.
        recent: what has recovered lately.
        audit: the last one that came to a result; None: not known.
    """
    verdict = decided.decide(snapshot, recent)
    # Of a job; without instances no job is blamed.
    attention = frozenset(
        each.subject
        for each in verdict.causes
        if each.level == RED and each.subject in snapshot.jobs
    )
    # The text of a cause that the sentence has in full is left out; its time and action stay.
    causes = [
        each._replace(text="") if each.text in verdict.sentence else each
        for each in map(_cause, verdict.causes)
    ]
    causes = [each for each in causes if each.text or each.button or each.href]
    facts = _facts(snapshot, attention, audit)
    shown, more = tuple(causes[:CAUSES_SHOWN]), max(0, len(causes) - CAUSES_SHOWN)
    recovered = any(each.level == decided.Level.AMBER for each in verdict.causes)
    level, symbol, sentence = verdict.level, verdict.symbol, verdict.sentence
    return Verdict(level, symbol, sentence, facts, shown, more, recovered, attention)


def _cause(cause: decided.Cause) -> Cause:
    action = cause.action
    opens = action is not None and action.kind == "open"
    return Cause(
        cause.level,
        cause.subject,
        cause.text,
        None if cause.since is None else cause.since.timestamp(),
        None if action is None or opens else action.kind,
        "" if action is None else action.target,
        f"/jobs/{action.target}" if action is not None and action.kind != "dismiss" else None,
    )


def _facts(
    snapshot: StatusSnapshot,
    attention: frozenset[str],
    audit: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    live = {each["server"] for each in snapshot.instances if each["live"]}
    known = {each["server"] for each in snapshot.instances}
    blamed = sum(snapshot.jobs[name].summary.state == State.PAUSED for name in attention)
    paused = snapshot.counts["paused"] - blamed
    on_time = len(snapshot.jobs) - len(attention) - paused
    facts = [f"{len(live)} of {len(known)} {'instance' if len(known) == 1 else 'instances'} up"]
    if live:
        facts.append(f"{number(on_time)} {'job' if on_time == 1 else 'jobs'} on time")
    if paused:
        facts.append(f"{number(paused)} paused")
    if audit is not None and audit["outcome"] == Outcome.SUCCEEDED:
        since = snapshot.now.timestamp() - audit["ended"]
        # No seconds: it would change with each of them.
        when = ago(since) if since >= MINUTE else "less than a minute ago"
        facts.append(f"ledger verified {when}")
    return tuple(facts)
