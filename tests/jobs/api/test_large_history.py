"""With a history of a million runs, each statement reads few of its pages.

Every statement is explained as the service's own code sends it, with a custom and with a generic
plan (asyncpg's prepared statements may get either), and with current, outdated and no statistics of
the table. The number of pages is bounded, not the time.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, cast
from uuid import uuid4

import pytest

from balance_app.db.pool import KEEP_TO_INDEX, Database
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.api import history
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.history import History
from balance_app.jobs.api.stats import StatsReader
from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.api.verdict_reader import VerdictReader
from balance_app.jobs.job import Registry, job
from balance_app.jobs.repository import Completion, JobRepository, Me
from balance_app.jobs.run_log import Line, Unwritten
from balance_app.maintenance.audits import AUDITS, LedgerMismatchError
from balance_app.maintenance.housekeeping import PRUNE_RUNS, RUNS_AT_ONCE
from balance_app.maintenance.summaries import read_table_bytes
from balance_app.settings import load_settings
from balance_app.web.queries import RUNS_SEARCHED, PageQueries, RunFilter
from tests.explaining import OneConnection, both_plans, bounded, explaining
from tests.jobs.rows import add_job
from tests.jobs.support import AT_ONCE, LEASE, JobsDatabase, on

RUNS: Final = 1_000_000
# The million runs belong to jobs of every kind: one that always succeeds, one that never did (an
# audit), one that succeeded once at the very beginning, one whose ticks are skipped, one with five
# runs at the beginning, one with one in the middle, one without runs, and the one whose name sorts
# last.
MANY, FAILING, ONCE, SKIPPING = "many", "audit-keys", "once", "skipping"
RARE, SINGLE, FRESH, LAST = "rare", "single", "fresh", "zz-last"
NAMES: Final = (MANY, FAILING, ONCE, SKIPPING, RARE, SINGLE, FRESH, LAST)

BULK: Final = """
INSERT INTO job_runs (job, fence, due_at, last_due_at, started_at, ended_at, outcome, result)
SELECT job, CASE WHEN outcome <> 'skipped' THEN n END, at,
       CASE WHEN outcome = 'skipped' THEN at END, at, at, outcome, 'ValueError: no'
FROM (
    SELECT n, clock_timestamp() - (3000000 - n) * interval '1 s' AS at,
           CASE WHEN n <= 5 THEN 'rare' WHEN n = 6 THEN 'once' WHEN n = 7 THEN 'skipping'
                WHEN n = $1 / 2 THEN 'single' WHEN n % 10 < 4 THEN 'many'
                WHEN n % 10 < 6 THEN 'audit-keys' WHEN n % 10 < 8 THEN 'once'
                ELSE 'skipping' END AS job,
           CASE WHEN n <= 5 THEN 'lost' WHEN n <= 7 THEN 'succeeded' WHEN n % 10 < 4
                THEN 'succeeded' WHEN n % 10 < 8 THEN 'failed' ELSE 'skipped' END AS outcome
    FROM generate_series(1, $1::integer) AS n
) AS runs
"""
# 200 lines of each of a thousand runs of one job.
LINES: Final = """
INSERT INTO job_run_lines (job, fence, number, logged_at, level, text)
SELECT job, fence, number, started_at, 'info', 'said'
FROM (SELECT * FROM job_runs WHERE job = 'many' ORDER BY id LIMIT 1000) AS run,
     generate_series(1, 200) AS number
"""
KEYS: Final = """
SELECT conrelid::regclass::text AS table, conname, pg_get_constraintdef(oid) AS constraint
FROM pg_constraint WHERE confrelid = 'job_runs'::regclass
"""
# Filling a table first and indexing it then takes a third of the time.
INDEXES: Final = """
SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS sql, conname,
       pg_get_constraintdef(pg_constraint.oid) AS constraint
FROM pg_index LEFT JOIN pg_constraint ON conindid = indexrelid
WHERE indrelid = 'job_runs'::regclass
"""

NOTHING_KNOWN: Final = """
DELETE FROM pg_statistic WHERE starelid = 'job_runs'::regclass;
UPDATE pg_class SET reltuples = -1 WHERE oid = 'job_runs'::regclass
"""

Statistics = Literal["stale", "none", "fresh"]


@pytest.fixture(scope="module")
async def large(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        for name in NAMES:
            await add_job(jobs_db.admin, name, fence=RUNS)
        await jobs_db.admin.execute("ALTER TABLE job_runs SET (autovacuum_enabled = false)")
        await jobs_db.admin.execute("SET session_replication_role = replica")  # no foreign keys
        await jobs_db.admin.execute(BULK.replace("$1::integer", "1000").replace("$1", "1000"))
        await jobs_db.admin.execute("ANALYZE job_runs; DELETE FROM job_runs")
        keys = await jobs_db.admin.fetch(KEYS)
        for key in keys:
            await jobs_db.admin.execute(
                f"ALTER TABLE {key['table']} DROP CONSTRAINT {key['conname']}"
            )
        indexes = await jobs_db.admin.fetch(INDEXES)
        for index in indexes:
            await jobs_db.admin.execute(
                f"ALTER TABLE job_runs DROP CONSTRAINT {index['conname']}"
                if index["conname"]
                else f"DROP INDEX {index['name']}"
            )
        await jobs_db.admin.execute(BULK, RUNS, timeout=120)
        for index in indexes:
            await jobs_db.admin.execute(
                f"ALTER TABLE job_runs ADD CONSTRAINT {index['conname']} {index['constraint']}"
                if index["conname"]
                else index["sql"],
                timeout=120,
            )
        await jobs_db.admin.execute("ALTER TABLE job_run_lines SET (autovacuum_enabled = false)")
        await jobs_db.admin.execute(LINES)
        for key in keys:
            await jobs_db.admin.execute(
                f"ALTER TABLE {key['table']} ADD CONSTRAINT {key['conname']} {key['constraint']}"
            )
        await jobs_db.admin.execute("RESET session_replication_role")
        yield jobs_db


@pytest.fixture(scope="module", params=["stale", "none", "fresh"])
async def statistics(large: JobsDatabase, request: pytest.FixtureRequest) -> Statistics:
    """The planner's statistics of the history: of its first 1000 runs, none, or current ones."""
    known: Statistics = request.param
    if known == "none":
        await large.admin.execute(NOTHING_KNOWN)
    elif known == "fresh":
        await large.admin.execute("ANALYZE job_runs")
    return known


@both_plans
async def test_the_history_is_read_by_pages(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - it sets them
    mode: str,
) -> None:
    """For every job, outcome and cursor: only the rows that are shown."""
    async with explaining(large.admin, mode, "job_run") as connection:
        runs = History(cast("Database", OneConnection(connection)))
        for before in (MAX_INTEGER, RUNS // 2, 10):
            for job in (None, *NAMES):
                for outcome in (None, "succeeded", "failed", "lost", "timed_out", "skipped"):
                    page = await runs.page(job=job, outcome=outcome, before=before, limit=100)
                    assert all(run.job == job for run in page.runs if job is not None)
    bounded(connection.touched, 250)


@both_plans
async def test_a_log_is_read_by_its_run(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
) -> None:
    """Of many runs with many lines, one's; of a run that said nothing as well."""
    first = await large.admin.fetchval("SELECT min(id) FROM job_runs WHERE job = 'many'")
    async with explaining(large.admin, mode, "job_run") as connection:
        runs = History(cast("Database", OneConnection(connection)))
        assert len((await runs.log(first)).lines) == 200
        assert (await runs.log(RUNS // 2)).lines == []
    bounded(connection.touched, 250)


@both_plans
async def test_the_metrics_read_few_runs(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
) -> None:
    """The last successes, also of jobs without one, and the last result of an audit."""
    registry = Registry([job(name=name, cron="0 0 * * *")(print) for name in NAMES])
    async with explaining(large.admin, mode, "job_run") as connection:
        found = await StatsReader(
            cast("Database", OneConnection(connection)),
            registry,
            AUDITS,
            LedgerMismatchError,
            read_table_bytes,
        ).read()
    assert found is not None
    succeeded = {each.name for each in found.jobs if each.last_success_at is not None}
    assert succeeded == {MANY, ONCE, SKIPPING, SINGLE}
    # At most a thousand failures of each audit are read to find one with a mismatch.
    bounded(connection.touched, 1200)


@both_plans
async def test_the_verdict_reads_few_runs(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
) -> None:
    """The losses of late, and the last result of each audit."""
    async with explaining(large.admin, mode, "job_run") as connection:
        await _verdicts(large, cast("Database", OneConnection(connection))).recent()
    bounded(connection.touched, 1400)


def _verdicts(large: JobsDatabase, database: Database) -> VerdictReader:
    names = [each.name for each in AUDITS]
    status = StatusReader(database, large.settings)
    return VerdictReader(status, database, names, LedgerMismatchError.__name__)


@both_plans
async def test_the_page_reads_few_runs(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
) -> None:
    """The last runs of each job, without skipped ticks, and the latest ones of all jobs."""
    async with explaining(large.admin, mode, "job_run") as connection:
        database = cast("Database", OneConnection(connection))
        queries = PageQueries(database, _verdicts(large, database))
        activity = await queries.activity(NAMES, (), 1800.0)
        shown = {name: len(await queries.last_runs(name, 60)) for name in NAMES}
    assert {name: len(runs) for name, runs in activity.runs.items()} == {
        name: min(number, 20) for name, number in shown.items()
    }
    assert shown == {**dict.fromkeys(NAMES, 0), MANY: 60, FAILING: 60, ONCE: 60} | {
        SKIPPING: 1,
        RARE: 5,
        SINGLE: 1,
    }
    # A thousand runs are read to find those of the last half hour; with what the verdict reads.
    bounded(connection.touched, 2500 + 1400)


@both_plans
@pytest.mark.parametrize(
    ("given", "most"),
    [
        (RunFilter(), 200),
        (RunFilter(job=RARE), 200),
        (RunFilter(job=MANY, outcome="failed"), 200),
        (RunFilter(outcome="lost"), 200),
        (RunFilter(until=datetime(2026, 1, 1, tzinfo=UTC)), 400),
        (RunFilter(server="nobody"), RUNS_SEARCHED + 400),
    ],
)
async def test_a_page_of_runs_reads_few_of_them(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
    given: RunFilter,
    most: int,
) -> None:
    """As many as it shows, where an index has the filter; else it stops, and says so."""
    async with explaining(large.admin, mode, "job_run") as connection:
        database = cast("Database", OneConnection(connection))
        queries = PageQueries(database, _verdicts(large, database))
        await queries.runs(given, before=None, limit=50)
    bounded(connection.touched, most)


@both_plans
async def test_runs_begin_and_end_by_an_index(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
) -> None:
    """A claim, a takeover, a refuted loss, a log, a finish, and the resuming of a paused job."""
    async with explaining(large.admin, mode, "job_run") as connection:
        database = cast("Database", OneConnection(connection))
        me = Me(uuid4(), "app1")
        jobs = JobRepository(database, me, LEASE)
        capabilities = await large.instance().declare(*NAMES)
        await large.admin.execute("UPDATE jobs SET ready_at = clock_timestamp() - interval '1 s'")
        for _ in NAMES:
            claimed = (await jobs.claim_next(capabilities, AT_ONCE)).claimed
            assert claimed is not None
            if claimed.name in {RARE, FAILING}:
                await large.admin.execute(
                    "UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 h'"
                    " WHERE name = $1",
                    claimed.name,
                )
                claimed = (await jobs.claim_next(capabilities, AT_ONCE)).claimed
                assert claimed is not None
                assert claimed.attempt == 1
            line = Line(1, claimed.started_at, "info", "said")
            said = Unwritten(1, [line], "Traceback")
            await jobs.write_log(claimed.name, claimed.fence, said, seconds=9)
            completion = Completion(
                outcome="succeeded",
                result=None,
                seconds_ago=0,
                due_at=claimed.started_at + timedelta(hours=1),
                ready_at=claimed.started_at + timedelta(hours=1),
            )
            assert await jobs.finish(claimed.name, claimed.fence, completion) is True
        assert sorted(await jobs.retract_losses()) == [FAILING, RARE]
        controls = Controls(
            database, StatusReader(database, load_settings(db_host="localhost")), {}
        )
        await controls.pause(MANY, "ada", None)
        await controls.resume(MANY, "ada")
    bounded(connection.touched, 200)


@both_plans
async def test_old_runs_are_pruned_by_an_index(
    large: JobsDatabase,
    statistics: Statistics,  # noqa: ARG001 - the same
    mode: str,
) -> None:
    """So many runs of each job at a time, whether it has few or many."""
    await large.admin.execute(
        "UPDATE job_runs SET ended_at = ended_at - interval '30 days' WHERE id <= 1000"
    )
    async with explaining(large.admin, mode, "job_run") as connection:
        await large.admin.fetchval(KEEP_TO_INDEX)
        for name in ("", *sorted(NAMES)):
            await connection.fetchrow(PRUNE_RUNS, name, RUNS_AT_ONCE)
    # Each of these rows is found by its key.
    bounded(connection.touched, 8 * RUNS_AT_ONCE)


BY_EQUALITY: Final = """
SELECT * FROM job_runs WHERE job = $3 AND id < $1 ORDER BY job DESC, id DESC LIMIT $2
"""


@pytest.mark.parametrize("guard", ["range", "index", "order"])
async def test_without_a_guard_many_pages_are_read(large: JobsDatabase, guard: str) -> None:
    """The controls: without any one of the guards, statements exceed the bound."""
    await large.admin.execute("ANALYZE job_runs")
    async with explaining(large.admin, "force_generic_plan", "job_run") as connection:
        if guard == "range":
            await connection.fetch(BY_EQUALITY, MAX_INTEGER, 100, SINGLE)
        elif guard == "order":
            await large.admin.execute(NOTHING_KNOWN)
            await connection.fetch(history.RUNS_OF_JOB, MAX_INTEGER, 100, MANY)
        else:
            await large.admin.execute("DROP INDEX job_runs_job_outcome_id_idx")
            await connection.fetch(
                history.RUNS_OF_JOB_BY_OUTCOME, MAX_INTEGER, 100, FAILING, "timed_out"
            )
    with pytest.raises(AssertionError, match="pages by"):
        bounded(connection.touched, 250)
