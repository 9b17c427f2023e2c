"""Bad input gets a 4xx with a clear problem, changes nothing, and is never echoed."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

import asyncpg
import pytest

import balance_app.main  # noqa: F401 - with it every problem is known
from balance_app.errors import PROBLEM_JSON, all_problems
from balance_app.faults import SENTENCES
from tests.balances.hostile import (
    CHANGE,
    MAX,
    OPEN,
    Answer,
    Case,
    all_cases,
    chunked,
    exchange,
    one_instance,
    raw_request,
    request,
)
from tests.processes import Instance, connect, http_client

CASES: Final = all_cases()
MEMBERS: Final = {"type", "title", "status", "detail", "code", "applied"}
STATUS_OF: Final = {kind.code: kind.status for kind in all_problems()}
TITLE_OF: Final = {kind.code: kind.title for kind in all_problems()}
NAME: Final = re.compile(rb'\\"[A-Za-z][A-Za-z0-9_-]{0,39}\\"')
EVERYTHING: Final = """
SELECT (SELECT jsonb_agg(u ORDER BY id) FROM users u),
       (SELECT jsonb_agg(e ORDER BY user_id, version) FROM entries e),
       (SELECT jsonb_agg(h ORDER BY user_id, number) FROM holds h),
       (SELECT jsonb_agg(k ORDER BY user_id, key) FROM idempotency_keys k),
       (SELECT jsonb_agg(k ORDER BY key) FROM opening_keys k),
       (SELECT jsonb_agg(i ORDER BY user_id) FROM external_ids i),
       (SELECT jsonb_agg(s ORDER BY user_id, settings_version) FROM user_settings s)
"""


@dataclass(frozen=True)
class Target:
    """One running instance, and a connection to its database."""

    instance: Instance
    ledger: "asyncpg.Connection[asyncpg.Record]"

    async def stored(self) -> tuple[str | None, ...]:
        """Return every row of every table, as text."""
        row = await self.ledger.fetchrow(EVERYTHING)
        assert row is not None
        return tuple(row)

    async def send(self, *parts: bytes, pause_seconds: float = 0) -> Answer:
        return await exchange(self.instance.port, *parts, pause_seconds=pause_seconds)


@pytest.fixture(scope="module")
async def target(postgres: dict[str, str]) -> AsyncIterator[Target]:
    """One instance for the whole file; bodies have a second to arrive."""
    async with one_instance(postgres, body_seconds="1") as (instance, database):
        ledger = await connect(database)
        try:
            yield Target(instance, ledger)
        finally:
            await ledger.close()


def assert_problem(answer: Answer, status: int, code: str, method: bytes = b"POST") -> None:
    """Check that the answer is this complete problem, with `applied: "no"` on a change."""
    assert (answer.status, answer.rest) == (status, b""), answer.raw[:500]
    assert answer.headers["content-type"] == PROBLEM_JSON
    assert STATUS_OF[code] == status
    body = json.loads(answer.body)
    reads = method in {b"GET", b"OPTIONS"}
    assert body.keys() >= MEMBERS - ({"applied"} if reads else set())
    applied = None if reads else "no"
    assert (body["status"], body["code"], body.get("applied")) == (status, code, applied), body
    assert (body["type"], body["title"]) == (f"/problems/{code}", TITLE_OF[code])
    assert body["detail"]
    for fault in body.get("errors", ()):
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", fault["code"]), fault
        assert re.fullmatch(r"|(/\w+)+|(header|query|path):[\w-]*", fault["pointer"]), fault
        assert fault["code"] in SENTENCES, fault
        assert re.fullmatch(r"[\w\" ].{5,240}[.?]", fault["detail"]), fault
        assert not re.search(r"[{}<>]", fault["detail"]), fault


def test_the_table_is_large_and_its_rows_have_unique_names() -> None:
    """So that a failure names its input."""
    assert len(CASES) >= 300
    names = [case.id for case in CASES]
    assert {name for name in names if names.count(name) > 1} == set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.id)[1:-1])
async def test_a_hostile_request_is_refused(target: Target, case: Case) -> None:
    """It gets the expected 4xx without its input in it, and stores nothing."""
    before = await target.stored()
    answer = await target.send(case.request)
    if case.code is None:
        assert (answer.status, answer.rest) == (case.status, b""), answer.raw[:500]
        assert answer.headers["connection"] == "close"
    elif case.request.startswith(b"HEAD "):
        assert (answer.status, answer.rest) == (case.status, b"")
    else:
        assert_problem(answer, case.status, case.code, case.request.split(b" ")[0])
    if case.fault is not None:
        first = json.loads(answer.body)["errors"][0]
        assert (first["pointer"], first["code"]) == case.fault
    if case.allow:
        assert case.allow <= set(answer.headers["allow"].split(", ")), answer.headers["allow"]
    if len(case.poison) > 5:
        # The name of an unknown or repeated field is repeated, if it is a plain word.
        assert case.poison[:40] not in NAME.sub(b"", answer.raw)
    assert await target.stored() == before


# -- controls: the table must not pass by refusing everything, nor by comparing nothing ----------

FINE_CHANGES: Final = {
    "plain": request(body=CHANGE),
    "in chunks": raw_request(
        "POST",
        "/api/balance",
        *("Host: localhost", "Connection: close"),
        *("Content-Type: application/json", "Transfer-Encoding: chunked"),
        body=chunked(CHANGE, 5),
    ),
    "spaces around": request(body=b" \r\n\t" + CHANGE + b"\n"),
    "exactly 16 KiB": request(body=CHANGE.ljust(16 * 1024)),
    "other order": request(body=b'{"amount":-2,"userId":1}'),
    "escaped names": request(body=b'{"\\u0075serId":1,"am\\u006Funt":-2}'),
    "charset": request(body=CHANGE, content_type="application/json; charset=utf-8"),
    "charset in quotes": request(body=CHANGE, content_type='application/json;charset="UTF-8"'),
    "charset and more": request(body=CHANGE, content_type="application/json; charset=utf-8; a=b"),
    "other parameter": request(body=CHANGE, content_type="application/json; version=1"),
    "odd case": request(body=CHANGE, content_type="aPPlication/JSON"),
    "problem+json": request(body=CHANGE, content_type="application/problem+json"),
    "longest key": request("POST", "/api/balance", CHANGE, "Idempotency-Key: " + "k" * 255),
    "odd key": request("POST", "/api/balance", CHANGE, "IDEMPOTENCY-KEY: !\"#$%&'()~/\\"),
    "spaces around the key": request("POST", "/api/balance", CHANGE, "Idempotency-Key:  k1 \t"),
    "unknown header": request("POST", "/api/balance", CHANGE, b"X-Odd: \xe9\xff"),
    "identity coding": request("POST", "/api/balance", CHANGE, "Content-Encoding: identity"),
    "expects 100": request("POST", "/api/balance", CHANGE, "Expect: 100-continue"),
    "HTTP/1.0": raw_request(
        "POST",
        "/api/balance",
        *("Content-Type: application/json", f"Content-Length: {len(CHANGE)}"),
        body=CHANGE,
        version="1.0",
    ),
}


@pytest.mark.parametrize("sent", FINE_CHANGES.values(), ids=FINE_CHANGES)
async def test_an_unusual_but_right_change_is_made(target: Target, sent: bytes) -> None:
    """Control: a valid change is accepted in any spelling."""
    before = await target.ledger.fetchval("SELECT balance FROM users WHERE id = 1")
    answer = await target.send(sent)
    assert answer.status == 200, answer.raw[:500]
    assert json.loads(answer.body)["balance"] == before - 2
    assert await target.ledger.fetchval("SELECT balance FROM users WHERE id = 1") == before - 2


@pytest.mark.parametrize(
    ("body", "balance"),
    [
        (OPEN, 7),
        (b"{}", 0),
        (b'{"balance":0}', 0),
        (b'{"balance":-0}', 0),
        (b'{"balance":%d}' % MAX, MAX),
    ],
)
async def test_a_valid_opening_balance_is_accepted(
    target: Target, body: bytes, balance: int
) -> None:
    """Control: from 0 to the limit."""
    answer = await target.send(request(path="/api/users", body=body))
    assert answer.status == 201
    assert json.loads(answer.body)["balance"] == balance


async def test_the_whole_range_can_be_moved_at_once(target: Target) -> None:
    """Control: an amount of 2^53-1 is accepted as a deposit and as a withdrawal."""
    opened = await target.send(request(path="/api/users", body=b"{}"))
    user = json.loads(opened.body)["userId"]
    for amount, balance in ((MAX, MAX), (-MAX, 0)):
        body = b'{"userId":%d,"amount":%d}' % (user, amount)
        answer = await target.send(request(body=body))
        assert (answer.status, json.loads(answer.body)["balance"]) == (200, balance)


@pytest.mark.parametrize(
    "path",
    [
        "/api/users/1",
        "/api/users/%31",
        "/api/users?after=0&limit=1000",
        "/api/users?%61fter=9007199254740991",
        "/api/users/1/entries?limit=1",
        "/api/users/1/daily-balances?before=0001-01-01",
        "/api/users/1/daily-balances?limit=1000&before=9999-12-31",
        "/api/users/1/daily-balances?before=2024-02-2%39",
        "/%61pi/users",
        "/docs",
        "/docs/assets/swagger-ui.css",
        "/problems/insufficient-funds",
        "http://localhost/api/users/1",
    ],
)
async def test_an_unusual_but_right_address_is_read(target: Target, path: str) -> None:
    """Control: paths are decoded before they are checked."""
    assert (await target.send(request("GET", path))).status == 200


async def test_the_comparison_detects_a_stored_change(target: Target) -> None:
    """Control: it differs after a change, a new user and a stored refusal."""
    refused = b'{"userId":1,"amount":-9007199254740991}'
    for sent in (
        request(body=CHANGE),
        request(path="/api/users", body=OPEN),
        request("POST", "/api/balance", refused, "Idempotency-Key: noticed"),
    ):
        before = await target.stored()
        assert before == await target.stored()
        await target.send(sent)
        assert await target.stored() != before


# -- oversized and incomplete bodies ------------------------------------------------------------

HEAD: Final = ("Host: localhost", "Content-Type: application/json")
FRAMINGS: Final = {
    "content-length": f"Content-Length: {50_000_000}",
    "chunked": "Transfer-Encoding: chunked",
}


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["", "expects 100"])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_fifty_megabytes_are_refused_and_not_kept(
    target: Target, framing: str, expect: tuple[str, ...]
) -> None:
    """The answer is 413, and the memory of the server does not grow by the body."""
    before, memory = await target.stored(), _memory_bytes(target.instance.pid)
    head = raw_request("POST", "/api/balance", *HEAD, FRAMINGS[framing], *expect)
    piece, end = b" " * 50_000, b""
    if framing == "chunked":
        piece, end = b"%x\r\n%b\r\n" % (len(piece), piece), b"0\r\n\r\n"
    answer = await target.send(head, *[piece] * 1000, end, request("GET", "/livez"))
    # Unread bytes did not become a request, and did not cost the client its answer.
    assert_problem(answer, 413, "body-too-large")
    assert answer.headers["connection"] == "close"
    assert _memory_bytes(target.instance.pid) < memory + 10_000_000
    assert await target.stored() == before


async def test_a_refused_body_never_becomes_a_request(target: Target) -> None:
    """Either it is discarded and the next request answered, or the connection ends with it."""
    hidden = request(body=CHANGE)
    big = request(body=hidden.ljust(40_000), keep=True)
    before = await target.stored()
    answer = await target.send(big + request("GET", "/api/users/0"))
    assert answer.status == 413
    if answer.headers.get("connection") == "close":
        assert answer.rest == b""
    else:
        assert answer.rest.startswith(b"HTTP/1.1 422 ")
        assert answer.rest.count(b"HTTP/1.1 ") == 1
    assert await target.stored() == before


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([raw_request("POST", "/api/balance", *HEAD, "Content-Length: 24")], id="none"),
        pytest.param(
            [raw_request("POST", "/api/balance", *HEAD, "Content-Length: 25", body=CHANGE)],
            id="one byte short",
        ),
        pytest.param(
            [
                raw_request("POST", "/api/balance", *HEAD, "Content-Length: 24"),
                *(CHANGE[at : at + 1] for at in range(24)),
            ],
            id="dripped",
        ),
        pytest.param(
            [
                raw_request("POST", "/api/balance", *HEAD, "Transfer-Encoding: chunked"),
                *([b"1\r\n \r\n"] * 24),
            ],
            id="chunks without end",
        ),
    ],
)
async def test_a_body_that_does_not_arrive_is_not_waited_for(
    target: Target, sent: list[bytes]
) -> None:
    """After BODY_SECONDS (1 here) the answer is 408, even if single bytes keep arriving."""
    before, started = await target.stored(), monotonic()
    answer = await target.send(*sent, pause_seconds=0.2)
    assert_problem(answer, 408, "request-timeout")
    assert answer.headers["connection"] == "close"
    assert 0.9 < monotonic() - started < 3
    assert await target.stored() == before


@pytest.mark.parametrize("body", [b"", CHANGE[:-1], CHANGE], ids=["none", "part", "all but a byte"])
async def test_a_client_that_leaves_halfway_changes_nothing(target: Target, body: bytes) -> None:
    """A body shorter than declared is no request, even if the received part is valid."""
    before = await target.stored()
    _, writer = await asyncio.open_connection("127.0.0.1", target.instance.port)
    writer.write(raw_request("POST", "/api/balance", *HEAD, "Content-Length: 25", body=body))
    await writer.drain()
    writer.close()
    await asyncio.sleep(0.1)
    assert await target.stored() == before


@pytest.mark.parametrize("garbage", [b"}", b"poison\r\n\r\n", b"\0", request(body=CHANGE)[1:]])
async def test_garbage_after_a_change_does_not_deny_it(target: Target, garbage: bytes) -> None:
    """The change is either made and answered, or neither."""
    before = await target.ledger.fetchval("SELECT balance FROM users WHERE id = 1")
    answer = await target.send(request(body=CHANGE, keep=True) + garbage)
    if answer.status == 400:
        await asyncio.sleep(0.3)  # a change that is made in spite of its refusal is made by now
    after = await target.ledger.fetchval("SELECT balance FROM users WHERE id = 1")
    assert (answer.status, before - after) in {(200, 2), (400, 0)}


async def test_an_endless_head_is_not_buffered(target: Target) -> None:
    """Headers have a limit: twenty megabytes of them end the connection, and are not stored."""
    memory = _memory_bytes(target.instance.pid)
    line = b"X-Poison: " + b"p" * 49_988 + b"\r\n"
    head = b"GET /api/users/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = await target.send(head, *[line] * 400, b"\r\n")
    assert answer.status in {0, 400, 431}
    assert _memory_bytes(target.instance.pid) < memory + 10_000_000


async def test_the_instance_is_still_the_same_and_sound(target: Target) -> None:
    """No test above ended the process, and the ledger still adds up."""
    assert target.instance.process is not None
    assert target.instance.process.returncode is None
    async with http_client(target.instance.url) as client:
        assert (await client.get("/readyz")).is_success
    wrong = await target.ledger.fetch(
        """
        SELECT id FROM users u WHERE (balance, version) IS DISTINCT FROM
        (SELECT (sum(amount)::bigint, count(*)) FROM entries WHERE user_id = u.id)
        """
    )
    assert wrong == []


def _memory_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 where the system does not report it."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) * 1024
