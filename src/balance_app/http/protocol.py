"""HTTP/1.1 on uvicorn's protocol, with checks that it lacks, limits and deadlines.

What ends a connection early (a head that is late or too large, input that can't be parsed, a client
that has sent its last byte) does not cut off the answer to a request under way: the application
answers that request, and then the connection ends.

A connection has at most one deadline: the first head has `HEAD_SECONDS` from the connection on,
later ones from their first byte, or from the answer before them; between requests a connection may
be idle for `timeout_keep_alive` seconds; a body has `body_seconds` from its head. An application
that reads a late body gets `RequestTimeout`, raised by `receive`. The application itself limits how
long it takes to answer; but a connection whose client takes nothing for `WRITE_SECONDS`, while more
is to be sent, is reset (a stream of events: `STREAM_SECONDS`).

When the file descriptors are used up, connections that are idle give way to new ones.
"""

import asyncio
import fcntl
import heapq
import re
import socket
import struct
import sys
import termios
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import Context
from typing import Any, ClassVar, Final, NoReturn, cast
from urllib.parse import unquote

import httptools
import structlog
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from typing_extensions import override
from uvicorn._types import ASGI3Application, ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from balance_app.errors import (
    HeadTooLarge,
    MalformedRequest,
    Overloaded,
    Problem,
    RequestTimeout,
    UnsupportedTransferCoding,
)
from balance_app.http.answer_headers import NO_STORE, is_event_stream
from balance_app.http.endings import Ending, Endings
from balance_app.http.problem_pages import answer
from balance_app.proxies import Proxies

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FRAMED_BYTES: Final = 1024 * 1024  # of one request: its body with its framing
HEAD_SECONDS: Final = 10.0
LAST_HEAD_SECONDS: Final = 0.5  # when the instance stops: for a head that is on its way
LINGER_SECONDS: Final = 2.0
WRITE_SECONDS: Final = 30.0
STREAM_SECONDS: Final = 10.0
CHECKS: Final = 4  # of a reader, within the time that it may stand still
# Connections beyond the limit that are kept until their request can be refused.
REFUSED_AT_ONCE: Final = 16
REFUSAL_SECONDS: Final = 1.0
# When there are too many: how long a connection without a whole head is left alone, and an idle one
# that was answered; how many of all give way at once, and how often they are searched.
HEADLESS_SECONDS: Final = 2.0
IDLE_SECONDS: Final = 10.0
GIVING_WAY: Final = 1 / 16
SEARCH_EVERY_SECONDS: Final = 0.25
# Statuses of answers that have no body; bytes that no header has in it, but for a tab.
_WITHOUT_BODY: Final = frozenset({204, 304})
_CONTROLS: Final = bytes({*range(0x20), 0x7F} - {0x09})
_RESET: Final = struct.pack("ii", 1, 0)  # linger for no time

_HEAD_TOO_LARGE: Final = f"The head may have at most {MAX_HEAD_BYTES // 1024} KiB."
_FULL: Final = Overloaded("This instance has no free file descriptor for more connections.")

# A name, an address, or an address in brackets; perhaps a port (RFC 3986, 3.2).
_HOST: Final = re.compile(
    rb"(?:\[[0-9A-Za-z:.~_-]+\]|(?:[0-9A-Za-z._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?"
)
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+(?:[ \t]*;.*)?", re.DOTALL)

log = structlog.get_logger(__name__)


class _RefusedError(Exception):
    """Stops the parser from within one of its callbacks."""


class _JoinedWrites:
    """The transport of answers: the head of one is sent with the first part of its body.

    ASGI asks for that, and two writes would be two system calls and two packets.
    """

    __slots__ = ("_head", "_transport", "written")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        # bytes that were given to the transport
        self.written = 0

    def hold(self, head: bytes) -> None:
        """Keep a head until the first part of its body comes."""
        self._head = head

    def write(self, data: bytes) -> None:
        """Send data, after a head that waits for it."""
        if self._head:
            data = self._head + data
            self._head = b""
        self.written += len(data)
        self._transport.write(data)

    def is_closing(self) -> bool:
        """Return whether nothing more can be sent."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Close the connection after what was written."""
        if self._head:
            self.write(b"")
        self._transport.close()


class _Cycle(RequestResponseCycle):
    """A request and its answer.

    The application gives its whole answer even if the client has sent its last byte, and even if
    the rest of the body can't be read.
    """

    transport: _JoinedWrites  # type: ignore[assignment]

    # the rest of the body will not come; `fault` is the reason, if the client can be answered
    broken = False
    fault: Problem | None = None
    # further input is read and dropped, or a reset may destroy the answer
    lingers = False
    # the headers of the answer; called when the answer is known to be a stream of events
    headers: Iterable[tuple[bytes, bytes]] = ()
    on_events: Callable[[], None] | None = None
    # the headers of all answers as they are sent, and the list that they were made from
    _defaults: ClassVar[tuple[object, bytes]] = (None, b"")

    def break_off(self, fault: Problem | None = None) -> None:
        """Report to the application that the rest of the body will not come."""
        self.broken = True
        self.fault = fault
        self.message_event.set()

    # Neither is a coroutine function: that would add a coroutine to every message.

    @override
    def receive(self) -> Coroutine[Any, Any, ASGIReceiveEvent]:
        return self._end_of_body() if self.broken else RequestResponseCycle.receive(self)

    @override
    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        if not self.response_started:
            return self._start_answer(message)
        if message.get("more_body") and self.headers:
            if self.on_events and is_event_stream(self.headers):
                self.on_events()
            self.headers = ()
        return RequestResponseCycle.send(self, message)

    async def _start_answer(self, message: ASGISendEvent) -> None:
        """Make the head of the answer, at less than half of what uvicorn's checks cost."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:  # all of the answer is dropped, and its start is not noted
            return
        if message["type"] != "http.response.start":
            raise RuntimeError("An answer begins with its head.")
        self.response_started = True
        self.waiting_for_100_continue = False
        status, self.headers = message["status"], message["headers"]
        # Where some of the body is missing, nothing more of it is read: the connection ends.
        self.lingers = self.lingers or self.more_body
        ends = self.lingers or not self.keep_alive
        lines = [STATUS_LINE[status], self._default_lines()]
        for name, value in self.headers:
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = ends = False
            lines.append(b"%b: %b\r\n" % (name, value))
        if ends:
            lines.append(b"connection: close\r\n")
        method = self.scope["method"]
        if self.chunked_encoding is None and method != "HEAD" and status not in _WITHOUT_BODY:
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join([*lines, b"\r\n"])
        # What a value has in it must not end its line (the list's second item has several lines).
        if len(head) - len(head.translate(None, _CONTROLS)) != 2 * (
            len(lines) + len(self.default_headers)
        ):
            raise RuntimeError("A header of the answer has a control character.")
        # If it lingers, `on_response_complete` ends it, and uvicorn must not before that.
        self.keep_alive = self.keep_alive or self.lingers
        # uvicorn writes no body for HEAD, not even an empty one.
        (self.transport.write if method == "HEAD" else self.transport.hold)(head)

    def _default_lines(self) -> bytes:
        """Return the headers of all answers; uvicorn makes a new list of them each second."""
        made_from, lines = _Cycle._defaults
        if made_from is not self.default_headers:
            lines = b"".join(b"%b: %b\r\n" % header for header in self.default_headers)
            _Cycle._defaults = self.default_headers, lines
        return lines

    async def _end_of_body(self) -> ASGIReceiveEvent:
        if self.fault is not None and not self.response_started:
            raise self.fault
        return {"type": "http.disconnect"}


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Connections beyond `max_connections` must not take the descriptors that the database's
    connections need: idle ones give way to them, or they are answered with 503.
    """

    max_connections: ClassVar[int | None] = None
    endings: ClassVar[Endings]
    # the instance stops: each answer is the last one of its connection
    ends_connections: ClassVar[bool] = False
    proxies: ClassVar[Proxies | None] = None  # those that are believed
    searched_at: ClassVar[float] = 0.0  # for connections that give way
    head_seconds = HEAD_SECONDS
    last_head_seconds = LAST_HEAD_SECONDS
    headless_seconds = HEADLESS_SECONDS
    write_seconds = WRITE_SECONDS
    stream_seconds = STREAM_SECONDS
    body_seconds: ClassVar[float | None] = None
    linger_seconds = LINGER_SECONDS

    # the request that the application answers now; later ones are in the pipeline
    _running: _Cycle | None = None
    # a head has begun and not ended; how many have begun; bytes of it, or of the body after it
    _in_head = False
    _heads = 0
    _unfinished_bytes = 0
    # of the headers that are parsed; a target of as much is none that `parse_url` accepts
    _head_bytes = 0
    # the last head that was read offers another protocol
    _upgrade_offered = False
    # further input is dropped; the client has sent its last byte
    _discards_input = False
    _input_ended = False
    # what the headers of a proxy say counts
    _is_of_proxy = False
    # the last host that passed the check on this connection
    _checked_host: bytes | None = None
    # why the parser was stopped
    _fault: Problem | None = None
    # what is called at the deadline (the loop's time), None without one; the timer that checks it
    _on_deadline: Callable[[], None] | None = None
    _deadline = 0.0
    _timer: asyncio.TimerHandle | None = None
    _timer_at = 0.0
    # the timer that checks whether the client reads; bytes that it had taken at the last check, and
    # when it had last taken any
    _reader_timer: asyncio.TimerHandle | None = None
    _taken_bytes = 0
    _taken_at = 0.0
    # the answer under way is a stream of events
    _sends_events = False

    # -- the connection ----------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._writes = _JoinedWrites(transport)
        self._set_deadline(self.head_seconds, self._head_timed_out)
        if self.proxies is not None and self.client is not None:
            self._is_of_proxy = self.proxies.trust(self.client[0])
        limit = self.max_connections
        if limit is not None and len(self.connections) > limit:
            self._refuse_connection(len(self.connections) - limit)

    def _refuse_connection(self, excess: int) -> None:
        if self._make_room():
            return
        self._note(Ending.FULL)
        if excess > REFUSED_AT_ONCE:
            self._discards_input = True
            self._writes.write(self._last_answer(_FULL, log.debug))
            self.transport.close()
            return
        # The request is read before it is refused, so that no reset loses the answer.
        self.app = self._answer_full
        self.loop.call_later(REFUSAL_SECONDS, self.transport.close)

    async def _answer_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = answer(Request(scope), _FULL)
        response.headers["Connection"] = "close"
        response.raw_headers.append(NO_STORE)
        response.raw_headers.extend(self._note_refusal(_FULL, log.debug, scope))
        await response(scope, receive, send)

    def _make_room(self) -> bool:
        """Close some connections that are idle; return whether there were any.

        First those that have sent no whole head, then those that wait for a further request, as
        any server may close at any time.
        """
        now, kind = self.loop.time(), type(self)
        if now - kind.searched_at < SEARCH_EVERY_SECONDS:
            return False
        kind.searched_at = now
        idle = (
            (rank, each)
            for each in self.connections
            if (rank := cast("LimitedProtocol", each).idle_rank(now)) is not None
        )
        most = max(1, int(len(self.connections) * GIVING_WAY))
        longest = heapq.nsmallest(most, idle, key=lambda pair: pair[0])
        for _, each in longest:
            self.connections.discard(each)
            cast("LimitedProtocol", each).give_way()
        return bool(longest)

    def idle_rank(self, now: float) -> tuple[bool, float] | None:
        """Return the place in the order in which idle connections give way; None: this stays."""
        if self._on_deadline == self._head_timed_out:
            since = self._deadline - self.head_seconds
            return (False, since) if now - since >= self.headless_seconds else None
        if self._on_deadline == self.timeout_keep_alive_handler:
            since = self._deadline - self.timeout_keep_alive
            return (True, since) if now - since >= IDLE_SECONDS else None
        return None

    def give_way(self) -> None:
        """Close the connection for the sake of another: its descriptor is free at once."""
        self._note(Ending.REPLACED)
        if self.transport.get_write_buffer_size():
            # An idle client that has not read its answers would keep it for as long as it likes.
            self._reset()
        else:
            self._close()

    def _note(self, why: Ending) -> None:
        self.endings.note(why, self.client, self.loop)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        for timer in (self._timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        for cycle in (self._running, cast("_Cycle | None", self.cycle)):
            if cycle is not None:
                # Or the connection and its requests hold each other until the collector comes.
                cycle.on_events = None
        if self._running is not None and self._running is not self.cycle:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._discards_input:
            return
        heads = self._heads
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as switch:
                self._read_on(memoryview(data)[switch.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._fault or MalformedRequest("The request is not HTTP/1.1."))
            return
        if self._in_head:
            # A head that began in this data is counted from the next data on.
            self._unfinished_bytes = (
                self._unfinished_bytes + len(data) if heads == self._heads else 0
            )
            if self._unfinished_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(_HEAD_TOO_LARGE))
            elif self._on_deadline is None and not self._is_under_way():
                self._set_deadline(self.head_seconds, self._head_timed_out)
        elif self.cycle is not None and self.cycle.more_body:
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > MAX_FRAMED_BYTES:
                self._refuse(MalformedRequest("The body's framing is too large."))
            elif self._on_deadline is None and self._running is self.cycle:
                self._set_body_deadline()

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the answers to requests that are under way."""
        if not self._is_under_way():
            return False
        self._discards_input = self._input_ended = True
        self.cycle.keep_alive = False
        if self.cycle.more_body:
            cast("_Cycle", self.cycle).break_off()
        return True

    @classmethod
    def end_with_answers(cls, connections: Iterable[object]) -> None:
        """Make each answer the last one of its connection, unless it has begun already."""
        cls.ends_connections = True
        for each in connections:
            cast("LimitedProtocol", each).end_with_answer()

    def end_with_answer(self) -> None:
        """Close the connection after the answer under way, if its head can still say so."""
        if self._is_under_way() and not self.cycle.response_started:
            self.cycle.keep_alive = False

    @override
    def shutdown(self) -> None:
        """Close the connection, after the answer to a request that is under way or arrives now.

        A proxy that has just sent a request takes a closed connection for a failed request.
        """
        if self._is_under_way():
            self.cycle.keep_alive = False
        elif self._discards_input:
            pass  # it is lingering, and closes soon
        elif self._in_head:
            self._set_deadline(self.last_head_seconds, self._head_timed_out)
        elif self._has_input() or self._is_new():
            self._set_deadline(self.last_head_seconds, self._close)
        else:
            self.transport.close()

    def _is_new(self) -> bool:
        """Return whether its first request may be on its way: proxies connect to send one."""
        since = self._deadline - self.head_seconds
        return (
            self._on_deadline == self._head_timed_out
            and self.loop.time() - since < self.last_head_seconds
        )

    def _has_input(self) -> bool:
        """Return whether the kernel has bytes that this process has not read yet."""
        with suppress(OSError):
            descriptor = self.transport.get_extra_info("socket").fileno()
            unread = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
            return int.from_bytes(unread, sys.byteorder) > 0
        return False

    # -- reading -----------------------------------------------------------------------------

    def _read_on(self, rest: memoryview) -> None:
        """Parse on after an `Upgrade` offer, which is not accepted (RFC 9110, 7.8).

        The parser takes each offer for a switch, and the body for another protocol. So a new parser
        parses the request again, without the offer.
        """
        while self._upgrade_offered:
            self._upgrade_offered = False
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as switch:
                rest = rest[switch.args[0] :]
            else:
                return
        self._discards_input = True  # it was CONNECT: what follows is not HTTP

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [each.strip() for each in value.split(b",")]
                kept = b", ".join(each for each in options if each.lower() != b"upgrade")
                lines.append(b"connection: " + kept)
            elif name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    @override
    def on_message_begin(self) -> None:
        if self._heads:  # the first one's began with the connection
            self._clear_deadline()
        self._in_head = True
        self._head_bytes = 0
        self._heads += 1
        super().on_message_begin()

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are no headers (RFC 9110, 6.5.1)
            self._head_bytes += len(name) + len(value) + len(b": \r\n")
            if self._head_bytes > MAX_HEAD_BYTES:
                self._stop(HeadTooLarge(_HEAD_TOO_LARGE))
            self.headers.append((name.lower(), value))

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        self._unfinished_bytes = 0
        self._clear_deadline()
        method = self.parser.get_method()
        is_connect = method == b"CONNECT"
        if self.parser.should_upgrade() and not is_connect:
            self._upgrade_offered = True
            return
        version = self.parser.get_http_version()
        self._check_head(version)
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self._read_target()
        if self._is_of_proxy:
            self._read_forwarded()
        self.cycle = cycle = _Cycle(
            scope=self.scope,
            transport=self._writes,  # type: ignore[arg-type]
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=(
                version != "1.0"
                and not is_connect
                and not self.ends_connections
                and self.parser.should_keep_alive()
            ),
            on_response=self.on_response_complete,
        )
        cycle.on_events = self._watch_events
        if self._is_under_way():
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))
        else:
            self._start_asgi_task(cycle, self.app)

    def _check_head(self, version: str) -> None:
        """Check the headers that give the request's host and framing (RFC 9112, 3.2 and 6.1).

        Raises:
            _RefusedError: the reason is in `_fault`.
        """
        hosts, codings = [], []
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding":
                codings.append(value)
            elif name == b"expect":
                self.expect_100_continue = version != "1.0" and value.lower() == b"100-continue"
        if len(hosts) != 1 and (hosts or version != "1.0"):
            self._stop(MalformedRequest("Send one Host header."))
        if hosts and hosts[0] != self._checked_host:
            if not _HOST.fullmatch(hosts[0].strip(b" \t")):
                self._stop(MalformedRequest("The Host header names no host."))
            self._checked_host = hosts[0]
        if codings and (codings != [b"chunked"] or version == "1.0"):
            self._check_codings(b",".join(codings).lower(), version)

    def _check_codings(self, codings: bytes, version: str) -> None:
        if version == "1.0":
            self._stop(MalformedRequest("HTTP/1.0 has no Transfer-Encoding."))
        names = [each.strip(b" \t") for each in codings.split(b",")]
        names = [each for each in names if each]
        if not names or not all(_TOKEN.fullmatch(each) for each in names):
            self._stop(MalformedRequest("The Transfer-Encoding can't be read."))
        if b"chunked" in names[:-1]:
            self._stop(MalformedRequest("The chunked coding must come once, and last."))
        if names != [b"chunked"]:
            self._stop(UnsupportedTransferCoding("Only the transfer coding chunked is supported."))

    def _read_target(self) -> None:
        """Take path and query from the request's target, whichever form it has (RFC 9112, 3.2)."""
        target = httptools.parse_url(self.url)
        if target.host is not None:
            host = b"[%b]" % target.host if b":" in target.host else target.host
            authority = host if target.port is None else b"%b:%d" % (host, target.port)
            self.headers[:] = [
                (name, authority if name == b"host" else value) for name, value in self.headers
            ]
        raw_path = target.path or b"/"
        path = raw_path.decode("ascii")
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = target.query or b""

    def _read_forwarded(self) -> None:
        """Take client, scheme and host from what the proxy says of them."""
        assert self.proxies is not None  # noqa: S101 - whose connection this is
        client, scheme, host = self.proxies.read(self.headers)
        if client is not None:
            self.scope["client"] = client
        if scheme is not None:
            self.scope["scheme"] = scheme
        if host is not None and _HOST.fullmatch(host):
            self.headers[:] = [
                *((name, value) for name, value in self.headers if name != b"host"),
                (b"host", host),
            ]

    def _stop(self, fault: Problem) -> NoReturn:
        self._fault = fault
        raise _RefusedError

    @override
    def on_message_complete(self) -> None:
        self._clear_deadline()
        if not self._upgrade_offered and not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    # -- answering ---------------------------------------------------------------------------

    def _is_under_way(self) -> bool:
        """Return whether there is a request without a complete answer."""
        return self._running is not None and not self._running.response_complete

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cast("_Cycle", cycle)
        super()._start_asgi_task(cycle, app)

    @override
    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._sends_events = False
        if self.transport.is_closing():
            self._set_deadline(self.linger_seconds, self._watch_reader)
            return
        self.flow.resume_reading()
        if self._running is not None and self._running.lingers:
            self._linger()
        elif self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            if self._running is self.cycle and self.cycle.more_body:
                self._set_body_deadline()
        elif self._in_head:
            self._set_deadline(self.head_seconds, self._head_timed_out)
        else:
            self._set_deadline(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _head_timed_out(self) -> None:
        if not self._in_head:
            self._note(Ending.SILENT)
            self._close()
            return
        self._note(Ending.TRICKLING)
        self._refuse(RequestTimeout(f"The head did not arrive within {self.head_seconds:g} s."))

    def _set_body_deadline(self) -> None:
        if self.body_seconds is not None:
            self._set_deadline(self.body_seconds, self._body_timed_out)

    def _body_timed_out(self) -> None:
        cycle = self._running
        assert cycle is not None  # noqa: S101 - whose body is waited for
        if cycle.more_body and not (cycle.response_started or cycle.broken):
            self._note(Ending.TRICKLING)
            sentence = f"The body did not arrive within {self.body_seconds:g} s."
            cycle.break_off(RequestTimeout(sentence, headers={"Connection": "close"}))

    def _refuse(self, problem: Problem) -> None:
        """Parse no more input; the application still answers earlier requests."""
        self._discards_input = True
        self._clear_deadline()
        if self._is_under_way():
            log.info("request refused", reason=problem.detail, client=self.client)
            cycle = cast("_Cycle", self.cycle)
            cycle.lingers = True
            if cycle.more_body:
                cycle.break_off()
        elif not self.transport.is_closing():
            # Of late ones there may be many: `endings` counts them.
            write_log = log.debug if isinstance(problem, RequestTimeout) else log.info
            self._writes.write(self._last_answer(problem, write_log))
            self._linger()

    def count_refusal(self, _status: int, _scope: Scope | None) -> bytes | None:
        """Count an answer of the protocol's own; return an id for its request, if it gets one.

        Overridden in `server`; `scope` is None if the request can't be read.
        """
        return None

    def _note_refusal(
        self, problem: Problem, write_log: Callable[..., None], scope: Scope | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Count and log an answer of the protocol's own; return its headers."""
        request_id = self.count_refusal(problem.status, scope)
        ids = {} if request_id is None else {"request_id": request_id.decode()}
        client = self.client if scope is None else scope["client"]
        write_log("request refused", reason=problem.detail, client=client, **ids)
        return [] if request_id is None else [(b"x-request-id", request_id)]

    def _last_answer(self, problem: Problem, write_log: Callable[..., None]) -> bytes:
        response = problem.response()
        ids = self._note_refusal(problem, write_log)
        headers = [*self.server_state.default_headers, *response.raw_headers, NO_STORE, *ids]
        lines = [STATUS_LINE[problem.status], *(b"%b: %b\r\n" % header for header in headers)]
        return b"".join([*lines, b"connection: close\r\n\r\n", response.body])

    def _linger(self) -> None:
        """Close the connection so that the answer arrives.

        For `linger_seconds` further input is read and dropped: closing a socket with unread input
        resets the connection, and the client may lose what it has not read yet.
        """
        if self._input_ended:
            self._close()
            return
        self._discards_input = True
        self.flow.resume_reading()
        self.transport.write_eof()
        self._set_deadline(self.linger_seconds, self._close)

    # -- a client that does not read ---------------------------------------------------------

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None and not self._is_watched():
            self._reader_timer.cancel()
            self._reader_timer = None

    @override
    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._close()

    def _close(self) -> None:
        """Close the connection after sending what is buffered, as long as the client reads it."""
        self.transport.close()
        self._set_deadline(self.linger_seconds, self._watch_reader)

    def _watch_events(self) -> None:
        """Watch the reader of a stream from its start: its events fill no buffer for long."""
        self._sends_events = True
        self._watch_reader()

    def _is_watched(self) -> bool:
        return self.flow.write_paused or self._sends_events or self.transport.is_closing()

    def _watch_reader(self) -> None:
        if self._reader_timer is None and self in self.connections:
            self._taken_bytes = self._writes.written - self._count_unsent()
            self._taken_at = self.loop.time()
            self._check_reader_later()

    def _check_reader_later(self) -> None:
        self._reader_timer = self.loop.call_later(
            self._reader_seconds() / CHECKS, self._check_reader, context=Context()
        )

    def _reader_seconds(self) -> float:
        return self.stream_seconds if self._sends_events else self.write_seconds

    def _check_reader(self) -> None:
        """Reset the connection if the client has taken nothing for too long."""
        self._reader_timer = None
        if not self._is_watched():
            return
        now, unsent = self.loop.time(), self._count_unsent()
        taken = self._writes.written - unsent
        if unsent == 0 or taken > self._taken_bytes:
            self._taken_bytes, self._taken_at = taken, now
        elif now - self._taken_at >= self._reader_seconds():
            self._note(Ending.NOT_READING)
            self._reset()
            return
        self._check_reader_later()

    def _reset(self) -> None:
        """End the connection with what is unsent: the kernel would keep that for minutes."""
        with suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _RESET
            )
        self.transport.abort()

    def _count_unsent(self) -> int:
        """Return how many bytes the client has not acknowledged, in this process and the kernel.

        The kernel may hold megabytes: with a slow client only its count changes.
        """
        unsent = self.transport.get_write_buffer_size()
        with suppress(OSError):
            descriptor = self.transport.get_extra_info("socket").fileno()
            queued = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4))
            unsent += int.from_bytes(queued, sys.byteorder)
        return unsent

    # -- time --------------------------------------------------------------------------------

    def _set_deadline(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` in so many seconds, unless `_clear_deadline` is called before.

        A timer of an earlier deadline that goes off before this one is kept, and then set anew:
        most deadlines are cleared at once, and a timer costs more than parsing a head.
        """
        self._on_deadline = callback
        self._deadline = deadline = self.loop.time() + seconds
        if self._timer is None or self._timer_at > deadline:
            self._set_timer(deadline)

    def _clear_deadline(self) -> None:
        self._on_deadline = None

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # In a context of its own: what it logs is not about the request that was answered before.
        self._timer = self.loop.call_at(at, self._check_deadline, context=Context())

    def _check_deadline(self) -> None:
        self._timer = None
        if self._on_deadline is None:
            return
        if self.loop.time() < self._deadline:
            self._set_timer(self._deadline)
            return
        callback, self._on_deadline = self._on_deadline, None
        callback()
