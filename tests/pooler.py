"""PgBouncer in transaction mode in front of a test's PostgreSQL.

With BALANCE_APP_TEST_POOLER=transaction the instances and pools of all tests that use the shared
server serve through one (`make test-pooler`); what tests look up themselves they read directly.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from tests.processes import RUN_ROLE, free_port, poolers

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/opt/homebrew/bin")
WANTED = os.environ.get("BALANCE_APP_TEST_POOLER", "none") == "transaction"


class PgBouncer:
    """A running PgBouncer: every database of one server, for each of its roles."""

    def __init__(self, server: Mapping[str, str], mode: str, options: Mapping[str, object]) -> None:
        self.port = free_port()
        self._home = Path(server["DB_HOST"])
        self._directory = tempfile.TemporaryDirectory(prefix="balance-app-pooler-")
        self._file = Path(self._directory.name) / "pgbouncer.ini"
        users = self._file.with_name("users.txt")
        users.write_text(f'"{server["DB_USER"]}" ""\n"{RUN_ROLE}" ""\n')
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": users,
            "admin_users": server["DB_USER"],
            "pool_mode": mode,
            "max_client_conn": 1000,
            **options,
        }
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        self._file.write_text(
            f"[databases]\n* = host={self._home} port={server['DB_PORT']}\n[pgbouncer]\n{lines}"
        )
        Path(self._directory.name).chmod(0o711)
        for each in (self._file, users):
            each.chmod(0o644)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        assert PGBOUNCER is not None
        # As root, it runs as the user of PostgreSQL.
        user = ["-u", self._home.owner()] if Path("/").owner() != self._home.owner() else []
        self.process = await asyncio.create_subprocess_exec(
            *(PGBOUNCER, "-q", *user, str(self._file)), stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    async def kill(self) -> None:
        """End it at once: its clients' connections close, and its own to PostgreSQL."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        """End it, and delete its files."""
        if self.process is not None and self.process.returncode is None:
            await self.kill()
        self._directory.cleanup()

    async def command(self, text: str) -> None:
        """Run a command of its console, as RECONNECT or PAUSE."""
        console = await asyncio.create_subprocess_exec(
            *("psql", "-qAt", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"),
            *("-c", text, "pgbouncer"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert await console.wait() == 0


@asynccontextmanager
async def pooler(
    server: Mapping[str, str], mode: str = "transaction", **options: object
) -> AsyncIterator[PgBouncer]:
    """Run a PgBouncer in front of a server."""
    running = PgBouncer(server, mode, options)
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


@asynccontextmanager
async def pooled_if_wanted(server: dict[str, str]) -> AsyncIterator[None]:
    """Let all instances on a server serve through a pooler, if these tests are to run so."""
    if not WANTED:
        yield
        return
    assert PGBOUNCER is not None, "BALANCE_APP_TEST_POOLER is set, and there is no pgbouncer"
    # As many sessions as the instances of one test may use at once.
    async with pooler(server, default_pool_size=40) as running:
        place = server["DB_HOST"], server["DB_PORT"]
        poolers[place] = running.port
        try:
            yield
        finally:
            del poolers[place]
