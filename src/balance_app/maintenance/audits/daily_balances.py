"""The audit of daily balances."""

from datetime import timedelta
from typing import Final

from balance_app.db.pool import Connection
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.audits import faults
from balance_app.maintenance.batches import FIRST_ID, Rows, State, Steps, count, in_batches

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
    return await check_daily_balances(run)


async def check_daily_balances(run: Steps) -> str:
    """Return what was checked.

    Raises:
        LedgerMismatchError: a daily balance differs.
    """
    start = {"user": FIRST_ID, "day": "-infinity", **faults.NONE}
    state = await in_batches(
        run, _audit_daily_balances, start, Rows("daily balances", DAILY_BALANCES, most=1000)
    )
    balances = count(state["done"], "daily balance")
    if state["wrong"]:
        raise faults.differ(state, balances)
    return f"checked {balances}: all agree with the ledger"


async def _audit_daily_balances(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(RECORDED_BALANCES, state["user"], state["day"], size)
    assert row is not None  # noqa: S101 - the statement always has one
    return {
        **faults.add(state, row["faults"]),
        "done": row["days"],
        "user": row["user_id"],
        "day": row["day"],
        "ended": row["days"] < size,
    }
