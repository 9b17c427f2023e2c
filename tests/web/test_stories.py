"""What the page promises to those who look at it, each as one story in a real browser."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final

import pytest
from playwright.async_api import Browser, Error, Page, Route

from tests.jobs.rows import add_instance, add_job, insert, running
from tests.processes import Instance, connect
from tests.system.databases import kill, own_postgres
from tests.web.browser import chromium, live, says, tab
from tests.web.site import SECOND, Site, add_example, add_run

MARK: Final = "window.mark = 1"
MARKED: Final = "window.mark"
IN_VIEW: Final = """(selector) => {
    const box = document.querySelector(selector)?.getBoundingClientRect();
    return Boolean(box) && box.height > 0 && box.top >= 0 && box.bottom <= innerHeight;
}"""
START: Final = """
UPDATE jobs SET holder = $1, server = 'app1', started_at = now(), fence = fence + 1,
    lease_expires_at = now() + interval '1 h', requested_by = NULL WHERE name = $2
"""
END: Final = """
UPDATE jobs SET fence = fence + 1, last_outcome = 'succeeded', last_server = 'app1',
    last_started_at = now() - interval '9 s', last_ended_at = now()
"""


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for this file."""
    async with chromium() as running_browser:
        yield running_browser


async def gone(page: Page, selector: str) -> None:
    """Wait until there is no such element."""
    await page.wait_for_selector(selector, state="detached")


# -- confirmations ---------------------------------------------------------------------------


async def test_a_confirmation_is_seen_where_one_looks_and_can_be_undone(
    site: Site, browser: Browser
) -> None:
    """Far down the page too; it goes once the row has followed the undo."""
    await add_instance(site.connection)
    for number in range(40):
        await add_job(site.connection, f"job-{number:02}")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.get_by_role("button", name="Pause: job-39").click()
        await says(page, "#toasts", "Paused job-39. It does not run until you resume it.")
        assert await page.evaluate(IN_VIEW, "#toasts .message")
        assert not await page.evaluate(IN_VIEW, "header")
        await page.locator("#toasts").get_by_role("button", name="Undo").click()
        await says(page, "#toasts", "Resumed job-39.")
        await page.get_by_role("button", name="Pause: job-39").wait_for()
        assert await site.value("SELECT paused_at IS NULL FROM jobs WHERE name = 'job-39'")
        # Somebody else pauses it again: the row no longer shows what the toast says.
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
        await gone(page, "#toasts .message")


async def test_a_queued_run_is_confirmed_until_its_row_runs(site: Site, browser: Browser) -> None:
    """And not before that."""
    instance = await add_instance(site.connection)
    await add_job(site.connection, "job-a")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.get_by_role("button", name="Run now: job-a").click()
        await says(page, "#toasts", "Queued job-a. It starts within 2 seconds.")
        await says(page, "#job-job-a", "requested")
        await asyncio.sleep(3)
        assert await page.locator("#toasts .message").count() == 1
        await site.connection.execute(START, instance, "job-a")
        await says(page, "#job-job-a", "running on app1")
        await gone(page, "#toasts .message")


async def test_a_refusal_stays_until_it_is_closed(site: Site, browser: Browser) -> None:
    """In view, with its reason."""
    await add_instance(site.connection)
    for number in range(40):
        await add_job(site.connection, f"job-{number:02}")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.get_by_role("button", name="Pause", exact=True).click()
        await says(page, "#state", "paused")
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
        await page.get_by_role("button", name="Run now: job-39").click()
        await says(page, "#toasts", "Not done.")
        assert await page.evaluate(IN_VIEW, "#toasts .message")
        await page.get_by_role("button", name="Close").click()
        await gone(page, "#toasts .message")


async def test_a_button_says_what_it_will_do(site: Site, browser: Browser) -> None:
    """With the amount and the receiver that are typed; without them its verb alone."""
    user = await site.open(100)
    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        form = page.get_by_role("form", name="Withdraw or add")
        assert await form.locator("button").all_inner_texts() == ["Withdraw", "Add"]
        await form.get_by_label("Amount").fill("58")
        assert await form.locator("button").all_inner_texts() == ["Withdraw 58", "Add 58"]
        await page.locator("#hold summary").click()
        form = page.get_by_role("form", name="Hold an amount")
        await form.get_by_label("Amount").fill("7")
        assert await form.locator("button").inner_text() == "Hold 7"


# -- old facts -------------------------------------------------------------------------------


async def test_a_banner_ends_with_its_cause(browser: Browser) -> None:
    """A page that was loaded during an outage has no word of it once it is live."""
    async with (
        own_postgres() as server,
        Instance(server.environment(), JOBS_ENABLED="false") as instance,
        tab(browser, instance.url) as page,
    ):
        await live(page)
        await kill(server)
        await says(page, "#state", "database unavailable")
        await page.goto("/")
        await says(page, "#message", "The last known state is below.")
        await server.start()
        await says(page, "#state", "live")
        assert await page.inner_text("#message") == ""


async def test_data_that_is_not_live_has_an_age(database: dict[str, str], browser: Browser) -> None:
    """It grows while the page reconnects, and is gone when the page is live again."""
    instance = Instance(database, JOBS_ENABLED="false")
    async with instance, tab(browser, instance.url) as page:
        await live(page)
        await instance.kill()
        await says(page, "#state", "reconnecting; data is")
        await says(page, "#state", "data is 9 s old")
        await instance.launch()
        await says(page, "#state", "live")
        assert "old" not in await page.inner_text("#state")


async def test_an_account_that_can_not_be_read_again_has_an_age(
    database: dict[str, str], browser: Browser
) -> None:
    """It is loaded again and again; when that fails, the page says how old it is."""
    instance = Instance(database, JOBS_ENABLED="false")
    async with instance, tab(browser, instance.url) as page:
        await page.goto("/users/1")
        await says(page, "#state", "live")
        await instance.kill()
        await says(page, "#state", "reconnecting; data is")
        await instance.launch()
        await says(page, "#state", "live")


# -- places ----------------------------------------------------------------------------------


async def test_an_accounts_page_is_live_and_keeps_what_is_typed(
    site: Site, browser: Browser
) -> None:
    """A change by somebody else appears; the form that is being filled in stays as it is."""
    user = await site.open(100)
    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        await page.evaluate(MARK)
        await page.locator("#transfer summary").click()
        await page.locator("#transfer").get_by_label("Amount").fill("12")
        await page.locator("#transfer").get_by_label("Reference").fill("rent")
        key = await page.input_value("#transfer [name=key]")
        await site.client.post("/api/balance", json={"userId": int(user), "amount": -58})
        await says(page, ".strip", "42")
        await says(page, "#statement", "\N{MINUS SIGN}58")
        assert await page.input_value("#transfer [name=amount]") == "12"
        assert await page.input_value("#transfer [name=reference]") == "rent"
        assert await page.input_value("#transfer [name=key]") == key
        assert await page.locator("#transfer").get_attribute("open") is not None
        assert await page.evaluate(MARKED) == 1


async def test_a_paused_page_stays_paused_when_a_form_is_sent(site: Site, browser: Browser) -> None:
    """Nothing that comes later is shown, so it does not say that it is live."""
    user = await site.open(100)
    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        await page.get_by_role("button", name="Pause", exact=True).click()
        await says(page, "#state", "paused; data is")
        form = page.get_by_role("form", name="Withdraw or add")
        await form.get_by_label("Amount").fill("58")
        await form.get_by_role("button", name="Withdraw 58").click()
        await says(page, "#said-change", f"Withdrew 58. User {user} then had 42.")
        await says(page, "#state", "paused; data is")
        assert "icon-none" in (await page.get_attribute("link[rel=icon]", "href") or "")
        await site.client.post("/api/balance", json={"userId": int(user), "amount": -2})
        await page.get_by_role("button", name="Resume", exact=True).click()
        await says(page, ".strip", "40")
        await says(page, "#state", "live")


HIDE: Final = """() => {
    Object.defineProperty(document, "hidden", { value: true, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
SHOW_AFTER_A_MINUTE: Final = """() => {
    asOf -= 60;
    delete document.hidden;
    document.dispatchEvent(new Event("visibilitychange"));
    return document.getElementById("state").innerText;
}"""
CLOSED: Final = "() => stream === null"


async def test_pages_that_nobody_sees_leave_others_their_connections(
    site: Site, browser: Browser
) -> None:
    """A browser has six; a hidden page still has its title, and is caught up when it is shown."""
    await add_instance(site.connection)
    await add_job(site.connection, "job-a")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        for other in [page, *[await page.context.new_page() for _ in range(6)]]:
            if other is not page:
                await live(other)
            await other.evaluate(HIDE)
            await other.wait_for_function(CLOSED)
        await add_instance(site.connection, "app3", up_seconds=900, seen_seconds_ago=90)
        await page.wait_for_function("() => document.title.startsWith('✕ app3 stopped responding')")
        await page.wait_for_function(CLOSED)
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
        assert "live" not in await page.evaluate(SHOW_AFTER_A_MINUTE)
        await says(page, "#state", "live")
        await says(page, "#job-job-a", "Paused by bob")


async def test_an_account_that_was_hidden_is_read_before_it_is_live(
    site: Site, browser: Browser
) -> None:
    """It is not read while nobody sees it."""
    user = await site.open(100)
    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        await says(page, "#state", "live")
        await page.evaluate(HIDE)
        await site.client.post("/api/balance", json={"userId": int(user), "amount": -58})
        assert "live" not in await page.evaluate(SHOW_AFTER_A_MINUTE)
        await says(page, "#state", "live")
        await says(page, ".strip", "42")


async def test_a_jobs_page_keeps_what_is_typed_when_a_run_ends(
    site: Site, browser: Browser
) -> None:
    """Its history grows; the forms are left as they are, each of which may come and go."""
    await add_instance(site.connection)
    await add_job(site.connection, "job-a")
    async with tab(browser, site.instance.url) as page:
        await live(page, "/jobs/job-a")
        await page.evaluate(MARK)
        await page.get_by_label("Why").fill("a full disk")
        await page.get_by_label("Every, seconds").fill("60")
        await page.get_by_label("in the zone").focus()
        await add_run(site.connection, "job-a", result="the first")
        await site.connection.execute(END)
        await says(page, "table.history", "the first")
        assert await page.get_by_label("Why").input_value() == "a full disk"
        assert await page.get_by_label("Every, seconds").input_value() == "60"
        # Once it is paused by somebody else, only its schedule can be set.
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
        await says(page, "#job-job-a", "Paused by bob")
        await add_run(site.connection, "job-a", result="the second")
        await site.connection.execute(END)
        await says(page, "table.history", "the second")
        assert await page.get_by_label("Why").count() == 0
        assert await page.get_by_label("Every, seconds").input_value() == "60"
        assert await page.evaluate(MARKED) == 1


async def test_a_change_is_undone_by_the_opposite_entry(site: Site, browser: Browser) -> None:
    """From the confirmation; both entries stay in the statement."""
    user = await site.open(100)
    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        form = page.get_by_role("form", name="Withdraw or add")
        await form.get_by_label("Amount").fill("58")
        await form.get_by_role("button", name="Withdraw 58").click()
        await says(page, "#said-change", f"Withdrew 58. User {user} then had 42.")
        await page.locator("#said-change").get_by_role("button", name="Undo").click()
        await says(page, "#said-reverse", "Reversed entry 2 by entry 3.")
        await says(page, "#entry-3", "reverses entry 2")
        assert await site.value("SELECT balance FROM users WHERE id = $1", int(user)) == 100


async def test_a_runs_log_grows_while_one_reads_it(site: Site, browser: Browser) -> None:
    """Lines appear without a reload; when the run ends, its outcome does."""
    instance = await add_instance(site.connection)
    await add_job(site.connection, "job-a", **running(instance, "app1"))
    run = await add_run(site.connection, "job-a", None, began_ago=40, fence=7, holder=instance)

    async def say(number: int) -> None:
        line = {"logged_at": -SECOND, "level": "info", "text": f"line {number}"}
        await insert(site.connection, "job_run_lines", job="job-a", fence=7, number=number, **line)

    await say(1)
    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/runs/{run}")
        await says(page, "ol.log", "line 1")
        await page.evaluate(MARK)
        await say(2)
        await says(page, "ol.log", "line 2")
        assert await page.evaluate(MARKED) == 1
        await site.connection.execute(
            "UPDATE job_runs SET outcome = 'failed', ended_at = now(), result = 'ValueError: x'"
        )
        await says(page, "main", "ValueError: x")
        await says(page, ".lead", "failed")


async def test_a_list_of_jobs_is_live_and_its_address_survives(
    site: Site, browser: Browser
) -> None:
    """Filter, search and order are in the address: reload, back and forward keep them."""
    instance = await add_instance(site.connection)
    for name in ("audit-keys", "audit-ledger", "prune-history"):
        await add_job(site.connection, name)
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.keyboard.press("/")
        await page.keyboard.type("keys")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/jobs?search=keys")
        await page.goto("/jobs?search=audit")
        await page.get_by_role("link", name="Running").click()
        await page.wait_for_url("**/jobs?search=audit&state=running")
        await says(page, "#jobs-list", "No jobs match.")
        await says(page, "#state", "live")
        await page.evaluate(MARK)
        await site.connection.execute(START, instance, "audit-keys")
        await site.connection.execute(START, instance, "prune-history")
        await says(page, "#jobs-list", "audit-keys")
        assert await page.locator("#jobs-list tr").count() == 1
        await says(page, "#chips", "Running 1")
        await page.get_by_role("button", name="Pause: audit-keys").click()
        await says(page, "#toasts", "Paused audit-keys")
        assert page.url.endswith("/jobs?search=audit&state=running")
        assert await page.evaluate(MARKED) == 1
        await page.get_by_role("link", name="Last 20 runs").click()
        await page.wait_for_url("**sort=last")
        await page.go_back()
        await page.wait_for_url("**/jobs?search=audit&state=running")
        await page.reload()
        await says(page, "#jobs-list", "audit-keys")
        assert await page.locator("#jobs-list tr").count() == 1


async def test_runs_are_reached_from_the_squares_and_the_lanes(
    site: Site, browser: Browser
) -> None:
    """Each of the last runs is a link to its own page."""
    await add_example(site.connection)
    run = await site.value("SELECT id FROM job_runs WHERE outcome = 'failed'")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.locator("#job-job-failed .squares a.bad").click()
        await page.wait_for_url(f"**/runs/{run}")
        assert "ZeroDivisionError" in await page.inner_text("main")
        await page.go_back()
        await page.locator(f"#lanes a[href='/runs/{run}']").click()
        await page.wait_for_url(f"**/runs/{run}")


async def test_work_that_is_done_is_not_shown_as_running_on(site: Site, browser: Browser) -> None:
    """While only the minimum duration runs, no bar stands at 100 percent."""
    instance = await add_instance(site.connection)
    more = running(instance, "app1")
    await add_job(site.connection, "job-a", done=5, total=6, **more)
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await says(page, "#job-job-a", "83 %")
        # Its end is recorded by the next heartbeat, which may be some seconds later.
        for update in ("UPDATE jobs SET done = 6", "UPDATE jobs SET work_ended_at = now()"):
            await site.connection.execute(update)
            await says(page, "#job-job-a", "ork done, holding to")
            assert await page.locator("#job-job-a progress").count() == 0


async def test_two_outages_of_the_database_are_told_as_outages(
    site: Site, browser: Browser
) -> None:
    """No instance is lost by them, and each has its place in the lanes.

    It comes before the one that dismisses what has recovered until then.
    """
    for server in ("app1", "app2"):
        await add_instance(site.connection, server, up_seconds=2000)
    await site.connection.execute(
        "UPDATE instances SET silences = ARRAY[now() - interval '200 s', now() - interval '180 s',"
        " now() - interval '400 s', now() - interval '370 s']"
    )
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await says(page, "#verdict", "Recovered: no instance reached the database for 20 s")
        assert "2 of 2 instances up" in await page.inner_text("#verdict")
        assert await page.locator("#lanes .gap").count() == 4
        title = await page.locator("#lanes .gap title").first.text_content()
        assert title is not None
        assert title.startswith("database unavailable from ")
        assert await page.locator("#lanes .death").count() == 0


async def test_what_is_gone_and_what_has_recovered_is_dismissed_where_one_looks(
    site: Site, browser: Browser
) -> None:
    """The view stays, and what is not red can be dismissed beside what is."""
    await add_instance(site.connection)
    await add_instance(site.connection, "app3", up_seconds=900, seen_seconds_ago=90)
    await add_instance(site.connection, "app4", up_seconds=900, seen_seconds_ago=90)
    await add_instance(site.connection, "app4", up_seconds=60)
    before = await site.value("SELECT count(*) FROM actions")
    async with tab(browser, site.instance.url) as page:
        await live(page, "/?span=5&lanes=instance")
        await says(page, "#verdict", "app3 stopped responding")
        await says(page, "#verdict", "app4 is back after")
        await page.get_by_role("button", name="Dismiss what has recovered").click()
        await says(page, "#toasts", "What has recovered is off the page.")
        await page.wait_for_function(
            "() => !document.querySelector('#verdict').innerText.includes('is back')"
        )
        await says(page, "#verdict", "app3 stopped responding")
        assert "span=5" in page.url
        await page.locator("#beats").get_by_role("button", name="Dismiss: app3").click()
        await says(page, "#toasts", "The instance is off the list.")
        await says(page, "#verdict", "All is well.")
        assert "app3" not in await page.inner_text("#fleet")
        assert await site.value("SELECT count(*) FROM actions") == before + 2


async def test_instances_that_stop_as_they_should_leave_nothing_to_do(
    site: Site, browser: Browser
) -> None:
    """Two stop and three start: none is lost, and all are counted anew."""
    for number in range(1, 6):
        await add_instance(site.connection, f"app{number}")
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await says(page, "#verdict", "5 of 5 instances up")
        # What a stop does: it deletes its row.
        await site.connection.execute("DELETE FROM instances WHERE server IN ('app4', 'app5')")
        await says(page, "#verdict", "3 of 3 instances up")
        for number in range(6, 9):
            await add_instance(site.connection, f"app{number}", up_seconds=1)
        await says(page, "#verdict", "6 of 6 instances up")
        await says(page, "#verdict", "All is well.")
        assert "stopped responding" not in await page.inner_text("#lanes")
        assert "app4" not in await page.inner_text("#lanes")


async def test_the_tab_does_not_say_that_all_is_well_while_nothing_is_known(
    database: dict[str, str], browser: Browser
) -> None:
    """Neither its title nor its icon, from the moment when the page is not live."""
    async with Instance(database, JOBS_ENABLED="false") as instance:
        connection = await connect(database)
        await add_instance(connection)
        await connection.close()
        async with tab(browser, instance.url) as page:
            await live(page)
            await says(page, "#verdict", "All is well.")
            icon = page.locator("link[rel=icon]")
            assert "icon-green" in str(await icon.get_attribute("href"))
            assert (await page.title()).startswith("✓ All is well")
            await instance.kill()
            await says(page, "#state", "reconnecting")
            assert "icon-none" in str(await icon.get_attribute("href"))
            assert (await page.title()).startswith("… reconnecting")


# -- times, paper, screens -------------------------------------------------------------------


async def test_times_are_utc_and_by_a_switch_the_viewers_own(site: Site, browser: Browser) -> None:
    """The switch is kept; the other time is shown on hover."""
    await add_job(site.connection, "job-a")
    run = await add_run(site.connection, "job-a")
    await site.connection.execute("UPDATE job_runs SET started_at = '2026-11-28T20:00:05Z'")
    async with tab(browser, site.instance.url, timezone_id="Asia/Tokyo") as page:
        await page.goto("/runs")
        time = page.locator(f"#run-{run} time")
        assert await time.inner_text() == "2026-11-28 20:00:05"
        await time.hover()
        title = await time.get_attribute("title")
        assert title == "2026-11-28 20:00:05 UTC, 2026-11-29 05:00:05 your time"
        await page.locator("#zone").click()
        assert await time.inner_text() == "2026-11-29 05:00:05"
        assert "your time" in await page.inner_text("thead")
        await page.reload()
        assert await time.inner_text() == "2026-11-29 05:00:05"
        await page.locator("#zone").click()
        assert await time.inner_text() == "2026-11-28 20:00:05"
        assert "UTC" in await page.inner_text("thead")


async def test_a_tablet_gets_a_table(site: Site, browser: Browser) -> None:
    """At 768 pixels ten jobs are rows of a table, not a list of cards."""
    await add_instance(site.connection)
    for number in range(10):
        await add_job(site.connection, f"note-daily-balances-{number}")
    size = {"width": 768, "height": 1000}
    async with tab(browser, site.instance.url, viewport=size) as page:
        await live(page)
        display = await page.evaluate(
            "getComputedStyle(document.querySelector('#jobs-list tr')).display"
        )
        assert display == "table-row"
        assert await page.evaluate("document.documentElement.scrollWidth") <= 768
        high = await page.evaluate("document.querySelector('.jobs').offsetHeight")
        assert high < 1000


async def test_paper_has_facts_and_nothing_to_press(site: Site, browser: Browser) -> None:
    """And says from when they are."""
    await add_example(site.connection)
    async with tab(browser, site.instance.url) as page:
        await live(page)
        await page.emulate_media(media="print")
        assert await page.locator("button:visible").count() == 0
        assert await page.locator("nav:visible").count() == 0
        assert (await page.inner_text("#as-of")).startswith("as of 20")
        assert await page.locator("#jobs-list tr:visible").count() == 6


async def test_durations_have_an_axis(site: Site, browser: Browser) -> None:
    """From nothing to the longest."""
    await add_job(site.connection, "job-a")
    for seconds in (20, 90):
        await add_run(site.connection, "job-a", began_ago=200, seconds=seconds)
    async with tab(browser, site.instance.url) as page:
        await page.goto("/jobs/job-a")
        assert (await page.inner_text(".scale")).split("\n") == ["1 min 30 s", "45 s", "0 s"]


def error(status: int, body: str) -> Callable[[Route], Awaitable[None]]:
    """Return what answers with an error page."""
    return lambda route: route.fulfill(status=status, content_type="text/html", body=body)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Route.abort, id="none"),
        pytest.param(error(502, "<h1>Bad Gateway</h1>"), id="a proxy's"),
        pytest.param(error(500, '<main id="main">Internal error</main>'), id="an error page"),
    ],
)
async def test_a_form_without_an_answer_may_be_sent_again(
    database: dict[str, str], browser: Browser, answer: Callable[[Route], Awaitable[None]]
) -> None:
    """The page says what is not known; sent again as it is, the form takes effect once."""

    async def lose(route: Route) -> None:
        if route.request.method == "POST":  # it is done, and its answer is lost
            await route.fetch(max_redirects=0)
            await answer(route)
        else:
            await route.continue_()

    instance = Instance(database, JOBS_ENABLED="false")
    async with instance, tab(browser, instance.url) as page:
        await page.goto("/users/1")
        form = page.get_by_role("form", name="Withdraw or add")
        await form.get_by_label("Amount").fill("58")
        await page.route("**/users/1", lose)
        await form.get_by_role("button", name="Withdraw 58").click()
        await says(page, "#toasts", "we don't know whether it was done.")
        await says(page, "#toasts", "it can't be applied twice.")
        await page.unroute("**/users/1")
        await form.get_by_role("button", name="Withdraw 58").click()
        await says(page, "#said-change", "Withdrew 58. User 1 then had 9")
        await says(page, ".strip", "9\N{NARROW NO-BREAK SPACE}942")


async def test_a_click_is_not_lost_while_the_page_is_loaded_again(
    site: Site, browser: Browser
) -> None:
    """A form is sent, however long the page's own request takes."""
    user = await site.open(100)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def hold_back(route: Route) -> None:
        if route.request.method == "GET" and not answer.is_set():
            asked.set()
            await answer.wait()
        with suppress(Error):  # the page has given this request up
            await route.continue_()

    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        await page.route(f"**/users/{user}", hold_back)
        await asked.wait()
        form = page.get_by_role("form", name="Withdraw or add")
        await form.get_by_label("Amount").fill("58")
        await form.get_by_role("button", name="Withdraw 58").click()
        await says(page, "#said-change", f"Withdrew 58. User {user} then had 42.")
        answer.set()


@pytest.mark.parametrize("body", ["<h1>Bad Gateway</h1>", '<main id="main">Unavailable</main>'])
async def test_a_live_page_does_not_give_way_to_an_error(
    site: Site, browser: Browser, body: str
) -> None:
    """When it can't be loaded again at the end of a run, by a proxy's answer or the service's."""
    await add_instance(site.connection)
    await add_job(site.connection, "job-a")
    asked = asyncio.Event()

    async def refuse(route: Route) -> None:
        await route.fulfill(status=502, content_type="text/html", body=body)
        asked.set()

    async with tab(browser, site.instance.url) as page:
        await live(page, "/jobs/job-a")
        await page.evaluate(MARK)
        await page.route("**/jobs/job-a", refuse)
        await site.connection.execute(END)
        async with asyncio.timeout(20):
            await asked.wait()
        await site.connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
        await says(page, "#job-job-a", "Paused by bob")
        assert await page.evaluate(MARKED) == 1
        assert await page.locator("#job-title").count() == 1


async def test_a_problem_that_answers_a_form_is_shown_in_place(
    site: Site, browser: Browser
) -> None:
    """As one outside of the page's own routes: what it says is not lost by a reload."""
    user = await site.open(100)

    async def answer_with_a_problem(route: Route) -> None:
        if route.request.method == "GET":
            await route.continue_()
            return
        problem = await site.client.get("/nothing", headers={"Accept": "text/html"})
        # Its style, which the page's policy keeps out, would be reported as a breach.
        body = re.sub(r"<style>.*</style>", "", problem.text, flags=re.DOTALL)
        await route.fulfill(status=404, content_type="text/html", body=body)

    async with tab(browser, site.instance.url) as page:
        await page.goto(f"/users/{user}")
        await page.evaluate(MARK)
        await page.route(f"**/users/{user}", answer_with_a_problem)
        form = page.get_by_role("form", name="Withdraw or add")
        await form.get_by_label("Amount").fill("58")
        await form.get_by_role("button", name="Withdraw 58").click()
        await says(page, "#main .status", "404")
        await says(page, "#state", "no data")
        assert await page.locator("#toasts .message").count() == 0
        assert await page.evaluate(MARKED) == 1
