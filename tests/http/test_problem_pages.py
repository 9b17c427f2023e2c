"""Problems are pages in a browser, and JSON for programs; no page repeats what was sent as HTML."""

import re
from collections.abc import AsyncIterator
from html import unescape
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser
from starlette.requests import Request

import balance_app.main  # noqa: F401 - with it every problem is known
from balance_app.errors import (
    PROBLEM_JSON,
    InternalError,
    InvalidRequest,
    Problem,
    all_problems,
    explain,
)
from balance_app.http import problem_pages
from balance_app.http.negotiation import prefers_html
from tests.access.keyring import keys_are_needed, make_key
from tests.balances.hostile import one_instance
from tests.processes import Instance, http_client
from tests.system.databases import freeze, own_postgres, thaw
from tests.web.browser import chromium, tab
from tests.web.site import Tags, text

CHROMIUM: Final = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"
PAGES: Final = {
    "/nowhere": (404, "There is nothing at this address."),
    "/api/nowhere": (404, "There is nothing at this address."),
    "/docs/assets/none.css": (404, "There is nothing at this address."),
    "/problems/none": (404, "There is no such problem."),
    "/api/users/99": (404, "There is no user 99."),
    "/api/users/1.5": (422, "userId must be an integer, without decimals."),
    "/api/users/1?befor=2": (422, 'Unknown query parameter "befor". Known: at, version.'),
    "/api/users?limit=0": (422, "limit must be at least 1."),
    "/api/users?limit=0&after=x": (422, "after must be an integer, without decimals."),
    "/api/balance": (405, "This address does not take this method, only POST."),
    "/api/cron/history?outcome=odd": (422, "outcome must be the outcome of a run"),
}


@pytest.fixture(scope="module")
async def instance(postgres: dict[str, str]) -> AsyncIterator[Instance]:
    """One instance for the whole file."""
    async with one_instance(postgres) as (running, _):
        yield running


@pytest.fixture
async def people(instance: Instance) -> AsyncIterator[httpx.AsyncClient]:
    """A client that accepts what a browser does."""
    async with http_client(instance.url) as client:
        client.headers["Accept"] = CHROMIUM
        yield client


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests here."""
    async with chromium() as running:
        yield running


@pytest.mark.parametrize("path", PAGES)
async def test_a_browser_gets_a_page(people: httpx.AsyncClient, path: str) -> None:
    """With status, sentence, what to do, a link to the explanation, and one home."""
    status, sentence = PAGES[path]
    answer = await people.get(path)
    assert (answer.status_code, answer.headers["vary"]) == (status, "Accept")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["cache-control"] == "no-store"
    assert sentence in text(answer.text)
    assert "What to do" in answer.text
    links = {given.get("href") for tag, given in Tags(answer.text).found if tag == "a"}
    code = re.search(r"<code>([a-z-]+)</code></p>\n<h1>", answer.text)
    assert code is not None
    assert {"/", f"/problems/{code[1]}"} <= links
    explained = await people.get(f"/problems/{code[1]}")
    assert explained.status_code == 200


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize(
    "accept",
    [
        *("*/*", None, "application/json", "application/problem+json, text/html;q=0.9"),
        *("text/html;q=0.5, */*", "text/html;q=0", "text/plain", "application/json, text/html"),
    ],
)
async def test_a_program_gets_json(instance: Instance, path: str, accept: str | None) -> None:
    """Whoever does not prefer HTML, as curl."""
    async with http_client(instance.url) as client:
        del client.headers["accept"]
        answer = await client.get(path, headers={} if accept is None else {"Accept": accept})
    status, _ = PAGES[path]
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM_JSON)
    assert answer.headers["vary"] == "Accept"
    assert answer.json()["code"]


async def test_a_problem_of_a_page_is_json_for_a_program(people: httpx.AsyncClient) -> None:
    """A person gets it within the pages that lead there."""
    for path, status in {"/jobs/none": 404, "/users/x": 422}.items():
        page = await people.get(path)
        assert page.status_code == status
        assert page.headers["content-type"].startswith("text/html")
        answer = await people.get(path, headers={"Accept": "*/*"})
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM_JSON)


async def test_a_change_is_answered_as_json_whatever_is_accepted(
    people: httpx.AsyncClient,
) -> None:
    """What changes something under /api is sent by programs; its answers stay the same bytes."""
    answer = await people.post("/api/balance", json={"userId": 1, "amount": 0})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM_JSON)


def test_html_is_preferred_as_the_weights_say() -> None:
    """The most precise range counts; `*/*` prefers neither, and nonsense is no preference."""
    for accept, expected in {
        CHROMIUM: True,
        "text/html": True,
        "TEXT/HTML": True,
        "text/*": True,
        "text/html;q=0.2, application/json;q=0.1": True,
        "application/json;q=0.5, text/html;q=0.6, application/problem+json;q=0.6": False,
        "text/html, application/json": False,
        "*/*": False,
        "": False,
        "text/html;q=poison": False,
        "text/html;q=0": False,
        "text/*;q=0, */*": False,
    }.items():
        assert prefers_html(_request(accept)) is expected, accept


@pytest.mark.parametrize("kind", list(all_problems()), ids=lambda kind: kind.code)
async def test_every_kind_is_explained_to_people(
    people: httpx.AsyncClient, kind: type[Problem]
) -> None:
    """What it means, what to do, and an example as a program gets it; the list links to it."""
    page = _dense(text((await people.get(f"/problems/{kind.code}")).text))
    for part in (kind.title, *explain(kind), f'"code": "{kind.code}"'):
        assert _dense(part) in page
    assert f'href="/problems/{kind.code}"' in (await people.get("/problems")).text


HOSTILE: Final = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


async def test_nothing_of_the_address_becomes_html(people: httpx.AsyncClient) -> None:
    """Not in paths, queries or headers; and the policy allows no script."""
    for path in ("/api/users/{}", "/api/users?{}=1", "/{}", "/problems/{}", "/jobs/{}"):
        answer = await people.get(path.format(quote(HOSTILE, safe="")))
        assert answer.status_code in {404, 422}
        tags = {tag for tag, given in Tags(answer.text).found if "onerror" in given}
        assert not tags
        assert "alert(1)" not in re.sub(r"<script src=[^>]*>", "", answer.text)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy or "default-src 'self'" in policy
        assert "unsafe" not in policy


def test_what_a_problem_says_is_escaped() -> None:
    """Control: the sentence, its members and the sentences of faults."""
    problem = InvalidRequest(("/a", "zero"), sentence=HOSTILE)
    page = bytes(problem_pages.answer(_request("text/html"), problem).body).decode()
    assert "<script>" not in page
    assert "<img" not in page
    assert HOSTILE in unescape(page)


def test_a_failure_of_the_service_is_a_page_too() -> None:
    """With the request's id, and a way to try again."""
    answer = problem_pages.answer(_request("text/html"), InternalError())
    assert answer.status_code == 500
    assert "Try again" in bytes(answer.body).decode()


async def test_without_a_key_one_may_log_in(database: dict[str, str], browser: Browser) -> None:
    """An address of programs, opened in a browser: it says so, and goes on after the login."""
    async with (
        Instance(database, JOBS_ENABLED="false") as running,
        tab(browser, running.url) as page,
    ):
        key = await make_key(database, "read")
        await keys_are_needed(running.url)
        await page.goto("/api/users/1?version=1")
        assert "401" in await page.inner_text("main")
        await page.get_by_role("link", name="Log in").click()
        await page.get_by_label("Key").fill(key.text)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/api/users/1?version=1")
        assert '"balance"' in await page.inner_text("body")


async def test_while_the_database_is_unavailable_it_is_a_page() -> None:
    """503 with Retry-After, in a browser with a way to try again."""
    async with (
        own_postgres() as server,
        Instance(server.environment(), JOBS_ENABLED="false") as running,
        http_client(running.url) as client,
    ):
        client.headers["Accept"] = CHROMIUM
        await freeze(server)
        try:
            answer = await client.get("/api/users/1")
        finally:
            await thaw(server)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "Try again" in answer.text
        assert "Database unavailable" in text(answer.text)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
async def test_axe_finds_nothing(
    instance: Instance,
    browser: Browser,
    theme: Any,  # noqa: ANN401
    width: int,
) -> None:
    """No violation, contrast included, and nothing is cut off; the style passes the policy."""
    size = {"width": width, "height": 700}
    async with tab(browser, instance.url, color_scheme=theme, viewport=size) as page:
        for path in (*PAGES, "/problems", "/problems/insufficient-funds"):
            await page.goto(path)
            found = await Axe().run(page)
            assert found.violations_count == 0, (path, found.generate_report())
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, path
            ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(16, 18, 21)" if theme == "dark" else "rgb(247, 247, 245)")


def _dense(text: str) -> str:
    return re.sub(r"[\s`]", "", text)


def _request(accept: str) -> Request:
    return Request(
        {
            "type": "http",
            "method": "GET",
            "path": "/",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"accept", accept.encode())],
        }
    )
