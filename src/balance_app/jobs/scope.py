"""Everything that executes for a run belongs to it, and a run has ended when all of it has.

A context variable names the run that the code of this moment executes for. What is started under it
is counted: tasks (a task factory), work in threads (an executor that is the event loop's default),
timers, and child processes. Tasks and threads inherit the variable, so what they start is counted
too. Not seen are threads that a job starts by `threading` and children that it starts by
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
from typing import Any, Final, Protocol
from weakref import WeakSet

import structlog
from typing_extensions import override

log = structlog.get_logger(__name__)

# What was requested to stop and still executes is requested again after each of these.
AGAIN_SECONDS: Final = 5.0
MAX_THREADS: Final = 32

CURRENT: Final[ContextVar["Scope | None"]] = ContextVar("balance_app_run", default=None)


class Stoppable(Protocol):
    """A child process of a run."""

    def stop(self) -> None:
        """Ask it to end; it is ended by force soon after."""


class Scope(Executor):
    """What executes for one run; as an executor it takes work for threads that are counted.

    Its own methods are called in the event loop that it was made in, those of an executor in any
    thread.
    """

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
        # used by threads: what is under way there, what has not begun, and how many take it
        self._lock = threading.Lock()
        self._work: set[Future[Any]] = set()
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = 0

    def start(self, main: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start the main task of the run, under the variable that counts what it starts."""
        context = Context()
        context.run(CURRENT.set, self)
        self._main = self._loop.create_task(main, context=context)
        return self._main

    def stop(self) -> None:
        """Request the run to stop, and all that belongs to it again every few seconds.

        Its main task is cancelled first: most that it has started ends with it, in its own way.
        """
        if self.stop_requested_at is None:
            self.stop_requested_at = monotonic()
        if self._main is not None:
            self._main.cancel()
        self._stop_children()
        self._ask_again_later()

    async def ended(self) -> None:
        """Wait for the main task, end what it has left behind, and return when all has ended."""
        assert self._main is not None  # noqa: S101 - started before
        await asyncio.wait({self._main})
        # What its last step has set off (an asynchronous generator's end) is counted after this.
        await asyncio.sleep(0)
        if self._left():
            if self.stop_requested_at is None:
                log.warning("a run has left something behind", job=self.name, **self._left())
            for task in list(self._tasks):
                if not task.cancelling():
                    task.cancel()
            self._stop_children()
            self._drop_queue()
            self._ask_again_later()
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

    def _ask_again_later(self) -> None:
        if self._again is None:
            self._again = self._loop.call_later(AGAIN_SECONDS, self._ask_again)

    def _ask_again(self) -> None:
        self._again = None
        if left := self._left():
            log.warning(
                "a run was requested to stop and goes on: requested again", job=self.name, **left
            )
            for task in list(self._tasks):
                task.cancel()
            self._stop_children()
            self._drop_queue()
            self._ask_again_later()

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
        """Count a timer: it does not go off after the run's end."""
        self._timers.add(timer)

    def add_child(self, child: Stoppable) -> None:
        """Count a child process until `forget_child`; one that comes late is requested to stop."""
        self._children.add(child)
        if self.stop_requested_at is not None:
            child.stop()

    def forget_child(self, child: Stoppable) -> None:
        """Note that a child process has ended."""
        self._children.discard(child)
        self._changed.set()

    def add_work(self, work: "Future[Any]") -> None:
        """Count what executes in another thread until it has ended; called in any thread."""
        with self._lock:
            self._work.add(work)
        work.add_done_callback(self._forget_work)

    def _forget_task(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        self._changed.set()

    def _forget_work(self, work: "Future[Any]") -> None:
        with self._lock:
            self._work.discard(work)
        with suppress(RuntimeError):  # the event loop has ended before its threads
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
        # A daemon: what can't be stopped must not keep the process alive.
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
                except BaseException as error:  # noqa: BLE001 - it belongs to who asked
                    work.set_exception(error)
                else:
                    work.set_result(result)

    def _drop_queue(self) -> None:
        """Cancel what waits for a thread; what is under way there can't be."""
        with self._lock:
            all_work = list(self._work)
        for work in all_work:
            work.cancel()


class _DefaultExecutor(ThreadPoolExecutor):
    """The event loop's default executor: what a run gives it is the run's."""

    @override
    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        scope = CURRENT.get()
        if scope is None:
            return super().submit(call, *args, **kwargs)
        return scope.submit(call, *args, **kwargs)


class CountedCalls:
    """What counts the timers and executors of runs; mixed in before `uvloop.Loop`."""

    # `call_at` of uvloop calls it.
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


def count_what_runs_start(loop: asyncio.AbstractEventLoop) -> None:
    """Let an event loop count the tasks and the work in threads that runs start in it."""
    if loop.get_task_factory() is not _create_task:
        loop.set_task_factory(_create_task)  # type: ignore[arg-type]
        loop.set_default_executor(_DefaultExecutor())


@contextmanager
def under(scope: Scope | None) -> Iterator[None]:
    """Count what is started meanwhile for another run; for none: a shared pool's timers, say."""
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
    **more: Any,  # noqa: ANN401 - what newer versions of Python give
) -> "asyncio.Task[Any]":
    task = asyncio.Task(coroutine, loop=loop, context=context, **more)
    scope = CURRENT.get() if context is None else context.get(CURRENT)
    if scope is not None:
        scope.add_task(task)
    return task
