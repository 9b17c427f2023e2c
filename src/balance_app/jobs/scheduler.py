"""The scheduler of one instance: it claims due jobs by its claim policy, and runs them."""

import asyncio
import math
from contextvars import Context
from datetime import datetime, timedelta
from itertools import islice
from time import monotonic
from typing import Final
from uuid import uuid4

import structlog

from balance_app.db.migrations import Installation
from balance_app.db.pool import Database
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.completion import complete, release_pause
from balance_app.jobs.declarations import LIVE, Capabilities
from balance_app.jobs.heartbeat import HeartbeatThread
from balance_app.jobs.job import Job, Registry
from balance_app.jobs.leases import HeldLeases
from balance_app.jobs.repository import (
    NOT_BEGUN,
    STOPPED,
    Ahead,
    Claimed,
    ClaimPolicy,
    Completion,
    JobRepository,
    Me,
)
from balance_app.jobs.run import Run, plain
from balance_app.jobs.runner import RunResult, execute, stop
from balance_app.jobs.scope import count_what_runs_start
from balance_app.metrics import Metrics
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

# Something runs somewhere and may be released at any moment, or nothing does.
BUSY_POLL_SECONDS: Final = 0.25
IDLE_POLL_SECONDS: Final = 2.5
# A claim that lost a race is tried again.
RACE_SECONDS: Final = 0.05
AWAY_SECONDS: Final = 0.25
# After an outage the owners of leases that ran out meanwhile come first, to say what happened.
OWNERS_FIRST_SECONDS: Final = 2.0
CLEAR_UP_SECONDS: Final = 0.5
# How often an instance declares its jobs again.
DECLARE_SECONDS: Final = 15.0
# How much later an instance takes a job that has claimed one in this round already.
TIE_BREAK: Final = timedelta(milliseconds=10)
# The backoff grows with what runs here, ever more slowly: at most ten steps.
MOST_BACKOFF_STEPS: Final = 10
DRAIN_SECONDS: Final = 0.8
NAMED: Final = 5  # so many undeclared jobs are reported with their reasons
# What can't be stopped ends with the process within this; its lease later, by as much as
# PostgreSQL's clock may step, and by this at least.
EXIT_SECONDS: Final = 2.0
LEAST_RESERVE_SECONDS: Final = 0.5


class Scheduler:
    """Runs jobs on this instance, sharing them with instances that it knows nothing of."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        registry: Registry,
        metrics: Metrics | None = None,
        *,
        watchdog: bool = True,
    ) -> None:
        self._settings = settings
        self._database = database
        self._registry = registry
        self.me: Final = Me(uuid4(), settings.server_id)
        self._jobs = JobRepository(database, self.me, timedelta(seconds=settings.job_lease_seconds))
        self._metrics = metrics or Metrics()
        self._leases = HeldLeases(settings, watchdog=watchdog)
        self._heartbeat = HeartbeatThread(settings, self.me, self._leases, self._metrics)
        self._capabilities: Capabilities | None = None
        # in which tables the jobs are declared, and from when on they may be (monotonic)
        self._installation: Installation | None = None
        self._declare_at = 0.0
        # jobs of this program that do not run as it declares them, with the reason
        self.undeclared: dict[str, str] = {}
        # why no jobs are claimed here, if none can be
        self.fault: str | None = None
        self._runs: dict[Run, asyncio.Task[None]] = {}
        self._metrics.jobs_running.set_function(lambda: len(self._runs))
        self._round = 0
        self._booted = 0.0
        # when the database was last known to be unavailable, or a lease or an answer was late
        self._away_at = -math.inf
        self._cleared_at = -math.inf
        # when the jobs were last declared, and leases from before PostgreSQL's clock was set back
        self._declared_at = math.inf
        self._ahead: dict[Ahead, float] = {}
        self._soon = asyncio.Event()
        self._draining = False
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take jobs, in a task of its own."""
        count_what_runs_start(asyncio.get_running_loop())
        self._loop = asyncio.create_task(self.run(), context=Context())

    async def stop(self) -> None:
        """Take no more jobs, request all runs to stop, and release them as they end.

        Returns after a second at the latest. What has not ended by then keeps its lease; see
        `close`.
        """
        self._draining = True
        self.wake()
        for run in list(self._runs):
            stop(run, "released", STOPPED)
        until = monotonic() + DRAIN_SECONDS
        if self._loop is not None:
            await asyncio.wait({self._loop}, timeout=DRAIN_SECONDS)
        if self._runs:
            left = max(0.1, until - monotonic())
            await asyncio.wait(set(self._runs.values()), timeout=left)

    async def close(self) -> None:
        """Stop the heartbeat; the process is about to end.

        A run that could not be stopped keeps its lease until a moment at which this process has
        ended for certain: the kernel sees to that.
        """
        uncancellable = list(self._runs)
        if uncancellable:
            log.warning("runs that can't be stopped", jobs=[run.name for run in uncancellable])
            self._leases.end_within(EXIT_SECONDS)
        await self._heartbeat.stop()
        reserve = max(LEAST_RESERVE_SECONDS, self._settings.clock_reserve_seconds)
        last_lease = timedelta(seconds=EXIT_SECONDS + reserve)
        for run in uncancellable:
            try:
                await self._jobs.mark_releasing(run.name, run.fence, last_lease)
            except DatabaseUnavailable:
                log.warning("not released: its lease runs out", job=run.name)
        if self._loop is not None:
            self._loop.cancel()

    def wake(self) -> None:
        """Try to claim now: something has changed."""
        self._soon.set()
        self._heartbeat.renew_soon()

    async def run(self) -> None:
        """Take jobs until requested to stop."""
        while not self._draining:
            try:
                wait_seconds = await self.run_once()
            except DatabaseUnavailable as problem:
                log.debug("no claim was tried", reason=problem.detail)
                self._away_at = monotonic()
                wait_seconds = AWAY_SECONDS
            except Exception:
                log.exception("a claim failed")
                wait_seconds = IDLE_POLL_SECONDS
            if wait_seconds > 0:
                await self._sleep(wait_seconds)
            else:
                # A run that blocks the event loop from its first step does so before the next
                # claim is sent, whose answer would come too late.
                await asyncio.sleep(0)

    async def run_once(self) -> float:
        """Try to claim a job once, and start it.

        Returns:
            How many seconds to wait before the next claim; 0 after a job was taken.
        """
        wait_seconds = await self._prepare()
        capabilities = self._capabilities
        if capabilities is None or wait_seconds > 0:
            return wait_seconds
        now = monotonic()
        warmed_up = now - self._booted >= self._settings.job_warm_up_seconds
        warm_up = timedelta(seconds=self._settings.job_warm_up_seconds)
        await self._maintain(now)
        if not warmed_up:
            await self._jobs.mark_startup(capabilities, warm_up)
        found = await self._jobs.claim_next(
            capabilities,
            ClaimPolicy(
                backoff=backoff(len(self._runs), self._settings.job_step_seconds),
                round=self._round,
                tie_break=TIE_BREAK,
                warmed_up=warmed_up,
                warm_up=warm_up,
                takes_over_until=self._takes_over_until(now),
            ),
        )
        self._heartbeat.set_clock(found.now, monotonic())
        if monotonic() - found.sent_at > self._patience_seconds:
            self._away_at = monotonic()
        if found.freed is not None:
            log.warning("job quarantined, or lost while paused", job=found.freed)
            self._metrics.run_ended(found.freed, found.ended)
            return 0
        if found.claimed is not None:
            self._start(found.claimed, found.sent_at)
            self._count(found.claimed, found.ended)
            return 0
        longest = BUSY_POLL_SECONDS if found.busy or not warmed_up else IDLE_POLL_SECONDS
        if found.wait_seconds is None:
            return longest
        if found.wait_seconds <= 0:
            return RACE_SECONDS
        return min(found.wait_seconds, longest)

    async def _prepare(self) -> float:
        """Declare the jobs and see that leases are renewed; return how long to wait for that."""
        if self._capabilities is not None and self._database.installation != self._installation:
            self._begin_anew()
        if self._capabilities is None and (rest := self._declare_at - monotonic()) > 0:
            return rest
        if self._capabilities is None:
            await self._declare()
        self.fault = self._heartbeat.fault()
        return 0 if self.fault is None else RACE_SECONDS

    async def _maintain(self, now: float) -> None:
        if now - self._declared_at >= DECLARE_SECONDS:
            await self._declare_again(now)
        if now - self._away_at < 2 * self._settings.job_lease_seconds:
            await self._clear_up(now)

    # -- after an outage ----------------------------------------------------------------------

    @property
    def _patience_seconds(self) -> float:
        """How late an answer may be before it is as good as an outage.

        An outage in which leases run out lasts longer: each was renewed a heartbeat ago at most.
        """
        return (self._settings.job_lease_seconds - self._settings.job_heartbeat_seconds) / 2

    def _takes_over_until(self, now: float) -> datetime | None:
        """Return until when, by PostgreSQL's clock, a claim may take what another has lost.

        A claim that is carried out later was held up by an outage, and so were the heartbeats of
        those whose leases it finds expired.
        """
        if now - self._away_at < OWNERS_FIRST_SECONDS:
            return None
        return self._heartbeat.server_time() + timedelta(seconds=self._patience_seconds)

    async def _clear_up(self, now: float) -> None:
        """Release claims whose answer was never taken, and take losses back; no claim is under way.

        What was sent before an outage may be carried out long after it: this goes on for a while.
        """
        if now - self._cleared_at < CLEAR_UP_SECONDS:
            return
        for each in await self._jobs.abandoned((run.name, run.fence) for run in self._runs):
            ready_at = self._heartbeat.server_time() + release_pause(each.releases)
            completion = Completion(
                outcome="released",
                result=NOT_BEGUN,
                seconds_ago=0,
                ready_at=ready_at,
                keeps_checkpoint=True,
                releases=each.releases + 1,
                retries=each.retries,
            )
            if await self._jobs.finish(each.name, each.fence, completion):
                log.info("claim released", job=each.name, fence=each.fence)
                self._metrics.run_ended(each.name, completion.outcome)
        refuted = await self._jobs.refute_losses()
        if refuted:
            log.info("losses taken back: this instance lives", jobs=refuted)
        self._cleared_at = now

    # -- declarations -------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """Stop all runs: the tables that hold their leases are gone, and others in their place.

        What is known of the jobs is void, and their fences begin again. No job is taken before
        every run that began on the tables of before has ended, here and elsewhere.
        """
        log.warning("the tables are other ones than before", stopping=len(self._runs))
        self._capabilities = None
        self._declare_at = monotonic() + self._settings.job_lease_seconds
        for run in list(self._runs):
            stop(run, "released", "its database was made anew, or restored")

    async def _declare(self) -> Capabilities:
        self._installation = self._database.installation
        try:
            capabilities = await self._jobs.declare(*self._declared())
        except Exception as error:
            if not isinstance(error, DatabaseUnavailable):  # which concerns more than the jobs
                self._set_undeclared(dict.fromkeys(self._registry, repr(error)))
            raise
        self._set_undeclared(self._jobs.undeclared)
        self._capabilities = capabilities
        self._booted = self._declared_at = monotonic()
        self._heartbeat.set_clock(capabilities.booted_at, self._booted)
        if not self._draining:
            self._heartbeat.start(capabilities)
        log.info("scheduler started", instance=str(self.me.id), jobs=len(self._registry))
        return capabilities

    def _declared(self) -> tuple[dict[str, tuple[str, str]], dict[str, timedelta]]:
        jobs = self._registry.values()
        return (
            {job.name: (str(job.schedule), job.description) for job in jobs},
            {job.name: timedelta(seconds=job.jitter_seconds) for job in jobs},
        )

    async def _declare_again(self, now: float) -> None:
        """Keep the declarations alive, and mend what a clock that was set back has left.

        Others may have been as long without the database as this instance: theirs count as long.
        """
        live = LIVE + timedelta(seconds=now - self._declared_at - DECLARE_SECONDS)
        await self._jobs.declare(*self._declared(), live=live)
        self._set_undeclared(self._jobs.undeclared)
        self._declared_at = now
        ahead = await self._jobs.ahead()
        seen_at = monotonic()
        self._ahead = {lease: self._ahead.get(lease, seen_at) for lease in ahead}
        for lease, first_seen_at in self._ahead.items():
            if seen_at - first_seen_at > lease.length.total_seconds() and (
                await self._jobs.expire(lease)
            ):
                log.warning("a lease from before the clock was set back is over", job=lease.name)

    def condition(self) -> str:
        """Return what keeps jobs from running here as they are declared; "ok" if nothing does."""
        if self.fault is not None:
            return f"No jobs are claimed here. {self.fault}"
        if not self.undeclared:
            return "ok"
        few = islice(self.undeclared.items(), NAMED)
        named = "; ".join(f"{name}: {reason}" for name, reason in few)
        rest = len(self.undeclared) - NAMED
        more = f"; and {rest} more" if rest > 0 else ""
        return f"Not declared, so not run as this program says: {named}{more}."

    def _set_undeclared(self, undeclared: dict[str, str]) -> None:
        found = {name: plain(reason, 500) for name, reason in undeclared.items()}
        for name, reason in found.items():
            if self.undeclared.get(name) != reason:
                log.error("job not declared", job=name, reason=reason)
        self.undeclared = found
        self._metrics.jobs_undeclared.set(len(undeclared))

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._soon.wait(), seconds)
        except TimeoutError:
            return
        self._soon.clear()

    def _minimum(self, job: Job) -> float:
        return self._settings.job_min_seconds if job.min_seconds is None else job.min_seconds

    # -- runs ---------------------------------------------------------------------------------

    def _start(self, claimed: Claimed, sent_at: float) -> None:
        self._round = claimed.round + 1
        job = self._registry[claimed.name]
        run = Run(claimed, self._database, self._jobs, min_seconds=self._minimum(job))

        def stop_run(outcome: str, reason: str) -> None:
            stop(run, "cancelled" if outcome == "cancelled" else "released", reason)

        run.lease = self._leases.hold(run.name, run.fence, sent_at, stop_run)
        if self._leases.is_late(run.lease):
            self._heartbeat.renew_soon()
        if not run.lease.executing:
            self._away_at = monotonic()  # as good as: it is released before it looks lost
            run.stopped = ("released", "the answer to its claim came too late")
        elif (
            claimed.cancel_requested_by is not None
        ):  # its last owner was lost before it could obey
            run.stopped = ("cancelled", f"cancelled by {claimed.cancel_requested_by}")
        elif self._draining:
            run.stopped = ("released", STOPPED)
        # Of its own context: the run belongs to no request.
        self._runs[run] = asyncio.create_task(
            self._execute(run, job, claimed), name=run.name, context=Context()
        )

    def _count(self, claimed: Claimed, run_before: str | None) -> None:
        if claimed.attempt == 0:
            delay = claimed.started_at - claimed.due_at
            self._metrics.start_delay.observe(delay.total_seconds())
        self._metrics.run_ended(claimed.name, run_before)
        if run_before == "lost":
            self._metrics.takeovers.labels(claimed.name).inc()

    async def _execute(self, run: Run, job: Job, claimed: Claimed) -> None:
        """Execute a run, record its completion, and release its lease."""
        started = monotonic()
        assert run.lease is not None  # noqa: S101 - held since the claim
        try:
            try:
                run.log.info("run started", attempt=run.attempt, resumed=run.resumed is not None)
                run_result = await execute(run, job, min_seconds=self._minimum(job))
            finally:
                self._leases.ended(run.lease)
            ended = monotonic()
            seconds = round(ended - started, 1)
            run.log.info("run ended", **run_result._asdict(), seconds=seconds)
            await self._record(run, job, claimed, run_result, ended)
        except Exception:
            run.log.exception("the end of a run can't be recorded: its lease runs out")
        finally:
            self._leases.release(run.lease)
            del self._runs[run]
            self._soon.set()

    async def _record(
        self,
        run: Run,
        job: Job,
        claimed: Claimed,
        run_result: RunResult,
        ended: float,
    ) -> None:
        """Record the end of a run; however long the database is unavailable, unless all stops."""
        while True:
            now = self._heartbeat.server_time()
            completion = complete(job, claimed, run_result, now, seconds_ago=monotonic() - ended)
            try:
                done = await self._jobs.finish(run.name, run.fence, completion, claimed.schedule)
            except DatabaseUnavailable as problem:
                if self._draining:
                    raise
                run.log.debug("the end of a run waits for the database", reason=problem.detail)
                await asyncio.sleep(AWAY_SECONDS / 2)
                continue
            if isinstance(done, str):  # declared anew meanwhile
                claimed = claimed._replace(schedule=done)
                continue
            if done:
                self._metrics.run_ended(run.name, completion.outcome)
                skipped = sum(each.range.ticks for each in completion.skipped)
                self._metrics.ticks_skipped.labels(run.name).inc(skipped)
            else:
                run.log.warning("the run had lost its job before it ended")
                self._away_at = monotonic()
                self._soon.set()
            return


def backoff(runs: int, step_seconds: float) -> timedelta:
    """Return how long after a job is ready an instance with so many runs may take it.

    Of instances that could claim the same job the one with the fewest runs comes first, and none
    has to know of another.
    """
    return timedelta(seconds=step_seconds * runs / (1 + runs / MOST_BACKOFF_STEPS))
