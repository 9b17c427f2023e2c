"""Instances as rows: gone, back, left, dismissed; their counters; and the verdict over HTTP."""

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import NoReturn
from uuid import uuid4

import pytest
from pydantic_core import from_json

from balance_app.cli.output import moment
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.errors import (
    InstanceLive,
    InstanceNotFound,
    JobHasCode,
    JobWithoutCode,
)
from balance_app.jobs.api.status import StatusReader, StatusSnapshot
from balance_app.jobs.api.verdict_reader import VerdictReader
from balance_app.jobs.heartbeat import HeartbeatThread
from balance_app.jobs.leases import LEAVE, Changes, HeldLeases, renew_leases
from balance_app.jobs.repository import Me
from balance_app.metrics import Metrics
from balance_app.sessions import Session
from balance_app.states import job_sign
from tests.cli.test_jobs import add_run
from tests.jobs.rows import (
    AHEAD,
    Connection,
    add_instance,
    add_job,
    migrated,
    running,
    settings_for,
)
from tests.jobs.support import JobsDatabase, on, until
from tests.processes import Instance, connect, http_client
from tests.terminal import run

SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    """One database for the tests of heartbeats."""
    async with on(postgres) as jobs_db:
        yield jobs_db


class Site:
    """What reads and changes the rows of a database."""

    def __init__(self, reader: StatusReader, verdict: VerdictReader, controls: Controls) -> None:
        self.reader = reader
        self.verdict = verdict
        self.controls = controls

    async def states(self) -> dict[str, str]:
        """The state of each instance by its name."""
        snapshot = await self.reader.read()
        return {each["server"]: each["state"] for each in snapshot.instances}


@pytest.fixture
async def site(database: dict[str, str]) -> AsyncIterator[tuple[Site, Connection]]:
    """Readers of a database without jobs, and a connection to it."""
    async with migrated(database) as (served, connection):
        reader = StatusReader(served, settings_for(database))
        yield Site(reader, VerdictReader(reader, served), Controls(served, reader, {})), connection


async def test_an_instance_that_is_gone_stays_until_it_is_dismissed(
    site: tuple[Site, Connection],
) -> None:
    """It is listed for days; who dismissed it is recorded; a live one can't be dismissed."""
    where, connection = site
    live = await add_instance(connection, "app1")
    gone = await add_instance(connection, "app4", up_seconds=200_000, seen_seconds_ago=100_000)
    assert await where.states() == {"app1": "live", "app4": "gone"}
    with pytest.raises(InstanceLive):
        await where.controls.dismiss(str(live), "ada")
    for wrong in (str(uuid4()), "app4", "\x00"):
        with pytest.raises(InstanceNotFound):
            await where.controls.dismiss(wrong, "ada")
    assert await where.controls.dismiss(str(gone), "ada") == "app4"
    assert await where.states() == {"app1": "live"}
    with pytest.raises(InstanceNotFound):
        await where.controls.dismiss(str(gone), "bob")
    rows = await connection.fetch("SELECT by, action, subject FROM actions WHERE by = 'ada'")
    assert [tuple(row) for row in rows] == [("ada", "instance dismissed", "instance app4")]


async def test_a_dead_instance_from_before_a_clock_was_set_back_holds_nobody_up(
    site: tuple[Site, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the code of no job, and can be dismissed. The control: as if it were live."""
    where, connection = site
    dead = str(await add_instance(connection, "app4"))
    await add_job(connection, "moon")
    with pytest.raises(JobHasCode):
        await where.controls.forget("moon", "ada")
    with pytest.raises(InstanceLive):
        await where.controls.dismiss(dead, "ada")
    monkeypatch.setattr(where.reader, "ahead", AHEAD)
    with pytest.raises(JobWithoutCode):
        await where.controls.run("moon", "ada")
    await where.controls.forget("moon", "ada")
    assert await where.controls.dismiss(dead, "ada") == "app4"


async def test_an_instance_of_the_same_name_takes_the_place_of_one_that_is_gone(
    site: tuple[Site, Connection],
) -> None:
    """Restarted under its name it is back, however often it died; and it leaves no trace of them.

    The control: one that was up beside it when it died is not its successor.
    """
    where, connection = site
    await add_instance(connection, "app4", up_seconds=900, seen_seconds_ago=500)
    await add_instance(connection, "app4", up_seconds=400, seen_seconds_ago=300)
    back = await add_instance(connection, "app4", up_seconds=291)
    await add_instance(connection, "twin", up_seconds=800, seen_seconds_ago=100)
    await add_instance(connection, "twin", up_seconds=700)
    snapshot = await where.reader.read()
    states = sorted((each["server"], each["state"]) for each in snapshot.instances)
    assert states == [("app4", "live"), ("twin", "gone"), ("twin", "live")]
    await connection.execute(LEAVE, back)
    assert "app4" not in await where.states()


async def test_a_heartbeat_carries_counters_and_the_gap_before_it(
    jobs_db: JobsDatabase,
) -> None:
    """No gap within a lease; the latest ten gaps are kept, the latest first."""
    instance = jobs_db.instance("app7")
    capabilities = await instance.declare("moon")
    admin = jobs_db.admin
    me = Me(uuid4(), "app7")
    for accepted in (3, 5):
        changes = Changes(accepted, 2)
        await renew_leases(admin, me, 6 * SECOND, capabilities, [], changes)
    row = await admin.fetchrow("SELECT accepted, refused, silences FROM instances")
    assert row is not None
    assert tuple(row) == (5, 2, [])
    earlier = "UPDATE instances SET last_heartbeat_at = last_heartbeat_at - $1::interval"
    for _ in range(12):
        await admin.execute(earlier, 9 * SECOND)
        await renew_leases(admin, me, 6 * SECOND, capabilities, [], changes)
    silences = await admin.fetchval("SELECT silences FROM instances")
    assert len(silences) == 20
    pairs = zip(silences[::2], silences[1::2], strict=True)
    assert all(until - since >= 9 * SECOND for since, until in pairs)
    assert silences[1] == max(silences)


@pytest.mark.parametrize("reconnects", [True, False])
async def test_an_instance_leaves_also_after_a_heartbeat_that_failed(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, reconnects: bool
) -> None:
    """Its connection is closed then, so a new one says that it leaves.

    The control: without a new connection it stays, as an instance that is gone.
    """
    instance = jobs_db.instance("app8")
    failed = threading.Event()

    async def fail(*_arguments: object) -> NoReturn:
        failed.set()
        raise ConnectionResetError

    async def keep(_thread: HeartbeatThread, connection: Session | None) -> Session | None:
        return connection

    # Without runs a heartbeat that failed is tried again after this time.
    settings = jobs_db.settings.model_copy(update={"job_heartbeat_seconds": 600.0})
    leases = HeldLeases(settings, watchdog=False)
    thread = HeartbeatThread(settings, instance.me, leases, Metrics())
    thread.start(await instance.declare("moon"))
    present = "SELECT count(*) FROM instances WHERE server = 'app8' HAVING count(*) = 1"
    assert await until(lambda: jobs_db.admin.fetchval(present)) == 1
    monkeypatch.setattr("balance_app.jobs.heartbeat.renew_leases", fail)
    thread.renew_soon()
    assert await asyncio.to_thread(failed.wait, 10)
    if not reconnects:
        monkeypatch.setattr(HeartbeatThread, "_connected", keep)
    await thread.stop()
    assert (await jobs_db.admin.fetchval(present) == 1) is not reconnects


async def test_what_recovered_is_told_by_one_statement_and_can_be_dismissed(
    site: tuple[Site, Connection],
) -> None:
    """A lost run is amber once the next has begun, and no longer after somebody dismissed it."""
    where, connection = site
    await add_instance(connection, "app1")
    await add_job(connection, "moon")
    lost = {"server": "app4", "outcome": "lost", "ended_at": -26 * SECOND}
    await add_run(connection, "moon", 6, **lost)
    assert (await where.verdict.read()).level == "green"
    await add_run(connection, "moon", 7)
    verdict = await where.verdict.read()
    assert [cause.code for cause in verdict.causes] == ["run-resumed"]
    await where.controls.dismiss_recovered("ada")
    assert (await where.verdict.read()).level == "green"


async def test_the_verdict_over_http_and_on_the_command_line(
    instance: Instance, database: dict[str, str]
) -> None:
    """The same sentence: first in `status`, whose exit code is its level."""
    connection = await connect(database)
    await connection.execute("DELETE FROM instances; DELETE FROM job_runs; DELETE FROM jobs")
    await add_instance(connection, "app1")
    gone = await add_instance(connection, "app4", seen_seconds_ago=100)
    await add_job(connection, "moon", paused_at=-SECOND, paused_by="balance_app")
    await add_job(connection, "sun")
    async with http_client(instance.url) as client:
        verdict = (await client.get("/api/verdict")).json()
        assert (verdict["level"], verdict["symbol"]) == ("red", "✕")
        assert [each["code"] for each in verdict["causes"]] == ["instance-gone", "job-paused"]
        assert verdict["causes"][1]["action"] == {"kind": "resume", "target": "moon"}
        assert verdict["causes"][0]["action"] == {"kind": "dismiss", "target": str(gone)}
        metrics = (await client.get("/metrics")).text
        assert "balance_app_fleet_verdict 2.0" in metrics
        assert 'balance_app_fleet_verdict_causes{code="job-paused"} 1.0' in metrics
    code, out, _ = await run("status", "--attention", BALANCE_APP_URL=instance.url)
    assert (code, out.splitlines()[0]) == (7, f"✕ {verdict['sentence']}")
    assert "moon" in out
    assert "sun" not in out
    assert "moon was paused (balance-app resume moon)\n" in out
    code, _, err = await run("status", "moon", "--watch", BALANCE_APP_URL=instance.url)
    assert (code, "shows all jobs" in err) == (2, True)
    code, out, _ = await run("dismiss", "app4", BALANCE_APP_URL=instance.url)
    assert (code, out) == (0, "Dismissed app4.\n")
    # The only thing that is wrong has its command, too.
    code, out, _ = await run("status", BALANCE_APP_URL=instance.url)
    assert (code, out.splitlines()[0]) == (7, "✕ moon was paused.")
    assert "balance-app resume moon" in out
    await connection.execute("UPDATE jobs SET paused_at = NULL, paused_by = NULL")
    code, out, _ = await run("status", BALANCE_APP_URL=instance.url)
    assert (code, out.splitlines()[0]) == (0, "✓ All is well.")
    await connection.close()


class _Gone:
    """A status that can't be read."""

    async def read(self) -> StatusSnapshot:
        raise DatabaseUnavailable("it is gone", applied="no")


async def test_there_is_a_verdict_without_the_database(
    site: tuple[Site, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory: red, and since when, by the database's clock as it was last seen."""
    where, connection = site
    await add_instance(connection, "app1")
    before = await where.verdict.read()
    assert before.level == "green"
    monkeypatch.setattr(where.verdict, "_status_reader", _Gone())
    first, second = await where.verdict.read(), await where.verdict.read()
    (cause,) = second.causes
    assert (second.level, cause.code) == ("red", "database-unavailable")
    assert before.now is not None
    assert first.now is not None
    assert second.now is not None
    assert before.now <= first.now <= second.now
    assert cause.since == first.now


async def test_a_run_whose_work_is_done_holds_to_its_minimum_duration(
    database: dict[str, str],
) -> None:
    """By its function's end, or its progress; until the duration that its job declares.

    The control: a run that goes on, and one whose minimum duration is over, hold nothing.
    """
    async with migrated(database) as (served, connection):
        least = {"own": 3600.0}
        settings = settings_for(database, job_min_seconds=120)
        reader = StatusReader(served, settings, least_seconds=least)
        one = await add_instance(connection, "app1")
        at_work = running(one, "app1")
        await add_job(connection, "ended", **at_work, work_ended_at=-SECOND)
        await add_job(connection, "full", **at_work, done=4, total=4)
        await add_job(connection, "half", **at_work, done=2, total=4)
        await add_job(connection, "long", **running(one, "app1", seconds=500), done=4, total=4)
        await add_job(connection, "own", **at_work, done=4, total=4)
        jobs = {job["name"]: job for job in from_json((await reader.read()).text)["jobs"]}
    lasts = {
        name: (moment(job["holdingUntil"]) - moment(job["startedAt"])).total_seconds()
        for name, job in jobs.items()
        if job["holdingUntil"] is not None
    }
    assert lasts == {"ended": 120, "full": 120, "own": 3600}
    assert job_sign(jobs["full"]).label == "work done"
