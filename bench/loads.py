"""Changes over HTTP under several loads, by alternating arms: the service, the floor, the peers.

In each round every arm is started anew (some processes are faster than others for as long as they
live), warmed up, and measured in random order. Ratios are taken within a round.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from balance_app.local.postgres import EmbeddedPostgres
from balance_app.settings import Settings
from bench.fire import Volley
from bench.report import Report, percentile, ratios, spread
from bench.servers import (
    ARMS,
    PLENTY,
    POOL_SIZES,
    PYTHONS,
    Server,
    cpu_of_tree,
    pgbench,
    postgres_server,
    running_all,
    skipped,
)

ROUNDS: Final = int(os.environ.get("ROUNDS", "5"))
# All counts of requests and rows are multiplied by this: the tests measure next to nothing.
SCALE: Final = float(os.environ.get("BENCH_SCALE", "1"))
SERVICES: Final = ("service", "service x5", "grouped", "grouped x5")
PEERS: Final = ("fastify", "fastify, no ledger", "fastapi", "express")
CONSTANT: Final = ("constant", "bare")  # they accept everything
OVERLOAD: Final = "503"
MOST_OVERLOADS: Final = 3
WARM_UP: Final = 1000
BUCKETS: Final = 40


def scaled(number: int, least: int = 20) -> int:
    """Return a count of this run, a multiple of what the connections share."""
    return max(least, int(number * SCALE) // least * least)


class Load(NamedTuple):
    """Requests of 2 each, by connections that are kept, to accounts that can pay for some."""

    title: str
    requests: int
    connections: int
    accounts: int = 1
    balance: int = PLENTY
    # In how many turns a round sends it: many short ones show a difference that is smaller than
    # what the machine's speed changes by from one second to the next.
    turns: int = 1

    def volley(self, urls: list[str], first: int) -> Volley:
        """Return what is sent for accounts from this one on."""
        connections = min(self.connections, self.requests)
        return Volley(urls, first, self.accounts, self.requests, connections)


class Shot(NamedTuple):
    """What one round took: seconds, and the most memory of one process."""

    wall: float
    server: float
    postgres: float
    client: float
    megabytes: float
    fired: dict[str, Any]
    overloads: int  # how often it was measured once more, as it had answered 503


async def shoot(server: Server, postgres: EmbeddedPostgres, load: Load, *, constant: bool) -> Shot:
    """Send a load for new accounts; wrong answers end the measurement.

    On a machine that is busy with other work the service may say that it is overloaded: that is no
    wrong answer, but it is less work, and so it is measured again.
    """
    overloads = 0
    while True:
        first = 1 if constant else await server.open(load.balance, load.accounts)
        before = server.cpu_seconds(), cpu_of_tree(postgres.process.pid)
        fired = await server.fire(load.volley(server.urls, first))
        used = server.cpu_seconds() - before[0], cpu_of_tree(postgres.process.pid) - before[1]
        if not fired["got"].get(OVERLOAD) or overloads == MOST_OVERLOADS:
            break
        overloads += 1
        print(f"    once more, as it was overloaded: {fired['got']}", flush=True)
    accepted = load.requests if constant else min(load.requests, load.accounts * load.balance // 2)
    right = {"200": accepted, "409": load.requests - accepted}
    assert fired["got"] == {status: n for status, n in right.items() if n}, fired["got"]
    seconds = fired["wall"], *used, fired["cpu"]
    return Shot(*seconds, server.peak_megabytes(), fired, overloads)


Shots = dict[str, list[Shot]]


def present(report: Report, names: Sequence[str]) -> list[str]:
    """Return which arms can be measured; say why the others can't."""
    found = []
    for name in names:
        if (reason := skipped(name)) is None:
            found.append(name)
        else:
            report.text(f"Not measured: {ARMS[name].title}, as {reason}.")
    return found


@asynccontextmanager
async def warmed_up(
    names: Sequence[str], postgres: EmbeddedPostgres, *, keys: Mapping[str, str] | None = None
) -> AsyncIterator[dict[str, Server]]:
    """Run arms, each of which has answered some requests; to some a key is sent."""
    load = Load("warm-up", scaled(WARM_UP), 20)
    async with running_all(names, postgres) as servers:
        for name, server in servers.items():
            server.key = (keys or {}).get(name)
            await shoot(server, postgres, load, constant=name in CONSTANT)
        yield servers


async def alternate(
    names: Sequence[str],
    postgres: EmbeddedPostgres,
    *loads: Load,
    keys: Mapping[str, str] | None = None,
) -> list[Shots]:
    """Measure arms in alternating rounds, under each of the loads; to some a key is sent."""
    found: list[Shots] = [{name: [] for name in names} for _ in loads]
    for _ in range(ROUNDS):
        async with warmed_up(names, postgres, keys=keys) as servers:
            for load, shots in zip(loads, found, strict=True):
                turns: Shots = {name: [] for name in names}
                for _ in range(load.turns):
                    for name in random.sample([*servers], len(servers)):
                        shot = await shoot(servers[name], postgres, load, constant=name in CONSTANT)
                        turns[name].append(shot)
                for name, each in turns.items():
                    shots[name].append(_sum(each))
                    print(f"    {name}: {shots[name][-1].wall:.2f} s", flush=True)
    return found


def _sum(turns: Sequence[Shot]) -> Shot:
    """Return what the turns of a round took together; its answers are those of the last one."""
    wall, server, postgres, client = (
        sum(column) for column in zip(*[t[:4] for t in turns], strict=True)
    )
    megabytes = max(turn.megabytes for turn in turns)
    overloads = sum(turn.overloads for turn in turns)
    return Shot(wall, server, postgres, client, megabytes, turns[-1].fired, overloads)


def tabulate(report: Report, shots: Shots, load: Load, floor: str, prefix: str) -> None:
    """Add a table of what each arm took, and keep its figures under a prefix."""
    rows = []
    for name, each in shots.items():
        walls = [shot.wall for shot in each]
        cpu = [shot.server + shot.postgres for shot in each]
        report.add(f"{prefix}{name} wall", *walls)
        report.add(f"{prefix}{name} cpu", *cpu)
        report.add(f"{prefix}{name} MB", *(shot.megabytes for shot in each))
        to_floor = ratios(walls, [shot.wall for shot in shots[floor]])
        rows.append(
            [
                ARMS[name].title,
                spread(walls),
                spread([load.requests / wall for wall in walls], "{:.0f}"),
                *(
                    spread([getattr(shot, what) for shot in each])
                    for what in ("server", "postgres", "client")
                ),
                spread(to_floor),
                f"{max(shot.megabytes for shot in each):.0f}",
            ]
        )
    report.text(f"**{load.title}**")
    head = ("wall, s", "requests/s", "server CPU, s", "PostgreSQL CPU, s", "client CPU, s")
    against = "wall / the floor" if floor == "bare" else f"wall / {ARMS[floor].title}"
    report.table(["", *head, against, "most memory, MB"], rows)
    overloads = {ARMS[name].title: sum(s.overloads for s in each) for name, each in shots.items()}
    if any(overloads.values()):
        said = ", ".join(f"{title} {number} times" for title, number in overloads.items() if number)
        report.text(f"Measured once more, as requests were answered with 503 (overload): {said}.")


async def burst(report: Report) -> None:
    """10 000 requests at one moment, half of which the account can pay."""
    number = scaled(10_000)
    load = Load(
        f"{number} requests at one moment, {number} connections, one account", number, number
    )._replace(balance=number)
    async with postgres_server() as postgres:
        names = present(report, (*SERVICES, "constant", "bare", *PEERS))
        (shots,) = await alternate(names, postgres, load)
    tabulate(report, shots, load, "bare", "")
    latencies = []
    rates = []
    for name, each in shots.items():
        middle = _middle(each)
        taken = sorted(middle["latencies"])
        points = [
            [taken[min(len(taken) - 1, len(taken) * share // 100)], share] for share in range(101)
        ]
        latencies.append({"name": ARMS[name].title, "points": points})
        if name not in CONSTANT:  # beside them nothing else could be told apart
            rates.append({"name": ARMS[name].title, "points": _rate(middle["answered"])})
    _over_time(
        report,
        "burst-latency",
        f"The burst: how many of {number} answers are there after so many seconds",
        "% answered",
        latencies,
    )
    speed = "answers per second"
    _over_time(report, "burst-rate", "The burst: answers per second over time", speed, rates)
    middle = _middle(shots["service"])
    outcomes = [
        {"name": kind, "points": _rate(_answered(middle, status), max(middle["answered"]))}
        for status, kind in (("200", "accepted"), ("409", "refused"))
    ]
    title = "The burst at one instance: accepted, then refused"
    _over_time(report, "burst-outcomes", title, speed, outcomes)


def _middle(shots: Sequence[Shot]) -> dict[str, Any]:
    """Return what was fired in the round of the median time."""
    return sorted(shots, key=lambda shot: shot.wall)[len(shots) // 2].fired


def _answered(fired: dict[str, Any], status: str) -> list[float]:
    both = zip(fired["answered"], fired["statuses"], strict=True)
    return [at for at, found in both if found == status]


def _over_time(report: Report, name: str, title: str, y: str, series: list[Any]) -> None:
    x = "seconds since the release of all requests"
    report.chart(kind="lines", name=name, title=title, x=x, y=y, series=series)


def _rate(answered: list[float], until: float | None = None) -> list[list[float]]:
    """Return the rate of answers in equal slices of time, as points in their middles."""
    width = (until or max(answered)) / BUCKETS
    counts = [0] * BUCKETS
    for at in answered:
        counts[min(BUCKETS - 1, int(at / width))] += 1
    return [[(number + 0.5) * width, count / width] for number, count in enumerate(counts)]


async def hot(report: Report) -> None:
    """One account that can pay, from 100 kept connections; beside it pgbench, the upper limit."""
    number = scaled(10_000, 100)
    load = Load(f"{number} changes of one account, 100 connections", number, 100)
    rates: dict[str, list[float]] = {}
    async with postgres_server() as postgres:
        names = present(report, (*SERVICES, "bare", *PEERS))
        shots: Shots = {name: [] for name in names}
        for _ in range(ROUNDS):
            async with warmed_up(names, postgres) as servers:
                steps: list[str | int] = [*servers, 1, 2, 4, 100]
                for step in random.sample(steps, len(steps)):
                    if isinstance(step, str):
                        constant = step in CONSTANT
                        shot = await shoot(servers[step], postgres, load, constant=constant)
                        shots[step].append(shot)
                        continue
                    user = await servers["service"].open(PLENTY)
                    place = postgres.socket_directory
                    rate = await pgbench(place, step, user, database="service")
                    rates.setdefault(f"pgbench {step}", []).append(rate)
    tabulate(report, shots, load, "bare", "")
    report.text("The statement of a change alone, by pgbench on the same server:")
    report.table(
        ["clients of pgbench", "changes/s"],
        [[name.split()[1], spread(values, "{:.0f}")] for name, values in sorted(rates.items())],
    )
    best = [max(values) for values in zip(*rates.values(), strict=True)]
    report.add("pgbench best", *best)
    report.add("requests", number)


async def accounts(report: Report) -> None:
    """Other shapes of load on the service and on Fastify: connections, accounts, refusals."""
    number = scaled(10_000, 1000 if SCALE >= 1 else 20)
    loads = {
        "1000 connections": Load(
            f"{number} changes of one account, 1000 connections", number, 1000
        ),
        "many": Load(f"{number} changes of 10 000 accounts, 100 connections", number, 100, 10_000),
        "many 1000": Load(
            f"{number} changes of 10 000 accounts, 1000 connections", number, 1000, 10_000
        ),
        "refused": Load(
            f"{number} refusals of one empty account, 100 connections", number, 100, 1, 0
        ),
    }
    async with postgres_server() as postgres:
        names = present(report, (*SERVICES, "fastify", "bare"))
        found = await alternate(names, postgres, *loads.values())
    for (kind, load), shots in zip(loads.items(), found, strict=True):
        tabulate(report, shots, load, "bare", f"{kind}: ")


async def pool(report: Report) -> None:
    """How many connections an instance has to PostgreSQL."""
    default = Settings.model_fields["db_pool_size"].default
    names = [f"pool of {size}" for size in POOL_SIZES]
    await _under_three_loads(report, names, f"pool of {default}")


async def pythons(report: Report) -> None:
    """The service by this Python, and by those of BENCH_PYTHONS."""
    names = [f"python {version}" for version in PYTHONS]
    await _under_three_loads(report, names, names[0])


async def _under_three_loads(report: Report, names: Sequence[str], floor: str) -> None:
    number = scaled(10_000, 100)
    loads = {
        "one": Load(f"{number} changes of one account, 100 connections", number, 100),
        "many": Load(f"{number} changes of 10 000 accounts, 100 connections", number, 100, 10_000),
        "burst": Load(f"{number} requests at one moment", number, number, balance=number),
    }
    async with postgres_server() as postgres:
        found = await alternate(names, postgres, *loads.values())
    for (kind, load), shots in zip(loads.items(), found, strict=True):
        tabulate(report, shots, load, floor, f"{kind}: ")


async def slow_flush(report: Report) -> None:
    """Each flush takes 1 ms more, as a disk or a synchronous standby may."""
    number = scaled(3000, 100)
    load = Load(f"{number} changes of one account, 100 connections, slow flush", number, 100)
    async with postgres_server(commit_delay="1000", commit_siblings="0") as postgres:
        names = present(report, ("service", "grouped", "fastify"))
        (shots,) = await alternate(names, postgres, load)
    report.text("PostgreSQL runs with `commit_delay` 1000 µs and `commit_siblings` 0.")
    tabulate(report, shots, load, "service", "")


async def mixed(report: Report) -> None:
    """Other accounts at a steady rate, while one account is stormed, or as many are, or none."""
    rate, seconds = 200, max(2, int(10 * min(1, SCALE)))
    storms = {"nothing else": 0, "a storm of 10 000 accounts": 10_000, "a storm of one account": 1}
    took: dict[tuple[str, str], list[float]] = {}
    async with postgres_server() as postgres:
        names = present(report, ("service", "grouped"))
        for _ in range(ROUNDS):
            async with warmed_up(names, postgres) as servers:
                for name in random.sample(names, len(names)):
                    for kind, many in random.sample([*storms.items()], len(storms)):
                        times = await _beside(servers[name], rate, seconds, many)
                        took.setdefault((name, kind), []).append(percentile(times, 99) * 1000)
    report.text(
        f"{rate} changes a second of 1000 other accounts, by 20 connections: the 99th percentile "
        "of their latency, in ms, counted from when each was due. The storm is 100 connections "
        "that send without a pause; it takes processor time from all, whichever accounts it is for."
    )
    rows = []
    for name in names:
        alone, spread_out, one = (took[name, kind] for kind in storms)
        report.add(f"{name} alone", *alone)
        report.add(f"{name} many", *spread_out)
        report.add(f"{name} one", *one)
        rows.append(
            [
                ARMS[name].title,
                *(spread(each, "{:.1f}") for each in (alone, spread_out, one)),
                spread(ratios(one, alone)),
                spread(ratios(one, spread_out)),
            ]
        )
    report.table(["", *storms, "one / nothing", "one / 10 000"], rows)


async def _beside(server: Server, rate: int, seconds: int, many: int) -> list[float]:
    """Return latencies of other accounts while so many accounts are stormed."""
    others = await server.open(PLENTY, 1000)
    steady = asyncio.create_task(
        server.fire(Volley(server.urls, others, 1000, rate * seconds, 20, rate=rate))
    )
    await asyncio.sleep(0.5)  # the client has to start
    storm = []
    if many:
        first = await server.open(PLENTY, many)
        while not steady.done():
            storm.append(await server.fire(Volley(server.urls, first, many, 2000, 100)))
    fired = await steady
    assert all(each["got"].keys() == {"200"} for each in (fired, *storm)), fired["got"]
    latencies: list[float] = fired["latencies"]
    return latencies
