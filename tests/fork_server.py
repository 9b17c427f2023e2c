"""Instances forked from a process that has imported everything: they are up in a moment.

Each is a process of its own that does what `python -m MODULE ARGUMENTS` does; only its imports are
done already. `python -m tests.fork_server` is the parent: it reads a line of JSON per instance that
is to be forked, and reports who was forked and who has ended, and how.
"""

import asyncio
import gc
import json
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Final

from balance_app.db.migrations import alembic_head
from balance_app.web.rendering import templates

# What `python -m` may be given, and the module whose `main()` that is.
FORKABLE: Final = {"balance_app": "balance_app.__main__", "tests.jobs.fleet": "tests.jobs.fleet"}


class Child:
    """A forked process, to be used like those of asyncio."""

    def __init__(self) -> None:
        self.forked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        return self.forked.result()

    @property
    def returncode(self) -> int | None:
        return self.ended.result() if self.ended.done() else None

    def send_signal(self, number: int) -> None:
        # Its end may not have been told yet; until it is, its number is not used again.
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)


class ForkServer:
    """The parent, as its user sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._children: list[Child] = []

    async def fork(
        self, module: str, *arguments: str, log: Path, environment: dict[str, str]
    ) -> Child:
        """Fork an instance; its output goes to the end of a file."""
        child = Child()
        self._children.append(child)
        order = [len(self._children) - 1, module, arguments, str(log), environment]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await child.forked
        return child

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            what, number, value = json.loads(line)
            getattr(self._children[number], what).set_result(value)


# The one that runs, if one does.
running: list[ForkServer] = []


@asynccontextmanager
async def run() -> AsyncIterator[None]:
    """Run the parent; what it has forked ends with it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fork_server"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    parent = ForkServer(process)
    listener = asyncio.create_task(parent.listen())
    running.append(parent)
    try:
        yield
    finally:
        running.remove(parent)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await listener


def main() -> None:
    """Fork whatever is asked for, until nobody can ask any more."""
    _prepare()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    asked = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 1024)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                _say("ended", children.pop(pid), os.waitstatus_to_exitcode(status))
        if 0 in readable:
            if not (read := os.read(0, 65536)):
                break
            *orders, asked = (asked + read).split(b"\n")
            for order in orders:
                number, *what = json.loads(order)
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(woken)
                    os.close(wake)
                    _live(*what)
                children[pid] = number
                _say("forked", number, pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _prepare() -> None:
    """Do once what every instance would do again."""
    for module in (*FORKABLE.values(), "balance_app.maintenance"):
        import_module(module)
    alembic_head()
    for name in templates().list_templates():
        templates().get_template(name)
    # What is imported is never freed: children that looked through it would copy every page.
    gc.collect()
    gc.freeze()


def _say(what: str, number: int, value: int) -> None:
    os.write(1, json.dumps([what, number, value]).encode() + b"\n")


def _live(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Be an instance, and end with it."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((null, output, output)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [module, *arguments]
        import_module(FORKABLE[module]).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
