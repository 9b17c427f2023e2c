"""Transfers make both entries or none, and hold no lock that outlives their statement."""

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from random import choice, randint, sample, uniform

from tests.accounts.check import check_accounts
from tests.accounts.model import Capture, Change, Done, Place, Transfer
from tests.balances.snapshots import DEADLOCKS, Snapshots, snapshots
from tests.processes import SERVE, Instance, connect, query, running
from tests.system.accounts_client import AccountsLoad, read_accounts
from tests.system.client import open_account
from tests.system.databases import accepting, kill, own_postgres
from tests.system.sizes import report_figures, size

TRANSFERS = size(small=1_000, full=10_000)
SNAPSHOTS = size(small=50, full=1_000)
KILLS = size(small=2, full=10)
USERS = 10
MUTANTS = ("-m", "tests.mutants")
STOPS = size(small=2, full=20)


class Transfers(AccountsLoad):
    """Clients that transfer random amounts between random users."""

    async def act(self) -> None:
        payer, payee = sample(self._user_ids, 2)
        await self.decide(Transfer(payer, payee, randint(1, 50), next(self.keys)))


class TransfersAndCaptures(Transfers):
    """Some of them hold an amount, capture it, and deposit it again, instead."""

    async def act(self) -> None:
        if randint(0, 1):
            await super().act()
            return
        user_id, amount = choice(self._user_ids), randint(1, 9)
        placed = await self.decide(Place(user_id, amount, next(self.keys)))
        if isinstance(placed, Done) and placed.number is not None:
            captured = await self.decide(Capture(user_id, placed.number))
            if isinstance(captured, Done):
                await self.decide(Change(user_id, amount, next(self.keys)))


async def opened(database: dict[str, str], url: str) -> list[int]:
    """Create users with 100 each; three of them have an overdraft."""
    users = [await open_account(url, 100) for _ in range(USERS)]
    await query(database, "UPDATE users SET floor = -50 WHERE id = ANY($1)", users[:3])
    return users


async def faults(
    database: dict[str, str], users: Sequence[int], load: AccountsLoad
) -> list[object]:
    """Return what contradicts itself in ledgers, accounts and answers."""
    return [
        *check_accounts(await read_accounts(database, users), load.operations),
        *load.unexpected,
    ]


async def test_transfers_keep_the_total() -> None:
    """In each snapshot meanwhile; there is no deadlock, no error, and nobody below the floor."""
    async with own_postgres(max_connections="200") as server:
        database = server.environment()
        instances = [Instance(database, f"app{n}", JOBS_ENABLED="false") for n in range(1, 6)]
        async with running(instances):
            users = await opened(database, instances[0].url)
            began = len(server.log.read_text())
            load = Transfers([each.url for each in instances], users, connections=32)
            async with snapshots(database) as seen, load:
                while load.outcomes.total() < TRANSFERS or seen.taken < SNAPSHOTS:  # noqa: ASYNC110 - of two tasks
                    await asyncio.sleep(0.01)
            found = await faults(database, users, load)
            log = server.log.read_text()[began:]
        await asyncio.sleep(1.1)  # the statistics of sessions are written after a second
        deadlocks = (await query(database, DEADLOCKS))[0]["deadlocks"]
    report_figures(f"{load.figures()}, {deadlocks} deadlocks, {seen}")
    assert found == []
    assert set(load.answers) == {"200", "409"}
    assert (len(seen.totals), seen.faults, deadlocks) == (1, 0, 0)
    assert "ERROR" not in log


async def kill_instances(
    database: dict[str, str], kills: int, program: Sequence[str], *, at_once: int = 1
) -> tuple[list[object], Snapshots]:
    """Kill instances in the middle of transfers; return the faults, and those of snapshots."""
    names = [f"app{number}" for number in (1, 2, 3)]
    instances = [Instance(database, name, program=program, JOBS_ENABLED="false") for name in names]
    async with running(instances):
        users = await opened(database, instances[0].url)
        load = Transfers([each.url for each in instances], users)
        async with load:
            for _ in range(kills):
                await load.progress(50)
                await asyncio.sleep(uniform(0, 0.2))
                victims = sample(instances, at_once)
                await asyncio.gather(*(victim.kill() for victim in victims))
                if at_once < len(instances):
                    await load.progress(20)
                for victim in victims:
                    await victim.launch()
                    await victim.ready()
            await load.progress(50)
        found = await faults(database, users, load)
        async with snapshots(database) as seen:
            pass
    report_figures(f"{kills} instances killed: {load.figures()}, {seen}")
    assert load.answers["cut"], "no kill met a request under way"
    return found, seen


def total_of(seen: Snapshots) -> int:
    """Return the total of all balances; it includes that of the first user."""
    (total,) = seen.totals
    return total - 10_000


async def test_a_killed_instance_leaves_no_half(database: dict[str, str]) -> None:
    """Each transfer that a kill has interrupted has both entries, or none."""
    found, seen = await kill_instances(database, KILLS, SERVE)
    assert found == []
    assert (total_of(seen), seen.faults) == (USERS * 100, 0)


async def test_two_transactions_leave_halves(database: dict[str, str]) -> None:
    """The control: of some transfers only the payer's entry is there after the kill."""
    found, seen = await kill_instances(database, 1, (*MUTANTS, "halves"), at_once=3)
    assert found
    assert total_of(seen) < USERS * 100


async def test_a_killed_database_leaves_no_half() -> None:
    """PostgreSQL is killed during commits: each transfer has both entries, or none."""
    # Commits are as slow as on a slow disk, so that each kill interrupts some.
    async with own_postgres(commit_delay="5000", commit_siblings="0") as server:
        database = server.environment()
        instances = [Instance(database, f"app{n}", JOBS_ENABLED="false") for n in (1, 2)]
        async with running(instances):
            users = await opened(database, instances[0].url)
            load = Transfers([each.url for each in instances], users)
            seen = Snapshots()
            async with load:
                for _ in range(KILLS):
                    await load.progress(50)
                    await asyncio.sleep(uniform(0, 0.2))
                    await kill(server)
                    starting = asyncio.create_task(server.start())
                    await accepting(server)
                    connection = await connect(database)
                    await seen.take(connection, halves=True)
                    await connection.close()
                    await starting
                await load.progress(50)
            found = await faults(database, users, load)
    report_figures(f"{KILLS} database kills: {load.figures()}, {seen}")
    assert found == []
    assert (total_of(seen), seen.faults) == (USERS * 100, 0)
    assert load.answers["503 unknown"], "no kill met a request under way"


async def versions(database: dict[str, str]) -> set[tuple[int, int]]:
    """Return the users that change, and their versions."""
    rows = await query(database, "SELECT id, version FROM users WHERE id > 1")
    return {(row["id"], row["version"]) for row in rows}


async def freeze_an_instance(
    database: dict[str, str], times: int, program: Sequence[str], until: str = ""
) -> Counter[str]:
    """Freeze an instance until others have changed every account; return what they answered.

    It is frozen so many times, or until the answer `until` is among those.
    """
    frozen = Instance(database, "frozen", program=program, JOBS_ENABLED="false")
    others = [Instance(database, f"app{n}", JOBS_ENABLED="false") for n in (1, 2)]
    async with running([frozen, *others]):
        users = await opened(database, frozen.url)
        unlucky = TransfersAndCaptures([frozen.url], users)
        lucky = TransfersAndCaptures([each.url for each in others], users)
        async with unlucky, lucky:
            for _ in range(times):
                if lucky.answers[until]:
                    break
                await unlucky.progress(20)
                await asyncio.sleep(uniform(0, 0.1))
                assert frozen.process is not None
                frozen.process.send_signal(signal.SIGSTOP)
                before = await versions(database)
                while before & await versions(database) and not lucky.answers["503 unknown"]:  # noqa: ASYNC110 - in the database
                    await asyncio.sleep(0.05)
                frozen.process.send_signal(signal.SIGCONT)
        operations = [*unlucky.operations, *lucky.operations]
        found = check_accounts(await read_accounts(database, users), operations)
    report_figures(f"{times} times frozen; others: {lucky.figures()}; itself: {unlucky.figures()}")
    assert found == []
    return lucky.answers


async def test_a_frozen_instance_holds_no_lock(
    database: dict[str, str], mode: dict[str, str]
) -> None:
    """The accounts go on changing elsewhere, whatever statement it was frozen in."""
    answers = await freeze_an_instance(database | mode, STOPS, SERVE)
    assert set(answers) <= {"200", "201", "409"}


async def test_an_instance_that_decides_in_a_transaction_holds_locks(
    database: dict[str, str],
) -> None:
    """The control: frozen between two statements of one transaction it stops all others.

    Not every moment at which it is frozen is between two statements.
    """
    answers = await freeze_an_instance(database, 20, (*MUTANTS, "statement"), until="503 unknown")
    assert answers["503 unknown"]
