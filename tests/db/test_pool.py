"""The connection pool and its wait queue."""

import asyncio
from pathlib import Path

import asyncpg
import httpx
import pytest

from balance_app.db import pool as db
from balance_app.db.migrations import migrate
from balance_app.db.outages import Cause, Kind
from balance_app.db.wait_queue import Lane
from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.sessions import Session
from balance_app.settings import Settings, load_settings
from tests.jobs.proxy import Proxy
from tests.processes import Instance, as_instance, connect, http_client


def settings_for(database: dict[str, str], **more: object) -> Settings:
    values = {name.lower(): value for name, value in as_instance(database).items()}
    return load_settings(**values, **more)


async def test_an_interrupted_operation_ends_its_callers_wait(database: dict[str, str]) -> None:
    """An operation that raises CancelledError fails its caller, and the queue goes on."""
    await migrate(settings_for(database).as_owner())
    line = db.Database(settings_for(database))
    await line.start()

    async def cut_off(_connection: db.Connection) -> None:
        raise asyncio.CancelledError

    try:
        for _ in range(7):  # more than there are connections
            with pytest.raises(DatabaseUnavailable) as caught:
                await asyncio.wait_for(line.run(cut_off), 10)
            assert caught.value.applied == "unknown"
        assert await line.run(lambda con: con.fetchval("SELECT 1")) == 1
    finally:
        await line.stop()


@pytest.mark.parametrize("how", ["recovery", "former primary", "control"])
async def test_an_idle_connection_for_jobs_is_not_trusted_for_ever(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """After an outage, or with another primary, it may lead to a server that is cut off."""
    await migrate(settings_for(database).as_owner())
    pool = db.Database(settings_for(database))
    await pool.start()

    async def pid() -> int:
        async with pool.lend() as connection:
            return int(await connection.fetchval("SELECT pg_backend_pid()"))

    try:
        first = await pid()
        if how == "recovery":
            pool._mark_unavailable(Cause(Kind.NO_ANSWER, "unknown"))
            assert pool._recovery is not None
            await asyncio.wait_for(pool._recovery, 20)
        elif how == "former primary":
            former = {*pool._lent_open}
            monkeypatch.setattr(Session, "is_current", lambda session: session not in former)
        assert (await pid() == first) == (how == "control")
    finally:
        await pool.stop()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_server_that_vanishes_keeps_no_connection_for_jobs(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """One that is given back then is closed after a moment, and no longer counts as in use."""
    monkeypatch.setattr(db, "PIN_SECONDS", 0.3 if guarded else None)
    await migrate(settings_for(database).as_owner())
    async with Proxy(database) as proxy:
        pool = db.Database(settings_for(proxy.environment()))
        await pool.start()

        async def use() -> None:
            async with pool.lend() as connection:
                await connection.execute("SELECT")
                proxy.freeze()

        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(use(), 3)
            in_use = pool._lent.get_size() - pool._lent.get_idle_size()
            assert (in_use == 0) is guarded
        finally:
            proxy.heal()
            await pool.stop()


async def test_a_parked_operation_starts_no_worker(database: dict[str, str]) -> None:
    """What waits for its lane is no work for an idle connection; of another lane it is."""
    await migrate(settings_for(database).as_owner())
    pool = db.Database(settings_for(database))
    await pool.start()
    leave = asyncio.Event()

    async def wait(connection: db.Connection) -> int:
        await leave.wait()
        return int(await connection.fetchval("SELECT 1"))

    try:
        one, other = Lane("one"), Lane("other")
        # so that each worker finds a connection
        together = asyncio.Barrier(3)
        async with asyncio.timeout(10):
            await asyncio.gather(*(pool.run(lambda _: together.wait()) for _ in range(3)))
        await asyncio.sleep(0)
        assert len(pool._idle) == 3
        waiting = [asyncio.create_task(pool.run(wait, lane=one)) for _ in range(5)]
        await asyncio.sleep(0)
        assert len(pool._workers) == 1
        waiting.append(asyncio.create_task(pool.run(wait, lane=other)))
        await asyncio.sleep(0)
        assert len(pool._workers) == 2
        leave.set()
        async with asyncio.timeout(10):
            assert await asyncio.gather(*waiting) == [1] * 6
    finally:
        await pool.stop()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_transaction_without_an_answer_is_an_outage(
    database: dict[str, str], *, begun: bool
) -> None:
    """Also when it is the BEGIN or the ROLLBACK of the driver that gets none."""
    await migrate(settings_for(database).as_owner())
    async with Proxy(database) as proxy:
        line = db.Database(settings_for(proxy.environment()))
        await line.start()

        async def freeze(connection: db.Connection) -> None:
            if not begun:
                proxy.freeze()
            async with connection.transaction():
                proxy.freeze()
                await db.read(connection, "SELECT 1")

        try:
            with pytest.raises(DatabaseUnavailable):
                await line.run(freeze)
            if begun:
                # The driver may have closed the connection before its ROLLBACK, which tells nothing
                # of the others: then that is found by the next operation.
                with pytest.raises(DatabaseUnavailable):
                    await line.run(lambda con: db.read(con, "SELECT 1"))
            with pytest.raises(DatabaseUnavailable):
                line.check()
        finally:
            proxy.heal()
            await line.stop()


async def test_what_has_priority_waits_for_as_long_as_it_takes(database: dict[str, str]) -> None:
    """What a request may not: the end of a run, which nobody would send again, is recorded late."""
    await migrate(settings_for(database).as_owner())
    pool = db.Database(settings_for(database, db_pool_size=1, max_waiting_seconds=0.1))
    await pool.start()
    begun, leave = asyncio.Event(), asyncio.Event()

    async def hold(_connection: db.Connection) -> None:
        begun.set()
        await leave.wait()

    async def ask(*, priority: bool) -> int:
        return int(await pool.run(lambda con: con.fetchval("SELECT 1"), priority=priority))

    try:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(pool.run(hold))
            await begun.wait()
            prior = group.create_task(ask(priority=True))
            request = asyncio.create_task(ask(priority=False))
            await asyncio.sleep(0.3)
            leave.set()
        assert await prior == 1
        with pytest.raises(Overloaded):
            await request
    finally:
        await pool.stop()


async def test_overload_is_refused_at_once(database: dict[str, str]) -> None:
    """A request that finds the wait queue full gets a 503 at once, without effect."""
    async with Instance(database, DB_POOL_SIZE="1", MAX_WAITING="1") as instance:
        holder = await connect(database)
        async with http_client(instance.url) as client:

            async def change() -> httpx.Response:
                return await client.post("/api/balance", json={"userId": 1, "amount": -1})

            async with holder.transaction():
                await holder.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
                first = asyncio.create_task(change())
                second = asyncio.create_task(change())
                await _until_a_session_waits_for_a_lock(holder)
                refused = await change()
            answers = [await first, await second]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert refused.status_code == 503
            assert refused.json()["code"] == "overloaded"
            assert refused.json()["applied"] == "no"
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/api/users/1")).json()["balance"] == 9_998
        await holder.close()


async def _until_a_session_waits_for_a_lock(
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    async with asyncio.timeout(10):
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):  # noqa: ASYNC110 - a fact in the database has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"DB_NAME": "no_such_database"}, "no_such_database"),
        ({"DB_HOST": ""}, "No database is configured"),
        ({"PORT": "70000"}, "PORT"),
    ],
)
async def test_a_permanent_fault_ends_the_instance(
    database: dict[str, str], tmp_path: Path, wrong: dict[str, str], message: str
) -> None:
    """An instance that can never serve exits at once, with a sentence and no traceback."""
    log = tmp_path / "log"
    instance = Instance({**database, **wrong}, log=log)
    instance._environment |= wrong
    await instance.launch()
    assert instance.process is not None
    code = await asyncio.wait_for(instance.process.wait(), 30)
    assert code in {1, 2, 3}
    assert message in log.read_text()
    assert "Traceback" not in log.read_text()
