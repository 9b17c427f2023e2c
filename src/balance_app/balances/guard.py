"""A row that another session locks delays no request for any other row.

Changes of one account wait for each other, in order; all but two wait without a connection. That is
contention: the account keeps changing, however slow each commit is. While another session locks the
row, the account does not change. A lock timeout alone does not distinguish the two, so the request
that meets it checks whether the account has changed while it waited, and who holds the row now. If
it has changed, the request tries again, as long as a request may take. If not, requests for the
account (or for the key, if the wait was for that) are refused for a second; then one request checks
whether it is free.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final, TypeAlias, TypeVar

import asyncpg
import structlog

from balance_app.balances.errors import too_slow
from balance_app.db.pool import Connection, Database, read, write
from balance_app.db.wait_queue import Lane
from balance_app.errors import DatabaseUnavailable, Problem

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

HELD_SECONDS: Final = 1.0  # as long as `Retry-After` asks to wait
FORGET_SECONDS: Final = 60.0
# One connection checks what is free again, however many rows were found locked.
RECHECKS: Final = Lane(("rechecks",))
LOCKED: Final = "It is locked by another session of the database."
COMMITTING: Final = "An earlier change of it waits for its commit."
KEY_IN_USE: Final = "Another try of this Idempotency-Key is still under way."

# The lock is at most as old as the last entry or hold. Its holder is in the row's xmax; where
# several sessions share the lock, there is none to be read.
#
# $1 the account, $2 the statements of ours that lock it until their commit
PROGRESS: Final = """
SELECT version + hold_events + settings_version AS changes,
       holder.pid, holder.application_name, holder.own, holder.waits,
       extract(epoch FROM clock_timestamp() - greatest(
           (SELECT at FROM entries WHERE user_id = id ORDER BY version DESC LIMIT 1),
           (SELECT at FROM holds WHERE user_id = id ORDER BY number DESC LIMIT 1)
       ))::float8 AS age
FROM users LEFT JOIN LATERAL (
    SELECT pid, application_name, state = 'active' AND EXISTS (
        SELECT FROM unnest($2::text[]) AS ours WHERE query <> '' AND starts_with(ours, query)
    ) AS own, wait_event_type IS NOT DISTINCT FROM 'Lock' AS waits
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'transactionid' AND transactionid = users.xmax AND granted
    LIMIT 1
) AS holder ON true
WHERE id = $1
"""

# One account alone, so that a transfer that checks whether a locked account is free again locks no
# other one meanwhile.
PROBE: Final = "SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE"

# What is refused while another session locks it: an account, or a key of one.
Name: TypeAlias = int | tuple[int | None, str]


class _Progress:
    """Whether an account changes while one request waits for it; times are monotonic."""

    def __init__(self, user_id: int, began_at: float) -> None:
        self.user_id = user_id
        # since when no change of the account is seen, when that was checked, and how many there
        # were then
        self.since = self.checked_at = began_at
        self.changes: int | None = None
        # who held the lock then: whether a session of ours, and its pid
        self.holder: tuple[bool | None, int | None] | None = None

    def observe(self, changes: int, age_seconds: float | None) -> None:
        """Record the account's state; changes are found by number, as clocks may be set."""
        now = monotonic()
        waited = now - self.checked_at
        if self.changes is None:
            moved = age_seconds is not None and 0 <= age_seconds < waited
        else:
            moved = changes != self.changes
        if moved:
            self.since = now - min(max(age_seconds or 0, 0), waited)
        self.checked_at, self.changes = now, changes


class _Wait:
    """One request's wait for accounts or a key, or both; times are monotonic."""

    def __init__(self, user_ids: tuple[int, ...], key: str | None, patience_seconds: float) -> None:
        self.user_ids = user_ids
        self.names: list[Name] = [*user_ids]
        self.key: tuple[int | None, str] | None = None
        if key is not None:
            self.key = (user_ids[0] if user_ids else None, key)
            self.names.append(self.key)
        self.until = monotonic() + patience_seconds
        self.begin()

    def begin(self) -> None:
        """Start the wait inside PostgreSQL."""
        self.began_at = monotonic()
        # looked at from the first lock timeout on
        self._accounts: list[_Progress] = []

    @property
    def accounts(self) -> list[_Progress]:
        """The progress of each account since the wait began."""
        if not self._accounts:
            self._accounts = [_Progress(user_id, self.began_at) for user_id in self.user_ids]
        return self._accounts


class Guard:
    """Admits operations on accounts and keys, and refuses those that another session locks."""

    def __init__(self, database: Database, own_statements: tuple[str, ...]) -> None:
        self._database = database
        self._own_statements = [*own_statements, PROBE]
        # Two per account: while the commit of one is written, the other waits for the row. One
        # connection is left for other accounts, if there is more than one. Where changes go
        # together, those that wait for the commit are the next statement.
        settings = database.settings
        at_once = 1 if settings.balance_group_commit else 2
        self._at_once = max(1, min(at_once, settings.db_pool_size - 1))
        # how many transfers of each account wait or run
        self._transfers: Counter[int] = Counter()
        # accounts and keys that are refused: why, and until when (monotonic)
        self._held: dict[Name, tuple[str, float]] = {}

    async def run(
        self,
        operation: Callable[[Connection], Awaitable[Result]],
        *user_ids: int,
        key: str | None = None,
    ) -> Result:
        """Run an operation that locks accounts, or writes a key of the first, or both.

        It must be one transaction: it runs again when its lock wait timed out and the account has
        changed meanwhile.

        Raises:
            DatabaseUnavailable: as `Database.run`; or another session locks the account or key.
            Overloaded: as `Database.run`; or it was not decided in MAX_WAITING_SECONDS.
        """
        waits = _Wait(user_ids, key, self._database.settings.max_waiting_seconds)
        if len(user_ids) < 2:  # noqa: PLR2004 - it is no transfer
            return await self._run(operation, waits, waits.names[0])
        # It waits with the account that more transfers wait for: all payers of one payee, each in a
        # lane of its own, would take every connection.
        self._transfers.update(user_ids)
        try:
            name = max(user_ids, key=self._transfers.__getitem__)
            return await self._run(operation, waits, name)
        finally:
            self._transfers.subtract(user_ids)
            for user_id in user_ids:
                if not self._transfers[user_id]:
                    del self._transfers[user_id]

    async def _run(
        self, operation: Callable[[Connection], Awaitable[Result]], waits: _Wait, name: Name
    ) -> Result:
        lane = Lane(name, self._at_once)
        if self._held:
            self._refuse_held(waits.names)
            if any(name in self._held for name in waits.names):
                lane = RECHECKS
        return await self._database.run(
            lambda connection: self._attempt(connection, operation, waits), lane=lane
        )

    async def _attempt(
        self,
        connection: Connection,
        operation: Callable[[Connection], Awaitable[Result]],
        waits: _Wait,
    ) -> Result:
        held = self._begin_recheck(waits.names) if self._held else []
        waits.begin()
        while True:
            try:
                if len(waits.user_ids) > 1:
                    for user_id in held:
                        await write(connection, PROBE, user_id)
                result = await operation(connection)
            except DatabaseUnavailable as problem:
                locked = await self._find_lock(connection, problem, waits)
                if locked is not None:
                    raise self._refuse(*locked, problem) from problem.__cause__
            except Exception:
                self._release(waits.names)
                raise
            else:
                self._release(waits.names)
                return result
            if monotonic() >= waits.until:
                raise too_slow(self._database.settings.max_waiting_seconds)
            self._database.check()

    async def _find_lock(
        self,
        connection: Connection,
        problem: DatabaseUnavailable,
        waits: _Wait,
    ) -> tuple[Name, str] | None:
        """Return what another session locks, and the reason; None: it has changed, so try again.

        Raises:
            DatabaseUnavailable: `problem`, when it is not a lock timeout.
        """
        settings, cause = self._database.settings, problem.__cause__
        checked_at = max((each.checked_at for each in waits.accounts), default=waits.began_at)
        timed_out = isinstance(cause, asyncpg.LockNotAvailableError) or (
            # The statement timeout, or somebody cancelled the statement.
            isinstance(cause, asyncpg.QueryCanceledError)
            and monotonic() - checked_at >= settings.db_lock_seconds / 2
        )
        if not timed_out:
            self._release(waits.names)
            raise problem
        if waits.key is None and waits_for_key(problem):
            raise problem  # of one of several changes: the account itself is not locked
        if waits.key is not None and (not waits.accounts or waits_for_key(problem)):
            return waits.key, KEY_IN_USE
        sole = len(waits.accounts) == 1
        found: list[tuple[Name, str]] = []
        for account in waits.accounts:
            reason = await self._check_progress(connection, account, sole=sole)
            if reason is not None:
                found.append((account.user_id, reason))
        # A transfer of ours that waits for the locked one keeps the other one from changing, too.
        return min(found, key=lambda each: each[1] != LOCKED, default=None)

    async def _check_progress(
        self, connection: Connection, account: _Progress, *, sole: bool
    ) -> str | None:
        """Return why an account can't be changed; None: it has changed, or nobody locks it.

        Of several accounts that an operation waits for, only one may be locked.
        """
        settings, user_id = self._database.settings, account.user_id
        try:
            rows = await read(connection, PROGRESS, user_id, self._own_statements)
        except DatabaseUnavailable:  # the whole table is locked
            return LOCKED
        if not rows:
            return None
        (row,) = rows
        account.observe(row["changes"], row["age"])
        if row["pid"] is None and not sole:
            return None
        still = monotonic() - account.since
        again = account.holder == (row["own"], row["pid"])
        account.holder = row["own"], row["pid"]
        if row["own"]:
            # A transfer of ours that waits for its other account finds out who locks that.
            stuck = again and not row["waits"] and still >= settings.db_statement_seconds
            return COMMITTING if stuck else None
        # Between two of ours there is no holder for a moment.
        if still < settings.db_lock_seconds * 3 / 4 or (row["pid"] is None and not again):
            return None
        log.warning(
            "account locked",
            user=user_id,
            by=row["application_name"],
            pid=row["pid"],
            not_changed_for=round(still, 1),
        )
        return LOCKED

    def refuses_key(self, user_id: int, key: str | None) -> bool:
        """Return whether a key is known to be in use by another session."""
        return bool(self._held) and (user_id, key) in self._held

    def _begin_recheck(self, names: list[Name]) -> list[int]:
        """Return the accounts to check of those that were locked; refuse their other requests.

        Raises:
            DatabaseUnavailable: it is not the time to check.
        """
        self._refuse_held(names)
        held = [name for name in names if name in self._held]
        for name in held:
            self._hold(name, self._held[name][0], 4 * HELD_SECONDS)
        return [name for name in held if isinstance(name, int)]

    def _refuse(self, name: Name, reason: str, problem: DatabaseUnavailable) -> DatabaseUnavailable:
        self._hold(name, reason, HELD_SECONDS)
        return DatabaseUnavailable(_sentence(name, reason), applied=problem.applied)

    def _refuse_held(self, names: list[Name]) -> None:
        for name in names:
            reason, until = self._held.get(name, ("", 0.0))
            if monotonic() < until:
                raise DatabaseUnavailable(_sentence(name, reason), applied="no")

    def _hold(self, name: Name, reason: str, seconds: float) -> None:
        now = monotonic()
        if name not in self._held:  # bounds its size: names that no request uses are dropped
            old = [each for each, (_, until) in self._held.items() if until < now - FORGET_SECONDS]
            self._release(old)
        self._held[name] = (reason, now + seconds)

    def _release(self, names: list[Name]) -> None:
        if self._held:
            for name in names:
                self._held.pop(name, None)


def waits_for_key(problem: Problem) -> bool:
    """Return whether what failed had waited for an idempotency key, and not for an account."""
    # The error's context names the table, in whatever language.
    return "_keys" in str(getattr(problem.__cause__, "context", None) or "")


def _sentence(name: Name, reason: str) -> str:
    return f"User {name} can't be changed now. {reason}" if isinstance(name, int) else reason
