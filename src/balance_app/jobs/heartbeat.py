"""The heartbeat of an instance: it renews the leases of its runs, and stops what it can't renew.

The heartbeat thread has a connection of its own, so that a job that blocks the event loop loses no
lease. A renewal is trusted for as long as a lease less a reserve, counted from the
moment it was sent: the server granted the lease later than that, so trust ends before the lease,
also when PostgreSQL's clock steps ahead meanwhile, by the reserve at most. Shortly before
trust ends the runs are told to stop. What can't stop (frozen, blocked) is ended by the kernel: each
good heartbeat sets the watchdog timer anew (see `watchdog`), which ends the process before it
executes one more instruction, also when it is frozen.
"""

import asyncio
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Final

import asyncpg
import structlog

from balance_app.db.outages import Kind, classify
from balance_app.jobs.declarations import Capabilities
from balance_app.jobs.repository import LEAVE, Me, Progress, Renewal, renew_leases
from balance_app.jobs.watchdog import WatchdogTimer, watchdog_timer
from balance_app.metrics import Metrics
from balance_app.sessions import open_session
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

HANG_SECONDS: Final = 60.0
AGAIN_SECONDS: Final = 0.2
STOP_SECONDS: Final = 0.5
# The watchdog timer may be set this much late.
ARM_SECONDS: Final = 0.005
NOTHING_SAID: Final = Progress(None, None, None)


@dataclass(slots=True, eq=False)
class Lease:
    """A lease on one job, as far as this instance trusts it (monotonic seconds)."""

    name: str
    fence: int
    trusted_until: float
    # called in the event loop, with what to say: stop now
    stop: Callable[[str, str], None]
    # is code of the run still executing?
    executing: bool = True
    stop_sent: bool = False
    # the run was told to stop, by whomever; the next heartbeat writes down since when
    stopping: bool = False
    progress: Progress = NOTHING_SAID


class Heartbeat:
    """Renews leases until it is stopped; all its methods may be called from any thread."""

    def __init__(
        self, settings: Settings, me: Me, metrics: Metrics | None = None, *, watchdog: bool = True
    ) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._me = me
        self._has_watchdog = watchdog
        self._watchdog: WatchdogTimer | None = None
        self._lease_seconds = settings.job_lease_seconds
        self._trust_seconds = settings.job_lease_seconds - settings.clock_reserve_seconds
        # how long before the end of trust runs are told to stop
        self._margin_seconds = min(1.0, self._lease_seconds / 6)
        self._lock = threading.Lock()
        self._leases: set[Lease] = set()
        self._clock: tuple[datetime, float] | None = None
        self._service: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._soon: asyncio.Event | None = None
        self._stopped = False
        self._answered_at = monotonic()
        self._thread: threading.Thread | None = None
        # why there is none
        self._no_thread: str | None = None
        # when the last heartbeat was sent that was answered (monotonic)
        self._renewed_at = -math.inf
        self._capabilities: Capabilities | None = None

    def start(self, capabilities: Capabilities) -> None:
        """Begin to renew; called in the event loop of the service, in the main thread.

        Where no thread can be started, `fault` tries again.
        """
        if self._has_watchdog and self._watchdog is None:
            self._watchdog = watchdog_timer()
        self._capabilities = capabilities
        self._service = asyncio.get_running_loop()
        if self._thread is None or not self._thread.is_alive():
            self._start_thread()

    def fault(self) -> str | None:
        """Say why leases can't be renewed, so that none may be claimed; None: they are renewed.

        A thread that could not be started, or has ended, is started again.
        """
        if self._thread is None or not self._thread.is_alive():
            self._start_thread()
        if self._no_thread is not None:
            return f"The heartbeat thread can't be started: {self._no_thread}."
        silent_seconds = monotonic() - self._renewed_at
        if silent_seconds <= self._trust_seconds - self._margin_seconds:
            return None
        return "No heartbeat has been answered lately."

    def _start_thread(self) -> None:
        self._answered_at = monotonic()
        thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if self._no_thread is None:
                log.error("the heartbeat thread can't be started", error=str(error))  # noqa: TRY400
            self._no_thread = str(error)
        else:
            self._thread, self._no_thread = thread, None
            self._renewed_at = monotonic()  # as good as: the first is on its way

    async def stop(self) -> None:
        """End the thread; leases that are still held stay armed, and run out."""
        self._stopped = True
        self.renew_soon()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    def hold(
        self, name: str, fence: int, sent_at: float, stop: Callable[[str, str], None]
    ) -> Lease:
        """Take charge of a lease that was asked for at `sent_at` (monotonic).

        It is not `executing` when the answer took so long that too little trust is left: then no
        code of the run may begin.
        """
        until = sent_at + self._trust_seconds
        left = until - monotonic()
        least_seconds = self._margin_seconds + self._longest_sleep()
        lease = Lease(name, fence, until, stop, executing=left > least_seconds)
        with self._lock:
            self._leases.add(lease)
            self._arm()
        if lease.executing and left < self._trust_seconds - self._settings.job_heartbeat_seconds:
            self.renew_soon()
        return lease

    def ended(self, lease: Lease) -> None:
        """Note that the run's code has ended: nothing needs to be killed for it any more."""
        with self._lock:
            lease.executing = False
            self._arm()

    def release(self, lease: Lease) -> None:
        """Let go of a lease: the job is free, or no longer this instance's."""
        with self._lock:
            lease.executing = False
            self._leases.discard(lease)
            self._arm()

    def end_within(self, seconds: float) -> None:
        """End this process within that time, or when trust ends, unless it ends by itself."""
        with self._lock:
            watchdog, self._watchdog = self._watchdog, None
            ends = [lease.trusted_until for lease in self._leases if lease.executing]
            left = [seconds, *(max(0.001, end - monotonic()) for end in ends)]
            if watchdog is not None:
                watchdog.set(min(left))

    def renew_soon(self) -> None:
        """Send the next heartbeat now."""
        if self._loop is not None and self._soon is not None:
            with suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(self._soon.set)

    def set_clock(self, now: datetime, at: float) -> None:
        """Note that the server's clock said `now` at `at` (monotonic)."""
        self._clock = (now, at)

    def server_time(self) -> datetime:
        """Return what the server's clock says now, to some milliseconds."""
        assert self._clock is not None  # noqa: S101 - nothing runs before the first claim
        now, at = self._clock
        return now + timedelta(seconds=monotonic() - at)

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._renew_until_stopped())
        except Exception:
            log.exception(
                "the heartbeat thread has stopped"
            )  # the watchdog timer ends what it held

    async def _renew_until_stopped(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._soon = asyncio.Event()
        watch = asyncio.create_task(self._stop_before_expiry())
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        logged: Kind | str | None = None
        try:
            while not self._stopped:
                started = monotonic()
                pause = self._settings.job_heartbeat_seconds
                try:
                    if connection is None or connection.is_closed():
                        connection = await self._connect()
                    if self._service_answers() and not await self._renew(connection):
                        pause = AGAIN_SECONDS
                    logged = None
                except Exception as error:  # noqa: BLE001 - whatever it is, it tries again
                    cause = classify(error)
                    found = repr(error) if cause is None else cause.kind
                    if found != logged:  # and not with each of its tries
                        logged = found
                        state = None if cause is None else cause.sqlstate
                        log.warning("no heartbeat", error=repr(error), sqlstate=state)
                    # Nothing is lost by a pause while there is nothing to renew.
                    pause = AGAIN_SECONDS if self._leases else pause
                    if connection is not None:
                        connection.terminate()
                rest = max(AGAIN_SECONDS, started + pause - monotonic())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._soon.wait(), rest)
                self._soon.clear()
            if connection is not None and not connection.is_closed():
                with suppress(Exception):  # it would be taken for lost, by people alone
                    await connection.execute(LEAVE, self._me.id, timeout=0.5)
        finally:
            watch.cancel()
            if connection is not None:
                connection.terminate()

    async def _connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        arguments = self._settings.connect_arguments()
        arguments["timeout"] = min(arguments["timeout"], self._lease_seconds / 6)
        return await open_session(arguments)

    async def _renew(self, connection: "asyncpg.Connection[asyncpg.Record]") -> bool:
        """Renew all leases; False: a row was locked, try again soon."""
        with self._lock:
            leases = {(lease.name, lease.fence): lease for lease in self._leases}
        capabilities = self._capabilities
        assert capabilities is not None  # noqa: S101 - started with it
        renewals = [Renewal(*key, lease.progress, lease.stopping) for key, lease in leases.items()]
        sent_at = monotonic()
        now, results = await asyncio.wait_for(
            renew_leases(
                connection, self._me, timedelta(seconds=self._lease_seconds), capabilities, renewals
            ),
            self._settings.job_heartbeat_seconds,
        )
        answered_at = monotonic()
        self._renewed_at = sent_at
        self.set_clock(now, answered_at)
        renewed = [leases[each.name, each.fence] for each in results if each.renewed]
        with self._lock:
            ends = [lease.trusted_until for lease in renewed]
            for lease in renewed:
                lease.trusted_until = max(lease.trusted_until, sent_at + self._trust_seconds)
            self._arm()
        if ends:
            self._metrics.lease_margin.observe((min(ends) - answered_at) / self._lease_seconds)
        for result in results:
            lease = leases[result.name, result.fence]
            if result.cancel_by is not None:
                self._stop_run(lease, "cancelled", f"cancelled by {result.cancel_by}")
            elif not result.renewed and not result.still_held:
                self._stop_run(lease, "interrupted", "its lease was over")
        return all(result.renewed or not result.still_held for result in results)

    async def _stop_before_expiry(self) -> None:
        """Tell runs to stop shortly before their lease can't be trusted any more."""
        while True:
            with self._lock:
                executing = [lease for lease in self._leases if lease.executing]
            deadlines = [lease.trusted_until - self._margin_seconds for lease in executing]
            now = monotonic()
            for lease, deadline in zip(executing, deadlines, strict=True):
                if deadline <= now:
                    self._stop_run(lease, "interrupted", "its lease could not be renewed")
            ahead = [deadline - now for deadline in deadlines if deadline > now]
            # A lease that is taken meanwhile lasts longer than this sleep.
            await asyncio.sleep(min([self._longest_sleep(), *ahead]))

    def _longest_sleep(self) -> float:
        return min(self._settings.job_heartbeat_seconds, self._lease_seconds / 12)

    def _stop_run(self, lease: Lease, outcome: str, reason: str) -> None:
        if not lease.stop_sent and self._service is not None:
            lease.stop_sent = True
            with suppress(RuntimeError):  # the loop has ended, and its runs with it
                self._service.call_soon_threadsafe(lease.stop, outcome, reason)

    def _service_answers(self) -> bool:
        """Ask the service's event loop for an answer; one that hangs loses its leases."""
        assert self._service is not None  # noqa: S101 - started in it
        self._service.call_soon_threadsafe(self._note_answer)
        silent_seconds = monotonic() - self._answered_at
        if silent_seconds > HANG_SECONDS:
            log.error("the event loop hangs: no more heartbeats", seconds=round(silent_seconds))
            return False
        return True

    def _note_answer(self) -> None:
        self._answered_at = monotonic()

    def _arm(self) -> None:
        """Set the watchdog timer to the earliest end of trust in what still executes."""
        if self._watchdog is None:
            return
        ends = [lease.trusted_until for lease in self._leases if lease.executing]
        if not ends:
            self._watchdog.set(0)
            return
        # The timer counts from the moment at which it is set: if the process stood still since its
        # time was computed, it is set again.
        late = True
        while late:
            now = monotonic()
            left = min(ends) - ARM_SECONDS - now
            if left <= 0:
                self._watchdog.expire()
            self._watchdog.set(max(0.001, left))
            late = monotonic() - now > ARM_SECONDS
