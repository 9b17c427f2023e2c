"""A job that watches values that have a limit."""

from datetime import timedelta
from typing import Final

from balance_app.db.pool import Connection
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.batches import (
    FIRST_ID,
    USERS,
    MissingRightError,
    Rows,
    State,
    count,
    in_batches,
)

NEAR: Final = 0.8  # of a limit


class LimitNearError(Exception):
    """A value is near its limit."""


# What LIMITS can't see: PostgreSQL shows a role without these rights less, and reports no error.
HIDDEN: Final = """
SELECT 'membership in pg_read_all_stats' WHERE NOT pg_has_role('pg_read_all_stats', 'USAGE')
UNION ALL
SELECT format('SELECT on sequence %s', sequencename) FROM pg_sequences
WHERE schemaname = current_schema()
  AND NOT has_sequence_privilege(format('%I.%I', schemaname, sequencename), 'SELECT, USAGE')
"""


# The users so near the largest balance that larger deposits will soon be refused.
NEAR_LARGEST: Final = """
WITH few AS (SELECT id, balance FROM users WHERE id > $1 ORDER BY id LIMIT $2)
SELECT count(*) AS users, max(id) AS user_id,
       count(*) FILTER (WHERE balance > $3::float8 * $4::bigint) AS rich,
       min(id) FILTER (WHERE balance > $3::float8 * $4::bigint) AS first
FROM few
"""

# The used share of each limit. Ids must stay exact in JSON. Autovacuum starts to freeze at
# `autovacuum_freeze_max_age`; at half as much again, freezing is not keeping up. A transaction that
# lasts an hour keeps vacuum from removing any row version deleted since.
LIMITS: Final = """
SELECT format('numbers of %s', sequencename) AS what,
       coalesce(last_value, 0) / least(max_value, $1::bigint)::float8 AS used
FROM pg_sequences WHERE schemaname = current_schema()
UNION ALL
SELECT 'transaction ids', age(datfrozenxid) / least(
    1.5 * current_setting('autovacuum_freeze_max_age')::float8,
    current_setting('vacuum_failsafe_age')::float8
)
FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT 'multixact ids', mxid_age(datminmxid) / least(
    1.5 * current_setting('autovacuum_multixact_freeze_max_age')::float8,
    current_setting('vacuum_multixact_failsafe_age')::float8
)
FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT 'connections', count(*) / current_setting('max_connections')::float8
FROM pg_stat_activity WHERE backend_type = 'client backend'
UNION ALL
SELECT 'the hour that a transaction may last',
       coalesce(extract(epoch FROM max(clock_timestamp() - xact_start)) / 3600, 0)::float8
FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend'
ORDER BY used DESC
"""


@job(name="watch-limits", every=timedelta(minutes=3))
async def watch_limits(run: Run) -> str:
    """Watch values that have a limit: balances, ids, connections, the age of transactions."""
    state = await in_batches(
        run,
        _watch_limits,
        {"user": FIRST_ID, "rich": 0, "first": None, "limits": []},
        Rows("users", USERS, most=2000),
    )
    limits = [(what, f"{what} {used:.0%}", used) for what, used in state["limits"]]
    near = [sentence for _, sentence, used in limits if used >= NEAR]
    if near:
        raise LimitNearError(f"{count(len(near), 'limit')} near: {', '.join(near)}")
    sentence = f"watched {count(len(limits), 'limit')} and {count(state['done'], 'user')}"
    if state["rich"]:
        rich = count(state["rich"], "user is", "users are")
        return f"{sentence}: {rich} near the largest balance, first user {state['first']}"
    return f"{sentence}: most used is {limits[0][1]}"


async def _watch_limits(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(NEAR_LARGEST, state["user"], size, NEAR, MAX_INTEGER)
    assert row is not None  # noqa: S101 - an aggregate always has one
    ended = row["users"] < size
    if ended and (hidden := await connection.fetch(HIDDEN)):
        raise MissingRightError(*(name for (name,) in hidden))
    return {
        "done": row["users"],
        "user": row["user_id"],
        "rich": state["rich"] + row["rich"],
        "first": state["first"] if state["first"] is not None else row["first"],
        "limits": (
            [list(limit) for limit in await connection.fetch(LIMITS, MAX_INTEGER)] if ended else []
        ),
        "ended": ended,
    }
