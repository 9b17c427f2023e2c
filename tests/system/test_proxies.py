"""Behind nginx and HAProxy, with the examples of `deploy/` as they are.

What each passes on, what it sends a second time, and what it must not.
"""

import asyncio
import json
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.access.keyring import keys_are_needed, make_key
from tests.processes import Instance, free_port, http_client
from tests.processes import running as running_instances
from tests.system import proxies
from tests.system.proxies import KINDS, PREFIX, SETTINGS, Proxy
from tests.system.rolling import Clients, Viewers
from tests.system.sizes import report_figures

CHANGE = {"userId": 1, "amount": -1}
CLIENT = "127.0.0.2"  # of this machine, and none of the trusted proxies

pytestmark = [
    pytest.mark.parametrize(
        "kind",
        [
            pytest.param(
                kind,
                marks=pytest.mark.skipif(
                    proxies.program(kind) is None, reason=f"{kind} is not installed"
                ),
            )
            for kind in KINDS
        ],
    )
]


@asynccontextmanager
async def proxied(
    kind: str, database: dict[str, str], *, log: Path | None = None, tls: bool = False
) -> AsyncIterator[tuple[Proxy, httpx.AsyncClient, list[Instance]]]:
    """Run two instances behind a proxy that has five; yield it, and a client from elsewhere."""
    instances = [
        Instance(database, name, log=log, JOBS_ENABLED="false", LOG_REQUESTS="true", **SETTINGS)
        for name in ("app1", "app2")
    ]
    ports = [*(each.port for each in instances), *(free_port() for _ in range(3))]
    elsewhere = httpx.AsyncHTTPTransport(local_address=CLIENT, verify=False)
    async with (
        running_instances(instances),
        proxies.running(kind, ports, tls=tls) as proxy,
        httpx.AsyncClient(transport=elsewhere, base_url=proxy.origin, timeout=20) as client,
    ):
        yield proxy, client, instances


async def test_the_example_serves(kind: str, database: dict[str, str], tmp_path: Path) -> None:
    """Below its prefix, with the client's address, and no more than the service takes."""
    log = tmp_path / "log"
    async with proxied(kind, database, log=log) as (proxy, client, _):
        changed = await client.post(f"{PREFIX}/api/balance", json=CHANGE)
        assert (changed.status_code, changed.json()["balance"]) == (200, 9_999)
        page = await client.get(PREFIX, follow_redirects=True)
        assert page.url.path == f"{PREFIX}/"
        assert page.status_code == 200
        assert f'href="{PREFIX}/jobs' in page.text
        for path in ("/", "/api/balance", f"{PREFIX}x", f"{PREFIX}/metrics"):
            assert (await client.get(path)).status_code == 404, path
        large = await client.post(f"{PREFIX}/api/balance", content=b" " * 16_385)
        assert large.status_code == 413
        # a form of this site, and one of another
        for origin, expected in ((proxy.origin, 200), ("http://evil.example", 403)):
            answer = await client.post(
                f"{PREFIX}/api/balance", json=CHANGE, headers={"Origin": origin}
            )
            assert answer.status_code == expected
        # what the client writes itself counts for nothing
        spoofed = {"X-Forwarded-For": "6.6.6.6, 127.0.0.1", "X-Forwarded-Host": "evil.example"}
        answer = await client.get(f"{PREFIX}/api/users/1", headers=spoofed)
        assert answer.status_code == 200
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seen = {line["client"] for line in lines if line.get("path", "").endswith("/api/users/1")}
    assert seen == {CLIENT}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_tls_ends_at_the_proxy(kind: str, database: dict[str, str]) -> None:
    """With the lines that are comments: a login is secure, and a form of the site is its own."""
    async with proxied(kind, database, tls=True) as (proxy, client, instances):
        key = await make_key(database)
        for each in instances:
            await keys_are_needed(each.url)
        for headers in ({}, {"Origin": proxy.origin}):
            answer = await client.post(f"{PREFIX}/login", data={"key": key.text}, headers=headers)
            assert answer.status_code == 303, answer.text
            assert "max-age" in answer.headers["strict-transport-security"]
            assert answer.headers["location"].startswith(PREFIX)
            [set_] = [
                each for each in answer.headers.get_list("set-cookie") if "Max-Age=43200" in each
            ]
            assert set_.startswith("__Host-ba=")
            assert "Secure" in set_


async def test_an_instance_that_is_not_ready_answers_if_none_is(kind: str) -> None:
    """Its own 503 says more than the proxy's."""

    async def unready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(unready, "127.0.0.1", 0) as server:
        ports = [server.sockets[0].getsockname()[1]] * 5
        async with proxies.running(kind, ports) as proxy, http_client() as client:
            for method in ("GET", "POST"):
                answer = await client.request(method, f"{proxy.url}/api/users")
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


async def test_streams_come_at_once_and_end_cleanly(kind: str, database: dict[str, str]) -> None:
    """Each event when it is sent; and when its instance stops, the end of a whole answer."""
    async with proxied(kind, database) as (_, client, instances):
        for path in (f"{PREFIX}/api/cron/events", f"{PREFIX}/live"):
            async with asyncio.timeout(20), client.stream("GET", path) as stream:
                assert stream.status_code == 200
                events = 0
                async for line in stream.aiter_lines():
                    events += line.startswith("event: status")
                    if events == 4:  # one each second
                        break
        async with asyncio.timeout(20), AsyncExitStack() as streams:
            opened = [
                await streams.enter_async_context(client.stream("GET", f"{PREFIX}/api/cron/events"))
                for _ in range(4)
            ]
            by = [each.headers["X-Server-Id"] for each in opened]
            assert set(by) == {"app1", "app2"}
            leaving = asyncio.create_task(instances[0].stop(signal.SIGTERM))
            for each, server in zip(opened, by, strict=True):
                if server == "app1":
                    assert b"event: status" in await each.aread()  # to its end
            assert await leaving == 0


# -- what is sent a second time ----------------------------------------------------------------


class Dying:
    """Five instances that read a request and then die, once: it may have been processed."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = head.lower().partition("content-length: ")[2].partition("\r")[0]
                await reader.readexactly(int(length or "0"))
                request = head.partition(" HTTP/")[0]
                if not request.endswith("/readyz"):
                    self.received[request] += 1
                    if self.received[request] == 1:
                        return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


REPEATED = [
    ("GET", "/api/users/1", False),
    ("POST", "/api/balance", True),
    ("POST", "/api/transfers", True),
    ("POST", "/api/holds?x=1", True),
    ("POST", "/api/users", True),
]
NOT_REPEATED = [
    ("POST", "/api/balance", False),
    ("POST", "/api/users", False),
    ("PATCH", "/api/users/1", True),
    ("POST", "/api/cron/jobs/a/run", True),  # takes no key
    ("POST", "/api/holds/1/capture", False),
    ("POST", "/change", False),
    ("POST", "/api/balance/x", True),
]


async def times_sent(
    kind: str, requests: list[tuple[str, str, bool]], changed: tuple[str, str] = ("", "")
) -> list[tuple[int, int]]:
    """Return how often each was sent to an instance, and the status of its answer.

    A connection that ends without an answer counts as 502.
    """
    dying = Dying()
    found = []
    async with AsyncExitStack() as servers:
        ports = []
        for _ in range(5):
            server = await asyncio.start_server(dying, "127.0.0.1", 0)
            await servers.enter_async_context(server)
            ports.append(server.sockets[0].getsockname()[1])
        async with proxies.running(kind, ports, changed) as proxy, http_client() as client:
            for method, path, keyed in requests:
                dying.received.clear()
                headers = {"Idempotency-Key": "k: 1"} if keyed else {}
                url = proxy.url + path
                try:
                    answer = await client.request(method, url, json={}, headers=headers)
                    status = answer.status_code
                except httpx.RemoteProtocolError:  # of HAProxy, where it reused a connection
                    status = 502
                found.append((dying.received.total(), status))
                await asyncio.sleep(1.1)  # nginx leaves out an instance that failed
    return found


async def test_what_may_be_done_twice_is_sent_again(kind: str) -> None:
    """What only reads, and what has a key: the client notices nothing."""
    assert await times_sent(kind, REPEATED) == [(2, 200)] * len(REPEATED)


async def test_what_may_have_been_done_is_not_sent_again(kind: str) -> None:
    """Not a withdrawal without a key: the client has to look."""
    assert await times_sent(kind, NOT_REPEATED) == [(1, 502)] * len(NOT_REPEATED)


async def test_without_the_exception_it_is_sent_twice(kind: str) -> None:
    """Control: as such a configuration is often written."""
    changed = {
        "nginx": (
            "proxy_next_upstream error timeout;",
            "proxy_next_upstream error timeout non_idempotent;",
        ),
        "haproxy": ("http-request disable-l7-retry unless", "# "),
    }
    assert await times_sent(kind, NOT_REPEATED[:1], changed[kind]) == [(2, 200)]


# -- an instance stops -------------------------------------------------------------------------


async def errors_of_stop(kind: str, database: dict[str, str], number: int) -> Counter[str]:
    """Stop one of two instances by a signal, under clients; return the errors that these saw."""
    async with proxied(kind, database) as (proxy, _, instances):
        async with Clients(proxy.url, connections=6) as clients, Viewers(proxy.url, 2) as viewers:
            await clients.progress(100)
            await instances[0].stop(number)
            await clients.progress(100)
        report_figures(f"{kind}: {clients.figures()}; {viewers.figures()}")
        if number == signal.SIGTERM:
            assert await clients.check() == []
        return clients.errors() + viewers.errors()


async def test_no_client_notices_a_stop(kind: str, database: dict[str, str]) -> None:
    """Neither those that change without a key, nor those that read, nor those with a stream."""
    assert await errors_of_stop(kind, database, signal.SIGTERM) == Counter()


async def test_they_notice_that_one_is_killed(kind: str, database: dict[str, str]) -> None:
    """Control: the same by SIGKILL, under which requests and streams break off."""
    assert await errors_of_stop(kind, database, signal.SIGKILL) != Counter()
