"""The contract of the balance routes, call by call."""

from typing import Any

import httpx

from balance_app.maintenance.summaries import RECORD_BALANCES
from tests.processes import connect

LIMIT = 2**53 - 1


async def test_the_first_user_is_there(client: httpx.AsyncClient) -> None:
    """A new database has user 1, with a balance of 10000."""
    answer = await client.get("/api/users/1")
    assert answer.status_code == 200
    assert answer.json()["balance"] == 10_000
    assert answer.headers["etag"] == '"1"'


async def test_a_withdrawal_is_answered_with_the_new_balance(client: httpx.AsyncClient) -> None:
    """The answer has the balance and version that the change made; it is the user's next entry."""
    answer = await client.post("/api/balance", json={"userId": 1, "amount": -2})
    assert answer.status_code == 200
    assert answer.headers["etag"] == '"2"'
    body = answer.json()
    change = body.pop("change")
    assert body == {"userId": 1, "balance": 9_998, "version": 2}
    assert (change["amount"], change["key"]) == (-2, None)
    entries = (await client.get("/api/users/1/entries")).json()["entries"]
    assert [(e["version"], e["amount"], e["balance"]) for e in entries] == [
        (1, 10_000, 10_000),
        (2, -2, 9_998),
    ]
    assert entries[1]["at"] == change["at"]


async def test_a_refusal_proves_itself(client: httpx.AsyncClient) -> None:
    """It has the balance and version that refused it, and changes nothing."""
    answer = await client.post("/api/balance", json={"userId": 1, "amount": -10_001})
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "/problems/insufficient-funds",
        "title": "Insufficient funds",
        "status": 409,
        "detail": "User 1 has 10000; withdrawing 10001 needs 1 more.",
        "code": "insufficient-funds",
        "userId": 1,
        "balance": 10_000,
        "version": 1,
        "amount": -10_001,
        "shortfall": 1,
        "applied": "no",
    }
    assert (await client.get("/api/users/1")).json()["version"] == 1


async def test_the_last_unit_can_be_spent(client: httpx.AsyncClient) -> None:
    """A balance can be reduced to 0 and not below."""
    assert (await client.post("/api/balance", json={"userId": 1, "amount": -10_000})).json()[
        "balance"
    ] == 0
    assert (await client.post("/api/balance", json={"userId": 1, "amount": -1})).status_code == 409


async def test_a_balance_has_an_upper_limit(client: httpx.AsyncClient) -> None:
    """2^53-1 can be reached but not exceeded: JSON readers would round it."""
    reached = await client.post("/api/balance", json={"userId": 1, "amount": LIMIT - 10_000})
    assert reached.json()["balance"] == LIMIT
    passed = await client.post("/api/balance", json={"userId": 1, "amount": 1})
    assert (passed.status_code, passed.json()["code"]) == (409, "balance-limit-exceeded")
    assert passed.json()["excess"] == 1


async def test_an_unknown_user_gets_a_404(client: httpx.AsyncClient) -> None:
    """On every route with a user id."""
    for answer in (
        await client.post("/api/balance", json={"userId": 99, "amount": 1}),
        await client.get("/api/users/99"),
        await client.get("/api/users/99/entries"),
        await client.get("/api/users/99/entries", params={"after": 5}),
        await client.get("/api/users/99/daily-balances"),
        await client.get("/api/users/99/daily-balances", params={"before": "2026-11-21"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "user-not-found")


async def test_users_are_created_and_listed_by_cursor(client: httpx.AsyncClient) -> None:
    """A new user has the next id and an opening entry; pages join without gap or overlap."""
    made = await client.post("/api/users", json={"balance": 3})
    assert made.status_code == 201
    assert made.headers["location"] == "/api/users/2"
    assert (await client.get(made.headers["location"])).json() == made.json()
    assert (await client.post("/api/users", json={})).json()["balance"] == 0
    seen = []
    after: int | None = 0
    while after is not None:
        page = (await client.get("/api/users", params={"after": after, "limit": 2})).json()
        seen += [user["userId"] for user in page["users"]]
        after = page["next"]
    assert seen == [1, 2, 3]


async def test_the_ledger_is_read_by_version(client: httpx.AsyncClient) -> None:
    """The version is the cursor; a page that is exactly full is the last when nothing follows."""
    for _ in range(3):
        await client.post("/api/balance", json={"userId": 1, "amount": -1})
    first = (await client.get("/api/users/1/entries", params={"limit": 2})).json()
    assert [entry["version"] for entry in first["entries"]] == [1, 2]
    assert first["next"] == 2
    rest = (await client.get("/api/users/1/entries", params={"limit": 2, "after": 2})).json()
    assert [entry["balance"] for entry in rest["entries"]] == [9_998, 9_997]
    assert rest["next"] is None
    beyond = (await client.get("/api/users/1/entries", params={"after": 4})).json()
    assert beyond == {"entries": [], "next": None}


async def test_past_balances_are_read_by_day(
    client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """From the latest day back; a day added between two pages is on no page twice."""
    connection = await connect(database)
    await connection.execute("""
        INSERT INTO daily_balances (user_id, day, version, balance, at)
        SELECT user_id, '2026-01-01'::date - age, 1, user_id * 1000 + age, '2026-01-02Z'
        FROM generate_series(1, 2) AS user_id, generate_series(1, 6) AS age
    """)
    address = "/api/users/1/daily-balances"
    all_at_once = (await client.get(address, params={"limit": 6})).json()
    assert all_at_once["next"] is None
    assert [(each["day"], each["balance"]) for each in all_at_once["dailyBalances"]] == [
        (f"2025-12-{32 - age}", 1000 + age) for age in range(1, 7)
    ]

    page = (await client.get(address, params={"limit": 2})).json()
    seen = page["dailyBalances"]
    while page["next"] is not None:
        change = await client.post("/api/balance", json={"userId": 1, "amount": -2})
        await connection.fetchrow(RECORD_BALANCES, 0, 1000)
        page = (await client.get(address, params={"before": page["next"], "limit": 2})).json()
        assert len(page["dailyBalances"]) == 2
        seen += page["dailyBalances"]
    assert seen == all_at_once["dailyBalances"]

    latest, *others = (await client.get(address)).json()["dailyBalances"]
    assert others == all_at_once["dailyBalances"]
    noted = await connection.fetchrow("SELECT day::text, at FROM daily_balances ORDER BY at DESC")
    assert noted is not None
    assert latest == {
        "day": noted["day"],
        "balance": 9_996,
        "version": change.json()["version"],
        "at": noted["at"].isoformat().replace("+00:00", "Z"),
    }
    beyond = (await client.get(address, params={"before": "2025-12-26"})).json()
    assert beyond == {"dailyBalances": [], "next": None}
    await connection.close()


async def test_what_each_answer_consists_of(client: httpx.AsyncClient) -> None:
    """A new or missing field changes the contract; a replay has the fields of the first answer."""
    problem = {"type", "title", "status", "detail", "code", "applied"}
    refusal = problem | {"userId", "balance", "version", "amount"}
    requests: dict[str, tuple[str, dict[str, int], set[str]]] = {
        "opened": ("users", {"balance": 2}, {"userId", "balance", "version", "createdAt"}),
        "accepted": (
            "balance",
            {"userId": 2, "amount": -2},
            {"userId", "balance", "version", "change"},
        ),
        "short": ("balance", {"userId": 2, "amount": -1}, refusal | {"shortfall"}),
        "full": ("balance", {"userId": 1, "amount": LIMIT}, refusal | {"excess"}),
    }
    answers = {}
    for key, (path, body, members) in requests.items():
        sent: dict[str, Any] = {"json": body, "headers": {"Idempotency-Key": key}}
        first, again = [await client.post(f"/api/{path}", **sent) for _ in range(2)]
        assert first.json().keys() == members
        assert (again.headers["idempotent-replayed"], again.content) == ("true", first.content)
        known = (await client.get(f"/api/changes/{key}")).json()
        assert known.keys() == {"key", "outcome", "status", "answer"}
        assert known["answer"] == first.json()
        answers[key] = first.json()
    assert answers["accepted"]["change"].keys() == {"amount", "at", "key"}
    assert (await client.get("/api/users/2")).json().keys() == answers["opened"].keys()
    for path, one in {
        "users": answers["opened"].keys(),
        "users/2/entries": {"version", "amount", "balance", "at", "key"},
    }.items():
        page = (await client.get(f"/api/{path}")).json()
        name = path.rpartition("/")[2]
        assert page.keys() == {name, "next"}
        assert [each.keys() for each in page[name]] == [one, one]
