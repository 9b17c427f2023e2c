"""What a claim costs does not depend on how many jobs there are."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest

from balance_app.db.pool import Database
from balance_app.jobs import statements
from balance_app.jobs.declarations import IN_EFFECT, LIVE, Capabilities
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


async def test_a_declaration_takes_each_live_one_once(jobs_db: JobsDatabase) -> None:
    """Not all of them again for each job: with thousands of jobs that took seconds."""
    admin = jobs_db.admin
    await admin.execute(FILL, 2000, 3600)
    await admin.execute(
        "INSERT INTO job_declarations (job, digest, schedule, description, first_declared_at)"
        " SELECT name, version, 'every ' || version || ' s', '',"
        " clock_timestamp() + version::integer * interval '1 s'"
        " FROM jobs, unnest(ARRAY['1', '2', '3']) AS version"
    )
    arguments = [row["name"] for row in await admin.fetch("SELECT name FROM jobs")], LIVE
    rows = await admin.fetch(IN_EFFECT, *arguments)
    assert {(row["schedule"], *row["others"]) for row in rows} == {
        ("every 3 s", "every 1 s", "every 2 s")
    }
    assert len(rows) == 2000
    plan = await admin.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {IN_EFFECT}", *arguments)
    assert {node["Actual Loops"] for node in _nodes(json.loads(plan)[0]["Plan"])} == {1}


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from _nodes(each)
