"""Pages and forms without a browser: every section and refusal; foreign markup is only text."""

import asyncio
import re
from collections.abc import Callable
from secrets import token_hex
from typing import Final

import httpx
import pytest

from balance_app.web import view_models
from tests.jobs.rows import add_instance, add_job, insert, running
from tests.processes import served
from tests.system.databases import kill, own_postgres
from tests.web.site import SECOND, Site, Tags, add_example, add_run, text

PEOPLE: Final = {"Accept": "text/html"}
HOSTILE: Final = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}&amp;"
STATES: Final = {
    "job-running": ("▶ running on app1", "progress of job-running", "25 %", "row 30", "Cancel…"),
    "job-cancelled": ("▶ cancelling on app2", "Cancellation requested by ada."),
    "job-waiting": ("○ waiting", "in 1 min", "Run now", "succeeded after 20 s"),
    "job-overdue": ("! overdue", "since 10 min"),
    "job-paused": ("‖ paused", "Paused by ada at", "a full disk", "Resume"),
    "job-failed": ("✕ failed", "1 min ago", "in 30 s on app2"),
}


async def test_every_state_has_a_symbol_and_a_word(site: Site) -> None:
    """A job's row shows its state, server, duration and the outcome of its last run."""
    await add_example(site.connection)
    html = await site.page()
    for job, texts in STATES.items():
        row = text(html, f"job-{job}")
        for each in texts:
            assert each in row, (job, each, row)
    assert re.search(r"All 6 Needs attention 2 Running 2 Waiting 3 Paused 1", text(html, "chips"))


async def test_jobs_that_need_attention_come_first_with_cause_and_button(site: Site) -> None:
    """They are tinted, and each cause is named in the verdict, with what mends it."""
    await add_example(site.connection)
    html = await site.page()
    rows = re.findall(r'<tr id="job-([^"]+)"[^>]*?(?: class="(\w+)")?>', html)
    assert rows[:2] == [("job-failed", "bad"), ("job-overdue", "bad")] or rows[:2] == [
        ("job-overdue", "bad"),
        ("job-failed", "bad"),
    ]
    assert {tint for _, tint in rows[2:]} == {""}
    verdict = text(html, "verdict-now")
    assert "✕ 2 jobs need you." in verdict
    assert "job-failed failed: ZeroDivisionError: division by zero" in verdict
    assert 'formaction="/jobs/job-overdue/run"' in html
    assert "<title>✕ 2 jobs need you · balance_app</title>" in html
    assert "icon-red.svg" in html


async def test_all_is_well_is_said(site: Site) -> None:
    """In a sentence, with the facts that it rests on; title and icon show the same."""
    await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a")
    html = await site.page()
    assert re.match(
        r"✓ All is well\. 1 of 1 instances? up · 1 jobs? on time", text(html, "verdict-now")
    )
    assert "<title>✓ All is well · balance_app</title>" in html
    assert "icon-green.svg" in html


async def test_instances_are_shown_with_what_they_run(site: Site) -> None:
    """A lane per server: its runs, and the age of its last heartbeat at the edge."""
    await add_example(site.connection)
    html = await site.page()
    assert re.search(r"app1 .*job-running has been running on app1", text(html, "lane-30-i-app1"))
    assert re.search(r"last heartbeat 0 s 1 running", text(html, "beat-30-i-app1"))
    by_job = await site.page("/?lanes=job&span=5")
    assert "job-running has been running on app1" in text(by_job, "lane-5-j-job-running")
    assert "job-failed ran" not in text(by_job, "lane-5-j-job-waiting")


async def test_a_lost_instance_is_shown_with_where_its_run_resumed(site: Site) -> None:
    """Its lane has a mark where it stopped, and a line to the lane where the run resumed."""
    gone = await add_instance(site.connection, "app3", seen_seconds_ago=30)
    heir = await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a", **running(heir, "app1", seconds=10))
    lost = await add_run(
        site.connection, "job-a", "lost", began_ago=50, seconds=25, server="app3", holder=gone
    )
    await add_run(site.connection, "job-a", None, began_ago=10, server="app1", holder=heir)
    await site.connection.execute(
        "UPDATE job_runs SET due_at = now() - interval '51 s', attempt = id - $1", lost
    )
    html = await site.page()
    assert re.search(r"stopped responding 3\d s ago", text(html, "beat-30-i-app3"))
    # Shown once; with a button named after the instance in the verdict, and one beside its lane.
    assert text(html, "verdict-now").count("app3 stopped responding") == 1
    assert html.count('aria-label="Dismiss: app3"') == 2
    assert "app3 stopped responding before" in text(html, "lane-30-i-app3")
    assert re.search(r'<svg id="resumed-30-i".*?<line x1="[\d.]+%"', html, re.DOTALL)
    await site.connection.execute("DELETE FROM instances WHERE server = 'app3'")
    html = await site.page()
    assert "app3" not in text(html, "fleet")
    await add_instance(site.connection, "app3", up_seconds=4)
    html = await site.page()
    assert "stopped responding" not in text(html, "beat-30-i-app3")
    assert "app3 stopped responding before" in text(html, "lane-30-i-app3")


async def test_the_lanes_have_a_sentence_per_run(site: Site) -> None:
    """Failures are hatched; earlier runs are not shown; every bar can be focused."""
    await add_example(site.connection)
    await add_run(site.connection, "job-failed", began_ago=1900)
    html = await site.page("/?lanes=job")
    assert text(html, "lanes").count("ran on app1 from") == 5 * 2  # as label and as tooltip
    lane = re.search(r'<li id="lane-30-j-job-failed">.*?</li>', html, re.DOTALL)
    assert lane is not None
    assert lane[0].count("<a ") == 2  # the job, and the only run of the last half hour
    assert 'fill="url(#hatch)"' in lane[0]
    assert "(30 s) and failed: ZeroDivisionError: division by zero" in lane[0]
    bar = re.search(r'data-from="([\d.]+)" width="([\d.]+)%"', html)
    assert bar is not None
    assert 2.0 < float(bar[2]) < 3.5  # 40 s of 1800
    day = await site.page("/?lanes=job&span=1440")
    parts = text(day, "lane-1440-j-job-failed")
    assert re.search(r"\d\d:\d\d:\d\d UTC: 20 s of runs", parts)
    assert "1 run failed, timed out or lost" in parts


async def test_empty_lists_have_sentences(site: Site) -> None:
    """Each empty list explains what that means."""
    html = text(await site.page())
    for sentence in (
        "No instance is running jobs. Nothing starts until one does.",
        "There are no jobs.",
        "No audit has run yet.",
    ):
        assert sentence in html


async def test_totals_are_counted_and_the_last_audit_shown(site: Site) -> None:
    """Few users are summed up at once; the audit's own sentence is shown."""
    await add_job(
        site.connection,
        "audit-ledger",
        last_outcome="failed",
        last_server="app1",
        last_started_at=-200 * SECOND,
        last_ended_at=-180 * SECOND,
        last_result="1 of 2 entries differs: user 1",
    )
    totals = text(await site.page(), "totals")
    users = await site.value("SELECT count(*) FROM users")
    balance = await site.value("SELECT sum(balance) FROM users")
    assert (
        f"accounts {users} all balances {view_models.number(balance)}".replace("\u202f", " ")
        in totals
    )
    assert "✕ failed 3 min ago" in totals
    assert "1 of 2 entries differs: user 1" in totals


async def test_the_last_audit_is_the_last_one_with_a_result(site: Site) -> None:
    """One that was released, as its instance stopped, says nothing about the ledger."""
    released = {"last_outcome": "released", "last_server": "app1", "last_result": "stopped"}
    times = {"last_started_at": -20 * SECOND, "last_ended_at": -10 * SECOND}
    await add_job(site.connection, "audit-ledger", **released, **times)
    await add_run(site.connection, "audit-ledger", began_ago=400, outcome="failed", result="worse")
    await add_run(
        site.connection, "audit-ledger", began_ago=270, outcome="succeeded", result="all match"
    )
    await add_run(site.connection, "audit-ledger", began_ago=20, outcome="released")
    html = await site.page()
    assert "✓ succeeded 4 min ago" in text(html, "totals")
    assert "all match" in text(html, "totals")
    assert "ledger verified 4 min ago" in text(html, "verdict-now")


async def test_foreign_markup_is_shown_as_text(site: Site) -> None:
    """In names, notes, reasons, results and servers, on every page."""
    server = "a<b>\"'&{{7*7}}"
    instance = await add_instance(site.connection, server)
    await add_job(
        site.connection,
        "job-hostile",
        description=HOSTILE,
        note=HOSTILE,
        done=1,
        total=None,
        last_outcome="failed",
        last_server=server,
        last_started_at=-9 * SECOND,
        last_ended_at=-5 * SECOND,
        last_result=HOSTILE,
        **running(instance, server),
    )
    await add_job(
        site.connection, "job-paused", paused_at=-SECOND, paused_by=HOSTILE, pause_reason=HOSTILE
    )
    await add_run(site.connection, "job-hostile", "failed", result=HOSTILE, server=server)
    for path in (
        "/",
        "/jobs",
        "/jobs/job-hostile",
        "/jobs/job-hostile/cancel",
        f"/?user={HOSTILE}&before={HOSTILE}&entry={HOSTILE}&did={HOSTILE}&job={HOSTILE}",
        f"/jobs?search={HOSTILE}&state={HOSTILE}&after=",
        f"/jobs/job-hostile?did=run&job={HOSTILE}",
    ):
        html = await site.page(path)
        assert "{{7*7}}" in html or HOSTILE not in path, path
        assert "49" not in re.sub(r"[\d:.]{3,}", "", text(html, "main")), path
        for tag, given in Tags(html).found:
            assert tag not in {"img", "iframe", "b<b>"}, path
            assert not [name for name in given if name.startswith("on")], path
            assert tag != "script" or (given["src"] or "").startswith("/static/"), path
            assert "style" not in given, path
    html = await site.page("/jobs/job-hostile")
    assert text(html).count("<script>alert(1)</script>") >= 3
    for path in ("/jobs/" + HOSTILE.replace("/", ""), f"/jobs/job-hostile?outcome={HOSTILE}"):
        answer = await site.client.get(path, headers=PEOPLE)
        assert answer.status_code in {404, 422}
        assert "<script>alert" not in answer.text


async def test_every_page_allows_its_own_files_only(site: Site) -> None:
    """Only the service's own scripts and styles, no framing, no caching."""
    await add_job(site.connection, "job-a")
    answers = [
        await site.client.get(path, headers=PEOPLE)
        for path in ("/", "/jobs", "/jobs/job-a", "/jobs/job-a/cancel", "/jobs/none")
    ]
    answers.append(await site.send("/jobs/none/run"))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "text/html; charset=utf-8"


async def test_static_files_are_cached_by_content(site: Site) -> None:
    """An address with the content's hash is immutable; any other file is not served."""
    html = await site.page()
    addresses = re.findall(r'(?:src|href)="(/static/[^"]+)"', html)
    assert len(addresses) == 4
    for address in addresses:
        answer = await site.client.get(address)
        assert "immutable" in answer.headers["cache-control"]
        later = await site.client.get(address.partition("?")[0] + "?v=other")
        assert later.headers["cache-control"] == "no-cache"
    for path in ("/static/none.css", "/static/..%2fpages.py", "/static/"):
        assert (await site.client.get(path)).status_code == 404
    licence = (await site.client.get("/static/idiomorph-0.7.4.min.js")).text[:800]
    assert "idiomorph 0.7.4" in licence
    assert "Zero-Clause BSD" in licence


# -- a job's own page ------------------------------------------------------------------------


async def test_a_jobs_page_shows_its_history_by_pages(site: Site) -> None:
    """The latest runs first, filtered by outcome; a link leads to earlier ones."""
    await add_job(
        site.connection,
        "job-a",
        description="Counts.\n\nEach of them.",
        fence=31,
        checkpoint='{"row": 17}',
    )
    for number in range(30):
        await add_run(
            site.connection,
            "job-a",
            "lost" if number % 10 == 0 else "succeeded",
            began_ago=3000 - 100 * number,
            result=f"run {number}",
        )
    html = await site.page("/jobs/job-a")
    assert "Counts. Each of them." in text(html)
    assert [f"run {number} " in text(html) for number in (29, 5, 4)] == [True, True, False]
    assert '{"row": 17}' in text(html)
    assert "How long the last 30 runs took: the shortest 20 s" in text(html)
    (earlier,) = re.findall(r'href="([^"#]+)[^"]*">Earlier runs', html)
    older = text(await site.page(earlier))
    assert "run 4 " in older
    assert "run 5 " not in older
    lost = text(await site.page("/jobs/job-a?outcome=lost"))
    assert [f"run {number}" in lost for number in (0, 10, 20, 21)] == [True, True, True, False]
    none = text(await site.page("/jobs/job-a?outcome=failed"))
    assert "No runs of job-a that failed." in none


async def test_a_runs_page_tells_what_it_said(site: Site) -> None:
    """Its lines and its traceback, and nothing that a browser obeys; the history links to it."""
    await add_job(site.connection, "job-a")
    await add_job(site.connection, "job-b")
    failed = await add_run(site.connection, "job-a", "failed", fence=1, result="ValueError: x")
    runs = await add_run(site.connection, "job-a", None, fence=2)
    for number in (4, 5):
        line = {"logged_at": -SECOND, "level": "info", "text": f"line {number}\n<b>of two</b>"}
        await insert(site.connection, "job_run_lines", job="job-a", fence=1, number=number, **line)
    await insert(site.connection, "job_run_tracebacks", job="job-a", fence=1, text="File <x>")
    history = await site.page("/jobs/job-a")
    assert f'href="/runs/{failed}"' in history
    html = await site.page(f"/runs/{failed}")
    assert f"job-a, run {failed}" in text(html)
    assert "The first 3 lines were not kept." in text(html)
    assert "info line 4 <b>of two</b>" in text(html)
    assert "Traceback File <x>" in text(html)
    assert "<b>of" not in html
    html = text(await site.page(f"/runs/{runs}"))
    assert "No log lines yet." in html
    assert "Traceback" not in html
    for path, status in (
        (f"/jobs/job-b/runs/{failed}", 404),
        ("/runs/404404", 404),
        ("/runs/x", 422),
        ("/runs/0", 422),
    ):
        assert 'href="/"' in await site.page(path, status)


async def test_a_range_of_ticks_that_did_not_run_is_in_the_history(site: Site) -> None:
    """With its count and its end; in charts it is no run."""
    await add_job(site.connection, "job-a")
    await insert(
        site.connection,
        "job_runs",
        job="job-a",
        due_at=-900 * SECOND,
        last_due_at=-300 * SECOND,
        ticks=3,
        started_at=-200 * SECOND,
        ended_at=-200 * SECOND,
        outcome="skipped",
        result="paused by ada",
    )
    html = await site.page("/jobs/job-a")
    assert re.search(
        r"□ skipped . . 3 scheduled runs skipped, up to [-\d: ]+UTC: paused by ada", text(html)
    )
    assert "Never run." in text(html)
    assert "never run" in text(await site.page(), "job-job-a")


async def test_an_unknown_address_gets_a_404_page(site: Site) -> None:
    """With a sentence, a link back, and status 404."""
    html = await site.page("/jobs/none", 404)
    assert "There is no job none." in text(html)
    assert 'href="/"' in html
    assert "before must be an integer" in text(await site.page("/jobs/none?before=x", 422))


# -- many jobs -------------------------------------------------------------------------------

MANY: Final = """
INSERT INTO jobs (name, schedule, description, due_at, ready_at, last_outcome, last_server,
                  last_started_at, last_ended_at, failure_streak)
SELECT format('job-%s', lpad(n::text, 5, '0')), 'every 300 s', '', now() + interval '1 day',
       now() + interval '1 day', CASE n % 1000 WHEN 7 THEN 'failed' ELSE 'succeeded' END, 'app1',
       now(), now(), (n % 1000 = 7)::int
FROM generate_series(1, 10000) AS n
"""


async def test_ten_thousand_jobs_have_a_bounded_page(site: Site) -> None:
    """The most important ones are shown, all others are found by name and state."""
    await site.connection.execute(MANY)
    await add_instance(site.connection)
    await add_job(site.connection, "zz-overdue", due_at=-600 * SECOND)
    html = await site.page()
    rows = re.findall(r'<tr id="job-([^"]+)"', html)
    assert len(rows) == 50
    assert rows[:2] == ["zz-overdue", "job-00007"]
    assert "50 of 10\u202f001" in html
    assert len((await site.client.get("/")).content) < 150_000
    first = await site.page("/jobs?search=job-0&sort=name")
    (more,) = re.findall(r'href="([^"]+)"[^>]*>Next page', first)
    second = await site.page(more.replace("&amp;", "&"))
    assert "job-00100" in text(first)
    assert "job-00100" not in text(second)
    assert "job-00101" in text(second)
    contains = re.findall(r'<tr id="job-([^"]+)"', await site.page("/jobs?search=0007"))
    assert {"job-00007", "job-00070", "job-10007"} - set(contains) == {"job-10007"}
    failed = re.findall(r'<tr id="job-([^"]+)"', await site.page("/jobs?state=failed"))
    assert len(failed) == 10
    assert "No jobs match." in text(await site.page("/jobs?search=none"))


# -- forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "columns", "fact"),
    [
        ("run", {}, "requested_by = 'ada' AND ready_at <= clock_timestamp()"),
        ("pause", {}, "paused_by = 'ada' AND pause_reason = 'why <not>'"),
        ("resume", {"paused_at": -SECOND, "paused_by": "bob"}, "paused_at IS NULL"),
        ("cancel", {"running": True}, "cancel_requested_by = 'ada'"),
    ],
)
async def test_a_job_is_controlled_by_a_form(
    site: Site, what: str, columns: dict[str, object], fact: str
) -> None:
    """The answer redirects to the page, which shows a message."""
    instance = await add_instance(site.connection)
    if columns.pop("running", False):
        columns = running(instance, "app1")
    await add_job(site.connection, "job-a", **columns)
    more = {"reason": "why <not>"} if what == "pause" else {}
    answer = await site.send(f"/jobs/job-a/{what}", by="ada", **more)
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        f"/?did={what}&job=job-a#job-job-a",
    )
    assert await site.value(f"SELECT {fact} FROM jobs")  # noqa: S608 - written above
    assert "job-a" in text(await site.page(answer.headers["location"]), "message")


async def test_a_job_without_code_is_forgotten_by_a_form(site: Site) -> None:
    """After a confirmation; then its page has only its history. Other jobs have no such button."""
    await add_job(site.connection, "moon")
    await add_run(site.connection, "moon", "failed", began_ago=60, result="ValueError: dark")
    assert 'action="/jobs/moon/forget"' in await site.page("/jobs/moon")
    assert "Forget moon?" in text(await site.page("/jobs/moon/forget"), "question")
    answer = await site.send("/jobs/moon/forget", by="ada", back="job")
    assert answer.status_code == 303
    page = text(await site.page(answer.headers["location"]))
    assert "This job was forgotten by ada at" in page
    assert "ValueError: dark" in page
    assert "moon" not in text(await site.page("/jobs"))
    await add_job(site.connection, "sun")
    await add_instance(site.connection)
    assert "/forget" not in await site.page("/jobs/sun")
    assert "can't be forgotten" in text(await site.page("/jobs/sun/forget"), "question")
    answer = await site.send("/jobs/sun/forget", by="ada", back="job")
    assert answer.status_code == 409
    assert "a running instance has its code" in answer.text


async def test_a_schedule_is_set_and_reset_by_forms(site: Site) -> None:
    """The row and the job's own page mark that it differs from the code; who and when are there."""
    await add_job(site.connection, "moon", other_schedules=["every 7200 s"])
    assert "set by" not in text(await site.page())
    assert "an instance with another version declares: every 2 hours" in text(
        await site.page("/jobs/moon")
    )
    answer = await site.send("/jobs/moon/schedule", by=HOSTILE, back="job", every="1 000")
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/jobs/moon?did=schedule&job=moon#job-moon",
    )
    page = await site.page(answer.headers["location"])
    assert "moon now runs every 1000 seconds, on all instances." in text(page, "message")
    assert "<script>alert(1)" not in page
    answer = await site.send(
        "/jobs/moon/schedule", by="ada", back="job", every="", cron="@daily", tz="Europe/Berlin"
    )
    page = text(await site.page(answer.headers["location"]))
    assert re.search(r"set by ada at [-\d: ]+ UTC; declared in code: every 5 minutes", page)
    assert "Reset to: every 5 minutes" in page
    for row in (text(await site.page(), "job-moon"), text(await site.page("/jobs"))):
        assert "at midnight every day, Europe/Berlin" in row or "at 00:00 every day" in row, row
        assert "set by ada; code: every 5 minutes" in row
    answer = await site.send("/jobs/moon/schedule/reset", by="ada")
    assert answer.headers["location"] == "/?did=reset&job=moon#job-moon"
    assert "set by" not in text(await site.page())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "Enter either an interval or a cron expression"),
        ({"every": "60", "cron": "* * * * *"}, "Enter either an interval or a cron expression"),
        ({"every": "60", "tz": "UTC"}, "Enter either an interval or a cron expression"),
        ({"every": "0"}, "The interval must be a whole number of seconds, 1 or more."),
        ({"every": "1.5"}, "The interval must be a whole number of seconds, 1 or more."),
        ({"every": "31622401"}, "The interval (31622401 s) must be between 1 s and 366 days."),
        ({"cron": "* * * *"}, "The cron expression '* * * *' has 4 fields"),
        ({"cron": "a\0b"}, "cron must be 1 to 200 characters"),
        ({"cron": "@daily", "tz": HOSTILE}, "There is no time zone"),
    ],
)
async def test_what_is_no_schedule_is_reported_on_the_page(
    site: Site, fields: dict[str, str], sentence: str
) -> None:
    """In the words of the API; the page is all there, and the job as it was."""
    await add_job(site.connection, "moon")
    answer = await site.send("/jobs/moon/schedule", by="ada", back="job", **fields)
    assert answer.status_code == 422
    assert f"Not done. {sentence}" in text(answer.text, "message")
    assert "<script>alert(1)" not in answer.text
    assert "Durations" in answer.text
    assert await site.value("SELECT schedule_override IS NULL FROM jobs")


async def test_a_cancel_that_comes_after_the_work_says_so(site: Site) -> None:
    """In the confirmation, in the row, and in the answer."""
    instance = await add_instance(site.connection)
    await add_job(site.connection, "moon", **running(instance, "app1"), work_ended_at=-2 * SECOND)
    assert "The work was done at" in text(await site.page("/jobs/moon/cancel"), "question")
    assert "Work done, holding to 2 min." in text(await site.page(), "job-moon")
    answer = await site.send("/jobs/moon/cancel", by="ada")
    message = text(await site.page(answer.headers["location"]), "message")
    assert message.startswith("moon had already finished its work: the run succeeded and ends now.")


async def test_a_form_redirects_to_its_page(site: Site) -> None:
    """A form on a job's own page leads back to that page."""
    await add_job(site.connection, "job-a")
    own = {"Referer": f"{site.instance.url}/jobs/job-a"}
    answer = await site.client.post("/jobs/job-a/pause", data={"by": "a"}, headers=own)
    assert answer.headers["location"].startswith("/jobs/job-a?did=pause")
    again = await site.client.post("/jobs/job-a/run", data={"by": "a"}, headers=own)
    assert again.status_code == 409
    assert "Not done. job-a is paused (by a, since " in text(again.text, "message")
    assert "Durations" in again.text
    question = await site.page("/jobs/job-a/cancel", headers=own)
    assert "job-a is not running: nothing to cancel." in text(question)


async def test_a_refused_control_is_reported_on_the_page(site: Site) -> None:
    """The answer has the refusal's status and the complete page."""
    await add_example(site.connection)
    for call, sentence in (
        (
            "job-running/run",
            "Not done. job-running was not started: it is already running on app1",
        ),
        ("job-paused/run", "Not done. job-paused is paused (by ada, since "),
        ("job-waiting/cancel", "Not done. job-waiting is not running (it is waiting), so"),
    ):
        answer = await site.send(f"/jobs/{call}", by="ada")
        assert answer.status_code == 409
        assert text(answer.text, "message").startswith(sentence)
        assert 'id="job-job-waiting"' in answer.text


BEFORE: Final = """
SELECT (SELECT jsonb_agg(j ORDER BY name) FROM jobs j), (SELECT jsonb_agg(u) FROM users u)
"""


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (403, {"headers": {"Sec-Fetch-Site": "cross-site"}}),
        (403, {"headers": {"Origin": "https://elsewhere.example"}}),
        (415, {"json": {"by": "ada"}}),
        (415, {"content": b"by=ada"}),
        (400, {"content": b"by=a&by=b", "headers": {"Content-Type": "FORM"}}),
        (400, {"content": b"by=%ff%fe", "headers": {"Content-Type": "FORM"}}),
        (400, {"content": b"by=\xff", "headers": {"Content-Type": "FORM"}}),
        (
            400,
            {
                "content": b"&".join(b"f%d=1" % n for n in range(30)),
                "headers": {"Content-Type": "FORM"},
            },
        ),
        (413, {"content": b"by=" + b"a" * 20_000, "headers": {"Content-Type": "FORM"}}),
    ],
)
async def test_forms_of_other_sites_and_invalid_forms_are_refused(
    site: Site, status: int, change: dict[str, dict[str, str]]
) -> None:
    """With a page, and no row changes."""
    await add_job(site.connection, "job-a")
    options = {**change}
    headers = dict(change.get("headers", {}))
    if headers.get("Content-Type") == "FORM":
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    options["headers"] = {"Accept": "text/html", **headers}
    if status == 403:
        options["data"] = {"by": "ada", "user": "1", "what": "add", "amount": "1", "key": "k"}
    before = await site.connection.fetchrow(BEFORE)
    for path in ("/jobs/job-a/pause", "/change"):
        answer = await site.client.post(path, **options)  # type: ignore[arg-type]
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("text/html")
    assert await site.connection.fetchrow(BEFORE) == before


async def test_a_name_that_can_not_be_displayed_is_refused(site: Site) -> None:
    """As by the API."""
    await add_job(site.connection, "job-a")
    for fields in ({"by": "a\u202eb"}, {"by": "x" * 101}, {"by": "a", "surprise": "1"}):
        answer = await site.send("/jobs/job-a/pause", **fields)
        assert answer.status_code == 422
    assert await site.value("SELECT paused_at IS NULL FROM jobs")
    assert (await site.send("/jobs/job-a/pause", by="")).status_code == 303
    assert await site.value("SELECT paused_by FROM jobs") == "api"


def field(html: str, name: str) -> str:
    """Return the value of a field in the form for changes."""
    form = html[html.index('action="/change"') :]
    found = re.search(rf'name="{name}"[^>]*value="([^"]*)"', form)
    assert found is not None
    return found[1]


async def test_a_change_is_made_once_and_reported_from_the_ledger(site: Site) -> None:
    """Sent twice with the form's key, it takes effect once; the page shows the balance it left."""
    user = await site.open()
    key = field(await site.page(), "key")
    for _ in range(2):
        answer = await site.send("/change", user=user, what="withdraw", amount="1 500", key=key)
        assert (answer.status_code, answer.headers["location"]) == (
            303,
            f"/?user={user}&entry=2#balances",
        )
    html = await site.page(answer.headers["location"])
    assert text(html, "changed") == f"Withdrew 1 500. User {user} then had 8 500."
    assert f'action="/users/{user}"' in html  # the form that undoes it
    assert field(html, "key") != key
    assert await site.value("SELECT balance FROM users WHERE id = $1", int(user)) == 8500


TOO_MUCH: Final = (
    "Not done: user 1 has 10 000, so 10 001 can't be withdrawn (1 short). Nothing was changed."
)
TOO_MANY: Final = (
    "Not done: user 1 has 10 000, and 9 007 199 254 740 991 more would exceed the largest balance "
    "by 10 000. Nothing was changed."
)
NO_AMOUNT: Final = "Not done: the amount must be a whole number from 1 to 9 007 199 254 740 991."


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"amount": "10001"}, 409, TOO_MUCH),
        ({"what": "add", "amount": "9007199254740991"}, 409, TOO_MANY),
        ({"user": "404404"}, 404, "Not done. There is no user 404404."),
        ({"user": "me"}, 422, "Not done: the user id must be a whole number, 1 or more."),
        ({"amount": "-5"}, 422, NO_AMOUNT),
        ({"amount": "1.5"}, 422, NO_AMOUNT),
        ({"amount": "0"}, 422, NO_AMOUNT),
        ({"amount": "9007199254740992"}, 422, NO_AMOUNT),
        ({"what": "double"}, 422, "Not done. what must be withdraw or add."),
    ],
)
async def test_a_refused_change_is_reported_in_words(
    site: Site, fields: dict[str, str], status: int, sentence: str
) -> None:
    """In a sentence beside the form, which keeps its input; nothing is changed."""
    entries = await site.value("SELECT count(*) FROM entries")
    sent = {"user": "1", "what": "withdraw", "amount": "5", **fields}
    answer = await site.send("/change", key=token_hex(8), **sent)
    assert answer.status_code == status
    assert text(answer.text, "changed") == sentence
    assert field(answer.text, "amount") == sent["amount"]
    assert field(answer.text, "user") == sent["user"]
    assert await site.value("SELECT count(*) FROM entries") == entries


# -- when the database is unavailable ---------------------------------------------------------


async def until(
    what: Callable[[httpx.Response], bool], client: httpx.AsyncClient
) -> httpx.Response:
    """Get the page until it satisfies a condition."""
    async with asyncio.timeout(30):
        while not what(answer := await client.get("/", headers=PEOPLE)):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.1)
    return answer


async def test_without_its_database_the_page_still_comes() -> None:
    """503 and a sentence; the last known state is shown as such; the page reconnects by itself."""
    async with own_postgres() as server, served(server.environment()) as client:
        await kill(server)
        answer = await until(lambda answer: answer.status_code == 503, client)
        assert answer.headers["retry-after"] == "1"
        assert 'data-stream="/live"' in answer.text
        assert "reconnects by itself" in text(answer.text)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        form = {"user": "1", "what": "add", "amount": "1", "key": "k"}
        assert (await client.post("/change", data=form)).status_code == 503
        assert (await client.get("/jobs/any")).status_code == 503
        await server.start()
        seen = await until(lambda answer: answer.status_code == 200, client)
        assert "There are no jobs." in text(seen.text)
        await kill(server)
        answer = await until(lambda answer: answer.status_code == 503, client)
        assert "The last known state is below." in text(answer.text, "message")
        assert "There are no jobs." in text(answer.text)
        refused = await client.post("/change", data=form)
        assert refused.status_code == 503
        assert "amount" in refused.text
        await server.start()
        await until(lambda answer: answer.status_code == 200, client)
