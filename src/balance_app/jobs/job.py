"""Jobs as code declares them; a declaration that can't work is refused before any job runs."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import entry_points
from textwrap import shorten
from traceback import extract_tb
from types import ModuleType
from typing import Any, Final, Literal, Self

from typing_extensions import override

from balance_app.jobs.arguments import ArgumentsError, Parameters
from balance_app.jobs.schedule import LONGEST, Cron, Every, Schedule

# async def f(run: Run, *, ...) -> str | None, or def f(run: ThreadRun, *, ...) -> str | None
Function = Callable[..., Any]

MOST_BACKOFF: Final = 10
# More than two polls of an instance that has nothing to run (`IDLE_POLL_SECONDS`).
SHORTEST_START: Final = timedelta(seconds=5)
# Installed packages name their modules of jobs, or single jobs, under this group of entry points.
ENTRY_POINTS: Final = "balance_app.jobs"
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_MODULE: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
# text is UTF-8 without NUL
_UNSTORABLE: Final = re.compile("[\\0\ud800-\udfff]")


class DeclarationError(ValueError):
    """A declaration that can't work; the message names the job and the wrong value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A function with a name and a schedule. Durations are in seconds; None: no such limit."""

    name: str
    function: Function
    schedule: Schedule
    timeout_seconds: float | None
    retry_after_seconds: float | None
    # the factor by which each further retry of a tick waits longer
    retry_backoff: float
    max_retries: int | None
    # how many failures in a row pause the job; None: no number does
    pause_after_failures: int | None
    # None: JOB_MIN_SECONDS
    min_seconds: float | None
    jitter_seconds: float
    # what the function is called with, beside its run
    args: Mapping[str, Any]
    parameters: Parameters
    # a tick that no instance started so long after it was ready is skipped; None: it runs, late
    start_within_seconds: float | None

    def args_with(self, requested: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the declared arguments, replaced by those that a run is requested with."""
        return {**self.args, **(requested or {})}

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function; any other runs in a thread."""
        call = getattr(self.function, "__call__", None)  # noqa: B004 - it may be a callable object
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    @property
    def description(self) -> str:
        """The function's docstring, for people."""
        return inspect.getdoc(self.function) or ""


def job(  # noqa: PLR0913 - each is an option of a job
    *,
    name: str,
    every: timedelta | None = None,
    cron: str | None = None,
    tz: str | None = None,
    timeout: timedelta | None = None,
    retry_after: timedelta | None = None,
    retry_backoff: float = 2.0,
    max_retries: int | None = None,
    pause_after_failures: int | None = None,
    min_duration: timedelta | None = None,
    jitter: timedelta = timedelta(0),
    args: Mapping[str, object] | None = None,
    late: Literal["run", "skip"] = "run",
    start_within: timedelta | None = None,
) -> Callable[[Function], Job]:
    """Declare a function as a job.

    Args:
        name: lower-case letters, digits and hyphens; unique among all jobs.
        every: the interval between ticks, at least a second.
        cron: instead of `every`: five fields as in crontab(5), or `@daily` and the like.
        tz: the time zone of `cron` (default UTC).
        timeout: a run that lasts longer is stopped; its outcome is `timed_out`.
        retry_after: the tick of a run that failed or timed out is retried after this (and up to a
            tenth more, at random), unless the next tick is due first.
        retry_backoff: each further retry of a tick waits this many times as long as the one
            before, up to an hour, or `retry_after` if that is longer; 1 to 10.
        max_retries: the most retries of a tick (default: any number, until the next tick).
        pause_after_failures: the job is paused when this many runs in a row failed or timed out.
        min_duration: a run lasts at least this long (default: JOB_MIN_SECONDS).
        jitter: each tick starts later by a random time up to this, and never after the next tick.
        args: what the function is called with, by the names of its parameters behind the first;
            JSON that its type hints allow. Who requests a run may give others.
        late: a tick that no instance has started in time runs late (`run`), or is recorded as
            skipped (`skip`). A run that was lost, and a tick that is tried again, are never late.
        start_within: with `skip`, what is in time: so long after the tick, and its jitter.

    Raises:
        DeclarationError: one sentence that names the job and the value.
    """

    def declare(function: Function) -> Job:
        _check_name(name)
        _check_function(name, function)
        _check_durations(
            name,
            every=every,
            timeout=timeout,
            retry_after=retry_after,
            min_duration=min_duration,
            start_within=start_within,
        )
        _check_durations(name, jitter=jitter, optional=False)
        _check_texts(name, cron=cron, tz=tz)
        if (every is None) == (cron is None):
            raise DeclarationError(f"Job {name}: give either every= or cron=.")
        if every is not None and tz is not None:
            raise DeclarationError(f"Job {name}: tz={tz!r} is allowed only with cron=.")
        try:
            schedule = (
                Every(every) if every is not None else Cron(cron or "", "UTC" if tz is None else tz)
            )
        except ValueError as error:
            raise DeclarationError(f"Job {name}: {error}") from None
        for label, value in {"timeout": timeout, "retry_after": retry_after}.items():
            if value is not None and value <= timedelta(0):
                raise DeclarationError(f"Job {name}: {label} is {value}; it must be above zero.")
        if min_duration is not None and min_duration < timedelta(0):
            raise DeclarationError(f"Job {name}: min_duration is {min_duration}: below zero.")
        _check_retries(name, retry_after, retry_backoff, max_retries, pause_after_failures)
        _check_late(name, late, start_within)
        parameters = _parameters(name, function, args or {})
        if jitter < timedelta(0) or (every is not None and jitter >= every):
            raise DeclarationError(
                f"Job {name}: jitter is {jitter}; it must be between zero and the interval."
            )
        if timeout and min_duration and timeout <= min_duration:
            raise DeclarationError(
                f"Job {name}: timeout ({timeout}) must be above min_duration ({min_duration}), "
                "or no run can succeed."
            )
        return Job(
            name=name,
            function=function,
            schedule=schedule,
            timeout_seconds=timeout.total_seconds() if timeout else None,
            retry_after_seconds=retry_after.total_seconds() if retry_after else None,
            retry_backoff=retry_backoff,
            max_retries=max_retries,
            pause_after_failures=pause_after_failures,
            min_seconds=None if min_duration is None else min_duration.total_seconds(),
            jitter_seconds=jitter.total_seconds(),
            args=dict(args or {}),
            parameters=parameters,
            start_within_seconds=start_within.total_seconds() if start_within else None,
        )

    return declare


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DeclarationError(
            f"A job can't be named {_shown(name)}: a name is up to 63 lower-case letters, "
            "digits and hyphens, and begins with a letter."
        )


def _check_function(name: str, function: Function) -> None:
    if not callable(function) or _yields(function):
        raise DeclarationError(
            f"Job {name}: {function!r} is not a function that runs when it is called."
        )
    if (character := _UNSTORABLE.search(inspect.getdoc(function) or "")) is not None:
        raise DeclarationError(
            f"Job {name}: its description (the docstring) has {character[0]!r}, which "
            "PostgreSQL can't hold."
        )


def _check_durations(name: str, *, optional: bool = True, **durations: object) -> None:
    for label, value in durations.items():
        if value is None and optional:
            continue
        if not isinstance(value, timedelta):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            instead = f"timedelta(seconds={value})" if number else "timedelta(minutes=5)"
            raise DeclarationError(
                f"Job {name}: {label} is {_shown(value)}; write a timedelta, like {instead}."
            )
        if value > LONGEST and label != "every":
            raise DeclarationError(
                f"Job {name}: {label} is {value}; it must be at most {LONGEST.days} days."
            )


def _check_texts(name: str, **texts: object) -> None:
    for label, value in texts.items():
        if not isinstance(value, str | None):
            raise DeclarationError(
                f"Job {name}: {label} is {_shown(value)}, which is not a string."
            )


def _shown(value: object) -> str:
    """Return a value in one short line."""
    return _in_one_line(repr(value), 100)


def _in_one_line(text: str, limit: int = 300) -> str:
    return shorten(text, limit, placeholder=" ...")


def _check_retries(
    name: str,
    retry_after: timedelta | None,
    retry_backoff: float,
    max_retries: int | None,
    pause_after_failures: int | None,
) -> None:
    if not isinstance(retry_backoff, int | float) or not 1 <= retry_backoff <= MOST_BACKOFF:
        raise DeclarationError(
            f"Job {name}: retry_backoff is {_shown(retry_backoff)}; it must be between 1 and "
            f"{MOST_BACKOFF}."
        )
    for label, count in {
        "max_retries": max_retries,
        "pause_after_failures": pause_after_failures,
    }.items():
        if count is not None and (type(count) is not int or count < 1):
            raise DeclarationError(
                f"Job {name}: {label} is {_shown(count)}; it must be a whole number above zero."
            )
    if max_retries is not None and retry_after is None:
        raise DeclarationError(
            f"Job {name}: max_retries={max_retries} is allowed only with retry_after=."
        )


def _check_late(name: str, late: object, start_within: timedelta | None) -> None:
    if late not in {"run", "skip"}:
        raise DeclarationError(f"Job {name}: late is {_shown(late)}; it must be 'run' or 'skip'.")
    if (late == "skip") != (start_within is not None):
        raise DeclarationError(
            f"Job {name}: late='skip' and start_within= have a meaning only together."
        )
    if start_within is not None and start_within < SHORTEST_START:
        raise DeclarationError(
            f"Job {name}: start_within is {start_within}; it must be at least {SHORTEST_START}: an "
            "instance may come for a tick that much later."
        )


def _parameters(name: str, function: Function, args: object) -> Parameters:
    if not isinstance(args, Mapping) or not all(isinstance(key, str) for key in args):
        raise DeclarationError(f"Job {name}: args is {_shown(args)}; write a dict of names.")
    try:
        parameters = Parameters(function)
        parameters.check(args)
    except TypeError as error:
        raise DeclarationError(f"Job {name}: its parameters can't be used: {error}.") from None
    except ArgumentsError as error:
        raise DeclarationError(f"Job {name}: args: {error}.") from None
    return parameters


def _yields(function: Function) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _sources(modules: str, *, installed: bool) -> Iterator[tuple[str, list[Job]]]:
    """Yield where jobs come from, and the jobs found there."""
    for name in filter(None, map(str.strip, modules.split(","))):
        if not _MODULE.fullmatch(name):
            raise DeclarationError(
                f"JOBS_MODULES: {_shown(name)} is not the name of a module: write it as after "
                "`import`, like acme.jobs."
            )
        where = f"JOBS_MODULES: {name}"
        with _import_errors(where, name):
            module = import_module(name)
        yield name, _jobs_of(module, where)
    for point in sorted(entry_points(group=ENTRY_POINTS)) if installed else ():
        package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        where = f"{point.value} (entry point {point.name}{package})"
        with _import_errors(where, point.module):
            loaded = point.load()
        yield where, [loaded] if isinstance(loaded, Job) else _jobs_of(loaded, where)


def _jobs_of(module: object, where: str) -> list[Job]:
    """Return the jobs that a module has among its names; the same one under two names once."""
    if not isinstance(module, ModuleType):
        raise DeclarationError(f"{where} is {_shown(module)}: neither a module nor a job.")
    jobs = {id(each): each for each in vars(module).values() if isinstance(each, Job)}
    if not jobs:
        raise DeclarationError(f"{where} has no job: nothing in it was declared with @job.")
    return list(jobs.values())


@contextmanager
def _import_errors(where: str, module: str) -> Iterator[None]:
    """Report whatever an import raises in one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise DeclarationError(f"{where} can't be imported: {_reason(error, module)}") from error


def _reason(error: BaseException, module: str) -> str:
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return (
            f"there is no module {error.name}. Install its package, or name the folder that it is "
            "in in PYTHONPATH."
        )
    text = _in_one_line(f"{type(error).__name__}: {error}")
    frames = [each for each in extract_tb(error.__traceback__) if "importlib" not in each.filename]
    last = frames[-1]
    # A syntax error says itself where it is; an attribute that is missing is missed here.
    if isinstance(error, SyntaxError) or last.filename == __file__:
        return text
    return f"{text} ({last.filename}, line {last.lineno})"


def _place(job: Job) -> str:
    """Return where a job's function is defined."""
    function = job.function
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{name}"


class Registry(Mapping[str, Job]):
    """The jobs that an instance has the code of, by name.

    Attributes:
        origins: by name, where each was loaded from: a module, or an entry point of a package.

    Raises:
        DeclarationError: two jobs have one name.
    """

    def __init__(self, jobs: Iterable[Job], origins: Mapping[str, str] | None = None) -> None:
        self.origins: Final = dict(origins or {})
        self._jobs: dict[str, Job] = {}
        for each in jobs:
            if each.name in self._jobs:
                both = f"{_place(self._jobs[each.name])} and {_place(each)}"
                raise DeclarationError(f"Two jobs are named {each.name}: {both}.")
            self._jobs[each.name] = each

    @classmethod
    def load(cls, modules: str, *, installed: bool = False) -> Self:
        """Return the jobs of modules, and with `installed` those of entry points as well.

        A job that several of them have is one job.

        Args:
            modules: their names, with commas between them, as in JOBS_MODULES.
            installed: load what installed packages name as entry points `balance_app.jobs`, too.

        Raises:
            DeclarationError: one sentence that names the module or entry point, and the reason: it
                can't be imported, or has no job; or two jobs have one name.
        """
        jobs: dict[int, Job] = {}
        origins: dict[str, str] = {}
        for origin, found in _sources(modules, installed=installed):
            for each in found:
                jobs[id(each)] = each
                origins.setdefault(each.name, origin)
        return cls(jobs.values(), origins)

    def check(self, *, min_seconds: float) -> None:
        """Refuse jobs whose timeout is not above the minimum duration of a run.

        Raises:
            DeclarationError: it names the job and the values.
        """
        for each in self._jobs.values():
            least = min_seconds if each.min_seconds is None else each.min_seconds
            if each.timeout_seconds is not None and each.timeout_seconds <= least:
                raise DeclarationError(
                    f"Job {each.name}: its timeout ({each.timeout_seconds:g} s) must be above its "
                    f"minimum duration ({least:g} s, by JOB_MIN_SECONDS), or no run can succeed."
                )

    @override
    def __getitem__(self, name: str) -> Job:
        return self._jobs[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    @override
    def __len__(self) -> int:
        return len(self._jobs)
