"""Behind a proxy that is trusted, its clients count; what anybody else says counts for nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.access.keyring import keys_are_needed, make_key, unknown
from tests.balances.hostile import exchange, raw_request
from tests.processes import SERVE, Instance, http_client

MUTANT = ("tests.mutants", "every-proxy")
PROXY = {"TRUSTED_PROXIES": "127.0.0.1"}
ELSEWHERE = {"TRUSTED_PROXIES": "203.0.113.0/24"}  # the tests' own address is none of these

# Whose headers are believed: a trusted proxy's; not anybody's, with or without trusted ones, but
# without the guard (the control).
POSTURES = [
    pytest.param(PROXY, SERVE, True, id="trusted"),
    pytest.param({}, SERVE, False, id="no-proxies"),
    pytest.param(ELSEWHERE, SERVE, False, id="not-that-proxy"),
    pytest.param(ELSEWHERE, MUTANT, True, id="control"),
]


@asynccontextmanager
async def serving(
    database: dict[str, str],
    program: tuple[str, ...] = SERVE,
    log: Path | None = None,
    **env: str,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run an instance without keys; yield a client."""
    env = {"JOBS_ENABLED": "false", "ALLOW_ANONYMOUS": "true", **env}
    async with (
        Instance(database, program=program, log=log, **env) as instance,
        http_client(instance.url) as client,
    ):
        yield client


@pytest.mark.parametrize(("env", "program", "believed"), POSTURES)
async def test_streams_are_counted_for_each_client(
    database: dict[str, str], env: dict[str, str], program: tuple[str, ...], *, believed: bool
) -> None:
    """By address: two clients of a proxy take nothing from each other, and no spoofer has more."""
    async with (
        serving(database, program, None, **env, STREAMS_PER_CLIENT="1") as client,
        AsyncExitStack() as streams,
    ):
        statuses = []
        for hops in ("198.51.100.1", "198.51.100.2", "6.6.6.6, 198.51.100.2", "[2001:db8::1]:5"):
            answer = await streams.enter_async_context(
                client.stream("GET", "/api/cron/events", headers={"X-Forwarded-For": hops})
            )
            statuses.append(answer.status_code)
    assert statuses == ([200, 200, 429, 200] if believed else [200, 429, 429, 429])


@pytest.mark.parametrize(("env", "program", "believed"), POSTURES)
async def test_wrong_keys_are_counted_for_each_client(
    database: dict[str, str], env: dict[str, str], program: tuple[str, ...], *, believed: bool
) -> None:
    """One who guesses does not shut out the others behind the proxy."""
    async with serving(database, program, None, **env) as client:
        await make_key(database)
        await keys_are_needed(str(client.base_url).rstrip("/"))
        guess = {
            "Authorization": f"Bearer {unknown().text[:-1]}",
            "X-Forwarded-For": "198.51.100.1",
        }
        guesses = [await client.get("/api/users", headers=guess) for _ in range(15)]
        assert 429 in {each.status_code for each in guesses}
        other = await client.get("/api/users", headers=guess | {"X-Forwarded-For": "198.51.100.2"})
    assert other.status_code == (401 if believed else 429)


@pytest.mark.parametrize(("env", "program", "believed"), POSTURES[:3])
async def test_the_log_has_the_client(
    database: dict[str, str],
    tmp_path: Path,
    env: dict[str, str],
    program: tuple[str, ...],
    *,
    believed: bool,
) -> None:
    """Each request its own, on one connection of the proxy."""
    log = tmp_path / "log"
    async with serving(database, program, log, **env, LOG_REQUESTS="true") as client:
        for hops in ("6.6.6.6, 198.51.100.1", "198.51.100.2", "unknown"):
            await client.get("/api/users/1", headers={"X-Forwarded-For": hops})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seen = [line["client"] for line in lines if line.get("path") == "/api/users/1"]
    own = "127.0.0.1"
    assert seen == (["198.51.100.1", "198.51.100.2", own] if believed else [own] * 3)


@pytest.mark.parametrize(("env", "program", "believed"), POSTURES)
async def test_a_login_behind_tls_is_secure(
    database: dict[str, str], env: dict[str, str], program: tuple[str, ...], *, believed: bool
) -> None:
    """Also of a browser that sends no Origin."""
    async with serving(database, program, None, **env) as client:
        key = await make_key(database)
        await keys_are_needed(str(client.base_url).rstrip("/"))
        for proto, secure in (("https", believed), ("http", False), ("nothing", False)):
            answer = await client.post(
                "/login", data={"key": key.text}, headers={"X-Forwarded-Proto": proto}
            )
            assert answer.status_code == 303
            [set_] = [
                each for each in answer.headers.get_list("set-cookie") if "Max-Age=43200" in each
            ]
            assert (set_.startswith("__Host-ba="), "Secure" in set_) == (secure, secure), proto


@pytest.mark.parametrize(("env", "program", "believed"), POSTURES)
async def test_the_forwarded_host_is_the_site(
    database: dict[str, str], env: dict[str, str], program: tuple[str, ...], *, believed: bool
) -> None:
    """By it an Origin is of this site, and a name is foreign where there are no keys."""
    change = {"userId": 1, "amount": -1}
    named = {"ALLOWED_HOSTS": "bank.example,app1"}
    async with serving(database, program, None, **env, **named) as client:
        own = {"Host": "app1:3000", "Origin": "https://bank.example"}
        for host in ("bank.example", "bank.example:443"):
            answer = await client.post(
                "/api/balance", json=change, headers=own | {"X-Forwarded-Host": host}
            )
            assert answer.status_code == (200 if believed else 403), host
        foreign = await client.get(
            "/api/users", headers={"Host": "app1", "X-Forwarded-Host": "evil.example"}
        )
        assert foreign.status_code == (421 if believed else 200)
        # what names no host is left out
        garbage = await client.get(
            "/api/users", headers={"Host": "app1", "X-Forwarded-Host": "<evil> example"}
        )
        assert garbage.status_code == 200


async def test_without_keys_a_proxy_is_the_network(database: dict[str, str]) -> None:
    """An instance on a loopback address does not serve everybody through it unasked."""
    instance = Instance(database, JOBS_ENABLED="false", TRUSTED_PROXIES="127.0.0.1")
    await instance.launch()
    try:
        assert instance.process is not None
        assert await asyncio.wait_for(instance.process.wait(), 60) == 2
    finally:
        await instance.kill()


GARBAGE = (
    *(b"", b",", b" ,", b"unknown", b"_hidden", b"[", b"]:", b"[::1", b"::::::", b"1.1.1.1:", b"%"),
    *(b"1.2.3.4, " * 3000, b"9" * 5000, b":" * 5000, b"[" * 5000, b"\xff\xfe", b"\xc2\xb2.1.1.1"),
    *(b"fe80::1%eth0", b"0x7f.1", b"1", b"\x1b[31m", b'for="[::1]"', b"a\tb", b"1.1.1.1\t,2.2.2.2"),
    *(b"https, https", b"HTTPS", b"javascript", b"evil.example/", b"a b", b"@", b"host:99999999"),
)


async def test_garbage_is_no_error(database: dict[str, str]) -> None:
    """Of any kind, in any of the headers, once and twice: it is as if they were not there."""
    async with serving(database, SERVE, None, **PROXY) as client:
        port = client.base_url.port
        assert port is not None
        for value in GARBAGE:
            for name in (b"For", b"Proto", b"Host"):
                line = b"X-Forwarded-%b: %b" % (name, value)
                for lines in ([line], [line, line]):
                    common = ("Host: localhost", "Connection: close")
                    sent = raw_request("GET", "/api/users/1", *common, *lines)
                    answer = await exchange(port, sent)
                    # a control character is none of a header: that is a 400 with or without a proxy
                    expected = {200, 421} if name == b"Host" else {200}
                    expected |= {400} if b"\x1b" in value else set()
                    assert answer.status in expected, (line[:60], answer)
