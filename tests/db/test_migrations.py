"""The schema and its migrations."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from asyncpg.transaction import Transaction
from sqlalchemy.ext.asyncio import create_async_engine

from balance_app.db import migrations
from balance_app.db.migrations import (
    MIGRATION_LOCK,
    RIGHTS,
    VERSION_TABLE,
    UnusableDatabaseError,
    alembic_config,
    alembic_head,
    migrate,
)
from balance_app.settings import Settings, load_settings
from tests.processes import RUN_ROLE, Instance, connect, http_client, query


def settings_for(database: dict[str, str]) -> Settings:
    return load_settings(**{name.lower(): value for name, value in database.items()})


def test_a_new_migration_passes_the_linters(tmp_path: Path) -> None:
    """As `make migration` writes it: only the statements have to be filled in."""
    scripts = tmp_path / "alembic"
    shutil.copytree(Path(alembic_config().get_main_option("script_location") or ""), scripts)
    config = alembic_config()
    config.set_main_option("script_location", str(scripts))
    command.revision(config, "Add holds", rev_id="9999")
    (written,) = scripts.glob("versions/9999_*.py")
    settings = ("--config", str(Path(__file__).parents[2] / "pyproject.toml"), str(written))
    for check in (("check", "--ignore=INP001"), ("format", "--check")):  # as in alembic/
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, *settings],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_the_names_of_the_scripts_are_their_revisions() -> None:
    """In their order: an instance reads the names alone."""
    scripts = ScriptDirectory.from_config(alembic_config())
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert migrations._known_revisions() == tuple(revisions)
    assert alembic_head() == scripts.get_current_head()


async def test_an_instance_imports_alembic_only_to_migrate(database: dict[str, str]) -> None:
    """Neither it nor SQLAlchemy, a fifth of its memory; nor the client of alerts without any.

    The control: who migrates has imported the two.
    """
    program = """
import asyncio, sys
import balance_app.main
from balance_app.db.migrations import migrate
from balance_app.settings import load_settings
asyncio.run(migrate(load_settings()))
print(*sorted({"alembic", "httpx", "sqlalchemy"} & {*sys.modules}))
"""
    for imported in ("alembic sqlalchemy\n", "\n"):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program],
            env={**os.environ, **database},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == imported


async def test_the_tables_are_as_declared(database: dict[str, str]) -> None:
    """The migrations create exactly what the `tables` modules declare."""
    settings = settings_for(database)
    await migrate(settings)
    config = alembic_config()
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(**settings.connect_arguments()),
    )

    def check(connection: object) -> None:
        config.attributes["connection"] = connection
        command.check(config)

    async with engine.connect() as connection:
        await connection.run_sync(check)
    await engine.dispose()


@pytest.mark.parametrize(
    "rewriting",
    ["UPDATE entries SET amount = 1", "DELETE FROM entries", "TRUNCATE entries"],
)
async def test_the_ledger_is_append_only(database: dict[str, str], rewriting: str) -> None:
    """PostgreSQL itself refuses to rewrite an entry."""
    await migrate(settings_for(database))
    connection = await connect(database)
    with pytest.raises(asyncpg.RaiseError, match="append-only"):
        await connection.execute(rewriting)
    await connection.close()


@pytest.mark.parametrize("balance", [-1, 2**53])
async def test_the_check_refuses_an_invalid_balance(database: dict[str, str], balance: int) -> None:
    """No statement, however wrong, can store a balance out of range."""
    await migrate(settings_for(database))
    connection = await connect(database)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("UPDATE users SET balance = $1", balance)
    await connection.close()


# -- schemas of other programs ------------------------------------------------------------------

FOREIGN_VERSION = (
    "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);"
    "INSERT INTO alembic_version VALUES ('{}');"
)
RELATIONS = """
SELECT nspname || '.' || relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' ORDER BY 1
"""


async def everything(connection: "asyncpg.Connection[asyncpg.Record]") -> list[str]:
    return [name for (name,) in await connection.fetch(RELATIONS)]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            FOREIGN_VERSION.format("0001") + "CREATE TABLE users (id int)",
            "alembic_version says 0001",
        ),
        (FOREIGN_VERSION.format("0003"), "alembic_version says 0003"),
        (FOREIGN_VERSION.format("ae10"), "alembic_version says ae10"),
        ("CREATE TABLE alembic_version (version_num int)", "alembic_version says nothing"),
        ("CREATE TABLE balance_app_version (a int)", "balance_app_version says nothing"),
        ("CREATE TABLE users (id int)", "has users, but no version"),
        ("CREATE TABLE jobs (id int); CREATE VIEW entries AS SELECT 1", "has entries and jobs"),
        ("CREATE SEQUENCE instances", "has instances"),
        ("CREATE TYPE users AS ENUM ('a')", 'type "users" already exists'),
        ("CREATE FUNCTION hold_lease() RETURNS int RETURN 1", 'function "hold_lease" already'),
        ("CREATE FUNCTION refuse_rewriting() RETURNS int RETURN 1", '"refuse_rewriting" already'),
        (
            "CREATE TABLE x (a int); CREATE INDEX jobs_round_idx ON x (a)",
            '"jobs_round_idx" already',
        ),
    ],
)
async def test_the_schema_of_another_program_is_left_alone(
    database: dict[str, str], there: str, message: str
) -> None:
    """One sentence says what was found and what to do; nothing is written. Another schema works."""
    connection = await connect(database)
    await connection.execute(there)
    before = await everything(connection)
    with pytest.raises(UnusableDatabaseError) as refused:
        await migrate(settings_for(database))
    sentence = str(refused.value)
    assert message in sentence
    assert "DB_SCHEMA" in sentence
    assert "\n" not in sentence
    assert await everything(connection) == before
    await migrate(settings_for({**database, "DB_SCHEMA": "own-1"}))
    after = await everything(connection)
    await connection.close()
    assert [name for name in after if not name.startswith("own-1.")] == before
    assert "own-1.alembic_version" not in after


async def test_tables_in_other_schemas_are_ignored(database: dict[str, str]) -> None:
    """Only the configured schema is checked."""
    connection = await connect(database)
    await connection.execute("CREATE SCHEMA x; CREATE TABLE x.users (a int); SET search_path = x")
    await connection.execute(FOREIGN_VERSION.format("0001"))
    await connection.close()
    assert (await migrate(settings_for(database))).revision == alembic_head()


async def test_tables_that_a_search_path_hid_are_not_made_again(database: dict[str, str]) -> None:
    """Earlier releases created them in the role's search path: DB_SCHEMA has to name it."""
    connection = await connect(database)
    name = database["DB_NAME"]
    await connection.execute(f'CREATE SCHEMA mine; ALTER DATABASE "{name}" SET search_path = mine')
    mine = settings_for({**database, "DB_SCHEMA": "mine"})
    await migrate(mine)
    before = await everything(connection)
    with pytest.raises(UnusableDatabaseError, match='are in "mine"'):
        await migrate(settings_for(database))
    assert await everything(connection) == before
    assert (await migrate(mine)).revision == alembic_head()
    await migrate(settings_for({**database, "DB_SCHEMA": "public"}))  # set on purpose
    await connection.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE job_runs CASCADE", "is incomplete: job_runs is missing"),
        ("TRUNCATE balance_app_version", "balance_app_version says nothing"),
        ("UPDATE balance_app_version SET version_num = '0099'", None),
        (
            "UPDATE balance_app_version SET version_num = '0099', compatible_from = '0098'",
            "at 0099, for programs from 0098 on",
        ),
    ],
)
async def test_an_incomplete_or_too_new_schema_is_refused(
    database: dict[str, str], change: str, message: str | None
) -> None:
    """A newer one that is compatible with this program is used unchanged."""
    await migrate(settings_for(database))
    connection = await connect(database)
    await connection.execute(change)
    await connection.close()
    if message is None:
        assert (await migrate(settings_for(database))).revision == "0099"
        return
    with pytest.raises(UnusableDatabaseError, match=message):
        await migrate(settings_for(database))


async def test_every_table_has_its_rights(database: dict[str, str]) -> None:
    """The rights that the service needs are listed for exactly the existing tables."""
    await migrate(settings_for(database))
    tables = await query(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert {name for (name,) in tables} == {*RIGHTS, VERSION_TABLE}


# -- rights -------------------------------------------------------------------------------------


@pytest.fixture
async def role(database: dict[str, str]) -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of a role that owns nothing and has no rights."""
    admin, name = await connect(database), f"role_{uuid4().hex[:12]}"
    await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'")
    await admin.execute("REVOKE ALL ON SCHEMA public FROM public")
    try:
        yield {**database, "DB_USER": name, "DB_PASSWORD": "x"}
    finally:
        await admin.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
        await admin.close()


@pytest.mark.parametrize(
    ("granted", "schema", "message"),
    [
        ("SELECT", "public", r"may not use schema .*: GRANT USAGE ON SCHEMA"),
        (
            "GRANT USAGE ON SCHEMA public TO {role}",
            "public",
            r"may not create tables.*Run `balance-app migrate` as the database's owner.*GRANT ",
        ),
        ("SELECT", "own", r"There is no schema .*: GRANT CREATE ON DATABASE"),
        ("GRANT CREATE, USAGE ON SCHEMA public TO {role}", "public", None),
        ('GRANT CREATE ON DATABASE "{database}" TO {role}', "own", None),
    ],
)
async def test_a_missing_right_is_named(
    database: dict[str, str], role: dict[str, str], granted: str, schema: str, message: str | None
) -> None:
    """For a role without CREATE or USAGE, in a sentence with the GRANT."""
    await query(database, granted.format(role=role["DB_USER"], database=database["DB_NAME"]))
    settings = settings_for({**role, "DB_SCHEMA": schema})
    if message is None:
        assert (await migrate(settings)).revision == alembic_head()
        return
    with pytest.raises(UnusableDatabaseError, match=message):
        await migrate(settings)


async def test_on_a_migrated_schema_a_role_needs_no_create(
    database: dict[str, str], role: dict[str, str]
) -> None:
    """It needs the rights on the rows only; each missing right is named."""
    await migrate(settings_for(database))
    admin, name = await connect(database), role["DB_USER"]
    await admin.execute(f"GRANT USAGE ON SCHEMA public TO {name}")
    with pytest.raises(UnusableDatabaseError, match=r"GRANT SELECT ON .*balance_app_version"):
        await migrate(settings_for(role))
    await admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    with pytest.raises(UnusableDatabaseError, match=r"INSERT on entries;.*DB_RUN_ROLE="):
        await migrate(settings_for(role))
    await admin.execute(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}")
    assert (await migrate(settings_for(role))).revision == alembic_head()
    await admin.execute("UPDATE balance_app_version SET version_num = '0003'")
    await admin.execute(f"GRANT CREATE ON SCHEMA public TO {name}")
    with pytest.raises(UnusableDatabaseError, match=r"belongs to .*Run `balance-app migrate` as"):
        await migrate(settings_for(role))
    await admin.close()


# -- frozen instances ---------------------------------------------------------------------------

STOPPED = """
import asyncio, os, signal
from balance_app.db import migrations
from balance_app.settings import load_settings

if os.environ.get("STOP") == "in-turn":
    # As an instance of the previous release: frozen while its session holds the lock.
    async def main():
        connection = await migrations._connect(load_settings())
        await connection.fetchval("SELECT pg_advisory_lock($1)", migrations.MIGRATION_LOCK)
        os.kill(os.getpid(), signal.SIGSTOP)
    asyncio.run(main())
# In the middle of an upgrade that takes two seconds.
statements = migrations._statements
migrations._statements = lambda revision: "SELECT pg_sleep(2);" + statements(revision)
asyncio.run(migrations.migrate(load_settings()))
"""


async def test_an_instance_frozen_in_its_upgrade_blocks_no_other(
    database: dict[str, str],
) -> None:
    """PostgreSQL has received the whole upgrade: it completes without the instance."""
    frozen = await _migrate_in_a_process(database)
    connection = await connect(database)
    try:
        await _lock_holder(connection)
        frozen.send_signal(signal.SIGSTOP)
        assert await everything(connection) == []
        reports: list[str] = []
        async with asyncio.timeout(20):
            await migrate(settings_for(database), reports.append)
        assert any("another instance that migrates" in report for report in reports)
    finally:
        frozen.kill()
        await frozen.wait()
        await connection.close()


async def test_an_interrupted_upgrade_changes_nothing(database: dict[str, str]) -> None:
    """A session that is ended in the middle has changed nothing; the next try does all."""
    cut = await _migrate_in_a_process(database)
    connection = await connect(database)
    await connection.execute("SELECT pg_terminate_backend($1)", await _lock_holder(connection))
    assert await cut.wait() != 0
    assert await everything(connection) == []
    await connection.close()
    assert (await migrate(settings_for(database))).revision == alembic_head()


async def test_the_holder_of_the_lock_is_named_and_head_needs_no_lock(
    database: dict[str, str],
) -> None:
    """A frozen instance that holds the lock is named; on a migrated schema it is not needed."""
    frozen = await _migrate_in_a_process(database, STOP="in-turn")
    connection = await connect(database)
    try:
        holder = await _lock_holder(connection)
        async with Instance(database, JOBS_ENABLED="false", DB_SCHEMA="own"):
            pass  # of another schema, which has a lock of its own
        waiting = Instance(database, "waiting", JOBS_ENABLED="false")
        await waiting.launch()
        try:
            async with http_client(timeout=5) as http, asyncio.timeout(30):
                message = ""
                while f"PostgreSQL process {holder}, since" not in message:
                    with suppress(httpx.HTTPError):
                        message = (await http.get(f"{waiting.url}/readyz")).text
                    await asyncio.sleep(0.1)
            assert frozen.returncode is None
            frozen.kill()
            await frozen.wait()
            await waiting.ready()
        finally:
            assert await waiting.stop() == 0
        assert await connection.fetchval("SELECT pg_try_advisory_lock($1)", MIGRATION_LOCK)
        async with asyncio.timeout(10):
            await migrate(settings_for(database))
    finally:
        if frozen.returncode is None:
            frozen.kill()
        await connection.close()


LOCKED = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND (classid::bigint << 32) | objid::bigint = $1
  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def _lock_holder(connection: "asyncpg.Connection[asyncpg.Record]") -> int:
    """Wait until a session holds the lock of schema "public"; return its backend's pid."""
    async with asyncio.timeout(30):
        while True:
            for (pid,) in await connection.fetch(LOCKED, MIGRATION_LOCK):
                return int(pid)
            await asyncio.sleep(0.02)


async def _migrate_in_a_process(database: dict[str, str], **env: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STOPPED),
        env={**os.environ, **database, **env},
        stderr=asyncio.subprocess.DEVNULL,
    )


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
@pytest.mark.parametrize("what", ["migrate", "grant"])
async def test_grants_of_two_schemas_at_once(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, what: str, guarded: bool
) -> None:
    """Both are on the same database: PostgreSQL refuses the one that waited for the other."""
    if not guarded:
        monkeypatch.setattr(migrations, "CONFLICT", "never said")
    settings = settings_for(database)
    if what == "grant":
        await migrate(settings)
    async with granting(database) as (other, transaction):
        said: list[str] = []
        task = asyncio.ensure_future(getattr(migrations, what)(settings, said.append))
        async with asyncio.timeout(30):
            while True:
                if await other.fetchval(WAITERS):
                    break
                await asyncio.sleep(0.01)
        await transaction.commit()
        if guarded:
            async with asyncio.timeout(30):
                await task
            assert any("grants of another schema" in line for line in said)
        else:
            with pytest.raises(Exception, match="tuple concurrently updated"):
                await task


async def test_grants_wait_for_a_lock(database: dict[str, str]) -> None:
    """For longer than the limit of a session, if need be."""
    settings = settings_for(database)
    await migrate(settings)
    async with granting(database) as (_, transaction):
        waits = asyncio.Event()
        task = asyncio.create_task(migrations.grant(settings, lambda _: waits.set()))
        async with asyncio.timeout(60):
            await waits.wait()
            await transaction.rollback()
            await task


@asynccontextmanager
async def granting(database: dict[str, str]) -> AsyncIterator[tuple[Any, Transaction]]:
    """Change rights on the database, as the grants of a schema do, and do not commit."""
    other = await connect(database)
    try:
        transaction = other.transaction()
        await transaction.start()
        await other.execute(f'REVOKE TEMPORARY ON DATABASE "{database["DB_NAME"]}" FROM PUBLIC')
        yield other, transaction
    finally:
        await other.close()


WAITERS = """
SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))
"""


@pytest.mark.parametrize("limited", [True, False], ids=["limited", "control"])
async def test_a_check_that_gets_no_answer_ends(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, limited: bool
) -> None:
    """A server that is frozen during the check would keep an instance from all others."""

    async def frozen(connection: "asyncpg.Connection[Any]", *_: object) -> None:
        await connection.execute("SELECT pg_sleep(600)")

    monkeypatch.setattr(migrations, "_tables_and_version", frozen)
    monkeypatch.setattr(migrations, "INSPECT_SECONDS", 0.3 if limited else None)
    check = asyncio.create_task(migrations.find(settings_for(database)))
    await asyncio.wait({check}, timeout=20 if limited else 2)
    assert check.done() == limited
    check.cancel()
    with pytest.raises(TimeoutError if limited else asyncio.CancelledError):
        await check


@pytest.mark.parametrize("encoding", ["EUC_JP", "EUC_KR", "LATIN1", "SQL_ASCII", "UTF8"])
async def test_an_encoding_that_changes_characters_is_refused(
    database: dict[str, str], encoding: str
) -> None:
    """Any of several bytes but UTF8; the control: EUC_JP gives back another character."""
    other = {**database, "DB_NAME": f"encoded_{uuid4().hex}"}
    admin = await connect(database)
    await admin.execute(
        f"CREATE DATABASE {other['DB_NAME']} TEMPLATE template0 ENCODING '{encoding}'"
        " LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        if encoding.startswith("EUC"):
            with pytest.raises(UnusableDatabaseError, match=f"is {encoding}: .*ENCODING 'UTF8'"):
                await migrate(settings_for(other))
            if encoding == "EUC_JP":
                ((back,),) = await query(other, "SELECT $1::text", "\xa6")
                assert back == "\uffe4"
        else:
            await migrate(settings_for(other))
    finally:
        await admin.execute(f"DROP DATABASE {other['DB_NAME']}")
        await admin.close()


async def test_a_schema_that_changes_meanwhile_is_not_incomplete(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables and version are of one moment, also while another instance migrates."""
    other = await connect(database)
    await _move(other, "base", "0011")
    read_version, reads = migrations._version, 0

    async def migrated_meanwhile(*arguments: Any) -> Any:  # noqa: ANN401
        nonlocal reads
        reads += 1
        if reads == 1:
            await _move(other, "0011", "head")
        return await read_version(*arguments)

    monkeypatch.setattr(migrations, "_version", migrated_meanwhile)
    assert await migrations.find(settings_for(database)) is not None
    assert reads == 2
    await other.close()


# -- 0014: which accounts have a hash ------------------------------------------------------------

HASHED = """
SELECT array_agg(hash IS NOT NULL ORDER BY id), chained_from = '-infinity',
       chained_from > clock_timestamp() + interval '23 hours'
FROM users CROSS JOIN balance_app_version GROUP BY chained_from
"""


async def test_0018_and_back(database: dict[str, str]) -> None:
    """Its rows in the lists of grants go with its tables, and come again."""
    await migrate(settings_for(database))
    connection = await connect(database)
    grant = "SELECT prosrc FROM pg_proc WHERE proname = 'grant_to_instances'"
    with_tables = await connection.fetchval(grant)
    assert with_tables.count("'alerts'") == 2
    await _move(connection, "head", "0016")
    without = await connection.fetchval(grant)
    assert not re.search("alerts|pings", without)
    await connection.execute("SELECT grant_to_instances($1)", RUN_ROLE)
    await _move(connection, "0016", "head")
    assert await connection.fetchval(grant) == with_tables
    await connection.close()


async def test_0019_and_back(database: dict[str, str]) -> None:
    """Both functions are as they were, and change again."""
    await migrate(settings_for(database))
    connection = await connect(database)
    functions = """
        SELECT array_agg(prosrc ORDER BY proname) FROM pg_proc
        WHERE proname IN ('require_entry', 'grant_to_instances')
    """
    after = await connection.fetchval(functions)
    await _move(connection, "head", "0018")
    before = await connection.fetchval(functions)
    assert all("TEMPORARY ON" in grant for grant in (before[0], after[0]))
    assert ("public.entries" in before[1], "public.entries" in after[1]) == (False, True)
    await _move(connection, "0018", "head")
    assert await connection.fetchval(functions) == after != before
    await connection.close()


async def test_0020_and_back(database: dict[str, str]) -> None:
    """Group commit hashes as before, and again in two parts; instances may call it either way."""
    await migrate(settings_for(database))
    connection = await connect(database)
    await connection.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
    callable_ones = """
        SELECT array_agg(proname::text ORDER BY proname) FROM pg_proc
        WHERE has_function_privilege($1, oid, 'EXECUTE')
          AND proname IN ('chain_hash', 'change_together', 'entry_content')
    """
    together = "SELECT pg_get_functiondef(to_regproc('change_together'))"
    after = await connection.fetchval(together)
    await _move(connection, "head", "0019")
    before = await connection.fetchval(together)
    assert await connection.fetchval(callable_ones, RUN_ROLE) == ["change_together"]
    assert ("entry_hash(" in before, "chain_hash(" in before) == (True, False)
    assert ("entry_hash(" in after, "chain_hash(" in after) == (False, True)
    await _move(connection, "0019", "head")
    assert len(await connection.fetchval(callable_ones, RUN_ROLE)) == 3
    assert await connection.fetchval(together) == after
    await connection.close()


async def test_0014_gives_the_first_account_of_a_new_database_its_hash(
    database: dict[str, str],
) -> None:
    """There every account must have one; older accounts get theirs by a job."""
    await migrate(settings_for(database))
    connection = await connect(database)
    row = await connection.fetchrow(HASHED)
    assert row is not None
    assert tuple(row) == ([True], True, False)
    await _move(connection, "head", "0013")
    await connection.execute("UPDATE users SET hash = NULL")
    await connection.execute("INSERT INTO users (balance, version) VALUES (0, 1)")
    await _move(connection, "0013", "head")
    row = await connection.fetchrow(HASHED)
    assert row is not None
    assert tuple(row) == ([False, False], False, True)
    await connection.close()


# -- 0012: keys of accounts ---------------------------------------------------------------------

# A key of each outcome that there was before, and changes without one.
BEFORE_0012 = """
INSERT INTO users (id, balance, version) VALUES (2, 5, 3), (3, 9, 1);
INSERT INTO entries (user_id, version, amount, balance, key) VALUES
    (2, 1, 7, 7, 'opened'), (2, 2, -3, 4, 'changed'), (2, 3, 1, 5, NULL), (3, 1, 9, 9, NULL);
INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
SELECT key, CASE version WHEN 1 THEN 'opened' ELSE 'accepted' END, user_id, amount, balance,
       version, at
FROM entries WHERE key IS NOT NULL;
INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version) VALUES
    ('too-much', 'refused', 2, -8, 5, 3), ('too-many', 'refused', 2, 9007199254740990, 5, 3);
SELECT setval(pg_get_serial_sequence('users', 'id'), 3);
"""
KNOWN_BEFORE = (
    "SELECT id, balance, version, created_at FROM users ORDER BY 1",
    "SELECT user_id, version, amount, balance, key, at FROM entries ORDER BY 1, 2",
    """
    SELECT key, outcome, user_id, amount, balance, version, at FROM idempotency_keys ORDER BY 1
    """,
)
CONSTRAINTS = """
SELECT conrelid::regclass::text, conname::text, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"


async def test_0012_moves_every_kind_of_row_and_back(database: dict[str, str]) -> None:
    """Each key still has its first answer; going back, nothing that was known before is lost."""
    connection = await connect(database)
    await _move(connection, "base", "0011")
    await connection.execute(BEFORE_0012)
    shape = [await connection.fetch(question) for question in (CONSTRAINTS, INDEXES)]
    before = [await connection.fetch(question) for question in KNOWN_BEFORE]
    await _move(connection, "0011", "0012")
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
    ):
        await _repeat_all(client)
    assert [await connection.fetch(question) for question in KNOWN_BEFORE[:2]] == before[:2]
    moved = "SELECT key, user_id, request FROM opening_keys"
    assert [tuple(row) for row in await connection.fetch(moved)] == [("opened", 2, '{"balance":7}')]
    await _move(connection, "head", "0011")
    assert [await connection.fetch(question) for question in KNOWN_BEFORE] == before
    assert [await connection.fetch(question) for question in (CONSTRAINTS, INDEXES)] == shape
    await _move(connection, "0011", "0012")
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
    ):
        await _repeat_all(client)
        await _make_every_kind(client)
    known = [await connection.fetch(question) for question in KNOWN_BEFORE[:2]]
    await _move(connection, "head", "0011")
    assert [await connection.fetch(question) for question in KNOWN_BEFORE[:2]] == known
    outcomes = await connection.fetch(
        "SELECT key, outcome FROM idempotency_keys WHERE key LIKE 'new-%' ORDER BY 1"
    )
    assert [tuple(row) for row in outcomes] == [
        ("new-hold", "accepted"),
        ("new-refusal", "refused"),
        ("new-transfer", "accepted"),
        ("new-user", "opened"),
    ]
    await connection.close()


async def _repeat_all(client: httpx.AsyncClient) -> None:
    """Send what the keys of `BEFORE_0012` were sent with: each is replayed."""
    for key, path, body, status in (
        ("opened", "users", {"balance": 7}, 201),
        ("changed", "balance", {"userId": 2, "amount": -3}, 200),
        ("too-much", "balance", {"userId": 2, "amount": -8}, 409),
        ("too-many", "balance", {"userId": 2, "amount": 2**53 - 2}, 409),
    ):
        answer = await client.post(f"/api/{path}", json=body, headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.headers.get("idempotent-replayed")) == (status, "true")
        assert answer.json()["userId"] == 2


async def _make_every_kind(client: httpx.AsyncClient) -> None:
    """Make what only a schema since 0012 has, each with a key if it may have one."""
    moved = {"fromUserId": 1, "toUserId": 3, "amount": 2, "reference": "rent", "note": "May"}
    held = {"userId": 1, "amount": 3, "expiresInSeconds": 3600}
    made = [
        await client.post(f"/api/{path}", json=body, headers={"Idempotency-Key": f"new-{key}"})
        for key, path, body in (
            ("user", "users", {"balance": 5, "floor": -5, "externalId": "a"}),
            ("transfer", "transfers", moved),
            ("hold", "holds", held),
            ("refusal", "holds", {**held, "amount": 10_000}),
        )
    ]
    assert [answer.status_code for answer in made] == [201, 200, 201, 409]
    for hold in range(2):
        placed = await client.post("/api/holds", json={**held, "amount": hold + 1})
        end = ("capture", "void")[hold]
        assert (await client.post(f"{placed.headers['location']}/{end}")).status_code == 200
    assert (await client.post("/api/users/3/entries/2/reverse")).status_code == 200
    patched = await client.patch(
        "/api/users/2", json={"frozen": True, "externalId": "b"}, headers={"If-Match": "*"}
    )
    assert patched.status_code == 200


@pytest.mark.parametrize(
    "lost",
    [
        """
        UPDATE users SET floor = -1;
        WITH changed AS (UPDATE users SET balance = -1, version = 2, hash = NULL)
        INSERT INTO entries (user_id, version, amount, balance) VALUES (1, 2, -10001, -1)
        """,
        """
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
        VALUES ('k', 'accepted', 1, 1, 1, 1), ('k', 'accepted', 2, 1, 1, 1)
        """,
        """
        INSERT INTO opening_keys VALUES ('k', 1, '{"balance":10000}');
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
        VALUES ('k', 'accepted', 1, 1, 1, 1)
        """,
    ],
    ids=["a negative balance", "a key of two users", "a key of an opening and a user"],
)
async def test_going_back_behind_0012_loses_nothing(database: dict[str, str], lost: str) -> None:
    """What the schema before can't have stops it, with all its tables as they were."""
    await migrate(settings_for(database))
    connection = await connect(database)
    await connection.execute(lost)
    shape = [await connection.fetch(question) for question in (CONSTRAINTS, INDEXES)]
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await _move(connection, "head", "0011")
    assert [await connection.fetch(question) for question in (CONSTRAINTS, INDEXES)] == shape
    await connection.close()


async def _move(connection: "asyncpg.Connection[asyncpg.Record]", start: str, end: str) -> None:
    """Bring the schema from one revision to another, by the SQL that alembic writes."""
    written = StringIO()
    config = alembic_config()
    config.output_buffer = written
    move = command.upgrade if start == "base" or start < end else command.downgrade
    move(config, f"{start}:{end}", sql=True)
    await connection.execute(written.getvalue())
