"""A TCP proxy between an instance and PostgreSQL that can stop forwarding."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, cast

from tests.processes import free_port


class Proxy:
    """Forwards TCP connections to PostgreSQL, until it is frozen.

    While frozen it buffers what both sides send, closes and new connections included, and reports
    nothing. After `heal` the buffered bytes arrive late, in order. It can also buffer the answers
    alone: PostgreSQL then executes statements whose sender gets no answer.
    """

    def __init__(self, database: dict[str, str]) -> None:
        self._database = database
        self._server: asyncio.Server | None = None
        self._port = 0
        self._links: set[_Link] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._mute = False

    def environment(self) -> dict[str, str]:
        """Return the DB_* variables with which an instance connects through the proxy."""
        return {**self._database, "DB_HOST": "127.0.0.1", "DB_PORT": str(self._port)}

    def freeze(self) -> None:
        """Stop forwarding in both directions."""
        self._flows.clear()

    def hold_answers(self) -> None:
        """Stop forwarding answers."""
        self._mute = True

    def heal(self) -> None:
        """Forward what is buffered, and all that follows."""
        self._mute = False
        self._flows.set()
        for link in list(self._links):
            link.flush()

    def cut(self) -> None:
        """End all connections; what is buffered is lost."""
        for link in list(self._links):
            link.cut()

    def held(self) -> int:
        """Return how many bytes for PostgreSQL are buffered."""
        return sum(link.requests.held() for link in self._links)

    async def connect(self, receiver: "_End") -> None:
        """Connect one end to PostgreSQL, over a socket or an address."""
        await self._flows.wait()
        loop = asyncio.get_running_loop()
        host, port = self._database["DB_HOST"], self._database.get("DB_PORT", "5432")
        if host.startswith("/"):
            await loop.create_unix_connection(lambda: receiver, f"{host}/.s.PGSQL.{port}")
        else:
            await loop.create_connection(lambda: receiver, host, int(port))

    async def __aenter__(self) -> Self:
        self._port = free_port()
        self._server = await asyncio.get_running_loop().create_server(
            self._accept, "127.0.0.1", self._port
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def _accept(self) -> "_End":
        link = _Link(self, requests=_Flow(self._is_frozen), answers=_Flow(self._silent))
        self._links.add(link)
        return link.client

    def _is_frozen(self) -> bool:
        return not self._flows.is_set()

    def _silent(self) -> bool:
        return self._mute or self._is_frozen()

    def forget(self, link: "_Link") -> None:
        """Drop a connection that both sides have ended."""
        self._links.discard(link)


class _Flow:
    """The bytes of one direction of a connection, in order; None closes it."""

    def __init__(self, is_frozen: Callable[[], bool]) -> None:
        self._is_frozen = is_frozen
        self._chunks: list[bytes | None] = []
        self._to: asyncio.Transport | None = None

    def held(self) -> int:
        return sum(len(chunk) for chunk in self._chunks if chunk is not None)

    def connect_to(self, transport: asyncio.Transport) -> None:
        self._to = transport
        self.flush()

    def put(self, chunk: bytes | None) -> None:
        self._chunks.append(chunk)
        self.flush()

    def flush(self) -> None:
        if self._to is None or self._is_frozen():
            return
        chunks, self._chunks = self._chunks, []
        for chunk in chunks:
            if self._to.is_closing():
                return
            if chunk is None:
                self._to.close()
            else:
                self._to.write(chunk)


class _Link:
    """One connection: its two ends and its two directions."""

    def __init__(self, proxy: Proxy, *, requests: _Flow, answers: _Flow) -> None:
        self._proxy = proxy
        self.requests, self.answers = requests, answers
        self.server = _End(self, sends=self.answers, takes=self.requests)
        self.client = _End(
            self, sends=self.requests, takes=self.answers, then=lambda: proxy.connect(self.server)
        )
        self._ended = 0

    def flush(self) -> None:
        self.requests.flush()
        self.answers.flush()

    def ended(self) -> None:
        self._ended += 1
        if self._ended == 2:
            self._proxy.forget(self)

    def cut(self) -> None:
        for end in (self.client, self.server):
            end.cut()


class _End(asyncio.Protocol):
    def __init__(
        self,
        link: _Link,
        *,
        sends: _Flow,
        takes: _Flow,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._link, self._sends, self._takes, self._then = link, sends, takes, then
        self._task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._takes.connect_to(self.transport)
        if self._then is not None:
            self._task = asyncio.get_running_loop().create_task(self._connect(self._then))

    def data_received(self, data: bytes) -> None:
        self._sends.put(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self._sends.put(None)
        self._link.ended()

    def cut(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self.transport is not None:
            self.transport.abort()

    async def _connect(self, then: Callable[[], Awaitable[None]]) -> None:
        try:
            await then()
        except OSError:  # PostgreSQL accepts no connections
            assert self.transport is not None
            self.transport.abort()
            self._link.ended()
