"""A request that waits for another transaction has the outcome that it has after that one.

Each request is sent while another transaction has changed the account and not yet ended. What it is
answered, and what it leaves, is compared with the same two things done one after the other.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from itertools import product
from random import sample
from typing import Any, NamedTuple

import asyncpg
import pytest

from balance_app.balances import accounts, holds, repository, state
from balance_app.balances.accounts import Patch
from balance_app.balances.model import Accepted, Movement, Refused
from balance_app.errors import Problem
from tests.balances.repositories import Repositories, repositories
from tests.jobs.support import Connection
from tests.mutants import replaced
from tests.processes import connect
from tests.system.databases import WAITERS
from tests.system.sizes import FULL, report_figures

SAMPLE = 150
# They differ from all amounts.
LARGE_IDS = "SELECT setval(pg_get_serial_sequence('users', 'id'), 1000000)"
OVERDUE = """
WITH hold AS (UPDATE holds SET expires_at = at WHERE user_id = $1)
UPDATE users SET holds_due_at = clock_timestamp() - interval '1 s' WHERE id = $1
"""
LEFT = (
    """
    SELECT balance, held, floor, frozen, version, settings_version, hold_events
    FROM users WHERE id = ANY($1) ORDER BY id
    """,
    """
    SELECT user_id, version, amount, balance, held, key, other_user_id, other_version, reverses,
           hold
    FROM entries WHERE user_id = ANY($1) ORDER BY user_id, version
    """,
    """
    SELECT user_id, number, amount, state, captured, balance, held, version
    FROM holds WHERE user_id = ANY($1) ORDER BY user_id, number
    """,
    """
    SELECT user_id, key, outcome, balance, version, held, floor, frozen, refused_by
    FROM idempotency_keys WHERE user_id = ANY($1) ORDER BY user_id, key
    """,
    """
    SELECT user_id, settings_version, floor, frozen, external_id
    FROM user_settings WHERE user_id = ANY($1) ORDER BY user_id, settings_version
    """,
)


class Pair(NamedTuple):
    """Two accounts: `first` has 100, of which 30 are held, and a deposit of 10; `second` has 50."""

    first: int
    second: int

    def names(self, value: object) -> object:
        """Return a value with the names of the users in place of their ids."""
        match value:
            case dict():
                return {
                    key: self.names(each)
                    for key, each in value.items()
                    if key not in {"at", "endedAt"}
                }
            case list() | tuple():
                return [self.names(each) for each in value]
            case int() if not isinstance(value, bool) and value in self:
                return "first" if value == self.first else "second"
            case str():
                return value.replace(str(self.first), "first")
            case _:
                return value


Interference = Callable[[Connection, Pair], Awaitable[object]]
Request = Callable[[Repositories, Pair], Awaitable[object]]


async def _set(
    con: Connection,
    user_id: int,
    *,
    floor: int | None = None,
    frozen: bool | None = None,
    name: str | None = None,
) -> object:
    names = name is not None
    return await con.fetch(accounts.SET, user_id, floor, frozen, names, name, None, None)


INTERFERENCES: dict[str, Interference] = {
    "locks the first": lambda con, of: con.fetch(
        "SELECT FROM users WHERE id = $1 FOR UPDATE", of.first
    ),
    "locks the second": lambda con, of: con.fetch(
        "SELECT FROM users WHERE id = $1 FOR UPDATE", of.second
    ),
    "withdraws": lambda con, of: repository._change(con, Movement(of.first, -60)),
    "deposits": lambda con, of: repository._change(con, Movement(of.first, 60)),
    "deposits with a key": lambda con, of: repository._change(con, Movement(of.first, 7, "k")),
    "withdraws from the second": lambda con, of: repository._change(con, Movement(of.second, -45)),
    "holds": lambda con, of: repository._hold(con, Movement(of.first, -60, seconds=60)),
    "captures": lambda con, of: con.fetch(holds.CAPTURE, of.first, 1, 10, None, None, None),
    "voids": lambda con, of: con.fetch(holds.VOID, of.first, 1, None),
    "pays": lambda con, of: repository._transfer(
        con, Movement(of.first, -60, to_user_id=of.second)
    ),
    "is paid": lambda con, of: repository._transfer(
        con, Movement(of.second, -40, to_user_id=of.first)
    ),
    "reverses": lambda con, of: repository._change(con, Movement(of.first, -10), reverses=2),
    "raises the floor": lambda con, of: _set(con, of.first, floor=50),
    "allows an overdraft": lambda con, of: _set(con, of.first, floor=-100),
    "freezes": lambda con, of: _set(con, of.first, frozen=True),
    "freezes the second": lambda con, of: _set(con, of.second, frozen=True),
    "names": lambda con, of: _set(con, of.first, name=f"user {of.first}"),
    "thaws": lambda con, of: _set(con, of.first, frozen=False),
    "expires": lambda con, of: con.fetch(state.EXPIRE, of.first, 1000),
}
TAGS = ["2.1.1", "2.2.1"]  # that of the start, and of a frozen one
REQUESTS: dict[str, Request] = {
    "withdraw": lambda app, of: app.balances.change(Movement(of.first, -50)),
    "withdraw more": lambda app, of: app.balances.change(Movement(of.first, -80)),
    "deposit": lambda app, of: app.balances.change(Movement(of.first, 5)),
    "withdraw with a key": lambda app, of: app.balances.change(Movement(of.first, -50, "k")),
    "deposit with the same key": lambda app, of: app.balances.change(Movement(of.first, 7, "k")),
    "withdraw if unchanged": lambda app, of: app.balances.change(Movement(of.first, -5, tags=TAGS)),
    "pay": lambda app, of: app.balances.transfer(Movement(of.first, -50, to_user_id=of.second)),
    "pay more": lambda app, of: app.balances.transfer(
        Movement(of.first, -80, to_user_id=of.second)
    ),
    "pay with a key": lambda app, of: app.balances.transfer(
        Movement(of.first, -50, "k", to_user_id=of.second)
    ),
    "pay if unchanged": lambda app, of: app.balances.transfer(
        Movement(of.first, -5, to_user_id=of.second, tags=TAGS)
    ),
    "be paid": lambda app, of: app.balances.transfer(
        Movement(of.second, -20, "k", to_user_id=of.first)
    ),
    "be paid more": lambda app, of: app.balances.transfer(
        Movement(of.second, -60, "k", to_user_id=of.first)
    ),
    "hold": lambda app, of: app.balances.hold(Movement(of.first, -50, seconds=60)),
    "hold more, with a key": lambda app, of: app.balances.hold(
        Movement(of.first, -80, "k", seconds=60)
    ),
    "hold if unchanged": lambda app, of: app.balances.hold(
        Movement(of.first, -5, seconds=60, tags=TAGS)
    ),
    "capture": lambda app, of: app.holds.capture(
        of.first, 1, amount=None, reference=None, note=None
    ),
    "capture a part": lambda app, of: app.holds.capture(
        of.first, 1, amount=10, reference=None, note=None
    ),
    "void": lambda app, of: app.holds.void(of.first, 1),
    "reverse": lambda app, of: app.balances.reverse(of.first, 2, reference=None, note=None),
    "set a floor": lambda app, of: app.accounts.change_settings(of.first, Patch(floor=60), "me"),
    "freeze": lambda app, of: app.accounts.change_settings(
        of.first, Patch(frozen=True, settings_versions=[1]), "me"
    ),
}


async def _nothing(_connection: Connection, _of: Pair) -> object:
    return None


STARTS: dict[str, Interference] = {
    "": _nothing,
    "frozen": lambda con, of: _set(con, of.first, frozen=True),
    "overdue": lambda con, of: con.execute(OVERDUE, of.first),
}
CASES = list(product(STARTS, INTERFERENCES, (True, False), REQUESTS))


class Case:
    """One request against one interfering transaction, which is committed or rolled back."""

    def __init__(self, app: Repositories, case: tuple[str, str, bool, str]) -> None:
        start, interference, self._commits, request = case
        self._app = app
        self._start, self._interfere = STARTS[start], INTERFERENCES[interference]
        self._request = REQUESTS[request]

    async def pair(self, admin: Connection) -> Pair:
        of = Pair(await self._app.opened(90), await self._app.opened(50))
        await self._app.balances.change(Movement(of.first, 10))
        await self._app.balances.hold(Movement(of.first, -30, seconds=3600))
        await self._start(admin, of)
        return of

    async def at_once(self, admin: Connection, other: Connection) -> tuple[bool, list[object]]:
        """Return whether the request waited, and its outcome and what is left."""
        of = await self.pair(admin)
        transaction = other.transaction()
        await transaction.start()
        await self._interfere(other, of)
        request = asyncio.create_task(outcome(self._request(self._app, of)))
        while not (request.done() or await admin.fetchval(WAITERS)):  # noqa: ASYNC110 - in the database
            await asyncio.sleep(0.001)
        waited = not request.done()
        await (transaction.commit() if self._commits else transaction.rollback())
        return waited, [of.names(await request), of.names(await left(admin, of))]

    async def in_turn(self, admin: Connection, *, last: bool) -> list[object]:
        """Return the same for both in turn, with the request first or `last`."""
        of = await self.pair(admin)
        if last and self._commits:
            await self._interfere(admin, of)
        answer = await outcome(self._request(self._app, of))
        if not last and self._commits:
            await self._interfere(admin, of)
        return [of.names(answer), of.names(await left(admin, of))]


async def left(admin: Connection, of: Pair) -> list[object]:
    """Return the rows of both users."""
    return [[dict(row) for row in await admin.fetch(sql, list(of))] for sql in LEFT]


async def outcome(request: Awaitable[object]) -> dict[str, Any]:
    """Return what a request was answered, without times."""
    try:
        made: Any = await request
    except (Problem, asyncpg.PostgresError) as error:
        return {"error": type(error).__name__, **getattr(error, "members", {})}
    if isinstance(made, Refused):
        return {"refused": made.problem.members, "replayed": made.replayed}
    if not isinstance(made, Accepted):
        found = asdict(made)
        return {name: each for name, each in found.items() if name != "created_at"}
    parts = made._asdict()
    return {
        name: {
            member: each
            for member, each in part._asdict().items()
            if member not in {"at", "expires_at", "ended_at"}
        }
        for name, part in parts.items()
        if part is not None and name != "replayed"
    } | {"replayed": made.replayed}


async def differing(database: dict[str, str], cases: list[Any]) -> list[str]:
    """Return the cases whose outcome depends on the interleaving; and how many waited, printed."""
    admin, other = await connect(database), await connect(database)
    found, waits = [], 0
    limits = {"DB_LOCK_SECONDS": 8, "DB_STATEMENT_SECONDS": 10}
    async with repositories(database, **limits) as (app,):
        await admin.execute(LARGE_IDS)
        for case in cases:
            waited, one = await Case(app, case).at_once(admin, other)
            waits += waited
            expected = await Case(app, case).in_turn(admin, last=True)
            if one != expected and not waited:
                # It may have seen nothing of the other transaction, which comes after it then.
                expected = await Case(app, case).in_turn(admin, last=False)
            if one != expected:
                found.append(f"{case}, {waited=}:\n  {one}\n  {expected}")
    report_figures(f"{len(cases)} cases, {waits} of which waited")
    await admin.close()
    await other.close()
    return found


async def test_what_waits_is_decided_after_what_it_waited_for(
    database: dict[str, str],
) -> None:
    """No request is decided by a state that another transaction has changed meanwhile."""
    cases = CASES if FULL else sample(CASES, SAMPLE)
    assert await differing(database, cases) == []


@pytest.mark.parametrize(
    "guard",
    [
        (repository, "TRANSFER", "ORDER BY id FOR NO KEY UPDATE", ("", "withdraws", True, "pay")),
        (
            holds,
            "CAPTURE",
            "FOR NO KEY UPDATE OF holds",
            ("", "voids", True, "capture"),
        ),
        (
            holds,
            "VOID",
            "FOR NO KEY UPDATE OF holds",
            ("", "captures", True, "void"),
        ),
        (
            state,
            "EXPIRE",
            "AND users.hold_events = overdue.hold_events",
            ("overdue", "expires", True, "deposit"),
        ),
        (
            accounts,
            "SET",
            "AND users.settings_version = seen.settings_version",
            ("", "names", True, "set a floor"),
        ),
    ],
    ids=lambda guard: guard[1],
)
@pytest.mark.single
async def test_without_its_guard_a_statement_is_decided_by_the_past(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch, guard: tuple[Any, str, str, Any]
) -> None:
    """The control: without the lock or the comparison the outcome is another one."""
    module, statement, removed, case = guard
    monkeypatch.setattr(module, statement, replaced(getattr(module, statement), removed, ""))
    assert await differing(database, [case])
