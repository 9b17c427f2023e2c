"""The report of a burst, for people and machines."""

import json
import math
from collections import Counter
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.burst import Answer, BurstConfig, BurstResult
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
    width = _round_up(max(seconds) / _BANDS)
    counts = Counter(int(each / width) for each in seconds)
    return [
        Band(place * width, (place + 1) * width, counts[place]) for place in range(max(counts) + 1)
    ]


@dataclass(frozen=True, slots=True)
class Report:
    """A burst and its verdict, ready to be printed."""

    config: BurstConfig
    expected: Expectation
    result: BurstResult
    verdict: Verdict

    def print(self, console: Console) -> None:
        """Print title, checks, timing, all problems, and the verdict on the last line."""
        console.print()
        console.print(Text(self._title(), style="bold"))
        frame = box.SIMPLE if console.is_terminal else None
        console.print(self._checks(frame))
        console.print(self._measurements(frame))
        self._print_bands(console)
        for problem in self.verdict.problems:
            console.print(Text(f"wrong: {problem}", style="red"))
        console.print(self._last_line())

    def as_json(self) -> str:
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
                "requestsPerInstance": dict(_requests_per_instance(result)),
            }
        )

    def _title(self) -> str:
        amount, before, config = self.expected.amount, self.expected.before, self.config
        what = f"withdrawals of {-amount} from" if amount < 0 else f"deposits of {amount} to"
        spread = (
            "at one moment, each on its own connection"
            if config.connections >= config.requests
            else f"over {config.connections} connections"
        )
        return (
            f"{config.requests} {what} user {before.user_id} "
            f"(balance {before.balance} before), {spread}"
        )

    def _checks(self, frame: box.Box | None) -> Table:
        expected, verdict = self.expected, self.verdict
        table = Table("", box=frame, pad_edge=False)
        for heading in ("measured", "expected"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for label, measured, wanted in (
            ("accepted", verdict.accepted, expected.accepted),
            ("refused: insufficient funds", verdict.refused, expected.refused),
            *((kind, count, 0) for kind, count in verdict.others.most_common()),
            ("balance left", verdict.balance, expected.balance),
            ("new entries", verdict.new_entries, expected.accepted),
        ):
            right = measured == wanted
            mark = Text("ok", style="green") if right else Text("wrong", style="bold red")
            shown = "unread" if measured is None else str(measured)
            table.add_row(Text(label), shown, str(wanted), mark)
        return table

    def _measurements(self, frame: box.Box | None) -> Table:
        result, timing = self.result, Timing.of(self.result)
        table = Table(box=frame, pad_edge=False, show_header=False)
        table.add_row(
            "release to last answer",
            f"{result.wall_seconds:.2f} s, {timing.requests_per_second:.0f} requests/s",
        )
        table.add_row(
            "latency",
            f"p50 {_milliseconds(timing.p50)}, p95 {_milliseconds(timing.p95)}, "
            f"p99 {_milliseconds(timing.p99)}, max {_milliseconds(timing.max)}",
        )
        instances = (f"{name} {count}" for name, count in _requests_per_instance(result))
        table.add_row("answers per instance", Text(", ".join(instances) or "none"))
        table.add_row(
            "this client",
            f"{result.opening_seconds:.2f} s to open the connections, "
            f"{result.cpu_seconds:.2f} s of CPU in all",
        )
        return table

    def _print_bands(self, console: Console) -> None:
        shown = bands(self.result)
        most = max((band.answers for band in shown), default=0)
        block = "█" if console.encoding.lower().startswith("utf") else "#"
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="right")
        table.add_column(justify="right")
        for band in shown:
            # Rounded up: a band with few answers has a bar too, or the slowest would not show.
            length = math.ceil(band.answers * min(_BAR, console.width // 2) / most)
            table.add_row(
                f"{band.start * 1000:g} to {band.end * 1000:g} ms",
                str(band.answers),
                Text(block * length, style="cyan"),
            )
        if shown:
            console.print(Text("answers by latency"))
            console.print(table)
            console.print()

    def _last_line(self) -> Text:
        verdict = self.verdict
        label, style = ("PASS", "bold green") if verdict.passed else ("FAIL", "bold red")
        unread = "unread"
        latencies = [
            f"{verdict.accepted} accepted",
            f"{verdict.refused} refused for insufficient funds",
            *([f"{verdict.others.total()} otherwise"] if verdict.others else []),
            f"balance {unread if verdict.balance is None else verdict.balance}",
            f"{unread if verdict.new_entries is None else verdict.new_entries} new entries",
        ]
        return Text.assemble((label, style), "  ", ", ".join(latencies))


def _answers(result: BurstResult) -> list[Answer]:
    return [outcome for outcome in result.outcomes if isinstance(outcome, Answer)]


def _requests_per_instance(result: BurstResult) -> list[tuple[str, int]]:
    return sorted(Counter(answer.server_id for answer in _answers(result)).items())


def _nearest_rank(ascending: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed."""
    return ascending[math.ceil(share * len(ascending)) - 1]


def _round_up(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least or 1e-6))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
