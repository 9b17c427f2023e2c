"""What is alerted about: what the verdict calls red, also when it is looked at again."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs.api.status import JobStatus, StatusReader, StatusSnapshot
from balance_app.jobs.api.verdict import Cause as Red
from balance_app.jobs.api.verdict import Code, Difference, Level, Recent
from balance_app.jobs.api.verdict_reader import VerdictReader
from balance_app.maintenance.alerting import Cause, causes
from balance_app.maintenance.alerting.causes import CauseReader
from tests.jobs.rows import add_instance
from tests.jobs.support import JobsDatabase, on

NOW = datetime(2026, 11, 29, 5, 30, tzinfo=UTC)
FAILING = Red(Level.RED, Code.JOB_FAILING, "moon", "moon failed: E: why", NOW)
NO_CODE = Red(Level.RED, Code.NO_CODE, "sun", "No running instance has the code of sun")
OVERDUE = Red(Level.RED, Code.JOB_OVERDUE, "mars", "mars is overdue", NOW)
# the instance app2
GONE = "app2"


def instance(name: str, state: str) -> dict[str, Any]:
    more = {"startedAt": NOW - timedelta(hours=1), "replacesSeenAt": None, "seenSecondsAgo": 60}
    return {"id": name, "server": name, "state": state, **more}


def look(*wrong: Red | str, settling: bool = False, live: bool = True) -> StatusSnapshot:
    """The status with jobs or instances that need a hand."""
    reds = {each.subject: each for each in wrong if isinstance(each, Red)}
    instances = [instance(each, "gone") for each in wrong if isinstance(each, str)]
    if live:
        instances.append(instance("app1", "live"))
    jobs = {"moon": cast("JobStatus", None)}
    return StatusSnapshot(NOW, b"", {}, instances, jobs, reds, (), settling)


UNAVAILABLE = None


class Looks:
    """What each look finds; the last one stays. And what is known of the looks before."""

    def __init__(self, *looks: StatusSnapshot | None) -> None:
        self.looks = list(looks)
        self.known: list[Cause] = []
        self.differences: tuple[Difference, ...] = ()

    async def _read(self) -> tuple[StatusSnapshot, Recent]:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if found is None:
            raise DatabaseUnavailable("It did not answer in time.", applied="no")
        return found, Recent(differences=self.differences)

    async def find(self) -> list[str] | None:
        """Return the codes of what is wrong, which is known then."""
        # A reader for each turn, as on an instance that takes over: it remembers nothing.
        found = await CauseReader(self._read).read(self.known)
        if found is None:
            return None
        self.known = found
        return sorted(each.code for each in found)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, without the wait."""
    waited: list[float] = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", wait)
    return waited


@pytest.mark.usefixtures("waits")
async def test_what_needs_a_hand_is_alerted_about() -> None:
    """With the time when it was seen where the one of its begin is not known."""
    looks = Looks(look(GONE, NO_CODE))
    assert await looks.find() == [Code.INSTANCE_GONE, Code.NO_CODE]
    gone, no_code = looks.known
    sentence = "app2 stopped responding (last heartbeat at 2026-11-29 05:29:00 UTC)"
    assert gone == (Code.INSTANCE_GONE, "app2", sentence, NOW - timedelta(minutes=1))
    assert no_code == (Code.NO_CODE, "sun", "No running instance has the code of sun", NOW)


async def test_what_is_new_is_looked_at_twice(waits: list[float]) -> None:
    """After an outage jobs are overdue, and instances silent, until they have had their moment."""
    looks = Looks(look(GONE, FAILING), look(FAILING))
    assert await looks.find() == [Code.JOB_FAILING]
    assert waits == [causes.SECOND_LOOK_SECONDS]
    # What is known is not waited for.
    assert await looks.find() == [Code.JOB_FAILING]
    assert waits == [causes.SECOND_LOOK_SECONDS]


async def test_what_only_the_second_look_finds_waits_for_its_own(waits: list[float]) -> None:
    """It is new then."""
    looks = Looks(look(FAILING), look(FAILING, GONE))
    assert await looks.find() == [Code.JOB_FAILING]
    assert await looks.find() == [Code.INSTANCE_GONE, Code.JOB_FAILING]
    assert len(waits) == 2


@pytest.mark.usefixtures("waits")
async def test_a_difference_that_an_audit_found_is_alerted_about_until_it_finds_none() -> None:
    """It is in the history, also when a run after it was released."""
    looks = Looks(look())
    looks.differences = (Difference("moon", " user 7 differs", NOW),)
    assert await looks.find() == [Code.AUDIT_DIFFERS]
    looks.differences = ()
    assert await looks.find() == []


@pytest.mark.usefixtures("waits")
async def test_a_look_that_fails_does_not_find_that_nothing_is_wrong() -> None:
    """Neither the first one nor the second: what is wrong is not known then."""
    for looks in (Looks(UNAVAILABLE), Looks(look(GONE), UNAVAILABLE)):
        assert await looks.find() is None

    async def is_overloaded() -> tuple[StatusSnapshot, Recent]:
        raise Overloaded("Too many requests wait.")

    assert await CauseReader(is_overloaded).read([]) is None


@pytest.mark.usefixtures("waits")
async def test_what_the_verdict_leaves_out_has_not_recovered() -> None:
    """For two leases after an outage, and while no instance is there, it leaves out much."""
    looks = Looks(look(NO_CODE, OVERDUE))
    wrong = await looks.find()
    assert wrong == [Code.JOB_OVERDUE, Code.NO_CODE]
    looks.looks = [look(NO_CODE, OVERDUE, settling=True)]
    assert await looks.find() == wrong
    looks.looks = [look(NO_CODE, OVERDUE, live=False)]
    assert await looks.find() == [*wrong, Code.NO_INSTANCES]
    # When the instances have had their moment it counts.
    looks.looks = [look(OVERDUE)]
    assert await looks.find() == [Code.JOB_OVERDUE]


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


@pytest.mark.usefixtures("waits")
async def test_an_instance_that_is_gone_is_found_in_the_rows(jobs_db: JobsDatabase) -> None:
    """It stays wrong, also when it was hours ago."""
    running = jobs_db.instance("app1")
    await running.declare("audit-ledger")
    await running.renew(await jobs_db.connect())
    await add_instance(jobs_db.admin, "app2", up_seconds=20_000, seen_seconds_ago=18_000)
    status = StatusReader(jobs_db.database, jobs_db.settings)
    verdicts = VerdictReader(status, jobs_db.database)
    found = await CauseReader(verdicts.look).read([])
    assert found is not None
    (cause,) = found
    assert (cause.code, cause.subject) == ("instance-gone", "app2")
    assert cause.sentence.startswith("app2 stopped responding (last heartbeat at ")
