"""PostgreSQL servers that a test may kill, stop and freeze."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Final

import asyncpg
import psutil

from balance_app.local import postgres
from balance_app.local.postgres import SUPERUSER, EmbeddedPostgres, binaries
from tests.processes import connect

# The directory of another version's programs: `make test-matrix` sets it.
PROGRAMS: Final = Path(given) if (given := os.environ.get("BALANCE_APP_TEST_POSTGRES")) else None


class TestPostgres(EmbeddedPostgres):
    """A server of the version under test."""

    __test__ = False
    parts = ("PG_VERSION",)  # the OID of the database `postgres` is not 5 in each of them

    def __init__(self, data: Path, *, options: Mapping[str, str] | None = None) -> None:
        super().__init__(data, options=options)
        self._bin = PROGRAMS or self._bin

    def _restrict_log_in(self) -> None:
        """Let in whoever can pass the data directory: no role stands for all before version 16."""
        if PROGRAMS is None:
            super()._restrict_log_in()
        else:
            trusting = postgres._HBA.replace("peer map=starter", "trust")
            (self.data / "pg_hba.conf").write_text(trusting)


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
        async with _running(TestPostgres(Path(top) / "data", options=options)) as server:
            yield server


@asynccontextmanager
async def _running(server: EmbeddedPostgres) -> AsyncIterator[EmbeddedPostgres]:
    """Start a server, and stop it at the end, also one that is frozen."""
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


@asynccontextmanager
async def standby_of(primary: EmbeddedPostgres, **options: str) -> AsyncIterator[EmbeddedPostgres]:
    """Run a streaming standby of a server for one test; its `application_name` is `standby`."""
    with tempfile.TemporaryDirectory(prefix="balance-app-test-", ignore_cleanup_errors=True) as top:
        Path(top).chmod(0o711)
        data = Path(top) / "data"
        source = f"host={primary.socket_directory} user={SUPERUSER} application_name=standby"
        await _copy(primary, source, data)
        # `--write-recovery-conf` would write words of its version, which an older server refuses.
        from_primary = {"primary_conninfo": source, **options}
        async with _running(TestPostgres(data, options=from_primary)) as server:
            yield server


async def _copy(primary: EmbeddedPostgres, source: str, data: Path) -> None:
    """Make a base backup that starts as a standby."""
    owner = primary.data.stat()
    data.mkdir(mode=0o700)
    os.chown(data, owner.st_uid, owner.st_gid)
    process = await asyncio.create_subprocess_exec(
        *(binaries() / "pg_basebackup", "--pgdata", data, "--dbname", source),
        "--checkpoint=fast",
        cwd=data.parent,
        user=owner.st_uid,
        group=owner.st_gid,
    )
    assert await process.wait() == 0
    (data / ".s.PGSQL.5432.lock").unlink(missing_ok=True)  # it was copied, too
    signal = data / "standby.signal"
    signal.touch()
    os.chown(signal, owner.st_uid, owner.st_gid)


async def promote(server: EmbeddedPostgres) -> None:
    """Make a standby the primary."""
    connection = await connect(server.environment())
    try:
        assert await connection.fetchval("SELECT pg_promote()")
    finally:
        await connection.close()


def hosts(*servers: EmbeddedPostgres) -> dict[str, str]:
    """Return the DB_* variables that name several servers."""
    directories = (str(server.socket_directory) for server in servers)
    return {**servers[0].environment(), "DB_HOST": ",".join(directories)}
