"""All faults together, and a failover at the end: no answer contradicts another."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from random import choice, uniform
from time import monotonic

from balance_app.local.postgres import EmbeddedPostgres
from tests.history import check
from tests.jobs.proxy import Proxy
from tests.processes import Instance, connect, running
from tests.system.client import Load, open_account, read_ledger
from tests.system.databases import freeze, kill, own_postgres, standby_of, thaw
from tests.system.sizes import report_figures, size

SECONDS = size(small=5, full=300)
INSTANCES = 3
OPENING_BALANCE = 100
STANDBY = "standby"


@asynccontextmanager
async def synchronous_standby_of(primary: EmbeddedPostgres) -> AsyncIterator[EmbeddedPostgres]:
    """Run a synchronous standby of a server."""
    async with standby_of(primary, max_connections="200") as standby:
        admin = await connect(primary.environment())
        await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
        await admin.execute("SELECT pg_reload_conf()")
        async with asyncio.timeout(30):
            while not await admin.fetchval(  # noqa: ASYNC110 - a fact in the database
                "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            ):
                await asyncio.sleep(0.05)
        await admin.close()
        yield standby


class Faults:
    """Faults of instances, their networks, an account and the standby."""

    def __init__(
        self,
        instances: list[Instance],
        proxies: list[Proxy],
        primary: EmbeddedPostgres,
        standby: EmbeddedPostgres,
        account: int,
    ) -> None:
        self.seen: Counter[str] = Counter()
        self._instances, self._proxies = instances, proxies
        self._primary, self._standby = primary, standby
        self._account = account

    async def one(self) -> None:
        """Inject one random fault, and end it."""
        fault = choice(
            [
                self._kill_instance,
                self._stop_instance,
                self._mute_network,
                self._hold_answers,
                self._cut_network,
                self._lock_account,
                self._stall_standby,
            ]
        )
        self.seen[fault.__name__.removeprefix("_").replace("_", " ")] += 1
        await fault()

    async def fail_over(self) -> None:
        """Kill the primary while it waits for the standby, and promote the standby."""
        await freeze(self._standby)
        await asyncio.sleep(uniform(0.5, 4))
        await kill(self._primary)
        await thaw(self._standby)
        admin = await connect(self._standby.environment())
        await admin.execute("SELECT pg_promote()")
        await admin.close()
        for proxy in self._proxies:
            proxy._database = self._standby.environment()

    async def _kill_instance(self) -> None:
        victim = choice(self._instances)
        await victim.kill()
        await victim.launch()
        await victim.ready()

    async def _stop_instance(self) -> None:
        victim = choice(self._instances)
        assert victim.process is not None
        victim.process.send_signal(signal.SIGSTOP)
        await _a_while()
        victim.process.send_signal(signal.SIGCONT)

    async def _mute_network(self) -> None:
        await self._for_a_while(Proxy.freeze)

    async def _hold_answers(self) -> None:
        await self._for_a_while(Proxy.hold_answers)

    async def _for_a_while(self, fall_silent: Callable[[Proxy], None]) -> None:
        proxy = choice(self._proxies)
        fall_silent(proxy)
        await _a_while()
        proxy.heal()

    async def _cut_network(self) -> None:
        choice(self._proxies).cut()

    async def _lock_account(self) -> None:
        holder = await connect(self._primary.environment())
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", self._account)
        await _a_while()
        await transaction.rollback()
        await holder.close()

    async def _stall_standby(self) -> None:
        await freeze(self._standby)
        await _a_while()
        await thaw(self._standby)


def _a_while() -> Awaitable[None]:
    return asyncio.sleep(uniform(0.2, 4))


async def test_no_answer_lies_whatever_fails(mode: dict[str, str]) -> None:
    """Instances are killed and stopped, networks freeze, rows are locked, the standby stalls."""
    async with AsyncExitStack() as stack:
        primary = await stack.enter_async_context(own_postgres(max_connections="200"))
        standby = await stack.enter_async_context(synchronous_standby_of(primary))
        proxies = [
            await stack.enter_async_context(Proxy(primary.environment())) for _ in range(INSTANCES)
        ]
        instances = [
            Instance(proxy.environment() | mode, f"app{number}", JOBS_ENABLED="false")
            for number, proxy in enumerate(proxies, 1)
        ]
        await stack.enter_async_context(running(instances))
        account = await open_account(instances[0].url, OPENING_BALANCE)
        faults = Faults(instances, proxies, primary, standby, account)
        async with Load([instance.url for instance in instances], account) as load:
            ends = monotonic() + SECONDS
            while monotonic() < ends:
                await faults.one()
                await asyncio.sleep(uniform(0, 0.5))
            await load.progress(20)
            await faults.fail_over()
            await load.progress(20)
        ledger = await read_ledger(instances[0].url, account)
    report_figures(f"{dict(faults.seen)} and a failover: {load.figures()}")
    assert check(ledger, load.operations) == []
    assert load.unexpected == []
    assert load.answers["503 no"] == 0
