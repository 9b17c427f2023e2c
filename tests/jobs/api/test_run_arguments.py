"""A request to run a job with other arguments than its code declares."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jobs.rows import add_instance, add_job
from tests.jobs.support import Connection, until
from tests.processes import Instance, connect, served

ACME = '''
from datetime import timedelta
from balance_app.jobs import Run, job

@job(name="report", every=timedelta(hours=1), min_duration=timedelta(0), args={"days": 7})
async def report(run: Run, *, days: int, city: str = "Rome") -> str:
    """Report."""
    return f"{days} days of {city}"
'''


@pytest.fixture
async def report(instance: Instance, database: dict[str, str]) -> AsyncIterator[Connection]:  # noqa: ARG001 - it migrates
    """A connection to the database of an instance; a live one has the code of `report`."""
    connection = await connect(database)
    await add_instance(connection, "app9")
    await add_job(connection, "report", checkpoint='{"user": 5}')
    yield connection
    await connection.close()


async def post(client: httpx.AsyncClient, name: str, body: Any = None) -> httpx.Response:  # noqa: ANN401
    return await client.post(f"/api/cron/jobs/{name}/run", json=body, params={"by": "ada"})


async def test_a_run_with_other_arguments(database: dict[str, str], tmp_path: Path) -> None:
    """It runs once with them; the history tells it from the others; wrong ones are refused."""
    (tmp_path / "acme_report.py").write_text(ACME)
    async with served(
        database,
        program=("-m", "balance_app", "serve"),
        JOBS_ENABLED="true",
        JOBS_MODULES="acme_report",
        PYTHONPATH=str(tmp_path),
        JOB_WARM_UP_SECONDS="0",
    ) as client:

        async def runs(number: int) -> list[dict[str, Any]]:
            async def ended() -> list[dict[str, Any]]:
                answer = await client.get("/api/cron/history", params={"job": "report"})
                found = [each for each in answer.json().get("runs", []) if each["outcome"]]
                return found[::-1] if len(found) >= number else []

            return await until(ended)

        await runs(1)
        for args, sentence, names in (
            ({"days": "30"}, "days: input should be a valid integer", ["days"]),
            ({"weeks": 1, "city": 2}, "city: input should be a valid string", ["city", "weeks"]),
        ):
            refused = await post(client, "report", {"args": args})
            body = refused.json()
            assert (refused.status_code, body["code"]) == (422, "invalid-arguments")
            assert sentence in body["detail"]
            pointers = {each["pointer"] for each in body["errors"]}
            assert pointers == {f"/args/{name}" for name in names}
        accepted = await post(client, "report", {"args": {"days": 30}})
        assert accepted.status_code == 202
        assert (accepted.json()["args"], accepted.json()["requestedArgs"]) in (
            ({"days": 7}, {"days": 30}),
            ({"days": 7}, None),  # it ran at once
        )
        await runs(2)
        assert (await post(client, "report")).status_code == 202
        found = await runs(3)
    assert [(each["result"], each["args"]) for each in found] == [
        ("7 days of Rome", None),
        ("30 days of Rome", {"days": 30}),
        ("7 days of Rome", None),
    ]


async def test_of_two_requests_with_different_arguments_the_first_is_kept(
    client: httpx.AsyncClient, report: Connection
) -> None:
    """The second is refused, not merged and not lost; the same again, or none, changes nothing."""
    first = await post(client, "report", {"args": {"days": 30}})
    assert (first.status_code, first.json()["requestedArgs"]) == (202, {"days": 30})
    same: list[Any] = [{"args": {"days": 30}}, {"args": {}}, None]
    for each in same:
        again = await post(client, "report", each)
        assert (again.status_code, again.json()["requestedArgs"]) == (202, {"days": 30})
    refused = await post(client, "report", {"args": {"days": 31}})
    assert (refused.status_code, refused.json()["code"]) == (409, "job-requested")
    assert refused.json()["requestedBy"] == "ada"
    row = await report.fetchrow("SELECT requested_args, checkpoint FROM jobs")
    assert row is not None
    assert tuple(row) == ('{"days": 30}', None)  # a checkpoint is one of other arguments


async def test_a_request_without_arguments_comes_first(
    client: httpx.AsyncClient, report: Connection
) -> None:
    """Who asked for a run as it is declared gets that."""
    assert (await post(client, "report")).status_code == 202
    refused = await post(client, "report", {"args": {"days": 31}})
    assert (refused.status_code, refused.json()["code"]) == (409, "job-requested")
    assert await report.fetchval("SELECT checkpoint FROM jobs") == '{"user": 5}'


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"", None, 202),
        (b"", "application/json", 202),
        (b"{", "application/json", 400),
        (b"{}", "application/json", 422),
        (b'{"args":{}}', "text/plain", 415),
    ],
)
async def test_the_body_is_optional(
    client: httpx.AsyncClient,
    report: Connection,  # noqa: ARG001 - the job
    content: bytes,
    content_type: str | None,
    status: int,
) -> None:
    """As before there was one; but what is sent is read."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await client.post("/api/cron/jobs/report/run", content=content, headers=headers)
    assert answer.status_code == status
