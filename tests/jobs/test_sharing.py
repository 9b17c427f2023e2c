"""Copies that know nothing of each other share the jobs evenly, and newcomers delay nobody."""

import asyncio
import itertools
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import pytest

from tests.jobs.fleet import Span, overlaps, read_diaries
from tests.jobs.nursery import Nursery, nursery
from tests.processes import Copy, connect, running
from tests.system.sizes import size, tell

Database = dict[str, str]

SKEW_SECONDS = 1.5
SETTLING_SECONDS = 5.0  # the default
# Starts under way at a time; most of each is waiting.
AT_ONCE = 2

# Runs in the order of their start: what each waited for, by the clock of the database.
STARTS = """
SELECT extract(epoch FROM started_at - due_at)::float8 AS late, attempt, server, outcome
FROM job_runs WHERE fence IS NOT NULL ORDER BY id
"""

# Whatever waits is due one after the other, evenly, from some seconds on.
STAGGER = """
UPDATE jobs SET anchor_at = at, due_at = at, ready_at = at FROM (
    SELECT name, now() + interval '3 s' + $1 * (row_number() OVER (ORDER BY number))::int AS at
    FROM jobs
) AS staggered
WHERE jobs.name = staggered.name
"""


@pytest.fixture(scope="module")
async def nest() -> AsyncIterator[Nursery]:
    async with nursery() as running_nursery:
        yield running_nursery


@dataclass
class Ground:
    """An empty database, and a directory for the diaries of the copies that use it."""

    nest: Nursery
    database: Database
    directory: Path

    def copies(self, count: int, *, forked: bool = True, **env: str) -> list[Copy]:
        names = [f"app{number}" for number in range(1, count + 1)]
        env = {"FLEET_DIARY": str(self.diaries), "JOB_SETTLING_SECONDS": "3", **env}
        if forked:
            return [self.nest.copy(self.database, name, self.log, **env) for name in names]
        program = ("-m", "tests.jobs.fleet")
        return [Copy(self.database, name, log=self.log, program=program, **env) for name in names]

    @property
    def diaries(self) -> Path:
        return self.directory / "diaries"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def spans(self, since: float = 0) -> list[Span]:
        return [span for span in read_diaries(self.diaries) if span.begin >= since]

    async def until(
        self, spans: int, since: float = 0, *, within_seconds: float = 60
    ) -> list[Span]:
        """Wait for that many runs to begin; return them."""
        async with asyncio.timeout(within_seconds):
            while len(found := self.spans(since)) < spans:
                await asyncio.sleep(0.1)
        return found

    async def rows(self, sql: str, *arguments: object) -> list[tuple[object, ...]]:
        connection = await connect(self.database)
        try:
            return [tuple(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()


_numbers = itertools.count(1)


@asynccontextmanager
async def ground(postgres: Database, nest: Nursery, top: Path) -> AsyncIterator[Ground]:
    number = next(_numbers)
    name = f"test_sharing_{top.name}_{number}".replace("-", "_").lower()
    admin = await connect(postgres)
    await admin.execute(f'CREATE DATABASE "{name}"')
    directory = top / str(number)
    (directory / "diaries").mkdir(parents=True)
    try:
        yield Ground(nest, {**postgres, "DB_NAME": name}, directory)
    finally:
        await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await admin.close()


# -- a simultaneous start ---------------------------------------------------------------------


@dataclass
class Start:
    """A simultaneous start, as it went."""

    kind: str
    loads: list[int]
    # between the first and the last copy that was ready
    skew: float
    # from the last copy's launch to the last job's start
    took: float
    overlaps: int

    @property
    def difference(self) -> int:
        return max(self.loads) - min(self.loads)


async def start_together(where: Ground, copies: list[Copy], jobs: int, kind: str) -> Start:
    """Launch copies within the skew; wait until all jobs run, and somewhat longer."""

    async def launch(copy: Copy) -> float:
        await asyncio.sleep(random.uniform(0, SKEW_SECONDS))
        await copy.launch()
        await copy.ready()
        return monotonic()

    begun = monotonic()
    ready = await asyncio.gather(*(launch(copy) for copy in copies))
    spans = await where.until(jobs, begun)
    await asyncio.sleep(0.5)
    spans = where.spans(begun)
    assert len(spans) == jobs, f"{len(spans)} runs of {jobs} jobs"
    loads = Counter(span.server for span in spans)
    return Start(
        kind=kind,
        loads=sorted((loads[copy.name] for copy in copies), reverse=True),
        skew=max(ready) - min(ready),
        took=spans[-1].begin - max(ready),
        overlaps=len(overlaps(where.spans())),
    )


async def end(copies: Iterable[Copy], number: int = signal.SIGKILL) -> None:
    await asyncio.gather(*(copy.stop(number) for copy in copies if copy.process is not None))


async def cold_and_warm(
    where: Ground, count: int, jobs: int, *, forked: bool, ending: int, **env: str
) -> list[Start]:
    """Start copies on an empty database; end them with that signal while all jobs run; again."""
    env = {
        "FLEET_JOBS": str(jobs),
        "FLEET_SECONDS": "600",
        "JOB_SETTLING_SECONDS": f"{SETTLING_SECONDS}",
        **env,
    }
    what = f"{jobs} jobs on {count}"
    copies = where.copies(count, forked=forked, **env)
    try:
        cold = await start_together(where, copies, jobs, f"{what}, cold")
        await end(copies, ending)
        # Leases that ran out long ago, or that run out while the copies come up.
        await asyncio.sleep(random.choice([0, 2, 4, 8]) if ending == signal.SIGKILL else 0)
        name = f"{what}, warm after {signal.Signals(ending).name}"
        return [cold, await start_together(where, copies, jobs, name)]
    finally:
        await end(copies)


async def at_most_at_once(
    most: int, tasks: Iterable[Callable[[], Awaitable[list[Start]]]]
) -> list[Start]:
    gate = asyncio.Semaphore(most)

    async def one(task: Callable[[], Awaitable[list[Start]]]) -> list[Start]:
        async with gate:
            return await task()

    return [start for starts in await asyncio.gather(*map(one, tasks)) for start in starts]


def tell_starts(starts: list[Start]) -> None:
    for kind in sorted({start.kind for start in starts}):
        mine = [start for start in starts if start.kind == kind]
        differences = Counter(start.difference for start in mine)
        tell(
            f"{kind}: {len(mine)} starts, differences "
            f"{', '.join(f'{what} x {times}' for what, times in sorted(differences.items()))}; "
            f"skew up to {max(start.skew for start in mine):.2f} s, "
            f"all run at most {max(start.took for start in mine):.2f} s after the last is ready"
        )
    for start in starts:
        if start.difference > 1:
            tell(f"uneven: {start}")


async def test_copies_that_start_together_share_the_jobs(
    postgres: Database, nest: Nursery, tmp_path: Path
) -> None:
    """Cold or warm, after a stop or a kill, the copies' loads differ by at most 1."""
    plans = (
        [(5, 10)] * size(small=1, full=50)
        + [(5, 7)] * size(small=1, full=13)
        + [(7, 23)] * size(small=1, full=13)
    )

    async def one(turn: int, count: int, jobs: int) -> list[Start]:
        async with ground(postgres, nest, tmp_path) as where:
            return await cold_and_warm(
                where,
                count,
                jobs,
                # Some are whole programs, imports and all.
                forked=turn % 4 != 0,
                ending=(signal.SIGKILL, signal.SIGTERM)[turn % 2],
            )

    starts = await at_most_at_once(
        AT_ONCE,
        [lambda turn=turn, plan=plan: one(turn, *plan) for turn, plan in enumerate(plans)],
    )
    tell_starts(starts)
    assert max(start.skew for start in starts) < SETTLING_SECONDS, "the machine is too busy"
    assert [start for start in starts if start.overlaps] == []
    assert [start for start in starts if start.difference > 1] == []


async def test_without_turns_the_first_copy_takes_all(
    postgres: Database, nest: Nursery, tmp_path: Path
) -> None:
    """The control: whatever is due is taken as soon as it is seen, and the shares are uneven."""
    async with ground(postgres, nest, tmp_path) as where:
        starts = await cold_and_warm(
            where, 5, 10, forked=True, ending=signal.SIGTERM, FLEET_UNGUARDED="turns"
        )
    tell("; ".join(f"{start.kind}: {start.loads}" for start in starts))
    assert [start for start in starts if start.difference <= 1] == []
