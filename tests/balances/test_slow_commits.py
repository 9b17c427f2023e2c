"""The duration of commits changes the time of a burst, but none of its answers."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import product
from time import monotonic
from typing import NamedTuple

import pytest

from balance_app.balances import guard
from balance_app.balances.accounts import AccountRepository, Opening
from balance_app.balances.guard import Guard
from balance_app.balances.model import Accepted, Movement
from balance_app.balances.repository import BalanceRepository
from balance_app.db.pool import Database
from balance_app.errors import Problem
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.main import LOCKING
from balance_app.settings import load_settings
from tests.processes import connect
from tests.system.databases import own_postgres
from tests.system.sizes import FULL, report_figures

CROWD = 600
GRID = list(product((1, 10, 35, 50, 100), (1, 3, 10), (1, 3, 5, 20)))
CELLS = [*GRID, (50, 3, 16)] if FULL else [(35, 3, 5)]


class Repositories(NamedTuple):
    """Those of one instance."""

    accounts: AccountRepository
    balances: BalanceRepository


@asynccontextmanager
async def instances(
    server: EmbeddedPostgres, number: int, connections: int
) -> AsyncIterator[list[Repositories]]:
    """Run several instances' repositories in this process."""
    variables = {name.lower(): value for name, value in server.environment().items()}
    settings = load_settings(**variables, db_pool_size=connections)
    databases = [Database(settings) for _ in range(number)]
    try:
        for database in databases:
            await database.start()
        guards = [Guard(database, LOCKING) for database in databases]
        yield [
            Repositories(AccountRepository(*each), BalanceRepository(*each))
            for each in zip(databases, guards, strict=True)
        ]
    finally:
        for database in databases:
            await database.stop()


async def fire(repositories: Sequence[Repositories], crowd: int) -> Counter[str]:
    """Withdraw 2 as many times at once from a new user who has as much; count the outcomes."""
    opened = await repositories[0].accounts.open(Opening(crowd), None)
    movement = Movement(opened.account.user_id, -2)

    async def withdraw(number: int) -> str:
        balances = repositories[number % len(repositories)].balances
        try:
            outcome = await balances.change(movement)
        except Problem as problem:
            return f"{problem.status} {problem.detail}"
        return "accepted" if isinstance(outcome, Accepted) else "refused"

    return Counter(await asyncio.gather(*(withdraw(number) for number in range(crowd))))


@asynccontextmanager
async def slow_postgres() -> AsyncIterator[EmbeddedPostgres]:
    """Run a PostgreSQL whose commits take as long as `commits_take` says."""
    async with own_postgres(commit_siblings="0", max_connections="400") as server:
        yield server


async def commits_take(server: EmbeddedPostgres, milliseconds: int) -> None:
    admin = await connect(server.environment())
    await admin.execute(f"ALTER SYSTEM SET commit_delay = {min(milliseconds * 1000, 100_000)}")
    await admin.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(10):
        while int(await admin.fetchval("SHOW commit_delay")) != milliseconds * 1000:  # noqa: ASYNC110 - a fact in the database
            await asyncio.sleep(0.02)
    await admin.close()


async def test_half_is_accepted_whatever_a_commit_costs() -> None:
    """600 withdrawals of 2 from 600: 300 accepted, 300 refused, however slow the disk is."""
    async with slow_postgres() as server:
        for milliseconds, number, connections in CELLS:
            await commits_take(server, milliseconds)
            async with instances(server, number, connections) as repositories:
                began = monotonic()
                answers = await fire(repositories, CROWD)
                report_figures(
                    f"{milliseconds:3} ms, {number:2} instances x {connections:2} connections: "
                    f"{monotonic() - began:5.1f} s, {dict(answers)}"
                )
                assert answers == {"accepted": CROWD // 2, "refused": CROWD // 2}


async def test_without_the_check_contention_is_taken_for_a_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: where each lock timeout counts as a foreign lock, some changes are refused."""

    async def find_lock(
        self: guard.Guard, _connection: object, _problem: Problem, waits: guard._Wait
    ) -> tuple[guard.Name, str]:
        del self
        return waits.names[0], guard.LOCKED

    monkeypatch.setattr(guard.Guard, "_find_lock", find_lock)
    async with slow_postgres() as server, instances(server, 10, 5) as repositories:
        await commits_take(server, 100)
        answers = await fire(repositories, 200)
    report_figures(f"{dict(answers)}")
    assert any(answer.startswith("503") for answer in answers)
