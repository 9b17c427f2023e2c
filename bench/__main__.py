"""Measure the parts that are named, or all, and write docs/performance.md: `make bench`.

`python -m bench burst hot` measures two parts; `python -m bench page` only writes the page, from
the last results of each part, which are kept in `bench/results`.
"""

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from bench import chain, doors, growth, jobs, loads, page, scaling, statements
from bench.machine import facts
from bench.report import Report

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "bench" / "results"
DOCS: Final = ROOT / "docs"
Part = Callable[[Report], Awaitable[None]]
# Each part's title on the page, and what measures it, in the order of the page.
PARTS: Final[dict[str, tuple[str, Part]]] = {
    "burst": ("The burst", loads.burst),
    "hot": ("One account, without a pause", loads.hot),
    "accounts": ("More connections, more accounts, refusals", loads.accounts),
    "pool": ("How many connections an instance has", loads.pool),
    "pythons": ("Newer Pythons", loads.pythons),
    "slow": ("One account, when a flush is slow", loads.slow_flush),
    "mixed": ("Other accounts, while one is stormed", loads.mixed),
    "growth": ("Growth", growth.measure),
    "jobs": ("Jobs", jobs.measure),
    "statements": ("Statements of an account with many entries", statements.measure),
    "doors": ("Key check and hash chain", doors.measure),
    "chain": ("The hash chain", chain.measure),
    "scaling": ("Past one server", scaling.measure),
}

# What needs more than this checkout, and is measured only where it is named.
ON_REQUEST: Final = {"pythons"}


async def main(names: list[str]) -> None:
    """Measure parts, keep their results, and write the page."""
    if unknown := set(names) - {*PARTS, "page"}:
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}. Parts: {', '.join(PARTS)}, page")
    for name, (title, measure) in PARTS.items():
        if name not in names and (names or name in ON_REQUEST):
            continue
        with tempfile.TemporaryDirectory() as directory:
            report = Report(name, title, facts(Path(directory)))
        print(f"\n== {title}", flush=True)
        await measure(report)
        report.save(RESULTS)
    page.write(RESULTS, [*PARTS], DOCS)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
