"""How a job processes many rows: in batches, each one bounded transaction.

The cost of a batch's statement must depend only on its number of rows, however large the tables are
and whatever the planner's statistics. So rows are found by LATERAL with a LIMIT or by an array of
keys: neither can become a scan of a whole table.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple, Protocol

from balance_app.db.pool import Connection

State = dict[str, Any]
Batch = Callable[[Connection, State, int], Awaitable[State]]

BATCHES: Final = 24  # at least, if there are as many rows, so that progress is visible
FIRST_ID: Final = -(2**63)

# The approximate number of rows: counted up to 10000, above that as ANALYZE estimated.
USERS: Final = """
SELECT greatest(
    (SELECT count(*) FROM (SELECT FROM users LIMIT 10000) AS first_ones),
    (SELECT reltuples FROM pg_class WHERE oid = 'users'::regclass)
)::bigint
"""


class MissingRightError(Exception):
    """The role lacks rights without which the job would see less than it reports on."""

    def __init__(self, *missing: str) -> None:
        super().__init__(
            f"the role of this instance lacks {', '.join(missing)}: run `balance-app migrate` as "
            "the owner of the tables, or see docs/production.md"
        )


class Rows(NamedTuple):
    """The rows that a job processes."""

    unit: str
    # a statement that returns their approximate number
    total: str
    # the most rows of a batch
    most: int
    # of `total`
    arguments: tuple[object, ...] = ()


class Steps(Protocol):
    """What batches need of a `Run`."""

    @property
    def resumed(self) -> Any:  # noqa: ANN401 - any JSON
        """The state of a run before, to go on from."""

    def transaction(self) -> AbstractAsyncContextManager[Connection]:
        """Open the transaction of a batch."""

    async def checkpoint(self, state: object) -> None:
        """Store the state after it."""

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report it."""

    async def pace(self) -> None:
        """Wait before the next batch."""


async def in_batches(run: Steps, batch: Batch, start: State, rows: Rows) -> State:
    """Process batches until the state that `batch` returns has `ended`; return that state.

    Each batch and its state are one transaction, so a run that is interrupted continues after the
    last batch that was committed.

    Args:
        run: the run of the job.
        batch: gets the number of rows to process, and returns the members of the state that it
            changes; `done` is the number that it adds.
        start: the state before the first batch, as JSON.
        rows: the rows to process.
    """
    state: State = {**start, "done": 0, "total": None, "ended": False}
    # Another version may have stored a different state; then the run starts from the beginning.
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
    """Return a number with its thousands separated: 12 000."""
    return f"{value:,}".replace(",", " ")


def count(value: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: 1 entry, 12 000 entries."""
    return f"{number(value)} {one if value == 1 else many or one + 's'}"
