"""Broadcast of the status: one read a second for all viewers of an instance, none without viewers.

A viewer is always sent the newest event. A slow viewer misses events; none are buffered.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Final

import structlog
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from balance_app.errors import InternalError, Problem
from balance_app.http.seats import Seats
from balance_app.jobs.api.status import StatusSnapshot

log = structlog.get_logger(__name__)

TICK_SECONDS: Final = 1.0
RETRY_MILLISECONDS: Final = 1000  # how soon a disconnected viewer connects again


class EventBroadcaster:
    """Sends the newest status event to every viewer of this instance, until the instance stops."""

    def __init__(
        self,
        read_status: Callable[[], Awaitable[StatusSnapshot]],
        stopping: asyncio.Event,
        seats: Seats,
    ) -> None:
        self._read_status = read_status
        self._stopping = stopping
        self._seats = seats
        self._viewers = 0
        self._ticker: asyncio.Task[None] | None = None
        # the newest event, the number of events so far, and set when the next is published
        self._event: bytes | None = None
        self._events = 0
        self._published = asyncio.Event()

    @contextmanager
    def viewer(self, scope: Scope) -> Iterator[None]:
        """Count a viewer within the block, who sent this request.

        Raises:
            Overloaded, TooManyRequests: there are too many viewers.
        """
        with self._seats.take(scope):
            self._viewers += 1
            if self._ticker is None:
                # An empty context: it reads for all viewers.
                self._ticker = asyncio.create_task(self._tick(), context=Context())
            try:
                yield
            finally:
                self._viewers -= 1

    def wake(self) -> None:
        """Send each viewer an empty part; the request middleware ends streams without a key."""
        published, self._published = self._published, asyncio.Event()
        published.set()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield each new event, or nothing; those that were replaced meanwhile are left out."""
        yield format_sse_event(retry=RETRY_MILLISECONDS)
        seen = 0
        while not self._stopping.is_set():
            if self._event is None or self._events == seen:
                await self._published.wait()
                if self._event is not None and self._events == seen:
                    yield b""  # `wake`
            else:
                seen = self._events
                yield self._event

    async def _tick(self) -> None:
        stop = asyncio.create_task(self._stopping.wait())
        try:
            while self._viewers:
                event = asyncio.create_task(self._next_event())
                await asyncio.wait({event, stop}, return_when=asyncio.FIRST_COMPLETED)
                if stop.done():
                    event.cancel()
                    return
                self._publish(event.result())
                await asyncio.wait({stop}, timeout=TICK_SECONDS)
        finally:
            stop.cancel()
            self._ticker = None
            self._publish(None)

    def _publish(self, event: bytes | None) -> None:
        self._event = event
        self._events += event is not None
        self.wake()

    async def _next_event(self) -> bytes:
        try:
            snapshot = await self._read_status()
        except Problem as caught:
            problem = caught
        except Exception:
            log.exception("the status can't be read for the event stream")
            problem = InternalError()
        else:
            return format_sse_event(
                event="status", data_str=snapshot.text.decode(), id=snapshot.now.isoformat()
            )
        return format_sse_event(event="unavailable", data_str=to_json(problem.body("GET")).decode())


class EventStreamResponse(EventSourceResponse):
    """The response to one viewer.

    FastAPI would format each event for each viewer and buffer events for slow ones; here all are
    sent the same bytes.
    """

    def __init__(self, broadcaster: EventBroadcaster) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(broadcaster.events(), headers=headers)
        self._broadcaster = broadcaster

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._broadcaster.viewer(scope):
            await super().__call__(scope, receive, send)
