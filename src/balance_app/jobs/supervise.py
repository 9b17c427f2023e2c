"""Executes a command for `Run.subprocess`, and ends it with the run and the instance's process.

A program of its own: `python supervise.py FD COMMAND...`. It is the parent of the command and
adopts the processes that the command leaves behind. It kills all its descendants when the command
has ended or the other end of the socket FD is closed, which the kernel does however the instance
ends. Then it ends with the command's status. It forwards signals to the command's process group.
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
SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2), as is the next
SET_CHILD_SUBREAPER = 36
NOT_FOUND = 127  # as in a shell


def main(control: int, command: list[str]) -> None:
    """Execute the command and end with its status."""
    os.set_inheritable(control, False)  # noqa: FBT003 - positional only
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
    with contextlib.suppress(OSError):  # the child does the same, perhaps first
        os.setpgid(pid, pid)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):  # keep none of the command's pipes open
        os.dup2(null, descriptor)
    watch(pid, control, woken)
    code = os.waitstatus_to_exitcode(kill_all(pid))
    if code < 0:
        if -code not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def watch(pid: int, control: int, woken: int) -> None:
    """Forward signals until the command has ended or the control socket is closed."""
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if control in ready:
            return
        for number in os.read(woken, 100):
            if number != signal.SIGCHLD:
                with contextlib.suppress(OSError):
                    os.killpg(pid, number)
        # WNOWAIT keeps its pid, and so its group's id, reserved until `kill_all`.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        for orphan in children() - {pid}:
            os.waitpid(orphan, os.WNOHANG)


def execute(command: list[str]) -> None:
    """Become the command, in a new process group and with default signal dispositions."""
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
    """Kill every descendant, also those outside the group; return the command's wait status."""
    status = 0
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    while True:
        for child in children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, ended_status = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if ended == pid:
            status = ended_status


def children() -> set[int]:
    """Return the pids of this process's children; empty where /proc does not list them."""
    try:
        with open("/proc/thread-self/children", encoding="ascii") as file:  # noqa: PTH123
            return {int(pid) for pid in file.read().split()}
    except OSError:
        return set()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
