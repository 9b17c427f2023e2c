"""That everything in bench/ still runs, with next to nothing to do; no time is looked at."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from balance_app.local.postgres import EmbeddedPostgres
from bench import charts, page
from bench.fire import Volley
from bench.loads import CONSTANT, Load, shoot
from bench.report import Report
from bench.servers import ARMS, postgres_server, running, skipped
from tests.processes import query

ROOT = Path(__file__).parents[2]
REQUESTS = 20
PARTS = {"slow": 0, "pool": 0, "growth": 3, "doors": 0, "chain": 0}  # and their pictures


@pytest.fixture(scope="module")
async def postgres() -> AsyncIterator[EmbeddedPostgres]:
    async with postgres_server() as server:
        yield server


@pytest.mark.parametrize("name", ARMS)
async def test_each_arm_answers(postgres: EmbeddedPostgres, name: str) -> None:
    """Each program accepts what an account can pay, and refuses the rest."""
    if (reason := skipped(name)) is not None:
        pytest.skip(reason)
    load = Load("some", REQUESTS, 10, balance=REQUESTS)
    async with running(name, postgres) as server:
        shot = await shoot(server, postgres, load, constant=name in CONSTANT)
        assert len(shot.fired["latencies"]) == REQUESTS
        assert len(server.urls) == ARMS[name].instances
        if name in CONSTANT:
            return
        entries = "entries WHERE user_id = (SELECT max(id) FROM users)"
        rows = await query(server.database, f"SELECT amount, balance FROM {entries}")  # noqa: S608
        ledger = name != "fastify, no ledger"
        assert len(rows) == 1 + ledger * REQUESTS // 2
        assert min(row["balance"] for row in rows) == (0 if ledger else REQUESTS)


async def test_wrong_answers_end_a_measurement(postgres: EmbeddedPostgres) -> None:
    """A server that accepts what an account can't pay is not measured."""
    load = Load("some", REQUESTS, 10, balance=REQUESTS)
    async with running("bare", postgres) as server:
        with pytest.raises(AssertionError):
            await shoot(server, postgres, load, constant=False)


async def test_a_steady_rate(postgres: EmbeddedPostgres) -> None:
    """Requests are sent when they are due, not before."""
    async with running("bare", postgres) as server:
        fired = await server.fire(Volley(server.urls, 1, 10, REQUESTS, 2, rate=100))
    assert fired["got"] == {"200": REQUESTS}
    assert fired["wall"] >= (REQUESTS - 1) / 100


@pytest.mark.parametrize(("part", "pictures"), PARTS.items())
async def test_a_part_makes_the_page(tmp_path: Path, part: str, pictures: int) -> None:
    """A part runs by name; the page has its pictures, and says what is not measured."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, part),
        cwd=ROOT,
        env={
            **os.environ,
            "BENCH_SCALE": "0.001",
            "ROUNDS": "1",
            "RESULTS": str(tmp_path),
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    report = Report.load(tmp_path, part)
    assert report is not None
    text = (tmp_path / "performance.md").read_text()
    assert "not measured" in text
    assert f"## {report.title}" in text
    found = re.findall(r"\]\((performance/[a-z-]+\.svg)\)", text)
    assert len(found) == pictures
    for picture in found:
        ET.parse(tmp_path / picture)  # noqa: S314 - our own


# Some of the states that grow: each starts an instance.
PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from bench import __main__ as bench, growth
bench.RESULTS = bench.DOCS = Path(os.environ["RESULTS"])
states = growth.states()
chosen = [states[0], states[2], next(s for s in states if s.dimension == "instances"), states[-1]]
growth.states = lambda: chosen
asyncio.run(bench.main(sys.argv[1:]))
"""


def test_aims_are_met_or_missed(tmp_path: Path) -> None:
    """An aim is compared by the median of ratios within a round."""
    report = Report("burst", "The burst", {"Load before": "0.1 (1 minute)"})
    report.add("service wall", 5.0, 2.5, 2.0)
    report.add("bare wall", 1.0, 1.0, 1.0)
    report.add("fastify wall", 5.0, 2.5, 2.0)
    report.save(tmp_path)
    page.write(tmp_path, ["burst", "hot"], tmp_path)
    lines = (tmp_path / "performance.md").read_text().splitlines()
    assert "| burst: wall / the floor | ≤ 2.6 | 2.50 (2 to 5) | met |" in lines
    assert "| burst: Fastify's wall / ours | ≥ 1.4 | 1.00 (1 to 1) | **missed** |" in lines


def test_a_chart_is_readable_on_dark_pages() -> None:
    """A chart has colors of its own for both, and escapes what it is given."""
    series = [{"name": "a < b", "points": [[0, 0], [1, 12345]]}]
    svg = charts.draw(
        {"kind": "lines", "name": "n", "title": "A & B", "x": "s", "y": "n", "series": series}
    )
    assert "prefers-color-scheme:dark" in svg
    assert "a &lt; b" in svg
    ET.fromstring(svg)  # noqa: S314 - our own


def test_the_lock_file_names_no_package_host() -> None:
    """The packages of the peers are pinned by version and hash alone."""
    lock = json.loads((ROOT / "bench" / "peers" / "package-lock.json").read_text())
    packages = {name: each for name, each in lock["packages"].items() if name}
    assert packages
    for name, each in packages.items():
        assert "resolved" not in each, name
        assert each["integrity"].startswith("sha512-"), name
