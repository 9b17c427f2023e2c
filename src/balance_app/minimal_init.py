"""A minimal init, for process 1 of a container that was started without one.

For process 1 the kernel drops each signal that has no handler and comes from inside the container,
also the one by which an instance ends itself. So the service runs as its child.
"""

import os
import signal
from typing import Final

# Of the terminal, which signals the whole foreground group: the child has the signal already.
_BY_KERNEL: Final = 0x80  # SI_KERNEL of sigaction(2)


def become_child() -> None:
    """Go on in a child process: this one forwards signals, reaps orphans, ends as the child does.

    Called while there is one thread.

    Raises:
        OSError: there can be no child.
    """
    everything = signal.valid_signals()
    # Blocked signals are queued, whatever their disposition, so none is lost before the first wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
    try:
        child = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        received = signal.sigwaitinfo(everything)
        if received.si_signo == signal.SIGCHLD:
            code = _reap(child)
            if code is not None:
                os._exit(code if code >= 0 else 128 - code)  # as a shell reports a signal
        elif received.si_code != _BY_KERNEL:
            os.kill(child, received.si_signo)


def _reap(child: int) -> int | None:
    """Take the status of all that have ended; return the exit code of `child`, if it has."""
    code = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if ended == 0:
            return code
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
