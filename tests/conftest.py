"""Shared fixtures: one real PostgreSQL, an empty database per test, instances and clients."""

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Final

import alembic.command  # noqa: F401 - a migration imports it: not in a test's time
import httpx
import pytest

from balance_app.db.migrations import migrate
from balance_app.settings import load_settings
from tests import fork_server
from tests.jobs.support import JobsDatabase
from tests.pooler import pooled_if_wanted
from tests.processes import DATABASE_VARIABLES, Instance, empty_database, http_client, kept_logs
from tests.system.databases import own_postgres


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that parallel workers finish together."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/system/", "tests/jobs/")))


@pytest.fixture(scope="session", autouse=True)
def _no_secret_is_logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Search the logs of all instances for keys, sessions and passwords, after the last test."""
    kept_logs.directory = tmp_path_factory.mktemp("logs")
    yield
    assert kept_logs.secrets() == []
    shutil.rmtree(kept_logs.directory)


@pytest.fixture(scope="session")
async def _fork_server() -> AsyncIterator[None]:
    """The fork server for the instances of tests, unless a test starts them otherwise."""
    async with fork_server.run():
        yield


@pytest.fixture(scope="session")
async def postgres(_fork_server: None) -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of a PostgreSQL: the configured one, or an embedded one."""
    configured = {name: os.environ[name] for name in DATABASE_VARIABLES if os.environ.get(name)}
    if "DB_HOST" in configured:
        yield configured
        return
    async with own_postgres(max_connections="200") as server:
        environment = server.environment()
        async with pooled_if_wanted(environment):
            yield environment


# Each migrates its database before the test begins.
MIGRATING: Final = {"instance", "runner", "rows"}


@pytest.fixture(scope="session")
async def _migrated(postgres: dict[str, str]) -> AsyncIterator[str]:
    """The name of a migrated database that nobody uses."""
    async with empty_database(postgres) as variables:
        await migrate(load_settings(**{key.lower(): value for key, value in variables.items()}))
        yield variables["DB_NAME"]


@pytest.fixture
async def database(
    request: pytest.FixtureRequest, postgres: dict[str, str], _migrated: str
) -> AsyncIterator[dict[str, str]]:
    """The DB_* variables of an empty database; for what migrates it at once, a migrated one's."""
    template = _migrated if MIGRATING & set(request.fixturenames) else "template1"
    async with empty_database(postgres, template) as variables:
        yield variables


@pytest.fixture
async def instance(database: dict[str, str]) -> AsyncIterator[Instance]:
    """One running instance of the service on an empty database, without jobs."""
    async with Instance(database, JOBS_ENABLED="false") as running:
        yield running


@pytest.fixture
async def client(instance: Instance) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of `instance`."""
    async with http_client(instance.url) as client:
        yield client


@pytest.fixture
async def jobs_db(shared_jobs_db: JobsDatabase) -> AsyncIterator[JobsDatabase]:
    """The database of a file's `shared_jobs_db`, without the rows of earlier tests."""
    await shared_jobs_db.forget()
    yield shared_jobs_db
    await shared_jobs_db.close()
