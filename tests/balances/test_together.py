"""Group commit: changes of one account that wait for each other are judged in order, in one go.

What is the same with and without it is tested by the other files here, in both modes. The tests of
this file are on databases with group commit alone, and gather changes behind a row lock.
"""

import asyncio
import json
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
import pytest

from balance_app.balances import repository, together
from balance_app.balances.accounts import Patch
from balance_app.balances.api.movements import outcome_response
from balance_app.balances.errors import VersionConflict
from balance_app.balances.model import Accepted, Movement, Outcome, Refused
from balance_app.balances.together import AT_ONCE
from balance_app.errors import Problem
from balance_app.http.body import MAX_INTEGER
from tests.balances.repositories import Repositories, repositories
from tests.balances.test_applied import locked
from tests.balances.test_guard import HOLD_THE_KEY
from tests.balances.test_interleavings import OVERDUE
from tests.jobs.support import Connection
from tests.maintenance.forgery import audit, forge, verify
from tests.maintenance.runner import JobRunner
from tests.mutants import replaced
from tests.processes import Instance, connect, empty_database
from tests.system.databases import WAITERS, session_waits
from tests.system.sizes import report_figures, size

SEQUENCES: Final = size(small=40, full=1_000)
CROWD: Final = size(small=1_000, full=10_000)
SINGLE: Final = {"BALANCE_GROUP_COMMIT": "false"}
TOGETHER: Final = {"BALANCE_GROUP_COMMIT": "true"}
# How many entries each transaction has made, the first one first.
STATEMENTS: Final = """
SELECT count(*) AS entries FROM entries WHERE user_id = $1 AND version > 1
GROUP BY xmin::text ORDER BY min(version)
"""
LEDGER: Final = """
SELECT version, amount, balance, held, key, reference, note, by FROM entries
WHERE user_id = $1 ORDER BY version
"""


@pytest.fixture
async def database(postgres: dict[str, str], _migrated: str) -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of a migrated database, and the mode."""
    async with empty_database(postgres, _migrated) as variables:
        yield {**variables, **TOGETHER}


@pytest.fixture
async def admin(database: dict[str, str]) -> AsyncIterator[Connection]:
    """A connection of the owner."""
    connection = await connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def app(database: dict[str, str]) -> AsyncIterator[Repositories]:
    """One instance with group commit, in this process."""
    async with repositories(database) as (running,):
        yield running


def start(app: Repositories, movements: Sequence[Movement]) -> list[asyncio.Task[Outcome]]:
    """Start changes, which arrive in this order."""
    return [asyncio.create_task(app.balances.change(each)) for each in movements]


async def ends(tasks: Sequence[asyncio.Task[Outcome]]) -> list[Any]:
    """Return the outcome or the exception of each task."""
    async with asyncio.timeout(60):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def decided(app: Repositories, *movements: Movement) -> list[Any]:
    """Send changes that go in one statement; return the outcome or the exception of each."""
    return await ends(start(app, movements))


def kinds(outcomes: Sequence[object]) -> list[str]:
    """Return the names of the outcomes' classes."""
    return [type(each).__name__ for each in outcomes]


def row_of(user_id: int) -> str:
    """Return a statement that locks the row of a user."""
    return f"SELECT FROM users WHERE id = {user_id} FOR UPDATE"


async def statements(admin: Connection, user_id: int) -> list[int]:
    """Return how many entries of a user each transaction has made."""
    return [row["entries"] for row in await admin.fetch(STATEMENTS, user_id)]


async def ledger(admin: Connection, user_id: int) -> list[dict[str, Any]]:
    """Return the entries of a user after the opening one."""
    return [dict(row) for row in await admin.fetch(LEDGER, user_id)][1:]


async def mutate(admin: Connection, *guards: tuple[str, str]) -> None:
    """Replace guards in the function of group commit."""
    for guard, instead in guards:
        text = await admin.fetchval("SELECT pg_get_functiondef('change_together'::regproc)")
        await admin.execute(replaced(text, guard, instead))


# -- what goes together, and in which order -------------------------------------------------------


async def gathered(database: dict[str, str], mode: dict[str, str]) -> tuple[list[Any], int]:
    """Send a change that waits for the row, then 30 more; return the outcomes, and the user."""
    async with repositories({**database, **mode}) as (app,):
        user_id = await app.opened(1_000)
        async with locked(database, row_of(user_id)):
            first = start(app, [Movement(user_id, -1, note="0")])
            await session_waits(database)
            rest = start(app, [Movement(user_id, -n, note=f"{n}") for n in range(1, 31)])
            await asyncio.sleep(0.1)
        return await ends([*first, *rest]), user_id


async def test_what_waits_goes_in_one_statement(
    database: dict[str, str], admin: Connection
) -> None:
    """In the order of arrival, at one time."""
    outcomes, user_id = await gathered(database, TOGETHER)
    assert await statements(admin, user_id) == [1, 30]
    made = await ledger(admin, user_id)
    assert [each["note"] for each in made] == [f"{n}" for n in range(31)]
    assert [each.entry.version for each in outcomes] == [each["version"] for each in made]
    assert [each.entry.balance for each in outcomes] == [each["balance"] for each in made]
    assert len({each.entry.at for each in outcomes[1:]}) == 1
    assert outcomes[0].entry.at < outcomes[1].entry.at


async def test_without_the_mode_each_goes_alone(
    database: dict[str, str], admin: Connection
) -> None:
    """The control."""
    _, user_id = await gathered(database, SINGLE)
    assert await statements(admin, user_id) == [1] * 31


async def test_a_statement_has_a_limit(app: Repositories, admin: Connection) -> None:
    """Of 600 that arrive at once, 512 go together, and then the rest."""
    user_id = await app.opened(600)
    outcomes = await decided(app, *(Movement(user_id, -1) for _ in range(600)))
    assert [each.entry.version for each in outcomes] == list(range(2, 602))
    assert await statements(admin, user_id) == [AT_ONCE, 600 - AT_ONCE]


async def test_a_change_alone_waits_for_no_other(app: Repositories, admin: Connection) -> None:
    """An account at rest answers its first change by itself, and accounts do not wait together."""
    users = [await app.opened(10) for _ in range(3)]
    for user_id in users:
        for _ in range(2):
            assert kinds(await decided(app, Movement(user_id, -1))) == ["Accepted"]
        assert await statements(admin, user_id) == [1, 1]
    both = await decided(app, *(Movement(user_id, -1) for user_id in users * 2))
    assert kinds(both) == ["Accepted"] * 6
    assert [await statements(admin, user_id) for user_id in users] == [[1, 1, 2]] * 3


# -- each as if it were alone ---------------------------------------------------------------------

AMOUNTS: Final = (-71, -31, -30, -7, -1, 1, 5, 40, MAX_INTEGER - 90)
PRINCIPALS: Final = (None, None, "till-1", "till-2")
TEXTS: Final = (None, None, "rent", "é\u2028\U0001f600", "a,b", '"{}"', "NULL", "\\", "\t'", "")


def random_changes(source: random.Random, number: int, user_id: int) -> list[Movement]:
    """Return changes, some with the same keys, some on conditions that may be met."""
    found: list[Movement] = []
    for _ in range(number):
        if found and source.random() < 0.2:
            found.append(source.choice(found))
            continue
        versions = [source.randint(1, 4) for _ in range(source.randint(0, 3))]
        tags = [
            source.choice((f"{each}.{source.randint(1, 2)}.{source.randint(0, 2)}", "a,b", "1", ""))
            for each in versions
        ]
        found.append(
            Movement(
                user_id,
                source.choice(AMOUNTS),
                source.choice((None, None, "k1", "k2", "k3, k4", "NULL", "{}")),
                source.choice(TEXTS),
                source.choice(TEXTS),
                tags=tags if source.random() < 0.4 else None,
                by=source.choice(PRINCIPALS),
            )
        )
    return found


async def answer(outcome: Awaitable[Outcome]) -> tuple[int, Any, dict[str, str]]:
    """Return what a client gets: status, body, headers."""
    try:
        response = outcome_response(await outcome)
    except Problem as problem:
        problem.under(None)
        response = problem.response()
    headers = {**response.headers}
    del headers["content-length"]  # of numbers that differ
    return response.status_code, json.loads(bytes(response.body)), headers


def named(answers: object, user_id: int) -> object:
    """Return answers with a name in place of a user's id, without times."""
    match answers:
        case dict():
            return {key: named(each, user_id) for key, each in answers.items() if key != "at"}
        case list() | tuple():
            return [named(each, user_id) for each in answers]
        case int() if answers == user_id:
            return "user"
        case str():
            return answers.replace(str(user_id), "user")
        case _:
            return answers


# No answer to what was accepted depends on the floor.
LEFT: Final = (
    """
    SELECT balance, held, floor, frozen, version, settings_version, hold_events
    FROM users WHERE id = $1
    """,
    LEDGER,
    """
    SELECT key, outcome, amount, request, balance, held, frozen, version, refused_by, hold, by,
           CASE outcome WHEN 'refused' THEN floor END AS floor
    FROM idempotency_keys WHERE user_id = $1 ORDER BY key
    """,
)


async def left(admin: Connection, user_id: int) -> list[object]:
    """Return what changes have left of a user."""
    return [[dict(row) for row in await admin.fetch(sql, user_id)] for sql in LEFT]


async def prepare(app: Repositories, source: random.Random) -> int:
    """Create an account: some with a floor, some with a hold, some frozen, some with a key."""
    user_id = await app.opened(source.choice((0, 90)), source.choice((0, 0, -50)))
    if source.random() < 0.3:
        await app.balances.change(Movement(user_id, 30, "k1", by="till-1"))
    if source.random() < 0.4:
        hold = Movement(user_id, -20, source.choice((None, "k2")), seconds=3600)
        await app.balances.hold(hold)
    if source.random() < 0.15:
        await app.set(user_id, Patch(frozen=True))
    return user_id


async def differing(
    database: dict[str, str], admin: Connection, seeds: Sequence[int], *, first: bool = False
) -> tuple[list[str], Counter[str]]:
    """Return where changes together are not what they are one after another; and what they were.

    With `first` the first such sequence is enough.
    """
    found, seen = [], Counter[str]()
    # They differ from all amounts.
    await admin.execute("SELECT setval(pg_get_serial_sequence('users', 'id'), 1000000)")
    async with (
        repositories(database) as (app,),
        repositories({**database, **SINGLE}) as (plain,),
    ):
        for seed in seeds:
            results = []
            for at_once in (True, False):
                source = random.Random(seed)
                user_id = await prepare(plain, source)
                changes = random_changes(source, source.randint(2, 12), user_id)
                if at_once:
                    sent = (asyncio.create_task(answer(app.balances.change(c))) for c in changes)
                    answers = list(await asyncio.gather(*sent))
                    seen.update(each.get("code", "accepted") for _, each, _ in answers)
                    seen.update("replayed" for *_, each in answers if "idempotent-replayed" in each)
                else:
                    answers = [await answer(plain.balances.change(each)) for each in changes]
                results.append(
                    [named(answers, user_id), named(await left(admin, user_id), user_id)]
                )
            if results[0] != results[1]:
                found.append(f"{seed}: {changes}\n  {results[0]}\n  {results[1]}")
                if first:
                    break
    report_figures(f"{len(seeds)} sequences: {dict(seen)}")
    return found, seen


async def test_each_is_decided_as_one_after_another(
    database: dict[str, str], admin: Connection
) -> None:
    """Answers, headers, ledger, recorded keys; and all that verifies a ledger agrees."""
    seeds = random.sample(range(10**9), SEQUENCES)
    found, seen = await differing(database, admin, seeds)
    assert found == []
    assert {"accepted", "insufficient-funds", "version-conflict", "replayed"} < {*seen}
    checked = await verify(database)
    assert checked.faults == []
    assert checked.unhashed <= 1


@pytest.mark.parametrize(
    ("guard", "instead"),
    [
        ("asked.key = ANY (known)", "asked.key = 'none'"),
        ("NOT account.frozen AND", ""),
        ("account.balance + asked.amount <= largest", "true"),
        ("account.balance - account.held + asked.amount", "account.balance + asked.amount"),
        ("asked.tags IS NOT NULL AND NOT", "false AND NOT"),
        ("known := known || asked.key;", ""),
        ("of_key.outcome := verdict;", "of_key.outcome := 'accepted';"),
    ],
)
async def test_without_a_guard_another_decision_is_made(
    database: dict[str, str], admin: Connection, guard: str, instead: str
) -> None:
    """The control, for each condition; the tables' own constraints are removed as well."""
    await admin.execute("ALTER TABLE users DROP CONSTRAINT users_balance_check")
    await mutate(
        admin,
        (guard, instead),
        ("SELECT * FROM unnest(recorded)", "SELECT * FROM unnest(recorded) ON CONFLICT DO NOTHING"),
    )
    found, _ = await differing(database, admin, range(200), first=True)
    assert found


# -- keys -----------------------------------------------------------------------------------------


async def test_a_key_twice_in_a_statement_has_one_effect(
    app: Repositories, admin: Connection
) -> None:
    """The second is the replay, byte for byte; another request or principal is refused."""
    user_id = await app.opened(100)
    first = Movement(user_id, -1, "k", "rent", by="till-1")
    outcomes = await decided(
        app,
        first,
        first,
        first._replace(amount=-2),
        first._replace(reference="Rent"),
        first._replace(by="till-2"),
        Movement(user_id, -3),
        first._replace(tags=["0.0.0"]),
        Movement(user_id, -1_000, "no"),
        Movement(user_id, 2_000),
        Movement(user_id, -1_000, "no"),
    )
    reused = "IdempotencyKeyReused"
    assert kinds(outcomes) == [
        *("Accepted", "Accepted", reused, reused, reused, "Accepted", "Accepted"),
        *("Refused", "Accepted", "Refused"),
    ]
    assert [each.replayed for each in outcomes if not isinstance(each, Problem)] == [
        *(False, True, False, True, False, False, True)
    ]
    for one, again in ((0, 1), (0, 6), (7, 9)):
        bodies = [bytes(outcome_response(outcomes[each]).body) for each in (one, again)]
        assert bodies[0] == bodies[1]
    assert await statements(admin, user_id) == [3]
    assert [each["amount"] for each in await ledger(admin, user_id)] == [-1, -3, 2_000]
    assert (await app.balances.recorded(user_id, "no")).outcome.replayed


@pytest.mark.parametrize("locks", [True, False], ids=["behind its lock", "without a lock"])
async def test_a_key_that_is_recorded_meanwhile_counts(
    database: dict[str, str], app: Repositories, admin: Connection, *, locks: bool
) -> None:
    """By another instance, after the statement was sent: its change is not made twice.

    Without a lock of the row, as a refusal is recorded.
    """
    user_id = await app.opened(100)
    other = await connect(database)
    transaction = other.transaction()
    await transaction.start()
    if locks:
        assert await repository._change(other, Movement(user_id, -7, "k"))
    else:
        await other.execute(
            "INSERT INTO idempotency_keys (user_id, key, outcome, amount, balance, version)"
            " VALUES ($1, 'k', 'refused', -7, 1, 1)",
            user_id,
        )
    sent = start(app, [Movement(user_id, -1), Movement(user_id, -7, "k"), Movement(user_id, -2)])
    await session_waits(database)
    await transaction.commit()
    await other.close()
    before, keyed, after = await ends(sent)
    assert isinstance(before, Accepted)
    assert isinstance(after, Accepted)
    assert keyed.replayed
    assert isinstance(keyed, Accepted if locks else Refused)
    amounts = [each["amount"] for each in await ledger(admin, user_id)]
    assert amounts == ([-7, -1, -2] if locks else [-1, -2])


async def test_a_key_in_use_elsewhere_delays_its_own_request_alone(
    database: dict[str, str], admin: Connection
) -> None:
    """It is refused, as without group commit; those that were sent with it are made."""
    async with repositories(database, DB_LOCK_SECONDS=0.5) as (app,):
        user_id = await app.opened(100)
        # The first new user has the id 2.
        async with locked(database, HOLD_THE_KEY.replace("1, 1, 1, 1", "2, 1, 1, 1")):
            changes = Movement(user_id, -1), Movement(user_id, -7, "k"), Movement(user_id, -2)
            for _ in range(2):
                outcomes = await decided(app, *changes)
                assert kinds(outcomes) == ["Accepted", "DatabaseUnavailable", "Accepted"]
                text = "Another try of this Idempotency-Key is still under way."
                assert (outcomes[1].detail, outcomes[1].applied) == (text, "unknown")
    assert [each["amount"] for each in await ledger(admin, user_id)] == [-1, -2] * 2
    assert await statements(admin, user_id) == [1, 1, 2]  # known, it is not sent with others


# -- conditions, holds, limits --------------------------------------------------------------------


async def test_conditions_are_judged_in_order(app: Repositories) -> None:
    """The tag after a change of the same statement is met, one before it is not."""
    user_id = await app.opened(100)

    def changes(*given: list[str] | None) -> list[Movement]:
        return [Movement(user_id, -1, tags=tags) for tags in given]

    outcomes = await decided(
        app,
        *changes(["1.1.0"], ["2.1.0"], ["2.1.0"], None, ["2.1.0", "4.1.0"], ["3.1.0", "4.1.0"]),
        *changes([], ["5.1.0,6.1.0"], ["5.1.0,"], ["05.1.0"], ["5.1.0 "], ["5.1.0\n"], ["*"]),
        *changes(["a,b", "\x7f", "5.1.0"], ["5.1.0"]),
    )
    met = [isinstance(each, Accepted) for each in outcomes]
    assert met == [True, True, False, True, True, *(False,) * 8, True, False]
    stale = [each.members for each in outcomes if isinstance(each, VersionConflict)]
    assert [each["version"] for each in stale] == [3, *(5,) * 8, 6]
    assert [each["balance"] for each in stale] == [98, *(96,) * 8, 95]


async def test_limits_are_judged_in_order(app: Repositories) -> None:
    """A deposit makes a withdrawal fit only if it came before; a refusal shows its state."""
    user_id = await app.opened(10, floor=-5)
    await app.balances.hold(Movement(user_id, -10, seconds=60))
    largest = MAX_INTEGER
    amounts = (-6, 1, -6, -1, largest - 4, largest - 5, 1, -largest, 5 - largest)
    outcomes = await decided(
        app, *(Movement(user_id, each, f"{n}") for n, each in enumerate(amounts))
    )
    accepted = [isinstance(each, Accepted) for each in outcomes]
    assert accepted == [False, True, True, False, False, True, False, False, True]
    states = [
        (each.state.balance, each.state.version) for each in outcomes if isinstance(each, Refused)
    ]
    assert states == [(10, 1), (5, 3), (5, 3), (largest, 4), (largest, 4)]


async def test_a_frozen_account_refuses_all(app: Repositories) -> None:
    """Each with its state."""
    user_id = await app.opened(10)
    await app.set(user_id, Patch(frozen=True))
    outcomes = await decided(app, Movement(user_id, 1), Movement(user_id, -1, "k"))
    assert [(each.state.frozen, each.state.version) for each in outcomes] == [(True, 1)] * 2


async def test_an_overdue_hold_ends_before_all(app: Repositories, admin: Connection) -> None:
    """What it had reserved is there for each of them."""
    user_id = await app.opened(10)
    await app.balances.hold(Movement(user_id, -10, seconds=60))
    await admin.execute(OVERDUE, user_id)
    outcomes = await decided(app, *(Movement(user_id, -4, key) for key in (None, "k", "k", None)))
    assert kinds(outcomes) == ["Accepted", "Accepted", "Accepted", "Refused"]
    assert [each["held"] for each in await ledger(admin, user_id)] == [0, 0]
    assert await admin.fetchval("SELECT state FROM holds WHERE user_id = $1", user_id) == "expired"


async def test_an_unknown_user_is_unknown_to_each(app: Repositories) -> None:
    """And their keys stay unused."""
    outcomes = await decided(app, *(Movement(404, 1, key) for key in (None, "k", "k", None)))
    assert kinds(outcomes) == ["UserNotFound"] * 4


# -- failures -------------------------------------------------------------------------------------

END_WAITING: Final = """
SELECT {}(pid) FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@pytest.mark.parametrize(
    ("how", "applied"), [("pg_terminate_backend", "unknown"), ("pg_cancel_backend", "no")]
)
async def test_a_failed_statement_fails_each_of_its_changes(
    database: dict[str, str], app: Repositories, admin: Connection, how: str, applied: str
) -> None:
    """With what is known of it, and of its own key; those that wait for the next one are made."""
    user_id = await app.opened(100)
    key = "k" if applied == "unknown" else None
    changes = [Movement(user_id, -1), Movement(user_id, -2, key), Movement(user_id, -3)]
    async with locked(database, row_of(user_id)):
        sent = start(app, changes)
        await session_waits(database)
        waiting = start(app, [Movement(user_id, -4), Movement(user_id, -5)])
        await asyncio.sleep(0.05)
        await admin.execute(END_WAITING.format(how))
        failed = await ends(sent)
    assert kinds(failed) == ["DatabaseUnavailable"] * 3
    assert [each.applied for each in failed] == [applied] * 3
    assert len({id(each) for each in failed}) == 3
    assert kinds(await ends(waiting)) == ["Accepted"] * 2
    assert [each["amount"] for each in await ledger(admin, user_id)] == [-4, -5]
    # An unknown one is resolved by its key.
    (again,) = await decided(app, changes[1])
    assert not again.replayed


async def test_a_locked_row_refuses_each(database: dict[str, str], admin: Connection) -> None:
    """Those that were sent, and at once those that wait; afterwards all are served again."""
    async with repositories(database, DB_LOCK_SECONDS=0.3) as (app,):
        user_id = await app.opened(100)
        async with locked(database, row_of(user_id)):
            sent = start(app, [Movement(user_id, -1), Movement(user_id, -1, "k")])
            await session_waits(database)
            refused = await ends([*sent, *start(app, [Movement(user_id, -1)] * 3)])
        assert {each.detail for each in refused} == {
            f"User {user_id} can't be changed now. It is locked by another session of the database."
        }
        assert [each.applied for each in refused] == ["no", "unknown", "no", "no", "no"]
        assert await ledger(admin, user_id) == []
        await asyncio.sleep(1.1)
        assert kinds(await decided(app, *[Movement(user_id, -1)] * 3)) == ["Accepted"] * 3


@pytest.mark.parametrize("end", ["refuse_requests", "stop"])
async def test_what_waits_when_the_instance_stops_is_answered(
    database: dict[str, str], app: Repositories, admin: Connection, end: str
) -> None:
    """What was not sent has no effect; what was sent goes on, or is unknown."""
    user_id = await app.opened(100)
    async with locked(database, row_of(user_id)):
        sent = start(app, [Movement(user_id, -1), Movement(user_id, -2)])
        await session_waits(database)
        waiting = start(app, [Movement(user_id, -3), Movement(user_id, -4, "k")])
        await asyncio.sleep(0.05)
        if end == "stop":
            await app.database.stop()
        else:
            app.database.refuse_requests()
        refused = await ends([*waiting, *start(app, [Movement(user_id, -5)])])
    assert kinds(refused) == ["DatabaseUnavailable"] * 3
    assert [each.applied for each in refused] == ["no", "unknown", "no"]
    outcomes = await ends(sent)
    if end == "stop":
        assert [each.applied for each in outcomes] == ["unknown", "unknown"]
    else:
        assert kinds(outcomes) == ["Accepted", "Accepted"]
        assert [each["amount"] for each in await ledger(admin, user_id)] == [-1, -2]


REFUSE_A_NOTE: Final = """
CREATE FUNCTION refuse_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.note = 'bad' THEN
        RAISE division_by_zero;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse_note BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION refuse_note()
"""


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"note": "bad"}, asyncpg.DivisionByZeroError),
        ({"note": "\0"}, asyncpg.CharacterNotInRepertoireError),
        ({"note": "\ud800"}, UnicodeEncodeError),
        ({"by": "\ud800"}, UnicodeEncodeError),
        ({"key": "\ud800"}, UnicodeEncodeError),
        ({"amount": 2**63}, struct.error),
        ({"amount": 2**63 - 1}, asyncpg.NumericValueOutOfRangeError),
    ],
    ids=str,
)
async def test_one_bad_change_fails_no_other(
    app: Repositories, admin: Connection, bad: dict[str, Any], error: type[Exception]
) -> None:
    """What PostgreSQL refuses for one of them, or can't be sent; HTTP lets none of it in."""
    await admin.execute(REFUSE_A_NOTE)
    user_id = await app.opened(100)
    changes = [Movement(user_id, -1), Movement(user_id, -2)._replace(**bad), Movement(user_id, -3)]
    before, failed, after = await decided(app, *changes)
    assert (type(before), type(after)) == (Accepted, Accepted)
    assert [each["amount"] for each in await ledger(admin, user_id)] == [-1, -3]
    assert isinstance(failed, error)


async def test_what_may_be_committed_is_not_sent_again(
    app: Repositories, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service fails after the statement: nothing is made twice, and each gets an error."""
    user_id = await app.opened(100)

    def fails(*_: object, **__: object) -> None:
        raise LookupError

    monkeypatch.setattr(together, "Accepted", fails)
    outcomes = await decided(app, *(Movement(user_id, -n) for n in (1, 2, 3)))
    assert kinds(outcomes) == ["LookupError"] * 3
    assert [each["amount"] for each in await ledger(admin, user_id)] == [-1, -2, -3]


async def test_too_many_are_refused_at_once(database: dict[str, str]) -> None:
    """As many wait as may; each other one is an overload without effect."""
    async with repositories(database, MAX_WAITING=5) as (app,):
        user_id = await app.opened(100)
        async with locked(database, row_of(user_id)):
            sent = start(app, [Movement(user_id, -1)] * 3)
            await session_waits(database)
            more = start(app, [Movement(user_id, -1)] * 7)
            done, _ = await asyncio.wait(more, timeout=0.3)
            assert {type(each.exception()).__name__ for each in done} == {"Overloaded"}
            assert 4 <= len(done) <= 5
        outcomes = Counter(kinds(await ends([*sent, *more])))
    assert outcomes == {"Accepted": 10 - len(done), "Overloaded": len(done)}


# -- who goes away --------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [[0], [1], [0, 2], [0, 1, 2]])
async def test_who_goes_away_disturbs_no_other(
    database: dict[str, str], app: Repositories, admin: Connection, gone: list[int]
) -> None:
    """The one that began the statement, another one, or all; what was not sent is not made."""
    user_id = await app.opened(100)
    async with locked(database, row_of(user_id)):
        sent = start(app, [Movement(user_id, -1), Movement(user_id, -2)])
        await session_waits(database)
        sent[0].cancel()  # the first of what is under way
        waiting = start(app, [Movement(user_id, -n) for n in (10, 11, 12)])
        await asyncio.sleep(0.05)
        for each in gone:
            waiting[each].cancel()
        await asyncio.sleep(0.05)
    _, second = await ends(sent)
    assert isinstance(second, Accepted)
    rest = [each for n, each in enumerate(waiting) if n not in gone]
    assert kinds(await ends(rest)) == ["Accepted"] * len(rest)
    assert kinds(await decided(app, Movement(user_id, -3))) == ["Accepted"]
    amounts = [each["amount"] for each in await ledger(admin, user_id)]
    assert amounts == [-1, -2, *(-10 - n for n in range(3) if n not in gone), -3]


async def test_closed_connections_disturb_no_other(
    database: dict[str, str], admin: Connection
) -> None:
    """Clients close their sockets while their changes wait: all others are answered."""
    async with Instance(database, JOBS_ENABLED="false") as instance:
        async with locked(database):
            clients = []
            for number in range(12):
                clients.append(await send_change(instance.port, -1 - number))
                if number == 0:
                    await session_waits(database)
            await asyncio.sleep(0.2)
            for _, writer in clients[::3]:  # the first one was sent alone
                writer.transport.abort()
            await asyncio.sleep(0.2)
        for number, (reader, writer) in enumerate(clients):
            if number % 3:
                async with asyncio.timeout(20):
                    assert (await reader.readline()).startswith(b"HTTP/1.1 200"), number
                writer.close()
        async with asyncio.timeout(20):
            while await admin.fetchval(WAITERS):  # noqa: ASYNC110 - a fact in the database
                await asyncio.sleep(0.02)
    amounts = [each["amount"] for each in await ledger(admin, 1)]
    assert amounts == sorted(amounts, reverse=True)  # in the order of arrival
    assert {-1 - n for n in range(12) if n % 3} <= {*amounts}
    assert (await verify(database)).faults == []


async def send_change(port: int, amount: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a change of user 1 on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"userId": 1, "amount": amount}).encode()
    writer.write(
        b"POST /api/balance HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    await writer.drain()
    return reader, writer


# -- crowds ---------------------------------------------------------------------------------------


@asynccontextmanager
async def fleet(database: dict[str, str], modes: str) -> AsyncIterator[list[Repositories]]:
    """Run an instance for each letter: t for one with group commit, s for one without."""
    counted = Counter(modes)
    async with (
        repositories(database, counted["t"]) as grouping,
        repositories({**database, **SINGLE}, counted["s"]) as others,
    ):
        yield [*grouping, *others]


async def withdraw(apps: Sequence[Repositories], user_id: int, number: int) -> list[Any]:
    """Withdraw 2 so many times at once, on instances in turn."""
    each = (apps[n % len(apps)].balances.change(Movement(user_id, -2)) for n in range(number))
    return await asyncio.gather(*each, return_exceptions=True)


@pytest.mark.parametrize("modes", ["t", "ttttt", "ttsss"])
async def test_exactly_half_of_a_crowd_succeeds(
    database: dict[str, str], admin: Connection, modes: str
) -> None:
    """On one instance, on five, and on five of which some have no group commit."""
    async with fleet(database, modes) as apps:
        user_id = await apps[0].opened(CROWD)
        outcomes = await withdraw(apps, user_id, CROWD)
    assert Counter(kinds(outcomes)) == {"Accepted": CROWD // 2, "Refused": CROWD // 2}
    assert {each.state.balance for each in outcomes if isinstance(each, Refused)} == {0}
    versions = {each.entry.version for each in outcomes if not isinstance(each, Refused)}
    assert versions == set(range(2, CROWD // 2 + 2))
    sizes = await statements(admin, user_id)
    report_figures(f"{CROWD} changes on {modes}: {len(sizes)} statements with entries")
    assert len(sizes) < CROWD // 2
    assert (await verify(database)).faults == []


async def test_without_the_condition_more_than_half_succeed(
    database: dict[str, str], admin: Connection
) -> None:
    """The control; the table's own constraint is removed as well."""
    await admin.execute("ALTER TABLE users DROP CONSTRAINT users_balance_check")
    await mutate(
        admin,
        ("account.balance - account.held + asked.amount >= account.floor", "true"),
    )
    async with fleet(database, "tt") as apps:
        user_id = await apps[0].opened(200)
        outcomes = await withdraw(apps, user_id, 200)
    assert kinds(outcomes) == ["Accepted"] * 200


def random_movements(users: list[int], number: int) -> list[Movement]:
    """Return changes with and without keys, transfers, and holds."""
    found = []
    for turn in range(number):
        user_id, other_id = random.sample(users, 2)
        amount = random.randint(1, 9)
        kinds_of = (
            Movement(user_id, -amount, f"{turn // 2}"),
            Movement(user_id, -amount),
            Movement(user_id, amount),
            Movement(user_id, -amount, to_user_id=other_id),
            Movement(user_id, -amount, seconds=3600),
        )
        found.append(random.choice(kinds_of))
    return found


async def test_a_crowd_of_all_kinds_leaves_what_it_was_answered(
    database: dict[str, str], admin: Connection
) -> None:
    """Changes, transfers and holds of two accounts at once, on instances of both modes."""
    async with fleet(database, "tts") as apps:
        users = [await apps[0].opened(300) for _ in range(2)]
        movements = random_movements(users, 600)
        outcomes = await asyncio.gather(
            *(make(apps[n % 3].balances, each) for n, each in enumerate(movements)),
            return_exceptions=True,
        )
    seen = Counter(kinds(outcomes))
    report_figures(f"{dict(seen)}")
    assert seen.keys() <= {"Accepted", "Refused", "IdempotencyKeyReused"}
    change, held = dict.fromkeys(users, 0), dict.fromkeys(users, 0)
    for outcome in outcomes:
        if isinstance(outcome, Accepted) and not outcome.replayed:
            for entry in (outcome.entry, outcome.other):
                if entry is not None:
                    change[entry.user_id] += entry.amount
            if outcome.hold is not None:
                held[outcome.hold.user_id] += outcome.hold.amount
    for user_id in users:
        row = await admin.fetchrow("SELECT balance, held FROM users WHERE id = $1", user_id)
        assert row is not None
        assert (row["balance"], row["held"]) == (300 + change[user_id], held[user_id])
    assert (await verify(database)).faults == []


async def make(balances: repository.BalanceRepository, movement: Movement) -> Outcome:
    """Send a movement of any kind."""
    if movement.seconds is not None:
        return await balances.hold(movement)
    if movement.to_user_id is not None:
        return await balances.transfer(movement)
    return await balances.change(movement)


# -- what verifies a ledger -----------------------------------------------------------------------


async def test_a_forgery_inside_a_statement_is_found(
    database: dict[str, str], app: Repositories, admin: Connection
) -> None:
    """By the job and by the whole check; the control: neither finds anything before it."""
    user_id = await app.opened(100)
    changes = [Movement(user_id, -1, f"{n}", "rent", "May", by="till-1") for n in range(20)]
    await decided(app, *changes)
    assert await statements(admin, user_id) == [20]
    runner = JobRunner(app.database, admin)
    await runner.declare()
    assert await audit(runner) is None
    assert (await verify(database)).faults == []
    await forge(admin, "UPDATE entries SET note = 'gift' WHERE user_id = 2 AND version = 9")
    assert f"user {user_id}: entry 9 does not match its hash" in (await audit(runner) or "")
    assert f"user {user_id}: entry 9 does not match its hash" in (await verify(database)).faults
