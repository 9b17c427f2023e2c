"""The run that a job gets: progress, checkpoints, and writes that need its lease."""

# ruff: noqa: PT012 - the end of a transaction is refused, after its body

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any, TypeVar

import asyncpg
import pytest

from balance_app.errors import DatabaseUnavailable
from balance_app.jobs import transaction
from balance_app.jobs.leases import Progress, Renewal, renew_leases
from balance_app.jobs.run import (
    CHECKPOINT_BYTES,
    CheckpointError,
    Run,
    RunStoppedError,
)
from balance_app.jobs.threads import ThreadRun
from balance_app.jobs.transaction import LeaseLostError, RunTransaction
from balance_app.sessions import NotReplicatedError, StandbyError
from tests.jobs.support import Instance, JobsDatabase, on, until
from tests.processes import RUN_ROLE

Result = TypeVar("Result")

NOTE = "INSERT INTO notes VALUES ($1)"


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres, job_lease_seconds=6) as jobs_db:
        # A job may have rights that the service itself does not need.
        await jobs_db.admin.execute(
            "CREATE TABLE notes (what text UNIQUE DEFERRABLE); GRANT ALL ON notes TO PUBLIC;"
            f'GRANT TEMPORARY ON DATABASE "{jobs_db.variables["DB_NAME"]}" TO PUBLIC;'
            f"GRANT pg_monitor TO {RUN_ROLE}"
        )
        yield jobs_db
        await jobs_db.admin.execute(f"REVOKE pg_monitor FROM {RUN_ROLE}")


@pytest.fixture
async def jobs_db(shared_jobs_db: JobsDatabase) -> AsyncIterator[JobsDatabase]:
    await shared_jobs_db.forget()
    await shared_jobs_db.admin.execute("TRUNCATE notes")
    yield shared_jobs_db
    await shared_jobs_db.close()


@pytest.fixture
async def instance(jobs_db: JobsDatabase) -> Instance:
    instance = jobs_db.instance()
    await instance.declare("moon")
    return instance


@pytest.fixture
async def run(instance: Instance) -> Run:
    return instance.run(await instance.claim())


async def notes(jobs_db: JobsDatabase) -> list[str]:
    return [row["what"] for row in await jobs_db.admin.fetch("SELECT what FROM notes ORDER BY 1")]


async def take_over(jobs_db: JobsDatabase) -> None:
    """Let another instance claim the job."""
    other = jobs_db.instance("other")
    await other.declare("moon")
    await jobs_db.expire("moon")
    await other.claim()


# -- progress --------------------------------------------------------------------------------------

PROGRESS: dict[tuple[Any, Any, str], Progress] = {
    (3, 10, "three"): Progress(3, 10, "three"),
    (3, None, ""): Progress(3, None, ""),
    (-1, -10, ""): Progress(0, 0, ""),
    (2.9, 10.1, ""): Progress(2, 10, ""),
    (True, False, ""): Progress(1, 0, ""),
    (10**30, 2**63, ""): Progress(2**53, 2**53, ""),
    (11, 10, ""): Progress(11, 10, ""),
    (1, 2, "a\0b\ud800c\udfff"): Progress(1, 2, "ab?c?"),
    (1, 2, "\U0001f319" * 600): Progress(1, 2, "\U0001f319" * 500),
    (1, 2, "'; DROP TABLE jobs; --"): Progress(1, 2, "'; DROP TABLE jobs; --"),
}


async def test_progress_is_written_with_the_next_heartbeat(
    jobs_db: JobsDatabase, instance: Instance, run: Run
) -> None:
    """Progress of any size and text is adjusted, and can't break a heartbeat."""
    assert run.lease is not None
    for given, expected in PROGRESS.items():
        run.progress(*given)
        assert run.lease.progress == expected
        assert instance.capabilities is not None
        renewal = Renewal("moon", 1, run.lease.progress)
        _, (result,) = await renew_leases(
            jobs_db.admin, instance.me, instance.lease, instance.capabilities, [renewal]
        )
        assert result.renewed
        row = await jobs_db.row("moon")
        assert (row["done"], row["total"], row["note"]) == expected


@pytest.mark.parametrize("done", ["three", float("nan"), float("inf"), None, b"x"])
async def test_progress_that_is_none_changes_nothing(run: Run, done: Any) -> None:  # noqa: ANN401
    """Invalid progress is ignored: the last one stays, and the run goes on."""
    run.progress(1, 2, "good")
    run.progress(done, 3, "bad")
    assert run.lease is not None
    assert run.lease.progress == Progress(1, 2, "good")
    total: Any = "ten"
    note: Any = None
    run.progress(2, total, note)
    assert run.lease.progress == Progress(2, None, "None")


async def test_pace_follows_the_progress(instance: Instance) -> None:
    """A run sleeps until the share of its time equals the share of its work, and no longer."""
    run = instance.run(await instance.claim(), min_seconds=1)
    started = monotonic()
    for done, total in ((0, 10), (5, None), (5, 0)):
        run.progress(done, total)
        await run.pace()
    assert monotonic() - started < 0.5
    run.progress(6, 10)
    await run.pace()
    assert monotonic() - started >= 0.55
    run.progress(99, 10)
    await run.pace()
    assert 0.95 <= monotonic() - started < 30
    run.lease = None
    await run.pace()


# -- checkpoints -----------------------------------------------------------------------------------

STATES = [
    {"done": 3, "of": [1, 2.5, None, True, "\u00e9\U0001f319"], "": {}},
    [],
    "text",
    0,
    2**64,
    -1.5e-300,
    10**4000,
    "\\u0000",  # six characters, none of them a NUL
    '\x01\x1f\x7f"\\',
    ["x" * (CHECKPOINT_BYTES - 4)],
    {"1": [[[[[[[[[[]]]]]]]]]]},
]


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
async def test_a_checkpoint_comes_back(
    jobs_db: JobsDatabase, instance: Instance, run: Run, state: object
) -> None:
    """After a loss the next owner gets the last checkpoint."""
    assert run.resumed is None
    await run.checkpoint("an older one")
    await run.checkpoint(state)
    await jobs_db.expire("moon")
    assert instance.run(await instance.claim()).resumed == state


async def test_none_forgets_a_checkpoint(
    jobs_db: JobsDatabase, instance: Instance, run: Run
) -> None:
    """A run can delete its checkpoint to start afresh."""
    await run.checkpoint([1])
    await run.checkpoint(None)
    await jobs_db.expire("moon")
    assert instance.run(await instance.claim()).resumed is None


def nested(depth: int) -> list[Any]:
    state: list[Any] = []
    for _ in range(depth):
        state = [state]
    return state


BAD_STATES: dict[str, Any] = {
    "a byte too many": ["x" * (CHECKPOINT_BYTES - 3)],
    "characters of four bytes": "\U0001f319" * (CHECKPOINT_BYTES // 4),
    "a NUL": "a\0b",
    "a NUL after a backslash": "\\\0",
    "a NUL in a key": {"a\0": 1},
    "a surrogate": "\ud800",
    "a surrogate in a key": {"\ud800": 1},
    "not a number": float("nan"),
    "infinity": [float("inf")],
    "an object": object(),
    "a function": nested,
    "bytes that are no text": b"\xff",
    "deeper than can be written": nested(300),
    "deeper than can be read": nested(230),
    "a number longer than can be read": 10**4400,
}


@pytest.mark.parametrize("what", BAD_STATES)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
async def test_a_checkpoint_that_cannot_be_is_refused(
    jobs_db: JobsDatabase, instance: Instance, run: Run, what: str, *, inside: bool
) -> None:
    """A state that JSON or PostgreSQL can't store or read back raises in the function at once."""
    await run.checkpoint({"good": True})
    if inside:
        with pytest.raises(CheckpointError):
            async with run.transaction() as connection:
                await connection.execute(NOTE, "moon")
                await run.checkpoint(BAD_STATES[what])
        assert await notes(jobs_db) == []
    else:
        with pytest.raises(CheckpointError):
            await run.checkpoint(BAD_STATES[what])
    await jobs_db.expire("moon")
    assert instance.run(await instance.claim()).resumed == {"good": True}


async def test_a_state_that_contains_itself_is_refused(run: Run) -> None:
    """JSON has no cycles."""
    state: list[Any] = []
    state.append(state)
    with pytest.raises(CheckpointError, match="must be JSON"):
        await run.checkpoint(state)


@pytest.mark.parametrize(
    "changed",
    [
        "SET LOCAL search_path = pg_catalog",
        "SET search_path = nowhere",
        "CREATE TEMP TABLE jobs (name text); SET LOCAL search_path = pg_temp, public",
        "SET LOCAL ROLE pg_monitor",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ],
)
async def test_what_a_job_sets_ends_with_its_transaction(
    jobs_db: JobsDatabase, run: Run, changed: str
) -> None:
    """The commit finds its function and tables; the next transaction has the usual settings."""
    async with run.transaction() as connection:
        await connection.execute(NOTE, "written")
        await connection.execute(changed)
    async with run.transaction() as connection:
        assert await connection.fetchval("SHOW transaction_isolation") == "read committed"
        await connection.execute(NOTE, "too")
    assert sorted(await notes(jobs_db)) == ["too", "written"]


async def test_the_refusal_names_the_size(run: Run) -> None:
    """It contains the limit and the size."""
    with pytest.raises(CheckpointError, match=f"at most {CHECKPOINT_BYTES} .* has 9002 bytes"):
        await run.checkpoint("x" * 9000)


async def test_a_checkpoint_after_the_lease_is_refused(jobs_db: JobsDatabase, run: Run) -> None:
    """A run that was taken over can't overwrite the new owner's state."""
    await run.checkpoint([1])
    await take_over(jobs_db)
    with pytest.raises(LeaseLostError, match="moon has lost its lease"):
        await run.checkpoint([2])
    assert (await jobs_db.row("moon"))["checkpoint"] == "[1]"


async def test_a_checkpoint_inside_is_written_with_the_transaction(
    jobs_db: JobsDatabase, instance: Instance, run: Run
) -> None:
    """Both are written or neither; the last of several in one transaction counts."""
    await run.checkpoint("before")
    with pytest.raises(ZeroDivisionError):
        async with run.transaction() as connection:
            await connection.execute(NOTE, "rolled back")
            await run.checkpoint("rolled back")
            raise ZeroDivisionError
    assert (await jobs_db.row("moon"))["checkpoint"] == '"before"'
    async with run.transaction() as connection:
        await connection.execute(NOTE, "written")
        await run.checkpoint("first")
        await run.checkpoint({"second": "'; --"})
        assert (await jobs_db.row("moon"))["checkpoint"] == '"before"'
    async with run.transaction() as connection:
        await connection.execute(NOTE, "written without")
    assert await notes(jobs_db) == ["written", "written without"]
    await jobs_db.expire("moon")
    assert instance.run(await instance.claim()).resumed == {"second": "'; --"}


async def test_none_inside_forgets_too(jobs_db: JobsDatabase, run: Run) -> None:
    """The last step of a job can delete its state together with its effect."""
    await run.checkpoint([1])
    async with run.transaction():
        await run.checkpoint(None)
    assert (await jobs_db.row("moon"))["checkpoint"] == "null"


# -- transactions ----------------------------------------------------------------------------------


async def test_a_transaction_takes_effect_at_its_end(jobs_db: JobsDatabase, run: Run) -> None:
    """Before, it is invisible to others and locks no row of the job."""
    async with run.transaction() as connection:
        await connection.execute(NOTE, "moon")
        assert await notes(jobs_db) == []
        async with jobs_db.admin.transaction():
            await jobs_db.admin.execute("SELECT FROM jobs WHERE name = 'moon' FOR UPDATE NOWAIT")
    assert await notes(jobs_db) == ["moon"]


async def test_a_run_that_was_taken_over_commits_nothing(jobs_db: JobsDatabase, run: Run) -> None:
    """The lease is checked at the commit: what the transaction wrote is rolled back."""
    await run.checkpoint([1])
    with pytest.raises(LeaseLostError, match="moon has lost its lease") as refusal:
        async with run.transaction() as connection:
            await connection.execute(NOTE, "too late")
            await run.checkpoint([2])
            await take_over(jobs_db)
    assert isinstance(refusal.value.__cause__, asyncpg.PostgresError)
    assert await notes(jobs_db) == []
    assert (await jobs_db.row("moon"))["checkpoint"] == "[1]"


async def test_without_the_check_a_stale_run_commits(
    jobs_db: JobsDatabase, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with a plain commit, the write of a stale run takes effect."""
    monkeypatch.setattr(transaction, "COMMIT", "COMMIT")
    async with run.transaction() as connection:
        await connection.execute(NOTE, "too late")
        await take_over(jobs_db)
    assert await notes(jobs_db) == ["too late"]


@pytest.mark.parametrize("taken", [True, False], ids=["taken over", "expired"])
async def test_a_run_that_has_lost_its_lease_begins_nothing(
    jobs_db: JobsDatabase, run: Run, *, taken: bool
) -> None:
    """The body of the transaction is not entered."""
    await (take_over(jobs_db) if taken else jobs_db.expire("moon"))
    entered = False
    with pytest.raises(LeaseLostError):
        async with run.transaction():
            entered = True
    assert not entered


async def test_an_error_rolls_back(jobs_db: JobsDatabase, run: Run) -> None:
    """Errors of the function or of a statement are raised unchanged; the run may go on."""
    with pytest.raises(ZeroDivisionError):
        async with run.transaction() as connection:
            await connection.execute(NOTE, "moon")
            raise ZeroDivisionError
    with pytest.raises(asyncpg.UniqueViolationError) as error:
        async with run.transaction() as connection:
            await connection.execute(NOTE, "sun")
            await connection.execute(NOTE, "sun")
    assert error.value.__cause__ is not error.value
    with pytest.raises(asyncpg.InFailedSQLTransactionError) as failed:
        async with run.transaction() as connection:
            await connection.execute(NOTE, "mars")
            with suppress(asyncpg.PostgresError):
                await connection.execute("SELECT 1 / 0")
    assert failed.value.__cause__ is not failed.value
    assert await notes(jobs_db) == []
    async with run.transaction() as connection:
        await connection.execute(NOTE, "at last")
    assert await notes(jobs_db) == ["at last"]


async def test_a_constraint_that_is_checked_at_the_commit(jobs_db: JobsDatabase, run: Run) -> None:
    """An error at the commit is the function's error, and nothing is written."""
    await run.checkpoint([1])
    with pytest.raises(asyncpg.UniqueViolationError):
        async with run.transaction() as connection:
            await connection.execute("SET CONSTRAINTS ALL DEFERRED")
            await connection.execute(NOTE, "sun")
            await connection.execute(NOTE, "sun")
            await run.checkpoint([2])
    assert await notes(jobs_db) == []
    assert (await jobs_db.row("moon"))["checkpoint"] == "[1]"


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("of the function"), TimeoutError("of the function"), ConnectionError()],
    ids=lambda error: type(error).__name__,
)
async def test_an_unrelated_os_error_is_no_outage(
    jobs_db: JobsDatabase, run: Run, error: OSError
) -> None:
    """A missing file is no unavailable database: the run fails, and is not released."""
    with pytest.raises(type(error)) as raised:
        async with run.transaction() as connection:
            await connection.execute(NOTE, "moon")
            raise error
    assert raised.value is error
    assert error.__cause__ is None
    assert await notes(jobs_db) == []


async def test_a_connection_used_wrongly_is_no_outage(run: Run) -> None:
    """Two statements at once on one connection are the function's error."""
    with pytest.raises(asyncpg.InterfaceError, match="another operation"):
        async with run.transaction() as connection:
            await asyncio.gather(
                connection.execute("SELECT pg_sleep(0.2)"), connection.fetch("SELECT")
            )


async def test_cancelling_rolls_back(jobs_db: JobsDatabase, run: Run) -> None:
    """A run that is stopped in a statement, or between two, leaves no write and no lock."""
    for statement in ("SELECT pg_sleep(60)", None):
        inside = asyncio.Event()

        async def write(inside: asyncio.Event, statement: str | None) -> None:
            async with run.transaction() as connection:
                await connection.execute(NOTE, "moon")
                inside.set()
                if statement:
                    await connection.execute(statement)
                await asyncio.sleep(60)

        task = asyncio.create_task(write(inside, statement))
        await inside.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await notes(jobs_db) == []
        async with asyncio.timeout(10):
            await jobs_db.admin.execute(NOTE, "moon")
        await jobs_db.admin.execute("TRUNCATE notes")


async def test_a_run_has_one_transaction_at_a_time(jobs_db: JobsDatabase, run: Run) -> None:
    """A second one, nested or concurrent, is refused; the first is not affected."""
    async with run.transaction() as connection:
        with pytest.raises(RuntimeError, match="moon has a transaction open already"):
            async with run.transaction():
                pass
        await connection.execute(NOTE, "first")
    assert await notes(jobs_db) == ["first"]

    async def write(what: str) -> None:
        async with run.transaction() as connection:
            await connection.execute(NOTE, what)

    results = await asyncio.gather(write("second"), write("third"), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NoneType", "RuntimeError"]
    assert len(await notes(jobs_db)) == 2
    await write("again")


@pytest.mark.parametrize("when", ["in a statement", "between statements", "before the commit"])
async def test_a_connection_that_is_lost_is_an_outage(
    jobs_db: JobsDatabase, run: Run, when: str
) -> None:
    """The function gets the outage as an error; nothing is written."""
    with pytest.raises(DatabaseUnavailable) as unavailable:
        async with run.transaction() as connection:
            await connection.execute(NOTE, "moon")
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            if when == "in a statement":
                waiting = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
                await asyncio.sleep(0.1)
            await jobs_db.admin.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            if when == "in a statement":
                await waiting
            elif when == "between statements":
                await connection.execute(NOTE, "sun")
    assert unavailable.value.detail == "The database became unavailable in a transaction."
    assert await notes(jobs_db) == []
    async with run.transaction() as connection:
        await connection.execute(NOTE, "at last")
    assert await notes(jobs_db) == ["at last"]


@pytest.mark.parametrize(
    ("error", "at_commit", "applied"),
    [
        (StandbyError("is a standby"), False, "no"),
        (NotReplicatedError("canceled"), True, "unknown"),
    ],
    ids=["no primary", "not replicated"],
)
async def test_a_failover_is_an_outage(
    monkeypatch: pytest.MonkeyPatch, run: Run, error: Exception, applied: str, *, at_commit: bool
) -> None:
    """The run is released for it, and does not fail: it is no error of the job."""

    async def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(RunTransaction, "commit" if at_commit else "enter", fails)
    with pytest.raises(DatabaseUnavailable) as unavailable:
        async with run.transaction():
            assert at_commit
    assert unavailable.value.applied == applied
    assert unavailable.value.__cause__ is error


async def test_an_unavailable_database_is_an_outage(jobs_db: JobsDatabase, run: Run) -> None:
    """Neither a transaction nor a checkpoint waits for ever, and both work when it is back."""
    await jobs_db.begin_outage()
    try:
        with pytest.raises(DatabaseUnavailable):
            async with run.transaction():
                raise AssertionError("it must not begin")

        async def refused() -> bool:
            try:
                await run.checkpoint([1])
            except DatabaseUnavailable:
                return True
            return False

        await until(refused)
    finally:
        await jobs_db.end_outage()

    async def works() -> bool:
        with suppress(DatabaseUnavailable):
            await run.checkpoint([2])
            async with run.transaction() as connection:
                await connection.execute(NOTE, "back")
            return True
        return False

    await until(works)
    assert (await jobs_db.row("moon"))["checkpoint"] == "[2]"
    assert await notes(jobs_db) == ["back"]


async def test_an_idle_transaction_is_ended(postgres: dict[str, str]) -> None:
    """The server ends a transaction that is idle for as long as a lease."""
    async with on(postgres, job_lease_seconds=1.5) as quick:
        await quick.admin.execute("CREATE TABLE notes (what text); GRANT ALL ON notes TO PUBLIC")
        other = quick.instance(lease=timedelta(seconds=30))
        await other.declare("moon")
        run = other.run(await other.claim())
        with pytest.raises(DatabaseUnavailable):
            async with run.transaction() as connection:
                await connection.execute(NOTE, "moon")
                await asyncio.sleep(2)
        assert await notes(quick) == []


# -- functions in threads --------------------------------------------------------------------------


async def in_thread(run: Run, function: Callable[[ThreadRun], Result]) -> Result:
    """Call a function as the scheduler calls one that is not async."""
    return await asyncio.to_thread(function, ThreadRun(run))


async def test_a_run_works_from_a_thread(
    jobs_db: JobsDatabase, instance: Instance, run: Run
) -> None:
    """Progress, checkpoints, transactions and attributes, used from a thread."""
    await run.checkpoint("before")
    await jobs_db.expire("moon")
    run = instance.run(await instance.claim())

    def function(run: ThreadRun) -> str:
        assert (run.name, run.fence, run.attempt, run.resumed) == ("moon", 2, 1, "before")
        run.log.info("hello")
        run.progress(1, 2, "half\0")
        run.pace()
        run.checkpoint({"done": 1})
        with run.transaction() as connection:
            assert connection.execute(NOTE, "moon") == "INSERT 0 1"
            assert [row["what"] for row in connection.fetch("SELECT what FROM notes")] == ["moon"]
            run.checkpoint({"done": 2})
        return str(threading.current_thread() is threading.main_thread())

    assert await in_thread(run, function) == "False"
    assert run.lease is not None
    assert run.lease.progress == Progress(1, 2, "half")
    assert await notes(jobs_db) == ["moon"]
    assert (await jobs_db.row("moon"))["checkpoint"] == '{"done": 2}'


async def test_errors_in_a_thread_are_raised(jobs_db: JobsDatabase, run: Run) -> None:
    """An error in a transaction rolls it back; a lost lease is raised as such."""

    def fails(run: ThreadRun) -> None:
        with run.transaction() as connection:
            connection.execute(NOTE, "moon")
            raise ZeroDivisionError

    def fails_in_sql(run: ThreadRun) -> None:
        with run.transaction() as connection:
            connection.execute(NOTE, "moon")
            connection.execute("SELECT 1 / 0")

    def checks(run: ThreadRun) -> None:
        run.checkpoint(float("nan"))

    def loses(run: ThreadRun) -> None:
        with run.transaction() as connection:
            connection.execute(NOTE, "moon")
            losing.set()
            lost.wait(10)

    for function, error in {
        fails: ZeroDivisionError,
        fails_in_sql: asyncpg.DivisionByZeroError,
        checks: CheckpointError,
    }.items():
        with pytest.raises(error):
            await in_thread(run, function)
    losing, lost = threading.Event(), threading.Event()
    call = asyncio.create_task(in_thread(run, loses))
    await asyncio.to_thread(losing.wait, 10)
    await take_over(jobs_db)
    lost.set()
    with pytest.raises(LeaseLostError):
        await call
    with pytest.raises(LeaseLostError):
        await in_thread(run, lambda run: run.checkpoint(1))
    assert await notes(jobs_db) == []


CALLS: dict[str, Callable[[ThreadRun], object]] = {
    "progress": lambda run: run.progress(1),
    "pace": lambda run: run.pace(),
    "checkpoint": lambda run: run.checkpoint(1),
    "transaction": lambda run: run.transaction().__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_thread_is_stopped_at_its_next_call(
    jobs_db: JobsDatabase, run: Run, call: str
) -> None:
    """Every call raises with the reason once the run was requested to stop, without effect."""
    run.stopped = ("cancelled", "cancelled by ada")
    with pytest.raises(RunStoppedError, match="cancelled by ada"):
        await in_thread(run, CALLS[call])
    row = await jobs_db.row("moon")
    assert (row["checkpoint"], run.lease and run.lease.progress.done) == (None, None)


async def test_a_thread_is_stopped_inside_a_transaction(jobs_db: JobsDatabase, run: Run) -> None:
    """The next statement raises, and the transaction is rolled back."""

    def function(facade: ThreadRun) -> None:
        with facade.transaction() as connection:
            connection.execute(NOTE, "moon")
            run.stopped = ("cancelled", "cancelled by ada")
            connection.execute(NOTE, "sun")

    with pytest.raises(RunStoppedError, match="cancelled by ada"):
        await in_thread(run, function)
    assert await notes(jobs_db) == []
    async with asyncio.timeout(10):
        await jobs_db.admin.execute(NOTE, "moon")


async def test_a_constraint_that_is_checked_at_the_commit_of_a_thread(
    jobs_db: JobsDatabase, run: Run
) -> None:
    """An error at the commit is raised unchanged."""

    def function(run: ThreadRun) -> None:
        with run.transaction() as connection:
            connection.execute("SET CONSTRAINTS ALL DEFERRED")
            connection.execute(NOTE, "sun")
            connection.execute(NOTE, "sun")

    with pytest.raises(asyncpg.UniqueViolationError):
        await in_thread(run, function)
    assert await notes(jobs_db) == []


async def test_a_thread_is_stopped_before_its_commit(jobs_db: JobsDatabase, run: Run) -> None:
    """A run that is requested to stop in the body does not commit."""

    def function(facade: ThreadRun) -> None:
        with facade.transaction() as connection:
            connection.execute(NOTE, "moon")
            run.stopped = ("cancelled", "cancelled by ada")

    with pytest.raises(RunStoppedError, match="cancelled by ada"):
        await in_thread(run, function)
    assert await notes(jobs_db) == []
