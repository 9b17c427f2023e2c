"""Child processes of runs: they end with their run, and with the process of the instance."""

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from balance_app.jobs.scope import Scope

# between the polite signal and the end by force
GRACE_SECONDS: Final = 0.5

_SUPERVISE: Final = str(Path(__file__).with_name("supervise.py"))


class Child:
    """A child process, known by a socket whose other end only its supervisor holds.

    Made in the event loop, before the process is; informed of the process in any thread.
    """

    def __init__(
        self, scope: Scope, command: tuple[str, ...], env: Mapping[str, str] | None
    ) -> None:
        """Prepare for a command.

        Raises:
            FileNotFoundError: it is not to be found.
        """
        path = (os.environ if env is None else env).get("PATH")
        if not command or (
            os.sep not in command[0] and shutil.which(command[0], path=path) is None
        ):
            raise FileNotFoundError(f"There is no program {' '.join(command[:1])!r}.")
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._line, self._theirs = socket.socketpair()
        self._send: Callable[[int], object] | None = None
        self._stopped = False
        # what to execute, and with what
        self.command: Final = (
            sys.executable,
            "-I",
            "-S",
            _SUPERVISE,
            str(self._theirs.fileno()),
            *command,
        )
        self.options: Final[dict[str, Any]] = {
            "env": env,
            "pass_fds": (self._theirs.fileno(),),
            "start_new_session": True,
        }
        scope.add_child(self)

    def started(self, send: Callable[[int], object]) -> None:
        """Note that the process has started, and how a signal is sent to it."""
        self._theirs.close()
        self._send = send
        self._loop.call_soon_threadsafe(self._listen)

    def failed(self) -> None:
        """Note that the process could not be started."""
        self._theirs.close()
        self._loop.call_soon_threadsafe(self._listen)

    def stop(self) -> None:
        """Ask it to end (SIGTERM); after the grace it is killed, with all of its descendants."""
        if not self._stopped:
            self._stopped = True
            self._loop.call_later(GRACE_SECONDS, self._kill)
        if self._send is not None:
            with suppress(ProcessLookupError):
                self._send(signal.SIGTERM)

    def _listen(self) -> None:
        # The supervisor sends nothing: the end of its socket is its own, and that of all below it.
        self._line.setblocking(False)  # noqa: FBT003 - it has no name
        self._loop.add_reader(self._line, self._end)
        if self._stopped:
            self.stop()

    def _kill(self) -> None:
        with suppress(OSError):  # it has ended already
            self._line.shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        self._loop.remove_reader(self._line)
        self._line.close()
        self._scope.forget_child(self)


async def start(
    scope: Scope,
    command: tuple[str, ...],
    env: Mapping[str, str] | None,
    options: Mapping[str, Any],
) -> asyncio.subprocess.Process:
    """Start a command as a child process of a run; see `Run.subprocess`."""
    child = Child(scope, command, env)

    async def create() -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                child.command[0], *child.command[1:], **options, **child.options
            )
        except BaseException:
            child.failed()
            raise
        child.started(process.send_signal)
        return process

    # A run that is stopped meanwhile must not lose sight of it.
    return await asyncio.shield(scope.outlive(create()))
