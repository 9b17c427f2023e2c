"""What is wrong now and needs a hand, from the status snapshot."""

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
from pydantic_core import from_json

from balance_app.db.pool import Database, read
from balance_app.formatting import exact
from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.maintenance.alerting.events import Cause
from balance_app.maintenance.audits import AUDITS, LedgerMismatchError
from balance_app.states import Outcome, Reason

_AUDITS: Final = frozenset(each.name for each in AUDITS)
_MISMATCH: Final = f"{LedgerMismatchError.__name__}:"
_GONE: Final = "{} stopped responding: its last heartbeat was at {} UTC."
SECOND_LOOK_SECONDS: Final = 5.0
# Who pauses a job that failed too often.
_BY_ITSELF: Final = "balance_app"


class CauseReader:
    """Reads what is wrong.

    What is new is looked at a second time: after an outage of the database jobs are overdue, and
    instances silent, for a moment.
    """

    def __init__(self, status: StatusReader, database: Database) -> None:
        self._status = status
        self._database = database
        self._known: set[tuple[str, str]] = set()

    async def read(self) -> list[Cause]:
        """Return what is wrong now.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        found = await self._read()
        if not found.keys() <= self._known:
            seen = self._known | found.keys()
            await asyncio.sleep(SECOND_LOOK_SECONDS)
            found = {key: cause for key, cause in (await self._read()).items() if key in seen}
        self._known = set(found)
        return list(found.values())

    async def _read(self) -> dict[tuple[str, str], Cause]:
        snapshot = await self._status.read()
        gone = await self._database.run(lambda con: read(con, GONE, self._status.lease))
        causes = [
            *causes_of_jobs(snapshot),
            *(
                Cause(
                    "instance-gone", row["server"], _GONE.format(row["server"], _at(row)), row["at"]
                )
                for row in gone
            ),
        ]
        return {(each.code, each.subject): each for each in causes}


# An instance that stops as it should deletes its row. One that starts again has its name, and
# another id.
GONE: Final = """
SELECT server, max(last_heartbeat_at) AS at FROM instances
GROUP BY server HAVING max(last_heartbeat_at) <= clock_timestamp() - $1::interval
ORDER BY server
"""


def causes_of_jobs(snapshot: StatusSnapshot) -> Iterator[Cause]:
    """Yield what is wrong with jobs in a snapshot."""
    for status in snapshot.jobs.values():
        job = from_json(status.text)
        cause = _cause_of_job(job)
        if cause is not None:
            code, sentence, since = cause
            yield Cause(code, job["name"], sentence, datetime.fromisoformat(since))


def _at(row: asyncpg.Record) -> str:
    return exact(row["at"].astimezone(UTC))


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
    if last and failures:
        times = f" {failures} times in a row" if failures > 1 else ""
        # A run after it may have been cancelled or released.
        why = f": {result}" if last["outcome"] in {Outcome.FAILED, Outcome.TIMED_OUT} else "."
        return "job-failing", f"{name} failed{times}{why}", last["endedAt"]
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
