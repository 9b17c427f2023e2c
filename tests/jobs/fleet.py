"""An instance of the service whose jobs write event logs to local files.

`python -m tests.jobs.fleet` serves one instance. Overlaps are looked for in the
files alone, never in the service's own tables. The environment configures the jobs:

FLEET_EVENT_LOGS  the directory that all instances write to, a file per boot
FLEET_JOBS        how many jobs, named job-01 and so on
FLEET_EVERY       their interval in seconds
FLEET_SECONDS     how long each run lasts
FLEET_KIND        paced (default), quiet (sends PostgreSQL nothing), sleep or spin (both block the
                  event loop), uncancellable (a thread that can't be stopped), thread (one that
                  can), thread-writes (one with transactions), writes (through its transaction),
                  held (the same, and each transaction is held open), poison (kills its process),
                  ignores-cancel (writes until its time is over, also when it is cancelled);
                  one of those that leave the run's own task (tests/jobs/kinds.py);
                  several, separated by commas, are assigned to the jobs round robin
FLEET_ALARM       taken: jobs that write use SIGALRM and its timer for themselves
FLEET_TIMEOUT     the jobs' timeout in seconds, if they have one
FLEET_HOLD        how many seconds a held transaction lasts
FLEET_TIE_BREAK   the tie break of the claim policy in seconds, if not the default
FLEET_MUTANTS     guards to remove, for controls
"""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from balance_app import server
from balance_app.jobs import (
    heartbeat,
    leases,
    repository,
    runner,
    scheduler,
    scope,
    statements,
    transaction,
    watchdog,
)
from balance_app.jobs.job import Job, Registry, job
from balance_app.jobs.run import Run
from balance_app.jobs.threads import ThreadRun
from balance_app.logs import configure_logs
from balance_app.settings import load_settings
from tests.jobs import kinds
from tests.jobs.kinds import TICK_SECONDS, EventLog
from tests.mutants import abrupt_stop, put, replaced


class Script:
    """The job functions of one job number, by kind."""

    def __init__(self, number: int, event_log: EventLog) -> None:
        kinds = os.environ.get("FLEET_KIND", "paced").split(",")
        self.kind = kinds[number % len(kinds)]
        self.hold = float(os.environ.get("FLEET_HOLD", "0.5")) if self.kind == "held" else 0.0
        self.seconds = float(os.environ.get("FLEET_SECONDS", "2"))
        self.steps = max(1, round(self.seconds / TICK_SECONDS))
        self.event_log = event_log

    async def paced(self, run: Run) -> str:
        start = (run.resumed or {"step": 0})["step"]
        due = run.due_at.timestamp()
        self.event_log.write("start", run, resumed=run.resumed, due=due, attempt=run.attempt)
        try:
            for step in range(start, self.steps):
                self.event_log.write("tick", run, step=step)
                run.log.info("ticks", step=step)
                run.progress(step, self.steps, "ticking")
                if step % 10 == 9:
                    await run.checkpoint({"step": step + 1})
                    self.event_log.write("checkpoint", run, step=step + 1)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            self.event_log.write("end", run)
        return f"ticked {self.steps} times"

    async def quiet(self, run: Run) -> None:
        self.event_log.write("start", run)
        try:
            for step in range(self.steps):
                self.event_log.write("tick", run, step=step)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            self.event_log.write("end", run)

    async def blocking(self, run: Run) -> None:
        self.event_log.write("start", run)
        until = time.monotonic() + self.seconds
        reported = self.steps
        while (left := until - time.monotonic()) > 0:
            if self.kind == "sleep":
                time.sleep(left)  # noqa: ASYNC251 - it is meant to block
            if reported != int(left / TICK_SECONDS):
                reported = int(left / TICK_SECONDS)
                self.event_log.write("tick", run)
        self.event_log.write("end", run)

    def threaded(self, run: ThreadRun) -> str:
        self.event_log.write("start", run)
        try:
            for step in range(self.steps):
                self.event_log.write("tick", run, step=step)
                run.log.info("ticks", step=step)
                if self.kind == "thread":
                    run.progress(step, self.steps)
                    if step % 10 == 9:
                        run.checkpoint({"step": step})
                elif self.kind == "thread-writes":
                    with run.transaction() as connection:
                        connection.execute("SELECT")
                time.sleep(TICK_SECONDS)
        finally:
            self.event_log.write("end", run)
        return "ticked"

    async def writes(self, run: Run) -> None:
        if os.environ.get("FLEET_ALARM") == "taken":
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.alarm(0)
        self.event_log.write("start", run)
        try:
            for step in range(self.steps):
                self.event_log.write("tick", run, step=step)
                async with run.transaction() as connection:
                    await connection.execute(
                        "INSERT INTO fenced (job, fence) VALUES ($1, $2)", run.name, run.fence
                    )
                    # The first is short: it shows from when on its fence applies.
                    if self.hold and step:
                        self.event_log.write("inside", run, step=step)
                        await connection.execute("SELECT pg_sleep($1)", self.hold)
                self.event_log.write("wrote", run, step=step)
                await asyncio.sleep(TICK_SECONDS)
        except Exception as error:
            self.event_log.write("refused", run, error=repr(error))
            raise
        finally:
            self.event_log.write("end", run)

    async def ignores_cancel(self, run: Run) -> None:
        begun = time.monotonic()
        self.event_log.write("start", run)
        while time.monotonic() < begun + self.seconds:
            with suppress(Exception, asyncio.CancelledError):
                async with run.transaction() as connection:
                    await connection.execute(
                        "INSERT INTO fenced (job, fence, begun) VALUES ($1, $2, $3)",
                        *(run.name, run.fence, begun),
                    )
                await asyncio.sleep(TICK_SECONDS)
        self.event_log.write("end", run)

    async def poison(self, run: Run) -> None:
        self.event_log.write("start", run)
        os.kill(os.getpid(), signal.SIGKILL)


def declare(number: int, event_log: EventLog) -> Job:
    """Return the job with this number."""
    script = Script(number, event_log)
    functions: dict[str, Callable[[Any], Any]] = {
        "paced": script.paced,
        "quiet": script.quiet,
        "sleep": script.blocking,
        "spin": script.blocking,
        "thread": script.threaded,
        "thread-writes": script.threaded,
        "uncancellable": script.threaded,
        "writes": script.writes,
        "held": script.writes,
        "poison": script.poison,
        "ignores-cancel": script.ignores_cancel,
        **kinds.functions(event_log, script.seconds),
    }
    limit = os.environ.get("FLEET_TIMEOUT")
    return job(
        name=f"job-{number:02}",
        every=timedelta(seconds=float(os.environ.get("FLEET_EVERY", "3600"))),
        min_duration=timedelta(milliseconds=1),
        timeout=timedelta(seconds=float(limit)) if limit else None,
    )(functions[script.kind])


def no_watchdog() -> None:
    """Never end a process that has lost its leases, nor cancel its runs."""
    vars(leases)["HeldLeases"]._arm = lambda _self: None
    vars(leases)["HeldLeases"].stop_run = lambda *_: None


def alarm_timer() -> None:
    """Use SIGALRM for the watchdog timer, as on systems without a better timer."""
    put(leases, "watchdog_timer", watchdog.AlarmTimer)


def no_fence() -> None:
    """Let every transaction commit, also without the lease."""
    put(transaction, "COMMIT", "COMMIT")
    put(transaction, "ENTER", "SELECT $1::text, $2::bigint, $3::uuid")


def no_policy() -> None:
    """Claim any due job at once."""
    guarded = repository.ClaimPolicy

    def greedy(**policy: Any) -> repository.ClaimPolicy:  # noqa: ANN401 - whatever a policy is made of
        none = timedelta(0)
        return guarded(
            **{**policy, "backoff": none, "tie_break": none, "warmed_up": True, "warm_up": none}
        )

    put(scheduler, "ClaimPolicy", greedy)


def newcomers_first() -> None:
    """Let every instance that starts restart the warm-up of all."""
    guard = """CASE WHEN last_heartbeat_at > $4"""
    newcomers = """CASE WHEN true THEN
        greatest(claimable_at, (SELECT max(started_at) FROM instances) + $11::interval)
        WHEN last_heartbeat_at > $4"""
    put(statements, "CLAIM", replaced(statements.CLAIM, guard, newcomers))


def seen_again() -> None:
    """Let every instance that starts overwrite the startup marks, which all instances follow."""
    for name, guard, without in (
        ("MARK_STARTUP", "startup_marked_at IS NULL", "(true OR startup_marked_at IS NULL)"),
        ("CLAIM", "startup_marked_at <= $4 + $11", "startup_marked_at <= clock_timestamp() + $11"),
    ):
        put(statements, name, replaced(vars(statements)[name], guard, without))


def no_wait_for_threads() -> None:
    """Treat a run as ended when it is requested to stop, even if its thread goes on."""

    async def leave_thread(run: Run, job: Job, _scope: object, args: Mapping[str, Any]) -> object:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[object] = loop.create_future()
        facade = ThreadRun(run)

        def call() -> None:
            loop.call_soon_threadsafe(ended.set_result, job.function(facade, **args))

        threading.Thread(target=call, daemon=True).start()
        return await ended

    put(runner, "_in_thread", leave_thread)


def main_task_only() -> None:
    """Treat a run as ended when its main task has ended, whatever that has started."""

    async def ended(self: scope.Scope) -> None:
        assert self._main is not None
        await asyncio.wait({self._main})

    vars(scope)["Scope"].ended = ended
    vars(scope)["Scope"]._stop_children = lambda _self: None


def no_release() -> None:
    """Exit without releasing any job when requested to stop."""

    async def say_nothing(_self: object) -> None:
        await asyncio.sleep(0)

    vars(scheduler)["Scheduler"].stop = say_nothing
    vars(scheduler)["Scheduler"].close = say_nothing


def no_expiry() -> None:
    """Let a late heartbeat revive a lease that is over."""
    over = "WHERE holder = $1 AND lease_expires_at > clock_timestamp()"
    put(leases, "HEARTBEAT", replaced(leases.HEARTBEAT, over, "WHERE holder = $1"))


def losses_stand() -> None:
    """Take over whenever a lease is over, release no claim, and refute no loss."""

    async def leave(_self: object, _now: float) -> None:
        await asyncio.sleep(0)

    until = datetime(3000, 1, 1, tzinfo=UTC)
    vars(scheduler)["Scheduler"]._reconcile = leave
    vars(scheduler)["Scheduler"]._takes_over_until = lambda *_: until


def go_on_anew() -> None:
    """Declare the jobs in recreated tables at once, and let earlier runs go on."""

    def go_on(self: scheduler.Scheduler) -> None:
        self._capabilities = None

    vars(scheduler)["Scheduler"]._reset = go_on


def own_clock() -> None:
    """Decide by the instance's own clock, which is wrong by FLEET_SHIFT seconds."""
    shifted = f"(clock_timestamp() + interval '{os.environ['FLEET_SHIFT']} s')"
    put(statements, "CLAIM", replaced(statements.CLAIM, "clock_timestamp()", shifted))


def log_at_the_end() -> None:
    """Write what a run says before its completion alone."""

    async def write_nothing(_self: object, _connection: object, _leases: object) -> None:
        await asyncio.sleep(0)

    vars(heartbeat)["HeartbeatThread"]._write_logs = write_nothing


GUARDS: dict[str, Callable[[], None]] = {
    "abrupt-stop": abrupt_stop,
    "log": log_at_the_end,
    "watchdog": no_watchdog,
    "kill-timer": alarm_timer,
    "expiry": no_expiry,
    "own-clock": own_clock,
    "fence": no_fence,
    "policy": no_policy,
    "newcomers": newcomers_first,
    "once": seen_again,
    "threads": no_wait_for_threads,
    "scope": main_task_only,
    "release": no_release,
    "outages": losses_stand,
    "anew": go_on_anew,
}


@dataclass(frozen=True)
class Span:
    """A run as in its event log: from its first line to its last."""

    job: str
    fence: int
    server: str
    pid: int
    begin: float
    end: float
    # whether its last line is its end
    ended: bool
    lines: tuple[dict[str, Any], ...]


def read_event_logs(directory: Path) -> list[Span]:
    """Return all runs, by the time of their first line."""
    runs: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for path in directory.iterdir():
        # A line without its end is being written by an instance that still runs.
        for line in path.read_text().split("\n")[:-1]:
            entry = json.loads(line)
            runs.setdefault((entry["job"], entry["fence"], entry["pid"]), []).append(entry)
    spans = [
        Span(
            job=name,
            fence=fence,
            server=lines[0]["server"],
            pid=pid,
            begin=lines[0]["at"],
            end=lines[-1]["at"],
            ended=any(line["what"] == "end" for line in lines),
            lines=tuple(lines),
        )
        for (name, fence, pid), lines in runs.items()
    ]
    return sorted(spans, key=lambda span: span.begin)


async def each_job_runs(event_logs: Path, jobs: int) -> None:
    """Wait until this many jobs have begun a run after now."""
    now = time.monotonic()
    async with asyncio.timeout(60):
        while len({s.job for s in read_event_logs(event_logs) if s.begin > now}) < jobs:  # noqa: ASYNC110 - files
            await asyncio.sleep(0.1)


def overlaps(spans: list[Span]) -> list[tuple[Span, Span]]:
    """Return the pairs of runs of one job where the later begins before the earlier has ended."""
    found = []
    last: dict[str, Span] = {}
    for span in spans:
        before = last.get(span.job)
        if before is not None and span.begin <= before.end:
            found.append((before, span))
        if before is None or span.end > before.end:
            last[span.job] = span
    return found


def main() -> None:
    """Serve one instance."""
    for guard in filter(None, os.environ.get("FLEET_MUTANTS", "").split(",")):
        GUARDS[guard]()
    if tie := os.environ.get("FLEET_TIE_BREAK"):
        put(scheduler, "TIE_BREAK", timedelta(seconds=float(tie)))
    settings = load_settings()
    configure_logs(settings)
    event_log = EventLog(Path(os.environ["FLEET_EVENT_LOGS"]))
    count = int(os.environ.get("FLEET_JOBS", "10"))
    server.serve(settings, Registry([declare(number, event_log) for number in range(1, count + 1)]))


if __name__ == "__main__":
    main()
