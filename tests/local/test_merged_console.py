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

    def __init__(self, *, quiet: bool = True, as_json: bool = False) -> None:
        self.console = MergedConsole(NAMES, quiet=quiet, as_json=as_json)
        self.stream = io.BytesIO()

    def write(self, name: str, *lines: bytes) -> None:
        self.console.write(name, list(lines), self.stream)

    def end(self, name: str) -> None:
        self.console.forget(name, self.stream)

    async def until(self, number: int) -> None:
        """Wait until so many lines are shown."""
        async with asyncio.timeout(10):
            while len(self.lines) < number:  # noqa: ASYNC110 - what is shown has no event
                await asyncio.sleep(0.01)

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


AGAIN = "The database is available again, after 0.0 s."


async def test_an_instance_that_has_ended_does_not_prolong_an_outage() -> None:
    """It is over when all that run have the database again; also if one has ended meanwhile."""
    unavailable = on_a_terminal("warning", "database unavailable", cause="refused")
    available = on_a_terminal("info", "database available")
    # Before the others have it again.
    shown = Shown()
    for name in NAMES:
        shown.write(name, unavailable)
    shown.end("app3")
    shown.write("app1", available)
    assert len(shown.lines) == 1
    shown.write("app2", available)
    assert shown.lines[1:] == [AGAIN]
    # After that.
    shown.write("app1", unavailable)
    shown.write("app2", unavailable)
    shown.write("app2", available)
    assert len(shown.lines) == 3
    shown.end("app1")
    assert shown.lines[3:] == [AGAIN]


async def test_an_outage_is_not_over_because_all_have_ended() -> None:
    """But when one that was started again has the database."""
    shown = Shown()
    for name in NAMES:
        shown.write(name, on_a_terminal("warning", "database unavailable", cause="refused"))
    for name in NAMES:
        shown.end(name)
    assert len(shown.lines) == 1
    shown.write("app2", on_a_terminal("warning", "waiting for the database", cause="refused"))
    assert len(shown.lines) == 1
    shown.write("app2", on_a_terminal("info", "started"))
    assert shown.lines[1:] == [AGAIN]
    shown.write("app3", on_a_terminal("info", "started"))
    assert len(shown.lines) == 2


async def test_a_heartbeat_that_fails_alone_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little later, when no outage has begun."""
    monkeypatch.setattr(merged_console, "HOLD_SECONDS", 0.01)
    shown = Shown()
    shown.write("app2", on_a_terminal("warning", "heartbeat failed", error="locked"))
    assert shown.lines == []
    await shown.until(1)
    assert "app2 | " in shown.lines[0]
    assert len(shown.lines) == 1


@pytest.mark.parametrize("line", [on_a_terminal, as_json])
def test_of_a_traceback_the_error_is_shown(line: object) -> None:
    """Beside its event; the log has the traceback. Other output is passed through unchanged."""
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


async def test_an_error_that_arrives_later_is_shown() -> None:
    """A long traceback comes in several reads; its last line is the error."""
    shown = Shown()
    shown.write("app1", on_a_terminal("error", "run failed", job="moon"))
    shown.write("app1", b"  Traceback (most recent call last):", b'    File "x.py", line 1')
    shown.write("app1", b"  ValueError: boom")
    await shown.until(2)
    assert shown.lines[1] == "app1 | ValueError: boom"
    # The next line does not overtake it.
    shown.write("app1", on_a_terminal("error", "run failed", job="sun"))
    shown.write("app1", b"  ValueError: bang")
    shown.write("app1", b"Killed")
    assert shown.lines[3:] == ["app1 | ValueError: bang", "app1 | Killed"]
    await asyncio.sleep(2 * merged_console.REST_SECONDS)
    assert len(shown.lines) == 5
    # Of an event that is not shown nothing is.
    shown.write("app1", on_a_terminal("info", "released"))
    shown.write("app1", b"  more")
    await asyncio.sleep(2 * merged_console.REST_SECONDS)
    assert len(shown.lines) == 5


@pytest.mark.parametrize("quiet", [False, True])
def test_json_that_was_asked_for_is_json(*, quiet: bool) -> None:
    """With LOG_FORMAT=json each line is an object, for another program; levels count as ever."""
    shown = Shown(quiet=quiet, as_json=True)
    warnings = [as_json("warning", "database unavailable")] * 2
    shown.write("app1", as_json("info", "started"), *warnings, b"Killed")
    lines = shown.stream.getvalue().splitlines()
    assert lines == [*([] if quiet else [as_json("info", "started")]), *warnings, b"Killed"]
