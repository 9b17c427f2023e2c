"""Three PostgreSQL servers under Patroni and etcd, of which each can be killed, frozen, cut off.

The programs are Debian's. Every node reaches etcd, and is reached by the other nodes and by the
clients, through TCP proxies of its own: a network that can be cut without a firewall.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal, Self

import asyncpg
import httpx
import psutil

from balance_app.local.postgres import SYSTEM_USER, make_system_user, stop_with_parent
from tests.jobs.proxy import Proxy
from tests.processes import free_port, http_client

SCOPE: Final = "drill"
SUPERUSER: Final = "postgres"
REPLICATOR: Final = "replicator"
LEADER_SECONDS: Final = 90
HEALTHY_SECONDS: Final = 120
STOP_SECONDS: Final = 10
DEBIAN: Final = Path("/usr/lib/postgresql")
PROGRAMS: Final = ("etcd", "patroni", "patronictl")
# Two standbys stream, and the one that Patroni may promote is the one that commits wait for.
STANDBYS: Final = """
SELECT application_name AS name, sync_state FROM pg_stat_replication WHERE state = 'streaming'
"""


class ClusterError(Exception):
    """The cluster can't be started, or does not do what it has to."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Patroni's three durations in seconds: `loop_wait + 2 * retry_timeout` is at most `ttl`."""

    ttl: int
    loop_wait: int = 2

    @property
    def retry_timeout(self) -> int:
        """How long a node waits for etcd, before a leader demotes itself."""
        return (self.ttl - self.loop_wait) // 2


def newest_postgres() -> Path:
    """Return the directory of the programs of Debian's newest PostgreSQL.

    Raises:
        ClusterError: there is none.
    """
    found = sorted(DEBIAN.glob("*/bin/postgres"), key=lambda each: int(each.parts[-3]))
    if not found:
        raise ClusterError(f"There is no PostgreSQL in {DEBIAN}: apt install postgresql.")
    return found[-1].parent


def require_programs() -> None:
    """Refuse to start where a program is missing.

    Raises:
        ClusterError: naming what is missing.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ClusterError(
            f"Not installed: {', '.join(missing)} (apt install patroni etcd-server etcd-client)."
        )


class Node:
    """One PostgreSQL server, the Patroni that rules it, and its network."""

    def __init__(self, name: str, directory: Path, etcd_port: int) -> None:
        self.name = name
        self.directory = directory
        self.data = directory / "data"
        self.configuration = directory / "patroni.json"
        self.log = directory.with_suffix(".log")
        self.port, self.rest_port = free_port(), free_port()
        # From its Patroni to etcd; from other nodes to its servers; from clients to PostgreSQL.
        self.etcd = _proxy(etcd_port)
        self.postgres, self.rest = _proxy(self.port), _proxy(self.rest_port)
        self.clients = _proxy(self.port)
        self.proxies = (self.etcd, self.postgres, self.rest, self.clients)
        self._patroni: asyncio.subprocess.Process | None = None
        self._user: str | None = None

    async def start(self, user: str | None = None) -> None:
        """Start Patroni, which starts PostgreSQL; again as the same user."""
        self._user = user or self._user
        self._patroni = await _spawn(
            "patroni", str(self.configuration), user=self._user, log=self.log
        )

    async def kill(self) -> None:
        """End Patroni and all of PostgreSQL with SIGKILL."""
        killed = self._signal(psutil.Process.kill)
        if self._patroni is not None:
            await self._patroni.wait()
        await asyncio.to_thread(psutil.wait_procs, killed, 10)

    def freeze(self) -> None:
        """Stop all processes: connections stay open, without answers."""
        self._signal(psutil.Process.suspend)

    def thaw(self) -> None:
        """Continue all processes."""
        self._signal(psutil.Process.resume)

    def cut_off(self, *, from_clients: bool) -> None:
        """Drop what goes between this node and etcd, the other nodes, and perhaps the clients."""
        for proxy in (self.etcd, self.postgres, self.rest):
            proxy.freeze()
        if from_clients:
            self.clients.freeze()

    def heal(self) -> None:
        """Undo `cut_off`."""
        for proxy in self.proxies:
            proxy.heal()

    async def stop(self) -> None:
        """Stop this node, at last by SIGKILL."""
        self.thaw()
        if self._patroni is not None and self._patroni.returncode is None:
            self._patroni.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._patroni.wait(), STOP_SECONDS)
        await self.kill()

    def _signal(self, how: Callable[[psutil.Process], None]) -> list[psutil.Process]:
        processes = list(self._processes())
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                how(process)
        return processes

    def _processes(self) -> Iterator[psutil.Process]:
        """Find all that runs here: Patroni first, as it starts again what ends."""
        with suppress(psutil.NoSuchProcess):
            if self._patroni is not None and self._patroni.returncode is None:
                patroni = psutil.Process(self._patroni.pid)
                yield patroni
                yield from patroni.children(recursive=True)
        # PostgreSQL is not its child; another program may have the pid of one that has ended.
        with suppress(OSError, ValueError, psutil.Error):
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
            postmaster = psutil.Process(pid)
            if str(self.data) in postmaster.cmdline():
                yield postmaster
                yield from postmaster.children(recursive=True)


class Cluster:
    """Three nodes and an etcd, in one directory."""

    def __init__(
        self,
        directory: Path,
        binaries: Path,
        timing: Timing,
        *,
        synchronous: bool,
        etcd: Literal["etcd", "etcd3"],
    ) -> None:
        self.synchronous = synchronous
        # the section of Patroni's configuration: which version of etcd's API it uses
        self._etcd = etcd
        self._directory, self._binaries, self._timing = directory, binaries, timing
        self._passwords = {name: secrets.token_hex(16) for name in (SUPERUSER, REPLICATOR)}
        self._stack = AsyncExitStack()
        self._http = http_client(timeout=2)
        self._etcd_port = free_port()
        self.nodes = [
            Node(f"pg{number}", directory / f"pg{number}", self._etcd_port) for number in (1, 2, 3)
        ]

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    @property
    def addresses(self) -> list[str]:
        """Where clients reach the servers: host and port of each."""
        return [_address(node.clients) for node in self.nodes]

    async def connect(
        self, node: Node, database: str = "postgres"
    ) -> "asyncpg.Connection[asyncpg.Record]":
        """Connect to one server as the superuser, past its proxy."""
        return await asyncpg.connect(
            host="127.0.0.1",
            port=node.port,
            user=SUPERUSER,
            password=self._passwords[SUPERUSER],
            database=database,
            timeout=3,
        )

    async def leader(self, *, other_than: Node | None = None) -> Node:
        """Wait until a node is the leader, and a primary; return it.

        Raises:
            ClusterError: none is in time.
        """
        deadline = monotonic() + LEADER_SECONDS
        candidates = [node for node in self.nodes if node is not other_than]
        while monotonic() < deadline:
            for node in candidates:
                with suppress(httpx.HTTPError):
                    url = f"http://127.0.0.1:{node.rest_port}/primary"
                    if (await self._http.get(url)).is_success:
                        return node
            await asyncio.sleep(0.2)
        raise ClusterError(f"No node is the leader within {LEADER_SECONDS} s.")

    async def healthy(self) -> Node:
        """Wait until both standbys stream, and commits wait for the one that may be promoted.

        Raises:
            ClusterError: they don't in time.
        """
        deadline, seen = monotonic() + HEALTHY_SECONDS, ""
        while monotonic() < deadline:
            with suppress(OSError, TimeoutError, asyncpg.PostgresError, httpx.HTTPError):
                leader = await self.leader()
                connection = await self.connect(leader)
                try:
                    rows = await connection.fetch(STANDBYS)
                finally:
                    await connection.close()
                url = f"http://127.0.0.1:{leader.rest_port}/cluster"
                members = (await self._http.get(url)).json()["members"]
                waited_for = {row["name"] for row in rows if row["sync_state"] == "sync"}
                promotable = {each["name"] for each in members if each["role"] == "sync_standby"}
                if len(rows) == len(self.nodes) - 1 and (
                    not self.synchronous or (waited_for and waited_for == promotable)
                ):
                    return leader
                seen = f": {[tuple(row) for row in rows]}, {members}"
            await asyncio.sleep(0.2)
        raise ClusterError(f"The standbys are not back within {HEALTHY_SECONDS} s{seen}")

    async def switch_over(self, leader: Node) -> None:
        """Make a standby the leader while both run.

        Raises:
            ClusterError: patronictl refuses.
        """
        process = await asyncio.create_subprocess_exec(
            *("patronictl", "-c", str(leader.configuration)),
            *("switchover", SCOPE, "--leader", leader.name, "--force"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        if process.returncode or b"Successfully" not in said:
            raise ClusterError(f"patronictl: {said.decode(errors='replace').strip()}")

    async def _start(self) -> None:
        user = SYSTEM_USER if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        if user is not None:
            make_system_user()
        await self._start_etcd(user)
        for node in self.nodes:
            for proxy in node.proxies:
                await self._stack.enter_async_context(proxy)
            node.directory.mkdir(mode=0o700)
            node.configuration.touch(mode=0o600)
            node.configuration.write_text(json.dumps(self._configuration(node), indent=2))
            if user is not None:
                shutil.chown(node.directory, user, user)
                shutil.chown(node.configuration, user, user)
        first, *others = self.nodes
        await first.start(user)
        await self.leader()
        for node in others:
            await node.start(user)
        await self.healthy()

    async def _stop(self) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes))
        await self._stack.aclose()
        await self._http.aclose()

    async def _start_etcd(self, user: str | None) -> None:
        url, peers = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{free_port()}"
        directory = self._directory / "etcd"
        directory.mkdir(mode=0o700)
        if user is not None:
            shutil.chown(directory, user, user)
        process = await _spawn(
            *("etcd", "--enable-v2", "--data-dir", str(directory / "data")),
            *("--name", "etcd", "--initial-cluster", f"etcd={peers}"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            user=user,
            log=self._directory / "etcd.log",
        )

        async def end() -> None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

        self._stack.push_async_callback(end)
        deadline = monotonic() + LEADER_SECONDS
        while monotonic() < deadline and process.returncode is None:
            with suppress(httpx.HTTPError):
                if (await self._http.get(f"{url}/health")).is_success:
                    return
            await asyncio.sleep(0.1)
        raise ClusterError("etcd does not start.")

    def _configuration(self, node: Node) -> dict[str, Any]:
        """Return Patroni's configuration; JSON is YAML."""
        anybody = "127.0.0.1/32 scram-sha-256"
        return {
            "scope": SCOPE,
            "name": node.name,
            "restapi": {
                "listen": f"127.0.0.1:{node.rest_port}",
                "connect_address": _address(node.rest),
            },
            # As proxies: what etcd says its address is leads past them.
            self._etcd: {"hosts": [_address(node.etcd)], "use_proxies": True},
            "bootstrap": {
                "dcs": {
                    "ttl": self._timing.ttl,
                    "loop_wait": self._timing.loop_wait,
                    "retry_timeout": self._timing.retry_timeout,
                    # The control has to lose: a standby that lacks changes may be promoted.
                    "maximum_lag_on_failover": 1 << 30,
                    "synchronous_mode": self.synchronous,
                    # Otherwise a primary without a standby acknowledges what only it has.
                    "synchronous_mode_strict": self.synchronous,
                    "postgresql": {
                        "use_pg_rewind": True,
                        "parameters": {"max_connections": 200, "wal_keep_size": "256MB"},
                    },
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{node.port}",
                "connect_address": _address(node.postgres),
                "data_dir": str(node.data),
                "bin_dir": str(self._binaries),
                "pgpass": str(node.directory / "pgpass"),
                "pg_hba": [f"host all all {anybody}", f"host replication {REPLICATOR} {anybody}"],
                "authentication": {
                    part: {"username": name, "password": self._passwords[name]}
                    for part, name in (("superuser", SUPERUSER), ("replication", REPLICATOR))
                },
                "parameters": {"unix_socket_directories": str(node.directory)},
                "remove_data_directory_on_rewind_failure": True,
                "remove_data_directory_on_diverged_timelines": True,
            },
        }


async def _spawn(*command: str, user: str | None, log: Path) -> asyncio.subprocess.Process:
    """Start a program that ends with this one."""
    with log.open("ab") as file:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches it through this process alone
            user=user,
            group=user,
            extra_groups=[] if user else None,
            preexec_fn=stop_with_parent(signal.SIGTERM),
        )


def _proxy(port: int) -> Proxy:
    return Proxy({"DB_HOST": "127.0.0.1", "DB_PORT": str(port)})


def _address(proxy: Proxy) -> str:
    return f"127.0.0.1:{proxy.environment()['DB_PORT']}"
