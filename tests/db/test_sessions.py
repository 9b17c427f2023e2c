"""The semantics of a session do not depend on the server's defaults."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from balance_app.db.pool import Connection
from balance_app.local.postgres import SUPERUSER
from balance_app.sessions import PINNED, PoolerError, open_session, reset
from balance_app.settings import Settings, load_settings
from tests.processes import Instance, connect, http_client, query, running

# Unpinned, these would refuse or repeat changes, delay, misread, hide, or end sessions.
HOSTILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "synchronous_commit": "off",
    "search_path": "elsewhere",
    "session_replication_role": "replica",
    "statement_timeout": "1ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms",
    # Not in every version, so not in the startup packet: set by the first statement.
    "idle_session_timeout": "300ms",
    "transaction_timeout": "300ms",
    "TimeZone": "Pacific/Chatham",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "row_security": "off",
    "standard_conforming_strings": "off",
    "transform_null_equals": "on",
    "array_nulls": "off",
    "exit_on_error": "on",
    "client_min_messages": "debug5",
    "quote_all_identifiers": "on",
}
SETTINGS = "SELECT name, setting FROM pg_settings WHERE name = ANY ($1)"


def settings_for(database: dict[str, str], **more: object) -> Settings:
    return load_settings(**{name.lower(): value for name, value in database.items()}, **more)


@asynccontextmanager
async def hostile(database: dict[str, str]) -> AsyncIterator[None]:
    """Set each default on the database that its server has."""
    admin = await connect(database)
    name = database["DB_NAME"]
    known = {row["name"] for row in await admin.fetch(SETTINGS, list(HOSTILE))}
    for number, setting in enumerate(sorted(known)):
        whose = ("DATABASE {0}", "ROLE {1} IN DATABASE {0}")[number % 2]
        target = whose.format(f'"{name}"', f'"{database["DB_USER"]}"')
        await admin.execute(f"ALTER {target} SET {setting} = '{HOSTILE[setting]}'")
    try:
        yield
    finally:
        await admin.close()


async def test_each_session_pins_what_changes_its_meaning(database: dict[str, str]) -> None:
    """In sessions for requests, for jobs and for all else, whatever the defaults."""
    settings = settings_for(database)
    async with hostile(database):
        pure = await asyncpg.connect(
            host=database["DB_HOST"],
            port=int(database["DB_PORT"]),
            user=database["DB_USER"],
            password=database.get("DB_PASSWORD"),
            database=database["DB_NAME"],
            server_settings={"statement_timeout": "0", "exit_on_error": "off"}
            | dict.fromkeys(("idle_session_timeout", "idle_in_transaction_session_timeout"), "0"),
        )
        found = await pure.fetchval("SHOW default_transaction_isolation")
        assert found == "serializable", "the control: an unpinned session has the defaults"
        await pure.close()
        for arguments in (
            settings.connect_arguments(),
            settings.statement_arguments(),
            settings.job_arguments(),
        ):
            connection = await open_session(arguments)
            await asyncio.sleep(0.4)  # longer than a session may be idle by default
            for again in (False, True):
                if again:
                    await connection.execute(
                        "SET search_path = elsewhere; SET TimeZone = 'Asia/Tokyo'"
                    )
                    await connection.execute("SET synchronous_commit = off; SET ROLE pg_monitor")
                    await connection.execute("CREATE TEMP TABLE users ()")
                    await reset(connection)
                await _check(connection, arguments["server_settings"])
            await connection.close()


async def _check(connection: Connection, pinned: dict[str, str]) -> None:
    names = [*PINNED, "search_path", "synchronous_commit", "session_replication_role"]
    is_now = {
        name: await connection.fetchval("SELECT current_setting($1, true)", name)
        for name in (*names, "idle_session_timeout", "transaction_timeout")
    }
    timeouts = {name for name in pinned if name.endswith("_timeout")}
    assert {name: is_now[name] for name in PINNED if name not in timeouts} == {
        name: value for name, value in PINNED.items() if name not in timeouts
    }
    assert is_now["search_path"] == pinned["search_path"]
    assert is_now["synchronous_commit"] == "on"
    assert is_now["session_replication_role"] == "origin"
    for name in (*timeouts, "idle_session_timeout", "transaction_timeout"):
        assert is_now[name] not in {"1ms", "300ms"}
    assert await connection.fetchval("SELECT current_user = session_user")
    assert await connection.fetchval("SELECT to_regclass('pg_temp.users')") is None


@pytest.mark.parametrize("stricter", ["local", "remote_write", "on", "remote_apply"])
async def test_synchronous_commit_is_raised_only_from_off(
    database: dict[str, str], stricter: str
) -> None:
    """Any durable value stays as the operator has set it, and can't be lowered."""
    await query(
        database, f'ALTER DATABASE "{database["DB_NAME"]}" SET synchronous_commit={stricter}'
    )
    connection = await open_session(settings_for(database).statement_arguments())
    rows = await connection.fetch(
        "SELECT setting, source FROM pg_settings WHERE name = $1", "synchronous_commit"
    )
    assert tuple(rows[0]) == (stricter, "session")  # a reload of the server's file changes nothing
    await connection.close()


async def test_the_service_works_under_hostile_defaults(
    database: dict[str, str], tmp_path: Path
) -> None:
    """It migrates, accepts and refuses exactly, with two instances and no 503; jobs run."""
    async with hostile(database):
        instances = [
            Instance(
                database,
                name,
                log=tmp_path / name,
                JOB_MIN_SECONDS="0",
                JOB_WARM_UP_SECONDS="0",
                DB_USER=SUPERUSER,  # who alone can undo a default of session_replication_role
            )
            for name in ("app1", "app2")
        ]
        async with running(instances), http_client() as client:
            answers = await asyncio.gather(
                *(
                    client.post(
                        f"{instances[number % 2].url}/api/balance",
                        json={"userId": 1, "amount": -100},
                    )
                    for number in range(200)
                )
            )
            statuses = [answer.status_code for answer in answers]
            assert sorted(set(statuses)) == [200, 409]
            assert statuses.count(200) == 100
            outcomes = await _outcomes(database, at_least=3)
            assert set(outcomes) == {"succeeded"}


async def _outcomes(database: dict[str, str], *, at_least: int) -> list[str]:
    connection = await open_session(settings_for(database).connect_arguments())
    try:
        async with asyncio.timeout(20):
            while True:
                rows = await connection.fetch("SELECT outcome FROM job_runs WHERE outcome <> ''")
                if len(rows) >= at_least:
                    return [row["outcome"] for row in rows]
                await asyncio.sleep(0.05)
    finally:
        await connection.close()


async def test_a_prepared_statement_survives_a_migration(database: dict[str, str]) -> None:
    """One that returns other columns since then is prepared again; in a transaction it fails."""
    session = await open_session(settings_for(database).statement_arguments())
    try:
        await session.execute("CREATE TABLE shape (a integer)")
        await session.execute("INSERT INTO shape VALUES (1)")
        for type_, value in (("integer", 1), ("text", "1"), ("bigint", 1)):
            await session.execute(f"ALTER TABLE shape ALTER a TYPE {type_} USING a::{type_}")
            for _ in range(3):
                assert [tuple(row) for row in await session.fetch("SELECT a FROM shape")] == [
                    (value,)
                ]
        await session.execute("ALTER TABLE shape ADD b integer DEFAULT 7")
        await session.fetch("SELECT * FROM shape")
        await session.execute("ALTER TABLE shape DROP b")
        async with session.transaction():
            with pytest.raises(asyncpg.InvalidCachedStatementError):
                await session.fetch("SELECT * FROM shape")
            # what is open is rolled back, so nothing more of it is sent
            raise_later = session.is_in_transaction()
        assert raise_later
    finally:
        session.terminate()


async def test_a_closed_session_says_so(database: dict[str, str]) -> None:
    """Also for a statement that it has prepared."""
    session = await open_session(settings_for(database).statement_arguments())
    for _ in range(2):
        await session.fetch("SELECT 1")
    session.terminate()
    with pytest.raises(asyncpg.InterfaceError):
        await session.fetch("SELECT 1")


async def test_sessions_with_triggers_off_are_refused(database: dict[str, str]) -> None:
    """If the role can't reset session_replication_role, the session is refused, with a sentence."""
    role = f"plain_{database['DB_NAME']}"
    admin = await connect(database)
    await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'x'")
    try:
        await admin.execute(f'ALTER ROLE "{role}" SET session_replication_role = replica')
        plain = {**database, "DB_USER": role, "DB_PASSWORD": "x"}
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="session_replication_role"):
            await open_session(settings_for(plain).connect_arguments())
    finally:
        await admin.execute(f'DROP ROLE "{role}"')
        await admin.close()


async def test_a_pooler_that_drops_startup_parameters_is_detected(database: dict[str, str]) -> None:
    """Such as PgBouncer with `ignore_startup_parameters`: such a session is not used."""
    settings = settings_for(database)
    arguments = settings.connect_arguments()
    del arguments["server_settings"]["balance_app.pinned"]
    with pytest.raises(PoolerError):
        await open_session(arguments)
