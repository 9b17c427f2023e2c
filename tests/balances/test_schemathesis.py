"""The service behaves as its OpenAPI document says."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import jsonschema_rs
import pytest

import balance_app.main  # noqa: F401 - with it every problem is known
from balance_app.errors import PROBLEM_JSON, all_problems, explain
from tests.balances.hostile import one_instance
from tests.processes import Instance, http_client
from tests.system.sizes import size

EXAMPLES = size(small=25, full=100)  # of each operation

KINDS: Final = {kind.code: kind for kind in all_problems()}

# Rules that no schema can express: a key belongs to one content for ever (each request gets its
# own), and 2.0 is not an integer here (in JSON Schema it is: such numbers are sent as integers).
HOOKS: Final = """
import re
import uuid

import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch("[!-~]{1,255}", key):
        case.headers["Idempotency-Key"] = uuid.uuid4().hex
    if isinstance(case.body, dict):
        case.body = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in case.body.items()
        }
"""


@pytest.fixture(scope="module")
async def instance(postgres: dict[str, str]) -> AsyncIterator[Instance]:
    """One instance for the whole file."""
    async with one_instance(postgres) as (running, _):
        yield running


async def test_the_service_keeps_to_its_openapi_document(
    instance: Instance, tmp_path: Path
) -> None:
    """Schemathesis finds no undocumented answer, invalid body, 5xx or wrongly accepted input."""
    (tmp_path / "hooks.py").write_text(HOOKS)
    tester = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{instance.url}/openapi.json"),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--generation-deterministic", "--seed", "1"),
        *("--continue-on-failure", "--no-color"),
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": _path_with(tmp_path)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(tester.communicate(), 120)
    finally:
        if tester.returncode is None:
            tester.kill()
            await tester.wait()
    assert tester.returncode == 0, output.decode()
    tested = re.search(r"Tested: (\d+)", output.decode())
    assert tested is not None, output.decode()
    assert int(tested[1]) == len(list(_operations(await _document(instance))))


def _path_with(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


async def test_every_problem_is_explained(client: httpx.AsyncClient) -> None:
    """`/problems` lists every kind; the page of each `type` has the same text."""
    listed = {about["code"]: about for about in (await client.get("/problems")).json()}
    assert listed.keys() == KINDS.keys()
    for code, kind in KINDS.items():
        about = listed[code]
        means, advice = explain(kind)
        assert (about["status"], about["title"]) == (kind.status, kind.title)
        assert (about["means"], about["advice"]) == (means, advice)
        assert means.endswith(".")
        assert advice.endswith(".")
        answer = await client.get(about["type"])
        assert (answer.status_code, answer.json()) == (200, about)


async def test_the_schema_of_a_problem_names_every_code(instance: Instance) -> None:
    """A generated client knows every code that it may get."""
    schema = (await _document(instance))["components"]["schemas"]["Problem"]
    assert set(schema["properties"]["code"]["enum"]) == KINDS.keys()


async def test_every_documented_example_is_true(instance: Instance) -> None:
    """Each fits its schema; a problem's has the code, status and text of its kind."""
    document = await _document(instance)
    seen = set()
    for name, status, media_type, content in _contents(document):
        examples = {key: one["value"] for key, one in content.get("examples", {}).items()}
        if "example" in content:
            examples[""] = content["example"]
        for key, example in examples.items():
            schema = {**content.get("schema", {}), "components": document["components"]}
            jsonschema_rs.validate(schema, example)
            if media_type == PROBLEM_JSON:
                assert example["code"] == key
                assert example == KINDS[key].example().body(name.split()[0].upper())
                assert example["status"] == int(status), name
                seen.add(key)
    # These can occur on any path, or on undocumented ones only.
    assert KINDS.keys() - seen <= {
        *("internal-error", "method-not-allowed"),
        *("head-too-large", "unsupported-transfer-coding"),
    }


async def test_every_refusal_is_documented_as_a_problem(instance: Instance) -> None:
    """4xx answers are problem+json with the Problem schema, none has the framework's format."""
    document = await _document(instance)
    for name, status, media_type, content in _contents(document):
        if status.startswith("4"):
            assert (name, status, media_type) == (name, status, PROBLEM_JSON)
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_numbers_are_documented_with_their_limits(instance: Instance) -> None:
    """Every integer of a request has a least and a greatest value in the document."""
    for name, operation in _operations(await _document(instance)):
        for parameter in operation.get("parameters", ()):
            if parameter["schema"].get("type") == "integer":
                assert {"minimum", "maximum"} <= parameter["schema"].keys(), (name, parameter)


async def test_the_docs_page_needs_no_internet(client: httpx.AsyncClient) -> None:
    """The page links to this service only, and all its files are served."""
    page = (await client.get("/docs")).text
    assert not re.findall(r"""["'(](?:https?:)?//[^"')]*""", page)
    named = set(re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page))
    assert len(named) >= 4, page
    for address in named:
        answer = await client.get(address)
        assert (answer.status_code, len(answer.content) > 0) == (200, True), address
        if address.endswith(".css"):
            assert not re.findall(
                r"""url\(\s*(?!["']?(?:data:|#))[^)]*|@import[^;]*""", answer.text
            )


async def _document(instance: Instance) -> dict[str, Any]:
    async with http_client(instance.url) as client:
        document: dict[str, Any] = (await client.get("/openapi.json")).json()
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"{method} {path}", operation


def _contents(document: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield operation, status ("" for its request), media type and content of each body."""
    for name, operation in _operations(document):
        bodies = {"": operation.get("requestBody", {}), **operation["responses"]}
        for status, body in bodies.items():
            for media_type, content in body.get("content", {}).items():
                yield name, status, media_type, content


# Headers that any answer may have.
COMMON_HEADERS: Final = {
    *("date", "content-type", "content-length", "transfer-encoding", "cache-control"),
    *("x-accel-buffering", "vary"),
}


async def test_headers_are_documented_on_the_answers_that_carry_them(instance: Instance) -> None:
    """Each answer has the headers that the document requires, and no others."""
    document = await _document(instance)
    change: dict[str, Any] = {"json": {"userId": 1, "amount": -2}}
    refused: dict[str, Any] = {"json": {"userId": 1, "amount": -(10**9)}}
    key, other = ({"Idempotency-Key": f"headers-{number}"} for number in (1, 2))
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    calls: list[tuple[str, str, str, dict[str, Any]]] = [
        ("POST", "/api/balance", "/api/balance", {**change, "headers": key}),
        ("POST", "/api/balance", "/api/balance", {**change, "headers": key}),
        ("POST", "/api/balance", "/api/balance", {**refused, "headers": other}),
        ("POST", "/api/balance", "/api/balance", {**refused, "headers": other}),
        ("POST", "/api/balance", "/api/balance", {"json": {}, "headers": trace}),
        ("POST", "/api/balance", "/api/balance", {"content": b"{" * 20_000}),
        ("POST", "/api/users", "/api/users", {"json": {}}),
        ("GET", "/api/users", "/api/users", {}),
        ("GET", "/api/users/{userId}", "/api/users/1", {}),
        ("GET", "/api/users/{userId}", "/api/users/404404", {}),
        ("GET", "/api/users/{userId}/entries", "/api/users/1/entries", {}),
        ("GET", "/api/users/{userId}/daily-balances", "/api/users/1/daily-balances", {}),
        ("GET", "/api/changes/{key}", "/api/changes/headers-1", {}),
        ("GET", "/api/cron/status", "/api/cron/status", {}),
        ("GET", "/api/cron/runs/{run}/log", "/api/cron/runs/404404/log", {}),
        ("POST", "/api/cron/jobs/{name}/run", "/api/cron/jobs/none/run", {}),
        ("PUT", "/api/cron/jobs/{name}/schedule", "/api/cron/jobs/none/schedule", {"json": {}}),
        ("DELETE", "/api/cron/jobs/{name}/schedule", "/api/cron/jobs/none/schedule", {}),
        ("GET", "/problems", "/problems", {}),
        ("GET", "/readyz", "/readyz", {}),
    ]
    seen: set[str] = set()
    async with http_client(instance.url) as client:
        for method, template, path, more in calls:
            answer = await client.request(method, path, **more)
            described = document["paths"][template][method.lower()]["responses"]
            documented = {
                name.lower(): document["components"]["headers"][name]
                for name in described[str(answer.status_code)]["headers"]
            }
            carried = {name.lower() for name in answer.headers} - COMMON_HEADERS
            required = {name for name, header in documented.items() if header.get("required")}
            assert required <= carried <= documented.keys(), (method, path, answer.status_code)
            for name in carried:
                schema = documented[name]["schema"]
                value: object = answer.headers[name]
                jsonschema_rs.validate(
                    schema, int(str(value)) if schema["type"] == "integer" else value
                )
            seen |= carried
    assert {"etag", "location", "idempotent-replayed", "traceparent", "x-request-id"} <= seen
    for name, operation in _operations(document):
        for status, described in operation["responses"].items():
            assert ("Retry-After" in described["headers"]) == (status == "503"), name
