"""`balance-app up`: a database if none is configured, and several instances, on this machine.

A launcher, not a master: it starts processes, reports when each is ready, and restarts those that
end. No instance knows of it or talks to it.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

import httpx
from rich.console import Console

from balance_app.access.gate import OpenToNetworkError, open_to_network
from balance_app.access.owner import keys_are_required
from balance_app.db.migrations import UnusableDatabaseError, grant, migrate
from balance_app.db.outages import classify
from balance_app.formatting import url
from balance_app.local.instance_logs import InstanceLog, Output, open_directory
from balance_app.local.merged_console import MergedConsole
from balance_app.local.postgres import (
    SYSTEM_USER,
    EmbeddedError,
    EmbeddedPostgres,
    data_directory,
    stop_with_parent,
)
from balance_app.local.reloading import Code, Places, ReloadError
from balance_app.local.unprivileged import why_root
from balance_app.server import ListenError, listen
from balance_app.settings import Settings

READY_SECONDS: Final = 60.0
PAUSES_SECONDS: Final = (0.5, 1, 2, 4, 8, 16, 30)
HEALTHY_SECONDS: Final = 30.0  # an instance that ran this long starts again without a long pause

console = Console(highlight=False)


class LaunchError(Exception):
    """The service can't be started here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance to run: its name and its own port; as which user, None: as this one."""

    name: str
    port: int
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What `up` is called with."""

    instances: int
    # the port of all; each instance has one above it, too
    shared_port: int
    # where to keep their logs; None: in the data directory, if that is possible
    log_dir: Path | None = None
    # the code whose changes restart the instances; None: nothing does
    watched: Places | None = None


class _Requests(NamedTuple):
    """What signals request: to stop, and not to wait for that any more."""

    stop: asyncio.Event
    kill: asyncio.Event


async def launch(settings: Settings, options: Options) -> int:
    """Run everything until SIGINT or SIGTERM; return the exit code.

    Raises:
        LaunchError: a port is taken, the embedded database can't run, or logs can't be kept.
        OpenToNetworkError: there are no keys, and others can reach the instances.
    """
    requests = _Requests(asyncio.Event(), asyncio.Event())

    def request_stop() -> None:
        (requests.kill if requests.stop.is_set() else requests.stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, request_stop)

    port = options.shared_port
    fleet = [Instance(f"app{n}", port + n) for n in range(1, options.instances + 1)]
    _require_free_ports(settings.host, [port, *(instance.port for instance in fleet)])
    database: EmbeddedPostgres | None = None
    try:
        if not settings.database_is_configured:
            database = EmbeddedPostgres(data_directory(settings))
            if _is_new(database):
                await _check_posture(settings, None)
            console.print("Starting PostgreSQL ...")
            await database.start()
            await _migrate(database)
        await _check_posture(settings, database)
        return await _supervise(settings, options, fleet, database, requests)
    except EmbeddedError as error:
        raise LaunchError(str(error)) from error
    finally:
        if database is not None:
            await database.stop()
        if requests.stop.is_set():
            console.print("Stopped.")


async def _supervise(
    settings: Settings,
    options: Options,
    fleet: list[Instance],
    database: EmbeddedPostgres | None,
    requests: _Requests,
) -> int:
    """Run the instances on their database until requested to stop; return the exit code."""
    outputs = await _open_logs(settings, options.log_dir, fleet)
    reload: asyncio.Task[None] | None = None
    try:
        _print_addresses(settings, options.shared_port, database)
        environment = {
            **os.environ,
            **({} if database is None else database.environment(settings.db_run_role)),
            "HOST": settings.host,
            "DRAIN_SECONDS": "0",  # all stop together: no other takes the requests
            "SHARED_PORT": str(options.shared_port),
            **_log_environment(settings, kept=bool(outputs)),
        }
        user = None
        if database is not None and os.geteuid() == 0:
            user = await _unprivileged_user(options.shared_port, environment)
        supervisors = [
            _Supervisor(
                replace(instance, user=user),
                settings,
                environment,
                outputs.get(instance.name),
            )
            for instance in fleet
        ]
        tasks = [asyncio.create_task(each.run(*requests)) for each in supervisors]
        if database is not None:
            tasks.append(asyncio.create_task(_watch(database, requests.stop)))
        if options.watched is not None:
            code = Code(options.watched, environment, user)
            reload = asyncio.create_task(_reload(code, supervisors))
        await asyncio.wait(tasks)
        return max(task.result() for task in tasks)
    finally:
        if reload is not None:
            reload.cancel()
            await asyncio.wait({reload})
        for output in outputs.values():
            await output.close()


def _is_new(database: EmbeddedPostgres) -> bool:
    return not os.path.exists(database.data)  # noqa: PTH110 - Path's raises for some names


async def _check_posture(settings: Settings, database: EmbeddedPostgres | None) -> None:
    """Refuse to serve anybody who can reach the address, before an instance starts.

    Raises:
        OpenToNetworkError: there are no keys.
    """
    if settings.is_loopback or settings.allow_anonymous:
        return
    if database is not None:
        settings = database.settings(host=settings.host)
    if settings.database_is_configured:
        try:
            if await keys_are_required(settings.as_owner()):
                return
        except Exception as error:
            if classify(error) is None:
                raise
            return  # the instances report it, and refuse requests until they know
    raise OpenToNetworkError(open_to_network(settings))


async def _unprivileged_user(port: int, environment: dict[str, str]) -> str | None:
    """Return the user that instances run as when root starts them; None: as root."""
    why = await why_root(port, environment)
    if why is None:
        return SYSTEM_USER
    console.print(f"The instances run as root: {why}", style="red")
    return None


async def _migrate(database: EmbeddedPostgres) -> None:
    """Migrate as the superuser of the embedded database: the instances only serve.

    Raises:
        LaunchError: the schema can't be used.
    """
    owner = database.settings()
    try:
        await migrate(owner, console.print)
        await grant(owner, console.print)
    except UnusableDatabaseError as error:
        raise LaunchError(str(error)) from None


def _require_free_ports(host: str, ports: list[int]) -> None:
    try:
        for port in ports:
            listen(host, port).close()
    except ListenError as error:
        hint = " (`balance-app up --port N`, or `make run PORT=N`)" if error.of_the_port else ""
        raise LaunchError(f"{error}{hint}") from None


async def _open_logs(
    settings: Settings, given: Path | None, fleet: list[Instance]
) -> dict[str, Output]:
    """Return each instance's output, which is kept; none if that is neither possible nor requested.

    Raises:
        LaunchError: the directory that was given can't be used.
    """
    merged = MergedConsole(
        [each.name for each in fleet],
        quiet="log_level" not in settings.model_fields_set,
        as_json=settings.log_format == "json",
    )
    report = partial(console.print, style="red", markup=False)
    try:
        directory = open_directory(settings, given)
        outputs = {
            each.name: Output(InstanceLog(directory, each.name), report, merged) for each in fleet
        }
        for output in outputs.values():
            await output.open()
    except OSError as error:
        sentence = f"The instances' logs can't be kept: {error.filename}: {error.strerror}."
        if given is not None:
            raise LaunchError(sentence) from None
        report(f"{sentence} `--log-dir` names another directory.")
        return {}
    return outputs


def _log_environment(settings: Settings, *, kept: bool) -> dict[str, str]:
    """Return how the instances log: where it is kept, with more than the console shows."""
    level = settings.log_level
    if "log_level" not in settings.model_fields_set:
        level = "info" if kept else "warning"
    if not kept:
        return {"LOG_LEVEL": level}
    log_format = settings.log_format
    if log_format == "auto":  # the instances have a pipe
        log_format = "console" if sys.stderr.isatty() else "json"
    return {"LOG_LEVEL": level, "LOG_FORMAT": log_format, "PYTHONUNBUFFERED": "1"}


def _print_addresses(settings: Settings, port: int, database: EmbeddedPostgres | None) -> None:
    where = url(settings.host, port)
    console.print(f"  page       {where}")
    console.print(f"  API        {where}/api/users/1  (all instances)")
    console.print(f"  docs       {where}/docs")
    console.print(f"  database   {database.data if database else settings.database_address}")
    console.print("  Ctrl-C stops everything.\n")


class _Supervisor:
    """Keeps one instance running: starts it again when it ends, or when it is to be replaced."""

    def __init__(
        self,
        instance: Instance,
        settings: Settings,
        environment: dict[str, str],
        output: Output | None,
    ) -> None:
        self.name = instance.name
        self._instance = instance
        self._where = url(settings.host, instance.port)
        self._stop_seconds = settings.stop_seconds + 1
        self._environment = {
            **environment,
            "SERVER_ID": instance.name,
            "PORT": str(instance.port),
        }
        self._output = output
        # set while the running process is to be replaced, and when its successor is ready or ended
        self._replaced = asyncio.Event()
        self._started = asyncio.Event()
        self._is_ready = False

    async def run(self, stop: asyncio.Event, kill: asyncio.Event) -> int:
        """Run the instance until `stop`; restart it when it ends, with growing pauses."""
        ends = 0
        while not stop.is_set():
            started = monotonic()
            try:
                process = await self._start()
            except OSError as error:  # the machine has no memory or process for it just now
                reason = f"can't be started ({error.strerror})"
            else:
                ready = asyncio.create_task(self._report_ready(process))
                await _first(process.wait(), stop.wait(), self._replaced.wait())
                ready.cancel()
                if stop.is_set() or self._replaced.is_set():
                    code = await _stop(process, kill, self._stop_seconds)
                    if stop.is_set():
                        return code
                    self._replaced.clear()
                    ends = 0
                    continue
                reason = _exit_reason(process)
            self._is_ready = False
            self._started.set()
            ends = 0 if monotonic() - started > HEALTHY_SECONDS else ends
            pause = PAUSES_SECONDS[min(ends, len(PAUSES_SECONDS) - 1)]
            ends += 1
            await self._report_end(f"{reason}; restart in {pause:g} s")
            await _first(asyncio.sleep(pause), stop.wait(), self._replaced.wait())
            self._replaced.clear()
        return 0

    async def replace(self) -> bool:
        """Stop the instance, which releases its jobs, and start it; return whether it is ready."""
        self._started.clear()
        self._replaced.set()
        await self._started.wait()
        return self._is_ready

    async def _start(self) -> asyncio.subprocess.Process:
        instance = self._instance
        out, err = (None, None) if self._output is None else self._output.descriptors
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balance_app", "serve", "--launched"),
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # Ctrl-C reaches it through this process alone
            preexec_fn=stop_with_parent(signal.SIGTERM),
            user=instance.user,
            group=instance.user,
            extra_groups=None if instance.user is None else [],
        )

    async def _report_ready(self, process: asyncio.subprocess.Process) -> None:
        started = monotonic()
        self._is_ready = await _is_ready(self._where, until=started + READY_SECONDS)
        self._started.set()
        if self._is_ready:
            console.print(
                f"[bold green]{self.name}[/] ready at {self._where} "
                f"({monotonic() - started:.1f} s, pid {process.pid})"
            )
        else:
            console.print(
                f"{self.name} is not ready after {READY_SECONDS:g} s: see {self._where}/readyz"
            )

    async def _report_end(self, sentence: str) -> None:
        console.print(f"[bold red]{self.name}[/] {sentence}", style="red")
        if self._output is not None:
            await self._output.note(f"{self.name} {sentence}")


async def _is_ready(where: str, *, until: float) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
        while monotonic() < until:
            with suppress(httpx.HTTPError):
                if (await client.get(f"{where}/readyz")).is_success:
                    return True
            await asyncio.sleep(0.1)
    return False


async def _reload(code: Code, supervisors: list[_Supervisor]) -> None:
    """Restart the instances one after another on each save, if their code can be imported."""
    try:
        async for changed in code.changes():
            console.print(f"\n{_named(changed)} changed.", markup=False)
            error = await code.import_error()
            if error is not None:
                console.print(error, style="red", markup=False)
                console.print("The instances go on as they were, until the next save.")
                continue
            for supervisor in supervisors:
                if not code.saved.empty():
                    break  # what an instance would import now is not checked
                if not await supervisor.replace():
                    console.print("The others go on as they were, until the next save.")
                    break
    except ReloadError as error:
        console.print(str(error), style="red", markup=False)


def _named(files: list[Path]) -> str:
    first, *others = files
    name = os.path.relpath(first) if first.is_relative_to(Path.cwd()) else str(first)
    return f"{name} and {len(others)} more" if others else name


async def _stop(process: asyncio.subprocess.Process, kill: asyncio.Event, seconds: float) -> int:
    """Stop an instance by SIGTERM, or by SIGKILL when it takes too long; return 1 then."""
    if process.returncode is None:
        process.terminate()
        await _first(process.wait(), asyncio.sleep(seconds), kill.wait())
    if process.returncode is None:
        process.kill()
        await process.wait()
        return 1
    return 0


async def _watch(database: EmbeddedPostgres, stop: asyncio.Event) -> int:
    """Restart the database when it ends; return 1 when that fails."""
    while not stop.is_set():
        await _first(database.process.wait(), stop.wait())
        if not stop.is_set():
            console.print(f"PostgreSQL ended; restarting it (see {database.log})", style="red")
            await asyncio.sleep(0.5)
            try:
                await database.start()
            except EmbeddedError as error:
                console.print(str(error), style="red")
                stop.set()
                return 1
    return 0


async def _first(*coroutines: Coroutine[object, object, object]) -> None:
    """Wait until one of several coroutines ends; cancel the others."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _exit_reason(process: asyncio.subprocess.Process) -> str:
    code = process.returncode or 0
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
