"""The network between an instance and PostgreSQL freezes, or a job blocks the event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import asyncpg

from tests.jobs.fleet import Span, overlaps, read_event_logs
from tests.jobs.proxy import Proxy
from tests.processes import FLEET, Instance, connect, empty_database, running
from tests.system.sizes import report_figures, size
from tests.system.test_outage import Probes

LEASE_SECONDS = size(small=3, full=6)
ROUNDS = size(small=2, full=15)
BLOCKING_SECONDS = size(small=8, full=20)
RUN_SECONDS = size(small=8, full=20)
# Longer than every lease of the instance, and enough for others to have taken its jobs.
SILENT_SECONDS = LEASE_SECONDS + 3
TAKES_PART_SECONDS = 30

# PostgreSQL itself records each renewal of a lease that was over.
WATCH_LEASES = """
CREATE TABLE revived (job text, fence bigint);
GRANT ALL ON revived TO PUBLIC;
CREATE FUNCTION note_revival() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO revived VALUES (new.name, new.fence);
    RETURN NULL;
END
$$;
CREATE TRIGGER revival AFTER UPDATE ON jobs FOR EACH ROW
WHEN (new.fence = old.fence AND new.lease_expires_at > old.lease_expires_at
      AND old.lease_expires_at < clock_timestamp() - interval '0.1 s')
EXECUTE FUNCTION note_revival();
"""

# Runs that do not end soon.
HAS_YOUNG_RUNS = """
SELECT count(*) > 0 FROM jobs
WHERE server = $1 AND started_at > clock_timestamp() - make_interval(secs => $2)
"""

HAS_STARTED = "SELECT count(*) > 0 FROM job_runs WHERE server = $1 AND started_at > $2"


class Round(NamedTuple):
    """An instance whose network froze and healed (monotonic times), and when it was not ready."""

    name: str
    frozen: float
    unready: float
    healed: float


async def test_jobs_stop_before_others_start_them(database: dict[str, str], tmp_path: Path) -> None:
    """An instance with a frozen network stops its runs in time, and claims again later."""
    instances, jobs = size(small=3, full=5), size(small=6, full=10)
    rounds: list[Round] = []
    lives = set()
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(
            _fleet(
                database,
                tmp_path,
                instances,
                FLEET_JOBS=str(jobs),
                FLEET_KIND="quiet,thread,paced,thread-writes",
                FLEET_SECONDS=str(RUN_SECONDS),
                FLEET_EVERY="1",
            )
        )
        connection = await connect(database)
        stack.push_async_callback(connection.close)
        await connection.execute(WATCH_LEASES)
        await _wait_for(connection, "SELECT count(*) = $1 FROM jobs WHERE holder IS NOT NULL", jobs)
        for number in range(ROUNDS):
            instance, proxy = fleet[number % instances]
            await _blink(proxy)
            await _wait_for(connection, HAS_YOUNG_RUNS, instance.name, RUN_SECONDS / 2)
            async with Probes([instance.url]) as probes:
                frozen = monotonic()
                proxy.freeze()
                unready = await probes.until(ready=False) - frozen
                await asyncio.sleep(frozen + SILENT_SECONDS - monotonic())
                healed = monotonic()
                proxy.heal()
                await probes.until(ready=True)
                await _starts_again(tmp_path, instance.name, healed)
            lives |= {sample.status for sample in probes.samples if sample.path == "/livez"}
            rounds.append(Round(instance.name, frozen, unready, healed))
        alive = _alive(fleet)
        outcomes = await _outcomes(connection)
        revived = await connection.fetch("SELECT * FROM revived")
        paused = await connection.fetch("SELECT name FROM jobs WHERE paused_at IS NOT NULL")
    spans = read_event_logs(tmp_path)
    moves = [(each, *move) for each in rounds for move in _moves(spans, each)]
    stops = [before.end - each.frozen for each, before, _ in moves]
    margins = [after.begin - before.end for _, before, after in moves]
    again = [
        min(s.begin for s in spans if s.server == each.name and s.begin > each.healed) - each.healed
        for each in rounds
    ]
    report_figures(
        f"{ROUNDS} frozen networks of {SILENT_SECONDS} s, lease {LEASE_SECONDS} s: "
        f"{len(moves)} runs stopped {min(stops):.2f} to {max(stops):.2f} s after the freeze and "
        f"began elsewhere {min(margins):.2f} to {max(margins):.2f} s after their last line; "
        f"not ready after {max(each.unready for each in rounds):.2f} s at most; "
        f"a new run {min(again):.2f} to {max(again):.2f} s after the healing; {outcomes}"
    )
    assert overlaps(spans) == []
    assert len(moves) >= ROUNDS
    assert all(before.ended for _, before, _ in moves)  # each wrote its end: none was killed
    assert alive == [None] * instances
    assert lives == {200}
    assert revived == []
    assert paused == []
    assert set(outcomes) <= {"succeeded", "released", "lost"}


async def test_without_the_watchdog_runs_overlap(database: dict[str, str], tmp_path: Path) -> None:
    """The control: runs that are not cancelled when their lease is over go on."""
    async with _fleet(
        database,
        tmp_path,
        2,
        FLEET_JOBS="2",
        FLEET_KIND="quiet",
        FLEET_SECONDS="30",
        FLEET_MUTANTS="watchdog",
    ) as fleet:
        connection = await connect(database)
        await _wait_for(connection, "SELECT bool_and(holder IS NOT NULL) FROM jobs")
        instance, proxy = fleet[0]
        proxy.freeze()
        await _wait_for(
            connection,
            "SELECT bool_and(server IS NOT NULL AND server <> $1) FROM jobs",
            instance.name,
        )
        await asyncio.sleep(1)
        await connection.close()
    assert overlaps(read_event_logs(tmp_path)) != []


async def test_late_messages_change_nothing(postgres: dict[str, str], tmp_path: Path) -> None:
    """Messages that arrive when the network heals neither revive a lease nor start a run."""
    async with (
        empty_database(postgres) as first,
        empty_database(postgres) as second,
        empty_database(postgres) as third,
    ):
        guarded, control, late_claims = await asyncio.gather(
            _revivals(first, tmp_path / "1"),
            _revivals(second, tmp_path / "2", FLEET_MUTANTS="expiry"),
            _late_claims(third, tmp_path / "3"),
        )
    report_figures(f"claims whose answer came late and that started no run: {late_claims}")
    assert guarded == []
    assert control != []
    assert late_claims > 0


async def test_blocking_jobs_keep_their_lease(database: dict[str, str], tmp_path: Path) -> None:
    """A job that sleeps or computes in the event loop keeps its lease; its instance stays up."""
    async with _fleet(
        database,
        tmp_path,
        2,
        FLEET_JOBS="4",
        FLEET_KIND="sleep,spin",
        FLEET_SECONDS=str(BLOCKING_SECONDS),
    ) as fleet:
        connection = await connect(database)
        await _wait_for(
            connection,
            "SELECT bool_and(last_outcome IS NOT DISTINCT FROM 'succeeded') FROM jobs",
            within_seconds=30 + 4 * BLOCKING_SECONDS,
        )
        alive = _alive(fleet)
        rows = await connection.fetch("SELECT * FROM job_runs WHERE fence IS NOT NULL")
        await connection.close()
    outcomes = {(row["job"], row["fence"]): row["outcome"] for row in rows}
    spans = read_event_logs(tmp_path)
    begun = [outcomes[span.job, span.fence] for span in spans]
    report_figures(
        f"{len(begun)} runs that blocked for {BLOCKING_SECONDS} s, lease {LEASE_SECONDS} s; "
        f"{len(outcomes) - len(begun)} claims were answered too late"
    )
    assert alive == [None, None]
    assert overlaps(spans) == []
    assert {span.job for span in spans} == {"job-01", "job-02", "job-03", "job-04"}
    assert set(begun) == {"succeeded"}


@asynccontextmanager
async def _fleet(
    database: dict[str, str], directory: Path, instances: int, **env: str
) -> AsyncIterator[list[tuple[Instance, Proxy]]]:
    """Run instances, each connected to the database through a proxy of its own."""
    directory.mkdir(exist_ok=True)
    settings = {
        "FLEET_EVENT_LOGS": str(directory),
        "JOB_LEASE_SECONDS": str(LEASE_SECONDS),
        "JOB_HEARTBEAT_SECONDS": str(LEASE_SECONDS / 3),
        "JOB_WARM_UP_SECONDS": "2",
        **env,
    }
    async with AsyncExitStack() as stack:
        fleet = []
        for number in range(1, instances + 1):
            proxy = await stack.enter_async_context(Proxy(database))
            instance = Instance(
                proxy.environment(),
                f"app{number}",
                log=directory.with_suffix(".log"),
                program=FLEET,
                **settings,
            )
            fleet.append((instance, proxy))
        await stack.enter_async_context(running([instance for instance, _ in fleet]))
        yield fleet


async def _revivals(database: dict[str, str], directory: Path, **env: str) -> list[Any]:
    """Freeze the only instance for longer than its lease; return the leases that were revived."""
    async with _fleet(
        database, directory, 1, FLEET_JOBS="2", FLEET_KIND="quiet", FLEET_SECONDS="30", **env
    ) as [(instance, proxy)]:
        connection = await connect(database)
        await connection.execute(WATCH_LEASES)
        await _wait_for(connection, "SELECT bool_and(holder IS NOT NULL) FROM jobs")
        await asyncio.sleep(1)
        proxy.freeze()
        await _wait_for(
            connection, "SELECT bool_and(lease_expires_at < clock_timestamp()) FROM jobs"
        )
        await asyncio.sleep(1)
        assert proxy.held() > 0
        proxy.heal()
        # It claims its jobs again, as new runs.
        await _wait_for(connection, "SELECT bool_and(fence > 1 AND holder IS NOT NULL) FROM jobs")
        assert instance.process is not None
        assert instance.process.returncode is None
        revived = await connection.fetch("SELECT * FROM revived")
        await connection.close()
    assert overlaps(read_event_logs(directory)) == []
    return revived


async def _late_claims(database: dict[str, str], directory: Path) -> int:
    """Delay answers for longer than a lease; return how many claims started no run."""
    async with _fleet(
        database,
        directory,
        1,
        FLEET_JOBS="10",
        FLEET_KIND="quiet",
        FLEET_SECONDS="0.1",
        FLEET_EVERY="1",
        # A claim's timeout is 2.5 s: longer than this lease.
        JOB_LEASE_SECONDS="1.5",
        JOB_HEARTBEAT_SECONDS="0.5",
    ) as [(instance, proxy)]:
        connection = await connect(database)
        for _ in range(size(small=3, full=20)):
            began = await connection.fetchval("SELECT clock_timestamp()")
            await _wait_for(connection, HAS_STARTED, instance.name, began)
            proxy.hold_answers()
            await asyncio.sleep(2)
            proxy.heal()
            await asyncio.sleep(1)
        assert instance.process is not None
        assert instance.process.returncode is None
        rows = await connection.fetch("SELECT job, fence FROM job_runs WHERE fence IS NOT NULL")
        await connection.close()
        await instance.stop()
    spans = read_event_logs(directory)
    assert overlaps(spans) == []
    return len({(row["job"], row["fence"]) for row in rows} - {(s.job, s.fence) for s in spans})


def _alive(fleet: Sequence[tuple[Instance, Proxy]]) -> list[int | None]:
    """Return None for each instance that has not ended."""
    return [instance.process.returncode for instance, _ in fleet if instance.process is not None]


async def _blink(proxy: Proxy) -> None:
    """Freeze a network for too short a time to lose a lease."""
    proxy.freeze()
    await asyncio.sleep(LEASE_SECONDS / 6)
    proxy.heal()


def _moves(spans: Sequence[Span], frozen: Round) -> list[tuple[Span, Span]]:
    """Return the runs of a frozen instance, each with the next run of its job elsewhere."""
    under_way = [
        span
        for span in spans
        if span.server == frozen.name and span.begin < frozen.frozen <= span.end
    ]
    moves = []
    for before in under_way:
        after = min(_later(spans, before), key=lambda span: span.begin, default=None)
        if after is not None and after.server != frozen.name:
            moves.append((before, after))
    return moves


def _later(spans: Sequence[Span], before: Span) -> list[Span]:
    return [span for span in spans if span.job == before.job and span.fence > before.fence]


async def _wait_for(
    connection: "asyncpg.Connection[asyncpg.Record]",
    condition: str,
    *arguments: object,
    within_seconds: float = TAKES_PART_SECONDS,
) -> None:
    async with asyncio.timeout(within_seconds):
        while True:
            if await connection.fetchval(condition, *arguments):
                return
            await asyncio.sleep(0.05)


async def _starts_again(directory: Path, server: str, since: float) -> None:
    """Wait until a new run executes: a claim whose answer came late starts none."""
    async with asyncio.timeout(TAKES_PART_SECONDS):
        while not any(  # noqa: ASYNC110 - lines in a file have no event
            span.server == server and span.begin > since for span in read_event_logs(directory)
        ):
            await asyncio.sleep(0.2)


async def _outcomes(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, int]:
    rows = await connection.fetch(
        "SELECT outcome, count(*) FROM job_runs"
        " WHERE outcome IS NOT NULL AND outcome <> 'skipped' GROUP BY outcome"
    )
    return {row["outcome"]: row["count"] for row in rows}
