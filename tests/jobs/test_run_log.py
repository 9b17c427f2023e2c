"""What a run says is kept with it, bounded and without secrets, and costs it nothing."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from balance_app.db.pool import Database, write
from balance_app.jobs import repository
from balance_app.jobs.heartbeat import HeartbeatThread
from balance_app.jobs.job import Job, job
from balance_app.jobs.leases import Lease
from balance_app.jobs.repository import Completion, JobRepository
from balance_app.jobs.run import Run
from balance_app.jobs.run_log import (
    LINE_BYTES,
    MOST_BYTES,
    MOST_LINES,
    WRITE_LOGS,
    Line,
    RunLog,
    Unwritten,
    log_arguments,
)
from balance_app.jobs.threads import ThreadRun
from balance_app.masks import mask_of
from balance_app.settings import load_settings
from tests.jobs.fleet import read_event_logs
from tests.jobs.jobs_db import JobsDatabase as Fleet
from tests.jobs.jobs_db import end
from tests.jobs.jobs_db import jobs_db as fleet_on
from tests.jobs.support import LEASE, Connection, JobsDatabase, on, until
from tests.mutants import replaced
from tests.processes import http_client, running

LEASE_SECONDS = 1.5
LINES_OF = "SELECT number, level, text FROM job_run_lines WHERE job = $1 ORDER BY fence, number"
TRACEBACKS_OF = "SELECT text FROM job_run_tracebacks WHERE job = $1"


@pytest.fixture(scope="module")
async def shared(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres, job_lease_seconds=LEASE_SECONDS, job_heartbeat_seconds=0.4) as jobs_db:
        yield jobs_db


@pytest.fixture
async def jobs_db(shared: JobsDatabase) -> JobsDatabase:
    """The same, without a job."""
    await shared.forget()
    return shared


def declared(function: Callable[[Any], Any]) -> Job:
    return job(name="talks", every=timedelta(hours=1), min_duration=timedelta(milliseconds=1))(
        function
    )


async def lines(jobs_db: JobsDatabase) -> list[tuple[int, str, str]]:
    return [tuple(row) for row in await jobs_db.admin.fetch(LINES_OF, "talks")]


async def traceback(jobs_db: JobsDatabase) -> str | None:
    text: str | None = await jobs_db.admin.fetchval(TRACEBACKS_OF, "talks")
    return text


async def run_to_its_end(jobs_db: JobsDatabase, function: Callable[[Any], Any]) -> str | None:
    """Run a function as a job; return the outcome."""
    async with jobs_db.scheduler([declared(function)]):
        (run,) = await jobs_db.ended("talks")
    outcome: str | None = run["outcome"]
    return outcome


# -- what is kept ------------------------------------------------------------------------------


async def test_what_an_async_run_says(jobs_db: JobsDatabase) -> None:
    """Level, text and values of each line, errors with their tracebacks; no line of the engine."""

    async def talks(run: Run) -> None:
        run.log.debug("is not kept")
        run.log.info("sent", mails=3, to="a b", empty="", job="other")
        run.log.bind(user=7).warning("odd %s", "name")
        await run.log.ainfo("from a thread")
        try:
            raise OSError("no disk")  # noqa: TRY301 - what a job may do
        except OSError:
            run.log.exception("not stored")
        run.log.info("100 %s", 1, 2)  # noqa: PLE1205 - the same
        run.log.info("two\nlines")

    assert await run_to_its_end(jobs_db, talks) == "succeeded"
    said = await lines(jobs_db)
    assert [(level, text.split("\n")[0]) for _, level, text in said] == [
        ("info", "sent mails=3 to='a b' empty='' job=other"),
        ("warning", "odd name user=7"),
        ("info", "from a thread"),
        ("error", "not stored"),
        ("info", "100 %s (1, 2)"),
        ("info", "two"),
    ]
    assert [number for number, _, _ in said] == [1, 2, 3, 4, 5, 6]
    assert said[3][2].endswith("OSError: no disk")
    assert "Traceback (most recent call last)" in said[3][2]
    assert await traceback(jobs_db) is None


async def test_what_a_thread_says(jobs_db: JobsDatabase) -> None:
    """Of the run's own thread, and of others that it starts; no line is lost or doubled."""

    def talks(run: ThreadRun) -> None:
        def count(name: str) -> None:
            for number in range(40):
                run.log.info("counts", of=name, number=number)

        threads = [threading.Thread(target=count, args=(f"t{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise ValueError("enough")

    assert await run_to_its_end(jobs_db, talks) == "failed"
    said = await lines(jobs_db)
    assert [number for number, _, _ in said] == list(range(1, 161))
    for name in ("t0", "t3"):
        own = [text for _, _, text in said if f"of={name} " in text]
        assert own == [f"counts of={name} number={number}" for number in range(40)]
    text = await traceback(jobs_db)
    assert text is not None
    assert text.startswith("Traceback (most recent call last)")
    assert "in talks" in text
    assert text.endswith("ValueError: enough")


async def test_a_failure_of_a_run_that_was_stopped_has_its_traceback(jobs_db: JobsDatabase) -> None:
    """What it says while it stops is kept, too."""
    begun = asyncio.Event()

    async def talks(run: Run) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            run.log.info("tidies up")
            raise KeyError("lost and found")

    async with jobs_db.scheduler([declared(talks)]):
        await begun.wait()
    (run,) = await jobs_db.runs("talks")
    assert run["outcome"] == "released"
    assert await lines(jobs_db) == [(1, "info", "tidies up")]
    assert (await traceback(jobs_db) or "").endswith("KeyError: 'lost and found'")


async def test_the_last_lines_of_ten_thousand(jobs_db: JobsDatabase) -> None:
    """Some were written by heartbeats and are dropped again; the numbers tell how many."""

    async def talks(run: Run) -> None:
        for number in range(1, 10_001):
            run.log.info("line", n=number)
            if number % 1000 == 0:
                await asyncio.sleep(0.15)

    assert await run_to_its_end(jobs_db, talks) == "succeeded"
    assert await lines(jobs_db) == [
        (number, "info", f"line n={number}") for number in range(9801, 10_001)
    ]


async def test_long_lines(jobs_db: JobsDatabase) -> None:
    """A line of a megabyte is cut in its middle; of many long ones there are 64 KiB."""

    async def one(run: Run) -> None:
        run.log.info("begin%send", "ä" * 2**19)

    assert await run_to_its_end(jobs_db, one) == "succeeded"
    ((_, _, text),) = await lines(jobs_db)
    assert LINE_BYTES - 100 < len(text.encode()) <= LINE_BYTES
    assert (text[:5], text[-3:]) == ("begin", "end")
    assert f"[{2**20 + 8 - 2 * ((LINE_BYTES - 50) // 2)} bytes]" in text

    async def many(run: Run) -> None:
        for number in range(100):
            run.log.info("x" * 5000, number=number)

    await jobs_db.forget()
    assert await run_to_its_end(jobs_db, many) == "succeeded"
    said = await lines(jobs_db)
    assert said[-1][0] == 100
    assert MOST_BYTES - LINE_BYTES < sum(len(text) for _, _, text in said) <= MOST_BYTES


class Odd:
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a\0b", "ab"),
        ("a\ud800b", "a?b"),
        ("\udcff", "?"),
        ("", ""),
        (None, ""),
        (Odd(), "a Odd without a text (RuntimeError)"),
        ({"a": [1]}, "{'a': [1]}"),
        (b"\xff", "b'\\xff'"),
    ],
)
async def test_odd_texts_are_kept_as_far_as_they_can_be(
    jobs_db: JobsDatabase, said: object, kept: str
) -> None:
    """Also as a value; and with them all that was said before and after."""

    async def talks(run: Run) -> None:
        run.log.info("before")
        run.log.info(cast("str", said))
        run.log.info("after", value=said)

    assert await run_to_its_end(jobs_db, talks) == "succeeded"
    before, odd, after = await lines(jobs_db)
    assert (before[2], odd[2]) == ("before", kept)
    assert after[2].startswith("after value=")


# -- secrets -----------------------------------------------------------------------------------

PASSWORD = "it's/a\\p@ß \"word"  # noqa: S105 - it is to be masked
URL = "postgresql://me:S%3Ac%2Fr%40t@db.example/app?sslpassword=k%C3%A4y"


async def test_secrets_are_masked(jobs_db: JobsDatabase) -> None:
    """In lines, values, tracebacks, errors, results and notes, however they are written there."""
    settings = load_settings(db_password=PASSWORD, database_url=URL)
    secret = [PASSWORD, URL, "S%3Ac%2Fr%40t", "S:c/r@t", "k%C3%A4y", "käy"]
    noted = asyncio.Event()

    async def fails(run: Run) -> None:
        for each in secret:
            run.log.info("connects with %s", each, password=each, all={"password": each})
        run.progress(1, 2, f"with {PASSWORD}")
        await noted.wait()
        raise ValueError("x" * 1890 + f" {PASSWORD}")  # where the text of an error is cut

    async with jobs_db.scheduler([declared(fails)], starts=False) as scheduler:
        scheduler._mask = mask_of(settings)
        scheduler.start()

        async def note() -> str | None:
            text: str | None = await jobs_db.admin.fetchval("SELECT note FROM jobs")
            return text

        assert await until(note) == "with ***"
        noted.set()
        (run,) = await jobs_db.ended("talks")
    said = await lines(jobs_db)
    assert [text for _, _, text in said] == [
        "connects with *** password=*** all=\"{'password': '***'}\""
    ] * 5 + ["connects with *** password=*** all=\"{'password': '***'}\""]
    assert run["result"] == f"ValueError: {'x' * 1890} ***"
    text = await traceback(jobs_db)
    assert text is not None
    assert text.endswith(" ***")
    assert not any(each in text for each in secret)

    async def succeeds(_run: Run) -> str:
        await asyncio.sleep(0)
        return f"connected with {URL}"

    await jobs_db.forget()
    async with jobs_db.scheduler([declared(succeeds)], starts=False) as scheduler:
        scheduler._mask = mask_of(settings)
        scheduler.start()
        (run,) = await jobs_db.ended("talks")
    assert run["result"] == "connected with ***"


def test_without_secrets_nothing_is_masked() -> None:
    """An empty password is none."""
    settings = load_settings(db_password="", database_url="postgresql://me:@db.example/app")
    assert mask_of(settings)("abc") == "abc"
    assert mask_of(settings)("postgresql://me:@db.example/app") == "***"


# -- the buffer --------------------------------------------------------------------------------


def test_what_was_written_is_not_written_again() -> None:
    """But what is said meanwhile is; the first line to keep is that of the buffer."""
    log = RunLog("a", 1)
    assert log.unwritten() is None
    for number in range(3):
        log.log.info("line", n=number)
    first = log.unwritten()
    assert first is not None
    log.log.info("meanwhile")
    log.written(first)
    second = log.unwritten()
    assert second is not None
    assert [line.text for line in second.lines] == ["meanwhile"]
    for _ in range(MOST_LINES):
        log.log.info("more")
    third = log.unwritten()
    assert third is not None
    assert (third.first, len(third.lines)) == (5, MOST_LINES)
    log.fail(ValueError("x"))
    log.written(third)
    last = log.unwritten()
    assert last is not None
    assert (last.lines, last.traceback) == ([], "ValueError: x")
    log.written(last)
    assert log.unwritten() is None


# -- whose it is -------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["guarded", "control"])
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        anybody = replaced(WRITE_LOGS, "WHERE holder = $1", "WHERE $1::uuid IS NOT NULL")
        monkeypatch.setattr(repository, "WRITE_LOGS", anybody)
    return bool(request.param)


async def test_a_run_that_lost_its_job_says_nothing_more(
    jobs_db: JobsDatabase,
    guarded: bool,  # noqa: FBT001 - a fixture
) -> None:
    """As with its completion: no line of it is written once the job is free, or another's."""
    one, other = jobs_db.instance("app1"), jobs_db.instance("app2")
    await one.declare("talks")
    await other.declare("talks")
    await jobs_db.ready("talks")
    claimed = await one.claim()
    run = one.run(claimed)
    run.log.info("mine")
    said = run.kept_log.unwritten()
    assert said is not None
    await one.jobs.write_log("talks", claimed.fence, said, seconds=9)
    await one.jobs.write_log("talks", claimed.fence, said, seconds=9)  # twice is once
    assert await lines(jobs_db) == [(1, "info", "mine")]
    run.kept_log.written(said)
    run.log.info("late")
    late = run.kept_log.unwritten()
    assert late is not None
    await jobs_db.admin.execute(
        "UPDATE jobs SET holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL"
    )
    await one.jobs.write_log("talks", claimed.fence, late, seconds=9)
    assert [text for _, _, text in await lines(jobs_db)] == (
        ["mine"] if guarded else ["mine", "late"]
    )
    await jobs_db.ready("talks")
    taken = await other.claim()
    await one.jobs.write_log("talks", claimed.fence, late, seconds=9)
    assert len(await lines(jobs_db)) == (1 if guarded else 2)
    assert await other.jobs.finish(
        "talks", taken.fence, Completion(outcome="failed", result=None, seconds_ago=0)
    )


# -- it costs nothing --------------------------------------------------------------------------


async def unbounded(self: HeartbeatThread, connection: Connection, leases: list[Lease]) -> None:
    """Write logs as if a lease depended on them."""
    logs = {(each.name, each.fence): each.log for each in leases if each.log is not None}
    said = {run: what for run, log in logs.items() if (what := log.unwritten()) is not None}
    if said:
        await connection.fetch(WRITE_LOGS, *log_arguments(self._me.id, said))


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "control"])
async def test_a_log_that_cant_be_written_costs_no_lease(
    jobs_db: JobsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    bounded: bool,  # noqa: FBT001 - a parameter
) -> None:
    """The table is locked for longer than a lease: the run goes on, its log is written later."""
    if not bounded:
        monkeypatch.setattr(HeartbeatThread, "_write_logs", unbounded)
    monkeypatch.setattr("balance_app.jobs.heartbeat.LOGS_PAUSE_SECONDS", 0.5)
    told = asyncio.Event()

    async def talks(run: Run) -> str:
        number = 0
        while not told.is_set():
            number += 1
            run.log.info("line", n=number)
            await asyncio.sleep(0.02)
        return "to its end"

    other = await jobs_db.connect()
    async with jobs_db.scheduler([declared(talks)]):
        await until(lambda: lines(jobs_db))
        async with other.transaction():
            await other.execute("LOCK TABLE job_run_lines IN ACCESS EXCLUSIVE MODE")
            before = await jobs_db.admin.fetchval("SELECT clock_timestamp()")

            async def lasted() -> bool:
                row = await jobs_db.row("talks")
                kept = row["last_heartbeat_at"] - before > timedelta(seconds=2 * LEASE_SECONDS)
                return kept or row["last_outcome"] is not None or row["fence"] > 1

            await until(lasted)
        known = len(await lines(jobs_db))
        told.set()
        runs = await jobs_db.ended("talks")
        kept = await lines(jobs_db)
    if bounded:
        assert [(run["outcome"], run["result"]) for run in runs] == [("succeeded", "to its end")]
        assert kept[-1][0] > known
        assert [number for number, _, _ in kept] == list(range(kept[0][0], kept[-1][0] + 1))
    else:
        assert runs[0]["outcome"] == "released"


async def test_a_completion_does_not_wait_for_a_log_for_long(jobs_db: JobsDatabase) -> None:
    """The table stays locked: the run is recorded all the same, without its last lines."""
    begun, told = asyncio.Event(), asyncio.Event()

    async def talks(run: Run) -> str:
        begun.set()
        await told.wait()
        run.log.info("unheard")
        return "done"

    other = await jobs_db.connect()
    async with jobs_db.scheduler([declared(talks)]):
        await begun.wait()
        async with other.transaction():
            await other.execute("LOCK TABLE job_run_lines IN ACCESS EXCLUSIVE MODE")
            told.set()
            (run,) = await jobs_db.ended("talks")
    assert (run["outcome"], run["result"]) == ("succeeded", "done")


async def unlimited(
    self: JobRepository,
    name: str,
    fence: int,
    what: Unwritten,
    *,
    seconds: float,
) -> None:
    """Write a log for as long as it takes, whoever waits for it."""
    arguments = log_arguments(self.me.id, {(name, fence): what})
    async with asyncio.timeout(seconds):
        await self._database.run(lambda con: write(con, WRITE_LOGS, *arguments), priority=True)


@pytest.mark.parametrize("limited", [True, False], ids=["limited", "control"])
async def test_a_stop_hands_back_although_logs_cant_be_written(
    jobs_db: JobsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    limited: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Of more runs than there are connections, each within the time that a stop has.

    Control: writes that wait for the table keep the connections that the completions need.
    """
    if not limited:
        monkeypatch.setattr(JobRepository, "write_log", unlimited)
    begun: set[str] = set()

    async def talks(run: Run) -> None:
        begun.add(run.name)
        try:
            await asyncio.sleep(60)
        finally:
            run.log.info("unheard")

    jobs = [
        job(name=f"talks-{n}", every=timedelta(hours=1), min_duration=timedelta(milliseconds=1))(
            talks
        )
        for n in range(8)
    ]

    async def all_begun() -> bool:
        await asyncio.sleep(0)
        return len(begun) == len(jobs)

    other = await jobs_db.connect()
    async with jobs_db.scheduler(jobs) as scheduler:
        await until(all_begun)
        async with other.transaction():
            await other.execute("LOCK TABLE job_run_lines IN ACCESS EXCLUSIVE MODE")
            await scheduler.stop()
            found = await jobs_db.admin.fetch("SELECT outcome FROM job_runs")
    ended = [run["outcome"] for run in found].count("released")
    assert (ended == len(jobs)) is limited


OPEN = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
"""


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "control"])
async def test_a_log_that_was_cut_off_leaves_no_transaction_open(
    jobs_db: JobsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    ended: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Its time is up when it is prepared, and not executed yet."""
    if not ended:

        async def leave_open(_connection: object) -> None:
            """Leave the connection as it is."""

        monkeypatch.setattr("balance_app.jobs.repository.end_implicit_transaction", leave_open)
    prepare: Any = vars(asyncpg.Connection)["_get_statement"]

    async def prepare_slowly(*arguments: object, **named: object) -> object:
        prepared = await prepare(*arguments, **named)
        await asyncio.sleep(0.3)
        return prepared

    database = Database(jobs_db.settings)
    await database.start()
    jobs = JobRepository(database, jobs_db.instance().me, LEASE)
    unwritten = Unwritten(1, [Line(1, datetime.now(UTC), "info", "unheard")], None)
    with monkeypatch.context() as slow:
        slow.setattr(asyncpg.Connection, "_get_statement", prepare_slowly)
        with suppress(TimeoutError):
            await jobs.write_log("talks", 1, unwritten, seconds=0.1)
    await asyncio.sleep(0.1)
    left_open = await jobs_db.admin.fetchval(OPEN)
    await database.stop()
    assert (left_open == 0) is ended


# -- killed ------------------------------------------------------------------------------------

LINES = "SELECT number, text FROM job_run_lines WHERE fence = 1 ORDER BY number"
LAST = "SELECT coalesce(max(number), 0) FROM job_run_lines"


@pytest.fixture
async def fleet(postgres: dict[str, str], tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet_on(postgres, tmp_path) as fleet:
        yield fleet


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"], indirect=False)
async def test_the_log_of_a_killed_run_is_there_up_to_its_last_heartbeat(
    fleet: Fleet,
    guarded: bool,  # noqa: FBT001 - a parameter
) -> None:
    """SIGKILL: another instance shows it. Control: with lines written at the end alone, none is."""
    environment = {
        "FLEET_JOBS": "1",
        "FLEET_SECONDS": "600",
        "JOB_WARM_UP_SECONDS": "0.1",
        "JOB_LEASE_SECONDS": "3",
        "JOB_HEARTBEAT_SECONDS": "0.5",
    }
    if not guarded:
        environment["FLEET_MUTANTS"] = "log"
    instances = fleet.instances(2, environment)
    async with running(instances):
        await fleet.until(1)
        if guarded:
            await fleet.until_fact(f"SELECT FROM ({LAST}) AS said (last) WHERE last > 30")
        else:
            await fleet.until_fact(
                "SELECT FROM jobs WHERE last_heartbeat_at > started_at + interval '2 s'"
            )
        server = await fleet.value("SELECT server FROM jobs")
        (held,) = (each for each in instances if each.name == server)
        (survivor,) = (each for each in instances if each.name != server)
        written = await fleet.value(LAST)
        await end([held], signal.SIGKILL)
        await fleet.until_fact("SELECT FROM job_runs WHERE fence = 1 AND outcome = 'lost'")
        first = read_event_logs(fleet.event_logs)[0]
        said = [line["step"] for line in first.lines if line["what"] == "tick"]
        kept = await fleet.rows(LINES)
        run = await fleet.value("SELECT id FROM job_runs WHERE fence = 1")
        async with http_client(survivor.url) as client:
            answer = (await client.get(f"/api/cron/runs/{run}/log")).json()
    assert answer["run"]["outcome"] == "lost"
    assert answer["traceback"] is None
    if not guarded:
        assert len(said) > 30
        assert kept == answer["lines"] == []
        return
    assert written <= len(kept) <= len(said)
    assert [(line["number"], line["text"]) for line in answer["lines"]] == kept[-MOST_LINES:]
    assert kept == [(step + 1, f"ticks step={step}") for step in said[: len(kept)]]
    print(f"killed after {len(said)} lines; {len(kept)} of them were kept")
