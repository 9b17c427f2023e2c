"""How one run is executed: its function is called and its end classified."""

import asyncio
import inspect
from collections.abc import Mapping
from time import monotonic
from typing import Any, NamedTuple

from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.jobs.job import Job
from balance_app.jobs.run import Run, RunStoppedError, Stopped
from balance_app.jobs.run_log import describe, safe_str, storable
from balance_app.jobs.scope import Scope
from balance_app.jobs.threads import ThreadRun
from balance_app.jobs.transaction import LeaseLostError


class RunResult(NamedTuple):
    """How a run ended, and what it returned or why it did not succeed."""

    outcome: str
    result: str | None


async def execute(run: Run, job: Job, *, min_seconds: float) -> RunResult:
    """Execute the function; returns when all code that executes for the run has ended."""
    if run.stopped is not None:
        return RunResult(*run.stopped)
    started = monotonic()
    run.scope = scope = Scope(run.name)
    main = scope.start(_call(run, job, scope))
    done, _ = await asyncio.wait({main}, timeout=job.timeout_seconds)
    if not done:
        stop(run, "timed_out", f"it took longer than its timeout of {job.timeout_seconds:g} s")
    await scope.ended()
    run_result = classify(run, main)
    if run_result.outcome == "succeeded":
        rest = min_seconds - (monotonic() - started)
        if rest > 0 and run.stopped is None:
            # The work is done, so a run that is stopped while it waits has still succeeded.
            await asyncio.wait({scope.start(_wait_out(run, rest))})
    return run_result


async def _wait_out(run: Run, seconds: float) -> None:
    until = monotonic() + seconds
    await run.end_work()
    await asyncio.sleep(until - monotonic())


def stop(run: Run, outcome: Stopped, reason: str) -> None:
    """Request a run to stop; the first reason is kept."""
    if run.stopped is None:
        run.stopped = (outcome, reason)
    if run.lease is not None:
        run.lease.stopping = True
    if run.scope is not None:
        run.scope.stop()


async def _call(run: Run, job: Job, scope: Scope) -> Any:  # noqa: ANN401 - what the function returns
    """Call the function and await its value while that is awaitable."""
    try:
        run.awaited = job.is_async
        args = job.parameters.check(run.args)
        value = await (
            job.function(run, **args) if job.is_async else _in_thread(run, job, scope, args)
        )
        while inspect.isawaitable(value):
            if run.stopped is not None:
                if inspect.iscoroutine(value):
                    value.close()
                raise asyncio.CancelledError
            run.awaited = True
            value = await value
    except (SystemExit, KeyboardInterrupt) as error:
        # A task that ended with one of these would end the event loop.
        raise RuntimeError(f"it tried to end its instance: {error!r}") from error
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        raise TypeError("it returned a generator, which is never iterated over: its body never ran")
    return value


async def _in_thread(run: Run, job: Job, scope: Scope, args: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what the function returns
    """Call a function in a thread of its own and wait until it has ended, even if cancelled."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()
    facade = ThreadRun(run)

    def report(value: object, error: BaseException | None) -> None:
        if inspect.isawaitable(value):
            facade.continue_in_event_loop()
        if error is None:
            ended.set_result(value)
        else:
            ended.set_exception(error)

    def call() -> None:
        value, error = None, None
        try:
            value = job.function(facade, **args)
        except BaseException as caught:  # noqa: BLE001 - `classify` gets it
            error = RuntimeError(repr(caught)) if isinstance(caught, StopIteration) else caught
        loop.call_soon_threadsafe(report, value, error)

    scope.submit(call)
    while True:
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            # A thread can't be cancelled: its current or next call of `facade` raises.
            if ended.done():
                return ended.result()
            facade.interrupt()


def classify(run: Run, task: "asyncio.Task[Any]") -> RunResult:
    """Return how a run's code ended."""
    stopped = run.stopped if task.cancelled() or task.cancelling() else None
    error = None if task.cancelled() else task.exception()
    finished = error is None and not task.cancelled()
    mask, instance_logger = run.kept_log.mask, run.kept_log.instance_logger
    if finished and (stopped is None or not run.awaited):
        returned = task.result()
        text = None if returned is None else storable(mask(safe_str(returned)), 2000)
        return RunResult("succeeded", text)
    if stopped is not None:  # however the function handled it
        if error is not None and not isinstance(error, RunStoppedError):
            run.kept_log.fail(error)
            instance_logger.warning("run failed when it was stopped", exc_info=error)
        return RunResult(*stopped)
    match _outage(error):
        case LeaseLostError():
            return RunResult("released", "it had lost its lease")
        case DatabaseUnavailable() | Overloaded() as outage:
            return RunResult("released", storable(mask(outage.detail)))
    if error is None:
        return RunResult("failed", "it cancelled itself")
    run.kept_log.fail(error)
    instance_logger.error("run failed", exc_info=error)
    return RunResult("failed", storable(describe(error, mask), 2000))


def _outage(error: BaseException | None) -> BaseException | None:
    """Return the outage or lost lease that an error, or all of a group, consists of; else None."""
    if isinstance(error, BaseExceptionGroup):
        inside = [_outage(each) for each in error.exceptions]
        return inside[0] if all(inside) else None
    return error if isinstance(error, LeaseLostError | DatabaseUnavailable | Overloaded) else None
