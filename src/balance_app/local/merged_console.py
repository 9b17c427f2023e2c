"""What the console of `balance-app up` shows of the instances: one line for each event.

Each line begins with the name of its instance. An outage of the database is met by all of them, in
several ways: it is shown once, and its end is. What is left out is in the instances' logs.
"""

import asyncio
import re
from contextlib import suppress
from time import monotonic
from typing import BinaryIO, Final, NamedTuple

from pydantic_core import from_json

from balance_app.db.outages import PERMANENT
from balance_app.formatting import MINUTE, duration, visible

# How long a failed heartbeat waits for the outage that it may be a sign of.
HOLD_SECONDS: Final = 2.0
# How long the rest of a traceback may take to arrive, in one read after another.
REST_SECONDS: Final = 0.05
_COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")
# A line of the log on a terminal; the event's name ends before two spaces or its logger's name.
_LINE: Final = re.compile(rb"\S+ \[(\w+) *\] (.*?)(?: {2,}| \[[\w.]+\]|$)")
_CAUSE: Final = re.compile(rb" cause=(\w+)")
_QUIET: Final = frozenset({"debug", "info"})
_BEGINS: Final = frozenset({"database unavailable", "waiting for the database"})
_ENDS: Final = frozenset({"database available", "started"})
# What else an instance logs of an outage.
_OF_AN_OUTAGE: Final = frozenset(
    {
        *("heartbeat failed", "no further connection", "readiness check failed"),
        *("keys not read", "the database failed", "logs of runs are not written"),
    }
)
_TO_MEND: Final = frozenset(kind.name.lower() for kind in PERMANENT)
_NOT_SHOWN: Final = frozenset({"event", "level", "logger", "server", "timestamp", "exception"})


class _Event(NamedTuple):
    level: str
    name: str
    # of an outage: what is wrong with the database
    cause: str
    line: bytes


class MergedConsole:
    """Writes the lines of all instances to this program's own output and error."""

    def __init__(self, names: list[str], *, quiet: bool, as_json: bool = False) -> None:
        """Show warnings alone if `quiet`; `as_json`: each line as it is, for another program."""
        self._width = max((len(name) for name in names), default=0)
        self._quiet = quiet
        self._as_json = as_json
        # whether the last line of an instance was one of the log, and was shown
        self._is_event: dict[str, bool] = {}
        self._is_shown: dict[str, bool] = {}
        # the last line so far of a traceback whose event was shown before
        self._rest: dict[str, bytes] = {}
        # whether the database is unavailable, the instances without it and those that have it
        # again, since when, and what was said about it
        self._is_out = False
        self._without: set[str] = set()
        self._back: set[str] = set()
        self._since = 0.0
        self._said: set[str] = set()
        self._held: dict[str, asyncio.TimerHandle] = {}

    def write(self, name: str, lines: list[bytes], stream: BinaryIO) -> None:
        """Write an instance's lines, those of an error folded into one."""
        if self._as_json:
            self._put(stream, [line for line in lines if not (self._quiet and _is_quiet(line))])
            return
        shown: list[bytes] = []
        for line in lines:
            event = _read(line)
            is_traceback = self._quiet and self._is_event.get(name) and line[:1].isspace()
            if not is_traceback and name in self._rest:
                shown.append(self._rest.pop(name))
            if event is not None:
                self._is_event[name] = True
                out = self._shown(name, event, stream)
                self._is_shown[name] = out is not None
                if out is not None:
                    shown.append(out)
            elif is_traceback:
                # Of a traceback the error is shown, its last line.
                if self._is_shown[name] and shown:
                    shown[-1] = shown[-1].split(b"\0")[0] + b"\0  " + line.strip()
                elif self._is_shown[name]:
                    self._keep_rest(name, line, stream)
            else:
                self._is_event[name] = False
                shown.append(self._named(name, line))
        self._put(stream, [line.replace(b"\0", b"") for line in shown])

    def forget(self, name: str, stream: BinaryIO) -> None:
        """Let an instance that has ended be without the database no longer."""
        self._without.discard(name)
        self._back.discard(name)
        if self._back and not self._without:
            self._put(stream, [self._end_outage()])

    def _keep_rest(self, name: str, line: bytes, stream: BinaryIO) -> None:
        if name not in self._rest:
            loop = asyncio.get_running_loop()
            loop.call_later(REST_SECONDS, self._put_rest, name, stream)
        self._rest[name] = self._named(name, b"  " + line.strip())

    def _put_rest(self, name: str, stream: BinaryIO) -> None:
        if name in self._rest:
            self._put(stream, [self._rest.pop(name)])

    def _shown(self, name: str, event: _Event, stream: BinaryIO) -> bytes | None:
        """Return the line that is shown of an event; None: none is."""
        line = self._named(name, event.line)
        if not self._quiet:
            return line
        if event.name in _ENDS and self._is_out:
            self._without.discard(name)
            self._back.add(name)
            return None if self._without else self._end_outage()
        if event.level in _QUIET:
            return None
        if event.name in _BEGINS:
            return self._begin_outage(name, event, line)
        if event.name not in _OF_AN_OUTAGE:
            return line
        if not self._is_out and name not in self._held:
            loop = asyncio.get_running_loop()
            self._held[name] = loop.call_later(HOLD_SECONDS, self._release, name, line, stream)
        return None

    def _begin_outage(self, name: str, event: _Event, line: bytes) -> bytes | None:
        self._without.add(name)
        self._back.discard(name)
        if not self._is_out:
            self._is_out = True
            self._since = monotonic()
            self._said = {event.cause}
            for each in self._held.values():
                each.cancel()
            self._held.clear()
            return line
        # Another cause, which somebody has to remove.
        if event.cause in self._said or event.cause not in _TO_MEND:
            return None
        self._said.add(event.cause)
        return line

    def _end_outage(self) -> bytes:
        self._is_out = False
        self._back.clear()
        seconds = monotonic() - self._since
        lasted = f"{seconds:.1f} s" if seconds < MINUTE else duration(seconds)
        return f"The database is available again, after {lasted}.".encode()

    def _release(self, name: str, line: bytes, stream: BinaryIO) -> None:
        self._held.pop(name, None)
        self._put(stream, [line])

    def _named(self, name: str, line: bytes) -> bytes:
        return f"{name:{self._width}} | ".encode() + line

    @staticmethod
    def _put(stream: BinaryIO, lines: list[bytes]) -> None:
        if lines:
            with suppress(OSError):  # a terminal that is gone
                stream.write(b"".join(line + b"\n" for line in lines))
                stream.flush()


def _read(line: bytes) -> _Event | None:
    """Return the event of a line of the log, in either format; None: it is none."""
    if line.startswith(b"{"):
        with suppress(ValueError):
            found = from_json(line)
            level, name = found.get("level"), found.get("event")
            if isinstance(level, str) and isinstance(name, str):
                return _Event(level, name, str(found.get("cause", "")), _for_people(found))
        return None
    plain = _COLOUR.sub(b"", line)
    matched = _LINE.match(plain)
    if matched is None:
        return None
    cause = _CAUSE.search(plain)
    level, name = matched[1].decode(), matched[2].decode(errors="replace")
    return _Event(level, name, "" if cause is None else cause[1].decode(), line)


def _is_quiet(line: bytes) -> bool:
    event = _read(line)
    return event is not None and event.level in _QUIET


def _for_people(found: dict[str, object]) -> bytes:
    """Return a line of JSON as it would be on a terminal."""
    fields = [f"{name}={_value(value)}" for name, value in found.items() if name not in _NOT_SHOWN]
    error = str(found.get("exception", "")).rstrip().rpartition("\n")[2].strip()
    head = f"{found.get('timestamp', '')} [{found['level']}] {found['event']}"
    return visible("  ".join(filter(None, [head, " ".join(fields), error]))).encode()


def _value(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text) if " " in text or not text else text
