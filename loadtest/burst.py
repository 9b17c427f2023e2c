"""The burst itself: every connection is opened first, then one event releases all requests.

A connection sends its share of the requests one after another; by default there are as many
connections as requests, so each sends one.
"""

import asyncio
import gc
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from loadtest.preconditions import CannotRunError, Target

# Concurrent handshakes: below the smallest usual listen backlog (128).
_OPENING_AT_ONCE = 100
_CONNECT_TRIES = 5
_CONNECT_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class BurstConfig:
    """What to fire: `requests` times the same change of `amount` on one user.

    `keyed` gives each request an Idempotency-Key of its own. `timeout_seconds` bounds the opening
    and the firing together. `api_key` is sent with each request, None: the service needs none.
    """

    targets: Sequence[Target]
    user_id: int
    amount: int
    requests: int
    connections: int
    keyed: bool
    timeout_seconds: float
    api_key: str | None = field(default=None, repr=False)


@dataclass(slots=True)
class Progress:
    """How far a burst is: counts that the burst writes and the display reads."""

    opened: int = 0
    answered: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP answer.

    `seconds` runs from the release (for a connection's later requests: from its previous answer)
    to the last byte of the body, `after_seconds` always from the release.
    """

    status: int
    server_id: str
    body: bytes
    seconds: float
    after_seconds: float


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A request without a valid HTTP answer; whether it was applied is unknown."""

    reason: str


Outcome = Answer | NoAnswer

_TOO_LATE = NoAnswer("no answer within the time limit")


@dataclass(frozen=True, slots=True)
class BurstResult:
    """A finished burst: one outcome per request.

    `wall_seconds` is the time from the release to the last answer, `cpu_seconds` the CPU time of
    this process for opening and sending together.
    """

    outcomes: list[Outcome]
    opening_seconds: float
    wall_seconds: float
    cpu_seconds: float


async def fire(config: BurstConfig, progress: Progress) -> BurstResult:
    """Open every connection, release every request, and collect what comes back.

    Raises:
        CannotRunError: the connections could not all be opened; nothing was sent.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    count = min(config.connections, config.requests)
    connections = [_Connection(_target_of(config, lane)) for lane in range(count)]
    try:
        with _collector_paused():
            await _open_all(connections, config, progress)
            opened = time.perf_counter()
            release = _Release(progress, outcomes=[_TOO_LATE] * config.requests)
            tasks = [
                asyncio.create_task(release.send_in_turn(connection, _share(config, lane, count)))
                for lane, connection in enumerate(connections)
            ]
            await release.now()
            await _finish(tasks, started + config.timeout_seconds - time.perf_counter())
        return BurstResult(
            release.outcomes,
            opening_seconds=opened - started,
            wall_seconds=release.last_answer_at - release.released_at,
            cpu_seconds=time.process_time() - cpu_started,
        )
    finally:
        for connection in connections:
            connection.close()
        await asyncio.sleep(0)  # a transport closes its socket in the loop's next iteration


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Stop the garbage collector: traversing 10 000 live streams costs a quarter of the CPU."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    """One HTTP/1.1 connection to a target, reopened when the service closed it between requests."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._streams: _Streams | None = None

    async def open(self) -> _Streams:
        """Connect; retry a few times when the connection is refused."""
        tries_left = _CONNECT_TRIES
        while True:
            tries_left -= 1
            try:
                self._streams = await asyncio.open_connection(self._target.host, self._target.port)
            except OSError:
                if not tries_left:
                    raise
                await asyncio.sleep(_CONNECT_PAUSE_SECONDS)
            else:
                return self._streams

    async def exchange(self, request: bytes) -> tuple[int, str, bytes]:
        """Send a request and return its answer's status, server id and body.

        Raises:
            OSError, EOFError: the connection could not be opened, or it broke.
            asyncio.LimitOverrunError, KeyError, ValueError: the answer is not HTTP/1.1 with a
                Content-Length.
        """
        if self._streams is not None and self._streams[0].at_eof():
            self.close()  # idle for too long, as when opening all takes longer than a head may
        reader, writer = self._streams or await self.open()
        writer.write(request)
        status, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
        body = await reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return status, headers.get(b"x-server-id", b"unnamed").decode("latin-1"), body

    def close(self) -> None:
        """Close, without waiting for it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class _Release:
    """The simultaneous release of all requests; `outcomes[n]` belongs to request n."""

    def __init__(self, progress: Progress, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        self.released_at = self.last_answer_at = 0.0
        self._progress = progress
        self._event = asyncio.Event()

    async def now(self) -> None:
        """Release every request, once all tasks wait for the event."""
        await asyncio.sleep(0)
        self.released_at = self.last_answer_at = time.perf_counter()
        self._event.set()

    async def send_in_turn(
        self, connection: _Connection, requests: list[tuple[int, bytes]]
    ) -> None:
        """Wait for the release, then send numbered requests, each after the previous answer."""
        await self._event.wait()
        due = self.released_at
        for number, request in requests:
            try:
                status, server_id, body = await connection.exchange(request)
            except (OSError, EOFError, asyncio.LimitOverrunError, KeyError, ValueError) as error:
                self.outcomes[number] = NoAnswer(_reason(error))
                connection.close()
                due = time.perf_counter()
            else:
                answered = time.perf_counter()
                self.outcomes[number] = Answer(
                    status, server_id, body, answered - due, answered - self.released_at
                )
                self.last_answer_at = due = answered
            self._progress.answered += 1


async def _open_all(
    connections: list[_Connection], config: BurstConfig, progress: Progress
) -> None:
    waiting = iter(connections)

    async def open_in_turn() -> None:
        for connection in waiting:
            await connection.open()
            progress.opened += 1

    try:
        async with asyncio.timeout(config.timeout_seconds), asyncio.TaskGroup() as group:
            for _ in range(_OPENING_AT_ONCE):
                group.create_task(open_in_turn())
    except TimeoutError:
        reason = f"the limit of {config.timeout_seconds:g} s was reached"
    except ExceptionGroup as failures:
        refused, bugs = failures.split(OSError)
        if refused is None or bugs is not None:
            raise
        reason = str(refused.exceptions[0])
    else:
        return
    raise CannotRunError(
        f"Only {progress.opened} of {len(connections)} connections could be opened, then {reason}; "
        "nothing was sent."
    )


async def _finish(tasks: list[asyncio.Task[None]], timeout_seconds: float) -> None:
    """Wait for the tasks and cancel those still running at the timeout; raise a task's error."""
    done, late = await asyncio.wait(tasks, timeout=max(0.0, timeout_seconds))
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()


def _target_of(config: BurstConfig, lane: int) -> Target:
    return config.targets[lane % len(config.targets)]


def _share(config: BurstConfig, lane: int, lanes: int) -> list[tuple[int, bytes]]:
    """Return the numbered requests of one connection, ready to be written."""
    host = _target_of(config, lane).authority
    body = f'{{"userId":{config.user_id},"amount":{config.amount}}}'
    head = (
        f"POST /api/balance HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    if config.api_key is not None:
        head += f"Authorization: Bearer {config.api_key}\r\n"
    return [
        (number, f"{head}{_key_header(config)}\r\n{body}".encode("ascii"))
        for number in range(lane, config.requests, lanes)
    ]


def _key_header(config: BurstConfig) -> str:
    return f"Idempotency-Key: {uuid.uuid4()}\r\n" if config.keyed else ""


def _parse_head(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    """Return an answer's status and its headers by lower-case name."""
    status_line, *lines = head[:-4].split(b"\r\n")
    version, status, *_ = status_line.split(b" ", 2)
    if not version.startswith(b"HTTP/1."):
        raise ValueError("not HTTP/1")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    return int(status), headers


def _reason(error: Exception) -> str:
    match error:
        case asyncio.IncompleteReadError(partial=b""):
            return "connection closed before an answer"
        case asyncio.IncompleteReadError():
            return "connection closed in the middle of an answer"
        case ConnectionResetError():
            return "connection reset"
        case OSError():
            return f"connection failed ({type(error).__name__})"
        case _:
            return f"no HTTP answer ({type(error).__name__})"
