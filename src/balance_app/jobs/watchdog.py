"""The watchdog timer: the kernel kills this process when the timer expires.

A POSIX timer (`timer_create`) that sends SIGKILL depends on nothing that a job can change by
accident: no handler, no mask, no `alarm(0)`. It kills a process at once even while SIGSTOP has
frozen it, and counts the time for which the machine was suspended. A system without it (macOS) uses
the interval timer's SIGALRM. Its default action ends a process too, but not while it is frozen, and
not if a job has installed a handler for the signal.
"""

import ctypes
import os
import signal
import sys
from typing import Final, Protocol

import structlog

log = structlog.get_logger(__name__)

# linux/time.h
CLOCK_MONOTONIC: Final = 1
CLOCK_BOOTTIME: Final = 7
SIGEV_SIGNAL: Final = 0


class WatchdogTimer(Protocol):
    """A timer that kills this process unless it is set again; used by one thread at a time."""

    def set(self, seconds: float) -> None:
        """End this process after that time; 0 disarms."""

    def expire(self) -> None:
        """End this process now."""


def watchdog_timer() -> WatchdogTimer:
    """Return the best timer of this system; called in the main thread."""
    try:
        return KillTimer()
    except (OSError, AttributeError) as error:
        log.warning(
            "the watchdog timer is SIGALRM: a job that handles this signal disarms it",
            reason=str(error),
        )
        return AlarmTimer()


class _SignalEvent(ctypes.Structure):
    # sigevent(3type) on 64-bit Linux, the same for glibc and musl: 64 bytes
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _TimerSpec(ctypes.Structure):
    # itimerspec(3type): seconds and nanoseconds, of the interval and of the first time
    _fields_ = (
        ("every_seconds", ctypes.c_int64),
        ("every_nanoseconds", ctypes.c_int64),
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
    )


class KillTimer:
    """A POSIX timer that sends SIGKILL."""

    def __init__(self) -> None:
        """Create it, disarmed.

        Raises:
            OSError: the system has no such timer, or too many signals are pending.
            AttributeError: its C library has no such function.
        """
        if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:  # noqa: PLR2004
            raise OSError("not a 64-bit Linux")
        self._libc = _library_of("timer_create")
        self._id = ctypes.c_void_p()
        event = _SignalEvent(signal=signal.SIGKILL, notify=SIGEV_SIGNAL)
        for clock in (CLOCK_BOOTTIME, CLOCK_MONOTONIC):
            if self._libc.timer_create(clock, ctypes.byref(event), ctypes.byref(self._id)) == 0:
                return
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def set(self, seconds: float) -> None:
        """End this process after that time; 0 disarms."""
        whole, part = divmod(round(seconds * 1e9), 10**9)
        spec = _TimerSpec(seconds=whole, nanoseconds=part)
        if self._libc.timer_settime(self._id, 0, ctypes.byref(spec), None) != 0:
            # A job may have deleted it. Without a timer no run may execute here.
            log.error("the watchdog timer is gone", error=os.strerror(ctypes.get_errno()))
            self.expire()

    def expire(self) -> None:
        """End this process now."""
        os.kill(os.getpid(), signal.SIGKILL)


class AlarmTimer:
    """The interval timer; the default action of its signal ends the process."""

    def __init__(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def set(self, seconds: float) -> None:
        """End this process after that time; 0 disarms."""
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def expire(self) -> None:
        """End this process now."""
        signal.raise_signal(signal.SIGALRM)


def _library_of(function: str) -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    # Before 2.34 the GNU C library had the timers in librt.
    return libc if hasattr(libc, function) else ctypes.CDLL("librt.so.1", use_errno=True)
