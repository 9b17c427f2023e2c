"""Restore a backup to a moment, under load and with jobs running: does all fit together again?

`make drill-restore` runs it, with the commands of docs/backup.md; drills/README.md says what it
shows.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, repeat
from pathlib import Path
from secrets import token_hex
from textwrap import indent
from time import monotonic
from typing import Any, Final, NamedTuple, TypeVar

import asyncpg
import httpx
from typing_extensions import override

from balance_app.local.postgres import (
    SYSTEM_USER,
    EmbeddedError,
    EmbeddedPostgres,
    binaries,
    make_system_user,
)
from balance_app.maintenance.restoration import LEAP
from drills.documented import CommandError, Commands, run
from drills.program import run_drill, working_directory
from tests.jobs.fleet import overlaps, read_event_logs
from tests.processes import RUN_ROLE, SERVE, Instance, connect, http_client, query, running

Found = TypeVar("Found")

PAGE: Final = Path(__file__).parents[1] / "docs" / "backup.md"
NEEDED: Final = ("pg_basebackup", "pg_verifybackup", "pg_dump", "pg_dumpall", "pg_restore", "psql")
DATABASE: Final = "balances"
USERS: Final = 12
CLIENTS: Final = 4
JOBS: Final = 4  # one for each instance of the fleet, and of the control
# A lease still lasts when the server is restored: otherwise a run of before is stopped by its end.
LEASE_SECONDS: Final = 120
LOAD_SECONDS: Final = 4
# More than the 32 that a sequence is ahead in the log, which a restore to a moment skips.
OPENED: Final = 40
WAIT_SECONDS: Final = 300
PAUSE_SECONDS: Final = 0.02  # between two requests of a client: two cores serve all of this

STUBBORN: Final = "ignores-cancel"  # jobs that go on writing whatever they are told
AGAIN: Final = 2  # the fence of a job's second claim
DECIDED: Final = {200, 201, 409}  # the statuses of outcomes that are kept

KEYS: Final = "SELECT user_id, key FROM idempotency_keys"
HELD: Final = "SELECT name, server, fence FROM jobs WHERE name LIKE 'job-%' AND holder IS NOT NULL"
WRITTEN: Final = "SELECT count(*) FROM fenced WHERE fence < $1"
LEFT: Final = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
CUT: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = $1 AND query LIKE '%access_state%'
"""
# What docs/backup.md says of a dump: who may do what, and settings.
RIGHTS: Final = """
SELECT has_table_privilege($1, 'entries', 'INSERT') AS may_insert,
       has_table_privilege($1, 'entries', 'UPDATE') AS may_update,
       pg_has_role($1, 'pg_read_all_stats', 'MEMBER') AS is_member,
       has_database_privilege('public', current_database(), 'TEMPORARY') AS may_make_temporary,
       (SELECT count(*) FROM pg_db_role_setting WHERE setdatabase = 0) AS role_settings,
       (SELECT count(*) FROM pg_db_role_setting WHERE setdatabase <> 0) AS database_settings
"""
SETTINGS: Final = (
    f"ALTER ROLE {RUN_ROLE} SET work_mem = '5MB'",
    f"ALTER DATABASE {DATABASE} SET work_mem = '6MB'",
    f"ALTER ROLE {RUN_ROLE} IN DATABASE {DATABASE} SET work_mem = '7MB'",
)
# As somebody does who wants that user 2 has more.
FORGE: Final = """
SET session_replication_role = replica;
UPDATE entries SET amount = amount + 1000, balance = balance + 1000
WHERE (user_id, version) = (2, 1)
"""


class NotRunError(Exception):
    """The drill can't be run here; the message says why."""


class Promise(NamedTuple):
    """What is promised, what was found, and whether that keeps it."""

    text: str
    found: str
    kept: bool


@dataclass(slots=True)
class Report:
    """The promises, in the order in which they were checked."""

    promises: list[Promise] = field(default_factory=list)

    def add(self, text: str, found: object, *, kept: bool) -> None:
        """Note and print what was found."""
        self.promises.append(Promise(text, str(found), kept))

    def step(self, text: str) -> None:
        """Say what happens now."""
        print(f"{monotonic() - BEGAN:6.1f} s  {text}", flush=True)


BEGAN: Final = monotonic()


class Server(EmbeddedPostgres):
    """A server that also counts as ready while it recovers."""

    def __init__(self, data: Path, *, options: Mapping[str, str]) -> None:
        super().__init__(data, options=options)
        self.socket_directory = data.parent  # a base backup would copy the lock of the socket

    @override
    async def _wait_until_ready(self, deadline: float) -> None:
        while monotonic() < deadline:
            if self.process.returncode is not None:
                break
            with suppress(OSError, asyncpg.PostgresError):
                connection = await connect(self.environment())
                await connection.close()
                return
            await asyncio.sleep(0.1)
        raise EmbeddedError(self.log.read_text(errors="replace")[-2000:])

    def database(self) -> dict[str, str]:
        """Return the DB_* variables of the service's database, for the superuser."""
        return {**self.environment(), "DB_NAME": DATABASE}

    def shell(self, **more: str) -> dict[str, str]:
        """Return the environment of a documented command."""
        place = f"host={self.socket_directory}&port=5432"
        return {
            "PGHOST": str(self.socket_directory),
            "PGUSER": "postgres",
            "DATABASE_URL": f"postgresql://postgres@/{DATABASE}?{place}",
            **more,
        }

    async def query(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement in the service's database."""
        return await query(self.database(), sql, *arguments)

    async def value(self, sql: str, *arguments: object) -> Any:  # noqa: ANN401 - of any type
        """Run one statement there that returns one value."""
        return (await self.query(sql, *arguments))[0][0]


class Sent(NamedTuple):
    """A request that moves money: when it was sent and answered, and how."""

    path: str
    body: dict[str, int]
    key: str
    sent: float
    answered: float
    status: int
    answer: bytes

    @property
    def is_acknowledged(self) -> bool:
        """Whether its outcome was told, and is kept."""
        return self.status in DECIDED

    @property
    def of(self) -> tuple[int, str]:
        """Whose key it is, and the key."""
        return self.body.get("userId") or self.body["fromUserId"], self.key


class Clients:
    """Clients that change balances, hold, capture and transfer, each request with a key."""

    def __init__(self, instances: Sequence[Instance], users: Sequence[int]) -> None:
        self._urls = [instance.url for instance in instances]
        self._users = users
        self.sent: list[Sent] = []

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Send requests all the time."""
        tasks = [asyncio.create_task(self._work()) for _ in range(CLIENTS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        async with http_client(timeout=20) as http:
            while True:
                await self._act(http)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _act(self, http: httpx.AsyncClient) -> None:
        user, other = random.sample(self._users, 2)
        amount = random.randint(1, 20)
        match random.randrange(6):
            case 0:
                body = {"fromUserId": user, "toUserId": other, "amount": amount}
                await self.send(http, "/api/transfers", body)
            case 1:
                body = {"userId": user, "amount": amount, "expiresInSeconds": 3600}
                sent = await self.send(http, "/api/holds", body)
                if sent.status == httpx.codes.CREATED:
                    hold = json.loads(sent.answer)["id"]
                    await http.post(f"{random.choice(self._urls)}/api/holds/{hold}/capture")
            case _:
                body = {"userId": user, "amount": random.choice((-amount, amount))}
                await self.send(http, "/api/balance", body)

    async def send(
        self, http: httpx.AsyncClient, path: str, body: dict[str, int], key: str = ""
    ) -> Sent:
        """Send a request, with a new key or with an earlier one."""
        key = key or token_hex(8)
        began = monotonic()
        status, answer = 0, b""
        with suppress(httpx.TransportError):
            got = await http.post(
                f"{random.choice(self._urls)}{path}", json=body, headers={"Idempotency-Key": key}
            )
            status, answer = got.status_code, got.content
        sent = Sent(path, body, key, began, monotonic(), status, answer)
        self.sent.append(sent)
        return sent


@dataclass(slots=True)
class Seen:
    """The moment by the server's clock and by that of the clients; what came before and after."""

    earlier: str
    before: float
    moment: str
    after: float
    # the digests that were noted before and after it
    seal: str
    later_seal: str
    # the job that was claimed again after it
    again: str
    # users who were opened after it
    opened: list[int]
    # what the runs of before had written in the control
    at_control: int = 0


class Drill:
    """The servers, and the instances on them."""

    def __init__(self, top: Path, report: Report, stack: AsyncExitStack) -> None:
        self.top = top
        self.report = report
        self.commands = Commands(PAGE)
        self._stack = stack
        self.backup = top / "backup"
        archive = self.commands.settings("archive", self.places())
        self.options = {**archive, "archive_timeout": "5", "max_connections": "150"}
        self.old = Server(top / "old" / "data", options=self.options)
        # as a name of the network leads to one server, and later to another
        self.address, self.control_address = top / "address", top / "control-address"
        self.events, self.control_events = top / "events", top / "control-events"
        for directory in (self.events, self.control_events):
            directory.mkdir()

        self.books = self._instance("books", self.address, "balance_app.maintenance")
        self.fleet = [
            self._instance("frozen", self.address, "drills.jobs", kind=STUBBORN),
            self._instance("app2", self.address, "drills.jobs"),
            self._instance("app3", self.address, "drills.jobs"),
        ]
        self.frozen, *self.alive = self.fleet
        self.control = self._instance("control", self.control_address, "drills.jobs", kind=STUBBORN)

    async def prepare(self) -> None:
        """Start the old server, migrate, and make what the jobs and the page need."""
        self._give(self.backup)
        self._give(self.backup / "wal")
        await self.start(self.old)
        await query(self.old.environment(), f"CREATE DATABASE {DATABASE}")
        await self.commands.expect("role", self.places(), self.old.shell())
        for address in (self.address, self.control_address):
            self.lead(address, self.old)
        migrated = await run("balance-app migrate", self.old.shell())
        if migrated.code:
            raise NotRunError(migrated.output)
        await self.old.query("CREATE TABLE fenced (job text, fence bigint, begun float8)")
        await self.old.query(f"GRANT ALL ON fenced TO {RUN_ROLE}")
        for statement in SETTINGS:
            await self.old.query(statement)

    @staticmethod
    def process(instance: Instance) -> asyncio.subprocess.Process:
        """Return the process of an instance that was started."""
        assert instance.process is not None
        return instance.process

    def places(self, restored: Path | None = None) -> dict[str, Path]:
        """Return the directories of this drill by those of the page."""
        return {"/backup": self.backup, "/var/lib/postgresql/restored": restored or self.top}

    async def start(self, server: Server) -> None:
        """Start a server that is stopped at the end."""
        await server.start()
        self._stack.push_async_callback(server.stop)

    def _give(self, directory: Path) -> None:
        """Make a directory of the user who runs PostgreSQL."""
        directory.mkdir(mode=0o755)
        if os.geteuid() == 0:
            shutil.chown(directory, SYSTEM_USER, SYSTEM_USER)

    def lead(self, address: Path, server: Server) -> None:
        """Let an address lead to a server from now on."""
        new = address.with_suffix(".new")
        new.symlink_to(server.socket_directory)
        new.replace(address)

    def _instance(
        self, name: str, address: Path, modules: str, *, kind: str = "writes"
    ) -> Instance:
        """Return an instance on the server to which an address leads."""
        events = self.control_events if address == self.control_address else self.events
        return Instance(
            {**self.old.database(), "DB_HOST": str(address)},
            name,
            log=self.top / f"{name}.log",
            program=SERVE,
            JOBS_MODULES=modules,
            JOB_MIN_SECONDS="0",
            JOB_LEASE_SECONDS=str(LEASE_SECONDS),
            JOB_WARM_UP_SECONDS="10",  # each instance has its share, however slow the start is
            FLEET_EVENT_LOGS=str(events),
            FLEET_JOBS=str(JOBS),
            FLEET_KIND=kind,
            FLEET_EVERY="86400",
            FLEET_SECONDS="3600",
        )

    async def restored(self, name: str, *moments: str) -> Server:
        """Restore to a moment into a new server that pauses there, and at earlier ones first."""
        self._give(self.top / name)
        server = Server(self.top / name / "data", options=self.options)
        places = self.places(server.data)

        async def pause() -> str:
            return await self.commands.expect("paused", places, server.shell())

        self._stack.push_async_callback(server.stop)
        for command, moment in zip(chain(["restore"], repeat("later")), moments, strict=False):
            await server.stop()
            await self.commands.expect(command, places, {"MOMENT": moment})
            await server.start()
            await _until(pause, lambda found: found.startswith("paused"))
        return server


# -- the drill -----------------------------------------------------------------------------------


async def drill(top: Path, report: Report) -> None:
    """Back up, go on, restore to a moment in between, and check what then is there."""
    async with AsyncExitStack() as stack:
        it = Drill(top, report, stack)
        report.step("a server with an archive, five instances, and clients")
        await it.prepare()
        await stack.enter_async_context(running([it.books, *it.fleet, it.control]))
        users = [await _open(it.books) for _ in range(USERS)]
        clients = Clients([it.books, *it.alive, it.control], users)
        names = {each.name for each in (*it.fleet, it.control)}
        await _until(lambda: _holders(it.old), lambda found: names <= set(found))
        async with clients.working():
            seen = await _back_up_and_go_on(it)
        await _archive(it)
        report.step("two servers are restored to the moment; one is the control")
        new = await it.restored("new", seen.moment)
        other = await it.restored("control", seen.earlier, seen.moment)
        await _check_changes(report, new, clients.sent, seen)
        await _check_seals(it, new, seen)
        for server in (new, other):
            await it.commands.expect("promote", it.places(), server.shell())
        await _make_safe_and_lead(it, new, other, seen)
        await _check_control(it, other, seen)
        await _check_repeated(it, clients.sent, seen)
        await _check_ids(it, other, seen)
        await _check_tampering(it, other)
        async with clients.working():
            await asyncio.sleep(LOAD_SECONDS)
        found = await run(f"balance-app audit --seal {seen.seal}", new.shell())
        text = "audit after more load there"
        report.add(text, found.output.splitlines()[0], kept=found.code == 0)
        await _check_dump(it)


async def _back_up_and_go_on(it: Drill) -> Seen:
    """Back up under load; then the moment, and what the old server does after it."""
    report, old = it.report, it.old
    await asyncio.sleep(LOAD_SECONDS / 2)
    report.step("a base backup and a dump, under load")
    await it.commands.expect("base", it.places(), old.shell())
    await it.commands.expect("dump", it.places(), old.shell())
    earlier = await _now(old)
    await asyncio.sleep(LOAD_SECONDS)
    seal = await _seal(it)
    report.step("an instance is frozen while it holds leases; then the moment")
    it.process(it.frozen).send_signal(signal.SIGSTOP)
    held = await old.query(HELD)
    before = monotonic()
    moment = await _now(old)
    after = monotonic()
    report.step("the old server goes on: changes, claims, users, a seal")
    again = next(row["name"] for row in held if row["server"] == it.alive[0].name)
    opening = asyncio.gather(*(_open(it.books) for _ in range(OPENED)))
    later_seal, _, opened = await asyncio.gather(_seal(it), _claim_again(it, again), opening)
    await asyncio.sleep(LOAD_SECONDS / 2)
    return Seen(earlier, before, moment, after, seal, later_seal, again, opened)


async def _archive(it: Drill) -> None:
    """Have the old server archive what it has written."""
    segment = await it.old.value("SELECT pg_walfile_name(pg_current_wal_lsn())")
    await it.commands.expect("switch", it.places(), it.old.shell())
    await _until(lambda: _exists(it.backup / "wal" / segment), lambda found: found)


async def _make_safe_and_lead(it: Drill, new: Server, other: Server, seen: Seen) -> None:
    """Run `restored` on one server, let instances reach both, and check what becomes of jobs."""
    report = it.report
    report.step("`balance-app restored` on one of them")
    ended = await it.commands.expect("restored", it.places(), new.shell())
    print(indent(ended, 10 * " "))
    restored_at = await new.value("SELECT clock_timestamp()")
    written = await new.value(WRITTEN, LEAP)
    seen.at_control = await other.value(WRITTEN, LEAP)
    report.step("the address leads there, while the old server still runs; then it is lost")
    it.lead(it.address, new)
    left = await _leaves(it.old, it.alive[0])
    text = "connections to the old server, of an instance whose next one led to the new"
    report.add(text, left, kept=left == 0)
    await it.old.kill()
    it.lead(it.control_address, other)
    it.process(it.frozen).send_signal(signal.SIGCONT)
    report.step(f"until all jobs run again: a lease of {LEASE_SECONDS} s has to pass")
    await _until(lambda: _fences(new), lambda found: sum(fence > LEAP for fence in found) == JOBS)
    await _check_jobs(it, new, written, restored_at)
    _check_instances(it)


async def _open(instance: Instance) -> int:
    async with http_client(timeout=30) as http:
        answer = await http.post(f"{instance.url}/api/users", json={"balance": 10_000})
        return int(answer.raise_for_status().json()["userId"])


async def _now(server: Server) -> str:
    moment: datetime = await server.value("SELECT clock_timestamp()")
    return moment.isoformat(sep=" ")


async def _holders(server: Server) -> list[str]:
    return [row["server"] for row in await server.query(HELD)]


async def _fences(server: Server) -> list[int]:
    return [row["fence"] for row in await server.query(HELD)]


async def _exists(path: Path) -> bool:
    return path.exists()


async def _until(read: Callable[[], Awaitable[Found]], is_enough: Callable[[Found], bool]) -> Found:
    """Read until it is enough; return it."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not is_enough(found := await read()):  # noqa: ASYNC110 - of databases and files
            await asyncio.sleep(0.2)
        return found


async def _seal(it: Drill) -> str:
    """Have the job make a seal on the old server; return its digest."""
    url, environment = f"--url {it.books.url}", it.old.shell()
    ran = await run(f"balance-app {url} run note-daily-balances --wait", environment)
    if ran.code:
        raise CommandError(ran.output)
    seals = await run("balance-app seals --json --limit 1", environment)
    return str(json.loads(seals.output)[0]["digest"])


async def _claim_again(it: Drill, job: str) -> None:
    """Have a job that runs at the moment claimed once more, on the old server."""
    url = f"{it.alive[0].url}/api/cron/jobs/{job}"
    async with http_client(timeout=30) as http:

        async def request() -> bool:
            return (await http.post(f"{url}/run")).is_success

        async def claimed() -> bool:
            return any(
                row["name"] == job and row["fence"] == AGAIN for row in await it.old.query(HELD)
            )

        (await http.post(f"{url}/cancel")).raise_for_status()
        await _until(request, bool)
        await _until(claimed, bool)


# -- what is checked -------------------------------------------------------------------------------


async def _check_changes(report: Report, new: Server, sent: Sequence[Sent], seen: Seen) -> None:
    there = {(row["user_id"], row["key"]) for row in await new.query(KEYS)}
    told = [each for each in sent if each.is_acknowledged]
    old = [each.of in there for each in told if each.answered <= seen.before]
    late = [each.of in there for each in told if each.sent >= seen.after]
    text = "acknowledged before the moment: there"
    report.add(text, f"{sum(old)} of {len(old)}", kept=all(old) and len(old) > 0)
    text = "acknowledged after the moment: there"
    report.add(text, f"{sum(late)} of {len(late)}", kept=not any(late) and len(late) > 0)


async def _check_seals(it: Drill, new: Server, seen: Seen) -> None:
    look = await it.commands.run("look", it.places(), new.shell(SEAL=seen.seal))
    found = look.output.splitlines()
    it.report.add("audit while it pauses at the moment", found[0], kept=look.code == 0)
    text = "a seal that was noted before the moment"
    it.report.add(text, found[-1], kept=look.code == 0 and "is as it was" in found[-1])
    look = await it.commands.run("look", it.places(), new.shell(SEAL=seen.later_seal))
    known = "no seal has the digest" not in look.output
    text = "a seal that was noted after the moment"
    it.report.add(text, "known" if known else "unknown, exit code 1", kept=look.code == 1)


async def _leaves(old: Server, instance: Instance) -> int:
    """Cut the connection that reads keys; return how many to the old server are left."""
    name = f"balance_app {instance.name}"
    assert await old.value(LEFT, name) > 0
    left = -1
    deadline = monotonic() + LEASE_SECONDS / 2
    while left and monotonic() < deadline:
        await old.query(CUT, name)
        await asyncio.sleep(0.5)
        left = await old.value(LEFT, name)
    return left


async def _check_jobs(it: Drill, new: Server, written: int, restored_at: object) -> None:
    now = await new.value(WRITTEN, LEAP)
    it.report.add("rows written by runs of before", now - written, kept=now == written)
    outcomes = await new.query(
        "SELECT outcome, count(*) FROM job_runs WHERE job LIKE 'job-%' AND fence < $1 GROUP BY 1",
        LEAP,
    )
    found = {row[0]: row[1] for row in outcomes}
    it.report.add("outcomes of runs of before", found, kept=found == {"lost": JOBS})
    first = await new.value(
        "SELECT extract(epoch FROM min(started_at) - $1)::float8 FROM job_runs WHERE fence > $2",
        restored_at,
        LEAP,
    )
    text = f"first claim after `restored` (lease: {LEASE_SECONDS} s)"
    it.report.add(text, f"{first:.1f} s", kept=first > LEASE_SECONDS - 2)
    fences = sorted(await _fences(new))
    text = "fences of the runs there"
    it.report.add(text, f"{fences[0]} to {fences[-1]}", kept=fences[0] > LEAP)
    spans = read_event_logs(it.events)
    found_overlaps = overlaps(spans)
    it.report.add(
        f"overlaps of {len(spans)} runs, by what the jobs wrote themselves",
        len(found_overlaps),
        kept=not found_overlaps,
    )


def _check_instances(it: Drill) -> None:
    ended = [each.name for each in it.alive if it.process(each).returncode is not None]
    it.report.add("instances that had to be started again", len(ended), kept=not ended)
    code = it.process(it.frozen).returncode
    how = "goes on, without its runs" if code is None else f"was ended by signal {-code}"
    # Its trust in its leases is over, or the restored server has refused it: both are right.
    it.report.add("the frozen instance, thawed", how, kept=code in {None, -signal.SIGKILL})


async def _check_control(it: Drill, other: Server, seen: Seen) -> None:
    """Without `balance-app restored` a run of before goes on, and a fence is given twice."""
    it.report.step("the control: without `restored`, until the last lease of before is over")

    async def given_twice() -> bool:
        logs = [read_event_logs(each) for each in (it.events, it.control_events)]
        claims = [{(span.job, span.fence) for span in spans} for spans in logs]
        return all((seen.again, AGAIN) in each for each in claims)

    await _until(given_twice, bool)
    more = await other.value("SELECT count(*) FROM fenced WHERE fence = 1") - seen.at_control
    it.report.add(
        "control, without `restored`: rows written by runs of before", more, kept=more > 0
    )
    text = "control: a claim with a fence that the old server had given"
    it.report.add(text, f"{seen.again}, fence {AGAIN}", kept=True)
    await it.control.stop()


async def _check_repeated(it: Drill, sent: Sequence[Sent], seen: Seen) -> None:
    """A repeated request of before the moment is replayed, one of after it is made anew."""
    counts: Counter[str] = Counter()
    accepted = [
        each for each in sent if each.path == "/api/balance" and each.status == httpx.codes.OK
    ]
    early = [each for each in accepted if each.answered <= seen.before][-20:]
    late = [each for each in accepted if each.sent >= seen.after][:20]
    async with http_client(timeout=30) as http:
        for when, chosen in (("before", early), ("after", late)):
            for each in chosen:
                answer = await http.post(
                    f"{it.alive[-1].url}{each.path}",
                    json=each.body,
                    headers={"Idempotency-Key": each.key},
                )
                if "Idempotent-Replayed" in answer.headers and answer.content == each.answer:
                    counts[f"{when}, replayed"] += 1
                elif answer.status_code in DECIDED:
                    counts[f"{when}, anew"] += 1
    it.report.add(
        "repeated requests of before and after the moment",
        ", ".join(f"{number} of {what}" for what, number in sorted(counts.items())),
        kept=counts == {"before, replayed": len(early), "after, anew": len(late)}
        and len(early) > 0
        and len(late) > 0,
    )


async def _check_ids(it: Drill, other: Server, seen: Seen) -> None:
    """Nobody gets the id of a user who was opened later; in the control somebody does."""
    await it.books.ready()
    user = await _open(it.books)
    it.report.add("id of the next new user", user, kept=user > LEAP)
    given = await other.value("SELECT nextval(pg_get_serial_sequence('users', 'id'))")
    text = "control: id of the next new user, given by the old server already"
    it.report.add(text, given, kept=given in seen.opened)


async def _check_tampering(it: Drill, other: Server) -> None:
    """A changed byte of the backup is found, and a changed row of the restored server."""
    connection = await connect(other.database())
    try:
        file = await connection.fetchval("SELECT pg_relation_filepath('entries')")
        await connection.execute(FORGE)
    finally:
        await connection.close()
    found = await run("balance-app audit", other.shell())
    text = "a restored entry that somebody has changed"
    it.report.add(text, found.output.splitlines()[0], kept=found.code == 1)
    with (it.backup / "base" / file).open("r+b") as backup:
        backup.seek(100)
        byte = backup.read(1)
        backup.seek(100)
        backup.write(bytes([byte[0] ^ 1]))
    found = await run(f"pg_verifybackup {it.backup}/base", {})
    text = "a changed byte of the base backup"
    it.report.add(text, found.output.splitlines()[-1][-60:], kept=found.code != 0)


async def _check_dump(it: Drill) -> None:
    """Load the dump into a server that knows none of its roles."""
    it.report.step("the dump is loaded into a server of its own")
    fresh = Server(it.top / "fresh" / "data", options={"max_connections": "50"})
    await it.start(fresh)
    script = f"createdb control; pg_restore -d control -e {it.backup}/balances.dump"
    alone = await run(script, fresh.shell())
    text = "control: the dump without its roles"
    it.report.add(text, alone.output.splitlines()[-1][-60:], kept=alone.code != 0)
    await run("dropdb control", fresh.shell())
    loaded = await it.commands.run("load", it.places(), fresh.shell())
    text = "the dump: audit"
    it.report.add(text, loaded.output.splitlines()[-2], kept=loaded.code == 0)
    refused = ""
    try:
        await fresh.query("UPDATE entries SET amount = amount + 1")
    except asyncpg.PostgresError as error:
        refused = str(error)
    it.report.add("the dump: an entry is rewritten", refused or "done", kept=bool(refused))
    row = (await fresh.query(RIGHTS, RUN_ROLE))[0]
    found = {name: row[name] for name in row.keys()}  # noqa: SIM118 - a record
    expected = {
        "may_insert": True,
        "may_update": False,
        "is_member": True,
        "may_make_temporary": False,
        "role_settings": 1,
        "database_settings": 0,
    }
    it.report.add("the dump: rights and settings, as the page says", found, kept=found == expected)
    instance = Instance(
        fresh.database(),
        "loaded",
        log=it.top / "loaded.log",
        program=SERVE,
        JOBS_ENABLED="false",
    )
    async with instance, http_client(timeout=30) as http:
        answer = await http.post(f"{instance.url}/api/balance", json={"userId": 1, "amount": -1})
    text = "the dump: a change on an instance there"
    it.report.add(text, answer.status_code, kept=answer.status_code == httpx.codes.OK)


# -- the program ---------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    """Print all promises, and which are broken."""
    print()
    width = max(len(each.text) for each in report.promises)
    for each in report.promises:
        print(f"{each.text:{width}}   {each.found}{'' if each.kept else '   BROKEN'}")


def _require_programs() -> None:
    missing = [name for name in NEEDED if not (binaries() / name).exists()]
    if missing:
        raise NotRunError(f"The embedded PostgreSQL has no {', '.join(missing)}.")
    if os.geteuid() == 0:
        make_system_user()


async def _main(keep: Path | None) -> bool:
    _require_programs()
    report = Report()
    with working_directory(keep) as top:
        try:
            await drill(top, report)
        finally:
            if report.promises:
                print_report(report)
    return all(each.kept for each in report.promises)


def main() -> int:
    """Run the drill; return the exit code."""
    parser = argparse.ArgumentParser(prog="make drill-restore DRILL=...", description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy all logs there")
    return run_drill(
        _main(parser.parse_args().keep),
        not_run=(NotRunError, EmbeddedError),
        broken=(AssertionError, CommandError, TimeoutError),
    )


if __name__ == "__main__":
    sys.exit(main())
