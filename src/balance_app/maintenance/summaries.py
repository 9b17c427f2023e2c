"""Jobs that record summaries which can't be computed later, or only at a cost."""

from datetime import datetime, timedelta
from typing import Final

from balance_app.db.pool import Connection, read
from balance_app.jobs.job import job
from balance_app.jobs.run import Run
from balance_app.maintenance.batches import FIRST_ID, USERS, Rows, State, count, in_batches
from balance_app.maintenance.seals import Sealed, add_part, seal

ENTRIES_AT_ONCE: Final = 2000
LISTS_AT_ONCE: Final = 50

# Writes at most one row per user and UTC day, from the day's latest snapshot, and only if there is
# a new version: there are never more rows than entries. The time is read after the snapshot was
# taken, so a balance is never recorded for a day before it existed. Days never go back, also when
# PostgreSQL's clock does: otherwise the latest version would not be that of the latest day, and be
# recorded and sealed by every run until that day. A version that was recorded while its account had
# no hash is sealed as soon as it has one, in the row that it has.
RECORD_BALANCES: Final = """
WITH few AS MATERIALIZED (
    SELECT id, version, balance, hash FROM users WHERE id > $1 ORDER BY id LIMIT $2
), snapshot AS MATERIALIZED (
    SELECT clock_timestamp() AS at
), fresh AS MATERIALIZED (
    SELECT id AS user_id, few.version, few.balance, few.hash,
           latest.version IS DISTINCT FROM few.version AS is_new,
           CASE WHEN latest.version = few.version THEN latest.day
                ELSE greatest(latest.day, (snapshot.at AT TIME ZONE 'UTC')::date) END AS day,
           CASE WHEN latest.version = few.version THEN latest.at
                ELSE greatest(latest.at, snapshot.at) END AS at
    FROM few CROSS JOIN snapshot LEFT JOIN LATERAL (
        SELECT version, day, at, sealed FROM daily_balances
        WHERE user_id = id ORDER BY day DESC LIMIT 1
    ) AS latest ON true
    WHERE latest.version IS DISTINCT FROM few.version OR few.hash IS NOT NULL AND NOT latest.sealed
), recorded AS (
    INSERT INTO daily_balances (user_id, day, version, balance, at, sealed)
    SELECT user_id, day, version, balance, at, hash IS NOT NULL FROM fresh
    ON CONFLICT (user_id, day) DO UPDATE
    SET version = excluded.version, balance = excluded.balance, at = excluded.at,
        sealed = excluded.sealed
)
SELECT count(*) AS users, max(id) AS user_id,
       (SELECT count(*) FROM fresh WHERE is_new) AS recorded,
       ARRAY(SELECT user_id FROM fresh WHERE hash IS NOT NULL ORDER BY user_id) AS user_ids,
       ARRAY(SELECT version FROM fresh WHERE hash IS NOT NULL ORDER BY user_id) AS versions,
       ARRAY(SELECT hash FROM fresh WHERE hash IS NOT NULL ORDER BY user_id) AS hashes
FROM few
"""


@job(name="note-daily-balances", every=timedelta(minutes=10))
async def note_daily_balances(run: Run) -> str:
    """Record each user's balance at the end of each day, and seal the ledgers that changed."""
    start = {"user": FIRST_ID, "recorded": 0, "seal": None}
    state = await in_batches(run, _note_daily_balances, start, Rows("users", USERS, most=1000))
    users, recorded = count(state["done"], "user"), count(state["recorded"], "new balance")
    sentence = f"read {users}: recorded {recorded}"
    if state["seal"] is None:
        return sentence
    made = Sealed(*state["seal"])
    # Whoever ships the logs elsewhere has a witness: a run that goes on here may say it twice.
    run.log.info("sealed", seal=made.number, digest=made.digest, heads=made.heads)
    return f"{sentence}; seal {made.number} is {'' if made.heads else 'still '}{made.digest}"


async def _note_daily_balances(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(RECORD_BALANCES, state["user"], size)
    assert row is not None  # noqa: S101 - an aggregate always has one
    await add_part(connection, row["user_ids"], row["versions"], row["hashes"])
    ended = row["users"] < size
    return {
        "done": row["users"],
        "user": row["user_id"],
        "recorded": state["recorded"] + row["recorded"],
        "seal": await seal(connection) if ended else None,
        "ended": ended,
    }


# Each entry is counted once: the totals and each user's last counted version are written by one
# statement. Versions are dense, so the number of new entries is known without reading them, and at
# most $3 are read. A user counts as active once a day, however many runs read the day's entries. A
# transfer is neither a deposit nor a withdrawal, as it changes nothing in total; so the totals add
# up however many halves are counted. It is counted with the payer's half.
COUNT: Final = """
WITH few AS MATERIALIZED (
    SELECT id, users.version, coalesce(counted.version, 0) AS counted, counted.day AS counted_day,
           greatest(0, users.version - coalesce(counted.version, 0)) AS new
    FROM (SELECT id, version FROM users WHERE id >= $1 ORDER BY id LIMIT $2) AS users
    LEFT JOIN LATERAL (
        SELECT version, day FROM counted_users WHERE user_id = id LIMIT 1
    ) AS counted ON true
), queue AS (
    SELECT *, sum(new) OVER (ORDER BY id) - new AS ahead FROM few
), share AS MATERIALIZED (
    SELECT id, counted, counted_day, least(version, counted + $3::bigint - ahead)::bigint AS upto
    FROM queue WHERE new > 0 AND ahead < $3
), fresh AS MATERIALIZED (
    SELECT id AS user_id, entry.version, amount, other_user_id IS NOT NULL AS transfer,
           (at AT TIME ZONE 'UTC')::date AS day, counted_day
    FROM share CROSS JOIN LATERAL (
        SELECT version, amount, at, other_user_id FROM entries
        WHERE user_id = id AND version > counted AND version <= upto
        ORDER BY version LIMIT upto - counted
    ) AS entry
), added AS (
    INSERT INTO daily_totals AS known
        (day, opened, opening, changes, deposited, withdrawn, transfers, transferred, active_users)
    SELECT day,
           count(*) FILTER (WHERE version = 1),
           coalesce(sum(amount) FILTER (WHERE version = 1), 0),
           count(*) FILTER (WHERE version > 1 AND NOT transfer),
           coalesce(sum(amount) FILTER (WHERE version > 1 AND amount > 0 AND NOT transfer), 0),
           coalesce(-sum(amount) FILTER (WHERE version > 1 AND amount < 0 AND NOT transfer), 0),
           count(*) FILTER (WHERE transfer AND amount < 0),
           coalesce(-sum(amount) FILTER (WHERE transfer AND amount < 0), 0),
           count(DISTINCT user_id) FILTER (WHERE day IS DISTINCT FROM counted_day)
    FROM fresh GROUP BY day
    ON CONFLICT (day) DO UPDATE SET
        opened = known.opened + excluded.opened,
        opening = known.opening + excluded.opening,
        changes = known.changes + excluded.changes,
        deposited = known.deposited + excluded.deposited,
        withdrawn = known.withdrawn + excluded.withdrawn,
        transfers = known.transfers + excluded.transfers,
        transferred = known.transferred + excluded.transferred,
        active_users = known.active_users + excluded.active_users
), marked AS (
    INSERT INTO counted_users (user_id, version, day)
    SELECT id, upto, day FROM share
    LEFT JOIN (SELECT user_id, max(day) AS day FROM fresh GROUP BY user_id) AS days ON user_id = id
    ON CONFLICT (user_id) DO UPDATE
    SET version = excluded.version, day = coalesce(excluded.day, counted_users.day)
), reach AS (
    SELECT count(*) AS users, max(id) AS last,
           CASE WHEN sum(new) > $3 THEN (SELECT max(id) FROM share) END AS cut_at
    FROM few
)
SELECT coalesce(cut_at, last + 1) AS user_id,
       (SELECT count(*) FROM few WHERE cut_at IS NULL OR id < cut_at) AS users,
       (SELECT count(*) FROM fresh) AS entries,
       cut_at IS NULL AND users < $2 AS ended
FROM reach
"""


@job(name="total-days", every=timedelta(minutes=12))
async def total_days(run: Run) -> str:
    """Add up each day's deposits, withdrawals and transfers, and count its active users."""
    start = {"user": FIRST_ID, "entries": 0}
    state = await in_batches(run, _total_days, start, Rows("users", USERS, most=1000))
    entries = count(state["entries"], "new entry", "new entries")
    return f"read {count(state['done'], 'user')}: counted {entries}"


async def _total_days(connection: Connection, state: State, size: int) -> State:
    row = await connection.fetchrow(COUNT, state["user"], size, ENTRIES_AT_ONCE)
    assert row is not None  # noqa: S101 - an aggregate always has one
    return {
        "done": row["users"],
        "user": row["user_id"],
        "entries": state["entries"] + row["entries"],
        "ended": row["ended"],
    }


TABLES: Final = """
SELECT count(*) FROM pg_class
WHERE relkind = 'r'
  AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
"""

# Records the size of the next table with its indexes. All rows of a list have one time, kept in the
# checkpoint, so a run that is taken over completes the list, and a table is recorded once.
MEASURE: Final = """
WITH next AS (
    SELECT relname::text AS name, pg_total_relation_size(oid) AS bytes,
           nullif(reltuples, -1)::bigint AS estimated_rows
    FROM pg_class
    WHERE relkind = 'r' AND relname > $2::name
      AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    ORDER BY relname LIMIT 1
), recorded AS (
    INSERT INTO table_sizes (at, name, bytes, estimated_rows)
    SELECT $1, name, bytes, estimated_rows FROM next
    ON CONFLICT (at, name) DO NOTHING
)
SELECT name, bytes FROM next
"""

DELETE_SIZES: Final = """
WITH deleted AS (
    DELETE FROM table_sizes WHERE at = ANY (ARRAY(
        SELECT DISTINCT at FROM table_sizes
        WHERE at < (SELECT clock_timestamp() - interval '90 days') ORDER BY at LIMIT $1
    ))
    RETURNING 1
)
SELECT count(*) FROM deleted
"""

# The totals of the list at $1, and of the latest list at least a day older.
GROWTH: Final = """
SELECT (SELECT sum(bytes) FROM table_sizes WHERE at = $1)::bigint AS bytes,
       (SELECT name FROM table_sizes WHERE at = $1 ORDER BY bytes DESC LIMIT 1) AS largest,
       (SELECT max(bytes) FROM table_sizes WHERE at = $1) AS largest_bytes,
       (SELECT sum(bytes) FROM table_sizes WHERE at = (
           SELECT max(at) FROM table_sizes WHERE at <= $1 - interval '1 day'
       ))::bigint AS bytes_before
"""


@job(name="record-sizes", every=timedelta(minutes=30))
async def record_sizes(run: Run) -> str:
    """Record the size of each table; delete records older than 90 days."""
    state = await in_batches(
        run,
        _record_sizes,
        {"at": None, "table": "", "tables": 0, "sentence": ""},
        Rows("tables", TABLES, most=1),
    )
    return f"measured {count(state['tables'], 'table')}: {state['sentence']}"


async def _record_sizes(connection: Connection, state: State, _size: int) -> State:
    if state["at"] is None:
        at: datetime = await connection.fetchval("SELECT clock_timestamp()")
    else:
        at = datetime.fromisoformat(state["at"])
    row = await connection.fetchrow(MEASURE, at, state["table"])
    if row is not None:
        table, tables = row["name"], state["tables"] + 1
        return {"done": 1, "at": at.isoformat(), "table": table, "tables": tables}
    if await connection.fetchval(DELETE_SIZES, LISTS_AT_ONCE):
        return {"done": 0}
    growth = await connection.fetchrow(GROWTH, at)
    assert growth is not None  # noqa: S101 - the statement always has one
    sentence = (
        f"{_megabytes(growth['bytes'])}, of which {growth['largest']} takes "
        f"{_megabytes(growth['largest_bytes'])}"
    )
    if growth["bytes_before"] is not None:
        grown = growth["bytes"] - growth["bytes_before"]
        more = "more" if grown >= 0 else "less"
        sentence += f"; {_megabytes(abs(grown))} {more} than a day before"
    return {"done": 0, "sentence": sentence, "ended": True}


# The latest size of each table that was in a list within a day of the latest. The latest list alone
# may be incomplete. A list dated ahead is from before the clock was set back, so not the latest.
SIZES: Final = """
WITH latest AS (
    SELECT max(at) AS at FROM table_sizes WHERE at <= (SELECT clock_timestamp())
)
SELECT DISTINCT ON (name) name, bytes FROM table_sizes
WHERE at <= (SELECT at FROM latest) AND at > (SELECT at FROM latest) - interval '1 day'
ORDER BY name, at DESC
"""


async def read_table_bytes(connection: Connection) -> dict[str, int]:
    """Return the bytes of each table with its indexes, as last recorded.

    Raises:
        DatabaseUnavailable: as `read` does.
    """
    return {row["name"]: row["bytes"] for row in await read(connection, SIZES)}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB".replace(",", " ")
