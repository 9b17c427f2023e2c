"""Everything that executes for a run belongs to it, and a run has ended when all of it has.

A context variable names the run for which the current code executes. All that is started under it
is counted: tasks (by a task factory), work in threads (by the event loop's default executor),
timers, and child processes. Tasks and threads inherit the variable, so what they start is counted
too. Not counted are threads that a job starts by `threading` and processes that it starts by
`subprocess`: see `Run.executor` and `Run.subprocess`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from time import monotonic
from typing import Any, ClassVar, Final, Protocol
from weakref import WeakSet

import structlog
from typing_extensions import override

log = structlog.get_logger(__name__)

# How often a run that still executes is requested again to stop.
REPEAT_SECONDS: Final = 5.0
MAX_THREADS: Final = 32

CURRENT: Final[ContextVar["Scope | None"]] = ContextVar("balance_app_run", default=None)


class Stoppable(Protocol):
    """A child process of a run."""

    def stop(self) -> None:
        """Request it to end; it is killed soon after."""


class Scope(Executor):
    """All that executes for one run; as an executor it runs work in threads that are counted.

    Its own methods are called in the event loop in which it was created, those of an executor in
    any thread.
    """

    # makes the context in which a run's code begins: without anything of who started the run
    new_context: ClassVar[Callable[[], Context]] = Context

    def __init__(self, name: str) -> None:
        self.name: Final = name
        # when it was first requested to stop (monotonic)
        self.stop_requested_at: float | None = None
        self._loop = asyncio.get_running_loop()
        self._main: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: WeakSet[asyncio.TimerHandle] = WeakSet()
        self._children: set[Stoppable] = set()
        self._again: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        # shared with threads: work that has not ended, work that has not started, and their number
        self._lock = threading.Lock()
        self._work: set[Future[Any]] = set()
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = 0

    def start(self, main: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start the main task of the run, with the context variable set to this scope."""
        context = type(self).new_context()
        context.run(CURRENT.set, self)
        self._main = self._loop.create_task(main, context=context)
        return self._main

    def stop(self) -> None:
        """Request the run to stop: cancel its main task and stop its child processes.

        Other tasks are cancelled when the main task has ended, as they usually end with it. Every
        few seconds the request is repeated for all that still executes.
        """
        if self.stop_requested_at is None:
            self.stop_requested_at = monotonic()
        if self._main is not None:
            self._main.cancel()
        self._stop_children()
        self._schedule_repeat()

    async def ended(self) -> None:
        """Wait for the main task, stop what it has left, and return when all has ended."""
        assert self._main is not None  # noqa: S101 - started before
        await asyncio.wait({self._main})
        # The main task's last step may have started tasks (to close an asynchronous generator).
        await asyncio.sleep(0)
        if self._left():
            if self.stop_requested_at is None:
                log.warning("run left work behind", job=self.name, **self._left())
            for task in list(self._tasks):
                if not task.cancelling():
                    task.cancel()
            self._stop_children()
            self._cancel_queued()
            self._schedule_repeat()
        while self._left():
            self._changed.clear()
            await self._changed.wait()
        for timer in list(self._timers):
            timer.cancel()
        if self._again is not None:
            self._again.cancel()

    def _left(self) -> dict[str, int]:
        with self._lock:
            counts = {"tasks": len(self._tasks), "threads": len(self._work)}
        counts["processes"] = len(self._children)
        return {what: count for what, count in counts.items() if count}

    def _schedule_repeat(self) -> None:
        if self._again is None:
            self._again = self._loop.call_later(REPEAT_SECONDS, self._repeat)

    def _repeat(self) -> None:
        self._again = None
        if left := self._left():
            log.warning("run has not stopped: requested again", job=self.name, **left)
            for task in list(self._tasks):
                task.cancel()
            self._stop_children()
            self._cancel_queued()
            self._schedule_repeat()

    def _stop_children(self) -> None:
        for child in list(self._children):
            child.stop()

    # -- what is counted ----------------------------------------------------------------------

    def add_task(self, task: "asyncio.Task[Any]") -> None:
        """Count a task until it has ended."""
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def outlive(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start a task that is not cancelled with the run."""
        return self._loop.create_task(coroutine, context=Context())

    def add_timer(self, timer: asyncio.TimerHandle) -> None:
        """Count a timer: it is cancelled when the run ends."""
        self._timers.add(timer)

    def add_child(self, child: Stoppable) -> None:
        """Count a child process until `forget_child`; if the run is stopping, stop it at once."""
        self._children.add(child)
        if self.stop_requested_at is not None:
            child.stop()

    def forget_child(self, child: Stoppable) -> None:
        """Record that a child process has ended."""
        self._children.discard(child)
        self._changed.set()

    def add_work(self, work: "Future[Any]") -> None:
        """Count work in another thread until it has ended; called in any thread."""
        with self._lock:
            self._work.add(work)
        work.add_done_callback(self._forget_work)

    def _forget_task(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        self._changed.set()

    def _forget_work(self, work: "Future[Any]") -> None:
        with self._lock:
            self._work.discard(work)
        with suppress(RuntimeError):  # the event loop was closed before its threads ended
            self._loop.call_soon_threadsafe(self._changed.set)

    # -- threads ------------------------------------------------------------------------------

    @override
    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Call a function in a thread that belongs to the run; at most 32 at a time."""
        work: Future[Any] = Future()
        context = copy_context()
        context.run(CURRENT.set, self)
        self.add_work(work)
        with self._lock:
            self._queue.append((work, lambda: context.run(call, *args, **kwargs)))
            if self._threads == MAX_THREADS:
                return work
            self._threads += 1
        # A daemon thread: work that can't be stopped must not keep the process alive.
        threading.Thread(target=self._take_work, name=self.name, daemon=True).start()
        return work

    def _take_work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                work, call = self._queue.popleft()
            if work.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # noqa: BLE001 - the submitter gets it
                    work.set_exception(error)
                else:
                    work.set_result(result)

    def _cancel_queued(self) -> None:
        """Cancel the work that has not started; work in a thread can't be cancelled."""
        with self._lock:
            all_work = list(self._work)
        for work in all_work:
            work.cancel()


class _DefaultExecutor(ThreadPoolExecutor):
    """The event loop's default executor: work that a run submits belongs to the run."""

    @override
    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        scope = CURRENT.get()
        if scope is None:
            return super().submit(call, *args, **kwargs)
        return scope.submit(call, *args, **kwargs)


class CountedCalls:
    """Counts the timers and executor calls of runs; a mixin before `uvloop.Loop`."""

    # uvloop's `call_at` calls it.
    def call_later(self, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # noqa: ANN401
        """See `asyncio.loop.call_later`."""
        timer: asyncio.TimerHandle = super().call_later(*args, context=context)  # type: ignore[misc]
        scope = CURRENT.get() if context is None else context.get(CURRENT)
        if scope is not None:
            scope.add_timer(timer)
        return timer

    def run_in_executor(
        self,
        executor: Executor | None,
        call: Callable[..., Any],
        *args: Any,  # noqa: ANN401
    ) -> "asyncio.Future[Any]":
        """See `asyncio.loop.run_in_executor`."""
        scope = CURRENT.get()
        if scope is None or executor is None:
            return super().run_in_executor(executor, call, *args)  # type: ignore[misc,no-any-return]
        work = executor.submit(call, *args)
        scope.add_work(work)
        return asyncio.wrap_future(work)


def track_runs(loop: asyncio.AbstractEventLoop) -> None:
    """Make an event loop count the tasks and the work in threads that runs start in it."""
    if loop.get_task_factory() is not _create_task:
        loop.set_task_factory(_create_task)  # type: ignore[arg-type]
        loop.set_default_executor(_DefaultExecutor())


@contextmanager
def under(scope: Scope | None) -> Iterator[None]:
    """Count what the block starts for this scope; for None it belongs to no run."""
    before = CURRENT.get()
    CURRENT.set(scope)
    try:
        yield
    finally:
        CURRENT.set(before)


def _create_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, Any],
    *,
    context: Context | None = None,
    **more: Any,  # noqa: ANN401 - arguments of newer versions of Python
) -> "asyncio.Task[Any]":
    task = asyncio.Task(coroutine, loop=loop, context=context, **more)
    scope = CURRENT.get() if context is None else context.get(CURRENT)
    if scope is not None:
        scope.add_task(task)
    return task
