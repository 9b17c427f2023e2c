"""The table of jobs in a terminal: what `/api/cron/status` says, for people."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Final

import httpx
from pydantic_core import from_json
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

TIMEOUT_SECONDS: Final = 5.0  # an event comes every second
RETRY_SECONDS: Final = 1.0
PLAIN_WIDTH: Final = 1000  # what is not read on a terminal is not cut to its width

_STATES: Final = {
    "running": ("●", "*", "green"),
    "waiting": ("○", "-", ""),
    "paused": ("‖", "=", ""),
}
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class NoAnswerError(Exception):
    """The service gave no status; the message is a sentence for the person who asked."""


def show(url: str) -> None:
    """Print the table once.

    Raises:
        NoAnswerError: nobody answers there, or not with a status.
    """
    address = f"{url.rstrip('/')}/api/cron/status"
    try:
        answer = httpx.get(address, timeout=TIMEOUT_SECONDS, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoAnswerError(f"Nobody answers at {url}: {_reason(error)}") from None
    console = _console()
    console.print(_table(_parse(answer, url), console))


def watch(url: str) -> None:
    """Show the table and keep it up to date, across restarts of the service, until Ctrl-C."""
    console = _console()
    status: dict[str, Any] | None = None
    with suppress(KeyboardInterrupt), _display(console) as draw:
        while True:
            try:
                for kind, data in _events(url):
                    if kind == "status":
                        status = data
                        draw(_table(status, console))
                    else:
                        draw(_stale(status, str(data.get("detail", "")), console))
                said = "The stream ended."
            except NoAnswerError as error:
                said = str(error)
            draw(_stale(status, f"{said} Reconnecting.", console))
            time.sleep(RETRY_SECONDS)


# -- asking ------------------------------------------------------------------------------------


def _events(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield events of the live feed with their data, until the stream ends."""
    address = f"{url.rstrip('/')}/api/cron/events"
    try:
        with httpx.stream("GET", address, timeout=TIMEOUT_SECONDS, trust_env=False) as answer:
            if not answer.is_success:
                answer.read()
                _parse(answer, url)
            kind, data = "", ""
            for line in answer.iter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    kind = value
                elif field == "data":
                    data += value
                elif not line and data:
                    yield kind, from_json(data)
                    kind, data = "", ""
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoAnswerError(f"Nobody answers at {url}: {_reason(error)}") from None
    except ValueError:
        raise NoAnswerError(f"What answers at {url} is not this service.") from None


def _parse(answer: httpx.Response, url: str) -> dict[str, Any]:
    try:
        body = from_json(answer.content)
        if answer.is_success and isinstance(body["jobs"], list):
            return dict(body)
        said = f"{url} answers {answer.status_code}: {body['detail']}"
    except (ValueError, TypeError, KeyError):
        said = f"What answers at {url} is not this service: status {answer.status_code}."
    raise NoAnswerError(said)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no answer in {TIMEOUT_SECONDS:g} s."
    return str(error) or type(error).__name__


# -- drawing -----------------------------------------------------------------------------------


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    return console


@contextmanager
def _display(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Yield what draws: in place on a terminal, one below the other elsewhere."""
    if not console.is_terminal:
        yield console.print
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        yield lambda shown: live.update(shown, refresh=True)


def _table(status: dict[str, Any], console: Console) -> RenderableType:
    now = datetime.fromisoformat(status["now"])
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("JOB", "STATE", "SERVER", "FOR", "PROGRESS", "DUE", "LAST RUN"):
        # Where it is narrow, these two are cut first.
        table.add_column(title, no_wrap=title not in {"PROGRESS", "LAST RUN"}, overflow="ellipsis")
    jobs = sorted(status["jobs"], key=lambda job: (job["state"] != "running", job["name"]))
    for job in jobs:
        table.add_row(
            _plain(job["name"]),
            _state(job, console),
            _plain(job["server"] or ""),
            _plain("" if job["elapsedSeconds"] is None else _duration(job["elapsedSeconds"])),
            _plain(_progress(job["progress"])),
            _plain(_due(job, now)),
            _last(job["lastRun"], now),
        )
    return Group(table, Text(), _copies(status))


def _state(job: dict[str, Any], console: Console) -> Text:
    symbol, ascii_symbol, style = _STATES[job["state"]]
    word = job["state"]
    if job["cancelBy"] is not None:
        word = "cancelling"
    elif job["state"] == "running" and job["paused"] is not None:
        word = "running, then paused"
    elif job["state"] == "waiting" and job["waiting"]["reason"] not in {"not-due", "due"}:
        word = f"waiting: {job['waiting']['reason']}"
    if job["waiting"] is not None and job["waiting"]["overdue"]:
        word, style = f"{word}, overdue", "red"
    unicode = console.encoding.lower().startswith("utf")
    return _plain(f"{symbol if unicode else ascii_symbol} {word}", style)


def _progress(progress: dict[str, Any] | None) -> str:
    if progress is None:
        return ""
    done, total, note = progress["done"], progress["total"], progress["note"]
    share = f"{done}" if not total else f"{done}/{total} ({done * 100 // total} %)"
    return f"{share} {note}".rstrip()


def _due(job: dict[str, Any], now: datetime) -> str:
    if job["state"] != "waiting":
        return ""
    seconds = (datetime.fromisoformat(job["readyAt"]) - now).total_seconds()
    return f"in {_duration(seconds)}" if seconds > 0 else f"since {_duration(-seconds)}"


def _last(run: dict[str, Any] | None, now: datetime) -> Text:
    if run is None:
        return Text()
    ago = (now - datetime.fromisoformat(run["endedAt"])).total_seconds()
    text = (
        f"{run['outcome']} {_duration(ago)} ago on {run['server']} in {_duration(run['seconds'])}"
    )
    if run["result"]:
        text += f": {run['result']}"
    bad = run["outcome"] in {"failed", "timed_out", "lost"}
    return _plain(text, "red" if bad else "")


def _copies(status: dict[str, Any]) -> RenderableType:
    counts = status["counts"]
    lines = [
        _plain(
            f"{counts['running']} running, {counts['waiting']} waiting "
            f"({counts['overdue']} overdue), {counts['paused']} paused"
        )
    ]
    for copy in status["copies"]:
        names = [job["name"] for job in status["jobs"] if job["copyId"] == copy["id"]]
        said = f"{copy['server']}: {copy['running']} running"
        if names:
            said += f" ({', '.join(names)})"
        if not copy["live"]:
            said += f", not seen for {_duration(copy['seenSecondsAgo'])}"
        lines.append(_plain(said, "" if copy["live"] else "red"))
    if not status["copies"]:
        lines.append(_plain("No copy that runs jobs was seen in the last minute.", "red"))
    return Group(*lines)


def _stale(status: dict[str, Any] | None, said: str, console: Console) -> RenderableType:
    """Return the last known table under a sentence that says that it is old."""
    sentence = _plain(said, "red")
    if status is None or not console.is_terminal:
        return sentence
    return Group(_table(status, console), Text(), sentence)


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    for length, unit, rest_length, rest_unit in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // rest_length} {rest_unit}"
    return f"{whole} s"


def _plain(text: str, style: str = "") -> Text:
    """Return text without markup, and with nothing that a terminal would obey."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return Text(shown, style=style, no_wrap=True, overflow="ellipsis")
