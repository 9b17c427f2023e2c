"""What the console of `up` shows: one line for each event, an outage and its end once."""

import asyncio
import io
import json
import re

import pytest

from balance_app.local import merged_console
from balance_app.local.merged_console import MergedConsole

NAMES = ["app1", "app2", "app3"]


def on_a_terminal(level: str, event: str, **fields: str) -> bytes:
    """Return a line as structlog's renderer for consoles writes it."""
    values = " ".join(f"{name}=\x1b[35m{value}\x1b[0m" for name, value in fields.items())
    return (
        f"\x1b[2m2026-11-29T05:08:42.928167Z\x1b[0m [\x1b[33m\x1b[1m{level:<9}\x1b[0m] "
        f"\x1b[1m{event:<30}\x1b[0m [\x1b[34mbalance_app.db.pool\x1b[0m] {values}"
    ).encode()


def as_json(level: str, event: str, **fields: str) -> bytes:
    """Return a line of a log in JSON."""
    at = "2026-11-29T05:08:42.928167Z"
    of_each = {"level": level, "logger": "balance_app.db.pool", "timestamp": at, "server": "app1"}
    return json.dumps({"event": event, **fields, **of_each}).encode()


class Shown:
    """A console, and the lines that it shows, without colours."""

    def __init__(self, *, quiet: bool = True) -> None:
        self.console = MergedConsole(NAMES, quiet=quiet)
        self.stream = io.BytesIO()

    def write(self, name: str, *lines: bytes) -> None:
        self.console.write(name, list(lines), self.stream)

    @property
    def lines(self) -> list[str]:
        plain = re.sub(r"\x1b\[\d+m", "", self.stream.getvalue().decode())
        return [" ".join(line.split()) for line in plain.splitlines()]


@pytest.mark.parametrize("line", [on_a_terminal, as_json])
async def test_an_outage_is_shown_once_and_its_end(line: object) -> None:
    """However many instances meet it, in whatever order, and however often they try."""
    assert callable(line)
    shown = Shown()
    shown.write("app3", line("warning", "heartbeat failed", error="refused"))
    for name in NAMES:
        shown.write(name, line("warning", "database unavailable", cause="refused"))
        shown.write(name, line("warning", "heartbeat failed", error="refused"))
    for name in NAMES:
        shown.write(name, line("warning", "waiting for the database", cause="starting"))
    for name in ("app2", "app1"):
        shown.write(name, line("info", "database available", after_seconds="3"))
    shown.write("app3", b"Killed", line("info", "started"))
    first, killed, last = shown.lines
    assert first.startswith("app1 | 2026-11-29T05:08:42.928167Z [warning")
    assert "database unavailable" in first
    assert killed == "app3 | Killed"
    assert last == "The database is available again, after 0.0 s."
    await asyncio.sleep(0)
    # And the next one.
    shown.write("app2", line("warning", "database unavailable", cause="refused"))
    assert shown.lines[-1].startswith("app2 | ")


async def test_a_cause_that_somebody_must_remove_is_shown_too() -> None:
    """Once, as it does not end by itself."""
    shown = Shown()
    for name in NAMES:
        shown.write(name, on_a_terminal("warning", "database unavailable", cause="cut_off"))
        shown.write(name, on_a_terminal("warning", "waiting for the database", cause="password"))
    assert ["cut_off" in line for line in shown.lines] == [True, False]
    assert "cause=password" in shown.lines[1]


async def test_a_heartbeat_that_fails_alone_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little later, when no outage has begun."""
    monkeypatch.setattr(merged_console, "HOLD_SECONDS", 0.01)
    shown = Shown()
    shown.write("app2", on_a_terminal("warning", "heartbeat failed", error="locked"))
    assert shown.lines == []
    while not shown.lines:  # noqa: ASYNC110 - what is shown has no event
        await asyncio.sleep(0.01)
    assert "app2 | " in shown.lines[0]
    assert len(shown.lines) == 1


@pytest.mark.parametrize("line", [on_a_terminal, as_json])
def test_of_a_traceback_the_error_is_shown(line: object) -> None:
    """In the line of its event; the log has all of it. What is not of the log is as it is."""
    assert callable(line)
    shown = Shown()
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: boom"]
    if line is as_json:
        shown.write("app1", line("error", "run failed", job="moon", exception="\n".join(trace)))
    else:
        lines = [f"  {each}".encode() for each in trace]
        shown.write("app1", line("error", "run failed", job="moon"), *lines)
    shown.write("app1", line("info", "started"), b"  more")
    (found,) = shown.lines
    assert "run failed" in found
    assert found.endswith("job=moon ValueError: boom")
    shown.write("app2", *(each.encode() for each in trace))
    assert len(shown.lines) == 4
    assert all(each.startswith("app2 | ") for each in shown.lines[1:])


def test_json_that_was_asked_for_is_json() -> None:
    """With LOG_FORMAT=json each line is an object, for another program."""
    console, stream = MergedConsole(NAMES, quiet=False, as_json=True), io.BytesIO()
    lines = [as_json("warning", "database unavailable")] * 2
    console.write("app1", lines, stream)
    assert stream.getvalue().splitlines() == lines
