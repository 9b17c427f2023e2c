"""How a job goes through many rows: one bounded transaction after the other.

A step's statement must stay as small as its number of rows, however large the tables are and
whatever the planner knows of them. So rows are looked up by LATERAL with a LIMIT, or by an array of
keys: neither can become a scan of a whole table.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from balance_app.db.pool import Connection
from balance_app.jobs.run import Run

State = dict[str, Any]
Step = Callable[[Connection, State, int], Awaitable[State]]

STEPS: Final = 24  # at least, where there are as many rows: progress is something to look at
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
    # no step takes more
    most: int


async def in_steps(run: Run, step: Step, start: State, rows: Rows) -> State:
    """Run `step` until the state it returns says `ended`; return that state.

    Each step and the state that it leaves are one transaction: a run that is cut goes on behind
    the last step that took place. A step is told how many rows to take.

    Args:
        run: what the job was given.
        step: returns the members of the state that it changes; `done` is what it adds.
        start: the state before the first step, as JSON.
        rows: what the steps go through.
    """
    state: State = {**start, "done": 0, "total": None, "ended": False}
    # Another version of the program may have left another state: then from the start.
    if isinstance(run.resumed, dict) and run.resumed.keys() == state.keys():
        state = run.resumed
    while not state["ended"]:
        async with run.transaction() as connection:
            if state["total"] is None:
                state = {**state, "total": await connection.fetchval(rows.total)}
            size = min(rows.most, max(1, -(-state["total"] // STEPS)))
            changed = await step(connection, state, size)
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
