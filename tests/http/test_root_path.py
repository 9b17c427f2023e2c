"""Behind a proxy that serves it below a path prefix, every URL of the service has the prefix."""

import asyncio
import re
from collections.abc import AsyncIterator
from html import unescape

import httpx
import pytest

from balance_app.jobs.job import Registry
from balance_app.main import create_app
from balance_app.settings import OWN_PATHS, BadSettingsError, load_settings
from tests.jobs.rows import add_job
from tests.processes import Instance, connect, http_client
from tests.web.test_stream import watch_once

ROOT = "/ledger/v1"
# They answer POST alone.
FORMS = ("/change", "/run", "/pause", "/resume", "/schedule", "/reset")
ADDRESS = re.compile(
    r"""(?:href|src|action|formaction|data-stream|url)\s*[=:]\s*["'](/[^"']*)["']"""
)


@pytest.fixture
async def proxied(database: dict[str, str]) -> AsyncIterator[Instance]:
    """An instance behind a proxy that strips the prefix, or does not."""
    async with Instance(database, JOBS_ENABLED="false", ROOT_PATH=ROOT) as running:
        connection = await connect(database)
        await add_job(connection, "job-a")
        await connection.close()
        yield running


@pytest.mark.parametrize("sent", ["", ROOT], ids=["stripped", "kept"])
async def test_every_address_follows_the_prefix(proxied: Instance, sent: str) -> None:
    """Links, forms, files and streams of pages; `Location`, problem types, the documentation."""
    async with http_client(proxied.url + sent) as client:
        pages = ("/", "/jobs", "/jobs/job-a", "/jobs/job-a/cancel", "/docs", "/jobs/nothing")
        for page in (*pages, "/users", "/users/1"):
            answer = await client.get(page, headers={"Accept": "text/html"})
            addresses = {unescape(each) for each in ADDRESS.findall(answer.text)}
            assert len(addresses) >= 4, (page, addresses)
            for address in addresses:
                assert address == ROOT or address.startswith(f"{ROOT}/"), (page, address)
                assert not address.startswith(ROOT + ROOT), (page, address)
                if "/live" in address or address.endswith(FORMS):
                    continue
                own = address if sent else address.removeprefix(ROOT)
                found = await client.get(f"{proxied.url}{own}")
                assert found.status_code in {200, 404 if "nothing" in own else 200}, address
        html = "".join((await watch_once(proxied.url + sent)).values())
        assert f'href="{ROOT}/jobs/job-a"' in html
        assert 'href="/jobs' not in html
        opened = await client.post("/api/users", json={"balance": 7})
        assert opened.headers["location"] == f"{ROOT}/api/users/{opened.json()['userId']}"
        changed = await client.post("/api/balance", json={"userId": 1, "amount": -2})
        assert changed.status_code == 200
        refused = await client.get("/api/users/0")
        assert refused.json()["type"] == f"{ROOT}/problems/invalid-request"
        about = (await client.get("/problems/overloaded")).json()
        assert about["type"] == f"{ROOT}/problems/overloaded"
        document = (await client.get("/openapi.json")).json()
        assert document["servers"] == [{"url": ROOT}]
        assert f"({ROOT}/problems)" in document["info"]["description"]
        assert (await client.delete("/api/users/1")).headers["allow"] == "GET, HEAD, PATCH"
        assert (await client.head("/")).status_code == 200
        steered = await client.post(
            "/jobs/job-a/pause",
            data={"by": "ada"},
            headers={"Referer": f"http://a{ROOT}/jobs/job-a"},
        )
        assert (steered.status_code, steered.headers["location"].partition("?")[0]) == (
            303,
            f"{ROOT}/jobs/job-a",
        )


async def test_without_a_prefix_addresses_begin_at_the_root(client: httpx.AsyncClient) -> None:
    """Control: and the prefix of another service is not found."""
    assert (await client.get(f"{ROOT}/livez")).status_code == 404


@pytest.mark.parametrize(
    "wrong", ["ledger", "/", "/ledger/", "//x", "/a b", "/a?b", "/é", "http://x/y"]
)
def test_an_invalid_prefix_is_refused(wrong: str) -> None:
    """The message names the setting and its form."""
    with pytest.raises(BadSettingsError, match="ROOT_PATH: must be a path"):
        load_settings(root_path=wrong)


def test_a_prefix_can_not_begin_like_a_route() -> None:
    """Otherwise it would be ambiguous whether the proxy has stripped it."""
    middleware = create_app(load_settings(), asyncio.Event(), Registry([]))
    paths = _paths(middleware.app.routes)
    assert {path.split("/")[1] for path in paths} - {""} == OWN_PATHS
    with pytest.raises(BadSettingsError, match="ROOT_PATH: must not begin"):
        load_settings(root_path="/api/x")


def _paths(routes: object) -> set[str]:
    found: set[str] = set()
    for route in routes:  # type: ignore[attr-defined]
        inside = getattr(route, "original_router", None) or getattr(route, "router", None)
        if inside is not None:
            found |= _paths(inside.routes)
        elif hasattr(route, "path"):
            found.add(route.path)
    return found
