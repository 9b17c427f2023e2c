"""`applied` is true of the request, with all tries of its key; reads have no such member."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from balance_app.balances import model
from balance_app.balances.guard import Guard
from balance_app.balances.repository import BalanceRepository
from balance_app.db.pool import Database
from balance_app.errors import DatabaseUnavailable, Problem
from tests.db.test_pool import settings_for
from tests.history import (
    Accepted,
    Entry,
    Kind,
    Ledger,
    NotApplied,
    Operation,
    State,
    Unknown,
    check,
)
from tests.processes import Instance, connect, served
from tests.system.databases import freeze, own_postgres, session_waits, thaw

KEYED = {"Idempotency-Key": "k"}
NEW_KEY = {"Idempotency-Key": "new"}
CHANGE = {"userId": 1, "amount": -1}
CANCEL_WAITING_COMMITS = (
    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
)
READ = ("/api/users", "/api/users/1", "/api/users/1/entries", "/api/users/1/changes/k")


@pytest.fixture
async def refusing(database: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """An instance that made a change with the key `k`, and has lost its database since."""
    async with served(database) as client:
        made = await client.post("/api/balance", json=CHANGE, headers=KEYED)
        assert made.status_code == 200
        admin = await connect({**database, "DB_NAME": "postgres"})
        await admin.execute(f'ALTER DATABASE "{database["DB_NAME"]}" ALLOW_CONNECTIONS false')
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
            database["DB_NAME"],
        )
        await _until_ready(client, ready=False)
        yield client
        await admin.close()


async def test_a_key_that_was_used_is_never_denied(refusing: httpx.AsyncClient) -> None:
    """Without its database an instance can't know the outcome of a key."""
    for path, body in (("/api/balance", CHANGE), ("/api/users", {"balance": 1})):
        keyed = await refusing.post(path, json=body, headers=KEYED)
        assert (keyed.status_code, keyed.json()["applied"]) == (503, "unknown")
        assert keyed.json()["detail"].endswith("Whether anything was changed is not known.")
        unkeyed = await refusing.post(path, json=body)
        assert (unkeyed.status_code, unkeyed.json()["applied"]) == (503, "no")
        assert unkeyed.json()["detail"].endswith("Nothing was changed.")
    steered = await refusing.post("/api/cron/jobs/none/run")
    assert (steered.status_code, steered.json()["applied"]) == (503, "no")


async def test_a_failed_read_does_not_mention_changes(refusing: httpx.AsyncClient) -> None:
    """Neither in a member nor in the text, for any cause."""
    paths = (*READ, "/api/cron/status", "/api/cron/history", "/api/nothing", "/api/users/x")
    for path in (*paths, "/api/balance"):
        answer = await refusing.get(path)
        assert not answer.is_success, path
        assert "applied" not in answer.json(), path
        assert "changed" not in answer.json()["detail"], path
    assert (await refusing.post("/api/nothing")).json()["applied"] == "no"
    page = (await refusing.get("/")).text
    assert "changed is not known" not in page
    assert "othing was changed" not in page


async def test_a_body_that_never_arrives_leaves_its_key_unknown(database: dict[str, str]) -> None:
    """The try that times out may repeat one that took effect."""
    async with Instance(database, JOBS_ENABLED="false", BODY_SECONDS="0.1") as instance:
        answers = [
            await _half_a_request(instance, headers) for headers in ("", "Idempotency-Key: k\r\n")
        ]
    assert [b'"applied":"no"' in each for each in answers] == [True, False]
    assert [b'"applied":"unknown"' in each for each in answers] == [False, True]
    assert all(each.startswith(b"HTTP/1.1 408") for each in answers)


async def _half_a_request(instance: Instance, headers: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", instance.port)
    head = f"POST /api/balance HTTP/1.1\r\nHost: localhost\r\n{headers}"
    head += "Content-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 26\r\n\r\n".encode())
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_a_try_refused_for_overload_leaves_its_key_unknown(database: dict[str, str]) -> None:
    """Refused for overload, for a lock, or because the instance stops: unknown if it has a key."""
    limits = {"DB_POOL_SIZE": "1", "MAX_WAITING": "1", "DB_LOCK_SECONDS": "1"}
    async with (
        served({**database, **limits}) as client,
        locked(database),
    ):

        async def send(headers: dict[str, str] | None = None) -> dict[str, Any]:
            answer = await client.post("/api/balance", json=CHANGE, headers=headers)
            assert answer.status_code == 503
            body: dict[str, Any] = answer.json()
            return body

        first = asyncio.create_task(send(NEW_KEY))
        await session_waits(database)
        second = asyncio.create_task(send())
        await asyncio.sleep(0.1)
        crowded = [await send(NEW_KEY), await send()]
        assert [each["code"] for each in crowded] == ["overloaded", "overloaded"]
        assert [each["applied"] for each in crowded] == ["unknown", "no"]
        assert [(await first)["applied"], (await second)["applied"]] == ["unknown", "no"]


@asynccontextmanager
async def locked(database: dict[str, str], statement: str = "") -> AsyncIterator[None]:
    """Lock the row of user 1, or what the statement locks, in another transaction."""
    holder = await connect(database)
    try:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute(statement or "SELECT FROM users WHERE id = 1 FOR UPDATE")
        yield
        await transaction.rollback()
    finally:
        await holder.close()


@pytest.mark.parametrize("guarded", [True, False])
async def test_a_history_shows_a_key_that_was_denied(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """The check finds no violation; the control answers "no" for one try instead of the key."""
    if not guarded:
        monkeypatch.setattr(Problem, "under", lambda _problem, _key: None)
    pool = Database(settings_for(database))
    await pool.start()
    try:
        balances, movement = BalanceRepository(pool, Guard(pool, ())), model.Movement(1, -1, "k")
        made = await balances.change(movement)
        assert isinstance(made, model.Accepted)
        assert made.entry is not None
        pool.refuse_requests()
        with pytest.raises(DatabaseUnavailable) as again:
            await balances.change(movement)
    finally:
        await pool.stop()
    tried = NotApplied if again.value.applied == "no" else Unknown
    operations: list[Operation] = [
        Accepted("k", -1, made.entry.version, made.entry.balance, sent=1, answered=2),
        tried("k", -1, sent=3, answered=4),
    ]
    entries = (Entry(1, 10_000, 10_000, None), Entry(2, -1, 9_999, "k"))
    found = {each.kind for each in check(Ledger(entries, State(2, 9_999)), operations)}
    assert found == (set() if guarded else {Kind.NOT_APPLIED_IN_LEDGER})


Lookup = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


def _request(client: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    return client.get("/api/users/1/changes/k")


def _reuse(client: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    return client.post("/api/balance", json={**CHANGE, "amount": -2}, headers=KEYED)


def _repeat(client: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    return client.post("/api/balance", json=CHANGE, headers=KEYED)


@pytest.mark.parametrize(("lookup", "status"), [(_request, 200), (_reuse, 422), (_repeat, 200)])
async def test_an_outcome_is_returned_while_its_account_is_locked(
    client: httpx.AsyncClient, database: dict[str, str], lookup: Lookup, status: int
) -> None:
    """A lookup waits for no row lock, and so blocks no other request."""
    other = (await client.post("/api/users", json={"balance": 1})).json()["userId"]
    assert (await _repeat(client)).status_code == 200
    async with locked(database), asyncio.timeout(5):
        lookups = [asyncio.create_task(_await(lookup(client))) for _ in range(30)]
        change = await client.post("/api/balance", json={"userId": other, "amount": 1})
        assert change.status_code == 200
        assert {(await each).status_code for each in lookups} == {status}


async def _await(answer: Awaitable[httpx.Response]) -> httpx.Response:
    return await answer


@pytest.mark.parametrize("guarded", [True, False])
async def test_an_outcome_that_is_not_replicated_is_not_reported(*, guarded: bool) -> None:
    """Without the synchronous standby, an outcome that a failover would lose is not acknowledged.

    The control reads the key by a bare SELECT, and acknowledges it.
    """
    program = ("-m", "balance_app", "serve") if guarded else ("-m", "tests.mutants", "recall")
    async with (
        own_postgres() as server,
        served(server.environment(), program=program) as client,
    ):
        admin = await connect(server.environment())
        await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await admin.execute("SELECT pg_reload_conf()")
        await _until_equal(admin, "SHOW synchronous_standby_names", "nobody")
        tries = []
        for request in (_repeat, _request, _repeat, _request):
            # Each timed-out wait marks the database unavailable, until the next probe.
            await _until_ready(client, ready=True)
            tries.append(await request(client))
            # A commit that is cancelled while it waits is visible locally.
            await admin.execute(CANCEL_WAITING_COMMITS)
            await _until_equal(admin, "SELECT count(*) FROM idempotency_keys", 1)
        await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()
        await _until_ready(client, ready=True)
        assert (await _request(client)).status_code == 200
    statuses = [each.status_code for each in tries]
    if guarded:
        assert statuses == [503, 503, 503, 503]
        assert [each.json().get("applied") for each in tries] == ["unknown", None] * 2
    else:
        assert 200 in statuses


async def _until_ready(client: httpx.AsyncClient, *, ready: bool) -> None:
    async with asyncio.timeout(20):
        while (await client.get("/readyz")).is_success != ready:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


async def _until_equal(admin: Any, question: str, expected: object) -> None:  # noqa: ANN401 - a connection
    async with asyncio.timeout(20):
        while await admin.fetchval(question) != expected:  # noqa: ASYNC110 - a fact in the database
            await asyncio.sleep(0.02)


async def test_a_frozen_database_denies_no_key() -> None:
    """Neither the try without an answer nor those that were not sent answer "no"."""
    async with (
        own_postgres() as server,
        served(server.environment()) as client,
    ):
        assert (await _repeat(client)).status_code == 200
        await freeze(server)
        try:
            answers = await asyncio.gather(*(_repeat(client) for _ in range(10)))
        finally:
            await thaw(server)
        assert {each.status_code for each in answers} == {503}
        assert {each.json()["applied"] for each in answers} == {"unknown"}
