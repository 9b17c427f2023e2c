"""The picture of a burst: one HTML file without scripts, which needs nothing from elsewhere.

What came from the service is text in it, never markup. Its size is bounded: of very many answers
some are drawn, and the caption says how many.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from dotenv import dotenv_values
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loadtest.charts import SECONDS, Axis, bars, chart, dots, steps
from loadtest.report import Report
from loadtest.timeline import ACCEPTED, REFUSED, Point, timeline
from loadtest.units import decimals, in_seconds, round_up

_NAME: Final = "load.html"
_DRAWN_AT_MOST = 15_000  # dots; each is some 12 bytes
_DRAWN_ALWAYS = 1000  # of the answers that ended in one way
_INSTANCES_AT_MOST = 20
_BARS = 80  # about so many
_PROBLEMS_AT_MOST = _CHECKS_AT_MOST = 20
_CLASSES: Final = {ACCEPTED: "accepted", REFUSED: "refused"}
_OTHER: Final = "other"  # the class of all other answers


def default_path() -> Path:
    """Return where a picture is kept: with the data of `make run`, which git ignores."""
    variables = {**dotenv_values(".env", encoding="utf-8-sig"), **os.environ}
    return Path(variables.get("BALANCE_APP_DATA") or ".balance-app") / _NAME


def write(path: Path, text: str) -> None:
    """Write a picture, over the one before; a new one can be read by its owner alone.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8", errors="replace") as file:
        file.write(text)


def draw(report: Report, now: datetime | None = None) -> str:
    """Return the picture as HTML."""
    points = timeline(report.result.outcomes)
    checks = report.checks()
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(
        "picture.html"
    ).render(
        report=report,
        passed=report.verdict.passed,
        checks=[*checks[:-2][: _CHECKS_AT_MOST - 2], *checks[-2:]],  # those are balance and entries
        checks_left_out=max(0, len(checks) - _CHECKS_AT_MOST),
        problems=report.verdict.problems[:_PROBLEMS_AT_MOST],
        made_at=now or datetime.now(UTC),
        unanswered=len(report.result.outcomes) - len(points),
        **(_charts(report, points) if points else {"charts": []}),
    )


@dataclass(frozen=True, slots=True)
class _Bins:
    """Time after the release in parts of one round width."""

    width: float
    count: int

    @classmethod
    def of(cls, points: Sequence[Point]) -> "_Bins":
        width = round_up(points[-1].after / _BARS)
        return cls(width, math.floor(points[-1].after / width) + 1)

    @property
    def width_in_words(self) -> str:
        return f"{self.width:.{decimals(self.width)}f} s"

    def axis(self, marks: int) -> Axis:
        return Axis(0, self.width * self.count, SECONDS, marks)

    def counts(self, points: Sequence[Point]) -> dict[str, list[int]]:
        """Count the answers of each class in each part."""
        found: dict[str, list[int]] = {name: [0] * self.count for name in _classes()}
        for point in points:
            found[_class(point)][min(int(point.after / self.width), self.count - 1)] += 1
        return found

    def rows(self, points: Sequence[Point]) -> list[tuple[str, list[int]]]:
        """Return the same by part, with its start and end in words."""
        places = decimals(self.width)
        edges = [f"{self.width * number:.{places}f}" for number in range(self.count + 1)]
        by_part = zip(*self.counts(points).values(), strict=True)
        return [
            (f"{edges[number]} to {edges[number + 1]} s", list(counts))
            for number, counts in enumerate(by_part)
        ]


def _charts(report: Report, points: list[Point]) -> dict[str, Any]:
    bins = _Bins.of(points)
    return {
        "charts": [
            _each_answer(report, points, bins),
            _balance(report, points, bins),
            _rate(points, bins),
        ],
        **_instances(points, bins),
        "bin_width": bins.width_in_words,
        "rows": bins.rows(points),
        "has_others": any(point.ending not in _CLASSES for point in points),
        "columns": ["accepted", "refused", "otherwise"],
    }


def _each_answer(report: Report, points: list[Point], bins: _Bins) -> dict[str, Any]:
    """Draw every answer as a dot; over connections that are used again its latency is of interest.

    Where each request has a connection of its own, its latency is the time after the release.
    """
    config = report.config
    x = bins.axis(marks=8)
    if config.connections >= config.requests:
        y = Axis(0, config.requests, "request {}")
        meaning = (
            "Up: the number of the request, in the order in which the connections were opened; "
            "dots in a line are mostly of one instance."
        )
    else:
        y = Axis(0, max(point.latency for point in points), SECONDS)
        meaning = "Up: its latency, from the answer before it on the same connection."
    every = math.ceil(len(points) / _DRAWN_AT_MOST)
    series: dict[str, list[tuple[float, float]]] = {}
    for name in _classes():
        of_class = [point for point in points if _class(point) == name]
        series[name] = [
            (point.after, point.latency if y.unit == SECONDS else point.request)
            for point in of_class[:: every if len(of_class) > _DRAWN_ALWAYS else 1]
        ]
    drawn = sum(map(len, series.values()))
    of_all = "" if drawn == len(points) else f" {drawn} of the {len(points)} answers are drawn."
    return {
        "title": "Each answer is a dot",
        "caption": f"Across: when the answer came, after the release. {meaning}{of_all}",
        "svg": chart(dots(series, x, y), x, y, height=320, label=f"{_in_words(points)} {meaning}"),
    }


def _balance(report: Report, points: list[Point], bins: _Bins) -> dict[str, Any]:
    """Draw the balance of the newest version that the answers so far have shown."""
    before = report.expected.before
    newest, balance = before.version, before.balance
    lowest = highest = balance
    pairs: list[tuple[float, float]] = [(0.0, balance)]
    below: list[tuple[float, float]] = []
    for point in points:
        if (state := point.state) is None:
            continue
        lowest, highest = min(lowest, state.balance), max(highest, state.balance)
        if state.balance < 0:
            below.append((point.after, state.balance))
        if state.version > newest:
            newest, balance = state.version, state.balance
            pairs.append((point.after, balance))
    x = bins.axis(marks=8)
    y = Axis(min(0, lowest), max(1, highest), "{} left", marks=4)
    words = (
        f"{before.balance} before, {lowest} at the lowest, {balance} at last; "
        f"{f'answers below 0: {len(below)}' if below else 'never below 0'}."
    )
    marked = dots({"below": below[:_DRAWN_ALWAYS]}, x, y)  # however little they are below
    return {
        "title": "The balance",
        "caption": f"As the answer of the highest version so far shows it: {words}",
        "svg": chart(steps(pairs, x, y) + marked, x, y, height=200, label=words),
    }


def _rate(points: list[Point], bins: _Bins) -> dict[str, Any]:
    series = bins.counts(points)
    x = bins.axis(marks=8)
    y = Axis(0, _highest(series), "{} answers", marks=4)
    most = f"At most {_highest(series)} answers came in {bins.width_in_words}."
    return {
        "title": "Answers over time",
        "caption": f"How many came in each {bins.width_in_words} after the release. {most}",
        "svg": chart(bars(series, y), x, y, height=200, label=f"{_in_words(points)} {most}"),
    }


def _instances(points: list[Point], bins: _Bins) -> dict[str, Any]:
    """Draw the same for each instance, all to one scale."""
    by_server: dict[str, list[Point]] = {}
    for point in points:
        by_server.setdefault(point.server_id, []).append(point)
    servers = sorted(by_server)[:_INSTANCES_AT_MOST]
    counted = {server: bins.counts(by_server[server]) for server in servers}
    x = bins.axis(marks=4)
    y = Axis(0, max(map(_highest, counted.values())), "{} answers", marks=3)
    return {
        "instances": [
            {
                "name": server,
                "words": _in_words(by_server[server]),
                "svg": chart(
                    bars(counted[server], y), x, y, height=120, label=_in_words(by_server[server])
                ),
            }
            for server in servers
        ],
        "instances_left_out": len(by_server) - len(servers),
    }


def _in_words(points: Sequence[Point]) -> str:
    counts = Counter(map(_class, points))
    others = f", {counts[_OTHER]} otherwise" if counts[_OTHER] else ""
    return (
        f"{counts['accepted']} accepted, {counts['refused']} refused{others}, "
        f"{in_seconds(points[0].after)} to {in_seconds(points[-1].after)} after the release."
    )


def _highest(series: dict[str, list[int]]) -> int:
    return max(map(sum, zip(*series.values(), strict=True)))


def _class(point: Point) -> str:
    return _CLASSES.get(point.ending, _OTHER)


def _classes() -> list[str]:
    return [*_CLASSES.values(), _OTHER]
