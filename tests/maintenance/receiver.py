"""A receiver of alerts and pings, which can be down, slow, or refuse what it gets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from tests.processes import free_port

PATH = "/hooks/T0PSECRETOFAPATH"


class Request(NamedTuple):
    """What was sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.body)
        return found


class Receiver:
    """An HTTP server whose answers a test chooses."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}{PATH}"
        self.requests: list[Request] = []
        self.status = "204 No Content"
        self.headers = ""
        # while it is set, the answer waits
        self.answers = asyncio.Event()
        self.answers.set()
        self.arrived = asyncio.Event()
        self._server: asyncio.Server | None = None

    @property
    def alerts(self) -> list[dict[str, str]]:
        return [each.json for each in self.requests if each.method == "POST"]

    @property
    def told(self) -> list[tuple[str, str, str | None]]:
        return [(each["event"], each["cause"], each["subject"]) for each in self.alerts]

    @property
    def pings(self) -> list[str]:
        return [each.path for each in self.requests if each.method == "GET"]

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, reuse_address=True
        )

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.split("\r\n")
            method, path, _ = first.split(" ")
            headers = dict(each.lower().split(": ", 1) for each in lines if each)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append(Request(method, path, headers, body))
            self.arrived.set()
            await self.answers.wait()
            writer.write(
                f"HTTP/1.1 {self.status}\r\nContent-Length: 0\r\nConnection: close\r\n"
                f"{self.headers}\r\n".encode()
            )
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    await receiver.start()
    try:
        yield receiver
    finally:
        receiver.answers.set()
        await receiver.stop()
