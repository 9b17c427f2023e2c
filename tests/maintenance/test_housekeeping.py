"""The ten jobs, on a real database and with real runs."""

import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from balance_app.balances.accounts import Patch
from balance_app.balances.errors import InsufficientFunds
from balance_app.balances.model import Movement
from balance_app.balances.repository import REFUSALS_KEPT
from balance_app.db.pool import KEEP_TO_INDEX
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.schedule import Every
from balance_app.jobs.transaction import LeaseLostError
from balance_app.maintenance import batches, housekeeping, limits, summaries
from balance_app.maintenance.audits import daily_balances, keys, ledger
from balance_app.maintenance.batches import MissingRightError
from balance_app.maintenance.housekeeping import ANALYZE
from balance_app.maintenance.limits import LimitNearError
from tests.maintenance.runner import (
    JOBS,
    Connection,
    CutError,
    JobRunner,
    days_as_counted,
    days_as_they_were,
)
from tests.mutants import replaced
from tests.processes import RUN_ROLE, connect, flush_counters, major_version, unguarded

# those that are analyzed, and the two with the schema's version
TABLES = len(ANALYZE) + 1


# what the job says before PostgreSQL 17
LEFT = rf"0 of {len(ANALYZE)} tables; left {len(ANALYZE)} to autovacuum: only their owner may.*"

# -- all of them ------------------------------------------------------------------------------

FRESH = {
    "watch-limits": r"watched 9 limits and 1 user: most used is .+ \d+%",
    "audit-ledger": r"checked 1 entry of 1 user: all balances match",
    "prune-refused-keys": (r"removed 0 refusals older than 7 days, ended 0 overdue holds"),
    "audit-keys": r"checked 0 keys and external ids: all agree with the ledger",
    "note-daily-balances": r"read 1 user: recorded 1 new balance; seal 1 is [\da-f]{64}",
    "total-days": r"read 1 user: counted 1 new entry",
    "prune-history": r"removed 0 runs older than 30 days and 0 instances not seen for a day",
    "audit-daily-balances": r"checked 1 daily balance: all agree with the ledger",
    "refresh-statistics": (
        rf"refreshed the statistics of (?:{len(ANALYZE)} of {len(ANALYZE)} tables.*|{LEFT})"
    ),
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
    "watch-limits": (16, r"watched 9 limits and 30 users: .+"),
    "audit-ledger": (57, r"checked 120 entries of 30 users: all balances match"),
    "prune-refused-keys": (
        25,
        r"removed 60 refusals older than 7 days, ended 0 overdue holds",
    ),
    "audit-keys": (27, r"checked 120 keys and external ids: all agree with the ledger"),
    "note-daily-balances": (16, r"read 30 users: recorded 30 new balances"),
    "total-days": (16, r"read 30 users: counted 120 new entries"),
    "prune-history": (
        1 + 2 * len(JOBS),
        rf"removed {5 * len(JOBS)} runs older than 30 days and 0 instances not seen for a day",
    ),
    "audit-daily-balances": (16, r"checked 30 daily balances: all agree with the ledger"),
    "refresh-statistics": (
        len(ANALYZE),
        rf"refreshed the statistics of (?:\d+ of {len(ANALYZE)} tables; .+|{LEFT})",
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
    await flush_counters(runner.connection)


async def traces(runner: JobRunner, *, but: str = "") -> dict[str, str]:
    """Return all that jobs write, except the times."""
    return {
        table: str(await runner.rows(sql))
        for table, sql in {
            "daily_balances": "SELECT user_id, day, version FROM daily_balances ORDER BY 1, 2",
            "seals": "SELECT number, heads FROM seals ORDER BY 1",
            "seal_parts": "SELECT * FROM seal_parts ORDER BY 1, 2",
            "hashes": "SELECT id, hash FROM users ORDER BY 1",
            "daily_totals": "SELECT * FROM daily_totals ORDER BY 1",
            "counted_users": "SELECT * FROM counted_users ORDER BY 1",
            "table_sizes": "SELECT name, bytes FROM table_sizes ORDER BY at, name",
            "job_runs": "SELECT id FROM job_runs ORDER BY 1",
            "keys": "SELECT key FROM idempotency_keys ORDER BY 1",
            "checkpoints": "SELECT name, checkpoint FROM jobs ORDER BY 1",
        }.items()
        if table != but
    }


# -- pruning ----------------------------------------------------------------------------------


async def test_only_old_refusals_are_removed(runner: JobRunner) -> None:
    """None younger than 7 days, and no accepted change, however old."""
    await runner.connection.execute("""
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
        SELECT outcome || age, outcome, 1, -1, 0, 1, clock_timestamp() - age::interval
        FROM unnest(ARRAY['accepted', 'refused']) AS outcome,
             unnest(ARRAY['1 min', '6 days 23:59', '7 days 00:01', '400 days']) AS age
    """)
    assert await runner.run("prune-refused-keys") == (
        "removed 2 refusals older than 7 days, ended 0 overdue holds"
    )
    refused = await runner.rows("SELECT key FROM idempotency_keys WHERE outcome = 'refused'")
    assert sorted(refused) == [("refused1 min",), ("refused6 days 23:59",)]
    others = "SELECT count(*) FROM idempotency_keys WHERE outcome <> 'refused'"
    assert await runner.rows(others) == [(4,)]


async def test_overdue_holds_end_though_nobody_looks(runner: JobRunner) -> None:
    """Those of accounts in any batch, also of a frozen one; no other hold."""
    await runner.populate(30, 1)
    for user_id in (1, 2, 17, 30):
        await runner.hold(5, user_id=user_id)
        await runner.hold(6, user_id=user_id)
    await runner.set(17, Patch(frozen=True))
    for hold in ((2, 1), (17, 1), (17, 2), (30, 1)):
        await runner.let_expire(*hold)
    ended = "removed 0 refusals older than 7 days, ended {} overdue holds"
    assert await runner.run("prune-refused-keys") == ended.format(4)
    held = "SELECT id, held, hold_events FROM users WHERE held > 0 OR hold_events > 0 ORDER BY id"
    assert await runner.rows(held) == [(1, 11, 2), (2, 6, 3), (17, 0, 4), (30, 6, 3)]
    assert (await runner.run("audit-ledger")).startswith("checked 30 entries and 8 holds")
    assert await runner.run("prune-refused-keys") == ended.format(0)


async def test_many_overdue_holds_of_an_account_end_in_several_transactions(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job goes on with the account until none of its holds is overdue."""
    monkeypatch.setattr(housekeeping, "HOLDS_AT_ONCE", 2)
    await runner.populate(3, 1)
    for _ in range(5):
        await runner.hold(1, user_id=2)
    for number in range(1, 6):
        await runner.let_expire(2, number)
    ended = "removed 0 refusals older than 7 days, ended 5 overdue holds"
    assert await runner.run("prune-refused-keys") == ended
    assert await runner.rows("SELECT held, hold_events FROM users WHERE id = 2") == [(0, 10)]


async def test_a_locked_account_keeps_no_overdue_hold_of_others(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """Its own ends in a later run."""
    await runner.populate(3, 1)
    for user_id in (2, 3):
        await runner.hold(5, user_id=user_id)
        await runner.let_expire(user_id, 1)
    other = await connect(database)
    held = "SELECT id FROM users WHERE held > 0"
    async with other.transaction():
        await other.execute("SELECT FROM users WHERE id = 2 FOR NO KEY UPDATE")
        assert (await runner.run("prune-refused-keys")).endswith(", ended 1 overdue hold")
        assert await runner.rows(held) == [(2,)]
    await other.close()
    assert (await runner.run("prune-refused-keys")).endswith(", ended 1 overdue hold")
    assert await runner.rows(held) == []


def test_the_documented_retention_of_refusals_is_the_real_one() -> None:
    """The days in the documentation are those of the constant."""
    assert re.findall(r"(\d+) days", str(InsufficientFunds.__doc__)) == [str(REFUSALS_KEPT.days)]


async def test_old_runs_are_removed_but_the_last_of_each_job(runner: JobRunner) -> None:
    """Runs older than 30 days are removed, except the last 20 of a job, and runs under way."""
    await runner.connection.execute("""
        INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome, server)
        SELECT 'audit-keys', n, at, at, at, 'succeeded', 'old-' || n
        FROM generate_series(1, 2500) AS n,
             LATERAL (
                 SELECT clock_timestamp() - interval '60 days' + n * interval '1 min' AS at
             ) AS x
        UNION ALL
        SELECT 'audit-ledger', n, at, at, at, 'lost', 'few-' || n
        FROM generate_series(1, 20) AS n, (SELECT timestamptz '2020-01-01' AS at) AS x
        UNION ALL
        SELECT 'total-days', n, at, at, at, 'failed', 'young-' || n
        FROM generate_series(1, 30) AS n,
             LATERAL (SELECT clock_timestamp() - interval '29 days' AS at) AS x
        UNION ALL
        SELECT 'record-sizes', 1, at, at, NULL, NULL, 'runs'
        FROM (SELECT timestamptz '2020-01-01' AS at) AS x
        UNION ALL
        SELECT 'record-sizes', n, at, at, at, 'timed_out', 'last-' || n
        FROM generate_series(2, 22) AS n, (SELECT timestamptz '2020-01-01' AS at) AS x
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


async def test_runs_that_ended_in_the_future_hold_up_no_others(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that was ahead has dated them so; they stay until they are old by the right one."""
    monkeypatch.setattr(housekeeping, "RUNS_AT_ONCE", 5)
    await runner.connection.execute("""
        INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome, server)
        SELECT 'audit-keys', n, at, at, at, 'succeeded', server
        FROM (VALUES ('ahead', 60, 1, 7), ('old', -60, 8, 40)) AS clock (server, days, first, last),
             LATERAL (SELECT clock_timestamp() + days * interval '1 day' AS at) AS x,
             generate_series(first, last) AS n ORDER BY n
    """)
    assert await runner.run("prune-history") == (
        "removed 13 runs older than 30 days and 0 instances not seen for a day"
    )
    left = await runner.rows("SELECT server, count(*) FROM job_runs GROUP BY 1 ORDER BY 1")
    assert left == [("ahead", 7), ("old", 20)]


async def test_an_instance_that_is_gone_stays_until_it_is_replaced(runner: JobRunner) -> None:
    """Or a month, so that the page does not forget it; one that came back goes after a day."""
    await runner.connection.execute("""
        INSERT INTO instances
            (id, server, started_at, last_heartbeat_at, highest_number, missing)
        SELECT gen_random_uuid(), server, clock_timestamp() - up::interval,
               clock_timestamp() - seen::interval, 1, '{}'
        FROM (VALUES
            ('gone', '9 days', '2 days'),
            ('gone long ago', '40 days', '31 days'),
            ('replaced', '9 days', '2 days'),
            ('replaced', '47 hours', '1 s'),
            ('replaced lately', '9 days', '23 hours'),
            ('replaced lately', '22 hours', '1 s')
        ) AS instance (server, up, seen)
    """)
    await runner.run("prune-history")
    left = await runner.rows("""
        SELECT server, last_heartbeat_at > clock_timestamp() - interval '1 min'
        FROM instances ORDER BY 1, 2
    """)
    assert left == [
        ("gone", False),
        ("replaced", True),
        ("replaced lately", False),
        ("replaced lately", True),
    ]


# -- recording --------------------------------------------------------------------------------


async def test_a_daily_balance_is_the_last_of_its_day(runner: JobRunner) -> None:
    """One row per user and day, and only if the balance has changed since the last one."""
    await runner.populate(3, 1)
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 3 new balances"
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 0 new balances"
    await runner.balances.change(Movement(2, -100))
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 1 new balance"
    noted = "SELECT user_id, version, balance FROM daily_balances ORDER BY day, user_id"
    assert await runner.rows(noted) == [(1, 1, 10_000), (2, 2, 900), (3, 1, 1000)]
    await runner.connection.execute("UPDATE daily_balances SET day = day - 1")
    await runner.balances.change(Movement(3, -1))
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
        (10, 19_000, 20, 0, 20, 10, 0, 0),
        (0, 0, 60, 0, 60, 10, 0, 0),
    ]
    await runner.balances.change(Movement(2, 500))
    await runner.rewrite("UPDATE entries SET at = '2026-03-02 07:00Z' WHERE version = 10")
    await runner.balances.change(Movement(2, -1))
    assert await runner.run("total-days") == "read 10 users: counted 2 new entries"
    assert await days_as_counted(runner) == await days_as_they_were(runner)


async def test_transfers_change_no_total(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are apart from deposits and withdrawals, also while one half alone is counted."""
    monkeypatch.setattr(batches, "BATCHES", 1000)
    await runner.populate(30, 4)
    await runner.move_money()
    with pytest.raises(CutError):
        await runner.run("total-days", cut_after=3)
    (half,) = await runner.rows("SELECT sum(transfers), sum(transferred) FROM daily_totals")
    assert half == (2, 11)
    assert await counted_balance(runner) == await balance_of_users(runner, 3)
    await runner.run("total-days")
    assert await days_as_counted(runner) == await days_as_they_were(runner)
    (transferred,) = await runner.rows("SELECT sum(transfers), sum(transferred) FROM daily_totals")
    assert transferred == (3, 15)
    assert await counted_balance(runner) == await balance_of_users(runner, 31)


async def counted_balance(runner: JobRunner) -> Decimal:
    rows = await runner.rows("SELECT sum(opening + deposited - withdrawn) FROM daily_totals")
    return Decimal(rows[0][0])


async def balance_of_users(runner: JobRunner, upto: int) -> Decimal:
    """What users have, and have paid to others."""
    rows = await runner.rows(
        "SELECT sum(amount) FROM entries WHERE user_id <= $1 AND other_user_id IS NULL", upto
    )
    return Decimal(rows[0][0])


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


async def test_sizes_dated_ahead_hide_no_newer_ones(runner: JobRunner) -> None:
    """They are from before PostgreSQL's clock was set back."""
    await runner.connection.execute("""
        INSERT INTO table_sizes (at, name, bytes)
        SELECT clock_timestamp() + interval '1 year', 'entries', 1
    """)
    await runner.run("record-sizes")
    sizes = await summaries.read_table_bytes(runner.connection)
    assert len(sizes) == TABLES
    assert sizes["entries"] > 1


# -- the planner, and limits ------------------------------------------------------------------


@pytest.fixture
async def maintainer(runner: JobRunner, database: dict[str, str]) -> JobRunner:
    """Jobs that may refresh statistics: before PostgreSQL 17 the tables have to be the role's."""
    if await major_version(database) < 17:
        for name in ANALYZE:
            await runner.connection.execute(f"ALTER TABLE {name} OWNER TO {RUN_ROLE}")
    return runner


async def test_what_only_its_owner_may_analyze_is_left_to_autovacuum(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """As before PostgreSQL 17; from there on the right is granted."""
    of_owners = await major_version(database) < 17
    said = await runner.run("refresh-statistics")
    assert bool(re.fullmatch(f"refreshed the statistics of {LEFT}", said)) == of_owners


async def test_statistics_are_refreshed_where_rows_changed(maintainer: JobRunner) -> None:
    """The job covers all tables; it skips those without changes."""
    runner = maintainer
    tables = await runner.rows("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
    assert {name for (name,) in tables} == {*ANALYZE, "balance_app_version"}
    assert all(statement == f"ANALYZE (SKIP_LOCKED) {name}" for name, statement in ANALYZE.items())
    await runner.run("refresh-statistics")
    await runner.populate(300, 4)
    await flush_counters(runner.connection)
    assert re.fullmatch(
        rf"refreshed the statistics of [34] of {len(ANALYZE)} tables; "
        r"most had changed in entries: 1 199 rows",
        await runner.run("refresh-statistics"),
    )
    capabilities = "SELECT reltuples::int FROM pg_class WHERE oid = 'entries'::regclass"
    assert await runner.rows(capabilities) == [(1200,)]


async def test_a_locked_table_is_skipped_until_the_next_run(
    maintainer: JobRunner, database: dict[str, str]
) -> None:
    """The job does not wait for the lock, and does not count the table as refreshed."""
    holder = await connect(database)
    async with holder.transaction():
        await holder.execute("LOCK TABLE entries IN SHARE UPDATE EXCLUSIVE MODE")
        assert f"of {len(ANALYZE) - 1} of {len(ANALYZE)} tables" in await maintainer.run(
            "refresh-statistics"
        )
    await holder.close()


# Calls a function for each row that ANALYZE samples.
SLOW_ANALYZE = """
CREATE FUNCTION slow(bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF current_query() LIKE 'ANALYZE%' THEN PERFORM pg_sleep(120); END IF;
    RETURN $1;
END$$;
CREATE INDEX slow ON entries (slow(amount))
"""


@pytest.mark.parametrize("limit", ["of the transaction", "of the job"])
async def test_a_table_that_takes_too_long_is_left_to_autovacuum(
    maintainer: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """The run says so, and goes on with the tables behind it."""
    if limit == "of the job":
        monkeypatch.setattr(housekeeping, "ANALYZE_SECONDS", 1)
    elif await major_version(database) < 17:
        pytest.skip("PostgreSQL 17 brought transaction_timeout")
    else:
        maintainer.set_lease(timedelta(seconds=2))
    await maintainer.connection.execute(SLOW_ANALYZE)
    others = len(ANALYZE) - 1
    left = f"{others} of {len(ANALYZE)} tables; left entries to autovacuum: ANALYZE took too long"
    assert await maintainer.run("refresh-statistics") == f"refreshed the statistics of {left}"
    analyzed = "SELECT relname::text FROM pg_stat_user_tables WHERE last_analyze IS NOT NULL"
    await flush_counters(maintainer.connection)
    assert {name for (name,) in await maintainer.rows(analyzed)} == {*ANALYZE} - {"entries"}
    # the control
    await maintainer.connection.execute("DROP INDEX slow")
    assert f"of {len(ANALYZE)} tables" in await maintainer.run("refresh-statistics")
    await flush_counters(maintainer.connection)
    assert ("entries",) in await maintainer.rows(analyzed)


async def test_a_balance_near_the_limit_is_reported(runner: JobRunner) -> None:
    """It is no fault, but its next deposit may be refused."""
    await runner.populate(5, 1)
    async with unguarded(runner.connection):
        await runner.connection.execute(
            "UPDATE users SET balance = $1 WHERE id IN (3, 5)", MAX_INTEGER
        )
    assert await runner.run("watch-limits") == (
        "watched 9 limits and 5 users: 2 users are near the largest balance, first user 3"
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


# Of users 9001 to 10000 each pays the next one, or is paid, and back. Others have holds, of which
# user 1 has half, names, and keys of their opening.
TRANSFERS_AND_HOLDS = """
    WITH half AS (
        SELECT id, id + CASE id % 2 WHEN 1 THEN 1 ELSE -1 END AS other,
               CASE id % 2 WHEN 1 THEN -1 ELSE 1 END AS amount
        FROM generate_series(9001, 10000) AS id
    ), moved AS (
        UPDATE users SET version = 7 WHERE id > 9000
    )
    INSERT INTO entries
        (user_id, version, amount, balance, at, other_user_id, other_version, reverses)
    SELECT id, 6, amount, 996 + amount, timestamptz '2026-12-01', other, 6, NULL FROM half
    UNION ALL
    SELECT id, 7, -amount, 996, timestamptz '2026-12-01', other, 7, 6 FROM half;
    WITH placed AS (
        INSERT INTO holds (user_id, number, amount, at, expires_at)
        SELECT id, 1, 1, clock_timestamp(), timestamptz 'infinity'
        FROM generate_series(5501, 10000) AS id
        UNION ALL
        SELECT 1, number, 1, clock_timestamp(), 'infinity' FROM generate_series(1, 4500) AS number
    )
    UPDATE users SET held = CASE id WHEN 1 THEN 4500 ELSE 1 END,
                     hold_events = CASE id WHEN 1 THEN 4500 ELSE 1 END
    WHERE id = 1 OR id > 5500;
    UPDATE entries SET key = 'opening-' || user_id WHERE version = 1;
    INSERT INTO opening_keys (key, user_id, request)
    SELECT key, user_id, '{"balance":' || amount || ',"external_id":"user-' || user_id || '"}'
    FROM entries WHERE version = 1;
    INSERT INTO external_ids (external_id, user_id)
    SELECT 'user-' || id, id FROM users;
    INSERT INTO user_settings (user_id, settings_version, floor, frozen, external_id)
    SELECT id, 1, 0, false, 'user-' || id FROM users
"""


async def test_each_batch_reads_a_bounded_number_of_rows(runner: JobRunner) -> None:
    """With 102 000 entries, half of them one user's, a batch reads at most 16 000 rows."""
    await runner.populate(10_000, 5)
    async with unguarded(runner.connection):
        await runner.connection.execute("""
            WITH changed AS (
                UPDATE users SET balance = balance + 50000, version = version + 50000 WHERE id = 1
            )
            INSERT INTO entries (user_id, version, amount, balance)
            SELECT 1, 5 + n, 1, 9996 + n FROM generate_series(1, 50000) AS n
        """)
    await runner.run("note-daily-balances")
    await runner.rewrite(TRANSFERS_AND_HOLDS)
    await runner.connection.execute("""
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
        SELECT n, 'refused', 1, -1, 0, 1, '2026-01-01' FROM generate_series(1, 20000) AS n
    """)
    await runner.connection.execute("""
        INSERT INTO job_runs (job, fence, due_at, started_at, ended_at, outcome)
        SELECT 'audit-keys', n, '2026-01-01', '2026-01-01', '2026-01-01', 'succeeded'
        FROM generate_series(1, 20000) AS n
    """)
    kept_to_index = {
        *(ledger.LEDGER, ledger.HOLDS, keys.RECORDED_KEYS),
        *(keys.OPENING_KEYS, keys.EXTERNAL_IDS),
        *(housekeeping.DELETE_REFUSALS, housekeeping.PRUNE_RUNS),
    }
    for analyzed in (False, True):
        if analyzed:
            await runner.connection.execute("ANALYZE")
        for sql, *arguments in (
            (ledger.LEDGER, 1, 20_000, 29_991, 2000, "-infinity"),
            (ledger.LEDGER, 5000, 0, 0, 2000, "-infinity"),
            (keys.RECORDED_KEYS, 5000, "key-5", 1000, MAX_INTEGER),
            (daily_balances.RECORDED_BALANCES, 5000, "2026-01-01", 1000),
            (summaries.RECORD_BALANCES, 5000, 1000),
            (summaries.COUNT, 1, 1000, 2000),
            (summaries.COUNT, 5000, 1000, 2000),
            (limits.NEAR_LARGEST, 5000, 2000, 0.8, MAX_INTEGER),
            (housekeeping.DELETE_REFUSALS, 500, REFUSALS_KEPT),
            (housekeeping.PRUNE_RUNS, "audit-kex", housekeeping.RUNS_AT_ONCE),
        ):
            async with runner.connection.transaction():
                if sql in kept_to_index:
                    await runner.connection.execute(KEEP_TO_INDEX)
                read = await rows_read(runner.connection, sql, *arguments)
            assert read <= 16_000, sql
    assert await runner.run("audit-ledger") == (
        "checked 102 000 entries and 9 000 holds of 10 000 users: all balances match"
    )
    await runner.connection.execute("DELETE FROM idempotency_keys WHERE outcome = 'refused'")
    assert await runner.run("audit-keys") == (
        "checked 40 000 keys and external ids: all agree with the ledger"
    )
    assert await runner.run("total-days") == "read 10 000 users: counted 102 000 new entries"
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


@pytest.mark.parametrize(
    ("job", "revoked", "missing"),
    [
        ("refresh-statistics", "MAINTAIN ON users", "MAINTAIN on users"),
        ("watch-limits", "SELECT ON SEQUENCE job_runs_id_seq", "SELECT on sequence job_runs_id"),
        ("watch-limits", "pg_read_all_stats", "membership in pg_read_all_stats"),
    ],
)
async def test_a_job_that_cannot_see_fails(
    runner: JobRunner, database: dict[str, str], job: str, revoked: str, missing: str
) -> None:
    """PostgreSQL only shows it less, or skips a table; the control: with its rights it passes."""
    if "MAINTAIN" in revoked and await major_version(database) < 17:
        pytest.skip("PostgreSQL 17 brought the right MAINTAIN")
    assert await runner.run(job)
    await runner.connection.execute(f"REVOKE {revoked} FROM {RUN_ROLE}")
    try:
        with pytest.raises(MissingRightError, match=missing):
            await runner.run(job)
    finally:
        await runner.connection.execute("SELECT grant_to_instances($1)", RUN_ROLE)
    assert await runner.run(job)
