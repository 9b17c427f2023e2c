"""The key of the command line: where it is found, where it is sent, and that it stands nowhere."""

import asyncio
import logging
from pathlib import Path
from typing import Final

import pytest

from balance_app.cli import credentials
from balance_app.cli.credentials import Credential, Setting, find_credential
from balance_app.client import KeyNotSent
from tests.access.keyring import keys_are_needed, make_key
from tests.processes import Instance
from tests.terminal import Screen, StandIn, answering, http, run

pytestmark = pytest.mark.usefixtures("_fork_server")

KEY: Final = "ba_0123456789ab_the-secret-part-of-a-key-that-was-never-made_AAAAAA"
PART: Final = "the-secret-part"
REFUSED: Final = http(
    "401 Unauthorized", '{"code":"unauthorized","detail":"An API key is needed.","status":401}'
)


def _sent(service: StandIn) -> list[bool]:
    """Return for each request whether it had the key."""
    return [f"authorization: bearer {KEY}".lower() in each.lower() for each in service.requests]


def _key_file(path: Path, mode: int = 0o600, text: str = f"{KEY}\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


async def test_the_key_is_that_of_the_option_the_environment_or_the_users_file(
    tmp_path: Path,
) -> None:
    """In this order; one that other users can read is refused."""
    config = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "BALANCE_APP_URL": ""}
    of_user = _key_file(tmp_path / "config/balance-app/key")
    other = _key_file(tmp_path / "other", text="another-key")
    async with answering(REFUSED) as service:
        url = f"--url={service.url}"
        code, out, err = await run("users", url, **config)
        assert (code, out) == (1, "")
        assert err == f"An API key is needed. It was that of {of_user}.\n"
        await run("users", url, **config, BALANCE_APP_KEY="another-key")
        await run("users", url, f"--key-file={of_user}", BALANCE_APP_KEY="another-key")
        await run(f"--key-file={of_user}", "status", url, BALANCE_APP_KEY="another-key")
        await run("users", url, f"--key-file={other}", **config)
        assert _sent(service) == [True, False, True, True, False]
        assert "bearer another-key" in service.requests[1].lower()
        count = len(service.requests)
        for mode in (0o640, 0o604, 0o620):
            of_user.chmod(mode)
            for arguments in (("users", url), ("users", url, f"--key-file={of_user}")):
                code, out, err = await run(*arguments, **config)
                assert (code, out, err.count("\n")) == (2, "", 1)
                assert f"is not used, as other users can read it: `chmod 600 {of_user}`" in err
        for text in ("", "two words", "x" * 5000, "\0"):
            _key_file(other, text=text)
            code, _, err = await run("users", url, f"--key-file={other}")
            assert (code, err.count("\n")) == (2, 1)
        for missing in (tmp_path / "none", tmp_path):
            code, _, err = await run("users", url, f"--key-file={missing}")
            assert code == 2
            assert err.startswith(f"The key can't be read from {missing}: ")
        assert len(service.requests) == count
        code, out, err = await run("users", url, XDG_CONFIG_HOME=str(tmp_path / "none"))
        assert f"keep the key in {tmp_path}/none/balance-app/key (chmod 600)" in err


async def test_a_url_of_a_directorys_env_file_gets_no_key_but_its_own(tmp_path: Path) -> None:
    """Whoever wrote the file would get the key of whoever calls a command there."""
    config = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    of_user = _key_file(tmp_path / "config/balance-app/key")
    here = tmp_path / "here"
    here.mkdir()
    async with answering(REFUSED) as service:
        (here / ".env").write_text(f"BALANCE_APP_URL={service.url}\n")
        for command in ("status", "users", "balance 1", "change 1 5", "history", "pause x"):
            words = command.split()
            for named in ({"BALANCE_APP_KEY": KEY}, {}):
                words = [*command.split(), *([] if named else [f"--key-file={of_user}"])]
                code, out, err = await run(*words, cwd=str(here), **config, **named)
                assert (code, out) == (2, ""), err
                assert f"is not sent to {service.url}, which .env in this directory names" in err
        assert service.requests == []
        # The file of the user was not named for this service: it goes without.
        code, _, err = await run("users", cwd=str(here), **config)
        assert code == 1
        assert f"The key in {of_user} was not sent to {service.url}, which .env" in err
        assert _sent(service) == [False]
        named = {"BALANCE_APP_URL": service.url}
        await run("users", cwd=str(here), **config, **named)
        await run("users", f"--url={service.url}", cwd=str(here), **config)
        (here / ".env").write_text(f"BALANCE_APP_URL={service.url}\nBALANCE_APP_KEY={KEY}\n")
        await run("users", cwd=str(here))
        assert _sent(service) == [False, True, True, True]


def test_without_the_rule_the_key_goes_where_an_env_file_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: with the rule removed both URLs get it."""
    url, key = Setting("https://evil.example", from_file=True), Setting(KEY, from_file=False)
    with pytest.raises(KeyNotSent, match=r"which \.env in this directory names"):
        find_credential(url, key, None)
    monkeypatch.setattr(credentials, "_refused", lambda _url, key_from_file: key_from_file or None)
    assert find_credential(url, key, None).key == KEY


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://bank.example", True),
        ("https://10.0.0.1:3000/balances", True),
        ("http://127.0.0.1:3000", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:3000", True),
        ("http://localhost:3000", True),
        ("http://bank.example", False),
        ("http://10.0.0.1", False),
        ("http://0.0.0.0:3000", False),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://127.0.0.1@bank.example", False),
        ("http://2130706433", False),
        ("http://[::ffff:8.8.8.8]", False),
    ],
)
def test_the_key_goes_through_tls_or_stays_on_this_machine(
    url: str, *, private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was named for the call is an error elsewhere, the user's file is left out."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    _key_file(tmp_path / "balance-app/key")
    given, none = Setting(url, from_file=False), Setting(None, from_file=False)
    assert (find_credential(given, none, None).key == KEY) == private
    named = Setting(KEY, from_file=False)
    if private:
        assert find_credential(given, named, None).key == KEY
    else:
        with pytest.raises(KeyNotSent) as refused:
            find_credential(given, named, None)
        assert PART not in str(refused.value)


async def test_no_message_has_the_password_of_a_url() -> None:
    """Not the command for the next page, nor the one that sends a change again; it is sent."""
    page = http("200 OK", '{"users":[],"next":5}')
    lost = http("502 Bad Gateway", "<html>")
    async with answering(page, lost, REFUSED) as service:
        url = service.url.replace("//", "//ada:s3cr@et@")
        said = [
            await run("users", f"--url={url}"),
            await run("change", "1", "-2", "--patience=0", f"--url={url}"),
            await run("healthcheck", f"--url={url}"),
        ]
    assert [code for code, _, _ in said] == [0, 5, 1]
    assert said[0][2] == f"More: balance-app users --after=5 --limit=20 --url={service.url}\n"
    assert said[1][2].endswith(f" --url={service.url}\n")
    assert all("authorization: basic " in each.lower() for each in service.requests)
    for command in ("users", "healthcheck", "open", "change 1 -2"):
        for wrong in ("", "/", "?"):
            url = f"http://ada:s3cr{wrong}@et@127.0.0.1:9"
            code, out, err = await run(*command.split(), f"--url={url}")
            assert code == (2 if wrong else 3), err
            said.append((code, out, err))
    text = "".join(out + err for _, out, err in said)
    assert "http://127.0.0.1:9" in text
    assert not {part for part in ("ada", "s3cr", "et@") if part in text}


def test_no_representation_has_the_key() -> None:
    """As in a traceback that shows variables."""
    assert repr(Credential(KEY, "BALANCE_APP_KEY")) == "Credential(BALANCE_APP_KEY)"


async def test_every_command_sends_the_key_and_none_shows_it(
    instance: Instance, database: dict[str, str]
) -> None:
    """With a table, JSON, a stream, and a debug log; a refusal says what to do."""
    name = (await make_key(database, "read", name="reader")).text
    token = {"BALANCE_APP_KEY": name, "BALANCE_APP_URL": instance.url}
    await keys_are_needed(instance.url)
    for command in (
        *("status", "history", "users", "user 1", "balance 1", "statement 1", "holds 1"),
        *("statement 1 --csv", "daily-balances 1", "users --json", "status --json"),
    ):
        code, out, err = await run(*command.split(), **token, BALANCE_APP_TRACEBACK="1")
        assert code == 0, (command, err)
        assert name not in out + err
        code, out, err = await run(*command.split(), BALANCE_APP_URL=instance.url)
        assert (code, "Set BALANCE_APP_KEY, or keep the key in" in err) == (1, True), command
    for command, scope in (("change 1 5", "change"), ("pause x", "operate"), ("run x", "operate")):
        code, out, err = await run(*command.split(), **token)
        assert (code, out) == (1, "")
        assert f"`balance-app keys create NAME --scope {scope}" in err
        code, out, err = await run(*command.split(), "--json", **token)
        assert '"code":"insufficient-scope"' in out
        assert name not in out + err
    assert (await run("healthcheck", f"--url={instance.url}"))[0] == 0
    words = {"COMP_WORDS": "balance-app run ", "COMP_CWORD": "2"}
    code, _, err = await run(**words, _BALANCE_APP_COMPLETE="complete_bash", **token)
    assert (code, err) == (0, "")
    # A stream that the key no longer opens is not opened again and again.
    async with Screen("status", "--watch", **token) as screen:
        await screen.until("running")
        assert (await run("keys", "revoke", "reader", **database))[0] == 0
        await screen.until("The key is wrong, expired or revoked.")
        assert await screen.end() == 1


def test_no_log_of_the_client_has_the_key(caplog: pytest.LogCaptureFixture) -> None:
    """Not even at the lowest level."""
    from balance_app.client import Service  # noqa: PLC0415 - it logs on import, too

    async def call() -> None:
        async with answering(http("200 OK", '{"users":[],"next":null}')) as service:
            async with Service(service.url, key=KEY) as client:
                assert [each async for each in client.users()] == []
            assert _sent(service) == [True]

    with caplog.at_level(logging.DEBUG):
        asyncio.run(call())
    assert caplog.records
    assert PART not in caplog.text
