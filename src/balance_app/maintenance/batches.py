"""How a job works through many rows: in batches, each one bounded transaction.

A batch's statement must stay as small as its number of rows, however large the tables are and
whatever the planner knows of them. So rows are looked up by LATERAL with a LIMIT, or by an array of
keys: neither can become a scan of a whole table.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from balance_app.db.pool import Connection
from balance_app.jobs.run import Run

State = dict[str, Any]
Batch = Callable[[Connection, State, int], Awaitable[State]]

BATCHES: Final = 24  # at least, where there are as many rows: so that progress is visible
FIRST_ID: Final = -(2**63)

# How many rows there are, roughly: counted as far as that is cheap, then as ANALYZE estimated.
USERS: Final = """
SELECT greatest(
    (SELECT count(*) FROM (SELECT FROM users LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'users'::regclass)
)::bigint
"""


class Rows(NamedTuple):
    """What a job goes through."""

    unit: str
    # a statement that returns how many there are, roughly
    total: str
    # no batch takes more
    most: int
    # of `total`
    arguments: tuple[object, ...] = ()


async def in_batches(run: Run, batch: Batch, start: State, rows: Rows) -> State:
    """Process batches until the state that `batch` returns has `ended`; return that state.

    Each batch and the state that it leaves are one transaction: a run that is cut goes on behind
    the last batch that took place. `batch` gets the number of rows to take.

    Args:
        run: what the job was given.
        batch: returns the members of the state that it changes; `done` is what it adds.
        start: the state before the first batch, as JSON.
        rows: what the batches go through.
    """
    state: State = {**start, "done": 0, "total": None, "ended": False}
    # Another version of the program may have left another state: then from the start.
    if isinstance(run.resumed, dict) and run.resumed.keys() == state.keys():
        state = run.resumed
    while not state["ended"]:
        async with run.transaction() as connection:
            if state["total"] is None:
                state = {**state, "total": await connection.fetchval(rows.total, *rows.arguments)}
            size = min(rows.most, max(1, -(-state["total"] // BATCHES)))
            changed = await batch(connection, state, size)
            done = state["done"] + changed["done"]
            state = {**state, **changed, "done": done, "total": max(done, state["total"])}
            await run.checkpoint(state)
        run.progress(done, done if state["ended"] else state["total"], rows.unit)
        await run.pace()
    return state


def number(value: int) -> str:
    """Return a number with its thousands apart: 12 000."""
    return f"{value:,}".replace(",", " ")


def count(value: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: 1 entry, 12 000 entries."""
    return f"{number(value)} {one if value == 1 else many or one + 's'}"
