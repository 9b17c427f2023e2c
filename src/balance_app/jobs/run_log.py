"""What a run says: the lines of `run.log` and the traceback of its failure, kept with the run.

The last lines of a run are in a buffer, and in a table that has the same lines: the new ones are
written after each renewal of its lease, the rest before its completion is. So of a run that was
killed there are the lines up to its last heartbeat. A write that fails is repeated with the next
heartbeat; no lease and no completion depends on it.
"""

import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

from balance_app.logs import format_traceback
from balance_app.masks import Mask

# What is kept of a run: its last lines, so many and so many bytes of them; and of one line.
MOST_LINES: Final = 200
MOST_BYTES: Final = 64 * 1024
LINE_BYTES: Final = 4096
# How much of an error a run's result keeps.
MESSAGE_CHARACTERS: Final = 1900
MOST_CAUSES: Final = 10
DEEPEST_CAUSE: Final = 5
_WORD: Final = re.compile(r"[^\s\"'=]+")


class Line(NamedTuple):
    """A line of a run's log; its first has the number 1."""

    number: int
    # by PostgreSQL's clock, to some milliseconds
    at: datetime
    level: str
    text: str


class Unwritten(NamedTuple):
    """What of a run's log is to be written: `first` is the number of the first line to keep."""

    first: int
    lines: list[Line]
    traceback: str | None


class RunLog:
    """The log of one run; its methods may be called from any thread.

    Attributes:
        log: what the job's function has as `run.log`: its lines are kept, and go on to
        instance_logger: the log of the instance, with job and fence; what is said here is not kept.
        mask: replaces the secrets of the settings in a text.
    """

    def __init__(
        self,
        name: str,
        fence: int,
        *,
        # ast-grep-ignore: instance-clock - when a line was written, for people
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        mask: Mask = str,
        debug: bool = False,
    ) -> None:
        """`debug`: lines of this level are kept, too."""
        self.mask: Final = mask
        self.instance_logger: Final = structlog.get_logger("balance_app.jobs.run").bind(
            job=name, fence=fence
        )
        # Whatever the process has configured: what it does not log is kept all the same.
        self.log: Final = structlog.wrap_logger(
            self.instance_logger,
            processors=[self._keep],
            wrapper_class=structlog.stdlib.BoundLogger,
        ).bind()
        self._clock = clock
        self._debug = debug
        self._lock = threading.Lock()
        self._lines: deque[Line] = deque()
        self._bytes = 0
        self._last = 0
        self._written = 0
        self._traceback: str | None = None

    def fail(self, error: BaseException) -> None:
        """Keep the traceback of the error that the function ended with."""
        text = self._traceback_of(error)
        with self._lock:
            self._traceback = text

    def unwritten(self) -> Unwritten | None:
        """Return what is to be written, if there is anything."""
        with self._lock:
            lines = [line for line in self._lines if line.number > self._written]
            if not lines and self._traceback is None:
                return None
            first = self._lines[0].number if self._lines else 1
            return Unwritten(first, lines, self._traceback)

    def written(self, what: Unwritten) -> None:
        """Note that this was written."""
        with self._lock:
            if what.lines:
                self._written = max(self._written, what.lines[-1].number)
            if what.traceback == self._traceback:
                self._traceback = None

    def _keep(
        self, _logger: object, method: str, event: MutableMapping[str, Any]
    ) -> tuple[tuple[object, ...], dict[str, Any]]:
        """Keep a line (a processor of structlog); return what the instance's log is called with."""
        level = structlog.stdlib.add_log_level(None, method, {})["level"]
        message, positional = event.pop("event", ""), event.pop("positional_args", ())
        if level != "debug" or self._debug:
            self._append(level, self._text(message, positional, event))
        return (message, *positional), dict(event)

    def _append(self, level: str, text: str) -> None:
        with self._lock:
            self._last += 1
            self._lines.append(Line(self._last, self._clock(), level, text))
            self._bytes += len(text.encode())
            while len(self._lines) > MOST_LINES or self._bytes > MOST_BYTES:
                self._bytes -= len(self._lines.popleft().text.encode())

    def _text(
        self, message: object, positional: tuple[object, ...], event: Mapping[str, Any]
    ) -> str:
        """Return a line's text: what it says, its pairs, and the error that it is about."""
        said = safe_str(message)
        if positional:
            try:
                said %= positional
            except Exception:  # noqa: BLE001 - as it is, then
                said = f"{said} {safe_str(positional)}"
        pairs = [
            f"{key}={self._value(value)}"
            for key, value in event.items()
            if key not in {"exc_info", "stack_info", "stacklevel"}
        ]
        text = " ".join([self.mask(said), *pairs])
        error = _error(event.get("exc_info"))
        if error is not None:
            text = f"{text}\n{self._traceback_of(error)}"
        return _cut(storable(text, None))

    def _value(self, value: object) -> str:
        text = self.mask(safe_str(value))
        return text if _WORD.fullmatch(text) else repr(text)

    def _traceback_of(self, error: BaseException) -> str:
        try:
            text = format_traceback((type(error), error, error.__traceback__), self.mask)
        except Exception as reason:  # noqa: BLE001 - an error that can't be formatted is one, too
            text = f"{type(error).__name__}, without a traceback ({type(reason).__name__})"
        return storable(text, None)


def _error(exc_info: object) -> BaseException | None:
    """Return the error that a line is about, as structlog and the standard library name it."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1] if len(exc_info) > 1 else None
        return exc_info if isinstance(exc_info, BaseException) else None
    return sys.exc_info()[1] if exc_info else None


def _cut(text: str) -> str:
    """Leave out the middle of a line that is too long."""
    encoded = text.encode()
    if len(encoded) <= LINE_BYTES:
        return text
    half = (LINE_BYTES - 50) // 2
    begin, end = encoded[:half].decode(errors="ignore"), encoded[-half:].decode(errors="ignore")
    return f"{begin} [{len(encoded) - 2 * half} bytes] {end}"


# -- texts ---------------------------------------------------------------------------------------


def storable(text: str, limit: int | None = 500) -> str:
    """Return text that PostgreSQL can store, in at most `limit` characters."""
    return text[:limit].replace("\0", "").encode("utf-8", "replace").decode()


def describe(error: BaseException, mask: Mask = str, depth: int = 0) -> str:
    """Return the text of an error, with the errors of a group and the causes."""
    text = f"{type(error).__name__}: {mask(safe_str(error))[:MESSAGE_CHARACTERS]}"
    if depth == DEEPEST_CAUSE:
        return text
    if isinstance(error, BaseExceptionGroup):
        inside = [describe(each, mask, depth + 1) for each in error.exceptions[:MOST_CAUSES]]
        text = f"{text}: {'; '.join(inside)}"
    if error.__cause__ is not None:
        text = f"{text} (from {describe(error.__cause__, mask, depth + 1)})"
    return text


def safe_str(value: object) -> str:
    """Return `str(value)`, or a substitute if that fails."""
    try:
        return str.__str__(str(value))
    except Exception as error:  # noqa: BLE001 - a value without a text must not fail the run
        return f"a {type(value).__name__} without a text ({type(error).__name__})"


# -- the tables ----------------------------------------------------------------------------------

# A run that has lost its job says nothing more, as with its completion. What is written twice, by
# the heartbeat and before the completion, is written once. The table keeps what the buffer keeps.
#
# $1 holder; of each run $2 name, $3 fence, $4 first, $5 traceback; of each line $6 job, $7 fence,
# $8 number, $9 at, $10 level, $11 text
WRITE_LOGS: Final = """
WITH run AS MATERIALIZED (  -- those that are still this instance's
    SELECT name, fence, first, traceback
    FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::text[])
         AS said (name, fence, first, traceback)
    JOIN jobs USING (name, fence)
    WHERE holder = $1
), dropped AS (
    DELETE FROM job_run_lines AS line USING run
    WHERE line.job = run.name AND line.fence = run.fence AND number < first
), failed AS (
    INSERT INTO job_run_tracebacks (job, fence, text)
    SELECT name, fence, traceback FROM run WHERE traceback IS NOT NULL
    ON CONFLICT (job, fence) DO NOTHING
)
INSERT INTO job_run_lines (job, fence, number, logged_at, level, text)
SELECT line.* FROM unnest($6::text[], $7::bigint[], $8::bigint[], $9::timestamptz[], $10::text[],
                          $11::text[]) AS line (job, fence, number, logged_at, level, text)
JOIN run ON run.name = line.job AND run.fence = line.fence
ON CONFLICT (job, fence, number) DO NOTHING
"""

# $1 job, $2 fence
LINES: Final = """
SELECT number, logged_at AS at, level, text FROM job_run_lines
WHERE job = $1 AND fence = $2 ORDER BY number
"""

TRACEBACK: Final = "SELECT text FROM job_run_tracebacks WHERE job = $1 AND fence = $2"


def log_arguments(holder: UUID, said: Mapping[tuple[str, int], Unwritten]) -> tuple[object, ...]:
    """Return the parameters of WRITE_LOGS, in its order: what the runs (name, fence) have said."""
    lines = [(run, line) for run, what in said.items() for line in what.lines]
    return (
        holder,
        [name for name, _ in said],
        [fence for _, fence in said],
        [what.first for what in said.values()],
        [what.traceback for what in said.values()],
        [name for (name, _), _ in lines],
        [fence for (_, fence), _ in lines],
        [line.number for _, line in lines],
        [line.at for _, line in lines],
        [line.level for _, line in lines],
        [line.text for _, line in lines],
    )
