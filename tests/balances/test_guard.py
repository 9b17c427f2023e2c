"""Requests for a row that another session has locked are refused soon, and delay no others."""

import asyncio
from collections import Counter
from time import monotonic
from typing import Any

import httpx
import pytest

from balance_app.balances import guard
from balance_app.balances.guard import FORGET_SECONDS, Guard
from balance_app.balances.model import Movement
from balance_app.db.pool import Database
from tests.balances.repositories import repositories
from tests.balances.test_applied import KEYED, locked
from tests.db.test_pool import settings_for
from tests.jobs.support import until
from tests.processes import connect, flush_counters, served, unguarded

HOLD_THE_KEY = """
INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
VALUES ('k', 'accepted', 1, 1, 1, 1)
"""
HOLD_THE_OPENING = "INSERT INTO opening_keys (key, user_id, request) VALUES ('k', 1, '{}')"
HOLD_THE_TABLE = "LOCK TABLE users IN ACCESS EXCLUSIVE MODE"
SOON_SECONDS = 2.5
SLACK_SECONDS = 1.5  # of a busy machine


@pytest.mark.parametrize(
    ("path", "body", "held"),
    [
        ("/api/users", {"balance": 1}, HOLD_THE_OPENING),
        ("/api/balance", {"userId": 1, "amount": 1}, HOLD_THE_KEY),
        ("/api/transfers", {"fromUserId": 1, "toUserId": 2, "amount": 1}, HOLD_THE_KEY),
        ("/api/holds", {"userId": 1, "amount": 1, "expiresInSeconds": 60}, HOLD_THE_KEY),
    ],
)
async def test_a_key_under_way_delays_no_other_request(
    client: httpx.AsyncClient,
    database: dict[str, str],
    path: str,
    body: dict[str, int],
    held: str,
) -> None:
    """Only requests with a key that another session has written but not committed are refused."""
    for _ in range(2):
        other = (await client.post("/api/users", json={"balance": 0})).json()["userId"]
    async with locked(database, held):
        began = monotonic()
        pending = [
            asyncio.create_task(client.post(path, json=body, headers=KEYED)) for _ in range(15)
        ]
        await asyncio.sleep(0.1)
        changed = await client.post("/api/balance", json={"userId": other, "amount": 1})
        assert changed.status_code == 200
        assert monotonic() - began < SOON_SECONDS
        answers = await asyncio.gather(*pending)
        assert monotonic() - began < SOON_SECONDS + SLACK_SECONDS
    assert {each.status_code for each in answers} == {503}
    assert {each.json()["applied"] for each in answers} == {"unknown"}
    assert {each.json()["detail"].partition(" ")[0] for each in answers} == {"Another"}
    await asyncio.sleep(1)
    assert (await client.post(path, json=body, headers=KEYED)).is_success


@pytest.mark.parametrize("statement", ["", HOLD_THE_TABLE])
async def test_a_locked_account_is_refused_soon(
    client: httpx.AsyncClient, database: dict[str, str], statement: str
) -> None:
    """Within seconds, and at once while the lock is known; after the lock requests succeed."""
    change = {"userId": 1, "amount": 1}
    async with locked(database, statement):
        began = monotonic()
        first = await client.post("/api/balance", json=change)
        found = monotonic()
        second = await client.post("/api/balance", json=change)
        assert monotonic() - found < SLACK_SECONDS
        assert found - began < SOON_SECONDS + SLACK_SECONDS
    for refused in (first, second):
        assert (refused.status_code, refused.json()["applied"]) == (503, "no")
        assert "locked by another session" in refused.json()["detail"]
    async with asyncio.timeout(10):
        while not (await client.post("/api/balance", json=change)).is_success:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.1)


async def test_many_locked_accounts_leave_room_for_others(database: dict[str, str]) -> None:
    """Accounts known to be locked are probed by one connection only, however many they are."""
    async with served(database, DB_POOL_SIZE="2") as client:
        users = [
            (await client.post("/api/users", json={"balance": 9})).json()["userId"]
            for _ in range(3)
        ]
        holder = await connect(database)
        async with holder.transaction():
            await holder.execute("SELECT FROM users WHERE id = ANY($1) FOR UPDATE", users)
            ends = monotonic() + 6.5

            async def insist(user: int) -> set[int]:
                seen = set()
                while monotonic() < ends:
                    answer = await client.post("/api/balance", json={"userId": user, "amount": 1})
                    seen.add(answer.status_code)
                    await asyncio.sleep(0.05)
                return seen

            crowd = [asyncio.create_task(insist(user)) for user in users for _ in range(3)]
            await asyncio.sleep(4)  # all locks are known
            slowest = 0.0
            while monotonic() < ends - 0.5:
                began = monotonic()
                answer = await client.post("/api/balance", json={"userId": 1, "amount": 1})
                assert answer.status_code == 200
                slowest = max(slowest, monotonic() - began)
                print(monotonic() - ends, monotonic() - began)
                await asyncio.sleep(0.02)
            seen = set().union(*await asyncio.gather(*crowd))
        await holder.close()
    assert seen == {503}
    assert slowest < 1


class Uncounted(Counter[int]):
    """Control: no account has more transfers than another, so each waits with its payer."""

    def __getitem__(self, key: int) -> int:
        return 0


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_payers_of_one_payee_leave_room_for_others(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """Their transfers wait for each other; in lanes of their payers they take all connections."""
    if not guarded:
        monkeypatch.setattr(guard, "Counter", Uncounted)
    async with repositories(database, DB_LOCK_SECONDS=20, DB_STATEMENT_SECONDS=30) as (app,):
        payee, other = await app.opened(), await app.opened()
        payers = [await app.opened(1) for _ in range(20)]
        async with locked(database, f"SELECT FROM users WHERE id = {payee} FOR UPDATE"):
            transfers = [
                asyncio.create_task(app.balances.transfer(Movement(each, -1, to_user_id=payee)))
                for each in payers
            ]
            await asyncio.sleep(0.5)
            change = asyncio.create_task(app.balances.change(Movement(other, 1)))
            await asyncio.wait({change}, timeout=10 if guarded else 1)
            assert change.done() == guarded
        await asyncio.gather(change, *transfers)
        assert (await app.accounts.account(payee)).balance == len(payers)
        assert not app.balances._guard._transfers


async def test_known_locks_are_forgotten(database: dict[str, str]) -> None:
    """An account that is no longer requested does not stay in memory."""
    guard = Guard(Database(settings_for(database)), ())
    for user in range(100):
        guard._hold(user, "", -FORGET_SECONDS - 1)
    guard._hold((1, "key"), "", 1)
    assert set(guard._held) == {(1, "key")}


async def test_ids_that_are_taken_are_named(
    client: httpx.AsyncClient, database: dict[str, str], postgres: dict[str, str]
) -> None:
    """Users were imported with ids beyond the sequence: one clear answer, no error in the log."""
    del postgres
    connection = await connect(database)
    async with unguarded(connection):
        await connection.execute(
            "INSERT INTO users (id, balance, version) SELECT n, 0, 1 FROM generate_series(2, 50) n"
        )
    await flush_counters(connection)
    before = await _rollbacks(connection, database)
    for headers in ({}, KEYED):
        answer = await client.post("/api/users", json={"balance": 5}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "user-id-taken")
        assert "are taken up to 50" in answer.json()["detail"]
        assert answer.json()["applied"] == ("unknown" if headers else "no")
    assert await _rollbacks(connection, database) == before
    await connection.execute(
        "SELECT setval(pg_get_serial_sequence('users', 'id'), max(id)) FROM users"
    )
    opened = await client.post("/api/users", json={"balance": 5}, headers=KEYED)
    assert (opened.status_code, opened.json()["userId"]) == (201, 51)
    await connection.close()


async def _rollbacks(connection: object, database: dict[str, str]) -> int:
    """Return how many transactions failed in this database: each would be in the log."""
    question = "SELECT xact_rollback FROM pg_stat_database WHERE datname = $1"
    return int(await connection.fetchval(question, database["DB_NAME"]))  # type: ignore[attr-defined]


async def test_a_ledger_ahead_of_its_account_is_tried_once(
    client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """A conflict that no retry can resolve is an internal error, not an endless retry."""
    connection = await connect(database)
    await connection.execute(
        "INSERT INTO entries (user_id, version, amount, balance) VALUES (1, 2, 1, 10001)"
    )
    began = monotonic()
    answer = await client.post("/api/balance", json={"userId": 1, "amount": 1}, headers=KEYED)
    assert (answer.status_code, answer.json()["applied"]) == (500, "unknown")
    assert monotonic() - began < SLACK_SECONDS
    await connection.close()


async def test_a_locked_job_delays_no_account(database: dict[str, str]) -> None:
    """Of the controls that wait for a job's row, only one uses a connection."""
    async with served(database, JOBS_ENABLED="true") as client:

        async def declared() -> list[dict[str, Any]]:
            jobs: list[dict[str, Any]] = (await client.get("/api/cron/status")).json()["jobs"]
            return jobs

        name = (await until(declared))[0]["name"]
        async with locked(database, "SELECT FROM jobs FOR UPDATE"):
            path = f"/api/cron/jobs/{name}/pause"
            pressed = [asyncio.create_task(client.post(path, json={})) for _ in range(5)]
            await asyncio.sleep(0.1)
            began = monotonic()
            changed = await client.post("/api/balance", json={"userId": 1, "amount": -1})
            assert changed.status_code == 200
            assert monotonic() - began < SLACK_SECONDS
            answers = await asyncio.gather(*pressed)
    assert {each.status_code for each in answers} == {503}
    assert {each.json()["applied"] for each in answers} == {"no"}
