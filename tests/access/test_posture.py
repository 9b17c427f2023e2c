"""Whom an instance lets in that has no keys: this machine, unless somebody says otherwise."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from balance_app.access.gate import Gate
from tests.access.application import client_at, keys_are_asked_for, serving
from tests.access.keyring import bearer, cookie, log_in, make_key
from tests.access.test_gate import away
from tests.processes import Instance, free_port, served

ALL = "0.0.0.0"  # noqa: S104 - which is what is refused
CHANGE = {"userId": 1, "amount": -1}


def other_address() -> str:
    """Return an address by which other machines reach this one."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family is socket.AF_INET and not address.address.startswith("127.")
    ]
    if not found:
        pytest.skip("this machine has no address but its loopback's")
    return str(found[0])


@pytest.mark.parametrize("host", [ALL, "::", "lan"])
@pytest.mark.parametrize("ports", [("PORT",), ("PORT", "SHARED_PORT")])
async def test_an_open_address_without_keys_is_refused(
    host: str, ports: tuple[str, ...], database: dict[str, str], tmp_path: Path
) -> None:
    """The program ends with exit code 2 and a sentence, and serves nobody."""
    host = other_address() if host == "lan" else host
    log = tmp_path / "log"
    listening = {port: str(free_port()) for port in ports}
    instance = Instance(database, log=log, HOST=host, JOBS_ENABLED="false", **listening)
    await instance.launch()
    assert instance.process is not None
    assert await asyncio.wait_for(instance.process.wait(), 60) == 2
    last = log.read_text().splitlines()[-1]
    assert f"HOST={host} is open to the network and there are no keys" in last
    for way in ("balance-app keys create", "HOST=127.0.0.1", "ALLOW_ANONYMOUS=true"):
        assert way in last


async def test_an_open_address_is_served_with_keys(database: dict[str, str]) -> None:
    """One key suffices, even one that is revoked; and then nobody gets in without one."""
    async with served(database):
        key = await make_key(database)
    async with served(database, HOST=ALL) as client:
        assert (await client.get("/api/users")).status_code == 401
        assert (await client.get("/api/users", headers=bearer(key))).status_code == 200


async def test_an_open_address_without_keys_may_be_wanted(
    database: dict[str, str], tmp_path: Path
) -> None:
    """ALLOW_ANONYMOUS serves everybody, and says so at each start."""
    for start in ("first", "second"):
        log = tmp_path / start
        async with served(database, HOST=ALL, ALLOW_ANONYMOUS="true", log=log) as client:
            assert (await client.post("/api/balance", json=CHANGE)).status_code == 200
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        warnings = [line for line in lines if line["event"] == "anonymous"]
        assert [line["level"] for line in warnings] == ["warning"]
        assert f"HOST={ALL}" in warnings[0]["reason"]


async def test_nobody_is_served_while_it_is_not_known_whether_there_are_keys(
    database: dict[str, str],
) -> None:
    """An instance that starts while the database is away waits; then it refuses what is open."""
    async with serving(database):
        pass
    async with away(database):
        app = serving(database, host=ALL)
        running = await app.__aenter__()
        async with client_at(running, "10.0.0.1") as client:
            assert (await client.get("/api/users")).status_code == 503
    try:
        async with client_at(running, "10.0.0.1") as client:
            while (refused := await client.get("/api/users")).status_code == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert refused.status_code == 401
            assert "open to the network" in refused.json()["detail"]
            assert (await client.get("/livez")).status_code == 200
            await make_key(database)
            await keys_are_asked_for(running)
    finally:
        await app.__aexit__(None, None, None)


# -- what a page of another site can do ------------------------------------------------------


@pytest.fixture
async def local(database: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an instance on a loopback address, without keys."""
    async with served(database) as client:
        yield client


def rebound(client: httpx.AsyncClient) -> dict[str, str]:
    """Return what a browser sends whose DNS took evil.example for 127.0.0.1."""
    name = f"evil.example:{client.base_url.port}"
    return {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}


async def test_a_foreign_name_does_not_reach_the_service(local: httpx.AsyncClient) -> None:
    """DNS rebinding: to the browser it is one site, but its name is not one of this machine."""
    refused = await local.post("/api/balance", json=CHANGE, headers=rebound(local))
    assert (refused.status_code, refused.json()["code"]) == (421, "misdirected-request")
    for path in ("/", "/api/users", "/api/cron/status", "/metrics", "/nothing"):
        assert (await local.get(path, headers=rebound(local))).status_code == 421
    for path in ("/livez", "/readyz", "/health"):  # a probe may use any name
        assert (await local.get(path, headers=rebound(local))).status_code == 200
    assert (await local.get("/api/users/1")).json()["balance"] == 10_000


async def test_with_every_name_allowed_it_does(database: dict[str, str]) -> None:
    """Control: the name is all that is wrong with that request."""
    async with served(database, ALLOWED_HOSTS="*") as client:
        response = await client.post("/api/balance", json=CHANGE, headers=rebound(client))
        assert response.status_code == 200


OWN_HOSTS = [
    *("localhost", "LOCALHOST:1", "localhost.", "app1.localhost:99", "127.0.0.1", "127.0.0.1:80"),
    *("[::1]", "[::1]:80", "10.1.2.3", "balances.example", "BALANCES.example.:443"),
]
FOREIGN_HOSTS = [
    *("evil.example", "localhost.evil.example", "xlocalhost", "127.0.0.1.evil.example"),
    *("127.0.0.1x", "[::1].evil.example", "[::1", "::1", "sub.balances.example", "*", ":80"),
    *("balances.example.evil.example", "evil.example/localhost", "evil.example@localhost"),
]


async def test_names_of_this_machine(database: dict[str, str]) -> None:
    """Addresses, localhost and what is below it, and what ALLOWED_HOSTS lists, exactly."""
    allowed = "balances.example, other.example"
    async with serving(database, allowed_hosts=allowed) as app, client_at(app, "::1") as client:
        for host in OWN_HOSTS:
            assert (await client.get("/api/users", headers={"Host": host})).status_code == 200, host
        for host in FOREIGN_HOSTS:
            assert (await client.get("/api/users", headers={"Host": host})).status_code == 421, host


FOREIGN: list[dict[str, str]] = [
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost:3001"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://evil.example://localhost"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    {"Sec-Fetch-Site": "anything"},
]
OWN: list[dict[str, str]] = [
    {},
    {"Origin": "http://localhost"},
    {"Origin": "https://localhost"},  # a proxy ends TLS
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"},
    {"Sec-Fetch-Site": "none"},
]


async def results(client: httpx.AsyncClient, cases: list[dict[str, str]]) -> list[int]:
    """Return the status of a change with each of these header fields."""
    return [
        (await client.post("/api/balance", json=CHANGE, headers=case)).status_code for case in cases
    ]


@pytest.mark.parametrize("mode", ["anonymous", "key", "session"])
async def test_a_page_of_another_site_changes_nothing(mode: str, database: dict[str, str]) -> None:
    """Without keys, and with the key or session that a browser has."""
    async with serving(database) as app, client_at(app, "::1") as client:
        if mode != "anonymous":
            key = await make_key(database)
            await keys_are_asked_for(app)
            session = await log_in(database, key)
            client.headers.update(bearer(key) if mode == "key" else cookie(session))
        assert await results(client, FOREIGN) == [403] * len(FOREIGN)
        assert await results(client, OWN) == [200] * len(OWN)
        refused = await client.post("/api/balance", json=CHANGE, headers=FOREIGN[0])
        assert refused.json()["code"] == "cross-site-request"
        # what only reads may come from anywhere: the browser keeps the answer from the page
        assert (await client.get("/api/users", headers=FOREIGN[0])).status_code == 200
        # nor a form of the page, nor what needs no key
        for path in ("/change", "/jobs/none/run", "/users/1", "/logout", "/login"):
            assert (await client.post(path, headers=FOREIGN[0])).status_code == 403, path


async def test_without_the_check_it_does(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: nothing else keeps it from that."""

    def unchecked(*_: Any) -> None:  # noqa: ANN401 - whatever it is called with
        return None

    monkeypatch.setattr(Gate, "_check_site", unchecked)
    async with serving(database) as app, client_at(app, "::1") as client:
        assert await results(client, FOREIGN) == [200] * len(FOREIGN)
