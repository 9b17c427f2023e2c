"""What is wrong now and needs a hand: the red causes of the verdict."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs.api.verdict import Level, Recent, Situation, decide
from balance_app.maintenance.alerting.events import Cause

SECOND_LOOK_SECONDS: Final = 5.0
Look = Callable[[], Awaitable[tuple[Situation, Recent]]]
_Causes = Mapping[tuple[str, str], Cause]


class CauseReader:
    """Reads what is wrong.

    What is new is looked at a second time: after an outage of the database jobs are overdue, and
    instances silent, for a moment.
    """

    def __init__(self, look: Look) -> None:
        """Read with `look`, which returns what the verdict is decided on."""
        self._read = look

    async def read(self, known: Collection[Cause]) -> list[Cause] | None:
        """Return what is wrong now, of which `known` is not new; None: that can't be read."""
        reported = {(each.code, each.subject): each for each in known}
        try:
            found = await self._look(reported)
            if not found.keys() <= reported.keys():
                await asyncio.sleep(SECOND_LOOK_SECONDS)
                again = await self._look(reported)
                seen = reported.keys() | found.keys()
                found = {key: cause for key, cause in again.items() if key in seen}
        except (DatabaseUnavailable, Overloaded):
            return None
        return list(found.values())

    async def _look(self, reported: _Causes) -> _Causes:
        snapshot, recent = await self._read()
        found: _Causes = {
            (each.code, each.subject): Cause(
                each.code, each.subject, each.text, each.since or snapshot.now
            )
            for each in decide(snapshot, recent).causes
            if each.level == Level.RED
        }
        # After an outage, and without an instance, the verdict leaves out what may follow from it:
        # that a cause is missing does not say that it has recovered.
        if snapshot.settling or not any(each["state"] == "live" for each in snapshot.instances):
            return {**reported, **found}
        return found
