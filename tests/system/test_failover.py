"""When another host becomes the primary, all that uses the database moves to it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import asyncpg
import httpx
import pytest

from balance_app.db.outages import Kind
from balance_app.db.pool import Database, read
from balance_app.errors import DatabaseUnavailable
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.settings import load_settings
from tests.processes import Instance, as_instance, connect, http_client, served
from tests.system.databases import freeze, hosts, kill, own_postgres, promote, standby_of, thaw
from tests.system.sizes import report_figures


@asynccontextmanager
async def streaming_pair() -> AsyncIterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    async with own_postgres() as primary, standby_of(primary) as standby:
        yield primary, standby


async def make_read_only(server: EmbeddedPostgres) -> None:
    """Begin a switchover as some managers do: the primary only reads from now on."""
    admin = await connect(server.environment())
    await admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    await admin.execute("SELECT pg_reload_conf()")
    await admin.close()


async def change(client: httpx.AsyncClient) -> int:
    return (await client.post("/api/balance", json={"userId": 1, "amount": -1})).status_code


async def fetch(server: EmbeddedPostgres, query: str, *arguments: object) -> Any:  # noqa: ANN401
    admin = await connect(server.environment())
    try:
        return await admin.fetchval(query, *arguments)
    finally:
        await admin.close()


async def until(server: EmbeddedPostgres, condition: str, *arguments: object) -> None:
    """Wait until a query answers true."""
    async with asyncio.timeout(30):
        while not await fetch(server, condition, *arguments):  # noqa: ASYNC110 - of the server
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("end", [freeze, kill, make_read_only], ids=lambda each: each.__name__)
async def test_the_next_primary_is_found(
    end: Callable[[EmbeddedPostgres], Awaitable[None]],
) -> None:
    """Requests and heartbeats go to it, and stay there when the former primary is back."""
    async with streaming_pair() as (primary, standby):
        variables = hosts(primary, standby)
        async with Instance(variables) as instance, http_client(instance.url) as client:
            assert await change(client) == 200
            await until(standby, "SELECT balance = 9999 FROM users")
            await end(primary)
            refused = await change(client)
            await promote(standby)
            began, slowest, accepted = monotonic(), 0.0, False
            async with asyncio.timeout(60):
                while not accepted:
                    sent = monotonic()
                    accepted = await change(client) == 200
                    slowest = max(slowest, monotonic() - sent)
                    await asyncio.sleep(0.05)
            report_figures(
                f"{end.__name__}: accepted again {monotonic() - began:.1f} s after the promotion, "
                f"slowest answer {slowest:.1f} s"
            )
            assert refused == 503
            now = await fetch(standby, "SELECT now()")
            await until(standby, "SELECT max(last_heartbeat_at) > $1 FROM instances", now)
            if end is freeze:
                await thaw(primary)
            assert [await change(client) for _ in range(20)] == [200] * 20
            assert await fetch(standby, "SELECT balance FROM users") == 9_978
            answer = (await client.get("/readyz")).json()
            assert answer["primary"] == f"{standby.socket_directory} port 5432"


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_former_primary_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """A job's transaction on a frozen former primary ends; the control waits for it for ever."""
    async with streaming_pair() as (primary, standby):
        variables = {name.lower(): value for name, value in hosts(primary, standby).items()}
        short = {"db_statement_seconds": 1.0, "db_lock_seconds": 0.5, "db_connect_seconds": 0.5}
        database = Database(load_settings(**variables, **short))
        await database.start()
        if not guarded:
            monkeypatch.setattr(Database, "_leave_other_hosts", lambda *_: None)
        began = asyncio.Event()

        async def work() -> None:
            async with database.lend() as connection:
                await connection.execute("SELECT")
                began.set()
                await connection.execute("SELECT pg_sleep(600)")

        try:
            job = asyncio.create_task(work())
            await began.wait()
            await freeze(primary)
            await promote(standby)
            where = "SELECT current_setting('data_directory') AS directory"
            async with asyncio.timeout(60):
                while True:
                    with suppress(DatabaseUnavailable):
                        (row,) = await database.run(lambda con: read(con, where))
                        break
                    await asyncio.sleep(0.05)
            assert row["directory"] == str(standby.data)
            if guarded:
                with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                    await job
            else:
                assert not job.done()
                job.cancel()
                await asyncio.wait({job})
        finally:
            await thaw(primary)
            await database.stop()


async def test_commands_find_the_primary(tmp_path: Path) -> None:
    """`migrate`, `keys` and `audit` work when the standby is named first."""
    async with streaming_pair() as (primary, standby):
        variables = as_instance(hosts(standby, primary))
        for command in (["migrate"], ["keys", "list"], ["audit"]):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "balance_app", *command),
                env=variables | {"HOME": str(tmp_path)},
                cwd=tmp_path,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            assert process.returncode == 0, output.decode()


async def test_a_server_that_has_become_a_standby_is_not_read() -> None:
    """With one host, too: what it answers may be old. A session that was there before ended."""
    async with own_postgres() as server, served(server.environment()) as client:
        assert await change(client) == 200
        await server.stop()
        (server.data / "standby.signal").touch()
        await server.start()
        async with asyncio.timeout(60):
            while Kind.STANDBY.value != await database_check(client):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert (await client.get("/api/users/1")).status_code == 503


async def database_check(client: httpx.AsyncClient) -> str:
    return str((await client.get("/readyz")).json()["checks"]["database"])
