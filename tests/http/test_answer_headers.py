"""Headers of all answers: no cache keeps money, no browser guesses, no other site takes it in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import httpx

from tests.balances.hostile import raw_request
from tests.processes import SERVE, Instance, http_client

MUTANT: Final = ("tests.mutants", "answer-headers")
Headers = list[tuple[str, str]]

ALWAYS: Final = (
    ("x-content-type-options", "nosniff"),
    ("cross-origin-resource-policy", "same-origin"),
)
REQUESTS: Final = (
    *(("GET", path) for path in ("/", "/jobs", "/users/1", "/docs", "/openapi.json", "/livez")),
    *(("GET", path) for path in ("/readyz", "/health", "/metrics", "/problems", "/nowhere")),
    *(("GET", path) for path in ("/static/app.css", "/docs/assets/docs.js", "/static/none")),
    *(("GET", path) for path in ("/api/users", "/api/users/1", "/api/users/0", "/api/users/9")),
    *(("GET", path) for path in ("/api/users/1/entries", "/api/cron/status", "/api/nowhere")),
    *(("HEAD", path) for path in ("/api/users/1", "/nowhere", "/docs")),
    *(("POST", path) for path in ("/api/balance", "/api/users", "/api/transfers", "/change")),
    *(("DELETE", path) for path in ("/api/users/1", "/docs", "/")),
)
JSON: Final = "Content-Type: application/json"
KEPT: Final = frozenset({"/static/app.css", "/docs/assets/docs.js"})
BROKEN: Final = {
    400: b"}\r\n\r\n",
    408: b"GET",
    413: raw_request("POST", "/api/balance", "Host: localhost", JSON, "Content-Length: 99999"),
    421: raw_request("GET", "/api/users/1", "Host: evil.example"),
    431: b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 500_000,
    501: raw_request("POST", "/", "Host: localhost", "Transfer-Encoding: gzip"),
}


@asynccontextmanager
async def answers(
    database: dict[str, str], program: tuple[str, ...] = SERVE
) -> AsyncIterator[list[tuple[str, Headers]]]:
    """Run an instance, and yield the headers of its answers of every kind."""
    async with (
        Instance(database, program=program, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
    ):
        found = []
        for method, path in REQUESTS:
            answer = await client.request(method, path)
            found.append((path, answer.headers.multi_items()))
        changed = await client.post("/api/balance", json={"userId": 1, "amount": -1})
        refused = await client.post("/api/balance", json={"userId": 1, "amount": -99999})
        assert (changed.status_code, refused.status_code) == (200, 409)
        found += [("/api/balance", each.headers.multi_items()) for each in (changed, refused)]
        for path in ("/live", "/api/cron/events"):
            async with client.stream("GET", path) as stream:
                found.append((path, stream.headers.multi_items()))
        for status, sent in BROKEN.items():
            found.append((f"/api/{status}", await broken(instance.port, status, sent)))
        yield found


async def broken(port: int, status: int, sent: bytes) -> Headers:
    """Send what is refused with a status; return the headers of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(20):
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    writer.close()
    assert int(first.split()[1]) == status
    return [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]


def missing(found: list[tuple[str, Headers]]) -> list[tuple[str, str]]:
    """Return which answers lack which header, or have it twice."""
    lacking = []
    for path, headers in found:
        names = [name for name, _ in headers]
        lacking += [(path, name) for name, value in ALWAYS if headers.count((name, value)) != 1]
        lacking += [(path, name) for name, _ in ALWAYS if names.count(name) != 1]
        stored = httpx.Headers(headers).get_list("cache-control")
        if path.startswith("/api/") and stored != ["no-store"]:
            lacking.append((path, "cache-control"))
        if path not in KEPT and stored not in (["no-store"], ["no-cache"], []):
            lacking.append((path, "cache-control"))
    return lacking


async def test_every_answer_has_them_once(database: dict[str, str]) -> None:
    """Answers of routes, problems, streams, files, and those of the protocol itself."""
    async with answers(database) as found:
        assert missing(found) == []
        problems = [
            dict(headers) for path, headers in found if path in {"/nowhere", "/static/none"}
        ]
        assert {each["cache-control"] for each in problems} == {"no-store"}
        page = dict(next(headers for path, headers in found if path == "/docs"))
        assert "script-src 'self';" in page["content-security-policy"]
        assert "frame-ancestors 'none'" in page["content-security-policy"]


async def test_without_them_they_are_missed(database: dict[str, str]) -> None:
    """The control."""
    async with answers(database, MUTANT) as found:
        lacking = missing(found)
    assert {name for _, name in lacking} == {*dict(ALWAYS), "cache-control"}
    assert {path for path, _ in lacking} == {path for path, _ in found}
