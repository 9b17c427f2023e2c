"""A pooler that breaks sessions is refused at start, before a lock is lost in it."""

import asyncio
import shutil
from pathlib import Path

import pytest

from balance_app.settings import load_settings
from tests.processes import Instance, free_port, query
from tests.system.databases import own_postgres

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/opt/homebrew/bin")
LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"


@pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")
@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("parameters", ["refused", "dropped"])
async def test_pgbouncer_is_refused_at_start(tmp_path: Path, mode: str, parameters: str) -> None:
    """Whether it refuses startup parameters or drops them; no statement has changed a session."""
    assert PGBOUNCER is not None
    async with own_postgres() as server:
        environment = server.environment()
        port = free_port()
        home = Path(environment["DB_HOST"])
        dropped = ", ".join(load_settings(db_host="x").job_arguments()["server_settings"])
        configuration = home / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\npostgres = host={home} port={environment['DB_PORT']} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = {mode}\n"
            + (f"ignore_startup_parameters = {dropped}\n" if parameters == "dropped" else "")
        )
        configuration.chmod(0o644)
        user = ["-u", home.owner()] if Path("/").owner() != home.owner() else []
        pooler = await asyncio.create_subprocess_exec(
            PGBOUNCER, "-q", *user, str(configuration), stderr=asyncio.subprocess.DEVNULL
        )
        log = tmp_path / "log"
        pooled = {"DB_HOST": "127.0.0.1", "DB_PORT": str(port), "DB_USER": "postgres"}
        instance = Instance({**pooled, "DB_NAME": "postgres"}, log=log)
        try:
            await _listens(port)
            await instance.launch()
            assert instance.process is not None
            assert await asyncio.wait_for(instance.process.wait(), 30) == 3
        finally:
            await instance.kill()
            pooler.terminate()
            await pooler.wait()
        assert (await query(environment, LOCKS))[0][0] == 0
    assert "A pooler in front of PostgreSQL breaks sessions" in log.read_text()
    assert "Traceback" not in log.read_text()


async def _listens(port: int) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
