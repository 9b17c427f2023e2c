"""Everything that executes for a run belongs to it: a run has ended when all of it has."""

import asyncio
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from balance_app.jobs import children
from balance_app.jobs.scope import Scope, track_runs
from tests.jobs.fleet import overlaps
from tests.jobs.jobs_db import Database, JobsDatabase, end, jobs_db
from tests.jobs.kinds import EventLog, functions
from tests.system.sizes import report_figures, size

ROUNDS = size(small=1, full=4)
LEASE = 3
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
# These end with the main task in any case: it forwards its cancellation or waits for them.
WITH_THE_MAIN_TASK = {"group", "generator", "thread-child"}


async def disturb(
    where: JobsDatabase, kinds: list[str], **env: str
) -> Counter[tuple[str, str | None]]:
    """Let runs of all kinds end in every way; return the overlaps by kind and outcome."""
    instances = where.instances(
        3,
        {
            "FLEET_JOBS": str(len(kinds)),
            "FLEET_KIND": ",".join([kinds[-1], *kinds[:-1]]),  # they are numbered from 1
            "FLEET_EVERY": "1",
            "FLEET_SECONDS": "4.5",
            "FLEET_TIMEOUT": "3",
            "JOB_WARM_UP_SECONDS": "0",
            "JOB_STEP_SECONDS": "0.05",
            "JOB_LEASE_SECONDS": str(LEASE),
            "JOB_HEARTBEAT_SECONDS": "1",
            **env,
        },
    )
    try:
        for instance in instances:
            await instance.launch()
        await asyncio.gather(*(instance.ready() for instance in instances))
        await where.until(len(kinds))
        for _ in range(ROUNDS):
            await asyncio.sleep(4)  # timeouts
            await where.rows("UPDATE jobs SET cancel_requested_by = 'ada' WHERE holder IS NOT NULL")
            await asyncio.sleep(3)
            await instances[0].stop(signal.SIGTERM)
            await instances[0].launch()
            await instances[0].ready()
            await asyncio.sleep(1)
            assert instances[1].process is not None
            instances[1].process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE + 1.5)
            await instances[1].stop(signal.SIGCONT)
            await instances[1].launch()
            await instances[1].ready()
    finally:
        await end(instances)
    outcomes = {
        (job, fence): outcome
        for job, fence, outcome in await where.rows("SELECT job, fence, outcome FROM job_runs")
    }
    spans = where.spans()
    found: Counter[tuple[str, str | None]] = Counter()
    for before, after in overlaps(spans):
        late = sum(line["at"] >= after.begin for line in before.lines)
        kind = kinds[int(before.job.removeprefix("job-")) - 1]
        found[kind, outcomes.get((before.job, before.fence))] += late
    report_figures(f"{len(spans)} runs, ended as {dict(Counter(outcomes.values()))}")
    return found


async def test_whatever_a_run_starts_ends_before_the_next_run_begins(
    postgres: Database, tmp_path: Path
) -> None:
    """Cancelled, timed out, released or lost: no line of a run follows the next run's first line.

    The control treats a run as ended when its main task has: then each kind overlaps.
    """
    kinds = list(functions(cast("EventLog", None), 0))
    async with (
        jobs_db(postgres, tmp_path) as guarded,
        jobs_db(postgres, tmp_path) as control_db,
    ):
        found = await disturb(guarded, kinds)
        control = await disturb(control_db, kinds, FLEET_MUTANTS="scope")
    report_figures(f"late lines: {dict(found)}; control: {dict(control)}")
    assert found == {}
    assert {kind for kind, _ in control} >= set(kinds) - WITH_THE_MAIN_TASK


async def test_children_end_with_the_process_of_their_instance(
    postgres: Database, tmp_path: Path
) -> None:
    """After kill -9 no descendant process of a run writes another line."""
    kinds = ["subprocess", "grandchild", "deaf-child", "thread-child"]
    async with jobs_db(postgres, tmp_path) as where:
        env = {"FLEET_JOBS": str(len(kinds)), "FLEET_KIND": ",".join(kinds)}
        (instance,) = where.instances(1, {**env, "JOB_WARM_UP_SECONDS": "0"})
        await instance.launch()
        try:
            spans = await where.until(len(kinds))
            await asyncio.sleep(0.5)
            assert len(spans) == len(kinds)
        finally:
            await instance.kill()
        await asyncio.sleep(1)
        before = [len(span.lines) for span in where.spans()]
        await asyncio.sleep(0.5)
        after = [len(span.lines) for span in where.spans()]
    assert before == after
    assert min(before) > 3


@pytest.fixture
async def scope() -> AsyncIterator[Scope]:
    """The scope of a run without work."""
    track_runs(asyncio.get_running_loop())
    scope = Scope("a")
    scope.start(asyncio.sleep(3600))
    yield scope
    scope.stop()
    async with asyncio.timeout(30):
        await scope.ended()


async def test_a_child_process_has_output_exit_code_and_signals(scope: Scope) -> None:
    """As a child of asyncio has; a command that is not found is refused."""
    process = await children.start(
        scope,
        ("sh", "-c", "read x; echo got $x $A; exit 3"),
        {"A": "b", "PATH": "/usr/bin:/bin"},
        PIPES,
    )
    output, _ = await process.communicate(b"it\n")
    assert output == b"got it b\n"
    assert process.returncode == 3
    process = await children.start(scope, ("sleep", "600"), None, {})
    await asyncio.sleep(0.5)  # until exec has replaced the supervisor's image
    process.send_signal(signal.SIGUSR1)
    assert await process.wait() == -signal.SIGUSR1
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        await children.start(scope, ("no-such-program",), None, {})


async def test_when_a_child_ends_its_own_children_are_killed(scope: Scope) -> None:
    """Processes that the command started are killed when it ends, even in another session."""
    process = await children.start(
        scope, ("sh", "-c", "setsid sleep 600 & echo $!"), None, {"stdout": subprocess.PIPE}
    )
    output, _ = await process.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(int(output), 0)


async def test_a_full_pipe_does_not_keep_a_run_from_ending(scope: Scope) -> None:
    """A child whose output is not read is ended all the same."""
    process = await children.start(scope, ("yes",), None, {"stdout": subprocess.PIPE})
    await asyncio.sleep(0.3)
    scope.stop()
    async with asyncio.timeout(30):
        await scope.ended()
    assert process.stdout is not None
    assert (await process.stdout.read()).startswith(b"y\n")


@pytest.mark.usefixtures("scope")
async def test_work_that_outlives_its_function_is_ended() -> None:
    """Tasks are cancelled, running threads waited for, and calls queued for a thread dropped."""
    released = threading.Event()
    events: list[str] = []

    async def cleans_up() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.1)
            events.append("cleaned up")

    async def leaves() -> None:
        for _ in range(40):
            left.submit(released.wait)
        left.submit(events.append, "never")
        kept.append(asyncio.create_task(cleans_up()))
        await asyncio.sleep(0)

    kept: list[asyncio.Task[None]] = []
    left = Scope("b")
    left.start(leaves())
    ended = asyncio.create_task(left.ended())
    await asyncio.sleep(0.5)
    assert not ended.done()
    released.set()
    await asyncio.wait_for(ended, 30)
    assert events == ["cleaned up"]
    assert kept[0].cancelled()


@pytest.mark.usefixtures("scope")
async def test_a_task_that_swallows_its_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that still executes is cancelled again and again, until it has ended."""
    monkeypatch.setattr("balance_app.jobs.scope.REPEAT_SECONDS", 0.1)
    swallowed = []

    async def swallows() -> None:
        for number in range(3):
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                swallowed.append(number)

    async def waits() -> None:
        await asyncio.wait({asyncio.create_task(swallows()), asyncio.create_task(swallows())})

    deaf = Scope("b")
    deaf.start(waits())
    await asyncio.sleep(0)
    deaf.stop()
    async with asyncio.timeout(30):
        await deaf.ended()
    assert sorted(swallowed) == [0, 0, 1, 1, 2, 2]
