"""PgBouncer: refused without DB_POOLER; with it, statements mean the same, and faults are told."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from balance_app.balances.model import Accepted, Movement, Refused
from balance_app.db.migrations import migrate
from balance_app.db.outages import Kind
from balance_app.db.pooled import PooledSession, open_pooled
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.sessions import PoolerError, StandbyError
from balance_app.settings import Settings, load_settings
from tests.balances.repositories import repositories
from tests.db.test_sessions import HOSTILE, hostile
from tests.pooler import PGBOUNCER, PgBouncer, pooler
from tests.processes import Instance, as_instance, empty_database, query, served, through
from tests.system.databases import kill, own_postgres, standby_of

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")

LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
NOW = "SELECT name, setting FROM pg_settings WHERE name = ANY ($1)"
WITHDRAW = {"userId": 1, "amount": -1}


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[EmbeddedPostgres]:
    async with own_postgres() as running:
        environment = running.environment()
        await migrate(settings_of(as_instance(environment)).as_owner())
        yield running


@pytest.fixture
async def database(server: EmbeddedPostgres) -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of a migrated database behind no pooler."""
    async with empty_database(server.environment(), "postgres") as variables:
        yield variables


def settings_of(variables: dict[str, str]) -> Settings:
    return load_settings(**{name.lower(): value for name, value in variables.items()})


@asynccontextmanager
async def sessions(
    pooler_: PgBouncer, database: dict[str, str], number: int = 1
) -> AsyncIterator[list[PooledSession]]:
    """Open sessions of requests through a pooler."""
    settings = settings_of(through(pooler_.port, as_instance(database)))
    arguments = {**settings.statement_arguments(), "command_timeout": 30}
    opened: list[PooledSession] = []
    try:
        while len(opened) < number:
            opened += [await open_pooled(arguments)]
        yield opened
    finally:
        for session in opened:
            session.terminate()


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("parameters", ["refused", "dropped"])
async def test_pgbouncer_is_refused_at_start(tmp_path: Path, mode: str, parameters: str) -> None:
    """Whether it refuses startup parameters or drops them; no statement has changed a session."""
    names = load_settings(db_host="x").job_arguments()["server_settings"]
    dropped = ", ".join(names) if parameters == "dropped" else "extra_float_digits"
    async with own_postgres() as server:
        environment = server.environment()
        async with pooler(environment, mode, ignore_startup_parameters=dropped) as running:
            place = {"DB_HOST": "127.0.0.1", "DB_PORT": str(running.port)}
            log = await refused({**environment, **place}, tmp_path)
        assert (await query(environment, LOCKS))[0][0] == 0
    assert "A pooler in front of PostgreSQL breaks sessions" in log
    assert "DB_POOLER=transaction" in log
    assert "DB_DIRECT_URL" in log


async def test_a_pooler_of_statements_is_refused(database: dict[str, str], tmp_path: Path) -> None:
    """It keeps no transaction; the setting names another mode."""
    async with pooler(database, "statement") as running:
        log = await refused(through(running.port, as_instance(database)), tmp_path)
    assert "statement pooling mode" in log


async def test_a_direct_url_to_another_database_is_refused(
    database: dict[str, str], server: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Jobs and requests would work on different tables."""
    async with (
        pooler(database) as running,
        empty_database(server.environment()) as other,
    ):
        await migrate(settings_of(as_instance(other)).as_owner())
        variables = through(running.port, as_instance(database))
        variables["DB_DIRECT_URL"] = through(running.port, as_instance(other))["DB_DIRECT_URL"]
        log = await refused(variables, tmp_path)
    assert "lead to different databases" in log


async def refused(variables: dict[str, str], directory: Path) -> str:
    """Start an instance that must end by itself; return its log."""
    log = directory / "log"
    instance = Instance(variables, log=log)
    try:
        await instance.launch()
        assert instance.process is not None
        assert await asyncio.wait_for(instance.process.wait(), 30) == 3
    finally:
        await instance.kill()
    assert "Traceback" not in log.read_text()
    return log.read_text()


async def test_without_a_pooler_the_setting_changes_nothing(database: dict[str, str]) -> None:
    """The address of DB_HOST may be PostgreSQL's own."""
    variables = through(1, as_instance(database))
    variables |= {name: database[name] for name in ("DB_HOST", "DB_PORT")}
    async with served(variables, JOBS_ENABLED="true") as client:
        assert (await client.post("/api/balance", json=WITHDRAW)).json()["balance"] == 9999


async def test_each_transaction_has_its_settings(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server's defaults are, and whatever another client has left in the session."""
    for name in [name for name in HOSTILE if name.endswith("_timeout")]:
        monkeypatch.setitem(HOSTILE, name, "9s")  # time for the first message
    monkeypatch.delitem(HOSTILE, "session_replication_role")  # refused, as without a pooler
    wanted = settings_of(through(1, as_instance(database))).statement_arguments()
    wanted = {**wanted["server_settings"], "synchronous_commit": "on"}
    async with hostile(database), pooler(database, default_pool_size=1) as running:
        await poison(running, database)
        async with sessions(running, database) as (session,):
            for _ in range(2):
                assert_meant(await shown(session), wanted)
            async with session.transaction(isolation="read_committed"):
                assert_meant(await shown(session), wanted)
        # Nothing of it is left to others.
        (left,) = await through_pooler(running, database, NOW, ["search_path"])
        assert left["setting"] == "poisoned"


async def test_without_the_messages_before_a_statement_the_settings_are_others(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: it is those that set them, and a connection without them is not used."""
    monkeypatch.setattr(PooledSession, "_begin", lambda _self: None)
    async with pooler(database) as running:
        with pytest.raises(PoolerError):
            async with sessions(running, database):
                pass


async def shown(session: PooledSession) -> dict[str, str]:
    names = [*HOSTILE, "transaction_isolation", "enable_seqscan"]
    return {row["name"]: row["setting"] for row in await session.fetch(NOW, names)}


def assert_meant(found: dict[str, str], wanted: dict[str, str]) -> None:
    """Compare settings; times are shown without their units."""
    expected = {**wanted, "transaction_isolation": "read committed", "transaction_timeout": "0"}
    for name, value in found.items():
        if name in {
            "idle_session_timeout",
            "session_replication_role",
        }:  # the pooler's; superusers'
            continue
        assert value == expected[name].removesuffix("ms").replace("10s", "10000"), name


async def poison(running: PgBouncer, database: dict[str, str]) -> None:
    """Leave settings in the only session of a pooler, as a client does that uses SET."""
    for text in (
        "SET search_path = poisoned",
        "SET synchronous_commit = off",
        "SET statement_timeout = '1h'",
        "SET TimeZone = 'Pacific/Chatham'",
        "SET default_transaction_isolation = 'repeatable read'",
    ):
        await through_pooler(running, database, text)


async def through_pooler(
    running: PgBouncer, database: dict[str, str], sql: str, *arguments: object
) -> list[asyncpg.Record]:
    """Run a statement as another client of the pooler with the same role."""
    connection = await asyncpg.connect(
        host="127.0.0.1",
        port=running.port,
        user=as_instance(database)["DB_USER"],
        database=database["DB_NAME"],
        statement_cache_size=0,
    )
    try:
        return await connection.fetch(sql, *arguments)
    finally:
        connection.terminate()


async def test_sessions_share_fewer_of_postgresql(database: dict[str, str]) -> None:
    """No statement needs what another session has parsed, and each is one transaction."""
    async with (
        pooler(database, default_pool_size=2) as running,
        sessions(running, database, 12) as opened,
    ):
        found = await asyncio.gather(*(use(each, number) for number, each in enumerate(opened)))
    assert len(set().union(*found)) == 2


async def use(session: PooledSession, number: int) -> set[int]:
    """Run statements, and some that fail; return the processes of PostgreSQL that ran them."""
    pids = set()
    for turn in range(40):
        added = (number + turn) % 7
        rows = await session.fetch(f"SELECT pg_backend_pid(), $1::bigint + {added} AS sum", number)
        assert rows[0]["sum"] == number + added
        pids.add(rows[0]["pg_backend_pid"])
        with pytest.raises(asyncpg.DivisionByZeroError):
            await session.fetch("SELECT 1 / $1::bigint", 0)
        with pytest.raises(asyncpg.DataError):
            await session.fetch("SELECT $1::bigint", "no number")
        async with session.transaction(isolation="read_committed"):
            own = {await session.fetchval("SELECT pg_backend_pid()") for _ in range(3)}
        assert len(own) == 1
    return pids


async def test_a_standby_behind_a_pooler_answers_nothing() -> None:
    """A pooler may lead to another server than it did when the session was opened."""
    async with own_postgres(wal_level="replica") as primary:
        await migrate(settings_of(as_instance(primary.environment())).as_owner())
        async with standby_of(primary) as standby, pooler(standby.environment()) as running:
            settings = settings_of(through(running.port, as_instance(primary.environment())))
            with pytest.raises(StandbyError):
                await open_pooled({**settings.statement_arguments(), "command_timeout": 30})


async def test_a_pooler_that_restarts_costs_no_answer(database: dict[str, str]) -> None:
    """Each request is answered, by 503 at worst, and what is acknowledged is there."""
    async with (
        pooler(database) as running,
        served(through(running.port, as_instance(database))) as client,
    ):
        ended = asyncio.Event()
        clients = [asyncio.create_task(withdraw(client, ended)) for _ in range(8)]
        for _ in range(3):
            await asyncio.sleep(0.2)
            await running.kill()
            await asyncio.sleep(0.2)
            await running.start()
            await available(client)
        ended.set()
        answers = [each for task in clients for each in await task]
        balance = (await client.get("/api/users/1")).json()["balance"]
    assert {each.status_code for each in answers} == {200, 503}
    accepted = sum(each.status_code == 200 for each in answers)
    unknown = sum(each.json().get("applied") == "unknown" for each in answers)
    assert accepted <= 10_000 - balance <= accepted + unknown


async def test_a_pooler_without_a_free_session_is_a_full_house(database: dict[str, str]) -> None:
    """It says itself that it has sent nothing."""
    async with (
        pooler(database, default_pool_size=1, query_wait_timeout=1) as running,
        served(through(running.port, as_instance(database))) as client,
    ):
        async with held(running, database):
            answers = await asyncio.gather(
                *(client.post("/api/balance", json=WITHDRAW) for _ in range(20))
            )
        found = {(each.status_code, each.json()["applied"]) for each in answers}
        assert found == {(503, "no")}
        assert Kind.FULL.value.removesuffix(".") in answers[0].json()["detail"]
        await available(client)
        balance = (await client.post("/api/balance", json=WITHDRAW)).json()["balance"]
    assert balance == 9999


async def test_changes_that_go_together_pass_it(database: dict[str, str]) -> None:
    """Group commit needs no more of a session than one transaction."""
    async with pooler(database, default_pool_size=2) as running:
        variables = through(running.port, as_instance(database)) | {"BALANCE_GROUP_COMMIT": "true"}
        async with repositories(variables) as (app,):
            user_id = await app.opened(300)
            outcomes = await asyncio.gather(
                *(app.balances.change(Movement(user_id, -2, f"{n}")) for n in range(300))
            )
    assert Counter(map(type, outcomes)) == {Accepted: 150, Refused: 150}
    made = "SELECT count(DISTINCT xmin::text) FROM entries WHERE user_id = $1 AND version > 1"
    assert (await query(database, made, user_id))[0]["count"] == 1


@asynccontextmanager
async def held(running: PgBouncer, database: dict[str, str]) -> AsyncIterator[None]:
    """Hold the only session of a pooler in a transaction of another client."""
    connection = await asyncpg.connect(
        host="127.0.0.1",
        port=running.port,
        user=as_instance(database)["DB_USER"],
        database=database["DB_NAME"],
        statement_cache_size=0,
    )
    await connection.execute("BEGIN")
    try:
        yield
    finally:
        await connection.execute("COMMIT")
        connection.terminate()


async def test_a_pooler_without_its_server_says_so() -> None:
    """PostgreSQL is killed behind it: requests get 503, and are served again when it is back."""
    async with own_postgres() as server:
        environment = server.environment()
        async with (
            pooler(environment, server_login_retry=1) as running,
            served(through(running.port, as_instance(environment))) as client,
        ):
            await client.post("/api/balance", json=WITHDRAW)
            await kill(server)
            for _ in range(5):
                answer = await client.post("/api/balance", json=WITHDRAW)
                assert answer.status_code == 503, answer.text
            assert answer.json()["applied"] == "no"
            await server.start()
            await available(client)
            answer = await client.post("/api/balance", json=WITHDRAW)
            assert answer.status_code == 200, answer.text


async def withdraw(client: httpx.AsyncClient, ended: asyncio.Event) -> list[httpx.Response]:
    """Send one request after another."""
    answers = []
    while not ended.is_set():
        answers.append(await client.post("/api/balance", json=WITHDRAW))
        await asyncio.sleep(0.005)
    return answers


async def available(client: httpx.AsyncClient) -> None:
    """Wait until requests are served."""
    async with asyncio.timeout(30):
        while not (await client.get("/readyz")).is_success:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)
