"""The leases that an instance holds: a run whose lease can't be renewed in time is stopped.

An instance trusts a lease for its length less a reserve, counted from when the claim or renewal was
sent. The server granted the lease later than that, so trust ends before the lease does, even if
PostgreSQL's clock steps ahead meanwhile by as much as the reserve. Shortly before trust ends the
runs are requested to stop. If the process can't stop one (it is frozen or blocked), the watchdog
timer, which each renewal sets again, kills the process before it executes one more instruction (see
`watchdog`).
"""

import asyncio
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Final, NamedTuple

import asyncpg

from balance_app.jobs.declarations import Capabilities
from balance_app.jobs.repository import Me
from balance_app.jobs.run_log import RunLog
from balance_app.jobs.watchdog import WatchdogTimer, watchdog_timer
from balance_app.settings import Settings

# How late the watchdog timer may be set.
ARM_SECONDS: Final = 0.005


class Progress(NamedTuple):
    """The progress that a run reports."""

    done: int | None
    total: int | None
    note: str | None


NO_PROGRESS: Final = Progress(None, None, None)


@dataclass(slots=True, eq=False)
class Lease:
    """A lease on one job, trusted by this instance until a monotonic time in seconds."""

    name: str
    fence: int
    trusted_until: float
    # requests the run to stop, with outcome and reason; called in the event loop
    stop: Callable[[str, str], None]
    # whether code of the run still executes
    executing: bool = True
    stop_sent: bool = False
    # whether the run was requested to stop; the next heartbeat records the time
    stopping: bool = False
    progress: Progress = NO_PROGRESS
    # what the run says
    log: RunLog | None = None


class HeldLeases:
    """The leases of this instance's runs; all its methods may be called from any thread."""

    def __init__(self, settings: Settings, *, watchdog: bool = True) -> None:
        lease_seconds = settings.job_lease_seconds
        self.trust_seconds: Final = lease_seconds - settings.clock_reserve_seconds
        # how long before the end of trust runs are requested to stop
        self.margin_seconds: Final = min(1.0, lease_seconds / 6)
        self._heartbeat_seconds = settings.job_heartbeat_seconds
        # between two calls of `stop_before_expiry`
        self._longest_sleep = min(settings.job_heartbeat_seconds, lease_seconds / 12)
        self._has_watchdog = watchdog
        self._watchdog: WatchdogTimer | None = None
        self._service: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._leases: set[Lease] = set()

    def start(self) -> None:
        """Create the watchdog timer; called in the runs' event loop, in the main thread."""
        if self._has_watchdog and self._watchdog is None:
            self._watchdog = watchdog_timer()
        self._service = asyncio.get_running_loop()

    def hold(
        self, name: str, fence: int, sent_at: float, stop: Callable[[str, str], None]
    ) -> Lease:
        """Hold a lease whose claim was sent at `sent_at` (monotonic).

        It is not `executing` if the response took so long that too little trust is left; then no
        code of the run may start.
        """
        until = sent_at + self.trust_seconds
        least_seconds = self.margin_seconds + self._longest_sleep
        executing = until - monotonic() > least_seconds
        lease = Lease(name, fence, until, stop, executing=executing)
        with self._lock:
            self._leases.add(lease)
            self._arm()
        return lease

    def is_late(self, lease: Lease) -> bool:
        """Return whether a lease must be renewed at once, as its claim took long."""
        left = lease.trusted_until - monotonic()
        return lease.executing and left < self.trust_seconds - self._heartbeat_seconds

    def ended(self, lease: Lease) -> None:
        """Record that the run's code has ended: the watchdog no longer guards this lease."""
        with self._lock:
            lease.executing = False
            self._arm()

    def release(self, lease: Lease) -> None:
        """Stop holding a lease: the job is free, or another instance may take it."""
        with self._lock:
            lease.executing = False
            self._leases.discard(lease)
            self._arm()

    def end_within(self, seconds: float) -> None:
        """Set the watchdog to kill this process after `seconds`, or earlier if trust ends."""
        with self._lock:
            watchdog, self._watchdog = self._watchdog, None
            ends = [lease.trusted_until for lease in self._leases if lease.executing]
            left = [seconds, *(max(0.001, end - monotonic()) for end in ends)]
            if watchdog is not None:
                watchdog.set(min(left))

    def all(self) -> list[Lease]:
        """Return the leases held now."""
        with self._lock:
            return list(self._leases)

    def renew(self, leases: Iterable[Lease], sent_at: float) -> float | None:
        """Extend the trust in leases by a renewal that was sent at `sent_at` (monotonic).

        Returns:
            The earliest end of their trust before this renewal; None if there are no leases.
        """
        with self._lock:
            ends = []
            for lease in leases:
                ends.append(lease.trusted_until)
                lease.trusted_until = max(lease.trusted_until, sent_at + self.trust_seconds)
            self._arm()
        return min(ends, default=None)

    def stop_run(self, lease: Lease, outcome: str, reason: str) -> None:
        """Request the run of a lease to stop, once."""
        if not lease.stop_sent and self._service is not None:
            lease.stop_sent = True
            with suppress(RuntimeError):  # the event loop is closed, and its runs have ended
                self._service.call_soon_threadsafe(lease.stop, outcome, reason)

    def stop_before_expiry(self) -> float:
        """Request runs to stop whose trust is about to end.

        Returns:
            The seconds until the next call. Any lease claimed meanwhile is trusted for longer.
        """
        with self._lock:
            executing = [lease for lease in self._leases if lease.executing]
        deadlines = [lease.trusted_until - self.margin_seconds for lease in executing]
        now = monotonic()
        for lease, deadline in zip(executing, deadlines, strict=True):
            if deadline <= now:
                self.stop_run(lease, "released", "its lease could not be renewed")
        ahead = [deadline - now for deadline in deadlines if deadline > now]
        return min([self._longest_sleep, *ahead])

    def _arm(self) -> None:
        """Set the watchdog timer to the earliest end of trust of the executing runs."""
        if self._watchdog is None:
            return
        ends = [lease.trusted_until for lease in self._leases if lease.executing]
        if not ends:
            self._watchdog.set(0)
            return
        # The timer counts from when it is set: if the process was suspended after `left` was
        # computed, it is set again.
        late = True
        while late:
            now = monotonic()
            left = min(ends) - ARM_SECONDS - now
            if left <= 0:
                self._watchdog.expire()
            self._watchdog.set(max(0.001, left))
            late = monotonic() - now > ARM_SECONDS


class Renewal(NamedTuple):
    """The renewal of one run's lease, and what it writes to the job's row."""

    name: str
    fence: int
    progress: Progress
    stopping: bool = False


class Changes(NamedTuple):
    """How many changes of balances this instance has accepted, and refused, since its start."""

    accepted: int
    refused: int


NO_CHANGES: Final = Changes(0, 0)


class RenewalResult(NamedTuple):
    """The result of one renewal."""

    name: str
    fence: int
    renewed: bool
    # not renewed, but not lost either: another session had the row locked
    still_held: bool
    cancel_requested_by: str | None


# Renews only leases that this instance holds: fence and holder must still match, and an expired
# lease stays expired. A row that another session has locked is skipped this time: waiting for it
# would let all other leases expire.
#
# $1 id, $2 server, $3 lease, $4 highest_number, $5 missing, $6 to $11 the renewals,
# $12 max_running, $13 and $14 the changes that this instance has accepted and refused
HEARTBEAT: Final = """
WITH renewal AS (  -- one row for each lease to renew
    SELECT * FROM unnest($6::text[], $7::bigint[], $8::boolean[],
                         $9::bigint[], $10::bigint[], $11::text[])
                  AS renewal (name, fence, stopping, done, total, note)
), held AS MATERIALIZED (  -- the live ones, locked against other instances' claims
    SELECT name, fence FROM jobs JOIN renewal USING (name, fence)
    WHERE holder = $1 AND lease_expires_at > clock_timestamp()
    FOR NO KEY UPDATE OF jobs SKIP LOCKED
), renewed AS (  -- extended, with the runs' progress and requests to stop
    UPDATE jobs SET lease_expires_at = clock_timestamp() + $3::interval,
                    last_heartbeat_at = clock_timestamp(),
                    done = renewal.done, total = renewal.total, note = renewal.note,
                    stop_requested_at = CASE
                        WHEN NOT renewal.stopping OR stop_requested_at >= started_at
                        THEN stop_requested_at ELSE clock_timestamp() END
    FROM held JOIN renewal USING (name, fence)
    WHERE jobs.name = held.name
    RETURNING jobs.name, jobs.fence, cancel_requested_by
), seen AS (  -- for display only
    INSERT INTO instances (id, server, highest_number, missing, max_running, accepted, refused)
    VALUES ($1, $2, $4, $5, $12, $13, $14)
    ON CONFLICT (id) DO UPDATE SET
        last_heartbeat_at = clock_timestamp(), accepted = $13, refused = $14,
        silences = CASE
            WHEN instances.last_heartbeat_at + $3::interval > clock_timestamp()
            THEN instances.silences ELSE (ARRAY[instances.last_heartbeat_at, clock_timestamp()]
                  || instances.silences)[1:20] END
)
SELECT clock_timestamp() AS now, renewal.name, renewal.fence, renewed.name IS NOT NULL AS renewed,
       jobs.fence = renewal.fence AND jobs.holder = $1 AND jobs.lease_expires_at > clock_timestamp()
       AS still_held, renewed.cancel_requested_by
FROM (SELECT) AS always LEFT JOIN renewal ON true
LEFT JOIN renewed USING (name, fence) LEFT JOIN jobs ON jobs.name = renewal.name
"""

# A stopped instance is no longer listed, and none of its name that was gone before it started: it
# has taken the place of that. For display only.
LEAVE: Final = """
DELETE FROM instances USING (SELECT server, started_at FROM instances WHERE id = $1) AS me
WHERE id = $1 OR (instances.server = me.server AND last_heartbeat_at < me.started_at)
"""


async def renew_leases(  # noqa: PLR0913, PLR0917 - what a heartbeat writes
    connection: "asyncpg.Connection[asyncpg.Record]",
    me: Me,
    lease: timedelta,
    capabilities: Capabilities,
    renewals: Iterable[Renewal],
    changes: Changes = NO_CHANGES,
) -> tuple[datetime, list[RenewalResult]]:
    """Renew leases on the heartbeat's connection; return the server's time and the results."""
    sent = list(renewals)
    rows = await connection.fetch(
        HEARTBEAT,
        me.id,
        me.server,
        lease,
        capabilities.highest_number,
        capabilities.missing,
        [each.name for each in sent],
        [each.fence for each in sent],
        [each.stopping for each in sent],
        [each.progress.done for each in sent],
        [each.progress.total for each in sent],
        [each.progress.note for each in sent],
        capabilities.max_running,
        changes.accepted,
        changes.refused,
    )
    results = [
        RenewalResult(
            name=row["name"],
            fence=row["fence"],
            renewed=row["renewed"],
            still_held=bool(row["still_held"]),
            cancel_requested_by=row["cancel_requested_by"],
        )
        for row in rows
        if row["name"] is not None
    ]
    return rows[0]["now"], results
