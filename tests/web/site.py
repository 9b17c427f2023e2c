"""An instance whose rows only the test changes, and readers of its pages."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from html import unescape
from html.parser import HTMLParser
from typing import Any

import httpx

from tests.balances.hostile import one_instance
from tests.jobs.rows import Connection, add_instance, add_job, insert, running
from tests.processes import Instance, connect, http_client

SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Site:
    """An instance that runs no jobs, a client, and a connection to write rows."""

    instance: Instance
    client: httpx.AsyncClient
    connection: Connection

    async def page(
        self, path: str = "/", status: int = 200, headers: dict[str, str] | None = None
    ) -> str:
        """Get a page."""
        answer = await self.client.get(path, headers={"Accept": "text/html", **(headers or {})})
        assert answer.status_code == status, answer.text
        return answer.text

    async def send(self, path: str, **fields: str) -> httpx.Response:
        """Submit a form, as a browser does from a page of the site."""
        return await self.client.post(
            path,
            data=fields,
            headers={"Origin": self.instance.url, "Sec-Fetch-Site": "same-origin"},
        )

    async def value(self, sql: str, *arguments: object) -> Any:  # noqa: ANN401 - a row's
        return await self.connection.fetchval(sql, *arguments)

    async def open(self, balance: int = 10_000) -> str:
        """Create a user; return the id."""
        answer = await self.client.post("/api/users", json={"balance": balance})
        return str(answer.json()["userId"])

    async def clear(self) -> None:
        """Delete all jobs, runs and instances."""
        await self.connection.execute(
            "DELETE FROM job_runs; DELETE FROM jobs; DELETE FROM instances"
        )


@asynccontextmanager
async def site(postgres: dict[str, str]) -> AsyncIterator[Site]:
    """Run a site on an empty database."""
    async with one_instance(postgres) as (instance, database):
        connection = await connect(database)
        async with http_client(instance.url) as client:
            yield Site(instance, client, connection)
        await connection.close()


async def add_run(  # noqa: PLR0913 - the columns of a run
    connection: Connection,
    job: str,
    outcome: str | None = "succeeded",
    *,
    began_ago: float = 60,
    seconds: float = 20,
    server: str = "app1",
    fence: int | None = None,
    result: str | None = None,
    holder: object = None,
) -> int:
    """Add a run; return its id."""
    known: int = await connection.fetchval("SELECT count(*) FROM job_runs")
    await insert(
        connection,
        "job_runs",
        job=job,
        fence=known + 1 if fence is None else fence,
        due_at=-began_ago * SECOND,
        holder=holder,
        server=server,
        started_at=-began_ago * SECOND,
        ended_at=None if outcome is None else (seconds - began_ago) * SECOND,
        outcome=outcome,
        result=result,
    )
    number: int = await connection.fetchval("SELECT max(id) FROM job_runs")
    return number


async def add_example(connection: Connection) -> None:
    """Add two instances, and jobs in every state, with runs."""
    ada, bob = await add_instance(connection, "app1"), await add_instance(connection, "app2")
    await add_job(
        connection, "job-running", done=30, total=120, note="row 30", **running(ada, "app1")
    )
    await add_run(connection, "job-running", None, began_ago=40, fence=7, holder=ada)
    await add_job(
        connection, "job-cancelled", cancel_requested_by="ada", **running(bob, "app2", seconds=5)
    )
    await add_job(connection, "job-waiting", due_at=100 * SECOND)
    await add_job(connection, "job-overdue", due_at=-600 * SECOND)
    await add_job(
        connection,
        "job-paused",
        paused_at=-30 * SECOND,
        paused_by="ada",
        pause_reason="a full disk",
    )
    await add_job(
        connection,
        "job-failed",
        attempt=1,
        failure_streak=1,
        last_outcome="failed",
        last_server="app2",
        last_started_at=-90 * SECOND,
        last_ended_at=-60 * SECOND,
        last_result="ZeroDivisionError: division by zero",
    )
    await add_run(
        connection,
        "job-failed",
        "failed",
        began_ago=90,
        seconds=30,
        server="app2",
        result="ZeroDivisionError: division by zero",
    )
    for number in range(5):
        await add_run(connection, "job-waiting", began_ago=1000 - 120 * number)


async def add_movements(site: Site) -> str:
    """Open a user with a long name, holds, and entries of every kind; return the id."""
    user, other = await site.open(9_000_000_000_000), await site.open()
    name = f"customer-{user}-" + 150 * "m"
    post = site.client.post
    await site.client.patch(
        f"/api/users/{user}",
        json={"floor": -9_000_000_000_000, "externalId": name},
        headers={"If-Match": "*"},
        params={"by": 100 * "w"},
    )
    said = {"reference": 200 * "r", "note": "n " * 200}
    sides = {"fromUserId": int(user), "toUserId": int(other)}
    for amount in (5, 7_000_000_000_000):
        await post("/api/transfers", json={**sides, "amount": amount, **said})
    await post(f"/api/users/{user}/entries/2/reverse")
    for _ in range(7):
        hold = {"userId": int(user), "amount": 1_000_000_000_000, "expiresInSeconds": 9_000}
        await post("/api/holds", json={**hold, **said})
    await post(f"/api/holds/{user}-1/capture")
    await post("/api/balance", json={"userId": int(user), "amount": -1})
    return user


def text(html: str, id_: str | None = None) -> str:
    """Return the text of a page, or of one element, as a screen reader gets it."""
    reader = _Reader(id_)
    reader.feed(html)
    reader.close()
    return re.sub(r"\s+", " ", unescape("".join(reader.texts))).strip()


_EMPTY = {"input", "meta", "link", "rect", "path"}


class _Reader(HTMLParser):
    def __init__(self, id_: str | None) -> None:
        super().__init__()
        self._id = id_
        self._open: list[tuple[str, bool]] = []
        self.texts: list[str] = []

    def _within(self) -> bool:
        return self._id is None or any(found for _, found in self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in _EMPTY:
            self._open.append((tag, given.get("id") == self._id))
        if self._within():
            self.texts.append(f" {given.get('aria-label') or ''} ")

    def handle_endtag(self, tag: str) -> None:
        while tag not in _EMPTY and self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._within():
            self.texts.append(data)


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
