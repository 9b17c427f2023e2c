"""Instances that root starts beside the embedded PostgreSQL: they run as its unprivileged user.

What breaks into an instance is then not root. Instances on a configured database stay root: what
they need for it, such as a password file, may be readable by root alone.
"""

import asyncio
import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import balance_app
from balance_app.local.postgres import SYSTEM_USER, EmbeddedError, let_pass, make_system_user

_PRIVILEGED_PORTS: Final = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
PROBE: Final = ("-m", "balance_app", "jobs", "--json")


async def why_root(lowest_port: int, environment: Mapping[str, str]) -> str | None:
    """Let the unprivileged user pass to this program; return why instances can't run as it.

    It is tried: the user has to be able to read the program, the settings and the jobs.
    """
    if lowest_port < _first_unprivileged_port():
        return f"Only root may listen on port {lowest_port}."
    try:
        make_system_user()
        user = pwd.getpwnam(SYSTEM_USER)
        for path in _places():
            let_pass(path, user)
    except (EmbeddedError, OSError) as error:
        return str(error)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *PROBE),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        user=SYSTEM_USER,
        group=SYSTEM_USER,
        extra_groups=[],
    )
    _, said = await process.communicate()
    if process.returncode == 0:
        return None
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    return f"The user {SYSTEM_USER} can't run them: {last}"


def _first_unprivileged_port() -> int:
    try:
        return int(_PRIVILEGED_PORTS.read_text())
    except (OSError, ValueError):
        return 1024


def _places() -> set[Path]:
    """Return all directories on the way to this program, and the one that it is started in."""
    ends = [Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path.cwd()]
    ends += [Path(each) for each in (balance_app.__file__, os.__file__) if each]
    places: set[Path] = set()
    for end in ends:
        for path in (end, end.resolve()):
            places |= {*path.parents, *([path] if path.is_dir() else [])}
    return places
