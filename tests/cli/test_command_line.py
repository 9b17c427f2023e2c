"""Faults of the machine are reported in one sentence; settings apply to every command."""

import asyncio
import os
import stat
import sys
from importlib import metadata
from pathlib import Path

import pytest

from balance_app import __version__, settings
from balance_app.formatting import url
from balance_app.jobs import Registry
from balance_app.local.postgres import binaries
from balance_app.main import create_app
from tests.processes import Instance, free_ports
from tests.terminal import run

pytestmark = pytest.mark.usefixtures("_fork_server")

NOWHERE = {"DB_HOST": "127.0.0.1", "DB_PORT": "9"}


async def balance_app(cwd: Path, *arguments: str, **env: str) -> tuple[int | None, str]:
    """Run `balance-app` in a directory; return its exit code and its output."""
    code, out, err = await run(*arguments, cwd=str(cwd), **env)
    return code, err + out


async def test_a_fault_of_the_machine_is_reported_in_a_sentence(tmp_path: Path) -> None:
    """It names the path or the host; there is no traceback unless requested."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "postgres").touch()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / ".env").write_bytes(b"SERVER_ID=\xff")
    port = free_ports(2, below=32_000)
    up = ("up", "--instances=1", f"--port={port}")
    data = "PostgreSQL can't keep its data in"
    long_host = "x" * 70
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (up, {"BALANCE_APP_DATA": str(tmp_path / "file")}, f"{data} {tmp_path}/file/postgres"),
        (up, {"BALANCE_APP_DATA": str(tmp_path / "loop")}, f"{data} {tmp_path}/loop/postgres"),
        (up, {"BALANCE_APP_DATA": str(tmp_path / "taken")}, f"{data} {tmp_path}/taken/postgres"),
        (up, {"BALANCE_APP_DATA": "/proc/none"}, f"{data} /proc/none/postgres"),
        (up, {"BALANCE_APP_DATA": "x" * 300}, f"{data} {tmp_path}/xxx"),
        (up, {"HOST": "nowhere.invalid"}, "Can't listen on HOST=nowhere.invalid: "),
        (up, {"HOST": long_host}, f"Can't listen on HOST={long_host}: not a name"),
        (("serve",), {**NOWHERE, "HOST": "192.0.2.1"}, "Can't listen on 192.0.2.1:"),
        (("migrate",), NOWHERE, "(127.0.0.1 port 9: "),
        (("migrate",), {"DB_HOST": "nowhere.invalid"}, "(nowhere.invalid port 5432: "),
        (("--install-completion", "bash"), {"HOME": "/proc/none"}, "/proc/none"),
        (("psql",), {"BALANCE_APP_DATA": str(tmp_path / "loop")}, f"{tmp_path}/loop"),
    ]
    results = [await balance_app(tmp_path, *arguments, **env) for arguments, env, _ in cases]
    for (arguments, env, sentence), (code, output) in zip(cases, results, strict=True):
        assert code in {1, 3}, (arguments, env, output)
        lines = [line for line in output.splitlines() if line != "Starting PostgreSQL ..."]
        assert len(lines) == 1, (arguments, env, output)
        assert sentence in lines[0]
    code, output = await balance_app(tmp_path / "latin", "status")
    assert (code != 0, output.count("\n")) == (True, 1), output
    home = {"HOME": "/proc/none", "BALANCE_APP_TRACEBACK": "1"}
    assert "Traceback" in (await balance_app(tmp_path, "--install-completion", "bash", **home))[1]


async def test_the_version_is_in_one_place(tmp_path: Path) -> None:
    """The command line, the OpenAPI document and the package agree."""
    code, output = await balance_app(tmp_path, "--version")
    assert (code, output) == (0, f"balance-app {metadata.version('balance-app')}\n")
    app = create_app(settings.load_settings(), asyncio.Event(), Registry([])).app
    assert app.version == metadata.version("balance-app") == __version__


async def test_the_page_is_opened_and_its_address_printed(
    tmp_path: Path, instance: Instance
) -> None:
    """By BROWSER, or the desktop's; where there is none it is said, and where nobody answers."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}\n')
    browser.chmod(0o755)
    desktop = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "BROWSER": f"{browser} %s"}
    assert await run("open", "--url", f"{instance.url}/", **desktop) == (0, f"{instance.url}\n", "")
    assert opened.read_text() == instance.url
    opened.unlink()
    code, out, err = await run("open", BALANCE_APP_URL=instance.url, **{**desktop, "BROWSER": ""})
    assert (code, out) == (0, f"{instance.url}\n")
    assert err.startswith("There is no browser here")
    assert not opened.exists()
    code, out, err = await run("--url", "http://ada:s3cret@127.0.0.1:9", "open", **desktop)
    assert "s3cret" not in out + err
    assert (code, out) == (3, "")
    assert err.startswith("No answer from http://127.0.0.1:9: ")


def test_unknown_settings_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in `.env`; in the environment those that are similar to a setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(
        "DB_PASSWROD=geheim\ndb_host=localhost\nSOMETHING_ELSE=1\nCOMPOSE_PROJECT_NAME=x\n"
    )
    monkeypatch.setenv("JOB_LEASE_SECOND", "6")
    monkeypatch.setenv("POST", "1")
    assert settings.unknown_names() == [
        "DB_PASSWROD in .env is not a setting: did you mean DB_PASSWORD?",
        "SOMETHING_ELSE in .env is not a setting of this program.",
        "JOB_LEASE_SECOND in the environment is not a setting: did you mean JOB_LEASE_SECONDS?",
    ]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("DB_PASSWORD=geheim", "DB_PASSWORD"),
        ("db_password='geheim'", "db_password"),
        ("DATABASE_URL=postgresql://u:geheim@h/d", "DATABASE_URL"),
        ("DATABASE_URL=postgresql://h/d?password=geheim", "DATABASE_URL"),
        ("MIGRATE_DATABASE_URL=postgresql://u:geheim@h/d", "MIGRATE_DATABASE_URL"),
        ("BALANCE_APP_KEY=ba_geheim", "BALANCE_APP_KEY"),
        ("DATABASE_URL=postgresql://u@h/d", None),
        ("DB_PASSWORD=", None),
        ("DB_USER=geheim", None),
    ],
)
def test_a_secret_that_others_can_read_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, name: str | None
) -> None:
    """By one sentence, without its value; a file of its owner alone is not."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".env"
    file.write_text(f"PORT=9\n{line}\n")
    for mode in (0o600, 0o400, 0o640, 0o604, 0o644):
        file.chmod(mode)
        said = settings.exposed_secrets()
        assert len(said) == (mode & 0o077 != 0 and name is not None)
        assert not said or f"read {name} in" in said[0]
        assert "geheim" not in "".join(said)
    file.unlink()
    assert settings.exposed_secrets() == []


async def test_options_precede_the_environment_which_precedes_the_file(tmp_path: Path) -> None:
    """For the client commands, and for `up`, whose port they use."""
    (tmp_path / ".env").write_text("PORT=9\n")
    where = "No answer from http://127.0.0.1"
    asked = await asyncio.gather(
        balance_app(tmp_path, "status"),
        balance_app(tmp_path, "healthcheck"),
        balance_app(tmp_path, "status", PORT="8"),
        balance_app(tmp_path, "status", BALANCE_APP_URL="http://127.0.0.1:7"),
        balance_app(tmp_path, "status", "--url=http://127.0.0.1:6", BALANCE_APP_URL="http://x:7"),
        balance_app(tmp_path, "--url=http://127.0.0.1:5", "--json", "status"),
        balance_app(tmp_path, "--url=http://127.0.0.1:4", "healthcheck"),
        balance_app(tmp_path, "up", HOST="192.0.2.1"),
    )
    for port, (code, output) in zip((9, 9, 8, 7, 6, 5, 4), asked, strict=False):
        assert (code, output.startswith(f"{where}:{port}: ")) == (3, True), output
    assert "Can't listen on 192.0.2.1:9: " in asked[-1][1]
    (tmp_path / ".env").write_text(
        f"BALANCE_APP_URL=http://127.0.0.1:3\nBALANCE_APP_DATA={tmp_path}/d"
    )
    assert (await balance_app(tmp_path, "status"))[1].startswith(f"{where}:3: ")
    nothing = f"There is nothing at {tmp_path}/d/postgres.\n"
    assert (await balance_app(tmp_path, "reset", "--yes"))[1] == nothing
    code, output = await balance_app(tmp_path, "--url=http://127.0.0.1:5", "migrate", **NOWHERE)
    assert (code, output) == (2, "`migrate` takes no --url.\n")


async def test_up_does_not_migrate_one_database_and_serve_another(tmp_path: Path) -> None:
    """The owner's URL without a database to serve is refused, before anything starts."""
    (tmp_path / ".env").write_text(
        f"BALANCE_APP_DATA={tmp_path}/d\nHOST=192.0.2.1\n"  # where nothing can start, either
        "MIGRATE_DATABASE_URL=postgresql://owner:geheim@127.0.0.1:9/d\n"
    )
    code, output = await balance_app(tmp_path, "up")
    assert (code, output.count("\n")) == (2, 1), output
    assert output.startswith("MIGRATE_DATABASE_URL is set, but neither DATABASE_URL nor DB_HOST: ")
    assert "geheim" not in output
    assert not (tmp_path / "d").exists()
    # Control: with a database to serve it goes on, to the address that it can't have.
    code, output = await balance_app(tmp_path, "up", **NOWHERE)
    assert code == 1, output
    assert "Can't listen on 192.0.2.1:" in output


async def test_reset_shows_what_it_deletes(tmp_path: Path) -> None:
    """The confirmation has path, size and last use; a configured database is never deleted."""
    place = tmp_path / "postgres"
    place.mkdir()
    (place / "a").write_bytes(bytes(3_000_000))
    env = {"BALANCE_APP_DATA": str(tmp_path), "DATABASE_URL": "postgresql://u:geheim@h:5/d"}
    code, output = await balance_app(tmp_path, "reset", **env)
    assert code == 1
    assert output.startswith("The configured database (h port 5) stays as it is")
    assert f"in {place} (3 MB, last written " in output
    assert "geheim" not in output
    assert place.exists()


def test_an_instances_url_is_reachable() -> None:
    """An instance that listens on all addresses has the loopback URL; IPv6 is in brackets."""
    assert url("127.0.0.1", 1) == url("0.0.0.0", 1) == "http://127.0.0.1:1"  # noqa: S104
    assert url("::1", 1) == url("::", 1) == "http://[::1]:1"
    assert url("localhost", 1) == "http://localhost:1"


async def test_psql_is_that_of_the_embedded_server(tmp_path: Path) -> None:
    """With its own libraries, whether or not there is another in PATH."""
    fake = tmp_path / "bin" / "psql"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho another\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    program = (
        "import os; os.execv = lambda path, words: print(path, words[0]); "
        "from balance_app.local import postgres; postgres.running_server = lambda data: 1; "
        "import sys; sys.argv[1:] = ['psql']; from balance_app.cli.app import main; main()"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={**os.environ, "PATH": str(fake.parent), "BALANCE_APP_DATA": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    expected = str(binaries() / "psql")
    assert out.decode().split() == [expected, expected]


async def test_help_has_the_options_of_all_commands() -> None:
    """Without a command and with one."""
    code, out, _ = await run("--help", COLUMNS="100")
    assert code == 0
    assert "--url" in out
    assert "--json" in out
