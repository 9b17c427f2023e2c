"""Independent instances share the jobs evenly, and newcomers delay no start."""

import asyncio
import itertools
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

from tests.jobs.fleet import overlaps
from tests.jobs.jobs_db import Database, JobsDatabase, end, jobs_db
from tests.processes import Instance, running
from tests.system.sizes import FULL, report_figures, size

LIGHT_EVERY = size(small=25, full=50) / 10
LIGHT_RUNS = 60
# On a busy machine instances wake up later than the default tie break lasts.
TIE: dict[str, str] = {} if FULL else {"FLEET_TIE_BREAK": "0.08"}

SKEW_SECONDS = 1.5
# The warm-up must exceed the skew. Whole programs take seconds for their imports on a busy
# machine, some longer than others.
FORKED_WARM_UP, PROGRAM_WARM_UP = 5, 12  # 5 is the default
# For tests that do not check how a start is shared.
SHORT_WARM_UP = 3
# Concurrent starts; each mostly waits.
AT_ONCE = 2

# The time between the first and the last of the latest $1 starts, by the database's clock.
SKEW = """
SELECT extract(epoch FROM max(started_at) - min(started_at))::float8
FROM (SELECT started_at FROM instances ORDER BY started_at DESC LIMIT $1) AS latest
"""

NOW = "SELECT clock_timestamp()"

# The delay of the first attempt of each tick since then.
LATE = """
SELECT extract(epoch FROM started_at - due_at)::float8
FROM job_runs WHERE fence IS NOT NULL AND attempt = 0 AND started_at > $1
"""

OUTCOMES = """
SELECT coalesce(outcome, 'under way'), sum(ticks)::int FROM job_runs WHERE started_at > $1
GROUP BY 1 ORDER BY 1
"""

# All jobs become ready some time after the first instance has started.
DUE_AFTER_BOOT = """
UPDATE jobs SET anchor_at = at, due_at = at, ready_at = at, startup_marked_at = NULL
FROM (SELECT min(started_at) + $1::interval AS at FROM instances) AS boot
"""

IS_UP = "SELECT FROM instances"

NOTHING_RUNS = "SELECT WHERE NOT EXISTS (SELECT FROM jobs WHERE holder IS NOT NULL)"

# All jobs become due one after another at equal distances, beginning in 3 s.
STAGGER = """
UPDATE jobs SET anchor_at = at, due_at = at, ready_at = at FROM (
    SELECT name, now() + interval '3 s' + $1::interval * row_number() OVER (ORDER BY number) AS at
    FROM jobs
) AS staggered
WHERE jobs.name = staggered.name
"""


# -- a simultaneous start ---------------------------------------------------------------------


@dataclass
class Start:
    """The course of a simultaneous start."""

    kind: str
    loads: list[int]
    # the time between the first and the last instance's start, and the warm-up
    skew: float
    warm_up: float
    # from the last instance's start to the last job's start
    took: float
    overlaps: int

    @property
    def difference(self) -> int:
        return max(self.loads) - min(self.loads)

    @property
    def counts(self) -> bool:
        """Whether all instances started within the warm-up."""
        return self.skew < self.warm_up


async def start_together(
    where: JobsDatabase, instances: list[Instance], jobs: int, kind: str, warm_up: float
) -> Start:
    """Launch instances within the skew; wait until all jobs run, and a moment longer."""

    async def launch(instance: Instance) -> None:
        await asyncio.sleep(random.uniform(0, SKEW_SECONDS))
        await instance.launch()
        await instance.ready()

    begun = monotonic()
    await asyncio.gather(*map(launch, instances))
    ready = monotonic()
    await where.until(jobs, begun)
    await asyncio.sleep(0.5)
    spans = where.spans(begun)
    assert len(spans) == jobs, f"{len(spans)} runs of {jobs} jobs"
    loads = Counter(span.server for span in spans)
    return Start(
        kind=kind,
        loads=sorted((loads[instance.name] for instance in instances), reverse=True),
        skew=(await where.value(SKEW, len(instances))),
        warm_up=warm_up,
        took=spans[-1].begin - ready,
        overlaps=len(overlaps(where.spans())),
    )


async def cold_and_warm(
    where: JobsDatabase, count: int, jobs: int, *, forked: bool, stop_signal: int, **env: str
) -> list[Start]:
    """Start instances on an empty database, stop them with a signal while all jobs run, restart."""
    what = f"{jobs} jobs on {count}"
    warm_up = FORKED_WARM_UP if forked else PROGRAM_WARM_UP
    env = {
        "FLEET_JOBS": f"{jobs}",
        "FLEET_SECONDS": "600",
        "JOB_WARM_UP_SECONDS": f"{warm_up}",
        **env,
    }
    instances = where.instances(count, env, forked=forked)
    try:
        cold = await start_together(where, instances, jobs, f"{what}, cold", warm_up)
        await asyncio.sleep(random.uniform(0, 3))  # at any age of the leases
        await end(instances, stop_signal)
        # The leases have expired long ago, or expire while the instances start.
        await asyncio.sleep(
            random.choice([0, 1, 2, 3, 4, 8]) if stop_signal == signal.SIGKILL else 0
        )
        name = f"{what}, warm after {signal.Signals(stop_signal).name}"
        return [cold, await start_together(where, instances, jobs, name, warm_up)]
    finally:
        await end(instances)


def report_starts(starts: list[Start]) -> None:
    for kind in sorted({start.kind for start in starts}):
        mine = [start for start in starts if start.kind == kind]
        differences = Counter(start.difference for start in mine)
        report_figures(
            f"{kind}: {len(mine)} starts, differences "
            f"{', '.join(f'{what} x {times}' for what, times in sorted(differences.items()))}; "
            f"skew up to {max(start.skew for start in mine):.2f} s, "
            f"all run at most {max(start.took for start in mine):.2f} s after the last is ready"
        )
    for start in starts:
        if start.difference > 1:
            report_figures(f"uneven: {start}")


async def test_instances_that_start_together_share_the_jobs(
    postgres: Database, tmp_path: Path
) -> None:
    """After a cold or warm start, a stop or a kill, the instances' loads differ by at most 1."""
    plans = (
        [(5, 10)] * size(small=1, full=50)
        + [(5, 7)] * size(small=1, full=13)
        + [(7, 23)] * size(small=1, full=13)
    )
    gate = asyncio.Semaphore(AT_ONCE)
    beyond: list[Start] = []

    async def one(turn: int, count: int, jobs: int) -> list[Start]:
        # Even shares are promised for instances that start within the warm-up.
        while len(beyond) <= len(plans):
            async with gate, jobs_db(postgres, tmp_path) as where:
                starts = await cold_and_warm(
                    where,
                    count,
                    jobs,
                    # Some are whole programs with their imports.
                    forked=turn % 4 != 1,
                    stop_signal=(signal.SIGKILL, signal.SIGTERM)[turn % 2],
                )
            if all(start.counts for start in starts):
                return starts
            beyond.extend(start for start in starts if not start.counts)
        raise AssertionError("the machine is too busy")

    done = await asyncio.gather(*(one(turn, *plan) for turn, plan in enumerate(plans)))
    starts = list(itertools.chain(*done))
    report_starts(starts)
    report_figures(f"not counted because of too much skew: {beyond}")
    assert [start for start in starts if start.overlaps] == []
    assert [start for start in starts if start.difference > 1] == []


async def test_jobs_that_become_due_during_the_warm_up_are_shared_evenly(
    postgres: Database, tmp_path: Path
) -> None:
    """Also when the first instance has warmed up and the last has not.

    And without delay: their startup was marked long before they were due.
    """
    warm_up = FORKED_WARM_UP
    async with jobs_db(postgres, tmp_path) as where:
        instances = where.instances(
            5, {"FLEET_SECONDS": "600", "JOB_WARM_UP_SECONDS": f"{warm_up}"}
        )
        try:
            await instances[0].launch()
            await instances[0].ready()
            await where.until_fact(IS_UP)
            await where.rows(DUE_AFTER_BOOT, timedelta(seconds=warm_up + 0.7))
            begun = monotonic()
            await asyncio.sleep(1)
            for instance in instances[1:]:
                await instance.launch()
            spans = await where.until(10)
        finally:
            await end(instances)
        late = await where.column(LATE, datetime.min.replace(tzinfo=UTC))
    loads = Counter(span.server for span in spans)
    report_figures(f"loads {sorted(loads.values())}, the last {max(late):.2f} s late")
    assert spans[0].begin > begun, "they were due too early"
    assert sorted(loads.values()) == [2] * 5
    assert max(late) < warm_up


async def test_a_start_soon_after_a_start(postgres: Database, tmp_path: Path) -> None:
    """Startup marks of instances that are dead by now do not count."""
    warm_up = FORKED_WARM_UP
    async with jobs_db(postgres, tmp_path) as where:
        instances = where.instances(
            5, {"FLEET_SECONDS": "600", "JOB_WARM_UP_SECONDS": f"{warm_up}"}
        )
        try:
            await instances[0].launch()
            await asyncio.sleep(2.5)
            for instance in instances[1:]:
                await instance.launch()
            await where.until(10)
            # The later ones are still warming up while all jobs run; then all are killed.
            await asyncio.sleep(1.8)
            await end(instances)
            await asyncio.sleep(warm_up)
            start = await start_together(where, instances, 10, "soon after a start", warm_up)
        finally:
            await end(instances)
    report_starts([start])
    assert start.counts, "the machine is too busy"
    assert start.difference <= 1


async def test_without_the_claim_policy_the_first_instance_takes_all(
    postgres: Database, tmp_path: Path
) -> None:
    """The control: each due job is claimed at once, and the shares are uneven."""
    async with jobs_db(postgres, tmp_path) as where:
        starts = await cold_and_warm(
            where, 5, 10, forked=True, stop_signal=signal.SIGTERM, FLEET_MUTANTS="policy"
        )
    report_figures("; ".join(f"{start.kind}: {start.loads}" for start in starts))
    assert [start for start in starts if start.difference <= 1] == []


# -- light load -------------------------------------------------------------------------------


async def light_load(where: JobsDatabase, *, stagger: bool, **env: str) -> list[int]:
    """Let five instances run ten short jobs repeatedly; return the runs of each instance."""
    every = LIGHT_EVERY
    env = {
        "FLEET_EVERY": f"{every}",
        "FLEET_SECONDS": f"{every / 25}",
        "JOB_WARM_UP_SECONDS": f"{SHORT_WARM_UP}",
        **env,
    }
    instances = where.instances(5, env)
    async with running(instances):
        await where.until(10)
        await where.until_fact(NOTHING_RUNS)
        await where.rows(STAGGER, timedelta(seconds=every / 10 if stagger else 0))
        begun = monotonic()
        spans = (await where.until(LIGHT_RUNS, begun))[:LIGHT_RUNS]
        assert overlaps(where.spans()) == []
    loads = Counter(span.server for span in spans)
    return sorted((loads[instance.name] for instance in instances), reverse=True)


async def test_light_load_is_shared_evenly(postgres: Database, tmp_path: Path) -> None:
    """Short runs, due together or one after another; without rounds the shares are uneven."""
    async with AsyncExitStack() as stack:
        grounds = [await stack.enter_async_context(jobs_db(postgres, tmp_path)) for _ in range(3)]
        together, staggered, control = await asyncio.gather(
            light_load(grounds[0], stagger=False, **TIE),
            light_load(grounds[1], stagger=True, **TIE),
            light_load(grounds[2], stagger=True, FLEET_TIE_BREAK="0"),
        )
    report_figures(f"{LIGHT_RUNS} runs due together: {together}, one after the other: {staggered}")
    report_figures(f"one after the other, without rounds: {control}")
    assert together[0] - together[-1] <= 2
    assert staggered[0] - staggered[-1] <= 2
    assert control[0] - control[-1] > 2


# -- a newcomer in a crash loop ---------------------------------------------------------------


@asynccontextmanager
async def crash_loop(where: JobsDatabase, env: dict[str, str]) -> AsyncIterator[list[Instance]]:
    """Start an instance every second, and kill it as soon as it is ready or a little later."""
    born: list[Instance] = []

    async def live(instance: Instance) -> None:
        await instance.launch()
        await instance.ready()
        await asyncio.sleep(random.uniform(0.1, 0.6))
        await instance.kill()

    async def loop() -> None:
        async with asyncio.TaskGroup() as lives:
            while not stopping.is_set():
                instance = where.instances(1, env, name="newcomer")[0]
                born.append(instance)
                lives.create_task(live(instance))
                await asyncio.sleep(1)

    stopping = asyncio.Event()
    task = asyncio.create_task(loop())
    try:
        yield born
    finally:
        stopping.set()
        await task


async def lateness(where: JobsDatabase, seconds: float, **env: str) -> list[float]:
    """Return the delays of starts on three warmed-up instances, with a newcomer every second."""
    warm_up = {"JOB_WARM_UP_SECONDS": f"{SHORT_WARM_UP}"}
    env = {"FLEET_EVERY": "2", "FLEET_SECONDS": "0.1", **warm_up, **env}
    async with running(where.instances(3, env)):
        await where.until(10)
        await where.until_fact(NOTHING_RUNS)
        await where.rows(STAGGER, timedelta(seconds=0.2))
        await asyncio.sleep(2.5)
        begun = await where.value(NOW)
        async with crash_loop(where, env) as born:
            await asyncio.sleep(seconds)
        late = sorted(await where.column(LATE, begun))
        report_figures(f"{len(born)} newcomers, {dict(await where.rows(OUTCOMES, begun))}")
        assert overlaps(where.spans()) == []
    return late


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def test_crashing_newcomers_delay_no_job(postgres: Database, tmp_path: Path) -> None:
    """An instance in a crash loop delays no job on warmed-up instances."""
    async with jobs_db(postgres, tmp_path) as where:
        late = await lateness(where, size(small=8, full=30))
    async with jobs_db(postgres, tmp_path) as where:
        control = await lateness(where, 8, FLEET_MUTANTS="newcomers")
    report_figures(
        f"{len(late)} starts late by p50 {quantile(late, 0.5) * 1000:.1f} ms, "
        f"p99 {quantile(late, 0.99) * 1000:.1f} ms, at most {late[-1] * 1000:.1f} ms; "
        f"where any newcomer restarts the warm-up: {len(control)} starts"
    )
    # An instance that still runs a job backs off from the next one by a step of 0.23 s.
    assert quantile(late, 0.99) < size(small=2000, full=500) / 1000
    assert len(control) < len(late) / 2


async def test_crashing_newcomers_delay_no_cold_start(postgres: Database, tmp_path: Path) -> None:
    """Instances that start among crashing newcomers wait for one warm-up only.

    Without the guard that the startup is marked once, they wait for as long as newcomers start.
    """

    async def start(**env: str) -> list[float]:
        env = {"FLEET_SECONDS": "600", "JOB_WARM_UP_SECONDS": f"{SHORT_WARM_UP}", **env}
        async with (
            jobs_db(postgres, tmp_path) as where,
            crash_loop(where, env),
            running(where.instances(3, env)),
        ):
            ready = monotonic()
            await asyncio.sleep(8)
            first: dict[str, float] = {}
            for span in where.spans():
                first.setdefault(span.job, span.begin - ready)
            return list(first.values())

    guarded, control = await asyncio.gather(start(), start(FLEET_MUTANTS="once"))
    report_figures(
        f"the last began {max(guarded):.2f} s after the last instance was ready; control: {control}"
    )
    assert len(guarded) == 10
    assert control == []
