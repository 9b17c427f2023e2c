"""The scheduler of one instance: it claims ready jobs by its claim policy and runs them."""

import asyncio
import math
from collections.abc import Sequence
from contextvars import Context
from datetime import datetime, timedelta
from itertools import islice
from time import monotonic
from typing import Final
from uuid import uuid4

import structlog

from balance_app.db.migrations import Installation
from balance_app.db.outages import ends_a_statement_only
from balance_app.db.pool import Database
from balance_app.errors import DatabaseUnavailable
from balance_app.jobs.arguments import encode
from balance_app.jobs.completion import complete, release_pause, skip_late
from balance_app.jobs.declarations import LIVE, Capabilities, Declared
from balance_app.jobs.heartbeat import HeartbeatThread
from balance_app.jobs.job import Job, Registry
from balance_app.jobs.leases import HeldLeases
from balance_app.jobs.repository import (
    NOT_BEGUN,
    STOPPED,
    Ahead,
    Changed,
    Claimed,
    ClaimPolicy,
    Completion,
    JobRepository,
    Me,
)
from balance_app.jobs.run import Run
from balance_app.jobs.run_log import RunLog, storable
from balance_app.jobs.runner import RunResult, execute, stop
from balance_app.jobs.scope import track_runs
from balance_app.masks import mask_of
from balance_app.metrics import Metrics
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

# How often to try a claim while a job runs on any instance, as it may end at any moment, and while
# none does: the page reports of a job that was requested that it starts within two seconds.
BUSY_POLL_SECONDS: Final = 0.25
IDLE_POLL_SECONDS: Final = 1.75
# The wait before a claim that lost a race is tried again.
RACE_SECONDS: Final = 0.05
OUTAGE_POLL_SECONDS: Final = 0.25
# For this long after an outage an instance takes over no expired lease: the holder may still record
# how its run ended.
OWNERS_FIRST_SECONDS: Final = 2.0
RECONCILE_SECONDS: Final = 0.5
# How often an instance declares its jobs again.
DECLARE_SECONDS: Final = 15.0
# How much later an instance that has already claimed a job in this round may claim the next.
TIE_BREAK: Final = timedelta(milliseconds=10)
# The backoff grows with the number of runs here, ever more slowly, towards this many steps.
MOST_BACKOFF_STEPS: Final = 10
DRAIN_SECONDS: Final = 0.8
# How long a completion waits for the last log lines of its run, and while the instance stops.
LOG_SECONDS: Final = 2.0
LOG_SECONDS_AT_STOP: Final = 0.3
MOST_REASONS: Final = 5  # undeclared jobs that are reported with their reasons
# A process with runs that can't be stopped ends within this. Their leases end later, by as much as
# PostgreSQL's clock may step, or at least this.
EXIT_SECONDS: Final = 2.0
LEAST_RESERVE_SECONDS: Final = 0.5


class Scheduler:
    """Runs jobs on this instance and shares them with other instances, without knowing of any."""

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
        self._mask = mask_of(settings)
        self.me: Final = Me(uuid4(), settings.server_id)
        self._jobs = JobRepository(database, self.me, timedelta(seconds=settings.job_lease_seconds))
        self._metrics = metrics or Metrics()
        self._leases = HeldLeases(settings, watchdog=watchdog)
        self._heartbeat = HeartbeatThread(settings, self.me, self._leases, self._metrics)
        self._capabilities: Capabilities | None = None
        # the installed tables in which the jobs are declared, and the earliest time (monotonic) to
        # declare them
        self._installation: Installation | None = None
        self._declare_at = 0.0
        # when to declare them again (monotonic), and whether a time limit ended the last try
        self._declare_again_at = 0.0
        self._held_up = False
        # jobs that do not run as this program declares them, with the reason
        self.undeclared: dict[str, str] = {}
        # why this instance can claim no jobs; None: it can
        self.fault: str | None = None
        self._runs: dict[Run, asyncio.Task[None]] = {}
        self._metrics.jobs_running.set_function(lambda: len(self._runs))
        self._round = 0
        self._booted = 0.0
        # when the database was last unavailable, no heartbeat was answered, or a claim's response
        # was late
        self._outage_at = -math.inf
        self._reconciled_at = -math.inf
        # when the jobs were last declared, and when each lease with a heartbeat in the future was
        # first seen
        self._declared_at = math.inf
        self._ahead: dict[Ahead, float] = {}
        self._soon = asyncio.Event()
        self._draining = False
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to claim jobs, in a task of its own."""
        track_runs(asyncio.get_running_loop())
        self._loop = asyncio.create_task(self.run(), context=Context())

    async def stop(self) -> None:
        """Claim no more jobs, request all runs to stop, and release them as they end.

        Returns within a second. A run that has not ended by then keeps its lease; see `close`.
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

        A run that could not be stopped keeps a shortened lease. Before that expires the watchdog
        timer has killed this process.
        """
        uncancellable = list(self._runs)
        if uncancellable:
            log.warning("runs could not be stopped", jobs=[run.name for run in uncancellable])
            self._leases.end_within(EXIT_SECONDS)
        await self._heartbeat.stop()
        reserve = max(LEAST_RESERVE_SECONDS, self._settings.clock_reserve_seconds)
        last_lease = timedelta(seconds=EXIT_SECONDS + reserve)
        for run in uncancellable:
            try:
                await self._jobs.mark_releasing(run.name, run.fence, last_lease)
            except DatabaseUnavailable:
                log.warning("run not released: its lease will expire", job=run.name)
        if self._loop is not None:
            self._loop.cancel()

    def wake(self) -> None:
        """Try a claim and send a heartbeat now: a job's row has changed."""
        self._soon.set()
        self._heartbeat.renew_soon()

    async def run(self) -> None:
        """Claim jobs until requested to stop."""
        while not self._draining:
            try:
                wait_seconds = await self.run_once()
            except DatabaseUnavailable as problem:
                log.debug("claim not possible", reason=problem.detail)
                self._outage_at = monotonic()
                wait_seconds = OUTAGE_POLL_SECONDS
            except Exception:
                log.exception("claim failed")
                wait_seconds = IDLE_POLL_SECONDS
            if wait_seconds > 0:
                await self._sleep(wait_seconds)
            else:
                # Let the run take its first step: if it blocks the event loop, the response to a
                # claim sent before would be received too late.
                await asyncio.sleep(0)

    async def run_once(self) -> float:
        """Try to claim a job once, and start it.

        Returns:
            The seconds to wait before the next claim; 0 after a job was claimed or freed.
        """
        wait_seconds = await self._prepare()
        capabilities = self._capabilities
        if capabilities is None or wait_seconds > 0:
            return wait_seconds
        now = monotonic()
        warmed_up = now - self._booted >= self._settings.job_warm_up_seconds
        warm_up = timedelta(seconds=self._settings.job_warm_up_seconds)
        await self._maintain(now)
        if len(self._runs) >= (capabilities.max_running or math.inf):
            return IDLE_POLL_SECONDS
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
        if monotonic() - found.sent_at > self._late_seconds:
            self._outage_at = monotonic()
        if found.freed is not None:
            log.warning("job quarantined or lost while paused", job=found.freed)
            self._metrics.run_ended(found.freed, found.ended)
            return 0
        if found.claimed is not None:
            self._start(found.claimed, found.sent_at)
            self._count(found.claimed, found.ended)
            return 0
        if found.late:
            await self._skip_late(found.late)
        longest = BUSY_POLL_SECONDS if found.busy or not warmed_up else IDLE_POLL_SECONDS
        if found.wait_seconds is None:
            return longest
        return min(found.wait_seconds, longest) if found.wait_seconds > 0 else RACE_SECONDS

    async def runs_ended(self) -> None:
        """Wait until every run of this instance has ended, and is recorded."""
        if self._runs:
            await asyncio.wait(set(self._runs.values()))

    async def _prepare(self) -> float:
        """Declare the jobs, check the heartbeat, and return the seconds to wait before a claim."""
        if self._capabilities is not None and self._database.installation != self._installation:
            self._reset()
        if self._capabilities is None and (rest := self._declare_at - monotonic()) > 0:
            return rest
        if self._capabilities is None:
            await self.declare()
        self.fault = self._heartbeat.fault()
        if self.fault is None:
            return 0
        # No claim is tried meanwhile that would meet the outage, so its end is noted here.
        self._outage_at = monotonic()
        return RACE_SECONDS

    async def _maintain(self, now: float) -> None:
        """Declare again and reconcile, when it is time.

        A foreign lock that keeps either from its tables or rows keeps no job from being claimed.
        """
        try:
            if now >= self._declare_again_at:
                await self._declare_again(now)
            if now - self._outage_at < 2 * self._settings.job_lease_seconds:
                await self._reconcile(now)
        except DatabaseUnavailable as problem:
            if not ends_a_statement_only(problem):
                raise
            self._declare_again_at = now + DECLARE_SECONDS
            if not self._held_up:
                log.warning("upkeep of the jobs is held up", reason=problem.detail)
            self._held_up = True

    # -- after an outage ----------------------------------------------------------------------

    @property
    def _late_seconds(self) -> float:
        """How late a response may be before it is treated as an outage.

        An outage in which leases expire lasts longer: each was renewed within a heartbeat before.
        """
        return (self._settings.job_lease_seconds - self._settings.job_heartbeat_seconds) / 2

    def _takes_over_until(self, now: float) -> datetime | None:
        """Return until when, by PostgreSQL's clock, a claim may take over an expired lease.

        A claim that is executed later was delayed by an outage, which may have delayed the
        heartbeats of the holders too.
        """
        if now - self._outage_at < OWNERS_FIRST_SECONDS:
            return None
        return self._heartbeat.server_time() + timedelta(seconds=self._late_seconds)

    async def _reconcile(self, now: float) -> None:
        """Release claims whose response was not received, and retract losses.

        Called while no claim is in flight, and repeated for a while after an outage: PostgreSQL may
        execute a claim long after it was sent.
        """
        if now - self._reconciled_at < RECONCILE_SECONDS:
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
            if await self._jobs.finish(each.name, each.fence, completion) is True:
                log.info("claim released", job=each.name, fence=each.fence)
                self._metrics.run_ended(each.name, completion.outcome)
        retracted = await self._jobs.retract_losses()
        if retracted:
            log.info("losses retracted: this instance is running", jobs=retracted)
        self._reconciled_at = now

    # -- declarations -------------------------------------------------------------------------

    def _reset(self) -> None:
        """Stop all runs: the tables that held their leases were replaced by others.

        The capabilities are void and fences may repeat. No job is claimed for a lease's length, so
        that every run which started on the old tables has ended, here and on other instances.
        """
        log.warning("the tables were replaced", stopping=len(self._runs))
        self._capabilities = None
        self._declare_at = monotonic() + self._settings.job_lease_seconds
        self._heartbeat.connect_anew()
        for run in list(self._runs):
            stop(run, "released", "its database was recreated or restored")

    async def declare(self) -> Capabilities:
        """Declare the jobs of this program, and begin to renew leases; see `undeclared`."""
        self._installation = self._database.installation
        try:
            capabilities = await self._jobs.declare(*self._declared())
            capabilities = capabilities._replace(max_running=self._settings.job_max_running)
        except Exception as error:
            if not isinstance(error, DatabaseUnavailable):  # an outage is reported elsewhere
                self._set_undeclared(dict.fromkeys(self._registry, repr(error)))
            raise
        self._set_undeclared(self._jobs.undeclared)
        self._capabilities = capabilities
        self._booted = self._declared_at = monotonic()
        self._declare_again_at = self._booted + DECLARE_SECONDS
        self._heartbeat.set_clock(capabilities.booted_at, self._booted)
        if not self._draining:
            self._heartbeat.start(capabilities)
        log.info("scheduler started", instance=str(self.me.id), jobs=len(self._registry))
        return capabilities

    def _declared(self) -> tuple[dict[str, Declared], dict[str, timedelta]]:
        jobs = self._registry.values()
        return (
            {job.name: _declaration(job) for job in jobs},
            {job.name: timedelta(seconds=job.jitter_seconds) for job in jobs},
        )

    async def _declare_again(self, now: float) -> None:
        """Keep the declarations live, and expire leases from before the clock was set back.

        Other instances may have been without the database for as long as this one, so their
        declarations stay live for that much longer.
        """
        live = LIVE + timedelta(seconds=now - self._declared_at - DECLARE_SECONDS)
        before = self._capabilities
        assert before is not None  # noqa: S101 - declared before
        found = await self._jobs.declare(*self._declared(), live=live)
        # A job whose row was added only now has a number that it can be claimed by.
        self._capabilities = found._replace(
            booted_at=before.booted_at, max_running=before.max_running
        )
        self._heartbeat.note_declared(self._capabilities)
        self._set_undeclared(self._jobs.undeclared)
        self._declared_at, self._declare_again_at = now, now + DECLARE_SECONDS
        ahead = await self._jobs.ahead()
        seen_at = monotonic()
        self._ahead = {lease: self._ahead.get(lease, seen_at) for lease in ahead}
        for lease, first_seen_at in self._ahead.items():
            if seen_at - first_seen_at > lease.length.total_seconds() and (
                await self._jobs.expire(lease)
            ):
                log.warning("lease from before the clock was set back expired", job=lease.name)
        self._held_up = False

    def condition(self) -> str:
        """Return why jobs do not run here as they are declared; "ok" if they do."""
        if self.fault is not None:
            return f"No jobs are claimed here. {self.fault}"
        if not self.undeclared:
            return "ok"
        first = islice(self.undeclared.items(), MOST_REASONS)
        named = "; ".join(f"{name}: {reason}" for name, reason in first)
        rest = len(self.undeclared) - MOST_REASONS
        more = f"; and {rest} more" if rest > 0 else ""
        return f"Not run as this program declares them: {named}{more}."

    def _set_undeclared(self, undeclared: dict[str, str]) -> None:
        found = {name: storable(reason, 500) for name, reason in undeclared.items()}
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
        kept_log = RunLog(
            claimed.name,
            claimed.fence,
            clock=self._heartbeat.server_time,
            mask=self._mask,
            debug=self._settings.log_level == "debug",
        )
        run = Run(
            claimed,
            self._database,
            self._jobs,
            min_seconds=self._minimum(job),
            args=job.args_with(claimed.requested_args),
            kept_log=kept_log,
        )

        def stop_run(outcome: str, reason: str) -> None:
            stop(run, "cancelled" if outcome == "cancelled" else "released", reason)

        run.lease = self._leases.hold(run.name, run.fence, sent_at, stop_run)
        run.lease.log = kept_log
        if self._leases.is_late(run.lease):
            self._heartbeat.renew_soon()
        if not run.lease.executing:
            self._outage_at = monotonic()  # so that others' losses are retracted too
            run.stopped = ("released", "the response to its claim was too late")
        elif claimed.cancel_requested_by is not None:  # the previous run was lost before it stopped
            run.stopped = ("cancelled", f"cancelled by {claimed.cancel_requested_by}")
        elif self._draining:
            run.stopped = ("released", STOPPED)
        # An empty context: the run belongs to no request.
        self._runs[run] = asyncio.create_task(
            self._execute(run, job, claimed), name=run.name, context=Context()
        )

    async def _skip_late(self, names: Sequence[str]) -> None:
        for tick in await self._jobs.late(names):
            skip = skip_late(self._registry[tick.name], tick)
            if await self._jobs.skip(tick, skip):
                ticks = skip.skipped.range.ticks
                self._metrics.ticks_skipped.labels(tick.name).inc(ticks)
                due_at = tick.due_at.isoformat()
                log.warning("late ticks skipped", job=tick.name, due_at=due_at, ticks=ticks)

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
        instance_logger = run.kept_log.instance_logger
        assert run.lease is not None  # noqa: S101 - held since the claim
        try:
            try:
                instance_logger.info(
                    "run started", attempt=run.attempt, resumed=run.resumed is not None
                )
                run_result = await execute(run, job, min_seconds=self._minimum(job))
            finally:
                self._leases.ended(run.lease)
            ended = monotonic()
            seconds = round(ended - started, 1)
            instance_logger.info("run ended", **run_result._asdict(), seconds=seconds)
            await self._record(run, job, claimed, run_result, ended)
        except Exception:
            instance_logger.exception("the end of a run can't be recorded: its lease will expire")
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
        """Record the end of a run, with retries during an outage until the instance stops."""
        instance_logger = run.kept_log.instance_logger
        while True:
            not_written = await self._write_log(run)
            now = self._heartbeat.server_time()
            completion = complete(job, claimed, run_result, now, seconds_ago=monotonic() - ended)
            try:
                done = await self._jobs.finish(run.name, run.fence, completion, claimed.schedule)
            except DatabaseUnavailable as problem:
                if self._draining:
                    raise
                instance_logger.debug("the end of a run is not recorded yet", reason=problem.detail)
                await asyncio.sleep(OUTAGE_POLL_SECONDS / 2)
                continue
            if isinstance(done, Changed):
                claimed = claimed._replace(schedule=done.schedule)
                if run_result.outcome == "released" and done.cancel_requested_by is not None:
                    by = done.cancel_requested_by
                    run_result = RunResult("cancelled", f"cancelled by {by}")
                continue
            if done:
                self._metrics.run_ended(run.name, completion.outcome)
                skipped = sum(each.range.ticks for each in completion.skipped)
                self._metrics.ticks_skipped.labels(run.name).inc(skipped)
                if not_written is not None:
                    instance_logger.warning("its last log lines are lost", reason=not_written)
            else:
                instance_logger.warning("the run had lost its lease before it ended")
                self._outage_at = monotonic()
                self._soon.set()
            return

    async def _write_log(self, run: Run) -> str | None:
        """Write the last lines of a run, in a time that its completion can wait.

        Returns:
            Why they are not written; None: they are.
        """
        what = run.kept_log.unwritten()
        if what is None:
            return None
        seconds = LOG_SECONDS_AT_STOP if self._draining else LOG_SECONDS
        try:
            await self._jobs.write_log(run.name, run.fence, what, seconds=seconds)
        except Exception as error:  # noqa: BLE001 - whatever it is, the completion goes on
            return repr(error)
        run.kept_log.written(what)
        return None


def backoff(runs: int, step_seconds: float) -> timedelta:
    """Return how long after a job is ready an instance that has `runs` runs may claim it.

    The instance with the fewest runs is the first that may claim a job, and none has to know of
    another.
    """
    return timedelta(seconds=step_seconds * runs / (1 + runs / MOST_BACKOFF_STEPS))


def _declaration(job: Job) -> Declared:
    within = job.start_within_seconds
    return Declared(
        str(job.schedule),
        job.description,
        encode(job.args),
        None if within is None else timedelta(seconds=within),
    )
