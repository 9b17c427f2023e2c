"""Holds: what is held can't be spent otherwise, and each hold ends once."""

import asyncio
from collections import Counter
from datetime import timedelta
from random import choice, randint, random
from types import ModuleType
from typing import Any, cast

import asyncpg
import httpx
import pytest

from balance_app.balances import accounts, holds, repository, state
from balance_app.balances.errors import HoldEnded
from balance_app.balances.model import Accepted, Movement
from tests.balances.repositories import Repositories, repositories
from tests.balances.snapshots import Snapshots, snapshots
from tests.balances.test_transfers import Request, answers_to, content, word
from tests.jobs.support import until
from tests.mutants import replaced
from tests.processes import connect, query, served
from tests.system.databases import session_waits
from tests.system.sizes import report_figures, size

CROWD = size(small=1_000, full=10_000)
RACES = size(small=300, full=10_000)
ACCOUNTS = 10
AT_ONCE = 50
ANY = {"If-Match": "*"}
# The holds, and how many events there are for each.
EVENTS = """
SELECT count(*) AS holds, count(*) FILTER (WHERE state = 'open') AS open,
       (SELECT sum(hold_events) FROM users)::bigint AS events,
       count(*) FILTER (WHERE state = 'captured') AS captured,
       (SELECT count(*) FROM entries WHERE hold IS NOT NULL) AS entries
FROM holds
"""
# The holds were placed an hour earlier, and so are overdue.
AN_HOUR_LATER = """
WITH hold AS (
    UPDATE holds SET at = at - interval '1 hour', expires_at = expires_at - interval '1 hour'
)
UPDATE users SET holds_due_at = holds_due_at - interval '1 hour' WHERE id > 1
"""


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "control"])
@pytest.mark.parametrize(
    ("statement", "arguments", "when"),
    [
        (repository.HOLD, [5, None, timedelta(hours=1), *[None] * 5], "max(at) FROM holds"),
        (holds.VOID, [1, None], "max(ended_at) FROM holds"),
        (state.EXPIRE, [10], "max(ended_at) FROM holds"),
        (accounts.SET, [-9, None, False, None, None, None], "max(at) FROM user_settings"),
    ],
    ids=["hold", "void", "expiry", "settings"],
)
async def test_times_are_in_the_order_of_the_locks(
    database: dict[str, str],
    statement: str,
    arguments: list[object],
    when: str,
    raised: bool,  # noqa: FBT001 - a parameter
) -> None:
    """An entry that has waited for something else of its account is not older than that.

    The control: where that does not raise `changed_at`, the entry has the time of its own
    statement, which began before. With group commit it has that of the lock in any case.
    """
    together = database["BALANCE_GROUP_COMMIT"] == "true"
    other = await connect(database)
    async with repositories(database) as (app,):
        user_id = await app.opened(100)
        await app.balances.hold(Movement(user_id, -5, seconds=3600))
        async with other.transaction():
            await other.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id)
            change = asyncio.create_task(app.balances.change(Movement(user_id, -1)))
            await session_waits(database)
            if statement == state.EXPIRE:
                await other.execute(AN_HOUR_LATER)
            await other.execute(statement, user_id, *arguments)
            if not raised:
                await other.execute("UPDATE users SET changed_at = created_at")
        made = await change
    at = await other.fetchval(f"SELECT {when}")
    await other.close()
    assert isinstance(made, Accepted)
    assert made.entry is not None
    assert (made.entry.at > at) is (raised or together)


async def crowd(database: dict[str, str], number: int) -> tuple[Counter[str], int, int]:
    """Place holds of 2 at one moment on an account that covers half; return what is held, too."""
    async with repositories(database, 5) as apps:
        user = await apps[0].opened(number)

        def hold(app: Repositories) -> Request:
            return lambda: app.balances.hold(Movement(user, -2, seconds=3600))

        async with snapshots(database) as seen:
            answers = await answers_to([hold(apps[number % 5]) for number in range(number)])
    (row,) = await query(database, "SELECT held FROM users WHERE id = $1", user)
    counted = Counter(map(word, answers))
    report_figures(f"{dict(counted)}, {row['held']} held, {seen}")
    return counted, row["held"], seen.faults


async def test_exactly_half_of_the_holds_are_placed(database: dict[str, str]) -> None:
    """10 000 holds of 2 at one moment on 10 000: 5 000 are placed, 5 000 refused."""
    half = CROWD // 2
    assert await crowd(database, CROWD) == (
        {"accepted": half, "insufficient-funds": half},
        CROWD,
        0,
    )


async def test_a_condition_that_ignores_what_is_held_places_too_many(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control; the table's CHECK, which would end each of them, is removed too."""
    async with repositories(database):
        pass
    await query(database, "ALTER TABLE users DROP CONSTRAINT users_balance_check")
    blind = replaced(repository.HOLD, "balance - held - $2 >= floor", "balance - $2 >= floor")
    monkeypatch.setattr(repository, "HOLD", blind)
    counted, held, faults = await crowd(database, 200)
    assert counted == {"accepted": 200}
    assert held == 400
    assert faults


class Race:
    """Holds that are captured, voided and expire at about the same moment."""

    def __init__(self, apps: list[Repositories], users: list[int]) -> None:
        self._apps = apps
        self._users = users
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    @property
    def _app(self) -> Repositories:
        return choice(self._apps)

    async def one(self) -> None:
        """Place a hold, and end it in several ways at once, when it is about to expire."""
        user = choice(self._users)
        seconds = random()
        placed = await self._app.balances.hold(
            Movement(user, -randint(1, 5), seconds=cast("int", seconds))
        )
        assert isinstance(placed, Accepted)
        assert placed.hold is not None
        number, app = placed.hold.number, self._app
        await asyncio.sleep(seconds * random() * 1.3)
        answers = await answers_to(
            [
                lambda: app.holds.capture(user, number, amount=1, reference=None, note=None),
                lambda: self._app.holds.capture(user, number, amount=1, reference=None, note=None),
                lambda: self._app.holds.void(user, number),
                lambda: self._app.balances.change(Movement(user, choice((-1, 1)))),
            ]
        )
        *ends, _ = answers
        words = [word(each) for each in answers]
        hold = await self._app.holds.hold(user, number)
        accepted = [each for each in ends if isinstance(each, Accepted)]
        states = {str(each.hold.state) for each in accepted if each.hold is not None}
        states |= {str(each.members["state"]) for each in ends if isinstance(each, HoldEnded)}
        self.seen[hold.state] += 1
        if (
            hold.ended_at is None
            or states != {hold.state}
            or len(set(map(content, accepted))) > 1
            or words[:3].count("accepted") != (hold.state != "expired")
            or not set(words) <= {"accepted", "replayed", "hold-ended"}
            or (hold.state == "expired" and hold.ended_at < hold.expires_at)
        ):
            self.wrong.append(f"{hold}: {words} {answers}")

    async def run(self, races: int) -> None:
        """Run races on all accounts, some at once."""
        left = iter(range(races))

        async def some() -> None:
            for _ in left:
                try:
                    await self.one()
                except asyncpg.PostgresError as error:
                    self.wrong.append(repr(error))

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def race(database: dict[str, str], races: int) -> tuple[Race, Snapshots, dict[str, int]]:
    """Run races; return them, what snapshots showed meanwhile, and the events of the holds."""
    async with repositories(database, 5) as apps:
        found = Race(apps, [await apps[0].opened(100_000) for _ in range(ACCOUNTS)])
        async with snapshots(database) as seen:
            await found.run(races)
    (row,) = await query(database, EVENTS)
    report_figures(f"{dict(found.seen)}, {dict(row)}, {len(found.wrong)} wrong, {seen}")
    return found, seen, dict(row)


async def test_each_hold_ends_once(database: dict[str, str]) -> None:
    """Capture, void and expiry race: one of them ends the hold, and all answers say which."""
    found, seen, row = await race(database, RACES)
    assert found.wrong == []
    assert seen.faults == 0
    assert row["events"] == 2 * row["holds"] == 2 * RACES
    assert row["captured"] == row["entries"] == found.seen["captured"]
    assert min(found.seen[each] for each in ("captured", "voided", "expired"))


@pytest.mark.parametrize(
    ("module", "statement", "guard"),
    [
        (holds, "CAPTURE", "FOR NO KEY UPDATE OF holds"),
        (holds, "VOID", "FOR NO KEY UPDATE OF holds"),
        (state, "EXPIRE", "AND users.hold_events = overdue.hold_events"),
    ],
    ids=["capture", "void", "expiry"],
)
async def test_without_its_lock_or_the_number_of_events_a_hold_ends_twice(
    database: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    statement: str,
    guard: str,
) -> None:
    """The control: the hold is ended by a statement that has read it as it was before."""
    monkeypatch.setattr(module, statement, replaced(getattr(module, statement), guard, ""))
    found, seen, row = await race(database, 300)
    assert found.wrong or seen.faults or row["events"] != 2 * row["holds"]


async def test_a_hold_expires_although_no_job_runs(client: httpx.AsyncClient) -> None:
    """By PostgreSQL's clock, and not before its time; `client` is of an instance without jobs."""
    hold = {"userId": 1, "amount": 8, "expiresInSeconds": 1}
    placed = (await client.post("/api/holds", json=hold)).json()
    assert placed["account"]["held"] == 8

    async def released() -> bool:
        account = (await client.get("/api/users/1")).json()
        assert account["balance"] == account["available"] + account["held"] == 10_000
        return bool(account["held"] == 0)

    await until(released)
    ended = (await client.get(f"/api/holds/{placed['id']}")).json()
    assert ended["state"] == "expired"
    assert ended["endedAt"] >= ended["expiresAt"]


# Each kind of looking at a user who has 10, of which an overdue hold held 8; and where the answer
# has what is held now, or the state of the hold.
LOOKS: dict[str, tuple[str, str, Any, str, Any]] = {
    "read": ("GET", "/api/users/{user}", None, "held", 0),
    "list": ("GET", "/api/users?limit=1&after={before}", None, "users 0 held", 0),
    "find": ("GET", "/api/users?externalId=user{user}", None, "users 0 held", 0),
    "create once": ("PUT", "/api/users/by-external-id/user{user}", {}, "held", 0),
    "change": ("POST", "/api/balance", {"userId": 0, "amount": -10}, "held", 0),
    "deposit": ("POST", "/api/balance", {"userId": 0, "amount": 1}, "held", 0),
    "be refused": ("POST", "/api/balance", {"userId": 0, "amount": -11}, "held", 0),
    "pay": (
        "POST",
        "/api/transfers",
        {"fromUserId": 0, "toUserId": 1, "amount": 10},
        "from held",
        0,
    ),
    "be paid": (
        "POST",
        "/api/transfers",
        {"fromUserId": 1, "toUserId": 0, "amount": 1},
        "to held",
        0,
    ),
    "hold": (
        "POST",
        "/api/holds",
        {"userId": 0, "amount": 10, "expiresInSeconds": 9},
        "account held",
        10,
    ),
    "capture": ("POST", "/api/holds/{user}-1/capture", None, "state", "expired"),
    "void": ("POST", "/api/holds/{user}-1/void", None, "state", "expired"),
    "read the hold": ("GET", "/api/holds/{user}-1", None, "state", "expired"),
    "list holds": ("GET", "/api/users/{user}/holds", None, "holds 0 state", "expired"),
    "list open holds": ("GET", "/api/users/{user}/holds?state=open", None, "holds", []),
    "reverse": ("POST", "/api/users/{user}/entries/1/reverse", None, "held", 0),
    "set": ("PATCH", "/api/users/{user}", {"floor": 10}, "held", 0),
}


async def sees_the_end(database: dict[str, str], client: httpx.AsyncClient, look: str) -> bool:
    """Return whether this kind of looking sees that a hold has expired."""
    method, path, body, where, expected = LOOKS[look]
    user = (await client.post("/api/users", json={"balance": 10})).json()["userId"]
    await client.patch(f"/api/users/{user}", json={"externalId": f"user{user}"}, headers=ANY)
    hold = {"userId": user, "amount": 8, "expiresInSeconds": 60}
    assert (await client.post("/api/holds", json=hold)).is_success
    await query(database, AN_HOUR_LATER)
    answer = await client.request(
        method,
        path.format(user=user, before=user - 1),
        json=body and {name: value or user for name, value in body.items()},
        headers=ANY,
    )
    found = answer.json()
    for key in where.split():
        found = found[int(key)] if key == "0" else (found or {}).get(key)
    return bool(found == expected)


@pytest.mark.parametrize("look", LOOKS)
async def test_whoever_looks_sees_that_a_hold_has_expired(
    client: httpx.AsyncClient, database: dict[str, str], look: str
) -> None:
    """No job runs: the first request that needs the account ends what is overdue."""
    assert await sees_the_end(database, client, look)


async def test_without_looking_for_what_is_overdue_a_hold_stays_open(
    database: dict[str, str],
) -> None:
    """The control: statements that take what is stored for the present see an open hold."""
    async with served(database, program=("-m", "tests.mutants", "expiry")) as client:
        seen = [look for look in LOOKS if await sees_the_end(database, client, look)]
    assert seen == []


async def test_many_overdue_holds_end_in_several_statements(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One statement ends a limited number of them, but the account's next request all."""
    monkeypatch.setattr(state, "HOLDS_AT_ONCE", 10)
    async with repositories(database) as (app,):
        user = await app.opened(26)
        for _ in range(25):
            await app.balances.hold(Movement(user, -1, seconds=60))
        await app.balances.hold(Movement(user, -1, seconds=7200))
        await query(database, AN_HOUR_LATER)
        made = await app.balances.change(Movement(user, -25))
        assert word(made) == "accepted"
    (row,) = await query(database, EVENTS)
    assert (row["open"], row["events"]) == (1, 26 + 25)
