"""The page's event stream: one query a second for all viewers of this instance, sent as changes.

A poll is one transaction: it reads the status, or the recent activity, never both. Viewers who have
the same version of the page are sent the same bytes, made and compressed once.
"""

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from secrets import token_hex
from time import monotonic
from typing import Final

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from balance_app.http.seats import Seats
from balance_app.jobs.api.events import EventBroadcaster
from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.web import view_models
from balance_app.web.fragments import Fragments, View
from balance_app.web.queries import PageQueries
from balance_app.web.rendering import add_root_path

_VERSION: Final = re.compile(r"[0-9]{1,15}", re.ASCII)
ACTIVITY_SECONDS: Final = 4.0  # how often recent activity is read when no run changes
KEPT_SECONDS: Final = 10.0
VIEWS_KEPT: Final = 8  # at most, of those that nobody looks at any more
BUSY_SECONDS: Final = 1.5  # and how often while balances change
UNWATCHED_SECONDS: Final = 2 * ACTIVITY_SECONDS  # older activity does not match a new status


class PageStream:
    """Updates the page's fragments while there are viewers, and for each page requested."""

    def __init__(
        self,
        status_reader: StatusReader,
        queries: PageQueries,
        stopping: asyncio.Event,
        seats: Seats,
        *,
        root_path: str = "",
    ) -> None:
        self._root_path = root_path
        self._status_reader = status_reader
        self._queries = queries
        self._lock = asyncio.Lock()
        # when the reading of the status that is shown began
        self._began = 0.0
        # when the query of the activity began, and `_runs_of` each job then
        self._activity_began = 0.0
        self._runs_seen: dict[str, object] = {}
        # how long the lanes are that its runs fill
        self._span_read = 0.0
        self._status_is_next = True
        self._watched: Counter[View] = Counter()
        # until when a view is kept that nobody looks at any more: its page is just being loaded
        self._kept: dict[View, float] = {}
        # A version means nothing to another process, as after a restart.
        self._boot = token_hex(4)
        self._events: dict[tuple[int | None, View, bool], bytes] = {}
        self._compressed: dict[bytes, bytes] = {}
        self._broadcaster = EventBroadcaster(self._poll, stopping, seats)
        self.fragments = Fragments()

    @property
    def version(self) -> str:
        """The version of the page, which its browser sends when it reconnects."""
        return f"{self._boot}.{self.fragments.version}"

    @property
    def level(self) -> str:
        """The level of the verdict; none: it is not known, or was some time ago."""
        return self.fragments.level if monotonic() - self._began < KEPT_SECONDS else "none"

    async def refresh(self) -> StatusSnapshot:
        """Update the fragments to the present state.

        Raises:
            DatabaseUnavailable: it can't be reached; the fragments stay as they were.
        """
        began = monotonic()
        snapshot = await self._status_reader.read()
        async with self._lock:
            if began < self._began and self.fragments.snapshot is not None:
                snapshot = self.fragments.snapshot  # a later one is shown already
            self._began = max(began, self._began)
            self.fragments.update(snapshot, self._views(began))
            if self._activity_due(began):
                await self._read_activity()
            self._render()
        return snapshot

    def keep_last(self) -> bool:
        """Render the views that are kept from the last known state; False: nothing is known."""
        if self.fragments.snapshot is None:
            return False
        self.fragments.update(self.fragments.snapshot, self._views(monotonic()))
        self._render()
        return True

    async def _poll(self) -> StatusSnapshot:
        """Update the fragments by one statement, or by both after a while without viewers."""
        async with self._lock:
            now = monotonic()
            unwatched = self._activity_began < now - UNWATCHED_SECONDS
            busy = self.fragments.activity is not None and self.fragments.activity.busy
            oldest = now - (BUSY_SECONDS if busy else ACTIVITY_SECONDS)
            status_due = self._status_is_next or not self._activity_due(oldest)
            if status_due or unwatched:
                self._began = now
                self.fragments.update(await self._status_reader.read(), self._views(now))
                self._status_is_next = False
            if unwatched or not status_due:
                await self._read_activity()
            self._render()
            assert self.fragments.snapshot is not None  # noqa: S101 - `update` came before
            return self.fragments.snapshot

    def _activity_due(self, since: float) -> bool:
        """Say whether to read the activity: runs changed, or it was not read since that moment."""
        return (
            self.fragments.activity is None
            or self._activity_began < since
            or self._span(monotonic()) > self._span_read
            or any(
                _runs_of(job) != self._runs_seen.get(name)
                for name, job in self.fragments.jobs.items()
            )
        )

    async def _read_activity(self) -> None:
        """Read recent activity; the runs of a job only when they have changed."""
        runs_now = {name: _runs_of(job) for name, job in self.fragments.jobs.items()}
        changed = [name for name, runs in runs_now.items() if runs != self._runs_seen.get(name)]
        began = monotonic()
        span = self._span(began)
        self.fragments.add(await self._queries.activity(runs_now, changed, span))
        self._span_read = span
        self._runs_seen = runs_now
        self._activity_began = began
        self._status_is_next = True

    def _span(self, now: float) -> float:
        """Return how long the longest lanes are that somebody looks at."""
        return max((view.seconds for view in self._views(now)), default=0.0)

    def _render(self) -> None:
        self.fragments.render()
        self._events.clear()
        self._compressed.clear()

    # -- viewers -----------------------------------------------------------------------------

    @contextmanager
    def keeping(self, view: View) -> Iterator[None]:
        """Keep the fragments of a view up to date, and for a moment after."""
        self._watched[view] += 1
        try:
            yield
        finally:
            self._watched[view] -= 1
            self._watched = +self._watched
            self._kept[view] = monotonic() + KEPT_SECONDS
            while len(self._kept) > VIEWS_KEPT:
                del self._kept[min(self._kept, key=lambda each: self._kept[each])]

    def _views(self, now: float) -> list[View]:
        self._kept = {view: until for view, until in self._kept.items() if until > now}
        return list(dict.fromkeys([*self._watched, *self._kept]))

    @contextmanager
    def watching(self, view: View, scope: Scope) -> Iterator[None]:
        """Count a viewer of a view, who sent this request.

        Raises:
            Overloaded, TooManyRequests: there are too many viewers.
        """
        with self._broadcaster.viewer(scope), self.keeping(view):
            yield

    def wake(self) -> None:
        """Send each viewer an empty part, as `EventBroadcaster.wake`."""
        self._broadcaster.wake()

    async def events(self, since: str | None, view: View, *, buttons: bool) -> AsyncIterator[bytes]:
        """Yield what has changed for a viewer who has the version `since`, at each poll."""
        boot, _, number = (since or "").partition(".")
        has = int(number) if boot == self._boot and _VERSION.fullmatch(number) else None
        async for event in self._broadcaster.events():
            if event.startswith(b"event: status"):
                had, has = has, self.fragments.version
                yield self._event(had, view, buttons=buttons)
            else:  # how soon to reconnect, or that the database is unavailable
                yield event

    def _event(self, since: int | None, view: View, *, buttons: bool) -> bytes:
        """Return the event for all who have the version `since`, and buttons or none."""
        cached = self._events.get((since, view, buttons))
        if cached is None:
            snapshot = self.fragments.snapshot
            assert snapshot is not None  # noqa: S101 - a poll came before
            changes = self.fragments.changes(since, view, buttons=buttons)
            data = {
                "now": snapshot.now.timestamp(),
                "title": self.fragments.title,
                "level": self.fragments.level,
                "html": {
                    id_: add_root_path(self._root_path, html) for id_, html in changes.items()
                },
            }
            cached = format_sse_event(
                event="status", data_str=to_json(data).decode(), id=self.version
            )
            self._events[since, view, buttons] = cached
        return cached

    def compress(self, event: bytes) -> bytes:
        """Compress an event, once, into blocks that refer to nothing before them."""
        cached = self._compressed.get(event)
        if cached is None:
            compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
            cached = compressor.compress(event) + compressor.flush(zlib.Z_SYNC_FLUSH)
            self._compressed[event] = cached
        return cached


class PageStreamResponse(EventSourceResponse):
    """The stream to one viewer, compressed if its browser accepts that."""

    def __init__(
        self,
        stream: PageStream,
        *,
        since: str | None,
        view: View,
        buttons: bool,
        compress: bool,
    ) -> None:
        headers = {
            "Cache-Control": "no-store",
            "Vary": "Accept-Encoding",
            "X-Accel-Buffering": "no",
        }
        events = stream.events(since, view, buttons=buttons)
        if compress:
            headers["Content-Encoding"] = "gzip"
            events = _gzip(events, stream.compress)
        super().__init__(events, headers=headers)
        self._stream = stream
        self._view = view

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream.watching(self._view, scope):
            await super().__call__(scope, receive, send)


async def _gzip(
    events: AsyncIterator[bytes], compress: Callable[[bytes], bytes]
) -> AsyncIterator[bytes]:
    """Compress a stream as RFC 1952 says: header, blocks, an empty last one, checksum and size."""
    checksum, size = 0, 0
    yield b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    async for event in events:
        checksum, size = zlib.crc32(event, checksum), size + len(event)
        yield compress(event) if event else event
    yield b"\x03\x00" + checksum.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")


def _runs_of(job: view_models.Job) -> object:
    """Return a value that changes whenever a job's runs do."""
    last = job["lastRun"]
    ended = None if last is None else (last["endedAt"], last["outcome"])
    return job["fence"], job["state"], job["dueAt"], ended
