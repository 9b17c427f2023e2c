"""A load on several accounts at once, and its history in the form that `tests.accounts` checks.

Each connection sends one request after another (changes, transfers, holds, their ends, reversals,
reads of the present and the past) to any instance, and sends it again until it is decided. What has
a key is sometimes looked up by it. Every try is recorded.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from random import choice, choices, randint, random, sample
from time import monotonic
from typing import Any

import asyncpg
import httpx

from tests.accounts.model import (
    Account,
    Capture,
    Change,
    Done,
    Ended,
    Entry,
    Exceeded,
    Hold,
    HoldRead,
    Operation,
    Outcome,
    Past,
    PastRead,
    Place,
    Read,
    Refused,
    Request,
    Reverse,
    Seen,
    State,
    Transfer,
    Try,
    Undecided,
    Void,
)
from tests.processes import connect
from tests.system.client import CONNECTIONS, DECISION_SECONDS, PAUSE_SECONDS, Clients

LARGEST_AMOUNT = 50
RECENT = 64  # entries and holds that are used again
HOLD_SECONDS = (1, 2, 60)  # some expire meanwhile
WEIGHTS = {
    "change": 6,
    "transfer": 8,
    "place": 4,
    "end": 4,
    "reverse": 2,
    "read": 2,
    "read hold": 1,
    "read past": 1,
}

ACCOUNTS = "SELECT id, version, balance, held, floor FROM users WHERE id = ANY($1)"
ENTRIES = """
SELECT user_id, version, amount, balance, key, at, held, other_user_id, other_version, reverses,
       hold
FROM entries WHERE user_id = ANY($1) ORDER BY user_id, version
"""
HOLDS = """
SELECT user_id, number, amount, key, at, expires_at, state, ended_at, captured
FROM holds WHERE user_id = ANY($1) ORDER BY user_id, number
"""


async def read_accounts(database: dict[str, str], user_ids: Sequence[int]) -> dict[int, Account]:
    """Read the whole ledgers, holds and states of accounts in one snapshot."""
    connection = await connect(database)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            accounts = await connection.fetch(ACCOUNTS, user_ids)
            entries = await connection.fetch(ENTRIES, user_ids)
            holds = await connection.fetch(HOLDS, user_ids)
    finally:
        await connection.close()
    return {
        row["id"]: Account(
            tuple(_entry(each) for each in entries if each["user_id"] == row["id"]),
            tuple(_hold(each) for each in holds if each["user_id"] == row["id"]),
            State(row["version"], row["balance"], row["held"]),
            row["floor"],
        )
        for row in accounts
    }


async def read_snapshot(
    connection: "asyncpg.Connection[asyncpg.Record]", user_ids: Sequence[int]
) -> Read:
    """Read the states of accounts in the snapshot of one statement."""
    sent = monotonic()
    rows = await connection.fetch(ACCOUNTS, user_ids)
    states = (
        Seen(row["id"], row["version"], row["balance"], row["held"], row["balance"] - row["held"])
        for row in rows
    )
    return Read(tuple(states), sent, monotonic())


class AccountsLoad(Clients):
    """Clients that use several accounts as fast as they are answered, until they are stopped."""

    def __init__(
        self, urls: Sequence[str], user_ids: Sequence[int], *, connections: int = CONNECTIONS
    ) -> None:
        super().__init__(urls, connections=connections)
        self.operations: list[Operation] = []
        self.outcomes: Counter[str] = Counter()
        self._user_ids = list(user_ids)
        self._entries: deque[tuple[int, int, datetime]] = deque(maxlen=RECENT)
        self._holds: deque[tuple[int, int]] = deque(maxlen=RECENT)

    def figures(self) -> str:
        """Return a summary in one line."""
        return f"outcomes {dict(self.outcomes)}; {super().figures()}"

    async def act(self) -> None:
        """Send a request until it is decided, or read something."""
        (what,) = choices(list(WEIGHTS), list(WEIGHTS.values()))
        match what:
            case "read":
                await self._read()
            case "read hold" if self._holds:
                await self._read_hold(*choice(self._holds))
            case "read past" if self._entries:
                await self._read_past(*choice(self._entries))
            case _:
                await self.decide(self._request_for(what))

    async def decide(self, request: Request) -> Outcome | None:
        """Send a request, again and again if need be; return its outcome, None if there is none."""
        deadline = monotonic() + DECISION_SECONDS
        unknown = False
        while monotonic() < deadline:
            ask = unknown and _key(request) is not None and random() < 0.5
            tried = await (self._look_up(request) if ask else self._send(request))
            if tried is not None and not isinstance(tried.outcome, Undecided):
                name = f"{type(request).__name__} {type(tried.outcome).__name__}"
                self.outcomes[name + (" replayed" if tried.replayed else "")] += 1
                return tried.outcome
            unknown = unknown or (tried is not None and tried.outcome is Undecided.UNKNOWN)
            await asyncio.sleep(PAUSE_SECONDS)
        self.unexpected.append(f"{request} was not decided within {DECISION_SECONDS} s")
        return None

    # -- one try ------------------------------------------------------------------------------

    def _request_for(self, what: str) -> Request:
        user_id, amount, key = choice(self._user_ids), randint(1, LARGEST_AMOUNT), next(self.keys)
        match what:
            case "transfer" if len(self._user_ids) > 1:
                payer, payee = sample(self._user_ids, 2)
                return Transfer(payer, payee, amount, key)
            case "place":
                return Place(user_id, amount, key)
            case "end" if self._holds:
                hold = choice(self._holds)
                ends: list[Request] = [Void(*hold), Capture(*hold), Capture(*hold, amount)]
                return choice(ends)
            case "reverse" if self._entries:
                return Reverse(*choice(self._entries)[:2])
            case _:
                return Change(user_id, choice([amount, -amount]), key)

    async def _send(self, request: Request) -> Try | None:
        """Send a request once; record and return its outcome, None if this try had none."""
        path, body = _route(request)
        key = _key(request)
        sent, answer, answered = await self.request(
            "POST", path, body=body, headers=None if key is None else {"Idempotency-Key": key}
        )
        if isinstance(answer, httpx.ConnectError | httpx.ConnectTimeout):
            return None  # nothing was sent
        outcome: Outcome | None
        replayed = False
        if isinstance(answer, httpx.TransportError):
            outcome = Undecided.UNKNOWN
        elif answer.status_code == 503:
            if answer.json().get("applied") == "unknown":
                outcome = Undecided.UNKNOWN
            elif key is not None:
                outcome = Undecided.NOT_APPLIED
            else:
                return None  # without a key, this is said of this try alone
        else:
            replayed = answer.headers.get("Idempotent-Replayed") == "true"
            outcome = self._outcome(request, answer.status_code, answer.json())
        return self._record(request, outcome, sent, answered, replayed=replayed)

    async def _look_up(self, request: Request) -> Try | None:
        """Look up a key. "Not found" decides nothing: a try may still be under way."""
        user_id = request.payer if isinstance(request, Transfer) else request.user_id
        path = f"/api/users/{user_id}/changes/{_key(request)}"
        sent, answer, answered = await self.request("GET", path)
        if not isinstance(answer, httpx.Response) or answer.status_code != 200:
            return None
        found = answer.json()
        outcome = self._outcome(request, found["status"], found["answer"])
        return self._record(request, outcome, sent, answered, replayed=True)

    def _record(
        self,
        request: Request,
        outcome: Outcome | None,
        sent: float,
        answered: float,
        *,
        replayed: bool,
    ) -> Try | None:
        if outcome is None:
            return None
        tried = Try(request, outcome, sent, answered, replayed)
        self.operations.append(tried)
        if isinstance(outcome, Done):
            if outcome.number is not None:
                self._holds.append((outcome.states[0].user_id, outcome.number))
            elif isinstance(request, Change | Transfer | Capture):
                seen = choice(outcome.states)
                self._entries.append((seen.user_id, seen.version, outcome.at))
        return tried

    def _outcome(self, request: Request, status: int, body: dict[str, Any]) -> Outcome | None:
        """Return the outcome in an answer; record any other answer as unexpected."""
        outcome = _refusal(body) if status == 409 else _done(status, body)
        if outcome is None:
            self.unexpected.append(f"{status} to {request}: {body}")
        return outcome

    # -- reads --------------------------------------------------------------------------------

    async def _read(self) -> None:
        sent, body, answered = await self._get(f"/api/users/{choice(self._user_ids)}")
        if body is not None:
            self.operations.append(Read((_seen(body),), sent, answered))

    async def _read_hold(self, user_id: int, number: int) -> None:
        sent, body, answered = await self._get(f"/api/holds/{user_id}-{number}")
        if body is not None:
            self.operations.append(HoldRead(user_id, number, body["state"], sent, answered))

    async def _read_past(self, user_id: int, version: int, at: datetime) -> None:
        asked = choice((version, at))
        query = {"at": at.isoformat()} if isinstance(asked, datetime) else {"version": str(version)}
        path = httpx.URL(f"/api/users/{user_id}", params=query)
        sent, body, answered = await self._get(str(path))
        if body is not None:
            found = Past(body["version"], body["balance"], body["held"], _time(body["at"]))
            self.operations.append(PastRead(user_id, asked, found, sent, answered))

    async def _get(self, path: str) -> tuple[float, dict[str, Any] | None, float]:
        sent, answer, answered = await self.request("GET", path)
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            return sent, answer.json(), answered
        if isinstance(answer, httpx.Response) and answer.status_code == 404:
            self.unexpected.append(f"404 to {path}")
        return sent, None, answered


def _done(status: int, body: dict[str, Any]) -> Done | None:
    match status, body:
        case 200, {"from": payer, "to": payee, "at": at}:
            return Done((_seen(payer), _seen(payee)), _time(at))
        case 200, {"change": {"at": at}}:
            return Done((_seen(body),), _time(at))
        case 201, {"id": hold_id, "state": "open", "account": account, "at": at}:
            return Done((_seen(account),), _time(at), int(hold_id.split("-")[1]))
        case 200, {"state": "captured" | "voided", "account": account, "endedAt": at}:
            return Done((_seen(account),), _time(at))
        case _:
            return None


def _refusal(body: dict[str, Any]) -> Refused | Ended | Exceeded | None:
    match body:
        case {"code": "insufficient-funds" | "balance-limit-exceeded", "amount": amount}:
            return Refused(_seen(body), amount)
        case {"code": "hold-ended", "state": state, "endedAt": at}:
            return Ended(state, _time(at))
        case {"code": "capture-exceeds-hold", "held": held}:
            return Exceeded(held)
        case _:
            return None


def _key(request: Request) -> str | None:
    return request.key if isinstance(request, Change | Transfer | Place) else None


def _route(request: Request) -> tuple[str, Mapping[str, int | None] | None]:
    """Return the path and the body of a request."""
    match request:
        case Change(user_id, amount):
            return "/api/balance", {"userId": user_id, "amount": amount}
        case Transfer(payer, payee, amount):
            return "/api/transfers", {"fromUserId": payer, "toUserId": payee, "amount": amount}
        case Place(user_id, amount):
            seconds = HOLD_SECONDS[amount % len(HOLD_SECONDS)]  # the same in each try of a key
            return "/api/holds", {"userId": user_id, "amount": amount, "expiresInSeconds": seconds}
        case Capture(user_id, number, amount):
            body = None if amount is None else {"amount": amount}
            return f"/api/holds/{user_id}-{number}/capture", body
        case Void(user_id, number):
            return f"/api/holds/{user_id}-{number}/void", None
        case Reverse(user_id, version):
            return f"/api/users/{user_id}/entries/{version}/reverse", None


def _seen(body: Mapping[str, int]) -> Seen:
    return Seen(body["userId"], body["version"], body["balance"], body["held"], body["available"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _entry(row: asyncpg.Record) -> Entry:
    other = row["other_user_id"], row["other_version"]
    return Entry(
        row["version"],
        row["amount"],
        row["balance"],
        row["key"],
        row["at"],
        row["held"],
        None if None in other else other,
        row["reverses"],
        row["hold"],
    )


def _hold(row: asyncpg.Record) -> Hold:
    return Hold(
        row["number"],
        row["amount"],
        row["key"],
        row["at"],
        row["expires_at"],
        row["state"],
        row["ended_at"],
        row["captured"],
    )
