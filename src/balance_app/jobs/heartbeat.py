"""The heartbeat thread of an instance: it renews the leases of the runs.

It has an event loop and a connection of its own, so that a job that blocks the service's event loop
loses no lease. How long an instance trusts a renewal is in `leases`. After each
renewal the thread writes what the runs have logged meanwhile.
"""

import asyncio
import math
import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from time import monotonic
from typing import Final

import asyncpg
import structlog

from balance_app.db.outages import Kind, classify
from balance_app.jobs.declarations import Capabilities
from balance_app.jobs.leases import LEAVE, Changes, HeldLeases, Lease, Renewal, renew_leases
from balance_app.jobs.repository import Me
from balance_app.jobs.run_log import WRITE_LOGS, log_arguments
from balance_app.metrics import Metrics
from balance_app.sessions import Session, open_session
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

HANG_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 0.2
# How long a stop waits for the thread, which says that the instance leaves.
STOP_SECONDS: Final = 2.0
LEAVE_SECONDS: Final = 0.5
# After a write of logs that failed, until the next.
LOGS_PAUSE_SECONDS: Final = 5.0


class HeartbeatThread:
    """Renews leases until it is stopped; all methods but `start` may be called from any thread."""

    def __init__(self, settings: Settings, me: Me, leases: HeldLeases, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._me = me
        self._leases = leases
        self._lease_seconds = settings.job_lease_seconds
        self._clock: tuple[datetime, float] | None = None
        self._service: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._soon: asyncio.Event | None = None
        self._stopped = False
        self._answered_at = monotonic()
        self._thread: threading.Thread | None = None
        # whether the connection may lead to a database that was replaced
        self._connect_anew = False
        # whether its row of `instances` says of other jobs that it has them
        self._row_is_old = False
        # why the thread could not be started
        self._start_error: str | None = None
        # when the last successful heartbeat was sent (monotonic)
        self._renewed_at = -math.inf
        self._capabilities: Capabilities | None = None
        # when logs of runs may be written again (monotonic), and why they were not, the last time
        self._logs_at = -math.inf
        self._logs_error: str | None = None

    def start(self, capabilities: Capabilities) -> None:
        """Start to renew; called in the service's event loop, in the main thread.

        If the thread can't be started, `fault` tries again. One that runs already may have written
        into the new tables which jobs of the old ones it had.
        """
        self._leases.start()
        self._capabilities = capabilities
        self._service = asyncio.get_running_loop()
        if self._thread is None or not self._thread.is_alive():
            self._start_thread()
        else:
            self._write_row_anew()

    def note_declared(self, capabilities: Capabilities) -> None:
        """Write with the next heartbeat which jobs this instance has, if it has got others."""
        before, self._capabilities = self._capabilities, capabilities
        if before is not None and before.numbers != capabilities.numbers:
            self._write_row_anew()

    def _write_row_anew(self) -> None:
        self._row_is_old = True
        self.renew_soon()

    def fault(self) -> str | None:
        """Return why leases can't be renewed, so that none may be claimed; None: they can.

        Starts the thread if it is not running.
        """
        if self._thread is None or not self._thread.is_alive():
            self._start_thread()
        if self._start_error is not None:
            return f"The heartbeat thread can't be started: {self._start_error}."
        silent_seconds = monotonic() - self._renewed_at
        if silent_seconds <= self._leases.trust_seconds - self._leases.margin_seconds:
            return None
        return "No heartbeat has been answered lately."

    def _start_thread(self) -> None:
        self._answered_at = monotonic()
        thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if self._start_error is None:
                log.error("the heartbeat thread can't be started", error=str(error))  # noqa: TRY400
            self._start_error = str(error)
        else:
            self._thread, self._start_error = thread, None
            self._renewed_at = monotonic()  # until the first heartbeat has had its time

    async def stop(self) -> None:
        """End the thread; leases still held expire, and the watchdog timer stays armed for them."""
        self._stopped = True
        self.renew_soon()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    def renew_soon(self) -> None:
        """Send the next heartbeat now."""
        if self._loop is not None and self._soon is not None:
            with suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(self._soon.set)

    def connect_anew(self) -> None:
        """Leave the connection, which may lead to a database that was replaced."""
        self._connect_anew = True
        self.renew_soon()

    def set_clock(self, now: datetime, at: float) -> None:
        """Record that the server's clock showed `now` at `at` (monotonic)."""
        self._clock = (now, at)

    def server_time(self) -> datetime:
        """Return the server's time now, within some milliseconds."""
        assert self._clock is not None  # noqa: S101 - nothing runs before the first claim
        now, at = self._clock
        return now + timedelta(seconds=monotonic() - at)

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._renew_until_stopped())
        except Exception:  # the watchdog timer stays armed
            log.exception("the heartbeat thread has stopped")

    async def _renew_until_stopped(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._soon = asyncio.Event()
        watch = asyncio.create_task(self._stop_before_expiry())
        connection: Session | None = None
        logged: Kind | str | None = None
        try:
            while not self._stopped:
                started = monotonic()
                pause = self._settings.job_heartbeat_seconds
                try:
                    connection = await self._connected(connection)
                    if self._service_answers() and not await self._renew(connection):
                        pause = RETRY_SECONDS
                    logged = None
                except Exception as error:  # noqa: BLE001 - the next try may succeed
                    cause = classify(error)
                    found = repr(error) if cause is None else cause.kind
                    if found != logged:  # once for each cause
                        logged = found
                        state = None if cause is None else cause.sqlstate
                        log.warning("heartbeat failed", error=repr(error), sqlstate=state)
                    pause = RETRY_SECONDS if self._leases.all() else pause
                    if connection is not None:
                        connection.terminate()
                rest = max(RETRY_SECONDS, started + pause - monotonic())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._soon.wait(), rest)
                self._soon.clear()
            # Else it counts as gone against its will, until somebody dismisses it; so it is tried
            # also after a heartbeat that failed.
            with suppress(Exception):
                connection = await self._connected(connection)
                await connection.execute(LEAVE, self._me.id, timeout=LEAVE_SECONDS)
        finally:
            watch.cancel()
            if connection is not None:
                connection.terminate()

    async def _connected(self, connection: Session | None) -> Session:
        """Return the connection, or a new one when it is closed, or may lead to an old database."""
        anew, self._connect_anew = self._connect_anew, False
        if connection is not None and (anew or not connection.is_current()):
            connection.terminate()
        if connection is None or connection.is_closed():
            return await self._connect()
        return connection

    async def _connect(self) -> Session:
        arguments = self._settings.connect_arguments()
        arguments["timeout"] = min(arguments["timeout"], self._lease_seconds / 6)
        return await open_session(arguments)

    async def _renew(self, connection: "asyncpg.Connection[asyncpg.Record]") -> bool:
        """Renew all leases; False: a row was locked and must be tried again soon."""
        leases = {(lease.name, lease.fence): lease for lease in self._leases.all()}
        capabilities = self._capabilities
        assert capabilities is not None  # noqa: S101 - started with it
        renewals = [
            Renewal(lease.name, lease.fence, lease.progress, lease.stopping)
            for lease in leases.values()
        ]
        counted = self._metrics.changes
        changes = Changes(counted.count("accepted"), counted.count("refused"))
        sent_at = monotonic()
        now, results = await asyncio.wait_for(
            renew_leases(
                connection,
                self._me,
                timedelta(seconds=self._lease_seconds),
                capabilities,
                renewals,
                changes,
            ),
            self._settings.job_heartbeat_seconds,
        )
        answered_at = monotonic()
        self._renewed_at = sent_at
        self.set_clock(now, answered_at)
        renewed = [leases[each.name, each.fence] for each in results if each.renewed]
        end = self._leases.renew(renewed, sent_at)
        if end is not None:
            self._metrics.lease_margin.observe((end - answered_at) / self._lease_seconds)
        for result in results:
            lease = leases[result.name, result.fence]
            if result.cancel_requested_by is not None:
                self._leases.stop_run(
                    lease, "cancelled", f"cancelled by {result.cancel_requested_by}"
                )
            elif not result.renewed and not result.still_held:
                self._leases.stop_run(lease, "released", "its lease expired")
        await self._write_logs(connection, leases.values())
        if self._row_is_old:
            await self._delete_row(connection)
        return all(result.renewed or not result.still_held for result in results)

    async def _delete_row(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Delete this instance's row of `instances`; a heartbeat writes it anew at once.

        So none has to update the list of jobs that the instance lacks, which may be long.
        """
        self._row_is_old = False
        try:
            await connection.execute(LEAVE, self._me.id, timeout=LEAVE_SECONDS)
        except BaseException:
            self._row_is_old = True
            raise
        self.renew_soon()

    async def _write_logs(
        self, connection: "asyncpg.Connection[asyncpg.Record]", leases: Iterable[Lease]
    ) -> None:
        """Write what runs have said since the last time; it ends before the next renewal is due.

        A log is worth no lease: after a failure the connection is asked for renewals alone for a
        while.
        """
        logs = {(each.name, each.fence): each.log for each in leases if each.log is not None}
        said = {run: what for run, log_ in logs.items() if (what := log_.unwritten()) is not None}
        if not said or monotonic() < self._logs_at:
            return
        seconds = self._settings.job_heartbeat_seconds / 2
        try:
            await connection.fetch(WRITE_LOGS, *log_arguments(self._me.id, said), timeout=seconds)
        except Exception as error:  # noqa: BLE001 - whatever it is, leases go on being renewed
            self._logs_at = monotonic() + LOGS_PAUSE_SECONDS
            if repr(error) != self._logs_error:  # and not with each of its tries
                self._logs_error = repr(error)
                log.warning("logs of runs are not written", error=repr(error))
            return
        self._logs_error = None
        for run, what in said.items():
            logs[run].written(what)

    async def _stop_before_expiry(self) -> None:
        while True:
            seconds = self._leases.stop_before_expiry()
            await asyncio.sleep(seconds)

    def _service_answers(self) -> bool:
        """Return whether the service's event loop responds; if it hangs, no lease is renewed."""
        assert self._service is not None  # noqa: S101 - started in it
        self._service.call_soon_threadsafe(self._note_answer)
        silent_seconds = monotonic() - self._answered_at
        if silent_seconds > HANG_SECONDS:
            log.error("the event loop hangs: no more heartbeats", seconds=round(silent_seconds))
            return False
        return True

    def _note_answer(self) -> None:
        self._answered_at = monotonic()
