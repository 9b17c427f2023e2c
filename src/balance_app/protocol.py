"""uvicorn's HTTP/1.1 with what it lacks: limits for the heads of requests."""

import asyncio
from typing import Final

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_SECONDS: Final = 10


class LimitedProtocol(HttpToolsProtocol):
    """A head may be so large and take so long; garbage after a request does not deny it."""

    _in_head = True
    _heads = 0
    _unfinished_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

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
