"""Which versions of PostgreSQL are served, and that older ones are refused at start."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from balance_app.sessions import OLDEST_SERVER
from tests.processes import SERVE, Instance, query
from tests.terminal import run

SENTENCE = "too old: PostgreSQL 14 or newer is needed"
MADE = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
MUTANT = ("tests.mutants", "server-version")


@asynccontextmanager
async def reporting(database: dict[str, str], major: int) -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of a proxy behind which a server reports another major version."""
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = database["DB_HOST"], database.get("DB_PORT", "5432")
        if host.startswith("/"):
            ends = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            ends = await asyncio.open_connection(host, int(port))
        for source, target in ((reader, ends[1]), (ends[0], writer)):
            task = asyncio.create_task(forward(source, target))
            tasks.add(task)

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while message := await source.read(2**16):
                # of the same length, as it is part of a message of known length
                target.write(
                    re.sub(rb"(server_version\0)\d\d", rb"\g<1>%d" % major, message, count=1)
                )
                await target.drain()
            target.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        _, port = server.sockets[0].getsockname()
        yield {**database, "DB_HOST": "127.0.0.1", "DB_PORT": str(port)}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def start(database: dict[str, str], program: tuple[str, ...], log: Path) -> int | None:
    """Start an instance; return the code it exits with, None when it is ready."""
    instance = Instance(database, log=log, program=program, JOBS_ENABLED="false")
    await instance.launch()
    try:
        await instance.ready()
    except AssertionError:
        assert instance.process is not None
        return instance.process.returncode
    else:
        return None
    finally:
        await instance.stop()


async def test_an_older_server_is_refused(database: dict[str, str], tmp_path: Path) -> None:
    """By an instance and by `migrate`, in a sentence; nothing is made in the database."""
    log = tmp_path / "log"
    async with reporting(database, OLDEST_SERVER - 1) as older:
        assert await start(older, SERVE, log) == 3
        code, _, err = await run("migrate", **older)
    assert SENTENCE in log.read_text()
    assert f"It is PostgreSQL {OLDEST_SERVER - 1}." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert (code, err.count("\n")) == (1, 1), err
    assert SENTENCE in err
    assert (await query(database, MADE))[0][0] == 0


@pytest.mark.parametrize(
    ("major", "program"), [(OLDEST_SERVER, SERVE), (OLDEST_SERVER - 1, MUTANT)]
)
async def test_the_oldest_one_is_served(
    database: dict[str, str], tmp_path: Path, major: int, program: tuple[str, ...]
) -> None:
    """And the control: without the check an older one is served, too."""
    async with reporting(database, major) as old:
        assert await start(old, program, tmp_path / "log") is None
