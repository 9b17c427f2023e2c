"""What a part of the run has found: figures, lines, tables and charts, kept as JSON.

The page is made of the last report of each part, so parts can be measured apart.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

# Values by round, by what was measured: figures of the aims.
Figures = dict[str, list[float]]
PERCENT: Final = 100


@dataclass
class Report:
    """One part's results; what is added is also printed."""

    part: str
    title: str
    machine: dict[str, str]
    measured_at: str = ""
    figures: Figures = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, *values: float) -> None:
        """Keep values of a figure, one for each round."""
        self.figures.setdefault(name, []).extend(values)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        print(text)
        self.blocks.append({"text": text})

    def line(self, text: str) -> None:
        """Add a line to the listing that was begun last."""
        print(text, flush=True)
        if not self.blocks or "lines" not in self.blocks[-1]:
            self.blocks.append({"lines": []})
        self.blocks[-1]["lines"].append(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        for row in (columns, *rows):
            print("  ".join(f"{cell:26}" for cell in row), flush=True)
        self.blocks.append({"columns": [*columns], "rows": [[*row] for row in rows]})

    def chart(self, **chart: Any) -> None:  # noqa: ANN401 - see bench/charts.py
        """Add a chart: the keyword arguments of a function of `bench.charts`."""
        self.blocks.append({"chart": chart})

    def save(self, directory: Path) -> None:
        """Keep the report in the place of the last one of its part."""
        directory.mkdir(parents=True, exist_ok=True)
        self.measured_at = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        (directory / f"{self.part}.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, directory: Path, part: str) -> Self | None:
        """Return the last report of a part, if there is one."""
        path = directory / f"{part}.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return the median, lowest and highest."""
    shown: Callable[[float], str] = form.format
    if len(values) == 1:
        return shown(values[0])
    return f"{shown(statistics.median(values))} ({min(values):.4g} to {max(values):.4g})"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / PERCENT))]
