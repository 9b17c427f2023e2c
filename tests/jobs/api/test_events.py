"""The live feed costs one look a tick, however many watch, and keeps nothing for the slow."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from balance_app.errors import DatabaseUnavailable, Overloaded, Problem
from balance_app.http.services import Services
from balance_app.jobs.api import events as feed_module
from balance_app.jobs.api import router
from balance_app.jobs.api.events import Feed
from balance_app.jobs.api.status import Snapshot

TICK_SECONDS = 0.05


class Looks:
    """Stands in for a board: counts, and fails when told to."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.hangs = False

    async def look(self) -> Snapshot:
        self.count += 1
        await asyncio.sleep(3600 if self.hangs else 0)
        if self.error is not None:
            raise self.error
        moment = datetime(2026, 11, 21, tzinfo=UTC) + timedelta(seconds=self.count)
        return Snapshot(moment, b'{"look":%d}' % self.count, {}, [], {})


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What the feed looks at, with short ticks."""
    monkeypatch.setattr(feed_module, "TICK_SECONDS", TICK_SECONDS)
    return Looks()


async def follow(feed: Feed, told: list[bytes]) -> None:
    with feed.viewer():
        async for event in feed.events():
            told.append(event)  # noqa: PERF401 - it is read as it grows


def watch(feed: Feed, viewers: int) -> tuple[list[list[bytes]], list["asyncio.Task[None]"]]:
    told: list[list[bytes]] = [[] for _ in range(viewers)]
    return told, [asyncio.create_task(follow(feed, each)) for each in told]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 - what is waited for is counted, not told
            await asyncio.sleep(0.005)


async def test_a_look_serves_all_who_watch(looks: Looks) -> None:
    """A hundred viewers see the same events, each of them the fruit of one look."""
    feed = Feed(looks.look, asyncio.Event())
    told, viewers = watch(feed, 100)
    await until(lambda: looks.count >= 6)
    for viewer in viewers:
        viewer.cancel()
    await asyncio.gather(*viewers, return_exceptions=True)
    assert {len(each) for each in told} <= {looks.count, looks.count + 1}  # and `retry` first
    assert all(each[0] == b"retry: 1000\n\n" for each in told)
    assert all(len(set(each)) == len(each) for each in told)
    assert len({event for each in told for event in each[1:]}) <= looks.count


async def test_nobody_watches_nothing_is_asked(looks: Looks) -> None:
    """Looks end with the last viewer, and begin again with the next."""
    feed = Feed(looks.look, asyncio.Event())
    assert looks.count == 0
    for _ in range(2):
        told, (viewer,) = watch(feed, 1)
        await until(lambda told=told: len(told[0]) > 2)  # type: ignore[misc]
        viewer.cancel()
        await asyncio.gather(viewer, return_exceptions=True)
        await until(lambda: feed._ticker is None)
        after = looks.count
        await asyncio.sleep(4 * TICK_SECONDS)
        assert looks.count == after


async def test_a_newcomer_sees_the_newest_event_at_once(looks: Looks) -> None:
    """Who comes between two ticks does not wait for the next, and costs no look."""
    feed = Feed(looks.look, asyncio.Event())
    told, (viewer,) = watch(feed, 1)
    await until(lambda: len(told[0]) > 1)
    with feed.viewer():
        events = feed.events()
        await anext(events)
        before = looks.count
        newest = await anext(events)
        assert (newest, looks.count) == (told[0][-1], before)
    viewer.cancel()
    await asyncio.gather(viewer, return_exceptions=True)


async def test_a_slow_viewer_gets_the_newest_event(looks: Looks) -> None:
    """What came while it was not reading is not kept for it."""
    feed = Feed(looks.look, asyncio.Event())
    with feed.viewer():
        events = feed.events()
        await anext(events)
        first = await anext(events)
        await until(lambda: looks.count >= 6)
        newest = await anext(events)
        assert b'{"look":1}' in first
        assert b'{"look":%d}' % looks.count in newest


@pytest.mark.parametrize("hangs", [True, False])
async def test_all_streams_end_when_the_instance_stops(looks: Looks, *, hangs: bool) -> None:
    """Also while a look is under way that gets no answer."""
    stopping = asyncio.Event()
    feed = Feed(looks.look, stopping)
    told, viewers = watch(feed, 20)
    await until(lambda: all(len(each) > 1 for each in told))
    looks.hangs = hangs
    before = looks.count
    await until(lambda: looks.count > before)
    stopping.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*viewers)
    after = len(told[0])
    late: list[bytes] = []
    await follow(feed, late)
    assert (late, len(told[0])) == ([b"retry: 1000\n\n"], after)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DatabaseUnavailable("It is unavailable.", applied="no"), "database-unavailable"),
        (ZeroDivisionError(), "internal-error"),
    ],
)
async def test_a_failed_look_is_an_event_too(looks: Looks, error: Exception, code: str) -> None:
    """`unavailable` carries the problem; the status comes again by itself."""
    feed = Feed(looks.look, asyncio.Event())
    told, (viewer,) = watch(feed, 1)
    looks.error = error
    await until(lambda: any(event.startswith(b"event: unavailable") for event in told[0]))
    unavailable = told[0][-1]
    assert code.encode() in unavailable
    looks.error = None
    await until(lambda: told[0][-1].startswith(b"event: status"))
    viewer.cancel()
    await asyncio.gather(viewer, return_exceptions=True)


async def test_a_full_house_is_said_to_be_so(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """One viewer too many is refused with 503; when another leaves there is room again."""
    monkeypatch.setattr(feed_module, "MAX_VIEWERS", 3)
    stopping = asyncio.Event()
    feed = Feed(looks.look, stopping)
    app = FastAPI()
    app.state.services = Services(feed)
    app.include_router(router.router)
    app.add_exception_handler(Problem, _tell)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")
        )
        with ExitStack() as viewers:
            for _ in range(3):
                viewers.enter_context(feed.viewer())
            with pytest.raises(Overloaded):
                viewers.enter_context(feed.viewer())
            full = await client.get("/api/cron/events")
            assert (full.status_code, full.json()["code"]) == (503, "overloaded")
            assert full.headers["retry-after"] == "1"
        stopping.set()  # such a client reads to the end
        assert (await client.get("/api/cron/events")).status_code == 200


async def _tell(_request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.response()
