"""The audit of the hash chain, a part of `audit-ledger`; and the first hash of older accounts.

See `balances/chain.py`. Here the database computes the hashes, as it is faster; `balance-app audit`
does not ask it to.
"""

from typing import Any, Final, NamedTuple

import asyncpg

from balance_app.db.pool import Connection
from balance_app.maintenance.batches import State

# How many accounts one run of the audit gives their first hash; each is a transaction.
FOLDED_AT_ONCE: Final = 10_000
# More than can be made while one batch is read.
ENTRIES_BESIDE: Final = 10_000
# The entries that are read to compute a first hash, in one statement.
FOLD_AT_ONCE: Final = 2000

# Each entry after entry $2 of user $1, up to entry $5 of user $4, must have the hash of its content
# and of the hash before, in either format; once one has a hash, each after it has. The hashes of
# the first ones that have none are computed in the first format, as the chain goes on from them
# ($3: that of entry $2). An account of the users from $1 on and before $4 must have the hash of its
# last entry. Only one that is older than the chain may have none yet.
CHAIN: Final = """
WITH RECURSIVE batch AS MATERIALIZED (
    SELECT * FROM entries
    WHERE (user_id, version) > ($1, $2) AND (user_id, version) <= ($4, $5)
    ORDER BY user_id, version LIMIT $6
), folded AS (
    SELECT user_id, version, entry_hash(
               CASE WHEN version = 1 THEN '' ELSE $3::bytea END, user_id, version, amount, balance,
               held, at, key, by, other_user_id, other_version, reverses, hold, reference, note
           ) AS hash
    FROM batch WHERE hash IS NULL AND (version = 1 OR (user_id, version) = ($1, $2 + 1))
    UNION ALL
    SELECT next.user_id, next.version, next.computed
    FROM folded CROSS JOIN LATERAL (
        SELECT user_id, version, entry_hash(
                   folded.hash, user_id, version, amount, balance, held, at, key, by, other_user_id,
                   other_version, reverses, hold, reference, note
               ) AS computed
        FROM entries
        WHERE user_id = folded.user_id AND version = folded.version + 1 AND hash IS NULL
          AND (user_id, version) <= ($4, $5)
        LIMIT 1
    ) AS next
), linked AS (
    SELECT *, lag(hash, 1, CASE WHEN user_id = $1 THEN (
               SELECT hash FROM entries WHERE user_id = $1 AND version = $2
           ) END) OVER (PARTITION BY user_id ORDER BY version) AS hash_before
    FROM batch
), heads AS (
    SELECT id, version, hash, created_at >= (SELECT chained_from FROM balance_app_version) AS is_new
    FROM (
        SELECT * FROM users WHERE id >= $1 AND id < $4 ORDER BY id LIMIT $6
    ) AS whole WHERE (SELECT count(*) FROM batch) < $6
), ends AS (
    SELECT heads.*, entry.hash AS last_hash, coalesce(
               folded.hash, CASE WHEN (id, heads.version) = ($1, $2) THEN $3 END
           ) AS folded
    FROM heads LEFT JOIN LATERAL (
        SELECT hash FROM entries WHERE user_id = id AND version = heads.version LIMIT 1
    ) AS entry ON true
    LEFT JOIN folded ON (folded.user_id, folded.version) = (id, heads.version)
), faults AS (
    SELECT l.user_id, l.version AS place, CASE
        WHEN l.hash IS NULL AND hash_before IS NOT NULL THEN
            format('entry %s has no hash, but entry %s has', l.version, l.version - 1)
        WHEN l.hash IS NOT NULL AND l.hash IS DISTINCT FROM chain_hash(
            previous, entry_content(
                l.user_id, amount, key, by, other_user_id, other_version, reverses, hold, reference,
                note
            ), l.version, balance, held, at
        ) AND l.hash IS DISTINCT FROM entry_hash(
            previous, l.user_id, l.version, amount, balance, held, at, key, by, other_user_id,
            other_version, reverses, hold, reference, note
        ) THEN format('entry %s does not match its hash', l.version)
        END AS fault
    FROM linked AS l LEFT JOIN folded
    ON (folded.user_id, folded.version) = (l.user_id, l.version - 1)
       AND l.hash IS NOT NULL AND hash_before IS NULL
    CROSS JOIN LATERAL (
        SELECT CASE WHEN l.version = 1 THEN ''
                    ELSE coalesce(hash_before, folded.hash, CASE WHEN l.user_id = $1 THEN $3 END)
               END AS previous
    ) AS before
    UNION ALL
    SELECT id, 9223372036854775807, CASE
        WHEN hash IS NULL AND last_hash IS NOT NULL THEN
            format('the account has no hash, but entry %s has', version)
        WHEN hash IS NULL AND is_new THEN 'the account has no hash, but was created with one'
        WHEN hash <> coalesce(last_hash, folded) THEN
            format('the hash of the account is not that of entry %s, the last', version)
        END
    FROM ends
), first AS (
    SELECT DISTINCT ON (user_id) user_id, fault FROM faults WHERE fault IS NOT NULL
    ORDER BY user_id, place
)
SELECT ARRAY(SELECT user_id FROM first ORDER BY user_id) AS wrong,
       ARRAY(SELECT fault FROM first ORDER BY user_id) AS faults,
       (SELECT count(*) FROM heads WHERE hash IS NULL) AS unhashed,
       (SELECT min(id) FROM heads WHERE hash IS NULL) AS first_unhashed,
       encode(coalesce(
           (SELECT hash FROM entries WHERE user_id = $4 AND version = $5),
           (SELECT hash FROM folded WHERE user_id = $4 AND version = $5)
       ), 'hex') AS hash
"""


class Links(NamedTuple):
    """What was found in a batch: the first fault of each user that differs."""

    faults: dict[int, str]
    # of the state of the run
    progress: State


async def check_links(
    connection: Connection, state: State, size: int, end: tuple[int | None, int]
) -> Links:
    """Check the chain from the position of the state to `end`, the last entry of the batch."""
    user, version = end
    if user is None:  # there are no users
        return Links({}, {"hash": None})
    row = await connection.fetchrow(
        CHAIN,
        state["user"],
        state["version"],
        None if state["hash"] is None else bytes.fromhex(state["hash"]),
        user,
        version,
        size + ENTRIES_BESIDE,
    )
    assert row is not None  # noqa: S101 - the statement always has one
    first = state["first_unhashed"]
    return Links(
        dict(zip(row["wrong"], row["faults"], strict=True)),
        {
            "hash": row["hash"],
            "unhashed": state["unhashed"] + row["unhashed"],
            "first_unhashed": row["first_unhashed"] if first is None else first,
        },
    )


# Of the next $2 users after $1, those up to the first one that has no hash yet.
UNHASHED: Final = """
WITH few AS MATERIALIZED (
    SELECT id, hash IS NULL AND created_at < (SELECT chained_from FROM balance_app_version)
               AS unhashed
    FROM users WHERE id > $1 ORDER BY id LIMIT $2
), first AS (
    SELECT min(id) AS id FROM few WHERE unhashed
)
SELECT max(few.id) AS user_id, first.id IS NOT NULL AS found
FROM few CROSS JOIN first WHERE first.id IS NULL OR few.id <= first.id
GROUP BY first.id
"""

# The hash of the entry of user $1 that is $4 after entry $2, which has the hash $3; or of the last
# one before.
FOLD: Final = """
WITH RECURSIVE folded AS (
    SELECT $2::bigint AS version, $3::bytea AS hash
    UNION ALL
    SELECT next.version, next.computed
    FROM folded CROSS JOIN LATERAL (
        SELECT version, entry_hash(
                   folded.hash, user_id, version, amount, balance, held, at, key, by, other_user_id,
                   other_version, reverses, hold, reference, note
               ) AS computed
        FROM entries
        WHERE user_id = $1 AND version = folded.version + 1 AND hash IS NULL
        LIMIT 1
    ) AS next
    WHERE folded.version < $2 + $4
)
SELECT version, hash FROM folded ORDER BY version DESC LIMIT 1
"""

# It waits: SKIP LOCKED would skip an account that changes all the time in run after run.
LOCK: Final = "SELECT version FROM users WHERE id = $1 AND hash IS NULL FOR NO KEY UPDATE"

# Only if no entry was made since the last one in the hash: it would have none.
GIVE: Final = "UPDATE users SET hash = $3 WHERE id = $1 AND version = $2 AND hash IS NULL"


async def give_first_hash(connection: Connection, state: State, size: int) -> State:
    """Compute a step of the first hash of the next account that has none; give it when complete.

    The account is locked once all of its entries but the newest are in the hash, so that the last
    ones can't get more while they are read: one account, and for three short statements.
    """
    user, version, hashed = state["user"], state["version"], bytes.fromhex(state["hash"] or "")
    if version == 0:
        found = await connection.fetchrow(UNHASHED, user, size)
        if found is None:
            return {"done": 0, "ended": True}
        user = found["user_id"]
        if not found["found"]:
            return {"done": 0, "user": user}
    version, hashed = await _fold(connection, user, version, hashed)
    if version - state["version"] == FOLD_AT_ONCE:
        return {"done": 0, "user": user, "version": version, "hash": hashed.hex()}
    await connection.execute("SAVEPOINT before_lock")
    try:
        current = await connection.fetchval(LOCK, user)
    except asyncpg.LockNotAvailableError:  # it is left to the next run
        await connection.execute("ROLLBACK TO before_lock")
        current = None
    given = 0
    if current is not None:
        version, hashed = await _fold(connection, user, version, hashed)
        status = await connection.execute(GIVE, user, version, hashed)
        given = int(status.removeprefix("UPDATE "))
    folded = state["folded"] + given
    tried = state["tried"] + 1
    next_one = {"done": 0, "user": user, "version": 0, "hash": None}
    return {**next_one, "folded": folded, "tried": tried, "ended": tried == FOLDED_AT_ONCE}


async def _fold(
    connection: Connection, user: int, version: int, hashed: bytes
) -> tuple[int, bytes]:
    row: Any = await connection.fetchrow(FOLD, user, version, hashed, FOLD_AT_ONCE)
    return row["version"], row["hash"]
