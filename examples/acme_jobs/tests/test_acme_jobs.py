"""Needs an empty PostgreSQL database, DATABASE_URL, and no service."""

import asyncio
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import entry_points
from typing import Any

import asyncpg
import pytest
from acme_jobs import archive_orders, report_orders

from balance_app.jobs.testing import run_once

TABLES = """
DROP TABLE IF EXISTS acme_orders, acme_reports;
CREATE TABLE acme_orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    placed_at timestamptz NOT NULL,
    archived boolean NOT NULL DEFAULT false
);
CREATE TABLE acme_reports (due_at timestamptz PRIMARY KEY, orders bigint NOT NULL);
INSERT INTO acme_orders (placed_at)
SELECT clock_timestamp() - number * interval '1 hour' FROM generate_series(1, 1200) AS number
"""
ARCHIVED = "SELECT count(*) FROM acme_orders WHERE archived"


def ask(method: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the statement returns
    """Call a method of a connection."""

    async def call() -> Any:  # noqa: ANN401
        connection = await asyncpg.connect(os.environ["DATABASE_URL"])
        try:
            return await getattr(connection, method)(*arguments)
        finally:
            await connection.close()

    return asyncio.run(call())


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    ask("execute", TABLES)
    yield
    ask("execute", "DROP TABLE acme_orders, acme_reports")


def test_old_orders_are_archived() -> None:
    """Those of the last 30 days stay; a second run finds nothing more."""
    record = asyncio.run(run_once(archive_orders))
    assert (record.outcome, record.result) == ("succeeded", "archived 481 orders")
    assert ask("fetchval", ARCHIVED) == 481
    assert asyncio.run(run_once(archive_orders)).result == "archived 0 orders"


def test_a_run_that_was_lost_goes_on() -> None:
    """From the checkpoint of the last batch that was committed."""
    resumed = {"last_id": 1000, "archived": 281}
    record = asyncio.run(run_once(archive_orders, resumed=resumed))
    assert record.result == "archived 481 orders"
    assert ask("fetchval", ARCHIVED) == 200


def test_a_tick_has_one_report() -> None:
    """However often it is tried."""
    due_at = datetime.now(UTC).replace(microsecond=0)
    for _ in range(2):
        record = asyncio.run(run_once(report_orders, due_at=due_at))
        assert (record.outcome, record.result) == ("succeeded", "24 orders")
    assert ask("fetchval", "SELECT count(*) FROM acme_reports") == 1


def test_the_package_names_its_jobs() -> None:
    """Instances find them where it is installed."""
    (point,) = (each for each in entry_points(group="balance_app.jobs") if each.name == "acme")
    assert point.load().archive_orders is archive_orders
