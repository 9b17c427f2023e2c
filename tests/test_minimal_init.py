"""Process 1 of a container without an init: its instance can be ended, and no orphan stays."""

import asyncio
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.processes import Instance, connect

UNSHARE: Final = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
BECOME_CHILD: Final = "from balance_app.minimal_init import become_child; become_child()\n"

pytestmark = pytest.mark.skipif(
    subprocess.run((*UNSHARE, "true"), capture_output=True, check=False).returncode != 0
    if sys.platform == "linux"
    else True,
    reason="this user can't make a namespace of processes (unshare)",
)


def as_process_1(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*UNSHARE, sys.executable, "-c", program),
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("raise SystemExit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM),
    ],
)
def test_process_1_ends_as_its_child_ends(end: str, code: int) -> None:
    """The container's exit code is the instance's, or that of the signal which ended it."""
    assert as_process_1(f"import os, signal\n{BECOME_CHILD}{end}").returncode == code


EXPIRE: Final = """
import time
from balance_app.jobs.watchdog import KillTimer
KillTimer().set(0.2)
time.sleep({seconds})
"""


def test_the_watchdog_timer_ends_the_instance() -> None:
    """The kernel delivers its SIGKILL. Control: process 1 itself survives it."""
    guarded = as_process_1(BECOME_CHILD + EXPIRE.format(seconds=30))
    assert guarded.returncode == 128 + signal.SIGKILL
    assert as_process_1(EXPIRE.format(seconds=1)).returncode == 0


ORPHANS: Final = """
import os, time
def is_dead(pid):
    try:
        return " Z " in open(f"/proc/{pid}/stat").read()
    except OSError:
        return False
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
until = time.monotonic() + 20
while True:
    dead = [each for each in os.listdir("/proc") if each.isdecimal() and is_dead(each)]
    if not dead or time.monotonic() > until:
        break
    time.sleep(0.02)
print(len(dead))
"""


def test_orphans_are_reaped() -> None:
    """What a job leaves behind stays no zombie. Control: an instance as process 1 keeps them."""
    assert as_process_1(BECOME_CHILD + ORPHANS).stdout == "0\n"
    assert as_process_1(ORPHANS.replace("+ 20", "+ 1")).stdout == "20\n"


COUNT: Final = """
import signal, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("waiting", flush=True)
until = time.monotonic() + 20
while not got and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(0.5)
print("got", len(got), flush=True)
"""


# Two signals at the same moment would be delivered as one.
LATE_SIGNAL: Final = """
import os, time
kill = os.kill
os.kill = lambda *arguments: (time.sleep(0.2), kill(*arguments))
"""


def test_a_signal_of_the_terminal_arrives_once() -> None:
    """Ctrl-C reaches the whole group; a second one would end an instance without its jobs.

    Control: a process 1 that forwards it, too.
    """
    forwards = "from balance_app import minimal_init; minimal_init._BY_KERNEL = None\n"
    assert _interrupted(LATE_SIGNAL + BECOME_CHILD + COUNT) == b"got 1"
    assert _interrupted(LATE_SIGNAL + forwards + BECOME_CHILD + COUNT) == b"got 2"


def _interrupted(program: str) -> bytes:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(UNSHARE[0], (*UNSHARE, sys.executable, "-c", program))  # noqa: S606
    output = b""
    for each in _lines(terminal):
        output = each
        if b"waiting" in each:
            os.write(terminal, b"\x03")
    os.waitpid(pid, 0)
    os.close(terminal)
    return output.strip().removeprefix(b"^C")


def _lines(terminal: int) -> Iterator[bytes]:
    with suppress(OSError), open(terminal, "rb", closefd=False) as file:
        yield from file


async def test_an_instance_as_process_1_serves_and_hands_its_jobs_back(
    database: dict[str, str],
) -> None:
    """`docker stop` sends SIGTERM to process 1; the runs are released, and the exit code is 0."""
    instance = Instance(database, JOB_WARM_UP_SECONDS="0")
    program = (*UNSHARE, sys.executable, "-m", "balance_app", "serve")
    outer = await asyncio.create_subprocess_exec(*program, env=instance._environment)
    instance.process = outer
    connection = None
    try:
        await instance.ready()
        connection = await connect(database)
        held = "SELECT count(*) FROM jobs WHERE holder IS NOT NULL"
        while await connection.fetchval(held) < 2:  # noqa: ASYNC110 - it waits for another process
            await asyncio.sleep(0.05)
        inner = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text(encoding="ascii")
        os.kill(int(inner), signal.SIGTERM)
        assert await asyncio.wait_for(outer.wait(), 10) == 0
        outcomes = await connection.fetch("SELECT outcome FROM job_runs")
        assert {"released"} <= {outcome for (outcome,) in outcomes} <= {"released", "succeeded"}
    finally:
        if connection is not None:
            await connection.close()
        if outer.returncode is None:
            outer.kill()
            await outer.wait()
