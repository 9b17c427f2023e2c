"""What is older than a restored database can't write to it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from balance_app.access import owner
from balance_app.access.repository import LOG_IN, KeyRepository
from balance_app.db.pool import Database, read
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.heartbeat import HeartbeatThread
from balance_app.jobs.repository import Completion
from balance_app.jobs.transaction import LEASE_LOST
from balance_app.maintenance import restoration
from balance_app.maintenance.restoration import LEAP, RESULT, make_safe
from balance_app.settings import Settings, load_settings
from tests.jobs.support import LEASE, JobsDatabase, on, until
from tests.mutants import replaced
from tests.processes import as_instance, empty_database, query
from tests.terminal import Screen, run

DONE = Completion(outcome="succeeded", result="done", seconds_ago=0)
KEPT = "fence = fence + 0 * $1::bigint"


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


async def _restore(jobs_db: JobsDatabase) -> restoration.Restored:
    return await make_safe(jobs_db.admin, by="ada", lease=LEASE)


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_run_of_before_writes_nothing(jobs_db: JobsDatabase, *, guarded: bool) -> None:
    """Its lease has not expired, and its instance lives: without the command it just goes on."""
    old = jobs_db.instance("old")
    await old.declare("moon")
    claimed = await old.claim()
    await old.renew(jobs_db.admin, ("moon", claimed.fence))
    if guarded:
        restored = await _restore(jobs_db)
        assert restored.runs == [("moon", "old")]
        assert await jobs_db.admin.fetchval("SELECT count(*) FROM instances") == 0
    renewal = (await old.renew(jobs_db.admin, ("moon", claimed.fence)))["moon", claimed.fence]
    written = [
        renewal.renewed,
        renewal.still_held,
        await old.jobs.checkpoint("moon", claimed.fence, '{"done": 9}'),
        await _commits(jobs_db, claimed.fence, old.me.id),
        await old.jobs.finish("moon", claimed.fence, DONE),
    ]
    assert written == [not guarded] * 5
    if guarded:
        assert await old.jobs.retract_losses() == []
        assert await jobs_db.outcomes("moon") == [("lost", RESULT)]
        row = await jobs_db.row("moon")
        assert (row["holder"], row["attempt"], row["last_outcome"]) == (None, 1, "lost")
        assert (row["lost_streak"], row["last_result"], row["checkpoint"]) == (0, RESULT, None)


async def _commits(jobs_db: JobsDatabase, fence: int, holder: UUID) -> bool:
    """Commit a transaction as a run does; False: it has lost its lease."""
    connection = await jobs_db.connect()
    settings = {"job": "moon", "fence": str(fence), "holder": str(holder)}
    try:
        async with connection.transaction():
            for name, value in settings.items():
                await connection.execute(
                    "SELECT set_config($1, $2, true)", f"balance_app.{name}", value
                )
            await connection.execute("SELECT hold_lease()")
    except asyncpg.PostgresError as error:
        if error.sqlstate != LEASE_LOST:
            raise
        return False
    return True


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_claim_of_after_the_moment_is_not_repeated(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """The restored table would give an instance the very fence that it still has a run with."""
    if not guarded:
        without = replaced(restoration.RAISE_FENCES, "fence = fence + $1", KEPT)
        monkeypatch.setattr(restoration, "RAISE_FENCES", without)
    instance = jobs_db.instance()
    await instance.declare("moon")
    on_old_server = ("moon", 1)  # claimed there after the moment that was restored
    await _restore(jobs_db)
    await jobs_db.ready("moon")
    claimed = await instance.claim()
    assert (claimed.fence == 1) is not guarded
    assert claimed.fence in {1, LEAP + 1}
    renewal = (await instance.renew(jobs_db.admin, on_old_server))[on_old_server]
    assert renewal.renewed is not guarded
    assert await instance.jobs.finish(*on_old_server, DONE) is not guarded


async def test_no_job_starts_before_a_lease_is_over(jobs_db: JobsDatabase) -> None:
    """A run may go on for so long on the old server; a tick that is too late stays too late."""
    instance = jobs_db.instance()
    await instance.declare("held", "waits", "late", "later")
    await jobs_db.admin.execute("UPDATE jobs SET ready_at = ready_at + interval '1 h'")
    await jobs_db.ready("held", seconds_ago=9)
    assert (await instance.claim()).name == "held"
    for name in ("waits", "late"):
        await jobs_db.ready(name, seconds_ago=9)
    within = "UPDATE jobs SET start_within = '1 s' WHERE name IN ('late', 'held')"
    await jobs_db.admin.execute(within)
    before = {name: await jobs_db.row(name) for name in ("late", "later")}
    await _restore(jobs_db)
    assert (await instance.claim_next()).claimed is None
    waits = "SELECT ready_at - clock_timestamp() FROM jobs WHERE name = $1"
    for name in ("held", "waits"):
        left = await jobs_db.admin.fetchval(waits, name)
        assert LEASE - timedelta(seconds=10) < left <= LEASE
    for name, row in before.items():
        assert (await jobs_db.row(name))["ready_at"] == row["ready_at"]
    assert [each.name for each in await instance.jobs.late(["held", "waits", "late", "later"])] == [
        "late"
    ]


async def test_the_longest_lease_in_the_backup_counts(jobs_db: JobsDatabase) -> None:
    """Whoever calls the command may not know what the instances were configured with."""
    instance = jobs_db.instance()
    await instance.declare("held", "waits")
    await jobs_db.ready("held", seconds_ago=9)
    assert (await instance.claim()).name == "held"
    await jobs_db.admin.execute(
        "UPDATE jobs SET lease_expires_at = last_heartbeat_at + interval '5 min'"
        " WHERE name = 'held'"
    )
    await _restore(jobs_db)
    rows = await jobs_db.admin.fetch("SELECT ready_at - clock_timestamp() AS left FROM jobs")
    assert all(row["left"] > timedelta(minutes=4) for row in rows)


async def test_a_declaration_cuts_no_wait_for_a_long_lease_short(jobs_db: JobsDatabase) -> None:
    """However short its interval, no job starts while runs may go on on the old server."""
    lease = timedelta(minutes=20)
    instance = jobs_db.instance(lease=lease)
    await instance.declare("moon", schedule="every 60 s")
    await make_safe(jobs_db.admin, by="ada", lease=lease)
    waits = (await jobs_db.row("moon"))["ready_at"]
    await instance.declare("moon", schedule="every 60 s")
    assert (await jobs_db.row("moon"))["ready_at"] == waits


async def test_numbers_of_after_the_moment_are_not_given_again(database: dict[str, str]) -> None:
    """Ids of users, generations of keys, logins, the installation; the action says so."""
    assert (await run("migrate", **database))[0] == 0
    (before,) = await query(database, "SELECT installation FROM balance_app_version")
    async with owner.Owner(_settings(database)) as keys:
        await keys.create_key("till", ["read"], by="ada", expires=None, deliver=lambda _: None)
    key_id = await _value(database, "SELECT id FROM api_keys")
    hour, day = timedelta(hours=1), timedelta(days=1)
    await query(database, LOG_IN, "session", bytes(32), key_id, hour, day, 9)
    code, out, err = await run("restored", "--yes", **database)
    assert (code, err) == (0, "")
    assert out.startswith("Nothing older can write to it: 0 runs lost, 1 login ended, fences and")
    assert await _value(database, "SELECT generation FROM access_state") == LEAP + 3
    assert await _value(database, "SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 0
    pool = Database(_settings(database))
    await pool.start()
    try:
        assert await KeyRepository(pool).state() == (LEAP + 3, True)
        assert [each.principal.name for each in await KeyRepository(pool).valid()] == ["till"]
    finally:
        await pool.stop()
    sequences = "SELECT sequencename, last_value FROM pg_sequences WHERE sequencename = ANY ($1)"
    rows = await query(database, sequences, ["users_id_seq", "jobs_number_seq"])
    found = {row["sequencename"]: row["last_value"] for row in rows}
    assert found == {"users_id_seq": LEAP + 1, "jobs_number_seq": LEAP}
    (after,) = await query(database, "SELECT installation FROM balance_app_version")
    assert after != before
    action = "SELECT id, action, subject, before, after FROM actions ORDER BY id DESC LIMIT 1"
    ((number, *rest),) = await query(database, action)
    assert number > LEAP
    assert rest[:2] == ["database restored", "database"]
    assert str(before["installation"]) in rest[2]
    assert str(after["installation"]) in rest[3]
    assert (await run("restored", "--yes", **database))[0] == 0  # once more does no harm
    assert await _value(database, "SELECT generation FROM access_state") == 2 * LEAP + 3


def _settings(database: dict[str, str]) -> Settings:
    return load_settings(**{name.lower(): value for name, value in database.items()})


async def _value(database: dict[str, str], sql: str) -> object:
    ((value,),) = await query(database, sql)
    return value


async def test_who_may_and_where(postgres: dict[str, str], database: dict[str, str]) -> None:
    """The owner alone, of a schema of this program, on a server that is no longer in recovery."""
    code, out, err = await run("restored", "--yes", **database)
    assert (code, out) == (1, "")
    assert err.startswith("The database has no schema of balance_app (DB_SCHEMA).")
    assert (await run("migrate", **database))[0] == 0
    serving = as_instance(database)
    del serving["MIGRATE_DATABASE_URL"]
    code, out, err = await run("restored", "--yes", **serving)
    assert (code, out) == (1, "")
    assert err.startswith("The role of this connection may not do that (permission denied")
    code, out, err = await run("restored", "--yes", **{**database, "DB_PORT": "1"})
    assert (code, out, err.count("\n")) == (3, "", 1)
    async with empty_database(postgres) as other:
        assert (await run("migrate", **other))[0] == 0
        name = other["DB_NAME"]
        await query(other, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        code, out, err = await run("restored", "--yes", **other)
        assert (code, out) == (3, "")
        assert err.startswith("The database is read-only at present")
    untouched = "SELECT generation FROM access_state"
    assert await _value(database, untouched) == 1
    async with Screen("restored", **database) as screen:
        await screen.until("everybody has to log in again")
        screen.type("n\n")
        assert await screen.end() == 1
    assert await _value(database, untouched) == 1
    async with Screen("restored", **database) as screen:
        await screen.until("everybody has to log in again")
        screen.type("y\n")
        assert await screen.end() == 0
    assert await _value(database, untouched) == LEAP + 1


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_an_instance_notices_when_it_connects_again(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """Its address leads to the restored server now: it begins there as at start, jobs too."""
    if not guarded:
        monkeypatch.setattr(Database, "_open_same", Database._open_connection)
    pool = Database(jobs_db.settings)
    await pool.start()
    try:
        before = pool.installation
        assert before is not None
        pid = await pool.run(lambda con: con.fetchval("SELECT pg_backend_pid()"))
        restored = await _restore(jobs_db)
        await jobs_db.admin.execute("SELECT pg_terminate_backend($1, 5000)", pid)
        answers = set()

        async def again() -> bool:
            try:
                await pool.run(lambda con: read(con, "SELECT"))
            except DatabaseUnavailable as error:
                answers.add(error.detail)
                return False
            return True

        await until(again)
        await asyncio.sleep(0)
        noticed = pool.installation == before._replace(id=str(restored.installation))
        assert noticed is guarded
        assert any("was replaced by another" in each for each in answers) is guarded
    finally:
        await pool.stop()


HEARTBEATS = """
SELECT pid, query_start FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE '%one row for each lease to renew%'
  AND pid <> pg_backend_pid()
"""
CUT_OTHERS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid NOT IN (pg_backend_pid(), $1)
"""


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_heartbeats_leave_the_old_server_too(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """Their connection may still lead there when that of a request no longer does."""
    if not guarded:
        monkeypatch.setattr(HeartbeatThread, "connect_anew", lambda _: None)

    async def heartbeats() -> dict[int, datetime]:
        return {row["pid"]: row["query_start"] for row in await jobs_db.admin.fetch(HEARTBEATS)}

    async with jobs_db.scheduler([]) as scheduler:
        ((old, _),) = (await until(heartbeats)).items()
        await _restore(jobs_db)
        await jobs_db.admin.execute(CUT_OTHERS, old)

        async def noticed() -> bool:
            return scheduler._capabilities is None

        await until(noticed)
        at = await jobs_db.admin.fetchval("SELECT clock_timestamp()")

        async def renewed() -> list[int]:
            return [pid for pid, sent_at in (await heartbeats()).items() if sent_at > at]

        assert (await until(renewed) == [old]) is not guarded
