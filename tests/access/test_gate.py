"""The gate of an instance: new keys, ended ones, guesses, and a database that is away."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from time import monotonic
from types import SimpleNamespace
from typing import Final, cast

import asyncpg
import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from balance_app.access import gate
from balance_app.access.keys import Principal
from balance_app.access.repository import KeyRepository
from balance_app.http.middleware import RequestMiddleware
from tests.access.application import client_at, keys_are_asked_for, serving
from tests.access.keyring import bearer, cookie, log_in, make_key, revoke, unknown
from tests.processes import connect, query

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"
NEVER: Final = 1e6


class Clock:
    """A monotonic clock that hardly moves until it is set."""

    def __init__(self) -> None:
        self.now = monotonic()

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the gate."""
    clock = Clock()
    monkeypatch.setattr(gate, "monotonic", clock)
    return clock


@pytest.fixture
def only_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are not read by and by, but only when a request has one that is not known."""
    monkeypatch.setattr(gate, "REFRESH_SECONDS", NEVER)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the state of the keys was read from the database."""
    times: list[float] = []
    state = KeyRepository.state

    async def noted(self: KeyRepository) -> tuple[int, bool]:
        times.append(monotonic())
        return await state(self)

    monkeypatch.setattr(KeyRepository, "state", noted)
    return times


@asynccontextmanager
async def with_keys(
    database: dict[str, str], **settings: object
) -> AsyncIterator[RequestMiddleware]:
    """Run the application on a database that has a key."""
    async with serving(database):
        await make_key(database)
    async with serving(database, **settings) as app:
        yield app


async def status(app: RequestMiddleware, headers: dict[str, str], at: str = A) -> int:
    """Return what a request gets that reads no row."""
    async with client_at(app, at) as client:
        return (await client.get("/metrics", headers=headers)).status_code


# -- new keys, and guesses -------------------------------------------------------------------


@pytest.mark.usefixtures("only_early")
async def test_a_new_key_works_at_once(database: dict[str, str]) -> None:
    """An instance that has never seen it looks for it."""
    async with with_keys(database) as app:
        key = await make_key(database)
        session = await log_in(database, key)
        assert await status(app, bearer(key)) == 200
        assert await status(app, cookie(session)) == 200


async def test_a_session_in_the_value_of_another_cookie_is_none(database: dict[str, str]) -> None:
    """A comma separates no cookies: a neighbouring host could put somebody into its own session."""
    async with with_keys(database) as app:
        session = await log_in(database, await make_key(database))
        (name, pair), *_ = cookie(session).items()
        assert await status(app, {name: f"x=y; {pair}"}) == 200
        assert await status(app, {name: f"x=y,{pair}"}) == 401
        foreign = pair.partition("=")[0] + "=" + unknown("bs").text
        assert await status(app, {name: f"x=y,{foreign}; {pair}"}) == 200


@pytest.mark.usefixtures("only_early")
async def test_without_the_early_look_a_new_key_is_unknown(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: nothing else makes a new key known at once."""
    async with with_keys(database) as app:
        monkeypatch.setattr(gate, "is_token", lambda _: False)
        assert await status(app, bearer(await make_key(database))) == 401


async def guess(app: RequestMiddleware, number: int, *, at: int = 0) -> None:
    """Send guesses that are well formed, each from an address of its own."""
    for turn in range(number):
        assert await status(app, bearer(unknown()), at=f"10.9.{at}.{turn}") == 401


@pytest.mark.usefixtures("only_early")
async def test_guesses_cost_one_look_a_second(database: dict[str, str], reads: list[float]) -> None:
    """However many keys are guessed, and from however many addresses."""
    async with with_keys(database) as app:
        reads.clear()
        await asyncio.gather(*(guess(app, 2, at=at) for at in range(100)))
        assert len(reads) >= 2
        apart = [later - earlier for earlier, later in pairwise(reads)]
        assert min(apart) >= gate.EARLY_SECONDS - 0.05


@pytest.mark.usefixtures("only_early")
async def test_without_the_limit_each_guess_costs_a_look(
    database: dict[str, str], reads: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the pause between two looks is what bounds them."""
    monkeypatch.setattr(gate, "EARLY_SECONDS", 0.0)
    async with with_keys(database) as app:
        reads.clear()
        await guess(app, 20)
        assert len(reads) == 20


async def test_a_guess_that_is_no_key_costs_no_look(
    database: dict[str, str], reads: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong checksum, a wrong form, a key in another field: nothing is looked for."""
    monkeypatch.setattr(gate, "REFRESH_SECONDS", NEVER)
    async with with_keys(database) as app:
        reads.clear()
        key = (await make_key(database)).text
        for turn, headers in enumerate(
            [
                {"Authorization": f"Bearer {key[:-1]}{'B' if key[-1] == 'A' else 'A'}"},
                {"Authorization": f"Bearer {key}x"},
                {"Authorization": f"Bearer {key} {key}"},
                {"Authorization": f"Bearer {key.upper()}"},
                {"Authorization": f"Basic {key}"},
                {"Authorization": key},
                {"Authorization": "Bearer"},
                {"X-Api-Key": key},
                {"Cookie": f"x={key}"},
                {"Cookie": f"xba={key}"},
                {},
            ]
        ):
            assert await status(app, headers, at=f"10.8.0.{turn}") == 401, headers
        async with client_at(app, B) as client:
            twice = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
            assert (await client.get("/metrics", headers=twice)).status_code == 401
            assert (await client.get(f"/metrics?key={key}")).status_code == 401
        assert reads == []


async def test_wrong_keys_are_slowed_by_address(database: dict[str, str], clock: Clock) -> None:
    """Ten pass in a second, then 429 with the time to wait; nobody else is slowed."""
    async with with_keys(database) as app:
        key = await make_key(database)
        assert await status(app, bearer(key), at=C) == 200
        wrong = {"Authorization": "Bearer wrong"}
        found = Counter(await asyncio.gather(*(status(app, wrong) for _ in range(50))))
        assert found == {401: gate.WRONG_RATE, 429: 50 - gate.WRONG_RATE}
        async with client_at(app, A) as client:
            refused = await client.get("/metrics", headers=wrong)
            assert refused.json()["code"] == "too-many-requests"
            assert refused.headers["retry-after"] == "1"
            # neither a known key at this address, nor what needs none, nor other addresses
            assert (await client.get("/metrics", headers=bearer(key))).status_code == 200
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/metrics")).status_code == 401
        assert await status(app, wrong, at=B) == 401
        clock.now += 0.1
        assert [await status(app, wrong) for _ in range(2)] == [401, 429]


async def test_the_rate_of_a_key_is_its_own(database: dict[str, str], clock: Clock) -> None:
    """With RATE_PER_KEY the sessions of a key count with it, another key does not."""
    async with with_keys(database, rate_per_key=5) as app:
        key, other = await make_key(database), await make_key(database)
        session = await log_in(database, key)
        assert [await status(app, bearer(key)) for _ in range(4)] == [200] * 4
        assert [await status(app, cookie(session)) for _ in range(2)] == [200, 429]
        assert await status(app, bearer(key)) == 429
        assert await status(app, bearer(other)) == 200
        clock.now += 0.2
        assert [await status(app, bearer(key)) for _ in range(2)] == [200, 429]


# -- keys that end ---------------------------------------------------------------------------


async def test_a_key_ends_by_the_clock_of_the_database(
    database: dict[str, str], clock: Clock
) -> None:
    """After it has expired, it and its sessions are refused, without another look."""
    async with with_keys(database) as app:
        key = await make_key(database, seconds=3600)
        session = await log_in(database, key, seconds=7200)
        assert await status(app, bearer(key)) == await status(app, cookie(session)) == 200
        clock.now += 3590
        app.gate._refreshed_at = clock.now
        assert await status(app, bearer(key)) == await status(app, cookie(session)) == 200
        clock.now += 20
        app.gate._refreshed_at = clock.now
        assert await status(app, bearer(key), at=B) == 401
        assert await status(app, cookie(session), at=C) == 401


async def test_revoking_the_last_key_opens_nothing(database: dict[str, str]) -> None:
    """Whether keys are needed is a row, not their number; a new instance reads it, too."""
    async with serving(database) as app:
        key = await make_key(database)
        await keys_are_asked_for(app)
        await revoke(database, key)
    async with serving(database) as app:
        assert await status(app, bearer(key)) == 401
        assert await status(app, {}) == 401


# -- the database is away --------------------------------------------------------------------


@asynccontextmanager
async def away(database: dict[str, str]) -> AsyncIterator[None]:
    """Let the database accept no connection, and end those that it has."""
    name = database["DB_NAME"]
    admin: asyncpg.Connection[asyncpg.Record] = await connect({**database, "DB_NAME": "postgres"})
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await admin.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
    )
    try:
        yield
    finally:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await admin.close()


async def test_known_keys_stay_valid_for_a_minute_without_the_database(
    database: dict[str, str], clock: Clock
) -> None:
    """Then nobody can say whether they were revoked: 503, until the database is back."""
    async with with_keys(database) as app, client_at(app, A) as client:
        key = bearer(await make_key(database))
        assert await status(app, key) == 200
        async with away(database):
            while (await client.get("/readyz")).status_code == 200:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
            assert await status(app, key) == 200
            clock.now += gate.TRUST_SECONDS - 1
            assert await status(app, key) == 200
            # one that is not known may be valid
            assert await status(app, bearer(unknown())) == 503
            clock.now += 1
            late = await client.get("/metrics", headers=key)
            assert (late.status_code, late.json()["code"]) == (503, "database-unavailable")
            assert "retry-after" in late.headers
            change = {"userId": 1, "amount": -1}
            late = await client.post("/api/balance", json=change, headers=key)
            assert (late.status_code, late.json()["applied"]) == (503, "no")
            assert (await client.get("/livez")).status_code == 200
        while await status(app, key) != 200:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)


async def test_without_the_limit_keys_would_be_valid_for_ever(
    database: dict[str, str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: nothing else refuses a key that was revoked while nobody could know."""
    monkeypatch.setattr(gate, "TRUST_SECONDS", float("inf"))
    async with with_keys(database) as app, client_at(app, A) as client:
        key = bearer(await make_key(database))
        assert await status(app, key) == 200
        async with away(database):
            while (await client.get("/readyz")).status_code == 200:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
            clock.now += 3600
            assert await status(app, key) == 200


# -- what a scope is worth -------------------------------------------------------------------


async def test_a_key_for_withdrawals_makes_no_money(database: dict[str, str]) -> None:
    """It lessens and reserves; it adds nothing, moves nothing elsewhere, and undoes nothing."""
    async with with_keys(database) as app, client_at(app, A) as client:
        client.headers.update(bearer(await make_key(database, "withdraw", name="till")))

        async def post(path: str, body: Mapping[str, object]) -> tuple[int, str | None]:
            response = await client.post(f"/api{path}", json=body)
            return response.status_code, response.json().get("code")

        refused = (403, "insufficient-scope")
        assert await post("/balance", {"userId": 1, "amount": -2}) == (200, None)
        assert await post("/balance", {"userId": 1, "amount": 2}) == refused
        assert (await post("/holds", {"userId": 1, "amount": 5, "expiresInSeconds": 60}))[0] == 201
        assert (await post("/holds", {"userId": 1, "amount": 5, "expiresInSeconds": 60}))[0] == 201
        assert await post("/holds/1-1/capture", {}) == (200, None)
        assert await post("/holds/1-2/void", {}) == (200, None)
        transfer = {"fromUserId": 1, "toUserId": 2, "amount": 1}
        assert await post("/transfers", transfer) == refused
        assert await post("/users/1/entries/2/reverse", {}) == refused
        assert await post("/users", {"balance": 1}) == refused
        patched = await client.patch("/api/users/1", json={"floor": -5})
        assert patched.status_code == 403
        assert (await client.get("/api/users/1")).status_code == 403
        rows = await query(
            database, "SELECT amount, by FROM entries WHERE version > 1 ORDER BY version"
        )
        assert [(row["amount"], row["by"]) for row in rows] == [(-2, "till"), (-5, "till")]


async def test_a_form_asks_for_what_its_button_does(database: dict[str, str]) -> None:
    """One address has the forms of an account; each has the scope of the API's route."""
    buttons = {
        "withdraw": {"do": "change", "what": "withdraw", "amount": "1"},
        "add": {"do": "change", "what": "add", "amount": "1"},
        "transfer": {"do": "transfer", "to": "2", "amount": "1"},
        "hold": {"do": "hold", "amount": "1", "lasts": "1", "unit": "hours"},
        "reverse": {"do": "reverse", "entry": "1"},
        "capture": {"do": "capture", "hold": "9", "amount": "1"},
        "void": {"do": "void", "hold": "9"},
        "settings": {"do": "settings", "tag": "9.9.9", "floor": "-1"},
        "freeze": {"do": "freeze", "tag": "9.9.9"},
        "thaw": {"do": "thaw", "tag": "9.9.9"},
    }
    allowed = {
        "withdraw": {"withdraw", "hold", "capture", "void"},
        "change": {"withdraw", "add", "transfer", "hold", "reverse", "capture", "void"},
        "open": {"settings", "freeze", "thaw"},
        "operate": set(),
    }
    async with with_keys(database) as app, client_at(app, A) as client:
        for scope, expected in allowed.items():
            key = bearer(await make_key(database, "read", scope))
            passed = set()
            for name, form in buttons.items():
                data = {**form, "key": f"{scope}-{name}"}
                response = await client.post("/users/1", data=data, headers=key)
                assert response.status_code in {303, 403, 404, 409, 412, 422}, (name, response.text)
                if response.status_code != 403:
                    passed.add(name)
            assert passed == expected, scope


# -- an answer that is under way when its key ends ----------------------------------------------


@pytest.mark.parametrize(
    ("media_type", "ends"),
    [
        ("text/event-stream; charset=utf-8", True),
        ("text/csv; charset=utf-8; header=present", False),
        ("application/jsonl", False),
    ],
)
async def test_a_cut_export_has_no_end(media_type: str, *, ends: bool) -> None:
    """The end of its message would say that it is complete; a stream of events has no other."""

    async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            await send({"type": "http.response.body", "body": b"some", "more_body": True})

    revoked = SimpleNamespace(
        admit_known=lambda *_: Principal("ada", frozenset({"read"}), "id"),
        is_valid=lambda _: False,
    )
    application = RequestMiddleware(
        cast("FastAPI", stream), gate=cast("gate.Gate", revoked), direct={}, log_requests=False
    )
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/api/users/1/entries", "headers": []}
    await application({**scope, "client": (A, 1)}, receive, send)
    assert [message.get("body") for message in sent] == [None, b""][: 1 + ends]


# -- what is remembered of keys ---------------------------------------------------------------


async def test_only_the_headers_of_valid_keys_are_remembered(database: dict[str, str]) -> None:
    """One of each key, until a key changes: neither guesses nor odd forms take memory."""
    async with with_keys(database) as app:
        keys = [await make_key(database) for _ in range(2)]
        texts = [key.text for key in keys]
        forms = [f"{scheme}{key}" for scheme in ("Bearer  ", "bearer ", "Bearer ") for key in texts]
        for form in forms * 2:
            assert await status(app, {"Authorization": form}) == 200
        assert await status(app, bearer(unknown())) == 401
        remembered = app.gate._digests
        assert remembered == {f"Bearer {key.text}".encode(): key.digest for key in keys}
        await revoke(database, keys[0])
        async with asyncio.timeout(10):
            while await status(app, bearer(keys[0])) != 401:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        assert [await status(app, bearer(key)) for key in keys] == [401, 200]
        assert app.gate._digests.keys() == {f"Bearer {texts[1]}".encode()}


@pytest.mark.parametrize("other", ["Basic cHJveHk6cHJveHk=", "Bearer", "Bearer a b", "{session}"])
async def test_what_comes_beside_a_session_is_not_remembered_as_its_key(
    database: dict[str, str], other: str
) -> None:
    """A proxy may send the same header for everybody."""
    async with with_keys(database) as app:
        session = await log_in(database, await make_key(database))
        beside = {"Authorization": other.format(session=session.text)}
        for _ in range(2):
            assert await status(app, cookie(session) | beside) == 200
            assert await status(app, beside) == 401
        assert app.gate._digests == {}


async def test_a_header_that_were_remembered_would_be_believed(database: dict[str, str]) -> None:
    """The control of both."""
    async with with_keys(database) as app:
        key = await make_key(database)
        assert await status(app, bearer(key)) == 200
        beside = {"Authorization": "Basic cHJveHk6cHJveHk="}
        app.gate._digests[beside["Authorization"].encode()] = key.digest
        assert await status(app, beside) == 200
