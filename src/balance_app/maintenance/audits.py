"""Jobs that check the consistency of the stored data, and fail with the differences."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from balance_app.db.pool import Connection
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.batches import FIRST_ID, Rows, State, count, in_batches, number

MOST_FAULTS: Final = 5  # that are reported in full


class LedgerMismatchError(Exception):
    """The ledger contradicts itself or data derived from it."""


def _differ(state: State, checked: str) -> LedgerMismatchError:
    named = "; ".join(state["named"])
    rest = state["wrong"] - MOST_FAULTS
    more = f"; and {number(rest)} more" if rest > 0 else ""
    differ = "differs" if state["wrong"] == 1 else "differ"
    return LedgerMismatchError(f"{number(state['wrong'])} of {checked} {differ}: {named}{more}")


def _add(state: State, faults: Iterable[str]) -> State:
    found = list(faults)
    return {
        "wrong": state["wrong"] + len(found),
        "named": [*state["named"], *found][:MOST_FAULTS],
    }


ENTRIES: Final = """
SELECT greatest(
    (SELECT count(*) FROM (SELECT FROM entries LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'entries'::regclass)
)::bigint
"""

# A change writes the user and the entry in one transaction, and this reads both in one snapshot, so
# it sees each concurrent change whole or not at all. It reads up to $4 entries after the entry of
# user $1 and version $2, which left the balance $3. Each must follow the previous one and be
# recorded under its key. A user whose entries end in the batch must have the last one's balance.
LEDGER: Final = """
WITH few AS MATERIALIZED (
    SELECT id, version, balance FROM users WHERE id >= $1 ORDER BY id LIMIT $4
), batch AS MATERIALIZED (
    SELECT user_id, version, amount, balance, key FROM entries
    WHERE (user_id, version) > ($1, $2) AND user_id <= (SELECT max(id) FROM few)
    ORDER BY user_id, version LIMIT $4
), reach AS MATERIALIZED (
    SELECT count(*) AS entries, count(*) = $4 AS cut,
           CASE WHEN count(*) = $4 THEN max(user_id) - 1 ELSE (SELECT max(id) FROM few) END AS whole
    FROM batch
), chained AS (
    SELECT *,
           lag(version, 1, CASE WHEN user_id = $1 THEN $2 ELSE 0 END) OVER own AS version_before,
           lag(balance, 1, CASE WHEN user_id = $1 THEN $3::bigint ELSE 0 END) OVER own
           AS balance_before
    FROM batch WINDOW own AS (PARTITION BY user_id ORDER BY version)
), last AS (
    SELECT DISTINCT ON (user_id) user_id, version, balance FROM batch
    ORDER BY user_id, version DESC
), stands AS (
    SELECT id, few.version, few.balance,
           coalesce(last.version, CASE WHEN id = $1 THEN $2 ELSE 0 END) AS last_version,
           coalesce(last.balance, CASE WHEN id = $1 THEN $3 ELSE 0 END) AS last_balance
    FROM few LEFT JOIN last ON user_id = id WHERE id <= (SELECT whole FROM reach)
), faults AS (
    SELECT user_id, version AS place, CASE
        WHEN version <> version_before + 1 THEN format('entry %s is missing', version_before + 1)
        WHEN balance <> balance_before::numeric + amount THEN
            format('entry %s adds %s to %s and leaves %s', version, amount, balance_before, balance)
        WHEN key IS NOT NULL AND (
            SELECT outcome <> 'refused' AND (known.user_id, known.version) = (c.user_id, c.version)
            FROM idempotency_keys AS known WHERE known.key = c.key
        ) IS NOT TRUE THEN format('the key of entry %s is not recorded', version)
        END AS fault
    FROM chained AS c
    UNION ALL
    SELECT id, 9223372036854775807, CASE
        WHEN last_version = 0 THEN 'there are no entries'
        ELSE format('the balance is %s at version %s, but entry %s, the last, left %s',
                    balance, version, last_version, last_balance)
        END
    FROM stands WHERE (version, balance) <> (last_version, last_balance)
), first AS (
    SELECT DISTINCT ON (user_id) user_id, fault FROM faults WHERE fault IS NOT NULL
    ORDER BY user_id, place
)
SELECT entries, (SELECT count(*) FROM stands) AS users, NOT cut AND span.count < $4 AS ended,
       CASE WHEN cut THEN tail.user_id ELSE span.max + 1 END AS user_id,
       CASE WHEN cut THEN tail.version ELSE 0 END AS version,
       CASE WHEN cut THEN tail.balance ELSE 0 END AS balance,
       ARRAY(SELECT user_id FROM first ORDER BY user_id) AS wrong,
       ARRAY(SELECT fault FROM first ORDER BY user_id) AS faults
FROM reach CROSS JOIN (SELECT count(*), max(id) FROM few) AS span
LEFT JOIN (SELECT * FROM batch ORDER BY user_id DESC, version DESC LIMIT 1) AS tail ON true
"""


@job(name="audit-ledger", every=timedelta(minutes=5))
async def audit_ledger(run: Run) -> str:
    """Check that each entry follows the previous one, and each balance is the last entry's."""
    state = await in_batches(
        run,
        _audit_ledger,
        {
            "user": FIRST_ID,
            "version": 0,
            "balance": 0,
            "users": 0,
            "wrong": 0,
            "named": [],
            "last_wrong": None,
        },
        Rows("entries", ENTRIES, most=2000),
    )
    users = count(state["users"], "user")
    if state["wrong"]:
        raise _differ(state, users)
    entries = count(state["done"], "entry", "entries")
    return f"checked {entries} of {users}: all balances match"


async def _audit_ledger(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(LEDGER, state["user"], state["version"], state["balance"], size)
    assert row is not None  # noqa: S101 - the statement always has one
    # A user whose entries are read in two batches may have faults in both; only the first counts.
    faults = {
        user: fault
        for user, fault in zip(row["wrong"], row["faults"], strict=True)
        if user != state["last_wrong"]
    }
    return {
        **_add(state, (f"user {user}: {fault}" for user, fault in faults.items())),
        "done": row["entries"],
        "users": state["users"] + row["users"],
        "user": row["user_id"],
        "version": row["version"],
        "balance": row["balance"],
        "last_wrong": max(faults, default=state["last_wrong"]),
        "ended": row["ended"],
    }


KEYS: Final = """
SELECT greatest(
    (SELECT count(*) FROM (SELECT FROM idempotency_keys LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'idempotency_keys'::regclass)
)::bigint
"""

# A key is written in one transaction with its entry, and one snapshot sees both. An accepted key
# must match its entry. A refused key must have a balance that existed and refuses the amount.
RECORDED_KEYS: Final = """
WITH batch AS MATERIALIZED (
    SELECT * FROM idempotency_keys WHERE key > $1 ORDER BY key LIMIT $2
), checked AS (
    SELECT batch.key, CASE
        WHEN entry.balance IS NULL THEN
            format('user %s has no entry %s', batch.user_id, batch.version)
        WHEN entry.balance <> batch.balance THEN
            format('it has the balance %s, but entry %s of user %s left %s',
                   batch.balance, batch.version, batch.user_id, entry.balance)
        WHEN outcome = 'refused'
             AND batch.balance::numeric + batch.amount BETWEEN 0 AND $3::bigint THEN
            format('it refuses %s to user %s, who had %s',
                   batch.amount, batch.user_id, batch.balance)
        WHEN outcome <> 'refused' AND (entry.key, entry.amount, entry.at)
             IS DISTINCT FROM (batch.key, batch.amount, batch.at) THEN
            format('entry %s of user %s is not its change', batch.version, batch.user_id)
        END AS fault
    FROM batch LEFT JOIN LATERAL (
        SELECT balance, amount, key, at FROM entries
        WHERE user_id = batch.user_id AND version = batch.version LIMIT 1
    ) AS entry ON true
)
SELECT (SELECT count(*) FROM batch) AS keys, (SELECT max(key) FROM batch) AS key,
       ARRAY(SELECT format('key %s: %s', key, fault) FROM checked WHERE fault IS NOT NULL
             ORDER BY key) AS faults
"""


@job(name="audit-keys", every=timedelta(minutes=8))
async def audit_keys(run: Run) -> str:
    """Check that each idempotency key's recorded answer agrees with the ledger."""
    start = {"key": "", "wrong": 0, "named": []}
    state = await in_batches(run, _audit_keys, start, Rows("keys", KEYS, most=1000))
    keys = count(state["done"], "idempotency key")
    if state["wrong"]:
        raise _differ(state, keys)
    return f"checked {keys}: all agree with the ledger"


async def _audit_keys(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(RECORDED_KEYS, state["key"], size, MAX_INTEGER)
    assert row is not None  # noqa: S101 - the statement always has one
    return {
        **_add(state, row["faults"]),
        "done": row["keys"],
        "key": row["key"],
        "ended": row["keys"] < size,
    }


DAILY_BALANCES: Final = """
SELECT greatest(
    (SELECT count(*) FROM (SELECT FROM daily_balances LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'daily_balances'::regclass)
)::bigint
"""

# A daily balance equals the entry of its version, which no later change can alter.
RECORDED_BALANCES: Final = """
WITH batch AS MATERIALIZED (
    SELECT user_id, day, version, balance FROM daily_balances
    WHERE (user_id, day) > ($1, $2::text::date) ORDER BY user_id, day LIMIT $3
), tail AS (
    SELECT user_id, day::text FROM batch ORDER BY user_id DESC, day DESC LIMIT 1
), checked AS (
    SELECT batch.user_id, day, CASE
        WHEN entry.balance IS NULL THEN format('there is no entry %s', batch.version)
        WHEN entry.balance <> batch.balance THEN
            format('the balance is %s, but entry %s left %s',
                   batch.balance, batch.version, entry.balance)
        END AS fault
    FROM batch LEFT JOIN LATERAL (
        SELECT balance FROM entries
        WHERE user_id = batch.user_id AND version = batch.version LIMIT 1
    ) AS entry ON true
)
SELECT (SELECT count(*) FROM batch) AS days, tail.user_id, tail.day,
       ARRAY(SELECT format('user %s on %s: %s', user_id, day, fault) FROM checked
             WHERE fault IS NOT NULL ORDER BY checked.user_id, checked.day) AS faults
FROM (SELECT) AS always LEFT JOIN tail ON true
"""


@job(name="audit-daily-balances", every=timedelta(minutes=20))
async def audit_daily_balances(run: Run) -> str:
    """Check that the daily balances agree with the ledger."""
    start = {"user": FIRST_ID, "day": "-infinity", "wrong": 0, "named": []}
    state = await in_batches(
        run, _audit_daily_balances, start, Rows("daily balances", DAILY_BALANCES, most=1000)
    )
    balances = count(state["done"], "daily balance")
    if state["wrong"]:
        raise _differ(state, balances)
    return f"checked {balances}: all agree with the ledger"


async def _audit_daily_balances(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(RECORDED_BALANCES, state["user"], state["day"], size)
    assert row is not None  # noqa: S101 - the statement always has one
    return {
        **_add(state, row["faults"]),
        "done": row["days"],
        "user": row["user_id"],
        "day": row["day"],
        "ended": row["days"] < size,
    }


AUDITS: Final = (audit_ledger, audit_keys, audit_daily_balances)
