"""How many pages of a large table each statement of the service reads.

Every statement is explained as the service's own code sends it, with a custom and with a generic
plan, as asyncpg's prepared statements may get either.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, cast

import asyncpg
import pytest

from tests.jobs.support import Connection

both_plans = pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])


class Explaining:
    """A connection that explains each statement with EXPLAIN (ANALYZE) before it runs it."""

    def __init__(self, connection: Connection, mode: str, table: str) -> None:
        self._connection = connection
        self._mode = mode
        self._table = table
        # for each statement that reads the table: its text, the pages it touched, its plan
        self.touched: list[tuple[str, int, str]] = []

    async def fetch(self, sql: str, *arguments: object) -> list[Any]:
        await self._explain(sql, arguments)
        return cast("list[Any]", await self._connection.fetch(sql, *arguments))

    async def fetchrow(self, sql: str, *arguments: object) -> Any:  # noqa: ANN401 - a row
        await self._explain(sql, arguments)
        return await self._connection.fetchrow(sql, *arguments)

    def transaction(self, **_options: object) -> Any:  # noqa: ANN401 - a context manager
        return self._connection.transaction()

    async def _explain(self, sql: str, arguments: tuple[object, ...]) -> None:
        if self._table not in sql:
            return
        given = f"({', '.join(map(_literal, arguments))})" if arguments else ""
        await self._connection.execute(
            f"SAVEPOINT explained; SET LOCAL plan_cache_mode = {self._mode}; "
            f"PREPARE explained AS {sql}"
        )
        plan = await self._connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained{given}"
        )
        await self._connection.execute("ROLLBACK TO explained; DEALLOCATE explained")
        root = json.loads(plan)[0]["Plan"]
        pages = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        # Pages read for planning do not depend on the table's size.
        self.touched.append((sql, pages, plan))


class OneConnection:
    """A stand-in for the pool: runs all operations on one connection."""

    def __init__(self, connection: Explaining) -> None:
        self._connection = connection

    async def run(
        self,
        operation: Callable[[Any], Awaitable[object]],
        *,
        priority: bool = False,  # noqa: ARG002 - nothing waits
        lane: object = None,  # noqa: ARG002 - the same
    ) -> object:
        return await operation(self._connection)

    async def replication(self) -> None:
        """Say that nothing is known of standbys."""


def _literal(value: object) -> str:
    """Return an argument as an SQL literal, typed by its parameter."""
    if value is None:
        return "NULL"
    if isinstance(value, list) and value and isinstance(value[0], asyncpg.Range):
        return _literal(f"{{{','.join(f'[{each.lower},{each.upper})' for each in value)}}}")
    if isinstance(value, list | tuple):
        items = ",".join(json.dumps(_text(item), ensure_ascii=False) for item in value)
        return _literal(f"{{{items}}}")
    return "'" + _text(value).replace("'", "''") + "'"


def _text(value: object) -> str:
    if isinstance(value, timedelta):
        return f"{value.total_seconds()} s"
    return value.isoformat() if isinstance(value, datetime) else str(value)


@asynccontextmanager
async def explaining(connection: Connection, mode: str, table: str) -> AsyncIterator[Explaining]:
    """Yield a connection that explains; all its changes are rolled back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield Explaining(connection, mode, table)
    finally:
        await transaction.rollback()


def bounded(touched: Iterable[tuple[str, int, str]], pages: int) -> None:
    """Check that each statement touched at most this many pages."""
    touched = list(touched)
    assert touched
    for sql, number, plan in touched:
        assert number <= pages, f"{number} pages by {sql}\n{plan}"
