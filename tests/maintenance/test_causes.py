"""What is alerted about: what the verdict calls red, also when it is looked at again."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.api.verdict import Cause, Code, Level, Verdict
from balance_app.jobs.api.verdict_reader import VerdictReader
from balance_app.maintenance.alerting import causes
from balance_app.maintenance.alerting.causes import CauseReader
from tests.jobs.rows import add_instance
from tests.jobs.support import JobsDatabase, on

NOW = datetime(2026, 11, 29, 5, 30, tzinfo=UTC)
GONE = Cause(Level.RED, Code.INSTANCE_GONE, "app2", "app2 stopped responding", NOW)
FAILING = Cause(Level.RED, Code.JOB_FAILING, "moon", "moon failed: E: why", NOW)
NO_CODE = Cause(Level.RED, Code.NO_CODE, "sun", "No running instance has the code of sun")
RESUMED = Cause(Level.AMBER, Code.RUN_RESUMED, "moon", "the run of moon was resumed", NOW)
UNAVAILABLE = Cause(Level.RED, Code.DATABASE_UNAVAILABLE, "", "Database unavailable", NOW)


class Verdicts:
    """The verdicts of each look; the last one stays."""

    def __init__(self, *looks: tuple[Cause, ...]) -> None:
        self.looks = list(looks)

    async def read(self) -> Verdict:
        causes_now = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return Verdict(Level.RED, "", causes_now, NOW)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, without the wait."""
    waited: list[float] = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", wait)
    return waited


async def found(reader: CauseReader) -> list[str]:
    """Return the codes of what is wrong."""
    return [each.code for each in await reader.read()]


@pytest.mark.usefixtures("waits")
async def test_what_needs_a_hand_is_alerted_about() -> None:
    """Not what has healed by itself, nor what could not be recorded."""
    reader = CauseReader(Verdicts((GONE, NO_CODE, UNAVAILABLE, RESUMED)).read)
    gone, no_code = await reader.read()
    assert gone == (Code.INSTANCE_GONE, "app2", "app2 stopped responding.", NOW)
    # Since when is not known: since it was seen.
    assert no_code == (Code.NO_CODE, "sun", "No running instance has the code of sun.", NOW)


async def test_what_is_new_is_looked_at_twice(waits: list[float]) -> None:
    """After an outage jobs are overdue, and instances silent, until they have had their moment."""
    reader = CauseReader(Verdicts((GONE, FAILING), (FAILING,), (FAILING,)).read)
    assert await found(reader) == [Code.JOB_FAILING]
    assert waits == [causes.SECOND_LOOK_SECONDS]
    # What is known is not waited for.
    assert await found(reader) == [Code.JOB_FAILING]
    assert waits == [causes.SECOND_LOOK_SECONDS]


async def test_what_only_the_second_look_finds_waits_for_its_own(waits: list[float]) -> None:
    """It is new then."""
    reader = CauseReader(Verdicts((FAILING,), (FAILING, GONE), (FAILING, GONE)).read)
    assert await found(reader) == [Code.JOB_FAILING]
    assert await found(reader) == [Code.JOB_FAILING, Code.INSTANCE_GONE]
    assert len(waits) == 2


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


@pytest.mark.usefixtures("waits")
async def test_an_instance_that_is_gone_is_found_in_the_rows(jobs_db: JobsDatabase) -> None:
    """It stays wrong, also when it was hours ago."""
    instance = jobs_db.instance("app1")
    await instance.declare("audit-ledger")
    await instance.renew(await jobs_db.connect())
    await add_instance(jobs_db.admin, "app2", up_seconds=20_000, seen_seconds_ago=18_000)
    verdicts = VerdictReader(StatusReader(jobs_db.database, jobs_db.settings), jobs_db.database)
    (cause,) = await CauseReader(verdicts.read).read()
    assert (cause.code, cause.subject) == ("instance-gone", "app2")
    assert cause.sentence.startswith("app2 stopped responding (last heartbeat at ")
