"""Instances that start together on an empty database."""

import asyncio
import time

import pytest

from balance_app.db.migrations import alembic_head
from tests.processes import Instance, connect, http_client, running
from tests.system.sizes import size

INSTANCES = 8
STARTS = size(small=2, full=20)


@pytest.mark.parametrize("turn", range(1, STARTS + 1))
async def test_eight_instances_start_at_once(database: dict[str, str], turn: int) -> None:
    """All become ready, and the database was migrated exactly once."""
    instances = [Instance(database, f"app{turn}-{number}") for number in range(1, INSTANCES + 1)]
    async with running(instances), http_client(timeout=5) as http:
        answers = await asyncio.gather(
            *(http.get(f"{instance.url}/health") for instance in instances)
        )
        assert [answer.status_code for answer in answers] == [200] * INSTANCES
        assert all(
            instance.process and instance.process.returncode is None for instance in instances
        )
        connection = await connect(database)
        try:
            users = await connection.fetch("SELECT id, balance, version FROM users")
            entries = await connection.fetch("SELECT user_id, version, amount FROM entries")
            revisions = await connection.fetch("SELECT version_num FROM balance_app_version")
        finally:
            await connection.close()
    assert [tuple(user) for user in users] == [(1, 10_000, 1)]
    assert [tuple(entry) for entry in entries] == [(1, 1, 10_000)]
    assert [tuple(revision) for revision in revisions] == [(alembic_head(),)]


async def test_without_the_lock_some_instances_fail(database: dict[str, str]) -> None:
    """The control: instances that migrate at the same time without the lock exit with errors."""
    mutant = ("-m", "tests.mutants", "migration-lock")
    moment = str(time.time() + 12)  # all have started by then
    instances = [
        Instance(database, f"app{number}", program=mutant, MIGRATE_AT=moment)
        for number in range(1, INSTANCES + 1)
    ]
    try:
        for instance in instances:
            await instance.launch()
        started = await asyncio.gather(
            *(instance.ready() for instance in instances), return_exceptions=True
        )
        assert any(isinstance(each, AssertionError) for each in started)
    finally:
        await asyncio.gather(*(instance.stop() for instance in instances))
