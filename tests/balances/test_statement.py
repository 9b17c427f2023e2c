"""Pages of a ledger, and past balances: each is what a replay of the entries gives."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, cast

import httpx
import pytest

from balance_app.balances import ledger as ledger_module
from balance_app.balances.errors import EntryNotFound
from balance_app.balances.ledger import BISECT, BY_REFERENCE, LedgerRepository, Selection
from balance_app.balances.model import Entry
from balance_app.db.pool import Database
from tests.balances.ledgers import (
    BEGIN,
    REFERENCES,
    TICK,
    add_ledger,
    fill,
    moments,
    replay,
    select,
)
from tests.explaining import OneConnection, both_plans, bounded, explaining
from tests.jobs.support import JobsDatabase, on
from tests.mutants import replaced
from tests.processes import connect
from tests.system.sizes import FULL, report_figures, size

ENTRIES: Final = size(small=100_000, full=1_000_000)
MOMENTS: Final = 1000


@pytest.fixture(scope="module")
async def rows(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    """A migrated database for the whole file."""
    async with on(postgres) as database:
        yield database


# -- past balances ------------------------------------------------------------------------------


async def wrong_moments(
    database: Database, ledger: list[Entry], times: list[datetime]
) -> list[datetime]:
    """Return the times at which the past, or a selection that begins or ends then, is wrong."""
    repository = LedgerRepository(database)
    user_id = ledger[0].user_id

    async def is_wrong(at: datetime) -> bool:
        try:
            past: Entry | None = await repository.past(user_id, at=at)
        except EntryNotFound:
            past = None
        until, since = Selection(end=at), Selection(begin=at)
        before = await repository.entries(user_id, until, after=None, limit=2, descending=True)
        return (
            past != replay(ledger, at)
            or before != select(ledger, until, descending=True)[:2]
            or await repository.entries(user_id, since, after=None, limit=2)
            != select(ledger, since)[:2]
        )

    wrong = await asyncio.gather(*map(is_wrong, times))
    return list(itertools.compress(times, wrong))


@pytest.mark.parametrize("entries", [1, 2, 7, 500])
async def test_a_past_balance_equals_a_replay(rows: JobsDatabase, entries: int) -> None:
    """At random times, at an entry's very time, at one that several have, before and after all."""
    ledger = await add_ledger(rows.admin, seed=entries, entries=entries)
    times = moments(ledger, seed=entries, number=MOMENTS)
    assert await wrong_moments(rows.database, ledger, times) == []


@pytest.mark.parametrize(
    ("guard", "instead"),
    [
        ("(at = $2 AND $3)", "(at = $2 AND $3 AND false)"),
        ("at < $2", "at <= $2"),
        ("coalesce((SELECT version FROM users WHERE id = $1), 0)", "1000::bigint"),
        ("high ELSE middle - 1", "high ELSE greatest(middle - 2, low)"),
    ],
)
async def test_a_wrong_bisection_is_found(
    rows: JobsDatabase, monkeypatch: pytest.MonkeyPatch, guard: str, instead: str
) -> None:
    """The control: with any one comparison or bound changed, some of these times are wrong."""
    ledger = await add_ledger(rows.admin, seed=3, entries=500)
    monkeypatch.setattr(ledger_module, "BISECT", replaced(BISECT, guard, instead))
    with pytest.raises((AssertionError, IndexError)):
        assert await wrong_moments(rows.database, ledger, moments(ledger, 3, MOMENTS)) == []


async def test_the_past_is_told_as_it_was_answered(client: httpx.AsyncClient) -> None:
    """At the time of each change it is that change's answer, however many were under way."""
    answers = await asyncio.gather(
        *(client.post("/api/balance", json={"userId": 1, "amount": 1}) for _ in range(100))
    )
    changes = sorted((answer.json() for answer in answers), key=lambda each: each["version"])
    for change, after in itertools.pairwise(changes):
        at = change["change"]["at"]
        if at == after["change"]["at"]:
            continue
        for moment in ({"at": at}, {"version": change["version"]}):
            past = (await client.get("/api/users/1", params=moment)).json()
            assert past == {
                **{name: change[name] for name in ("userId", "version", "balance", "held")},
                "at": at,
            }
    now = (await client.get("/api/users/1")).json()
    future = (await client.get("/api/users/1", params={"at": "9999-12-31T23:59:59.999999Z"})).json()
    assert {**now, **future} == {**now, "at": changes[-1]["change"]["at"]}
    zoned = {"at": "2999-01-01T00:00:00+14:00"}
    assert (await client.get("/api/users/1", params=zoned)).json() == future


async def test_before_the_first_entry_there_is_no_balance(client: httpx.AsyncClient) -> None:
    """Nor at a version that is not there yet; an unknown user is told apart."""
    opened = (await client.get("/api/users/1/entries")).json()["entries"][0]["at"]
    before = (datetime.fromisoformat(opened) - TICK).isoformat()
    for user, moment, code in (
        (1, {"at": before}, "entry-not-found"),
        (1, {"at": "0001-01-01T00:00:00Z"}, "entry-not-found"),
        (1, {"version": 2}, "entry-not-found"),
        (1, {"version": 2**53 - 1}, "entry-not-found"),
        (99, {"at": opened}, "user-not-found"),
        (99, {"version": 1}, "user-not-found"),
    ):
        answer = await client.get(f"/api/users/{user}", params=cast("dict[str, Any]", moment))
        assert (answer.status_code, answer.json()["code"]) == (404, code), moment
    assert (await client.get("/api/users/1", params={"at": opened})).json()["balance"] == 10_000


# -- pages --------------------------------------------------------------------------------------


def selections(ledger: list[Entry]) -> Iterator[dict[str, str]]:
    middle = ledger[len(ledger) // 2].at
    times = (None, BEGIN - TICK, middle, middle + TICK, datetime(2999, 1, 1, tzinfo=UTC))
    for order, reference, begin, end in itertools.product(
        ("asc", "desc"), sorted({*REFERENCES, "none"} - {None}, key=str), times, times
    ):
        members = {"order": order, "reference": str(reference)}
        members |= {} if begin is None else {"from": begin.isoformat()}
        members |= {} if end is None else {"to": end.isoformat()}
        yield members
        if reference == "none":
            yield {name: value for name, value in members.items() if name != "reference"}


async def test_pages_join_to_the_whole_selection(
    client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """In both orders, with every filter: without gap or overlap, and the last says so."""
    admin = await connect(database)
    ledger = await add_ledger(admin, seed=1, entries=60)
    await admin.close()
    address = f"/api/users/{ledger[0].user_id}/entries"
    for query in selections(ledger):
        times = [query.get(name) for name in ("from", "to")]
        begin, end = (None if each is None else datetime.fromisoformat(each) for each in times)
        wanted = select(
            ledger,
            Selection(begin, end, query.get("reference")),
            descending=query["order"] == "desc",
        )
        seen: list[int] = []
        after: dict[str, int] = {}
        while True:
            page = (await client.get(address, params={**query, **after, "limit": 25})).json()
            seen += [entry["version"] for entry in page["entries"]]
            if page["next"] is None:
                break
            assert page["next"] == seen[-1]
            after = {"after": page["next"]}
        assert seen == [entry.version for entry in wanted], query


async def test_a_page_begins_after_any_version(
    client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """Also after one that is not there, in either order."""
    admin = await connect(database)
    ledger = await add_ledger(admin, seed=2, entries=5)
    await admin.close()
    for order, after, versions in (
        ("asc", 0, [1, 2, 3, 4, 5]),
        ("asc", 4, [5]),
        ("asc", 2**53 - 1, []),
        ("desc", 0, []),
        ("desc", 1, []),
        ("desc", 3, [2, 1]),
        ("desc", 2**53 - 1, [5, 4, 3, 2, 1]),
    ):
        query = cast("dict[str, Any]", {"order": order, "after": after})
        page = await client.get(f"/api/users/{ledger[0].user_id}/entries", params=query)
        assert [entry["version"] for entry in page.json()["entries"]] == versions


# -- a large ledger -----------------------------------------------------------------------------

Statistics = Literal["stale", "none", "fresh"]

INDEXES: Final = """
SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS sql, conname,
       pg_get_constraintdef(pg_constraint.oid) AS constraint
FROM pg_index LEFT JOIN pg_constraint ON conindid = indexrelid
WHERE indrelid = 'entries'::regclass
"""

# Many users with ten entries each, before one has very many.
BEFORE: Final = """
INSERT INTO entries (user_id, version, amount, balance, at, reference)
SELECT 1000 + n * 7919 % $1, n / $1 + 1, 1, n / $1 + 1, '2026-01-01Z',
       CASE WHEN n % 2 = 0 THEN 'often' END
FROM generate_series(0, $1 * 10 - 1::bigint) AS n
"""

NOTHING_KNOWN: Final = """
DELETE FROM pg_statistic WHERE starelid IN ('entries'::regclass, 'users'::regclass);
UPDATE pg_class SET reltuples = -1 WHERE oid IN ('entries'::regclass, 'users'::regclass)
"""


@pytest.fixture(scope="module")
async def large(postgres: dict[str, str]) -> AsyncIterator[tuple[JobsDatabase, int]]:
    """A user with very many entries, with the statistics of the entries that there were before."""
    async with on(postgres) as database:
        admin = database.admin
        await admin.execute("ALTER TABLE entries SET (autovacuum_enabled = false)")
        await admin.execute("SET session_replication_role = replica")  # no foreign keys
        await admin.execute(BEFORE, ENTRIES // 500)
        await admin.execute("ANALYZE entries, users")
        indexes = await admin.fetch(INDEXES)
        for index in indexes:
            await admin.execute(
                f"ALTER TABLE entries DROP CONSTRAINT {index['conname']}"
                if index["conname"]
                else f"DROP INDEX {index['name']}"
            )
        user_id = await fill(admin, ENTRIES)
        for index in indexes:
            await admin.execute(
                f"ALTER TABLE entries ADD CONSTRAINT {index['conname']} {index['constraint']}"
                if index["conname"]
                else index["sql"],
                timeout=120,
            )
        await admin.execute("RESET session_replication_role")
        yield database, user_id


@pytest.fixture(scope="module", params=["stale", "none", "fresh"])
async def statistics(large: tuple[JobsDatabase, int], request: pytest.FixtureRequest) -> Statistics:
    """The planner's statistics: of the entries before them, none, or current ones."""
    known: Statistics = request.param
    if known == "none":
        await large[0].admin.execute(NOTHING_KNOWN)
    elif known == "fresh":
        await large[0].admin.execute("ANALYZE entries, users")
    return known


def last_second() -> datetime:
    return BEGIN + timedelta(seconds=ENTRIES // 10)


@both_plans
async def test_a_page_reads_few_rows_of_a_large_ledger(
    large: tuple[JobsDatabase, int], statistics: Statistics, mode: str
) -> None:
    """The first, the last, one of a time or a reference; in both orders, whatever is known."""
    database, user_id = large
    middle = BEGIN + timedelta(seconds=ENTRIES // 20)
    times = ((None, None), (middle, None), (None, middle), (last_second(), None))
    async with explaining(database.admin, mode, "entries") as connection:
        repository = LedgerRepository(cast("Database", OneConnection(connection)))
        for (begin, end), reference, after, descending in itertools.product(
            times, (None, "often", "seldom", "none"), (None, ENTRIES // 2), (False, True)
        ):
            page = await repository.entries(
                user_id,
                Selection(begin, end, reference),
                after=after,
                limit=101,
                descending=descending,
            )
            assert reference is None or {each.reference for each in page} <= {reference}
    bounded(connection.touched, 250)
    if mode == "force_generic_plan":
        report_figures(f"{statistics}: at most {max(n for _, n, _ in connection.touched)} pages")


@both_plans
async def test_the_past_is_found_in_a_large_ledger(
    large: tuple[JobsDatabase, int],
    statistics: Statistics,  # noqa: ARG001 - it sets them
    mode: str,
) -> None:
    """A bisection reads some twenty entries, each by its key."""
    database, user_id = large
    async with explaining(database.admin, mode, "entries") as connection:
        repository = LedgerRepository(cast("Database", OneConnection(connection)))
        for second in (0, 1, ENTRIES // 20, ENTRIES // 10, ENTRIES):
            past = await repository.past(user_id, at=BEGIN + timedelta(seconds=second))
            assert past.version == min(10 * second + 9, ENTRIES)
    bounded(connection.touched, 120)


WITHOUT_RANGE: Final = """
SELECT * FROM entries
WHERE user_id = $1 AND version BETWEEN $2 AND $3 ORDER BY version DESC LIMIT $4
"""


@pytest.mark.skipif(FULL, reason="at this size these statistics mislead the planner less")
@pytest.mark.parametrize("statistics", ["stale"], indirect=True)
@pytest.mark.parametrize("guard", ["range", "order", "look-up"])
async def test_without_a_guard_many_rows_are_read(
    large: tuple[JobsDatabase, int],
    statistics: Statistics,  # noqa: ARG001 - the same
    guard: str,
) -> None:
    """The controls: a simpler statement, or one whose rows may be sorted, exceeds the bound."""
    database, user_id = large
    async with explaining(database.admin, "force_custom_plan", "entries") as connection:
        versions = ((1, ENTRIES), (1, ENTRIES // 2), (ENTRIES // 2, ENTRIES))
        for (first, last), limit in itertools.product(versions, (2, 101, 501)):
            if guard == "range":
                await connection.fetch(WITHOUT_RANGE, user_id, first, last, limit)
            elif guard == "order":
                await connection.fetch(BY_REFERENCE, user_id, first, last, limit, "often")
        if guard == "look-up":
            joined = replaced(BISECT, " LIMIT 1", "")
            await connection.fetch(joined, user_id, BEGIN + timedelta(seconds=5), True)  # noqa: FBT003 - as the service sends it
    with pytest.raises(AssertionError, match="pages by"):
        bounded(connection.touched, 600)
