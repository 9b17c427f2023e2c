"""The hash chain and the seals: what was rewritten is found, by which of them, and what is not."""

import asyncio
import random
import re
import tracemalloc
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import asyncpg
import pytest

from balance_app.balances import repository
from balance_app.balances.accounts import Opening
from balance_app.balances.chain import entry_hash, first_format_hash, is_hash
from balance_app.balances.model import Accepted, Movement, Refused
from balance_app.maintenance import batches, summaries, verification
from balance_app.maintenance.audits import LedgerMismatchError, chain
from tests.balances.repositories import Repositories, repositories
from tests.maintenance import forgery
from tests.maintenance.forgery import FORGERIES, audit, forge, seal_again, verify
from tests.maintenance.runner import CutError, JobRunner
from tests.mutants import replaced
from tests.processes import connect, unguarded

# What finds each forgery, alone; then after every hash was computed anew; then after the seals were
# made anew, too. With the digest of the last seal that was noted elsewhere all are found.
# audit-ledger, the whole check; then with new hashes: the whole check
CHANGED = "entry 5 does not match its hash"
RESEALED = "seal 2: entries that it covers were rewritten: of user 3 up to 5"
FOUND: dict[str, tuple[str | None, str | None, str | None]] = {
    "an amount": (
        "entry 3 does not match its hash",
        "entry 3 does not match its hash",
        "seal 1: entries that it covers were rewritten: of user 3 up to 3",
    ),
    "a note": (CHANGED, CHANGED, RESEALED),
    "a reference": (CHANGED, CHANGED, RESEALED),
    "who": (CHANGED, CHANGED, RESEALED),
    "a time": (CHANGED, CHANGED, RESEALED),
    "a last entry that is gone": (
        None,
        "user 3: entry 5 is missing, which seal 2 covers",
        "user 3: entry 5 is missing, which seal 2 covers",
    ),
    "a middle entry that is gone": (
        "entry 3 does not match its hash",
        "entry 3 does not match its hash",
        "seal 1: entries that it covers were rewritten: of user 3 up to 3",
    ),
    "a stray entry": (
        "entry 6 does not match its hash",
        "entry 6 does not match its hash",
        None,
    ),
    "swapped entries": ("entry 4 does not match its hash", "entry 4 does not match", RESEALED),
    "no hash at the end": (
        "entry 5 has no hash, but entry 4 has",
        "entry 5 has no hash, but entry 4 has",
        None,
    ),
    "no hash of the account": (
        "the account has no hash, but entry 5 has",
        "the account has no hash, but entry 5 has",
        None,
    ),
    "no hash at all": (
        "the account has no hash, but was created with one",
        "the account has no hash, but was created with one",
        None,
    ),
    "no user": (None, "user 3: entry 3 is missing, which seal 1 covers", "user 3: entry 3 is miss"),
    "a seal that is gone": (None, "seal 1 is missing", "seal 1 is missing"),
    "the last seal that is gone": (None, None, None),
    "no seals": (None, "there are no seals, but balances that were sealed", "there are no seals"),
    "the time of a seal": (None, "seal 2 does not match its digest", "seal 2 does not match"),
    "what a seal covers": (
        None,
        "seal 2: entries that it covers were rewritten: of user 3 up to 4",
        "seal 2: entries that it covers were rewritten: of user 3 up to 4",
    ),
}
# What is no forgery once it has its hashes, and what only a later seal can find.
HARMLESS = {"no hash at the end", "no hash of the account", "no hash at all"}
AFTER_THE_SEAL = {"a stray entry"}


async def test_nothing_is_found_in_a_ledger_as_it_was_made(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """The control; its seal is recognized. A digest that no seal has is a fault."""
    noted = await forgery.build(runner)
    assert await audit(runner) is None
    checked = await verify(database, noted)
    assert checked.faults == []
    assert (checked.entries, checked.users, checked.unhashed, checked.seals) == (10, 4, 0, 2)
    assert checked.noted_seal is not None
    assert (checked.noted_seal.number, checked.noted_seal.heads) == (2, 3)
    (fault,) = (await verify(database, bytes(32))).faults
    assert fault.startswith(f"no seal has the digest {'00' * 32}: ")


@pytest.mark.parametrize("what", FORGERIES)
async def test_a_forgery_is_found(runner: JobRunner, database: dict[str, str], what: str) -> None:
    """By the chain; after that was computed anew by the seals; then by the one noted elsewhere."""
    by_job, alone, with_chain = FOUND[what]
    noted = await forgery.build(runner)
    await forge(runner.connection, *FORGERIES[what])
    found = await audit(runner)
    if by_job is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(rf"^1 of 4 users differs: user 3: {by_job}$", found)
    assert_found((await verify(database)).faults, alone)
    assert (await verify(database, noted)).faults

    await forge(runner.connection, chain=True)
    assert await audit(runner) is None
    assert_found((await verify(database)).faults, with_chain)

    await seal_again(runner.connection)
    if what == "no seals":
        await runner.connection.execute("UPDATE daily_balances SET sealed = false")
    checked = await verify(database)
    assert checked.faults == []
    faults = (await verify(database, noted)).faults
    if what in HARMLESS | AFTER_THE_SEAL:
        assert faults == []
    else:
        (fault,) = faults
        assert fault.startswith(f"no seal has the digest {noted.hex()}: ")


@pytest.mark.parametrize("at", ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC"])
async def test_a_time_that_python_lacks_is_found(
    runner: JobRunner, database: dict[str, str], at: str
) -> None:
    """Of an entry and of a seal."""
    await forgery.build(runner)
    await forge(
        runner.connection,
        f"UPDATE entries SET at = '{at}' WHERE (user_id, version) = (3, 5)",  # noqa: S608
        f"UPDATE seals SET at = '{at}' WHERE number = 2",  # noqa: S608
    )
    assert "user 3: entry 5 " in (await audit(runner) or "")
    faults = (await verify(database)).faults
    assert faults[:2] == [
        "user 3: entry 5 does not match its hash",
        "seal 2 does not match its digest",
    ]


def assert_found(faults: list[str], expected: str | None) -> None:
    if expected is None:
        assert faults == []
    else:
        assert expected in faults[0]


def test_each_forgery_has_its_finding() -> None:
    """The tables are of the same kinds."""
    assert FOUND.keys() == FORGERIES.keys()


async def test_the_hash_is_that_of_the_database(runner: JobRunner) -> None:
    """For values of each kind, and for what a column can hold at most."""
    source = random.Random(0)
    texts = (None, "", "a", "é\u2028\U0001f600", "'; --", "x" * 300)
    numbers = (None, 0, 1, -1, 2**63 - 1, -(2**63))
    times = (
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime(1, 1, 2, tzinfo=UTC),
        datetime(2026, 11, 28, 17, 0, 0, 123457, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC) - timedelta(days=1),
    )
    sql = """
        SELECT chain_hash($1, entry_content($2, $4, $8, $9, $10, $11, $12, $13, $14, $15),
                          $3, $5, $6, $7),
               entry_hash($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
    """
    for _ in range(300):
        row = {
            **{
                name: source.choice(numbers[1:])
                for name in ("user_id", "version", "amount", "balance", "held")
            },
            "at": source.choice(times),
            "key": source.choice(texts),
            "by": source.choice(texts),
            **{
                name: source.choice(numbers)
                for name in ("other_user_id", "other_version", "reverses", "hold")
            },
            "reference": source.choice(texts),
            "note": source.choice(texts),
        }
        previous = source.choice((b"", source.randbytes(32)))
        computed = await runner.connection.fetchrow(sql, previous, *row.values())
        expected = (entry_hash(previous, row), first_format_hash(previous, row))
        assert tuple(computed or ()) == expected, (previous, row)


async def test_the_content_of_a_change_is_that_of_its_entry(runner: JobRunner) -> None:
    """What the service computes before the statement, for texts of each kind."""
    texts = (None, "", "a", "é\u2028\U0001f600", "e\u0301", "'; --\\x00", "x" * 255)
    for number, text in enumerate(texts):
        key = None if text is None else f"{number}{text}"
        await runner.balances.change(Movement(1, 5, key, text, text, by=text))
        reversed_one = await runner.balances.change(Movement(1, 7, None, text))
        assert isinstance(reversed_one, Accepted)
        assert reversed_one.entry is not None
        await runner.balances.reverse(1, reversed_one.entry.version, reference=text, note=text)
    entries = await runner.connection.fetch("SELECT * FROM entries ORDER BY version")
    assert len(entries) == 1 + 3 * len(texts)
    for before, entry in pairwise(entries):
        assert entry["hash"] == entry_hash(before["hash"] or await first(runner), entry)


async def first(runner: JobRunner) -> bytes:
    """Return the hash of the first entry, which is older than the chain."""
    row = await runner.connection.fetchrow("SELECT * FROM entries WHERE version = 1")
    assert row is not None
    return first_format_hash(b"", row)


async def test_the_hash_covers_each_column(runner: JobRunner) -> None:
    """A column that is added to entries must be added to the hash, too."""
    await runner.populate(2, 2)
    entry = dict((await runner.connection.fetch("SELECT * FROM entries WHERE version = 2"))[0])
    made = entry_hash(b"", entry), first_format_hash(b"", entry)
    for name in entry.keys() - {"hash"}:
        other = entry["at"] + timedelta(microseconds=1) if name == "at" else 7
        if name in {"key", "by", "reference", "note"}:
            other = "another"
        changed = {**entry, name: other}
        for covered in made:
            assert is_hash(covered, b"", entry)
            assert not is_hash(covered, b"", changed), name
            assert not is_hash(covered, b"another", entry)


async def test_entries_of_the_first_format_are_checked(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """A ledger begins with hashes as before migration 0020, and goes on: each forgery is found."""
    await runner.accounts.open(Opening(500), None, "ops")
    await forgery.change(runner, 2, -10)
    hashed = b""
    async with unguarded(runner.connection):
        for entry in await runner.connection.fetch(
            "SELECT * FROM entries WHERE user_id = 2 ORDER BY version"
        ):
            hashed = first_format_hash(hashed, entry)
            await runner.connection.execute(
                "UPDATE entries SET hash = $2 WHERE (user_id, version) = (2, $1)",
                entry["version"],
                hashed,
            )
        await runner.connection.execute("UPDATE users SET hash = $1 WHERE id = 2", hashed)
    await forgery.change(runner, 2, -20)
    await forgery.change(runner, 2, -30)
    await runner.run("note-daily-balances")
    assert await audit(runner) is None
    assert (await verify(database)).faults == []
    for version in (1, 2, 3, 4):
        note = f"UPDATE entries SET note = $1 WHERE (user_id, version) = (2, {version})"  # noqa: S608
        await forge(runner.connection, note.replace("$1", "'gift'"))
        found = f"user 2: entry {version} does not match its hash"
        assert await audit(runner) == f"1 of 2 users differs: {found}"
        assert found in (await verify(database)).faults
        await forge(runner.connection, note.replace("$1", "NULL"))
    assert (await verify(database)).faults == []


async def test_the_chain_is_whole_under_concurrent_changes(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """400 movements of each kind by ten connections at one account: dense, and each hash fits."""
    async with repositories(database, 5, DB_POOL_SIZE=2) as instances:
        other = await instances[0].opened(100_000)
        await asyncio.gather(
            *(_move(each, other, number) for number in range(80) for each in instances)
        )
    await runner.connection.fetch("SELECT 1")
    for user in (1, other):
        entries = await runner.connection.fetch(
            "SELECT * FROM entries WHERE user_id = $1 ORDER BY version", user
        )
        assert [entry["version"] for entry in entries] == list(range(1, len(entries) + 1))
        assert [entry["at"] for entry in entries] == sorted(entry["at"] for entry in entries)
        hashed = b""
        for entry in entries:
            if (user, entry["version"]) == (1, 1):  # older than the chain
                assert entry["hash"] is None
                hashed = first_format_hash(hashed, entry)
            else:
                hashed = entry_hash(hashed, entry)
                assert entry["hash"] == hashed
        account = await runner.connection.fetchrow("SELECT * FROM users WHERE id = $1", user)
        assert account is not None
        assert (account["hash"], account["version"]) == (hashed, len(entries))
        assert len(entries) > 100
        assert {entry["by"] for entry in entries} >= {"till"}
        for kind in ("other_user_id", "reverses", "hold", "key"):
            assert any(entry[kind] is not None for entry in entries), kind
    assert (await verify(database)).faults == []
    assert await audit(runner) is None


async def _move(instance: Repositories, other: int, number: int) -> None:
    one, two = ((1, other), (other, 1))[number // 4 % 2]
    match number % 4:
        case 0:
            key = f"key-{number}"
            made = await instance.balances.change(Movement(one, -3, key, "r", by="till"))
        case 1:
            made = await instance.balances.transfer(
                Movement(one, -2, note="n", to_user_id=two, by="till")
            )
            assert isinstance(made, Accepted)
            assert made.entry is not None
            if number % 8 == 1:
                version = made.entry.version
                made = await instance.balances.reverse(one, version, reference=None, note=None)
        case 2:
            made = await instance.balances.hold(Movement(one, -4, seconds=60))
            assert isinstance(made, Accepted)
            assert made.hold is not None
            made = await instance.holds.capture(
                one, made.hold.number, amount=2, reference=None, note=None, by="till"
            )
        case _:
            made = await instance.balances.change(Movement(one, 5, by="till"))
    assert not isinstance(made, Refused)


async def test_the_hash_before_is_not_that_of_a_snapshot(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: read from the entry before, it is that of an older one."""
    before = "(SELECT hash FROM entries WHERE user_id = $1 ORDER BY version DESC LIMIT 1)"
    statement = replaced(repository.CHANGE, "chain_hash(hash,", f"chain_hash({before},")
    monkeypatch.setattr(repository, "CHANGE", statement)
    async with repositories(database, 5, DB_POOL_SIZE=2) as instances:
        user = await instances[0].opened(1000)
        await asyncio.gather(
            *(each.balances.change(Movement(user, -1)) for _ in range(20) for each in instances)
        )
    assert await audit(runner) is not None
    fault = (await verify(database)).faults[0]
    assert re.fullmatch(rf"user {user}: entry \d+ does not match its hash", fault)


# -- accounts that are older than the chain -----------------------------------------------------


async def test_older_accounts_get_their_hash_in_steps(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also across cuts; the result says how many have none, and the chain goes on from it."""
    monkeypatch.setattr(batches, "BATCHES", 1)
    monkeypatch.setattr(chain, "FOLDED_AT_ONCE", 2)
    monkeypatch.setattr(chain, "FOLD_AT_ONCE", 3)
    await runner.populate(5, 7)
    checked = await verify(database)
    assert (checked.faults, checked.unhashed) == ([], 5)
    for left in (
        "; 3 older accounts have no hash yet",
        "; 1 older account has no hash yet",
        "",
    ):
        with pytest.raises(CutError):
            await runner.run("audit-ledger", cut_after=5)
        result = await runner.run("audit-ledger")
        assert result == f"checked 35 entries of 5 users: all balances match{left}"
    await forgery.change(runner, 3, -5)
    checked = await verify(database)
    assert (checked.faults, checked.unhashed) == ([], 0)
    hashes = "SELECT version FROM entries WHERE user_id = 3 AND hash IS NOT NULL"
    assert await runner.rows(hashes) == [(8,)]
    for size in (1, 1000):
        monkeypatch.setattr(batches, "BATCHES", size)
        assert await audit(runner) is None
    await forge(
        runner.connection, "UPDATE entries SET note = 'x' WHERE version = 3 AND user_id > 2"
    )
    for size in (1, 1000):
        monkeypatch.setattr(batches, "BATCHES", size)
        assert await audit(runner) == (
            "3 of 5 users differ: user 3: entry 8 does not match its hash; "
            "user 4: the hash of the account is not that of entry 7, the last; "
            "user 5: the hash of the account is not that of entry 7, the last"
        )
    assert len((await verify(database)).faults) == 4  # the fourth is of the job's check


async def test_an_older_account_is_sealed_once_it_has_a_hash(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """Although its balance was noted before; the noted day and time stay."""
    await runner.populate(3, 4)
    assert await runner.run("note-daily-balances") == "read 3 users: recorded 3 new balances"
    await runner.connection.execute(
        "UPDATE daily_balances SET day = day - 1, at = at - interval '1 day'"
    )
    noted = "SELECT user_id, day, version, at FROM daily_balances ORDER BY 1, 2"
    before = await runner.rows(noted)
    await runner.run("audit-ledger")
    result = await runner.run("note-daily-balances")
    assert re.fullmatch(r"read 3 users: recorded 0 new balances; seal 1 is [\da-f]{64}", result)
    assert await runner.rows(noted) == before
    assert await runner.run("note-daily-balances") == result.replace(" is ", " is still ")
    assert (await verify(database)).faults == []
    await forge(
        runner.connection,
        "UPDATE entries SET note = 'x' WHERE (user_id, version) = (3, 3)",
        "UPDATE users SET hash = NULL WHERE id = 3",
    )
    assert await audit(runner) is None  # which gives the account a hash of what it has now
    (fault,) = (await verify(database)).faults
    assert fault == "seal 1: entries that it covers were rewritten: of user 3 up to 4"


async def test_a_locked_account_hides_no_mismatch(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """While anything differs no account gets its first hash; then all do that are not locked."""
    await runner.populate(5, 4)
    unhashed = "SELECT id FROM users WHERE hash IS NULL ORDER BY id"
    forged = "UPDATE entries SET balance = balance + {} WHERE (user_id, version) = (5, 2)"
    await runner.rewrite(forged.format(1))
    other = await connect(database)
    async with other.transaction():
        await other.execute("SELECT FROM users WHERE id = 3 FOR NO KEY UPDATE")
        assert "user 5: entry 2 adds -1 to 1000 and leaves 1000" in (await audit(runner) or "")
        assert len(await runner.rows(unhashed)) == 5
        await runner.rewrite(forged.format(-1))
        assert await runner.run("audit-ledger") == (
            "checked 20 entries of 5 users: all balances match; 1 older account has no hash yet"
        )
        assert await runner.rows(unhashed) == [(3,)]
    await other.close()
    assert await audit(runner) is None
    assert await runner.rows(unhashed) == []


async def test_a_first_hash_misses_no_change_meanwhile(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """While an older account changes all the time, it gets the hash of all of its entries."""
    await runner.populate(1, 500)
    async with repositories(database, 3, DB_POOL_SIZE=2) as instances:
        stop = asyncio.Event()

        async def go_on(instance: Repositories) -> None:
            while not stop.is_set():
                await instance.balances.change(Movement(1, 1))

        tasks = [asyncio.create_task(go_on(each)) for each in instances for _ in range(2)]
        while not await runner.connection.fetchval("SELECT hash FROM users WHERE id = 1"):
            assert await audit(runner) is None
        await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*tasks)
    checked = await verify(database)
    assert (checked.faults, checked.unhashed) == ([], 0)
    assert checked.entries > 510
    assert await audit(runner) is None


async def test_without_the_lock_a_first_hash_is_never_given(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what is read without a lock is old when it is written."""
    lock = replaced(chain.LOCK, "FOR NO KEY UPDATE", "")
    monkeypatch.setattr(chain, "LOCK", lock)
    late = chain.GIVE.replace("AND version = $2 ", "AND $2 > 0 ")
    monkeypatch.setattr(chain, "GIVE", f"WITH slept AS MATERIALIZED (SELECT pg_sleep(0.05)) {late}")
    monkeypatch.setattr(
        chain, "GIVE", chain.GIVE.replace("AND $2", "AND (SELECT count(*) FROM slept) = 1 AND $2")
    )
    await runner.populate(1, 50)
    async with repositories(database, 1, DB_POOL_SIZE=2) as (instance,):
        stop = asyncio.Event()

        async def go_on() -> None:
            while not stop.is_set():
                await instance.balances.change(Movement(1, 1))

        task = asyncio.create_task(go_on())
        while not await runner.connection.fetchval("SELECT hash FROM users WHERE id = 1"):
            await runner.run("audit-ledger")
        stop.set()
        await task
    with pytest.raises(LedgerMismatchError):
        await runner.run("audit-ledger")


async def test_a_program_without_hashes_can_break_no_chain(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """It changes accounts that have no hash yet; of others its change is refused as a whole."""
    await runner.populate(2, 3)
    await runner.accounts.open(Opening(9), None)
    change = """
        WITH changed AS (
            UPDATE users SET balance = balance + 1, version = version + 1 WHERE id = $1
            RETURNING id, version, balance
        )
        INSERT INTO entries (user_id, version, amount, balance)
        SELECT id, version, 1, balance FROM changed
    """
    await runner.connection.execute(change, 2)
    with pytest.raises(asyncpg.UndefinedColumnError, match="user 3 has another hash than entry 2"):
        await runner.connection.execute(change, 3)
    assert (await verify(database)).faults == []
    assert await audit(runner) is None
    # the control
    await runner.connection.execute("DROP TRIGGER users_changed_with_entry ON users")
    await runner.connection.execute(change, 3)
    assert await audit(runner) == (
        "1 of 3 users differs: user 3: entry 2 has no hash, but entry 1 has"
    )


# -- runs that are cut off ------------------------------------------------------------------------


@pytest.mark.parametrize("resumes", [True, False])
async def test_a_run_that_is_cut_off_leaves_the_seals_whole(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, resumes: bool
) -> None:
    """Whether it goes on from its checkpoint or a new run begins: one seal over all parts."""
    monkeypatch.setattr(batches, "BATCHES", 6)
    for balance in range(11):
        await runner.accounts.open(Opening(balance), None)
    for after in (1, 2):
        with pytest.raises(CutError):
            await runner.run("note-daily-balances", cut_after=after)
    assert await runner.rows("SELECT count(*) FROM seals") == [(0,)]
    assert (await verify(database)).faults == []
    if not resumes:
        await runner.connection.execute("UPDATE jobs SET checkpoint = NULL")
        await forgery.change(runner, 1, 5)
    result = await runner.run("note-daily-balances")
    checked = await verify(database)
    assert checked.faults == []
    assert checked.last_seal is not None
    assert f"seal 1 is {checked.last_seal.digest}" in result
    assert checked.last_seal.heads == (12 if resumes else 13)
    parts = "SELECT count(*) FROM seal_parts WHERE seal = 1"
    assert await runner.rows(parts) == [(6 if resumes else 7,)]
    await forge(runner.connection, "DELETE FROM seal_parts WHERE part = 2")
    assert (await verify(database)).faults[0] == "seal 1: part 2 is missing"


async def test_a_seal_covers_each_head_once(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the job runs, there are no more heads than entries."""
    monkeypatch.setattr(batches, "BATCHES", 1)
    await runner.accounts.open(Opening(5), None)
    for number in range(6):
        if number % 2:
            await forgery.change(runner, 2, 1)
        await runner.run("note-daily-balances")
    heads = "SELECT user_ids, versions FROM seal_parts ORDER BY seal, part"
    assert await runner.rows(heads) == [([1, 2], [1, 1]), ([2], [2]), ([2], [3]), ([2], [4])]


@pytest.mark.parametrize("guard", ["greatest(latest.day, ", None])
async def test_a_seal_covers_each_head_once_although_the_clock_is_set_back(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch, guard: str | None
) -> None:
    """A balance keeps the later day and time; the control: with those of the clock, it does not."""
    if guard is not None:
        statement = replaced(summaries.RECORD_BALANCES, guard, "greatest(NULL::date, ")
        monkeypatch.setattr(summaries, "RECORD_BALANCES", statement)
    await forgery.change(runner, 1, -1)
    await runner.run("note-daily-balances")
    await runner.connection.execute(
        "UPDATE daily_balances SET day = day + 2, at = at + interval '2 days'"
    )
    before = await runner.rows("SELECT day, at FROM daily_balances")
    await forgery.change(runner, 1, -1)
    for _ in range(3):
        await runner.run("note-daily-balances")
    versions = await runner.rows("SELECT versions FROM seal_parts ORDER BY seal, part")
    if guard is not None:
        assert versions == [([2],), ([3],), ([3],), ([3],)]
        return
    assert versions == [([2],), ([3],)]
    assert await runner.rows("SELECT day, at FROM daily_balances WHERE version = 3") == before
    # once the clock has come to that day
    await runner.connection.execute(
        "UPDATE daily_balances SET day = day - 3, at = at - interval '3 days'"
    )
    await forgery.change(runner, 1, -1)
    await runner.run("note-daily-balances")
    assert await runner.rows("SELECT version FROM daily_balances ORDER BY day") == [(3,), (4,)]


# -- larger ledgers -------------------------------------------------------------------------------


async def test_ledgers_larger_than_a_page_are_checked(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a page: each fault is named, with its user and version."""
    await runner.populate(7, 9)
    await runner.run("audit-ledger")
    await runner.run("note-daily-balances")
    for user in (1, 4, 7):
        await forgery.change(runner, user, -1)
    sizes = (1, 2, 3, 5, 9, 10, 66, 5000)
    for size in sizes:
        monkeypatch.setattr(verification, "ROWS_AT_ONCE", size)
        checked = await verify(database)
        assert (checked.faults, checked.users, checked.entries) == ([], 7, 66)
    await forge(
        runner.connection,
        "UPDATE entries SET note = 'x' WHERE (user_id, version) IN ((4, 10), (5, 2))",
        "INSERT INTO entries (user_id, version, amount, balance) VALUES (9, 1, 1, 1)",
    )
    for size in sizes:
        monkeypatch.setattr(verification, "ROWS_AT_ONCE", size)
        faults = (await verify(database)).faults
        assert faults[:3] == [
            "user 4: entry 10 does not match its hash",
            "user 5: the hash of the account is not that of entry 9, the last",
            "user 9: there are entries, but no account",
        ]
        assert faults[3] == "seal 1: entries that it covers were rewritten: of user 5 up to 9"


async def test_the_parts_of_a_seal_are_read_a_few_at_a_time(
    runner: JobRunner, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many that are, a part that is missing is named."""
    monkeypatch.setattr(batches, "BATCHES", 7)
    for balance in range(6):
        await runner.accounts.open(Opening(balance), None)
    await runner.run("note-daily-balances")
    assert await runner.rows("SELECT count(*) FROM seal_parts WHERE seal = 1") == [(7,)]
    sizes = (1, 3, 7)
    for size in sizes:
        monkeypatch.setattr(verification, "PARTS_AT_ONCE", size)
        assert (await verify(database)).faults == []
    await forge(runner.connection, "DELETE FROM seal_parts WHERE part = 4")
    for size in sizes:
        monkeypatch.setattr(verification, "PARTS_AT_ONCE", size)
        assert (await verify(database)).faults == [
            "seal 1: part 4 is missing",
            "seal 1 does not match its digest",
        ]


async def test_memory_grows_neither_with_a_seal_nor_with_its_faults(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """Eight times as many heads, all of which are missing, take no more of it."""
    parts = verification.PARTS_AT_ONCE
    await forgery.add_parts(runner.connection, 1, parts)
    await verify(database)  # what is made once
    tracemalloc.start()
    try:
        await verify(database)
        _, few = tracemalloc.get_traced_memory()
        await forgery.add_parts(runner.connection, parts + 1, parts * 8)
        tracemalloc.reset_peak()
        checked = await verify(database)
        _, many = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(checked.faults) == verification.MOST_FAULTS
    assert checked.more_faults == parts * 8000 - verification.MOST_FAULTS
    assert many < few * 2.5
