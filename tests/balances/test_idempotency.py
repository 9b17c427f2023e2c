"""One key has one effect and one answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import pytest

from balance_app.balances.api.schemas import (
    ChangeRequest,
    HoldRequest,
    OpenRequest,
    TransferRequest,
)
from balance_app.http.body import StrictModel
from tests.processes import Instance, query, running
from tests.system.sizes import size

KEYS = size(small=10, full=200)
TRIES = 100


@pytest.fixture
async def two_instances(database: dict[str, str]) -> AsyncIterator[list[Instance]]:
    async with running([Instance(database, "app1"), Instance(database, "app2")]) as instances:
        yield instances


async def test_a_hundred_tries_at_once_have_one_effect(
    two_instances: list[Instance], database: dict[str, str]
) -> None:
    """Each key is sent 100 times at once; half of the keys withdraw more than the balance."""
    bodies = await hammer(two_instances)
    assert all(len(set(answers)) == 1 for answers in bodies)
    accepted = [answers[0] for answers in bodies if answers[0][0] == 200]
    assert len(accepted) == KEYS // 2
    effects = await query(
        database, "SELECT count(*) AS n FROM entries WHERE key IS NOT NULL GROUP BY key"
    )
    balance = (await query(database, "SELECT balance FROM users WHERE id = 1"))[0][0]
    assert [row["n"] for row in effects] == [1] * (KEYS // 2)
    assert balance == 10_000 - KEYS // 2


async def test_without_stored_keys_one_key_has_many_effects(database: dict[str, str]) -> None:
    """The control: an instance that does not store keys gives many answers to one key."""
    async with Instance(database, program=("-m", "tests.mutants", "key")) as instance:
        bodies = await hammer([instance], keys=2)
    assert any(len(set(answers)) > 1 for answers in bodies)


async def hammer(instances: list[Instance], keys: int = KEYS) -> list[list[tuple[int, bytes]]]:
    """Send each of several keys many times at once; return the answers by key."""

    async def send(http: httpx.AsyncClient, number: int, attempt: int) -> tuple[int, bytes]:
        amount = -1 if number % 2 else -20_000
        answer = await http.post(
            f"{instances[attempt % len(instances)].url}/api/balance",
            json={"userId": 1, "amount": amount},
            headers={"Idempotency-Key": f"key-{number}"},
        )
        return answer.status_code, answer.content

    limits = httpx.Limits(max_connections=TRIES)
    async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits) as http:
        return [
            await asyncio.gather(*(send(http, number, attempt) for attempt in range(TRIES)))
            for number in range(keys)
        ]


async def test_a_refusal_is_replayed_after_a_deposit(client: httpx.AsyncClient) -> None:
    """The same key gets the same refusal, byte for byte."""
    withdraw = {"userId": 1, "amount": -10_001}
    key = {"Idempotency-Key": "rent"}
    first = await client.post("/api/balance", json=withdraw, headers=key)
    deposit = await client.post("/api/balance", json={"userId": 1, "amount": 50_000})
    again = await client.post("/api/balance", json=withdraw, headers=key)
    assert (first.status_code, deposit.status_code, again.status_code) == (409, 200, 409)
    assert again.content == first.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (await client.get("/api/users/1")).json()["balance"] == 60_000


async def test_an_accepted_change_is_replayed(client: httpx.AsyncClient) -> None:
    """The answer is the first one, even if the balance has changed since."""
    change = {"userId": 1, "amount": -1}
    first = await client.post("/api/balance", json=change, headers={"Idempotency-Key": "a"})
    await client.post("/api/balance", json=change)
    again = await client.post("/api/balance", json=change, headers={"Idempotency-Key": "a"})
    assert again.content == first.content
    assert again.json()["change"]["key"] == "a"


KEY: Final = {"Idempotency-Key": "k"}
REQUESTS: Final[dict[str, tuple[type[StrictModel], dict[str, Any]]]] = {
    "/api/balance": (
        ChangeRequest,
        {"userId": 1, "amount": -1, "reference": "rent", "note": "May"},
    ),
    "/api/transfers": (
        TransferRequest,
        {"fromUserId": 1, "toUserId": 2, "amount": 1, "reference": "rent", "note": "May"},
    ),
    "/api/holds": (
        HoldRequest,
        {"userId": 1, "amount": 1, "expiresInSeconds": 60, "reference": "rent", "note": "May"},
    ),
    "/api/users": (OpenRequest, {"balance": 5, "floor": -5, "externalId": "a"}),
}
OTHERS: Final = {"amount": 2, "balance": 6, "floor": -6, "expiresInSeconds": 61, "toUserId": 3}


def other(name: str, value: object) -> object:
    """Return another value of a field that is as right, but not the user whose key it is."""
    return OTHERS.get(name, f"{value}!")


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("path", REQUESTS)
async def test_a_key_belongs_to_its_request(
    client: httpx.AsyncClient, path: str, *, accepted: bool
) -> None:
    """A key used with another value in any field is refused, whatever the first outcome."""
    for _ in range(2):
        await client.post("/api/users", json={"balance": 5})
    model, body = REQUESTS[path]
    assert body.keys() == {field.alias for field in model.model_fields.values()}
    if path != "/api/users" and not accepted:
        body = {**body, "amount": body["amount"] * 20_000}
    first = await client.post(path, json=body, headers=KEY)
    assert first.is_success == (accepted or path == "/api/users")
    before = (await client.get("/api/users")).json()
    for name in body.keys() - {"userId", "fromUserId"}:
        changed = {**body, name: other(name, body[name])}
        left_out = {key: value for key, value in body.items() if key != name}
        optional = not model.model_fields[_field(model, name)].is_required()
        for request in (changed, *([left_out] if optional else [])):
            answer = await client.post(path, json=request, headers=KEY)
            assert (answer.status_code, answer.json()["code"]) == (422, "idempotency-key-reused")
    assert (await client.get("/api/users")).json() == before
    again = await client.post(path, json=body, headers=KEY)
    assert (again.status_code, again.content) == (first.status_code, first.content)


def _field(model: type[StrictModel], alias: str) -> str:
    return next(name for name, field in model.model_fields.items() if field.alias == alias)


async def test_a_key_belongs_to_one_kind_of_request(client: httpx.AsyncClient) -> None:
    """A change, a transfer and a hold of the same amount are three requests."""
    await client.post("/api/users", json={"balance": 5})
    requests = {
        "/api/balance": {"userId": 1, "amount": -1},
        "/api/transfers": {"fromUserId": 1, "toUserId": 2, "amount": 1},
        "/api/holds": {"userId": 1, "amount": 1, "expiresInSeconds": 60},
    }
    for first, body in requests.items():
        key = {"Idempotency-Key": first}
        assert (await client.post(first, json=body, headers=key)).is_success
        for path in requests.keys() - {first}:
            reused = await client.post(path, json=requests[path], headers=key)
            assert (reused.status_code, reused.json()["code"]) == (422, "idempotency-key-reused")


async def test_a_key_of_two_users_has_two_effects(
    client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """A key belongs to the account that withdraws, so no user can learn or block another's."""
    for headers in (KEY, {}):
        await client.post("/api/users", json={"balance": 5}, headers=headers)
    for user in (1, 2, 3):
        changed = await client.post(
            "/api/balance", json={"userId": user, "amount": -1}, headers=KEY
        )
        assert (changed.status_code, changed.json()["userId"]) == (200, user)
        found = (await client.get(f"/api/users/{user}/changes/k")).json()
        assert found["answer"] == changed.json()
    # the payee of a transfer may have used its key for something else
    moved = {"fromUserId": 3, "toUserId": 2, "amount": 1}
    paid = await client.post("/api/transfers", json=moved, headers={"Idempotency-Key": "new"})
    spent = await client.post(
        "/api/balance", json={"userId": 2, "amount": -1}, headers={"Idempotency-Key": "new"}
    )
    assert (paid.status_code, spent.status_code) == (200, 200)
    keys = await query(database, "SELECT user_id, key FROM idempotency_keys ORDER BY 2, 1")
    assert [tuple(row) for row in keys] == [(1, "k"), (2, "k"), (3, "k"), (2, "new"), (3, "new")]


async def test_a_user_is_created_once_per_key(client: httpx.AsyncClient) -> None:
    """Also if the request is sent many times at once; the key is none of an account."""

    async def create() -> httpx.Response:
        return await client.post("/api/users", json={"balance": 7}, headers=KEY)

    answers = await asyncio.gather(*(create() for _ in range(20)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert len((await client.get("/api/users")).json()["users"]) == 2
    changed = await client.post("/api/balance", json={"userId": 1, "amount": 7}, headers=KEY)
    assert changed.status_code == 200


async def test_the_outcome_of_a_key_can_be_looked_up(client: httpx.AsyncClient) -> None:
    """`GET /api/users/{userId}/changes/{key}` returns the first answer, accepted or refused."""
    for key, amount in (("yes/1", -1), ("no", -20_000)):
        first = await client.post(
            "/api/balance", json={"userId": 1, "amount": amount}, headers={"Idempotency-Key": key}
        )
        recorded = (await client.get(f"/api/users/1/changes/{key}")).json()
        assert recorded["answer"] == first.json()
        assert recorded["status"] == first.status_code
    for path in ("users/1/changes/never", "users/2/changes/no", "users/99/changes/no"):
        unknown = await client.get(f"/api/{path}")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "key-not-found")


async def test_a_key_of_an_unknown_user_stays_unused(client: httpx.AsyncClient) -> None:
    """A 404 is not stored: the key has no outcome yet."""
    key = {"Idempotency-Key": "k"}
    lost = await client.post("/api/balance", json={"userId": 2, "amount": 1}, headers=key)
    assert lost.json()["code"] == "user-not-found"
    await client.post("/api/users", json={"balance": 0})
    found = await client.post("/api/balance", json={"userId": 2, "amount": 1}, headers=key)
    assert found.status_code == 200
