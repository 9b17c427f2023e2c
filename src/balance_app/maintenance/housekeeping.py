"""Jobs that delete old rows, end overdue holds, and refresh the planner's statistics."""

from datetime import timedelta
from typing import Final

import asyncpg

from balance_app.balances.repository import REFUSALS_KEPT
from balance_app.balances.state import EXPIRE, HOLDS_AT_ONCE
from balance_app.db.pool import KEEP_TO_INDEX, Connection
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.batches import (
    FIRST_ID,
    MissingRightError,
    Rows,
    State,
    count,
    in_batches,
)
from balance_app.maintenance.summaries import TABLES

# The lines and the traceback of a run are deleted with it: up to 200 rows each.
RUNS_AT_ONCE: Final = 200
ANALYZE_SECONDS: Final = 60  # at most; see SETTINGS

PRUNABLE: Final = """
SELECT ((SELECT count(*) FROM (
    SELECT FROM idempotency_keys
    WHERE outcome = 'refused' AND at < (SELECT clock_timestamp() - $1::interval) LIMIT 100000
) AS old) + greatest(
    (SELECT count(*) FROM (SELECT FROM users LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'users'::regclass)
))::bigint
"""

# Only refusals are deleted, and only after the promised time: the key of an accepted change is kept
# for ever. The oldest are deleted first. A row of the snapshot keeps its place (`ctid`) as long as
# the statement lasts, and by it no plan reads other rows.
DELETE_REFUSALS: Final = """
WITH deleted AS (
    DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM idempotency_keys
        WHERE outcome = 'refused' AND at < (SELECT clock_timestamp() - $2::interval)
        ORDER BY at LIMIT $1
    ))
    RETURNING 1
)
SELECT count(*) FROM deleted
"""


# Of the next $2 users after $1, those up to the first one with an overdue hold.
OVERDUE: Final = """
WITH few AS MATERIALIZED (
    SELECT id, holds_due_at <= (SELECT clock_timestamp()) AS overdue
    FROM users WHERE id > $1 ORDER BY id LIMIT $2
), first AS (
    SELECT min(id) AS id FROM few WHERE overdue
)
SELECT count(*) AS users, max(few.id) AS user_id, first.id IS NOT NULL AS overdue
FROM few CROSS JOIN first WHERE first.id IS NULL OR few.id <= first.id
GROUP BY first.id
"""

# An account that somebody else has locked is left to the next run, and to who looks at it.
LOCK: Final = "SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE SKIP LOCKED"


@job(name="prune-refused-keys", every=timedelta(minutes=6))
async def prune_refused_keys(run: Run) -> str:
    """Delete refusals older than 7 days; end overdue holds of accounts that nobody looks at."""
    state = await in_batches(
        run,
        _prune,
        # the last user whose holds were looked at; None: all refusals come first
        {"refusals": 0, "user": None, "holds": 0},
        Rows("refusals and users", PRUNABLE, most=500, arguments=(REFUSALS_KEPT,)),
    )
    refusals = count(state["refusals"], "refusal")
    holds = count(state["holds"], "overdue hold")
    return f"removed {refusals} older than {REFUSALS_KEPT.days} days, ended {holds}"


async def _prune(connection: Connection, state: State, size: int) -> State:
    if state["user"] is not None:
        return await _end_overdue_holds(connection, state, size)
    await connection.fetchval(KEEP_TO_INDEX)
    deleted = await connection.fetchval(DELETE_REFUSALS, size, REFUSALS_KEPT)
    return {
        "done": deleted,
        "refusals": state["refusals"] + deleted,
        "user": FIRST_ID if deleted < size else None,
    }


async def _end_overdue_holds(connection: Connection, state: State, size: int) -> State:
    # One account in a transaction: an instance that freezes within it keeps no other one locked.
    row = await connection.fetchrow(OVERDUE, state["user"], size)
    if row is None:
        return {"done": 0, "ended": True}
    ended = 0
    if row["overdue"] and await connection.fetchval(LOCK, row["user_id"]) is not None:
        status = await connection.execute(EXPIRE, row["user_id"], HOLDS_AT_ONCE)
        ended = int(status.removeprefix("UPDATE "))
    holds = state["holds"] + ended
    if ended == HOLDS_AT_ONCE:  # the account may have more of them
        return {"done": 0, "holds": holds}
    return {"done": row["users"], "user": row["user_id"], "holds": holds}


JOB_ROWS: Final = "SELECT count(*) FROM jobs"

# Deletes the oldest runs of the first job after $1, except its last 20 and one in progress (it has
# no end). Ids rise with the start, and the row comparisons use the index in this order (see
# `jobs/api/history.py`), so the oldest are found without a scan. Those that ended in the future,
# before the clock was set back, hold up no later ones.
PRUNE_RUNS: Final = """
WITH next AS MATERIALIZED (
    SELECT name FROM jobs WHERE name > $1 ORDER BY name LIMIT 1
), oldest AS MATERIALIZED (
    SELECT id, ended_at FROM job_runs
    WHERE (job, id) > ((SELECT name FROM next), 0) AND (job, id) < ((SELECT name FROM next), (
        SELECT id FROM job_runs
        WHERE (job, id) < ((SELECT name FROM next), 9223372036854775807)
          AND (job, id) > ((SELECT name FROM next), 0)
        ORDER BY job DESC, id DESC OFFSET 19 LIMIT 1
    ))
      AND (ended_at > (SELECT clock_timestamp())) IS NOT TRUE
    ORDER BY job, id LIMIT $2
), removed AS (
    DELETE FROM job_runs WHERE id = ANY (ARRAY(
        SELECT id FROM oldest WHERE ended_at < (SELECT clock_timestamp() - interval '30 days')
    ))
    RETURNING 1
)
SELECT (SELECT name FROM next), (SELECT count(*) FROM removed) AS removed
"""

# Instances are listed for display only; one that sends a heartbeat again is listed again. One that
# is gone stays until somebody dismisses it, or a month; one that was started again, for a day.
PRUNE_INSTANCES: Final = """
WITH removed AS (
    DELETE FROM instances
    WHERE last_heartbeat_at < (SELECT clock_timestamp() - interval '1 day') AND id = ANY (ARRAY(
        SELECT id FROM (
            SELECT id, last_heartbeat_at, max(started_at) OVER (PARTITION BY server) AS latest
            FROM instances
        ) AS listed
        WHERE last_heartbeat_at < (SELECT clock_timestamp() - interval '1 day')
          AND (latest > last_heartbeat_at
               OR last_heartbeat_at < (SELECT clock_timestamp() - interval '30 days'))
        LIMIT $1
    ))
    RETURNING 1
)
SELECT count(*) FROM removed
"""


@job(name="prune-history", every=timedelta(minutes=15))
async def prune_history(run: Run) -> str:
    """Remove runs older than 30 days, except each job's last 20, and instances unseen for a day."""
    start = {"job": "", "runs": 0, "instances": 0}
    state = await in_batches(run, _prune_history, start, Rows("jobs", JOB_ROWS, most=1))
    runs, instances = count(state["runs"], "run"), count(state["instances"], "instance")
    return f"removed {runs} older than 30 days and {instances} not seen for a day"


async def _prune_history(connection: Connection, state: State, _size: int) -> State:
    await connection.fetchval(KEEP_TO_INDEX)
    row = await connection.fetchrow(PRUNE_RUNS, state["job"], RUNS_AT_ONCE)
    assert row is not None  # noqa: S101 - the statement always has one
    if row["removed"]:
        return {"done": 0, "runs": state["runs"] + row["removed"]}
    if row["name"] is not None:
        return {"done": 1, "job": row["name"]}
    removed = await connection.fetchval(PRUNE_INSTANCES, RUNS_AT_ONCE)
    return {
        "done": 0,
        "instances": state["instances"] + removed,
        "ended": removed < RUNS_AT_ONCE,
    }


# Plans depend on how many rows there are. A locked table is skipped until the next run; ANALYZE
# blocks no reads or writes.
ANALYZE: Final = {
    "access_state": "ANALYZE (SKIP_LOCKED) access_state",
    "actions": "ANALYZE (SKIP_LOCKED) actions",
    "alerts": "ANALYZE (SKIP_LOCKED) alerts",
    "api_keys": "ANALYZE (SKIP_LOCKED) api_keys",
    "sessions": "ANALYZE (SKIP_LOCKED) sessions",
    "instances": "ANALYZE (SKIP_LOCKED) instances",
    "counted_users": "ANALYZE (SKIP_LOCKED) counted_users",
    "daily_balances": "ANALYZE (SKIP_LOCKED) daily_balances",
    "daily_totals": "ANALYZE (SKIP_LOCKED) daily_totals",
    "entries": "ANALYZE (SKIP_LOCKED) entries",
    "external_ids": "ANALYZE (SKIP_LOCKED) external_ids",
    "holds": "ANALYZE (SKIP_LOCKED) holds",
    "idempotency_keys": "ANALYZE (SKIP_LOCKED) idempotency_keys",
    "job_declarations": "ANALYZE (SKIP_LOCKED) job_declarations",
    "job_run_lines": "ANALYZE (SKIP_LOCKED) job_run_lines",
    "job_run_tracebacks": "ANALYZE (SKIP_LOCKED) job_run_tracebacks",
    "job_runs": "ANALYZE (SKIP_LOCKED) job_runs",
    "jobs": "ANALYZE (SKIP_LOCKED) jobs",
    "opening_keys": "ANALYZE (SKIP_LOCKED) opening_keys",
    "pings": "ANALYZE (SKIP_LOCKED) pings",
    "seal_parts": "ANALYZE (SKIP_LOCKED) seal_parts",
    "seals": "ANALYZE (SKIP_LOCKED) seals",
    "table_sizes": "ANALYZE (SKIP_LOCKED) table_sizes",
    "user_settings": "ANALYZE (SKIP_LOCKED) user_settings",
    "users": "ANALYZE (SKIP_LOCKED) users",
}

# Sampling a large table from disk takes long. From PostgreSQL 17 on the server ends the transaction
# after three leases, and the run with it: ANALYZE has two of them.
#
# $1 milliseconds
SETTINGS: Final = """
SELECT set_config('statement_timeout', least($1::integer, (
    SELECT nullif(setting, '0')::integer / 3 * 2 FROM pg_settings
    WHERE name = 'transaction_timeout'
))::text, true)
"""

# The counters must be read anew, not from the transaction's cache. Before PostgreSQL 15 they come
# up to half a second late.
FORGET_COUNTERS: Final = """
SELECT pg_stat_clear_snapshot(),
       CASE WHEN current_setting('server_version_num')::integer < 150000 THEN pg_sleep(0.6) END
"""

# ANALYZE skips a table that the role has no right to, with a warning only. Before PostgreSQL 17 the
# right was that of the owner, of the table or the database, and could not be granted.
CHANGED: Final = """
SELECT n_mod_since_analyze AS rows, last_analyze,
       current_setting('server_version_num')::integer < 170000 AS of_owners,
       CASE WHEN current_setting('server_version_num')::integer >= 170000
            THEN has_table_privilege(relid, 'MAINTAIN')
            ELSE pg_has_role(relowner, 'USAGE') OR pg_has_role(datdba, 'USAGE') END AS may_analyze
FROM pg_stat_user_tables JOIN pg_class ON pg_class.oid = relid
JOIN pg_database ON datname = current_database()
WHERE relid = to_regclass($1)
"""


@job(name="refresh-statistics", every=timedelta(minutes=25))
async def refresh_statistics(run: Run) -> str:
    """Refresh the planner's statistics of each table whose rows have changed."""
    state = await in_batches(
        run,
        _refresh_statistics,
        {"table": "", "refreshed": 0, "left": 0, "too_slow": [], "most": 0, "most_in": None},
        Rows("tables", TABLES, most=1),
    )
    sentence = (
        f"refreshed the statistics of {state['refreshed']} of {count(state['done'], 'table')}"
    )
    if state["left"]:
        sentence += f"; left {state['left']} to autovacuum: only their owner may, before 17"
    if state["too_slow"]:
        sentence += f"; left {', '.join(state['too_slow'])} to autovacuum: ANALYZE took too long"
    if state["left"] or state["too_slow"] or state["most_in"] is None:
        return sentence
    return f"{sentence}; most had changed in {state['most_in']}: {count(state['most'], 'row')}"


async def _refresh_statistics(connection: Connection, state: State, _size: int) -> State:
    table = min(name for name in ANALYZE if name > state["table"])
    progress = {"done": 1, "table": table, "ended": table == max(ANALYZE)}
    await connection.fetchrow(SETTINGS, ANALYZE_SECONDS * 1000)
    before = await connection.fetchrow(CHANGED, table)
    if before is not None and not before["may_analyze"]:
        if before["of_owners"]:
            return progress | {"left": state["left"] + 1}
        raise MissingRightError(f"MAINTAIN on {table}, or its ownership")
    if before is None or (before["last_analyze"] is not None and before["rows"] == 0):
        return progress
    await connection.execute("SAVEPOINT before_analyze")
    try:
        await connection.execute(ANALYZE[table])
    except asyncpg.QueryCanceledError:
        await connection.execute("ROLLBACK TO before_analyze")
        return progress | {"too_slow": [*state["too_slow"], table]}
    await connection.fetchrow(FORGET_COUNTERS)
    after = await connection.fetchrow(CHANGED, table)
    if after is None or after["last_analyze"] == before["last_analyze"]:
        return progress
    progress["refreshed"] = state["refreshed"] + 1
    if before["rows"] > state["most"]:
        progress |= {"most": before["rows"], "most_in": table}
    return progress
