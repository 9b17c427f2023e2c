"""The report of a burst, for people and machines."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.burst import Answer, BurstConfig, BurstResult
from loadtest.timeline import ACCEPTED, REFUSED, timeline
from loadtest.units import decimals, in_seconds, round_up
from loadtest.verdict import Expectation, Verdict

_BANDS = 10  # about so many
_BAR = 40


@dataclass(frozen=True, slots=True)
class Timing:
    """How long answers took, in seconds, and how many requests a second were answered."""

    requests_per_second: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, result: BurstResult) -> "Timing":
        """Measure a burst; all numbers are 0 when nothing was answered."""
        seconds = sorted(outcome.seconds for outcome in _answers(result)) or [0.0]
        rate = len(_answers(result)) / result.wall_seconds if result.wall_seconds else 0.0
        return cls(rate, *(_nearest_rank(seconds, share) for share in (0.50, 0.95, 0.99, 1.0)))


@dataclass(frozen=True, slots=True)
class Band:
    """How many answers took at least `start` and less than `end` seconds."""

    start: float
    end: float
    answers: int


def bands(result: BurstResult) -> list[Band]:
    """Count answers by latency, in bands of one round width, from 0 to the longest."""
    seconds = [outcome.seconds for outcome in _answers(result)]
    if not seconds:
        return []
    width = round_up(max(seconds) / _BANDS)
    counts = Counter(int(each / width) for each in seconds)
    return [
        Band(place * width, (place + 1) * width, counts[place]) for place in range(max(counts) + 1)
    ]


@dataclass(frozen=True, slots=True)
class Check:
    """A count beside what it must be; None: it could not be read.

    `answered` says when the answers came, after the release; empty where there are none.
    """

    label: str
    measured: int | None
    expected: int
    answered: str = ""

    @property
    def right(self) -> bool:
        """Return whether it is as expected."""
        return self.measured == self.expected

    @property
    def shown(self) -> str:
        """Return what was measured, in words if it could not be read."""
        return "unread" if self.measured is None else str(self.measured)


@dataclass(frozen=True, slots=True)
class Report:
    """A burst and its verdict, ready to be printed."""

    config: BurstConfig
    expected: Expectation
    result: BurstResult
    verdict: Verdict

    def print(self, console: Console, picture: Text | None = None) -> None:
        """Print title, checks, timing, all problems, and the verdict on the last line.

        `picture` says where the picture is.
        """
        console.print()
        console.print(Text(self.title, style="bold"))
        frame = box.SIMPLE if console.is_terminal else None
        console.print(self._checks(frame))
        console.print(self._measurements(frame))
        self._print_bands(console)
        if picture is not None:
            # Never wrapped: a path has to be complete.
            console.print(Text.assemble("picture  ", picture), soft_wrap=True)
        for problem in self.verdict.problems:
            console.print(Text(f"wrong: {problem}", style="red"))
        console.print(self._last_line())

    def as_json(self, picture: Path | None = None) -> str:
        """Return the same as one JSON object; times are seconds."""
        expected, verdict, result = self.expected, self.verdict, self.result
        timing = Timing.of(result)
        return json.dumps(
            {
                "verdict": "pass" if verdict.passed else "fail",
                "problems": verdict.problems,
                "userId": expected.before.user_id,
                "amount": expected.amount,
                "openingBalance": expected.before.balance,
                "requests": expected.requests,
                "connections": self.config.connections,
                "accepted": {"measured": verdict.accepted, "expected": expected.accepted},
                "refused": {"measured": verdict.refused, "expected": expected.refused},
                "others": verdict.others,
                "balance": {"measured": verdict.balance, "expected": expected.balance},
                "newEntries": {"measured": verdict.new_entries, "expected": expected.accepted},
                "wallSeconds": result.wall_seconds,
                "openingSeconds": result.opening_seconds,
                "clientCpuSeconds": result.cpu_seconds,
                "requestsPerSecond": timing.requests_per_second,
                "latencySeconds": {
                    "p50": timing.p50,
                    "p95": timing.p95,
                    "p99": timing.p99,
                    "max": timing.max,
                },
                "latencyBands": [
                    {"startSeconds": band.start, "endSeconds": band.end, "answers": band.answers}
                    for band in bands(result)
                ],
                "requestsPerInstance": dict(requests_per_instance(result)),
                "picture": None if picture is None else str(picture),
            }
        )

    @property
    def title(self) -> str:
        """Return in a sentence what was sent."""
        amount, before, config = self.expected.amount, self.expected.before, self.config
        what = f"withdrawals of {-amount} from" if amount < 0 else f"deposits of {amount} to"
        spread = (
            "at one moment, each on its own connection"
            if config.connections >= config.requests
            else f"over {config.connections} connections"
        )
        held = f", held {before.held}" if before.held else ""
        floor = f", floor {before.floor}" if before.floor else ""
        return (
            f"{config.requests} {what} user {before.user_id} "
            f"(balance {before.balance} before{held}{floor}), {spread}"
        )

    def checks(self) -> list[Check]:
        """Return what was counted, beside what it must be."""
        expected, verdict = self.expected, self.verdict
        times: dict[str, list[float]] = {}
        for point in timeline(self.result.outcomes):
            times.setdefault(point.ending, []).append(point.after)
        answered = {
            ending: f"{in_seconds(seconds[0])} to {in_seconds(seconds[-1])}"
            for ending, seconds in times.items()
        }
        counts = (
            (ACCEPTED, verdict.accepted, expected.accepted),
            (REFUSED, verdict.refused, expected.refused),
            *((kind, count, 0) for kind, count in verdict.others.most_common()),
            ("balance left", verdict.balance, expected.balance),
            ("new entries", verdict.new_entries, expected.accepted),
        )
        return [Check(*count, answered.get(count[0], "")) for count in counts]

    def measurements(self) -> list[tuple[str, str]]:
        """Return what took how long, as pairs of words."""
        result, timing = self.result, Timing.of(self.result)
        instances = (f"{name} {count}" for name, count in requests_per_instance(result))
        return [
            (
                "release to last answer",
                f"{in_seconds(result.wall_seconds)}, {timing.requests_per_second:.0f} requests/s",
            ),
            (
                "latency",
                ", ".join(
                    f"{name} {in_seconds(getattr(timing, name))}"
                    for name in ("p50", "p95", "p99", "max")
                ),
            ),
            ("answers per instance", ", ".join(instances) or "none"),
            (
                "this client",
                (
                    f"{in_seconds(result.opening_seconds)} to open the connections, "
                    f"{in_seconds(result.cpu_seconds)} of CPU in all"
                ),
            ),
        ]

    def _checks(self, frame: box.Box | None) -> Table:
        table = Table("", box=frame, pad_edge=False)
        for heading in ("measured", "expected"):
            table.add_column(heading, justify="right")
        table.add_column("")
        table.add_column("after the release")
        for check in self.checks():
            mark = Text("ok", style="green") if check.right else Text("wrong", style="bold red")
            row = (Text(check.label), check.shown, str(check.expected), mark, check.answered)
            table.add_row(*row)
        return table

    def _measurements(self, frame: box.Box | None) -> Table:
        table = Table(box=frame, pad_edge=False, show_header=False)
        for label, text in self.measurements():
            table.add_row(label, Text(text))
        return table

    def _print_bands(self, console: Console) -> None:
        shown = bands(self.result)
        most = max((band.answers for band in shown), default=0)
        places = decimals(shown[0].end) if shown else 0
        block = "█" if console.encoding.lower().startswith("utf") else "#"
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="right")
        table.add_column(justify="right")
        for band in shown:
            # Rounded up: a band with few answers has a bar too, or the slowest would not show.
            length = math.ceil(band.answers * min(_BAR, console.width // 2) / most)
            table.add_row(
                f"{band.start:.{places}f} to {band.end:.{places}f} s",
                str(band.answers),
                Text(block * length, style="cyan"),
            )
        if shown:
            console.print(Text("answers by latency"))
            console.print(table)
            console.print()

    @property
    def summary(self) -> str:
        """Return the counts in one line."""
        verdict = self.verdict
        unread = "unread"
        counts = [
            f"{verdict.accepted} accepted",
            f"{verdict.refused} refused for insufficient funds",
            *([f"{verdict.others.total()} otherwise"] if verdict.others else []),
            f"balance {unread if verdict.balance is None else verdict.balance}",
            f"{unread if verdict.new_entries is None else verdict.new_entries} new entries",
        ]
        return ", ".join(counts)

    def _last_line(self) -> Text:
        passed = self.verdict.passed
        label, style = ("PASS", "bold green") if passed else ("FAIL", "bold red")
        return Text.assemble((label, style), "  ", self.summary)


def _answers(result: BurstResult) -> list[Answer]:
    return [outcome for outcome in result.outcomes if isinstance(outcome, Answer)]


def requests_per_instance(result: BurstResult) -> list[tuple[str, int]]:
    """Count the answers by the name of the instance that gave them, in the order of the names."""
    return sorted(Counter(answer.server_id for answer in _answers(result)).items())


def _nearest_rank(ascending: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed."""
    return ascending[math.ceil(share * len(ascending)) - 1]
