"""What a claim costs does not depend on how many jobs there are."""

from collections.abc import AsyncIterator
from typing import cast
from uuid import uuid4

import asyncpg
import pytest

from balance_app.db.pool import Database
from balance_app.jobs import statements
from balance_app.jobs.declarations import Capabilities
from balance_app.jobs.repository import JobRepository, Me
from bench.jobs import FILL
from tests.explaining import OneConnection, both_plans, bounded, explaining
from tests.jobs.support import AT_ONCE, LEASE, JobsDatabase, on

MANY = 20_000


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    """One database for all tests."""
    async with on(postgres) as jobs_db:
        yield jobs_db


@both_plans
@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("guarded", [True, False])
async def test_a_claim_reads_few_of_many_jobs(
    jobs_db: JobsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    hours: int,
    *,
    guarded: bool,
) -> None:
    """Whether all of them are due, or none.

    The control: with a volatile function in the policy all are read.
    """
    if not guarded:
        volatile = statements.CLAIM.replace(
            "END AS late_at", "+ (clock_timestamp() - clock_timestamp()) END AS late_at"
        )
        assert volatile != statements.CLAIM
        monkeypatch.setattr(statements, "CLAIM", volatile)
    admin = jobs_db.admin
    await admin.execute(FILL, MANY, -3600 * hours)
    await admin.execute("VACUUM ANALYZE jobs")
    booted_at = await admin.fetchval("SELECT clock_timestamp() - interval '1 day'")
    everything = Capabilities(booted_at, MANY, [], [asyncpg.Range(1, 2**62)])
    async with explaining(admin, mode, "jobs") as connection:
        database = cast("Database", OneConnection(connection))
        jobs = JobRepository(database, Me(uuid4(), "app1"), LEASE)
        claimed = (await jobs.claim_next(everything, AT_ONCE)).claimed
    assert (None if claimed is None else claimed.name) == ("job-1" if hours > 0 else None)
    if guarded:
        bounded(connection.touched, 150)
    else:
        with pytest.raises(AssertionError):
            bounded(connection.touched, 150)
