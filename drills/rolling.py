"""Replace five instances behind a proxy one after another, under load: does a client notice?

`make drill-rolling` runs it; drills/README.md says what it shows and needs.
"""

import argparse
import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Final

from balance_app.local.postgres import SUPERUSER, EmbeddedError
from drills.program import EXIT_NOT_RUN, run_drill, working_directory
from tests.jobs.fleet import overlaps, read_event_logs
from tests.processes import RUN_ROLE, Instance, query
from tests.system import proxies
from tests.system.databases import own_postgres
from tests.system.proxies import KINDS, SETTINGS
from tests.system.releases import ROOT, NoReleaseError, oldest_compatible, unpack
from tests.system.rolling import Clients, Viewers

INSTANCES: Final = 5
CLIENTS: Final = 12
VIEWERS: Final = 6
JOBS: Final = 10
PROGRESS: Final = 100  # changes that are accepted after each replacement
FREQUENT: Final = {
    "FLEET_JOBS": str(JOBS),
    "FLEET_EVERY": "3",
    "FLEET_SECONDS": "1",
    "JOB_MIN_SECONDS": "0",
    "JOB_WARM_UP_SECONDS": "0.5",
}

REVISIONS: Final = "SELECT version_num FROM balance_app_version"
OUTCOMES: Final = "SELECT outcome, count(*) AS runs FROM job_runs GROUP BY outcome ORDER BY outcome"


@dataclass(frozen=True)
class Control:
    """A way to stop that clients have to notice."""

    signal: int = signal.SIGTERM
    settings: dict[str, str] = field(default_factory=dict)


CONTROLS: Final = {
    "killed": Control(signal.SIGKILL),
    "no-drain": Control(settings={"DRAIN_SECONDS": "0", "FLEET_MUTANTS": "abrupt-stop"}),
}


@dataclass(frozen=True)
class Row:
    """What one rolling replacement did to those who use the service."""

    proxy: str
    what: str
    clients: Clients
    viewers: Viewers
    seconds: float

    @property
    def errors(self) -> Counter[str]:
        """What was no answer of the service."""
        return self.clients.errors() + self.viewers.errors()

    def cells(self) -> list[str]:
        """Return the row of the table."""
        answers = self.clients.answers
        decided = answers["200"] + answers["409"]
        return [
            *(self.proxy, self.what, f"{self.seconds:.0f} s", str(decided)),
            *(str(answers["GET 200"]), str(self.viewers.seen["whole"])),
            *(f"{self.clients.slowest_seconds:.2f} s", str(self.errors.total())),
        ]


HEADS: Final = (
    *("proxy", "replaced", "took", "changes", "reads", "streams ended", "slowest", "errors"),
)


class Fleet:
    """Five instances on one database, of an earlier revision or of this one."""

    def __init__(
        self, database: dict[str, str], before: Path | None, logs: Path, control: Control
    ) -> None:
        self._database = database
        self._before = before
        self._control = control
        self.event_logs = logs / "events"
        self._logs = logs
        self.members: list[Instance] = []
        self.event_logs.mkdir()

    def _member(self, number: int, port: int | None, *, old: bool) -> Instance:
        source = self._before if old and self._before else ROOT
        instance = Instance(
            self._database,
            f"app{number}",
            log=self._logs / f"app{number}.log",
            program=("-P", "-m", "tests.jobs.fleet"),
            PYTHONPATH=f"{source / 'src'}:{source}",
            FLEET_EVENT_LOGS=str(self.event_logs),
            **FREQUENT,
            **{**SETTINGS, **({} if old else self._control.settings)},
            # A revision before the roles has one for everything.
            DB_USER=SUPERUSER if old else RUN_ROLE,
        )
        if port is not None:
            instance.move(port)
        return instance

    @asynccontextmanager
    async def running(self) -> AsyncIterator[list[int]]:
        """Start all; yield their ports."""
        old = self._before is not None
        self.members = [self._member(n, None, old=old) for n in range(1, INSTANCES + 1)]
        try:
            for each in self.members:
                await each.launch()
            await asyncio.gather(*(each.ready() for each in self.members))
            yield [each.port for each in self.members]
        finally:
            started = [each for each in self.members if each.process is not None]
            await asyncio.gather(*(each.stop() for each in started))

    async def replace(self, number: int) -> None:
        """Stop one, start one of this revision at its port, and wait until it is ready.

        Raises:
            AssertionError: it has not stopped by itself.
        """
        leaving = self.members[number - 1]
        code = await leaving.stop(self._control.signal)
        assert code == (0 if self._control.signal == signal.SIGTERM else -signal.SIGKILL), code
        joining = self._member(number, leaving.port, old=False)
        self.members[number - 1] = joining
        await joining.launch()
        await joining.ready()


async def roll(proxy: str, url: str, fleet: Fleet, what: str) -> Row:
    """Replace all instances, one after another, under clients and viewers."""
    began = monotonic()
    async with Clients(url, connections=CLIENTS) as clients, Viewers(url, VIEWERS) as viewers:
        await clients.progress(PROGRESS)
        for number in range(1, INSTANCES + 1):
            await fleet.replace(number)
            await clients.progress(PROGRESS)
            print(f"  {proxy}, {what}: app{number} replaced", file=sys.stderr)
    return Row(proxy, what, clients, viewers, monotonic() - began)


async def drill(proxy: str, options: argparse.Namespace, before: Path | None, logs: Path) -> bool:
    """Upgrade and restart behind one proxy; print what was seen, return whether all is well."""
    logs.mkdir()
    control = CONTROLS.get(options.control, Control())
    async with own_postgres(max_connections="200") as server:
        database = server.environment()
        fleet = Fleet(database, before, logs, control)
        rows, wrong = [], []
        async with fleet.running() as ports, proxies.running(proxy, ports) as behind:
            [schema_before] = await query(database, REVISIONS)
            for what in (*(["upgraded"] if before else []), "restarted"):
                rows.append(await roll(proxy, behind.url, fleet, what))
                if not options.control:
                    wrong += await rows[-1].clients.check()
            [schema] = await query(database, REVISIONS)
            outcomes = await query(database, OUTCOMES)
        spans = read_event_logs(fleet.event_logs)
    for row in rows:
        print("| " + " | ".join(row.cells()) + " |")
    found = overlaps(spans)
    runs = ", ".join(f"{each['runs']} {each['outcome']}" for each in outcomes)
    print(f"  {proxy}: schema {schema_before[0]} -> {schema[0]}; runs of jobs: {runs}")
    print(f"  {proxy}: jobs overlapped: {len(found)}; answers that the ledger denies: {len(wrong)}")
    for row in rows:
        for seconds, which in sorted(row.clients.slow, reverse=True)[:5]:
            print(f"  {proxy}, {row.what}: {seconds:.2f} s for {which} after the start")
        for kind, number in row.errors.most_common(8):
            print(f"  {proxy}, {row.what}: {number} x {kind[:200]}")
    for each in wrong[:5]:
        print(f"  {proxy}: {each}")
    return not (found or wrong or any(row.errors for row in rows))


async def _main(options: argparse.Namespace) -> bool:
    with working_directory() as top:
        before = None
        if not options.control:
            commit = options.since or oldest_compatible()
            (source := top / "before").mkdir()
            before = unpack(commit, source)
            print(f"Upgrades begin with commit {commit}.")
        print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
        kept = [
            await drill(proxy, options, before, Path(options.keep or top) / proxy)
            for proxy in options.proxies
        ]
    return all(kept)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make drill-rolling", description=__doc__)
    parser.add_argument("--proxies", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--from",
        dest="since",
        metavar="COMMIT",
        help="upgrade from this revision (default: the oldest that works on this schema)",
    )
    parser.add_argument(
        "--control", choices=CONTROLS, help="stop in a way that clients have to notice"
    )
    parser.add_argument("--keep", metavar="DIR", help="keep the logs in this directory")
    return parser.parse_args()


def main() -> int:
    """Run the drill; return the exit code."""
    options = _options()
    missing = [kind for kind in options.proxies if proxies.program(kind) is None]
    if missing:
        print(f"Not installed: {', '.join(missing)}.", file=sys.stderr)
        return EXIT_NOT_RUN
    return run_drill(_main(options), not_run=(NoReleaseError, EmbeddedError))


if __name__ == "__main__":
    sys.exit(main())
