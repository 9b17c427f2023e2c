"""Charts in SVG that fit any width: what is drawn is stretched, text and lines are not.

Places of text are percentages. What is drawn has coordinates of its own, in an inner picture that
the browser stretches. Colours are classes of the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from loadtest.units import decimals, round_up

SECONDS: Final = "{} s"

_WIDTH, _HEIGHT = 2000, 1000  # of the inner picture
_ABOVE, _BELOW = 20, 22  # pixels of the chart above and below it, for text
_LEAST = 10  # of a bar that is not 0: what is smaller could not be seen
_NEAR_THE_END = 0.94  # where a label in the middle of its tick would be cut off


@dataclass(frozen=True, slots=True)
class Axis:
    """The values from `start` to `end`, with a mark at each multiple of a round step.

    `unit` is how a value is written, as "{} left". Only SECONDS have marks between whole numbers.
    """

    start: float
    end: float
    unit: str
    marks: int = 5  # about so many

    def place(self, value: float) -> float:
        """Return where a value stands, from 0 to 1."""
        return (value - self.start) / ((self.end - self.start) or 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and labels, in ascending order."""
        step = round_up((self.end - self.start) / self.marks)
        if self.unit != SECONDS:
            step = max(1.0, step)
        first, last = (round(edge / step) for edge in (self.start, self.end))
        values = [step * count for count in range(first - 1, last + 2)]
        return [
            (self.place(value), f"{value:,.{decimals(step)}f}".replace(",", "\u202f"))
            for value in values
            if self.start - step / 1e6 <= value <= self.end + step / 1e6
        ]


def dots(series: Mapping[str, Iterable[tuple[float, float]]], x: Axis, y: Axis) -> Markup:
    """Draw a dot for each pair of values; the series' names are their classes."""
    return Markup().join(
        Markup('<path class="dots {}" d="{}"/>').format(
            name, "".join(f"M{_across(x, across)} {_down(y, up)}h0" for across, up in pairs)
        )
        for name, pairs in series.items()
    )


def bars(series: Mapping[str, Sequence[int]], y: Axis) -> Markup:
    """Draw counts as bars side by side, those of later series upon those of earlier ones."""
    places = len(next(iter(series.values())))
    width = round(_WIDTH / places * 0.86)
    tops = [_HEIGHT] * places
    paths = []
    for name, counts in series.items():
        commands = []
        for place, count in enumerate(counts):
            if count:
                height = max(_LEAST, round(_HEIGHT * y.place(count)))
                left = round(_WIDTH * place / places)
                commands.append(f"M{left} {tops[place]}v-{height}h{width}v{height}z")
                tops[place] -= height
        paths.append(Markup('<path class="bars {}" d="{}"/>').format(name, "".join(commands)))
    return Markup().join(paths)


def steps(pairs: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Markup:
    """Draw values that each last until the next one; of those at one place the last counts."""
    if not pairs:
        return Markup()
    by_place = {_across(x, across): _down(y, up) for across, up in pairs}
    (left, first), *later = by_place.items()
    line = f"M{left} {first}{''.join(f'H{place}V{down}' for place, down in later)}"
    zero = _down(y, 0)
    return Markup(
        '<path class="area" d="{line}H{end}V{zero}H{left}z"/>'
        '<path class="line" d="{line}H{end}"/><path class="zero" d="M0 {zero}H{end}"/>'
    ).format(line=line, end=_WIDTH, left=left, zero=zero)


def chart(drawn: Markup, x: Axis, y: Axis, *, height: int, label: str) -> Markup:
    """Put axes around what was drawn; `label` says in words what is seen."""
    inner = height - _ABOVE - _BELOW
    return Markup(
        '<svg class="chart" width="100%" height="{height}" role="img" aria-label="{label}">'
        '{lines}<svg y="{above}" width="100%" height="{inner}" viewBox="0 0 {across} {down}" '
        'preserveAspectRatio="none" overflow="visible">{drawn}</svg>{texts}</svg>'
    ).format(
        height=height,
        label=label,
        lines=Markup().join(_lines(x, y, inner)),
        above=_ABOVE,
        inner=inner,
        across=_WIDTH,
        down=_HEIGHT,
        drawn=drawn,
        texts=Markup().join(_texts(x, y, inner)),
    )


def _lines(x: Axis, y: Axis, inner: int) -> Iterable[Markup]:
    for place, _ in y.ticks():
        yield Markup('<line class="grid" x2="100%" y1="{0}" y2="{0}"/>').format(
            _pixel(place, inner)
        )
    for place, _ in x.ticks():
        yield Markup('<line class="tick" x1="{0}%" x2="{0}%" y1="{1}" y2="{2}"/>').format(
            round(100 * place, 2), _ABOVE + inner, _ABOVE + inner + 4
        )


def _texts(x: Axis, y: Axis, inner: int) -> Iterable[Markup]:
    marks = y.ticks()
    for place, text in marks:
        if place == y.place(0) == 0:
            continue  # the line at the bottom is 0
        words = y.unit.format(text) if text == marks[-1][1] else text
        yield Markup('<text x="2" y="{}">{}</text>').format(_pixel(place, inner) - 4, words)
    for place, text in x.ticks():
        anchor = "start" if place <= 0 else "end" if place > _NEAR_THE_END else "middle"
        yield Markup('<text x="{}%" y="{}" text-anchor="{}">{}</text>').format(
            round(100 * place, 2), _ABOVE + inner + 17, anchor, x.unit.format(text)
        )


def _pixel(place: float, inner: int) -> int:
    return _ABOVE + round(inner * (1 - place))


def _across(x: Axis, value: float) -> int:
    return round(_WIDTH * x.place(value))


def _down(y: Axis, value: float) -> int:
    return round(_HEIGHT * (1 - y.place(value)))
