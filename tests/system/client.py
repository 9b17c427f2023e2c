"""A load of keyed changes on one account, and its history in the form that `tests.history` checks.

Each connection sends one change after another, each with its own key, until the change is decided:
a try that was not applied is sent again, and one with an unknown outcome is looked up or sent again
with the same key. Every try is recorded.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from random import choice, random
from time import monotonic
from types import TracebackType
from typing import Any, Self, assert_never
from uuid import uuid4

import httpx

from tests.history import (
    Accepted,
    Entry,
    Ledger,
    NotApplied,
    Operation,
    Read,
    Refused,
    State,
    Unknown,
)

CONNECTIONS = 16
AMOUNTS = (*range(-55, 0), *range(1, 51))  # more is withdrawn than deposited: some are refused
PAUSE_SECONDS = 0.05
DECISION_SECONDS = 60
PROGRESS_SECONDS = 60
TIMEOUT_SECONDS = 20  # well above the service's limits, so that a hanging request is detected


async def open_account(url: str, balance: int) -> int:
    """Create a user; return the id."""
    async with _http() as http:
        answer = await http.post(f"{url}/api/users", json={"balance": balance})
        answer.raise_for_status()
        return int(answer.json()["userId"])


async def read_ledger(url: str, user_id: int) -> Ledger:
    """Read the whole ledger of a user that is no longer changed."""
    async with _http() as http:
        account = (await http.get(f"{url}/api/users/{user_id}")).raise_for_status().json()
        entries: list[Entry] = []
        after: int | None = 0
        while after is not None:
            page = await http.get(
                f"{url}/api/users/{user_id}/entries", params={"after": after, "limit": 1000}
            )
            body = page.raise_for_status().json()
            entries += [
                Entry(row["version"], row["amount"], row["balance"], row["key"])
                for row in body["entries"]
            ]
            after = body["next"]
    return Ledger(tuple(entries), State(account["version"], account["balance"]))


@dataclass(frozen=True, slots=True)
class _Try:
    """When a key was sent or looked up, when that was answered, and whether it was a retry."""

    key: str
    sent: float
    answered: float
    replayed: bool


class Clients:
    """Clients of any number of instances, each of which does one thing after another until stopped.

    The names of all answers are counted; those that break the contract are kept as unexpected.
    """

    def __init__(self, urls: Sequence[str], *, connections: int = CONNECTIONS) -> None:
        self.answers: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.slowest_seconds = 0.0
        self.keys = (f"{uuid4().hex[:8]}-{number}" for number in count())
        self._urls = list(urls)
        self._connections = connections
        self._stopping = asyncio.Event()
        self._clients: list[asyncio.Task[None]] = []
        self._http = _http()

    async def act(self) -> None:
        """Do one thing, until it is decided."""
        raise NotImplementedError

    def figures(self) -> str:
        """Return a summary in one line."""
        return f"answers {dict(self.answers)}; slowest request {self.slowest_seconds:.2f} s"

    async def __aenter__(self) -> Self:
        self._clients = [asyncio.create_task(self._work()) for _ in range(self._connections)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Start no more changes; wait until those under way are decided."""
        self._stopping.set()
        if error is not None:
            for client in self._clients:
                client.cancel()
        ends = await asyncio.gather(*self._clients, return_exceptions=True)
        await self._http.aclose()
        for end in ends:
            if error is None and end is not None:
                raise end

    async def progress(self, accepted: int) -> None:
        """Wait until this many more changes are accepted."""
        goal = self.answers["200"] + accepted
        deadline = monotonic() + PROGRESS_SECONDS
        while self.answers["200"] < goal:
            assert monotonic() < deadline, f"stuck: {self.figures()} {self.unexpected[:3]}"
            await asyncio.sleep(0.005)

    async def _work(self) -> None:
        while not self._stopping.is_set():
            await self.act()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, int | None] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[float, httpx.Response | httpx.TransportError, float]:
        """Send a request to any instance; return when it was sent, its answer, and its end."""
        url = choice(self._urls)
        answer: httpx.Response | httpx.TransportError
        sent = monotonic()
        try:
            answer = await self._http.request(method, url + path, json=body, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            answer, name = error, "no connection"
        except httpx.TransportError as error:
            answer, name = error, "cut"
        else:
            name = self._name(method, answer, keyed=headers is not None)
        answered = monotonic()
        self.slowest_seconds = max(self.slowest_seconds, answered - sent)
        self.answers[name] += 1
        return sent, answer, answered

    def _name(self, method: str, answer: httpx.Response, *, keyed: bool) -> str:
        """Return an answer's name for the count; record it if it breaks the contract."""
        if answer.status_code == 503:
            # An earlier try of the key may have had an effect, even if this one was not made.
            applied = answer.json().get("applied")
            expected = {"unknown"} if keyed else {"no", "unknown"} if method == "POST" else {None}
            if "Retry-After" not in answer.headers or applied not in expected:
                self.unexpected.append(f"503 {answer.headers} {answer.text}")
            return f"503 {applied}" if method == "POST" else "GET 503"
        if method == "GET":
            if answer.status_code not in {200, 404}:
                self.unexpected.append(f"{answer.status_code} to {answer.url}: {answer.text}")
            return f"GET {answer.status_code}"
        return str(answer.status_code)


class Load(Clients):
    """Clients that change one account as fast as they are answered, until they are stopped."""

    def __init__(
        self, urls: Sequence[str], user_id: int, *, connections: int = CONNECTIONS
    ) -> None:
        super().__init__(urls, connections=connections)
        self.operations: list[Operation] = []
        self.resolved: Counter[str] = Counter()
        self._user_id = user_id

    async def first_answer_after(self, moment: float) -> float:
        """Wait until a change is decided after a moment; return how many seconds after."""
        deadline = monotonic() + PROGRESS_SECONDS
        while monotonic() < deadline:
            for operation in reversed(self.operations):
                if isinstance(operation, Accepted | Refused) and operation.answered >= moment:
                    return min(
                        each.answered - moment
                        for each in self.operations
                        if isinstance(each, Accepted | Refused) and each.answered >= moment
                    )
            await asyncio.sleep(0.005)
        raise AssertionError(f"nothing is decided: {self.figures()} {self.unexpected[:3]}")

    def figures(self) -> str:
        """Return a summary in one line."""
        acknowledged = len({op.key for op in self.operations if isinstance(op, Accepted)})
        unknown = len({op.key for op in self.operations if isinstance(op, Unknown)})
        return (
            f"{acknowledged} changes acknowledged; {unknown} keys were unknown, "
            f"resolved {dict(self.resolved)}; {super().figures()}"
        )

    # -- one connection -----------------------------------------------------------------------

    async def act(self) -> None:
        """Make a change, and sometimes read the account."""
        await self._decide(next(self.keys), choice(AMOUNTS))
        if random() < 0.1:
            await self._read()

    async def _decide(self, key: str, amount: int) -> None:
        """Send a change, again and again if need be, until it is accepted or refused."""
        deadline = monotonic() + DECISION_SECONDS
        unknown = False
        while monotonic() < deadline:
            ask = unknown and random() < 0.5
            operation = await (self._look_up(key, amount) if ask else self._send(key, amount))
            match operation:
                case Accepted() | Refused():
                    if operation.replayed and not unknown:
                        self.unexpected.append(f"{key} was done, though no try was unknown")
                    if unknown:
                        how = "by asking" if ask else "by sending again"
                        done = "done before" if operation.replayed else "done now"
                        self.resolved[f"{how}: {done}"] += 1
                    return
                case Unknown():
                    unknown = True
                case NotApplied() | None:
                    pass
                case _:
                    assert_never(operation)
            await asyncio.sleep(PAUSE_SECONDS)
        self.unexpected.append(f"{key} was not decided within {DECISION_SECONDS} s")

    async def _send(
        self, key: str, amount: int
    ) -> Accepted | Refused | NotApplied | Unknown | None:
        """Send a change once; record and return its outcome as far as it is known."""
        sent, answer, answered = await self.request(
            "POST",
            "/api/balance",
            body={"userId": self._user_id, "amount": amount},
            headers={"Idempotency-Key": key},
        )
        operation: Accepted | Refused | NotApplied | Unknown
        if isinstance(answer, httpx.ConnectError | httpx.ConnectTimeout):
            return None  # nothing was sent
        if isinstance(answer, httpx.TransportError):
            operation = Unknown(key, amount, sent, answered)
        elif answer.status_code == 503:
            kind = NotApplied if answer.json().get("applied") == "no" else Unknown
            operation = kind(key, amount, sent, answered)
        else:
            replayed = answer.headers.get("Idempotent-Replayed") == "true"
            tried = _Try(key, sent, answered, replayed)
            decided = self._decision(tried, answer.status_code, answer.json())
            if decided is None:
                return None
            operation = decided
        self.operations.append(operation)
        return operation

    async def _look_up(self, key: str, amount: int) -> Accepted | Refused | Unknown:
        """Look up a change. "Not found" decides nothing: a try may still be under way."""
        sent, answer, answered = await self.request(
            "GET", f"/api/users/{self._user_id}/changes/{key}"
        )
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            recorded = answer.json()
            asked = _Try(key, sent, answered, replayed=True)
            decided = self._decision(asked, recorded["status"], recorded["answer"])
            if decided is not None:
                self.operations.append(decided)
                return decided
        return Unknown(key, amount, sent)

    def _decision(
        self, tried: _Try, status: int, body: dict[str, Any]
    ) -> Accepted | Refused | None:
        """Return the decision in an answer; record any other answer as unexpected."""
        match status, body:
            case 200, {"balance": balance, "version": version, "change": {"amount": amount}}:
                kind: type[Accepted | Refused] = Accepted
            case 409, {
                "code": "insufficient-funds",
                "balance": balance,
                "version": version,
                "amount": amount,
                "applied": "no",
            }:
                kind = Refused
            case _:
                self.unexpected.append(f"{status} to {tried.key}: {body}")
                return None
        return kind(tried.key, amount, version, balance, tried.sent, tried.answered, tried.replayed)

    async def _read(self) -> None:
        sent, answer, answered = await self.request("GET", f"/api/users/{self._user_id}")
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            body = answer.json()
            self.operations.append(Read(body["version"], body["balance"], sent, answered))


def _http() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        trust_env=False,
        timeout=TIMEOUT_SECONDS,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )
