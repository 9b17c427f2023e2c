"""What is wrong now: each kind of thing, and its like that is not wrong."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from balance_app.jobs.api.status import StatusReader
from balance_app.maintenance.alerting import causes
from balance_app.maintenance.alerting.causes import CauseReader
from tests.jobs.support import JobsDatabase, on

NAME = "audit-ledger"


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


@pytest.fixture
async def reader(jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch) -> CauseReader:
    """A reader of a database with one job, and a live instance that has its code."""
    monkeypatch.setattr(causes, "SECOND_LOOK_SECONDS", 0)
    instance = jobs_db.instance("app1")
    await instance.declare(NAME)
    await instance.renew(await jobs_db.connect())
    return CauseReader(StatusReader(jobs_db.database, jobs_db.settings), jobs_db.database)


FAILED = """
UPDATE jobs SET failure_streak = 1, last_outcome = 'failed', last_server = 'app1',
    last_started_at = clock_timestamp(), last_ended_at = clock_timestamp(), last_result = 'E: why'
"""


BY_ITSELF = "UPDATE jobs SET paused_by = 'balance_app'"
PAUSED = """
UPDATE jobs SET paused_at = clock_timestamp(), paused_by = 'ann', pause_reason = 'its runs failed'
"""
THRICE = "UPDATE jobs SET failure_streak = 3"
RELEASED = "UPDATE jobs SET last_outcome = 'released'"
SUCCEEDED = "UPDATE jobs SET failure_streak = 0, last_outcome = 'succeeded'"
LOST = "UPDATE jobs SET failure_streak = 0, last_outcome = 'lost'"
MISMATCH = "UPDATE jobs SET last_result = 'LedgerMismatchError: user 3 differs'"
LATE = "UPDATE jobs SET ready_at = clock_timestamp() - interval '1 min'"
DUE = "UPDATE jobs SET ready_at = clock_timestamp() - interval '1 s'"
QUARANTINED = """
UPDATE jobs SET lost_streak = 3, ready_at = clock_timestamp() + interval '9 min'
"""
LOST_TWICE = "UPDATE jobs SET lost_streak = 2"
NO_CODE = "UPDATE instances SET missing = '{audit-ledger}'"


@pytest.mark.parametrize(
    ("statements", "code", "sentence"),
    [
        ((), None, ""),
        ((FAILED,), "job-failing", "audit-ledger failed: E: why"),
        ((FAILED, THRICE), "job-failing", "failed 3 times in a row:"),
        # It fails until it has succeeded, whatever became of the last run.
        ((FAILED, RELEASED), "job-failing", "failed."),
        ((FAILED, SUCCEEDED), None, ""),
        ((FAILED, LOST), None, ""),
        ((FAILED, MISMATCH), "audit-differs", "found a difference: user 3 differs"),
        ((PAUSED, BY_ITSELF), "job-paused", "paused: its runs failed."),
        ((PAUSED,), None, ""),
        ((FAILED, PAUSED), None, ""),
        ((LATE,), "job-overdue", "audit-ledger is overdue: Due since"),
        ((DUE,), None, ""),
        ((QUARANTINED,), "job-lost", "was lost and is not resumed."),
        ((LOST_TWICE,), None, ""),
        ((NO_CODE,), "no-code", "No live instance has"),
    ],
)
async def test_what_is_wrong_with_a_job(
    jobs_db: JobsDatabase,
    reader: CauseReader,
    statements: tuple[str, ...],
    code: str | None,
    sentence: str,
) -> None:
    """Not history, not what a person has done, and not what will start in a moment."""
    for each in statements:
        await jobs_db.admin.execute(each)
    found = await reader.read()
    assert [each.code for each in found] == ([] if code is None else [code])
    if code is not None:
        (cause,) = found
        assert cause.subject == NAME
        assert sentence in cause.sentence
        assert cause.since.tzinfo is not None


OTHER = """
INSERT INTO instances (id, server, last_heartbeat_at, highest_number, missing)
VALUES (gen_random_uuid(), $1, clock_timestamp() - $2::interval, 1000, '{}')
"""


async def test_an_instance_that_is_gone(jobs_db: JobsDatabase, reader: CauseReader) -> None:
    """By its name: one that has started again is there; also when it was hours ago."""
    await jobs_db.admin.execute(OTHER, "app2", timedelta(hours=5))
    await jobs_db.admin.execute(OTHER, "app3", timedelta(seconds=0.1))
    await jobs_db.admin.execute(OTHER, "app1", timedelta(minutes=1))
    (cause,) = await reader.read()
    assert (cause.code, cause.subject) == ("instance-gone", "app2")
    assert cause.sentence.startswith("app2 stopped responding: its last heartbeat was at 20")
    await jobs_db.admin.execute(OTHER, "app2", timedelta(0))
    assert await reader.read() == []


async def test_what_is_new_is_looked_at_twice(
    jobs_db: JobsDatabase, reader: CauseReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage jobs are overdue, and instances silent, until they have had their moment."""
    looks = 0

    async def catch_up(seconds: float) -> None:
        nonlocal looks
        looks += seconds == causes.SECOND_LOOK_SECONDS
        await jobs_db.admin.execute(
            "UPDATE instances SET last_heartbeat_at = clock_timestamp() WHERE server = 'app2'"
        )

    await jobs_db.admin.execute(OTHER, "app2", timedelta(minutes=1))
    await jobs_db.admin.execute(FAILED)
    monkeypatch.setattr(causes, "SECOND_LOOK_SECONDS", 5)
    monkeypatch.setattr(asyncio, "sleep", catch_up)
    assert [each.code for each in await reader.read()] == ["job-failing"]
    assert looks == 1
    # What is known is not waited for.
    assert [each.code for each in await reader.read()] == ["job-failing"]
    assert looks == 1
