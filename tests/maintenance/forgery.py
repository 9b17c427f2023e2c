"""A ledger with entries of each kind and two seals, and how its owner would rewrite it."""

from typing import Final

from balance_app.balances.accounts import Opening
from balance_app.balances.chain import part_digest, seal_digest
from balance_app.balances.model import Accepted, Movement
from balance_app.maintenance.audits import LedgerMismatchError
from balance_app.maintenance.verification import Checked, Verification
from tests.maintenance.runner import Connection, JobRunner, chain_again, hashes_of
from tests.processes import connect, unguarded

# Rewrites user 3: | 1 opened 500 | 2 -10 | 3 -20 | 4 -30 | 5 -40, sealed at 3 and at 5.
FORGERIES: Final = {
    "an amount": (
        "UPDATE entries SET amount = amount + 7 WHERE user_id = 3 AND version = 3",
        "UPDATE entries SET balance = balance + 7 WHERE user_id = 3 AND version >= 3",
        "UPDATE users SET balance = balance + 7 WHERE id = 3",
        "UPDATE daily_balances SET balance = balance + 7 WHERE user_id = 3 AND version >= 3",
        "UPDATE idempotency_keys SET amount = amount + 7 WHERE user_id = 3 AND key = 'third'",
        "UPDATE idempotency_keys SET balance = balance + 7 WHERE user_id = 3",
    ),
    "a note": ("UPDATE entries SET note = 'gift' WHERE user_id = 3 AND version = 5",),
    "a reference": ("UPDATE entries SET reference = 'gift' WHERE user_id = 3 AND version = 5",),
    "who": ("UPDATE entries SET by = 'mallory' WHERE user_id = 3 AND version = 5",),
    "a time": ("UPDATE entries SET at = at + interval '1 us' WHERE user_id = 3 AND version = 5",),
    "a last entry that is gone": (
        "DELETE FROM entries WHERE user_id = 3 AND version = 5",
        """
        UPDATE users SET version = 4, balance = balance + 40,
                         hash = (SELECT hash FROM entries WHERE user_id = 3 AND version = 4)
        WHERE id = 3
        """,
        "UPDATE daily_balances SET version = 4, balance = balance + 40 WHERE user_id = 3",
    ),
    "a middle entry that is gone": (
        "DELETE FROM entries WHERE user_id = 3 AND version = 3",
        "DELETE FROM idempotency_keys WHERE user_id = 3",
        """
        UPDATE entries SET version = version - 1, balance = balance + 20
        WHERE user_id = 3 AND version > 3
        """,
        "UPDATE users SET version = 4, balance = balance + 20 WHERE id = 3",
        "UPDATE daily_balances SET version = 4, balance = balance + 20 WHERE user_id = 3",
    ),
    "a stray entry": (
        """
        INSERT INTO entries SELECT (entries).* FROM (
            SELECT jsonb_populate_record(entries, '{"version": 6, "amount": 9, "balance": 409}')
                   AS entries
            FROM entries WHERE user_id = 3 AND version = 5
        ) AS more
        """,
        "UPDATE users SET version = 6, balance = 409 WHERE id = 3",
    ),
    "swapped entries": (
        """
        UPDATE entries SET amount = CASE version WHEN 4 THEN -40 ELSE -30 END,
                           balance = balance - CASE version WHEN 4 THEN 10 ELSE 0 END
        WHERE user_id = 3 AND version IN (4, 5)
        """,
    ),
    "no hash at the end": (
        "UPDATE entries SET hash = NULL WHERE user_id = 3 AND version = 5",
        "UPDATE users SET hash = NULL WHERE id = 3",
    ),
    "no hash of the account": ("UPDATE users SET hash = NULL WHERE id = 3",),
    "no hash at all": (
        "UPDATE entries SET hash = NULL WHERE user_id = 3",
        "UPDATE users SET hash = NULL WHERE id = 3",
    ),
    "no user": (
        "DELETE FROM entries WHERE user_id = 3",
        "DELETE FROM idempotency_keys WHERE user_id = 3",
        "DELETE FROM daily_balances WHERE user_id = 3",
        "DELETE FROM users WHERE id = 3",
    ),
    "a seal that is gone": (
        "DELETE FROM seals WHERE number = 1",
        "DELETE FROM seal_parts WHERE seal = 1",
    ),
    "the last seal that is gone": (
        "DELETE FROM seals WHERE number = 2",
        "DELETE FROM seal_parts WHERE seal = 2",
    ),
    "no seals": ("DELETE FROM seals", "DELETE FROM seal_parts"),
    "the time of a seal": ("UPDATE seals SET at = at - interval '1 day' WHERE number = 2",),
    "what a seal covers": (
        "UPDATE seal_parts SET versions = array_replace(versions, 5, 4) WHERE seal = 2",
    ),
}


async def build(runner: JobRunner) -> bytes:
    """Make the ledger; return the digest of the last seal, which somebody noted elsewhere."""
    for balance in (300, 500, 700):
        await runner.accounts.open(Opening(balance), None, "ops")
    for amount, key in ((-10, None), (-20, "third")):
        await change(runner, 3, amount, key)
    await runner.run("note-daily-balances")
    for amount in (-30, -40):
        await change(runner, 3, amount)
    transfer = Movement(2, -5, note="a fifth", to_user_id=4, by="till-1")
    assert isinstance(await runner.balances.transfer(transfer), Accepted)
    await runner.run("note-daily-balances")
    return bytes(await runner.connection.fetchval("SELECT digest FROM seals WHERE number = 2"))


async def change(runner: JobRunner, user_id: int, amount: int, key: str | None = None) -> None:
    movement = Movement(user_id, amount, key, by="till-1")
    assert isinstance(await runner.balances.change(movement), Accepted)


async def forge(connection: Connection, *statements: str, chain: bool = False) -> None:
    """Rewrite rows as the database's owner can, past triggers and foreign keys."""
    async with unguarded(connection):
        for statement in statements:
            await connection.execute(statement)
        if chain:
            await connection.execute(
                "UPDATE entries SET hash = '' WHERE hash IS NULL AND (user_id, version) <> (1, 1)"
            )
            await connection.execute("UPDATE users SET hash = '' WHERE hash IS NULL")
            await chain_again(connection)


async def seal_again(connection: Connection) -> None:
    """Make the stored seals anew from what there is now, with what can be kept of them."""
    hashes = await hashes_of(connection)
    seals = await connection.fetch("SELECT * FROM seals ORDER BY number")
    parts = await connection.fetch("SELECT * FROM seal_parts ORDER BY seal, part")
    versions = dict(tuple(row) for row in await connection.fetch("SELECT id, version FROM users"))
    async with unguarded(connection):
        await connection.execute("TRUNCATE seals, seal_parts")
        digest = b""
        for number, seal in enumerate(seals, 1):
            total = 0
            for part in (each for each in parts if each["seal"] == seal["number"]):
                heads = [
                    (user, min(version, versions[user]))
                    for user, version in zip(part["user_ids"], part["versions"], strict=True)
                    if user in versions
                ]
                total += len(heads)
                digest = part_digest(digest, [(*head, hashes[head]) for head in heads])
                await connection.execute(
                    "INSERT INTO seal_parts VALUES ($1, $2, $3, $4, $5)",
                    *(number, part["part"]),
                    *([user for user, _ in heads], [version for _, version in heads], digest),
                )
            digest = seal_digest(digest, number, total, seal["at"])
            await connection.execute(
                "INSERT INTO seals VALUES ($1, $2, $3, $4)", number, seal["at"], total, digest
            )


async def add_parts(connection: Connection, first: int, last: int) -> None:
    """Add parts to the first seal, each with 1000 heads that are in no ledger."""
    await connection.execute(
        """
        INSERT INTO seal_parts (seal, part, user_ids, versions, digest)
        SELECT 1, part, ARRAY(SELECT part * 1000 + n FROM generate_series(1, 1000) AS n),
               array_fill(7, ARRAY[1000]), sha256('')
        FROM generate_series($1::int, $2::int) AS part
        """,
        first,
        last,
    )


async def audit(runner: JobRunner) -> str | None:
    """Return what the job finds."""
    try:
        await runner.run("audit-ledger")
    except LedgerMismatchError as error:
        return str(error)
    return None


async def verify(database: dict[str, str], noted: bytes | None = None) -> Checked:
    """Check all at once."""
    connection = await connect(database)
    try:
        return await Verification(connection, lambda *_: None).run(noted)
    finally:
        await connection.close()
