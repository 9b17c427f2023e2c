"""A real browser for the tests: Debian's chromium, driven by Playwright."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

PATIENCE_MILLISECONDS = 20_000


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start a browser, or skip the test where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program,
            # As root it runs only without a sandbox; it loads pages of this machine only.
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def tab(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:  # noqa: ANN401
    """Open a page in a profile of its own; script errors and refused requests fail the test."""
    context = await browser.new_context(base_url=url, **options)
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda line: faults.append(line.text) if "Content Security Policy" in line.text else None,
    )
    yield page
    await context.close()
    assert faults == []


async def live(page: Page, path: str = "/") -> None:
    """Open a page, and wait until its live updates have begun."""
    await page.goto(path)
    await says(page, "#state", "live")


async def says(page: Page, selector: str, text: str) -> None:
    """Wait until an element contains a text."""
    await page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)",
        arg=[selector, text],
    )
