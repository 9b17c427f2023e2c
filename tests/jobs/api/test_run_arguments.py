"""A request to run a job with other arguments than its code declares."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jobs.rows import add_instance, add_job
from tests.processes import Instance, connect, http_client, served

ACME = '''
from datetime import timedelta
from balance_app.jobs import Run, job

@job(name="report", every=timedelta(hours=1), min_duration=timedelta(0), args={"days": 7})
async def report(run: Run, *, days: int, city: str = "Rome") -> str:
    """Report."""
    return f"{days} days of {city}"
'''


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
            async with asyncio.timeout(30):
                while True:
                    answer = await client.get("/api/cron/history", params={"job": "report"})
                    found = answer.json().get("runs", [])
                    if len([each for each in found if each["outcome"]]) >= number:
                        return list(reversed(found))
                    await asyncio.sleep(0.05)

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
    instance: Instance, database: dict[str, str]
) -> None:
    """The second is refused, not merged and not lost; the same again, or none, changes nothing."""
    connection = await connect(database)
    await add_instance(connection, "app9")
    await add_job(connection, "report", checkpoint='{"user": 5}')
    async with http_client(instance.url) as client:
        first = await post(client, "report", {"args": {"days": 30}})
        assert (first.status_code, first.json()["requestedArgs"]) == (202, {"days": 30})
        same: list[Any] = [{"args": {"days": 30}}, {"args": {}}, None]
        for each in same:
            again = await post(client, "report", each)
            assert (again.status_code, again.json()["requestedArgs"]) == (202, {"days": 30})
        refused = await post(client, "report", {"args": {"days": 31}})
        assert (refused.status_code, refused.json()["code"]) == (409, "job-requested")
        assert refused.json()["requestedBy"] == "ada"
    row = await connection.fetchrow("SELECT requested_args, checkpoint FROM jobs")
    assert row is not None
    assert tuple(row) == ('{"days": 30}', None)  # a checkpoint is one of other arguments
    await connection.close()


async def test_a_request_without_arguments_comes_first(
    instance: Instance, database: dict[str, str]
) -> None:
    """Who asked for a run as it is declared gets that."""
    connection = await connect(database)
    await add_instance(connection, "app9")
    await add_job(connection, "report", checkpoint='{"user": 5}')
    async with http_client(instance.url) as client:
        assert (await post(client, "report")).status_code == 202
        refused = await post(client, "report", {"args": {"days": 31}})
        assert (refused.status_code, refused.json()["code"]) == (409, "job-requested")
    assert await connection.fetchval("SELECT checkpoint FROM jobs") == '{"user": 5}'
    await connection.close()


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
    instance: Instance,
    database: dict[str, str],
    content: bytes,
    content_type: str | None,
    status: int,
) -> None:
    """As before there was one; but what is sent is read."""
    connection = await connect(database)
    await add_instance(connection, "app9")
    await add_job(connection, "report")
    await connection.close()
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with http_client(instance.url) as client:
        answer = await client.post("/api/cron/jobs/report/run", content=content, headers=headers)
    assert answer.status_code == status
