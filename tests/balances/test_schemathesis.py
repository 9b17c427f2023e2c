"""The service behaves as its OpenAPI document says."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx
import jsonschema_rs
import pytest

import balance_app.main  # noqa: F401 - with it every problem is known
from balance_app.access.keys import Token
from balance_app.access.routes import NEEDS, OPEN
from balance_app.balances import errors
from balance_app.errors import PROBLEM_JSON, all_problems, explain
from tests.access.keyring import bearer, keys_are_needed, make_key
from tests.balances.hostile import one_instance
from tests.processes import Instance, http_client
from tests.system.sizes import size

EXAMPLES = size(small=25, full=100)  # of each operation

KINDS: Final = {kind.code: kind for kind in all_problems()}

# Rules that no schema can express: a key belongs to one content for ever (each request gets its
# own), an entity tag is one that the account has or not, no transfer is to oneself, no moment both
# a time and a version, and 2.0 is not an integer here (in JSON Schema it is: such numbers are sent
# as integers). That each operation asks for its scope is tested in tests/access: here too many
# wrong keys would come from one address.
HOOKS: Final = """
import re
import uuid

import schemathesis

from balance_app.http.openapi import TAGS_PATTERN


@schemathesis.hook
def before_load_schema(context, raw_schema):
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)


@schemathesis.hook
def before_call(context, case, kwargs):
    headers = case.headers or {}
    key = headers.get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch("[!-~]{1,255}", key):
        headers["Idempotency-Key"] = uuid.uuid4().hex
    is_valid = case.meta is None or case.meta.generation.mode.is_positive
    for name, tag in {"If-Match": "*", "If-None-Match": '"none"'}.items():
        given = headers.get(name)
        if isinstance(given, str) and (is_valid or re.fullmatch(TAGS_PATTERN, given)):
            headers[name] = tag
    if is_valid and {"at", "version"} <= (case.query or {}).keys():
        del case.query["at"]
    if isinstance(case.body, dict):
        case.body = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in case.body.items()
        }
        if type(case.body.get("fromUserId")) is int:
            if case.body["fromUserId"] == case.body.get("toUserId"):
                case.body["toUserId"] += 1 if case.body["toUserId"] < 9 else -1
"""


# 428 is what RFC 6585 has for a header that makes a request conditional.
CONFIGURATION: Final = """
[checks]
missing_required_header.expected-statuses = [400, 401, 403, 406, 415, 422, 428]
"""


@pytest.fixture(scope="module")
async def instance(postgres: dict[str, str]) -> AsyncIterator[Instance]:
    """One instance for the whole file."""
    async with one_instance(postgres) as (running, database):
        KEY.append(await make_key(database))
        await keys_are_needed(running.url)
        yield running


# with all scopes, of the instance of this file
KEY: Final[list[Token]] = []


def _client(instance: Instance) -> httpx.AsyncClient:
    client = http_client(instance.url)
    client.headers.update(bearer(KEY[-1]))
    return client


async def test_the_service_keeps_to_its_openapi_document(
    instance: Instance, tmp_path: Path
) -> None:
    """Schemathesis finds no undocumented answer, invalid body, 5xx or wrongly accepted input."""
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    tester = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{instance.url}/openapi.json"),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--generation-deterministic", "--seed", "1"),
        *("--continue-on-failure", "--no-color"),
        *("--header", "Authorization: " + bearer(KEY[-1])["Authorization"]),
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": _path_with(tmp_path)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(tester.communicate(), 400)
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


async def test_each_operation_names_its_scopes_and_how_it_refuses_without(
    instance: Instance,
) -> None:
    """As the table by which requests are refused; open ones ask nobody."""
    document = await _document(instance)
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    needs = {(method, re.sub(r":\w+}", "}", path)): each for (method, path), each in NEEDS.items()}
    for name, operation in _operations(document):
        method, path = name.upper().split()[0], name.split()[1]
        scopes = [each["key"] for each in operation["security"]]
        described = operation.get("description", "").count("The key needs the scope ")
        assert described == min(1, len(scopes)), name
        assert scopes == [[scope] for scope in needs[method, path]], name
        found = {
            code
            for status in ("401", "403", "421", "429")
            for code in operation["responses"]
            .get(status, {})
            .get("content", {})
            .get(PROBLEM_JSON, {})
            .get("examples", {})
        }
        expected = {"unauthorized", "insufficient-scope", "misdirected-request"}
        expected |= {"too-many-requests"} | ({"cross-site-request"} if method != "GET" else set())
        assert found == (set() if needs[method, path] == OPEN else expected), name


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
    named = set(re.findall(r'<(?:link|script)[^>]* (?:src|href)="([^"]+)"', page))
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
    *("x-accel-buffering", "vary", "x-content-type-options", "cross-origin-resource-policy"),
}


async def test_headers_are_documented_on_the_answers_that_carry_them(instance: Instance) -> None:
    """Each answer has the headers that the document requires, and no others."""
    document = await _document(instance)
    seen: set[str] = set()
    codes: set[str] = set()
    async with _client(instance) as client:

        async def call(
            status: int | None,
            method: str,
            template: str,
            *values: object,
            **more: Any,  # noqa: ANN401 - what httpx takes
        ) -> httpx.Response:
            path = re.sub(r"{\w+}", "{}", template).format(*values)
            answer = await client.request(method, path, **more)
            assert status in {answer.status_code, None}, (method, path, answer.text)
            answers = document["paths"][template][method.lower()]["responses"]
            described = answers[str(answer.status_code)]
            carried = _check_headers(document, described, answer)
            seen.update(carried)
            if answer.headers.get("content-type") == PROBLEM_JSON:
                code = answer.json()["code"]
                assert code in described["content"][PROBLEM_JSON]["examples"], (method, path)
                codes.add(code)
            return answer

        await _call_movements(call)
        await _call_accounts(call)
        await _call_others(call)
    assert {"etag", "location", "idempotent-replayed", "traceparent", "x-request-id"} <= seen
    of_balances = {kind.code for kind in KINDS.values() if kind.__module__ == errors.__name__}
    assert of_balances - codes == {"user-id-taken", "balance-limit-exceeded"}
    for name, operation in _operations(document):
        for status, described in operation["responses"].items():
            assert ("Retry-After" in described["headers"]) == (status in {"429", "503"}), name


JSON: Final = {"Content-Type": "application/json"}
Call: TypeAlias = Callable[..., Awaitable[httpx.Response]]


def _check_headers(
    document: dict[str, Any], described: dict[str, Any], answer: httpx.Response
) -> set[str]:
    """Compare an answer's headers with the document; return those that are not common."""
    documented = {
        name.lower(): document["components"]["headers"][name] for name in described["headers"]
    }
    carried = {name.lower() for name in answer.headers} - COMMON_HEADERS
    required = {name for name, header in documented.items() if header.get("required")}
    assert required <= carried <= documented.keys(), answer.request.url
    for name in carried:
        schema = documented[name]["schema"]
        value: object = answer.headers[name]
        jsonschema_rs.validate(schema, int(str(value)) if schema["type"] == "integer" else value)
    return carried


def _key(number: int) -> dict[str, str]:
    return {"Idempotency-Key": f"headers-{number}"}


async def _new_user(call: Call, balance: int = 100) -> int:
    opened = await call(201, "POST", "/api/users", json={"balance": balance})
    assert "etag" in opened.headers
    return int(opened.json()["userId"])


async def _call_movements(call: Call) -> None:
    """Each route that moves money or reserves it, accepted, replayed, and refused."""
    one, two = await _new_user(call), await _new_user(call)
    bodies: dict[str, tuple[int, dict[str, Any]]] = {
        "/api/balance": (200, {"userId": one, "amount": -2}),
        "/api/transfers": (200, {"fromUserId": one, "toUserId": two, "amount": 2}),
        "/api/holds": (201, {"userId": one, "amount": 2, "expiresInSeconds": 60}),
    }
    for number, (path, (status, body)) in enumerate(bodies.items()):
        much = {**body, "amount": body["amount"] * 1000}
        for keyed in (_key(2 * number), _key(2 * number)):
            made = await call(status, "POST", path, json=body, headers=keyed)
        await call(422, "POST", path, json=much, headers=_key(2 * number))
        for _ in range(2):
            await call(409, "POST", path, json=much, headers=_key(2 * number + 1))
            await call(200, "GET", "/api/users/{userId}/changes/{key}", one, f"headers-{number}")
        nobody = {
            name: 404_404 if name in {"userId", "toUserId"} else value
            for name, value in body.items()
        }
        await call(404, "POST", path, json=nobody)
        await call(400, "POST", path, json=body, headers={"If-Match": "none"})
        stale = await call(412, "POST", path, json=body, headers={"If-Match": '"9.9.9"'})
        assert stale.headers["etag"].count(".") == 2
        await call(413, "POST", path, content=b"{" * 20_000, headers=JSON)
        await call(415, "POST", path, content=b"{}")
    assert made.headers["location"] == f"/api/holds/{made.json()['id']}"
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    await call(422, "POST", "/api/balance", json={}, headers=trace)
    await call(404, "GET", "/api/users/{userId}/changes/{key}", one, "never")
    moved = await call(200, "POST", "/api/transfers", json=bodies["/api/transfers"][1])
    await call(200, "GET", "/api/transfers/{transferId}", moved.json()["id"])
    await call(404, "GET", "/api/transfers/{transferId}", "1-404404")
    hold, capture, void = (
        "/api/holds/{holdId}",
        "/api/holds/{holdId}/capture",
        "/api/holds/{holdId}/void",
    )
    await call(200, "GET", hold, made.json()["id"])
    await call(409, "POST", capture, made.json()["id"], json={"amount": 3})
    for _ in range(2):
        await call(200, "POST", capture, made.json()["id"], json={"amount": 1})
    await call(409, "POST", void, made.json()["id"])
    placed = await call(201, "POST", "/api/holds", json=bodies["/api/holds"][1])
    for _ in range(2):
        await call(200, "POST", void, placed.json()["id"])
    for method, template in (("GET", hold), ("POST", capture), ("POST", void)):
        await call(404, method, template, "1-404404")
    reverse = "/api/users/{userId}/entries/{version}/reverse"
    for _ in range(2):
        undone = await call(200, "POST", reverse, one, 2)
    await call(409, "POST", reverse, one, undone.json()["version"])
    await call(404, "POST", reverse, one, 404_404)


async def _call_accounts(call: Call) -> None:
    """Each route of an account and its settings."""
    user = await _new_user(call)
    account = "/api/users/{userId}"
    found = await call(200, "GET", account, user)
    tag = found.headers["etag"]
    same = await call(304, "GET", account, user, headers={"If-None-Match": tag})
    assert (same.content, same.headers["etag"]) == (b"", tag)
    await call(400, "GET", account, user, headers={"If-None-Match": "none"})
    past = await call(200, "GET", account, user, params={"version": 1})
    assert "etag" not in past.headers
    await call(404, "GET", account, user, params={"version": 2})
    await call(404, "GET", account, 404_404)
    name = f"headers-{user}"
    await call(428, "PATCH", account, user, json={"floor": -5})
    patched = await call(
        200,
        "PATCH",
        account,
        user,
        json={"frozen": True, "externalId": name},
        headers={"If-Match": tag},
    )
    assert patched.headers["etag"] != tag
    await call(412, "PATCH", account, user, json={"floor": -5}, headers={"If-Match": tag})
    anyhow = {"If-Match": "*"}
    await call(409, "PATCH", account, user, json={"floor": 101}, headers=anyhow)
    await call(404, "PATCH", account, 404_404, json={"floor": -5}, headers=anyhow)
    await call(
        409, "PATCH", account, await _new_user(call), json={"externalId": name}, headers=anyhow
    )
    await call(409, "POST", "/api/balance", json={"userId": user, "amount": 1}, headers=_key(user))
    once = "/api/users/by-external-id/{externalId}"
    await call(200, "PUT", once, name, json={})
    made = await call(201, "PUT", once, f"{name}-once")
    assert made.headers["location"] == f"/api/users/{made.json()['userId']}"
    await call(409, "PUT", once, f"{name}-poor", json={"floor": 1})
    await call(409, "POST", "/api/users", json={"externalId": name})
    for _ in range(2):
        await call(201, "POST", "/api/users", json={}, headers=_key(100 + user))
    for below in ("entries", "daily-balances", "settings", "holds"):
        await call(200, "GET", f"{account}/{below}", user)
        await call(404, "GET", f"{account}/{below}", 404_404)
        await call(422, "GET", f"{account}/{below}", user, params={"limit": 0})
    for media_type in ("text/csv", "application/jsonl"):
        sent = {"Accept": media_type}
        exported = await call(200, "GET", f"{account}/entries", user, headers=sent)
        assert "content-disposition" in exported.headers
        await call(404, "GET", f"{account}/entries", 404_404, headers=sent)
    await call(406, "GET", f"{account}/entries", user, headers={"Accept": "text/plain"})
    for accept in ("text/csv", "application/jsonl"):
        exported = await call(200, "GET", f"{account}/entries", user, headers={"Accept": accept})
        assert "content-disposition" in exported.headers
    await call(406, "GET", f"{account}/entries", user, headers={"Accept": "text/plain"})
    await call(200, "GET", "/api/users")


async def _call_others(call: Call) -> None:
    """Routes of jobs, and about the service."""
    await call(200, "GET", "/api/actions")
    await call(200, "GET", "/api/cron/status")
    await call(404, "GET", "/api/cron/runs/{run}/log", 404_404)
    await call(404, "POST", "/api/cron/jobs/{name}/run", "none")
    await call(422, "PUT", "/api/cron/jobs/{name}/schedule", "none", json={})
    await call(404, "DELETE", "/api/cron/jobs/{name}/schedule", "none")
    await call(200, "GET", "/problems")
    await call(200, "GET", "/readyz")
    await call(200, "GET", "/metrics")
    wrong = {"Authorization": "Bearer wrong"}
    refused = await call(401, "GET", "/metrics", headers=wrong)
    assert refused.headers["www-authenticate"] == "Bearer"
    await call(401, "POST", "/api/balance", json={"userId": 1, "amount": 1}, headers=wrong)
    page = {"Sec-Fetch-Site": "cross-site"}
    await call(403, "POST", "/api/balance", json={"userId": 1, "amount": 1}, headers=page)
    while True:  # until there are more than a second allows
        tries = (call(None, "GET", "/api/users", headers=wrong) for _ in range(50))
        if 429 in {each.status_code for each in await asyncio.gather(*tries)}:
            return


async def test_every_header_has_an_example(instance: Instance) -> None:
    """Of each header that an answer may have, one that fits its schema."""
    for name, header in (await _document(instance))["components"]["headers"].items():
        assert "example" in header, name
        jsonschema_rs.validate(header["schema"], header["example"])


async def test_every_request_has_an_example(instance: Instance) -> None:
    """Of each body, and each parameter that has to be sent, of the routes of balances."""
    for name, operation in _operations(await _document(instance)):
        if not {"balances", "holds", "ledger", "users"} & set(operation.get("tags", ())):
            continue
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        assert body is None or "example" in body, name
        for parameter in operation.get("parameters", ()):
            examples = {"example", "examples"} & (parameter.keys() | parameter["schema"].keys())
            assert examples or not parameter.get("required"), (name, parameter)
