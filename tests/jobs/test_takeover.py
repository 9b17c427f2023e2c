"""Instances are killed and frozen: each of their jobs goes on elsewhere, without an overlap."""

import asyncio
import math
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import choice, sample, uniform
from time import monotonic
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from balance_app.db.migrations import migrate
from balance_app.db.pool import Database
from balance_app.jobs.declarations import QUARANTINE, Declared
from balance_app.jobs.leases import HeldLeases
from balance_app.jobs.repository import JobRepository, Me
from balance_app.jobs.run import Run
from balance_app.jobs.transaction import TransactionLimitError
from balance_app.settings import load_settings
from tests.jobs.fleet import Span, overlaps, read_event_logs
from tests.jobs.support import AT_ONCE, HAS_TRANSACTION_TIMEOUT
from tests.processes import Instance, connect, running
from tests.system.databases import own_postgres
from tests.system.sizes import report_figures, size

KILLS = size(small=10, full=30)
FREEZES = size(small=5, full=15)
LEASE = size(small=3, full=6)
HEARTBEAT = size(small=1, full=2)
SETTLING = 4
# A lost job starts elsewhere within lease + 2 s; the rest is slack for a busy machine.
PROMPT = size(small=4, full=2)
# of one held transaction; the control's outlasts the freeze, so that it commits late
HELD, HELD_LONG = 0.5, LEASE + 2
FOREVER = "3600"
# between the signal's moment here and a claim that was under way
SOON = timedelta(seconds=0.5)

FENCED = """
CREATE TABLE fenced (
    job text NOT NULL, fence bigint NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp()
);
GRANT ALL ON fenced TO PUBLIC
"""
# in the order of the commits, whatever time their transactions recorded
COMMITTED = "SELECT job, fence FROM fenced ORDER BY pg_xact_commit_timestamp(xmin), fence"

LOST = "SELECT job, fence, server, started_at, ended_at FROM job_runs WHERE outcome = 'lost'"

LONG_TRANSACTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend'
  AND xact_start < clock_timestamp() - $1::float8 * interval '1 second'
"""

LATE_ANSWER = """
CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(1.3); RETURN NEW; END';
CREATE TRIGGER dawdle BEFORE INSERT ON job_runs FOR EACH ROW EXECUTE FUNCTION dawdle()
"""


@pytest.fixture(scope="module")
async def stamping() -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of a PostgreSQL that records commit timestamps."""
    async with own_postgres(max_connections="200", track_commit_timestamp="on") as server:
        yield server.environment()


@pytest.fixture
async def fenced(stamping: dict[str, str]) -> AsyncIterator[dict[str, str]]:
    """An empty database on it, with the table that the jobs write to."""
    admin = await connect(stamping)
    await admin.execute("CREATE DATABASE fenced")
    database = {**stamping, "DB_NAME": "fenced"}
    connection = await connect(database)
    await connection.execute(FENCED)
    await connection.close()
    yield database
    await admin.execute("DROP DATABASE fenced WITH (FORCE)")
    await admin.close()


async def test_jobs_of_killed_instances_go_on_elsewhere(
    database: dict[str, str], tmp_path: Path
) -> None:
    """A killed instance's jobs start elsewhere in time, from their checkpoints, without overlap."""
    names = ("twin", "twin", "app1", "app2", "app3", "app4")  # two instances may share a name
    instances = _fleet(database, tmp_path, names, jobs=12, FLEET_SECONDS="12", FLEET_EVERY="1")
    lost: list[Span] = []
    delays: list[float] = []
    kills: list[tuple[str, datetime]] = []
    async with running(instances):
        await _all_started(tmp_path, 12)
        await _until(lambda: all(_under_way(tmp_path, instance) for instance in instances[:2]))
        victims = [instances[0], instances[-1]]
        for _ in range(KILLS // 2):
            kills += [(instance.name, datetime.now(UTC)) for instance in victims]
            gone, after = await _kill(victims, tmp_path)
            lost += gone
            delays += after
            await asyncio.gather(*(instance.ready() for instance in victims))
            await _forgive(database)
            await asyncio.sleep(uniform(0, HEARTBEAT))
            owners = [instance for instance in instances if _under_way(tmp_path, instance)]
            victims = sample(owners, 2)
    spans = read_event_logs(tmp_path)
    wrong = [span for span in lost if not _goes_on(span, _successor(span, spans))]
    recorded = await _lost_runs(database)
    # An instance may also be killed just before its run's first line or after its last.
    unexplained = [
        run
        for run, (server, since, until) in recorded.items()
        if not any(name == server and since - SOON < at < until for name, at in kills)
    ]
    report_figures(
        f"{KILLS} instances killed: {len(lost)} jobs lost, started elsewhere after "
        f"{_times(delays)}; {sum(_checkpoint(span) > 0 for span in lost)} "
        f"from a checkpoint, {len(spans)} runs, {len(overlaps(spans))} overlaps"
    )
    assert overlaps(spans) == []
    assert wrong == []
    assert max(delays) <= LEASE + PROMPT
    assert {(span.job, span.fence) for span in lost} <= recorded.keys()
    assert unexplained == []  # no other run was lost
    assert any(_checkpoint(span) for span in lost)


async def test_frozen_instances_are_ended_before_they_go_on(
    fenced: dict[str, str], tmp_path: Path
) -> None:
    """An instance frozen past its leases executes nothing more, and its jobs and locks are free.

    Its jobs use SIGALRM for themselves: the watchdog timer does not depend on it.
    """
    instances = _fleet(
        fenced,
        tmp_path,
        [f"app{number}" for number in range(1, 7)],
        jobs=12,
        FLEET_SECONDS=FOREVER,
        FLEET_KIND="writes,held",
        FLEET_HOLD=str(HELD),
        FLEET_ALARM="taken",
        JOB_CONNECTIONS="12",
    )
    lost: list[Span] = []
    delays: list[float] = []
    codes: list[int] = []
    late_lines = long_transactions = 0
    unharmed: list[Span] = []
    connection = await connect(fenced)
    async with running(instances):
        await _all_started(tmp_path, 12)
        while len(codes) < FREEZES:
            dead = [
                instance
                for instance in instances
                if instance.process and instance.process.returncode is not None
            ]
            if len(dead) > len(instances) / 2:
                await asyncio.gather(*(instance.launch() for instance in dead))
                await asyncio.gather(*(instance.ready() for instance in dead))
                dead = []
            owners = [
                instance
                for instance in instances
                if instance not in dead and _under_way(tmp_path, instance)
            ]
            some = min(3, FREEZES - len(codes), max(1, len(owners) - 1))
            frozen = sample(owners, some)
            other = choice([instance for instance in instances if instance not in dead + frozen])
            await _forgive(fenced)
            await asyncio.sleep(uniform(0, HEARTBEAT))
            async with _frozen(frozen):
                since = monotonic()
                gone = [span for instance in frozen for span in _under_way(tmp_path, instance)]
                unharmed += await _freeze_shortly(other, tmp_path)
                delays += await _takeovers(gone, tmp_path, since)
                lost += gone
                await asyncio.sleep(since + LEASE + 1.5 - monotonic())
                long_transactions += await connection.fetchval(LONG_TRANSACTIONS, LEASE + 1.0)
                sizes = [_size(tmp_path, instance) for instance in frozen]
            codes += [await _end(instance) for instance in frozen]
            late_lines += sum(
                _size(tmp_path, instance) != size
                for instance, size in zip(frozen, sizes, strict=True)
            )
        spans = read_event_logs(tmp_path)
    late = _late(await connection.fetch(COMMITTED))
    writes = await connection.fetchval("SELECT count(*) FROM fenced")
    await connection.close()
    recorded = await _lost_runs(fenced)
    inside = sum(_last_line(span) == "inside" for span in lost)
    report_figures(
        f"{FREEZES} instances frozen: {len(lost)} jobs lost, {inside} of them in a transaction, "
        f"started elsewhere after {_times(delays)}; after SIGCONT {late_lines} wrote lines, "
        f"{late} of {writes} writes were late, {len(overlaps(spans))} overlaps, "
        f"{len(unharmed)} runs went on after a short freeze"
    )
    assert codes == [-signal.SIGKILL] * len(codes)
    assert late_lines == 0
    assert overlaps(spans) == []
    assert max(delays) <= LEASE + PROMPT
    assert late == 0
    assert writes
    assert inside, "no freeze met a transaction"
    assert long_transactions == 0
    assert recorded.keys() == {(span.job, span.fence) for span in lost}
    assert unharmed


async def test_without_watchdog_and_fence_late_lines_and_writes_are_seen(
    fenced: dict[str, str], tmp_path: Path
) -> None:
    """The controls: without the timer there are late lines, without the fence also late writes."""
    kinds = {
        "no timer": ("writes", "watchdog"),
        "no timer, held": ("held", "watchdog"),
        "alarm timer": ("writes", "kill-timer"),
        "no fence": ("writes", "watchdog,fence"),
        "no fence, held": ("held", "watchdog,fence"),
        "guarded": ("writes", ""),
    }
    instances = [
        instance
        for name, (kind, guards) in kinds.items()
        for instance in _fleet(
            fenced,
            tmp_path,
            [name.replace(" ", "_")],
            jobs=10,
            FLEET_SECONDS=FOREVER,
            FLEET_KIND=kind,
            FLEET_HOLD=str(HELD_LONG),
            FLEET_MUTANTS=guards,
            FLEET_ALARM="taken",
            JOB_CONNECTIONS="12",
        )
    ]
    connection = await connect(fenced)
    async with running(instances):
        await _all_started(tmp_path, 10)
        after = await asyncio.gather(
            *(
                _lines_after_a_freeze(instance, tmp_path, held=kind == "held")
                for instance, (kind, _) in zip(instances[:-1], kinds.values(), strict=False)
            )
        )
        alive = [
            instance
            for instance in instances
            if instance.process and instance.process.returncode is None
        ]
        rows = await connection.fetch(COMMITTED)
        spans = read_event_logs(tmp_path)
    await connection.close()
    late = [_late(rows, of={(line["job"], line["fence"]) for line in lines}) for lines in after]
    refusals = [[line["error"] for line in lines if line["what"] == "refused"] for lines in after]
    report_figures(
        f"{len(overlaps(spans))} overlaps; after SIGCONT: "
        + "; ".join(
            f"{name}: {len(lines)} lines, {count} late writes, refused: {errors}"
            for name, lines, count, errors in zip(kinds, after, late, refusals, strict=False)
        )
    )
    assert alive == instances
    assert overlaps(spans)
    assert all(after)
    # The fence alone refuses late writes, at the beginning of a transaction and at its commit.
    assert late[:3] == [0, 0, 0]
    assert all(late[3:])
    refused = [{error.split("(")[0] for error in errors} for errors in refusals]
    assert refused[2] <= {
        "LeaseLostError"
    }  # requested to stop, it may not begin another transaction
    assert refused[:2] + refused[3:] == [
        {"LeaseLostError"},
        {"LeaseLostError"},
        set(),
        set(),
    ]


async def test_a_job_that_kills_its_process_is_quarantined(
    database: dict[str, str], tmp_path: Path
) -> None:
    """After three lost runs in a row a job is quarantined, and the instances stay up."""
    instances = _fleet(
        database,
        tmp_path,
        ("app1", "app2", "app3"),
        jobs=2,
        FLEET_KIND="paced,poison",
        FLEET_SECONDS="0.5",
        FLEET_EVERY="1",
        JOB_WARM_UP_SECONDS="2",
        JOB_LEASE_SECONDS="1.5",
        JOB_HEARTBEAT_SECONDS="0.5",
    )
    connection = await connect(database)
    async with running(instances), _supervised(instances) as deaths:
        await _until_true(
            connection,
            "SELECT holder IS NULL AND lost_streak >= 3 FROM jobs WHERE name = 'job-01'",
        )
        quarantined_at = monotonic()
        await asyncio.gather(*(instance.ready() for instance in instances))
        await asyncio.sleep(3)  # two leases: time enough for a run that must not start
        await asyncio.gather(*(instance.ready() for instance in instances))
        spans = read_event_logs(tmp_path)
    row = await connection.fetchrow("SELECT * FROM jobs WHERE name = 'job-01'")
    outcomes = await connection.fetch("SELECT outcome FROM job_runs WHERE job = 'job-01'")
    await connection.close()
    poison = [span for span in spans if span.job == "job-01"]
    other = [span for span in spans if span.job == "job-02"]
    after = [span for span in other if span.begin > quarantined_at and span.ended]
    between = [later.begin - earlier.begin for earlier, later in pairwise(poison)]
    report_figures(
        f"{len(poison)} runs killed their instances, {_times(between)} apart; quarantined since; "
        f"the other job ran {len(other)} times, {len(after)} times since"
    )
    assert row is not None
    assert (row["holder"], row["paused_at"], row["last_outcome"]) == (None, None, "lost")
    waits = row["ready_at"] - row["last_ended_at"]
    assert QUARANTINE < waits < QUARANTINE + timedelta(minutes=1)
    assert [outcome for (outcome,) in outcomes] == ["lost"] * 3
    assert len(poison) == 3
    assert deaths == [-signal.SIGKILL] * 3
    assert len({span.pid for span in poison}) == 3
    assert after
    assert overlaps(spans) == []


async def test_a_claim_that_is_answered_too_late_starts_nothing(
    database: dict[str, str], tmp_path: Path
) -> None:
    """A claim whose answer arrives after the lease is released, and the instance stays up."""
    await migrate(load_settings(**{name.lower(): value for name, value in database.items()}))
    connection = await connect(database)
    await connection.execute(LATE_ANSWER)
    instances = _fleet(
        database,
        tmp_path,
        ["app1"],
        jobs=1,
        JOB_WARM_UP_SECONDS="0",
        JOB_LEASE_SECONDS="1",
        JOB_HEARTBEAT_SECONDS="0.3",
    )
    async with running(instances):
        await _until_true(connection, "SELECT count(*) > 2 FROM job_runs")
        await instances[0].ready()
        too_early = read_event_logs(tmp_path)
        await connection.execute("DROP TRIGGER dawdle ON job_runs")
        await _all_started(tmp_path, 1)
    *late, last = await connection.fetch("SELECT outcome, result FROM job_runs ORDER BY id")
    await connection.close()
    report_figures(f"{len(late)} claims were answered too late, then: {last['outcome']}")
    assert too_early == []
    assert {tuple(run) for run in late} == {("released", "the response to its claim was too late")}


@pytest.mark.parametrize("half_way", [False, True], ids=["idle", "half-way"])
async def test_the_locks_of_a_silent_transaction_are_released(
    database: dict[str, str], *, half_way: bool
) -> None:
    """An instance that stops sending in a transaction, even in a statement, soon holds no locks.

    For the server, a session that has sent only the first message of a statement is not idle: only
    a limit of the whole transaction ends it.
    """
    settings = load_settings(
        **{name.lower(): value for name, value in database.items()},
        job_lease_seconds=0.5,
        job_heartbeat_seconds=0.1,
    )
    service = Database(settings)
    await service.start()
    jobs = JobRepository(service, Me(uuid4(), "app1"), timedelta(seconds=0.5))
    capabilities = await jobs.declare({"a": Declared("every 60 s")})
    found = await jobs.claim_next(capabilities, AT_ONCE)
    assert found.claimed is not None
    run = Run(found.claimed, service, jobs, min_seconds=0)
    other = await connect(database)
    if half_way and other.get_server_version().major < HAS_TRANSACTION_TIMEOUT:
        pytest.skip("PostgreSQL 17 brought transaction_timeout")
    async with asyncio.timeout(30):
        with suppress(TransactionLimitError):
            async with run.transaction() as connection:
                await connection.execute("SELECT pg_advisory_xact_lock(1)")
                if half_way:
                    await connection.prepare("SELECT $1::integer")
                since = monotonic()
                await other.execute("SELECT pg_advisory_lock(1)")
                seconds = monotonic() - since
    await other.close()
    await service.stop()
    report_figures(f"the lock of a silent transaction was free after {seconds:.2f} s")
    assert 0.4 < seconds < 5


def test_a_timer_that_is_set_late_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is frozen just before it sets the timer is ended as soon as it continues."""
    now = 1000.0
    calls: list[str] = []

    class Timer:
        def set(self, _seconds: float) -> None:
            nonlocal now
            now += 0 if calls else 10
            calls.append("set")

        def expire(self) -> None:
            calls.append("expired")

    monkeypatch.setattr("balance_app.jobs.leases.monotonic", lambda: now)
    leases = HeldLeases(load_settings(job_lease_seconds=6))
    leases._watchdog = Timer()
    leases.hold("a", 1, now, lambda _outcome, _reason: None)
    assert calls[:2] == ["set", "expired"]


def _fleet(
    database: dict[str, str], event_logs: Path, names: Iterable[str], *, jobs: int, **env: str
) -> list[Instance]:
    settings = {
        "FLEET_EVENT_LOGS": str(event_logs),
        "FLEET_JOBS": str(jobs),
        "JOB_WARM_UP_SECONDS": str(SETTLING),
        "JOB_LEASE_SECONDS": str(LEASE),
        "JOB_HEARTBEAT_SECONDS": str(HEARTBEAT),
        **env,
    }
    program = ("-m", "tests.jobs.fleet")
    return [Instance(database, name, log=None, program=program, **settings) for name in names]


def _under_way(event_logs: Path, instance: Instance) -> list[Span]:
    """Return the runs of an instance's process that have not ended."""
    return [
        span for span in read_event_logs(event_logs) if span.pid == instance.pid and not span.ended
    ]


def _successor(span: Span, spans: list[Span]) -> Span | None:
    """Return the next run of the same job."""
    later = (each for each in spans if each.job == span.job and each.fence > span.fence)
    return min(later, key=lambda each: each.fence, default=None)


def _again(spans: list[Span], now: list[Span]) -> list[Span]:
    """Return the same runs as they are in the event logs now."""
    names = {(span.job, span.fence, span.pid) for span in spans}
    return [span for span in now if (span.job, span.fence, span.pid) in names]


def _start_step(span: Span) -> int:
    resumed = span.lines[0]["resumed"]
    return 0 if resumed is None else int(resumed["step"])


def _checkpoint(span: Span) -> int:
    """Return the step from which the next run resumes: this run's last checkpoint."""
    steps = [line["step"] for line in span.lines if line["what"] == "checkpoint"]
    return int(steps[-1]) if steps else _start_step(span)


def _goes_on(span: Span, after: Span | None) -> bool:
    """Return whether the next run began elsewhere, from the lost run's checkpoint."""
    if after is None or after.pid == span.pid:
        return False
    resumed = _start_step(after)
    last = span.lines[-1]
    # It may have been killed between the checkpoint and the line that records it.
    unrecorded = last["step"] + 1 if last["what"] == "tick" and last["step"] % 10 == 9 else None
    return resumed in {_checkpoint(span), unrecorded}


async def _until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if check():
                return
            await asyncio.sleep(0.1)


async def _until_true(connection: "asyncpg.Connection[asyncpg.Record]", query: str) -> None:
    async with asyncio.timeout(60):
        while True:
            if await connection.fetchval(query):
                return
            await asyncio.sleep(0.1)


async def _all_started(event_logs: Path, jobs: int) -> None:
    await _until(lambda: len({span.job for span in read_event_logs(event_logs)}) == jobs)


async def _kill(victims: list[Instance], event_logs: Path) -> tuple[list[Span], list[float]]:
    """Kill instances and restart them; return their runs, and how long each job was idle."""
    since = monotonic()
    pids = {instance.pid for instance in victims}
    await asyncio.gather(*(instance.kill() for instance in victims))
    gone = [span for instance in victims for span in _under_way(event_logs, instance)]
    assert {span.pid for span in gone} <= pids
    await asyncio.gather(*(instance.launch() for instance in victims))
    return gone, await _takeovers(gone, event_logs, since)


async def _takeovers(gone: list[Span], event_logs: Path, since: float) -> list[float]:
    """Wait until these jobs run again; return how many seconds each took."""
    while True:
        spans = read_event_logs(event_logs)
        after = [_successor(span, spans) for span in gone]
        if all(after) or monotonic() > since + LEASE + 10:
            return [math.inf if span is None else span.begin - since for span in after]
        await asyncio.sleep(0.1)


async def _forgive(database: dict[str, str]) -> None:
    """Reset the losses, so that no job is quarantined for the kills of this test."""
    connection = await connect(database)
    await connection.execute("UPDATE jobs SET lost_streak = 0 WHERE lost_streak > 0")
    await connection.close()


async def _lost_runs(
    database: dict[str, str],
) -> dict[tuple[str, int], tuple[str, datetime, datetime]]:
    """Return the runs recorded as lost: server, start and end."""
    connection = await connect(database)
    rows = await connection.fetch(LOST)
    await connection.close()
    return {(job, fence): (server, since, until) for job, fence, server, since, until in rows}


@asynccontextmanager
async def _frozen(instances: list[Instance]) -> AsyncIterator[None]:
    """Stop processes with SIGSTOP; continue them at the end."""
    for instance in instances:
        assert instance.process is not None
        instance.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for instance in instances:
            assert instance.process is not None
            with suppress(ProcessLookupError):  # the watchdog timer has ended it
                instance.process.send_signal(signal.SIGCONT)


async def _freeze_shortly(instance: Instance, event_logs: Path) -> list[Span]:
    """Freeze an instance for less than a lease; return its runs, which went on."""
    async with _frozen([instance]):
        before = _under_way(event_logs, instance)
        await asyncio.sleep(LEASE / 4)
        thawed = monotonic()
    await _until(
        lambda: all(span.end > thawed for span in _again(before, read_event_logs(event_logs)))
    )
    return before


async def _end(instance: Instance) -> int:
    """Return the exit code of a process that is about to end."""
    assert instance.process is not None
    async with asyncio.timeout(10):
        return await instance.process.wait()


def _size(event_logs: Path, instance: Instance) -> int:
    """Return how much an instance's process has written into its event log."""
    return sum(path.stat().st_size for path in event_logs.glob(f"*-{instance.pid}-*"))


async def _lines_after_a_freeze(
    instance: Instance, event_logs: Path, *, held: bool
) -> list[dict[str, Any]]:
    """Freeze an instance until others run its jobs; return the lines its runs write afterwards."""
    async with _frozen_when(instance, event_logs, "inside" if held else "wrote") as before:
        since = monotonic()
        await _takeovers(before, event_logs, since)
        await asyncio.sleep(0.5)
    ends = since + HELD_LONG if held else monotonic()
    await asyncio.sleep(ends + 1 - monotonic())
    names = {(span.job, span.fence): len(span.lines) for span in before}
    return [
        line
        for span in read_event_logs(event_logs)
        if span.pid == instance.pid and (span.job, span.fence) in names
        for line in span.lines[names[span.job, span.fence] :]
    ]


@asynccontextmanager
async def _frozen_when(
    instance: Instance, event_logs: Path, line: str
) -> AsyncIterator[list[Span]]:
    """Freeze an instance as soon as this is a run's last line: idle transactions are ended soon."""
    async with asyncio.timeout(60) as limit:
        while True:
            async with _frozen([instance]):
                await asyncio.sleep(0.02)  # the signal takes a moment
                now = monotonic()
                # The work after the line is under way by then.
                if runs := [
                    span
                    for span in _under_way(event_logs, instance)
                    if _last_line(span) == line and 0.02 < now - span.end < 1
                ]:
                    limit.reschedule(None)
                    yield runs
                    return
            await asyncio.sleep(uniform(0.05, 0.1))


def _last_line(span: Span) -> str:
    return str(span.lines[-1]["what"])


def _late(rows: list[asyncpg.Record], of: set[tuple[str, int]] | None = None) -> int:
    """Count the writes that were committed after one of a later run of the same job."""
    highest: dict[str, int] = {}
    late = 0
    for job, fence in rows:
        late += fence < highest.get(job, 0) and (of is None or (job, fence) in of)
        highest[job] = max(fence, highest.get(job, 0))
    return late


def _times(seconds: list[float]) -> str:
    middle = sorted(seconds)[len(seconds) // 2]
    return f"{min(seconds):.2f} to {max(seconds):.2f} s (median {middle:.2f})"


@asynccontextmanager
async def _supervised(instances: list[Instance]) -> AsyncIterator[list[int]]:
    """Restart each instance whenever it ends; the list collects the exit codes."""
    deaths: list[int] = []

    async def keep(instance: Instance) -> None:
        while True:
            assert instance.process is not None
            deaths.append(await instance.process.wait())
            await instance.launch()

    keepers = [asyncio.create_task(keep(instance)) for instance in instances]
    try:
        yield deaths
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.wait(keepers)
