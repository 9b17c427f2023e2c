"""One instance of the service: its sockets, its signals, uvicorn."""

import asyncio
import contextlib
import ctypes
import errno
import signal
import socket
import struct
import sys
from collections.abc import Generator
from types import FrameType

import uvicorn
import uvloop
from starlette.types import Scope
from typing_extensions import override

from balance_app import open_files
from balance_app.access.gate import OpenToNetworkError
from balance_app.http.answer_headers import ALWAYS
from balance_app.http.endings import Endings
from balance_app.http.protocol import LimitedProtocol
from balance_app.jobs.job import Registry
from balance_app.jobs.scope import CountedCalls
from balance_app.main import create_app
from balance_app.proxies import Proxies
from balance_app.settings import Settings

BACKLOG = 4096  # in a burst, connections arrive faster than one process accepts them
ACCEPT_SECONDS = 0.1  # for connections that are being made when the listening socket closes

# A program of the kernel's packet filter that drops each segment with SYN and without ACK: what
# begins a connection, and nothing of those that have begun. Its operations: load the byte of flags,
# mask it, jump if it is not SYN alone, drop, pass.
_NO_SYN = b"".join(
    struct.pack("HBBI", *operation)
    for operation in (
        (0x30, 0, 0, 13),
        (0x54, 0, 0, 0x12),
        (0x15, 0, 1, 0x02),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0xFFFF),
    )
)
_SO_ATTACH_FILTER = 26  # of Linux


class ListenError(Exception):
    """The address can't be listened on; the message names it, and says what to do."""

    def __init__(self, sentence: str, *, of_the_port: bool) -> None:
        super().__init__(sentence)
        self.of_the_port = of_the_port


class _Server(uvicorn.Server):
    """uvicorn's server, stopped by signals with exit code 0, so that no connection is reset.

    From the first signal on the instance is not ready, and each answer ends its connection. For
    `drain_seconds` it goes on to listen, and keeps idle connections: until proxies have noticed.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        protocol: type[LimitedProtocol],
        *,
        stopping: asyncio.Event,
        closing: asyncio.Event,
        drain_seconds: float,
    ) -> None:
        super().__init__(config)
        self._protocol = protocol
        self._stopping = stopping
        self._closing = closing
        self._drain_seconds = drain_seconds

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal ends the wait for proxies."""
        if self._drain_seconds and self.started and not self._stopping.is_set():
            self._stopping.set()
            self._protocol.end_with_answers(self.server_state.connections)
            asyncio.get_running_loop().call_later(self._drain_seconds, self._end_wait, sig, frame)
            return
        self._stopping.set()
        self._closing.set()
        super().handle_exit(sig, frame)

    def _end_wait(self, sig: int, frame: FrameType | None) -> None:
        if not self._closing.is_set():
            self.handle_exit(sig, frame)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept all connections that clients take for made, then close the listening sockets.

        The kernel resets those that wait to be accepted when their socket closes.
        """
        self._protocol.ends_connections = True
        for each in sockets or ():
            refuse_new(each)
        await asyncio.sleep(ACCEPT_SECONDS)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGINT and SIGTERM; unlike uvicorn's own, end with exit code 0 after them."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


class ServiceLoop(CountedCalls, uvloop.Loop):  # type: ignore[misc] # its annotations differ
    """The event loop of an instance; it counts the calls that runs of jobs schedule in it."""


def serve(settings: Settings, registry: Registry) -> None:
    """Run one instance, with the jobs of `registry`, until SIGINT or SIGTERM.

    Raises:
        ListenError: naming the address.
        OpenToNetworkError: there are no keys, and others can reach the address.
        SystemExit: the start failed; the log has the reason.
    """
    limit = open_files.raise_limit()
    stopping, closing = asyncio.Event(), asyncio.Event()
    app = create_app(settings, stopping, registry, closing=closing)

    class Protocol(LimitedProtocol):
        max_connections = open_files.for_clients(settings, limit)
        endings = Endings()
        body_seconds = settings.body_seconds
        proxies = Proxies(settings.proxy_networks) if settings.proxy_networks else None

        @override
        def count_refusal(self, status: int, scope: Scope | None) -> bytes:
            return app.count_refusal(status, scope)

    sockets = [listen(settings.host, settings.port)]
    if settings.shared_port is not None:
        sockets.append(listen(settings.host, settings.shared_port, shared=True))
    config = uvicorn.Config(
        app,
        loop="balance_app.server:ServiceLoop",
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the protocol reads them, of trusted proxies
        headers=[("X-Server-Id", settings.server_id), *ALWAYS],
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.stop_seconds,
    )
    server = _Server(
        config, Protocol, stopping=stopping, closing=closing, drain_seconds=settings.drain_seconds
    )
    try:
        server.run(sockets=sockets)
    except SystemExit:
        if app.gate.open_to_network is not None:
            raise OpenToNetworkError(app.gate.open_to_network) from None
        raise
    finally:
        for each in sockets:
            each.close()


def refuse_new(listener: socket.socket) -> None:
    """Let the kernel drop what begins a connection, where it can: the client tries again later.

    Once the socket is closed, it is refused then, which every proxy takes for "not sent".
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(_NO_SYN)
        described = struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(program))
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Bind a TCP socket; with `shared`, the kernel spreads connections over all such sockets.

    Raises:
        ListenError: naming the address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        sentence = f"Can't listen on HOST={host}: {reason}. {_USE_AN_ADDRESS}"
        raise ListenError(sentence, of_the_port=False) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        advice = _ADVICE.get(error.errno or 0, _USE_AN_ADDRESS)
        sentence = f"Can't listen on {host}:{port}: {error.strerror}. {advice}"
        raise ListenError(sentence, of_the_port=error.errno in _ADVICE) from None
    return listener


_USE_AN_ADDRESS = (
    "HOST is an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them."
)
_ADVICE = {
    errno.EADDRINUSE: "Stop the program that listens there, or choose another port.",
    errno.EACCES: "This user may not listen on a port below 1024: choose another port.",
}
