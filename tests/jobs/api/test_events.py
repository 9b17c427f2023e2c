"""The broadcaster reads once a tick for all viewers, and buffers no events for slow ones."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from datetime import UTC, datetime, timedelta
from typing import Final

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from balance_app.errors import DatabaseUnavailable, Problem
from balance_app.http.seats import Seats
from balance_app.http.services import Services
from balance_app.jobs.api import events as events_module
from balance_app.jobs.api import router
from balance_app.jobs.api.events import EventBroadcaster
from balance_app.jobs.api.status import StatusSnapshot

TICK_SECONDS = 0.05


class StubReader:
    """Stands in for a status reader: counts, and fails on demand."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.hangs = False

    async def read(self) -> StatusSnapshot:
        self.count += 1
        await asyncio.sleep(3600 if self.hangs else 0)
        if self.error is not None:
            raise self.error
        moment = datetime(2026, 11, 21, tzinfo=UTC) + timedelta(seconds=self.count)
        return StatusSnapshot(moment, b'{"read":%d}' % self.count, {}, [], {})


# A client as `httpx.ASGITransport` names it.
SCOPE: Final = {"type": "http", "client": ("127.0.0.1", 123)}


def seats(most: int = 100, per_client: int = 100) -> Seats:
    return Seats("streams", most=most, per_client=per_client)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubReader:
    """The broadcaster's reader, with short ticks."""
    monkeypatch.setattr(events_module, "TICK_SECONDS", TICK_SECONDS)
    return StubReader()


async def follow(broadcaster: EventBroadcaster, received: list[bytes]) -> None:
    with broadcaster.viewer(SCOPE):
        async for event in broadcaster.events():
            received.append(event)  # noqa: PERF401 - the test reads it meanwhile


def watch(
    broadcaster: EventBroadcaster, viewers: int
) -> tuple[list[list[bytes]], list["asyncio.Task[None]"]]:
    received: list[list[bytes]] = [[] for _ in range(viewers)]
    return received, [asyncio.create_task(follow(broadcaster, each)) for each in received]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 - counts have no event
            await asyncio.sleep(0.005)


async def test_one_read_serves_all_viewers(stub: StubReader) -> None:
    """A hundred viewers get the same events, each from one read."""
    broadcaster = EventBroadcaster(stub.read, asyncio.Event(), seats())
    received, viewers = watch(broadcaster, 100)
    await until(lambda: stub.count >= 6)
    for viewer in viewers:
        viewer.cancel()
    await asyncio.gather(*viewers, return_exceptions=True)
    assert {len(each) for each in received} <= {stub.count, stub.count + 1}  # and `retry` first
    assert all(each[0] == b"retry: 1000\n\n" for each in received)
    assert all(len(set(each)) == len(each) for each in received)
    assert len({event for each in received for event in each[1:]}) <= stub.count


async def test_nothing_is_read_without_viewers(stub: StubReader) -> None:
    """Reads end with the last viewer, and begin again with the next."""
    broadcaster = EventBroadcaster(stub.read, asyncio.Event(), seats())
    assert stub.count == 0
    for _ in range(2):
        received, (viewer,) = watch(broadcaster, 1)
        await until(lambda received=received: len(received[0]) > 2)  # type: ignore[misc]
        viewer.cancel()
        await asyncio.gather(viewer, return_exceptions=True)
        await until(lambda: broadcaster._ticker is None)
        after = stub.count
        await asyncio.sleep(4 * TICK_SECONDS)
        assert stub.count == after


async def test_a_newcomer_sees_the_newest_event_at_once(stub: StubReader) -> None:
    """A viewer that joins between two ticks gets an event without waiting or another read."""
    broadcaster = EventBroadcaster(stub.read, asyncio.Event(), seats())
    received, (viewer,) = watch(broadcaster, 1)
    await until(lambda: len(received[0]) > 1)
    with broadcaster.viewer(SCOPE):
        events = broadcaster.events()
        await anext(events)
        before = stub.count
        newest = await anext(events)
        assert (newest, stub.count) == (received[0][-1], before)
    viewer.cancel()
    await asyncio.gather(viewer, return_exceptions=True)


async def test_a_slow_viewer_gets_the_newest_event(stub: StubReader) -> None:
    """Events that were sent while it was not reading are dropped."""
    broadcaster = EventBroadcaster(stub.read, asyncio.Event(), seats())
    with broadcaster.viewer(SCOPE):
        events = broadcaster.events()
        await anext(events)
        first = await anext(events)
        await until(lambda: stub.count >= 6)
        newest = await anext(events)
        assert b'{"read":1}' in first
        assert b'{"read":%d}' % stub.count in newest


@pytest.mark.parametrize("hangs", [True, False])
async def test_all_streams_end_when_the_instance_stops(stub: StubReader, *, hangs: bool) -> None:
    """Also while a read hangs."""
    stopping = asyncio.Event()
    broadcaster = EventBroadcaster(stub.read, stopping, seats())
    received, viewers = watch(broadcaster, 20)
    await until(lambda: all(len(each) > 1 for each in received))
    stub.hangs = hangs
    before = stub.count
    await until(lambda: stub.count > before)
    stopping.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*viewers)
    after = len(received[0])
    late: list[bytes] = []
    await follow(broadcaster, late)
    assert (late, len(received[0])) == ([b"retry: 1000\n\n"], after)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DatabaseUnavailable("It is unavailable.", applied="no"), "database-unavailable"),
        (ZeroDivisionError(), "internal-error"),
    ],
)
async def test_a_failed_read_is_an_event_too(stub: StubReader, error: Exception, code: str) -> None:
    """`unavailable` carries the problem; the status is sent again after recovery."""
    broadcaster = EventBroadcaster(stub.read, asyncio.Event(), seats())
    received, (viewer,) = watch(broadcaster, 1)
    stub.error = error
    await until(lambda: any(event.startswith(b"event: unavailable") for event in received[0]))
    unavailable = received[0][-1]
    assert code.encode() in unavailable
    stub.error = None
    await until(lambda: received[0][-1].startswith(b"event: status"))
    viewer.cancel()
    await asyncio.gather(viewer, return_exceptions=True)


@pytest.mark.parametrize(
    ("most", "code", "status"), [(2, "overloaded", 503), (9, "too-many-requests", 429)]
)
async def test_one_viewer_too_many_is_refused(
    stub: StubReader, most: int, code: str, status: int
) -> None:
    """With 503 when all seats are taken, with 429 when a client has its share; until one leaves."""
    stopping = asyncio.Event()
    broadcaster = EventBroadcaster(
        stub.read, stopping, seats(most, per_client=2 if status == 429 else 9)
    )
    app = FastAPI()
    app.state.services = Services(broadcaster)
    app.include_router(router.router)
    app.add_exception_handler(Problem, _respond)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
        )
        with ExitStack() as viewers:
            for _ in range(2):
                viewers.enter_context(broadcaster.viewer(SCOPE))
            with pytest.raises(Problem, match="already"):
                viewers.enter_context(broadcaster.viewer(SCOPE))
            full = await client.get("/api/cron/events")
            assert (full.status_code, full.json()["code"]) == (status, code)
            assert full.headers["retry-after"] == "1"
        stopping.set()  # this client reads to the end of the stream
        assert (await client.get("/api/cron/events")).status_code == 200


async def _respond(_request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.response()
