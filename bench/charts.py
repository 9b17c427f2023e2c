"""Charts as SVG, drawn without a library; readable on light and dark pages."""

import math
from html import escape
from typing import Any, Final

Series = dict[str, Any]  # its name, and its points as pairs

WIDTH: Final = 900
HEIGHT: Final = 380
LEFT: Final = 70
TOP: Final = 44
BOTTOM: Final = 56
LEGEND: Final = 300
COLUMNS: Final = 3
PANEL: Final = (280, 170)
INSET: Final = 22  # of a panel's first and last value, which would cover the axis
TICKS: Final = 5
LIGHT: Final = (
    *("#0969da", "#1a7f37", "#8250df", "#bf3989", "#57606a"),
    *("#24292f", "#bc4c00", "#9a6700", "#cf222e", "#0a7ea4"),
)
DARK: Final = (
    *("#58a6ff", "#3fb950", "#bc8cff", "#f778ba", "#8b949e"),
    *("#f0f6fc", "#ffa657", "#d29922", "#ff7b72", "#39c5cf"),
)
DASHES: Final = ("", "6 3", "2 3")


def draw(chart: dict[str, Any]) -> str:
    """Return the SVG of a chart that a report has kept."""
    keywords = {name: value for name, value in chart.items() if name not in {"kind", "name"}}
    return lines(**keywords) if chart["kind"] == "lines" else panels(**keywords)


def lines(*, title: str, x: str, y: str, series: list[Series]) -> str:
    """Return curves with a legend at their right."""
    right, low = WIDTH - LEGEND, HEIGHT - BOTTOM
    most_x = _nice(max(point[0] for each in series for point in each["points"]))
    most_y = _nice(max(point[1] for each in series for point in each["points"]))
    parts = [f'<text x="{LEFT}" y="22" class="title">{escape(title)}</text>']
    parts += _axes(most_x, most_y, (LEFT, TOP, right, low))
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" class="mid">{escape(x)}</text>')
    turned = f"translate(16 {(TOP + low) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" class="mid">{escape(y)}</text>')
    for number, each in enumerate(series):
        points = " ".join(
            f"{LEFT + px / most_x * (right - LEFT):.1f},{low - py / most_y * (low - TOP):.1f}"
            for px, py in each["points"]
        )
        look = _look(number)
        at = TOP + 8 + number * 22
        parts.append(f'<polyline points="{points}" {look}/>')
        parts.append(f'<line x1="{right + 14}" x2="{right + 40}" y1="{at}" y2="{at}" {look}/>')
        parts.append(f'<text x="{right + 46}" y="{at + 4}">{escape(each["name"])}</text>')
    return _svg(WIDTH, HEIGHT, title, parts)


def panels(*, title: str, panels: list[dict[str, Any]]) -> str:
    """Return small charts with one curve each: values over the steps of what grows."""
    wide, high = PANEL
    rows = math.ceil(len(panels) / COLUMNS)
    parts = [f'<text x="16" y="22" class="title">{escape(title)}</text>']
    for number, panel in enumerate(panels):
        x, y = number % COLUMNS * wide + 16, number // COLUMNS * high + 40
        parts.append(f'<text x="{x}" y="{y + 12}" class="name">{escape(panel["title"])}</text>')
        box = x + 44, y + 26, x + wide - 34, y + high - 34
        parts += _panel(panel, box)
    return _svg(COLUMNS * wide + 16, rows * high + 50, title, parts)


def _panel(panel: dict[str, Any], box: tuple[float, float, float, float]) -> list[str]:
    left, top, right, low = box
    values = [value for _, value in panel["points"]]
    most = _nice(max(values))
    found = [
        f'<line x1="{left}" x2="{right}" y1="{at}" y2="{at}" class="grid"/>'
        + _label(left - 6, at + 4, value, "end")
        for at, value in ((low, 0.0), ((low + top) / 2, most / 2), (top, most))
    ]
    step = (right - left - 2 * INSET) / max(1, len(values) - 1)
    spots = [
        (left + INSET + number * step, low - value / most * (low - top))
        for number, value in enumerate(values)
    ]
    found.append(
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}" {_look(0)}/>'
    )
    for (label, value), (x, y) in zip(panel["points"], spots, strict=True):
        found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot"/>')
        found.append(f'<text x="{x:.1f}" y="{y - 7:.1f}" class="mid value">{_short(value)}</text>')
        found.append(f'<text x="{x:.1f}" y="{low + 16}" class="mid">{escape(str(label))}</text>')
    return found


def _axes(most_x: float, most_y: float, box: tuple[float, float, float, float]) -> list[str]:
    left, top, right, low = box
    found = []
    for number in range(TICKS + 1):
        x = left + number / TICKS * (right - left)
        y = low - number / TICKS * (low - top)
        found += [
            f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>',
            _label(left - 8, y + 4, most_y * number / TICKS, "end"),
            _label(x, low + 18, most_x * number / TICKS, "mid"),
        ]
    return found


def _label(x: float, y: float, value: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{anchor}">{_short(value)}</text>'


def _look(number: int) -> str:
    dashes = DASHES[number // len(LIGHT) % len(DASHES)]
    return f'class="s{number % len(LIGHT)}" stroke-dasharray="{dashes}"'


def _nice(most: float) -> float:
    """Return the next round number that a value does not exceed."""
    if most <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    return next(unit * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if most <= unit * step)


def _short(value: float) -> str:
    """Return a number in three digits, with a unit of thousands where it has more."""
    for unit, name in ((1e6, " M"), (1e4, " k")):
        if value >= unit:
            return f"{value / (1e3 if name == ' k' else unit):.3g}{name}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    def strokes(colors: tuple[str, ...]) -> str:
        return "".join(f".s{number}{{stroke:{color}}}" for number, color in enumerate(colors))

    def theme(paper: str, ink: str, grid: str, colors: tuple[str, ...]) -> str:
        return (
            f".paper{{fill:{paper}}}text{{fill:{ink}}}.grid{{stroke:{grid}}}"
            f".dot{{fill:{colors[0]}}}{strokes(colors)}"
        )

    style = (
        "text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:600}"
        ".name{font-weight:600}.mid{text-anchor:middle}.end{text-anchor:end}"
        ".value{font-size:11px}polyline,line{fill:none;stroke-width:2}.grid{stroke-width:1}"
        + theme("#ffffff", "#24292f", "#d0d7de", LIGHT)
        + f"@media(prefers-color-scheme:dark){{{theme('#0d1117', '#e6edf3', '#30363d', DARK)}}}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">\n<title>{escape(title)}</title>\n<style>{style}</style>\n'
        f'<rect class="paper" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
    )
