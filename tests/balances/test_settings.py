"""Floors, freezes and entity tags hold whatever else goes on."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from random import choice, randint
from typing import Any

import pytest

from balance_app.balances import accounts, repository
from balance_app.balances.accounts import Patch
from balance_app.balances.model import Accepted, Movement, Outcome
from balance_app.errors import Problem
from tests.balances.repositories import Repositories, repositories
from tests.balances.snapshots import snapshots
from tests.balances.test_transfers import Request, answers_to, word
from tests.mutants import replaced
from tests.processes import query
from tests.system.sizes import report_figures, size

TRIES = 100
CLIENTS = 20
CHANGES = size(small=1_000, full=20_000)
FREEZES = size(small=10, full=200)
# What a frozen account has no more of.
MOVEMENTS = """
SELECT version, (SELECT count(*) FROM holds WHERE user_id = id) AS holds FROM users WHERE id = $1
"""


class Load:
    """Changes, transfers and holds among some users, until it is stopped."""

    def __init__(self, apps: list[Repositories], users: list[int]) -> None:
        self.apps = apps
        self.users = users
        self.answers: Counter[str] = Counter()
        self.stopping = False
        self._keys = map(str, count())

    async def one(self) -> None:
        """Send a request of any kind."""
        app, user = choice(self.apps), choice(self.users)
        other = choice([each for each in self.users if each != user])
        amount = randint(1, 30)
        requests: list[Request] = [
            lambda: app.balances.change(Movement(user, choice((amount, -amount)))),
            lambda: app.balances.change(Movement(user, -amount, next(self._keys))),
            lambda: app.balances.transfer(Movement(user, -amount, to_user_id=other)),
            lambda: _hold(app, Movement(user, -amount, seconds=60)),
        ]
        (answer,) = await answers_to([choice(requests)])
        self.answers[word(answer)] += 1

    async def more(self, answers: int) -> None:
        """Wait for this many more answers."""
        goal = self.answers.total() + answers
        while self.answers.total() < goal:  # noqa: ASYNC110 - of several tasks
            await asyncio.sleep(0.002)


async def _hold(app: Repositories, movement: Movement) -> Outcome:
    """Place a hold; capture or void it."""
    placed = await app.balances.hold(movement)
    if not isinstance(placed, Accepted) or placed.hold is None:
        return placed
    number = placed.hold.number
    if randint(0, 1):
        return await app.holds.void(movement.user_id, number)
    return await app.holds.capture(movement.user_id, number, amount=1, reference=None, note=None)


@asynccontextmanager
async def load(database: dict[str, str], users: int) -> AsyncIterator[Load]:
    """Run a load from five instances."""
    async with repositories(database, 5) as apps:
        running = Load(apps, [await apps[0].opened(100) for _ in range(users)])

        async def client() -> None:
            while not running.stopping:
                await running.one()

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        try:
            yield running
        finally:
            running.stopping = True
            await asyncio.gather(*clients)


async def floors_changed(database: dict[str, str], changes: int) -> tuple[set[str], int, int]:
    """Change floors under load; return the answers, and how often one was below its floor."""
    settings: Counter[str] = Counter()
    async with load(database, 4) as running, snapshots(database) as seen:

        async def change_floors() -> None:
            app = running.apps[0]
            while running.answers.total() < changes:
                floor = randint(-100, 100)
                try:
                    await app.set(choice(running.users), Patch(floor=floor))
                except Problem as problem:
                    settings[problem.code] += 1
                else:
                    settings["made"] += 1

        await asyncio.gather(change_floors(), change_floors())
    report_figures(f"{dict(running.answers)}, floors {dict(settings)}, {seen}")
    assert {"made", "floor-not-covered"} == set(settings)
    return set(running.answers), seen.below_the_floor, seen.faults


async def test_nothing_available_is_below_the_floor(database: dict[str, str]) -> None:
    """Although floors are raised and lowered meanwhile; no CHECK of the table has to fire."""
    answers, below, faults = await floors_changed(database, CHANGES)
    assert answers == {"accepted", "insufficient-funds"}
    assert below == faults == 0


@pytest.mark.single
async def test_a_change_that_ignores_the_floor_goes_below_it(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control; the table's CHECK is removed too."""
    async with repositories(database):
        pass
    await query(database, "ALTER TABLE users DROP CONSTRAINT users_balance_check")
    unlimited = replaced(repository.CHANGE, "balance - held + $2 >= floor AND ", "")
    monkeypatch.setattr(repository, "CHANGE", unlimited)
    _, below, _ = await floors_changed(database, 500)
    assert below > 0


async def moved_while_frozen(database: dict[str, str], freezes: int) -> tuple[set[str], int]:
    """Freeze accounts under load; return the answers, and how often a movement came after that."""
    moved = 0
    async with load(database, 3) as running:
        for _ in range(freezes):
            user = choice(running.users)
            await running.more(20)
            await running.apps[0].set(user, Patch(frozen=True))
            before = await query(database, MOVEMENTS, user)
            await running.more(60)
            moved += await query(database, MOVEMENTS, user) != before
            await running.apps[0].set(user, Patch(frozen=False))
    report_figures(f"{dict(running.answers)}, moved after {moved} of {freezes} freezes")
    return set(running.answers), moved


async def test_nothing_moves_after_a_freeze_is_acknowledged(database: dict[str, str]) -> None:
    """Also not what waited for the account meanwhile."""
    answers, moved = await moved_while_frozen(database, FREEZES)
    assert moved == 0
    assert answers == {"accepted", "insufficient-funds", "user-frozen"}


@pytest.mark.parametrize("statement", ["CHANGE", "TRANSFER", "HOLD"])
@pytest.mark.single
async def test_without_the_condition_a_frozen_account_moves(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    """The control."""
    guard, instead = ("NOT frozen AND ", "") if statement == "TRANSFER" else ("NOT frozen", "true")
    monkeypatch.setattr(
        repository, statement, replaced(getattr(repository, statement), guard, instead)
    )
    _, moved = await moved_while_frozen(database, 5)
    assert moved > 0


async def with_one_tag(database: dict[str, str], what: str) -> Counter[str]:
    """Send many requests at once that all name the tag of the account as it was opened."""
    async with repositories(database, 2) as apps:
        user, other = [await apps[0].opened(TRIES) for _ in range(2)]
        tags = ["1.1.0"]
        keys = map(str, count())

        def request(app: Repositories) -> Request:
            match what:
                case "change":
                    return lambda: app.balances.change(Movement(user, -1, tags=tags))
                case "change with a key":
                    return lambda: app.balances.change(Movement(user, -1, next(keys), tags=tags))
                case "transfer":
                    pay = Movement(user, -1, to_user_id=other, tags=tags)
                    return lambda: app.balances.transfer(pay)
                case "hold":
                    return lambda: app.balances.hold(Movement(user, -1, seconds=9, tags=tags))
                case _:
                    patch = Patch(floor=-1, settings_versions=[1])
                    set_: Any = app.accounts.change_settings
                    return lambda: set_(user, patch, None)

        requests = [request(apps[number % 2]) for number in range(TRIES)]
        return Counter(map(word, await answers_to(requests)))


TAGGED: dict[str, tuple[Any, str, str]] = {
    "change": (repository, "CHANGE", "= ANY ($4)"),
    "change with a key": (repository, "CHANGE_ONCE", "= ANY ($4)"),
    "transfer": (repository, "TRANSFER", "= ANY ($5)"),
    "hold": (repository, "HOLD", "= ANY ($3)"),
    "settings": (accounts, "SET", "= ANY ($6)"),
}


@pytest.mark.parametrize("what", TAGGED)
async def test_one_change_is_made_per_entity_tag(database: dict[str, str], what: str) -> None:
    """Of 100 at once that name one tag, the first is made, and 99 are answered 412."""
    answers = await with_one_tag(database, what)
    assert answers == {"accepted": 1, "version-conflict": TRIES - 1}


@pytest.mark.parametrize("what", TAGGED)
@pytest.mark.single
async def test_without_the_comparison_several_are_made(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The control."""
    module, name, compared = TAGGED[what]
    monkeypatch.setattr(module, name, replaced(getattr(module, name), compared, "IS NOT NULL"))
    answers = await with_one_tag(database, what)
    assert answers["accepted"] > 1


async def test_a_change_of_settings_is_answered_by_its_statement(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read after the commit could fail, or find the change of somebody else."""
    async with repositories(database) as (app,):
        user = await app.opened(7)
        await app.balances.change(Movement(user, -2))
        await app.balances.hold(Movement(user, -1, seconds=60))
        patch = Patch(floor=-5, frozen=True, external_id="one", names=True)
        with monkeypatch.context() as patched:
            patched.setattr(accounts, "ACCOUNT", "SELECT 1 / 0")
            account = await app.accounts.change_settings(user, patch, "ada")
        assert account == await app.accounts.account(user)
        assert (account.balance, account.held, account.floor, account.frozen) == (5, 1, -5, True)
        assert (account.version, account.settings_version, account.external_id) == (2, 2, "one")
