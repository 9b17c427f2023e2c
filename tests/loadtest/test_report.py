"""The progress and the report of a burst."""

import asyncio
import io
from itertools import pairwise

import pytest
from rich.console import Console

from loadtest.burst import Answer, BurstConfig, BurstResult, NoAnswer, Progress
from loadtest.progress import shown
from loadtest.report import Band, bands

CONFIG = BurstConfig(
    targets=(), user_id=1, amount=-2, requests=20, connections=10, keyed=False, timeout_seconds=9
)


def result(*seconds: float) -> BurstResult:
    answers = [Answer(200, "app1", b"", each, each) for each in seconds]
    return BurstResult([*answers, NoAnswer("closed")], 0.1, max(seconds, default=0.0), 0.1)


@pytest.mark.parametrize(
    ("longest", "width"),
    [(9.252, 1.0), (10.0, 1.0), (4.287, 0.5), (0.029, 0.005), (0.0000004, 5e-8), (11.0, 2.0)],
)
def test_answers_are_counted_in_bands_of_a_round_width(longest: float, width: float) -> None:
    """About ten of one width, from 0 to the longest, without gaps; each answer is in one."""
    seconds = [longest * part / 99 for part in range(100)]
    found = bands(result(*seconds))
    assert 5 <= len(found) <= 11
    assert found[0].start == 0
    assert all(before.end == after.start for before, after in pairwise(found))
    assert all(band.end - band.start == pytest.approx(width) for band in found)
    assert sum(band.answers for band in found) == 100
    assert found[-1].answers > 0
    assert found[-1].start <= longest < found[-1].end * (1 + 1e-9)


def test_no_answer_has_no_latency() -> None:
    """Unanswered requests are in no band; immediate answers are in the first."""
    assert bands(result()) == []
    assert [band.answers for band in bands(result(0.0, 0.0))] == [2]
    assert bands(result(1.0, 3.0, 3.5))[-1] == Band(3.5, 4.0, 1)


async def followed(console: Console, stream: io.StringIO) -> str:
    progress = Progress()
    async with shown(progress, CONFIG, console):
        progress.opened = 10
        async with asyncio.timeout(10):
            while not console.quiet and "10" not in stream.getvalue():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        progress.answered = 20
    return stream.getvalue()


async def test_a_terminal_has_bars() -> None:
    """They are redrawn in place, and full at the end."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    output = await followed(console, stream)
    opened, _, answered = output.rpartition("connections opened")[2].partition("answers received")
    assert "10/10" in opened
    assert "━" * 20 in answered
    assert "20/20" in answered
    assert "\x1b[1A" in output


async def test_a_pipe_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines at intervals; a quiet console gets nothing."""
    monkeypatch.setattr("loadtest.progress._LINES_EVERY_SECONDS", 0.05)
    stream = io.StringIO()
    output = await followed(Console(file=stream, width=200), stream)
    assert output.splitlines()[0] == "10 of 10 connections opened, 0 of 20 answers received"
    assert "\x1b" not in output
    quiet = io.StringIO()
    assert await followed(Console(file=quiet, quiet=True), quiet) == ""
