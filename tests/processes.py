"""Instances of the service as processes, and databases, for the tests."""

import asyncio
import os
import random
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import ClassVar, Self, cast
from urllib.parse import urlencode
from uuid import uuid4

import asyncpg
import httpx

from balance_app.local.postgres import SUPERUSER
from balance_app.settings import Settings
from tests import fork_server

START_SECONDS = 60
# Programs that the fork server has imported; any other one is run by a new Python process.
SERVE = ("balance_app", "serve")
FLEET = ("tests.jobs.fleet",)
RUN_ROLE = Settings.model_fields["db_run_role"].default
DATABASE_VARIABLES = ("DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME", "DATABASE_URL")
# Servers whose instances serve through a pooler (tests/pooler.py): its port, by host and port.
poolers: dict[tuple[str, str], int] = {}


def free_port() -> int:
    """Return a free port, reserved until these tests end."""
    return _reserve(0)


def free_ports(number: int, below: int) -> int:
    """Return the first of several consecutive free ports, all below a limit, reserved likewise."""
    while True:
        first = random.randrange(1024, below - number)
        try:
            return min(_reserve(port) for port in range(first, first + number))
        except OSError:
            continue


def _reserve(port: int) -> int:
    holder = socket.socket()
    _holders.append(holder)
    # Bound exclusively, then shared: Linux lets sockets that all set SO_REUSEADDR (as the instances
    # do) bind one port as long as only the last one listens. The kernel assigns a bound port
    # neither to a client nor to a bind of port 0.
    holder.bind(("127.0.0.1", port))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return int(holder.getsockname()[1])


_holders: list[socket.socket] = []


class KeptLogs:
    """The logs of all instances of a run of the tests: no secret may be in them."""

    KEY: ClassVar = re.compile(rb"b[as]_[0-9a-z]{12}_[0-9A-Za-z_-]{20}")
    SECRET_FROM: ClassVar = 8  # characters; shorter passwords of tests are words

    def __init__(self) -> None:
        self.directory: Path | None = None  # None: they are thrown away
        self._paths: set[Path] = set()
        self._passwords: set[bytes] = set()

    def add(self, name: str, path: Path | None, environment: Mapping[str, str]) -> Path:
        """Return where an instance logs: in a file of the test's, or in one of these."""
        password = environment.get("DB_PASSWORD", "")
        if len(password) >= self.SECRET_FROM:
            self._passwords.add(password.encode())
        if path is None:
            if self.directory is None:
                return Path(os.devnull)
            path = self.directory / f"{name}-{uuid4().hex}.log"
        self._paths.add(path)
        return path

    def secrets(self) -> list[str]:
        """Return the lines that have a key, a session or a password in them."""
        return [
            f"{path.name}: {line.decode(errors='replace')}"
            for path in self._paths
            if path.exists()
            for line in path.read_bytes().splitlines()
            if self.KEY.search(line) or any(each in line for each in self._passwords)
        ]


kept_logs = KeptLogs()


class Instance:
    """One instance of the service, as a process of its own."""

    def __init__(
        self,
        database: dict[str, str],
        name: str = "app1",
        *,
        log: Path | None = None,
        program: Sequence[str] = SERVE,
        **env: str,
    ) -> None:
        self.name = name
        self._program = program
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._environment = {
            **{k: v for k, v in os.environ.items() if k not in DATABASE_VARIABLES},
            **as_instance(database),
            "SERVER_ID": name,
            "PORT": str(self.port),
            "LOG_FORMAT": "json",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            **env,
        }
        self.process: asyncio.subprocess.Process | None = None

    def move(self, port: int) -> None:
        """Listen on another port from the next start on, as one whose place it takes."""
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._environment["PORT"] = str(port)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def launch(self) -> None:
        """Start the process, without waiting until it is ready."""
        path = kept_logs.add(self.name, self._log, self._environment)
        module, *arguments = self._program
        if fork_server.running and module in fork_server.FORKABLE:
            child = await fork_server.running[0].fork(
                module,
                *arguments,
                files=(os.devnull, str(path), str(path)),
                environment=self._environment,
            )
            self.process = cast("asyncio.subprocess.Process", child)
            return
        options = () if module.startswith("-") else ("-m",)
        with path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, *options, *self._program),
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[1],
            )

    async def ready(self, within_seconds: float = START_SECONDS) -> None:
        """Wait until `/readyz` succeeds."""
        deadline = monotonic() + within_seconds
        async with http_client(timeout=5) as client:
            while monotonic() < deadline:
                assert self.process is not None
                if self.process.returncode is not None:
                    raise AssertionError(f"{self.name} ended: {self.process.returncode}")
                with suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/readyz")).is_success:
                        return
                await asyncio.sleep(0.05)
        raise AssertionError(f"{self.name} is not ready within {within_seconds} s")

    async def stop(self, number: int = signal.SIGTERM, within_seconds: float = 10) -> int:
        """Signal the process, wait for its end (at last by SIGKILL), return the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
            try:
                await asyncio.wait_for(self.process.wait(), within_seconds)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        assert self.process.returncode is not None
        return self.process.returncode

    async def kill(self) -> None:
        """End the process with SIGKILL."""
        await self.stop(signal.SIGKILL)

    async def __aenter__(self) -> Self:
        await self.launch()
        try:
            await self.ready()
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


@asynccontextmanager
async def running(instances: list[Instance]) -> AsyncIterator[list[Instance]]:
    """Run several instances, started together."""
    try:
        for instance in instances:
            await instance.launch()
        await asyncio.gather(*(instance.ready() for instance in instances))
        yield instances
    finally:
        await asyncio.gather(
            *(instance.stop() for instance in instances if instance.process is not None)
        )


@asynccontextmanager
async def served(
    database: dict[str, str], *, log: Path | None = None, program: Sequence[str] = SERVE, **env: str
) -> AsyncIterator[httpx.AsyncClient]:
    """Run one instance, by default without jobs; yield an HTTP client of it."""
    env = {"JOBS_ENABLED": "false", **env}
    async with (
        Instance(database, log=log, program=program, **env) as instance,
        http_client(instance.url, timeout=60) as client,
    ):
        yield client


def http_client(base_url: str = "", *, timeout: float = 30) -> httpx.AsyncClient:
    """Return a client without proxies and TLS, whose authorities take long to load."""
    return httpx.AsyncClient(base_url=base_url, timeout=timeout, trust_env=False, verify=False)  # noqa: S501


def as_instance(database: dict[str, str]) -> dict[str, str]:
    """Return the variables of an instance on a database of the embedded superuser.

    It migrates as the superuser, and serves as the role that may only serve. Any other user stays.
    """
    if database.get("DB_USER") != SUPERUSER or not database.get("DB_HOST"):
        return database
    if {"DATABASE_URL", "DB_PASSWORD"} & database.keys():
        return database
    serving = {"MIGRATE_DATABASE_URL": url_of(database), **database, "DB_USER": RUN_ROLE}
    pooler = poolers.get((database["DB_HOST"], database["DB_PORT"]))
    return serving if pooler is None else through(pooler, serving)


def through(pooler: int, database: dict[str, str]) -> dict[str, str]:
    """Return the variables of an instance that serves through a pooler at a port."""
    pooled = {"DB_HOST": "127.0.0.1", "DB_PORT": str(pooler), "DB_POOLER": "transaction"}
    return {"DB_DIRECT_URL": url_of(database), **database, **pooled}


def url_of(database: dict[str, str]) -> str:
    """Return the URL of a database of an embedded server."""
    place = urlencode({"host": database["DB_HOST"], "port": database["DB_PORT"]})
    return f"postgresql://{database['DB_USER']}@/{database['DB_NAME']}?{place}"


async def connect(database: dict[str, str]) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect to the database that these DB_* variables name."""
    if "DATABASE_URL" in database:
        return await asyncpg.connect(database["DATABASE_URL"])
    return await asyncpg.connect(
        host=database["DB_HOST"],
        port=int(database.get("DB_PORT", "5432")),
        user=database.get("DB_USER", "postgres"),
        password=database.get("DB_PASSWORD"),
        database=database.get("DB_NAME", "postgres"),
    )


@asynccontextmanager
async def unguarded(connection: "asyncpg.Connection[asyncpg.Record]") -> AsyncIterator[None]:
    """Open a transaction that writes past triggers and foreign keys, as only a superuser can."""
    async with connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        yield


async def query(database: dict[str, str], sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Run one statement on a connection of its own; return its rows."""
    connection = await connect(database)
    try:
        return await connection.fetch(sql, *arguments)
    finally:
        await connection.close()


async def major_version(database: dict[str, str]) -> int:
    """Return the version of a server, such as 17."""
    ((number,),) = await query(database, "SELECT current_setting('server_version_num')::int")
    return int(number) // 10_000


async def flush_counters(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Have the server count what a session has changed."""
    if connection.get_server_version().major >= 15:
        await connection.execute("SELECT pg_stat_force_next_flush()")
        return
    # A session reports twice a second at most, at the end of a statement; it is shown as late.
    await asyncio.sleep(0.6)
    await connection.execute("SELECT")
    await asyncio.sleep(0.6)


@asynccontextmanager
async def empty_database(
    server: Mapping[str, str], template: str = "template1"
) -> AsyncIterator[dict[str, str]]:
    """Make a database, empty or a copy of one; yield its DB_* variables, drop it at the end."""
    name = f"test_{uuid4().hex}"  # other tests may use the same server at the same time
    admin = await connect(dict(server))
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield {**server, "DB_NAME": name}
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()
