"""The system user of the embedded PostgreSQL, if it is started as root."""

import fcntl
import pwd
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from balance_app.local.postgres import SYSTEM_USER, make_system_user

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
