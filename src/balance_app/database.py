"""The one pool of the running service, and the knowledge whether PostgreSQL answers.

Few connections serve many requests: a row's lock is held through the flush of its commit, so more
connections only add waiters inside PostgreSQL. Requests wait here instead, first come first served,
and a connection goes from one request straight to the next. What waits for a database that stops
answering is told so at once, as nothing of it was sent; then one probe looks for the database's
return, so that neither a hang nor a storm of connection attempts can build up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from time import monotonic
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
import structlog
from alembic.util import CommandError
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy.exc import DBAPIError

from balance_app.errors import Applied, DatabaseAway, Overloaded
from balance_app.metrics import Metrics
from balance_app.migrations import migrate
from balance_app.settings import Settings
from balance_app.wait_queue import Lane, Queued, WaitQueue

log = structlog.get_logger(__name__)

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
Result = TypeVar("Result")
# what to do on a connection, where its result is waited for, since when (monotonic), and whether
# it was at the end of the line
_Waiter: TypeAlias = (
    "tuple[Callable[[Connection], Awaitable[Any]], asyncio.Future[Any], float, bool]"
)

PROBE_SECONDS: Final = 0.1
ROLLBACK_SECONDS: Final = 0.3


class UnusableDatabaseError(Exception):
    """The database answers, but waiting can't help: a wrong password, a schema too new."""


def is_away(error: BaseException) -> Applied | None:
    """Say whether `error` means that the database is away, and if so whether a write took effect.

    None: no, the statement itself is at fault. `no`: the server said that it rolled back, or
    nothing was sent. `unknown`: the connection ended before an answer came.
    """
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig.__cause__ or error.orig  # a migration's: SQLAlchemy wraps it twice
    if isinstance(error, asyncpg.PostgresError):
        return _server_said(getattr(error, "severity", None), error.sqlstate or "")
    if isinstance(error, ValueError):  # asyncpg's DataError: an argument of the wrong type
        return None
    # asyncpg's InternalClientError: the server said good-bye (FATAL) while the connection was
    # idle, and the next statement met a connection that is ending.
    if isinstance(
        error, TimeoutError | OSError | asyncpg.InterfaceError | asyncpg.InternalClientError
    ):
        return "unknown"
    return None


def _server_said(severity: str | None, state: str) -> Applied | None:
    # Appendix A of the PostgreSQL manual lists the codes.
    if severity in {"FATAL", "PANIC"}:
        # A connection refused (57P03, class 53) is plain; other ends may follow a commit.
        return "no" if state.startswith(("53", "57P03")) else "unknown"
    if state.startswith(("08", "57P")):
        return "unknown"
    if state.startswith(("25006", "40", "53", "55P03", "57014", "58")):
        return "no"
    return None


class Database:
    """The pool, the line in front of it, and the probe that watches for a lost database."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.settings = settings
        self._pool: asyncpg.Pool[asyncpg.Record] = asyncpg.create_pool(
            **settings.statement_arguments(),
            min_size=0,
            max_size=settings.db_pool_size,
            max_inactive_connection_lifetime=0,
            command_timeout=settings.db_statement_seconds,
            reset=_keep_session,
        )
        self._lent: asyncpg.Pool[asyncpg.Record] = asyncpg.create_pool(
            **settings.job_arguments(),
            min_size=0,
            max_size=settings.job_connections,
            max_inactive_connection_lifetime=60,
        )
        self._waiting: WaitQueue[_Waiter] = WaitQueue()
        self._clerks: set[asyncio.Task[None] | None] = set()
        # why the database can't be used, in a sentence; None when it can
        self._away: str | None = "The service has not reached its database yet."
        self._stopping = False
        self._watch: asyncio.Task[None] | None = None
        self._serving = False
        self._show(metrics or Metrics())

    def _show(self, metrics: Metrics) -> None:
        self._waited = metrics.connection_wait
        metrics.requests_waiting.set_function(lambda: sum(in_line for *_, in_line in self._waiting))
        metrics.database_away.set_function(lambda: self._away is not None)
        for pool_name, limit, in_use in (
            ("requests", self.settings.db_pool_size, lambda: len(self._clerks)),
            (
                "jobs",
                self.settings.job_connections,
                lambda: self._lent.get_size() - self._lent.get_idle_size(),
            ),
        ):
            metrics.connections_limit.labels(pool_name).set(limit)
            metrics.connections_in_use.labels(pool_name).set_function(in_use)

    async def start(self, patience_seconds: float = 5.0) -> None:
        """Migrate and connect; a database that is away is waited for in the background.

        Raises:
            UnusableDatabaseError: the database answers but can't be used.
        """
        await self._pool
        await self._lent
        self._watch = asyncio.create_task(self._bring_up())
        done, _ = await asyncio.wait({self._watch}, timeout=patience_seconds)
        self._serving = True
        if done:
            await self._watch

    async def stop(self) -> None:
        """Close every connection; what is still waiting is refused."""
        self._stop_serving("The service is stopping.")
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        self._pool.terminate()
        self._lent.terminate()

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """Lend a connection for longer work; there are few, apart from those that serve the line.

        It is closed, and what was not committed is rolled back, when the work ends by an exception.
        """
        connection = await self._lent.acquire()
        try:
            yield connection
        except BaseException:
            # Of a connection that just ends, the server notices nothing while a statement is under
            # way: that would go on, and keep its locks. To cancel it takes a connection of its own.
            # By the driver's own time limit: asyncio's raises nothing but a cancellation in a task
            # that is cancelled already (Python before 3.11.4), and the connection would be kept.
            try:
                with suppress(Exception):
                    await connection.execute("ROLLBACK", timeout=ROLLBACK_SECONDS)
            finally:
                _terminate(connection)
            raise
        finally:
            await self._lent.release(connection)

    async def run(
        self,
        operation: Callable[[Connection], Awaitable[Result]],
        *,
        urgent: bool = False,
        lane: Lane | None = None,
    ) -> Result:
        """Run `operation` on a connection when its turn comes.

        What is `urgent` goes to the head of the line, however long it is, and is still done while
        the copy stops. Of one `lane` only a few are on connections at once, the others wait for
        them without one.

        Raises:
            DatabaseAway: it can't be reached; nothing of the operation was sent.
            Overloaded: too many wait, or this one waited too long.
        """
        self.check(urgent=urgent)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiter = (operation, answer, monotonic(), not urgent)
        free = len(self._clerks) < self.settings.db_pool_size
        if not (free and self._waiting.admits(lane)) and not urgent:
            waiting = len(self._waiting)
            if waiting >= self.settings.max_waiting:
                raise Overloaded(f"{waiting} requests wait already.")
        self._waiting.put(waiter, lane=lane, urgent=urgent)
        if free and (queued := self._waiting.take()) is not None:
            # Of its own context: a clerk serves many requests.
            clerk = asyncio.create_task(self._serve_line(queued), context=Context())
            self._clerks.add(clerk)
        return await answer

    def check(self, *, urgent: bool = False) -> None:
        """Raise what `run` would raise at once, if it would.

        Raises:
            DatabaseAway: the database can't be used, or this copy is stopping.
        """
        if self._away is not None:
            raise DatabaseAway(self._away, applied="no")
        if self._stopping and not urgent:
            raise DatabaseAway("This copy is stopping.", applied="no")

    def refuse_requests(self) -> None:
        """Refuse who waits and who comes, but for what is urgent: this copy stops."""
        self._stopping = True
        self._refuse_all("This copy is stopping.")

    def _stop_serving(self, reason: str) -> None:
        self._away = reason
        self._refuse_all(reason)

    def _refuse_all(self, reason: str) -> None:
        """Refuse who waits; what has its connection goes on."""
        for _, answer, _, _ in self._waiting.clear():
            if not answer.done():
                answer.set_exception(DatabaseAway(reason, applied="no"))

    # -- the line -----------------------------------------------------------------------------

    async def _serve_line(self, queued: Queued[_Waiter] | None) -> None:
        """Be a clerk: with one connection, serve one after the other until nobody waits.

        The next operation's statement is on its way before the last one's answer is looked at.
        """
        connection: Connection | None = None
        try:
            while queued is not None:
                connection = await self._serve(queued.item, connection)
                self._waiting.done(queued)
                queued = self._waiting.take()
        finally:
            self._clerks.discard(asyncio.current_task())
            if connection is not None:
                await self._pool.release(connection)

    async def _serve(self, waiter: _Waiter, connection: Connection | None) -> Connection | None:
        """Do what one of the line wants; return the connection, which the next may use."""
        operation, answer, since, in_line = waiter
        if answer.done():  # who asked is gone
            return connection
        if monotonic() - since > self.settings.max_waiting_seconds:
            answer.set_exception(Overloaded("Too slow: no turn came in time."))
            return connection
        try:
            if connection is None or _is_closed(connection):
                connection = await self._acquire()
            if in_line:
                self._waited.observe(monotonic() - since)
            result = await operation(connection)
            if not answer.done():
                answer.set_result(result)
        except asyncio.CancelledError:
            _tell_cut_off(answer, connection)
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the event loop ends
                raise
        except Exception as error:  # noqa: BLE001 - it belongs to who asked
            self._learn_from(error, connection)
            if not answer.done():
                answer.set_exception(error)
        return connection

    async def _acquire(self) -> Connection:
        try:
            return await self._pool.acquire(timeout=self.settings.db_connect_seconds)
        except Exception as error:
            if not is_away(error):
                raise
            # A server that is merely full still serves the connections that there are.
            if not isinstance(error, asyncpg.TooManyConnectionsError):
                self._lose("The database can't be reached.")
            raise DatabaseAway("The database can't be reached.", applied="no") from error

    def _learn_from(self, error: Exception, connection: Connection | None) -> None:
        cause = error.__cause__
        if connection is None or not isinstance(error, DatabaseAway) or cause is None:
            return
        silent = isinstance(cause, TimeoutError | asyncpg.ReadOnlySQLTransactionError)
        if silent or is_away(cause) == "unknown":
            _terminate(connection)
        if silent:
            self._lose("The database does not answer.")

    # -- away and back ------------------------------------------------------------------------

    def _lose(self, reason: str) -> None:
        """Refuse everybody until a probe finds the database again."""
        if self._away is None:
            log.warning("database away", reason=reason, waiting=len(self._waiting))
            # Of its own context: what it logs is not about the request that found out.
            self._watch = asyncio.create_task(self._probe(), context=Context())
        self._stop_serving(reason)

    async def _bring_up(self) -> None:
        told = None
        while True:
            try:
                await migrate(self.settings)
            except Exception as error:
                hopeless = isinstance(error, _CANNOT_BE_MENDED_BY_WAITING)
                away = is_away(error) is not None and not hopeless
                # Whoever starts this copy is told; once it serves, an operator may still mend it.
                if hopeless and not self._serving:
                    raise UnusableDatabaseError(f"The database can't be used: {error}") from error
                if not away and not self._serving:
                    raise
                reason = "can't be reached" if away else "can't be used; the log says why"
                if reason != told:
                    told = reason
                    log.warning("waiting for the database", reason=reason, error=repr(error))
                self._away = f"The database {reason}."
                await asyncio.sleep(PROBE_SECONDS if away else 1.0)
            else:
                self._away = None
                return

    async def _probe(self) -> None:
        arguments = {**self.settings.connect_arguments(), "timeout": 1.0}
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                connection = await asyncpg.connect(**arguments)
                try:
                    read_only = await connection.fetchval("SELECT pg_is_in_recovery()", timeout=1.0)
                finally:
                    connection.terminate()
            except Exception as error:  # noqa: BLE001 - whatever it is, the database is not back
                log.debug("database still away", error=repr(error))
            else:
                if not read_only:
                    log.info("database back")
                    self._away = None
                    return


_CANNOT_BE_MENDED_BY_WAITING: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    CommandError,  # alembic's: the schema is newer than this program
)


def _is_closed(connection: Connection) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # it closed, and the pool has taken it back already
        return True


def _tell_cut_off(answer: asyncio.Future[Any], connection: Connection | None) -> None:
    """Answer who asked for what ended as if it were cancelled.

    Nobody cancels a clerk, but the making of a connection may end like this when it is cut off.
    """
    applied: Applied = "no" if connection is None else "unknown"
    if connection is not None:
        _terminate(connection)
    if not answer.done():
        answer.set_exception(DatabaseAway(_SENTENCES[applied], applied=applied))


def _terminate(connection: Connection) -> None:
    if not _is_closed(connection):
        connection.terminate()


async def _keep_session(_connection: object) -> None:
    """Skip the pool's RESET, which costs a round trip: no statement here changes the session."""


async def write(connection: Connection, sql: str, *arguments: object) -> asyncpg.Record | None:
    """Run a statement that changes something, as one transaction; return its first row.

    Raises:
        DatabaseAway: with `applied` "no" when the server rolled it back, "unknown" when the
            connection ended or the time was up before its answer.
    """
    try:
        return await connection.fetchrow(sql, *arguments)
    except Exception as error:
        applied = is_away(error)
        if applied is None:
            raise
        raise DatabaseAway(_SENTENCES[applied], applied=applied) from error


async def read(connection: Connection, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Run a statement that changes nothing; return its rows.

    Raises:
        DatabaseAway: always with `applied` "no".
    """
    try:
        return await connection.fetch(sql, *arguments)
    except Exception as error:
        if is_away(error) is None:
            raise
        raise DatabaseAway(_SENTENCES["no"], applied="no") from error


_SENTENCES: Final[dict[Applied, str]] = {
    "no": "The database could not do it now; nothing was changed.",
    "unknown": "The database went away before it answered; the change may have been made.",
}
