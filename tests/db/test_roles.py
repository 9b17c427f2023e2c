"""What the role of an instance may do: exactly what is listed here."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from uuid import uuid4

import asyncpg
import pytest

from balance_app.balances.model import Accepted, Movement
from balance_app.balances.repository import REFUSALS_KEPT
from balance_app.db.migrations import alembic_config, migrate
from balance_app.maintenance.housekeeping import ANALYZE
from balance_app.sessions import open_session
from balance_app.settings import load_settings
from tests.balances.repositories import repositories
from tests.processes import (
    RUN_ROLE,
    Instance,
    as_instance,
    connect,
    http_client,
    major_version,
    query,
    served,
)

ALL: Final = "*"
# For each table: the rights on all of it, and those on columns.
TABLE: Final[dict[str, dict[str, str]]] = {
    "balance_app_version": {"SELECT": ALL},
    "access_state": {"SELECT": ALL, "UPDATE": "generation"},
    "api_keys": {"SELECT": ALL, "UPDATE": "last_used_on"},
    "sessions": {
        "SELECT": ALL,
        "INSERT": "id digest key_id expires_at",
        "UPDATE": "revoked_at",
        "DELETE": ALL,
    },
    "actions": {"SELECT": ALL, "INSERT": "by action subject before after"},
    "users": {
        "SELECT": ALL,
        "INSERT": "id balance version floor created_at changed_at hash",
        "UPDATE": "balance version changed_at hash held hold_events holds_due_at floor frozen "
        "settings_version",
    },
    "entries": {"SELECT": ALL, "INSERT": ALL},
    "holds": {
        "SELECT": ALL,
        "INSERT": "user_id number amount at expires_at key reference note by",
        "UPDATE": "state captured ended_at ended_by balance held version",
    },
    "idempotency_keys": {"SELECT": ALL, "INSERT": ALL, "DELETE": ALL},
    "opening_keys": {"SELECT": ALL, "INSERT": ALL},
    "external_ids": {"SELECT": ALL, "INSERT": ALL, "UPDATE": "external_id", "DELETE": ALL},
    "user_settings": {"SELECT": ALL, "INSERT": ALL},
    "jobs": {
        "SELECT": ALL,
        "INSERT": "name schedule description args start_within anchor_at due_at ready_at",
        "UPDATE": "schedule description other_schedules anchor_at due_at ready_at attempt "
        "requested_by startup_marked_at paused_at paused_by pause_reason fence holder server "
        "started_at lease_expires_at cancel_requested_by releasing done total note checkpoint "
        "last_heartbeat_at lost_streak releases retries failure_streak round last_outcome "
        "last_server last_started_at last_ended_at last_result forgotten_at forgotten_by "
        "work_ended_at stop_requested_at args start_within requested_args schedule_override "
        "overridden_by overridden_at",
    },
    "job_runs": {
        "SELECT": ALL,
        "INSERT": "job fence due_at last_due_at ticks attempt holder server started_at ended_at "
        "outcome result args",
        "UPDATE": "outcome ended_at result",
        "DELETE": ALL,
    },
    "job_run_lines": {"SELECT": ALL, "INSERT": ALL, "DELETE": ALL},
    "job_run_tracebacks": {"SELECT": ALL, "INSERT": ALL},
    "job_declarations": {
        "SELECT": ALL,
        "INSERT": "job digest schedule description args start_within",
        "UPDATE": "last_declared_at",
    },
    "instances": {
        "SELECT": ALL,
        "INSERT": "id server highest_number missing max_running accepted refused",
        "UPDATE": "last_heartbeat_at accepted refused silences",
        "DELETE": ALL,
    },
    "daily_balances": {"SELECT": ALL, "INSERT": ALL, "UPDATE": "version balance at sealed"},
    "daily_totals": {
        "SELECT": ALL,
        "INSERT": ALL,
        "UPDATE": "opened opening changes deposited withdrawn transfers transferred active_users",
    },
    "counted_users": {"SELECT": ALL, "INSERT": ALL, "UPDATE": "version day"},
    "table_sizes": {"SELECT": ALL, "INSERT": ALL, "DELETE": ALL},
    "seals": {"SELECT": ALL, "INSERT": ALL},
    "seal_parts": {"SELECT": ALL, "INSERT": ALL},
    "alerts": {
        "SELECT": ALL,
        "INSERT": "code subject status sentence since",
        "UPDATE": "ended_at tries refusals next_try_at done_at error",
        "DELETE": ALL,
    },
    "pings": {"SELECT": ALL, "INSERT": "target fence phase", "UPDATE": "fence phase at"},
}

# Each right of a role on a column of a table, or on the table.
RIGHTS: Final = """
SELECT relname::text AS name, privilege, ARRAY(
    SELECT attname::text FROM pg_attribute
    WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped
      AND has_column_privilege($1, pg_class.oid, attnum, privilege) ORDER BY attname
) AS columns, has_table_privilege($1, pg_class.oid, privilege) AS whole
FROM pg_class, unnest('{SELECT,INSERT,UPDATE,REFERENCES}'::text[]) AS privilege
WHERE relkind IN ('r', 'v', 'm', 'p') AND relnamespace = 'public'::regnamespace
UNION ALL
SELECT relname, privilege, '{}', has_table_privilege($1, pg_class.oid, privilege)
FROM pg_class, unnest($2::text[]) AS privilege
WHERE relkind IN ('r', 'v', 'm', 'p') AND relnamespace = 'public'::regnamespace
"""
SEQUENCES: Final = """
SELECT relname::text AS name, array_agg(privilege ORDER BY privilege) AS rights
FROM pg_class, unnest('{SELECT,USAGE,UPDATE}'::text[]) AS privilege
WHERE relkind = 'S' AND relnamespace = 'public'::regnamespace
  AND has_sequence_privilege($1, pg_class.oid, privilege)
GROUP BY relname
"""


async def migrated(database: dict[str, str]) -> dict[str, str]:
    """Migrate as the owner; return the variables of an instance, without the owner's."""
    variables = as_instance(database)
    values = {name.lower(): value for name, value in variables.items()}
    await migrate(load_settings(**values).as_owner())
    return {name: value for name, value in variables.items() if name != "MIGRATE_DATABASE_URL"}


@pytest.fixture
async def instances(database: dict[str, str]) -> dict[str, str]:
    """The variables of the role of instances, on a migrated database."""
    return await migrated(database)


async def rights(database: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return what the role may do with each table, as in TABLE."""
    found: dict[str, dict[str, str]] = {}
    of_tables = ["DELETE", "TRUNCATE", "TRIGGER"]
    if await major_version(database) >= 17:
        of_tables.append("MAINTAIN")
    for row in await query(database, RIGHTS, RUN_ROLE, of_tables):
        of_table = found.setdefault(row["name"], {})
        if row["whole"]:
            of_table[row["privilege"]] = ALL
        elif row["columns"]:
            of_table[row["privilege"]] = " ".join(row["columns"])
    return found


async def test_the_role_has_exactly_the_listed_rights(
    database: dict[str, str], instances: dict[str, str]
) -> None:
    """Nothing more, and nothing less, on tables, columns and sequences; and again after a call."""
    grantable = await major_version(database) >= 17
    wanted = {
        name: {
            **({"MAINTAIN": ALL} if name in ANALYZE and grantable else {}),
            **{what: " ".join(sorted(columns.split())) for what, columns in listed.items()},
        }
        for name, listed in TABLE.items()
    }
    assert await rights(database) == wanted
    sequences = {row["name"]: row["rights"] for row in await query(database, SEQUENCES, RUN_ROLE)}
    assert sequences == {
        "users_id_seq": ["SELECT", "USAGE"],
        "jobs_number_seq": ["SELECT"],
        "job_runs_id_seq": ["SELECT"],
        "actions_id_seq": ["SELECT"],
        "alerts_id_seq": ["SELECT"],
    }
    (role,) = await query(
        database,
        "SELECT rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls"
        " FROM pg_roles WHERE rolname = $1",
        RUN_ROLE,
    )
    assert tuple(role) == (True, False, False, False, False, False)
    # The control: what is granted beside is found, and a second call takes it back.
    await query(database, f"GRANT UPDATE (id), TRUNCATE ON users TO {RUN_ROLE}")
    assert await rights(database) != wanted
    await query(database, "SELECT grant_to_instances($1)", RUN_ROLE)
    assert await rights(database) == wanted
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await query(instances, "SELECT grant_to_instances($1)", RUN_ROLE)


FORBIDDEN: Final = (
    "UPDATE entries SET amount = 1",
    "DELETE FROM entries",
    "TRUNCATE entries",
    "ALTER TABLE entries DISABLE TRIGGER ALL",
    "ALTER TABLE entries DISABLE TRIGGER entries_append_only",
    "SET session_replication_role = replica",
    "DROP TABLE entries CASCADE",
    "DROP TRIGGER entries_append_only ON entries",
    "DROP TRIGGER users_changed_with_entry ON users",
    "ALTER TABLE users DROP CONSTRAINT users_balance_check",
    "CREATE TABLE extra (a int)",
    "CREATE TEMPORARY TABLE extra (a int)",
    "CREATE FUNCTION extra() RETURNS int RETURN 1",
    "CREATE OR REPLACE FUNCTION hold_lease() RETURNS void LANGUAGE sql AS 'SELECT'",
    "CREATE OR REPLACE FUNCTION require_entry() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
    "CREATE SCHEMA extra",
    "CREATE ROLE extra",
    "CREATE EXTENSION citext",
    "ALTER SYSTEM SET fsync = off",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO '/tmp/balance_app_written'",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT pg_read_binary_file('PG_VERSION')",
    "SELECT lo_import('/etc/hostname')",
    "SELECT rolpassword FROM pg_authid",
    "UPDATE users SET id = 5",
    "UPDATE users SET created_at = now()",
    "DELETE FROM users",
    "TRUNCATE users CASCADE",
    "DELETE FROM jobs",
    "UPDATE jobs SET number = DEFAULT",
    "UPDATE jobs SET name = 'x'",
    "INSERT INTO jobs (name, fence) VALUES ('x', 1)",
    "UPDATE idempotency_keys SET outcome = 'refused'",
    "TRUNCATE idempotency_keys",
    "UPDATE opening_keys SET request = ''",
    "DELETE FROM opening_keys",
    "DELETE FROM holds",
    "UPDATE holds SET amount = 1",
    "UPDATE user_settings SET floor = 0",
    "DELETE FROM user_settings",
    "INSERT INTO api_keys (id, digest, name, scopes) VALUES ('a', '', 'x', '{open}')",
    "UPDATE api_keys SET scopes = '{open}'",
    "UPDATE api_keys SET digest = ''",
    "UPDATE api_keys SET expires_at = NULL",
    "UPDATE api_keys SET revoked_at = NULL",
    "DELETE FROM api_keys",
    "UPDATE sessions SET key_id = 'x'",
    "UPDATE sessions SET expires_at = 'infinity'",
    "UPDATE access_state SET keys_required = false",
    "DELETE FROM access_state",
    "UPDATE actions SET by = NULL",
    "DELETE FROM actions",
    "INSERT INTO actions (at, action, subject) VALUES ('2000-01-01', 'x', 'y')",
    "UPDATE seals SET digest = ''",
    "DELETE FROM seals",
    "UPDATE seal_parts SET digest = ''",
    "DELETE FROM seal_parts",
    "DELETE FROM daily_balances",
    "DELETE FROM daily_totals",
    "DELETE FROM job_declarations",
    "DELETE FROM job_run_tracebacks",
    "UPDATE balance_app_version SET version_num = '0001'",
    "DELETE FROM balance_app_version",
    "SELECT setval('users_id_seq', 1)",
    "SELECT nextval('jobs_number_seq')",
)


@pytest.fixture
async def connections(
    database: dict[str, str], instances: dict[str, str]
) -> AsyncIterator[tuple["asyncpg.Connection[asyncpg.Record]", ...]]:
    """Connections of the role of instances, and of the owner."""
    both = await connect(instances), await connect(database)
    yield both
    for each in both:
        await each.close()


async def test_what_the_role_must_not_do_is_refused(
    connections: tuple["asyncpg.Connection[asyncpg.Record]", ...],
) -> None:
    """Each statement, for lack of a right; the control: the owner has them."""
    role, owner = connections
    answers: dict[str, str] = {}
    for statement in FORBIDDEN:
        try:
            answers[statement] = await role.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            continue
        except asyncpg.PostgresError as error:
            answers[statement] = repr(error)
    assert answers == {}
    transaction = owner.transaction()
    await transaction.start()
    await owner.execute(f"{FORBIDDEN[5]}; {FORBIDDEN[3]}; {FORBIDDEN[0]}")
    await transaction.rollback()


# -- the guards ---------------------------------------------------------------------------------

UNPROVEN: Final = (
    "UPDATE users SET balance = 999999 WHERE id = 1",
    "UPDATE users SET balance = 999999, version = version + 1 WHERE id = 1",
    "UPDATE users SET version = version + 1 WHERE id = 1",
    # back to an entry of the past
    "UPDATE users SET version = 1, balance = 10000 WHERE id = 1",
    "INSERT INTO users (id, balance, version) VALUES (99, 5, 1)",
    "INSERT INTO users (id, balance, version) VALUES (99, 0, 1)",
)


async def test_a_balance_without_its_entry_is_refused(
    connections: tuple["asyncpg.Connection[asyncpg.Record]", ...],
) -> None:
    """By the statement itself; the control: without the guard each passes."""
    role, owner = connections
    # a change, as the program makes it
    changed = await role.execute("""
        WITH changed AS (
            UPDATE users SET balance = balance - 2, version = version + 1, hash = NULL WHERE id = 1
            RETURNING id, version, balance
        )
        INSERT INTO entries (user_id, version, amount, balance)
        SELECT id, version, -2, balance FROM changed
    """)
    assert changed == "INSERT 0 1"
    for statement in UNPROVEN:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await role.execute(statement)
        assert refused.value.sqlstate == "BL004", statement
    await role.execute("UPDATE users SET held = 3, hold_events = 1 WHERE id = 1")
    await owner.execute("ALTER TABLE users DISABLE TRIGGER USER")
    for statement in UNPROVEN:
        transaction = role.transaction()
        await transaction.start()
        await role.execute(statement)
        await transaction.rollback()


SHADOWED: Final = """
CREATE TEMPORARY TABLE entries (LIKE public.entries INCLUDING DEFAULTS) ON COMMIT DROP;
SET LOCAL search_path = pg_temp, public;
INSERT INTO entries (user_id, version, amount, balance, at)
SELECT id, version + 1, 999999 - balance, 999999, now() FROM users WHERE id = 1;
UPDATE users SET balance = 999999, version = version + 1, hash = NULL WHERE id = 1;
"""


async def test_a_table_in_front_of_the_ledger_proves_no_balance(
    connections: tuple["asyncpg.Connection[asyncpg.Record]", ...],
) -> None:
    """Whatever the session's search_path; the control: the guard before 0019 believes it."""
    role, owner = connections
    name = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"GRANT TEMPORARY ON DATABASE {name} TO {RUN_ROLE}")
    with pytest.raises(asyncpg.PostgresError) as refused:
        await role.execute(SHADOWED)
    assert refused.value.sqlstate == "BL004"
    guard = await owner.fetchval("SELECT pg_get_functiondef('require_entry'::regproc)")
    await owner.execute(guard.replace("FROM public.entries", "FROM entries"))
    await role.execute(SHADOWED)
    assert await owner.fetchval("SELECT balance FROM users WHERE id = 1") == 999999


# Raises the version by $1 and withdraws $2, with entries of 2 each at some of the steps between.
SEVERAL: Final = """
WITH changed AS (
    UPDATE users SET balance = balance - $2, version = version + $1, hash = $4 WHERE id = 1
    RETURNING version - $1 AS was, balance + $2 AS had
)
INSERT INTO entries (user_id, version, amount, balance)
SELECT 1, was + step, -2, had - 2 * step FROM changed CROSS JOIN unnest($3::bigint[]) AS step
"""
BL004: Final = "BL004"
# Such calls that are refused, and the SQLSTATE.
UNPROVEN_SEVERAL: Final = {
    "no entries": (2, 4, [], None, BL004),
    "a gap": (3, 6, [1, 3], None, BL004),
    "the last one alone": (3, 6, [3], None, BL004),
    "all but the last": (3, 6, [1, 2], None, BL004),
    "all but the first": (3, 6, [2, 3], None, BL004),
    "one too few": (4, 6, [1, 2, 3], None, BL004),
    "another one in place": (3, 6, [1, 3, 4], None, BL004),
    "another balance": (3, 5, [1, 2, 3], None, BL004),
    "another hash": (3, 6, [1, 2, 3], b"x", "42703"),
    "a step back": (-1, 0, [], None, BL004),
    "no step": (0, 2, [], None, BL004),
}


async def test_a_balance_without_all_its_entries_is_refused(
    connections: tuple["asyncpg.Connection[asyncpg.Record]", ...],
) -> None:
    """Several changes in one statement need an entry each; the control: without the guard none."""
    role, owner = connections
    for number in (1, 2, 512):
        steps = list(range(1, number + 1))
        made = await role.execute(SEVERAL, number, 2 * number, steps, None)
        assert made == f"INSERT 0 {number}"
    for what, (*arguments, sqlstate) in UNPROVEN_SEVERAL.items():
        with pytest.raises(asyncpg.PostgresError) as refused:
            await role.execute(SEVERAL, *arguments)
        assert refused.value.sqlstate == sqlstate, what
    await owner.execute("ALTER TABLE users DISABLE TRIGGER USER")
    for *arguments, _ in UNPROVEN_SEVERAL.values():
        transaction = role.transaction()
        await transaction.start()
        await role.execute(SEVERAL, *arguments)
        await transaction.rollback()


async def test_the_role_changes_several_at_once(
    database: dict[str, str], instances: dict[str, str]
) -> None:
    """With group commit it needs no more rights than it has."""
    async with repositories({**instances, "BALANCE_GROUP_COMMIT": "true"}) as (app,):
        changes = [Movement(1, -1, f"{n}") for n in range(50)]
        outcomes = await asyncio.gather(*(app.balances.change(each) for each in changes))
    assert {*map(type, outcomes)} == {Accepted}
    made = "SELECT count(*) AS entries FROM entries GROUP BY xmin::text ORDER BY min(version)"
    assert [row["entries"] for row in await query(database, made)] == [1, 50]


KEYS: Final = """
INSERT INTO idempotency_keys (user_id, key, outcome, amount, balance, version, at)
SELECT 1, format('%s %s', outcome, days), outcome, -2, 0, 1,
       clock_timestamp() - make_interval(days => days)
FROM unnest('{accepted,refused}'::text[]) AS outcome, unnest('{0,6,8}'::int[]) AS days
"""
DELETE_KEY: Final = "DELETE FROM idempotency_keys WHERE key = $1"


async def test_a_key_that_counts_is_not_deleted(
    connections: tuple["asyncpg.Connection[asyncpg.Record]", ...],
) -> None:
    """Only an old refusal is; the control: without the guard any is."""
    role, owner = connections
    await owner.execute(KEYS)
    for key in ("accepted 0", "accepted 8", "refused 0", "refused 6"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await role.execute(DELETE_KEY, key)
        assert refused.value.sqlstate == "BL004", key
    assert await role.execute(DELETE_KEY, "refused 8") == "DELETE 1"
    await owner.execute("ALTER TABLE idempotency_keys DISABLE TRIGGER USER")
    assert await role.execute(DELETE_KEY, "accepted 0") == "DELETE 1"


@pytest.mark.parametrize("pinned", [True, False])
async def test_no_lookup_reads_a_whole_table(database: dict[str, str], *, pinned: bool) -> None:
    """Neither a trigger's nor a foreign key's, with plans made when there was one row.

    The control: with the server's default they do.
    """
    settings = load_settings(**{name.lower(): value for name, value in database.items()})
    await migrate(settings)
    session = await open_session(settings.statement_arguments())
    if not pinned:
        await session.execute("SET enable_seqscan = on")
    await session.execute("ANALYZE users, entries")
    async with session.transaction():
        for _ in range(10):
            await session.execute(
                "WITH changed AS (UPDATE users SET balance = balance - 1, version = version + 1 "
                "WHERE id = 1 RETURNING id, version, balance, hash) "
                "INSERT INTO entries (user_id, version, amount, balance, hash) "
                "SELECT id, version, -1, balance, hash FROM changed"
            )
        scanned = await session.fetch(
            "SELECT relname::text FROM pg_stat_xact_user_tables "
            "WHERE seq_scan > 0 AND relname IN ('users', 'entries') ORDER BY relname"
        )
    await session.close()
    assert [row["relname"] for row in scanned] == ([] if pinned else ["entries", "users"])


def test_the_guard_keeps_refusals_as_long_as_the_program() -> None:
    """The trigger has the days as a constant."""
    versions = Path(alembic_config().get_main_option("script_location") or "") / "versions"
    (migration,) = versions.glob("0015_*.py")
    assert re.findall(r"interval '(\d+) days'", migration.read_text()) == [str(REFUSALS_KEPT.days)]


# -- how the role gets its rights, and who notices ----------------------------------------------


async def owner_of(database: dict[str, str], rights: str) -> AsyncIterator[dict[str, str]]:
    name = f"owner_{uuid4().hex[:12]}"
    admin = await connect(database)
    await admin.execute(f"CREATE ROLE {name} LOGIN {rights}")
    await admin.execute(f"GRANT CREATE, USAGE ON SCHEMA public TO {name}")
    try:
        yield {**database, "DB_USER": name}
    finally:
        await admin.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
        await admin.close()


@pytest.fixture
async def plain_owner(database: dict[str, str]) -> AsyncIterator[dict[str, str]]:
    """The variables of an owner who may create no role."""
    async for variables in owner_of(database, "NOCREATEROLE"):
        yield variables


async def test_without_a_role_the_migration_goes_on(
    database: dict[str, str], plain_owner: dict[str, str]
) -> None:
    """One sentence says what is missing; the owner serves, with a warning. Made, it is granted."""
    role = f"run_{uuid4().hex[:12]}"
    settings = load_settings(
        **{name.lower(): value for name, value in plain_owner.items()}, db_run_role=role
    )
    said: list[str] = []
    await migrate(settings, said.append)
    (missing,) = (sentence for sentence in said if role in sentence)
    assert missing.startswith(f'There is no role "{role}" for instances')
    async with served(plain_owner) as client:
        (warning,) = (await client.get("/readyz")).json()["warnings"]
        assert "as the owner of the tables:" in warning
    await query(database, f"CREATE ROLE {role} LOGIN")
    try:
        # What the owner may not give is left out, in a sentence each.
        owner = await connect(plain_owner)
        notices: list[str] = []
        owner.add_log_listener(lambda _, message: notices.append(str(message.message)))
        await owner.execute("SELECT public.grant_to_instances($1)", role)
        await owner.close()
        assert f"Not done, for lack of a right: GRANT pg_read_all_stats TO {role}" in str(notices)
        # Before PostgreSQL 15 the schema public is not the owner's, and everybody may create in it.
        open_schema = "Not done, for lack of a right: REVOKE CREATE ON SCHEMA public" in str(
            notices
        )
        assert open_schema == (await major_version(database) < 15)
        # The database is another role's.
        temporary = f"REVOKE TEMPORARY ON DATABASE {database['DB_NAME']} FROM PUBLIC"
        assert f"Not done, for lack of a right: {temporary}" in str(notices)
        async with served({**database, "DB_USER": role}) as client:
            assert (await client.post("/api/balance", json={"userId": 1, "amount": -2})).is_success
            assert "warnings" not in (await client.get("/readyz")).json()
    finally:
        await query(database, f"DROP OWNED BY {role}")
        await query(database, f"DROP ROLE {role}")


async def test_an_instance_without_the_owner_serves(
    instances: dict[str, str], tmp_path: Path
) -> None:
    """On a schema at head the owner is not needed; no statement lacks a right, in all ten jobs."""
    log = tmp_path / "log"
    async with (
        Instance(instances, log=log, JOB_MIN_SECONDS="0", JOB_WARM_UP_SECONDS="0") as instance,
        http_client(instance.url) as client,
    ):
        assert "warnings" not in (await client.get("/readyz")).json()
        for key in ("a", "a"):
            answer = await client.post(
                "/api/balance", json={"userId": 1, "amount": -2}, headers={"Idempotency-Key": key}
            )
            assert answer.is_success
    assert "permission denied" not in log.read_text()
    assert "too many rights" not in log.read_text()


async def test_a_superuser_is_warned_of_once(database: dict[str, str], tmp_path: Path) -> None:
    """In the log, and in /readyz for as long as it serves so."""
    log = tmp_path / "log"
    await migrated(database)
    # a password, which this server does not ask for, keeps the user
    async with served({**database, "DB_PASSWORD": "x"}, log=log) as client:
        for _ in range(2):
            (warning,) = (await client.get("/readyz")).json()["warnings"]
            assert "as a superuser:" in warning
    assert log.read_text().count("too many rights") == 1
