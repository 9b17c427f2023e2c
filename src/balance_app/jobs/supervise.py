"""Executes a command for `Run.subprocess`, and ends it with the run and the instance's process.

A small program of its own: `python supervise.py FD COMMAND...`. It is the command's parent and
adopts what the command leaves behind. When the other end of the socket FD is closed, which the
kernel does however the instance ends, or when the command has ended, it kills all its descendants.
Only then does it end, in the way the command did. Signals are passed on to the command's group.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys

FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2), as the next
SET_CHILD_SUBREAPER = 36
NOT_FOUND = 127  # as a shell says it


def main(line: int, command: list[str]) -> None:
    """Execute the command, and end as it does."""
    os.set_inheritable(line, False)  # noqa: FBT003 - it has no name
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    prctl(SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if pid == 0:
        prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        execute(command)
    with contextlib.suppress(OSError):  # the child does the same: whoever comes first
        os.setpgid(pid, pid)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):  # a pipe of the command's is closed when the command closes it
        os.dup2(nowhere, descriptor)
    watch(pid, line, woken)
    code = os.waitstatus_to_exitcode(kill_all(pid))
    if code < 0:
        if -code not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def watch(pid: int, line: int, woken: int) -> None:
    """Pass signals on until the command or the other end of the line is gone."""
    while True:
        ready, _, _ = select.select([line, woken], [], [])
        if line in ready:
            return
        for number in os.read(woken, 100):
            if number != signal.SIGCHLD:
                with contextlib.suppress(OSError):
                    os.killpg(pid, number)
        # Its number is not free for others before all that it left behind has been killed.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        for orphan in children() - {pid}:
            os.waitpid(orphan, os.WNOHANG)


def execute(command: list[str]) -> None:
    """Become the command, with a process group of its own and Python's signals undone."""
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606 - it is the job's command
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(NOT_FOUND)


def kill_all(pid: int) -> int:
    """Kill every descendant, also those that left the group; return how the command ended."""
    status = 0
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    while True:
        for child in children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, how = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if ended == pid:
            status = how


def children() -> set[int]:
    """Return who this process is the parent of, as far as the system says so."""
    try:
        with open("/proc/thread-self/children", encoding="ascii") as file:  # noqa: PTH123
            return {int(pid) for pid in file.read().split()}
    except OSError:
        return set()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
