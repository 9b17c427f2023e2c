"""Send changes to one URL from a process of its own; print wall and CPU seconds as JSON.

It costs less than the load test's client, which keeps every answer to check it: on a machine with
two cores, the client takes its CPU time from the service.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from functools import partial
from typing import cast
from urllib.parse import urlsplit

import uvloop

from loadtest.preconditions import allow_open_files

OPENING_AT_ONCE = 100


class Lane(asyncio.Protocol):
    """One connection, which sends its share of the requests one after another."""

    def __init__(self, request: bytes, share: int, got: Counter[str]) -> None:
        self.opened = asyncio.get_running_loop().create_future()
        self.finished = asyncio.get_running_loop().create_future()
        self._request = request
        self._left = share
        self._got = got
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Mark the connection as open."""
        self._transport = cast("asyncio.Transport", transport)
        self.opened.set_result(None)

    def send(self) -> None:
        """Send one request."""
        self._left -= 1
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count a complete answer, and send the next request."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._got[self._buffer[9:12].decode()] += 1
        self._buffer = b""
        if self._left:
            self.send()
        else:
            self.finished.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the requests without an answer."""
        if not self.finished.done():
            self._got[f"lost: {exc!r}"] += self._left + 1
            self.finished.set_result(None)


async def main(url: str, user_id: int, requests: int, connections: int) -> None:
    """Open all connections, release all requests, and print times and counts as JSON."""
    allow_open_files(connections)
    where = urlsplit(url)
    host, port = str(where.hostname), int(where.port or 80)
    body = f'{{"userId":{user_id},"amount":-2}}'
    key = os.environ.get("BENCH_KEY")
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    request = (
        f"POST /api/balance HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"{authorization}Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    got: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    lanes = [Lane(request, requests // connections, got) for _ in range(connections)]
    for first in range(0, connections, OPENING_AT_ONCE):
        some = lanes[first : first + OPENING_AT_ONCE]
        factories = [partial(_same, lane) for lane in some]
        await asyncio.gather(*(loop.create_connection(each, host, port) for each in factories))
    await asyncio.gather(*(lane.opened for lane in lanes))
    started, cpu = time.perf_counter(), time.process_time()
    for lane in lanes:
        lane.send()
    async with asyncio.timeout(300):
        await asyncio.gather(*(lane.finished for lane in lanes))
    wall = time.perf_counter() - started
    print(json.dumps({"wall": wall, "cpu": time.process_time() - cpu, "got": got}))


def _same(lane: Lane) -> Lane:
    return lane


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *(int(number) for number in sys.argv[2:5])))
