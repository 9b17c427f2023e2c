"""A busy instance is asked to stop."""

import asyncio
import signal
from time import monotonic

from tests.history import Accepted, Refused, Unknown, check
from tests.processes import Instance, connect, http_client, query, running
from tests.system.client import Load, open_account, read_ledger
from tests.system.databases import session_waits
from tests.system.sizes import report_figures, size

STOPS = size(small=2, full=10)
STOP_SECONDS = 5


async def test_a_stopping_instance_answers_requests_under_way(
    database: dict[str, str], mode: dict[str, str]
) -> None:
    """Stopped under load, an instance exits soon with code 0, and answers each change it made."""
    instances = [Instance(database | mode, f"app{number}") for number in (1, 2)]
    async with running(instances):
        account = await open_account(instances[0].url, balance=100)
        slowest = 0.0
        async with Load([instance.url for instance in instances], account) as load:
            for turn in range(STOPS):
                instance = instances[turn % 2]
                await load.progress(50)
                asked = monotonic()
                assert await instance.stop(signal.SIGTERM) == 0
                slowest = max(slowest, monotonic() - asked)
                await load.progress(20)
                await instance.launch()
                await instance.ready()
        ledger = await read_ledger(instances[0].url, account)
    report_figures(f"{STOPS} stops, the slowest took {slowest:.2f} s: {load.figures()}")
    assert load.unexpected == []
    assert check(ledger, load.operations) == []
    assert slowest < STOP_SECONDS
    unknown = {op.key for op in load.operations if isinstance(op, Unknown)}
    decided = [op for op in load.operations if isinstance(op, Accepted | Refused)]
    assert [op for op in decided if op.key in unknown and op.replayed] == []


async def test_a_request_that_waits_for_its_row_is_answered(
    database: dict[str, str], mode: dict[str, str]
) -> None:
    """Also when its instance is asked to stop meanwhile."""
    async with (
        Instance(database | mode) as instance,
        http_client(timeout=20) as http,
    ):
        connection = await connect(database)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
            request = asyncio.create_task(
                http.post(f"{instance.url}/api/balance", json={"userId": 1, "amount": -1})
            )
            await session_waits(database)
            stop = asyncio.create_task(instance.stop(signal.SIGTERM))
            await _wait_until_it_listens_no_more(instance)
            await transaction.rollback()
        finally:
            await connection.close()
        answer = await request
        assert await stop == 0
    assert answer.status_code == 200
    assert answer.json()["balance"] == 9_999
    assert answer.headers["connection"] == "close"


async def test_idle_clients_delay_no_stop(database: dict[str, str]) -> None:
    """Neither idle connections nor an unfinished request keep an instance from stopping."""
    async with Instance(database) as instance:
        connections = [await asyncio.open_connection("127.0.0.1", instance.port) for _ in range(21)]
        head = "POST /api/balance HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for number, (reader, writer) in enumerate(connections):
            if number < 10:  # idle after an answer; the others never sent a request
                writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await reader.readuntil(b"}")
            elif number == 20:
                writer.write(f"{head}Content-Length: 26\r\n\r\n".encode())
        asked = monotonic()
        code = await instance.stop(signal.SIGTERM)
        took = monotonic() - asked
        for _, writer in connections:
            writer.close()
    report_figures(f"stopped in {took:.2f} s")
    assert code == 0
    assert took < STOP_SECONDS


async def test_a_draining_instance_serves_and_is_not_ready(database: dict[str, str]) -> None:
    """On new connections and on idle ones, each of which ends with its answer; until it is over."""
    async with Instance(database, DRAIN_SECONDS="60") as instance, http_client() as idle:
        assert (await idle.get(f"{instance.url}/readyz")).status_code == 200
        assert instance.process is not None
        instance.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10), http_client() as probe:
            while (answer := await probe.get(f"{instance.url}/readyz")).is_success:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)
        assert answer.json()["checks"]["stopping"] == "This instance is stopping."
        assert answer.headers["connection"] == "close"
        for _ in ("on the idle connection", "on a new one"):
            answer = await idle.post(
                f"{instance.url}/api/balance", json={"userId": 1, "amount": -1}
            )
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        # the jobs are not kept for so long
        async with asyncio.timeout(10):
            while await query(database, "SELECT FROM jobs WHERE holder IS NOT NULL"):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        assert instance.process.returncode is None
        asked = monotonic()
        assert await instance.stop(signal.SIGTERM) == 0  # a second signal ends the wait
    assert monotonic() - asked < STOP_SECONDS


async def _wait_until_it_listens_no_more(instance: Instance) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                # Just before, the kernel drops what begins a connection.
                async with asyncio.timeout(0.1):
                    _, writer = await asyncio.open_connection("127.0.0.1", instance.port)
                writer.close()
            except ConnectionRefusedError:
                return
            except TimeoutError:
                continue
            await asyncio.sleep(0.02)
