"""Throughput of balance changes, as ratios to the machine's limits: `make bench`.

(a) Changes per second of one hot user over HTTP, from 100 kept-alive connections to one instance,
    compared with pgbench running the same statement on the same server: the upper limit.
(b) Wall and CPU seconds of 10 000 simultaneous requests to one instance, compared with the same
    instance without its database call, and with a bare ASGI callable.

Several alternating rounds are measured; ratios are taken within a round, medians are printed.
"""

import asyncio
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from balance_app.balances.repository import CHANGE
from balance_app.http.body import MAX_INTEGER
from balance_app.local.postgres import EmbeddedPostgres, binaries

ROUNDS = int(os.environ.get("ROUNDS", "7"))
HOT_REQUESTS = 10_000
HOT_CONNECTIONS = 100
BURST = 10_000
PGBENCH_CLIENTS = (1, 2, 4, HOT_CONNECTIONS)
PGBENCH_SECONDS = 2
HERE = Path(__file__).parent
PLENTY = 10**12


async def main() -> None:
    """Measure everything and print it."""
    with tempfile.TemporaryDirectory(prefix="balance-app-bench-") as top:
        Path(top).chmod(0o711)
        postgres = EmbeddedPostgres(Path(top) / "data", options={"max_connections": "200"})
        await postgres.start()
        try:
            print_machine(Path(top))
            if "burst" not in sys.argv:
                await hot_user(postgres)
            if "hot" not in sys.argv:
                await burst(postgres)
        finally:
            await postgres.stop()


def print_machine(where: Path) -> None:
    """Print the machine, the Python version and the time of an fdatasync."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    fsync = subprocess.run(
        [binaries() / "pg_test_fsync", "-s", "1", "-f", where / "fsync"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    fdatasync = re.search(r"fdatasync\s+[\d.]+ ops/sec\s+(\d+) usecs/op", fsync)
    print(f"machine: {os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}")
    print(f"Python {platform.python_version()}, fdatasync {fdatasync[1] if fdatasync else '?'} µs")
    print(f"{ROUNDS} rounds; medians (lowest to highest)\n")


async def hot_user(postgres: EmbeddedPostgres) -> None:
    """Measure (a)."""
    rates: dict[str, list[float]] = {}
    async with running("service", postgres) as service:
        for _ in range(ROUNDS):
            user = await service.open(PLENTY)
            for clients in PGBENCH_CLIENTS:
                rate = await pgbench(postgres.socket_directory, clients, user)
                rates.setdefault(f"pgbench, {clients} clients", []).append(rate)
            shot = await service.fire(user, HOT_REQUESTS, HOT_CONNECTIONS)
            assert shot["got"] == {"200": HOT_REQUESTS}, shot["got"]
            rates.setdefault("HTTP, 100 connections", []).append(HOT_REQUESTS / shot["wall"])
    print("(a) changes per second of one user")
    for name, values in rates.items():
        print(f"    {name:24} {spread(values, '{:7.0f}')}")
    http = rates.pop("HTTP, 100 connections")
    ceiling = max(rates, key=lambda name: statistics.median(rates[name]))
    same = f"pgbench, {HOT_CONNECTIONS} clients"
    for name in (ceiling, same):
        print(f"    HTTP / {name:20} {spread(ratios(http, rates[name]), '{:4.2f}')}")
    print()


async def burst(postgres: EmbeddedPostgres) -> None:
    """Measure (b)."""
    print(f"(b) {BURST} requests at one moment, seconds")
    print(f"    {'':10} {'wall':24} {'server CPU':24} {'PostgreSQL CPU':24} client CPU")
    walls: dict[str, list[float]] = {}
    for kind in ("service", "constant", "bare"):
        walls[kind] = []
    rows: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in walls}
    for _ in range(ROUNDS):
        for kind, measured in rows.items():
            async with running(kind, postgres) as server:
                user = await server.open(BURST) if kind == "service" else 1
                before = (server.cpu_seconds(), cpu_of_tree(postgres.process.pid))
                shot = await server.fire(user, BURST, BURST)
                half = BURST // 2
                right = {"200": half, "409": half} if kind == "service" else {"200": BURST}
                assert shot["got"] == right, shot["got"]
                measured.append(
                    (
                        shot["wall"],
                        server.cpu_seconds() - before[0],
                        cpu_of_tree(postgres.process.pid) - before[1],
                        shot["cpu"],
                    )
                )
    for kind, measured in rows.items():
        columns = "".join(
            f"{spread(column, '{:.2f}'):25}" for column in zip(*measured, strict=True)
        )
        print(f"    {kind:10} {columns}")
    wall = {kind: [row[0] for row in measured] for kind, measured in rows.items()}
    for other in ("constant", "bare"):
        ratio = spread(ratios(wall["service"], wall[other]), "{:.2f}")
        print(f"    service / {other}, wall: {ratio}")


class Server:
    """A running server under measurement."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid
        self.key: str | None = None
        self._process = psutil.Process(pid)

    def cpu_seconds(self) -> float:
        """Return the CPU time it has used."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    async def open(self, balance: int) -> int:
        """Create a user and return its id."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx.AsyncClient(trust_env=False, headers=headers) as client:
            answer = await client.post(f"{self.url}/api/users", json={"balance": balance})
            return int(answer.json()["userId"])

    async def fire(self, user: int, requests: int, connections: int) -> dict[str, Any]:
        """Send from another process; return its wall and CPU seconds and the count by status."""
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, HERE / "fire.py", self.url, str(user)),
            *(str(requests), str(connections)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "BENCH_KEY": self.key or ""},
        )
        out, _ = await client.communicate()
        shot: dict[str, Any] = json.loads(out)
        return shot


@asynccontextmanager
async def running(
    kind: str, postgres: EmbeddedPostgres, *, database: str = "postgres"
) -> AsyncIterator[Server]:
    """Run the service or a stand-in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, HERE / "stand_ins.py", kind),
        env={
            **os.environ,
            **postgres.environment(),
            "DB_NAME": database,
            "PORT": str(port),
            "LOG_LEVEL": "warning",
        },
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(200):
                with suppress(httpx.HTTPError):
                    if (await client.get(f"{url}/readyz")).is_success:
                        break
                await asyncio.sleep(0.1)
        yield Server(url, process.pid)
    finally:
        process.terminate()
        await process.wait()


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
    values = {"$1": user, "$2": -2, "$3": MAX_INTEGER}
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
    found = re.search(r"tps = ([\d.]+)", out.decode())
    assert found, out
    return float(found[1])


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


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Return the ratios round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float] | tuple[float, ...], form: str) -> str:
    """Return the median, lowest and highest."""
    shown: Callable[[float], str] = form.format
    return f"{shown(statistics.median(values))} ({min(values):.4g} to {max(values):.4g})"


if __name__ == "__main__":
    asyncio.run(main())
