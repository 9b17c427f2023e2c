"""The contract of the balance routes, call by call."""

import re
from pathlib import Path
from typing import Any, Final

import httpx

from balance_app.maintenance.summaries import RECORD_BALANCES
from tests.processes import connect
from tests.terminal import ROOT

LIMIT = 2**53 - 1


async def test_the_first_user_is_there(client: httpx.AsyncClient) -> None:
    """A new database has user 1, with a balance of 10000."""
    answer = await client.get("/api/users/1")
    assert answer.status_code == 200
    assert answer.json()["balance"] == 10_000
    assert answer.headers["etag"] == '"1.1.0"'


async def test_the_readmes_calls_work_in_their_order(client: httpx.AsyncClient) -> None:
    """On a new database; the second is the refusal that it shows."""
    changes = Path(ROOT, "README.md").read_text().partition("## A change")[2].partition("\n## ")[0]
    calls = re.findall(r"^curl --json '(.*)' http://127.0.0.1:3000(/\S+)$", changes, re.MULTILINE)
    answers = [
        await client.post(path, content=body, headers={"Content-Type": "application/json"})
        for body, path in calls
    ]
    assert [answer.status_code for answer in answers] == [200, 409, 201, 200, 201, 200]


async def test_a_withdrawal_is_answered_with_the_new_balance(client: httpx.AsyncClient) -> None:
    """The answer has the balance and version that the change made; it is the user's next entry."""
    answer = await client.post("/api/balance", json={"userId": 1, "amount": -2})
    assert answer.status_code == 200
    body = answer.json()
    change = body.pop("change")
    assert body == {"userId": 1, "balance": 9_998, "held": 0, "available": 9_998, "version": 2}
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
        "held": 0,
        "available": 10_000,
        "floor": 0,
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
    """On every route with a user id; a transfer says which of both there is not."""
    for answer in (
        await client.post("/api/balance", json={"userId": 99, "amount": 1}),
        await client.post("/api/transfers", json={"fromUserId": 99, "toUserId": 1, "amount": 1}),
        await client.post("/api/transfers", json={"fromUserId": 1, "toUserId": 99, "amount": 1}),
        await client.post("/api/holds", json={"userId": 99, "amount": 1, "expiresInSeconds": 1}),
        await client.post("/api/users/99/entries/1/reverse"),
        await client.patch("/api/users/99", json={"frozen": True}, headers={"If-Match": "*"}),
        await client.get("/api/users/99"),
        await client.get("/api/users/99", params={"version": 1}),
        await client.get("/api/users/99", params={"at": "2026-11-21T21:49:33Z"}),
        await client.get("/api/users/99/settings"),
        await client.get("/api/users/99/holds"),
        await client.get("/api/users/99/entries"),
        await client.get("/api/users/99/entries", params={"after": 5}),
        await client.get("/api/users/99/entries", params={"order": "desc", "reference": "a"}),
        await client.get("/api/users/99/daily-balances"),
        await client.get("/api/users/99/daily-balances", params={"before": "2026-11-21"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "user-not-found")
        assert answer.json()["userId"] == 99
    assert (await client.get("/api/users/1")).json()["version"] == 1


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


PROBLEM: Final = {"type", "title", "status", "detail", "code", "applied"}
STATE: Final = {"userId", "balance", "held", "available", "version"}
ACCOUNT: Final = STATE | {"floor", "frozen", "settingsVersion", "externalId", "createdAt"}
DETAILS: Final = {"amount", "at", "key", "reference", "note", "by"}
TRANSFER: Final = DETAILS | {"id", "from", "to", "reverses", "reversedBy"}
HOLD: Final = DETAILS | {"id", "userId", "state", "expiresAt", "endedAt", "endedBy", "captured"}
ENTRY: Final = DETAILS | {"version", "balance", "held"}
ENTRY_OF: Final = ENTRY | {"transfer", "otherUserId", "reverses", "hold"}
REFUSAL: Final = PROBLEM | STATE | {"floor", "amount"}


async def test_what_each_answer_consists_of(client: httpx.AsyncClient) -> None:
    """A new or missing field changes the contract; a replay has the fields of the first answer."""
    moved = {"fromUserId": 2, "toUserId": 1, "amount": 3}
    held = {"userId": 2, "amount": 5, "expiresInSeconds": 60}
    requests: dict[str, tuple[str, dict[str, int], set[str]]] = {
        "opened": ("users", {"balance": 10}, ACCOUNT),
        "accepted": ("balance", {"userId": 2, "amount": -2}, STATE | {"change"}),
        "transfer": ("transfers", moved, TRANSFER),
        "hold": ("holds", held, HOLD | {"account"}),
        "short": ("balance", {"userId": 2, "amount": -1}, REFUSAL | {"shortfall"}),
        "poor": ("transfers", {**moved, "amount": 9}, REFUSAL | {"shortfall"}),
        "held": ("holds", held, REFUSAL | {"shortfall"}),
        "full": ("balance", {"userId": 1, "amount": LIMIT}, REFUSAL | {"excess"}),
    }
    answers = {}
    for key, (path, body, members) in requests.items():
        sent: dict[str, Any] = {"json": body, "headers": {"Idempotency-Key": key}}
        first, again = [await client.post(f"/api/{path}", **sent) for _ in range(2)]
        assert first.json().keys() == members
        assert (again.headers["idempotent-replayed"], again.content) == ("true", first.content)
        assert again.status_code == first.status_code
        answers[key] = first.json()
        if path == "users":
            continue
        known = (await client.get(f"/api/users/{2 - (key == 'full')}/changes/{key}")).json()
        kind = {"balance": "change", "transfers": "transfer", "holds": "hold"}[path]
        outcome = "accepted" if first.is_success else "refused"
        assert known == {
            "key": key,
            "kind": kind,
            "by": None,
            "outcome": outcome,
            "status": first.status_code,
            "answer": first.json(),
        }
    assert answers["accepted"]["change"].keys() == DETAILS | {"reverses"}
    assert answers["transfer"]["from"].keys() == answers["transfer"]["to"].keys() == STATE
    assert answers["hold"]["account"].keys() == STATE
    reads = {
        "users/2": ACCOUNT,
        "users/2?version=1": {"userId", "version", "balance", "held", "at"},
        f"transfers/{answers['transfer']['id']}": TRANSFER,
        f"holds/{answers['hold']['id']}": HOLD,
    }
    for path, members in reads.items():
        assert (await client.get(f"/api/{path}")).json().keys() == members
    made = await client.post("/api/users/2/entries/2/reverse")
    assert made.json()["change"].keys() == DETAILS | {"reverses"}
    patched = await client.patch(
        "/api/users/2", json={"externalId": "b"}, headers={"If-Match": "*"}
    )
    assert patched.json().keys() == ACCOUNT
    settings = {"settingsVersion", "floor", "frozen", "externalId", "at", "by"}
    for path, one in {
        "users": ACCOUNT,
        "users/2/entries": ENTRY_OF,
        "users/2/holds": HOLD,
        "users/2/settings": settings,
    }.items():
        page = (await client.get(f"/api/{path}")).json()
        name = path.rpartition("/")[2]
        assert page.keys() == {name, "next"}
        assert page[name]
        assert all(each.keys() == one for each in page[name])
