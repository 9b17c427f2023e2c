"""What a function that is not async gets: its run, with calls from the run's thread."""

import asyncio
import subprocess
from collections.abc import Coroutine, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

import asyncpg

from balance_app.db.pool import Connection
from balance_app.jobs.children import Child
from balance_app.jobs.run import Run, RunStoppedError

Result = TypeVar("Result")


class ThreadRun:
    """A `Run` for a function that is not async, called from its thread.

    Each call raises `RunStoppedError` once the run was requested to stop, also while it waits for
    PostgreSQL. A function that makes no call can be stopped only by killing its process.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        # the task that executes the thread's current call, and may be cancelled
        self._task: asyncio.Task[Any] | None = None
        self.name: Final = run.name
        self.fence: Final = run.fence
        self.due_at: Final = run.due_at
        self.attempt: Final = run.attempt
        self.resumed: Final = run.resumed
        self.args: Final = run.args
        self.log: Final = run.log

    @property
    def executor(self) -> Executor:
        """An executor whose threads belong to the run: see `Run.executor`."""
        return self._run.executor

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report how far the run is, as `Run.progress`."""
        self._check_stopped()
        self._run.progress(done, total, note)

    def pace(self) -> None:
        """Sleep as `Run.pace`, until the run is requested to stop."""
        self._wait(self._run.pace())

    def checkpoint(self, state: object) -> None:
        """Store a checkpoint as `Run.checkpoint`."""
        self._wait(self._run.checkpoint(state))

    def subprocess(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        **options: Any,  # noqa: ANN401 - passed on
    ) -> "subprocess.Popen[Any]":
        """Start a child process as `Run.subprocess`; takes what `subprocess.Popen` takes."""
        child = self._wait(self._prepare(command, env))
        try:
            process = subprocess.Popen(child.command, **options, **child.options)  # noqa: S603
        except BaseException:
            child.failed()
            raise
        child.started(process.send_signal)
        return process

    async def _prepare(self, command: tuple[str, ...], env: Mapping[str, str] | None) -> Child:
        assert self._run.scope is not None  # noqa: S101 - it executes
        return Child(self._run.scope, command, env)

    @contextmanager
    def transaction(self) -> Iterator["ThreadConnection"]:
        """Open a transaction as `Run.transaction`."""
        manager = self._run.transaction()
        connection = self._wait(manager.__aenter__())
        exiting = False

        async def commit() -> None:
            nonlocal exiting
            exiting = True
            await manager.__aexit__(None, None, None)

        try:
            yield ThreadConnection(connection, self._wait)
            self._wait(commit())
        except BaseException as error:
            if not exiting:  # roll back, even if the run was requested to stop
                end = manager.__aexit__(type(error), error, error.__traceback__)
                asyncio.run_coroutine_threadsafe(end, self._loop).result()
            raise

    def continue_in_event_loop(self) -> None:
        """Act as the `Run`: the function has returned an awaitable that uses this object."""
        names = ("progress", "pace", "checkpoint", "transaction", "subprocess")
        vars(self).update({name: getattr(self._run, name) for name in names})

    def interrupt(self) -> None:
        """Cancel the thread's current call; called in the event loop, once a stop was requested."""
        if self._task is not None:
            self._task.cancel()

    def _check_stopped(self) -> None:
        if self._run.stopped is not None:
            raise RunStoppedError(self._run.stopped[1])

    def _wait(self, call: Coroutine[Any, Any, Result]) -> Result:
        try:
            return asyncio.run_coroutine_threadsafe(self._await(call), self._loop).result()
        except futures.CancelledError:
            self._check_stopped()
            raise

    async def _await(self, call: Coroutine[Any, Any, Result]) -> Result:
        try:
            self._check_stopped()
            self._task = asyncio.current_task()
            return await call
        finally:
            self._task = None
            call.close()


class _Waits(Protocol):
    def __call__(self, call: Coroutine[Any, Any, Result]) -> Result: ...


class ThreadConnection:
    """A connection for a function that is not async."""

    def __init__(self, connection: Connection, wait: _Waits) -> None:
        self._connection = connection
        self._wait = wait

    def fetch(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """Run a statement and return its rows."""
        return self._wait(self._connection.fetch(sql, *arguments))

    def execute(self, sql: str, *arguments: object) -> str:
        """Run a statement and return its status."""
        return self._wait(self._connection.execute(sql, *arguments))
