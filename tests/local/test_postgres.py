"""The embedded PostgreSQL: its system user if root starts it, and who can get at it."""

import asyncio
import fcntl
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from balance_app.local import postgres
from balance_app.local.postgres import (
    SYSTEM_USER,
    EmbeddedError,
    EmbeddedPostgres,
    make_system_user,
)
from tests.processes import connect

STARTS = 4


def start_at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Start several servers on a machine without the user; return the users that were created."""
    made: list[str] = []
    complete: list[str] = []

    def getpwnam(name: str) -> None:
        if name not in complete:
            raise KeyError(name)

    def useradd(command: list[str], **_: Any) -> None:  # noqa: ANN401 - as subprocess.run
        made.append(command[-1])
        time.sleep(0.1)
        complete.append(command[-1])

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)
    monkeypatch.setattr(subprocess, "run", useradd)
    with ThreadPoolExecutor(STARTS) as pool:
        for start in [pool.submit(make_system_user) for _ in range(STARTS)]:
            start.result()
    return made


def test_servers_that_start_at_once_create_their_user_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait until it is completely created."""
    assert start_at_once(monkeypatch) == [SYSTEM_USER]


def test_without_the_lock_they_all_create_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert len(start_at_once(monkeypatch)) > 1


# -- where it keeps its socket and its data ------------------------------------------------------

LONG: Final = "a-directory-with-a-long-name-" * 4
OTHER_USER: Final = 65534


def long_path(top: Path) -> Path:
    """Return a data path that is too long for a socket."""
    return top / LONG / "postgres"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a shared temporary directory of this test's own."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    return shared


def plant(kind: str, name: Path) -> None:
    """Make something of a name that can be foreseen, before it is used."""
    match kind:
        case "a link":
            (name.parent / "elsewhere").mkdir(mode=0o700)
            name.symlink_to(name.parent / "elsewhere")
            os.lchown(name, OTHER_USER, OTHER_USER)
        case "a link to nowhere":
            name.symlink_to(name.parent / "nowhere")
        case "of another user":
            name.mkdir(mode=0o700)
            os.chown(name, OTHER_USER, OTHER_USER)
        case "open":
            name.mkdir()
            name.chmod(0o777)
        case "for a group":
            name.mkdir()
            name.chmod(0o750)
        case "a file":
            name.write_text("")


NOT_ACCEPTED: Final = (
    *("a link", "a link to nowhere", "of another user", "open", "for a group", "a file"),
)


def is_accepted(kind: str, top: Path) -> bool:
    """Return whether a socket directory is used that somebody else has prepared."""
    made = EmbeddedPostgres(long_path(top)).socket_directory
    assert made.parent == Path(tempfile.gettempdir())
    assert stat.S_IMODE(made.lstat().st_mode) == 0o700
    assert EmbeddedPostgres(long_path(top)).socket_directory == made
    made.rmdir()
    plant(kind, made)
    try:
        EmbeddedPostgres(long_path(top))
    except EmbeddedError:
        return False
    return True


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")


@as_root
@pytest.mark.parametrize("kind", NOT_ACCEPTED)
def test_a_prepared_socket_directory_is_not_accepted(
    kind: str, tmp_path: Path, temporary: Path
) -> None:
    """Its name can be foreseen: who listens in it would be taken for the database."""
    assert temporary.exists()
    assert not is_accepted(kind, tmp_path)


@as_root
@pytest.mark.parametrize("kind", NOT_ACCEPTED)
def test_without_the_check_it_is(
    kind: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    assert temporary.exists()
    monkeypatch.setattr(postgres, "_require_directory", lambda *_, **__: None)
    assert is_accepted(kind, tmp_path)


@as_root
@pytest.mark.parametrize("kind", ["a link", "of another user"])
async def test_a_prepared_data_directory_is_not_used(kind: str, tmp_path: Path) -> None:
    """Nor one in a directory of another user, or that everybody can write to."""
    data = tmp_path / "top" / "postgres"
    data.parent.mkdir()
    plant(kind, data)
    (data / "PG_VERSION").write_text("18\n")
    for part in ("global/pg_control", "base/5/PG_VERSION"):
        (data / part).parent.mkdir(parents=True)
        (data / part).write_text("")
    before = (data.resolve().stat().st_uid, data.lstat().st_uid)
    with pytest.raises(EmbeddedError, match="another user"):
        await EmbeddedPostgres(data).start()
    assert (data.resolve().stat().st_uid, data.lstat().st_uid) == before


@as_root
async def test_a_data_directory_that_others_can_replace_is_not_used(tmp_path: Path) -> None:
    """It lies in a directory of another user, or in one that everybody can write to."""
    top = tmp_path / "top"
    top.mkdir()
    top.chmod(0o777)
    with pytest.raises(EmbeddedError, match="write"):
        await EmbeddedPostgres(top / "postgres").start()
    top.chmod(0o755)
    os.chown(top, OTHER_USER, OTHER_USER)
    with pytest.raises(EmbeddedError, match="another user"):
        await EmbeddedPostgres(top / "postgres").start()
    assert not list(top.iterdir())


@as_root
async def test_nobody_else_may_connect_or_pass(tmp_path: Path) -> None:
    """Not to the server, and not through the directories above it, which are as closed as before.

    Another user who can reach the socket is refused by PostgreSQL. (The control: with the rules of
    an earlier version it is let in.)
    """
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(long_path(closed))
    await server.start()
    try:
        assert stat.S_IMODE(closed.stat().st_mode) & 0o007 == 0
        connection = await connect(server.environment())
        assert await connection.fetchval("SELECT current_user") == "postgres"
        assert not can(OTHER_USER, f"os.stat({str(closed / LONG)!r})")
        select_one = SELECT_ONE.format(host=str(server.socket_directory))
        assert not can(OTHER_USER, select_one)

        server.socket_directory.chmod(0o711)
        (server.socket_directory / ".s.PGSQL.5432").chmod(0o777)
        assert not can(OTHER_USER, select_one)

        (server.data / "pg_hba.conf").write_text("local all all trust\n")
        await connection.execute("SELECT pg_reload_conf()")
        async with asyncio.timeout(10):
            while not can(OTHER_USER, select_one):  # noqa: ASYNC110 - of the server
                await asyncio.sleep(0.1)
        await connection.close()
    finally:
        await server.stop()
        shutil.rmtree(server.socket_directory)


SELECT_ONE: Final = """
connection = socket.socket(socket.AF_UNIX)
connection.connect({host!r} + "/.s.PGSQL.5432")
parameters = b"user\\0postgres\\0database\\0postgres\\0\\0"
connection.sendall((len(parameters) + 8).to_bytes(4, "big") + b"\\0\\3\\0\\0" + parameters)
kind, rest = connection.recv(1), connection.recv(8)
assert kind == b"R" and rest[4:] == bytes(4)  # AuthenticationOk
"""


def can(uid: int, program: str) -> bool:
    """Return whether a user can run a program to its end."""
    become = f"import os, socket; os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
    command = [sys.executable, "-c", become + program]
    return not subprocess.run(command, check=False, capture_output=True).returncode
