"""Clients of a proxy that must not notice when instances behind it are replaced.

Each has a connection of its own, and makes changes, with a key and without, and reads. Nothing is
tried again: whatever is not the answer of the service is an error.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from random import choice, random
from time import monotonic
from types import TracebackType
from typing import Final, Self

import httpx
from typing_extensions import override

from tests.history import check
from tests.processes import http_client
from tests.system.client import Load, open_account, read_ledger

_EXPECTED: Final = frozenset({"200", "409", "GET 200"})
SLOW_SECONDS: Final = 2.0
AMOUNTS: Final = (*range(-5, 0), *range(1, 6))


class Clients(Load):
    """Clients with one connection each; half of their changes have no key."""

    def __init__(self, url: str, *, connections: int = 12) -> None:
        super().__init__([url], 0, connections=connections)
        self._url = url
        self._unkeyed_user = 0
        self.unkeyed = 0  # acknowledged
        # requests that took long: for how long, and of which instance, and when
        self.slow: list[tuple[float, str]] = []
        self._began = monotonic()

    async def __aenter__(self) -> Self:
        """Open the accounts, and begin."""
        self._user_id = await open_account(self._url, balance=1_000_000)
        self._unkeyed_user = await open_account(self._url, balance=1_000_000)
        return await super().__aenter__()

    async def act(self) -> None:
        """Make a change, or read."""
        if random() < 0.5:
            await super().act()
            return
        body = {"userId": self._unkeyed_user, "amount": choice(AMOUNTS)}
        _, answer, _ = await self.request("POST", "/api/balance", body=body)
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            self.unkeyed += 1

    @override
    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, int | None] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[float, httpx.Response | httpx.TransportError, float]:
        sent, answer, answered = await super().request(method, path, body=body, headers=headers)
        if answered - sent >= SLOW_SECONDS:
            server = answer.headers.get("x-server-id") if isinstance(answer, httpx.Response) else ""
            self.slow.append((answered - sent, f"{method} at {server} {sent - self._began:.1f} s"))
        if isinstance(answer, httpx.Response) and not _is_of_the_service(answer):
            answer = httpx.RemoteProtocolError("The proxy answered.")
        return sent, answer, answered

    @override
    def _name(self, method: str, answer: httpx.Response, *, keyed: bool) -> str:
        if not _is_of_the_service(answer):
            return f"{answer.status_code} of the proxy to {method}"
        return super()._name(method, answer, keyed=keyed)

    def errors(self) -> Counter[str]:
        """Return what was no answer of the service, by kind."""
        found = Counter({k: n for k, n in self.answers.items() if k not in _EXPECTED})
        return found + Counter(self.unexpected)

    async def check(self) -> list[str]:
        """Compare what clients were told with the ledger; return what disagrees."""
        ledger = await read_ledger(self._url, self._user_id)
        found = [str(each) for each in check(ledger, self.operations)]
        ledger = await read_ledger(self._url, self._unkeyed_user)
        made = len(ledger.entries) - 1
        if made != self.unkeyed:
            found.append(f"{made} changes without a key were made, {self.unkeyed} acknowledged")
        return found


def _is_of_the_service(answer: httpx.Response) -> bool:
    return "x-server-id" in answer.headers


class Viewers:
    """Viewers of the stream of events, each of whom opens it again when it has ended."""

    def __init__(self, url: str, number: int) -> None:
        self._url = url
        self._number = number
        self._tasks: list[asyncio.Task[None]] = []
        self.seen: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        """Open the streams."""
        self._tasks = [asyncio.create_task(self._watch()) for _ in range(self._number)]
        async with asyncio.timeout(20):
            while self.seen["event"] < self._number:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the streams."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        async with http_client(timeout=20) as client:
            while True:
                try:
                    async with client.stream("GET", f"{self._url}/api/cron/events") as stream:
                        self.seen[str(stream.status_code)] += 1
                        async for line in stream.aiter_lines():
                            self.seen["event"] += line.startswith("event: status")
                    self.seen["whole"] += 1
                except httpx.TransportError as error:
                    self.seen[f"broken off: {type(error).__name__}"] += 1
                await asyncio.sleep(0.2)

    def errors(self) -> Counter[str]:
        """Return what was no stream from its beginning to its end."""
        expected = {"200", "event", "whole"}
        return Counter({k: n for k, n in self.seen.items() if k not in expected})

    def figures(self) -> str:
        """Return a summary in one line."""
        return f"streams {dict(self.seen)}"
