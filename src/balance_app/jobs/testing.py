"""For tests of one's own jobs: a job run once on a real database, with no service around it."""

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from pydantic import SecretStr

from balance_app.db.pool import Database, read, write
from balance_app.jobs.job import Job, Registry
from balance_app.jobs.run_log import LINES, TRACEBACK, Line
from balance_app.jobs.scheduler import Scheduler
from balance_app.jobs.stored_json import as_json
from balance_app.settings import load_settings

CLAIM_SECONDS: Final = 10.0

# Ready now, whatever its schedule says, and as if it had never run.
READY: Final = """
UPDATE jobs SET
    due_at = coalesce($2, clock_timestamp()), ready_at = clock_timestamp(), attempt = 0,
    checkpoint = $3, requested_by = 'run_once', requested_args = $4, startup_marked_at = NULL,
    paused_at = NULL, paused_by = NULL, pause_reason = NULL, lost_streak = 0, releases = 0,
    retries = 0, failure_streak = 0
WHERE name = $1 AND holder IS NULL
RETURNING fence
"""

LIVE_INSTANCES: Final = """
SELECT server FROM instances WHERE last_heartbeat_at + $1::interval > clock_timestamp() LIMIT 1
"""

RECORD: Final = "SELECT outcome, result FROM job_runs WHERE job = $1 AND fence = $2"


class RunRecord(NamedTuple):
    """What the history has of a run."""

    # succeeded, failed, timed_out, cancelled, released
    outcome: str
    # what the function returned, or the error
    result: str | None
    # the last 200 lines of `run.log`: `Line(number, at, level, text)`
    lines: list[Line]
    # of the error, if it failed
    traceback: str | None


async def run_once(
    job: Job,
    *,
    database_url: str | None = None,
    args: Mapping[str, object] | None = None,
    resumed: Any = None,  # noqa: ANN401 - any JSON
    due_at: datetime | None = None,
) -> RunRecord:
    """Run a job once, now, with all that a service gives it but its least duration.

    The run holds a lease that is renewed, and its transactions are fenced. The database is migrated
    first if it is empty. The rows of the job and its history stay.

    Args:
        job: as `@job` returns it.
        database_url: `postgresql://...`, a database for tests alone; by default DATABASE_URL, or
            DB_HOST and the like.
        args: what a request to run it would pass.
        resumed: the checkpoint that it goes on from.
        due_at: its tick; by default now.

    Raises:
        RuntimeError: live instances use this database, or the job can't be declared or claimed.
        UnusableDatabaseError: the database has tables that are not this service's.
    """
    settings = load_settings(
        database_url=database_url,
        server_id="run_once",
        job_min_seconds=0,
        job_warm_up_seconds=0,
        job_step_seconds=0,
    )
    if settings.pooled and database_url is not None:  # the pooler is that of another database
        settings = settings.at(SecretStr(database_url))
    if not settings.database_is_configured:
        raise RuntimeError("No database is configured: give database_url, or set DATABASE_URL.")
    database = Database(settings)
    scheduler = Scheduler(settings, database, Registry([job]), watchdog=False)
    await database.start()
    try:
        lease = timedelta(seconds=settings.job_lease_seconds)
        live = await database.run(lambda con: read(con, LIVE_INSTANCES, lease))
        if live:
            raise RuntimeError(
                f"The instance {live[0]['server']} uses this database: run_once needs one of its "
                "own."
            )
        await scheduler.declare()
        if job.name in scheduler.undeclared:
            raise RuntimeError(f"Not declared: {scheduler.undeclared[job.name]}.")
        checkpoint = None if resumed is None else as_json(resumed)
        passed = None if args is None else as_json(args)
        row = await database.run(
            lambda con: write(con, READY, job.name, due_at, checkpoint, passed)
        )
        if row is None:
            raise RuntimeError(f"{job.name} runs already.")
        async with asyncio.timeout(CLAIM_SECONDS):
            while (wait_seconds := await scheduler.run_once()) > 0:  # noqa: ASYNC110 - it says how long
                await asyncio.sleep(wait_seconds)
        await scheduler.runs_ended()
        of_run = (job.name, row["fence"] + 1)
        (found,) = await database.run(lambda con: read(con, RECORD, *of_run))
        lines = await database.run(lambda con: read(con, LINES, *of_run))
        traceback = await database.run(lambda con: read(con, TRACEBACK, *of_run))
        return RunRecord(
            **found,
            lines=[Line(**line) for line in lines],
            traceback=traceback[0]["text"] if traceback else None,
        )
    finally:
        await scheduler.stop()
        await scheduler.close()
        await database.stop()
