"""How `up` keeps an instance running, with a program in its place."""

import asyncio
import errno
import os
import re

import pytest

from balance_app.local.launcher import Instance, _Supervisor
from balance_app.settings import Settings
from tests.processes import free_port


async def test_an_instance_that_can_not_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For lack of memory or of processes, which may pass; each try is reported."""
    stop, kill = asyncio.Event(), asyncio.Event()
    start = asyncio.create_subprocess_exec
    refusals = [errno.ENOMEM, errno.EAGAIN]

    async def start_or_refuse(*_: str, **_options: object) -> asyncio.subprocess.Process:
        if refusals:
            reason = refusals.pop(0)
            raise OSError(reason, os.strerror(reason))
        stop.set()
        return await start("sleep", "60")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_or_refuse)
    supervisor = _Supervisor(Instance("app1", free_port()), Settings(), {}, None)
    async with asyncio.timeout(60):
        assert await supervisor.run(stop, kill) == 0
    said = re.findall(r"app1 can't be started \((.+)\); restart in", capsys.readouterr().out)
    assert said == [os.strerror(errno.ENOMEM), os.strerror(errno.EAGAIN)]
