"""A minimal service behind HTTP/1.1, which is right; tests make it wrong in one way."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

Json = dict[str, Any]


class FakeService:
    """One user in memory behind a minimal HTTP/1.1 server; subclasses override one method.

    `keys` collects the Idempotency-Keys received, `peers` the clients' addresses of changes. The
    port that took a request is the instance's X-Server-Id.
    """

    def __init__(self) -> None:
        self.url = ""
        self.balance = 0
        self.version = 1
        self.held = self.floor = 0
        self.frozen = False
        self.entries: list[Json] = []
        self.keys: list[str] = []
        self.peers: set[object] = set()
        self._serving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            await asyncio.gather(*self._serving, return_exceptions=True)

    def change(self, amount: int) -> tuple[int, Json] | None:
        """Decide one change; None drops the connection instead of answering."""
        if self.affords(amount):
            return self.accept(amount)
        return self.refuse(amount)

    def affords(self, amount: int) -> bool:
        return self.balance - self.held + amount >= self.floor

    def accept(self, amount: int) -> tuple[int, Json]:
        self.balance += amount
        self.version += 1
        self.entries.append({"version": self.version, "amount": amount, "balance": self.balance})
        return 200, self.user()

    def refuse(self, amount: int) -> tuple[int, Json]:
        return 409, {
            "code": "insufficient-funds",
            "userId": 7,
            "balance": self.balance,
            "held": self.held,
            "floor": self.floor,
            "version": self.version,
            "amount": amount,
            "shortfall": self.floor - (self.balance - self.held + amount),
            "applied": "no",
        }

    def user(self) -> Json:
        return {
            "userId": 7,
            "balance": self.balance,
            "version": self.version,
            "held": self.held,
            "floor": self.floor,
            "frozen": self.frozen,
        }

    def page(self, after: int, limit: int) -> tuple[int, Json]:
        newer = [entry for entry in self.entries if entry["version"] > after]
        more = len(newer) > limit
        return 200, {
            "entries": newer[:limit],
            "next": newer[limit - 1]["version"] if more else None,
        }

    async def answer(self, method: str, path: str, body: Json) -> tuple[int, Json] | None:
        if method == "POST" and path == "/api/balance":
            return self.change(body["amount"])
        if method == "POST" and path == "/api/users":
            self.balance, self.version, self.entries = body["balance"], 1, []
            return 201, self.user()
        if match := re.fullmatch(r"/api/users/7/entries\?after=(\d+)&limit=(\d+)", path):
            return self.page(int(match[1]), int(match[2]))
        if path == "/api/users/7":
            return 200, self.user()
        return 404, {"code": "user-not-found"}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._serve_one(reader, writer):
                pass
        writer.close()
        self._serving.discard(task)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        body = json.loads(await reader.readexactly(int(length[1]))) if length else {}
        self.keys += re.findall(r"idempotency-key: (\S+)", head, re.IGNORECASE)
        if path == "/api/balance":
            self.peers.add(writer.get_extra_info("peername"))
        answer = await self.answer(method, path, body)
        if answer is None:
            return False
        status, members = answer
        port = writer.get_extra_info("sockname")[1]
        content = json.dumps(members).encode()
        writer.write(
            f"HTTP/1.1 {status} Said\r\nX-Server-Id: {port}\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        return True
