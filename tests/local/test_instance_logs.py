"""The logs of the instances of `up`: what is written, how much of it, and how it is read."""

import asyncio
import errno
import io
import os
import stat
import sys
from contextlib import closing
from pathlib import Path

import pytest

from balance_app.local.instance_logs import (
    InstanceLog,
    Output,
    Tail,
    find_directory,
    names,
    open_directory,
)
from balance_app.local.merged_console import MergedConsole
from balance_app.settings import load_settings

INFO = (
    b"\x1b[2m2026-11-28T20:44:27Z\x1b[0m [\x1b[32m\x1b[1minfo     \x1b[0m] \x1b[1mstarted\x1b[0m\n"
)
WARNING = INFO.replace(b"\x1b[32m\x1b[1minfo     ", b"\x1b[33m\x1b[1mwarning  ")
JSON_INFO = b'{"event": "the \\"level\\": \\"error\\"", "level": "info"}\n'
JSON_ERROR = b'{"event": "run failed", "level": "error"}\n'


def test_only_its_owner_can_read_a_log(tmp_path: Path) -> None:
    """Also one that is there already with another mode, and whatever the umask is."""
    before = os.umask(0)
    try:
        directory = open_directory(load_settings(balance_app_data=str(tmp_path)), None)
        (directory / "app2.log").touch(mode=0o644)
        for name in ("app1", "app2"):
            InstanceLog(directory, name).close()
            assert stat.S_IMODE((directory / f"{name}.log").stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (directory / "app3.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"app3\.log"):
        InstanceLog(directory, "app3")
    assert not (tmp_path / "elsewhere").exists()


def test_a_log_has_a_bounded_size_and_its_end_is_found(tmp_path: Path) -> None:
    """One older file is kept; `Tail` reads on from one into the other, and misses no line."""
    with closing(InstanceLog(tmp_path, "app1", max_bytes=100)) as log:
        log.write(b"line 0\n")
        with closing(Tail(tmp_path, "app1")) as tail:
            found = tail.last(10)
            for number in range(1, 100):
                log.write(f"line {number}\n".encode())
                if number % 3 == 0:
                    found += tail.new()
    assert found == [f"line {number}" for number in range(100)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app1.log", "app1.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3 * 100
    for number in (0, 1, 5, 9):
        with closing(Tail(tmp_path, "app1")) as tail:
            assert tail.last(number) == [f"line {each}" for each in range(100 - number, 100)]


def test_a_line_is_shown_when_it_is_complete(tmp_path: Path) -> None:
    """Half a line, and half a character, wait for their other halves."""
    with (
        closing(InstanceLog(tmp_path, "app1")) as log,
        closing(Tail(tmp_path, "app1")) as tail,
    ):
        for byte in "größer".encode():
            log.write(bytes([byte]))
            assert tail.new() == []
        log.write(b"\n")
        assert tail.new() == ["größer"]
        log.write(b"\xff\n")
        assert tail.new() == ["\ufffd"]


def test_instances_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """And a file that was renamed is none."""
    for name in ("app10", "app2", "app1"):
        InstanceLog(tmp_path, name).close()
    (tmp_path / "app1.log.1").touch()
    assert names(tmp_path) == ["app1", "app2", "app10"]
    assert names(tmp_path / "nowhere") == []


def test_the_directory_of_the_latest_up_is_found(tmp_path: Path) -> None:
    """Whichever it was given; without a note it is the default one."""
    settings = load_settings(balance_app_data=str(tmp_path / "data"))
    default = tmp_path / "data" / "logs"
    assert find_directory(settings) == default
    given = tmp_path / "a b\n" / "c"
    assert open_directory(settings, given) == given
    assert find_directory(settings) == given
    assert open_directory(settings, None) == default
    assert find_directory(settings) == default


class _Console(io.TextIOWrapper):
    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes)


@pytest.mark.parametrize("quiet", [False, True])
async def test_the_console_shows_what_it_would_without_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, quiet: bool
) -> None:
    """The log has everything, without colours; the console names, and warnings in a line each."""
    console = _Console()
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", console)
    reported: list[str] = []
    merged = MergedConsole(["app1", "app10"], quiet=quiet)
    output = Output(InstanceLog(tmp_path, "app1"), reported.append, merged)
    await output.open()
    out, err = output.descriptors
    for each in (INFO, b" more\n", WARNING[:30], WARNING[30:], b"  traceback\n", b"print\n"):
        os.write(err, each)
    os.write(err, JSON_INFO + JSON_ERROR)
    await output.note("app1 was ended")
    os.write(out, b"\x1b[31mthe rest, without an end")
    await output.close()
    shown = console.bytes.getvalue().splitlines()
    assert all(each.startswith(b"app1  | ") for each in shown)
    shown = [each.removeprefix(b"app1  | ") for each in shown]
    ends = [b"print", b" [error] run failed", b"\x1b[31mthe rest, without an end"]
    if quiet:
        assert shown == [WARNING[:-1] + b"  traceback", *ends]
    else:
        more = [INFO[:-1], b" more", WARNING[:-1], b"  traceback"]
        of_json = b' [info] the "level": "error"'
        assert shown == [*more, ends[0], of_json, *ends[1:]]
    log = (tmp_path / "app1.log").read_bytes()
    assert b"\x1b" not in log
    plain = [b"info     ] started", b" more", b"warning  ] started", b"  traceback", b"print"]
    ends = [*plain, JSON_INFO[:-1], JSON_ERROR[:-1], b"app1 was ended", b"without an end"]
    lines = log.splitlines()
    assert len(lines) == len(ends)
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True))
    assert reported == []


async def test_a_rotation_that_fails_stops_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor for the next file the last one is written on, and the pipe is read."""
    log = InstanceLog(tmp_path, "app1", max_bytes=10)
    reported: list[str] = []
    output = Output(log, reported.append, MergedConsole(["app1"], quiet=True))
    await output.open()

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        for _ in range(3):
            os.write(output.descriptors[1], INFO * 2)
            await asyncio.sleep(0.05)
    os.write(output.descriptors[1], INFO)
    await output.close()
    assert reported == [f"{tmp_path}/app1.log can't be written: Too many open files"]
    # the one that was opened then, which was moved at the next lines in turn
    assert (tmp_path / "app1.log.1").read_bytes()
    assert (tmp_path / "app1.log").exists()


async def test_a_full_disk_is_reported_once(tmp_path: Path) -> None:
    """And the instance's output is still read, so that it goes on."""
    log = InstanceLog(tmp_path, "app1")
    log.close()
    log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: ASYNC230, SIM115 - closed by it
    reported: list[str] = []
    output = Output(log, reported.append, MergedConsole(["app1"], quiet=True))
    await output.open()
    for _ in range(3):
        os.write(output.descriptors[1], INFO * 500)  # less than a pipe takes
        await output.note("more")
    await output.close()
    assert reported == [f"{tmp_path}/app1.log can't be written: No space left on device"]
