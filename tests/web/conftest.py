"""One site for all tests of a file, without jobs at the start of each test."""

from collections.abc import AsyncIterator

import pytest

from tests.web.site import Site
from tests.web.site import site as run_site


@pytest.fixture(scope="module")
async def shared(postgres: dict[str, str]) -> AsyncIterator[Site]:
    """An instance with JOBS_ENABLED=false, for a whole file."""
    async with run_site(postgres) as running:
        yield running


@pytest.fixture
async def site(shared: Site) -> Site:
    """The shared site, without jobs, runs and instances."""
    await shared.clear()
    return shared
