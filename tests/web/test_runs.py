"""The pages of runs: all of them with filters, and one with its attempts; without a browser."""

import re
from html import unescape
from typing import Final

from balance_app.web.runs import RUNS_ON_PAGE
from tests.jobs.rows import add_instance, add_job, insert, running
from tests.web.site import SECOND, Site, add_run, text

HOSTILE: Final = "<script>alert(1)</script>"


def listed(html: str) -> list[int]:
    """Return the runs of a page, in its order."""
    return [int(run) for run in re.findall(r'<tr id="run-(\d+)"', html)]


async def add_runs(site: Site) -> dict[str, int]:
    """Add runs of two jobs on two instances, ten minutes apart, the last one under way."""
    await add_job(site.connection, "job-a")
    await add_job(site.connection, "job-b")
    runs = {}
    for place, (name, job, outcome, server) in enumerate(
        (
            ("first", "job-a", "succeeded", "app1"),
            ("failed", "job-b", "failed", "app2"),
            ("late", "job-a", "failed", "app1"),
            ("now", "job-b", None, "app2"),
        )
    ):
        runs[name] = await add_run(
            site.connection, job, outcome, began_ago=3000 - 600 * place, server=server
        )
    return runs


async def test_runs_of_all_jobs_are_listed_the_latest_first(site: Site) -> None:
    """Each leads to its own page, its job and its instance."""
    runs = await add_runs(site)
    html = await site.page("/runs")
    assert listed(html) == sorted(runs.values(), reverse=True)
    assert f'href="/runs/{runs["now"]}"' in html
    assert 'href="/jobs/job-b"' in html
    assert 'href="/runs?server=app2"' in html
    assert 'data-refresh="5"' in html
    assert 'href="/runs" aria-current="page"' in html
    assert "served by app1" in text(html)


async def test_the_filters_of_runs_are_in_the_address(site: Site) -> None:
    """Outcome, instance, job and time, alone and together."""
    runs = await add_runs(site)
    moments = {
        name: await site.value(
            "SELECT to_char(started_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"
            " FROM job_runs WHERE id = $1",
            run,
        )
        for name, run in runs.items()
    }
    for query, names in (
        ("outcome=failed", {"failed", "late"}),
        ("outcome=running", {"now"}),
        ("server=app1", {"first", "late"}),
        ("job=job-b", {"failed", "now"}),
        ("job=job-b&outcome=failed", {"failed"}),
        ("job=job-b&outcome=failed&server=app1", set()),
        (f"until={moments['failed']}", {"first"}),
        (f"since={moments['late']}", {"late", "now"}),
        (f"since={moments['failed']}&until={moments['now']}", {"failed", "late"}),
        ("since=2001-01-01", set(runs)),
        ("until=2001-01-01", set()),
    ):
        html = await site.page(f"/runs?{query}")
        assert listed(html) == sorted((runs[name] for name in names), reverse=True), query
        assert ("No runs match" in text(html)) == (not names), query


async def test_runs_are_listed_page_by_page(site: Site) -> None:
    """Each once, with the filters kept."""
    await add_job(site.connection, "job-a")
    await site.connection.execute(
        "INSERT INTO job_runs (job, fence, due_at, server, started_at, ended_at, outcome)"
        " SELECT 'job-a', n, now(), 'app' || n % 2, now() - n * interval '1 s', now(),"
        " 'succeeded' FROM generate_series(1, 230) AS n"
    )
    path, seen = "/runs?server=app1", []
    while path:
        html = await site.page(path)
        assert len(listed(html)) <= RUNS_ON_PAGE
        seen += listed(html)
        more = re.search(r'href="(/runs\?[^"]+)">Earlier runs', html)
        path = unescape(more[1]) if more else ""
    assert len(seen) == len(set(seen)) == 115
    assert seen == sorted(seen, reverse=True)
    assert "Latest runs" in html


async def test_wrong_filters_are_reported(site: Site) -> None:
    """With a sentence, and as text."""
    for query, sentence in (
        ("outcome=odd", "outcome"),
        ("job=A%20B", "must be the name of a job"),
        ("since=tomorrow", "A time is written as"),
        ("since=0001-01-01T00:00%2B14:00", "A time is written as"),
        ("until=9999-12-31T23:59-14:00", "A time is written as"),
        ("before=x", '"before" must be a whole number'),
        (f"server=a%00{HOSTILE}", "printable characters"),
    ):
        html = await site.page(f"/runs?{query}", 422)
        assert sentence in text(html), query
        assert HOSTILE not in html


async def test_a_lost_runs_page_says_where_it_resumed(site: Site) -> None:
    """When it was due and claimed, that it was lost, and by which run it was resumed."""
    heir = await add_instance(site.connection, "app1")
    await add_job(site.connection, "job-a", **running(heir, "app1", seconds=10))
    lost = await add_run(
        site.connection, "job-a", "lost", began_ago=50, seconds=24, server="app3", fence=6
    )
    after = await add_run(site.connection, "job-a", None, began_ago=10, server="app1", fence=7)
    other = await add_run(site.connection, "job-a", began_ago=500, fence=5)
    await site.connection.execute(
        "UPDATE job_runs SET due_at = now() - interval '51 s', attempt = fence - 6 WHERE fence > 5"
    )
    html = await site.page(f"/runs/{lost}")
    assert f"app3 stopped responding. The job resumed on app1 as run {after}, 1" in text(html)
    for word in ("scheduled for", "claimed", "lost", "attempt 1 of 2", "fence 6"):
        assert word in text(html), word
    assert f'href="/runs/{other}"' not in html
    assert 'data-refresh=""' in html
    html = await site.page(f"/runs/{after}")
    assert f"attempt 2 of 2 after run {lost}, was lost" in text(html)
    assert 'data-refresh="2"' in html
    old = await site.client.get(f"/jobs/job-a/runs/{lost}")
    assert (old.status_code, old.headers["location"]) == (303, f"/runs/{lost}")


async def test_a_run_under_way_shows_its_checkpoint_and_progress(site: Site) -> None:
    """And what it has written so far."""
    ada = await add_instance(site.connection, "app1")
    await add_job(
        site.connection,
        "job-a",
        checkpoint='{"row": 17}',
        done=3,
        total=9,
        **running(ada, "app1"),
    )
    run = await add_run(site.connection, "job-a", None, began_ago=40, fence=7, holder=ada)
    await insert(
        site.connection,
        "job_run_lines",
        job="job-a",
        fence=7,
        number=1,
        logged_at=-SECOND,
        level="info",
        text=HOSTILE,
    )
    html = await site.page(f"/runs/{run}")
    assert '{"row": 17}' in unescape(html)
    assert "3 of 9 done" in text(html)
    assert f"info {HOSTILE}" in text(html)
    assert HOSTILE not in html
