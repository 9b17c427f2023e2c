"""The audit of accounts: their entries and holds, one by one, and what the account says of them."""

from datetime import timedelta
from typing import Final

from balance_app.db.pool import KEEP_TO_INDEX, Connection
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.audits import chain, faults
from balance_app.maintenance.batches import FIRST_ID, Rows, State, Steps, count, in_batches

ROWS: Final = """
SELECT (greatest(
    (SELECT count(*) FROM (SELECT FROM entries LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'entries'::regclass)
) + greatest(
    (SELECT count(*) FROM (SELECT FROM holds LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'holds'::regclass)
))::bigint
"""

# Reads up to $4 entries after the entry of user $1 and version $2, which left the balance $3 at
# time $5. Each must follow the previous one, be recorded under its key, and agree with what it
# names: the other half of a transfer, the entry that it reverses, the hold that it captures. A user
# whose entries end in the batch must have the last one's balance, cover the floor, and have the
# settings of the last change of them.
LEDGER: Final = """
WITH few AS MATERIALIZED (
    SELECT id, version, balance, held, floor, frozen, settings_version
    FROM users WHERE id >= $1 ORDER BY id LIMIT $4
), batch AS MATERIALIZED (
    SELECT * FROM entries
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
           AS balance_before,
           lag(at, 1, CASE WHEN user_id = $1 THEN $5::text::timestamptz ELSE '-infinity' END)
           OVER own AS at_before
    FROM batch WINDOW own AS (PARTITION BY user_id ORDER BY version)
), last AS (
    SELECT DISTINCT ON (user_id) user_id, version, balance FROM batch
    ORDER BY user_id, version DESC
), stands AS (
    SELECT few.*,
           coalesce(last.version, CASE WHEN id = $1 THEN $2 ELSE 0 END) AS last_version,
           coalesce(last.balance, CASE WHEN id = $1 THEN $3 ELSE 0 END) AS last_balance
    FROM few LEFT JOIN last ON user_id = id WHERE id <= (SELECT whole FROM reach)
), faults AS (
    SELECT c.user_id, c.version AS place, CASE
        WHEN c.version <> version_before + 1 THEN
            format('entry %s is missing', version_before + 1)
        WHEN c.balance <> balance_before::numeric + c.amount THEN
            format('entry %s adds %s to %s and leaves %s',
                   c.version, c.amount, balance_before, c.balance)
        WHEN c.at < at_before
             AND at_before >= (SELECT times_rise_from FROM balance_app_version) THEN
            format('entry %s is of %s, before entry %s of %s',
                   c.version, c.at, version_before, at_before)
        WHEN c.key IS NOT NULL AND CASE c.version WHEN 1 THEN (
            SELECT known.user_id = c.user_id FROM opening_keys AS known WHERE known.key = c.key
        ) ELSE (
            SELECT outcome = 'accepted' AND known.version = c.version AND known.hold IS NULL
            FROM idempotency_keys AS known WHERE (known.user_id, known.key) = (c.user_id, c.key)
        ) END IS NOT TRUE THEN format('the key of entry %s is not recorded', c.version)
        WHEN c.other_user_id IS NOT NULL AND other.at IS NULL THEN
            format('entry %s is half of a transfer, but user %s has no entry %s',
                   c.version, c.other_user_id, c.other_version)
        WHEN (other.other_user_id, other.other_version) IS DISTINCT FROM (c.user_id, c.version)
             AND c.other_user_id IS NOT NULL OR c.other_user_id = c.user_id THEN
            format('entry %s is half of a transfer, but entry %s of user %s is not the other half',
                   c.version, c.other_version, c.other_user_id)
        WHEN other.amount + c.amount::numeric <> 0 THEN
            format('entry %s of a transfer adds %s, but entry %s of user %s adds %s',
                   c.version, c.amount, c.other_version, c.other_user_id, other.amount)
        WHEN other.at <> c.at THEN
            format('entry %s of a transfer is of %s, but entry %s of user %s is of %s',
                   c.version, c.at, c.other_version, c.other_user_id, other.at)
        WHEN c.reverses IS NOT NULL AND first.version IS NULL THEN
            format('entry %s reverses entry %s, but there is none before it',
                   c.version, c.reverses)
        WHEN again.version IS NOT NULL THEN
            format('entries %s and %s reverse entry %s',
                   least(c.version, again.version), greatest(c.version, again.version), c.reverses)
        WHEN first.reverses IS NOT NULL THEN
            format('entry %s reverses entry %s, a reversal itself', c.version, c.reverses)
        WHEN first.amount + c.amount::numeric <> 0 THEN
            format('entry %s adds %s and reverses entry %s, which adds %s',
                   c.version, c.amount, c.reverses, first.amount)
        WHEN c.reverses IS NOT NULL AND (c.other_user_id, other.reverses)
             IS DISTINCT FROM (first.other_user_id, first.other_version) THEN
            format('entry %s reverses entry %s alone, without the other half of the transfer',
                   c.version, c.reverses)
        WHEN c.hold IS NOT NULL AND hold.state IS NULL THEN
            format('entry %s captures hold %s, which does not exist', c.version, c.hold)
        WHEN hold.state <> 'captured' THEN
            format('entry %s captures hold %s, which is %s', c.version, c.hold, hold.state)
        WHEN (hold.version, hold.captured + c.amount::numeric) IS DISTINCT FROM (c.version, 0)
             AND c.hold IS NOT NULL THEN
            format('entry %s adds %s for hold %s, of which %s was captured by entry %s',
                   c.version, c.amount, c.hold, hold.captured, hold.version)
        END AS fault
    FROM chained AS c LEFT JOIN LATERAL (
        SELECT amount, at, other_user_id, other_version, reverses FROM entries
        WHERE user_id = c.other_user_id AND version = c.other_version LIMIT 1
    ) AS other ON true LEFT JOIN LATERAL (
        SELECT version, amount, other_user_id, other_version, reverses FROM entries
        WHERE user_id = c.user_id AND version = c.reverses AND version < c.version LIMIT 1
    ) AS first ON true LEFT JOIN LATERAL (
        SELECT version FROM entries
        WHERE user_id = c.user_id AND reverses = c.reverses AND version <> c.version LIMIT 1
    ) AS again ON true LEFT JOIN LATERAL (
        SELECT state, captured, version FROM holds
        WHERE user_id = c.user_id AND number = c.hold LIMIT 1
    ) AS hold ON true
    UNION ALL
    SELECT id, 9223372036854775807, CASE
        WHEN last_version = 0 THEN 'there are no entries'
        WHEN (version, balance) <> (last_version, last_balance) THEN
            format('the balance is %s at version %s, but entry %s, the last, left %s',
                   balance, version, last_version, last_balance)
        WHEN balance - held::numeric < s.floor THEN
            format('%s is available, less than the floor %s', balance - held::numeric, s.floor)
        WHEN held <> 0 AND any_hold.number IS NULL THEN
            format('%s is held, but there are no holds', held)
        -- a user who was created without settings has no row of them
        WHEN (s.floor, s.frozen, named.external_id) IS DISTINCT FROM
             (coalesce(known.floor, 0), coalesce(known.frozen, false), known.external_id)
             OR s.settings_version > 1 AND known.floor IS NULL THEN
            format('the settings are not those of their version %s', s.settings_version)
        END
    FROM stands AS s LEFT JOIN LATERAL (
        SELECT number FROM holds WHERE user_id = id ORDER BY number LIMIT 1
    ) AS any_hold ON true LEFT JOIN LATERAL (
        SELECT floor, frozen, external_id FROM user_settings
        WHERE user_id = id AND user_settings.settings_version = s.settings_version LIMIT 1
    ) AS known ON true LEFT JOIN LATERAL (
        SELECT external_id FROM external_ids WHERE user_id = id LIMIT 1
    ) AS named ON true
), first AS (
    SELECT DISTINCT ON (user_id) user_id, fault FROM faults WHERE fault IS NOT NULL
    ORDER BY user_id, place
)
SELECT entries, (SELECT count(*) FROM stands) AS users, NOT cut AND span.count < $4 AS ended,
       CASE WHEN cut THEN tail.user_id ELSE span.max + 1 END AS user_id,
       CASE WHEN cut THEN tail.version ELSE 0 END AS version,
       CASE WHEN cut THEN tail.balance ELSE 0 END AS balance,
       CASE WHEN cut THEN tail.at ELSE '-infinity' END::text AS at,
       ARRAY(SELECT user_id FROM first ORDER BY user_id) AS wrong,
       ARRAY(SELECT fault FROM first ORDER BY user_id) AS faults
FROM reach CROSS JOIN (SELECT count(*), max(id) FROM few) AS span
LEFT JOIN (SELECT * FROM batch ORDER BY user_id DESC, version DESC LIMIT 1) AS tail ON true
"""

# Reads up to $3 holds after number $2 of user $1. Each must be recorded under its key; one that has
# ended must agree with the entry that was the last one then, which of a captured hold is its own.
# What is held of a user whose holds end in the batch must be the sum of the open ones (all of them,
# as it is one sum of one snapshot), and none may expire before the account is looked at for it.
HOLDS: Final = """
WITH batch AS MATERIALIZED (
    SELECT * FROM holds WHERE (user_id, number) > ($1, $2) ORDER BY user_id, number LIMIT $3
), tail AS MATERIALIZED (
    SELECT user_id, number FROM batch ORDER BY user_id DESC, number DESC LIMIT 1
), reach AS MATERIALIZED (
    SELECT count(*) AS holds, count(*) = $3 AS cut FROM batch
), stands AS (
    SELECT id, held, holds_due_at FROM users
    WHERE id = ANY (ARRAY(
        SELECT user_id FROM batch UNION SELECT $1::bigint
        EXCEPT SELECT user_id FROM tail WHERE (SELECT cut FROM reach)
    ))
), faults AS (
    SELECT h.user_id, h.number AS place, CASE
        WHEN h.key IS NOT NULL AND (
            SELECT known.hold = h.number FROM idempotency_keys AS known
            WHERE (known.user_id, known.key) = (h.user_id, h.key)
        ) IS NOT TRUE THEN format('the key of hold %s is not recorded', h.number)
        WHEN h.state <> 'open' AND entry.balance IS NULL THEN
            format('hold %s is %s, but there is no entry %s',
                   h.number, h.state, coalesce(h.version, 0))
        WHEN h.state = 'captured'
             AND (entry.hold, entry.amount, entry.at, entry.balance, entry.held)
             IS DISTINCT FROM (h.number, -h.captured, h.ended_at, h.balance, h.held) THEN
            format('entry %s is not the capture of hold %s', h.version, h.number)
        WHEN entry.balance <> h.balance THEN
            format('hold %s is %s at the balance %s, but entry %s left %s',
                   h.number, h.state, h.balance, h.version, entry.balance)
        WHEN h.state = 'expired' AND ended_at < expires_at THEN
            format('hold %s expired at %s, before %s', h.number, ended_at, expires_at)
        END AS fault
    FROM batch AS h LEFT JOIN LATERAL (
        SELECT balance, held, amount, at, hold FROM entries
        WHERE user_id = h.user_id AND version = h.version LIMIT 1
    ) AS entry ON true
    UNION ALL
    SELECT id, 9223372036854775807, CASE
        WHEN held <> amount THEN
            format('%s is held, but the open holds are %s', held, amount)
        WHEN expires_at < holds_due_at THEN
            format('a hold expires at %s, but none is expected to before %s',
                   expires_at, holds_due_at)
        END
    FROM stands CROSS JOIN LATERAL (
        SELECT coalesce(sum(amount), 0) AS amount, min(expires_at) AS expires_at FROM holds
        WHERE user_id = id AND state = 'open'
    ) AS open
), first AS (
    SELECT DISTINCT ON (user_id) user_id, fault FROM faults WHERE fault IS NOT NULL
    ORDER BY user_id, place
)
SELECT holds, NOT cut AS ended, tail.user_id, tail.number,
       ARRAY(SELECT user_id FROM first ORDER BY user_id) AS wrong,
       ARRAY(SELECT fault FROM first ORDER BY user_id) AS faults
FROM reach LEFT JOIN tail ON true
"""


@job(name="audit-ledger", every=timedelta(minutes=5))
async def audit_ledger(run: Run) -> str:
    """Check balances, entries and holds against each other, and the hash chain of the entries."""
    return await check_ledger(run, folds=True)


async def check_ledger(run: Steps, *, folds: bool) -> str:
    """Return what was checked; with `folds` give older accounts their first hash, if all agree.

    Raises:
        LedgerMismatchError: a user's rows differ.
    """
    state = await in_batches(
        run,
        _audit_ledger,
        {
            "user": FIRST_ID,
            "version": 0,
            "balance": 0,
            "at": "-infinity",
            # of the last entry that was read of the user, in hexadecimal digits
            "hash": None,
            "users": 0,
            # the last one that was read; None: all entries come first
            "hold": None,
            "holds": 0,
            # accounts without a hash, the first one, whether they are to get one, and how many did
            # of how many that were tried; None: holds come before
            "unhashed": 0,
            "first_unhashed": None,
            "folds": folds,
            "folded": None,
            "tried": 0,
            **faults.NONE,
            "last_wrong": None,
        },
        Rows("entries and holds", ROWS, most=2000),
    )
    users = count(state["users"], "user")
    if state["wrong"]:
        raise faults.differ(state, users)
    checked = count(state["done"] - state["holds"], "entry", "entries")
    if state["holds"]:
        checked += f" and {count(state['holds'], 'hold')}"
    left = state["unhashed"] - (state["folded"] or 0)
    unhashed = f"; {count(left, 'older account has', 'older accounts have')} no hash yet"
    return f"checked {checked} of {users}: all balances match{unhashed if left else ''}"


async def _audit_ledger(connection: Connection, state: State, size: int) -> State:
    if state["folded"] is not None:
        return await chain.give_first_hash(connection, state, size)
    if state["hold"] is not None:
        return await _audit_holds(connection, state, size)
    await connection.fetchval(KEEP_TO_INDEX)
    row = await connection.fetchrow(
        LEDGER, state["user"], state["version"], state["balance"], size, state["at"]
    )
    assert row is not None  # noqa: S101 - the statement always has one
    links = await chain.check_links(connection, state, size, (row["user_id"], row["version"]))
    wrong = links.faults | dict(zip(row["wrong"], row["faults"], strict=True))
    progress = {
        **_add(state, wrong),
        **links.progress,
        "done": row["entries"],
        "users": state["users"] + row["users"],
    }
    if row["ended"]:
        return {**progress, "user": FIRST_ID, "hold": 0, "last_wrong": None}
    return {
        **progress,
        "user": row["user_id"],
        "version": row["version"],
        "balance": row["balance"],
        "at": row["at"],
    }


async def _audit_holds(connection: Connection, state: State, size: int) -> State:
    await connection.fetchval(KEEP_TO_INDEX)
    row = await connection.fetchrow(HOLDS, state["user"], state["hold"], size)
    assert row is not None  # noqa: S101 - the statement always has one
    progress = {
        **_add(state, dict(zip(row["wrong"], row["faults"], strict=True))),
        "done": row["holds"],
        "holds": state["holds"] + row["holds"],
        "user": row["user_id"],
        "hold": row["number"],
        "ended": row["ended"],
    }
    # What was found is reported at once, and no hash is given over what may be wrong.
    if not (row["ended"] and state["folds"] and state["unhashed"]) or progress["wrong"]:
        return progress
    first = {"user": state["first_unhashed"] - 1, "version": 0, "hash": None, "folded": 0}
    return {**progress, **first, "ended": False}


def _add(state: State, wrong: dict[int, str]) -> State:
    # A user whose rows are read in two batches may have faults in both; only the first counts. So
    # does it of one who was named for an entry, and has a hold that differs, too.
    found = {
        user: f"user {user}: {fault}"
        for user, fault in sorted(wrong.items())
        if user != state["last_wrong"]
        and not any(each.startswith(f"user {user}: ") for each in state["named"])
    }
    return {
        **faults.add(state, found.values()),
        "last_wrong": max(found, default=state["last_wrong"]),
    }
