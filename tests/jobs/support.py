"""Instances in the test's own process on a real database; time is simulated by rewriting rows."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypeVar, cast
from uuid import uuid4

import asyncpg
import structlog

from balance_app.db.pool import Database
from balance_app.jobs.declarations import Capabilities, Declared
from balance_app.jobs.job import Job, Registry
from balance_app.jobs.leases import Lease, Progress, Renewal, RenewalResult, renew_leases
from balance_app.jobs.repository import Claimed, ClaimPolicy, ClaimResult, JobRepository, Me
from balance_app.jobs.run import Run
from balance_app.jobs.scheduler import Scheduler
from balance_app.settings import Settings, load_settings
from tests.processes import as_instance, connect, empty_database

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

Found = TypeVar("Found")


PATIENCE_SECONDS = 30
LEASE = timedelta(seconds=30)
EVER = datetime(3000, 1, 1, tzinfo=UTC)
# the version of PostgreSQL that brought it
HAS_TRANSACTION_TIMEOUT = 17
AT_ONCE = ClaimPolicy(
    backoff=timedelta(0),
    round=0,
    tie_break=timedelta(0),
    warmed_up=True,
    warm_up=timedelta(0),
    takes_over_until=EVER,
)

SHIFT_JOBS = """
UPDATE jobs SET anchor_at = anchor_at - $1::interval, due_at = due_at - $1,
    ready_at = ready_at - $1, started_at = started_at - $1,
        startup_marked_at = startup_marked_at - $1,
    last_heartbeat_at = last_heartbeat_at - $1
"""
SHIFT_RUNS = """
UPDATE job_runs SET due_at = due_at - $1::interval, last_due_at = last_due_at - $1,
    started_at = started_at - $1, ended_at = ended_at - $1
"""

END_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"


class Instance:
    """An instance as its repository sees it: its capabilities and its identity."""

    def __init__(self, jobs_db: "JobsDatabase", name: str, lease: timedelta) -> None:
        self._ground = jobs_db
        self.me = Me(uuid4(), name)
        self.lease = lease
        self.jobs = JobRepository(jobs_db.database, self.me, lease)
        self.capabilities: Capabilities | None = None

    async def declare(self, *names: str, schedule: str = "every 3600 s") -> Capabilities:
        self.capabilities = await self.jobs.declare(dict.fromkeys(names, Declared(schedule)))
        return self.capabilities

    async def claim_next(self, **policy: object) -> ClaimResult:
        assert self.capabilities is not None
        return await self.jobs.claim_next(
            self.capabilities, AT_ONCE._replace(**cast("Any", policy))
        )

    async def claim(self, **policy: object) -> Claimed:
        claimed = (await self.claim_next(**policy)).claimed
        assert claimed is not None
        return claimed

    async def renew(
        self, connection: Connection, *fences: tuple[str, int], note: str | None = None
    ) -> dict[tuple[str, int], RenewalResult]:
        assert self.capabilities is not None
        renewals = [Renewal(name, fence, Progress(None, None, note)) for name, fence in fences]
        _, results = await renew_leases(
            connection, self.me, self.lease, self.capabilities, renewals
        )
        return {(result.name, result.fence): result for result in results}

    def run(self, claimed: Claimed, *, min_seconds: float = 0) -> Run:
        """Return the run of a claim, with a lease that is not renewed."""
        run = Run(claimed, self._ground.database, self.jobs, min_seconds=min_seconds)
        run.lease = Lease(claimed.name, claimed.fence, 0.0, lambda *_: None)
        return run


class JobsDatabase:
    """A migrated database, an administrator's connection to it, and instances."""

    def __init__(
        self,
        variables: Mapping[str, str],
        settings: Settings,
        database: Database,
        admin: Connection,
    ) -> None:
        self.variables = dict(variables)
        self.settings = settings
        self.database = database
        self.admin = admin
        self._connections: list[Connection] = []

    def instance(self, name: str = "app1", *, lease: timedelta = LEASE) -> Instance:
        return Instance(self, name, lease)

    async def connect(self) -> Connection:
        """Open another connection; it is closed at the end."""
        connection = await connect(self.variables)
        self._connections.append(connection)
        return connection

    async def close(self) -> None:
        while self._connections:
            self._connections.pop().terminate()

    @asynccontextmanager
    async def scheduler(
        self, jobs: Iterable[Job], *, starts: bool = True, **settings: object
    ) -> AsyncIterator[Scheduler]:
        """Run a scheduler, without a watchdog timer: that would end the test's own process."""
        changed = Settings.model_validate(
            {**self.settings.model_dump(exclude_unset=True), **settings}
        )
        scheduler = Scheduler(changed, self.database, Registry(jobs), watchdog=False)
        if starts:
            scheduler.start()
        try:
            yield scheduler
        finally:
            await scheduler.stop()
            await scheduler.close()

    async def row(self, name: str) -> asyncpg.Record:
        row = await self.admin.fetchrow("SELECT * FROM jobs WHERE name = $1", name)
        assert row is not None
        return row

    async def runs(self, name: str) -> list[asyncpg.Record]:
        return await self.admin.fetch("SELECT * FROM job_runs WHERE job = $1 ORDER BY id", name)

    async def outcomes(self, name: str) -> list[tuple[str | None, str | None]]:
        return [(run["outcome"], run["result"]) for run in await self.runs(name)]

    async def ended(self, name: str, *, runs: int = 1) -> list[asyncpg.Record]:
        """Wait until this many runs of a job have ended; return them."""

        async def check() -> list[asyncpg.Record] | None:
            found = [
                run for run in await self.runs(name) if run["outcome"] not in {None, "skipped"}
            ]
            return found if len(found) >= runs else None

        return await until(check)

    async def expire(self, name: str) -> None:
        """Let the lease of a job expire."""
        await self.admin.execute(
            "UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 ms'"
            " WHERE name = $1",
            name,
        )

    async def ready(self, name: str, *, seconds_ago: float = 0) -> None:
        """Let a job be ready since `seconds_ago`."""
        await self.admin.execute(
            "UPDATE jobs SET ready_at = clock_timestamp() - $2::interval,"
            " due_at = least(due_at, clock_timestamp() - $2::interval) WHERE name = $1",
            name,
            timedelta(seconds=seconds_ago),
        )

    async def forget(self) -> None:
        """Delete all jobs, runs and instances."""
        await self.admin.execute("TRUNCATE jobs, instances RESTART IDENTITY CASCADE")

    async def shift(self, seconds: float) -> None:
        """Let time pass: move all past times back. Leases are not changed."""
        async with self.admin.transaction():
            await self.admin.execute(SHIFT_JOBS, timedelta(seconds=seconds))
            await self.admin.execute(SHIFT_RUNS, timedelta(seconds=seconds))

    async def begin_outage(self) -> None:
        """End all connections of the service, and refuse new ones."""
        await self._allow_connections(allow=False)

    async def end_outage(self) -> None:
        """Accept connections of the service again."""
        await self._allow_connections(allow=True)
        self.admin = await connect(self.variables)

    async def _allow_connections(self, *, allow: bool) -> None:
        name = self.variables["DB_NAME"]
        admin = await connect({**self.variables, "DB_NAME": "postgres"})
        await admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {allow}')
        if not allow:
            await admin.execute(END_ALL, name)
        await admin.close()


@asynccontextmanager
async def on(postgres: Mapping[str, str], **settings: object) -> AsyncIterator[JobsDatabase]:
    """Migrate a new database; several tests may share it, with `forget` before each."""
    async with empty_database(postgres) as variables, _on(variables, settings) as jobs_db:
        yield jobs_db


@asynccontextmanager
async def _on(
    variables: dict[str, str], settings: Mapping[str, object]
) -> AsyncIterator[JobsDatabase]:
    values = {
        **{name.lower(): value for name, value in as_instance(variables).items()},
        "job_min_seconds": 0,
        "job_lease_seconds": 3,
        "job_heartbeat_seconds": 0.5,
        "job_warm_up_seconds": 0,
        "job_step_seconds": 0,
        "db_pool_size": 5,
        **settings,
    }
    loaded = load_settings(**values)
    # Only intended failures are logged here, with long tracebacks.
    logs = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    pool = Database(loaded)
    await pool.start()
    jobs_db = JobsDatabase(variables, loaded, pool, await connect(variables))
    try:
        yield jobs_db
    finally:
        await pool.stop()
        await jobs_db.close()
        await jobs_db.admin.close()
        structlog.configure(**logs)


async def until(check: Callable[[], Awaitable[Found | None]]) -> Found:
    """Poll until there is a result; return it."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := await check()):  # noqa: ASYNC110 - a fact in the database has no event
            await asyncio.sleep(0.02)
        return found
