"""Connections that are ended because of what their clients do: counted, and logged once a minute.

One line for each connection would let anybody fill the log.
"""

import asyncio
from collections import Counter
from contextvars import Context
from enum import StrEnum
from typing import Final

import structlog

GATHER_SECONDS: Final = 1.0  # so that the first line has the number of a crowd, not 1
LOG_EVERY_SECONDS: Final = 60.0
MANY: Final = 10  # browsers leave a few connections unused

log = structlog.get_logger(__name__)


class Ending(StrEnum):
    """Why connections are ended, or refused."""

    SILENT = "connections ended: their clients send nothing"
    TRICKLING = "connections ended: their clients send too slowly"
    NOT_READING = "connections ended: their clients read nothing"
    REPLACED = "connections ended: others need their file descriptors"
    FULL = "too many connections for the limit of open files"


class Endings:
    """What ended the connections of one server."""

    def __init__(self) -> None:
        self._counts: Counter[Ending] = Counter()
        self._reporting: set[Ending] = set()

    def note(
        self, why: Ending, client: tuple[str, int] | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Count one; what is counted is logged in a second, but not twice in a minute."""
        self._counts[why] += 1
        if why not in self._reporting:
            self._reporting.add(why)
            self._report_in(GATHER_SECONDS, why, client, loop)

    def _report_in(
        self,
        seconds: float,
        why: Ending,
        client: tuple[str, int] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        loop.call_later(seconds, self._report, why, client, loop, context=Context())

    def _report(
        self, why: Ending, client: tuple[str, int] | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        count = self._counts.pop(why, 0)
        if not count:
            self._reporting.discard(why)
            return
        write = log.warning if why is Ending.FULL or count >= MANY else log.info
        write(why.value, count=count, one_of_them=client)
        self._report_in(LOG_EVERY_SECONDS, why, client, loop)
