"""uvicorn's HTTP/1.1 with what it lacks: limits for connections and for the heads of requests."""

import asyncio
from time import monotonic
from typing import ClassVar, Final

import structlog
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from balance_app.errors import Overloaded

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_SECONDS: Final = 10
# So many connections more than there is room for are held until their request can be refused.
REFUSED_AT_ONCE: Final = 16
REFUSAL_SECONDS: Final = 1.0
LOG_EVERY_SECONDS: Final = 60.0

_FULL: Final = Overloaded("This instance has as many connections as it may have files open.")
_refusal = _FULL.response()
_refusal.headers["Connection"] = "close"
_REFUSAL: Final = b"HTTP/1.1 503 Service Unavailable\r\n%s\r\n%s" % (
    b"".join(b"%s: %s\r\n" % header for header in _refusal.raw_headers),
    _refusal.body,
)


class LimitedProtocol(HttpToolsProtocol):
    """A head may be so large and take so long; garbage after a request does not deny it.

    Connections beyond `max_connections` are answered with 503: they must not take the descriptors
    that the database's connections need.
    """

    max_connections: ClassVar[int | None] = None
    logged_full_at: ClassVar[float | None] = None
    _in_head = True
    _heads = 0
    _unfinished_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = self.max_connections
        if limit is not None and len(self.connections) > limit:
            self._refuse_connection(len(self.connections) - limit)

    @override
    def data_received(self, data: bytes) -> None:
        heads = self._heads
        super().data_received(data)
        if not self._in_head or self._heads != heads or self.transport.is_closing():
            return
        self._unfinished_bytes += len(data)
        if self._unfinished_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")
        elif self._deadline is None:
            self._deadline = self.loop.call_later(
                HEAD_SECONDS, self._refuse, b"408 Request Timeout"
            )

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        self._heads += 1
        self._unfinished_bytes = 0
        self._forget_deadline()
        super().on_headers_complete()

    @override
    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    @override
    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle and not cycle.response_complete and (self.pipeline or not cycle.more_body):
            # The garbage comes after a whole request: that one keeps its answer, then it's over.
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        super().send_400_response(msg)

    def _refuse_connection(self, excess: int) -> None:
        now, logged = monotonic(), LimitedProtocol.logged_full_at
        if logged is None or now - logged > LOG_EVERY_SECONDS:
            LimitedProtocol.logged_full_at = now
            log.warning("too many connections for the limit of open files", reason=_FULL.detail)
        if excess > REFUSED_AT_ONCE:
            self.transport.write(_REFUSAL)
            self.transport.close()
            return
        # Its request is read before it is refused, so that the answer can't be lost to a reset.
        self.app = _refusal
        self.loop.call_later(REFUSAL_SECONDS, self.transport.close)

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
