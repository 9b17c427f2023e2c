"""The OpenAPI document and the page at `/docs`: addresses, ids, tags, samples that run, themes."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from shutil import which
from typing import Any, Final

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page

from balance_app.http.samples import ADDRESS
from tests.access.keyring import keys_are_needed, make_key
from tests.balances.hostile import one_instance
from tests.jobs.rows import add_job
from tests.processes import Instance, connect, http_client
from tests.web.browser import chromium, says, tab

ENDLESS: Final = "watch_status"
# What samples name and an empty database has not, is not there; nothing of them is malformed.
MISSING: Final = {"200", "201", "202", "404", "409"}

# Runs a sample until it has logged something; returns that.
CONSOLE: Final = """
async () => {
  const said = [];
  const console = { log: (...each) => said.push(each) };
  SOURCE
  while (!said.length) await new Promise((resolve) => setTimeout(resolve, 20));
  return said[0];
}
"""


@pytest.fixture(scope="module")
async def instance(postgres: dict[str, str]) -> AsyncIterator[Instance]:
    """One instance for the whole file, with a job."""
    async with one_instance(postgres) as (running, database):
        connection = await connect(database)
        await add_job(connection, "audit-ledger")
        await connection.close()
        yield running


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests here."""
    async with chromium() as running:
        yield running


async def document(url: str, **headers: str) -> dict[str, Any]:
    """Read the OpenAPI document."""
    async with http_client(url) as client:
        found: dict[str, Any] = (await client.get("/openapi.json", headers=headers)).json()
    return found


def operations(of: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each operation."""
    for methods in of["paths"].values():
        yield from methods.values()


def sample(operation: dict[str, Any], label: str) -> str:
    """Return an operation's sample."""
    (source,) = (each["source"] for each in operation["x-codeSamples"] if each["label"] == label)
    return str(source)


async def test_examples_have_the_address_that_serves_them(instance: Instance) -> None:
    """In the introduction and in every sample; one that is no host's name is not repeated."""
    found = await document(instance.url)
    assert f"{instance.url}/api/balance" in found["info"]["description"]
    for operation in operations(found):
        for each in operation["x-codeSamples"]:
            assert instance.url in each["source"]
            assert ADDRESS not in each["source"]
    other = await document(instance.url, host="balance.example:8080")
    assert "http://balance.example:8080/api/balance" in other["info"]["description"]
    for host in ("<b>", 'a"b', "a/b", "a@b"):
        async with http_client(instance.url) as client:
            answer = await client.get("/openapi.json", headers={"Host": host})
        assert f"http://{host}" not in answer.text


async def test_ids_are_short_and_tags_described(instance: Instance) -> None:
    """A generated client has `change_balance`, not the path and the method beside it."""
    found = await document(instance.url)
    ids = [operation["operationId"] for operation in operations(found)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z_]{4,25}", each) for each in ids), ids
    described = {tag["name"] for tag in found["tags"] if tag["description"].endswith(".")}
    assert {tag for each in operations(found) for tag in each["tags"]} == described


async def test_samples_in_python_run(instance: Instance) -> None:
    """Each is a program, whose request is as the document says."""
    for operation in operations(await document(instance.url)):
        if operation["operationId"] == ENDLESS:
            continue
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", sample(operation, "Python")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await program.communicate()
        status = output.decode().partition(" ")[0]
        assert program.returncode == 0, (operation["operationId"], errors.decode())
        assert status in MISSING, (operation["operationId"], output.decode())


@pytest.mark.skipif(which("curl") is None, reason="curl is not installed")
async def test_samples_in_curl_run(instance: Instance) -> None:
    """Each is a command, whose request is as the document says."""
    for operation in operations(await document(instance.url)):
        if operation["operationId"] == ENDLESS:
            continue
        command = sample(operation, "curl").replace(
            "curl", "curl -sw '%{http_code}' -o /dev/null", 1
        )
        program = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
        output, _ = await program.communicate()
        assert output.decode() in MISSING, (command, output.decode())


async def test_samples_in_javascript_run(instance: Instance, browser: Browser) -> None:
    """Each runs in the console of a page of the service; the stream gets its first event."""
    async with tab(browser, instance.url) as page:
        await page.goto("/docs")
        for operation in operations(await document(instance.url)):
            name, source = operation["operationId"], sample(operation, "JavaScript")
            said = await page.evaluate(CONSOLE.replace("SOURCE", source))
            if name == ENDLESS:
                assert "jobs" in said[0]
            else:
                assert str(said[0]) in MISSING, (name, said)


async def test_samples_send_a_key_where_one_is_needed(database: dict[str, str]) -> None:
    """Once there are keys; not where nobody is asked."""
    async with Instance(database, JOBS_ENABLED="false") as running:
        await make_key(database)
        await keys_are_needed(running.url)
        found = await document(running.url)
    for operation in operations(found):
        for each in operation["x-codeSamples"]:
            assert ("Bearer ba_..." in each["source"]) == bool(operation["security"])


async def test_the_page_shows_samples(instance: Instance, browser: Browser) -> None:
    """In three languages, the one that was chosen for all; and a link leads home."""
    async with tab(browser, instance.url) as page:
        await opened(page, "balances-change_balance", "holds-place_hold")
        samples = page.locator(".samples")
        assert await samples.count() == 2
        await says(page, ".samples pre", f"{instance.url}/api/balance")
        await samples.first.get_by_role("button", name="Python").click()
        await says(page, ".samples pre", "httpx.post(")
        await samples.first.get_by_role("button", name="JavaScript").click()
        await says(page, ".samples pre", "await fetch(")
        assert "x-codeSamples" not in await page.inner_text("body")
        await page.get_by_role("link", name="Overview", exact=True).click()
        await page.wait_for_url(f"{instance.url}/")


async def test_the_page_knows_its_address_better_than_the_service(
    instance: Instance, browser: Browser
) -> None:
    """Behind a proxy that says nothing of it, samples have the one in the browser."""
    async with tab(browser, instance.url) as page:

        async def other(route: Any) -> None:  # noqa: ANN401
            answer = await route.fetch()
            text = (await answer.text()).replace(instance.url, "http://inside:3000")
            await route.fulfill(response=answer, body=text)

        await page.route("**/openapi.json", other)
        await opened(page, "balances-change_balance")
        await says(page, ".samples pre", f"{instance.url}/api/balance")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing(
    instance: Instance,
    browser: Browser,
    theme: Any,  # noqa: ANN401
) -> None:
    """No violation, contrast included, with operations of each method open and one executed."""
    async with tab(browser, instance.url, color_scheme=theme) as page:
        await opened(
            page,
            *("users-list_accounts", "balances-change_balance", "jobs-reset_schedule"),
            *("users-change_settings", "jobs-set_schedule"),
        )
        await page.locator("#operations-users-list_accounts button.execute").click()
        await page.locator(".responses-inner .response_current").wait_for()
        assert await page.get_attribute("html", "lang") == "en"
        dark = await page.evaluate("document.documentElement.classList.contains('dark-mode')")
        assert dark == (theme == "dark")
        found = await Axe().run(page)
        assert found.violations_count == 0, json.dumps(
            [
                (each["id"], each["nodes"][0]["html"][:200], each["nodes"][0]["failureSummary"])
                for each in found.response["violations"]
            ],
            indent=1,
        )


async def opened(page: Page, *ids: str) -> None:
    """Open the page, and some of its operations."""
    await page.goto("/docs")
    for each in ids:
        await page.locator(f"#operations-{each} .opblock-summary-control").click()
        await page.locator(f"#operations-{each} .samples pre").wait_for()
