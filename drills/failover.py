"""Fail over PostgreSQL again and again, under load and with jobs running: is anything lost?

`make drill-failover` runs it; drills/README.md says what it shows and needs.
"""

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from secrets import token_hex
from statistics import median
from time import monotonic
from typing import Final

import httpx
from typing_extensions import override

from drills.patroni import Cluster, ClusterError, Node, Timing, newest_postgres, require_programs
from drills.program import run_drill, working_directory
from tests.history import Accepted, Entry, Ledger, State, check
from tests.jobs.fleet import overlaps, read_event_logs
from tests.processes import RUN_ROLE, Instance, running
from tests.system.client import Load, open_account

INSTANCES: Final = 5
ACCOUNTS: Final = 4
CONNECTIONS: Final = 4  # of each account's clients
PAUSE_SECONDS: Final = 0.03  # between two changes of one connection: two cores serve all of this
OPENING_BALANCE: Final = 10_000
PROGRESS: Final = 100  # changes that are accepted before and after each failover
ANSWER_SECONDS: Final = 5.0
OWNER: Final = "balance_owner"
DATABASE: Final = "balances"
LEAST_TTL: Final = 5
JOBS: Final = {
    "JOBS_MODULES": "balance_app.maintenance,drills.jobs",
    "JOB_MIN_SECONDS": "2",
    "FLEET_JOBS": "10",
    "FLEET_KIND": "paced,thread,thread-writes",
    "FLEET_EVERY": "4",
    "FLEET_SECONDS": "2",
}

ENTRIES: Final = """
SELECT version, amount, balance, key FROM entries WHERE user_id = $1 ORDER BY version
"""
ACCOUNT: Final = "SELECT version, balance FROM users WHERE id = $1"
# The next run of a job starts when the one before has ended, or its lease has.
HISTORY: Final = """
SELECT outcome, count(*) AS runs, count(*) FILTER (WHERE started_at < earlier_end) AS overlapping
FROM (
    SELECT outcome, started_at, max(coalesce(ended_at, 'infinity')) OVER (
        PARTITION BY job ORDER BY fence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ) AS earlier_end
    FROM job_runs WHERE fence IS NOT NULL
) AS runs
GROUP BY outcome ORDER BY outcome
"""


class PacedLoad(Load):
    """Clients that pause after each change; requests without an answer in time are counted."""

    late = 0

    @property
    def user_id(self) -> int:
        """The account that they change."""
        return self._user_id

    @override
    async def act(self) -> None:
        await super().act()
        await asyncio.sleep(PAUSE_SECONDS)

    @override
    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, int | None] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[float, httpx.Response | httpx.TransportError, float]:
        sent, answer, answered = await super().request(method, path, body=body, headers=headers)
        self.late += answered - sent > ANSWER_SECONDS
        return sent, answer, answered


@dataclass(frozen=True, slots=True)
class Failover:
    """One failover: its kind, when (monotonic) it began, and when all nodes were back."""

    kind: str
    began: float
    ended: float

    def pause(self, accepted: Sequence[float]) -> float:
        """Return the longest time in it without an accepted write, of which the times are given."""
        inside = [self.began, *(each for each in accepted if self.began <= each <= self.ended)]
        return max(after - before for before, after in pairwise([*inside, self.ended]))


class Drill:
    """The nodes, the instances on them, and their clients."""

    def __init__(self, cluster: Cluster, loads: Sequence[PacedLoad]) -> None:
        self.cluster = cluster
        self.loads = loads
        self.failovers: list[Failover] = []
        self._cuts = cycle((False, True))

    async def fail_over(self, kind: str) -> None:
        """Fail over once, and wait until all nodes are back and changes are accepted."""
        leader = await self.cluster.healthy()
        await self.progress()
        began = monotonic()
        how = await KINDS[kind](self, leader)
        new = await self.cluster.healthy()
        failover = Failover(kind, began, monotonic())
        self.failovers.append(failover)
        await self.progress()
        print(
            f"{len(self.failovers):>3}  {leader.name} {how}, {new.name} leads: "
            f"{failover.pause(self.accepted()):.1f} s without an accepted write; "
            f"all nodes back after {failover.ended - began:.1f} s",
            flush=True,
        )

    async def kill(self, leader: Node) -> str:
        """Kill the leader; start it again when another one serves."""
        await leader.kill()
        await self._another_serves(leader)
        await leader.start()
        return "killed"

    async def freeze(self, leader: Node) -> str:
        """Freeze the leader until its key has expired and another one serves."""
        leader.freeze()
        try:
            await self._another_serves(leader)
        finally:
            leader.thaw()
        return "frozen"

    async def switch_over(self, leader: Node) -> str:
        """Let a standby take over from a leader that lives."""
        await self.cluster.switch_over(leader)
        await self._another_serves(leader)
        return "switched over"

    async def cut_off(self, leader: Node) -> str:
        """Cut the leader off from etcd and its standbys; every second time from clients, too."""
        from_clients = next(self._cuts)
        leader.cut_off(from_clients=from_clients)
        try:
            await self._another_serves(leader)
        finally:
            leader.heal()
        return "cut off from all" if from_clients else "cut off, but not from clients"

    async def lose(self, leader: Node) -> str:
        """Kill a leader whose standbys lack what it has acknowledged: the control."""
        leader.postgres.freeze()
        await self.progress()
        await leader.kill()
        leader.postgres.cut()
        leader.postgres.heal()
        await self._another_serves(leader)
        await leader.start()
        return "killed with changes that no standby has"

    async def progress(self) -> None:
        """Wait until more changes of every account are accepted."""
        await asyncio.gather(*(load.progress(PROGRESS // ACCOUNTS) for load in self.loads))

    def accepted(self) -> list[float]:
        """Return when (monotonic) changes were accepted."""
        return sorted(
            op.answered
            for load in self.loads
            for op in load.operations
            if isinstance(op, Accepted) and not op.replayed
        )

    async def _another_serves(self, leader: Node) -> None:
        await self.cluster.leader(other_than=leader)
        await self.progress()


KINDS: Final[Mapping[str, Callable[[Drill, Node], Awaitable[str]]]] = {
    "killed": Drill.kill,
    "frozen": Drill.freeze,
    "switched-over": Drill.switch_over,
    "cut-off": Drill.cut_off,
    "unreplicated": Drill.lose,
}
CONTROL: Final = "unreplicated"


@dataclass(frozen=True, slots=True)
class Promise:
    """What must hold, what was found, and whether it holds."""

    text: str
    found: str
    kept: bool


async def run(options: argparse.Namespace, directory: Path) -> bool:
    """Run the drill; print the report, return whether every promise is kept.

    Raises:
        ClusterError: a node does not come back.
    """
    passwords = {OWNER: token_hex(16), RUN_ROLE: token_hex(16)}
    synchronous = not options.asynchronous
    print(f"Three nodes (ttl {options.ttl} s, {'' if synchronous else 'a'}synchronous) ...")
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(
            Cluster(
                directory,
                options.postgres,
                Timing(options.ttl),
                synchronous=synchronous,
                etcd="etcd3" if options.etcd3 else "etcd",
            )
        )
        await _prepare(cluster, passwords)
        more = {"DB_RUN_PASSWORD": passwords[RUN_ROLE]}
        code, said = await _command(cluster, "migrate", OWNER, passwords, **more)
        if code:
            raise ClusterError(f"The database can't be migrated: {said}")
        event_logs = directory / "jobs"
        event_logs.mkdir()
        instances = [
            Instance(
                {
                    **_environment(cluster, RUN_ROLE, passwords),
                    "MIGRATE_DATABASE_URL": _url(cluster, OWNER, passwords),
                },
                f"app{number}",
                log=directory / f"app{number}.log",
                FLEET_EVENT_LOGS=str(event_logs),
                **JOBS,
            )
            for number in range(1, INSTANCES + 1)
        ]
        await stack.enter_async_context(running(instances))
        urls = [instance.url for instance in instances]
        async with AsyncExitStack() as clients:
            loads = [
                await clients.enter_async_context(
                    PacedLoad(
                        urls,
                        await open_account(urls[0], OPENING_BALANCE),
                        connections=CONNECTIONS,
                    )
                )
                for _ in range(ACCOUNTS)
            ]
            drill = Drill(cluster, loads)
            print(f"{INSTANCES} instances serve {ACCOUNTS * CONNECTIONS} clients.")
            stopped = ""
            try:
                for kind in islice(cycle(options.kinds), options.failovers):
                    await drill.fail_over(kind)
            except (AssertionError, ClusterError) as error:  # no changes, or not all nodes, again
                stopped = f": {error}"
        done = len(drill.failovers)
        promises = [
            Promise("failovers", f"{done} of {options.failovers}{stopped}", not stopped),
            *await _ledgers(drill),
            *_answers(drill),
            *await _jobs(drill, event_logs),
            await _audit(cluster, passwords),
        ]
    _print_report(drill, promises)
    return all(promise.kept for promise in promises)


async def _prepare(cluster: Cluster, passwords: Mapping[str, str]) -> None:
    """Make the database and its owner, who is no superuser."""
    connection = await cluster.connect(await cluster.leader())
    # All of it is from this program.
    await connection.execute(f"CREATE ROLE {OWNER} LOGIN CREATEROLE PASSWORD '{passwords[OWNER]}'")
    await connection.execute(f"CREATE DATABASE {DATABASE} OWNER {OWNER}")
    await connection.close()


def _environment(cluster: Cluster, role: str, passwords: Mapping[str, str]) -> dict[str, str]:
    """Return the DB_* variables with which a program finds the primary."""
    hosts, _, ports = zip(*(each.partition(":") for each in cluster.addresses), strict=True)
    return {
        "DB_HOST": ",".join(hosts),
        "DB_PORT": ",".join(ports),
        "DB_USER": role,
        "DB_PASSWORD": passwords[role],
        "DB_NAME": DATABASE,
    }


def _url(cluster: Cluster, role: str, passwords: Mapping[str, str]) -> str:
    """Return the same as a URL."""
    return f"postgresql://{role}:{passwords[role]}@{','.join(cluster.addresses)}/{DATABASE}"


async def _command(
    cluster: Cluster, command: str, role: str, passwords: Mapping[str, str], **more: str
) -> tuple[int, str]:
    """Run `balance-app` as a role; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", command),
        env={"PATH": os.defpath, **_environment(cluster, role, passwords), **more},
        cwd="/",  # where no .env is
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace").strip()


# -- what must hold ------------------------------------------------------------------------------


async def _ledgers(drill: Drill) -> list[Promise]:
    """Compare all answers with the ledgers of the final primary."""
    connection = await drill.cluster.connect(await drill.cluster.leader(), DATABASE)
    acknowledged = lost = 0
    contradictions: Counter[str] = Counter()
    for load in drill.loads:
        entries = [Entry(**row) for row in await connection.fetch(ENTRIES, load.user_id)]
        (account,) = await connection.fetch(ACCOUNT, load.user_id)
        state = State(account["version"], account["balance"])
        times = Counter(entry.key for entry in entries)
        keys = {op.key for op in load.operations if isinstance(op, Accepted)}
        acknowledged += len(keys)
        lost += sum(times[key] != 1 for key in keys)
        found = check(Ledger(tuple(entries), state), load.operations)
        contradictions.update(str(violation.kind) for violation in found)
    await connection.close()
    found_kinds = ", ".join(f"{kind} {count}" for kind, count in contradictions.items())
    return [
        Promise("acknowledged changes", str(acknowledged), acknowledged > 0),
        Promise("of these lost, or made twice", str(lost), lost == 0),
        Promise("answers that contradict the ledger", found_kinds or "0", not contradictions),
    ]


def _answers(drill: Drill) -> list[Promise]:
    """Look at what clients got."""
    late = sum(load.late for load in drill.loads)
    slowest = max(load.slowest_seconds for load in drill.loads)
    unexpected = [each for load in drill.loads for each in load.unexpected]
    answers: Counter[str] = sum((load.answers for load in drill.loads), Counter())
    resolved: Counter[str] = sum((load.resolved for load in drill.loads), Counter())
    for each in unexpected[:5]:
        print(f"     unexpected: {each}")
    return [
        Promise("requests", f"{answers.total()} ({_counts(answers)})", kept=True),
        Promise("unknown outcomes resolved", _counts(resolved) or "0", kept=True),
        Promise(
            f"requests without an answer in {ANSWER_SECONDS:g} s",
            f"{late} (slowest {slowest:.2f} s)",
            late == 0,
        ),
        Promise("answers that break the contract", str(len(unexpected)), not unexpected),
    ]


async def _jobs(drill: Drill, event_logs: Path) -> list[Promise]:
    """Look for two runs of a job at once: in the history, and in what the jobs themselves wrote."""
    connection = await drill.cluster.connect(await drill.cluster.leader(), DATABASE)
    rows = await connection.fetch(HISTORY)
    await connection.close()
    runs = Counter({row["outcome"] or "running": row["runs"] for row in rows})
    overlapping = sum(row["overlapping"] for row in rows)
    seen = len(overlaps(read_event_logs(event_logs)))
    return [
        Promise("runs of jobs", f"{runs.total()} ({_counts(runs)})", runs["succeeded"] > 0),
        Promise("overlapping runs, by the history", str(overlapping), overlapping == 0),
        Promise("overlapping runs, by the jobs' own files", str(seen), seen == 0),
    ]


async def _audit(cluster: Cluster, passwords: Mapping[str, str]) -> Promise:
    code, said = await _command(cluster, "audit", RUN_ROLE, passwords)
    found = [line for line in said.splitlines() if line.startswith("Checked")] if not code else []
    return Promise("balance-app audit", "".join(found) or said, code == 0)


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items()))


def _print_report(drill: Drill, promises: Sequence[Promise]) -> None:
    accepted = drill.accepted()
    print("\nkind            failovers   longest without an accepted write   median")
    for kind in KINDS:
        pauses = [each.pause(accepted) for each in drill.failovers if each.kind == kind]
        if pauses:
            print(f"{kind:14}  {len(pauses):9}   {max(pauses):31.1f} s   {median(pauses):4.1f} s")
    print()
    width = max(len(promise.text) for promise in promises)
    for promise in promises:
        broken = "" if promise.kept else "   BROKEN"
        print(f"{promise.text:{width}}   {promise.found}{broken}")


# -- the program ---------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make drill-failover DRILL=...",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit code: 0 every promise is kept, 1 one is broken, 2 the drill could not run.",
    )
    kinds = [kind for kind in KINDS if kind != CONTROL]
    parser.add_argument(
        "--failovers", type=int, metavar="N", help="how many (default: 20; 1 if asynchronous)"
    )
    parser.add_argument(
        "--kinds",
        default=",".join(kinds),
        metavar="KIND,...",
        help="which, in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--asynchronous",
        action="store_true",
        help="the control, which must lose: commits wait for no standby, and the leader is killed "
        "when replication is cut",
    )
    parser.add_argument(
        "--etcd3",
        action="store_true",
        help="Patroni uses the API of etcd 3: before Patroni 3.0.3 a frozen leader that wakes "
        "takes its key from the new one, and what that has acknowledged is lost",
    )
    parser.add_argument(
        "--ttl", type=int, default=10, metavar="SECONDS", help="Patroni's (default: %(default)s)"
    )
    parser.add_argument(
        "--postgres", type=Path, metavar="DIR", help="PostgreSQL's programs (default: Debian's)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy all logs here at the end")
    options = parser.parse_args()
    options.kinds = [CONTROL] if options.asynchronous else options.kinds.split(",")
    if wrong := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"no kind of failover: {', '.join(wrong)} (there are {', '.join(kinds)})")
    if options.failovers is None:
        options.failovers = 1 if options.asynchronous else 20
    if options.failovers < 1 or options.ttl < LEAST_TTL:
        parser.error(f"--failovers is at least 1, --ttl {LEAST_TTL}")
    return options


async def _main(options: argparse.Namespace) -> bool:
    require_programs()
    options.postgres = options.postgres or newest_postgres()
    with working_directory(options.keep) as top:
        return await run(options, top)


def main() -> int:
    """Run the drill; return the exit code."""
    return run_drill(_main(_options()), not_run=(ClusterError,))


if __name__ == "__main__":
    sys.exit(main())
