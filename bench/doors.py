"""The cost of the key check and the hash chain together.

Two instances of one PostgreSQL, in alternating turns: one where each request sends a key that is
checked and each change is hashed; and one with no key and the statement without the hash.
"""

import asyncio
import math
import os
import statistics
import sys
from typing import Final

from balance_app.local.postgres import EmbeddedPostgres
from bench.loads import Load, alternate, scaled
from bench.report import Report, ratios, spread
from bench.servers import postgres_server

TURN: Final = scaled(1000, 100)
BURST: Final = scaled(10_000, 100)
LOADS: Final = (
    Load(f"10 turns of {TURN} changes of one account, 100 connections", TURN, 100, turns=10),
    Load(f"2 turns of {BURST} requests at one moment", BURST, BURST, balance=BURST, turns=2),
)
KINDS: Final = {"service": "key and chain", "unchained": "neither"}


async def measure(report: Report) -> None:
    """Measure both loads."""
    async with postgres_server() as postgres:
        key = await make_key(postgres)
        found = await alternate([*KINDS], postgres, *LOADS, keys={"service": key})
    for load, each in zip(LOADS, found, strict=True):
        report.text(f"**{load.title}**")
        rows = []
        for what in ("wall", "server", "postgres"):
            values = {name: [getattr(shot, what) for shot in each[name]] for name in KINDS}
            both, neither = values.values()
            rounds = ratios(both, neither)
            # that of the ratios themselves is raised by their spread
            logs = [math.log(each) for each in rounds]
            error = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
            mean = f"{statistics.geometric_mean(rounds):.3f} ± {error:.3f}"
            rows.append([what, spread(both), spread(neither), spread(rounds, "{:.3f}"), mean])
        mean_title = "their geometric mean and its standard error"
        head = ("seconds", *KINDS.values(), "ratios of rounds", mean_title)
        report.table(head, rows)


async def make_key(postgres: EmbeddedPostgres) -> str:
    """Make the first key of the service's database."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", "keys", "create", "bench"),
        *("--scope", "change", "--scope", "open"),
        env={**os.environ, **postgres.environment(), "DB_NAME": "service"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await process.communicate()
    return out.decode().strip()
