"""Charts of runs and of balances, in SVG without inline styles."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from markupsafe import Markup

from balance_app.formatting import duration, rough
from balance_app.states import Tone, outcome_predicate, outcome_sign
from balance_app.web.queries import Runs
from balance_app.web.view_models import Changes, Gap, Mark, clock_time, exact, number

SQUARES: Final = 20
SPANS: Final = {
    "5": 300.0,
    "30": 1800.0,
    "1440": 86400.0,
}  # of the lanes, in seconds by their names
ROW: Final = 22  # pixels of a row of bars, with its gap
MOST_ROWS: Final = 4  # of a lane; more runs at once share the last one
MOST_BARS: Final = 60  # of a lane; more runs are drawn as parts of time
LONGEST_WITH_BARS: Final = 3600.0  # seconds; longer lanes are drawn so, too
PARTS: Final = 96  # of a lane with more runs than that
_BAR: Final = 18
_LEAST_PERCENT: Final = 0.35  # of a lane: what is shorter could not be seen
_LABEL_PERCENT: Final = 3.2  # what is shorter has no room for a name


def squares(runs: Runs) -> Markup:
    """Draw the last runs of a job as squares that lead to them; `runs` are the oldest first."""
    last = runs[-SQUARES:]
    if not last:
        return Markup('<span class="none">never run</span>')
    return Markup('<span class="squares">{}</span>').format(
        _join(
            Markup(
                '<a href="/runs/{id}" class="{tone}" title="{label}" aria-label="{label}"></a>'
            ).format(id=run["id"], tone=outcome_sign(run["outcome"]).tone, label=_brief(run))
            for run in last
        )
    )


def _brief(run: dict[str, Any]) -> str:
    """Return what became of a run, for its square."""
    sign = outcome_sign(run["outcome"])
    took = f" after {duration(_seconds(run))}" if run["ended"] is not None else ""
    return f"{sign.label}{took}, {clock_time(run['started'])} UTC on {run['server']}"


def in_lane(run: dict[str, Any], now: float, span: float) -> bool:
    """Say whether a run is shown in a lane of this length."""
    return run["ended"] is None or run["ended"] > now - span


def lane(  # noqa: PLR0913 - the parts of a lane
    runs: Runs,
    rows: Mapping[int, int],
    origin: float,
    span: float,
    *,
    by_job: bool,
    now: float,
    marks: Sequence[Mark] = (),
    gaps: Sequence[Gap] = (),
) -> Markup:
    """Draw the runs of an instance, or of a job, in a lane.

    Bars have fixed places, in percent of a lane from `origin`. With time all of them move together
    (`data-shift`), and the bar of a run under way grows (`data-from`). `rows` has the row of each
    run, as an instance may run several jobs at once.
    """
    height = ROW * lane_rows(rows, runs)
    bars = (
        _parts(runs, origin, span, height, now)
        if is_in_parts(runs, span)
        else _join(_bar(run, rows.get(run["id"], 0), origin, span, by_job=by_job) for run in runs)
    )
    return Markup(
        '<svg class="lane" width="100%" height="{height}"><line x2="100%" y1="{y}" y2="{y}"/>'
        '<svg data-shift="{span}">{gaps}{bars}{marks}</svg></svg>'
    ).format(
        height=height,
        y=height / 2,
        span=int(span),
        gaps=_join(
            Markup(
                '<g class="gap"><title>{label}</title>'
                '<rect x="{x}%" width="{width}%" height="{height}"/></g>'
            ).format(
                label=gap.label,
                x=percent(gap.since - origin, span),
                width=max(_LEAST_PERCENT, percent(gap.until - gap.since, span)),
                height=height,
            )
            for gap in gaps
        ),
        bars=bars,
        marks=_join(
            Markup(
                '<g class="death"><title>{label}</title><line x1="{x}%" x2="{x}%" y2="{height}"/>'
                '<text x="{x}%" y="{y}" dx="3">✕</text></g>'
            ).format(
                label=mark.label,
                x=percent(mark.at - origin, span),
                height=height,
                y=12,
            )
            for mark in marks
        ),
    )


def lane_rows(rows: Mapping[int, int], runs: Runs) -> int:
    """Return how many rows of bars a lane has."""
    return 1 + max((rows.get(run["id"], 0) for run in runs), default=0)


def is_in_parts(runs: Runs, span: float) -> bool:
    """Say whether a lane has too many runs, or is too long, for a bar of each."""
    return len(runs) > MOST_BARS or span > LONGEST_WITH_BARS


def rows_of(runs: Runs, known: Mapping[int, int], span: float) -> dict[int, int]:
    """Return the row of each run; runs that overlap have rows of their own. Known ones stay."""
    if is_in_parts(runs, span):
        return dict.fromkeys((run["id"] for run in runs), 0)
    ends: dict[int, float] = {}
    rows: dict[int, int] = {}
    for run in sorted(runs, key=lambda run: (run["id"] not in known, run["started"], run["id"])):
        row = known.get(run["id"])
        if row is None:
            row = next(
                (each for each in range(MOST_ROWS - 1) if ends.get(each, 0.0) <= run["started"]),
                MOST_ROWS - 1,
            )
        rows[run["id"]] = row
        ended = math.inf if run["ended"] is None else run["ended"]
        ends[row] = max(ends.get(row, 0.0), ended)
    return rows


def _bar(run: dict[str, Any], row: int, origin: float, span: float, *, by_job: bool) -> Markup:
    start = percent(run["started"] - origin, span)
    outcome = outcome_sign(run["outcome"])
    width = 0.0
    if run["ended"] is None:
        size = Markup('data-from="{}"').format(start)
    else:
        width = max(_LEAST_PERCENT, percent(run["ended"] - run["started"], span))
        size = Markup('width="{}%"').format(round(width, 2))
    text = ""
    if run["ended"] is None or width >= _LABEL_PERCENT:
        name = run["server"] if by_job else run["job"].partition("-")[2] or run["job"]
        text = Markup('<text x="4" y="13">{}</text>').format(name)
    return Markup(
        '<a href="/runs/{id}" aria-label="{label}"><title>{label}</title>'
        '<svg x="{start}%" y="{y}" height="{bar}" {size} class="bar {tone}">'
        '<rect width="100%" height="{bar}" rx="3"{fill}/>{text}</svg></a>'
    ).format(
        id=run["id"],
        label=sentence(run),
        start=start,
        y=row * ROW + 2,
        bar=_BAR,
        size=size,
        tone=outcome.tone,
        fill=_fill(run),
        text=text,
    )


def _parts(runs: Runs, origin: float, span: float, height: int, now: float) -> Markup:
    """Draw many runs as parts of time: the higher, the more of it was run; failures hatched."""
    length = span / PARTS
    busy: dict[int, float] = {}
    bad: dict[int, int] = {}
    for run in runs:
        ended = run["ended"] if run["ended"] is not None else max(now, run["started"])
        first, last = (int((each - origin) // length) for each in (run["started"], ended))
        for part in range(first, last + 1):
            begin = origin + part * length
            busy[part] = (
                busy.get(part, 0.0) + min(ended, begin + length) - max(run["started"], begin)
            )
        if outcome_sign(run["outcome"]).tone == Tone.BAD:
            bad[last] = bad.get(last, 0) + 1
    width = round(100 / PARTS, 3)
    most = max(busy.values(), default=0.0) or 1.0

    def rect(part: int, tone: str, share: float, label: str) -> Markup:
        high = max(2, round((height - 4) * share))
        return Markup(
            '<g class="bar {tone}"><title>{label}</title><rect x="{x}%" y="{y}" width="{width}%" '
            'height="{high}"{fill}/></g>'
        ).format(
            tone=tone,
            label=label,
            x=round(100 * (part * length) / span, 3),
            y=height - 2 - high,
            width=width,
            high=high,
            fill=Markup(' fill="url(#hatch)"') if tone == Tone.BAD else "",
        )

    return _join(
        [
            *(
                rect(
                    part,
                    Tone.GOOD,
                    seconds / most,
                    f"{clock_time(origin + part * length)} UTC: {duration(seconds)} of runs",
                )
                for part, seconds in sorted(busy.items())
            ),
            *(
                rect(
                    part,
                    Tone.BAD,
                    1.0,
                    f"{clock_time(origin + part * length)} UTC: {number} "
                    f"{'run' if number == 1 else 'runs'} failed, timed out or lost",
                )
                for part, number in sorted(bad.items())
            ),
        ]
    )


class Handover(NamedTuple):
    """A run that was lost, and the one that resumed it: moments, and places in pixels."""

    lost: float
    from_y: float
    resumed: float
    to_y: float


def handovers(
    id_: str, found: Iterable[Handover], origin: float, span: float, height: float
) -> Markup:
    """Draw a line from each lost run to the one that resumed it, over all lanes."""
    return Markup(
        '<svg id="{id}" width="100%" height="{height}" aria-hidden="true">'
        '<svg data-shift="{span}">{lines}</svg></svg>'
    ).format(
        id=id_,
        height=height,
        span=int(span),
        lines=_join(
            Markup('<line x1="{}%" y1="{}" x2="{}%" y2="{}"/>').format(
                percent(each.lost - origin, span),
                each.from_y,
                percent(each.resumed - origin, span),
                each.to_y,
            )
            for each in found
        ),
    )


def percent(seconds: float, span: float) -> float:
    """Return so many seconds in percent of a lane."""
    return round(100 * seconds / span, 2)


def growing(width: float) -> float:
    """Return the width of a bar whose run is under way, in percent of a lane."""
    return max(_LEAST_PERCENT, round(width, 2))


def sentence(run: dict[str, Any]) -> str:
    """Return what became of a run, as a sentence."""
    started = clock_time(run["started"])
    if run["ended"] is None:
        return f"{run['job']} has been running on {run['server']} since {started} UTC."
    text = (
        f"{run['job']} ran on {run['server']} from {started} to {clock_time(run['ended'])} UTC "
        f"({duration(_seconds(run))}) and {outcome_predicate(run['outcome'])}"
    )
    if outcome_sign(run["outcome"]).tone == Tone.BAD and run["result"]:
        return f"{text}: {run['result']}"
    return f"{text}."


def durations(runs: Runs, now: float) -> Markup:
    """Draw how long the last runs of a job took, the oldest on the left."""
    if not runs:
        return Markup('<p class="none">Never run.</p>')
    took = [_seconds(run, now) for run in runs]
    longest = max(took) or 1.0
    step = 100 / max(len(runs), 12)
    bars = _join(
        Markup(
            '<g class="bar {tone}"><title>{label}</title><rect x="{x}%" width="{width}%" '
            'y="{y}%" height="{height}%"{fill}/></g>'
        ).format(
            tone=outcome_sign(run["outcome"]).tone,
            label=sentence(run),
            x=round(place * step, 2),
            width=round(step * 0.75, 2),
            y=round(100 - 100 * max(seconds / longest, 0.02), 2),
            height=round(100 * max(seconds / longest, 0.02), 2),
            fill=_fill(run),
        )
        for place, (run, seconds) in enumerate(zip(runs, took, strict=True))
    )
    label = (
        f"How long the last {len(runs)} runs took: the shortest {duration(min(took))}, "
        f"the longest {duration(longest)}."
        if len(runs) > 1
        else f"The only run took {duration(longest)}."
    )
    return Markup(
        '<figure class="durations"><div class="scale" aria-hidden="true"><span>{top}</span>'
        "<span>{middle}</span><span>0 s</span></div>"
        '<svg width="100%" height="96" role="img" aria-label="{label}">'
        '<line class="grid" x2="100%" y1="0.5" y2="0.5"/><line class="grid" x2="100%" y1="50%" '
        'y2="50%"/>{bars}</svg><figcaption><span>{first}</span><span>{label}</span>'
        "<span>{last}</span></figcaption></figure>"
    ).format(
        label=label,
        bars=bars,
        top=duration(longest),
        middle=duration(longest / 2),
        first=exact(runs[0]["started"]),
        last=exact(runs[-1]["started"]),
    )


def balances(points: Sequence[tuple[float, int]]) -> Markup:
    """Draw a balance by its changes (moments since 1970 and balances), the oldest first.

    Each balance lasts until the next one.
    """
    if len(points) < 2:  # noqa: PLR2004 - a line has two ends
        return Markup('<p class="none">No changes yet.</p>')
    (began, first), (ended, last) = points[0], points[-1]
    lowest, highest = (end(balance for _, balance in points) for end in (min, max))

    def x(moment: float) -> float:
        return round(1000 * (moment - began) / ((ended - began) or 1.0), 1)

    def y(balance: int) -> float:
        return round(100 - 100 * (balance - lowest) / ((highest - lowest) or 1), 1)

    steps = "".join(f"H{x(moment)}V{y(balance)}" for moment, balance in points[1:])
    line = f"M0 {y(first)}{steps}"
    label = (
        f"The balance from {exact(began)} to {exact(ended)}: first {number(first)}, "
        f"lowest {number(lowest)}, highest {number(highest)}, last {number(last)}."
    )
    return Markup(
        '<figure class="durations past"><svg width="100%" height="112" viewBox="0 -4 1000 108" '
        'preserveAspectRatio="none" role="img" aria-label="{label}"><title>{label}</title>'
        '<path class="area" d="{line}V104H0Z"/><path class="line" d="{line}"/></svg>'
        "<figcaption><span>{began}</span><span>lowest {lowest}, highest {highest}</span>"
        "<span>{ended}</span></figcaption></figure>"
    ).format(
        label=label,
        line=line,
        began=exact(began),
        ended=exact(ended),
        lowest=number(lowest),
        highest=number(highest),
    )


_CHANGES_HEIGHT: Final = 132
_MIDDLE: Final = 84  # refused changes are drawn below it


def changes(shown: Changes) -> Markup:
    """Draw the changes of the last minutes, accepted ones up and refused ones down, and a balance.

    The balance is that of the account that changes most, as a step line.
    """
    most = max((bar.accepted + bar.refused for bar in shown.bars), default=0) or 1
    width = round(100 / max(len(shown.bars), 1), 3)

    def rect(place: int, count: float, room: float, kind: str) -> Markup:
        if not count:
            return Markup()
        high = max(1.0, round(room * count / most, 1))
        return Markup('<rect class="{}" x="{}%" y="{}" width="{}%" height="{}"/>').format(
            kind,
            round(place * width, 3),
            _MIDDLE - high if kind == "accepted" else _MIDDLE + 1,
            round(width * 0.85, 3),
            high,
        )

    bars = _join(
        Markup("<g><title>{}</title>{}{}</g>").format(
            f"{clock_time(bar.at)} UTC: {number(bar.accepted)} accepted, "
            f"{number(bar.refused)} refused",
            rect(place, bar.accepted, _MIDDLE - 16, "accepted"),
            rect(place, bar.refused, _CHANGES_HEIGHT - _MIDDLE - 14, "refused"),
        )
        for place, bar in enumerate(shown.bars)
        if bar.accepted or bar.refused
    )
    accepted = sum(bar.accepted for bar in shown.bars)
    refused = sum(bar.refused for bar in shown.bars)
    label = (
        f"The last {duration(shown.seconds)}, all instances: {number(accepted)} changes accepted, "
        f"{number(refused)} refused."
    )
    return Markup(
        '<figure id="changes-chart"><svg width="100%" height="{height}" role="img" '
        'aria-label="{label}"><line class="grid" x2="100%" y1="{middle}" y2="{middle}"/>{bars}'
        "{line}</svg><figcaption><span>{ago} ago{user}</span><span><b>{accepted}</b> accepted "
        '<span aria-hidden="true">▲</span> <b>{refused}</b> refused '
        '<span aria-hidden="true">▼</span></span><span>now</span></figcaption></figure>'
    ).format(
        height=_CHANGES_HEIGHT,
        middle=_MIDDLE,
        label=label,
        bars=bars,
        line=_balance_line(shown),
        user=""
        if shown.user is None
        else Markup(' · line: <a href="/users/{user}">user {user}</a>').format(user=shown.user),
        ago=rough(shown.seconds),
        accepted=number(accepted),
        refused=number(refused),
    )


def _balance_line(shown: Changes) -> Markup:
    """Draw a balance over the bars; 0 is at the line between them."""
    if shown.user is None or not shown.line:
        return Markup()
    highest = max(1, *(balance for _, balance in shown.line))

    def y(balance: int) -> float:
        return round(_MIDDLE - (_MIDDLE - 16) * max(balance, 0) / highest, 1)

    places = [(round(100 * share, 2), y(balance)) for share, balance in shown.line]
    ends = [*[x for x, _ in places[1:]], 100.0]
    steps = _join(
        Markup('<line class="balance" x1="{x}%" x2="{end}%" y1="{y}" y2="{y}"/>{rise}').format(
            x=x,
            end=end,
            y=high,
            rise=Markup('<line class="balance" x1="{x}%" x2="{x}%" y1="{a}" y2="{b}"/>').format(
                x=end, a=high, b=places[place + 1][1]
            )
            if place + 1 < len(places)
            else "",
        )
        for place, ((x, high), end) in enumerate(zip(places, ends, strict=True))
    )
    return Markup(
        '{steps}<text x="4" y="11">user {user}: {first}</text>'
        '<text x="100%" y="{y}" text-anchor="end">{last}</text>'
    ).format(
        steps=steps,
        user=shown.user,
        first=number(shown.line[0][1]),
        last=number(shown.line[-1][1]),
        y=max(11, min(places[-1][1] - 5, _MIDDLE - 5)),
    )


def _fill(run: dict[str, Any]) -> str:
    is_bad = outcome_sign(run["outcome"]).tone == Tone.BAD
    return Markup(' fill="url(#hatch)"') if is_bad else ""


def _seconds(run: dict[str, Any], now: float | None = None) -> float:
    ended = run["ended"] if run["ended"] is not None else now
    return max(0.0, ended - run["started"]) if ended is not None else 0.0


def _join(elements: Iterable[Markup]) -> Markup:
    return Markup().join(elements)
