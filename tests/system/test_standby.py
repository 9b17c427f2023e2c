"""With a synchronous standby an acknowledged change is on both servers, whoever fails then."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from balance_app.local.postgres import EmbeddedPostgres
from tests.processes import connect, served
from tests.system.databases import hosts, kill, own_postgres, promote, standby_of

QUICK = {"DB_STATEMENT_SECONDS": "0.8", "DB_LOCK_SECONDS": "0.5", "DB_CONNECT_SECONDS": "1"}
SYNCHRONOUS = ("ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()")
CANCEL_WAITING_COMMITS = """
SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'
"""
WAITING_COMMITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
SYNCHRONOUS_STANDBYS = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"


@asynccontextmanager
async def synchronous_pair() -> AsyncIterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A primary whose commits wait for its standby."""
    async with own_postgres() as primary, standby_of(primary) as standby:
        admin = await connect(primary.environment())
        try:
            for statement in SYNCHRONOUS:
                await admin.execute(statement)
            async with asyncio.timeout(30):
                while not await admin.fetchval(SYNCHRONOUS_STANDBYS):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        finally:
            await admin.close()
        yield primary, standby


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while not (await client.get("/readyz")).is_success:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


HOLD = {"userId": 1, "amount": 1, "expiresInSeconds": 3600}


async def made_before(client: httpx.AsyncClient) -> dict[str, Any]:
    """Make what the requests need; it is on both servers. Return what their paths name."""

    async def made(path: str, **body: Any) -> dict[str, Any]:  # noqa: ANN401 - of each request
        answer = await client.post(path, json=body)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    return {
        "to_capture": (await made("/api/holds", **HOLD))["id"],
        "to_void": (await made("/api/holds", **HOLD))["id"],
        "version": (await made("/api/balance", userId=1, amount=-1))["version"],
        "other": (await made("/api/users", balance=0))["userId"],
    }


# Requests whose repetitions are answered from a key, and those that find themselves made.
KEYED: dict[str, tuple[str, dict[str, Any]]] = {
    "change": ("POST /api/balance", {"userId": 1, "amount": -2}),
    "transfer": ("POST /api/transfers", {"fromUserId": 1, "toUserId": 2, "amount": 3}),
    "hold": ("POST /api/holds", HOLD),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opening": ("POST /api/users", {"balance": 5}),
    "opening-once": ("PUT /api/users/by-external-id/x", {"balance": 6}),
    "capture": ("POST /api/holds/{to_capture}/capture", {}),
    "void": ("POST /api/holds/{to_void}/void", {}),
    "reversal": ("POST /api/users/1/entries/{version}/reverse", {}),
}
KINDS = KEYED | OTHERS


async def send(client: httpx.AsyncClient, kind: str, before: dict[str, Any]) -> httpx.Response:
    """Send the request of a kind, each time the same."""
    route, body = KINDS[kind]
    method, path = route.format(**before).split()
    headers = {"Idempotency-Key": kind} if kind in {*KEYED, "opening"} else {}
    return await client.request(method, path, json=body, headers=headers)


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_no_replay_acknowledges_what_the_standby_lacks(
    mode: dict[str, str], *, guarded: bool
) -> None:
    """While the standby is away, requests and their repetitions get 503; a failover loses no 2xx.

    The control reads keys by a bare SELECT: it acknowledges what the new primary does not know.
    """
    program = ("-m", "balance_app", "serve") if guarded else ("-m", "tests.mutants", "recall")
    answers: dict[str, list[httpx.Response]] = {}
    async with synchronous_pair() as (primary, standby):
        variables = hosts(primary, standby) | QUICK | mode
        async with served(variables, program=program) as client:
            before = await made_before(client)
            admin = await connect(primary.environment())
            await standby.stop()
            for kind in KINDS if guarded else KEYED:
                answers[kind] = []
                for _ in range(2):
                    await until_ready(client)
                    answers[kind].append(await send(client, kind, before))
                    # A cancelled commit is visible on the primary alone.
                    while await admin.fetchval(WAITING_COMMITS):
                        await admin.fetchval(CANCEL_WAITING_COMMITS)
            accounts = await admin.fetchval("SELECT count(*) FROM users")
            await admin.close()
            await kill(primary)
            await standby.start()
            await promote(standby)
            await until_ready(client)
            found = {
                kind: (await client.get(f"/api/users/1/changes/{kind}")).status_code
                for kind in KEYED
            }
            after = await client.get("/api/users/1")
    assert found == dict.fromkeys(KEYED, 404)
    assert after.json()["balance"] == 9999
    if guarded:
        statuses = {kind: [each.status_code for each in two] for kind, two in answers.items()}
        assert statuses == {kind: [503, 503] for kind in KINDS}
        for kind in (*KEYED, "opening"):
            assert [each.json()["applied"] for each in answers[kind]] == ["unknown", "unknown"]
        assert accounts == 4  # they were made, on the primary
    else:
        assert {two[1].status_code for two in answers.values()} & {200, 201}


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_cancelled_wait_for_the_standby_acknowledges_nothing(
    mode: dict[str, str], *, guarded: bool
) -> None:
    """PostgreSQL reports such a commit as made, with a warning; the control believes it."""
    program = ("-m", "balance_app", "serve") if guarded else ("-m", "tests.mutants", "warnings")
    async with synchronous_pair() as (primary, standby):
        variables = hosts(primary, standby) | mode
        async with served(variables, program=program) as client:
            admin = await connect(primary.environment())
            await standby.stop()
            change = asyncio.create_task(send(client, "change", {}))
            async with asyncio.timeout(30):
                while not await admin.fetchval(CANCEL_WAITING_COMMITS):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            answer = await change
            await admin.close()
            await kill(primary)
            await standby.start()
            await promote(standby)
            await until_ready(client)
            after = await client.get("/api/users/1")
    assert after.json()["balance"] == 10_000
    if guarded:
        assert (answer.status_code, answer.json()["applied"]) == (503, "unknown")
        assert "standby" in answer.json()["detail"]
    else:
        assert answer.status_code == 200
