"""The stream: only changed fragments, and one statement a tick for all viewers."""

import asyncio
import re
import signal
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from time import monotonic
from typing import Any, Final

import httpx
import psutil
import pytest
from pydantic_core import from_json

from balance_app.web.stream import UNWATCHED_SECONDS
from tests.jobs.rows import add_instance, add_job, running
from tests.processes import Instance, flush_counters
from tests.web.site import SECOND, Site, add_example, add_run, text

FIRST_LOAD_BYTES: Final = 25_000
UPDATE_BYTES: Final = 5_000


class Watch:
    """One viewer: its events, and the bytes on the wire."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.compressed = answer.headers.get("content-encoding") == "gzip"
        self._decompress = zlib.decompressobj(31)
        self._chunks = answer.aiter_raw()
        self._text = ""
        self.bytes = 0
        self.last_id = ""

    async def chunk(self) -> bool:
        """Read the next chunk; return False at the end."""
        async for chunk in self._chunks:
            self.bytes += len(chunk)
            self._text += (
                self._decompress.decompress(chunk) if self.compressed else chunk
            ).decode()
            return True
        return False

    @property
    def whole(self) -> bool:
        """Whether the compressed stream is complete, and its checksum is right."""
        return self._decompress.eof

    async def event(self) -> dict[str, Any]:
        """Return the next event with data."""
        async with asyncio.timeout(20):
            while True:
                while "\n\n" not in self._text:
                    assert await self.chunk()
                event, _, self._text = self._text.partition("\n\n")
                fields = dict(line.split(": ", 1) for line in event.splitlines())
                if "data" in fields:
                    self.last_id = fields.get("id", "")
                    return {"kind": fields["event"], **from_json(fields["data"])}

    async def until(self, id_: str) -> str:
        """Return the element with this id once it is sent."""
        while True:
            html = (await self.event())["html"]
            if id_ in html:
                return str(html[id_])


def client_at(address: str) -> httpx.AsyncClient:
    """Return a client that connects from an address of this machine."""
    transport = httpx.AsyncHTTPTransport(local_address=address, verify=False)
    return httpx.AsyncClient(timeout=20, transport=transport)


@asynccontextmanager
async def watch(
    url: str,
    query: str = "",
    *,
    compressed: bool = True,
    last_id: str = "",
    address: str = "127.0.0.1",
) -> AsyncIterator[Watch]:
    headers = {"Accept-Encoding": "gzip" if compressed else "identity"}
    if last_id:
        headers["Last-Event-ID"] = last_id
    async with (
        client_at(address) as client,
        client.stream("GET", f"{url}/live{query}", headers=headers) as answer,
    ):
        assert answer.status_code == 200
        yield Watch(answer)


def version(html: str) -> str:
    found = re.search(r'data-stream="/live\?[^"]*since=([^"]+)"', html)
    assert found is not None
    return found[1]


def whole(html: str) -> set[str]:
    """Return the ids of the fragments that are not marked as unchanged."""
    fragments = re.findall(r'<(?:li|tr|div) id="([^"]+)"([^>]*)>', html)
    return {id_ for id_, more in fragments if "data-same" not in more}


async def test_a_current_page_is_sent_no_fragment(site: Site) -> None:
    """A viewer with the version of a page gets only later changes, and the time."""
    await add_job(site.connection, "job-a")
    since = version(await site.page())
    async with watch(site.instance.url, f"?since={since}") as viewer:
        first = await viewer.event()
        assert first["html"] == {}
        assert abs(first["now"] - await site.value("SELECT extract(epoch FROM now())::float8")) < 5
        assert viewer.last_id == since


async def test_only_what_has_changed_is_sent(site: Site) -> None:
    """One row of two, and the counts that include it; the rest is marked as unchanged."""
    await add_job(site.connection, "job-a")
    await add_job(site.connection, "job-b")
    async with watch(site.instance.url, f"?since={version(await site.page())}") as viewer:
        await viewer.event()
        await site.connection.execute(
            "UPDATE jobs SET paused_at = now(), paused_by = 'ada' WHERE name = 'job-a'"
        )
        html: dict[str, str] = {}
        while "jobs-list" not in html:
            html = (await viewer.event())["html"]
        assert whole(html["jobs-list"]) == {"job-job-a"}
        assert '<tr id="job-job-b" data-same></tr>' in html["jobs-list"]
        chips = {re.sub(r"-[0-9a-f]+$", "", id_) for id_ in whole(html["chips"])}
        assert chips == {"chip-waiting", "chip-paused"}
        assert "lanes" not in html
        assert "beats" not in html


async def test_the_first_viewer_gets_the_current_runs(site: Site) -> None:
    """The first event is current, also if the instance had no viewers for a while."""
    await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a")
    since = version(await site.page())
    await asyncio.sleep(UNWATCHED_SECONDS + 0.5)
    await add_run(site.connection, "job-a", "failed", result="just now")
    async with watch(site.instance.url, f"?since={since}") as viewer:
        assert "just now" in str((await viewer.event())["html"])


async def test_a_viewer_with_another_boots_version_gets_everything(site: Site) -> None:
    """So does one without a version; one that reconnects with an event's id does not."""
    await add_example(site.connection)
    await site.page()
    for query in ("", "?since=00000000.3", "?since=nonsense", "?since=."):
        async with watch(site.instance.url, query) as viewer:
            html = (await viewer.event())["html"]
            assert set(html) == {
                *("verdict", "lanes", "beats", "resumed", "changes", "totals"),
                *("chips", "jobs-list"),
            }
            assert "data-same" not in "".join(html.values())
    async with watch(site.instance.url, last_id=viewer.last_id) as viewer:
        assert "jobs-list" not in (await viewer.event())["html"]


async def test_ticking_clocks_are_not_sent(site: Site) -> None:
    """A longer duration of a run changes no fragment; its progress does."""
    instance = await add_instance(site.connection)
    await add_job(site.connection, "job-a", done=1, total=4, **running(instance, "app1"))
    await site.page()
    async with watch(site.instance.url, f"?since={version(await site.page())}") as viewer:
        for _ in range(4):
            assert not {"jobs-list", "lanes"} & set((await viewer.event())["html"])
        await site.connection.execute("UPDATE jobs SET done = 2")
        assert 'value="50.0"' in await viewer.until("jobs-list")


async def test_a_jobs_own_page_is_sent_its_row_alone(site: Site) -> None:
    """Also for a job that is not shown on the main page."""
    await site.connection.execute(
        """INSERT INTO jobs (name, schedule, description, due_at, ready_at)
        SELECT format('job-%s', 1000 + n), 'every 300 s', '', now() + interval '1 day',
               now() + interval '1 day' FROM generate_series(1, 60) AS n"""
    )
    html = await site.page("/jobs/job-1060")
    assert "? no code" in text(html, "job-job-1060")
    async with watch(site.instance.url, f"?job=job-1060&since={version(html)}") as viewer:
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'ada'")
        row = await viewer.until("job-job-1060")
        assert "Paused by ada" in row
        everything = await watch_once(site.instance.url)
        assert "job-job-1060" not in everything["jobs-list"]


async def watch_once(url: str) -> dict[str, str]:
    async with watch(url) as viewer:
        html: dict[str, str] = (await viewer.event())["html"]
        return html


async def test_the_page_and_its_updates_are_small(site: Site) -> None:
    """The first load with all its files, and each update, in bytes on the wire."""
    instances = [await add_instance(site.connection, f"app{number}") for number in range(1, 6)]
    for number in range(10):
        more: dict[str, object] = {"due_at": 100 * SECOND}
        if number % 2:
            server = f"app{number // 2 + 1}"
            more = {
                "done": 1,
                "total": 500,
                "note": "user 1",
                **running(instances[number // 2], server),
            }
        name = f"some-job-{number}"
        await add_job(site.connection, name, **more)
        for run in range(20):
            await add_run(
                site.connection,
                name,
                "failed" if run % 7 == number else "succeeded",
                began_ago=60 + 300 * (20 - run),
                seconds=120 + run,
                result="checked 12 000 entries of 1 000 users: all balances match",
            )
    html = await site.client.get("/")
    total = int(html.headers["content-length"])
    for address in re.findall(r'(?:src|href)="(/static/[^"]+)"', html.text):
        total += int((await site.client.get(address)).headers["content-length"])
    updates = []
    async with watch(site.instance.url, f"?since={version(html.text)}") as viewer:
        await viewer.event()
        for step in range(5):
            before = viewer.bytes
            await site.connection.execute("UPDATE jobs SET done = done + $1", step + 1)
            await site.connection.execute("UPDATE instances SET last_heartbeat_at = now()")
            await viewer.until("jobs-list")
            updates.append(viewer.bytes - before)
    everything = 0
    async with watch(site.instance.url) as viewer:
        await viewer.event()
        everything = viewer.bytes
    print(f"first load {total} bytes, updates {updates}, everything anew {everything}")
    assert total <= FIRST_LOAD_BYTES
    assert max(updates) <= UPDATE_BYTES


STATEMENTS: Final = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


async def test_one_address_does_not_take_all_streams(site: Site) -> None:
    """It has 20, of the page and of the API together; others get theirs."""
    url, one, other = site.instance.url, "127.0.0.100", "127.0.0.101"
    api = f"{url}/api/cron/events"
    async with client_at(one) as client:
        async with AsyncExitStack() as stack:
            for _ in range(10):
                await stack.enter_async_context(watch(url, address=one))
                await stack.enter_async_context(client.stream("GET", api))
            for each in (f"{url}/live", api):
                refused = await client.get(each)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["code"] == "too-many-requests"
            await stack.enter_async_context(watch(url, address=other))
            assert (await client.get(f"{url}/api/users/1")).status_code == 200
        async with asyncio.timeout(10):
            free = False
            while not free:
                async with client.stream("GET", api) as answer:
                    free = answer.status_code == 200


@pytest.mark.parametrize("viewers", [100])
async def test_a_hundred_viewers_cost_one_statement_a_second(site: Site, viewers: int) -> None:
    """The instance sends one statement a tick for any number of viewers."""
    await add_example(site.connection)
    await site.page()
    process = psutil.Process(site.instance.pid)
    async with AsyncExitStack() as stack:
        watching = [
            await stack.enter_async_context(
                watch(site.instance.url, address=f"127.0.0.{2 + number // 20}")
            )
            for number in range(viewers)
        ]
        await asyncio.gather(*(viewer.event() for viewer in watching))
        readers = [asyncio.create_task(_read(viewer)) for viewer in watching]
        began, used = monotonic(), sum(process.cpu_times()[:2])
        counts, moments = [], []
        for pause in (1.5, 4.0, 4.0):
            await asyncio.sleep(pause)
            # A connection reports its statistics a second later, or when it is idle.
            await flush_counters(site.connection)
            counts.append(await site.value(STATEMENTS))
            moments.append(monotonic())
        seconds, used = monotonic() - began, sum(process.cpu_times()[:2]) - used
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    # Statements of before that are reported late are counted in one interval only.
    rate, part = min(
        ((after - before) / (end - begin), end - begin)
        for (before, after), (begin, end) in zip(pairwise(counts), pairwise(moments), strict=True)
    )
    print(f"{viewers} viewers: {rate:.2f} statements a second, {used / seconds:.1%} of a core")
    # Another one reads whether a key has changed; the test's own are counted, too.
    assert rate <= 2.0 + 4 / part


async def _read(viewer: Watch) -> None:
    while await viewer.chunk():
        pass


async def test_streams_end_when_the_instance_stops(database: dict[str, str]) -> None:
    """Twenty of them, each complete, and the instance with them, within 3 seconds."""
    async with Instance(database, JOBS_ENABLED="false") as instance, AsyncExitStack() as stack:
        watching = [await stack.enter_async_context(watch(instance.url)) for _ in range(20)]
        await asyncio.gather(*(viewer.event() for viewer in watching))
        asked = monotonic()
        stop = asyncio.create_task(instance.stop(signal.SIGTERM))
        await asyncio.gather(*(_read(viewer) for viewer in watching))
        assert await stop == 0
        took = monotonic() - asked
        assert all(viewer.whole for viewer in watching)
    print(f"20 streams ended, and the instance with them, within {took:.2f} s")
    assert took < 3


async def test_a_stream_need_not_be_compressed(site: Site) -> None:
    """A viewer that does not accept it gets plain events."""
    async with watch(site.instance.url, compressed=False) as viewer:
        assert "content-encoding" not in viewer.answer.headers
        assert viewer.answer.headers["content-type"].startswith("text/event-stream")
        assert (await viewer.event())["kind"] == "status"
