"""Refusals of the load test, and their messages."""

import asyncio
import json
import resource
import socket
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from loadtest import preconditions
from loadtest.__main__ import EXIT_NOT_RUN, cli
from loadtest.key import find_key
from loadtest.preconditions import CannotRunError, Target, allow_open_files, find
from tests.access.keyring import keys_are_needed, make_key
from tests.processes import Instance


def test_absent_service() -> None:
    """Where nothing listens, one sentence says so and how to start the service."""
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound_but_deaf.getsockname()[1]}"
        result = CliRunner().invoke(cli, [url])
    assert result.exit_code == EXIT_NOT_RUN
    assert result.stderr == f"No service answers at {url}: start it with `make run`.\n"
    assert result.stdout == ""


async def test_the_service_is_found_where_its_commands_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At PORT; if nothing listens there, at the ports of the containers that answer."""
    monkeypatch.chdir(tmp_path)
    for name in ("PORT", "BALANCE_APP_URL"):
        monkeypatch.delenv(name, raising=False)
    servers = [
        await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        for _ in range(3)
    ]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    try:
        (tmp_path / ".env").write_text(f"PORT={ports[0]}\n")
        assert await find() == [Target("127.0.0.1", ports[0])]
        servers[0].close()
        monkeypatch.setattr(preconditions, "_PORTS_OF_CONTAINERS", ports)
        assert await find() == [Target("127.0.0.1", port) for port in ports[1:]]
        monkeypatch.setenv("BALANCE_APP_URL", f"http://127.0.0.1:{ports[0]}")
        with pytest.raises(CannotRunError, match=f"No service answers at .*:{ports[0]}"):
            await find()
    finally:
        for server in servers:
            server.close()


def test_reason_as_json() -> None:
    """With --json the reason for not running is one JSON object on stdout as well."""
    result = CliRunner().invoke(cli, ["http://192.0.2.1:3000", "--json"])
    assert result.exit_code == EXIT_NOT_RUN
    report = json.loads(result.stdout)
    assert report["verdict"] == "not-run"
    assert "loopback" in report["problems"][0]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "http://192.168.0.1:3000",
        "http://localhost.example.com",
        "http://127.0.0.1@192.0.2.1",
        "https://127.0.0.1:3000",
        "http://127.0.0.1:3000/api",
        "127.0.0.1:3000",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http://ada:geheim@127.0.0.1:3000",
        "http://ada:1/geheim@127.0.0.1",
        "",
    ],
)
def test_refused_urls(url: str) -> None:
    """Only plain base URLs of loopback addresses are accepted; no password is repeated."""
    with pytest.raises(CannotRunError) as refused:
        Target.parse(url)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:3000", "http://127.0.0.1:3000/", "http://127.8.9.1:80", "http://[::1]:3000"],
)
def test_accepted_urls(url: str) -> None:
    """Every loopback address is accepted and written unchanged."""
    assert Target.parse(url).url == url.rstrip("/")


def test_open_files_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A low soft limit is raised as far as the burst needs."""
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 20_000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    allow_open_files(10_000)
    assert raised[0][0] > 10_000
    assert raised[0][1] == 20_000


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard limit below the need is refused with both remedies."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(CannotRunError, match=r"ulimit -n 20000.*--connections 512"):
        allow_open_files(10_000)


@pytest.mark.parametrize(
    "option",
    [
        "--requests=0",
        "--requests=1000001",
        "--amount=0",
        f"--amount={-(2**53)}",
        "--balance=-1",
        f"--balance={2**53}",
        f"--user={2**53}",
        "--timeout=nan",
        "--connections=x",
    ],
)
def test_impossible_options(option: str) -> None:
    """An invalid option is a usage error."""
    result = CliRunner().invoke(cli, [option])
    assert result.exit_code == EXIT_NOT_RUN
    assert f"Error: Invalid value for '{option.partition('=')[0]}'" in result.stderr


def test_the_key_is_read_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from a file that others can read; nor is it sent to an address that `.env` names."""
    monkeypatch.chdir(tmp_path)
    for name in ("BALANCE_APP_URL", "BALANCE_APP_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert find_key(None, urls_are_given=False) is None
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("BALANCE_APP_KEY", "of-the-environment")
    assert find_key(None, urls_are_given=False) == "of-the-environment"
    assert find_key(file, urls_are_given=False) == "of-the-file"
    (tmp_path / ".env").write_text("BALANCE_APP_URL=http://127.0.0.1:1\nBALANCE_APP_KEY=written\n")
    for key_file in (None, file):
        assert find_key(key_file, urls_are_given=True) != "written"
        with pytest.raises(CannotRunError, match=r"\.env") as refused:
            find_key(key_file, urls_are_given=False)
        assert "of-the" not in str(refused.value)
    monkeypatch.delenv("BALANCE_APP_KEY")
    assert find_key(None, urls_are_given=False) == "written"
    file.chmod(0o640)
    with pytest.raises(CannotRunError, match="chmod 600"):
        find_key(file, urls_are_given=True)
    file.chmod(0o600)
    for text in ("", "two words", "caf\u00e9"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(CannotRunError):
            find_key(file, urls_are_given=True)


async def test_a_user_with_a_hold_and_an_overdraft_is_judged(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """As README makes them; a frozen one is not, and a sentence says so."""

    async def fire(amount: int) -> Result:
        options = ["--user=1", "--requests=20", f"--amount={amount}"]
        return await asyncio.to_thread(CliRunner().invoke, cli, [instance.url, *options])

    async def set_to(**settings: int) -> None:
        made = await client.patch("/api/users/1", json=settings, headers={"If-Match": "*"})
        assert made.status_code == 200

    hold = {"userId": 1, "amount": 20, "expiresInSeconds": 3600}
    assert (await client.post("/api/holds", json=hold)).status_code == 201
    passed = await fire(-1000)
    assert (passed.exit_code, "9 accepted, 11 refused" in passed.stdout) == (0, True), passed.output
    await set_to(floor=-500)
    passed = await fire(-100)
    assert (passed.exit_code, "14 accepted, 6 refused" in passed.stdout) == (0, True), passed.output
    assert "(balance 1000 before, held 20, floor -500)" in passed.stdout
    await set_to(frozen=True)
    refused = await fire(-100)
    assert (refused.exit_code, refused.stdout) == (EXIT_NOT_RUN, "")
    assert refused.stderr == "User 1 is frozen, and refuses every change: unfreeze it first.\n"


async def test_a_service_with_keys_is_tested_with_one(
    instance: Instance, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, or with one that does not suffice, a sentence says which it needs."""
    weak = await make_key(database, "read")
    strong = await make_key(database, "open", "change", "read")
    await keys_are_needed(instance.url)

    async def fire(**env: str) -> Result:
        monkeypatch.delenv("BALANCE_APP_KEY", raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return await asyncio.to_thread(CliRunner().invoke, cli, [instance.url, "--requests=20"])

    passed = await fire(BALANCE_APP_KEY=strong.text)
    assert (passed.exit_code, "PASS" in passed.stdout) == (0, True), passed.output
    for env in ({}, {"BALANCE_APP_KEY": weak.text}):
        refused = await fire(**env)
        assert (refused.exit_code, refused.stdout) == (EXIT_NOT_RUN, "")
        assert "its scopes must be open, change and read" in refused.stderr
        assert weak.text not in refused.stderr
    assert strong.text not in passed.output
