"""However many actions there are, a page of them is read from few pages of the table."""

from collections.abc import AsyncIterator
from typing import Final, cast

import pytest

from balance_app.access import actions
from balance_app.access.actions import ActionRepository
from balance_app.db.pool import KEEP_TO_INDEX, Database
from balance_app.http.body import MAX_INTEGER
from tests.explaining import OneConnection, both_plans, bounded, explaining
from tests.jobs.rows import Connection, migrated
from tests.processes import empty_database

# One principal did almost all, most of it to users of their own; another one did little, long ago.
MANY: Final = """
INSERT INTO actions (by, action, subject)
SELECT CASE WHEN n <= 5 THEN 'rare' WHEN n % 4 > 0 THEN 'busy' END, 'user created',
       CASE WHEN n <= 5 THEN 'job moon' ELSE 'user ' || n END
FROM generate_series(1, 200000) AS n
"""
STATISTICS: Final = {
    "none": "UPDATE pg_class SET reltuples = -1 WHERE oid = 'actions'::regclass",
    "fresh": "ANALYZE actions",
}
FILTERS: Final = [
    *((None, None), ("busy", None), ("rare", None), ("nobody", None), (None, "job moon")),
    *((None, "user 77777"), ("rare", "job moon"), ("busy", "job moon"), (None, "zz")),
]
PAGES: Final = 40


@pytest.fixture(scope="module")
async def many(postgres: dict[str, str]) -> AsyncIterator[Connection]:
    """A connection to a database with many actions."""
    async with empty_database(postgres) as database, migrated(database) as (_, connection):
        await connection.execute(MANY)
        yield connection


@both_plans
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("before", [MAX_INTEGER, 1000])
async def test_a_page_is_read_from_an_index(
    many: Connection, mode: str, statistics: str, before: int
) -> None:
    """Each filter has its own index, whatever the planner knows of the table."""
    async with explaining(many, mode, "actions") as connection:
        await many.execute(STATISTICS[statistics])
        repository = ActionRepository(cast("Database", OneConnection(connection)))
        for by, subject in FILTERS:
            await repository.page(by=by, subject=subject, before=before, limit=20)
        bounded(connection.touched, PAGES)
        assert len(connection.touched) == len(FILTERS)


async def test_an_order_by_ids_alone_reads_the_table(
    many: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a filter of few rows is then looked for through all others."""
    sql = """
    SELECT id, at, by, action, subject, before, after FROM actions
    WHERE id < $1 AND by || '' = $3 ORDER BY id DESC LIMIT $2
    """
    monkeypatch.setitem(actions.PAGES, (False, True), sql)
    async with explaining(many, "force_custom_plan", "actions") as connection:
        await connection.fetch(KEEP_TO_INDEX)
        repository = ActionRepository(cast("Database", OneConnection(connection)))
        await repository.page(by="rare", subject=None, before=MAX_INTEGER, limit=20)
        with pytest.raises(AssertionError, match="pages by"):
            bounded(connection.touched, PAGES)
