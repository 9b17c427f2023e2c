"""Connections: an early end of one never answers for a request that is under way.

The real protocol on real sockets, in front of an application that answers when the test lets it.
"""

import asyncio
import gc
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from types import ModuleType
from typing import Any, ClassVar, Final
from weakref import WeakSet

import pytest
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs
from typing_extensions import override
from uvicorn.server import ServerState

from balance_app.errors import RequestTimeout
from balance_app.http import endings, protocol
from balance_app.http.endings import Ending, Endings
from balance_app.http.protocol import LimitedProtocol
from tests.balances.hostile import chunked, raw_request

SOON: Final = 0.2  # seconds that a head has in these tests
LATER: Final = 0.3
GATHER: Final = 0.15  # seconds in which the connections that end together are counted
BODY: Final = b'{"userId":1,"amount":-2}'
LARGE: Final = 16 * 1024 * 1024  # more than the kernel buffers
LENGTH: Final = f"Content-Length: {len(BODY)}"


@pytest.fixture(autouse=True)
def hasty_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log soon what has ended."""
    monkeypatch.setattr(endings, "GATHER_SECONDS", GATHER)


Scenario = Callable[..., Coroutine[Any, Any, None]]


def on(*loops: ModuleType) -> Callable[[Scenario], Callable[..., None]]:
    """Run a test on an event loop of each of these kinds, not on that of the fixtures."""

    def decorate(scenario: Scenario) -> Callable[..., None]:
        def test(loop: ModuleType, **arguments: object) -> None:
            loop.run(scenario(**arguments))

        update_wrapper(test, scenario)
        own = signature(scenario).parameters.values()
        first = Parameter("loop", Parameter.POSITIONAL_OR_KEYWORD)
        vars(test)["__signature__"] = Signature([first, *own])
        return pytest.mark.parametrize("loop", loops, ids=lambda loop: loop.__name__)(test)

    return decorate


on_its_loop = on(uvloop)  # the service's
on_both_loops = on(asyncio, uvloop)


class Application:
    """Reads a body (not at `/blind`), waits for the test, answers with what it read."""

    def __init__(self) -> None:
        self.leave = asyncio.Event()
        self.leave.set()
        self.read: list[bytes] = []  # each request whose body was complete
        self.scopes: list[Scope] = []
        self.left = asyncio.Event()  # a client has disconnected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        body, more, whole = b"", scope["path"] not in {"/blind", "/stream"}, True
        while more:
            try:
                message = await receive()
            except RequestTimeout as late:
                await late.response()(scope, receive, send)
                return
            body += message.get("body", b"")
            whole = message["type"] == "http.request"
            more = message.get("more_body", False)
        if whole:
            self.read.append(body)
        await self.leave.wait()
        status = 200 if whole else 400
        if scope["path"] == "/large":
            body = bytes(LARGE)
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
            return
        if scope["path"] == "/events":
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            await send({"type": "http.response.start", "status": 200, "headers": [kind]})
            event = b"data: " + bytes(1000) + b"\n\n"
            while not self.left.is_set():
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0.005)
            return
        headers = [(b"content-length", b"%d" % len(body))]
        if scope["path"] == "/split":
            headers.append((b"location", b"/" + body))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def send(self, *parts: bytes) -> None:
        """Send each part as a packet of its own."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0.01)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return the next answer."""
        async with asyncio.timeout(5):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return int(first.split()[1]), headers, body

    async def rest(self) -> bytes:
        """Return all that comes until the connection closes."""
        async with asyncio.timeout(5):
            return await self._reader.read()

    async def is_quiet(self) -> bool:
        """Return whether neither data nor an end arrives within a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LATER):
                await self._reader.read(1)
            return False
        return True


class Server:
    """A listening server: its application, its connections."""

    def __init__(self, kind: type[LimitedProtocol], port: int, state: ServerState) -> None:
        self.kind = kind
        self.port = port
        self.state = state

    def stop(self) -> None:
        """End all connections, as uvicorn does."""
        self.kind.ends_connections = True
        for connection in list(self.state.connections):
            connection.shutdown()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Connect."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    *, keep_alive: float = 60, patience: float = 60, kind: type[LimitedProtocol] = LimitedProtocol
) -> AsyncIterator[tuple[Application, Server]]:
    """Serve an application with a short time limit for heads."""

    class Hasty(kind):  # type: ignore[misc, valid-type]
        endings = Endings()
        head_seconds = last_head_seconds = body_seconds = SOON
        linger_seconds = 1.0
        write_seconds = stream_seconds = patience

    application, state = Application(), ServerState()
    config = uvicorn.Config(application, ws="none", log_config=None)
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        lambda: Hasty(config=config, server_state=state, app_state={}, _loop=loop), "127.0.0.1", 0
    )
    try:
        yield application, Server(Hasty, listener.sockets[0].getsockname()[1], state)
    finally:
        listener.close()
        application.leave.set()
        for task in list(state.tasks):
            task.cancel()


def post(*headers: str, path: str = "/", body: bytes = b"") -> bytes:
    return raw_request("POST", path, "Host: a", *headers, body=body)


WHOLE: Final = post(LENGTH, body=BODY)
GET: Final = raw_request("GET", "/", "Host: a")


async def slow_answer(packets: list[bytes], kind: type[LimitedProtocol] = LimitedProtocol) -> None:
    """An answer may take longer than the limit of a head; the connection stays open after it."""
    async with serving(kind=kind) as (application, server), server.client() as client:
        application.leave.clear()
        await client.send(*packets)
        assert await client.is_quiet()
        application.leave.set()
        status, headers, body = await client.answer()
        assert (status, "connection" in headers) == (200, False)
        assert body.strip() == BODY
        await client.send(GET)
        assert (await client.answer())[0] == 200


IN_PACKETS: Final = {
    "at once": [WHOLE],
    "body in another packet": [post(LENGTH), BODY],
    "body in two": [post(LENGTH), BODY[:5], BODY[5:]],
    "head in two": [WHOLE[:20], WHOLE[20:]],
    "in chunks": [post("Transfer-Encoding: chunked"), chunked(BODY, 5)],
    "end of chunks in another": [
        post("Transfer-Encoding: chunked", body=chunked(BODY)[:-5]),
        b"0\r\n\r\n",
    ],
    "with a trailer": [
        post("Transfer-Encoding: chunked", body=chunked(BODY)[:-2]),
        b"X-Sum: 1\r\n\r\n",
    ],
    "with an extension": [
        post("Transfer-Encoding: chunked"),
        b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
    ],
    "an empty line behind it": [WHOLE, b"\r\n"],
}


@pytest.mark.parametrize("packets", IN_PACKETS.values(), ids=IN_PACKETS)
@on_its_loop
async def test_a_request_under_way_is_not_timed_out(packets: list[bytes]) -> None:
    """However its bytes arrive: no 408 for a change that is made."""
    await slow_answer(packets)


@on_its_loop
async def test_a_large_last_piece_is_no_head() -> None:
    """A body's last packet may exceed the limit of a head: no 431 for a change that is made."""
    size = 3 * protocol.MAX_HEAD_BYTES
    async with serving() as (_, server), server.client() as client:
        await client.send(post(f"Content-Length: {size}"), b" " * (size - 100_000))
        await client.send(b" " * 100_000)
        status, _, body = await client.answer()
        assert (status, len(body)) == (200, size)
        await client.send(GET)
        assert (await client.answer())[0] == 200


class AnyByteStartsAHead(LimitedProtocol):
    """Mutant, as in an earlier version: any byte after a head begins the next one."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._on_deadline is None and not self.cycle.more_body:
            self._set_deadline(self.head_seconds, self._speak)

    def _speak(self) -> None:
        self._running = None
        self._head_timed_out()


@on_its_loop
async def test_without_the_rule_a_request_under_way_is_timed_out() -> None:
    """Control: with the mutant the same scenario fails."""
    with pytest.raises(AssertionError):
        await slow_answer([post(LENGTH), BODY], kind=AnyByteStartsAHead)


@on_its_loop
@pytest.mark.parametrize("begun", [b"POST /abc", GET[:-2], b"GET / HTTP/1.1\r\nX: " + b"x" * 999])
@pytest.mark.parametrize("before", [[], [WHOLE], [post(LENGTH), BODY]], ids=["", "one", "split"])
async def test_an_unfinished_head_is_timed_out(before: list[bytes], begun: bytes) -> None:
    """408 with `Connection: close`, first on a connection or after an answer, even if it drips."""
    async with serving() as (_, server), server.client() as client:
        if before:
            await client.send(*before)
            assert (await client.answer())[0] == 200
        await client.send(begun)
        await client.send(*[b"x"] * 3)
        status, headers, body = await client.answer()
        assert (status, headers["connection"]) == (408, "close")
        assert b'"request-timeout"' in body
        assert await client.rest() == b""


@on_both_loops
@pytest.mark.parametrize("packets", [[WHOLE + GET[:20]], [WHOLE, GET[:20]]], ids=["one", "two"])
async def test_a_head_behind_a_request_waits_for_its_answer(packets: list[bytes]) -> None:
    """Its time limit begins when no request is under way; in time, it is a normal request."""
    async with serving() as (application, server), server.client() as client:
        application.leave.clear()
        await client.send(*packets)
        assert await client.is_quiet()
        application.leave.set()
        assert (await client.answer())[2] == BODY
        await client.send(GET[20:])
        assert (await client.answer())[0] == 200
        application.leave.clear()
        await client.send(*packets)
        assert await client.is_quiet()
        application.leave.set()
        assert (await client.answer())[2] == BODY
        assert (await client.answer())[0] == 408


@on_both_loops
async def test_a_late_body_is_timed_out_after_the_request_before_it() -> None:
    """Its time limit begins with its head, or when the request before it is answered."""
    async with serving() as (application, server), server.client() as client:
        await client.send(post(LENGTH), BODY[:5])
        assert (await client.answer())[0] == 408
        assert await client.rest() == b""
        application.leave.clear()
        async with server.client() as behind:
            await behind.send(WHOLE + post(LENGTH), BODY[:5])
            assert await behind.is_quiet()
            application.leave.set()
            assert (await behind.answer())[2] == BODY
            await behind.send(BODY[5:])
            assert (await behind.answer())[2] == BODY
            await behind.send(WHOLE + post(LENGTH), BODY[:5])
            assert (await behind.answer())[2] == BODY
            assert (await behind.answer())[0] == 408
            assert await behind.rest() == b""


@on_its_loop
@pytest.mark.parametrize(
    "packets", [[WHOLE], [post(LENGTH), BODY], [post(LENGTH) + BODY[:5], BODY[5:]]]
)
async def test_an_answer_may_take_longer_than_a_body(packets: list[bytes]) -> None:
    """A body that arrives in time clears its deadline."""
    async with serving() as (application, server), server.client() as client:
        application.leave.clear()
        await client.send(*packets)
        assert await client.is_quiet()
        application.leave.set()
        assert (await client.answer())[2] == BODY


@on_its_loop
async def test_an_unread_late_body_ends_no_answer() -> None:
    """An answer that has begun goes on; an application that does not read it causes no 408."""
    async with serving() as (application, server):
        async with server.client() as client:
            await client.send(post(LENGTH, path="/stream"))
            await client._reader.readuntil(b"\r\n\r\n")
            assert await client.is_quiet()
            assert not application.left.is_set()
        async with server.client() as client:
            application.leave.clear()
            await client.send(post(LENGTH, path="/blind"))
            assert await client.is_quiet()
            application.leave.set()
            assert (await client.answer())[0] == 200


@on_its_loop
async def test_a_head_too_large_is_refused_after_the_requests_before_it() -> None:
    """431 when no request is under way; otherwise its answer, then the connection closes."""
    line = b"X-Long: " + b"x" * 20_000 + b"\r\n"
    async with serving() as (application, server):
        async with server.client() as client:
            await client.send(GET[:-2], *[line] * 5)
            assert (await client.answer())[0] == 431
            assert await client.rest() == b""
        application.leave.clear()
        async with server.client() as client:
            await client.send(WHOLE + GET[:-2], *[line] * 5)
            application.leave.set()
            status, headers, body = await client.answer()
            assert (status, headers["connection"], body) == (200, "close", BODY)
            assert await client.rest() == b""


@on_its_loop
@pytest.mark.parametrize(
    "pieces",
    [
        [b"X-Long: " + b"x" * 62_000 + b"\r\n"] * 2,
        [b"A: 1\r\n" * 9_000, b"A: 1\r\n" * 9_000],
        [b"A:\r\n" * 45_000],
    ],
    ids=["long ones", "many", "at once"],
)
async def test_a_large_head_that_is_whole_is_refused(pieces: list[bytes]) -> None:
    """However it arrives: what counts is what the headers have together."""
    async with serving() as (_, server), server.client() as client:
        await client.send(GET[:-2], *pieces[:-1], pieces[-1] + b"\r\n")
        assert (await client.answer())[0] == 431
        assert await client.rest() == b""


@on_its_loop
@pytest.mark.parametrize(
    "garbage",
    [b"}", b"\0\0", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"],
    ids=["brace", "NUL", "version", "no host"],
)
@pytest.mark.parametrize("together", [True, False])
async def test_garbage_behind_a_request_does_not_deny_it(garbage: bytes, *, together: bool) -> None:
    """The request gets its answer with `Connection: close`; then the connection closes."""
    async with serving() as (application, server), server.client() as client:
        application.leave.clear()
        await client.send(*([WHOLE + garbage] if together else [WHOLE, garbage]))
        await asyncio.sleep(0.05)
        application.leave.set()
        status, headers, body = await client.answer()
        assert (status, headers["connection"], body) == (200, "close", BODY)
        assert await client.rest() == b""


@on_its_loop
@pytest.mark.parametrize("path", ["/", "/blind"])
async def test_a_body_framed_wrongly_is_answered_by_the_application(path: str) -> None:
    """It gets a 400 if it waits for the body, and gives its own answer if it does not."""
    async with serving() as (application, server), server.client() as client:
        if path == "/blind":
            application.leave.clear()
        await client.send(post("Transfer-Encoding: chunked", path=path), b"poison\r\n")
        application.leave.set()
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (400 if path == "/" else 200, "close")
        assert await client.rest() == b""
        assert application.read == ([] if path == "/" else [b""])


@on_its_loop
@pytest.mark.parametrize("packets", [1, 2])
async def test_a_trailer_is_not_a_header(packets: int) -> None:
    """And a trailer without end does not fill the memory."""
    sent = post("Transfer-Encoding: chunked", body=chunked(BODY)[:-2])
    trailer = b"Idempotency-Key: poison\r\nHost: poison\r\n\r\n"
    async with serving() as (application, server), server.client() as client:
        await client.send(*([sent + trailer] if packets == 1 else [sent, trailer]))
        assert (await client.answer())[2] == BODY
        assert [name for name, _ in application.scopes[0]["headers"]] == [
            *(b"host", b"transfer-encoding")
        ]
        await client.send(sent)
        with suppress(ConnectionError):
            await client.send(*[b"X-Sum: " + b"1" * 200_000] * 8)
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (400, "close")


@on_its_loop
async def test_an_idle_connection_is_closed_a_used_one_is_not() -> None:
    """Its time limit runs when no request is under way: from the start, and from each answer."""
    async with serving(keep_alive=SOON) as (application, server):
        async with server.client() as client:
            assert await client.rest() == b""
        async with server.client() as client:
            await client.send(b"\r\n", WHOLE)
            assert (await client.answer())[0] == 200
            application.leave.clear()
            await client.send(post(LENGTH), BODY + WHOLE)
            assert await client.is_quiet()
            application.leave.set()
            for _ in range(2):
                assert (await client.answer())[2] == BODY
            assert await client.rest() == b""


# -- a client that has sent its last byte -------------------------------------------------------


@on_its_loop
@pytest.mark.parametrize("packets", IN_PACKETS.values(), ids=IN_PACKETS)
async def test_a_half_closed_client_gets_its_answer(packets: list[bytes]) -> None:
    """Also a slow one; then the connection is closed."""
    async with serving() as (application, server), server.client() as client:
        application.leave.clear()
        await client.send(*packets)
        client.writer.write_eof()
        await asyncio.sleep(0.05)
        application.leave.set()
        status, headers, body = await client.answer()
        assert (status, headers["connection"], body) == (200, "close", BODY)
        assert await client.rest() == b""
        await asyncio.sleep(0.05)
        assert not server.state.connections


@on_both_loops
async def test_a_half_closed_client_gets_every_answer() -> None:
    """To all pipelined requests; half a request after them is dropped."""
    async with serving() as (application, server), server.client() as client:
        application.leave.clear()
        await client.send(WHOLE * 3 + GET[:9])
        client.writer.write_eof()
        await asyncio.sleep(0.05)
        application.leave.set()
        for _ in range(3):
            assert (await client.answer())[2] == BODY
        assert await client.rest() == b""


@on_both_loops
@pytest.mark.parametrize("sent", [b"", GET[:9], post(LENGTH), post(LENGTH, body=BODY[:-1])])
async def test_half_a_request_is_not_waited_for(sent: bytes) -> None:
    """A client that ends in the middle of a request is not answered as if it were complete."""
    async with serving() as (application, server), server.client() as client:
        await client.send(sent)
        client.writer.write_eof()
        assert b" 200 " not in await client.rest()
        assert application.read == []
        await asyncio.sleep(0.05)
        assert not server.state.connections


class Recorder:
    """A transport that records what is written, write by write."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Record, and send."""
        self.written.append(data)
        self._transport.write(data)


@on_both_loops
@pytest.mark.parametrize(
    ("request_", "body"),
    [
        (GET, b""),
        (WHOLE, BODY),
        (raw_request("HEAD", "/", "Host: a"), b""),
        (raw_request("HEAD", "/", "Host: a", "Connection: close"), b""),
        (raw_request("GET", "/stream", "Host: a"), b""),
    ],
    ids=["empty", "body", "head", "last head", "stream"],
)
async def test_an_answer_is_sent_by_one_write(request_: bytes, body: bytes) -> None:
    """Its head goes with the first part of its body, even an empty one."""
    recorders: list[Recorder] = []

    class Recorded(LimitedProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            recorders.append(Recorder(transport))
            super().connection_made(recorders[-1])  # type: ignore[arg-type]

    async with serving(kind=Recorded) as (_, server), server.client() as client:
        await client.send(request_)
        status, *_ = await client.answer()
        assert status == 200
        (recorder,) = recorders
        (written,) = recorder.written
        assert written.partition(b"\r\n\r\n")[2] == body


@pytest.mark.parametrize("value", [b"\r\nset-cookie: a=b", b"\nset-cookie: a=b", b"\0", b"\x7f"])
@on_its_loop
async def test_a_header_ends_its_line_itself(value: bytes) -> None:
    """What an answer repeats in a header can't begin another one."""
    async with serving() as (_, server), server.client() as client:
        length = f"Content-Length: {len(value)}"
        await client.send(post(length, path="/split", body=value))
        assert await client.rest() == b""
    async with serving() as (_, server), server.client() as client:
        await client.send(post("Content-Length: 2", path="/split", body=b"\ta"))
        assert (await client.answer())[1]["location"] == "/\ta"


class Held(LimitedProtocol):
    """A control: its requests still name it when it is closed."""

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.cycle.on_events = self._watch_events  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "left"), [(LimitedProtocol, 0), (Held, 5)])
@on_its_loop
async def test_a_closed_connection_needs_no_collector(
    kind: type[LimitedProtocol], left: int
) -> None:
    """Its memory is free at once: a burst leaves ten thousand of them."""
    async with serving(kind=kind) as (_, server):
        gc.collect()
        gc.disable()
        try:
            closed: WeakSet[object] = WeakSet()
            for _ in range(5):
                async with server.client() as client:
                    await client.send(WHOLE, GET)
                    await client.answer()
                    await client.answer()
                    closed.update(server.state.connections)
            async with asyncio.timeout(5):
                while server.state.connections:  # noqa: ASYNC110 - uvicorn's
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            assert len(closed) == left
        finally:
            gc.enable()


@on_both_loops
async def test_a_disconnect_is_reported_to_the_application() -> None:
    """Also if another request waits behind the one under way."""
    for behind in (b"", GET):
        async with serving() as (application, server):
            async with server.client() as client:
                await client.send(raw_request("GET", "/stream", "Host: a") + behind)
                reset = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                client.writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, reset
                )
            async with asyncio.timeout(5):
                await application.left.wait()


@on_its_loop
async def test_an_answer_to_nobody_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """The client has gone before its answer began, as an impatient probe: that is no error."""
    async with serving() as (application, server):
        application.leave.clear()
        async with server.client() as client:
            await client.send(GET)
            reset = struct.pack("ii", 1, 0)
            connection = client.writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        async with asyncio.timeout(5):
            while server.state.connections:  # noqa: ASYNC110 - of the server
                await asyncio.sleep(0.01)
            application.leave.set()
            while server.state.tasks:  # noqa: ASYNC110 - of the server
                await asyncio.sleep(0.01)
    assert application.read == [b""]
    assert caplog.records == []


# -- unread bodies ------------------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("more", [(), ("Expect: 100-continue",), ("Connection: close",)])
async def test_an_answer_before_the_body_arrives_ends_the_connection(more: tuple[str, ...]) -> None:
    """With `Connection: close`; it arrives while the client still sends; the body is no request."""
    async with serving() as (application, server), server.client() as client:
        size = 4_000_000
        head = post(f"Content-Length: {size}", *more, path="/blind")
        await client.send(head)
        with suppress(ConnectionError):
            await client.send(*[GET * 1000] * 20)
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await client.rest() == b""
        assert len(application.scopes) == 1


@on_its_loop
async def test_an_answer_after_the_body_leaves_the_connection_open() -> None:
    """Control: a received but unread body ends no connection."""
    async with serving() as (_, server), server.client() as client:
        for _ in range(2):
            await client.send(post(LENGTH, path="/blind", body=BODY))
            status, headers, _ = await client.answer()
            assert (status, "connection" in headers) == (200, False)


@on_both_loops
async def test_a_refused_client_that_keeps_sending_is_cut_off() -> None:
    """After a refusal the rest is discarded for a moment, and then the connection is closed."""
    async with serving() as (_, server), server.client() as client:
        await client.send(b"poison\r\n\r\n")
        assert (await client.answer())[0] == 400
        with suppress(ConnectionError):
            async with asyncio.timeout(5):
                while True:
                    await client.send(b"poison")
        assert not server.state.connections


# -- upgrade offers -----------------------------------------------------------------------------

OFFERS: Final = {
    "curl --http2": [
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    ],
    "Java": ["Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAA", "Connection: Upgrade, HTTP2-Settings"],
    "WebSocket": ["Connection: keep-alive, upgrade", "Upgrade: websocket"],
    "TLS": ["Upgrade: TLS/1.0, HTTP/1.1", "Connection: Upgrade"],
    "two lines": ["Upgrade: h2c", "Connection: Upgrade", "Connection: HTTP2-Settings"],
    "not named in Connection": ["Upgrade: h2c"],
}


@on_its_loop
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("framing", ["together", "apart", "byte by byte", "in chunks", "expects"])
async def test_an_upgrade_offer_is_ignored(offer: list[str], framing: str) -> None:
    """The request is served with its body, and so are those after it (RFC 9110, 7.8)."""
    head = post(LENGTH, "X-Kept: 1", *offer)
    packets = {
        "together": [(head + BODY) * 3],
        "apart": [head, BODY, head + BODY[:3], BODY[3:] + head + BODY],
        "byte by byte": [],
        "in chunks": [post("Transfer-Encoding: chunked", "X-Kept: 1", *offer), chunked(BODY, 5)]
        * 3,
        "expects": [post(LENGTH, "Expect: 100-continue", "X-Kept: 1", *offer), BODY] * 3,
    }[framing]
    async with serving() as (application, server), server.client() as client:
        for packet in packets:
            await client.send(packet)
        if framing == "byte by byte":
            client.writer.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )
            for byte in (head + BODY) * 3:
                client.writer.write(bytes([byte]))
                await asyncio.sleep(0)
        answered = 0
        while answered < 3:
            status, headers, body = await client.answer()
            if status != 100:
                assert (status, body, "connection" in headers) == (200, BODY, False)
                answered += 1
        for scope in application.scopes:
            assert (b"x-kept", b"1") in scope["headers"]
        await client.send(WHOLE)
        assert (await client.answer())[2] == BODY


@on_its_loop
async def test_an_offer_does_not_hide_what_is_refused() -> None:
    """A request with an offer is checked like any other, and its `close` is obeyed."""
    offer = ("Connection: Upgrade, close", "Upgrade: h2c")
    async with serving() as (_, server):
        for sent, expected in (
            (raw_request("POST", "/", *offer), 400),
            (post(*offer, "Host: b"), 400),
            (post(*offer, "Transfer-Encoding: gzip"), 501),
            (post(*offer, "Content-Length: 3", "Transfer-Encoding: chunked"), 400),
            (post(*offer, LENGTH, body=BODY), 200),
        ):
            async with server.client() as client:
                await client.send(sent)
                status, headers, _ = await client.answer()
                assert (status, headers["connection"]) == (expected, "close"), sent
                assert await client.rest() == b""


@on_its_loop
async def test_many_offers_in_one_packet_cost_no_more_than_requests() -> None:
    """Thousands of pipelined ones neither nest nor copy the bytes after them."""
    async with serving() as (application, server), server.client() as client:
        sent = raw_request("GET", "/", "Host: a", "Connection: Upgrade", "Upgrade: h2c")
        for _ in range(20):
            client.writer.write(sent * 150)
        for _ in range(3000):
            assert (await client.answer())[0] == 200
        assert len(application.scopes) == 3000


@on_its_loop
async def test_connect_is_answered_and_closed() -> None:
    """There is no tunnel: the bytes after it are neither a request nor forwarded."""
    async with serving() as (application, server):
        async with server.client() as client:
            await client.send(raw_request("CONNECT", "/", "Host: a") + GET)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.rest() == b""
            assert len(application.scopes) == 1
        async with server.client() as client:
            await client.send(raw_request("CONNECT", "a:443", "Host: a:443") + GET)
            assert (await client.answer())[0] == 400
            assert await client.rest() == b""


# -- targets and hosts --------------------------------------------------------------------------


@on_its_loop
@pytest.mark.parametrize(
    ("sent", "path", "host"),
    [
        ("GET /a HTTP/1.1|Host: a", "/a", b"a"),
        ("GET /a HTTP/1.1|Host: ", "/a", b""),
        ("GET /a HTTP/1.1|Host: [::1]:3000", "/a", b"[::1]:3000"),
        ("GET /a HTTP/1.1|Host: a_b.example.:", "/a", b"a_b.example.:"),
        ("GET /a HTTP/1.0", "/a", None),
        ("GET http://b/a HTTP/1.1|Host: a", "/a", b"b"),
        ("GET http://b:81 HTTP/1.1|Host: a", "/", b"b:81"),
        ("GET http://[::1]:81/a?c HTTP/1.1|Host: a", "/a", b"[::1]:81"),
    ],
)
async def test_a_target_of_any_form_is_read(sent: str, path: str, host: bytes | None) -> None:
    """The host of an absolute target overrides the header; a host may be empty."""
    async with serving() as (application, server), server.client() as client:
        await client.send(sent.replace("|", "\r\n").encode() + b"\r\n\r\n")
        assert (await client.answer())[0] == 200
        (scope,) = application.scopes
        assert scope["path"] == path
        assert dict(scope["headers"]).get(b"host") == host


# -- a client that does not read ----------------------------------------------------------------


class Patient(LimitedProtocol):
    """Mutant, as in an earlier version: unread answers are kept for ever."""

    def _watch_reader(self) -> None:
        pass


class Blind(LimitedProtocol):
    """Mutant: does not detect that the client reads."""

    def _count_unsent(self) -> int:
        return self._writes.written


UNREAD: Final = {
    "a large answer": [raw_request("GET", "/large", "Host: a")],
    "and the end of the connection": [raw_request("GET", "/large", "Host: a", "Connection: close")],
    "small answers": [post("Content-Length: 3000", body=b" " * 3000)] * 3000,
    "a large answer to a late body": [post("Content-Length: 9", path="/large") + b"1"],
}


async def is_ended(packets: list[bytes], kind: type[LimitedProtocol]) -> bool:
    """Send, read nothing, and return whether the server closes the connection."""
    async with (
        serving(keep_alive=SOON, patience=SOON, kind=kind) as (_, server),
        server.client() as client,
    ):
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(b"".join(packets))
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                while not server.state.connections:  # noqa: ASYNC110 - of the server
                    await asyncio.sleep(0.01)
                while server.state.connections:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                return True
        return False


@on_both_loops
@pytest.mark.parametrize("packets", UNREAD.values(), ids=UNREAD)
async def test_a_client_that_reads_nothing_is_not_waited_for(packets: list[bytes]) -> None:
    """With unread answers of any kind; a request that waits for its answer ends too."""
    assert await is_ended(packets, LimitedProtocol)


@on_both_loops
async def test_without_the_deadline_an_answer_is_kept_for_ever() -> None:
    """Control: with the mutant the connection and the unread answer are kept."""
    assert not await is_ended(UNREAD["a large answer"], Patient)


async def slow_reader(kind: type[LimitedProtocol]) -> int:
    """Read an answer for many times the idle limit; return how many bytes arrived."""
    async with serving(patience=0.5, kind=kind) as (_, server):
        loop, arrived = asyncio.get_running_loop(), 0
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setblocking(False)  # noqa: FBT003 - socket's own
            await loop.sock_sendall(client, raw_request("GET", "/large", "Host: a"))
            with suppress(ConnectionError):
                while arrived < LARGE and (piece := await loop.sock_recv(client, LARGE // 64)):
                    arrived += len(piece)
                    await asyncio.sleep(0.05)
        return arrived


@on_both_loops
async def test_a_client_that_reads_slowly_gets_all_of_its_answer() -> None:
    """As long as it reads at all; the mutant that does not detect reads cuts it off."""
    assert await slow_reader(LimitedProtocol) >= LARGE
    assert await slow_reader(Blind) < LARGE


class Careless(LimitedProtocol):
    """Mutant: waits until the events that a client does not take fill the buffers."""

    def _watch_events(self) -> None:
        pass


async def stream_ends(kind: type[LimitedProtocol], *, reads: bool) -> bool:
    """Open a stream of events in a small window; return whether the server ends it."""
    loop = asyncio.get_running_loop()
    async with serving(patience=0.6, kind=kind) as (application, server):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)  # noqa: FBT003 - socket's own
            await loop.sock_connect(client, ("127.0.0.1", server.port))
            await loop.sock_sendall(client, raw_request("GET", "/events", "Host: a"))
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    while not server.state.connections:  # noqa: ASYNC110 - of the server
                        await asyncio.sleep(0.01)
                    while server.state.connections:
                        await (loop.sock_recv(client, 100_000) if reads else asyncio.sleep(0.01))
                    return True
        application.left.set()
        return False


@on_both_loops
async def test_a_stream_ends_when_its_reader_stands_still() -> None:
    """Long before its events fill the buffers of the kernel; a stream that is read goes on."""
    with capture_logs() as lines:
        assert await stream_ends(LimitedProtocol, reads=False)
        await asyncio.sleep(LATER)
    assert [line["event"] for line in lines] == [Ending.NOT_READING]
    assert not await stream_ends(LimitedProtocol, reads=True)


@on_both_loops
async def test_without_the_watch_it_is_kept() -> None:
    """The control."""
    assert not await stream_ends(Careless, reads=False)


# -- a client that does not send ----------------------------------------------------------------


class Hospitable(LimitedProtocol):
    """Mutant, as in an earlier version: a connection without a request may be idle."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline(self.timeout_keep_alive, self.timeout_keep_alive_handler)


async def is_silently_closed(sent: bytes, kind: type[LimitedProtocol]) -> bool:
    """Send no whole head on some connections; return whether all are closed, without an answer."""
    async with serving(kind=kind) as (_, server), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.client()) for _ in range(20)]
        busy = await stack.enter_async_context(server.client())
        await busy.send(GET)
        assert (await busy.answer())[0] == 200
        for client in clients:
            client.writer.write(sent)
        closed = not await clients[0].is_quiet()
        if closed:
            for client in clients:
                assert await client.rest() == b""
        await busy.send(GET)  # others are not harmed
        assert (await busy.answer())[0] == 200
        return closed


@on_both_loops
@pytest.mark.parametrize("sent", [b"", b"\r\n"], ids=["nothing", "an empty line"])
async def test_a_connection_without_a_request_is_closed(sent: bytes) -> None:
    """At the limit of a head, not at that of an idle connection; one line in the log says so."""
    with capture_logs() as lines:
        assert await is_silently_closed(sent, LimitedProtocol)
        await asyncio.sleep(LATER)
    assert [(line["event"], line["count"]) for line in lines] == [(Ending.SILENT, 20)]
    assert not await is_silently_closed(sent, Hospitable)


class Generous(LimitedProtocol):
    """Mutant, as in an earlier version: the first byte of the first head renews its time."""

    def on_message_begin(self) -> None:
        self._clear_deadline()
        super().on_message_begin()


async def keeps_its_deadline(kind: type[LimitedProtocol]) -> bool:
    """Return whether the first byte of a first head leaves its deadline as it was."""
    async with serving(kind=kind) as (_, server), server.client() as client:
        while not server.state.connections:  # noqa: ASYNC110 - of the server
            await asyncio.sleep(0.01)
        (connection,) = server.state.connections
        assert isinstance(connection, LimitedProtocol)
        before = connection._deadline
        await asyncio.sleep(0.02)
        await client.send(b"G")
        return connection._deadline == before


@on_both_loops
async def test_the_time_of_a_first_head_begins_with_the_connection() -> None:
    """A client that sends its first byte late gets no more time; with the mutant it does."""
    assert await keeps_its_deadline(LimitedProtocol)
    assert not await keeps_its_deadline(Generous)


@on_both_loops
async def test_slow_heads_and_bodies_are_logged_once() -> None:
    """With their number: one line for each would let anybody fill the log."""
    with capture_logs() as lines:
        async with serving() as (_, server), AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(server.client()) for _ in range(12)]
            for number, client in enumerate(clients):
                client.writer.write(post(LENGTH) if number % 2 else b"POST")
            for client in clients:
                assert (await client.answer())[0] == 408
            await asyncio.sleep(LATER)
    (line,) = [line for line in lines if line["log_level"] != "debug"]
    assert (line["event"], line["count"]) == (Ending.TRICKLING, 12)
    assert line["log_level"] == "warning"


class Impatient(LimitedProtocol):
    max_connections = 3
    headless_seconds = 0.0


class Rigid(Impatient):
    """Mutant, as in an earlier version: refuses the newest, whatever the others do."""

    def _make_room(self) -> bool:
        return False


async def newest_of_a_crowd(kind: type[LimitedProtocol]) -> int:
    """Fill a server with connections, of which all but one send nothing; return what one more gets.

    The one that has a request under way is answered.
    """
    async with serving(kind=kind) as (application, server), AsyncExitStack() as stack:
        server.kind.head_seconds = 60
        application.leave.clear()
        busy = await stack.enter_async_context(server.client())
        await busy.send(WHOLE)
        while not application.scopes:  # noqa: ASYNC110 - of the server; before that it is idle
            await asyncio.sleep(0.01)
        for _ in range(2):
            await stack.enter_async_context(server.client())
        while len(server.state.connections) < 3:  # noqa: ASYNC110 - of the server
            await asyncio.sleep(0.01)
        newest = await stack.enter_async_context(server.client())
        await newest.send(GET)
        application.leave.set()
        assert (await busy.answer())[2] == BODY
        return (await newest.answer())[0]


@on_both_loops
async def test_idle_connections_give_way_to_new_ones() -> None:
    """Those without a request; the mutant refuses the new one."""
    with capture_logs() as lines:
        assert await newest_of_a_crowd(Impatient) == 200
        await asyncio.sleep(LATER)
    assert [(line["event"], line["count"]) for line in lines] == [(Ending.REPLACED, 1)]
    assert await newest_of_a_crowd(Rigid) == 503


class Polite(LimitedProtocol):
    """Mutant, as in an earlier version: sends what is unsent before it gives way."""

    def give_way(self) -> None:
        self._note(Ending.REPLACED)
        self._close()


async def gives_way_at_once(kind: type[LimitedProtocol]) -> bool:
    """Return whether a connection whose client reads nothing frees its descriptor for another."""
    loop = asyncio.get_running_loop()
    async with serving(kind=kind) as (_, server):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)  # noqa: FBT003 - socket's own
            await loop.sock_connect(client, ("127.0.0.1", server.port))
            while not server.state.connections:  # noqa: ASYNC110 - of the server
                await asyncio.sleep(0.01)
            (connection,) = server.state.connections
            assert isinstance(connection, LimitedProtocol)
            while not connection.transport.get_write_buffer_size():
                connection.transport.write(bytes(8192))
            server.state.connections.discard(connection)  # as `_make_room`
            connection.give_way()
            await asyncio.sleep(1)
            return bool(connection.transport.get_extra_info("socket").fileno() < 0)


@on_both_loops
async def test_a_client_that_reads_nothing_gives_way_at_once() -> None:
    """Or more descriptors than `max_connections` were in use; with the mutant they are."""
    assert await gives_way_at_once(LimitedProtocol)
    assert not await gives_way_at_once(Polite)


@on_its_loop
async def test_an_ending_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came meanwhile is counted in the next line; each kind has lines of its own."""
    monkeypatch.setattr(endings, "LOG_EVERY_SECONDS", 0.4)
    loop, noted = asyncio.get_running_loop(), Endings()
    with capture_logs() as lines:
        for _ in range(3):
            noted.note(Ending.SILENT, None, loop)
        noted.note(Ending.FULL, None, loop)
        await asyncio.sleep(GATHER + 0.05)
        said = [(line["event"], line["count"], line["log_level"]) for line in lines]
        assert sorted(said) == [(Ending.SILENT, 3, "info"), (Ending.FULL, 1, "warning")]
        for _ in range(20):
            noted.note(Ending.SILENT, None, loop)
        assert len(lines) == 2
        await asyncio.sleep(1)
        assert [(line["count"], line["log_level"]) for line in lines[2:]] == [(20, "warning")]
        noted.note(Ending.SILENT, None, loop)
        await asyncio.sleep(GATHER + 0.05)
        assert [line["count"] for line in lines[3:]] == [1]


# -- the protocol's own answers -----------------------------------------------------------------


class Counts(LimitedProtocol):
    """Counts refusals, and gives each an id."""

    refusals: ClassVar[list[int]] = []

    def count_refusal(self, status: int, scope: Scope | None) -> bytes:
        self.refusals.append(status)
        return b"read" if scope is not None else b"unread"


class Full(Counts):
    max_connections = 0


@on_its_loop
async def test_the_protocols_own_answers_are_counted_and_have_an_id() -> None:
    """Each once: 408, 400, 503; but not when the application answers."""
    Counts.refusals.clear()
    async with serving(kind=Counts) as (application, server):
        async with server.client() as late:
            await late.send(GET[:9])
            status, headers, _ = await late.answer()
            assert (status, headers["x-request-id"]) == (408, "unread")
        async with server.client() as behind:
            application.leave.clear()
            await behind.send(GET, b"\0")
            application.leave.set()
            status, headers, _ = await behind.answer()
            assert (status, "x-request-id" in headers) == (200, False)
        async with server.client() as garbage:
            await garbage.send(b"\0")
            assert (await garbage.answer())[0] == 400
    async with serving(kind=Full) as (_, server), server.client() as client:
        await client.send(GET)
        status, headers, _ = await client.answer()
        assert (status, headers["x-request-id"]) == (503, "read")
    assert Counts.refusals == [408, 400, 503]


# -- the stop -----------------------------------------------------------------------------------


@on_its_loop
async def test_a_stop_closes_idle_connections_and_completes_answers() -> None:
    """An idle one is closed at once; connections with a request get its answer first."""
    async with serving() as (application, server):
        application.leave.clear()
        async with server.client() as idle, server.client() as busy:
            await busy.send(post(LENGTH), BODY)
            await asyncio.sleep(LATER)  # until it is no new connection
            server.stop()
            assert await idle.rest() == b""
            application.leave.set()
            status, headers, body = await busy.answer()
            assert (status, headers["connection"], body) == (200, "close", BODY)
            assert await busy.rest() == b""


class Abrupt(LimitedProtocol):
    """Takes whoever has no request under way for idle (the control)."""

    @override
    def _is_new(self) -> bool:
        return False

    @override
    def _has_input(self) -> bool:
        return False


async def answer_at_stop(kind: type[LimitedProtocol], before: list[bytes], after: bytes) -> int:
    """Stop while a request is on its way; return the status of its answer, 0 if it has none."""
    async with serving(kind=kind) as (_, server), server.client() as client:
        for request in before:
            await client.send(request)
            await client.answer()
        await asyncio.sleep(0.05)  # until it is accepted
        os.write(client.writer.get_extra_info("socket").fileno(), after)
        server.stop()
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            status, headers, _ = await client.answer()
            assert headers["connection"] == "close"
            return status
    return 0


@pytest.mark.parametrize("before", [[], [GET]], ids=["new", "used"])
@on_its_loop
async def test_a_request_that_arrives_with_the_stop_is_answered(before: list[bytes]) -> None:
    """A proxy has sent it already, and may not send it again."""
    assert await answer_at_stop(LimitedProtocol, before, GET) == 200


@pytest.mark.parametrize("before", [[], [GET]], ids=["new", "used"])
@on_its_loop
async def test_without_the_look_it_is_lost(before: list[bytes]) -> None:
    """Control: its connection passes for an idle one."""
    assert await answer_at_stop(Abrupt, before, GET) == 0


@on_its_loop
async def test_half_a_head_is_waited_for_a_moment() -> None:
    """Then its client is told."""
    async with serving() as (_, server), server.client() as client, server.client() as other:
        await client.send(GET[:9])
        await other.send(GET[:9])
        await asyncio.sleep(0.05)
        server.stop()
        await client.send(GET[9:])
        assert (await client.answer())[0] == 200
        assert (await other.answer())[0] == 408
        assert await other.rest() == b""


@on_its_loop
async def test_while_it_drains_idle_connections_stay() -> None:
    """The next answer of each is its last one; so is one under way."""
    async with (
        serving() as (application, server),
        server.client() as idle,
        server.client() as busy,
    ):
        await idle.send(GET)
        assert "connection" not in (await idle.answer())[1]
        application.leave.clear()
        await busy.send(post(LENGTH), BODY)
        server.kind.end_with_answers(server.state.connections)
        application.leave.set()
        for client in (busy, idle):
            if client is idle:
                await client.send(GET)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.rest() == b""
