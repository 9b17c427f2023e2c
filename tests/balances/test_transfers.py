"""Transfers move money and make none; a key has one effect; an entry is reversed once."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from random import shuffle
from time import monotonic

import asyncpg
import pytest
from pydantic_core import to_json

from balance_app.balances import repository
from balance_app.balances.api.schemas import accepted_body
from balance_app.balances.errors import UserNotFound
from balance_app.balances.guard import LOCKED, Guard
from balance_app.balances.model import Accepted, Entry, Movement, Outcome, Refused
from balance_app.db.pool import Connection
from balance_app.errors import Problem
from tests.balances.repositories import Repositories, repositories
from tests.balances.snapshots import DEADLOCKS, snapshots
from tests.mutants import replaced
from tests.processes import connect, query
from tests.system.databases import own_postgres
from tests.system.sizes import report_figures, size

TRIES = 100
PAIRS = size(small=500, full=5_000)

Request = Callable[[], Awaitable[Outcome]]


async def answers_to(requests: Sequence[Request]) -> list[Outcome | Exception]:
    """Send all requests at once; return what they are answered."""

    async def send(request: Request) -> Outcome | Exception:
        try:
            return await request()
        except (Problem, asyncpg.PostgresError) as error:
            return error

    return await asyncio.gather(*(send(request) for request in requests))


def word(answer: Outcome | Exception) -> str:
    """Return `accepted`, `replayed`, or the code of a problem."""
    if isinstance(answer, Problem):
        return answer.code
    if isinstance(answer, Exception):
        return type(answer).__name__
    if isinstance(answer, Refused):
        return answer.problem.code
    return "replayed" if getattr(answer, "replayed", False) else "accepted"


def content(answer: Outcome | Exception) -> bytes:
    """Return the bytes that an answer is sent as."""
    if isinstance(answer, Accepted):
        return to_json(accepted_body(answer))
    return word(answer).encode()


async def both_ways(deadlock_timeout: str, pairs: int) -> tuple[Counter[str], int]:
    """Transfer from A to B and from B to A at once; return the answers and the deadlocks."""
    async with own_postgres(deadlock_timeout=deadlock_timeout, max_connections="200") as server:
        database = server.environment()
        async with repositories(database, 5) as apps:
            users = [await apps[0].opened(5) for _ in range(2)]

            def pay(number: int) -> Request:
                payer, payee = users if number % 2 else users[::-1]
                movement = Movement(payer, -1, to_user_id=payee)
                return lambda: apps[number // 2 % len(apps)].balances.transfer(movement)

            async with snapshots(database) as seen:
                answers = await answers_to([pay(number) for number in range(2 * pairs)])
        counted = Counter(map(word, answers))
        await asyncio.sleep(1.1)  # the statistics of sessions are written after a second
        deadlocks = (await query(database, DEADLOCKS))[0]["deadlocks"]
    report_figures(f"{dict(counted)}, {deadlocks} deadlocks, {seen}")
    assert len(seen.totals) == 1
    assert seen.faults == 0
    return counted, deadlocks


async def test_transfers_there_and_back_do_not_deadlock() -> None:
    """A to B and B to A, thousands at once: each is made or refused, none waits in a circle."""
    answers, deadlocks = await both_ways("1s", PAIRS)
    assert deadlocks == 0
    assert set(answers) <= {"accepted", "insufficient-funds"}
    assert answers.total() == 2 * PAIRS
    assert answers["accepted"] >= 10


async def test_locks_in_the_order_of_payer_and_payee_deadlock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: then transfers wait for each other in a circle."""
    payer_first = replaced(repository.TRANSFER, "ORDER BY id FOR", "ORDER BY id <> $1 FOR")
    monkeypatch.setattr(repository, "TRANSFER", payer_first)
    answers, deadlocks = await both_ways("10ms", 100)
    assert deadlocks > 0
    assert answers["database-unavailable"] > 0


async def one_key(database: dict[str, str]) -> tuple[set[bytes], int]:
    """Send one transfer many times at once; return the different answers, and the transfers."""
    async with repositories(database, 2) as apps:
        payer, payee = [await apps[0].opened(5) for _ in range(2)]
        movement = Movement(payer, -1, "k", "invoice 7", to_user_id=payee)
        answers = await answers_to(
            [
                lambda app=app: app.balances.transfer(movement)  # type: ignore[misc]
                for app in apps
                for _ in range(TRIES // 2)
            ]
        )
    made = await query(database, "SELECT FROM entries WHERE key = 'k'")
    return set(map(content, answers)), len(made)


async def test_a_key_has_one_transfer_and_one_answer(database: dict[str, str]) -> None:
    """Also if it is sent 100 times at once, to two instances."""
    answers, made = await one_key(database)
    assert (len(answers), made) == (1, 1)
    assert b'"amount":1,' in answers.pop()


async def test_without_the_recorded_key_it_has_several(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the statement neither looks for the key nor records it."""
    unique = "AND NOT EXISTS (SELECT FROM idempotency_keys WHERE user_id = $1 AND key = $8)"
    deaf = replaced(repository.TRANSFER, unique, "")
    deaf = replaced(deaf, "FROM entry\n    WHERE key IS NOT NULL", "FROM entry WHERE false")
    monkeypatch.setattr(repository, "TRANSFER", deaf)
    answers, made = await one_key(database)
    assert len(answers) > 1
    assert made > 1


async def test_a_key_belongs_to_the_payer(database: dict[str, str]) -> None:
    """Three accounts use one key, for a change, a transfer and a hold: each has its own effect."""
    async with repositories(database) as (app,):
        users = [await app.opened(5) for _ in range(3)]
        for made in (
            await app.balances.change(Movement(users[0], -1, "k")),
            await app.balances.transfer(Movement(users[1], -1, "k", to_user_id=users[0])),
            await app.balances.hold(Movement(users[2], -1, "k", seconds=60)),
        ):
            assert word(made) == "accepted"
        with pytest.raises(Problem, match="used before"):
            await app.balances.hold(Movement(users[0], -1, "k", seconds=60))


async def reversed_at_once(
    database: dict[str, str], *, transfer: bool, spare: int
) -> tuple[Counter[str], int]:
    """Reverse one entry many times at once; return the answers, and the reversals that there are.

    With `spare` the balance would cover several reversals.
    """
    async with repositories(database, 2) as apps:
        payer, payee = await apps[0].opened(5), await apps[0].opened(spare)
        if transfer:
            await apps[0].balances.transfer(Movement(payer, -5, to_user_id=payee))
        else:
            await apps[0].balances.change(Movement(payee, 5))
        halves = [(payer, 2), (payee, 2)] if transfer else [(payee, 2)]

        def reverse(app: Repositories, half: tuple[int, int]) -> Request:
            return lambda: app.balances.reverse(*half, reference=None, note=None)

        requests = [
            reverse(apps[number % 2], halves[number // 2 % len(halves)]) for number in range(TRIES)
        ]
        shuffle(requests)
        answers = await answers_to(requests)
    bodies = {content(answer) for answer in answers}
    found = await query(database, "SELECT FROM entries WHERE reverses = 2 AND user_id = $1", payee)
    report_figures(f"{Counter(map(word, answers))}, {len(bodies)} different answers")
    assert len(bodies) == 1 or len(found) != 1, bodies
    return Counter(map(word, answers)), len(found)


@pytest.mark.parametrize("spare", [0, 500])
@pytest.mark.parametrize("transfer", [False, True], ids=["change", "transfer"])
async def test_an_entry_is_reversed_once(
    database: dict[str, str], *, transfer: bool, spare: int
) -> None:
    """Of 100 tries at once one makes the reversal, and all others are answered with it."""
    answers, found = await reversed_at_once(database, transfer=transfer, spare=spare)
    assert found == 1
    assert answers == {"accepted": 1, "replayed": TRIES - 1}


async def test_without_the_unique_index_an_entry_is_reversed_twice(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: who looks first and then writes, reverses twice."""
    look = repository._reversal

    async def look_then_wait(connection: Connection, entry: Entry) -> Accepted | None:
        found = await look(connection, entry)
        await asyncio.sleep(0.05)  # meanwhile others have looked, too
        return found

    async with repositories(database):
        pass
    await query(database, "DROP INDEX entries_reverses_key")
    monkeypatch.setattr(repository, "_reversal", look_then_wait)
    answers, found = await reversed_at_once(database, transfer=False, spare=500)
    assert found > 1
    assert answers["accepted"] > 1


async def test_an_unknown_user_is_named(database: dict[str, str]) -> None:
    """Whichever side it is, and whether or not the other side would refuse."""
    async with repositories(database) as (app,):
        user = await app.opened(5)
        for payer, payee in ((user, 404), (404, user)):
            for amount in (-1, -9):
                with pytest.raises(UserNotFound) as caught:
                    await app.balances.transfer(Movement(payer, amount, to_user_id=payee))
                assert caught.value.members["userId"] == 404


async def one_is_locked(
    database: dict[str, str], *, payer_locked: bool
) -> tuple[Counter[str], ...]:
    """Lock one side of transfers; return the answers to them, and to changes of the other side."""
    async with repositories(database, 3) as apps:
        payer, payee = [await apps[0].opened(1_000_000) for _ in range(2)]
        locked, free = (payer, payee) if payer_locked else (payee, payer)
        transfers: Counter[str] = Counter()
        changes: Counter[str] = Counter()
        slowest = 0.0
        stopping = asyncio.Event()

        async def transfer(app: Repositories) -> None:
            while not stopping.is_set():
                (answer,) = await answers_to(
                    [lambda: app.balances.transfer(Movement(payer, -1, to_user_id=payee))]
                )
                detail = getattr(answer, "detail", "").replace(str(locked), "LOCKED")
                transfers[detail or word(answer)] += 1
                await asyncio.sleep(0.01)

        async def change(app: Repositories) -> None:
            nonlocal slowest
            while not stopping.is_set():
                began = monotonic()
                (answer,) = await answers_to([lambda: app.balances.change(Movement(free, 1))])
                changes[getattr(answer, "detail", word(answer))] += 1
                slowest = max(slowest, monotonic() - began)
                await asyncio.sleep(0.01)

        holder = await connect(database)
        async with holder.transaction():
            await holder.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", locked)
            clients = [
                asyncio.create_task(each(app)) for app in apps for each in (transfer, change)
            ]
            while transfers.total() < 600:  # noqa: ASYNC110 - of several tasks
                await asyncio.sleep(0.05)
            stopping.set()
        await asyncio.gather(*clients)
        await holder.close()
    report_figures(f"{payer_locked=}: {dict(transfers)}, {dict(changes)}, slowest {slowest:.1f} s")
    return transfers, changes


@pytest.mark.parametrize("payer_locked", [True, False], ids=["payer", "payee"])
async def test_a_locked_account_is_named_and_the_other_one_goes_on(
    database: dict[str, str], *, payer_locked: bool
) -> None:
    """Another session locks one side: its transfers are refused, the other side changes."""
    transfers, changes = await one_is_locked(database, payer_locked=payer_locked)
    assert set(transfers) - {"accepted"} == {
        "User LOCKED can't be changed now. It is locked by another session of the database."
    }
    assert transfers["accepted"] <= 3  # those that were under way when the lock was released
    assert set(changes) == {"accepted"}


async def test_without_looking_who_locks_it_the_other_account_is_refused(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a transfer that waits for the payee takes the payer for locked."""

    async def locked(_guard: Guard, *_: object, **__: object) -> str:
        return LOCKED

    monkeypatch.setattr(Guard, "_check_progress", locked)
    transfers, changes = await one_is_locked(database, payer_locked=False)
    assert not all("LOCKED" in answer for answer in transfers)
    assert set(changes) != {"accepted"}
