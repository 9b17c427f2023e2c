"""The metrics at `/metrics`: each measures what it says, and all are always available."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as read_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from balance_app import __version__
from balance_app import metrics as numbers
from balance_app.jobs.api.stats import StatsReader
from balance_app.jobs.declarations import LOST_LIMIT
from balance_app.jobs.job import Job, Registry, job
from balance_app.jobs.run import Run
from balance_app.jobs.scheduler import Scheduler
from balance_app.maintenance.audits import AUDITS, LedgerMismatchError, audit_ledger
from balance_app.maintenance.summaries import read_table_bytes
from balance_app.metrics import FleetStats, JobStats, Metrics
from balance_app.states import Outcome
from tests.jobs.rows import add_job, insert
from tests.jobs.support import JobsDatabase, on, until
from tests.processes import Instance, connect, http_client, running, unguarded
from tests.system.databases import session_waits

# every sample, by its name and labels: name{a="b",c="d"}
Samples = dict[str, float]


def read(text: str) -> Samples:
    """Parse the samples as Prometheus does."""
    return {
        sample.name + _labels(sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _labels(labels: dict[str, str]) -> str:
    labelled = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{{{labelled}}}" if labelled else ""


async def scrape(client: httpx.AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    return read(answer.text)


async def of(metrics: Metrics) -> Samples:
    return read((await metrics.render()).decode())


def changes(numbers: Samples) -> dict[str, float]:
    """Return the changes by result, without results that did not occur."""
    return {
        name.split('"')[1]: value
        for name, value in numbers.items()
        if name.startswith("balance_app_changes_total") and value
    }


# -- changes and connections -----------------------------------------------------------------------


async def test_changes_are_counted_by_result(client: httpx.AsyncClient) -> None:
    """Each result once, from 0; an invalid request is counted as a request, not as a change."""

    async def change(
        user: int, amount: object, key: str | None = None, tag: str | None = None
    ) -> int:
        headers = {"Idempotency-Key": key} if key else {}
        if tag:
            headers["If-Match"] = tag
        body = {"userId": user, "amount": amount}
        return (await client.post("/api/balance", json=body, headers=headers)).status_code

    before = await scrape(client)
    assert changes(before) == {}
    assert await change(1, -1) == 200
    assert await change(1, -2, "k") == 200
    assert await change(1, -2, "k") == 200  # replayed
    assert await change(1, -3, "k") == 422  # of another request
    assert await change(1, -20_000) == 409
    assert await change(1, -20_000, "l") == 409
    assert await change(2, 1) == 404
    assert await change(1, -1, tag='"1.1.0"') == 412
    assert await change(1, "much") == 422
    found = await scrape(client)
    # Prometheus sees no increase in a counter that begins with its first 1.
    counters = [name for name in found if name.startswith("balance_app_changes_total")]
    assert set(counters) <= set(before)
    assert changes(found) == {
        "accepted": 2,
        "replayed": 1,
        "key_reused": 1,
        "refused": 2,
        "no_user": 1,
        "version_conflict": 1,
    }
    assert found["balance_app_change_seconds_count"] == 5
    assert 0 < found["balance_app_change_seconds_sum"] < 30
    assert found["balance_app_connection_wait_seconds_count"] == 8
    statuses = {
        status: found.get(f'balance_app_requests_total{{status="{status}"}}')
        for status in (200, 404, 409, 412, 422, 500)
    }
    # The first scrape, and the readiness probes, were requests too.
    ready = statuses.pop(200)
    assert ready is not None
    assert ready >= 5
    assert statuses == {404: 1, 409: 2, 412: 1, 422: 2, 500: 0}


async def test_the_wait_queue_is_measured(database: dict[str, str]) -> None:
    """Queued operations and used connections are reported while no connection is free."""
    async with (
        Instance(
            database,
            JOBS_ENABLED="false",
            DB_POOL_SIZE="1",
            MAX_WAITING="2",  # one more request, and the query of the fleet's metrics
            DB_LOCK_SECONDS="20",
            DB_STATEMENT_SECONDS="25",
        ) as instance,
        http_client(instance.url) as client,
    ):
        body = {"userId": 1, "amount": -1}
        holder = await connect(database)
        async with holder.transaction():
            await holder.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
            asked = [asyncio.create_task(client.post("/api/balance", json=body))]
            await session_waits(database)
            asked.append(asyncio.create_task(client.post("/api/balance", json=body)))
            await until_waiting(client, 1)
            assert (await client.post("/api/balance", json=body)).status_code == 503
            found = await scrape(client)
        for each in asked:
            await each
        await holder.close()
        assert found["balance_app_requests_waiting"] == 1
        assert found['balance_app_connections_in_use{pool="requests"}'] == 1
        assert found['balance_app_connections_limit{pool="requests"}'] == 1
        assert changes(found) == {"overloaded": 1}
        found = await scrape(client)
        assert found["balance_app_requests_waiting"] == 0
        assert found['balance_app_connections_in_use{pool="requests"}'] == 0


async def until_waiting(client: httpx.AsyncClient, number: int) -> None:
    async with asyncio.timeout(10):
        while (await scrape(client))["balance_app_requests_waiting"] != number:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)


async def test_an_outage_is_reported(database: dict[str, str]) -> None:
    """During an outage the instance reports it, and all its own metrics."""
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
    ):
        before = await scrape(client)
        assert before["balance_app_database_unavailable"] == 0
        holder = await connect(database)
        async with _held_row(holder):
            asked = asyncio.create_task(
                client.post("/api/balance", json={"userId": 1, "amount": -1})
            )
            await session_waits(database)
            await _admin(database, "ALLOW_CONNECTIONS false", ends=True)
        assert (await asked).json()["applied"] == "unknown"
        refused = await client.post("/api/balance", json={"userId": 1, "amount": -1})
        assert refused.json()["applied"] == "no"
        found = await scrape(client)
        assert found["balance_app_database_unavailable"] == 1
        assert changes(found) == {"unknown": 1, "unavailable": 1}
        await _admin(database, "ALLOW_CONNECTIONS true")
        async with asyncio.timeout(10):
            while (await scrape(client))["balance_app_database_unavailable"]:  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.05)


@asynccontextmanager
async def _held_row(holder: Any) -> AsyncIterator[None]:  # noqa: ANN401 - a connection that is cut
    await holder.execute("BEGIN; SELECT FROM users WHERE id = 1 FOR UPDATE")
    try:
        yield
    finally:
        holder.terminate()


async def _admin(database: dict[str, str], setting: str, *, ends: bool = False) -> None:
    name = database["DB_NAME"]
    admin = await connect({**database, "DB_NAME": "postgres"})
    await admin.execute(f'ALTER DATABASE "{name}" {setting}')
    if ends:
        # The session that holds the row ends last: a waiting one must not get it before.
        await admin.execute(
            """
            SELECT pg_terminate_backend(pid, 5000) FROM (
                SELECT pid FROM pg_stat_activity WHERE datname = $1
                ORDER BY state = 'idle in transaction', pid
            ) AS sessions
            """,
            name,
        )
    await admin.close()


# -- runs ------------------------------------------------------------------------------------------

HOUR: Final = timedelta(hours=1)


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


@asynccontextmanager
async def scheduler(
    jobs_db: JobsDatabase, jobs: Iterable[Job]
) -> AsyncIterator[tuple[Scheduler, Metrics]]:
    """Run an instance's scheduler; yield it and its numbers."""
    registry = Registry(jobs)
    metrics = Metrics(jobs=registry)
    running = Scheduler(jobs_db.settings, jobs_db.database, registry, metrics, watchdog=False)
    running.start()
    try:
        yield running, metrics
    finally:
        await running.stop()
        await running.close()


def declare(name: str, function: Any, **options: Any) -> Job:  # noqa: ANN401 - what a job may be
    return job(**{"name": name, "every": HOUR, **options})(function)


async def returns(_run: Run) -> None:
    return


async def fails(_run: Run) -> None:
    raise ValueError


async def sleeps(_run: Run) -> None:
    await asyncio.sleep(600)


def runs(numbers: Samples) -> dict[tuple[str, str], float]:
    """Return the runs by job and outcome, without those that did not occur."""
    return {
        (name.split('"')[1], name.split('"')[3]): value
        for name, value in numbers.items()
        if name.startswith("balance_app_job_runs_total") and value
    }


async def test_runs_are_counted_by_outcome(jobs_db: JobsDatabase) -> None:
    """One count per run, as in the history; all outcomes exist from the start."""
    jobs = [
        declare("good", returns),
        declare("bad", fails),
        declare("slow", sleeps, timeout=timedelta(seconds=0.2)),
        declare("long", sleeps),
    ]
    async with scheduler(jobs_db, jobs) as (running, metrics):
        assert sum(name.startswith("balance_app_job_runs_total") for name in await of(metrics)) == (
            len(jobs) * len(set(Outcome) - {Outcome.SKIPPED})
        )
        for name in ("good", "bad", "slow"):
            await jobs_db.ended(name)
        await until(lambda: _holds(metrics, "balance_app_jobs_running", 1))
        await running.stop()
        found = await of(metrics)
    assert runs(found) == {
        ("good", "succeeded"): 1,
        ("bad", "failed"): 1,
        ("slow", "timed_out"): 1,
        ("long", "released"): 1,
    }
    assert found["balance_app_jobs_running"] == 0
    assert found["balance_app_job_start_delay_seconds_count"] == 4
    assert not any(name.startswith("balance_app_job_takeovers") and found[name] for name in found)


async def _holds(metrics: Metrics, name: str, value: float) -> bool:
    return (await of(metrics))[name] == value


async def test_the_start_delay_is_measured_once_a_tick(jobs_db: JobsDatabase) -> None:
    """From the tick, by the server's clock; a retry does not count."""
    instance = jobs_db.instance()
    await instance.declare("bad")
    await jobs_db.ready("bad", seconds_ago=100)
    again = declare("bad", fails, retry_after=timedelta(milliseconds=100))
    async with scheduler(jobs_db, [again]) as (_, metrics):
        await jobs_db.ended("bad", runs=2)
        found = await of(metrics)
    assert found["balance_app_job_start_delay_seconds_count"] == 1
    assert 100 <= found["balance_app_job_start_delay_seconds_sum"] < 130
    assert found['balance_app_job_start_delay_seconds_bucket{le="60.0"}'] == 0


async def test_a_takeover_counts_the_lost_run(jobs_db: JobsDatabase) -> None:
    """The instance that takes over counts the loss and the takeover."""
    other = jobs_db.instance("other")
    await other.declare("good")
    await other.claim()
    await jobs_db.expire("good")
    async with scheduler(jobs_db, [declare("good", returns)]) as (_, metrics):
        await jobs_db.ended("good", runs=2)
        await until(lambda: _holds(metrics, "balance_app_jobs_running", 0))
        found = await of(metrics)
    assert runs(found) == {("good", "lost"): 1, ("good", "succeeded"): 1}
    assert found['balance_app_job_takeovers_total{job_name="good"}'] == 1
    assert found["balance_app_job_start_delay_seconds_count"] == 0


async def test_the_claim_of_a_releasing_job_is_no_takeover(jobs_db: JobsDatabase) -> None:
    """A stopping instance leaves an uncancellable run: it is released, not lost."""
    other = jobs_db.instance("other")
    await other.declare("good")
    claimed = await other.claim()
    await other.jobs.mark_releasing(claimed.name, claimed.fence, timedelta(0))
    async with scheduler(jobs_db, [declare("good", returns)]) as (_, metrics):
        await jobs_db.ended("good", runs=2)
        await until(lambda: _holds(metrics, "balance_app_jobs_running", 0))
        found = await of(metrics)
    assert runs(found) == {("good", "released"): 1, ("good", "succeeded"): 1}
    assert found['balance_app_job_takeovers_total{job_name="good"}'] == 0


async def test_a_quarantined_job_counts_as_lost(jobs_db: JobsDatabase) -> None:
    """Although no instance takes the job over."""
    other = jobs_db.instance("other")
    await other.declare("good")
    await other.claim()
    await jobs_db.admin.execute("UPDATE jobs SET lost_streak = $1", LOST_LIMIT - 1)
    await jobs_db.expire("good")
    async with scheduler(jobs_db, [declare("good", returns)]) as (_, metrics):
        await until(lambda: _quarantined(jobs_db))
        await until(
            lambda: _holds(metrics, 'balance_app_job_runs_total{job_name="good",outcome="lost"}', 1)
        )
        found = await of(metrics)
    assert runs(found) == {("good", "lost"): 1}
    assert found['balance_app_job_takeovers_total{job_name="good"}'] == 0


async def _quarantined(jobs_db: JobsDatabase) -> bool:
    row = await jobs_db.row("good")
    return row["holder"] is None and row["lost_streak"] == LOST_LIMIT


async def test_ticks_that_did_not_run_are_counted(jobs_db: JobsDatabase) -> None:
    """As many as in the ranges of the history."""
    instance = jobs_db.instance()
    await instance.declare("good", schedule="every 60 s")
    await jobs_db.shift(600)
    async with scheduler(jobs_db, [declare("good", returns, every=timedelta(minutes=1))]) as (
        _,
        metrics,
    ):
        await jobs_db.ended("good")
        await until(lambda: _holds(metrics, "balance_app_jobs_running", 0))
        found = await of(metrics)
    skipped = await jobs_db.admin.fetchval(
        "SELECT sum(ticks) FROM job_runs WHERE outcome = 'skipped'"
    )
    assert skipped >= 9
    assert found['balance_app_job_ticks_skipped_total{job_name="good"}'] == skipped


def _stats_reader(jobs_db: JobsDatabase, registry: Registry) -> StatsReader:
    return StatsReader(jobs_db.database, registry, AUDITS, LedgerMismatchError, read_table_bytes)


async def test_each_heartbeat_measures_the_remaining_lease(jobs_db: JobsDatabase) -> None:
    """As a share: half, with heartbeats every sixth of the lease and a reserve of a third."""
    async with scheduler(jobs_db, [declare("long", sleeps)]) as (_, metrics):
        await until(lambda: _renewed(metrics, 3))
        found = await of(metrics)
    count = found["balance_app_lease_margin_ratio_count"]
    assert found['balance_app_lease_margin_ratio_bucket{le="0.9"}'] >= count - 1  # but the first
    # Answers take a while; the first heartbeat is sent at once, with two thirds left.
    assert 0.3 * count < found["balance_app_lease_margin_ratio_sum"] < 2 / 3 * count
    async with scheduler(jobs_db, [declare("none", sleeps, every=None, cron="0 0 29 2 *")]) as (
        _,
        metrics,
    ):
        await asyncio.sleep(1.5)
        assert (await of(metrics))["balance_app_lease_margin_ratio_count"] == 0


async def _renewed(metrics: Metrics, times: int) -> bool:
    return (await of(metrics))["balance_app_lease_margin_ratio_count"] >= times


# -- the fleet -------------------------------------------------------------------------------------


async def stats(jobs_db: JobsDatabase, *names: str) -> dict[str, JobStats]:
    registry = Registry([declare(name, returns) for name in names])
    found = await _stats_reader(jobs_db, registry).read()
    return {each.name: each for each in found.jobs} if found is not None else {}


async def ran(jobs_db: JobsDatabase, name: str, outcome: str, result: str, ago: float = 0) -> None:
    """Add a run to the history as the job's last one."""
    fence = await jobs_db.admin.fetchval("SELECT count(*) + 1 FROM job_runs WHERE job = $1", name)
    await insert(
        jobs_db.admin,
        "job_runs",
        job=name,
        fence=fence,
        due_at=timedelta(seconds=-ago),
        started_at=timedelta(seconds=-ago),
        ended_at=timedelta(seconds=-ago),
        outcome=outcome,
        result=result,
    )
    await jobs_db.admin.execute(
        "UPDATE jobs SET last_outcome = $2, last_result = $3 WHERE name = $1", name, outcome, result
    )


async def test_the_fleets_metrics_are_those_of_the_rows(jobs_db: JobsDatabase) -> None:
    """Last success, overdue, paused, failed: of the jobs whose code this instance has."""
    names = ("fresh", "failing", "lost", "paused", "ready", "other")
    for name in names:
        await add_job(jobs_db.admin, name)
    for outcome, ago in (("succeeded", 900.0), ("succeeded", 600.0), ("failed", 300.0)):
        await ran(jobs_db, "failing", outcome, "ValueError: x", ago)
    await ran(jobs_db, "ready", "succeeded", "", 100)
    await ran(jobs_db, "ready", "cancelled", "", 50)
    await jobs_db.ready("ready", seconds_ago=40)
    await jobs_db.ready("paused", seconds_ago=40)
    await jobs_db.admin.execute(
        "UPDATE jobs SET paused_at = clock_timestamp(), paused_by = 'x' WHERE name = 'paused'"
    )
    await jobs_db.admin.execute(
        "UPDATE jobs SET holder = gen_random_uuid(), server = 'x', started_at = clock_timestamp(),"
        " lease_expires_at = clock_timestamp() - interval '20 s' WHERE name = 'lost'"
    )
    await jobs_db.admin.execute(
        "UPDATE jobs SET schedule_override = 'every 60 s', overridden_by = 'x',"
        " overridden_at = clock_timestamp() WHERE name = 'ready'"
    )
    now = float(await jobs_db.admin.fetchval("SELECT extract(epoch FROM clock_timestamp())"))
    found = await stats(jobs_db, *(name for name in names if name != "other"))
    assert sorted(found) == ["failing", "fresh", "lost", "paused", "ready"]
    assert found["fresh"] == JobStats("fresh", None, 0, False, False, None)  # noqa: FBT003 - a row
    assert found["failing"].last_run_failed
    assert found["failing"].last_success_at == pytest.approx(now - 600, abs=5)
    assert found["ready"].last_success_at == pytest.approx(now - 100, abs=5)
    assert found["ready"].overdue_seconds == pytest.approx(40, abs=5)
    assert found["lost"].overdue_seconds == pytest.approx(20, abs=5)
    assert not found["ready"].last_run_failed
    assert found["paused"].paused
    assert found["paused"].overdue_seconds == 0
    assert not found["ready"].paused
    assert found["ready"].schedule_overridden
    assert not found["paused"].schedule_overridden


async def test_an_audit_s_result_stands_until_the_next(jobs_db: JobsDatabase) -> None:
    """A mismatch is reported until an audit finds none; an unfinished one reports none."""
    await add_job(jobs_db.admin, "audit-ledger")
    await add_job(jobs_db.admin, "good")

    async def mismatch(name: str = "audit-ledger") -> bool | None:
        return (await stats(jobs_db, "audit-ledger", "good"))[name].mismatch

    assert await mismatch() is None
    await ran(jobs_db, "audit-ledger", "failed", "TimeoutError: ")
    assert await mismatch() is None
    await ran(jobs_db, "audit-ledger", "failed", "LedgerMismatchError: 1 of 2 users differs")
    assert await mismatch() is True
    await ran(jobs_db, "audit-ledger", "failed", "TimeoutError: ")
    await ran(jobs_db, "audit-ledger", "released", "its instance was stopped")
    assert await mismatch() is True
    await ran(jobs_db, "audit-ledger", "succeeded", "all balances match")
    assert await mismatch() is False
    await ran(jobs_db, "good", "failed", "LedgerMismatchError: of a job that is no audit")
    assert await mismatch("good") is None


async def test_a_failed_audit_is_recognized_as_a_mismatch(jobs_db: JobsDatabase) -> None:
    """A manipulated ledger is a mismatch at `/metrics`, by the audit's own result."""
    async with unguarded(jobs_db.admin):
        await jobs_db.admin.execute("UPDATE users SET balance = balance + 1 WHERE id = 1")
    try:
        async with scheduler(jobs_db, [audit_ledger]) as (_, metrics):
            metrics.set_fleet_query(_stats_reader(jobs_db, Registry([audit_ledger])).read)
            await jobs_db.ended("audit-ledger")
            found = await of(metrics)
    finally:
        async with unguarded(jobs_db.admin):
            await jobs_db.admin.execute("UPDATE users SET balance = balance - 1 WHERE id = 1")
    assert found['balance_app_fleet_job_audit_mismatch{job_name="audit-ledger"}'] == 1
    assert found['balance_app_fleet_job_last_run_failed{job_name="audit-ledger"}'] == 1
    assert 'balance_app_fleet_job_last_success_timestamp_seconds{job_name="audit-ledger"}' not in (
        found
    )


NO_ANSWER: Final = {"balance_app_fleet_scrape_success": 0}


async def test_the_fleet_is_queried_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of scrapes share a query; its result is not cached for longer."""
    asked = 0
    answers = [FleetStats([JobStats("good", 1.0, 2.0, True, False, None)], {"t": 3}), None]  # noqa: FBT003 - a row

    async def query() -> FleetStats | None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return answers[asked - 1]

    metrics = Metrics()
    metrics.set_fleet_query(query)
    found = await asyncio.gather(*(of(metrics) for _ in range(20)))
    assert asked == 1
    assert {each['balance_app_fleet_job_overdue_seconds{job_name="good"}'] for each in found} == {2}
    assert {each['balance_app_fleet_table_bytes{table="t"}'] for each in found} == {3}
    assert {each["balance_app_fleet_scrape_success"] for each in found} == {1}
    monkeypatch.setattr(numbers, "monotonic", lambda: float("inf"))
    assert _of_the_fleet(await of(metrics)) == NO_ANSWER


async def test_a_database_that_is_slow_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance's own metrics are reported all the same."""
    monkeypatch.setattr(numbers, "PATIENCE_SECONDS", 0.01)

    async def query() -> FleetStats:
        await asyncio.sleep(600)
        raise AssertionError

    metrics = Metrics()
    metrics.set_fleet_query(query)
    async with asyncio.timeout(4):
        found = await of(metrics)
    assert found["balance_app_jobs_running"] == 0
    assert _of_the_fleet(found) == NO_ANSWER


async def test_a_failed_query_of_the_fleet_is_reported(jobs_db: JobsDatabase) -> None:
    """It is not shown as a fleet without jobs; the metrics return when the query succeeds."""
    metrics = Metrics()
    metrics.set_fleet_query(_stats_reader(jobs_db, Registry([])).read)
    await jobs_db.admin.execute("ALTER TABLE job_runs RENAME TO hidden")
    try:
        found = _of_the_fleet(await of(metrics))
    finally:
        await jobs_db.admin.execute("ALTER TABLE hidden RENAME TO job_runs")
    assert found == NO_ANSWER
    await asyncio.sleep(1.1)
    assert _of_the_fleet(await of(metrics)) == {"balance_app_fleet_scrape_success": 1}


def _of_the_fleet(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if "fleet" in name or "table" in name}


async def test_tables_are_as_large_as_when_each_was_last_measured(
    database: dict[str, str],
) -> None:
    """All instances report the same, also during a new measurement; nothing before the first."""
    connection = await connect(database)

    async def sizes() -> dict[str, float]:
        await asyncio.sleep(numbers.FRESH_SECONDS + 0.1)
        both = [_sizes(await scrape(client)) for client in clients]
        assert both[0] == both[1]
        return both[0]

    async def measure(hours_ago: int, **tables: int) -> None:
        await connection.executemany(
            "INSERT INTO table_sizes (at, name, bytes)"
            " VALUES (date_trunc('day', clock_timestamp()) - $1 * interval '1 hour', $2, $3)",
            [(hours_ago, name, size) for name, size in tables.items()],
        )

    instances = [Instance(database, JOBS_ENABLED="false") for _ in range(2)]
    async with running(instances), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(http_client(each.url)) for each in instances]
        assert await sizes() == {}
        await measure(50, entries=1, dropped=1)
        assert await sizes() == {"entries": 1, "dropped": 1}
        await measure(2, entries=2, users=2**60)
        assert await sizes() == {"entries": 2, "users": 2**60}
        await measure(1, entries=3)
        assert await sizes() == {"entries": 3, "users": 2**60}
    await connection.close()


def _sizes(found: Samples) -> dict[str, float]:
    return {
        name.split('"')[1]: value
        for name, value in found.items()
        if name.startswith("balance_app_fleet_table_bytes")
    }


# -- all metrics -----------------------------------------------------------------------------------


async def test_hostile_requests_make_no_new_series(client: httpx.AsyncClient) -> None:
    """Paths, methods, users, keys and headers of callers are never labels (a status may be new)."""
    before = set(await scrape(client))
    for number in range(30):
        await client.request(f"M{number}", f"/nowhere/{number}", headers={"Host": f"h{number}"})
        await client.post("/api/balance", json={"userId": number + 2, "amount": number + 1})
        await client.get(f"/api/users/{number}", headers={"X-Request-Id": f"r{number}"})
        accept = f"text/plain;version={number}é.x".encode("latin-1")
        await client.get("/metrics", headers={b"Accept": accept})
    new = set(await scrape(client)) - before
    assert {name.partition("{")[0] for name in new} <= {"balance_app_requests_total"}
    assert len(new) <= 5


async def test_openmetrics_is_served_if_accepted(client: httpx.AsyncClient) -> None:
    """Prometheus prefers it; the values are the same."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    answer = await client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = read_openmetrics(answer.text)  # type: ignore[no-untyped-call] # it has no types
    names = {sample.name for family in families for sample in family.samples}
    assert names == {name.partition("{")[0] for name in await scrape(client)}
    plain = await client.get("/metrics", headers={"Accept": "*/*"})
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert plain.headers["cache-control"] == "no-store"


async def test_the_process_is_measured_too(client: httpx.AsyncClient) -> None:
    """Its identity and its resources."""
    found = await scrape(client)
    assert found[f'balance_app_info{{server="app1",version="{__version__}"}}'] == 1
    assert found["process_resident_memory_bytes"] > 10_000_000
    assert found["process_cpu_seconds_total"] > 0
    assert not any("_created" in name for name in found)


async def test_each_application_has_its_own_numbers() -> None:
    """No metric is global to the process."""
    first, second = Metrics(), Metrics()
    first.changes.inc("accepted")
    assert changes(await of(first)) == {"accepted": 1}
    assert changes(await of(second)) == {}
    assert not any(family.name.startswith("balance_app") for family in REGISTRY.collect())
