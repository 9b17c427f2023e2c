"""The application in the process of the test, and clients that seem to be at any address."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from balance_app.http.middleware import RequestMiddleware
from balance_app.jobs.job import Registry
from balance_app.main import create_app
from balance_app.settings import load_settings
from tests.processes import as_instance


@asynccontextmanager
async def serving(database: dict[str, str], **settings: Any) -> AsyncIterator[RequestMiddleware]:  # noqa: ANN401 - of any kind
    """Run the application in this process."""
    of_database = {name.lower(): value for name, value in as_instance(database).items()}
    app = create_app(
        load_settings(**of_database, jobs_enabled=False, **settings), asyncio.Event(), Registry([])
    )
    async with app.app.router.lifespan_context(app.app):
        yield app


def client_at(app: RequestMiddleware, address: str) -> httpx.AsyncClient:
    """Return a client with this address: wrong keys are counted by address."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://localhost"
    )


async def keys_are_asked_for(app: RequestMiddleware) -> None:
    """Wait until the application has noticed that there is a key."""
    async with client_at(app, "10.255.0.1") as client:
        while (await client.get("/api/users")).status_code != 401:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)
