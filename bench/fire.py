"""Send changes from a process of its own; print wall and CPU seconds, and the times, as JSON.

It costs less than the load test's client, which keeps every answer to check it: on a machine with
two cores, the client takes its CPU time from the service.

The one argument is a `Volley` as JSON. Without a rate each connection sends its next request when
it has the answer to the one before. With a rate requests are due at regular times, and an answer's
latency counts from then: waiting for an earlier answer counts, too.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from functools import partial
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import uvloop

from loadtest.preconditions import allow_open_files

OPENING_AT_ONCE = 100
TIMEOUT_SECONDS = 600


class Volley(NamedTuple):
    """What is sent: to which URLs, for which accounts (`first` and the ones after it)."""

    urls: list[str]
    first: int
    accounts: int
    requests: int
    connections: int
    amount: int = -2
    rate: float = 0  # requests per second of all connections; 0: as fast as they are answered


class Lane(asyncio.Protocol):
    """One connection, which sends its share of the requests one after another."""

    def __init__(self, number: int, volley: Volley, host: str, log: list[Any]) -> None:
        self.opened = asyncio.get_running_loop().create_future()
        self.finished = asyncio.get_running_loop().create_future()
        self.began = 0.0
        self._number = number
        self._volley = volley
        self._host = host
        self._log = log
        self._share = volley.requests // volley.connections
        self._sent = 0
        self._due = 0.0
        self._buffer = b""
        self._random = random.Random(number)
        self._only = self._request(volley.first) if volley.accounts == 1 else None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Mark the connection as open."""
        self._transport = cast("asyncio.Transport", transport)
        self.opened.set_result(None)

    def start(self, began: float) -> None:
        """Send the first request, or wait until it is due."""
        self.began = began
        self._next()

    def _next(self) -> None:
        volley = self._volley
        if not volley.rate:
            self._due = self.began if not self._sent else time.perf_counter()
            self._send()
            return
        turn = self._sent * volley.connections + self._number
        self._due = self.began + turn / volley.rate
        wait = self._due - time.perf_counter()
        if wait > 0:
            asyncio.get_running_loop().call_later(wait, self._send)
        else:
            self._send()

    def _send(self) -> None:
        self._sent += 1
        user = self._volley.first + self._random.randrange(self._volley.accounts)
        self._transport.write(self._only or self._request(user))

    def _request(self, user: int) -> bytes:
        body = f'{{"userId":{user},"amount":{self._volley.amount}}}'
        key = os.environ.get("BENCH_KEY")
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        return (
            f"POST /api/balance HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\n{authorization}"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def data_received(self, data: bytes) -> None:
        """Count a complete answer, and send the next request."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        self._log.append((now - self.began, now - self._due, self._buffer[9:12].decode()))
        self._buffer = b""
        if self._sent < self._share:
            self._next()
        else:
            self.finished.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the requests without an answer."""
        if not self.opened.done():
            self.opened.set_result(None)
        if not self.finished.done():
            self._log += [(0, 0, f"lost: {exc!r}")] * (self._share - self._sent + 1)
            self.finished.set_result(None)


async def main(volley: Volley) -> None:
    """Open all connections, release all requests, and print times and counts as JSON."""
    allow_open_files(volley.connections)
    log: list[Any] = []
    loop = asyncio.get_running_loop()
    places = [urlsplit(url).netloc for url in volley.urls]
    lanes = [
        (Lane(number, volley, place, log), place)
        for number in range(volley.connections)
        for place in [places[number % len(places)]]
    ]
    for first in range(0, volley.connections, OPENING_AT_ONCE):
        await asyncio.gather(
            *(
                loop.create_connection(partial(_same, lane), *_address(place))
                for lane, place in lanes[first : first + OPENING_AT_ONCE]
            )
        )
    await asyncio.gather(*(lane.opened for lane, _ in lanes))
    began, cpu = time.perf_counter(), time.process_time()
    for lane, _ in lanes:
        lane.start(began)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await asyncio.gather(*(lane.finished for lane, _ in lanes))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        json.dumps(
            {
                "wall": wall,
                "cpu": cpu,
                "got": Counter(status for _, _, status in log),
                "answered": [round(at, 5) for at, _, _ in log],
                "latencies": [round(took, 6) for _, took, _ in log],
                "statuses": [status for _, _, status in log],
            }
        )
    )


def _address(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host, int(port)


def _same(lane: Lane) -> Lane:
    return lane


if __name__ == "__main__":
    uvloop.run(main(Volley(**json.loads(sys.argv[1]))))
