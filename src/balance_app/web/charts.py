"""Charts of runs and of balances, in SVG without inline styles."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from markupsafe import Markup

from balance_app.formatting import duration
from balance_app.states import Tone, outcome_predicate, outcome_sign
from balance_app.web.queries import Runs
from balance_app.web.view_models import clock_time, exact, number

SPARK_RUNS: Final = 20
LANE_SECONDS: Final = 1800.0
_STEP: Final = 5  # pixels of a bar and its gap
_HEIGHT: Final = 18
_LEAST_PERCENT: Final = 0.35  # of a lane: what is shorter could not be seen
_LABEL_PERCENT: Final = 3.2  # what is shorter has no room for its server's name


def spark(runs: Runs) -> Markup:
    """Draw the last runs of a job as bars: the height is the duration, the class the outcome.

    `runs` are the oldest first; a run under way has no bar. Failures have the full height.
    """
    ended = [run for run in runs if run["outcome"] is not None][-SPARK_RUNS:]
    if not ended:
        return Markup('<span class="none">no runs yet</span>')
    longest = max(_seconds(run) for run in ended) or 1.0
    bars: dict[str, list[str]] = {}
    for place, run in enumerate(ended, start=SPARK_RUNS - len(ended)):
        tone = outcome_sign(run["outcome"]).tone
        height = _HEIGHT if tone == Tone.BAD else max(2, round(_HEIGHT * _seconds(run) / longest))
        bars.setdefault(tone, []).append(f"M{place * _STEP + 2} {_HEIGHT}v-{height}")
    counts = Counter(outcome_sign(run["outcome"]).label for run in ended)
    ends = ", ".join(f"{number} {word}" for word, number in counts.items())
    label = f"Last {len(ended)} runs: {ends}; the longest took {duration(longest)}."
    return Markup(
        '<svg class="spark" width="{width}" height="{height}" role="img" aria-label="{label}">'
        "<title>{label}</title>{paths}</svg>"
    ).format(
        width=SPARK_RUNS * _STEP,
        height=_HEIGHT,
        label=label,
        paths=_join(
            Markup('<path class="{}" d="{}"/>').format(tone, "".join(commands))
            for tone, commands in bars.items()
        ),
    )


def in_lane(run: dict[str, Any], now: float) -> bool:
    """Say whether a run is shown in its job's lane."""
    return run["ended"] is None or run["ended"] > now - LANE_SECONDS


def lane(runs: Runs, origin: float) -> Markup:
    """Draw the runs of a job in its lane.

    Bars have fixed places, in percent of a lane from `origin`. With time all of them move together
    (`data-shift`), and the bar of a run under way grows (`data-from`).
    """
    return Markup(
        '<svg class="lane" width="100%" height="24"><svg data-shift="">{}</svg></svg>'
    ).format(_join(_bar(run, origin) for run in runs))


def _bar(run: dict[str, Any], origin: float) -> Markup:
    start = percent(run["started"] - origin)
    outcome = outcome_sign(run["outcome"])
    width = 0.0
    if run["ended"] is None:
        size = Markup('data-from="{}"').format(start)
    else:
        width = max(_LEAST_PERCENT, percent(run["ended"] - run["started"]))
        size = Markup('width="{}%"').format(round(width, 2))
    text = ""
    if run["ended"] is None or width >= _LABEL_PERCENT:
        text = Markup('<text x="5" y="14">{}</text>').format(run["server"])
    return Markup(
        '<a href="/jobs/{job}#run-{id}" aria-label="{label}"><title>{label}</title>'
        '<svg x="{start}%" y="2" height="20" {size} class="bar {tone}">'
        '<rect width="100%" height="20" rx="3"{fill}/>{text}</svg></a>'
    ).format(
        job=run["job"],
        id=run["id"],
        label=sentence(run),
        start=start,
        size=size,
        tone=outcome.tone,
        fill=_fill(run),
        text=text,
    )


def percent(seconds: float) -> float:
    """Return so many seconds in percent of a lane."""
    return round(100 * seconds / LANE_SECONDS, 2)


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
        return Markup('<p class="none">It has not run yet.</p>')
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
        '<figure class="durations"><svg width="100%" height="96" role="img" aria-label="{label}">'
        "{bars}</svg><figcaption><span>{first}</span><span>{label}</span><span>{last}</span>"
        "</figcaption></figure>"
    ).format(
        label=label, bars=bars, first=exact(runs[0]["started"]), last=exact(runs[-1]["started"])
    )


def balances(points: Sequence[tuple[float, int]]) -> Markup:
    """Draw a balance by its changes (moments since 1970 and balances), the oldest first.

    Each balance lasts until the next one.
    """
    if len(points) < 2:  # noqa: PLR2004 - a line has two ends
        return Markup('<p class="none">It has not changed yet.</p>')
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


def _fill(run: dict[str, Any]) -> str:
    is_bad = outcome_sign(run["outcome"]).tone == Tone.BAD
    return Markup(' fill="url(#hatch)"') if is_bad else ""


def _seconds(run: dict[str, Any], now: float | None = None) -> float:
    ended = run["ended"] if run["ended"] is not None else now
    return max(0.0, ended - run["started"]) if ended is not None else 0.0


def _join(elements: Iterable[Markup]) -> Markup:
    return Markup().join(elements)
