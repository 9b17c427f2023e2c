"""Processes are killed under load: no acknowledged change is lost, none takes effect twice."""

import asyncio
from random import choice, uniform

import pytest

from balance_app.local.postgres import EmbeddedPostgres
from tests.history import Kind, check
from tests.processes import Instance, connect, running
from tests.system.client import Load, open_account, read_ledger
from tests.system.databases import accepting, kill, own_postgres
from tests.system.sizes import report_figures, size

INSTANCE_KILLS = size(small=4, full=20)
DATABASE_KILLS = size(small=2, full=5)
OPENING_BALANCE = 100
MUTANTS = "tests.mutants"


async def test_killed_instances_lose_nothing(
    database: dict[str, str], mode: dict[str, str]
) -> None:
    """Instances are killed during changes; the others go on, and each change takes effect once."""
    instances = [Instance(database | mode, f"app{number}") for number in range(1, 4)]
    async with running(instances):
        account = await open_account(instances[0].url, OPENING_BALANCE)
        async with Load([instance.url for instance in instances], account) as load:
            for _ in range(INSTANCE_KILLS):
                await load.progress(50)
                await asyncio.sleep(uniform(0, 0.3))
                victim = choice(instances)
                await victim.kill()
                await load.progress(20)  # the others still serve
                await victim.launch()
                await victim.ready()
            await load.progress(50)
        ledger = await read_ledger(instances[0].url, account)
    report_figures(f"{INSTANCE_KILLS} instances killed: {load.figures()}")
    assert load.unexpected == []
    assert check(ledger, load.operations) == []
    assert load.answers["cut"], "no kill met a request under way"
    assert load.slowest_seconds < 15  # none hangs; a busy machine needs seconds


async def test_a_killed_database_loses_nothing(mode: dict[str, str]) -> None:
    """PostgreSQL is killed during commits; the instances recover, and all answers stay true."""
    # Commits are as slow as on a slow disk, so that each kill interrupts some.
    async with own_postgres(commit_delay="5000", commit_siblings="0") as server:
        database = server.environment() | mode
        instances = [Instance(database, f"app{number}") for number in (1, 2)]
        async with running(instances):
            account = await open_account(instances[0].url, OPENING_BALANCE)
            async with Load([instance.url for instance in instances], account) as load:
                seconds = await _kill_database(server, load, DATABASE_KILLS)
            ledger = await read_ledger(instances[0].url, account)
    after = ", ".join(f"{each:.2f}" for each in seconds)
    report_figures(
        f"{DATABASE_KILLS} database kills, first answer after {after} s: {load.figures()}"
    )
    assert load.unexpected == []
    assert check(ledger, load.operations) == []
    assert load.answers["503 unknown"], "no kill met a request under way"
    assert load.answers["cut"] == load.answers["no connection"] == 0
    assert load.slowest_seconds < 15  # none hangs; a busy machine needs seconds
    assert max(seconds) < 3  # 1 s is promised; the rest is slack for a busy machine


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_no_default_takes_durability_away(*, guarded: bool) -> None:
    """With `synchronous_commit = off` in file and database no acknowledged change is lost.

    The control leaves it off: then the history shows lost changes.
    """
    async with own_postgres(
        synchronous_commit="off",
        # The WAL writer must not flush before the buffers are full.
        wal_buffers="64MB",
        wal_writer_delay="10s",
        wal_writer_flush_after="1GB",
        bgwriter_lru_maxpages="0",
        autovacuum="off",
    ) as server:
        connection = await connect(server.environment())
        await connection.execute("ALTER DATABASE postgres SET synchronous_commit = off")
        program = ("-m", "balance_app", "serve") if guarded else ("-m", MUTANTS, "durability")
        instances = [Instance(server.environment(), program=program, JOBS_ENABLED="false")]
        async with running(instances):
            account = await open_account(instances[0].url, OPENING_BALANCE)
            await connection.execute("CHECKPOINT")  # the account itself must not be lost
            await connection.close()
            async with Load([instances[0].url], account) as load:
                await _kill_database(server, load, 1)
            ledger = await read_ledger(instances[0].url, account)
    lost = [each for each in check(ledger, load.operations) if each.kind == Kind.LOST_CHANGE]
    report_figures(f"{guarded=}: {len(lost)} changes are lost: {load.figures()}")
    assert bool(lost) is not guarded


async def _kill_database(server: EmbeddedPostgres, load: Load, times: int) -> list[float]:
    """Kill PostgreSQL under load and start it again; return the seconds to the first answers."""
    seconds = []
    for _ in range(times):
        await load.progress(100)
        await asyncio.sleep(uniform(0, 0.3))
        await kill(server)
        starting = asyncio.create_task(server.start())
        seconds.append(await load.first_answer_after(await accepting(server)))
        await starting
    await load.progress(100)
    return seconds
