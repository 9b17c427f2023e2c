"""The audit of what is recorded by name: idempotency keys, keys of openings, external ids."""

from datetime import timedelta
from typing import Final

from balance_app.db.pool import KEEP_TO_INDEX, Connection
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.audits import faults
from balance_app.maintenance.batches import FIRST_ID, Rows, State, Steps, count, in_batches

KEYS: Final = """
SELECT (greatest(
    (SELECT count(*) FROM (SELECT FROM idempotency_keys LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'idempotency_keys'::regclass)
) + greatest(
    (SELECT count(*) FROM (SELECT FROM opening_keys LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'opening_keys'::regclass)
) + greatest(
    (SELECT count(*) FROM (SELECT FROM external_ids LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'external_ids'::regclass)
))::bigint
"""

# An accepted key must match the entry that it made, or the hold: also in what was asked for, as
# only the same text is a repetition. A refused key must have a state with a balance that existed,
# and that refuses the amount: of a transfer that of the payer, or of the one who is to be paid.
#
# $1 and $2 the user and the key before, $3 how many, $4 largest balance
RECORDED_KEYS: Final = """
WITH batch AS MATERIALIZED (
    SELECT *, coalesce(refused_by, user_id) AS whose,
           CASE WHEN refused_by IS NULL THEN amount ELSE -amount::numeric END AS added
    FROM idempotency_keys WHERE (user_id, key) > ($1, $2) ORDER BY user_id, key LIMIT $3
), tail AS (
    SELECT user_id, key FROM batch ORDER BY user_id DESC, key DESC LIMIT 1
), checked AS (
    SELECT batch.user_id, batch.key, CASE
        WHEN entry.balance IS NULL THEN format('user %s has no entry %s', whose, batch.version)
        WHEN entry.balance <> batch.balance THEN
            format('it has the balance %s, but entry %s of user %s left %s',
                   batch.balance, batch.version, whose, entry.balance)
        WHEN outcome = 'refused' AND NOT (
            frozen OR batch.balance + added > $4::bigint
            OR added < 0 AND batch.balance::numeric - batch.held + added < floor
        ) THEN
            format('it refuses %s to user %s, who had %s available and the floor %s',
                   added, whose, batch.balance::numeric - batch.held, floor)
        WHEN refused_by IS NOT NULL
             AND (batch.request ~ format('^[{]"transfer":%s[,}]', refused_by)) IS NOT TRUE THEN
            format('it is refused by user %s, whom it does not pay', refused_by)
        WHEN outcome = 'accepted' AND batch.hold IS NULL
             AND (entry.key, entry.amount, entry.held, entry.at, entry.request)
             IS DISTINCT FROM (batch.key, batch.amount, batch.held, batch.at, batch.request) THEN
            format('entry %s of user %s is not its change', batch.version, batch.user_id)
        WHEN batch.hold IS NOT NULL
             AND (outcome, hold.key, hold.amount, hold.at, hold.request)
             IS DISTINCT FROM
                 ('accepted', batch.key, -batch.amount::numeric, batch.at, batch.request) THEN
            format('hold %s of user %s is not what it placed', batch.hold, batch.user_id)
        END AS fault
    FROM batch LEFT JOIN LATERAL (
        -- the request as `Movement.request` writes it
        SELECT balance, amount, key, at, held, nullif('{' || concat_ws(
            ',', '"transfer":' || other_user_id, '"reference":' || to_json(reference),
            '"note":' || to_json(note)
        ) || '}', '{}') AS request
        FROM entries WHERE user_id = whose AND version = batch.version LIMIT 1
    ) AS entry ON true LEFT JOIN LATERAL (
        SELECT amount, key, at, '{' || concat_ws(
            ',', '"hold":' || extract(epoch FROM expires_at - at)::bigint,
            '"reference":' || to_json(reference), '"note":' || to_json(note)
        ) || '}' AS request
        FROM holds WHERE user_id = batch.user_id AND number = batch.hold LIMIT 1
    ) AS hold ON true
)
SELECT (SELECT count(*) FROM batch) AS rows, tail.user_id, tail.key,
       ARRAY(SELECT format('key %s of user %s: %s', checked.key, checked.user_id, fault)
             FROM checked WHERE fault IS NOT NULL ORDER BY checked.user_id, checked.key) AS faults
FROM (SELECT) AS always LEFT JOIN tail ON true
"""

# The key of a request that created a user is that of entry 1, and such a request creates such a
# user. Compared as text, as a repetition is.
#
# $1 the key before, $2 how many
OPENING_KEYS: Final = """
WITH batch AS MATERIALIZED (
    SELECT key, user_id, request FROM opening_keys WHERE key > $1 ORDER BY key LIMIT $2
), checked AS (
    SELECT batch.key, CASE
        WHEN entry.amount IS NULL THEN format('user %s has no entry 1', batch.user_id)
        WHEN entry.key IS DISTINCT FROM batch.key THEN
            format('it is not the key of entry 1 of user %s', batch.user_id)
        -- as `Opening.request` writes it
        WHEN batch.request <> '{' || concat_ws(
            ',', '"balance":' || entry.amount, '"floor":' || nullif(floor, 0),
            '"external_id":' || to_json(external_id)
        ) || '}' THEN format('user %s was not created as it asks', batch.user_id)
        END AS fault
    FROM batch LEFT JOIN LATERAL (
        SELECT amount, key FROM entries WHERE user_id = batch.user_id AND version = 1 LIMIT 1
    ) AS entry ON true LEFT JOIN LATERAL (
        SELECT floor, external_id FROM user_settings
        WHERE user_id = batch.user_id AND settings_version = 1 LIMIT 1
    ) AS first ON true
)
SELECT (SELECT count(*) FROM batch) AS rows, (SELECT max(key) FROM batch) AS key,
       ARRAY(SELECT format('opening key %s: %s', checked.key, fault) FROM checked
             WHERE fault IS NOT NULL ORDER BY checked.key) AS faults
"""

# $1 the external id before, $2 how many
EXTERNAL_IDS: Final = """
WITH batch AS MATERIALIZED (
    SELECT external_id, user_id FROM external_ids WHERE external_id > $1
    ORDER BY external_id LIMIT $2
)
SELECT (SELECT count(*) FROM batch) AS rows, (SELECT max(external_id) FROM batch) AS key,
       ARRAY(SELECT format('external id %s: there is no user %s', external_id, user_id)
             FROM batch LEFT JOIN LATERAL (
                 SELECT id FROM users WHERE id = user_id LIMIT 1
             ) AS named ON true
             WHERE id IS NULL ORDER BY external_id) AS faults
"""


@job(name="audit-keys", every=timedelta(minutes=8))
async def audit_keys(run: Run) -> str:
    """Check that each key's recorded answer agrees with the ledger, and each external id."""
    return await check_keys(run)


async def check_keys(run: Steps) -> str:
    """Return what was checked.

    Raises:
        LedgerMismatchError: a key or external id differs.
    """
    start = {"table": "idempotency_keys", "user": FIRST_ID, "key": "", **faults.NONE}
    state = await in_batches(run, _audit_keys, start, Rows("keys", KEYS, most=1000))
    keys = count(state["done"], "key or external id", "keys and external ids")
    if state["wrong"]:
        raise faults.differ(state, keys)
    return f"checked {keys}: all agree with the ledger"


async def _audit_keys(connection: Connection, state: State, size: int) -> State:
    table, user, key = state["table"], state["user"], state["key"]
    await connection.fetchval(KEEP_TO_INDEX)
    if table == "idempotency_keys":
        row = await connection.fetchrow(RECORDED_KEYS, user, key, size, MAX_INTEGER)
    elif table == "opening_keys":
        row = await connection.fetchrow(OPENING_KEYS, key, size)
    else:
        row = await connection.fetchrow(EXTERNAL_IDS, key, size)
    assert row is not None  # noqa: S101 - each statement always has one
    progress = {**faults.add(state, row["faults"]), "done": row["rows"]}
    if row["rows"] == size:
        return {**progress, "user": row.get("user_id"), "key": row["key"]}
    following = {"idempotency_keys": "opening_keys", "opening_keys": "external_ids"}.get(table)
    return {**progress, "table": following, "key": "", "ended": following is None}
