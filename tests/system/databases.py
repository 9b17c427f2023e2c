"""PostgreSQL servers that a test may kill, stop and freeze."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import asyncpg
import psutil

from balance_app.local.postgres import EmbeddedPostgres
from tests.processes import connect

WAITERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@asynccontextmanager
async def own_postgres(**options: str) -> AsyncIterator[EmbeddedPostgres]:
    """Run a PostgreSQL server for one test."""
    # A short path of its own: the server's socket lies in its data directory.
    with tempfile.TemporaryDirectory(prefix="balance-app-test-", ignore_cleanup_errors=True) as top:
        Path(top).chmod(0o711)  # as root, the server runs as another user
        server = EmbeddedPostgres(Path(top) / "data", options=options)
        await server.start()
        try:
            yield server
        finally:
            if server.process.returncode is None:
                await thaw(server)
            await server.stop()


async def accepting(server: EmbeddedPostgres) -> float:
    """Wait until a server accepts connections; return the time."""
    async with asyncio.timeout(30):
        while True:
            with suppress(OSError, asyncpg.PostgresError):
                connection = await connect(server.environment())
                moment = monotonic()
                await connection.close()
                return moment
            await asyncio.sleep(0.005)


async def session_waits(database: dict[str, str], *, waits: bool = True) -> None:
    """Wait until a session waits for a lock in this database, or none does."""
    connection = await connect(database)
    try:
        async with asyncio.timeout(30):
            while True:
                if bool(await connection.fetchval(WAITERS)) == waits:
                    return
                await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def kill(server: EmbeddedPostgres) -> None:
    """End all processes of a server with SIGKILL while its clients go on."""
    # In a thread: finding the processes takes a while, and blocked clients would have no requests
    # under way when the server is killed.
    backends = await asyncio.to_thread(_signal, server, psutil.Process.kill)
    await server.process.wait()
    await asyncio.to_thread(psutil.wait_procs, backends, 10)


async def freeze(server: EmbeddedPostgres) -> None:
    """Stop all processes of a server: connections stay open, without answers."""
    await asyncio.to_thread(_signal, server, psutil.Process.suspend)


async def thaw(server: EmbeddedPostgres) -> None:
    """Continue the processes of a frozen server."""
    await asyncio.to_thread(_signal, server, psutil.Process.resume)


def _signal(
    server: EmbeddedPostgres, how: Callable[[psutil.Process], None]
) -> list[psutil.Process]:
    postmaster = psutil.Process(server.process.pid)
    backends: list[psutil.Process] = postmaster.children(recursive=True)
    how(postmaster)  # first, so that it neither starts processes nor signals the others
    for backend in backends:
        with suppress(psutil.NoSuchProcess):
            how(backend)
    return backends
