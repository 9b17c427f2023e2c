"""The page in a real browser: live updates, their interruptions, controls and accessibility."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page

from balance_app.local.postgres import EmbeddedPostgres
from balance_app.web import view_models
from tests.jobs.rows import add_instance, add_job, running
from tests.processes import FLEET, Instance
from tests.system.databases import kill, own_postgres
from tests.web.browser import chromium, live, says, tab
from tests.web.site import SECOND, Site, add_example, add_movements, add_run

PATHS: Final = (
    *("/", "/jobs", "/jobs/job-failed", "/jobs/job-running/cancel", "/jobs/none"),
    *("/?span=1440", "/?lanes=job&span=5", "/jobs?state=attention&search=job&sort=next"),
    *("/runs", "/runs?outcome=failed&server=app2&until=2001-01-01", "/runs/1", "/runs/404404"),
    "/?did=pause&job=job-paused",
    *(
        "/users",
        "/users?sort=balance",
        "/users?find=nobody",
        "/users/1",
        "/users/1?reverse=3",
        "/users/404404",
    ),
)
# A marker that a reload would remove.
MARK: Final = "window.mark = 1"
MARKED: Final = "window.mark"


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for this file."""
    async with chromium() as running:
        yield running


# -- live ------------------------------------------------------------------------------------


async def test_the_page_is_updated_without_a_reload(site: Site, browser: Browser) -> None:
    """State, tab title, tiles and charts follow the rows; clocks tick in between."""
    instance = await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.evaluate(MARK)
        await site.connection.execute(
            "UPDATE jobs SET holder = $1, server = 'app1', started_at = now() - interval '58 s', "
            "lease_expires_at = now() + interval '1 h', fence = 1, done = 1, total = 4",
            instance,
        )
        await add_run(site.connection, "job-a", None, began_ago=58, fence=1)
        await says(page, "#job-job-a", "▶ running on app1")
        await says(page, "#job-job-a", "25 %")
        await says(page, "#beat-30-i-app1", "1 running")
        await says(page, "#job-job-a", "for 1 min 1 s")
        bar = page.locator("#lane-30-i-app1 .bar")
        before = float((await bar.get_attribute("width") or "").rstrip("%"))
        await says(page, "#job-job-a", "for 1 min 4 s")
        assert float((await bar.get_attribute("width") or "").rstrip("%")) > before
        assert await page.title() == "✓ All is well · balance_app"
        assert "icon-green" in (await page.get_attribute("link[rel=icon]", "href") or "")
        assert await page.evaluate(MARKED) == 1


async def test_a_killed_instance_is_shown_as_lost(
    database: dict[str, str], tmp_path: Path, browser: Browser
) -> None:
    """Its lane has a mark where it stopped, and a line to where its run resumed."""
    (tmp_path / "event-logs").mkdir()
    instances = [
        Instance(
            database,
            f"app{number}",
            program=FLEET,
            FLEET_EVENT_LOGS=str(tmp_path / "event-logs"),
            FLEET_JOBS="2",
            FLEET_EVERY="3600",
            FLEET_SECONDS="120",
            JOB_LEASE_SECONDS="3",
            JOB_HEARTBEAT_SECONDS="0.5",
            JOB_WARM_UP_SECONDS="2",
        )
        for number in (1, 2)
    ]
    try:
        for instance in instances:
            await instance.launch()
        for instance in instances:
            await instance.ready()
        async with tab(browser, instances[0].url) as page:
            await live(page)
            await page.evaluate(MARK)
            await says(page, "#beat-30-i-app2", "1 running")
            await instances[1].stop(signal.SIGKILL)
            await says(page, "#beat-30-i-app2", "stopped responding")
            await says(page, "#verdict", "app2 stopped responding")
            await page.locator("#resumed-30-i line").wait_for(state="attached")
            assert (await page.title()).startswith("✕ app2 stopped responding")
            assert "icon-red" in (await page.get_attribute("link[rel=icon]", "href") or "")
            assert await page.locator("#lanes .bar.bad").count() == 1
            assert await page.locator("#lanes .death").count() == 1
            assert await page.evaluate(MARKED) == 1
    finally:
        for instance in instances:
            await instance.kill()


async def test_a_restart_is_shown_and_the_page_reconnects(
    database: dict[str, str], browser: Browser
) -> None:
    """During it the page shows that it is reconnecting; it is never reloaded."""
    instance = Instance(database, JOBS_ENABLED="false")
    async with instance, tab(browser, instance.url) as page:
        await live(page)
        await page.evaluate(MARK)
        await instance.kill()
        await says(page, "#state", "reconnecting")
        assert await page.evaluate("document.body.classList.contains('stale')")
        await instance.launch()
        await says(page, "#state", "live")
        await says(page, "#jobs-list", "There are no jobs.")
        assert await page.evaluate(MARKED) == 1
        await instance.stop()
        await says(page, "#state", "reconnecting")


@asynccontextmanager
async def alone(server: EmbeddedPostgres, browser: Browser) -> AsyncIterator[Page]:
    """Open a tab to an instance with a PostgreSQL server of its own."""
    async with (
        Instance(server.environment(), JOBS_ENABLED="false") as instance,
        tab(browser, instance.url) as page,
    ):
        yield page


async def test_an_outage_is_shown_and_the_page_recovers(browser: Browser) -> None:
    """An open page shows it; a page opened during it is completed after it without a reload."""
    async with own_postgres() as server, alone(server, browser) as late:
        await kill(server)
        await late.goto("/")
        await late.wait_for_selector("#problem-title")
        await says(late, "#state", "database unavailable")
        await late.evaluate(MARK)
        await server.start()
        await late.wait_for_selector("#jobs-list")
        await says(late, "#state", "live")
        assert await late.evaluate(MARKED) == 1
        await kill(server)
        await says(late, "#state", "database unavailable")
        # What the header says then is long; on a phone it takes two lines.
        await late.set_viewport_size({"width": 360, "height": 700})
        assert await late.evaluate("document.documentElement.scrollWidth") <= 360
        await server.start()
        await says(late, "#state", "live")


async def test_the_live_update_can_be_paused(site: Site, browser: Browser) -> None:
    """While it is paused nothing changes and the page shows since when; then it continues."""
    await add_job(site.connection, "job-a")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.get_by_role("button", name="Pause", exact=True).click()
        await says(page, "#state", "paused; data is")
        before = await page.inner_text("main")
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'ada'")
        await asyncio.sleep(2.5)
        assert await page.inner_text("main") == before
        await page.get_by_role("button", name="Resume", exact=True).click()
        await says(page, "#job-job-a", "Paused by ada")
        await says(page, "#state", "live")


async def test_the_docs_work_under_their_policy(site: Site, browser: Browser) -> None:
    """Swagger UI shows the operations and sends requests; the policy refuses nothing of it."""
    async with tab(browser, site.instance.url) as page:
        await page.goto("/docs")
        await page.click("text=Read a user >> nth=0")
        await page.fill("[data-param-name=userId] input", "1")
        await page.click("button.execute")
        await says(page, ".live-responses-table", "x-request-id")
        assert await page.evaluate("document.scripts[1].src.endsWith('/docs/assets/docs.js')")


async def test_focus_and_selection_survive_updates(site: Site, browser: Browser) -> None:
    """The focused button stays where it is, and no other takes its place."""
    instance = await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a", done=1, total=9, **running(instance, "app1"))
    await add_job(site.connection, "job-b")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.fill("form.change [name=amount]", "12")
        await page.get_by_role("button", name="Run now: job-b").focus()
        await page.evaluate(
            "getSelection().selectAllChildren(document.querySelector('#job-job-a .is'))"
        )
        await site.connection.execute("UPDATE jobs SET done = 8 WHERE name = 'job-a'")
        await says(page, "#job-job-a", "88 %")
        assert await page.evaluate("document.activeElement.id") == "run-job-b"
        assert "running" in await page.evaluate("getSelection().toString()")
        assert await page.input_value("form.change [name=amount]") == "12"
        await site.connection.execute(
            "UPDATE jobs SET holder = $1, server = 'app1', started_at = now(), fence = 1, "
            "lease_expires_at = now() + interval '1 h' WHERE name = 'job-b'",
            instance,
        )
        await says(page, "#job-job-b", "running")
        assert await page.evaluate("document.activeElement.getAttribute('href')") == "/jobs/job-b"


async def test_clocks_use_the_servers_format(site: Site, browser: Browser) -> None:
    """The script formats every duration as the server does."""
    seconds = [-90_000, -3_600, -61, -1, -0.4, 0, 0.9, 1, 59.9, 60, 61, 3599, 3600, 86_399, 200_000]
    async with tab(browser, site.instance.url) as page:
        await live(page)
        for kind, clock in view_models.CLOCKS.items():
            texts = await page.evaluate(
                "([kind, all]) => all.map((each) => clocks[kind](each))", [kind, seconds]
            )
            assert texts == [clock(each) for each in seconds], kind


# -- controls --------------------------------------------------------------------------------


async def test_buttons_control_jobs_in_place(site: Site, browser: Browser) -> None:
    """Run, pause, resume; a run is cancelled only after a confirmation."""
    instance = await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a")
    await add_job(site.connection, "job-b", **running(instance, "app1"))
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.evaluate(MARK)
        await page.get_by_role("button", name="Run now: job-a").click()
        await says(page, "#toasts", "Queued job-a. It starts within 2 seconds.")
        await says(page, "#job-job-a", "requested")
        await page.get_by_role("button", name="Pause: job-a").click()
        await says(page, "#job-job-a", "Paused by page")
        await page.get_by_role("button", name="Resume: job-a").click()
        await says(page, "#toasts", "Resumed job-a. The next run is at")
        cancel = page.get_by_role("button", name="Cancel…: job-b")
        await cancel.click()
        await page.get_by_role("dialog").get_by_text("Keep running").click()
        assert not await page.get_by_role("dialog").is_visible()
        assert await site.value("SELECT cancel_requested_by IS NULL FROM jobs WHERE name = 'job-b'")
        await cancel.click()
        await says(page, "#confirm", "so all of this run's work is lost")
        await page.get_by_role("dialog").get_by_role("button", name="Cancel the run").click()
        await says(page, "#job-job-b", "cancelling")
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
        await page.get_by_role("button", name="Resume: job-a").wait_for()
        assert await page.evaluate(MARKED) == 1
        assert page.url == f"{site.instance.url}/"


async def test_a_job_without_code_is_forgotten_after_a_confirmation(
    site: Site, browser: Browser
) -> None:
    """Its page has the button; afterwards only its history is left."""
    await add_job(site.connection, "job-a")
    await add_run(site.connection, "job-a", "failed", began_ago=60, result="ValueError: dark")
    async with tab(browser, site.instance.url) as page:
        await live(page, "/jobs/job-a")
        await page.get_by_role("button", name="Forget…").click()
        await page.get_by_role("dialog").get_by_text("Keep it").click()
        assert await site.value("SELECT forgotten_at IS NULL FROM jobs")
        await page.get_by_role("button", name="Forget…").click()
        await page.get_by_role("dialog").get_by_role("button", name="Forget the job").click()
        await page.get_by_text("This job was forgotten by").wait_for()
        assert "ValueError: dark" in await page.inner_text("main")
        assert await site.value("SELECT forgotten_by = 'page' FROM jobs")


async def test_a_jobs_own_page_is_live_and_controls_it(site: Site, browser: Browser) -> None:
    """An ended run is in the history at once; a pause may have a name and a reason."""
    await add_instance(site.connection)
    await add_job(site.connection, "job-a")
    async with tab(browser, site.instance.url) as page:
        await live(page, "/jobs/job-a")
        form = page.get_by_role("form", name="Pause with a reason")
        await form.get_by_label("Your name").fill("ada")
        await form.get_by_label("Why").fill("a full disk")
        await page.get_by_role("button", name="Pause with a reason").click()
        await says(page, "#job-job-a", "a full disk")
        assert page.url == f"{site.instance.url}/jobs/job-a"
        await page.get_by_role("button", name="Resume: job-a").click()
        await says(page, "#job-job-a", "waiting")
        await page.get_by_role("button", name="Pause: job-a").click()
        await says(page, "#job-job-a", "Paused by ada")  # the name is remembered
        await page.get_by_label("Every, seconds").fill("60")
        await page.get_by_role("button", name="Set the schedule").click()
        await says(page, "#job-job-a", "set by ada; code: every 5 minutes")
        await page.get_by_role("button", name="Reset to: every 5 minutes").click()
        await says(page, "#toasts", "job-a is back on its own schedule: every 5 minutes.")
        await add_run(site.connection, "job-a", result="it is done")
        await site.connection.execute(
            "UPDATE jobs SET fence = 1, last_outcome = 'succeeded', last_server = 'app1', "
            "last_started_at = now() - interval '9 s', last_ended_at = now()"
        )
        await says(page, "table.history", "it is done")


async def test_the_form_reports_a_change_and_a_refusal(site: Site, browser: Browser) -> None:
    """Both in place."""
    user = await site.open(100)
    async with tab(browser, site.instance.url) as page:
        await live(page, f"/?user={user}")
        await page.evaluate(MARK)
        await page.get_by_label("Amount").fill("30")
        await page.get_by_role("button", name="Withdraw 30").click()
        await says(page, "#changed", f"Withdrew 30. User {user} then had 70.")
        await page.get_by_label("Amount").fill("71")
        await page.get_by_role("button", name="Withdraw 71").click()
        await says(page, "#changed", "can't be withdrawn (1 short). Nothing was changed.")
        assert await page.evaluate(MARKED) == 1
        assert await site.value("SELECT balance FROM users WHERE id = $1", int(user)) == 70
        await page.get_by_label("Amount").fill("5")
        await page.get_by_role("button", name="Add 5").click()
        await says(page, "#changed", f"Added 5. User {user} then had 75.")
        await page.get_by_role("button", name="Undo").click()
        await page.get_by_text("Reversed entry 3 by entry 4.").wait_for()
        assert await site.value("SELECT balance FROM users WHERE id = $1", int(user)) == 70


async def test_an_accounts_page_reports_in_place(site: Site, browser: Browser) -> None:
    """Found by its external id; refusals keep what was typed; the name is remembered."""
    user, other = await site.open(100), await site.open(0)
    await site.client.patch(
        f"/api/users/{user}", json={"externalId": f"name of {user}"}, headers={"If-Match": "*"}
    )
    async with tab(browser, site.instance.url) as page:
        await page.goto("/users")
        await page.get_by_label("User id or external id").fill(f"name of {user}")
        await page.get_by_role("button", name="Find").click()
        await page.get_by_role("heading", name=f"User {user}").wait_for()
        await page.evaluate(MARK)
        await page.locator("#transfer summary").click()
        form = page.get_by_role("form", name="Transfer to another user")
        await form.get_by_label("To user").fill(other)
        await form.get_by_label("Amount").fill("130")
        await form.get_by_label("Reference").fill("rent & more")
        await form.get_by_role("button", name=f"Transfer 130 to user {other}").click()
        await says(page, "#said-transfer", "can't be transferred (30 short). Nothing was changed.")
        assert await form.get_by_label("Reference").input_value() == "rent & more"
        await form.get_by_label("Amount").fill("30")
        await form.get_by_label("Amount").press("Enter")
        await says(page, "#said-transfer", f"Transferred 30 to user {other}.")
        await says(page, "#statement", "rent & more")
        assert await form.get_by_label("Amount").input_value() == ""
        await page.locator("#freeze summary").click()
        form = page.get_by_role("form", name="Freeze")
        await form.get_by_label("Your name").fill("ada")
        await form.get_by_role("button").click()
        await says(page, "#said-freeze", "and the account is frozen.")
        await page.get_by_role("button", name="Unfreeze the account").click()
        await says(page, "#said-freeze", "and the account is not frozen.")
        await says(page, "#settings-history", "ada")
        assert await page.evaluate(MARKED) == 1
        assert page.url == f"{site.instance.url}/users/{user}"
        await page.get_by_role("link", name=f"user {other}").click()
        assert await page.locator("tr:target").inner_text() != ""
        assert page.url == f"{site.instance.url}/users/{other}?before=3#entry-2"


async def test_everything_works_without_scripts(site: Site, browser: Browser) -> None:
    """The page is complete, and each button is a form."""
    await add_example(site.connection)
    user = await site.open(100)
    async with tab(browser, site.instance.url, java_script_enabled=False) as page:
        await page.goto("/")
        assert "Reload for a newer one." in await page.inner_text("main")
        rows = " ".join((await page.inner_text("#jobs-list")).split())
        for row in (r"running on app1 for 4\d s 25 %", "waiting in 1 min", "in 30 s on app2"):
            assert re.search(row, rows), row
        assert await page.locator("#lanes .bar").count() == 7
        assert not await page.locator("#pause").is_visible()
        await page.locator("#pause-job-waiting").click()
        assert "Paused job-waiting" in await page.inner_text("#message")
        await page.locator("#resume-job-waiting").click()
        await page.locator("#run-job-waiting").click()
        assert "requested" in await page.inner_text("#job-job-waiting")
        await page.locator("#cancel-job-running").click()
        assert await page.title() == "Cancel job-running? · balance_app"
        await page.get_by_role("button", name="Cancel the run").click()
        assert "cancelling" in await page.inner_text("#job-job-running")
        await page.goto(f"/?user={user}")
        await page.get_by_label("Amount").fill("1000")
        await page.get_by_role("button", name="Withdraw").click()
        assert "(900 short)" in await page.inner_text("#changed")
        await page.get_by_label("Amount").fill("1")
        await page.get_by_role("button", name="Withdraw").click()
        assert f"User {user} then had 99." in await page.inner_text("#changed")
        await page.goto(f"/users/{user}")
        await page.locator("#hold summary").click()
        form = page.get_by_role("form", name="Hold an amount")
        await form.get_by_label("Amount").fill("1000")
        await form.get_by_role("button").click()
        assert "(901 short)" in await page.inner_text("#said-hold")
        assert await focused(page) == "INPUT"
        await form.get_by_label("Amount").fill("20")
        await form.get_by_role("button").click()
        assert "Held 20 until" in await page.inner_text("#said-hold")
        await page.get_by_label("Amount to capture of hold 1").fill("5")
        await page.get_by_role("button", name="Capture").click()
        assert "Captured 5 of hold 1." in await page.inner_text("#said-holds")


# -- accessibility ---------------------------------------------------------------------------


async def test_the_keyboard_is_enough(site: Site, browser: Browser) -> None:
    """It reaches the skip link, a job, a button, a bar; Enter confirms, Escape cancels."""
    await add_example(site.connection)
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.keyboard.press("Tab")
        assert await focused(page) == "Skip to the content"
        await page.keyboard.press("Enter")
        seen = []
        for _ in range(120):
            await page.keyboard.press("Tab")
            seen.append(await focused(page))
        order = [
            *("Run now: job-failed", "5 min", "Search jobs"),
            *("job-running", "Cancel…: job-running", "Pause: job-running"),
            "Run now: job-waiting",
        ]
        places = [seen.index(each) for each in order]
        assert places == sorted(places)
        assert any(each.startswith("job-failed ran on app2 from") for each in seen)
        assert any(each.startswith("job-running has been running on app1") for each in seen)
        await page.locator("#cancel-job-running").focus()
        await page.keyboard.press("Enter")
        await page.get_by_role("dialog").wait_for()
        assert await focused(page) == "Keep running"
        await page.keyboard.press("Escape")
        assert not await page.get_by_role("dialog").is_visible()
        assert await focused(page) == "Cancel…: job-running"
        await page.locator("#pause-job-waiting").focus()
        await page.keyboard.press("Enter")
        await says(page, "#job-job-waiting", "Paused by page")


async def focused(page: Page) -> str:
    label: str = await page.evaluate(
        "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText "
        "|| document.activeElement.tagName).trim()"
    )
    return label


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing(site: Site, browser: Browser, theme: Any) -> None:  # noqa: ANN401
    """No violation of WCAG 2 A and AA, contrast included, on any page."""
    await add_example(site.connection)
    gone = await add_instance(site.connection, "app3", seen_seconds_ago=20)
    await add_run(site.connection, "job-waiting", "lost", began_ago=50, server="app3", holder=gone)
    user = await add_movements(site)
    async with tab(browser, site.instance.url, color_scheme=theme) as page:
        for path in (*PATHS, f"/users/{user}?hold=1", f"/users?after={int(user) - 1}"):
            await page.goto(path)
            if await page.locator("#pause").is_visible():
                await says(page, "#state", "live")
            found = await Axe().run(page)
            assert found.violations_count == 0, (path, found.generate_report())
        await page.goto("/")
        await page.locator("#cancel-job-running").click()
        await says(page, "#confirm", "Keep running")
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize(
    ("width", "scale"), [pytest.param(360, 1, id="360 px"), pytest.param(640, 2, id="200 %")]
)
async def test_nothing_is_cut_off_on_a_narrow_screen(
    site: Site, browser: Browser, width: int, scale: int
) -> None:
    """No page scrolls sideways, and every button is visible."""
    await add_example(site.connection)
    await add_job(
        site.connection,
        "a-job-with-a-very-long-name-that-is-as-long-as-a-name-may-be-xyz",
        due_at=-SECOND * 90_000,
    )
    user = await add_movements(site)
    size = {"width": width, "height": 700}
    async with tab(browser, site.instance.url, viewport=size, device_scale_factor=scale) as page:
        for path in (*PATHS, f"/users/{user}?hold=1", f"/users?after={int(user) - 1}"):
            await page.goto(path)
            wide = await page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (path, wide)
            out = await page.evaluate(
                """() => [...document.querySelectorAll('th, td, li, dd, button, input, a')].filter(
                    (each) => {
                        const box = each.getBoundingClientRect();
                        return each.checkVisibility() && !each.closest('svg, .skip') && box.width
                            && (box.right > innerWidth + 1 || box.left < -1
                                || (each.clientWidth && each.scrollWidth > each.clientWidth + 1));
                    }).map((each) => each.outerHTML)"""
            )
            assert out == [], path


async def test_reduced_motion_is_respected(site: Site, browser: Browser) -> None:
    """`prefers-reduced-motion` stops the only animation."""
    for wish, name in (("reduce", "none"), ("no-preference", "blink")):
        async with tab(browser, site.instance.url, reduced_motion=wish) as page:
            await live(page)
            animation = await page.evaluate(
                "getComputedStyle(document.querySelector('#state > span')).animationName"
            )
            assert animation == name
