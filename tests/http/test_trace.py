"""A caller's trace is continued in the logs and in the answer (W3C Trace Context)."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from balance_app.http.middleware import RequestMiddleware
from balance_app.logs import REQUEST_ID, TRACE
from tests.access.gates import OpenGate
from tests.processes import Instance, connect, served

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
VALID = f"00-{TRACE_ID}-{PARENT}-01"

# Each read of a user divides by zero: an internal error.
A_MISTAKE = """
ALTER TABLE users RENAME TO true_users;
CREATE VIEW users AS SELECT id, balance / (id - id) AS balance, version, created_at, held, floor,
    frozen, settings_version, hold_events, holds_due_at, changed_at FROM true_users;
GRANT SELECT ON users TO PUBLIC
"""


async def _handler(_request: Request) -> Response:
    trace = TRACE.get()
    return JSONResponse({"trace": trace and trace._asdict(), "request": REQUEST_ID.get()})


async def request_with(
    *traceparents: str, direct: bool = False, path: str = "/x"
) -> httpx.Response:
    """Send these headers through the middleware; return the answer and the log context."""
    app = FastAPI()
    app.router.add_route("/x", _handler)
    middleware = RequestMiddleware(
        app, gate=OpenGate(), direct={("GET", "/x"): _handler} if direct else {}, log_requests=False
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(middleware), base_url="http://here"
    ) as client:
        return await client.get(path, headers=[("traceparent", each) for each in traceparents])


@pytest.mark.parametrize("direct", [True, False])
async def test_a_valid_trace_goes_on(*, direct: bool) -> None:
    """The answer and the logs have the same trace id and the same new span id."""
    answers = [await request_with(VALID, direct=direct) for _ in range(20)]
    spans = set()
    for answer in answers:
        version, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
        assert (version, trace_id, flags) == ("00", TRACE_ID, "01")
        assert answer.json()["trace"] == {"trace_id": TRACE_ID, "span_id": span_id}
        assert answer.headers["x-request-id"] == answer.json()["request"]
        assert len(span_id) == 16
        spans.add(span_id)
    assert len(spans) == len(answers)
    assert not spans & {PARENT, "0" * 16}


@pytest.mark.parametrize(
    ("sent", "answered"),
    [("00", "00"), ("01", "01"), ("02", "02"), ("03", "03"), ("ff", "03"), ("80", "00")],
)
async def test_only_defined_flags_are_forwarded(sent: str, answered: str) -> None:
    """Sampled and random are; the others have no meaning in version 00."""
    answer = await request_with(f"00-{TRACE_ID}-{PARENT}-{sent}")
    assert answer.headers["traceparent"].endswith(f"-{answered}")


@pytest.mark.parametrize("later", ["", "-", "-what-will-be"])
async def test_a_later_version_is_read_like_version_00(later: str) -> None:
    """And answered with version 00."""
    answer = await request_with(f"cc-{TRACE_ID}-{PARENT}-09{later}")
    assert answer.json()["trace"]["trace_id"] == TRACE_ID
    assert answer.headers["traceparent"].startswith(f"00-{TRACE_ID}-")
    assert answer.headers["traceparent"].endswith("-01")


INVALID = {
    "empty": [""],
    "no version": [f"{TRACE_ID}-{PARENT}-01"],
    "version ff": [f"ff-{TRACE_ID}-{PARENT}-01"],
    "version not hexadecimal": [f"0x-{TRACE_ID}-{PARENT}-01"],
    "more than version 00 has": [f"{VALID}-more"],
    "more without a dash": [f"cc-{TRACE_ID}-{PARENT}-01more"],
    "trace of zeros": [f"00-{'0' * 32}-{PARENT}-01"],
    "span of zeros": [f"00-{TRACE_ID}-{'0' * 16}-01"],
    "upper case": [VALID.upper()],
    "short trace": [f"00-{TRACE_ID[1:]}-{PARENT}-01"],
    "long trace": [f"00-0{TRACE_ID}-{PARENT}-01"],
    "short span": [f"00-{TRACE_ID}-{PARENT[1:]}-01"],
    "no flags": [f"00-{TRACE_ID}-{PARENT}"],
    "flags not hexadecimal": [f"00-{TRACE_ID}-{PARENT}-0."],
    "a new line": [f"00-{TRACE_ID}-{PARENT}-01\n"],
    "two of them": [VALID, VALID],
    "three of them": [VALID, VALID, VALID],
}


@pytest.mark.parametrize("headers", [[], *INVALID.values()], ids=["none", *INVALID])
async def test_an_invalid_trace_header_is_ignored(headers: list[str]) -> None:
    """No part of it is used, and no trace is made up."""
    answer = await request_with(*headers)
    assert answer.status_code == 200
    assert answer.json()["trace"] is None
    assert "traceparent" not in answer.headers


async def test_refusals_name_the_trace_too() -> None:
    """Every error answer does."""
    answer = await request_with(VALID, path="/nowhere")
    assert answer.status_code == 404
    assert answer.headers["traceparent"].split("-")[1] == TRACE_ID


async def test_every_line_about_a_request_names_its_trace(
    database: dict[str, str], tmp_path: Path
) -> None:
    """Also lines logged before the answer, and no line about anything else."""
    log = tmp_path / "log"
    async with served(database, log=log, LOG_REQUESTS="true") as client:
        connection = await connect(database)
        await connection.execute(A_MISTAKE)
        await connection.close()
        mistake = await client.get("/api/users/1", headers={"traceparent": VALID})
        assert mistake.status_code == 500
        await client.get("/livez")
    lines = _lines(log)
    traced = [line for line in lines if "trace_id" in line or "span_id" in line]
    assert [line["event"] for line in traced] == ["internal error", "request"]
    span_id = mistake.headers["traceparent"].split("-")[2]
    assert {(line["trace_id"], line["span_id"]) for line in traced} == {(TRACE_ID, span_id)}
    assert {line["request_id"] for line in traced} == {mistake.headers["x-request-id"]}
    assert [line["path"] for line in lines if line["event"] == "request"][-1] == "/livez"


async def test_a_trace_ends_with_its_request(database: dict[str, str], tmp_path: Path) -> None:
    """The next request on the connection, even a pipelined one, is not in the trace."""
    log = tmp_path / "log"
    async with Instance(database, log=log, LOG_REQUESTS="true", JOBS_ENABLED="false") as instance:
        reader, writer = await asyncio.open_connection("127.0.0.1", instance.port)
        traced = f"GET /first HTTP/1.1\r\nHost: localhost\r\ntraceparent: {VALID}\r\n\r\n"
        plain = "GET /second HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write((traced + plain).encode())
        answers = (await reader.read()).decode().lower()
        writer.close()
    assert answers.count("http/1.1 404") == 2
    assert answers.count("traceparent: ") == 1
    traces = {line["path"]: line.get("trace_id") for line in _lines(log) if "path" in line}
    assert (traces["/first"], traces["/second"]) == (TRACE_ID, None)


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]
