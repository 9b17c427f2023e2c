"""Jobs that work outside of the run's own task, each in another way; see `tests.jobs.fleet`."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

from balance_app.jobs.run import Run
from balance_app.jobs.threads import ThreadRun

TICK_SECONDS = 0.05

# A child process that writes its run's lines; its arguments are a line without its time and a file.
CHILD = """
import os, sys, time
file = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
while True:
    os.write(file, sys.argv[1].replace('"at": 0', f'"at": {time.monotonic()}').encode() + b"\\n")
    time.sleep(0.05)
"""


class EventLog:
    """Lines with monotonic time, comparable between all processes of a machine; one write each."""

    def __init__(self, directory: Path) -> None:
        name = f"{os.environ['SERVER_ID']}-{os.getpid()}-{uuid4().hex[:8]}"
        self.path = directory / name
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def line(self, at: float, what: str, run: Run | ThreadRun, **more: object) -> str:
        entry = {
            "at": at,
            "what": what,
            "job": run.name,
            "fence": run.fence,
            "server": os.environ["SERVER_ID"],
            "pid": os.getpid(),
            **more,
        }
        return json.dumps(entry)

    def write(self, what: str, run: Run | ThreadRun, **more: object) -> None:
        os.write(self._file, (self.line(time.monotonic(), what, run, **more) + "\n").encode())


def functions(event_log: EventLog, seconds: float) -> dict[str, Callable[[Any], Any]]:  # noqa: C901, PLR0915
    """Return the jobs by kind; those that block a thread last `seconds`, all others for ever."""

    async def ticks(run: Run) -> None:
        while True:
            event_log.write("tick", run)
            await asyncio.sleep(TICK_SECONDS)

    def blocks(run: Run | ThreadRun) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            event_log.write("tick", run)
            time.sleep(TICK_SECONDS)

    def child(run: Run | ThreadRun) -> tuple[str, ...]:
        line = event_log.line(0, "tick", run)
        return sys.executable, "-I", "-S", "-c", CHILD, line, str(event_log.path)

    async def to_thread(run: Run) -> None:
        await asyncio.to_thread(blocks, run)

    async def executor(run: Run) -> None:
        await asyncio.get_running_loop().run_in_executor(None, blocks, run)

    async def own_pool(run: Run) -> None:
        await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(), blocks, run)

    async def runs_executor(run: Run) -> None:
        await asyncio.wrap_future(run.executor.submit(blocks, run))

    async def stray(run: Run) -> None:
        task = asyncio.create_task(ticks(run))
        await asyncio.sleep(3600)
        del task

    async def waits(run: Run) -> None:
        await asyncio.wait({asyncio.create_task(ticks(run))})

    async def shields(run: Run) -> None:
        await asyncio.shield(ticks(run))

    async def gathers(run: Run) -> None:
        await asyncio.gather(ticks(run), asyncio.to_thread(blocks, run))

    async def groups(run: Run) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ticks(run))

    async def later(run: Run) -> None:
        def again() -> None:
            event_log.write("tick", run)
            asyncio.get_running_loop().call_later(TICK_SECONDS, again)

        again()
        await asyncio.sleep(3600)

    async def generates(run: Run) -> None:
        async def generator() -> AsyncIterator[int]:
            try:
                while True:
                    event_log.write("tick", run)
                    yield 1
                    await asyncio.sleep(TICK_SECONDS)
            finally:
                await asyncio.sleep(TICK_SECONDS)
                event_log.write("end", run)

        async for _ in generator():
            pass

    async def subprocess(run: Run) -> None:
        process = await run.subprocess(*child(run))
        await process.wait()

    async def grandchild(run: Run) -> None:
        process = await run.subprocess("sh", "-c", 'setsid "$@" & wait', "sh", *child(run))
        await process.wait()

    async def deaf_child(run: Run) -> None:
        await run.subprocess("sh", "-c", 'trap "" TERM; exec "$@"', "sh", *child(run))
        await asyncio.sleep(3600)

    def child_of_thread(run: ThreadRun) -> None:
        run.subprocess(*child(run)).wait()

    def task_of_thread(run: ThreadRun) -> None:
        loop = run._loop

        async def ticking() -> None:
            while True:
                event_log.write("tick", run)
                await asyncio.sleep(TICK_SECONDS)

        asyncio.run_coroutine_threadsafe(ticking(), loop)
        while True:
            run.progress(1)
            time.sleep(TICK_SECONDS)

    return {
        "to-thread": to_thread,
        "executor": executor,
        "own-pool": own_pool,
        "run-executor": runs_executor,
        "stray": stray,
        "wait": waits,
        "shield": shields,
        "gather": gathers,
        "group": groups,
        "later": later,
        "generator": generates,
        "subprocess": subprocess,
        "grandchild": grandchild,
        "deaf-child": deaf_child,
        "thread-child": child_of_thread,
        "thread-task": task_of_thread,
    }
