"""File descriptors are limited: clients must leave some for the database connections."""

import asyncio
import resource
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from balance_app import open_files
from balance_app.http.endings import GATHER_SECONDS
from balance_app.settings import Settings
from tests.processes import Instance, query

LIMIT = 256
CONNECTIONS = 300
SERVED_AT_LEAST = LIMIT // 2
PATIENCE_SECONDS = 10
LOGGED_SECONDS = GATHER_SECONDS + 1
GET = b"GET /api/users/1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
END_SESSIONS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__")
"""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def test_more_connections_than_descriptors(database: dict[str, str], tmp_path: Path) -> None:
    """Up to the limit clients are served, also after the sessions were ended; others get a 503."""
    log = tmp_path / "log"
    program = ("-c", LIMITED, "balance_app", "serve")
    async with Instance(database, program=program, log=log, JOBS_ENABLED="false") as instance:
        first, again = await crowd(instance, database)
        await asyncio.sleep(LOGGED_SECONDS)
    assert set(first) == {"200", "503"}
    assert first.total() == CONNECTIONS
    assert first["200"] >= SERVED_AT_LEAST
    assert again == {"200": first["200"]}
    output = log.read_text()
    assert output.count("too many connections for the limit of open files") == 1
    assert output.count("This process may have 256 files open") == 1


async def test_without_a_limit_clients_are_not_answered(database: dict[str, str]) -> None:
    """The control: when clients have taken every descriptor, the kernel cuts off all others."""
    program = ("-c", LIMITED, "tests.mutants", "open-files")
    async with Instance(database, program=program) as instance:
        first, _ = await crowd(instance, database)
    assert first["closed"] > 0


async def test_silent_connections_shut_out_nobody(database: dict[str, str], tmp_path: Path) -> None:
    """More than there are descriptors: they give way to others, and the log says so."""
    log = tmp_path / "log"
    program = ("-c", LIMITED, "balance_app", "serve")
    async with Instance(database, program=program, log=log, JOBS_ENABLED="false") as instance:
        assert await served_beside_silent_ones(instance)
        await asyncio.sleep(LOGGED_SECONDS)
    output = log.read_text()
    assert output.count("others need their file descriptors") == 1
    assert "Too many open files" not in output


async def test_without_giving_way_they_shut_out_all_others(database: dict[str, str]) -> None:
    """The control: each other client gets a 503 for as long as the silent ones may stay."""
    program = ("-c", LIMITED, "tests.mutants", "giving-way")
    async with Instance(database, program=program) as instance:
        assert not await served_beside_silent_ones(instance)


def test_the_soft_limit_is_raised_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the hard limit, or to the largest value that the system accepts for "unlimited"."""

    def take(at_most: int, _what: int, limits: tuple[int, int]) -> None:
        if limits[0] > at_most:
            raise ValueError

    for limits, at_most, holds in (
        ((1024, 20_000), 20_000, 20_000),
        ((1024, resource.RLIM_INFINITY), 2**40, open_files.ENOUGH),
        ((256, resource.RLIM_INFINITY), 10_240, 10_240),  # macOS
        ((1024, 20_000), 0, 1024),
        ((20_000, 20_000), 0, 20_000),
    ):
        monkeypatch.setattr(resource, "setrlimit", partial(take, at_most))
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert open_files.raise_limit() == holds, limits


def test_a_hard_limit_that_is_too_low_is_reported() -> None:
    """The need depends on the settings: with a shorter wait queue it is lower."""
    settings = Settings(max_waiting=20_000)
    assert open_files.shortage(settings, 20_000) is None
    assert "1024 files" in (open_files.shortage(settings, 1024) or "")
    assert open_files.shortage(Settings(max_waiting=500), 1024) is None


async def crowd(instance: Instance, database: dict[str, str]) -> tuple[Counter[str], Counter[str]]:
    """Use many connections at once, end the database's sessions, use the open connections again.

    Return the statuses of both rounds; the second is empty if no request is served any more.
    """
    opened = await asyncio.gather(
        *(asyncio.open_connection("127.0.0.1", instance.port) for _ in range(CONNECTIONS))
    )
    try:
        statuses = await asyncio.gather(*(request(each) for each in opened))
        kept = [each for each, status in zip(opened, statuses, strict=True) if status == "200"]
        await query(database, END_SESSIONS)
        with_service: list[str] = []
        for _ in range(PATIENCE_SECONDS * 10):
            if await request(kept[0]) == "200":
                with_service = await asyncio.gather(*(request(each) for each in kept))
                break
            await asyncio.sleep(0.1)
        return Counter(statuses), Counter(with_service)
    finally:
        for _, writer in opened:
            writer.close()


async def served_beside_silent_ones(instance: Instance) -> bool:
    """Open connections that send nothing, many times the limit; return whether others get in."""
    silent = await asyncio.gather(
        *(asyncio.open_connection("127.0.0.1", instance.port) for _ in range(CONNECTIONS)),
    )
    try:
        for _ in range(12):
            await asyncio.sleep(0.5)
            newest = await asyncio.open_connection("127.0.0.1", instance.port)
            silent.append(newest)
            if await request(newest) == "200":
                return True
        return False
    finally:
        for _, writer in silent:
            writer.close()


async def request(connection: Connection) -> str:
    """Send a request, return its status; `closed` when the connection ends without one."""
    reader, writer = connection
    try:
        writer.write(GET)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)
        lengths = [
            line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        ]
        await reader.readexactly(int(lengths[0].split(b":")[1]))
    except (OSError, asyncio.IncompleteReadError):
        return "closed"
    return head.split()[1].decode()
