"""A key is revoked while five instances work: each of them refuses it within two seconds."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic

import httpx
import pytest

from tests.access.keyring import bearer, cookie, log_in, make_key, revoke
from tests.processes import Instance, http_client, running, served

PROMISED_SECONDS = 2
# A machine that runs other tests beside this one is late.
SLACK_SECONDS = 3


class Caller:
    """Sends changes to one instance without a pause; notes what it gets, and since when not."""

    def __init__(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self.client = client
        self.headers = headers
        self.answers: Counter[int] = Counter()
        self.refused_at: float | None = None
        self.accepted_after = 0

    async def run(self) -> None:
        while True:
            response = await self.client.post(
                "/api/balance", json={"userId": 1, "amount": 1}, headers=self.headers
            )
            self.answers[response.status_code] += 1
            if response.status_code == 401 and self.refused_at is None:
                self.refused_at = monotonic()
            elif response.status_code == 200 and self.refused_at is not None:
                self.accepted_after += 1
            if self.refused_at is not None:
                await asyncio.sleep(0.2)  # wrong keys are slowed


class Listener:
    """Reads a stream; notes when it ends."""

    def __init__(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self.client = client
        self.headers = headers
        self.began = asyncio.Event()
        self.ended_at: float | None = None

    async def run(self) -> None:
        async with self.client.stream(
            "GET", "/api/cron/events", headers=self.headers, timeout=60
        ) as response:
            assert response.status_code == 200
            async for _ in response.aiter_raw():
                self.began.set()
        self.ended_at = monotonic()


@pytest.fixture
async def five(database: dict[str, str]) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Clients of five instances that ask for keys."""
    async with served(database):
        await make_key(database)
    instances = [Instance(database, f"app{number}") for number in range(1, 6)]
    async with running(instances), AsyncExitStack() as stack:
        yield [await stack.enter_async_context(http_client(instance.url)) for instance in instances]


@asynccontextmanager
async def under_way(*runs: Callable[[], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Keep these running."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run()) for run in runs]
        yield
        for task in tasks:
            task.cancel()


async def until(what: Callable[[], bool], within_seconds: float = 60) -> None:
    """Wait for something that the callers and listeners note."""
    async with asyncio.timeout(within_seconds):
        while not what():  # noqa: ASYNC110 - notes have no event
            await asyncio.sleep(0.01)


async def test_a_revoked_key_is_refused_everywhere_within_two_seconds(
    five: list[httpx.AsyncClient], database: dict[str, str]
) -> None:
    """Its sessions and streams end with it; the other keys notice nothing."""
    goes, stays = await make_key(database), await make_key(database)
    session = await log_in(database, goes)
    ending = [
        Caller(client, headers) for client in five for headers in (bearer(goes), cookie(session))
    ]
    staying = [Caller(client, bearer(stays)) for client in five for _ in range(4)]
    streams = [
        Listener(client, headers) for client in five for headers in (bearer(goes), cookie(session))
    ]
    lasting = [Listener(client, bearer(stays)) for client in five]
    everybody: list[Caller | Listener] = [*ending, *staying, *streams, *lasting]
    async with under_way(*(each.run for each in everybody)):
        await until(lambda: all(each.answers[200] > 10 for each in (*ending, *staying)))
        await asyncio.gather(*(each.began.wait() for each in (*streams, *lasting)))
        before = [each.answers[200] for each in staying]
        await revoke(database, goes)
        revoked_at = monotonic()
        await until(lambda: all(each.refused_at for each in ending))
        await until(lambda: all(each.ended_at for each in streams))
        await until(
            lambda: all(
                now.answers[200] > then + 10 for now, then in zip(staying, before, strict=True)
            )
        )
    refused = [(each.refused_at or 0) - revoked_at for each in ending]
    ended = [(each.ended_at or 0) - revoked_at for each in streams]
    print(f"refused after {min(refused):.2f} to {max(refused):.2f} s, ", end="")
    print(f"streams ended after {min(ended):.2f} to {max(ended):.2f} s")
    assert max(*refused, *ended) < PROMISED_SECONDS + SLACK_SECONDS
    assert [each.accepted_after for each in ending] == [0] * len(ending)
    assert {status for each in ending for status in each.answers} == {200, 401}
    assert {status for each in staying for status in each.answers} == {200}
    assert [each.ended_at for each in lasting] == [None] * len(lasting)


@pytest.mark.parametrize("guard", ["key-refresh", "key-of-stream"])
async def test_without_the_guard_a_revoked_key_goes_on(
    guard: str, database: dict[str, str]
) -> None:
    """Control: an instance that reads the keys once, and one that checks streams once."""
    async with served(database):
        key = await make_key(database)
    async with served(database, program=("-m", "tests.mutants", guard)) as client:
        caller, stream = Caller(client, bearer(key)), Listener(client, bearer(key))
        async with under_way(caller.run, stream.run):
            await until(lambda: caller.answers[200] > 10)
            await stream.began.wait()
            await revoke(database, key)
            if guard == "key-of-stream":
                await until(lambda: caller.refused_at is not None)
            await asyncio.sleep(PROMISED_SECONDS + SLACK_SECONDS)
        assert stream.ended_at is None
        assert (caller.refused_at is None) == (guard == "key-refresh")
