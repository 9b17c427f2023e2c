"""An instance that is asked to stop releases its jobs; they resume elsewhere."""

import asyncio
import itertools
import random
import signal
from pathlib import Path
from time import monotonic

from tests.jobs.fleet import Span, overlaps
from tests.jobs.jobs_db import Database, JobsDatabase, end, jobs_db
from tests.processes import Instance
from tests.system.sizes import report_figures, size

ROUNDS = size(small=2, full=10)
# One second is promised; the other is slack for a busy machine.
RELEASE_SECONDS = size(small=2, full=1)
STOP_SECONDS = 3
UNCANCELLABLE_SECONDS = 6.5

# The outcome of each run, and the seconds until the next run of its job.
HISTORY = """
SELECT outcome, extract(epoch FROM lead(started_at) OVER (PARTITION BY job ORDER BY id) - ended_at)
       ::float8
FROM job_runs
"""

HELD = "SELECT name FROM jobs WHERE holder IS NOT NULL"


async def serve(where: JobsDatabase, count: int, env: dict[str, str]) -> list[Instance]:
    """Start instances whose jobs never end; wait until all jobs run."""
    env = {"FLEET_SECONDS": "3600", "JOB_WARM_UP_SECONDS": "2", **env}
    instances = where.instances(count, env)
    for instance in instances:
        await instance.launch()
    await asyncio.gather(*(instance.ready() for instance in instances))
    await where.until(int(env["FLEET_JOBS"]))
    return instances


def gaps(spans: list[Span]) -> list[float]:
    """Return the seconds from the last line of each run to the next run of its job."""
    found = []
    for _, runs in itertools.groupby(sorted(spans, key=_job_and_begin), lambda run: run.job):
        found += [after.begin - before.end for before, after in itertools.pairwise(runs)]
    return sorted(found)


def not_resumed(spans: list[Span]) -> list[tuple[str, int, object]]:
    """Return the runs that did not resume from the last checkpoint of their job."""
    wrong = []
    reached: dict[str, tuple[int, int]] = {}
    for span in spans:
        first = span.lines[0]
        if "resumed" not in first:
            continue
        lowest, highest = reached.get(span.job, (0, 0))
        step = (first["resumed"] or {"step": 0})["step"]
        # A run may be stopped after its checkpoint is written and before it logs that.
        if not lowest <= step <= highest:
            wrong.append((span.job, span.fence, first["resumed"]))
        steps = [line["step"] for line in span.lines if line["what"] == "checkpoint"]
        ticks = [line["step"] for line in span.lines if line["what"] == "tick"]
        reached[span.job] = (max([step, *steps]), max([step, *(tick + 1 for tick in ticks)]))
    return wrong


def _job_and_begin(span: Span) -> tuple[str, float]:
    return span.job, span.begin


def figures(name: str, seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return (
        f"{name} p50 {ordered[len(ordered) // 2]:.2f} s, p99 "
        f"{ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]:.2f} s, max {ordered[-1]:.2f} s"
    )


async def test_a_rolling_restart_loses_nothing(postgres: Database, tmp_path: Path) -> None:
    """One instance after another is restarted: no job overlaps, is lost, or waits long."""
    stops: list[float] = []
    codes: list[int] = []
    async with jobs_db(postgres, tmp_path) as where:
        instances = await serve(where, 5, {"FLEET_JOBS": "10", "FLEET_KIND": "paced,thread"})
        try:
            for _ in range(ROUNDS):
                for instance in instances:
                    await asyncio.sleep(random.uniform(0, 0.7))
                    signalled_at = monotonic()
                    codes.append(await instance.stop(signal.SIGTERM))
                    stops.append(monotonic() - signalled_at)
                    await instance.launch()
                    await instance.ready()
            await asyncio.sleep(RELEASE_SECONDS)
            history = await where.rows(HISTORY)
            held = await where.column(HELD)
        finally:
            await end(instances)
        spans = where.spans()
    waits = [wait for outcome, wait in history if outcome is not None and wait is not None]
    outcomes = [outcome for outcome, _ in history]
    report_figures(
        f"{len(stops)} restarts, {len(spans)} runs; {figures('stop', stops)}; "
        f"{figures('last line to next start', gaps(spans))}; "
        f"{figures('end to next start in the history', waits)}"
    )
    assert set(codes) == {0}
    assert overlaps(spans) == []
    assert {outcome: outcomes.count(outcome) for outcome in set(outcomes)} == {
        "released": len(spans) - 10,
        None: 10,
    }
    assert len(held) == 10
    assert len(spans) > 10
    assert not_resumed(spans) == []
    assert gaps(spans)[-1] <= RELEASE_SECONDS
    assert max(waits) <= RELEASE_SECONDS


async def test_all_instances_are_stopped_at_once(postgres: Database, tmp_path: Path) -> None:
    """All exit soon, all jobs are free, and they resume after the next start."""
    async with jobs_db(postgres, tmp_path) as where:
        instances = await serve(where, 5, {"FLEET_JOBS": "10"})
        try:
            await asyncio.sleep(1)
            signalled_at = monotonic()
            codes = await asyncio.gather(*(instance.stop(signal.SIGTERM) for instance in instances))
            took = monotonic() - signalled_at
            history = await where.rows(HISTORY)
            held = await where.column(HELD)
            for instance in instances:
                await instance.launch()
            spans = await where.until(10, monotonic())
        finally:
            await end(instances)
        spans = where.spans()
    report_figures(f"all had ended {took:.2f} s after the signal")
    assert codes == [0] * 5
    assert took < STOP_SECONDS
    assert held == []
    assert {outcome for outcome, _ in history} == {"released"}
    assert overlaps(spans) == []
    assert not_resumed(spans) == []
    assert all(span.lines[0]["resumed"] for span in spans[-10:])


async def test_without_the_release_jobs_wait_for_the_lease(
    postgres: Database, tmp_path: Path
) -> None:
    """The control: an instance that just exits leaves its jobs held until their leases expire."""
    env = {
        "FLEET_JOBS": "4",
        "FLEET_MUTANTS": "release",
        "JOB_LEASE_SECONDS": "4",
        "JOB_HEARTBEAT_SECONDS": "0.5",
    }
    async with jobs_db(postgres, tmp_path) as where:
        instances = await serve(where, 2, env)
        try:
            await instances[0].stop(signal.SIGTERM)
            await where.until(6)
            history = await where.rows(HISTORY)
        finally:
            await end(instances)
        spans = where.spans()
    report_figures(figures("last line to next start", gaps(spans)))
    assert [outcome for outcome, _ in history if outcome is not None] == ["lost"] * 2
    assert gaps(spans)[-1] > RELEASE_SECONDS


async def stop_uncancellable(
    where: JobsDatabase, env: dict[str, str]
) -> tuple[int, float, list[Span]]:
    """Stop one of two instances with uncancellable jobs, while a client's request is unfinished."""
    instances = await serve(where, 2, {"FLEET_JOBS": "4", "FLEET_KIND": "uncancellable", **env})
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", instances[0].port)
        head = "POST /api/balance HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 26\r\n\r\n".encode())
        await writer.drain()
        signalled_at = monotonic()
        code = await instances[0].stop(signal.SIGTERM, within_seconds=20)
        took = monotonic() - signalled_at
        writer.close()
        await where.until(6)
        return code, took, where.spans()
    finally:
        await end(instances)


async def test_a_thread_that_never_ends_is_killed_before_its_job_restarts(
    postgres: Database, tmp_path: Path
) -> None:
    """Its process is ended first, and its jobs start elsewhere after that.

    In the control a run counts as ended when it is requested to stop: then its jobs start before.
    """
    async with (
        jobs_db(postgres, tmp_path) as where,
        jobs_db(postgres, tmp_path) as control_db,
    ):
        (code, took, spans), control = await asyncio.gather(
            stop_uncancellable(where, {}),
            stop_uncancellable(control_db, {"FLEET_MUTANTS": "threads"}),
        )
        history = await where.rows(HISTORY)
    report_figures(
        f"exit code {code} after {took:.2f} s, {figures('last line to next start', gaps(spans))}; "
        f"control: overlaps {len(overlaps(control[2]))}, exit code {control[0]}"
    )
    assert took < UNCANCELLABLE_SECONDS
    assert overlaps(spans) == []
    assert [outcome for outcome, _ in history if outcome is not None] == ["released"] * 2
    assert overlaps(control[2]) != []
