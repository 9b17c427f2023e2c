"""The page with keys, in a real browser."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page

from balance_app.access.keys import Token
from tests.access.keyring import make_key, revoke
from tests.processes import Instance
from tests.web.browser import chromium, live, says, tab
from tests.web.test_login import Locked
from tests.web.test_login import site as site  # noqa: PLC0414 - a fixture


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for this file."""
    async with chromium() as running:
        yield running


async def enter(page: Page, key: Token) -> None:
    """Fill in the form of the login."""
    await page.get_by_label("Key").fill(key.text)
    await page.get_by_role("button", name="Log in").click()


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
async def test_people_log_in_and_out(site: Locked, browser: Browser, scripts: bool) -> None:  # noqa: FBT001
    """They come to where they wanted to go; with scripts the page is live, and stays in place."""
    key = await make_key(site.database, "read", "operate", name=f"ada-{scripts}")
    async with tab(browser, site.instance.url, java_script_enabled=scripts) as page:
        await page.goto("/jobs/job-waiting?outcome=failed")
        assert await page.title() == "Log in · balance_app"
        await page.get_by_label("Key").fill("ba_wrong")
        await page.get_by_role("button", name="Log in").click()
        await page.get_by_text("The key is wrong, expired or revoked.").wait_for()
        assert await page.get_by_label("Key").input_value() == ""
        await enter(page, key)
        await page.wait_for_url("**/jobs/job-waiting?outcome=failed")
        assert f"ada-{scripts}" in await page.inner_text("header")
        assert await page.evaluate("document.cookie") == ""
        (cookie,) = await page.context.cookies()
        assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == ("ba", True, "Strict")
        if scripts:
            await says(page, "#state", "live")
        await page.locator("#pause-job-waiting").click()
        await page.get_by_text(f"Paused by ada-{scripts}").wait_for()
        await page.locator("#resume-job-waiting").click()
        await page.locator("#pause-job-waiting").wait_for()
        await page.get_by_role("button", name="Log out").click()
        await page.get_by_text("You are logged out.").wait_for()
        assert await page.context.cookies() == []
        await page.goto("/")
        assert await page.title() == "Log in · balance_app"


async def test_an_open_page_says_that_its_session_has_ended(site: Locked, browser: Browser) -> None:
    """It asks no more; the link, and a form that is sent all the same, lead to the login."""
    key = await make_key(site.database, "read", "change", name="for-a-while")
    other = await make_key(site.database, "read")
    async with tab(browser, site.instance.url) as page:
        await page.goto("/users/1")
        await enter(page, key)
        watching = await page.context.new_page()
        await live(watching, "/?user=1")
        asked: list[str] = []
        watching.on("request", lambda request: asked.append(request.url))
        await revoke(site.database, key)
        await says(watching, "#state", "logged out")
        before = len(asked)
        await asyncio.sleep(4)
        assert len(asked) == before
        await watching.get_by_role("link", name="Log in again").click()
        await watching.wait_for_url("**/login?next=%2F%3Fuser%3D1")
        form = page.get_by_role("form", name="Withdraw or add")
        await says(page, "#state", "logged out")
        await form.get_by_label("Amount").fill("1")
        await form.get_by_role("button", name="Withdraw 1").click()
        await page.get_by_text("Not done: you are logged out.").wait_for()
        await enter(page, other)
        await page.wait_for_url("**/users/1")
        assert "User 1" in await page.inner_text("h1")
        assert await page.get_by_role("button", name="Withdraw").count() == 0


async def test_a_link_on_another_site_leads_to_the_page(site: Locked, browser: Browser) -> None:
    """Though the cookie is not sent with it: the login loads itself once, as this site."""
    key = await make_key(site.database, "read")
    async with tab(browser, site.instance.url) as page:
        await page.goto("/login")
        await enter(page, key)
        await page.get_by_role("button", name="Log out").wait_for()
        elsewhere = site.instance.url.replace("127.0.0.1", "localhost")
        await page.goto(f"{elsewhere}/login")
        assert await page.get_by_role("button", name="Log out").count() == 0
        await page.evaluate(f"location.href = '{site.instance.url}/jobs?state=paused'")
        await page.wait_for_url("**/jobs?state=paused")
        await page.get_by_role("button", name="Log out").wait_for()


async def test_the_first_key_logs_everybody_out(database: dict[str, str], browser: Browser) -> None:
    """Who has looked without one is asked for it."""
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        tab(browser, instance.url) as page,
    ):
        await live(page, "/")
        assert await page.get_by_role("button", name="Log out").count() == 0
        key = await make_key(database, "read")
        await says(page, "#state", "logged out")
        await page.get_by_role("link", name="Log in again").click()
        await enter(page, key)
        await says(page, "#state", "live")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_with_keys(
    site: Locked,
    browser: Browser,
    theme: Any,  # noqa: ANN401
) -> None:
    """No violation of WCAG 2 A and AA, and nothing is cut off on a narrow screen."""
    name = f"the-key-of-somebody-{theme}-" + 60 * "m"
    key = await make_key(site.database, "read", "open", "change", name=name)
    async with tab(
        browser, site.instance.url, color_scheme=theme, viewport={"width": 360, "height": 700}
    ) as page:
        for path in ("/login", "/login?out=1", "/", "/users", "/users/1", "/nothing"):
            await page.goto(path)
            if path == "/":
                await enter(page, key)
                await says(page, "#state", "live")
            found = await Axe().run(page)
            assert found.violations_count == 0, (path, found.generate_report())
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width <= 360, path
