"""What is wrong now and needs a hand: the red causes of the verdict."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from balance_app.jobs.api.verdict import Code, Level, Verdict
from balance_app.maintenance.alerting.events import Cause

SECOND_LOOK_SECONDS: Final = 5.0


class CauseReader:
    """Reads what is wrong.

    What is new is looked at a second time: after an outage of the database jobs are overdue, and
    instances silent, for a moment.
    """

    def __init__(self, read_verdict: Callable[[], Awaitable[Verdict]]) -> None:
        self._read_verdict = read_verdict
        self._known: set[tuple[str, str]] = set()

    async def read(self) -> list[Cause]:
        """Return what is wrong now.

        That the database is unavailable is not among it: it could not be recorded.
        """
        found = await self._read()
        if not found.keys() <= self._known:
            seen = self._known | found.keys()
            await asyncio.sleep(SECOND_LOOK_SECONDS)
            found = {key: cause for key, cause in (await self._read()).items() if key in seen}
        self._known = set(found)
        return list(found.values())

    async def _read(self) -> dict[tuple[str, str], Cause]:
        verdict = await self._read_verdict()
        return {
            (each.code, each.subject): Cause(each.code, each.subject, f"{each.text}.", since)
            for each in verdict.causes
            if each.level == Level.RED
            and each.code != Code.DATABASE_UNAVAILABLE
            and (since := each.since or verdict.now) is not None
        }
