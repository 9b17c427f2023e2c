"""The contract of the jobs' routes, call by call."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import httpx
import jsonschema_rs
import pytest

from balance_app.jobs import Registry
from tests import processes
from tests.balances.hostile import one_instance
from tests.jobs.fleet import read_event_logs
from tests.jobs.rows import Connection, add_instance, add_job, insert, running
from tests.processes import FLEET, Instance, connect, http_client
from tests.system.databases import freeze, own_postgres, thaw

SECOND: Final = timedelta(seconds=1)
JOBS: Final = set(Registry.load("balance_app.maintenance"))
Answers = list[httpx.Response]


@dataclass(frozen=True)
class Quiet:
    """An instance that runs no jobs, and a connection to write rows that no other changes."""

    instance: Instance
    client: httpx.AsyncClient
    connection: Connection

    async def job(self, name: str) -> dict[str, Any]:
        return await job(self.client, name)

    async def post(self, call: str, **query: str) -> httpx.Response:
        return await self.client.post(f"/api/cron/jobs/{call}", params=query)

    async def schedule(self, name: str, body: object, **query: str) -> httpx.Response:
        """Set a schedule; without a body reset it."""
        address = f"/api/cron/jobs/{name}/schedule"
        if body is None:
            return await self.client.delete(address, params=query)
        return await self.client.put(address, params=query, json=body)


@pytest.fixture(scope="module")
async def shared(postgres: dict[str, str]) -> AsyncIterator[Quiet]:
    """An instance with JOBS_ENABLED=false, for most of this file."""
    async with one_instance(postgres) as (instance, database):
        connection = await connect(database)
        async with http_client(instance.url) as client:
            yield Quiet(instance, client, connection)
        await connection.close()


@pytest.fixture
async def quiet(shared: Quiet) -> Quiet:
    """The shared instance, without any rows."""
    await shared.connection.execute("DELETE FROM job_runs")
    await shared.connection.execute("ALTER TABLE job_runs ALTER id RESTART")
    await shared.connection.execute("DELETE FROM jobs")
    await shared.connection.execute("DELETE FROM instances")
    return shared


@asynccontextmanager
async def fleet(
    database: dict[str, str], event_log: Path, *, seconds: float
) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Run two instances with one job, `job-01`, of that duration; yield a client of each."""
    instances = [
        Instance(
            database,
            name,
            program=FLEET,
            FLEET_EVENT_LOGS=str(event_log),
            FLEET_JOBS="1",
            FLEET_SECONDS=str(seconds),
            FLEET_EVERY="3600",
            JOB_WARM_UP_SECONDS="0.1",
            JOB_LEASE_SECONDS="3",
            JOB_HEARTBEAT_SECONDS="0.5",
        )
        for name in ("app1", "app2")
    ]
    async with processes.running(instances), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(http_client(instance.url)) for instance in instances
        ]
        # An instance is ready before it has declared its jobs.
        await until(lambda found: bool(found["jobs"]), lambda: status(clients[0]))
        yield clients


async def status(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/api/cron/status")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def job(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    (found,) = (job for job in (await status(client))["jobs"] if job["name"] == name)
    return dict(found)


async def until(
    holds: Callable[[dict[str, Any]], bool], ask: Callable[[], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Repeat a request until its answer satisfies a condition."""
    async with asyncio.timeout(30):
        while True:
            answer = await ask()
            if holds(answer):
                return answer
            await asyncio.sleep(0.02)


def tally(answers: Answers) -> dict[str, int]:
    codes = [answer.json().get("code", str(answer.status_code)) for answer in answers]
    return {code: codes.count(code) for code in sorted(set(codes))}


async def conforms(client: httpx.AsyncClient, model: str, answer: object) -> None:
    """Check that an answer has the documented schema and no other members."""
    document = (await client.get("/openapi.json")).json()
    schema = {**document["components"]["schemas"][model], "components": document["components"]}
    jsonschema_rs.validate(schema, answer)
    _no_more(document["components"]["schemas"], {"$ref": f"#/{model}"}, answer)


def _no_more(schemas: dict[str, Any], schema: dict[str, Any], answer: object) -> None:
    for choice in schema.get("anyOf", [schema]):
        if "$ref" in choice and isinstance(answer, dict):
            fields = schemas[choice["$ref"].rpartition("/")[2]]["properties"]
            assert answer.keys() == fields.keys()
            for name, value in answer.items():
                _no_more(schemas, fields[name], value)
        elif isinstance(answer, list):
            for item in answer:
                _no_more(schemas, choice["items"], item)


# -- reading -----------------------------------------------------------------------------------


async def test_every_job_of_the_service_is_listed(database: dict[str, str]) -> None:
    """The ten jobs, as documented, on the instance that runs them."""
    async with (
        Instance(database, JOB_WARM_UP_SECONDS="0.1") as instance_,
        http_client(instance_.url) as client,
    ):
        found = await until(lambda found: found["counts"]["running"] > 0, lambda: status(client))
        assert {job["name"] for job in found["jobs"]} == JOBS
        await conforms(client, "StatusAnswer", found)
    (instance,) = found["instances"]
    at_work = [job for job in found["jobs"] if job["state"] == "running"]
    assert (instance["server"], instance["live"], instance["running"]) == (
        "app1",
        True,
        len(at_work),
    )
    assert {(job["server"], job["instanceId"]) for job in at_work} == {("app1", instance["id"])}
    assert sum(found["counts"].values()) == len(JOBS)
    assert all(job["description"] and job["schedule"]["words"] for job in found["jobs"])


async def test_an_instance_without_jobs_serves_the_api(quiet: Quiet) -> None:
    """With JOBS_ENABLED=false it shows and controls the jobs of other instances."""
    other = await add_instance(quiet.connection, "app9")
    await add_job(quiet.connection, "running", **running(other, "app9"), done=1, total=3, note="x")
    await add_job(
        quiet.connection,
        "waiting",
        last_outcome="succeeded",
        last_server="app9",
        last_started_at=-60 * SECOND,
        last_ended_at=-50 * SECOND,
        last_result="all is well",
    )
    await add_job(quiet.connection, "paused", paused_at=-SECOND, paused_by="ada")
    found = await status(quiet.client)
    await conforms(quiet.client, "StatusAnswer", found)
    assert [(job["name"], job["state"]) for job in found["jobs"]] == [
        (state, state) for state in ("paused", "running", "waiting")
    ]
    assert [instance["running"] for instance in found["instances"]] == [1]
    for call in ("waiting/run", "running/cancel", "waiting/pause", "paused/resume"):
        answer = await quiet.post(call)
        assert answer.status_code == 202, answer.text
        await conforms(quiet.client, "JobAnswer", answer.json())
        assert answer.json() == {
            **await quiet.job(answer.json()["name"]),
            "elapsedSeconds": answer.json()["elapsedSeconds"],
        }


async def test_the_history_is_read_by_pages(quiet: Quiet) -> None:
    """The latest first; pages join without gap or overlap, with and without filters."""
    for name in ("one", "two"):
        await add_job(quiet.connection, name)
    for number in range(1, 8):
        await insert(
            quiet.connection,
            "job_runs",
            job="one" if number % 2 else "two",
            fence=number,
            due_at=-60 * SECOND,
            holder=uuid4(),
            server="app1",
            started_at=-50 * SECOND,
            ended_at=None if number == 7 else -40 * SECOND,
            outcome=None if number == 7 else "failed" if number % 3 == 0 else "succeeded",
            result="so",
        )
    await insert(
        quiet.connection,
        "job_runs",
        job="two",
        due_at=-300 * SECOND,
        last_due_at=-180 * SECOND,
        ticks=3,
        started_at=-SECOND,
        ended_at=-SECOND,
        outcome="skipped",
        result="paused by ada",
    )

    async def pages(limit: int, **query: str) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = []
        cursor: dict[str, int] = {}
        while True:
            answer = await quiet.client.get(
                "/api/cron/history", params={**query, **cursor, "limit": limit}
            )
            assert answer.status_code == 200, answer.text
            await conforms(quiet.client, "HistoryAnswer", answer.json())
            runs += answer.json()["runs"]
            assert len(answer.json()["runs"]) <= limit
            if answer.json()["next"] is None:
                return runs
            cursor = {"before": answer.json()["next"]}

    async def ids(limit: int, **query: str) -> list[int]:
        return [run["id"] for run in await pages(limit, **query)]

    for limit in (1, 3, 4, 8, 100):
        assert await ids(limit) == [8, 7, 6, 5, 4, 3, 2, 1]
        assert await ids(limit, job="one") == [7, 5, 3, 1]
        assert await ids(limit, outcome="succeeded") == [5, 4, 2, 1]
        assert await ids(limit, job="two", outcome="failed") == [6]
        assert await ids(limit, job="two", outcome="lost") == []
    skipped, under_way, ended, *_ = await pages(100)
    assert (skipped["ticks"], skipped["startedAt"], skipped["seconds"]) == (3, None, None)
    assert skipped["dueAt"] < skipped["lastDueAt"]
    assert (under_way["outcome"], under_way["endedAt"]) == (None, None)
    assert 50 <= under_way["seconds"] < 90
    assert ended["seconds"] == pytest.approx(10, abs=1)
    answer = await quiet.client.get("/api/cron/history", params={"job": "three"})
    assert (answer.status_code, answer.json()["code"]) == (404, "job-not-found")


async def test_what_a_run_said_is_read(quiet: Quiet) -> None:
    """Its lines in their order, what went before them as a number, its traceback."""
    await add_job(quiet.connection, "one")
    run = {"job": "one", "due_at": -60 * SECOND, "started_at": -60 * SECOND, "server": "app1"}
    await insert(quiet.connection, "job_runs", **run, fence=7, outcome="failed", ended_at=-SECOND)
    await insert(quiet.connection, "job_runs", **run, fence=8)
    skipped = {**run, "server": None, "last_due_at": -60 * SECOND, "outcome": "skipped"}
    await insert(quiet.connection, "job_runs", **skipped, fence=None, ended_at=-SECOND)
    for number in (30, 9, 10):
        line = {"logged_at": -SECOND, "level": "info", "text": f"line\nn={number}"}
        await insert(quiet.connection, "job_run_lines", job="one", fence=7, number=number, **line)
    await insert(quiet.connection, "job_run_tracebacks", job="one", fence=7, text="ValueError: x")
    found = (await quiet.client.get("/api/cron/runs/1/log")).json()
    await conforms(quiet.client, "RunLogAnswer", found)
    assert (found["dropped"], found["traceback"]) == (8, "ValueError: x")
    assert [(line["number"], line["level"], line["text"]) for line in found["lines"]] == [
        (number, "info", f"line\nn={number}") for number in (9, 10, 30)
    ]
    (listed,) = (
        run
        for run in (await quiet.client.get("/api/cron/history")).json()["runs"]
        if run["id"] == 1
    )
    assert found["run"] == listed
    for silent in (2, 3):
        found = (await quiet.client.get(f"/api/cron/runs/{silent}/log")).json()
        assert (found["lines"], found["dropped"], found["traceback"]) == ([], 0, None)
        assert found["run"]["id"] == silent
    answer = await quiet.client.get("/api/cron/runs/4/log")
    assert (answer.status_code, answer.json()["code"]) == (404, "run-not-found")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("address", "pointer", "code"),
    [
        ("GET history?outcome=lucky", "query:outcome", "not-an-outcome"),
        ("GET history?outcome=", "query:outcome", "not-an-outcome"),
        ("GET history?job=No+name", "query:job", "not-a-name"),
        ("GET history?job=a%00", "query:job", "not-a-name"),
        ("GET history?before=0", "query:before", "out-of-range"),
        ("GET history?before=1e3", "query:before", "not-an-integer"),
        ("GET history?before=9007199254740992", "query:before", "out-of-range"),
        ("GET history?limit=1001", "query:limit", "out-of-range"),
        ("GET history?limit=1&limit=2", "query:", "duplicate-parameter"),
        ("GET history?page=2", "query:", "unknown-field"),
        ("GET runs/0/log", "path:run", "out-of-range"),
        ("GET runs/1e3/log", "path:run", "not-an-integer"),
        ("POST jobs/No/run", "path:name", "not-a-name"),
        ("POST jobs/a%00b/pause", "path:name", "not-a-name"),
        ("POST jobs/a/run?by=", "query:by", "not-printable"),
        ("POST jobs/a/run?by=%1b[31m", "query:by", "not-printable"),
        ("POST jobs/a/run?by=%00", "query:by", "not-printable"),
        (f"POST jobs/a/run?by={'x' * 101}", "query:by", "not-printable"),
        ("POST jobs/a/cancel?by=a&by=b", "query:", "duplicate-parameter"),
        ("POST jobs/a/resume?reason=x", "query:", "unknown-field"),
        (f"POST jobs/a/pause?reason={'x' * 201}", "query:reason", "not-printable"),
        ("POST jobs/a/pause?reason=a%0Ab", "query:reason", "not-printable"),
        ("PUT jobs/No/schedule", "path:name", "not-a-name"),
        ("PUT jobs/a/schedule?by=", "query:by", "not-printable"),
        ("DELETE jobs/a/schedule?by=a&by=b", "query:", "duplicate-parameter"),
        ("DELETE jobs/a/schedule?every=60", "query:", "unknown-field"),
    ],
)
async def test_wrong_questions_are_refused(
    quiet: Quiet, address: str, pointer: str, code: str
) -> None:
    """The 422 names the pointer and the code of the fault; nothing is changed."""
    method, _, path = address.partition(" ")
    answer = await quiet.client.request(method, f"/api/cron/{path}")
    assert answer.status_code == 422, answer.text
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"]) == (pointer, code)
    assert answer.json()["detail"] == fault["detail"]


async def test_the_longest_names_are_taken(quiet: Quiet) -> None:
    """`by` may have a hundred letters of any script, `reason` two hundred."""
    await add_job(quiet.connection, "a-job")
    who, why = "ü" * 100, "日" * 200
    answer = await quiet.post("a-job/pause", by=who, reason=why)
    assert answer.status_code == 202, answer.text
    assert answer.json()["paused"] == {
        "by": who,
        "reason": why,
        "at": answer.json()["paused"]["at"],
    }


# -- controls ----------------------------------------------------------------------------------


async def test_an_unknown_job_is_refused(quiet: Quiet) -> None:
    """404 for each of the four calls."""
    for call in ("run", "pause", "resume", "cancel"):
        answer = await quiet.post(f"nobody/{call}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job-not-found"), call


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy"}, True),
        ({"Origin": "http://{host}"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://{host}"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://evil-{host}"}, False),
        ({"Origin": "null"}, False),
    ],
)
async def test_requests_of_other_sites_are_refused(
    quiet: Quiet,
    headers: dict[str, str],
    taken: bool,  # noqa: FBT001
) -> None:
    """A browser states the site of the requesting page; only this service's own is accepted."""
    await add_instance(quiet.connection)
    await add_job(quiet.connection, "a-job")
    host = quiet.instance.url.removeprefix("http://")
    sent = {name: value.format(host=host) for name, value in headers.items()}
    for call in ("pause", "resume", "run", "cancel"):
        answer = await quiet.client.post(f"/api/cron/jobs/a-job/{call}", headers=sent)
        refused = (answer.status_code, answer.json().get("code")) == (403, "cross-site-request")
        assert refused is not taken, answer.text
    for method in ("PUT", "DELETE"):
        answer = await quiet.client.request(
            method,
            "/api/cron/jobs/a-job/schedule",
            headers=sent,
            json={"everySeconds": 60} if method == "PUT" else None,
        )
        assert (answer.status_code == 403) is not taken, answer.text
    assert ((await quiet.job("a-job"))["requestedBy"] == "api") is taken


async def test_a_run_is_requested(quiet: Quiet) -> None:
    """A future tick is replaced by a run now; a tick that is already due is unchanged."""
    await add_instance(quiet.connection)
    await add_job(quiet.connection, "later", due_at=60 * SECOND)
    await add_job(quiet.connection, "retry", due_at=-60 * SECOND, ready_at=60 * SECOND, attempt=2)
    before = {job["name"]: job for job in (await status(quiet.client))["jobs"]}
    later = (await quiet.post("later/run", by="ada")).json()
    assert later["dueAt"] == later["readyAt"] < before["later"]["dueAt"]
    assert (later["waiting"]["reason"], later["requestedBy"]) == ("requested", "ada")
    retry = (await quiet.post("retry/run", by="ada")).json()
    assert (retry["dueAt"], retry["attempt"]) == (before["retry"]["dueAt"], 2)
    assert (retry["readyAt"] < before["retry"]["readyAt"], retry["requestedBy"]) == (True, "ada")
    again = (await quiet.post("later/run", by="eve")).json()
    assert (again["readyAt"], again["requestedBy"]) == (later["readyAt"], "ada")


async def test_a_run_is_refused_by_the_state_that_it_quotes(quiet: Quiet) -> None:
    """A running job is not run again, a paused one not before it is resumed; nothing changes."""
    await add_job(quiet.connection, "running", **running(uuid4(), "app7"))
    await add_job(quiet.connection, "paused", paused_at=-SECOND, paused_by="ada")
    await add_job(
        quiet.connection, "both", **running(uuid4(), "app8"), paused_at=-SECOND, paused_by="ada"
    )
    await add_job(
        quiet.connection, "lost", **{**running(uuid4(), "app7"), "lease_expires_at": -SECOND}
    )
    before = await quiet.connection.fetch("SELECT * FROM jobs WHERE name <> 'lost' ORDER BY name")
    answers = {name: await quiet.post(f"{name}/run") for name in ("running", "paused", "both")}
    assert {name: (each.status_code, each.json()["code"]) for name, each in answers.items()} == {
        "running": (409, "job-running"),
        "paused": (409, "job-paused"),
        "both": (409, "job-running"),
    }
    assert answers["running"].json()["server"] == "app7"
    assert answers["paused"].json()["pausedBy"] == "ada"
    after = await quiet.connection.fetch("SELECT * FROM jobs WHERE name <> 'lost' ORDER BY name")
    assert before == after
    await add_instance(quiet.connection)
    assert (await quiet.post("lost/run")).status_code == 202


async def test_a_run_without_a_live_instance_with_its_code_is_refused(quiet: Quiet) -> None:
    """Instances without recent heartbeats do not count, nor instances without the job's code."""
    await add_instance(quiet.connection, "app1", missing=("moon",))
    await add_instance(quiet.connection, "app2", highest_number=0)
    gone = await add_instance(quiet.connection, "app3", seen_seconds_ago=50)
    await add_job(quiet.connection, "moon")
    await add_job(
        quiet.connection, "lost", **{**running(gone, "app3"), "lease_expires_at": -SECOND}
    )
    await quiet.connection.execute("UPDATE instances SET missing = missing || 'lost'::text")
    before = await quiet.connection.fetch("SELECT * FROM jobs ORDER BY name")
    for name in ("moon", "lost"):
        answer = await quiet.post(f"{name}/run")
        assert (answer.status_code, answer.json()["code"]) == (409, "job-without-code")
        assert (await quiet.job(name))["hasCode"] is False
    assert await quiet.connection.fetch("SELECT * FROM jobs ORDER BY name") == before
    await add_instance(quiet.connection, "app4")
    assert (await quiet.post("moon/run")).status_code == 202
    assert (await quiet.job("moon"))["hasCode"] is True


async def test_a_job_without_code_can_be_forgotten(quiet: Quiet) -> None:
    """It is on no list any more; its history and who forgot it first stay; its run is lost."""
    gone = await add_instance(quiet.connection, "app3", seen_seconds_ago=50)
    await add_job(
        quiet.connection, "moon", **{**running(gone, "app3"), "lease_expires_at": -SECOND}
    )
    await insert(
        quiet.connection,
        "job_runs",
        job="moon",
        fence=7,
        due_at=-60 * SECOND,
        holder=gone,
        server="app3",
        started_at=-60 * SECOND,
    )
    await add_job(quiet.connection, "sun")
    first = await quiet.post("moon/forget", by="ada")
    assert first.status_code == 200, first.text
    await conforms(quiet.client, "ForgottenAnswer", first.json())
    assert first.json()["forgottenBy"] == "ada"
    assert (await quiet.post("moon/forget", by="eve")).json() == first.json()
    found = await status(quiet.client)
    assert [job["name"] for job in found["jobs"]] == ["sun"]
    assert sum(found["counts"][state] for state in ("running", "waiting", "paused")) == 1
    runs = (await quiet.client.get("/api/cron/history", params={"job": "moon"})).json()["runs"]
    assert [(run["outcome"], run["server"]) for run in runs] == [("lost", "app3")]
    before = await quiet.connection.fetch("SELECT * FROM jobs WHERE name = 'moon'")
    for call in ("run", "pause", "resume", "cancel"):
        answer = await quiet.post(f"moon/{call}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job-not-found"), call
    assert await quiet.connection.fetch("SELECT * FROM jobs WHERE name = 'moon'") == before
    # A heartbeat of an older program that runs it makes it visible again.
    await quiet.connection.execute("UPDATE jobs SET last_heartbeat_at = now() WHERE name = 'moon'")
    assert (await quiet.job("moon"))["state"] == "waiting"


async def test_a_job_that_runs_or_could_run_is_not_forgotten(quiet: Quiet) -> None:
    """409 with the reason; nothing is changed."""
    await add_job(quiet.connection, "running", **running(uuid4(), "app7"))
    await add_job(quiet.connection, "waiting")
    await add_job(quiet.connection, "paused", paused_at=-SECOND, paused_by="ada")
    await add_instance(quiet.connection, "app1", missing=("running",))
    before = await quiet.connection.fetch("SELECT * FROM jobs ORDER BY name")
    for name, code in {
        "running": "job-running",
        "waiting": "job-has-code",
        "paused": "job-has-code",
    }.items():
        answer = await quiet.post(f"{name}/forget")
        assert (answer.status_code, answer.json()["code"]) == (409, code), name
    assert (
        "was not forgotten: it is already running on app7"
        in ((await quiet.post("running/forget")).json()["detail"])
    )
    assert await quiet.connection.fetch("SELECT * FROM jobs ORDER BY name") == before
    assert (await quiet.post("nobody/forget")).status_code == 404


async def test_cancelling_a_run_whose_work_is_done_says_so(quiet: Quiet) -> None:
    """`workEndedAt` is of the run under way, not of one before."""
    one = await add_instance(quiet.connection, "app1")
    await add_job(quiet.connection, "done", **running(one, "app1"), work_ended_at=-2 * SECOND)
    await add_job(quiet.connection, "busy", **running(one, "app1"), work_ended_at=-60 * SECOND)
    answers = {name: (await quiet.post(f"{name}/cancel")).json() for name in ("done", "busy")}
    assert answers["done"]["workEndedAt"] is not None
    assert answers["busy"]["workEndedAt"] is None


async def test_a_run_shows_since_when_it_is_requested_to_stop(quiet: Quiet) -> None:
    """`stopRequestedAt` is of the run under way, not of one before."""
    one = await add_instance(quiet.connection, "app1")
    await add_job(quiet.connection, "deaf", **running(one, "app1"), stop_requested_at=-2 * SECOND)
    await add_job(quiet.connection, "well", **running(one, "app1"), stop_requested_at=-60 * SECOND)
    jobs = {job["name"]: job for job in (await status(quiet.client))["jobs"]}
    assert jobs["deaf"]["stopRequestedAt"] is not None
    assert jobs["well"]["stopRequestedAt"] is None


async def test_the_first_pause_counts(quiet: Quiet) -> None:
    """Pausing again changes nothing; resuming a job that is not paused neither."""
    await add_job(quiet.connection, "a-job")
    first = (await quiet.post("a-job/pause", by="ada", reason="too loud")).json()
    assert (first["state"], first["waiting"]["reason"]) == ("paused", "paused")
    assert first["waiting"]["sentence"].endswith("too loud")
    assert (await quiet.post("a-job/pause", by="eve", reason="me too")).json() == first
    row = await quiet.connection.fetchrow("SELECT claimable_at FROM jobs")
    assert row is not None
    assert row["claimable_at"] is None
    resumed = (await quiet.post("a-job/resume")).json()
    assert (resumed["state"], resumed["paused"]) == ("waiting", None)
    assert (await quiet.post("a-job/resume")).json() == resumed


async def test_ticks_missed_in_a_pause_are_in_the_history(quiet: Quiet) -> None:
    """All ticks from the waiting one to now are one range; the next tick is in the future.

    Twenty simultaneous requests to resume record them once.
    """
    await add_job(
        quiet.connection,
        "a-job",
        schedule="every 60 s",
        anchor_at=-3630 * SECOND,
        due_at=-1830 * SECOND,
        paused_at=-1800 * SECOND,
        paused_by="ada",
        pause_reason="too loud",
        lost_streak=3,
        checkpoint="{}",
        requested_by="eve",
    )
    answers = await asyncio.gather(*(quiet.post("a-job/resume") for _ in range(20)))
    assert tally(list(answers)) == {"202": 20}
    row = await quiet.connection.fetchrow(
        """SELECT *, due_at - clock_timestamp() AS left,
                  extract(epoch FROM due_at - anchor_at)::float8 AS since FROM jobs"""
    )
    assert row is not None
    assert timedelta(0) < row["left"] <= 60 * SECOND
    assert row["since"] % 60 == pytest.approx(0, abs=0.02)
    assert (row["ready_at"], row["lost_streak"]) == (row["due_at"], 0)
    assert (row["checkpoint"], row["requested_by"], row["attempt"]) == (None, None, 0)
    (skipped,) = (await quiet.client.get("/api/cron/history")).json()["runs"]
    assert (skipped["outcome"], skipped["ticks"]) == ("skipped", 31)
    assert skipped["result"] == "paused by ada: too loud"
    first, last = (datetime.fromisoformat(skipped[at]) for at in ("dueAt", "lastDueAt"))
    assert last - first == pytest.approx(1800 * SECOND, abs=SECOND)


@pytest.mark.parametrize(
    ("columns", "ticks"),
    [
        ({"due_at": 45 * SECOND}, 0),  # nothing was missed
        ({"due_at": -75 * SECOND}, 2),  # of the two, neither ran
        ({"due_at": -75 * SECOND, "attempt": 1}, 1),  # the first had a run
        ({"due_at": -80 * SECOND, "requested_by": "eve"}, 2),  # a requested run is no tick
    ],
)
async def test_only_ticks_that_had_no_run_are_skipped(
    quiet: Quiet, columns: dict[str, object], ticks: int
) -> None:
    """Each tick is recorded once: by its runs, or by the range of skipped ticks."""
    await add_job(
        quiet.connection,
        "a-job",
        schedule="every 60 s",
        anchor_at=-3675 * SECOND,
        paused_at=-70 * SECOND,
        paused_by="ada",
        **columns,
    )
    answer = await quiet.post("a-job/resume")
    assert answer.json()["attempt"] == 0
    runs = (await quiet.client.get("/api/cron/history")).json()["runs"]
    assert [run["ticks"] for run in runs] == [ticks] * (ticks > 0)
    moment = datetime.fromisoformat(answer.json()["dueAt"])
    for run in runs:
        last = datetime.fromisoformat(run["lastDueAt"])
        assert moment - last == pytest.approx(60 * SECOND, abs=SECOND)


async def test_a_run_under_way_keeps_its_tick(quiet: Quiet) -> None:
    """Resuming a job that still runs, or was lost, leaves its tick to the run's end or takeover."""
    for name, lease in (("running", 3600 * SECOND), ("lost", -SECOND)):
        await add_job(
            quiet.connection,
            name,
            **{**running(uuid4(), "app7"), "lease_expires_at": lease},
            schedule="every 10 s",
            checkpoint="{}",
            paused_at=-SECOND,
            paused_by="ada",
        )
        before = await quiet.connection.fetchrow("SELECT * FROM jobs WHERE name = $1", name)
        assert (await quiet.post(f"{name}/resume")).json()["paused"] is None
        after = await quiet.connection.fetchrow("SELECT * FROM jobs WHERE name = $1", name)
        assert before is not None
        assert after is not None
        changed = {key for key in before.keys() if before[key] != after[key]}  # noqa: SIM118
        assert changed == {"paused_at", "paused_by"}
    assert (await quiet.client.get("/api/cron/history")).json()["runs"] == []


async def test_a_schedule_of_a_newer_program_is_left_alone(quiet: Quiet) -> None:
    """An instance that can't read a job's schedule resumes with the waiting tick."""
    await add_job(
        quiet.connection,
        "a-job",
        schedule="every other Tuesday",
        due_at=-60 * SECOND,
        paused_at=-SECOND,
        paused_by="ada",
    )
    before = await quiet.job("a-job")
    after = (await quiet.post("a-job/resume")).json()
    assert (after["state"], after["dueAt"]) == ("waiting", before["dueAt"])


async def test_a_schedule_is_set_and_reset(quiet: Quiet) -> None:
    """The next tick is one of it at once; the answer says who set it, and what code declares."""
    await add_job(quiet.connection, "a-job", anchor_at=-30 * SECOND)
    before = await quiet.job("a-job")
    assert (before["scheduleOverride"], before["declaredSchedule"]) == (None, before["schedule"])
    answer = await quiet.schedule("a-job", {"everySeconds": 60}, by="ada")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    await conforms(quiet.client, "JobAnswer", found)
    assert found["schedule"] == {"text": "every 60 s", "words": "every minute"}
    assert found["declaredSchedule"] == before["schedule"]
    assert found["scheduleOverride"]["by"] == "ada"
    assert found["dueAt"] == found["readyAt"] < before["dueAt"]
    again = (await quiet.schedule("a-job", {"everySeconds": 60}, by="eve")).json()
    assert again["scheduleOverride"] == found["scheduleOverride"]
    cron = {"cron": "@daily", "tz": "Europe/Berlin"}
    other = (await quiet.schedule("a-job", cron, by="eve")).json()
    assert other["schedule"]["text"] == "cron 0 0 * * * Europe/Berlin"
    assert (other["scheduleOverride"]["by"], other["dueAt"] > before["dueAt"]) == ("eve", True)
    for _ in range(2):
        answer = await quiet.schedule("a-job", None)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["schedule"], answer.json()["scheduleOverride"]) == (
            before["schedule"],
            None,
        )
    due_at = datetime.fromisoformat(answer.json()["dueAt"])
    assert due_at - datetime.fromisoformat(before["dueAt"]) == pytest.approx(
        170 * SECOND, abs=SECOND
    )


STAYS: Final[dict[str, dict[str, object]]] = {
    "a tick that is due": {"due_at": -SECOND},
    "a retry": {"due_at": -60 * SECOND, "ready_at": 60 * SECOND, "attempt": 1},
    "a run": running(uuid4(), "app7"),
    "a lost run": {**running(uuid4(), "app7"), "lease_expires_at": -SECOND},
}


@pytest.mark.parametrize("what", STAYS)
async def test_a_set_schedule_leaves_what_has_begun(quiet: Quiet, what: str) -> None:
    """Who runs it, or was lost with it, computes the next tick by the new schedule."""
    await add_job(quiet.connection, "a-job", **STAYS[what])
    before = await quiet.connection.fetchrow("SELECT * FROM jobs")
    assert (await quiet.schedule("a-job", {"everySeconds": 10})).status_code == 200
    after = await quiet.connection.fetchrow("SELECT * FROM jobs")
    assert before is not None
    assert after is not None
    changed = {key for key in before.keys() if before[key] != after[key]}  # noqa: SIM118
    assert changed == {"schedule_override", "overridden_by", "overridden_at"}


async def test_a_paused_job_is_resumed_by_the_schedule_that_was_set(quiet: Quiet) -> None:
    """Its next tick, and those that it missed, are of it."""
    await add_job(
        quiet.connection,
        "a-job",
        anchor_at=-905 * SECOND,
        due_at=-905 * SECOND,
        paused_at=-900 * SECOND,
        paused_by="ada",
    )
    await quiet.schedule("a-job", {"everySeconds": 60})
    answer = (await quiet.post("a-job/resume")).json()
    (skipped,) = (await quiet.client.get("/api/cron/history")).json()["runs"]
    assert skipped["ticks"] == 16
    last, due_at = (
        datetime.fromisoformat(moment) for moment in (skipped["lastDueAt"], answer["dueAt"])
    )
    assert due_at - last == 60 * SECOND


async def test_of_many_who_set_a_schedule_the_last_one_counts(quiet: Quiet) -> None:
    """The tick is always one of the schedule that the row has."""
    await add_job(quiet.connection, "a-job", anchor_at=-SECOND)
    lengths = [10, 7200, 100]
    bodies = [{"everySeconds": seconds} for seconds in lengths * 7] + [None] * 3
    answers = await asyncio.gather(*(quiet.schedule("a-job", body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    row = await quiet.connection.fetchrow(
        """SELECT coalesce(schedule_override, schedule) AS schedule,
                  extract(epoch FROM due_at - anchor_at)::float8 AS since FROM jobs"""
    )
    assert row is not None
    seconds = float(row["schedule"].split()[1])
    assert row["since"] == seconds


NO_SCHEDULES: Final[list[tuple[dict[str, object], str, str, str]]] = [
    ({}, "", "not-one-schedule", "Send either"),
    ({"everySeconds": 60, "cron": "* * * * *"}, "", "not-one-schedule", "Send either"),
    ({"everySeconds": 60, "tz": "UTC"}, "", "not-one-schedule", "Send either"),
    ({"tz": "UTC"}, "", "not-one-schedule", "Send either"),
    (
        {"everySeconds": None},
        "/everySeconds",
        "not-an-integer",
        "everySeconds must be an integer, ",
    ),
    (
        {"everySeconds": 60.0},
        "/everySeconds",
        "not-an-integer",
        "everySeconds must be an integer, ",
    ),
    ({"cron": "\u200b"}, "/cron", "not-printable", "cron must be 1 to 200 "),
    ({"cron": "* " * 101}, "/cron", "not-printable", "cron must be 1 to 200 "),
    ({"everySeconds": 0}, "/everySeconds", "not-a-schedule", "The interval (0 s) must be"),
    ({"everySeconds": -(10**19)}, "/everySeconds", "not-a-schedule", "The interval (-1000000"),
    ({"everySeconds": 31622401}, "/everySeconds", "not-a-schedule", "The interval (31622401 s)"),
    ({"cron": "* * * *"}, "/cron", "not-a-schedule", "The cron expression '* * * *' has 4 fields"),
    ({"cron": "*/90 * * * *"}, "/cron", "not-a-schedule", "The cron expression '*/90 * * * *' can"),
    ({"cron": "@daily", "tz": "Moon"}, "/cron", "not-a-schedule", "There is no time zone 'Moon'."),
    ({"cron": "0 0 30 2 *"}, "/cron", "not-a-schedule", "The cron expression '0 0 30 2 *' "),
]


@pytest.mark.parametrize(("body", "pointer", "code", "sentence"), NO_SCHEDULES)
async def test_what_is_no_schedule_is_refused(
    quiet: Quiet, body: dict[str, object], pointer: str, code: str, sentence: str
) -> None:
    """422 says why, in the words that a declaration would get; nothing is changed."""
    await add_job(quiet.connection, "a-job")
    before = await quiet.connection.fetchrow("SELECT * FROM jobs")
    answer = await quiet.schedule("a-job", body)
    assert answer.status_code == 422, answer.text
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"]) == (pointer, code)
    assert answer.json()["detail"] == fault["detail"]
    assert answer.json()["detail"].startswith(sentence)
    assert await quiet.connection.fetchrow("SELECT * FROM jobs") == before


async def test_a_schedule_of_no_job_is_refused(quiet: Quiet) -> None:
    """404, to set it and to reset it; one that was forgotten is none."""
    await add_job(quiet.connection, "a-job", forgotten_at=-SECOND, forgotten_by="ada")
    for name in ("a-job", "none"):
        for body in ({"everySeconds": 60}, None):
            answer = await quiet.schedule(name, body)
            assert (answer.status_code, answer.json()["code"]) == (404, "job-not-found")


async def test_resetting_to_a_schedule_of_a_newer_program_keeps_the_tick(quiet: Quiet) -> None:
    """An instance that can't read what is declared leaves the tick to those that can."""
    await add_job(quiet.connection, "a-job", schedule="every other Tuesday")
    before = (await quiet.schedule("a-job", {"everySeconds": 60})).json()
    after = (await quiet.schedule("a-job", None)).json()
    assert (after["schedule"]["text"], after["dueAt"]) == ("every other Tuesday", before["dueAt"])


async def test_only_a_run_under_way_can_be_cancelled(quiet: Quiet) -> None:
    """The first requester is reported; for a job that does not run, or was lost, it is refused."""
    await add_job(quiet.connection, "running", **running(uuid4(), "app7"))
    await add_job(quiet.connection, "waiting")
    await add_job(quiet.connection, "paused", paused_at=-SECOND, paused_by="ada")
    await add_job(
        quiet.connection, "lost", **{**running(uuid4(), "app7"), "lease_expires_at": -SECOND}
    )
    for name, state in (("waiting", "waiting"), ("paused", "paused"), ("lost", "waiting")):
        answer = await quiet.post(f"{name}/cancel")
        assert (answer.status_code, answer.json()["code"]) == (409, "job-not-running")
        assert answer.json()["state"] == state
    first = await quiet.post("running/cancel", by="ada")
    assert (first.status_code, first.json()["cancelRequestedBy"]) == (202, "ada")
    assert (await quiet.post("running/cancel", by="eve")).json()["cancelRequestedBy"] == "ada"


# -- with running jobs -------------------------------------------------------------------------


async def test_fifty_requests_make_one_run(database: dict[str, str], tmp_path: Path) -> None:
    """Requested on two instances at once, the job runs once; requested after its end, again."""
    async with fleet(database, tmp_path, seconds=4) as clients:

        async def ended(fence: int) -> None:
            await until(
                lambda job: job["state"] == "waiting" and job["fence"] == fence,
                lambda: job(clients[0], "job-01"),
            )

        await ended(1)
        for fence in (2, 3):
            answers = await asyncio.gather(
                *(
                    clients[number % 2].post("/api/cron/jobs/job-01/run", params={"by": "ada"})
                    for number in range(50)
                )
            )
            assert tally(list(answers)).keys() <= {"202", "job-running"}
            assert tally(list(answers))["202"] >= 1
            await ended(fence)
        history = (await clients[0].get("/api/cron/history")).json()["runs"]
    assert [run["outcome"] for run in history] == ["succeeded"] * 3
    assert len({run["dueAt"] for run in history}) == 3
    spans = read_event_logs(tmp_path)
    assert [span.fence for span in spans] == [1, 2, 3]
    assert all(one.end < other.begin for one, other in pairwise(spans))


async def test_a_set_schedule_is_that_of_all_instances(
    database: dict[str, str], tmp_path: Path
) -> None:
    """Set on one instance and reset on the other, without a restart; runs follow each at once."""
    async with fleet(database, tmp_path, seconds=0.2) as (one, other):

        async def ask() -> dict[str, Any]:
            return await job(other, "job-01")

        address = "/api/cron/jobs/job-01/schedule"
        await until(lambda found: found["lastRun"] is not None, ask)
        assert (await one.put(address, json={"everySeconds": 1})).status_code == 200
        found = await until(lambda found: found["fence"] >= 4, ask)
        assert found["schedule"]["text"] == "every 1 s"
        assert (await other.delete(address)).status_code == 200
        found = await until(lambda found: found["state"] == "waiting", ask)
        left = datetime.fromisoformat(found["dueAt"]) - datetime.now(UTC)
        assert left > 3000 * SECOND
        assert (await job(one, "job-01"))["scheduleOverride"] is None


async def test_a_cancelled_run_ends_wherever_it_is(
    database: dict[str, str], tmp_path: Path
) -> None:
    """Requested on another instance than its own; the next tick waits, and a pause keeps it."""
    async with fleet(database, tmp_path, seconds=60) as clients:
        at_work = await until(
            lambda job: job["state"] == "running", lambda: job(clients[0], "job-01")
        )
        other = clients[0 if at_work["server"] == "app2" else 1]
        paused = await other.post("/api/cron/jobs/job-01/pause", params={"by": "eve"})
        assert (paused.json()["state"], paused.json()["paused"]["by"]) == ("running", "eve")
        answer = await other.post("/api/cron/jobs/job-01/cancel", params={"by": "ada"})
        assert answer.json()["cancelRequestedBy"] == "ada"
        began = monotonic()
        over = await until(lambda job: job["state"] == "paused", lambda: job(other, "job-01"))
        assert monotonic() - began < 5  # a heartbeat is 0.5 s
        assert over["lastRun"]["outcome"] == "cancelled"
        assert "ada" in over["lastRun"]["result"]
        (run,) = (await other.get("/api/cron/history")).json()["runs"]
        assert (run["outcome"], run["server"]) == ("cancelled", at_work["server"])


# -- streams -----------------------------------------------------------------------------------


@dataclass
class Event:
    kind: str
    data: dict[str, Any]
    id: str | None


async def events(answer: httpx.Response) -> AsyncIterator[Event]:
    """Parse a stream of events as a browser does."""
    kind, data, last_id = "", "", None
    async for line in answer.aiter_lines():
        field, _, value = line.partition(": ")
        match field:
            case "event":
                kind = value
            case "data":
                data += value
            case "id":
                last_id = value
            case "" if data:
                yield Event(kind, httpx.Response(200, content=data).json(), last_id)
                kind, data, last_id = "", "", None


async def test_the_status_is_sent_as_it_changes(quiet: Quiet) -> None:
    """At once and every second: the body of the status call, each event with its own id."""
    await add_job(quiet.connection, "a-job")
    async with quiet.client.stream("GET", "/api/cron/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = events(answer)
        first = await anext(stream)
        await conforms(quiet.client, "StatusAnswer", first.data)
        await quiet.post("a-job/pause")
        second = await anext(stream)
        third = await anext(stream)
    assert {event.kind for event in (first, second, third)} == {"status"}
    assert first.data["counts"]["paused"] == 0
    assert third.data["counts"]["paused"] == 1
    assert len({first.id, second.id, third.id}) == 3


async def test_streams_end_when_the_instance_stops(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """All of them at once, so that no viewer keeps an instance from stopping."""
    ended = []

    async def watch(watching: asyncio.Event) -> None:
        async with client.stream("GET", "/api/cron/events") as answer:
            async for _ in events(answer):
                watching.set()
        ended.append(monotonic())

    signs = [asyncio.Event() for _ in range(20)]
    viewers = [asyncio.create_task(watch(sign)) for sign in signs]
    await asyncio.gather(*(sign.wait() for sign in signs))
    stopped = monotonic()
    assert await instance.stop(signal.SIGTERM) == 0
    await asyncio.gather(*viewers)
    assert monotonic() - stopped < 3  # less than it would wait for requests under way
    assert max(ended) - stopped < 2


async def test_a_stream_outlives_the_database(tmp_path: Path) -> None:
    """During an outage viewers get a problem; afterwards the status again."""
    async with own_postgres() as server:
        log = tmp_path / "log"
        async with (
            Instance(server.environment(), log=log, JOBS_ENABLED="false") as instance,
            http_client(instance.url) as client,
            client.stream("GET", "/api/cron/events") as answer,
        ):
            stream = events(answer)
            assert (await anext(stream)).kind == "status"
            await freeze(server)
            unavailable = await _next(stream, "unavailable")
            assert unavailable.data["code"] == "database-unavailable"
            await thaw(server)
            back = await _next(stream, "status")
            assert back.data["counts"]["running"] == 0
        assert "error" not in re.findall(r'"level": "(\w+)"', log.read_text())


async def _next(stream: AsyncIterator[Event], kind: str) -> Event:
    async with asyncio.timeout(30):
        async for event in stream:
            if event.kind == kind:
                return event
    raise AssertionError(f"no {kind}")


async def test_without_viewers_the_status_is_not_queried(quiet: Quiet) -> None:
    """The queries end when the last viewer has disconnected."""
    status_query = """
        SELECT max(query_start) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '%pg_snapshot_xmin%'
          AND pid <> pg_backend_pid()
    """
    async with quiet.client.stream("GET", "/api/cron/events") as answer:
        stream = events(answer)
        await anext(stream)
        await anext(stream)
    async with asyncio.timeout(30):
        while True:
            before = await quiet.connection.fetchval(status_query)
            await asyncio.sleep(2.5)
            if await quiet.connection.fetchval(status_query) == before:
                break
