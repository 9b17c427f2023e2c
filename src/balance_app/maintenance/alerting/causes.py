"""What is wrong now and needs a hand, from the status snapshot."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from pydantic_core import from_json

from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.maintenance.alerting.events import Cause
from balance_app.maintenance.audits import AUDITS, LedgerMismatchError
from balance_app.states import Outcome, Reason

_AUDITS: Final = frozenset(each.name for each in AUDITS)
_MISMATCH: Final = f"{LedgerMismatchError.__name__}:"
# Who pauses a job that failed too often.
_BY_ITSELF: Final = "balance_app"


class CauseReader:
    """Reads what is wrong."""

    def __init__(self, status: StatusReader) -> None:
        self._status = status

    async def read(self) -> list[Cause]:
        """Return what is wrong now.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        return list(causes(await self._status.read()))


def causes(snapshot: StatusSnapshot) -> Iterator[Cause]:
    """Yield what is wrong in a snapshot."""
    for status in snapshot.jobs.values():
        job = from_json(status.text)
        cause = _cause_of_job(job)
        if cause is not None:
            code, sentence, since = cause
            yield Cause(code, job["name"], sentence, datetime.fromisoformat(since))
    live = {each["server"] for each in snapshot.instances if each["live"]}
    for each in snapshot.instances:
        if not each["live"] and each["server"] not in live:
            sentence = f"{each['server']} stopped responding: no heartbeat."
            yield Cause("instance-gone", each["server"], sentence, snapshot.now)


def _cause_of_job(job: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return what is wrong with a job: the code, a sentence, and since when."""
    name, last, waiting, paused = job["name"], job["lastRun"], job["waiting"], job["paused"]
    failures = job["failuresInARow"]
    result = (last and last["result"]) or ""
    if name in _AUDITS and failures and result.startswith(_MISMATCH):
        differs = result.removeprefix(_MISMATCH).strip()
        return "audit-differs", f"{name} found a difference: {differs}", last["endedAt"]
    if paused is not None:
        if paused["by"] != _BY_ITSELF:
            return None
        return "job-paused", f"{name} is paused: {paused['reason']}.", paused["at"]
    if waiting is not None and (cause := _cause_of_wait(job)) is not None:
        return cause
    if last and failures and last["outcome"] in {Outcome.FAILED, Outcome.TIMED_OUT}:
        times = f" {failures} times in a row" if failures > 1 else ""
        return "job-failing", f"{name} failed{times}: {result}", last["endedAt"]
    return None


def _cause_of_wait(job: Mapping[str, Any]) -> tuple[str, str, str] | None:
    name, last, waiting = job["name"], job["lastRun"], job["waiting"]
    if waiting["reason"] == Reason.QUARANTINED:
        since = last["endedAt"] if last else job["readyAt"]
        return "job-lost", f"{name} was lost and is not resumed. {waiting['sentence']}", since
    if waiting["reason"] == Reason.NO_CODE:
        return "no-code", f"{name}: {waiting['sentence']}", job["readyAt"]
    if waiting["overdue"]:
        code = "job-lost" if waiting["reason"] == Reason.LOST else "job-overdue"
        return code, f"{name} is overdue: {waiting['sentence']}", job["readyAt"]
    return None
