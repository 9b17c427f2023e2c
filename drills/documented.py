"""Runs the commands that a page of docs/ shows: what is documented is what a drill has run.

A block of code after the comment `<!-- drill: NAME -->` is a command, some lines of configuration,
or SQL. Its example directories are replaced by those of the drill.
"""

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from balance_app.local.postgres import SYSTEM_USER, binaries

BLOCK: Final = re.compile(r"<!-- drill: ([a-z]+) -->\n```(?:sh|ini|sql)\n(.*?)```", re.DOTALL)
OURS: Final = re.compile(r"^balance-app ", re.MULTILINE)
SETTING: Final = re.compile(r"^(\w+) = (.*)$", re.MULTILINE)


class CommandError(Exception):
    """A documented command has failed, or does not exist."""


class Ran(NamedTuple):
    """How a command ended, and what it printed on both its outputs."""

    code: int
    output: str


class Commands:
    """The commands of a page, with the directories of the drill in place of the page's."""

    def __init__(self, page: Path) -> None:
        self._blocks = dict(BLOCK.findall(page.read_text()))

    def settings(self, name: str, places: Mapping[str, Path | str]) -> dict[str, str]:
        """Return the lines of a configuration as names and values."""
        found = SETTING.findall(self.text(name, places))
        return {setting: value.strip("'") for setting, value in found}

    async def run(
        self, name: str, places: Mapping[str, Path | str], environment: Mapping[str, str]
    ) -> Ran:
        """Run a command to its end, as the user who runs PostgreSQL, or if it is ours as this."""
        return await run(self.text(name, places), environment)

    async def expect(
        self, name: str, places: Mapping[str, Path | str], environment: Mapping[str, str]
    ) -> str:
        """Run a command that has to succeed; return its output.

        Raises:
            CommandError: it fails.
        """
        ran = await self.run(name, places, environment)
        if ran.code:
            raise CommandError(f"{name!r} ended with {ran.code}: {ran.output}")
        return ran.output

    def text(self, name: str, places: Mapping[str, Path | str]) -> str:
        """Return a block.

        Raises:
            CommandError: there is none of this name.
        """
        if name not in self._blocks:
            raise CommandError(f"There is no block {name!r}.")
        block: str = self._blocks[name]
        for shown, path in places.items():
            block = block.replace(shown, str(path))
        return block


async def run(script: str, environment: Mapping[str, str]) -> Ran:
    """Run a script of the shell to its end."""
    user = None if os.geteuid() or OURS.search(script) else SYSTEM_USER
    programs = [str(binaries()), str(Path(sys.executable).parent), os.environ["PATH"]]
    process = await asyncio.create_subprocess_exec(
        *("/bin/bash", "-euo", "pipefail", "-c", script),
        env={"PATH": ":".join(programs), "LC_ALL": "C.UTF-8", **environment},
        cwd="/",  # which every user may enter
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        user=user,
        group=user,
        extra_groups=[] if user else None,
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Ran(process.returncode, output.decode(errors="replace").strip())
