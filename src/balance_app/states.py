"""The states of jobs, the outcomes of runs and the reasons to wait: values, symbols and labels.

The values are those of the database, the API and the metrics; the symbols and labels are shown to
people, on the page and in the terminal. A symbol or a label never depends on a colour.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple


class Tone(StrEnum):
    """What the colour of a sign stands for; the symbol and label mean the same without it."""

    GOOD = "good"
    RUN = "run"
    WAIT = "wait"
    WARN = "warn"
    BAD = "bad"
    REST = "rest"


class Sign(NamedTuple):
    """How a state, an outcome or a reason is shown to people."""

    symbol: str
    label: str
    tone: Tone


class State(StrEnum):
    """The state of a job."""

    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"


class Outcome(StrEnum):
    """How a run ended; `SKIPPED` is a range of ticks that did not run."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    CANCELLED = "cancelled"
    RELEASED = "released"
    SKIPPED = "skipped"


class Reason(StrEnum):
    """Why a job does not run."""

    NOT_DUE = "not-due"
    DUE = "due"
    REQUESTED = "requested"
    RELEASED = "released"
    WARM_UP = "warm-up"
    RETRY = "retry"
    QUARANTINED = "quarantined"
    LOST = "lost"
    NO_CODE = "no-code"
    NO_CAPACITY = "no-capacity"
    PAUSED = "paused"


_RUNNING: Final = Sign("▶", "running", Tone.RUN)
_PAUSED: Final = Sign("‖", "paused", Tone.REST)
_OUTCOMES: Final[dict[str, Sign]] = {
    Outcome.SUCCEEDED: Sign("✓", "succeeded", Tone.GOOD),
    Outcome.FAILED: Sign("✕", "failed", Tone.BAD),
    Outcome.TIMED_OUT: Sign("✕", "timed out", Tone.BAD),
    Outcome.LOST: Sign("✕", "lost", Tone.BAD),
    Outcome.CANCELLED: Sign("■", "cancelled", Tone.REST),
    Outcome.RELEASED: Sign("↷", "released", Tone.REST),
    Outcome.SKIPPED: Sign("□", "skipped", Tone.REST),
}
_REASONS: Final[dict[str, Sign]] = {
    Reason.NOT_DUE: Sign("○", "waiting", Tone.REST),
    Reason.DUE: Sign("◔", "due", Tone.WAIT),
    Reason.REQUESTED: Sign("◔", "requested", Tone.WAIT),
    Reason.RELEASED: Sign("◔", "released", Tone.WAIT),
    Reason.WARM_UP: Sign("◔", "warm-up", Tone.WAIT),
    Reason.RETRY: Sign("↻", "retry", Tone.WARN),
    Reason.QUARANTINED: Sign("✕", "quarantined", Tone.BAD),
    Reason.LOST: Sign("✕", "lost", Tone.BAD),
    Reason.NO_CODE: Sign("?", "no code", Tone.WARN),
    Reason.NO_CAPACITY: Sign("◔", "no capacity", Tone.WARN),
}
_ACTIVE: Final = (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.TIMED_OUT)

# The outcomes of a job's last run that need attention.
FAILURES: Final = (Outcome.FAILED, Outcome.TIMED_OUT, Outcome.LOST)


def outcome_sign(outcome: str | None) -> Sign:
    """Return the sign of an outcome; None: the run goes on. A newer service may have others."""
    if outcome is None:
        return _RUNNING
    return _OUTCOMES.get(outcome) or Sign("?", outcome, Tone.REST)


def outcome_predicate(outcome: str) -> str:
    """Return the predicate of a run that ended so: "failed", "was cancelled"."""
    label = outcome_sign(outcome).label
    return label if outcome in _ACTIVE else f"was {label}"


def job_sign(job: Mapping[str, Any]) -> Sign:
    """Return the sign of a job (a `JobAnswer` as JSON): its state, and whether it is overdue."""
    if job["state"] == State.RUNNING:
        return _running_sign(job)
    if job["state"] == State.PAUSED:
        return _PAUSED
    reason = job["waiting"]["reason"]
    sign = _REASONS.get(reason) or Sign("○", reason, Tone.REST)
    if job["waiting"]["overdue"] and sign.tone != Tone.BAD:
        label = "overdue" if reason == Reason.DUE else f"{sign.label}, overdue"
        return Sign("!", label, Tone.WARN)
    return sign


def _running_sign(job: Mapping[str, Any]) -> Sign:
    if job["cancelRequestedBy"] is not None:
        return _RUNNING._replace(label="cancelling", tone=Tone.WARN)
    if job["stopRequestedAt"] is not None:
        return _RUNNING._replace(label="stopping", tone=Tone.WARN)
    if job.get("holdingUntil") is not None:
        return _RUNNING._replace(label="work done")
    return _RUNNING if job["paused"] is None else _RUNNING._replace(label="running, then paused")
