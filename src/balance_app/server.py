"""One instance of the service: its sockets, its signals, uvicorn."""

import asyncio
import contextlib
import errno
import signal
import socket
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
from balance_app.settings import Settings

BACKLOG = 4096  # in a burst, connections arrive faster than one process accepts them


class ListenError(Exception):
    """The address can't be listened on; the message names it, and says what to do."""

    def __init__(self, sentence: str, *, of_the_port: bool) -> None:
        super().__init__(sentence)
        self.of_the_port = of_the_port


class _Server(uvicorn.Server):
    """uvicorn's server, stopped by signals with exit code 0."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping.set()
        super().handle_exit(sig, frame)

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
    stopping = asyncio.Event()
    app = create_app(settings, stopping, registry)

    class Protocol(LimitedProtocol):
        max_connections = open_files.for_clients(settings, limit)
        endings = Endings()
        body_seconds = settings.body_seconds

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
        proxy_headers=False,
        headers=[("X-Server-Id", settings.server_id), *ALWAYS],
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.stop_seconds,
    )
    server = _Server(config, stopping)
    try:
        server.run(sockets=sockets)
    except SystemExit:
        if app.gate.open_to_network is not None:
            raise OpenToNetworkError(app.gate.open_to_network) from None
        raise
    finally:
        for each in sockets:
            each.close()


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
