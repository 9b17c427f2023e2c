"""A row that another session locks delays no request for any other row.

Changes of one account wait for each other, in order; all but two wait without a connection. That is
contention: the account keeps changing, however slow each commit is. While another session locks the
row, the account does not change. A lock timeout alone does not distinguish the two, so the request
that meets it checks whether the account has changed while it waited, and who holds the row now. If
it has changed, the request tries again, as long as a request may take. If not, requests for the
account (or for the key, if the wait was for that) are refused for a second; then one request checks
whether it is free.
"""

from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final, TypeVar

import asyncpg
import structlog

from balance_app.balances.errors import too_slow
from balance_app.db.pool import Connection, Database, read
from balance_app.db.wait_queue import Lane
from balance_app.errors import DatabaseUnavailable

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

HELD_SECONDS: Final = 1.0  # as long as `Retry-After` asks to wait
FORGET_SECONDS: Final = 60.0
# One connection checks what is free again, however many rows were found locked.
RECHECKS: Final = Lane(("rechecks",))
LOCKED: Final = "It is locked by another session of the database."
COMMITTING: Final = "An earlier change of it waits for its commit."
KEY_IN_USE: Final = "Another try of this Idempotency-Key is still under way."

# The lock is at most as old as the last change. Its holder is in the row's xmax; where several
# sessions share the lock, there is none to be read.
#
# $1 the account, $2 the statements of ours that lock it until their commit
PROGRESS: Final = """
SELECT version, holder.pid, holder.application_name, holder.own,
       (SELECT extract(epoch FROM clock_timestamp() - at)::float8
        FROM entries WHERE user_id = id ORDER BY version DESC LIMIT 1) AS age
FROM users LEFT JOIN LATERAL (
    SELECT pid, application_name, state = 'active' AND EXISTS (
        SELECT FROM unnest($2::text[]) AS ours WHERE query <> '' AND starts_with(ours, query)
    ) AS own
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'transactionid' AND transactionid = users.xmax AND granted
    LIMIT 1
) AS holder ON true
WHERE id = $1
"""


class _Wait:
    """One request's wait for an account or a key, or both; times are monotonic."""

    def __init__(self, user_id: int | None, key: str | None, patience_seconds: float) -> None:
        self.user_id, self.key = user_id, key
        self.names: list[int | str] = [name for name in (user_id, key) if name is not None]
        self.until = monotonic() + patience_seconds
        self.begin()

    def begin(self) -> None:
        """Start the wait inside PostgreSQL."""
        # since when no change of the account is seen, when that was checked, and its version then
        self.since = self.checked_at = monotonic()
        self.version: int | None = None

    def observe(self, version: int, age_seconds: float | None) -> None:
        """Record the account's state; changes are found by version, as clocks may be set."""
        now = monotonic()
        waited = now - self.checked_at
        if self.version is None:
            moved = age_seconds is not None and 0 <= age_seconds < waited
        else:
            moved = version != self.version
        if moved:
            self.since = now - min(max(age_seconds or 0, 0), waited)
        self.checked_at, self.version = now, version


class Guard:
    """Admits operations on accounts and keys, and refuses those that another session locks."""

    def __init__(self, database: Database, own_statements: tuple[str, ...]) -> None:
        self._database = database
        self._own_statements = list(own_statements)
        # Two per account: while the commit of one is written, the other waits for the row. One
        # connection is left for other accounts, if there is more than one.
        self._at_once = max(1, min(2, database.settings.db_pool_size - 1))
        # accounts and keys that are refused: why, and until when (monotonic)
        self._held: dict[int | str, tuple[str, float]] = {}

    async def run(
        self,
        operation: Callable[[Connection], Awaitable[Result]],
        *,
        user_id: int | None = None,
        key: str | None = None,
    ) -> Result:
        """Run an operation that locks the account, or writes the key, or both.

        It must be one transaction: it runs again when its lock wait timed out and the account has
        changed meanwhile.

        Raises:
            DatabaseUnavailable: as `Database.run`; or another session locks the account or key.
            Overloaded: as `Database.run`; or it was not decided in MAX_WAITING_SECONDS.
        """
        waits = _Wait(user_id, key, self._database.settings.max_waiting_seconds)
        lane = Lane(waits.names[0], self._at_once)
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
        if self._held:
            self._refuse_held(waits.names)
            for name in waits.names:
                if name in self._held:  # its other requests are refused while this one checks
                    self._hold(name, self._held[name][0], 4 * HELD_SECONDS)
        waits.begin()
        while True:
            try:
                result = await operation(connection)
            except DatabaseUnavailable as problem:
                held = await self._find_lock(connection, problem, waits)
                if held is not None:
                    raise self._refuse(*held, problem) from problem.__cause__
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
    ) -> tuple[int | str, str] | None:
        """Return what another session locks, and the reason; None: it has changed, so try again.

        Raises:
            DatabaseUnavailable: `problem`, when it is not a lock timeout.
        """
        settings, cause = self._database.settings, problem.__cause__
        timed_out = isinstance(cause, asyncpg.LockNotAvailableError) or (
            # The statement timeout, or somebody cancelled the statement.
            isinstance(cause, asyncpg.QueryCanceledError)
            and monotonic() - waits.checked_at >= settings.db_lock_seconds / 2
        )
        if not timed_out:
            self._release(waits.names)
            raise problem
        user_id, key = waits.user_id, waits.key
        # The error's context names the table, in whatever language.
        if key is not None and (user_id is None or "idempotency_keys" in _context(cause)):
            return key, KEY_IN_USE
        assert user_id is not None  # noqa: S101 - an operation has at least one of them
        try:
            rows = await read(connection, PROGRESS, user_id, self._own_statements)
        except DatabaseUnavailable:  # the whole table is locked
            return user_id, LOCKED
        if not rows:
            return None
        (row,) = rows
        waits.observe(row["version"], row["age"])
        still = monotonic() - waits.since
        if row["own"]:
            return (user_id, COMMITTING) if still >= settings.db_statement_seconds else None
        if still < settings.db_lock_seconds * 3 / 4:
            return None
        log.warning(
            "account locked",
            user=user_id,
            by=row["application_name"],
            pid=row["pid"],
            not_changed_for=round(still, 1),
        )
        return user_id, LOCKED

    def _refuse(
        self, name: int | str, reason: str, problem: DatabaseUnavailable
    ) -> DatabaseUnavailable:
        self._hold(name, reason, HELD_SECONDS)
        return DatabaseUnavailable(_sentence(name, reason), applied=problem.applied)

    def _refuse_held(self, names: list[int | str]) -> None:
        for name in names:
            reason, until = self._held.get(name, ("", 0.0))
            if monotonic() < until:
                raise DatabaseUnavailable(_sentence(name, reason), applied="no")

    def _hold(self, name: int | str, reason: str, seconds: float) -> None:
        now = monotonic()
        if name not in self._held:  # bounds its size: names that no request uses are dropped
            old = [each for each, (_, until) in self._held.items() if until < now - FORGET_SECONDS]
            self._release(old)
        self._held[name] = (reason, now + seconds)

    def _release(self, names: list[int | str]) -> None:
        if self._held:
            for name in names:
                self._held.pop(name, None)


def _context(error: BaseException | None) -> str:
    return str(getattr(error, "context", None) or "")


def _sentence(name: int | str, reason: str) -> str:
    return f"User {name} can't be changed now. {reason}" if isinstance(name, int) else reason
