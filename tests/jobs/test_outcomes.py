"""How runs with unusual functions end; what a run only displays can't fail it."""

import asyncio
import functools
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.job import Job, job
from balance_app.jobs.run import Run
from balance_app.jobs.run_log import describe
from balance_app.jobs.threads import ThreadRun
from balance_app.jobs.transaction import LeaseLostError
from balance_app.logs import configure_logs
from balance_app.settings import load_settings
from tests.jobs.support import HAS_TRANSACTION_TIMEOUT, JobsDatabase, on


@pytest.fixture(scope="module")
async def jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    """A database whose job transactions may be idle for 1.5 s and last for 4.5 s."""
    async with on(
        postgres, job_lease_seconds=1.5, job_heartbeat_seconds=0.4, job_connections=12
    ) as jobs_db:
        yield jobs_db


@pytest.fixture
async def patient_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    """A database whose leases outlast what keeps a busy machine's CPU for seconds."""
    async with on(postgres, job_lease_seconds=30) as jobs_db:
        yield jobs_db


async def outcomes(
    jobs_db: JobsDatabase, functions: dict[str, Callable[[Any], Any]]
) -> dict[str, tuple[str | None, str | None]]:
    """Run each function once; return how the runs ended."""
    await jobs_db.forget()
    jobs: list[Job] = [
        job(name=name, every=timedelta(hours=1), min_duration=timedelta(milliseconds=1))(function)
        for name, function in functions.items()
    ]
    async with jobs_db.scheduler(jobs):
        for name in functions:
            await jobs_db.ended(name)
        return {name: (await jobs_db.outcomes(name))[0] for name in functions}


def statements(*sql: str) -> Callable[[Run], Any]:
    async def function(run: Run) -> None:
        async with run.transaction() as connection:
            for each in sql:
                await connection.execute(each)

    return function


async def test_a_long_wait_for_a_connection_fails_no_run(postgres: dict[str, str]) -> None:
    """The end of a run is recorded late; one whose checkpoint could not wait is released."""
    running = asyncio.Semaphore(0)
    go, held, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def ends(_run: Run) -> None:
        running.release()
        await go.wait()

    async def notes(run: Run) -> None:
        await ends(run)
        await run.checkpoint({"done": 1})

    async def hold(_connection: object) -> None:
        held.set()
        await leave.wait()

    jobs = [job(name=each.__name__, every=timedelta(hours=1))(each) for each in (ends, notes)]
    async with (
        on(postgres, db_pool_size=1, max_waiting_seconds=0.2) as jobs_db,
        jobs_db.scheduler(jobs),
    ):
        for _ in jobs:
            await asyncio.wait_for(running.acquire(), 30)
        holder = asyncio.create_task(jobs_db.database.run(hold))
        await held.wait()
        go.set()
        await asyncio.sleep(0.5)
        leave.set()
        await holder
        await jobs_db.ended("ends")
        await jobs_db.ended("notes", runs=2)
        assert await jobs_db.outcomes("ends") == [("succeeded", None)]
        (released, succeeded) = await jobs_db.outcomes("notes")
    assert released[0] == "released"
    assert "no database connection was free in time" in str(released[1])
    assert succeeded == ("succeeded", None)


async def test_a_limit_of_the_server_is_the_jobs_failure(jobs_db: JobsDatabase) -> None:
    """The result names the limit; only a connection that was really lost is an outage."""

    async def idle(run: Run) -> None:
        async with run.transaction():
            await asyncio.sleep(2)

    async def blocks(run: Run) -> None:
        async with run.transaction() as connection:
            time.sleep(2)  # noqa: ASYNC251 - a job may block
            await connection.execute("SELECT 1")

    def thread(run: ThreadRun) -> None:
        with run.transaction():
            time.sleep(2)

    async def catches(run: Run) -> None:
        async with run.transaction() as connection:
            try:
                await connection.execute("SELECT pg_sleep(9)")
            except asyncpg.PostgresError:
                return

    async def locked(run: Run) -> None:
        other = await jobs_db.connect()
        await other.execute("SELECT pg_advisory_lock(7)")
        async with run.transaction() as connection:
            await connection.execute("SET LOCAL lock_timeout = '50ms'")
            await connection.execute("SELECT pg_advisory_xact_lock(7)")

    late = await outcomes(
        jobs_db,
        {
            "idle": idle,
            "thread": thread,
            "long": statements("SELECT pg_sleep(9)"),
            "catches": catches,
            "statement": statements("SET LOCAL statement_timeout = '50ms'", "SELECT pg_sleep(1)"),
            "locked": locked,
            "killed": statements("SELECT pg_terminate_backend(pg_backend_pid())"),
        },
    )
    late |= await outcomes(jobs_db, {"blocks": blocks})  # alone: it blocks the event loop
    results = {name: f"{outcome}: {result}" for name, (outcome, result) in late.items()}
    limit = "failed: TransactionLimitError: The server ended a transaction: "
    assert results["idle"] == f"{limit}it was idle for longer than 1.5 s."
    assert results["blocks"].startswith(f"{limit}it was idle for longer than 1.5 s")
    assert results["thread"] == f"{limit}it was idle for longer than 1.5 s."
    if jobs_db.admin.get_server_version().major >= HAS_TRANSACTION_TIMEOUT:
        assert results["long"] == f"{limit}it lasted for longer than 4.5 s (SQLSTATE 25P04)."
        assert results["catches"].startswith(f"{limit}it lasted for longer than 4.5 s")
    else:
        assert {late["long"][0], late["catches"][0]} == {"succeeded"}
    assert results["statement"].startswith("failed: QueryCanceledError: canceling statement due to")
    assert results["locked"].startswith("failed: LockNotAvailableError")
    assert late["killed"][0] == "released"


FAILS_AT_COMMIT = """
CREATE TEMP TABLE late (x int) ON COMMIT DROP;
CREATE FUNCTION pg_temp.conflict() RETURNS trigger LANGUAGE plpgsql
AS $$BEGIN RAISE 'conflict at commit' USING ERRCODE = '40001'; END$$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION pg_temp.conflict();
INSERT INTO late VALUES (1)
"""


async def test_a_conflict_of_transactions_is_the_jobs_failure(jobs_db: JobsDatabase) -> None:
    """A deadlock or a serialization failure names its cause; it is no outage and no release."""
    owner = await jobs_db.connect()
    await owner.execute(f"GRANT TEMPORARY ON DATABASE {jobs_db.variables['DB_NAME']} TO PUBLIC")

    async def deadlock(run: Run) -> None:
        other = await jobs_db.connect()
        await other.execute("SELECT pg_advisory_lock(8)")

        async def close_the_circle() -> None:
            await asyncio.sleep(0.3)  # the first to wait checks for a deadlock first, and is ended
            await other.execute("SELECT pg_advisory_lock(9)")

        async with run.transaction() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock(9)")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(close_the_circle())
                try:
                    await connection.execute("SELECT pg_advisory_xact_lock(8)")
                except asyncpg.PostgresError:
                    await connection.execute("ROLLBACK")  # or the other would wait for ever
                    raise

    ends = await outcomes(
        jobs_db,
        {
            "deadlock": deadlock,
            "statement": statements("DO $$BEGIN RAISE SQLSTATE '40001'; END$$"),
            "commit": statements(FAILS_AT_COMMIT),
        },
    )
    for name, cause in {
        "deadlock": "DeadlockDetectedError: deadlock detected",
        "statement": "SerializationError: ",
        "commit": "SerializationError: conflict at commit",
    }.items():
        outcome, result = ends[name]
        assert outcome == "failed", ends
        assert cause in str(result), ends
        assert len(await jobs_db.outcomes(name)) == 1
        assert (await jobs_db.row(name))["releases"] == 0


async def body(run: Run) -> str:
    """Use everything that a run offers, as an ordinary async job does."""
    run.progress(1, 2)
    await run.checkpoint({"a": 1})
    async with run.transaction() as connection:
        await connection.execute("SELECT 1")
    await run.pace()
    return "the body ran"


class Callee:
    async def __call__(self, run: Run) -> str:
        return await body(run)


def plain_wrapper(run: Run) -> Any:  # noqa: ANN401 - a coroutine
    return body(run)


@functools.wraps(body)
def wrapper(run: Run) -> Any:  # noqa: ANN401 - a coroutine
    return body(run)


async def returns_coroutine(run: Run) -> Any:  # noqa: ANN401 - a coroutine
    return body(run)


async def returns_task(run: Run) -> Any:  # noqa: ANN401 - a task
    return asyncio.ensure_future(body(run))


async def test_an_awaitable_result_is_awaited(jobs_db: JobsDatabase) -> None:
    """However a coroutine function is wrapped, its body runs; a generator's does not, and fails."""

    async def asynchronous(_run: Run) -> AsyncIterator[int]:
        yield 1

    def generator(_run: Run) -> Iterator[int]:
        yield 1

    async def fails(_run: Run) -> None:
        raise ValueError("in the body")

    ends = await outcomes(
        jobs_db,
        {
            "lambda": lambda run: body(run),  # noqa: PLW0108 - it is what is tried
            "plain-wrapper": plain_wrapper,
            "wrapper": wrapper,
            "partial": functools.partial(body),
            "partial-callee": functools.partial(Callee()),
            "callee": Callee(),
            "returns-coroutine": returns_coroutine,
            "returns-task": returns_task,
            "fails": lambda run: fails(run),  # noqa: PLW0108
            "generator": lambda run: generator(run),  # noqa: PLW0108
            "asynchronous": lambda run: asynchronous(run),  # noqa: PLW0108
        },
    )
    assert ends.pop("fails") == ("failed", "ValueError: in the body")
    for name in ("generator", "asynchronous"):
        outcome, result = ends.pop(name)
        assert outcome == "failed"
        assert "its body never ran" in str(result)
    assert set(ends.values()) == {("succeeded", "the body ran")}


async def test_a_returned_awaitable_is_stopped_like_an_async_job(
    jobs_db: JobsDatabase,
) -> None:
    """It is cancelled, and has timed out even if it swallows the cancellation."""

    async def swallows(_run: Run) -> str:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            return "swallowed"
        raise AssertionError

    await jobs_db.forget()
    late = job(
        name="late",
        every=timedelta(hours=1),
        min_duration=timedelta(milliseconds=1),
        timeout=timedelta(seconds=0.3),
    )(lambda run: swallows(run))  # noqa: PLW0108
    async with jobs_db.scheduler([late]):
        await jobs_db.ended("late")
    assert await jobs_db.outcomes("late") == [
        ("timed_out", "it took longer than its timeout of 0.3 s")
    ]


class Odd:
    """Raises at every operation."""

    def __raise(self, *_: object) -> Any:  # noqa: ANN401 - nothing
        raise ValueError("odd")

    __str__ = __repr__ = __int__ = __float__ = __lt__ = __gt__ = __eq__ = __ne__ = __raise
    __hash__ = None  # type: ignore[assignment]


class OddText(str):
    __slots__ = ()

    def __getitem__(self, _key: object) -> str:
        raise ValueError("odd")


ODD: list[Any] = [
    *(float("nan"), float("inf"), -float("inf"), -1, 2**200, 10**5000, True, 1.5),
    *(Decimal("NaN"), Decimal("sNaN"), Decimal("1e999999"), Decimal(3), 1 + 2j),
    *("5", "", None, b"x", [], {}, Odd(), object(), OddText("x")),
]


async def test_invalid_progress_fails_no_run(patient_db: JobsDatabase) -> None:
    """Whatever progress a run reports, it goes on, and so do its heartbeats."""
    notes: list[Any] = [*ODD, "x" * 30_000_000, "\0\ud800", ["a", "list"]]

    async def shows(run: Run) -> str:
        for odd in ODD:
            run.progress(odd, 10)
            await run.pace()
            run.progress(1, odd)
            await run.pace()
            run.progress(odd, odd, "note")
            await asyncio.sleep(0.02)
        for note in notes:
            run.progress(1, 2, note)
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        return "went on"

    def shows_in_thread(run: ThreadRun) -> str:
        for odd in ODD:
            run.progress(odd, odd, odd)
            run.pace()
        time.sleep(0.5)
        return "went on"

    ends = await outcomes(patient_db, {"shows": shows, "thread": shows_in_thread})
    assert set(ends.values()) == {("succeeded", "went on")}


async def test_the_result_names_errors_in_groups_and_causes(patient_db: JobsDatabase) -> None:
    """The result contains the errors of groups, and causes; outages are still outages."""

    def from_cause() -> Exception:
        error = KeyError("outer")
        error.__cause__ = ValueError("inner")
        return error

    async def group(_run: Run) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(raises(ZeroDivisionError("in the task")))
            await asyncio.sleep(1)

    async def raises(error: BaseException) -> None:
        raise error

    nested = ExceptionGroup("a", [ValueError("b"), ExceptionGroup("c", [from_cause()])])
    circle = ValueError("round")
    circle.__cause__ = RuntimeError("and")
    circle.__cause__.__cause__ = circle
    unavailable = DatabaseUnavailable("It is unavailable.", applied="no")
    ends = await outcomes(
        patient_db,
        {
            "group": group,
            "nested": lambda _run: raises(nested),
            "circle": lambda _run: raises(circle),
            "many": lambda _run: raises(ExceptionGroup("m", [ValueError("x" * 10**6)] * 9999)),
            "unavailable": lambda _run: raises(
                ExceptionGroup("o", [unavailable, LeaseLostError("lost")])
            ),
            "not-only": lambda _run: raises(ExceptionGroup("o", [unavailable, ValueError("mine")])),
        },
    )
    assert "ZeroDivisionError: in the task" in str(ends["group"][1])
    assert ends["nested"] == (
        "failed",
        (
            "ExceptionGroup: a (2 sub-exceptions): ValueError: b; "
            "ExceptionGroup: c (1 sub-exception): KeyError: 'outer' (from ValueError: inner)"
        ),
    )
    assert str(ends["circle"][1]).startswith("ValueError: round (from RuntimeError: and (from")
    assert len(str(ends["many"][1])) == 2000
    assert ends["unavailable"][0] == "released"
    assert ends["not-only"][0] == "failed"
    assert "ValueError: mine" in str(ends["not-only"][1])
    assert "without a text" in describe(ValueError(Odd()))


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_huge_error_is_cut_in_the_log(monkeypatch: pytest.MonkeyPatch, log_format: Any) -> None:  # noqa: ANN401 - a literal
    """The log has the beginning and the end of an error's message, not its 30 MB."""
    root = logging.getLogger()
    before = (root.handlers, root.level)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    try:
        configure_logs(load_settings(log_format=log_format))
        try:
            raise ValueError(  # noqa: TRY301
                "x" * 30_000_000 + " the end\n" + "many lines\n" * 100_000
            )
        except ValueError:
            logging.getLogger("a").exception("failed")
    finally:
        root.handlers, _ = before
        root.setLevel(before[1])
    text = stream.getvalue()
    assert len(text) < 100_000
    assert "ValueError: xxx" in text
    assert "the end" in text
    if log_format == "json":
        assert json.loads(text)["event"] == "failed"
