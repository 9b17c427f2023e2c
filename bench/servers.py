"""What is measured: the service, stand-ins that do less, and the same written as one usually does.

Each arm is a program that listens at PORT and answers `POST /api/balance`. Arms with other tables
have a database of their own; all are on one PostgreSQL.
"""

import asyncio
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from balance_app.balances.repository import CHANGE
from balance_app.db.migrations import migrate
from balance_app.http.body import MAX_INTEGER
from balance_app.local.postgres import EmbeddedPostgres, binaries
from balance_app.settings import Settings, load_settings
from bench.fire import Volley
from tests.processes import as_instance, connect, http_client, query

HERE: Final = Path(__file__).parent
PEERS: Final = HERE / "peers"
PGBENCH_SECONDS: Final = 2
READY_SECONDS: Final = 300
STOP_SECONDS: Final = 10
MIB: Final = 2**20
PLENTY: Final = 10**12
INTERNAL_ERROR: Final = 500
STAND_IN: Final = (sys.executable, str(HERE / "stand_ins.py"))

OPEN: Final = """
WITH opened AS (
    INSERT INTO users (balance, version, hash)
    SELECT $1::bigint, 1, sha256('') FROM generate_series(1, $2::bigint) RETURNING id
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance, hash)
    SELECT id, 1, $1, $1, sha256('') FROM opened
)
SELECT min(id) FROM opened
"""
OPEN_UNCHAINED: Final = """
WITH opened AS (
    INSERT INTO users (balance, version)
    SELECT $1::bigint, 1 FROM generate_series(1, $2::bigint) RETURNING id
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance)
    SELECT id, 1, $1, $1 FROM opened
)
SELECT min(id) FROM opened
"""
PEER_TABLES: Final = """
CREATE TABLE users (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    balance bigint NOT NULL CHECK (balance >= 0),
    version bigint NOT NULL
);
CREATE TABLE entries (
    user_id bigint NOT NULL REFERENCES users,
    version bigint NOT NULL,
    amount bigint NOT NULL,
    balance bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, version)
)
"""


class Arm(NamedTuple):
    """One program under measurement."""

    title: str
    program: Sequence[str]
    database: str
    instances: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    needs_node: bool = False


POOL_SIZES: Final = (2, 3, 5, 10)
# This Python, and others that have the service's packages, by their versions.
PYTHONS: Final = {
    platform.python_version(): sys.executable,
    **{
        subprocess.check_output([path, "-V"], text=True).split()[1]: path
        for path in os.environ.get("BENCH_PYTHONS", "").split()
    },
}
_GROUP: Final = (("BALANCE_GROUP_COMMIT", "true"),)
_NODE: Final = shutil.which("node") or "node"
_FASTIFY: Final = (_NODE, str(PEERS / "fastify.js"))
ARMS: Final = {
    "service": Arm("balance_app", (*STAND_IN, "service"), "service"),
    "service x5": Arm("balance_app, 5 instances", (*STAND_IN, "service"), "service", 5),
    "grouped": Arm(
        "balance_app, group commit", (*STAND_IN, "service"), "service", environment=_GROUP
    ),
    "grouped x5": Arm(
        "balance_app, group commit, 5 instances", (*STAND_IN, "service"), "service", 5, _GROUP
    ),
    **{
        f"pool of {size}": Arm(
            f"{size} connections",
            (*STAND_IN, "service"),
            "service",
            environment=(("DB_POOL_SIZE", str(size)),),
        )
        for size in POOL_SIZES
    },
    **{
        f"python {version}": Arm(f"Python {version}", (path, STAND_IN[1], "service"), "service")
        for version, path in PYTHONS.items()
    },
    "constant": Arm("balance_app, no database call", (*STAND_IN, "constant"), "service"),
    "unchained": Arm("balance_app, no hash chain", (*STAND_IN, "unchained"), "unchained"),
    "bare": Arm("bare ASGI callable: the floor", (*STAND_IN, "bare"), "service"),
    "fastify": Arm("Fastify + pg, with ledger", _FASTIFY, "peers", needs_node=True),
    "fastify, no ledger": Arm(
        "Fastify + pg, no ledger",
        *(_FASTIFY, "peers", 1, (("LEDGER", "no"),)),
        needs_node=True,
    ),
    "fastapi": Arm(
        "FastAPI + asyncpg, with ledger",
        (sys.executable, str(PEERS / "fastapi_asyncpg.py")),
        "peers",
    ),
    "express": Arm(
        "Express + Sequelize, with ledger",
        (_NODE, str(PEERS / "express.js")),
        "peers",
        needs_node=True,
    ),
}


def skipped(name: str) -> str | None:
    """Return why an arm can't be measured here, if so."""
    arm = ARMS[name]
    if arm.needs_node and not shutil.which("node"):
        return "Node is not installed"
    if arm.needs_node and not (PEERS / "node_modules").exists():
        return "its packages are not installed: npm ci in bench/peers"
    return None


@asynccontextmanager
async def postgres_server(
    data: Path | None = None, **options: str
) -> AsyncIterator[EmbeddedPostgres]:
    """Run a PostgreSQL with the databases of the arms, in a new directory or a kept one."""
    with tempfile.TemporaryDirectory(prefix="balance-app-bench-") as top:
        Path(top).chmod(0o711)
        wanted = {"max_connections": "400", **options}
        postgres = EmbeddedPostgres(data or Path(top) / "data", options=wanted)
        await postgres.start()
        try:
            await _make_databases(postgres)
            yield postgres
        finally:
            await postgres.stop()


async def _make_databases(postgres: EmbeddedPostgres) -> None:
    server = postgres.environment()
    there = {row[0] for row in await query(server, "SELECT datname FROM pg_database")}
    for name in ("service", "unchained", "peers"):
        if name not in there:
            await query(server, f'CREATE DATABASE "{name}"')
    if "peers" not in there:
        connection = await connect({**server, "DB_NAME": "peers"})
        await connection.execute(PEER_TABLES)
        await connection.close()
    for name in ("service", "unchained"):
        await migrate(settings_of({**server, "DB_NAME": name}))


def settings_of(database: dict[str, str]) -> Settings:
    """Return the settings of an instance of a database, as these DB_* variables name it."""
    return load_settings(**{name.lower(): value for name, value in database.items()})


class Server:
    """The running instances of an arm."""

    def __init__(self, urls: list[str], pids: list[int], database: dict[str, str]) -> None:
        self.urls = urls
        self.database = database
        self.key: str | None = None
        self.processes = [psutil.Process(pid) for pid in pids]

    @property
    def url(self) -> str:
        """The first instance's."""
        return self.urls[0]

    def cpu_seconds(self) -> float:
        """Return the CPU time that they have used."""
        each = [process.cpu_times() for process in self.processes]
        return float(sum(times.user + times.system for times in each))

    def peak_megabytes(self) -> float:
        """Return the most memory that one of them has had resident."""
        found = 0.0
        for process in self.processes:
            text = Path(f"/proc/{process.pid}/status").read_text()
            found = max(found, int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)
        return found

    async def open(self, balance: int, accounts: int = 1) -> int:
        """Create accounts with following ids; return the first one."""
        chained = self.database["DB_NAME"] not in {"peers", "unchained"}
        sql = OPEN if chained else OPEN_UNCHAINED
        ((first,),) = await query(self.database, sql, balance, accounts)
        return int(first)

    async def fire(self, volley: Volley) -> dict[str, Any]:
        """Send from another process; return what `bench/fire.py` prints."""
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, HERE / "fire.py", json.dumps(volley._asdict())),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": _path(), "BENCH_KEY": self.key or ""},
        )
        out, _ = await client.communicate()
        shot: dict[str, Any] = json.loads(out)
        return shot


def _path() -> str:
    return os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))


@asynccontextmanager
async def running(
    name: str, postgres: EmbeddedPostgres, *, database: str | None = None
) -> AsyncIterator[Server]:
    """Run an arm."""
    async with running_all([name], postgres, database=database) as servers:
        yield servers[name]


@asynccontextmanager
async def running_all(
    names: Sequence[str], postgres: EmbeddedPostgres, *, database: str | None = None
) -> AsyncIterator[dict[str, Server]]:
    """Run several arms at once, started together."""
    async with AsyncExitStack() as stack:
        servers = {}
        for name in names:
            arm = ARMS[name]
            place = {**postgres.environment(), "DB_NAME": database or arm.database}
            started = [await _start(arm, place, stack) for _ in range(arm.instances)]
            urls = [f"http://127.0.0.1:{port}" for port, _ in started]
            servers[name] = Server(urls, [pid for _, pid in started], place)
        await asyncio.gather(*(_ready(url) for each in servers.values() for url in each.urls))
        yield servers


async def _start(arm: Arm, place: dict[str, str], stack: AsyncExitStack) -> tuple[int, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *arm.program,
        env={
            **os.environ,
            **as_instance(place),
            "PGHOST": place["DB_HOST"],
            "PGUSER": place["DB_USER"],
            "PGDATABASE": place["DB_NAME"],
            "PYTHONPATH": _path(),
            "NODE_ENV": "production",
            "PORT": str(port),
            "LOG_LEVEL": "warning",
            **dict(arm.environment),
        },
    )
    stack.push_async_callback(_stop, process)
    return port, process.pid


async def _stop(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _ready(url: str) -> None:
    """Wait for an answer: the service has a path that says it is ready, the others answer 404."""
    async with asyncio.timeout(READY_SECONDS), http_client() as client:
        while True:
            with suppress(Exception):
                if (await client.get(f"{url}/readyz")).status_code < INTERNAL_ERROR:
                    return
            await asyncio.sleep(0.05)


async def pgbench(
    socket_directory: Path,
    clients: int,
    user: object,
    *,
    database: str = "postgres",
    setup: str = "",
) -> float:
    """Return how many times per second pgbench runs the statement of a change.

    `user` is an id, or a variable of pgbench that the `setup` before each statement sets.
    """
    # no entity tag, reversal, reference or note
    values = {"$1": user, "$2": -2, "$3": MAX_INTEGER, "$9": "sha256('')"}
    change = re.sub(r"\$\d", lambda name: str(values.get(name[0], "NULL")), CHANGE)
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"{setup}{change};")
        script.flush()
        process = await asyncio.create_subprocess_exec(
            *(binaries() / "pgbench", "--no-vacuum", "--protocol=prepared"),
            *(f"--client={clients}", f"--jobs={min(clients, 2)}", f"--time={PGBENCH_SECONDS}"),
            *(f"--host={socket_directory}", "--username=postgres"),
            *(f"--file={script.name}", database),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
    text = out.decode()
    assert "number of transactions actually processed" in text, text
    found = re.search(r"tps = ([\d.]+)", text)
    return float(found[1]) if found else 0.0  # it says nothing where there was none


def scheduled_seconds(pid: int) -> float:
    """Return the CPU time of a process of one thread, as the scheduler counts it.

    The usual counters are in hundredths of a second.
    """
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def cpu_of_tree(pid: int) -> float:
    """Return the CPU seconds of PostgreSQL: the postmaster and all backends, ended ones too."""
    parent = psutil.Process(pid)
    times = parent.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in parent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            used = child.cpu_times()
            total += used.user + used.system
    return float(total)
