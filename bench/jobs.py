"""Start latency, idle load, and the throughput of one database.

(c) Start latency: started_at - due_at of short runs on five real instances, with ten jobs that fall
    due one after another.
(d) Idle load: statements per second and instance while nothing is due, counted in PostgreSQL's log.
(e) 100 000 jobs and 50 instances, each with a connection of its own, that claim and finish as fast
    as they can: runs per second, and the time of a claim.
(f) `GET /api/cron/status` with 10 000 jobs.
(g) What the logs of runs cost a heartbeat: the renewal of ten leases, and the write after it when
    each run has said nothing, one line, 20, or 200 lines since the last one.
"""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import structlog

from balance_app.db.migrations import migrate
from balance_app.jobs.declarations import Capabilities
from balance_app.jobs.leases import NO_PROGRESS, Renewal, renew_leases
from balance_app.jobs.repository import ClaimPolicy, Me, claim_arguments
from balance_app.jobs.run_log import WRITE_LOGS, RunLog, log_arguments
from balance_app.jobs.statements import CLAIM, FINISH
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.settings import Settings
from bench.loads import SCALE, scaled
from bench.report import Report, percentile
from bench.servers import postgres_server, settings_of
from tests.processes import Instance, connect, empty_database, running

INSTANCES = 5
STARTS = scaled(500)
IDLE_SECONDS = max(2, int(20 * min(1, SCALE)))
CLAIMERS = 50
MANY_JOBS = scaled(100_000)
CLAIM_SECONDS = max(1, int(10 * min(1, SCALE)))
LISTED_JOBS = scaled(10_000)
STATUS_CALLS = scaled(200)
RUNS = 10
HEARTBEATS = scaled(200)

# Ten jobs with an interval of two seconds, of which one falls due every 0.2 s.
STAGGER = """
UPDATE jobs SET anchor_at = at, due_at = at, ready_at = at
FROM (SELECT name, clock_timestamp() + interval '3 s' + 0.2 * number * interval '1 s' AS at
      FROM jobs) AS staggered
WHERE jobs.name = staggered.name
"""

LATENCIES = """
SELECT extract(epoch FROM started_at - due_at)::float8 FROM job_runs
WHERE fence > 2 ORDER BY id LIMIT $1
"""

FILL = """
INSERT INTO jobs (name, schedule, description, due_at, ready_at)
SELECT 'job-' || n, 'every 3600 s', 'a job', at, at
FROM generate_series(1, $1::integer) AS n,
     LATERAL (SELECT clock_timestamp() + ($2 + n * 0.001) * interval '1 s') AS due (at)
"""

HELD = """
WITH held AS (
    UPDATE jobs SET fence = 1, holder = $1, server = 'bench', started_at = clock_timestamp(),
                    lease_expires_at = clock_timestamp() + interval '10 min'
    RETURNING name
)
INSERT INTO job_runs (job, fence, due_at, started_at) SELECT name, 1, now(), now() FROM held
"""


async def measure(report: Report) -> None:
    """Measure everything."""
    async with postgres_server() as postgres:
        for part in (starts, idling, many, listing, logs):
            async with empty_database(postgres.environment()) as variables:
                await part(report, variables, postgres)


async def starts(report: Report, variables: dict[str, str], _postgres: EmbeddedPostgres) -> None:
    """Measure (c)."""
    with tempfile.TemporaryDirectory() as event_log:
        async with fleet(variables, event_log, FLEET_EVERY="2", FLEET_SECONDS="0.1"):
            connection = await connect(variables)
            await asyncio.sleep(1)
            await connection.execute(STAGGER)
            rows: list[asyncpg.Record] = []
            for _ in range(10 * STARTS):
                await asyncio.sleep(1)
                rows = await connection.fetch(LATENCIES, STARTS)
                if len(rows) == STARTS:
                    break
            await connection.close()
    report.line(f"(c) {STARTS} starts on {INSTANCES} instances, ms after they were due")
    report.line(f"    {milliseconds([row[0] for row in rows])}")


async def idling(report: Report, variables: dict[str, str], postgres: EmbeddedPostgres) -> None:
    """Measure (d)."""
    connection = await connect(variables)
    await connection.execute(f"ALTER DATABASE {variables['DB_NAME']} SET log_statement = 'all'")
    await connection.close()
    with tempfile.TemporaryDirectory() as event_log:
        async with fleet(variables, event_log, FLEET_EVERY="3600", FLEET_SECONDS="0.1"):
            await asyncio.sleep(4)
            before = postgres.log.read_text().count("LOG:  execute ")
            await asyncio.sleep(IDLE_SECONDS)
            statements = postgres.log.read_text().count("LOG:  execute ") - before
    rate = statements / IDLE_SECONDS / INSTANCES
    report.add("idle statements", rate)
    report.line(f"(d) idle, statements per second and instance: {rate:.2f}")


async def many(report: Report, variables: dict[str, str], _postgres: EmbeddedPostgres) -> None:
    """Measure (e); on a slow machine a claim among so many takes longer than a service waits."""
    settings = settings_of(variables).model_copy(update={"db_statement_seconds": 60.0})
    await migrate(settings)
    connection = await connect(variables)
    await connection.execute(FILL, MANY_JOBS, -3600)
    await connection.execute("VACUUM ANALYZE jobs")
    booted_at = await connection.fetchval("SELECT clock_timestamp() - interval '1 day'")
    await connection.close()
    claims: list[float] = []
    capabilities = Capabilities(booted_at, MANY_JOBS, [], [asyncpg.Range(1, MANY_JOBS + 1)])
    started = monotonic()
    runs = await asyncio.gather(
        *(claimer(number, settings, capabilities, claims) for number in range(CLAIMERS))
    )
    rate = sum(runs) / (monotonic() - started)
    report.line(
        f"(e) {MANY_JOBS} jobs, {CLAIMERS} instances: {rate:.0f} runs claimed and finished a second"
    )
    report.line(
        f"    a claim, ms: {milliseconds(claims)}; runs per instance {min(runs)} to {max(runs)}"
    )


async def claimer(
    number: int, settings: Settings, capabilities: Capabilities, claims: list[float]
) -> int:
    """Claim and finish runs for CLAIM_SECONDS, with no other runs; return how many."""
    connection = await asyncpg.connect(**settings.statement_arguments())
    me = Me(uuid4(), f"instance {number}")
    policy = ClaimPolicy(
        backoff=timedelta(0),
        round=0,
        tie_break=timedelta(milliseconds=10),
        warmed_up=True,
        warm_up=timedelta(seconds=5),
        takes_over_until=None,
    )
    done = 0
    end = monotonic() + CLAIM_SECONDS
    while (sent_at := monotonic()) < end:
        row = await connection.fetchrow(
            CLAIM, *claim_arguments(me, timedelta(seconds=6), capabilities, policy)
        )
        claims.append(monotonic() - sent_at)
        assert row is not None
        if not row["claimable"]:
            await asyncio.sleep(0.01)
            continue
        policy = policy._replace(round=row["round"] + 1)
        due = datetime.now(UTC) + timedelta(hours=1)
        fields: tuple[object, ...] = (
            "succeeded",
            "done",
            timedelta(0),
            due,
            due,
            False,
            [],
            [],
            [],
            [],
            None,
            0,
            0,
            None,
        )
        assert await connection.fetchrow(FINISH, row["name"], row["fence"], me.id, *fields)
        done += 1
    await connection.close()
    return done


async def listing(report: Report, variables: dict[str, str], _postgres: EmbeddedPostgres) -> None:
    """Measure (f)."""
    async with running([Instance(variables, JOBS_ENABLED="false")]) as (instance,):
        connection = await connect(variables)
        await connection.execute(FILL, LISTED_JOBS, 3600)
        await connection.execute("VACUUM ANALYZE jobs")
        await connection.close()
        took = []
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            for _ in range(STATUS_CALLS):
                sent_at = monotonic()
                answer = await client.get(f"{instance.url}/api/cron/status")
                took.append(monotonic() - sent_at)
                assert answer.is_success
        assert len(answer.json()["jobs"]) == LISTED_JOBS
    size = len(answer.content) / 1e6
    report.line(f"(f) the status of {LISTED_JOBS} jobs ({size:.1f} MB), ms: {milliseconds(took)}")


async def logs(report: Report, variables: dict[str, str], _postgres: EmbeddedPostgres) -> None:
    """Measure (g)."""
    settings = settings_of(variables)
    await migrate(settings)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    connection = await connect(variables)
    me, lease = Me(uuid4(), "bench"), timedelta(minutes=10)
    await connection.execute(FILL, RUNS, -1)
    await connection.execute(HELD, me.id)
    capabilities = Capabilities(datetime.now(UTC), RUNS, [], [asyncpg.Range(1, RUNS + 1)])
    kept = {(f"job-{n}", 1): RunLog(f"job-{n}", 1) for n in range(1, RUNS + 1)}
    renewals = [Renewal(name, fence, NO_PROGRESS) for name, fence in kept]
    report.line(f"(g) a heartbeat of {RUNS} runs, ms")
    for lines in (0, 1, 20, 200):
        renewing, writing = [], []
        for _ in range(HEARTBEATS):
            for log in kept.values():
                for number in range(lines):
                    log.log.info("sent", number=number, to="somebody@mail.example", attempt=1)
            said = {run: what for run, log in kept.items() if (what := log.unwritten())}
            sent_at = monotonic()
            await renew_leases(connection, me, lease, capabilities, renewals)
            renewed_at = monotonic()
            if said:
                await connection.fetch(WRITE_LOGS, *log_arguments(me.id, said))
            written_at = monotonic()
            for run, what in said.items():
                kept[run].written(what)
            renewing.append(renewed_at - sent_at)
            writing.append(written_at - renewed_at)
        report.line(f"    {lines:>3} lines of each: renewal {milliseconds(renewing)}")
        report.line(f"                       write   {milliseconds(writing)}")
    await connection.close()


@asynccontextmanager
async def fleet(variables: dict[str, str], event_log: str, **env: str) -> AsyncIterator[None]:
    """Run instances whose ten jobs do almost nothing."""
    program = ("-m", "tests.jobs.fleet")
    environment: dict[str, Any] = {
        "FLEET_EVENT_LOGS": event_log,
        "FLEET_KIND": "quiet",
        "LOG_LEVEL": "warning",
        **env,
    }
    instances = [
        Instance(variables, f"app{number}", program=program, **environment)
        for number in range(1, INSTANCES + 1)
    ]
    async with running(instances):
        await asyncio.sleep(6)  # warmed up
        yield


def milliseconds(seconds: list[float]) -> str:
    """Return the median, the 99th percentile and the highest."""
    found = {"p50": 50, "p99": 99, "highest": 100}
    return ", ".join(
        f"{name} {percentile(seconds, share) * 1e3:.1f}" for name, share in found.items()
    )
