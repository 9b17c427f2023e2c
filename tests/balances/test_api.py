"""The contract of the balance routes, call by call."""

import httpx


async def test_the_first_user_is_there(client: httpx.AsyncClient) -> None:
    """An empty database comes up with user 1, who has 10000."""
    answer = await client.get("/api/users/1")
    assert answer.status_code == 200
    assert answer.json()["balance"] == 10_000
    assert answer.headers["etag"] == '"1"'


async def test_a_withdrawal_is_answered_with_the_new_balance(client: httpx.AsyncClient) -> None:
    """A change tells the balance and version it made, and becomes the user's next entry."""
    answer = await client.post("/api/balance", json={"userId": 1, "amount": -2})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["userId"], body["balance"], body["version"]) == (1, 9_998, 2)
    assert body["change"]["amount"] == -2
    entries = (await client.get("/api/users/1/entries")).json()["entries"]
    assert [(e["version"], e["amount"], e["balance"]) for e in entries] == [
        (1, 10_000, 10_000),
        (2, -2, 9_998),
    ]
