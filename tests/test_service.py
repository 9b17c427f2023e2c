"""Common to all routes: health, request ids, logs, clear errors, a clean end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from balance_app.db.outages import Cause, Kind
from balance_app.errors import InternalError
from balance_app.http.health import NOT_KNOWN, SCHEMA_UNFIT, without_details
from balance_app.http.middleware import RequestMiddleware
from balance_app.server import ListenError, listen
from tests.access.gates import OpenGate
from tests.access.keyring import bearer, keys_are_needed, make_key, unknown
from tests.balances.hostile import exchange, one_instance
from tests.processes import Instance, http_client, query


@pytest.fixture(scope="module")
async def reader(postgres: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of one instance, for the tests that change nothing."""
    async with one_instance(postgres) as (instance, _), http_client(instance.url) as client:
        yield client


async def test_health_names_what_fails(client: httpx.AsyncClient, database: dict[str, str]) -> None:
    """It is ready when all checks pass; an incompatible schema is reported in a sentence."""
    for path in ("/health", "/readyz"):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.json()["checks"] == {"stopping": "ok", "database": "ok", "schema": "ok"}
    await query(database, "UPDATE balance_app_version SET version_num = '0002'")
    answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"]["database"] == "ok"
    assert "0002" in answer.json()["checks"]["schema"]
    assert (await client.get("/livez")).status_code == 200


async def test_health_names_no_revision_once_keys_are_needed(
    client: httpx.AsyncClient, instance: Instance, database: dict[str, str]
) -> None:
    """Nobody asks who reads it; that a check fails is told, and the log says why."""
    await make_key(database)
    await keys_are_needed(instance.url)
    answer = await client.get("/readyz")
    assert answer.json()["checks"] == {"stopping": "ok", "database": "ok", "schema": "ok"}
    await query(database, "UPDATE balance_app_version SET version_num = '0002'")
    answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"] == {
        "stopping": "ok",
        "database": "ok",
        "schema": SCHEMA_UNFIT,
    }
    assert without_details({"database": 'The role "x" lacks rights.', "schema": NOT_KNOWN}) == {
        "database": Kind.UNEXPECTED.value,
        "schema": NOT_KNOWN,
    }
    password = Cause(Kind.PASSWORD, "no", sqlstate="28P01").sentence
    assert without_details({"database": password, "schema": NOT_KNOWN})["database"] == password


async def test_a_refusal_by_the_key_does_not_speak_of_earlier_tries(
    client: httpx.AsyncClient, instance: Instance, database: dict[str, str]
) -> None:
    """A change was made with an idempotency key; the same request without a valid key knows not."""
    change, keyed = {"userId": 1, "amount": -1}, {"Idempotency-Key": "k"}
    made = await client.post("/api/balance", json=change, headers=keyed)
    assert made.status_code == 200
    cross = {**keyed, "Sec-Fetch-Site": "cross-site"}
    answers = [
        await client.post("/api/balance", json=change, headers=cross),
        await client.post("/api/balance", json=change, headers={**keyed, "Host": "evil.example"}),
    ]
    reading = await make_key(database, "read")
    await keys_are_needed(instance.url)
    for more in ({}, bearer(unknown()), bearer(reading)):
        answers.append(await client.post("/api/balance", json=change, headers={**keyed, **more}))
        unkeyed = await client.post("/api/balance", json=change, headers=more)
        assert (unkeyed.status_code, unkeyed.json()["applied"]) == (answers[-1].status_code, "no")
    assert [each.status_code for each in answers] == [403, 421, 401, 401, 403]
    assert [each.json()["applied"] for each in answers] == ["unknown"] * 5


async def test_every_answer_names_its_server_and_request(client: httpx.AsyncClient) -> None:
    """A valid request id of the caller is kept, otherwise a new one is made."""
    mine = await client.get("/api/users/1", headers={"X-Request-Id": "abc-1"})
    assert (mine.headers["x-request-id"], mine.headers["x-server-id"]) == ("abc-1", "app1")
    others = [
        (await client.get("/api/users/1", headers={"X-Request-Id": hostile})).headers[
            "x-request-id"
        ]
        for hostile in ("", "a b", "x" * 101)
    ]
    assert len({*others, ""}) == 4
    lost = await client.get("/nowhere", headers={"X-Request-Id": "abc-2"})
    assert lost.headers["x-request-id"] == "abc-2"


async def test_logs_are_json_with_server_and_request(
    database: dict[str, str], tmp_path: Path
) -> None:
    """Without a terminal each line is an object with the server and the request id."""
    log = tmp_path / "log"
    async with (
        Instance(database, "app7", log=log, LOG_REQUESTS="true") as instance,
        http_client() as client,
    ):
        await client.get(f"{instance.url}/api/users/1", headers={"X-Request-Id": "find-me"})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["server"] for line in lines} == {"app7"}
    (found,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (found["event"], found["path"], found["status"]) == ("request", "/api/users/1", 200)


REFUSED: Final = {
    400: [b"GET / HTTP/1.1\r\n\r\n"],
    431: [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"x" * 70_000],
    501: [b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"],
}


async def test_a_refusal_by_the_protocol_has_an_id_and_is_counted(
    database: dict[str, str], tmp_path: Path
) -> None:
    """The id in the answer is that of the only log line, which has the reason."""
    log = tmp_path / "log"
    ids = {}
    async with (
        Instance(database, log=log, JOBS_ENABLED="false") as instance,
        http_client() as client,
    ):
        for status, sent in REFUSED.items():
            answer = await exchange(instance.port, *sent, pause_seconds=0.1)
            assert answer.status == status
            ids[status] = answer.headers["x-request-id"]
        metrics = (await client.get(f"{instance.url}/metrics")).text
    assert len(set(ids.values())) == len(REFUSED)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for status, request_id in ids.items():
        (line,) = [line for line in lines if line.get("request_id") == request_id]
        assert line["event"] == "request refused"
        assert f'balance_app_requests_total{{status="{status}"}} 1.0' in metrics


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("method", "applied"), [("GET", None), ("POST", "unknown")])
async def test_an_internal_error_is_a_problem_too(
    method: str, applied: str | None, *, direct: bool
) -> None:
    """An unforeseen exception is answered with a problem, not with a closed connection."""

    async def mistaken(_request: Request) -> Response:
        raise ZeroDivisionError

    app = FastAPI()
    app.add_exception_handler(Exception, _internal)
    app.router.add_route("/x", mistaken, methods=["GET", "POST"])
    middleware = RequestMiddleware(
        app,
        gate=OpenGate(),
        direct={(method, "/x"): mistaken} if direct else {},
        log_requests=False,
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(middleware), base_url="http://here"
    ) as client:
        answer = await client.request(method, "/x")
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal-error"
    assert answer.json().get("applied") == applied
    assert ("changed" in answer.json()["detail"]) == (method == "POST")
    assert answer.headers["x-request-id"]


async def _internal(request: Request, _error: Exception) -> Response:
    return InternalError().response(request.method)


def test_a_taken_port_is_reported_in_a_sentence() -> None:
    """With the port and what to do; shared ports may be used twice."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=rf"{port}: Address already in use\. Stop"):
            listen("127.0.0.1", port)
    with (
        listen("127.0.0.1", 0, shared=True) as first,
        listen("127.0.0.1", first.getsockname()[1], shared=True),
    ):
        pass


READABLE: Final = (
    *("/", "/jobs", "/static/app.css", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"),
    *("/api/users", "/api/users/1", "/api/users/1/entries", "/api/cron/history"),
    *("/problems", "/problems/overloaded", "/livez", "/readyz", "/health"),
    *("/api/users/999", "/api/users/0", "/nowhere", "/api/balance", "/jobs/nothing"),
)


@pytest.mark.parametrize("path", READABLE)
async def test_head_answers_as_get_does_without_a_body(
    reader: httpx.AsyncClient, path: str
) -> None:
    """The same status and headers, also for refusals."""
    varying = {"date", "x-request-id"}
    got = await reader.get(path)
    head = await reader.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    headers = [{**answer.headers} for answer in (got, head)]
    assert headers[0].keys() == headers[1].keys()
    if path != "/" and not path.startswith(
        "/jobs"
    ):  # pages contain the time and a key, and are compressed
        for each in headers:
            assert all(each.pop(name) for name in varying)
        assert headers[0] == headers[1]


@pytest.mark.parametrize("path", ["/live", "/api/cron/events"])
async def test_the_head_of_a_stream_has_an_end(reader: httpx.AsyncClient, path: str) -> None:
    """It is what the stream begins with, and counts as no viewer."""
    for _ in range(3):
        head = await reader.head(path, timeout=5)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
    assert (await reader.get("/livez")).status_code == 200


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/api/balance", "POST"),
        ("/api/users", "GET, HEAD, POST"),
        ("/api/users/1", "GET, HEAD, PATCH"),
        ("/jobs/a/cancel", "GET, HEAD, POST"),
        ("/jobs/a/run", "POST"),
        ("/docs/assets/swagger-ui.css", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
async def test_allow_names_every_method(reader: httpx.AsyncClient, path: str, methods: str) -> None:
    """Those of all routes of a path, and HEAD wherever there is GET."""
    answer = await reader.delete(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, methods)


async def test_a_half_closed_client_gets_its_answer(instance: Instance) -> None:
    """Twenty of twenty: a client that has closed its sending side still reads."""
    body = b'{"userId":1,"amount":-2}'
    head = (
        "POST /api/balance HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", instance.port)
        writer.write(head.encode() + body)
        writer.write_eof()
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 200 ")
        writer.close()
