"""The status reader shows the rows as they are now, of every job, to every caller."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest
from pydantic_core import from_json

from balance_app.db.outages import Cause, Kind
from balance_app.db.pool import Connection as PoolConnection
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.api import status as status_module
from balance_app.jobs.api.status import StatusReader
from tests.jobs.rows import (
    AHEAD,
    Connection,
    add_instance,
    add_job,
    migrated,
    running,
    settings_for,
)
from tests.mutants import replaced
from tests.processes import connect

Rows: TypeAlias = "list[asyncpg.Record]"
Read: TypeAlias = Callable[[PoolConnection], Awaitable[Rows]]

SECOND = timedelta(seconds=1)


@pytest.fixture
async def rows(database: dict[str, str]) -> AsyncIterator[tuple[StatusReader, Connection]]:
    """A reader of a database without jobs, and a connection to write them."""
    async with migrated(database) as (served, connection):
        yield StatusReader(served, settings_for(database)), connection


async def read_status(reader: StatusReader) -> dict[str, Any]:
    status: dict[str, Any] = from_json((await reader.read()).text)
    return status


REASONS: dict[str, tuple[dict[str, object], str | None, str]] = {
    "not-due": ({"due_at": 60 * SECOND}, "readyAt", "The next run is at "),
    "due": ({"due_at": -2 * SECOND}, None, "Due since "),
    "paused": (
        {"paused_at": -5 * SECOND, "paused_by": "ada", "pause_reason": "too loud"},
        None,
        "Paused by ada at ",
    ),
    "retry": (
        {
            "due_at": -60 * SECOND,
            "ready_at": 60 * SECOND,
            "attempt": 1,
            "last_outcome": "failed",
        },
        "readyAt",
        "The last run failed. The next try is at ",
    ),
    "released": (
        {
            "due_at": -60 * SECOND,
            "ready_at": -1 * SECOND,
            "attempt": 1,
            "last_outcome": "released",
        },
        None,
        "app9 released it",
    ),
    "requested": (
        {"due_at": -1 * SECOND, "requested_by": "bob"},
        None,
        "Queued by bob",
    ),
    "quarantined": (
        {"due_at": -60 * SECOND, "ready_at": 600 * SECOND, "attempt": 3, "lost_streak": 3}
        | {"last_outcome": "lost"},
        "readyAt",
        "The last 3 runs were lost with their processes. The next try is at",
    ),
    "lost": (
        {**running(uuid4(), "app7"), "lease_expires_at": -1 * SECOND},
        None,
        "app7 stopped responding, or can't reach the database",
    ),
}
LAST = {
    "last_server": "app9",
    "last_started_at": -70 * SECOND,
    "last_ended_at": -60 * SECOND,
    "last_result": "so",
}


@pytest.mark.parametrize("reason", REASONS)
async def test_a_waiting_job_says_why(rows: tuple[StatusReader, Connection], reason: str) -> None:
    """Each reason has a code, a sentence and the time that ends it, if any."""
    reader, connection = rows
    columns, until, sentence = REASONS[reason]
    await add_instance(connection)
    last = LAST if "last_outcome" in columns else {}
    await add_job(connection, "a-job", **columns, **last)
    status = await read_status(reader)
    (job,) = status["jobs"]
    state = "paused" if reason == "paused" else "waiting"
    assert (job["state"], job["waiting"]["reason"]) == (state, reason)
    assert job["waiting"]["sentence"].startswith(sentence)
    assert job["waiting"]["until"] == (None if until is None else job[until])
    assert job["waiting"]["overdue"] is False
    assert (job["server"], job["instanceId"], job["elapsedSeconds"]) == (None, None, None)
    assert status["counts"] == {"running": 0, "waiting": 0, "paused": 0, "overdue": 0, state: 1}


async def test_a_due_job_waits_for_the_warm_up(rows: tuple[StatusReader, Connection]) -> None:
    """Only when all instances have just started."""
    reader, connection = rows
    await add_instance(connection, up_seconds=-3600)
    await add_job(connection, "seen", due_at=-1 * SECOND, startup_marked_at=3600 * SECOND)
    await add_job(connection, "a-run", due_at=-1 * SECOND, startup_marked_at=3600 * SECOND)
    await connection.execute(
        "UPDATE jobs SET last_heartbeat_at = clock_timestamp() + interval '2 hours'"
        " WHERE name = 'a-run'"
    )
    fleet_up, job = (await read_status(reader))["jobs"]
    assert (job["waiting"]["reason"], fleet_up["waiting"]["reason"]) == ("warm-up", "due")
    assert job["waiting"]["until"] > job["readyAt"]
    await add_instance(connection, "app2", up_seconds=600)
    _, job = (await read_status(reader))["jobs"]
    assert job["waiting"]["reason"] == "due"


async def test_a_job_without_code_is_shown_as_such(rows: tuple[StatusReader, Connection]) -> None:
    """Live instances count, with the numbers up to their highest except the missing ones."""
    reader, connection = rows
    for name in ("early", "gone", "late"):
        await add_job(connection, name)

    async def without_code() -> set[str]:
        jobs = (await read_status(reader))["jobs"]
        return {job["name"] for job in jobs if job["waiting"]["reason"] == "no-code"}

    assert await without_code() == {"early", "gone", "late"}
    number = await connection.fetchval("SELECT number FROM jobs WHERE name = 'gone'")
    await add_instance(connection, seen_seconds_ago=30)
    assert await without_code() == {"early", "gone", "late"}
    await add_instance(connection, "app2", highest_number=number, missing=("gone",))
    assert await without_code() == {"gone", "late"}
    await add_instance(connection, "app3", missing=("early", "gone"))
    assert await without_code() == {"gone"}
    await add_instance(connection, "app4", highest_number=number)
    assert await without_code() == set()
    await connection.execute(
        "UPDATE instances SET last_heartbeat_at = clock_timestamp() - interval '20 s'"
    )
    assert await without_code() == {"early", "gone", "late"}


async def test_a_job_that_is_not_claimed_is_overdue(rows: tuple[StatusReader, Connection]) -> None:
    """When it was ready for longer than a lease and the warm-up, for any reason."""
    reader, connection = rows
    await add_instance(connection)
    await add_job(connection, "due", due_at=-30 * SECOND)
    await add_job(connection, "lost", **{**running(uuid4(), "x"), "lease_expires_at": -30 * SECOND})
    await add_job(connection, "soon", due_at=-5 * SECOND)
    await add_job(connection, "paused", due_at=-30 * SECOND, paused_at=SECOND, paused_by="ada")
    status = await read_status(reader)
    overdue = {job["name"] for job in status["jobs"] if job["waiting"]["overdue"]}
    assert overdue == {"due", "lost"}
    assert status["counts"] == {"running": 0, "waiting": 3, "paused": 1, "overdue": 2}


async def test_time_alone_changes_the_status(rows: tuple[StatusReader, Connection]) -> None:
    """A job becomes due, and a lease runs out, without a row being written."""
    reader, connection = rows
    await add_instance(connection)
    await add_job(connection, "soon", due_at=0.3 * SECOND)
    await add_job(connection, "run", **{**running(uuid4(), "x"), "lease_expires_at": 0.3 * SECOND})
    run, soon = (await read_status(reader))["jobs"]
    assert (run["state"], soon["waiting"]["reason"]) == ("running", "not-due")
    await asyncio.sleep(0.4)
    run, soon = (await read_status(reader))["jobs"]
    assert (run["waiting"]["reason"], soon["waiting"]["reason"]) == ("lost", "due")


async def test_a_running_job_says_where_and_for_how_long(
    rows: tuple[StatusReader, Connection],
) -> None:
    """By the database's clock; with its progress, a cancel request and a release under way."""
    reader, connection = rows
    one, other = await add_instance(connection, "app1"), await add_instance(connection, "app1")
    await add_job(connection, "plain", **running(one, "app1"))
    await add_job(
        connection,
        "rich",
        **running(other, "app1", seconds=90),
        done=4,
        total=12,
        note="users",
        cancel_requested_by="ada",
        requested_by="bob",
        paused_at=-1 * SECOND,
        paused_by="eve",
    )
    status = await read_status(reader)
    plain, rich = status["jobs"]
    for job, instance, seconds in ((plain, one, 40), (rich, other, 90)):
        assert (job["state"], job["server"], job["instanceId"]) == (
            "running",
            "app1",
            str(instance),
        )
        now, started = (datetime.fromisoformat(at) for at in (status["now"], job["startedAt"]))
        assert job["elapsedSeconds"] == pytest.approx((now - started).total_seconds(), abs=0.002)
        assert seconds <= job["elapsedSeconds"] < seconds + 30
        assert job["waiting"] is None
    assert (plain["progress"], plain["cancelRequestedBy"], plain["paused"]) == (None, None, None)
    assert rich["progress"] == {"done": 4, "total": 12, "note": "users"}
    assert (rich["cancelRequestedBy"], rich["requestedBy"], rich["paused"]["by"]) == (
        "ada",
        "bob",
        "eve",
    )
    assert {instance["id"]: instance["running"] for instance in status["instances"]} == {
        str(one): 1,
        str(other): 1,
    }


async def test_the_last_run_and_the_schedule_are_shown(
    rows: tuple[StatusReader, Connection],
) -> None:
    """The last run with its end; the schedule's description, or its text if it can't be parsed."""
    reader, connection = rows
    await add_job(connection, "new", schedule="every other Tuesday")
    await add_job(connection, "old", last_outcome="timed_out", **LAST)
    new, old = (await read_status(reader))["jobs"]
    assert new["lastRun"] is None
    assert new["schedule"] == {"text": "every other Tuesday", "words": "every other Tuesday"}
    assert old["schedule"] == {"text": "every 300 s", "words": "every 5 minutes"}
    assert old["lastRun"].pop("seconds") == pytest.approx(10, abs=1)
    assert (old["lastRun"]["outcome"], old["lastRun"]["server"]) == ("timed_out", "app9")


async def test_instances_are_listed_until_they_are_dismissed(
    rows: tuple[StatusReader, Connection],
) -> None:
    """Live for a lease, then gone, however long ago, whatever their capabilities."""
    reader, connection = rows
    await add_instance(connection, "live", seen_seconds_ago=1, missing=("x",))
    await add_instance(connection, "silent", seen_seconds_ago=20)
    await add_instance(connection, "gone", seen_seconds_ago=70)
    for _ in range(2):
        gone, live, silent = (await read_status(reader))["instances"]
        assert live.keys() == {
            *("id", "server", "startedAt", "seenSecondsAgo", "live", "running", "maxRunning"),
            *("state", "accepted", "refused", "silences", "replacesSeenAt"),
        }
        assert (gone["server"], gone["live"], gone["state"]) == ("gone", False, "gone")
        assert (live["server"], live["live"]) == ("live", True)
        assert (silent["server"], silent["live"]) == ("silent", False)
        assert 20 <= silent["seenSecondsAgo"] < 50
        assert live["startedAt"].endswith("Z")


async def test_a_heartbeat_ahead_of_the_clock_is_not_live(
    rows: tuple[StatusReader, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a dead instance has one: a live one writes the next by the clock that was set back."""
    reader, connection = rows
    await add_instance(connection, "app1", seen_seconds_ago=-30)
    await add_instance(connection, "app2", seen_seconds_ago=-3600)
    assert await states(reader) == {("app1", "live"), ("app2", "live")}  # as these tests have it
    monkeypatch.setattr(reader, "ahead", 60 * SECOND)
    assert await states(reader) == {("app1", "live"), ("app2", "gone")}
    # Which of its name was there later is not known: it is not gone while one of them is live.
    await add_instance(connection, "app2", up_seconds=10, seen_seconds_ago=-30)
    assert await states(reader) == {("app1", "live"), ("app2", "live")}
    monkeypatch.setattr(reader, "ahead", AHEAD)
    assert "live" not in {state for _, state in await states(reader)}


async def states(reader: StatusReader) -> set[tuple[str, str]]:
    instances = (await reader.read()).instances
    return {(each["server"], each["state"]) for each in instances}


async def test_a_status_without_jobs_is_complete(rows: tuple[StatusReader, Connection]) -> None:
    """On an empty database."""
    reader, _ = rows
    assert {**await read_status(reader), "now": 0} == {
        "now": 0,
        "counts": {"running": 0, "waiting": 0, "paused": 0, "overdue": 0},
        "instances": [],
        "outages": [],
        "jobs": [],
    }


async def test_incremental_reads_miss_no_change(
    rows: tuple[StatusReader, Connection], database: dict[str, str]
) -> None:
    """A reader that reads only changes returns the same as one that reads for the first time."""
    assert await _differences(*rows, database) == 0


@pytest.mark.parametrize(
    ("right", "wrong"), [("pg_snapshot_xmin", "pg_snapshot_xmax"), ("<= age($1", "< age($1")]
)
async def test_a_reader_that_reads_too_little_is_found_out(
    rows: tuple[StatusReader, Connection],
    database: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    right: str,
    wrong: str,
) -> None:
    """The control: a reader that ignores transactions open at its last read misses their writes."""
    monkeypatch.setattr(status_module, "CHANGED", replaced(status_module.CHANGED, right, wrong))
    assert await _differences(*rows, database) > 0


async def _differences(  # noqa: C901 - a small world
    reader: StatusReader, connection: Connection, database: dict[str, str]
) -> int:
    """Count reads that a fresh reader contradicts, while random writers go on.

    Writers commit, roll back and stay open across reads; rows are added, deleted, frozen, moved.
    """
    await add_instance(connection)
    for number in range(20):
        await add_job(connection, f"job-{number:02}")
    writers = [await connect(database) for _ in range(3)]
    open_transactions: dict[int, Any] = {}
    choose = random.Random(1)
    differences = 0
    try:
        for step in range(300):
            which = choose.randrange(3)
            writer = writers[which]
            match choose.randrange(8):
                case 0 | 1 | 2 | 3:
                    if which not in open_transactions and choose.random() < 0.3:
                        open_transactions[which] = writer.transaction()
                        await open_transactions[which].start()
                    taken = choose.randrange(which, 20, 3)  # no writer waits for another
                    await writer.execute(
                        "UPDATE jobs SET note = $2, attempt = attempt + 1 WHERE name = $1",
                        f"job-{taken:02}",
                        f"step {step}",
                    )
                case 4 | 5 if which in open_transactions:
                    transaction = open_transactions.pop(which)
                    await (transaction.commit if choose.random() < 0.7 else transaction.rollback)()
                case 6 if not open_transactions:
                    how = choose.choice(("FREEZE", "FULL"))
                    await connection.execute(f"VACUUM ({how}) jobs")
                case 7 if not open_transactions:
                    await connection.execute("DELETE FROM jobs WHERE name = 'extra'")
                    if choose.random() < 0.7:
                        await add_job(connection, "extra")
            if choose.random() < 0.6:
                fresh = StatusReader(reader._database, settings_for(database))
                differences += _lasting(await read_status(reader)) != _lasting(
                    await read_status(fresh)
                )
    finally:
        for writer in writers:
            writer.terminate()
    return differences


def _lasting(status: dict[str, Any]) -> object:
    """The part of a status that two consecutive reads must agree on."""
    return [{**job, "elapsedSeconds": 0} for job in status["jobs"]], status["counts"]


async def test_unchanged_rows_are_not_read_again(
    rows: tuple[StatusReader, Connection],
) -> None:
    """The second read takes one row besides the header when one job has changed."""
    reader, connection = rows
    for number in range(50):
        await add_job(connection, f"job-{number:02}")
    read = _count_rows(reader)
    await read_status(reader)
    await read_status(reader)
    await connection.execute("UPDATE jobs SET note = 'x' WHERE name = 'job-07'")
    await read_status(reader)
    assert read == [51, 1, 2]


async def test_another_server_is_read_from_the_start(rows: tuple[StatusReader, Connection]) -> None:
    """After a restore or a failover transaction ids are not comparable."""
    reader, connection = rows
    for number in range(5):
        await add_job(connection, f"job-{number}")
    await read_status(reader)
    reader._booted_at = datetime.fromisoformat("2020-01-01T00:00:00Z")
    read = _count_rows(reader)
    await read_status(reader)
    await read_status(reader)
    assert read == [6, 1]


def _count_rows(reader: StatusReader) -> list[int]:
    """Count the rows of each statement that a reader runs from now on."""
    counted: list[int] = []
    run = reader._database.run

    async def count(operation: Read, *, priority: bool = False) -> Rows:
        rows = await run(operation, priority=priority)
        counted.append(len(rows))
        return rows

    reader._database.run = count  # type: ignore[assignment,method-assign]
    return counted


async def test_concurrent_callers_share_a_read(rows: tuple[StatusReader, Connection]) -> None:
    """One read is under way, one more serves all later callers, even if its caller is cancelled."""
    reader, connection = rows
    await add_job(connection, "a-job")
    read = _count_rows(reader)
    first = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    others = [asyncio.create_task(reader.read()) for _ in range(50)]
    await asyncio.gather(first, *others)
    assert len(read) == 2
    leader = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    others = [asyncio.create_task(reader.read()) for _ in range(5)]
    leader.cancel()
    assert len({(await other).text for other in others}) == 1


async def test_a_read_is_never_older_than_the_call(
    rows: tuple[StatusReader, Connection],
) -> None:
    """A caller during a read gets the result of the next one."""
    reader, connection = rows
    await add_job(connection, "a-job", attempt=0)
    sent, go_on = asyncio.Event(), asyncio.Event()
    run = reader._database.run

    async def slow(operation: Read, *, priority: bool = False) -> Rows:
        result = await run(operation, priority=priority)
        sent.set()
        await go_on.wait()
        return result

    reader._database.run = slow  # type: ignore[assignment,method-assign]
    early = asyncio.create_task(read_status(reader))
    await sent.wait()
    await connection.execute("UPDATE jobs SET attempt = 5")
    late = asyncio.create_task(read_status(reader))
    await asyncio.sleep(0)
    go_on.set()
    assert (await early)["jobs"][0]["attempt"] == 0
    assert (await late)["jobs"][0]["attempt"] == 5


async def test_a_cancelled_read_has_no_effect_on_the_next(
    rows: tuple[StatusReader, Connection],
) -> None:
    """After a cancellation at any step, the next read is complete."""
    reader, connection = rows
    await add_instance(connection)
    for number in range(600):
        await add_job(connection, f"job-{number:03}")
    for steps in range(12):
        await connection.execute("UPDATE jobs SET attempt = $1", steps)
        given_up = asyncio.create_task(reader.read())
        for _ in range(steps * 3):
            await asyncio.sleep(0)
            if steps % 2:
                await asyncio.sleep(0.002)
        given_up.cancel()
        with suppress(asyncio.CancelledError):
            await given_up
        jobs = (await read_status(reader))["jobs"]
        assert [job["attempt"] for job in jobs] == [steps] * 600
        assert [job["name"] for job in jobs] == sorted(job["name"] for job in jobs)


async def test_an_outage_is_reported_to_all_callers(database: dict[str, str]) -> None:
    """A failed read is not the answer of a later caller."""
    async with migrated(database) as (served, connection):
        reader = StatusReader(served, settings_for(database))
        await add_job(connection, "a-job")
        served._outage = Cause(Kind.NO_ANSWER, "no")
        for result in await asyncio.gather(
            *(reader.read() for _ in range(5)), return_exceptions=True
        ):
            assert isinstance(result, DatabaseUnavailable)
        served._outage = None
        assert len((await read_status(reader))["jobs"]) == 1


async def test_what_jobs_say_is_json(rows: tuple[StatusReader, Connection]) -> None:
    """Quotes, line ends and any letters are unchanged."""
    reader, connection = rows
    text = 'a "quote", a \\, a\nline, \x1b[31m, ümlaut, 🙂'
    await add_job(connection, "a-job", description=text, last_outcome="failed", **LAST)
    (job,) = (await read_status(reader))["jobs"]
    assert job["description"] == text
