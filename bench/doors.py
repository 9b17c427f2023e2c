"""The cost of the key check and the hash chain together.

Two instances of one PostgreSQL, in alternating rounds: one where each request sends a key that is
checked and each change is hashed; and one with no key and the statement without the hash.
"""

import asyncio
import os
import statistics
import sys
from typing import Final

from balance_app.local.postgres import EmbeddedPostgres
from bench.loads import Load, alternate, scaled
from bench.report import Report, ratios, spread
from bench.servers import postgres_server

REQUESTS: Final = scaled(10_000, 100)
LOADS: Final = (
    Load(f"{REQUESTS} changes of one account, 100 connections", REQUESTS, 100),
    Load(f"{REQUESTS} requests at one moment", REQUESTS, REQUESTS, balance=REQUESTS),
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
            medians = statistics.median(both) / statistics.median(neither)
            rounds = spread(ratios(both, neither), "{:.3f}")
            rows.append([what, spread(both), spread(neither), f"{medians:.3f}", rounds])
        report.table(["seconds", *KINDS.values(), "ratio of medians", "ratios of rounds"], rows)


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
