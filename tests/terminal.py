"""The command line as a forked process, and stand-ins for a service that answers badly."""

import asyncio
import os
import pty
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from tests import fork_server
from tests.processes import DATABASE_VARIABLES

PATIENCE_SECONDS: Final = 30
ROOT: Final = Path(__file__).parents[1]


def command(*arguments: str, cwd: str = str(ROOT), **env: str) -> Awaitable[fork_server.Child]:
    """Start `balance-app` with its output in pipes."""
    return fork_server.running[0].fork_with_pipes(
        "balance_app", *arguments, environment=environment(**env), cwd=cwd
    )


def environment(**env: str) -> dict[str, str]:
    """Return its environment, without inherited variables that change its behaviour or output."""
    of_its_own = {"BALANCE_APP_URL", "BALANCE_APP_KEY", "XDG_CONFIG_HOME", "NO_COLOR"}
    of_its_own |= {"FORCE_COLOR", "COLUMNS", "PORT", "HOST"}
    of_its_own |= set(DATABASE_VARIABLES)
    return {
        **{name: value for name, value in os.environ.items() if name not in of_its_own},
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        **env,
    }


async def run(*arguments: str, cwd: str = str(ROOT), **env: str) -> tuple[int | None, str, str]:
    """Run `balance-app` to its end; return its exit code, stdout and stderr."""
    process = await command(*arguments, cwd=cwd, **env)
    try:
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return process.returncode, out.decode(), err.decode()


class Screen:
    """`balance-app` on a pseudo-terminal."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self.shown = ""
        self._arguments = arguments
        self._env = env

    async def __aenter__(self) -> Self:
        self._leader, follower = pty.openpty()
        terminal = os.ttyname(follower)
        self.process = await fork_server.running[0].fork(
            "balance_app",
            *self._arguments,
            files=(terminal, terminal, terminal),
            environment=environment(**{"TERM": "xterm-256color", "COLUMNS": "120", **self._env}),
        )
        os.close(follower)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        os.close(self._leader)

    async def until(self, text: str) -> None:
        """Wait until a text has been shown."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while text not in self.shown:
                more = await asyncio.to_thread(self._read)
                assert more, self.shown
                self.shown += more

    def type(self, text: str) -> None:
        """Type a text on its keyboard."""
        os.write(self._leader, text.encode())

    async def end(self) -> int:
        """Read to the end; return the exit code."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while more := await asyncio.to_thread(self._read):
                self.shown += more
            return await self.process.wait()

    def _read(self) -> str:
        try:
            return os.read(self._leader, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""


@dataclass
class StandIn:
    """A stand-in for the service: its URL and the requests it got."""

    url: str = ""
    requests: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """The idempotency keys that were sent."""
        return re.findall(r"(?i)idempotency-key: (\S+)", "".join(self.requests))


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[StandIn]:
    """Answer each request with the next of these bytes, and with the last from then on."""

    async def answer(request: bytes, number: int) -> bytes:
        del request
        return answers[min(number, len(answers) - 1)]

    async with _stand_in(answer) as stand_in:
        yield stand_in


@asynccontextmanager
async def losing(answers: int, port: int) -> AsyncIterator[StandIn]:
    """Forward requests to an instance, and drop the first answers."""
    async with replacing(port, lambda number, answer: b"" if number < answers else answer) as proxy:
        yield proxy


@asynccontextmanager
async def replacing(port: int, instead: Callable[[int, bytes], bytes]) -> AsyncIterator[StandIn]:
    """Forward requests to an instance; send what `instead` makes of a request's number and answer.

    An empty answer cuts the connection after the request has reached the instance.
    """

    async def pass_on(request: bytes, number: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await _message(reader)
        writer.close()
        return instead(number, answer)

    async with _stand_in(pass_on) as stand_in:
        yield stand_in


@asynccontextmanager
async def _stand_in(answer: Callable[[bytes, int], Awaitable[bytes]]) -> AsyncIterator[StandIn]:
    stand_in = StandIn()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _message(reader)
        stand_in.requests.append(request.decode())
        writer.write(await answer(request, len(stand_in.requests) - 1))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    stand_in.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield stand_in
    finally:
        server.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


def http(status: str, body: str) -> bytes:
    """Return the bytes of an answer."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
