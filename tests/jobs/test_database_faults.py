"""PostgreSQL restarts or is unavailable while jobs run; clocks of instances are wrong."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

import asyncpg

from balance_app.local.postgres import EmbeddedPostgres
from tests.jobs.fleet import Span, overlaps, read_event_logs
from tests.processes import Instance, connect, http_client, running
from tests.system.databases import own_postgres
from tests.system.sizes import report_figures, size
from tests.system.test_outage import Probes

INSTANCES = size(small=3, full=5)
JOBS = size(small=6, full=10)
RESTARTS = size(small=2, full=10)
OUTAGE_SECONDS = size(small=8, full=60)
OUTAGE_LEASE_SECONDS = size(small=3, full=6)
UNAVAILABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
KILLS = size(small=2, full=10)
SETTLING_SECONDS = 2
# From the end of an outage, or a kill, until every job runs again.
BOUND_SECONDS = 25

KINDS = "paced,quiet,thread,thread-writes"

# Each job either waits, or runs with a renewed lease on an instance with recent heartbeats.
STATES = """
SELECT name, fence, holder IS NOT NULL AS runs, paused_at IS NOT NULL AS paused,
       extract(epoch FROM clock_timestamp() - claimable_at)::float8 AS since,
       extract(epoch FROM lease_expires_at - instances.last_heartbeat_at)::float8 AS unseen
FROM jobs LEFT JOIN instances ON instances.id = holder
"""

# Shifts the wall clock of Python where there is no library that shifts that of the process.
SHIFTED = """
import datetime, os, runpy, time

real, seconds, nanoseconds = datetime.datetime, time.time, time.time_ns
shift = float(os.environ["FLEET_SHIFT"])


class AlsoReal(type):
    def __instancecheck__(cls, value):
        return isinstance(value, real)


class Shifted(real, metaclass=AlsoReal):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=shift)

    @classmethod
    def utcnow(cls):
        return real.utcnow() + datetime.timedelta(seconds=shift)


datetime.datetime = Shifted
time.time = lambda: seconds() + shift
time.time_ns = lambda: nanoseconds() + int(shift * 10**9)
runpy.run_module("tests.jobs.fleet", run_name="__main__", alter_sys=True)
"""

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


async def test_jobs_outlive_restarts(tmp_path: Path) -> None:
    """After a restart of the database every job runs again soon; a fast restart loses no run."""
    back_seconds: dict[str, list[float]] = {"fast": [], "immediate": []}
    lost = Counter[str]()
    async with own_postgres(max_connections="200") as server:
        database = server.environment()
        instances = _fleet(database, tmp_path, {"FLEET_SECONDS": "2", "FLEET_EVERY": "1"})
        async with running(instances), Watch(database, lease_seconds=6) as watch:
            await _all_run(tmp_path, monotonic())
            for _ in range(RESTARTS):
                for name, mode in (("fast", signal.SIGINT), ("immediate", signal.SIGQUIT)):
                    await asyncio.sleep(random.uniform(1.5, 3))
                    before = (await _outcomes(database))["lost"]
                    await server.stop(mode=mode)
                    await server.start()
                    back = monotonic()
                    back_seconds[name].append(await _all_run(tmp_path, back) - back)
                    lost[name] += (await _outcomes(database))["lost"] - before
            outcomes = await _outcomes(database)
            alive = _alive(instances)
    spans = read_event_logs(tmp_path)
    report_figures(
        f"{RESTARTS} fast and {RESTARTS} immediate restarts: all {JOBS} jobs run again within "
        f"{max(back_seconds['fast']):.2f} and {max(back_seconds['immediate']):.2f} s, "
        f"lost in them {lost['fast']} and {lost['immediate']}; {dict(outcomes)}; {watch.figures()}"
    )
    assert overlaps(spans) == []
    assert watch.complaints == []
    assert lost["fast"] == 0
    assert set(outcomes) <= {"succeeded", "released", "lost"}
    assert outcomes["succeeded"] > 0
    assert alive == [None] * INSTANCES


async def test_jobs_outlive_an_outage(tmp_path: Path) -> None:
    """Runs end before their leases during an outage; the jobs run again after it."""
    async with own_postgres(max_connections="200") as server:
        database = server.environment()
        instances = _fleet(
            database,
            tmp_path,
            {
                "FLEET_SECONDS": "600",
                "JOB_LEASE_SECONDS": str(OUTAGE_LEASE_SECONDS),
                "JOB_HEARTBEAT_SECONDS": str(OUTAGE_LEASE_SECONDS / 3),
            },
        )
        async with (
            running(instances),
            Probes([instance.url for instance in instances]) as probes,
            Watch(database, lease_seconds=OUTAGE_LEASE_SECONDS) as watch,
        ):
            await _all_run(tmp_path, monotonic())
            await server.stop()
            gone = monotonic()
            not_ready = await probes.until(ready=False) - gone
            meanwhile = {await _withdraw(instance) for instance in instances}
            await asyncio.sleep(gone + OUTAGE_SECONDS - monotonic())
            await server.start()
            back = monotonic()
            ready = await probes.until(ready=True) - back
            afterwards = {await _withdraw(instance) for instance in instances}
            again = await _all_run(tmp_path, back) - back
            await asyncio.sleep(2)
            outcomes = await _outcomes_by_run(database)
            alive = _alive(instances)
    spans = read_event_logs(tmp_path)
    stopped = [span for span in spans if span.begin < gone]
    last = max(span.end for span in stopped) - gone
    report_figures(
        f"outage of {OUTAGE_SECONDS} s, lease {OUTAGE_LEASE_SECONDS} s: the last of {len(stopped)} "
        f"runs wrote its last line after {last:.2f} s, not ready after {not_ready:.2f} s; "
        f"after the outage ready in {ready:.2f} s, all {JOBS} jobs run again in {again:.2f} s; "
        f"{watch.figures()}"
    )
    assert overlaps(spans) == []
    assert last < OUTAGE_LEASE_SECONDS
    assert [span for span in spans if gone + OUTAGE_LEASE_SECONDS < span.begin < back] == []
    assert watch.complaints == []
    assert Counter(outcomes[span.job, span.fence] for span in stopped) == {"released": JOBS}
    assert "lost" not in outcomes.values()
    assert (meanwhile, afterwards) == ({503}, {200})
    assert {sample.status for sample in probes.samples if sample.path == "/livez"} == {200}
    assert alive == [None] * INSTANCES


async def test_without_the_watchdog_an_outage_overlaps(tmp_path: Path) -> None:
    """The control: runs that outlive their lease are found, and so are unclaimed jobs."""
    async with own_postgres(max_connections="200") as server:
        database = server.environment()
        instances = _fleet(
            database,
            tmp_path,
            {
                "FLEET_KIND": "quiet",
                "FLEET_SECONDS": "600",
                "FLEET_MUTANTS": "watchdog",
                "JOB_LEASE_SECONDS": "3",
                "JOB_HEARTBEAT_SECONDS": "1",
            },
            instances=2,
        )
        async with Watch(database, lease_seconds=3) as watch:
            async with running(instances):
                await _all_run(tmp_path, monotonic())
                await server.stop()
                await asyncio.sleep(4)
                await server.start()
                await _overlaps(tmp_path)
                assert watch.complaints == []
                for instance in instances:
                    await instance.kill()
            async with asyncio.timeout(BOUND_SECONDS):
                await watch.complained.wait()
    assert overlaps(read_event_logs(tmp_path)) != []


async def test_wrong_clocks_decide_nothing(tmp_path: Path) -> None:
    """Instances an hour ahead or behind neither take held jobs nor miss claimable ones."""
    async with own_postgres(max_connections="300") as server:
        fleets = {"interpreter": _shifted_by_interpreter, "library": _shifted_by_library}
        if not LIBRARIES:
            del fleets["library"]
        databases = {name: await _database(server, name) for name in (*fleets, "control")}
        control, _ = await asyncio.gather(
            _own_clock(databases["control"], tmp_path / "control"),
            asyncio.gather(
                *(
                    _wrong_clocks(databases[name], tmp_path / name, shift, name)
                    for name, shift in fleets.items()
                )
            ),
        )
    assert control != []


async def _wrong_clocks(
    database: dict[str, str], directory: Path, shift: "Shift", name: str
) -> None:
    """Run instances, two of which have clocks an hour off, and kill some."""
    instances = [
        shift(database, directory, "app1", 3600),
        shift(database, directory, "app2", -3600),
        *_fleet(database, directory, CLOCK_SETTINGS, instances=INSTANCES - 2, first=3),
    ]
    again = []
    async with running(instances), Watch(database, lease_seconds=3) as watch:
        for instance, hours in zip(instances, (1, -1, 0), strict=False):
            assert abs(await _hours_off(instance) - hours) < 0.1
        await _all_run(directory, monotonic())
        for number in range(KILLS):
            # First one with a right clock: the others take over its jobs, neither early nor never.
            instance = instances[(2 + number) % INSTANCES]
            await instance.kill()
            killed = monotonic()
            again.append(await _all_run(directory, killed) - killed)
            await instance.launch()
            await instance.ready()
            # A job that is lost three times in a row would be quarantined.
            await asyncio.sleep(size(small=0, full=5))
        outcomes = await _outcomes(database)
    spans = await asyncio.to_thread(read_event_logs, directory)
    report_figures(
        f"clocks shifted by {name}: {len(spans)} runs, after {KILLS} kills all jobs ran again "
        f"within {max(again):.2f} s; {dict(outcomes)}; {watch.figures()}"
    )
    assert overlaps(spans) == []
    assert watch.complaints == []
    assert set(outcomes) <= {"succeeded", "lost", "released"}
    assert {span.server for span in spans} == {instance.name for instance in instances}


async def _own_clock(database: dict[str, str], directory: Path) -> list[tuple[Span, Span]]:
    """The control: return the overlaps when an instance decides by its own clock."""
    own = {**CLOCK_SETTINGS, "FLEET_MUTANTS": "own-clock", "FLEET_SHIFT": "3600"}
    instances = [
        *_fleet(database, directory, CLOCK_SETTINGS, instances=1),
        *_fleet(database, directory, own, instances=1, first=2),
    ]
    async with running(instances):
        return await _overlaps(directory)


class Watch:
    """Reads the jobs' rows every second, and records stranded jobs."""

    def __init__(self, database: dict[str, str], *, lease_seconds: float) -> None:
        self.complaints: list[str] = []
        self.complained = asyncio.Event()
        self._database = database
        # how long a job may be ready or lost, also when an instance was cut off for a moment
        self._longest_ready = lease_seconds + SETTLING_SECONDS + 6
        self._longest_over = 6.0
        self._lease_seconds = lease_seconds
        self._polls = 0
        self._ready = self._over = 0.0
        self._ended: set[tuple[str, int]] = set()
        self._task: asyncio.Task[None] | None = None

    def figures(self) -> str:
        return (
            f"{self._polls} reads of the rows, ready for {self._ready:.1f} s and over for "
            f"{self._over:.1f} s at most"
        )

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _poll(self) -> None:
        while True:
            with suppress(*UNAVAILABLE):
                connection = await connect(self._database)
                try:
                    await self._poll_while_it_answers(connection)
                finally:
                    connection.terminate()
            await asyncio.sleep(0.2)

    async def _poll_while_it_answers(
        self, connection: "asyncpg.Connection[asyncpg.Record]"
    ) -> None:
        began = monotonic()
        while True:
            if await connection.fetchval("SELECT to_regclass('instances') IS NOT NULL"):
                rows = await connection.fetch(STATES)
                self._polls += 1
                # Time without the database does not count as waiting for an instance.
                self._check(rows, monotonic() - began)
            await asyncio.sleep(1)

    def _check(self, rows: Iterable[asyncpg.Record], up_seconds: float) -> None:
        for name, fence, runs, paused, since, unseen in rows:
            if paused:
                self._record(f"{name} is paused")
                continue
            waited = min(since, up_seconds)
            if not runs:
                self._ready = max(self._ready, waited)
                if waited > self._longest_ready:
                    self._record(f"{name} has been ready for {waited:.1f} s")
                continue
            self._over = max(self._over, waited)
            if waited > self._longest_over:
                self._record(f"the lease of {name} has been over for {waited:.1f} s")
            if since > 0:
                self._ended.add((name, fence))
            elif (name, fence) in self._ended:
                self._record(f"the lease of {name} ({fence}) was over and was revived")
            # After an outage an instance may claim before its first heartbeat.
            if unseen is not None and unseen > 2 * self._lease_seconds and up_seconds > 4:
                self._record(f"{name} is held by an instance without recent heartbeats")

    def _record(self, sentence: str) -> None:
        self.complaints.append(sentence)
        self.complained.set()


def _fleet(
    database: dict[str, str],
    directory: Path,
    env: dict[str, str],
    *,
    instances: int = INSTANCES,
    first: int = 1,
) -> list[Instance]:
    return [
        _instance(database, directory, f"app{number}", env)
        for number in range(first, first + instances)
    ]


def _instance(
    database: dict[str, str],
    directory: Path,
    name: str,
    env: dict[str, str],
    program: tuple[str, str] = ("-m", "tests.jobs.fleet"),
) -> Instance:
    directory.mkdir(exist_ok=True)
    settings = {
        "FLEET_EVENT_LOGS": str(directory),
        "FLEET_JOBS": str(JOBS),
        "FLEET_KIND": KINDS,
        "JOB_WARM_UP_SECONDS": str(SETTLING_SECONDS),
        **env,
    }
    return Instance(database, name, log=directory.with_suffix(".log"), program=program, **settings)


CLOCK_SETTINGS = {
    # not for jobs in threads: the library breaks time.sleep()
    "FLEET_KIND": "paced,quiet",
    "FLEET_SECONDS": "3",
    "FLEET_EVERY": "1",
    "JOB_LEASE_SECONDS": "3",
    "JOB_HEARTBEAT_SECONDS": "1",
}


class Shift(Protocol):
    def __call__(
        self, database: dict[str, str], directory: Path, name: str, seconds: int
    ) -> Instance: ...


def _shifted_by_interpreter(
    database: dict[str, str], directory: Path, name: str, seconds: int
) -> Instance:
    """Return an instance in which Python's wall clock is wrong."""
    shift = {**CLOCK_SETTINGS, "FLEET_SHIFT": str(seconds)}
    return _instance(database, directory, name, shift, ("-c", SHIFTED))


def _shifted_by_library(
    database: dict[str, str], directory: Path, name: str, seconds: int
) -> Instance:
    """Return an instance in which the C library's wall clock is wrong."""
    shift = {
        **CLOCK_SETTINGS,
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME": f"{seconds:+}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    return _instance(database, directory, name, shift)


async def _hours_off(instance: Instance) -> float:
    """Return the error of an instance's clock in hours, by the dates of its answers."""
    async with http_client(timeout=10) as http:
        answer = await http.get(f"{instance.url}/livez")
    off = parsedate_to_datetime(answer.headers["Date"]) - datetime.now(UTC)
    return off.total_seconds() / 3600


async def _database(server: EmbeddedPostgres, name: str) -> dict[str, str]:
    connection = await connect(server.environment())
    await connection.execute(f'CREATE DATABASE "{name}"')
    await connection.close()
    return {**server.environment(), "DB_NAME": name}


async def _all_run(directory: Path, since: float) -> float:
    """Wait until every job runs again after a moment; return when the last one did."""
    async with asyncio.timeout(BOUND_SECONDS):
        while True:
            spans = await asyncio.to_thread(read_event_logs, directory)
            first: dict[str, float] = {}
            for span in spans:
                for line in span.lines if span.end > since else ():
                    if line["at"] > since and line["what"] in {"start", "tick"}:
                        first[span.job] = min(line["at"], first.get(span.job, line["at"]))
            if len(first) == JOBS:
                return max(first.values())
            await asyncio.sleep(0.2)


async def _overlaps(directory: Path) -> list[tuple[Span, Span]]:
    """Wait until runs overlap; return the pairs."""
    async with asyncio.timeout(BOUND_SECONDS):
        while True:
            found = overlaps(await asyncio.to_thread(read_event_logs, directory))
            if found:
                return found
            await asyncio.sleep(0.2)


async def _withdraw(instance: Instance) -> int:
    async with http_client(timeout=10) as http:
        answer = await http.post(f"{instance.url}/api/balance", json={"userId": 1, "amount": -1})
    return answer.status_code


async def _outcomes_by_run(database: dict[str, str]) -> dict[tuple[str, int], str | None]:
    connection = await connect(database)
    rows = await connection.fetch("SELECT * FROM job_runs WHERE fence IS NOT NULL")
    await connection.close()
    return {(row["job"], row["fence"]): row["outcome"] for row in rows}


async def _outcomes(database: dict[str, str]) -> Counter[str]:
    return Counter(filter(None, (await _outcomes_by_run(database)).values()))


def _alive(instances: Iterable[Instance]) -> list[int | None]:
    """Return None for each instance that has not ended."""
    return [instance.process.returncode for instance in instances if instance.process is not None]
