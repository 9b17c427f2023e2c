"""Processes forked from one that has imported everything: they are up in a moment.

Each does what `python -m MODULE ARGUMENTS` does; only its imports are done already.
`python -m tests.fork_server` is the parent: it reads a line of JSON per process that is to be
forked, and reports who has begun and who has ended, and how.
"""

import asyncio
import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Final

from balance_app.db.migrations import alembic_head
from balance_app.web.rendering import templates

ROOT: Final = Path(__file__).parents[1]
# Arguments of `python -m`, and the module whose `main()` they run.
FORKABLE: Final = {"balance_app": "balance_app.__main__", "tests.jobs.fleet": "tests.jobs.fleet"}


class Child:
    """A forked process with the interface of asyncio's."""

    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader

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
        # Its end may not be reported yet; until then its pid is not reused.
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)

    async def communicate(self) -> tuple[bytes, bytes]:
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return out, err


class ForkServer:
    """The parent, as the tests see it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._children: list[Child] = []

    async def fork(
        self,
        module: str,
        *arguments: str,
        files: tuple[str, str, str],
        environment: Mapping[str, str],
        cwd: str = str(ROOT),
    ) -> Child:
        """Fork a process; `files` are its standard input and, appended to, output and error."""
        child = Child()
        self._children.append(child)
        number, command = len(self._children) - 1, [module, *arguments]
        order = [number, command, files, cwd, dict(environment)]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await child.forked
        return child

    async def fork_with_pipes(
        self, module: str, *arguments: str, environment: Mapping[str, str], cwd: str = str(ROOT)
    ) -> Child:
        """Fork a process without input; its output is in `stdout` and `stderr`."""
        pipes = [os.pipe(), os.pipe()]
        out, err = (f"/proc/{os.getpid()}/fd/{write}" for _, write in pipes)
        child = await self.fork(
            module, *arguments, files=(os.devnull, out, err), environment=environment, cwd=cwd
        )
        child.stdout, child.stderr = [await _reader(*pipe) for pipe in pipes]
        return child

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            what, number, value = json.loads(line)
            getattr(self._children[number], what).set_result(value)


async def _reader(read: int, write: int) -> asyncio.StreamReader:
    os.close(write)  # the child has it
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
    )
    return reader


# The running fork server, if any.
running: list[ForkServer] = []


@asynccontextmanager
async def run() -> AsyncIterator[None]:
    """Run the parent; all forked processes end with it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fork_server"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
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
    """Fork on request, until stdin is closed."""
    _prepare()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    partial = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 1024)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                _report("ended", children.pop(pid), os.waitstatus_to_exitcode(status))
        if 0 in readable:
            if not (read := os.read(0, 65536)):
                break
            *orders, partial = (partial + read).split(b"\n")
            for order in orders:
                number, *what = json.loads(order)
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(woken)
                    os.close(wake)
                    _run_program(number, *what)
                children[pid] = number
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _prepare() -> None:
    """Do once what every instance would do again."""
    modules = ("balance_app.maintenance", "alembic.command", "tests.jobs.rows")
    for module in (*FORKABLE.values(), *modules):
        import_module(module)
    alembic_head()
    for name in templates().list_templates():
        templates().get_template(name)
    # What is imported is never freed: children that looked through it would copy every page.
    gc.collect()
    gc.freeze()


def _report(what: str, number: int, value: int) -> None:
    os.write(1, json.dumps([what, number, value]).encode() + b"\n")


def _run_program(
    number: int, command: list[str], files: list[str], cwd: str, environment: dict[str, str]
) -> None:
    """Be the process, and end with it."""
    code = 1
    try:
        try:
            null, *outputs = files
            opened = [os.open(null, os.O_RDONLY)]
            opened += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in outputs]
        finally:
            _report("forked", number, os.getpid())
        for standard, file in enumerate(opened):
            os.dup2(file, standard)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        encoding = environment.get("PYTHONIOENCODING")
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - for ever
        sys.stderr = open(2, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
        sys.argv = command
        import_module(FORKABLE[command[0]]).main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is ends the process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
