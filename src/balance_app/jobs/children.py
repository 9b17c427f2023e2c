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

# between SIGTERM and SIGKILL
GRACE_SECONDS: Final = 0.5

_SUPERVISE: Final = str(Path(__file__).with_name("supervise.py"))


class Child:
    """A child process, with a socket whose other end only its supervisor holds.

    Created in the event loop, before the process; `started` and `failed` may be called in any
    thread.
    """

    def __init__(
        self, scope: Scope, command: tuple[str, ...], env: Mapping[str, str] | None
    ) -> None:
        """Prepare to start a command.

        Raises:
            FileNotFoundError: there is no such program.
        """
        path = (os.environ if env is None else env).get("PATH")
        if not command or (
            os.sep not in command[0] and shutil.which(command[0], path=path) is None
        ):
            raise FileNotFoundError(f"There is no program {' '.join(command[:1])!r}.")
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._socket, self._supervisor_socket = socket.socketpair()
        self._send: Callable[[int], object] | None = None
        self._stopped = False
        # the arguments that start its supervisor
        self.command: Final = (
            sys.executable,
            "-I",
            "-S",
            _SUPERVISE,
            str(self._supervisor_socket.fileno()),
            *command,
        )
        self.options: Final[dict[str, Any]] = {
            "env": env,
            "pass_fds": (self._supervisor_socket.fileno(),),
            "start_new_session": True,
        }
        scope.add_child(self)

    def started(self, send: Callable[[int], object]) -> None:
        """Record that the process has started, and the function that sends it a signal."""
        self._supervisor_socket.close()
        self._send = send
        self._loop.call_soon_threadsafe(self._listen)

    def failed(self) -> None:
        """Record that the process could not be started."""
        self._supervisor_socket.close()
        self._loop.call_soon_threadsafe(self._listen)

    def stop(self) -> None:
        """Send SIGTERM; after the grace it is killed with all its descendants."""
        if not self._stopped:
            self._stopped = True
            self._loop.call_later(GRACE_SECONDS, self._kill)
        if self._send is not None:
            with suppress(ProcessLookupError):
                self._send(signal.SIGTERM)

    def _listen(self) -> None:
        # The supervisor sends nothing. Its socket closes when it and all descendants have ended.
        self._socket.setblocking(False)  # noqa: FBT003 - positional only
        self._loop.add_reader(self._socket, self._end)
        if self._stopped:
            self.stop()

    def _kill(self) -> None:
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
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

    # A run that is stopped meanwhile must still stop the process.
    return await asyncio.shield(scope.outlive(create()))
