"""Two jobs of a shop that keeps its customers' balances in balance_app.

Their tables are the shop's own (`acme_orders`, `acme_reports`), in the service's database: what a
job writes through `run.transaction()` is committed only while the run holds its lease.
"""

from datetime import timedelta

from balance_app.jobs import Run, ThreadRun, job

# A batch is one short transaction. The ids are the job's checkpoint.
ARCHIVE = """
WITH batch AS (
    SELECT id, placed_at FROM acme_orders WHERE id > $1 ORDER BY id LIMIT $2
), archived AS (
    UPDATE acme_orders SET archived = true FROM batch
    WHERE acme_orders.id = batch.id AND NOT archived
      AND batch.placed_at < clock_timestamp() - interval '30 days'
    RETURNING acme_orders.id
)
SELECT (SELECT max(id) FROM batch) AS last_id, (SELECT count(*) FROM archived) AS archived
"""

# A tick has one report, however often it is tried: its time is the key.
REPORT = """
INSERT INTO acme_reports (due_at, orders)
SELECT $1, count(*) FROM acme_orders WHERE placed_at <= $1 AND placed_at > $1 - interval '1 day'
ON CONFLICT (due_at) DO NOTHING
"""


@job(
    name="archive-orders",
    every=timedelta(minutes=10),
    timeout=timedelta(minutes=8),
    min_duration=timedelta(0),
    retry_after=timedelta(seconds=30),
)
async def archive_orders(run: Run) -> str:
    """Mark orders older than 30 days as archived, 500 at a time."""
    state = run.resumed or {"last_id": 0, "archived": 0}
    while True:
        async with run.transaction() as connection:
            (row,) = await connection.fetch(ARCHIVE, state["last_id"], 500)
            if row["last_id"] is None:
                return f"archived {state['archived']} orders"
            state = {"last_id": row["last_id"], "archived": state["archived"] + row["archived"]}
            await run.checkpoint(state)
        run.progress(state["archived"], note=f"up to order {state['last_id']}")


@job(
    name="report-orders",
    cron="0 6 * * *",
    tz="Europe/Berlin",
    timeout=timedelta(minutes=5),
    min_duration=timedelta(0),
)
def report_orders(run: ThreadRun) -> str:
    """Count the orders of the last 24 hours, every morning."""
    with run.transaction() as connection:
        connection.execute(REPORT, run.due_at)
        (row,) = connection.fetch("SELECT orders FROM acme_reports WHERE due_at = $1", run.due_at)
    run.log.info("reported", orders=row["orders"])
    return f"{row['orders']} orders"
