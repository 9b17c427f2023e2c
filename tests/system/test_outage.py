"""Outages of the database: every request is answered in time, and the service recovers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Self

import httpx
import pytest

from balance_app.local.postgres import EmbeddedPostgres
from tests.history import check
from tests.processes import Instance, connect, http_client, running
from tests.system.client import Load, open_account, read_ledger
from tests.system.databases import freeze, own_postgres, session_waits, thaw
from tests.system.sizes import report_figures, size

OUTAGE_SECONDS = size(small=5, full=10)
LONGEST_REQUEST_SECONDS = 15  # 2.5 s for an answer, and slack for a busy machine: none hangs
LOCKED_SECONDS = 6

Action = Callable[[EmbeddedPostgres], Awaitable[None]]


outages = pytest.mark.parametrize(
    ("begin", "end"),
    [(freeze, thaw), (EmbeddedPostgres.stop, EmbeddedPostgres.start)],
    ids=["frozen", "stopped"],
)


@outages
async def test_an_outage_is_reported_and_ends(begin: Action, end: Action) -> None:
    """Requests end in time during an outage, and succeed again after it."""
    async with own_postgres() as server:
        instances = [Instance(server.environment(), f"app{number}") for number in (1, 2)]
        urls = [instance.url for instance in instances]
        async with running(instances):
            account = await open_account(urls[0], balance=100)
            async with Load(urls, account) as load, Probes(urls) as probes:
                await load.progress(100)
                gone = monotonic()
                await begin(server)
                noticed = await probes.until(ready=False) - gone
                await asyncio.sleep(gone + OUTAGE_SECONDS - monotonic())
                coming_back = monotonic()
                await end(server)
                back = monotonic()
                first = await load.first_answer_after(back)
                await probes.until(ready=True)
                await load.progress(100)
            ledger = await read_ledger(urls[0], account)
    report_figures(
        f"{OUTAGE_SECONDS} s of outage, reported after {noticed:.2f} s, first answer {first:.2f} s"
        f" after its end, slowest probe {probes.slowest_seconds:.2f} s: {load.figures()}"
    )
    assert load.unexpected == []
    assert check(ledger, load.operations) == []
    assert load.answers["cut"] == load.answers["no connection"] == 0
    assert load.slowest_seconds <= LONGEST_REQUEST_SECONDS
    assert probes.slowest_seconds <= LONGEST_REQUEST_SECONDS
    assert {sample.status for sample in probes.samples if sample.path == "/livez"} == {200}
    during = [
        sample
        for sample in probes.samples
        if sample.path == "/readyz" and gone + noticed < sample.sent < coming_back - 0.5
    ]
    assert during
    assert {sample.status for sample in during} == {503}
    assert {sample.database_ok for sample in during} == {False}


@outages
async def test_an_instance_starts_without_its_database(begin: Action, end: Action) -> None:
    """Started during an outage, an instance reports it, and serves after its end."""
    async with own_postgres() as server:
        await begin(server)
        instance = Instance({**server.environment(), "DB_NAME": "later"})
        await instance.launch()
        try:
            async with Probes([instance.url]) as probes:
                await probes.until(ready=False)
                await end(server)
                await _wait_for_log(server, 'database "later" does not exist')
                await probes.until(ready=False)
                assert {sample.status for sample in probes.samples} == {200, 503}
                assert not any(sample.database_ok for sample in probes.samples)
                connection = await connect(server.environment())
                await connection.execute("CREATE DATABASE later")
                await connection.close()
                await probes.until(ready=True)
            async with Load([instance.url], await open_account(instance.url, balance=100)) as load:
                await load.progress(10)
        finally:
            await instance.stop()
    assert load.unexpected == []
    assert set(load.answers) <= {"200", "409", "GET 200"}
    assert probes.slowest_seconds <= LONGEST_REQUEST_SECONDS


async def test_an_instance_waits_for_a_schema_in_use(database: dict[str, str]) -> None:
    """An instance that starts while the schema is locked neither fails nor holds up its users."""
    async with Instance(database, "app1"):
        pass
    instance = Instance(database, "app2")
    connection = await connect(database)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("LOCK TABLE balance_app_version")
        await instance.launch()
        await session_waits(database)
        await session_waits(database, waits=False)  # the try has timed out
        await transaction.rollback()
        await instance.ready()
    finally:
        await connection.close()
        assert await instance.stop() == 0


async def test_a_locked_account_holds_up_no_other(database: dict[str, str]) -> None:
    """Requests for a locked row are refused in time; requests for others succeed."""
    async with Instance(database) as instance:
        other = await open_account(instance.url, balance=1_000_000)
        connection = await connect(database)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
            async with Probes([instance.url]) as probes:
                kept_out, others = await asyncio.gather(
                    *(_withdraw(instance.url, account, LOCKED_SECONDS) for account in (1, other))
                )
            await transaction.rollback()
            after = await _withdraw(instance.url, 1, 2)
        finally:
            await connection.close()
    report_figures(
        f"a row was locked for {LOCKED_SECONDS} s: slowest request for it "
        f"{max(kept_out.values()):.2f} s, for another {max(others.values()):.2f} s, "
        f"probes {probes.slowest_seconds:.2f} s; {others}"
    )
    assert set(kept_out) == {"503 no"}
    assert set(others) <= {"200", "503 no"}
    assert "200" in others
    assert "200" in after
    assert max(*kept_out.values(), *others.values()) <= LONGEST_REQUEST_SECONDS
    assert probes.slowest_seconds <= LONGEST_REQUEST_SECONDS
    assert all(sample.database_ok for sample in probes.samples if sample.path == "/readyz")


async def _wait_for_log(server: EmbeddedPostgres, sentence: str) -> None:
    """Wait until a server's log contains a sentence."""
    async with asyncio.timeout(30):
        while True:
            if sentence in server.log.read_text(errors="replace"):
                return
            await asyncio.sleep(0.05)


async def _withdraw(url: str, user_id: int, seconds: float) -> dict[str, float]:
    """Withdraw 1 repeatedly over several connections; return the longest time by answer."""
    longest: dict[str, float] = {}
    until = monotonic() + seconds

    async def client(http: httpx.AsyncClient) -> None:
        while True:
            sent = monotonic()
            answer = await http.post(f"{url}/api/balance", json={"userId": user_id, "amount": -1})
            name = str(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["Retry-After"]
                name += f" {answer.json()['applied']}"
            longest[name] = max(longest.get(name, 0), monotonic() - sent)
            if monotonic() >= until:
                return
            await asyncio.sleep(0.2)

    async with http_client() as http:
        await asyncio.gather(*(client(http) for _ in range(16)))
    return longest


@dataclass(frozen=True, slots=True)
class Sample:
    """One health report of an instance."""

    url: str
    path: str
    sent: float
    status: int
    database_ok: bool


class Probes:
    """Probes the health of instances continuously, as an orchestrator does."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.samples: list[Sample] = []
        self.slowest_seconds = 0.0
        self._addresses = [(url, path) for url in urls for path in ("/livez", "/readyz")]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._probe(*address)) for address in self._addresses]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in ends:
            if error is None and not isinstance(end, asyncio.CancelledError):
                raise AssertionError("a probe ended") from end

    async def until(self, *, ready: bool, within_seconds: float = 30) -> float:
        """Wait until every instance reports ready, or not ready; return the time."""
        asked = monotonic()
        urls = {url for url, _ in self._addresses}
        while monotonic() < asked + within_seconds:
            latest = {
                sample.url: sample
                for sample in self.samples
                if sample.path == "/readyz" and sample.sent >= asked
            }
            if set(latest) == urls and all((s.status == 200) == ready for s in latest.values()):
                return monotonic()
            await asyncio.sleep(0.02)
        raise AssertionError(f"not {ready=} within {within_seconds} s: {self.samples[-8:]}")

    async def _probe(self, url: str, path: str) -> None:
        async with http_client(timeout=20) as http:
            while True:
                sent = monotonic()
                try:
                    answer = await http.get(url + path)
                except httpx.ConnectError:  # it does not listen yet
                    await asyncio.sleep(0.05)
                    continue
                self.slowest_seconds = max(self.slowest_seconds, monotonic() - sent)
                database = answer.json().get("checks", {}).get("database")
                self.samples.append(Sample(url, path, sent, answer.status_code, database == "ok"))
                await asyncio.sleep(0.05)
