"""`balance-app status`: the table as people see it, and what it says when there is none."""

import asyncio
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.jobs.rows import Connection, add_copy, add_job, running
from tests.processes import Copy, connect, free_port

SECOND: Final = timedelta(seconds=1)
PATIENCE_SECONDS: Final = 30


@pytest.fixture
async def connection(database: dict[str, str]) -> AsyncIterator[Connection]:
    """A connection to the database of `copy`."""
    connection = await connect(database)
    yield connection
    await connection.close()


def command(*arguments: str, **env: str) -> Awaitable[asyncio.subprocess.Process]:
    return asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", "status", *arguments),
        env={
            **{name: value for name, value in os.environ.items() if name != "BALANCE_APP_URL"},
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONIOENCODING": "utf-8",
            **env,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )


async def run(*arguments: str, **env: str) -> tuple[int | None, str, str]:
    process = await command(*arguments, **env)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    return process.returncode, out.decode(), err.decode()


async def fill(connection: Connection) -> None:
    one, other = await add_copy(connection, "app1"), await add_copy(connection, "app2")
    await add_copy(connection, "app3", seen_seconds_ago=25)
    await add_job(
        connection, "at-work", **running(one, "app1", seconds=200), done=4, total=16, note="users"
    )
    await add_job(connection, "at-end", **running(other, "app2"), cancel_by="ada", done=3)
    await add_job(
        connection,
        "later",
        due_at=7300 * SECOND,
        last_outcome="failed",
        last_server="app2",
        last_started_at=-90 * SECOND,
        last_ended_at=-61 * SECOND,
        last_result="[red]user 7[/red]\x1b[2J differs",
    )
    await add_job(connection, "late", due_at=-90 * SECOND)
    await add_job(connection, "off", paused_at=-SECOND, paused_by="ada")


async def test_the_table_says_what_runs_where(copy: Copy, connection: Connection) -> None:
    """A line per job, those that run first; a line per copy; nothing that a terminal obeys."""
    await fill(connection)
    code, out, err = await run(BALANCE_APP_URL=f"{copy.url}/")
    assert (code, err) == (0, "")
    header, *lines = (re.sub(r"  +", " | ", line.rstrip()) for line in out.splitlines())
    assert header == "JOB | STATE | SERVER | FOR | PROGRESS | DUE | LAST RUN"
    said = re.escape("[red]user 7[/red] [2J differs")
    patterns = [
        r"at-end \| ● cancelling \| app2 \| 4\d s \| 3",
        r"at-work \| ● running \| app1 \| 3 min 2\d s \| 4/16 \(25 %\) users",
        r"late \| ○ waiting, overdue \| since 1 min 3\d s",
        r"later \| ○ waiting \| in 2 h 1 min \| failed 1 min \d+ s ago on app2 in 29 s: " + said,
        r"off \| ‖ paused",
        r"",
        r"2 running, 2 waiting \(1 overdue\), 1 paused",
        r"app1: 1 running \(at-work\)",
        r"app2: 1 running \(at-end\)",
        r"app3: 0 running, not seen for \d\d s",
    ]
    assert len(lines) == len(patterns), out
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert "\x1b" not in out


async def test_symbols_are_plain_where_there_are_no_others(
    copy: Copy, connection: Connection
) -> None:
    """Without UTF-8 the table is told in ASCII."""
    await fill(connection)
    code, out, err = await run(BALANCE_APP_URL=copy.url, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    assert "* running" in out
    assert "= paused" in out


async def test_the_port_says_whom_to_ask(copy: Copy, connection: Connection) -> None:
    """Without a URL it is the copy that runs here; without jobs and copies it says so."""
    code, out, _ = await run(PORT=str(copy.port))
    assert code == 0
    assert "No copy that runs jobs was seen in the last minute." in out
    await connection.execute("SELECT 1")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", r"Nobody answers at http://\S+: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK", r"\S+ is not this service: status 200"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", r"\S+ is not this service: status 200"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n[]", r"\S+ is not this service: status 404"),
        (
            b'HTTP/1.1 503 No\r\nContent-Length: 20\r\n\r\n{"detail":"It left"} ',
            r"http://\S+ answers 503: It left",
        ),
    ],
)
async def test_what_is_no_answer_is_said_in_a_sentence(answer: bytes, sentence: str) -> None:
    """One line on stderr and exit code 1, whoever answers there."""
    async with answering(answer) as url:
        code, out, err = await run(BALANCE_APP_URL=url)
    assert (code, out) == (1, "")
    assert re.search(sentence, err), err
    assert len(err.splitlines()) == 1


async def test_nobody_there_is_said_in_a_sentence() -> None:
    """One line on stderr and exit code 1; an address that is none too."""
    url = f"http://127.0.0.1:{free_port()}"
    for wrong in (url, "http://", "nonsense", "http://[::1"):
        code, out, err = await run(BALANCE_APP_URL=wrong)
        assert (code, out) == (1, "")
        assert err.startswith(f"Nobody answers at {wrong}: "), err
        assert len(err.splitlines()) == 1


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """Answer every request with these bytes."""

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(tell, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_watching_goes_on_over_a_restart(copy: Copy, connection: Connection) -> None:
    """The copy stops: "Reconnecting"; it comes back: the table. Ctrl-C ends it with exit code 0."""
    await add_job(connection, "first")
    watcher = await command("--watch", BALANCE_APP_URL=copy.url)
    assert watcher.stdout is not None
    stdout = watcher.stdout

    async def line() -> str:
        return (await stdout.readline()).decode()

    try:
        await _until(line, lambda said: "first" in said)
        await copy.stop()
        await _until(line, lambda said: "Reconnecting" in said)
        await copy.launch()
        await copy.ready()
        await add_job(connection, "second")
        await _until(line, lambda said: "second" in said)
        watcher.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(watcher.communicate(), PATIENCE_SECONDS)
        assert (watcher.returncode, err) == (0, b"")
    finally:
        if watcher.returncode is None:
            watcher.kill()
            await watcher.wait()


async def _until(line: Callable[[], Awaitable[str]], found: Callable[[str], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not found(said := await line()):
            assert said, "it has ended"


async def test_on_a_terminal_the_table_is_redrawn_in_place(
    copy: Copy, connection: Connection, client: httpx.AsyncClient
) -> None:
    """With colours, over and over at one place; the cursor is there again at the end."""
    await fill(connection)
    leader, follower = pty.openpty()
    watcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", "status", "--watch"),
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "BALANCE_APP_URL": copy.url,
            "TERM": "xterm-256color",
            "COLUMNS": "100",
        },
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=Path(__file__).parents[2],
    )
    os.close(follower)
    shown = ""

    def read() -> str:
        try:
            return os.read(leader, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""

    async def until(text: str) -> None:
        nonlocal shown
        async with asyncio.timeout(PATIENCE_SECONDS):
            while text not in shown:
                more = await asyncio.to_thread(read)
                assert more, shown
                shown += more

    try:
        await until("at-work")
        assert "\x1b[" in shown
        await client.post("/api/cron/jobs/later/pause")
        await until("2 paused")
        assert "\x1b[1A" in shown or "\x1b[2K" in shown
        watcher.send_signal(signal.SIGINT)
        await until("\x1b[?25h")
        assert await asyncio.wait_for(watcher.wait(), PATIENCE_SECONDS) == 0
    finally:
        if watcher.returncode is None:
            watcher.kill()
            await watcher.wait()
        os.close(leader)
