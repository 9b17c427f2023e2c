"""The connections of the burst."""

import asyncio

import pytest

from loadtest.burst import _Connection
from loadtest.preconditions import Target

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-server-id: app1\r\n\r\n{}"


@pytest.mark.parametrize("closes_first", [False, True])
async def test_a_connection_that_was_closed_unused_is_opened_again(*, closes_first: bool) -> None:
    """The service closes one that sends nothing; so nothing is lost."""
    accepted = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        if not (closes_first and accepted == 1):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection = _Connection(Target("127.0.0.1", port))
        reader, _ = await connection.open()
        if closes_first:
            assert await reader.read() == b""
        answered = await connection.exchange(b"GET / HTTP/1.1\r\n\r\n")
        connection.close()
    assert answered == (200, "app1", b"{}")
    assert accepted == 1 + closes_first
