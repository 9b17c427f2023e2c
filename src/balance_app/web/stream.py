"""The live page: one query a second for all who watch this instance, sent as what has changed.

A tick is one statement: a look at the board, or at what is around it, never both. Viewers who have
the same version of the picture are sent the same bytes, made and compressed once.
"""

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from secrets import token_hex
from time import monotonic
from typing import Final

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from balance_app.jobs.api.events import Feed
from balance_app.jobs.api.status import Board, Snapshot
from balance_app.web import view_models as views
from balance_app.web.fragments import Picture
from balance_app.web.queries import Around, Overview
from balance_app.web.rendering import under

_VERSION: Final = re.compile(r"[0-9]{1,16}", re.ASCII)
AROUND_SECONDS: Final = 4.0  # what is around the board is asked for as often, or when runs change


class Live:
    """Keeps the picture up to date while somebody watches, or asks for a page."""

    def __init__(
        self, board: Board, overview: Overview, stopping: asyncio.Event, *, root_path: str = ""
    ) -> None:
        self._root_path = root_path
        self._board = board
        self._overview = overview
        self._turn = asyncio.Lock()
        # when the look that is shown was asked for
        self._began = 0.0
        self._around: Around | None = None
        # when it was asked for, and of each job what its runs were known by
        self._asked_at = 0.0
        self._told: dict[str, object] = {}
        self._look_is_next = True
        self._watched: Counter[str] = Counter()
        # The versions of one boot say nothing to another.
        self._boot = token_hex(4)
        self._events: dict[tuple[int | None, str | None], bytes] = {}
        self._packed: dict[bytes, bytes] = {}
        self._feed = Feed(self._tick, stopping)
        self.picture = Picture()

    @property
    def version(self) -> str:
        """The name of the picture's version, for a browser that has it to come back with."""
        return f"{self._boot}.{self.picture.version}"

    async def refresh(self) -> Snapshot:
        """Bring the picture up to this moment.

        Raises:
            DatabaseUnavailable: it can't be reached; the picture stays as it was.
        """
        began = monotonic()
        snapshot = await self._board.look()
        async with self._turn:
            if began >= self._began:  # else the picture shows a later look already
                self._began = began
                self.picture.take(snapshot, self._watched)
            if self._due(began):
                await self._ask()
            self._draw()
        return snapshot

    async def _tick(self) -> Snapshot:
        """Bring the picture on by one statement."""
        async with self._turn:
            if self._look_is_next or not self._due(monotonic() - AROUND_SECONDS):
                self._began = monotonic()
                self.picture.take(await self._board.look(), self._watched)
                self._look_is_next = False
            else:
                await self._ask()
            self._draw()
            assert self.picture.snapshot is not None  # noqa: S101 - there was a look
            return self.picture.snapshot

    def _due(self, since: float) -> bool:
        """Say whether to look around: runs have changed, or nobody has since that moment."""
        return (
            self._around is None
            or self._asked_at < since
            or any(_runs_of(job) != self._told.get(name) for name, job in self.picture.jobs.items())
        )

    async def _ask(self) -> None:
        """Look around the board; the runs of a job are only asked for when they have changed."""
        told = {name: _runs_of(job) for name, job in self.picture.jobs.items()}
        changed = [name for name, runs in told.items() if runs != self._told.get(name)]
        began = monotonic()
        self._around = await self._overview.around(told, changed)
        self._told = told
        self._asked_at = began
        self._look_is_next = True

    def _draw(self) -> None:
        self.picture.draw(self._around)
        self._events.clear()
        self._packed.clear()

    # -- viewers -----------------------------------------------------------------------------

    @contextmanager
    def keeping(self, job: str) -> Iterator[None]:
        """Keep a job in the picture, whether it is shown or not."""
        self._watched[job] += 1
        try:
            yield
        finally:
            self._watched[job] -= 1
            self._watched = +self._watched

    @contextmanager
    def watching(self, job: str | None) -> Iterator[None]:
        """Count somebody who watches everything, or one job.

        Raises:
            Overloaded: too many do already.
        """
        with self._feed.viewer(), self.keeping(job) if job else nullcontext():
            yield

    async def events(self, since: str | None, job: str | None) -> AsyncIterator[bytes]:
        """Yield what is new to a viewer who has the version `since`, at each tick."""
        boot, _, number = (since or "").partition(".")
        has = int(number) if boot == self._boot and _VERSION.fullmatch(number) else None
        async for event in self._feed.events():
            if event.startswith(b"event: status"):
                had, has = has, self.picture.version
                yield self._event(had, job)
            else:  # how soon to come again, or that the database is unavailable
                yield event

    def _event(self, since: int | None, job: str | None) -> bytes:
        """Return the event for all who have the version `since`."""
        known = self._events.get((since, job))
        if known is None:
            snapshot = self.picture.snapshot
            assert snapshot is not None  # noqa: S101 - a tick came before
            news = self.picture.news(since, job)
            told = {
                "now": snapshot.now.timestamp(),
                "title": self.picture.title,
                "html": {id_: under(self._root_path, html) for id_, html in news.items()},
            }
            known = format_sse_event(
                event="status", data_str=to_json(told).decode(), id=self.version
            )
            self._events[since, job] = known
        return known

    def pack(self, event: bytes) -> bytes:
        """Compress an event into blocks that refer to nothing before them; the same one once."""
        known = self._packed.get(event)
        if known is None:
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            known = packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH)
            self._packed[event] = known
        return known


class LiveResponse(EventSourceResponse):
    """The stream to one viewer, compressed if its browser can read that."""

    def __init__(self, live: Live, *, since: str | None, job: str | None, compress: bool) -> None:
        headers = {
            "Cache-Control": "no-store",
            "Vary": "Accept-Encoding",
            "X-Accel-Buffering": "no",
        }
        events = live.events(since, job)
        if compress:
            headers["Content-Encoding"] = "gzip"
            events = _gzip(events, live.pack)
        super().__init__(events, headers=headers)
        self._watching = live.watching(job)

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._watching:
            await super().__call__(scope, receive, send)


async def _gzip(
    events: AsyncIterator[bytes], pack: Callable[[bytes], bytes]
) -> AsyncIterator[bytes]:
    """Compress a stream as RFC 1952 says: a head, blocks, the last block, and what to check."""
    check, size = 0, 0
    yield b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    async for event in events:
        check, size = zlib.crc32(event, check), size + len(event)
        yield pack(event)
    yield b"\x03\x00" + check.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")


def _runs_of(job: views.Job) -> object:
    """Return what changes whenever a job's runs do."""
    last = job["lastRun"]
    return job["fence"], job["state"], job["dueAt"], None if last is None else last["endedAt"]
