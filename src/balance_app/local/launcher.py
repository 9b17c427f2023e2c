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
from time import monotonic
from typing import Final

import httpx
from rich.console import Console

from balance_app.access.gate import OpenToNetworkError, open_to_network
from balance_app.access.owner import keys_are_required
from balance_app.db.migrations import UnusableDatabaseError, grant, migrate
from balance_app.db.outages import classify
from balance_app.formatting import url
from balance_app.local.postgres import (
    SYSTEM_USER,
    EmbeddedError,
    EmbeddedPostgres,
    data_directory,
    stop_with_parent,
)
from balance_app.local.unprivileged import why_root
from balance_app.server import ListenError, listen
from balance_app.settings import Settings

STOP_SECONDS: Final = 4.0
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


async def launch(settings: Settings, *, instances: int, shared_port: int) -> int:
    """Run everything until SIGINT or SIGTERM; return the exit code.

    Raises:
        LaunchError: a port is taken, or the embedded database can't run.
        OpenToNetworkError: there are no keys, and others can reach the instances.
    """
    stop = asyncio.Event()
    kill = asyncio.Event()

    def request_stop() -> None:
        (kill if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, request_stop)

    fleet = [Instance(f"app{n}", shared_port + n) for n in range(1, instances + 1)]
    _require_free_ports(settings.host, [shared_port, *(instance.port for instance in fleet)])
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
        _print_addresses(settings, shared_port, database)
        chosen = "log_level" in settings.model_fields_set
        log_level = settings.log_level if chosen else "warning"
        environment = {
            **os.environ,
            **({} if database is None else database.environment(settings.db_run_role)),
            "HOST": settings.host,
            "DRAIN_SECONDS": "0",  # all stop together: no other takes the requests
            "SHARED_PORT": str(shared_port),
            "LOG_LEVEL": log_level,
        }
        user = None
        if database is not None and os.geteuid() == 0:
            user = await _unprivileged_user(shared_port, environment)
        supervisors = [
            asyncio.create_task(
                _keep_running(replace(instance, user=user), environment, settings.host, stop, kill)
            )
            for instance in fleet
        ]
        if database is not None:
            supervisors.append(asyncio.create_task(_watch(database, stop)))
        await asyncio.wait(supervisors)
        return max(supervisor.result() for supervisor in supervisors)
    except EmbeddedError as error:
        raise LaunchError(str(error)) from error
    finally:
        if database is not None:
            await database.stop()
        if stop.is_set():
            console.print("Stopped.")


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


def _print_addresses(settings: Settings, port: int, database: EmbeddedPostgres | None) -> None:
    where = url(settings.host, port)
    console.print(f"  page       {where}")
    console.print(f"  API        {where}/api/users/1  (all instances)")
    console.print(f"  docs       {where}/docs")
    console.print(f"  database   {database.data if database else settings.database_address}")
    console.print("  Ctrl-C stops everything.\n")


async def _keep_running(
    instance: Instance,
    environment: dict[str, str],
    host: str,
    stop: asyncio.Event,
    kill: asyncio.Event,
) -> int:
    """Run an instance until `stop`; restart it when it ends, with growing pauses."""
    ends = 0
    while not stop.is_set():
        started = monotonic()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balance_app", "serve", "--launched"),
            env={**environment, "SERVER_ID": instance.name, "PORT": str(instance.port)},
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches it through this process alone
            preexec_fn=stop_with_parent(signal.SIGTERM),
            user=instance.user,
            group=instance.user,
            extra_groups=None if instance.user is None else [],
        )
        ready = asyncio.create_task(_report_ready(instance, host, process))
        await _first(process.wait(), stop.wait())
        ready.cancel()
        if stop.is_set():
            return await _stop(process, kill)
        ends = 0 if monotonic() - started > HEALTHY_SECONDS else ends
        pause = PAUSES_SECONDS[min(ends, len(PAUSES_SECONDS) - 1)]
        ends += 1
        console.print(
            f"[bold red]{instance.name}[/] {_exit_reason(process)}; restart in {pause:g} s",
            style="red",
        )
        await _first(asyncio.sleep(pause), stop.wait())
    return 0


async def _report_ready(instance: Instance, host: str, process: asyncio.subprocess.Process) -> None:
    started = monotonic()
    where = url(host, instance.port)
    async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
        while monotonic() - started < READY_SECONDS:
            with suppress(httpx.HTTPError):
                if (await client.get(f"{where}/readyz")).is_success:
                    took = monotonic() - started
                    console.print(
                        f"[bold green]{instance.name}[/] ready at {where} "
                        f"({took:.1f} s, pid {process.pid})"
                    )
                    return
            await asyncio.sleep(0.1)
    console.print(f"{instance.name} is not ready after {READY_SECONDS:g} s: see {where}/readyz")


async def _stop(process: asyncio.subprocess.Process, kill: asyncio.Event) -> int:
    """Stop an instance by SIGTERM, or by SIGKILL when it takes too long; return 1 then."""
    if process.returncode is None:
        process.terminate()
        await _first(process.wait(), asyncio.sleep(STOP_SECONDS), kill.wait())
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
