"""docs/performance.md, from the last report of each part."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench import charts
from bench.report import Report, ratios, spread

INTRODUCTION: Final = """\
# Performance

<!-- Written by `make bench`: changes belong into bench/. -->

What this service does on one machine, beside the least that HTTP costs in Python there, beside
what PostgreSQL does with the same statement, and beside the same exercise as one usually writes
it. [bench/README.md](../bench/README.md) says how to run it, and how to read it.

Figures are medians of rounds, with the lowest and highest. **Compare ratios, within a table:**
the seconds depend on the machine, and on what else it does. Where a machine is busy, wall seconds
vary more than CPU seconds do.
"""

# What each part's table and charts show, in a few sentences.
ABOUT: Final = {
    "burst": """\
The exercise's test: all connections are open, then every request is sent at one moment; the
account can pay for half of them. The floor is an ASGI callable under the same uvicorn that reads
the body and answers `{}`. `no database call` is the whole service with a constant in the place of
its statement. The peers are in [bench/peers](../bench/peers): FastAPI, Fastify and Express as one
usually writes them, without keys, holds, floors and hash chains. All servers have answered a
thousand requests before.""",
    "hot": """\
Each connection sends its next change when it has the answer to the one before. By default each
change is a transaction of its own, and waits for the flush of the one before: what pgbench
reaches with the same statement is the limit.""",
    "accounts": """\
As above; 5 instances share the connections evenly.""",
    "pool": """\
The default is 5 (`DB_POOL_SIZE`): changes of one account have two, one that works and one that
waits for the row, and three are left for others.""",
    "pythons": """\
The same service and packages by other releases of Python; the client is the same for all.""",
    "slow": """\
What a slower disk, or a synchronous standby, does to one account.""",
    "mixed": """\
Whether one account that everybody wants slows down the others.""",
    "growth": """\
Each column is a database with so much in it. A tenth of the entries belong to one account, whose
changes and pages are measured; the others have 20 each. Calls are sent one after the other, by
one client. `audit` checks every entry and every hash.""",
    "jobs": """\
(c) is light load: a job falls due every 0.2 s, and there is always an instance that runs none.
The 99th percentile is an instance that has claimed in this round already and therefore backs off
by the tie break. (d) is heartbeats and claims that find nothing. (e) is one process with 50
connections; the claims contend for the same rows. (f) is fast because an instance caches the JSON
of each job and queries changed rows only. (g) is the second statement of a heartbeat, which
writes what ten runs have said in a second; where they said nothing it is not sent.""",
    "statements": """\
(a) is what PostgreSQL takes for a page. (b) is an export, which reads 250 entries at a time, each
in a transaction of its own. In one transaction with a cursor (`snapshot`) PostgreSQL could remove
no version of a row that was changed since then, and the next change of the row passes all of
them.""",
    "doors": """\
The service with a key that is checked in each request, against the same without key and without
hashes.""",
    "chain": """\
What the hash of one entry takes, and a change with it and without. In a change, each execution of
the statement also sets up the expression that is hashed.""",
    "scaling": """\
[scaling.md](scaling.md) has the commands that this runs, and what follows from it.""",
}

Figures = dict[str, dict[str, list[float]]]


class Aim(NamedTuple):
    """A bound on a ratio or a figure, within one run."""

    title: str
    bound: float
    least: bool  # the bound is the least that is wanted, else the most
    found: Callable[[Figures], Sequence[float]]


def _over(part: str, above: str, below: str) -> Callable[[Figures], Sequence[float]]:
    return lambda figures: ratios(figures[part][above], figures[part][below])


def _rate(name: str) -> Callable[[Figures], Sequence[float]]:
    """Return changes per second as a part of the best that pgbench has made."""

    def found(figures: Figures) -> Sequence[float]:
        (number,) = figures["hot"]["requests"]
        rates = [number / wall for wall in figures["hot"][f"{name} wall"]]
        return ratios(rates, figures["hot"]["pgbench best"])

    return found


def _most(part: str, *names: str) -> Callable[[Figures], Sequence[float]]:
    """Return the highest of several figures, each by its median."""

    def found(figures: Figures) -> Sequence[float]:
        chosen = [
            statistics.median(values)
            for name, values in figures[part].items()
            if any(each in name for each in names)
        ]
        if not chosen:
            raise KeyError(names)
        return [max(chosen)]

    return found


def _at_least(title: str, bound: float, found: Callable[[Figures], Sequence[float]]) -> Aim:
    return Aim(title, bound, least=True, found=found)


def _at_most(title: str, bound: float, found: Callable[[Figures], Sequence[float]]) -> Aim:
    return Aim(title, bound, least=False, found=found)


AIMS: Final = (
    _at_most("burst: wall / the floor", 2.6, _over("burst", "service wall", "bare wall")),
    _at_least("burst: Fastify's wall / ours", 1.4, _over("burst", "fastify wall", "service wall")),
    _at_least("one account: rate / Fastify's", 1.25, _over("hot", "fastify wall", "service wall")),
    _at_least("one account: rate / pgbench's best", 0.75, _rate("service")),
    _at_least(
        "one account: rate of 5 instances / of one",
        0.9,
        _over("hot", "service wall", "service x5 wall"),
    ),
    _at_most(
        "p99 of other accounts: one is stormed / none is",
        1.5,
        _over("mixed", "service one", "service alone"),
    ),
    _at_most(
        "p99 of other accounts: one is stormed / 10 000 are",
        1.5,
        _over("mixed", "service one", "service many"),
    ),
    _at_most(
        "group commit: burst, wall / the floor", 1.6, _over("burst", "grouped wall", "bare wall")
    ),
    _at_least(
        "group commit: one account, rate / Fastify's",
        3,
        _over("hot", "fastify wall", "grouped wall"),
    ),
    _at_least("group commit: one account, rate / pgbench's best", 2, _rate("grouped")),
    _at_least(
        "group commit: slow flush, rate / the default's",
        8,
        _over("slow", "service wall", "grouped wall"),
    ),
    _at_most(
        "a change at 10 million entries / at none",
        1.15,
        _over("growth", "entries 2: a change, ms", "entries 0: a change, ms"),
    ),
    _at_most("a page of a statement, at either end, ms", 5, _most("growth", "page of a statement")),
    _at_most("memory of an instance in the burst, MB", 150, _most("burst", "service MB")),
    _at_most("memory of an idle instance, MB", 90, _most("growth", "instances 0: memory")),
    _at_most(
        "statements per second of an idle instance",
        1,
        lambda figures: figures["jobs"]["idle statements"],
    ),
)


def write(results: Path, parts: Sequence[str], docs: Path) -> None:
    """Write the page, and its pictures."""
    reports = [found for part in parts if (found := Report.load(results, part))]
    if not reports:
        return
    pictures = docs / "performance"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    sections = [INTRODUCTION, _machine(reports), _aims(reports)]
    for report in reports:
        sections.append(f"## {report.title}\n\n{ABOUT[report.part]}\n")
        sections += [_block(block, pictures) for block in report.blocks]
    (docs / "performance.md").write_text("\n".join(sections))


def _machine(reports: Sequence[Report]) -> str:
    newest = max(reports, key=lambda report: report.measured_at)
    rows = [[name, value] for name, value in newest.machine.items() if "Load" not in name]
    each = [
        [f"[{report.title}](#{_anchor(report.title)})", report.measured_at, _load(report)]
        for report in reports
    ]
    columns = ["part", "measured at", "load before (1 minute)"]
    return f"## The machine\n\n{_table(['', ''], rows)}\n{_table(columns, each)}"


def _load(report: Report) -> str:
    return report.machine["Load before"].split()[0]


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def _aims(reports: Sequence[Report]) -> str:
    figures = {report.part: report.figures for report in reports}
    rows = []
    for aim in AIMS:
        bound = f"{'≥' if aim.least else '≤'} {aim.bound}"
        try:
            values = aim.found(figures)
        except KeyError:
            rows.append([aim.title, bound, "", "not measured"])
            continue
        middle = statistics.median(values)
        met = middle >= aim.bound if aim.least else middle <= aim.bound
        rows.append([aim.title, bound, spread(values), "met" if met else "**missed**"])
    text = (
        "Ratios are medians of those within a round. What is missed, and why: "
        "[bench/README.md](../bench/README.md#what-is-missed-and-why)."
    )
    return f"## Aims\n\n{text}\n\n{_table(['', 'aim', 'found', ''], rows)}"


def _block(block: dict[str, Any], pictures: Path) -> str:
    if "text" in block:
        return f"{block['text']}\n"
    if "lines" in block:
        return "\n".join(["```", *block["lines"], "```\n"])
    if "chart" in block:
        chart = block["chart"]
        (pictures / f"{chart['name']}.svg").write_text(charts.draw(chart))
        return f"![{chart['title']}](performance/{chart['name']}.svg)\n"
    return _table(block["columns"], block["rows"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose figures stand right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
