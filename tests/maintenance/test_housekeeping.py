"""The ten jobs, on a real database and with real runs."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from random import Random
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest
from typing_extensions import override

from balance_app.balances.errors import InsufficientFunds
from balance_app.balances.repository import CHANGE, CHANGE_ONCE, OPEN, REFUSALS_KEPT, REFUSE_ONCE
from balance_app.db.pool import Database
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.api.history import KEEP_TO_INDEX
from balance_app.jobs.declarations import Declared
from balance_app.jobs.job import Registry
from balance_app.jobs.repository import Claimed, JobRepository, Me
from balance_app.jobs.run import Run
from balance_app.jobs.schedule import Every
from balance_app.jobs.transaction import LeaseLostError
from balance_app.maintenance import audits, batches, housekeeping, limits, summaries
from balance_app.maintenance.audits import LedgerMismatchError
from balance_app.maintenance.housekeeping import ANALYZE
from balance_app.maintenance.limits import LimitNearError
from balance_app.settings import load_settings
from tests.mutants import replaced
from tests.processes import connect

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

REGISTRY = Registry.load("balance_app.maintenance")
JOBS = tuple(REGISTRY.values())
# those that are analyzed, and the two with the schema's version
TABLES = len(ANALYZE) + 1

CLAIM = """
UPDATE jobs SET holder = $2, server = 'test', started_at = clock_timestamp(), fence = fence + 1,
    lease_expires_at = clock_timestamp() + interval '1 hour'
WHERE name = $1
RETURNING fence, due_at, checkpoint, schedule, anchor_at, started_at
"""

FREE = """
UPDATE jobs SET holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL,
    checkpoint = CASE WHEN $2 THEN checkpoint END
WHERE name = $1
"""


class CutError(BaseException):
    """The run ends here, as when its instance is killed."""


class TracedRun(Run):
    """A run that does not sleep, records its progress, and can be cut after some batches."""

    cut_after: int | None = None
    loses_lease: bool = False
    seen: tuple[tuple[int, int | None, str], ...] = ()

    @override
    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        self.seen += ((done, total, note),)

    @override
    async def pace(self) -> None:
        if len(self.seen) == self.cut_after:
            raise CutError

    @override
    async def checkpoint(self, state: object) -> None:
        if self.loses_lease:
            raise LeaseLostError("cut between its effect and its commit")
        await super().checkpoint(state)


class JobRunner:
    """A migrated database, and jobs that are run by the test."""

    def __init__(self, database: Database, connection: Connection) -> None:
        self.connection = connection
        self._database = database
        self._me = Me(uuid4(), "test")
        self._jobs = JobRepository(database, self._me, timedelta(hours=1))
        self.last: TracedRun | None = None

    async def declare(self) -> None:
        await self._jobs.declare({each.name: Declared(str(each.schedule)) for each in JOBS})

    async def run(
        self, name: str, *, cut_after: int | None = None, loses_lease: bool = False
    ) -> str:
        """Run a job and return its result; a cut run leaves its checkpoint."""
        row = await self.connection.fetchrow(CLAIM, name, self._me.id)
        assert row is not None
        checkpoint = row["checkpoint"]
        claimed = Claimed(
            name=name,
            fence=row["fence"],
            due_at=row["due_at"],
            attempt=0,
            resumed=None if checkpoint is None else json.loads(checkpoint),
            cancel_requested_by=None,
            schedule=row["schedule"],
            anchor_at=row["anchor_at"],
            started_at=row["started_at"],
            round=0,
        )
        run = self.last = TracedRun(claimed, self._database, self._jobs, min_seconds=0)
        run.cut_after, run.loses_lease = cut_after, loses_lease
        was_cut = False
        try:
            result = await REGISTRY[name].function(run)
        except (CutError, LeaseLostError):
            was_cut = True
            raise
        finally:
            await self.connection.execute(FREE, name, was_cut)
        assert isinstance(result, str)
        return result

    async def rewrite(self, *statements: str) -> None:
        """Change rows with the ledger's triggers off."""
        async with self.connection.transaction():
            await self.connection.execute("ALTER TABLE entries DISABLE TRIGGER USER")
            for statement in statements:
                await self.connection.execute(statement)
            await self.connection.execute("ALTER TABLE entries ENABLE TRIGGER USER")

    async def populate(self, users: int, entries: int) -> None:
        """Give users 1 to `users` this many entries each; every second one has a key."""
        for statement in POPULATE:
            await self.connection.execute(statement, users, entries)
        await self.connection.execute(
            "SELECT setval(pg_get_serial_sequence('users', 'id'), max(id)) FROM users"
        )

    async def rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.connection.fetch(sql, *arguments)]


POPULATE = (
    """
    INSERT INTO users (id, balance, version)
    SELECT id, 1000 - $2::bigint + 1, $2 FROM generate_series(2, $1::bigint) AS id
    """,
    """
    INSERT INTO entries (user_id, version, amount, balance, key)
    SELECT id, version, CASE version WHEN 1 THEN 1000 ELSE -1 END,
           CASE id WHEN 1 THEN 10000 ELSE 1000 END - version + 1,
           CASE version % 2 WHEN 0 THEN format('key-%s-%s', id, version) END
    FROM generate_series(1, $1::bigint) AS id, generate_series(1, $2::bigint) AS version
    WHERE id > 1 OR version > 1
    """,
    """
    UPDATE users SET balance = balance - $2 + 1, version = $2 + 0 * $1 WHERE id = 1
    """,
    """
    INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
    SELECT key, 'accepted', user_id, amount, balance, version, at FROM entries
    WHERE key IS NOT NULL AND user_id <= $1 AND version <= $2
    """,
)


@pytest.fixture
async def runner(database: dict[str, str]) -> AsyncIterator[JobRunner]:
    settings = load_settings(**{name.lower(): value for name, value in database.items()})
    pool = Database(settings)
    await pool.start()
    connection = await connect(database)
    runner = JobRunner(pool, connection)
    await runner.declare()
    try:
        yield runner
    finally:
        await pool.stop()
        await connection.close()


# -- all of them ------------------------------------------------------------------------------

FRESH = {
    "watch-limits": r"watched 7 limits and 1 user: most used is .+ \d+%",
    "audit-ledger": r"checked 1 entry of 1 user: all balances match",
    "prune-refused-keys": r"removed 0 refusals older than 7 days",
    "audit-keys": r"checked 0 idempotency keys: all agree with the ledger",
    "note-daily-balances": r"read 1 user: recorded 1 new balance",
    "total-days": r"read 1 user: counted 1 new entry",
    "prune-history": r"removed 0 runs older than 30 days and 0 instances not seen for a day",
    "audit-daily-balances": r"checked 1 daily balance: all agree with the ledger",
    "refresh-statistics": rf"refreshed the statistics of {len(ANALYZE)} of {len(ANALYZE)} tables.*",
    "record-sizes": rf"measured {TABLES} tables: 0\.\d MB, of which \w+ takes 0\.\d MB",
}


async def test_all_ten_work_on_a_new_database(runner: JobRunner) -> None:
    """Each returns one sentence, even with almost nothing to do."""
    assert {each.name for each in JOBS} == set(FRESH)
    for name, sentence in FRESH.items():
        assert re.fullmatch(sentence, await runner.run(name)), name


def test_every_job_has_an_interval_of_its_own() -> None:
    """All intervals differ, and lie between 3 and 30 minutes."""
    schedules = [each.schedule for each in JOBS]
    intervals = {schedule.interval for schedule in schedules if isinstance(schedule, Every)}
    assert len(intervals) == len(JOBS) == 10
    assert min(intervals) >= timedelta(minutes=3)
    assert max(intervals) <= timedelta(minutes=30)


def test_every_job_has_a_description_of_one_line() -> None:
    """One sentence, for people."""
    for each in JOBS:
        assert re.fullmatch(r"[A-Z][^\n]+\.", each.description), each.name


# The batches and the result of each job with 30 users with 4 entries each, 60 old refusals, and 5
# old runs of each job.
BUSY = {
    "watch-limits": (16, r"watched 7 limits and 30 users: .+"),
    "audit-ledger": (25, r"checked 120 entries of 30 users: all balances match"),
    "prune-refused-keys": (21, r"removed 60 refusals older than 7 days"),
    "audit-keys": (25, r"checked 120 idempotency keys: all agree with the ledger"),
    "note-daily-balances": (16, r"read 30 users: recorded 30 new balances"),
    "total-days": (16, r"read 30 users: counted 120 new entries"),
    "prune-history": (
        1 + 2 * len(JOBS),
        rf"removed {5 * len(JOBS)} runs older than 30 days and 0 instances not seen for a day",
    ),
    "audit-daily-balances": (16, r"checked 30 daily balances: all agree with the ledger"),
    "refresh-statistics": (
        len(ANALYZE),
        rf"refreshed the statistics of \d+ of {len(ANALYZE)} tables; .+",
    ),
    "record-sizes": (TABLES + 1, rf"measured {TABLES} tables: .+"),
}


@pytest.mark.parametrize("name", BUSY)
async def test_a_cut_job_resumes_from_its_checkpoint(runner: JobRunner, name: str) -> None:
    """Cut twice, the third run does only the rest; the traces are those of an uncut run."""
    await keep_busy(runner)
    number_of_batches, sentence = BUSY[name]
    seen: tuple[tuple[int, int | None, str], ...] = ()
    for after in (1, 4):
        with pytest.raises(CutError):
            await runner.run(name, cut_after=after)
        assert runner.last is not None
        seen += runner.last.seen
    assert re.fullmatch(sentence, await runner.run(name))
    assert runner.last is not None
    seen += runner.last.seen
    assert len(seen) == number_of_batches
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("name", BUSY)
async def test_a_repeated_run_changes_nothing_more(runner: JobRunner, name: str) -> None:
    """A run that loses its lease leaves no trace; a repeated run adds nothing."""
    await keep_busy(runner)
    before = await traces(runner)
    with pytest.raises(LeaseLostError):
        await runner.run(name, loses_lease=True)
    assert await traces(runner) == before
    assert re.fullmatch(BUSY[name][1], await runner.run(name))
    before = await traces(runner, but="table_sizes")
    await runner.run(name)
    assert await traces(runner, but="table_sizes") == before


async def test_a_checkpoint_of_another_version_is_ignored(runner: JobRunner) -> None:
    """A checkpoint with other members than this program's starts the job afresh."""
    await runner.populate(30, 4)
    await runner.connection.execute(
        "UPDATE jobs SET checkpoint = '{\"done\": 7}' WHERE name = 'audit-ledger'"
    )
    assert (await runner.run("audit-ledger")).startswith("checked 120 entries of 30 users")


async def keep_busy(runner: JobRunner) -> None:
    await runner.populate(30, 4)
    await runner.connection.execute("""
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
        SELECT 'no-' || n, 'refused', 1, -20000, 9999, 2, clock_timestamp() - interval '8 days'
        FROM generate_series(1, 60) AS n
    """)
    await runner.connection.execute("""
        INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome)
        SELECT name, n - 25, at, at, at, 'succeeded' FROM jobs, generate_series(1, 25) AS n,
               (SELECT clock_timestamp() - interval '31 days' AS at) AS old
    """)
    await runner.connection.execute("""
        INSERT INTO daily_balances (user_id, day, version, balance, at)
        SELECT user_id, date '2026-01-01', version, balance, at FROM entries WHERE version = 3
    """)
    await runner.connection.execute("SELECT pg_stat_force_next_flush()")


async def traces(runner: JobRunner, *, but: str = "") -> dict[str, str]:
    """Return all that jobs write, except the times."""
    return {
        table: str(await runner.rows(sql))
        for table, sql in {
            "daily_balances": "SELECT user_id, day, version FROM daily_balances ORDER BY 1, 2",
            "daily_totals": "SELECT * FROM daily_totals ORDER BY 1",
            "counted_users": "SELECT * FROM counted_users ORDER BY 1",
            "table_sizes": "SELECT name, bytes FROM table_sizes ORDER BY at, name",
            "job_runs": "SELECT id FROM job_runs ORDER BY 1",
            "keys": "SELECT key FROM idempotency_keys ORDER BY 1",
            "checkpoints": "SELECT name, checkpoint FROM jobs ORDER BY 1",
        }.items()
        if table != but
    }


# -- the audits -------------------------------------------------------------------------------


async def test_a_sound_ledger_matches(runner: JobRunner) -> None:
    """The result states how much was checked."""
    await runner.populate(1000, 12)
    assert await runner.run("audit-ledger") == (
        "checked 12 000 entries of 1 000 users: all balances match"
    )
    assert runner.last is not None
    assert runner.last.seen[-1] == (12_000, 12_000, "entries")


# A corruption of user 3 or 30 of 30 with 4 entries each, and the finding.
CORRUPTED = {
    "a balance": (
        "UPDATE users SET balance = 998 WHERE id = 3",
        "user 3: the balance is 998 at version 4, but entry 4, the last, left 997",
    ),
    "a version": (
        "UPDATE users SET version = 5 WHERE id = 30",
        "user 30: the balance is 997 at version 5, but entry 4, the last, left 997",
    ),
    "a missing entry": (
        "DELETE FROM entries WHERE user_id = 3 AND version = 2",
        "user 3: entry 2 is missing",
    ),
    "a missing first entry": (
        "DELETE FROM entries WHERE user_id = 30 AND version = 1",
        "user 30: entry 1 is missing",
    ),
    "a missing last entry": (
        "DELETE FROM entries WHERE user_id = 30 AND version = 4",
        "user 30: the balance is 997 at version 4, but entry 3, the last, left 998",
    ),
    "no entries": (
        "DELETE FROM entries WHERE user_id = 3",
        "user 3: there are no entries",
    ),
    "no entries of the last user": (
        "DELETE FROM entries WHERE user_id = 30",
        "user 30: there are no entries",
    ),
    "a running balance": (
        "UPDATE entries SET balance = 1 WHERE user_id = 3 AND version = 2",
        "user 3: entry 2 adds -1 to 1000 and leaves 1",
    ),
    "an amount": (
        "UPDATE entries SET amount = 9223372036854775807 WHERE user_id = 30 AND version = 3",
        "user 30: entry 3 adds 9223372036854775807 to 999 and leaves 998",
    ),
    "an opening": (
        "UPDATE entries SET balance = 1001 WHERE user_id = 3 AND version = 1",
        "user 3: entry 1 adds 1000 to 0 and leaves 1001",
    ),
    "an entry too many": (
        "INSERT INTO entries (user_id, version, amount, balance) VALUES (30, 5, 1, 998)",
        "user 30: the balance is 997 at version 4, but entry 5, the last, left 998",
    ),
    "a key that is gone": (
        "DELETE FROM idempotency_keys WHERE key = 'key-3-4'",
        "user 3: the key of entry 4 is not recorded",
    ),
    "a key that was refused": (
        "UPDATE idempotency_keys SET outcome = 'refused' WHERE key = 'key-3-4'",
        "user 3: the key of entry 4 is not recorded",
    ),
}


@pytest.mark.parametrize("what", CORRUPTED)
async def test_the_audit_names_the_user_that_differs(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Any fault is found, at any position in a batch, and no other user is named."""
    corrupt, message = CORRUPTED[what]
    await runner.populate(30, 4)
    await runner.rewrite(corrupt)
    for number_of_batches in (1, 17, 1000):
        monkeypatch.setattr(batches, "BATCHES", number_of_batches)
        with pytest.raises(LedgerMismatchError) as error:
            await runner.run("audit-ledger")
        assert str(error.value) == f"1 of 30 users differs: {message}"


async def test_the_audit_goes_on_after_the_first_fault(runner: JobRunner) -> None:
    """All users are checked; the first few that differ are named, the others counted."""
    await runner.populate(1200, 2)
    await runner.rewrite("UPDATE users SET balance = 5 WHERE id > 3")
    with pytest.raises(LedgerMismatchError) as error:
        await runner.run("audit-ledger")
    message = str(error.value)
    assert message.startswith("1 197 of 1 200 users differ: user 4: the balance is 5 at version 2")
    assert re.findall(r"user (\d+)", message) == ["4", "5", "6", "7", "8"]
    assert message.endswith("; and 1 192 more")


async def test_the_audits_find_no_fault_in_changes_under_way(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the batches are; the control finds some."""
    await runner.populate(4, 4)
    monkeypatch.setattr(batches, "BATCHES", 8)
    async with changes(database) as made:
        before = len(made)
        for _ in range(5):
            for name in ("audit-ledger", "audit-keys", "note-daily-balances", "total-days"):
                await runner.run(name)
            await runner.run("audit-daily-balances")
        assert len(made) > before
        async with asyncio.timeout(60):
            while not await differs_in_two_reads(runner):
                pass
    assert await days_as_counted(runner) != await days_as_they_were(runner)
    await runner.run("total-days")
    assert await days_as_counted(runner) == await days_as_they_were(runner)


async def differs_in_two_reads(runner: JobRunner) -> bool:
    """The control: read users and entries in two statements, as a naive audit would."""
    users = await runner.rows("SELECT id, version FROM users ORDER BY id")
    entries = await runner.rows("SELECT user_id, max(version) FROM entries GROUP BY 1 ORDER BY 1")
    return users != entries


@asynccontextmanager
async def changes(database: dict[str, str]) -> AsyncIterator[list[str]]:
    """Continuously change balances of users 1 to 4, and create users, as the service does."""
    made: list[str] = []

    async def client(number: int) -> None:
        random = Random(number)
        connection = await connect(database)
        try:
            while True:
                user, amount = random.randint(1, 4), random.choice([-40, -7, 3, 11])
                key = f"{number}-{len(made)}"
                made.append(key)
                match random.randint(0, 9):
                    case 0:
                        await connection.fetchrow(OPEN, random.randint(0, 9), key)
                    case 1:
                        await connection.fetchrow(REFUSE_ONCE, user, -(10**9), MAX_INTEGER, key)
                    case 2 | 3 | 4:
                        await connection.fetchrow(CHANGE_ONCE, user, amount, MAX_INTEGER, key)
                    case _:
                        await connection.fetchrow(CHANGE, user, amount, MAX_INTEGER)
        finally:
            connection.terminate()

    clients = [asyncio.create_task(client(number)) for number in range(3)]
    try:
        async with asyncio.timeout(30):
            while len(made) < 20 and not any(task.done() for task in clients):  # noqa: ASYNC110 - the clients' list has no event
                await asyncio.sleep(0.01)
        yield made
        assert not any(task.done() for task in clients)
    finally:
        for task in clients:
            task.cancel()
        await asyncio.wait(clients)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (
            "UPDATE idempotency_keys SET balance = 5 WHERE key = 'key-3-2'",
            "key key-3-2: it has the balance 5, but entry 2 of user 3 left 999",
        ),
        (
            "UPDATE idempotency_keys SET version = 9 WHERE key = 'key-3-2'",
            "key key-3-2: user 3 has no entry 9",
        ),
        (
            "UPDATE idempotency_keys SET amount = -2 WHERE key = 'key-3-2'",
            "key key-3-2: entry 2 of user 3 is not its change",
        ),
        (
            "UPDATE idempotency_keys SET at = at + interval '1 s' WHERE key = 'key-3-2'",
            "key key-3-2: entry 2 of user 3 is not its change",
        ),
        (
            "INSERT INTO idempotency_keys VALUES ('again', 'accepted', 3, -1, 999, 2)",
            "key again: entry 2 of user 3 is not its change",
        ),
        (
            "INSERT INTO idempotency_keys VALUES ('a-no', 'refused', 3, -999, 999, 2)",
            "key a-no: it refuses -999 to user 3, who had 999",
        ),
        (
            "INSERT INTO idempotency_keys VALUES ('a-no', 'refused', 3, -999, 998, 2)",
            "key a-no: it has the balance 998, but entry 2 of user 3 left 999",
        ),
    ],
)
async def test_the_audit_names_a_key_that_differs(
    runner: JobRunner, corrupt: str, message: str
) -> None:
    """A key whose replay would contradict the ledger is found."""
    await runner.populate(30, 4)
    await runner.connection.execute(corrupt)
    with pytest.raises(LedgerMismatchError) as error:
        await runner.run("audit-keys")
    assert re.fullmatch(rf"1 of \d+ idempotency keys differs: {message}", str(error.value))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (
            "UPDATE daily_balances SET balance = 5 WHERE user_id = 3",
            "the balance is 5, but entry 4 left 997",
        ),
        ("UPDATE daily_balances SET version = 7 WHERE user_id = 3", "there is no entry 7"),
    ],
)
async def test_the_audit_names_a_daily_balance_that_differs(
    runner: JobRunner, corrupt: str, message: str
) -> None:
    """A daily balance that contradicts the ledger is found."""
    await runner.populate(30, 4)
    await runner.run("note-daily-balances")
    await runner.connection.execute(corrupt)
    day = await runner.connection.fetchval("SELECT day::text FROM daily_balances WHERE user_id = 3")
    with pytest.raises(LedgerMismatchError) as error:
        await runner.run("audit-daily-balances")
    assert str(error.value) == f"1 of 30 daily balances differs: user 3 on {day}: {message}"


# -- pruning ----------------------------------------------------------------------------------


async def test_only_old_refusals_are_removed(runner: JobRunner) -> None:
    """None younger than 7 days, and no accepted change or created user, however old."""
    await runner.connection.execute("""
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
        SELECT outcome || age, outcome, 1, -1, 0, 1, clock_timestamp() - age::interval
        FROM unnest(ARRAY['opened', 'accepted', 'refused']) AS outcome,
             unnest(ARRAY['1 min', '6 days 23:59', '7 days 00:01', '400 days']) AS age
    """)
    assert await runner.run("prune-refused-keys") == "removed 2 refusals older than 7 days"
    refused = await runner.rows("SELECT key FROM idempotency_keys WHERE outcome = 'refused'")
    assert sorted(refused) == [("refused1 min",), ("refused6 days 23:59",)]
    others = "SELECT count(*) FROM idempotency_keys WHERE outcome <> 'refused'"
    assert await runner.rows(others) == [(8,)]


def test_the_documented_retention_of_refusals_is_the_real_one() -> None:
    """The days in the documentation are those of the constant."""
    assert re.findall(r"(\d+) days", str(InsufficientFunds.__doc__)) == [str(REFUSALS_KEPT.days)]


async def test_old_runs_are_removed_but_the_last_of_each_job(runner: JobRunner) -> None:
    """Runs older than 30 days are removed, except the last 20 of a job, and runs under way."""
    await runner.connection.execute("""
        INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome, server)
        SELECT 'audit-keys', n, at, at, at, 'succeeded', 'old-' || n
        FROM generate_series(1, 2500) AS n,
             LATERAL (SELECT clock_timestamp() - interval '60 days' + n * interval '1 min' AS at)
        UNION ALL
        SELECT 'audit-ledger', n, at, at, at, 'lost', 'few-' || n
        FROM generate_series(1, 20) AS n, (SELECT timestamptz '2020-01-01' AS at)
        UNION ALL
        SELECT 'total-days', n, at, at, at, 'failed', 'young-' || n
        FROM generate_series(1, 30) AS n,
             LATERAL (SELECT clock_timestamp() - interval '29 days' AS at)
        UNION ALL
        SELECT 'record-sizes', 1, at, at, NULL, NULL, 'runs'
        FROM (SELECT timestamptz '2020-01-01' AS at)
        UNION ALL
        SELECT 'record-sizes', n, at, at, at, 'timed_out', 'last-' || n
        FROM generate_series(2, 22) AS n, (SELECT timestamptz '2020-01-01' AS at)
    """)
    await runner.connection.execute("""
        INSERT INTO instances (id, server, last_heartbeat_at, highest_number, missing)
        SELECT gen_random_uuid(), age, clock_timestamp() - age::interval, 1, '{}'
        FROM unnest(ARRAY['1 s', '23:59', '24:01', '9 days']) AS age
    """)
    await runner.connection.execute("""
        INSERT INTO job_run_lines (job, fence, number, logged_at, level, text)
        SELECT job, fence, number, started_at, 'info', 'said'
        FROM job_runs, generate_series(1, 3) AS number;
        INSERT INTO job_run_tracebacks (job, fence, text) SELECT job, fence, 'failed' FROM job_runs
    """)
    assert await runner.run("prune-history") == (
        "removed 2 481 runs older than 30 days and 2 instances not seen for a day"
    )
    # what a run said goes with it, and only then
    (kept,) = await runner.rows("""
        SELECT (SELECT count(*) FROM job_run_lines), (SELECT count(*) FROM job_run_tracebacks),
               3 * count(*), count(*) FROM job_runs WHERE outcome IS DISTINCT FROM 'skipped'
    """)
    assert kept[:2] == kept[2:]
    left = {row[0] for row in await runner.rows("SELECT server FROM job_runs")}
    assert left == {
        *(f"old-{n}" for n in range(2481, 2501)),
        *(f"few-{n}" for n in range(1, 21)),
        *(f"young-{n}" for n in range(1, 31)),
        *("runs", *(f"last-{n}" for n in range(3, 23))),
    }
    assert sorted(await runner.rows("SELECT server FROM instances")) == [("1 s",), ("23:59",)]


# -- recording --------------------------------------------------------------------------------


async def test_a_daily_balance_is_the_last_of_its_day(runner: JobRunner) -> None:
    """One row per user and day, and only if the balance has changed since the last one."""
    await runner.populate(3, 1)
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 3 new balances"
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 0 new balances"
    await runner.connection.fetchrow(CHANGE, 2, -100, MAX_INTEGER)
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 1 new balance"
    noted = "SELECT user_id, version, balance FROM daily_balances ORDER BY day, user_id"
    assert await runner.rows(noted) == [(1, 1, 10_000), (2, 2, 900), (3, 1, 1000)]
    await runner.connection.execute("UPDATE daily_balances SET day = day - 1")
    await runner.connection.fetchrow(CHANGE, 3, -1, MAX_INTEGER)
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 1 new balance"
    assert (await runner.rows(noted))[3:] == [(3, 2, 999)]


async def test_days_are_totalled_once(runner: JobRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are counted once, however late; a user is active on a day once."""
    monkeypatch.setattr(summaries, "ENTRIES_AT_ONCE", 7)
    await runner.populate(10, 9)
    spread = "UPDATE entries SET at = timestamptz '2026-03-01 20:00Z' + version * interval '1 h'"
    await runner.rewrite(spread)
    assert await runner.run("total-days") == "read 10 users: counted 90 new entries"
    assert await runner.run("total-days") == "read 10 users: counted 0 new entries"
    assert await days_as_counted(runner) == await days_as_they_were(runner)
    assert [tuple(map(int, day[1:])) for day in await days_as_counted(runner)] == [
        (10, 19_000, 20, 0, 20, 10),
        (0, 0, 60, 0, 60, 10),
    ]
    await runner.connection.fetchrow(CHANGE, 2, 500, MAX_INTEGER)
    await runner.rewrite("UPDATE entries SET at = '2026-03-02 07:00Z' WHERE version = 10")
    await runner.connection.fetchrow(CHANGE, 2, -1, MAX_INTEGER)
    assert await runner.run("total-days") == "read 10 users: counted 2 new entries"
    assert await days_as_counted(runner) == await days_as_they_were(runner)


async def days_as_counted(runner: JobRunner) -> list[tuple[Any, ...]]:
    return await runner.rows("SELECT * FROM daily_totals ORDER BY day")


async def days_as_they_were(runner: JobRunner) -> list[tuple[Any, ...]]:
    return await runner.rows("""
        SELECT (at AT TIME ZONE 'UTC')::date,
               count(*) FILTER (WHERE version = 1),
               coalesce(sum(amount) FILTER (WHERE version = 1), 0),
               count(*) FILTER (WHERE version > 1),
               coalesce(sum(amount) FILTER (WHERE version > 1 AND amount > 0), 0),
               coalesce(-sum(amount) FILTER (WHERE amount < 0), 0),
               count(DISTINCT user_id)
        FROM entries GROUP BY 1 ORDER BY 1
    """)


async def test_sizes_are_recorded_and_removed_after_90_days(runner: JobRunner) -> None:
    """Every table is measured; the growth since the day before is reported."""
    await runner.connection.execute("""
        INSERT INTO table_sizes (at, name, bytes)
        SELECT clock_timestamp() - age, 'entries', 1
        FROM unnest(ARRAY[interval '1 day', '25 hours', '89 days', '91 days', '400 days']) AS age
    """)
    result = await runner.run("record-sizes")
    assert re.fullmatch(
        rf"measured {TABLES} tables: 0\.(\d) MB, of which \w+ takes 0\.\d MB; "
        r"0\.\1 MB more than a day before",
        result,
    )
    recorded = "SELECT name FROM table_sizes WHERE at = (SELECT max(at) FROM table_sizes)"
    tables = "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'"
    assert sorted(await runner.rows(recorded)) == sorted(await runner.rows(tables))
    assert await runner.rows("SELECT count(*) FROM table_sizes WHERE bytes = 1") == [(3,)]
    assert {(name,) for name in await summaries.read_table_bytes(runner.connection)} == set(
        await runner.rows(tables)
    )


# -- the planner, and limits ------------------------------------------------------------------


async def test_statistics_are_refreshed_where_rows_changed(runner: JobRunner) -> None:
    """The job covers all tables; it skips those without changes."""
    tables = await runner.rows("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
    assert {name for (name,) in tables} == {*ANALYZE, "balance_app_version"}
    assert all(statement == f"ANALYZE (SKIP_LOCKED) {name}" for name, statement in ANALYZE.items())
    await runner.run("refresh-statistics")
    await runner.populate(300, 4)
    await runner.connection.execute("SELECT pg_stat_force_next_flush()")
    assert re.fullmatch(
        rf"refreshed the statistics of [34] of {len(ANALYZE)} tables; "
        r"most had changed in entries: 1 199 rows",
        await runner.run("refresh-statistics"),
    )
    capabilities = "SELECT reltuples::int FROM pg_class WHERE oid = 'entries'::regclass"
    assert await runner.rows(capabilities) == [(1200,)]


async def test_a_locked_table_is_skipped_until_the_next_run(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """The job does not wait for the lock, and does not count the table as refreshed."""
    holder = await connect(database)
    async with holder.transaction():
        await holder.execute("LOCK TABLE entries IN SHARE UPDATE EXCLUSIVE MODE")
        assert f"of {len(ANALYZE) - 1} of {len(ANALYZE)} tables" in await runner.run(
            "refresh-statistics"
        )
    await holder.close()


async def test_a_balance_near_the_limit_is_reported(runner: JobRunner) -> None:
    """It is no fault, but its next deposit may be refused."""
    await runner.populate(5, 1)
    await runner.connection.execute("UPDATE users SET balance = $1 WHERE id IN (3, 5)", MAX_INTEGER)
    assert await runner.run("watch-limits") == (
        "watched 7 limits and 5 users: 2 users are near the largest balance, first user 3"
    )


async def test_ids_near_their_limit_fail_the_run(runner: JobRunner) -> None:
    """An id beyond 2^53-1 would not be exact in JSON: the run fails well before."""
    await runner.connection.execute("SELECT setval('users_id_seq', 8000000000000000)")
    with pytest.raises(LimitNearError, match=r"^1 limit near: numbers of users_id_seq 89%$"):
        await runner.run("watch-limits")


async def test_a_transaction_that_stays_open_is_reported(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps VACUUM from removing dead rows: the run fails."""
    monkeypatch.setattr(limits, "LIMITS", replaced(limits.LIMITS, "/ 3600", "/ 0.001"))
    with pytest.raises(LimitNearError, match="the hour that a transaction may last"):
        await runner.run("watch-limits")


# -- large tables -----------------------------------------------------------------------------


async def test_each_batch_reads_a_bounded_number_of_rows(runner: JobRunner) -> None:
    """With 100 000 entries, half of them one user's, a batch reads at most 8000 rows."""
    await runner.populate(10_000, 5)
    await runner.connection.execute("""
        WITH changed AS (
            UPDATE users SET balance = balance + 50000, version = version + 50000 WHERE id = 1
        )
        INSERT INTO entries (user_id, version, amount, balance)
        SELECT 1, 5 + n, 1, 9996 + n FROM generate_series(1, 50000) AS n
    """)
    await runner.run("note-daily-balances")
    await runner.connection.execute("""
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
        SELECT n, 'refused', 1, -1, 0, 1, '2026-01-01' FROM generate_series(1, 20000) AS n
    """)
    await runner.connection.execute("""
        INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome)
        SELECT 'audit-keys', n, '2026-01-01', '2026-01-01', '2026-01-01', 'succeeded'
        FROM generate_series(1, 20000) AS n
    """)
    for analyzed in (False, True):
        if analyzed:
            await runner.connection.execute("ANALYZE")
        for sql, *arguments in (
            (audits.LEDGER, 1, 20_000, 29_991, 2000),
            (audits.LEDGER, 5000, 0, 0, 2000),
            (audits.RECORDED_KEYS, "key-5", 1000, MAX_INTEGER),
            (audits.RECORDED_BALANCES, 5000, "2026-01-01", 1000),
            (summaries.RECORD_BALANCES, 5000, 1000),
            (summaries.COUNT, 1, 1000, 2000),
            (summaries.COUNT, 5000, 1000, 2000),
            (limits.NEAR_LARGEST, 5000, 2000, 0.8, MAX_INTEGER),
            (housekeeping.DELETE_REFUSALS, 500, REFUSALS_KEPT),
            (housekeeping.PRUNE_RUNS, "audit-kex", housekeeping.RUNS_AT_ONCE),
        ):
            async with runner.connection.transaction():
                if sql in {housekeeping.DELETE_REFUSALS, housekeeping.PRUNE_RUNS}:
                    await runner.connection.execute(KEEP_TO_INDEX)
                read = await rows_read(runner.connection, sql, *arguments)
            assert read <= 8000, sql
    assert await runner.run("audit-ledger") == (
        "checked 100 000 entries of 10 000 users: all balances match"
    )
    assert await runner.run("total-days") == "read 10 000 users: counted 100 000 new entries"
    assert await days_as_counted(runner) == await days_as_they_were(runner)


async def rows_read(connection: Connection, sql: str, *arguments: object) -> int:
    """Run a statement; return how many rows of tables it read, filtered ones included."""
    prepared = await connection.prepare(sql)
    (plan,) = await prepared.explain(*arguments, analyze=True)

    def below(node: dict[str, Any]) -> int:
        looked_at = 0
        if "Relation Name" in node and node["Node Type"] != "ModifyTable":
            each = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            looked_at = round(each * node["Actual Loops"])
        return looked_at + sum(below(child) for child in node.get("Plans", ()))

    return below(plan["Plan"])
