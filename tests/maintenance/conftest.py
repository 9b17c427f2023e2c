"""A migrated database on which the test runs the jobs."""

from collections.abc import AsyncIterator

import pytest

from balance_app.db.pool import Database
from balance_app.settings import load_settings
from tests.maintenance.runner import JobRunner
from tests.processes import as_instance, connect


@pytest.fixture
async def runner(database: dict[str, str]) -> AsyncIterator[JobRunner]:
    settings = load_settings(
        **{name.lower(): value for name, value in as_instance(database).items()}
    )
    pool = Database(settings)
    await pool.start()
    connection = await connect(database)
    runner = JobRunner(pool, connection)
    await runner.declare()
    try:
        yield runner
    finally:
        await pool.stop()
        await connection.close()
