"""The connections of the running service, and whether PostgreSQL can be used.

Few connections serve many requests: a row's lock is held through the flush of its commit, so more
connections only add lock waits inside PostgreSQL. Requests wait in the pool wait queue instead,
first come first served, and a connection goes from one request straight to the next. A worker
connects before it takes a request, so one that can't connect fails no request while other
connections are open. When none is open, every queued operation is refused at once with the cause,
as nothing of it was sent; then one task connects with retry, so that neither waiting requests nor
log-ins pile up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from time import monotonic
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, cast

import asyncpg
import structlog
from asyncpg.pool import PoolConnectionProxy

from balance_app.db.migrations import Installation, UnusableDatabaseError, find, migrate
from balance_app.db.outages import (
    OF_A_STATEMENT,
    PERMANENT,
    Cause,
    Kind,
    cause_of,
    classify,
    is_fatal,
    pause_seconds,
)
from balance_app.db.pooled import open_pooled
from balance_app.db.replication import Replication, read_replication
from balance_app.db.wait_queue import Lane, WaitQueue
from balance_app.errors import DatabaseUnavailable, Overloaded
from balance_app.metrics import Metrics
from balance_app.sessions import (
    PIN_SECONDS,
    Session,
    StandbyError,
    connect,
    open_session,
    pin,
    reset,
)
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Result = TypeVar("Result")

ROLLBACK_SECONDS: Final = 0.3
LOG_AGAIN_SECONDS: Final = 60.0
REPLICATION_SECONDS: Final = 1.0
_NOT_REACHED: Final = Cause(Kind.NOT_REACHED, "no")
_STOPPING: Final = Cause(Kind.STOPPING, "no")


class _Operation(NamedTuple):
    """A queued operation."""

    execute: Callable[[Connection], Awaitable[Any]]
    answer: asyncio.Future[Any]
    # monotonic
    since: float
    priority: bool


class Database:
    """The connections, the wait queue in front of them, and the state of the database."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.settings = settings
        # open connections for requests that no worker uses
        self._idle: list[Session] = []
        # all open connections for requests, and how many workers run an operation
        self._open: set[Session] = set()
        self._busy = 0
        self._lent: asyncpg.Pool[asyncpg.Record] = asyncpg.create_pool(
            **settings.job_arguments(),
            min_size=0,
            max_size=settings.job_connections,
            max_inactive_connection_lifetime=60,
            connect=self._connect_lent,
            init=pin,
            reset=reset,
        )
        # open connections of that pool
        self._lent_open: set[Session] = set()
        # of the primary that was found last
        self._address: str | None = None
        self._queue: WaitQueue[_Operation] = WaitQueue()
        self._workers: set[asyncio.Task[None] | None] = set()
        # why the database can't be used; None when it can
        self._outage: Cause | None = _NOT_REACHED
        # why no further connection can be made while some are open, how many tries failed, and
        # when the next may be made (monotonic)
        self._refusal: Cause | None = None
        self._refusals = 0
        self._connect_at = 0.0
        self._read_only: Cause | None = None
        # what was wrong with the server's configuration at the last check
        self._server_warnings: list[str] = []
        # the standbys, and when they were last read (monotonic)
        self._replication: Replication | None = None
        self._replication_at = -REPLICATION_SECONDS
        self._replication_logged: str | None = None
        # causes by kind: when they were last logged (monotonic)
        self._logged: dict[Kind, float] = {}
        # changes when the tables are created anew or restored
        self.installation: Installation | None = None
        self._stopping = False
        self._serving = False
        # how many workers connect at this moment
        self._connecting = 0
        # connections to close at their release
        self._expired: set[Session] = set()
        self._recovery: asyncio.Task[None] | None = None
        self._writable: asyncio.Task[None] | None = None
        self._schema_check: asyncio.Task[None] | None = None
        self._register_metrics(metrics or Metrics())

    def _register_metrics(self, metrics: Metrics) -> None:
        self._waited = metrics.connection_wait
        metrics.requests_waiting.set_function(
            lambda: sum(not operation.priority for operation in self._queue)
        )
        metrics.database_unavailable.set_function(lambda: self._outage is not None)
        for pool_name, limit, in_use in (
            ("requests", self.settings.db_pool_size, lambda: len(self._workers)),
            (
                "jobs",
                self.settings.job_connections,
                lambda: self._lent.get_size() - self._lent.get_idle_size(),
            ),
        ):
            metrics.connections_limit.labels(pool_name).set(limit)
            metrics.connections_in_use.labels(pool_name).set_function(in_use)

    async def start(self, patience_seconds: float = 5.0) -> None:
        """Migrate and connect; while the database is unavailable, go on trying in the background.

        Raises:
            UnusableDatabaseError: the database answers but can't be used.
        """
        await self._lent
        self._recovery = asyncio.create_task(self._connect_with_retry())
        done, _ = await asyncio.wait({self._recovery}, timeout=patience_seconds)
        self._serving = True
        if done:
            await self._recovery

    async def stop(self) -> None:
        """Refuse every queued operation, and close every connection."""
        self._outage = _STOPPING
        self._refuse_all(_STOPPING.sentence)
        watching = (self._recovery, self._writable, self._schema_check)
        tasks = {task for task in watching if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self._open):
            connection.terminate()
        self._lent.terminate()

    def warnings(self) -> list[str]:
        """Return what is wrong with the database although requests are served, for operators."""
        found = [*self._server_warnings]
        if self._read_only is not None:
            found.append(self._read_only.sentence)
        # While the database is unavailable nothing is known of its standbys.
        if self._outage is None and self._replication is not None:
            missing = self._replication.warning()
            if missing is not None:
                found.append(missing)
        if self._refusal is not None and self._outage is None:
            found.append(
                f"{len(self._open)} of {self.settings.db_pool_size} connections are open, no more "
                f"can be made: {self._refusal.sentence}"
            )
        return found

    async def replication(self) -> Replication | None:
        """Return the standbys, as of a second ago at most; None: not known.

        Raises:
            DatabaseUnavailable: as `run` does.
        """
        if monotonic() - self._replication_at >= REPLICATION_SECONDS:
            self._replication_at = monotonic()
            await self.run(self._check_replication, priority=True)
        return self._replication

    async def _check_replication(self, connection: Connection) -> None:
        try:
            await self._read_replication(connection)
        except Exception as error:
            cause = classify(error)
            if cause is None:
                raise
            raise DatabaseUnavailable(cause.sentence, applied="no") from error

    async def _read_replication(self, connection: Connection) -> None:
        """Read the standbys; log, once, why they can't be read, or that commits wait for some."""
        assert self._address is not None  # noqa: S101 - there is a connection
        try:
            self._replication = await read_replication(connection, self._address)
            reason = self._replication.warning()
        except asyncpg.PostgresError as error:
            if is_fatal(error):
                raise
            self._replication, reason = None, f"The standbys can't be read: {error}."
        if reason is not None and reason != self._replication_logged:
            log.warning("replication", reason=reason)
        self._replication_logged = reason

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """Lend a connection for longer work, from a small pool apart from that of requests.

        When the work ends by an exception, the connection is closed and an open transaction rolled
        back. While the server accepts no more connections, this waits and tries again.
        """
        connection = await self._acquire_lent()
        try:
            yield connection
        except BaseException:
            # The server does not notice a closed connection while a statement runs: it would go on
            # and keep its locks. So a ROLLBACK is sent first. Its time limit is the driver's:
            # asyncio's raises a cancellation instead of a timeout in a task that is cancelled
            # already (Python before 3.11.4), and the connection would be kept.
            try:
                with suppress(Exception):
                    await connection.execute("ROLLBACK", timeout=ROLLBACK_SECONDS)
            finally:
                _terminate(connection)
            raise
        finally:
            # It is reset first. A server that vanishes now would answer that never, and keep the
            # connection in use until TCP gives up.
            await self._lent.release(connection, timeout=PIN_SECONDS)

    async def _connect_lent(self, dsn: str | None = None, **arguments: Any) -> Session:  # noqa: ANN401
        connection = await connect(dsn, **arguments)
        self._lent_open = {each for each in self._lent_open if not each.is_closed()} | {connection}
        return connection

    async def _acquire_lent(self) -> PoolConnectionProxy[asyncpg.Record]:
        tries = 0
        while True:
            try:
                # ast-grep-ignore: acquire-without-timeout - the run that waits has its own
                connection = await self._lent.acquire()
                if cast("Session", connection).is_current():
                    return connection
                _terminate(connection)  # it leads to a former primary
                await self._lent.release(connection)
            except asyncpg.TooManyConnectionsError as error:
                cause = classify(error)
                assert cause is not None  # noqa: S101 - it is one of its codes
                self._log_cause("a job waits for a connection", cause)
                self._give_up_idle()
                await asyncio.sleep(_pause_seconds(Kind.FULL, tries))
                tries += 1

    def _give_up_idle(self) -> None:
        """Close an idle connection for requests, but never the last one that is open."""
        self._forget_closed()
        if len(self._open) > 1 and self._idle:
            self._idle.pop().terminate()

    async def run(
        self,
        operation: Callable[[Connection], Awaitable[Result]],
        *,
        priority: bool = False,
        lane: Lane | None = None,
    ) -> Result:
        """Run `operation` on a connection, after those queued before it.

        With `priority` it goes to the head of the queue, however long that is, waits for as long as
        it takes, and still runs while the instance stops. Only a few operations of one `lane` are
        on connections at once; the others wait without one.

        Raises:
            DatabaseUnavailable: the database can't be used; nothing of the operation was sent.
            Overloaded: too many operations wait, or this one waited too long; not with `priority`.
        """
        self.check(priority=priority)
        if len(self._queue) >= self.settings.max_waiting and not priority:
            self._check_length(lane)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        queued = _Operation(operation, answer, monotonic(), priority)
        self._queue.put(queued, lane=lane, priority=priority)
        # An idle connection serves it now; otherwise a worker that is connecting serves it soon.
        # What is parked behind its lane is for the workers of the lane.
        connecting = self._connecting if self._idle else 0
        if self._free_workers() - connecting < self._queue.ready and self._may_start_worker():
            # In a context of its own: a worker serves many requests.
            self._workers.add(asyncio.create_task(self._work(), context=Context()))
        return await answer

    def _check_length(self, lane: Lane | None) -> None:
        free, ready = self._free_workers(), self._queue.ready
        if self._queue.admits(lane) and (free > ready or self._may_start_worker()):
            return  # it does not wait for other operations
        waiting = len(self._queue) - min(free, ready)
        if waiting >= self.settings.max_waiting:
            raise Overloaded(f"Too many requests are waiting ({waiting}).")

    def check(self, *, priority: bool = False) -> None:
        """Raise what `run` would raise at once, if anything.

        Raises:
            DatabaseUnavailable: the database can't be used, or this instance is stopping.
        """
        if self._outage is not None:
            raise DatabaseUnavailable(self._outage.sentence, applied="no")
        if self._stopping and not priority:
            raise DatabaseUnavailable("This instance is stopping.", applied="no")

    def refuse_requests(self) -> None:
        """Refuse all queued operations, and new ones without priority: this instance stops."""
        self._stopping = True
        self._refuse_all("This instance is stopping.")

    def _refuse_all(self, reason: str) -> None:
        """Refuse every queued operation; those on connections go on."""
        for operation in self._queue.clear():
            if not operation.answer.done():
                operation.answer.set_exception(DatabaseUnavailable(reason, applied="no"))

    # -- the workers --------------------------------------------------------------------------

    def _free_workers(self) -> int:
        return len(self._workers) - self._busy

    def _may_start_worker(self) -> bool:
        """Return whether one more worker is allowed, and finds or may make a connection."""
        return len(self._workers) < self.settings.db_pool_size and (
            bool(self._idle) or not self._workers or monotonic() >= self._connect_at
        )

    async def _work(self) -> None:
        """Serve operations, one after another on one connection, until the queue is empty.

        The next operation's statement is sent before the caller of the last one resumes.
        """
        connection: Session | None = None
        try:
            while self._queue.ready:
                if connection is None or connection.is_closed():
                    connection = await self._connection()
                    if connection is None:
                        return
                    continue  # meanwhile other workers may have emptied the queue
                queued = self._queue.take()
                assert queued is not None  # noqa: S101 - checked above
                self._busy += 1
                try:
                    await self._serve(queued.item, connection)
                finally:
                    self._busy -= 1
                    self._queue.done(queued)
        finally:
            self._workers.discard(asyncio.current_task())
            if connection is not None:
                self._release(connection)

    def _release(self, connection: Session) -> None:
        if connection in self._expired:
            self._expired.discard(connection)
            connection.terminate()
        elif not connection.is_closed():
            self._idle.append(connection)

    async def _serve(self, operation: _Operation, connection: Session) -> None:
        """Execute a queued operation."""
        execute, answer, since, priority = operation
        if answer.done():  # the caller is gone
            return
        if not priority and monotonic() - since > self.settings.max_waiting_seconds:
            answer.set_exception(
                Overloaded(
                    "Too many requests are waiting: no database connection was free in time."
                )
            )
            return
        try:
            if not priority:
                self._waited.observe(monotonic() - since)
            result = await execute(connection)
            if not answer.done():
                answer.set_result(result)
        except asyncio.CancelledError:
            # An operation can raise CancelledError although its worker is not cancelled.
            connection.terminate()
            if not answer.done():
                answer.set_exception(_problem(Cause(Kind.CUT_OFF, "unknown")))
            if _is_cancelled():  # the event loop ends
                raise
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            failure = _as_problem(error)
            self._handle_failure(failure, connection)
            if not answer.done():
                answer.set_exception(failure)

    async def _connection(self) -> Session | None:
        """Return an idle connection, or a new one; None when none can be made now."""
        if (idle := self._take_idle()) is not None:
            return idle
        self._connecting += 1
        try:
            connection = await self._open_same()
        except asyncio.CancelledError:
            if _is_cancelled():  # the event loop ends
                raise
            cause = Cause(Kind.CUT_OFF, "no", text="cut off while it was made")
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no connection
            cause = classify(error) or Cause(Kind.UNEXPECTED, "no", text=repr(error))
        else:
            if connection is None:
                await self._leave_replaced()
                return None
            self._open.add(connection)
            self._refusal, self._refusals = None, 0
            return connection
        finally:
            self._connecting -= 1
        self._handle_refusal(cause)
        return self._take_idle()

    def _forget_closed(self) -> None:
        self._open = {connection for connection in self._open if not connection.is_closed()}

    def _take_idle(self) -> Session | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None

    async def _open_same(self) -> Session | None:
        """Open a connection; None: it leads to another database than those before."""
        connection = await self._open_connection()
        try:
            found = str(await connection.fetchval(INSTALLATION))
        except BaseException:
            connection.terminate()
            raise
        if self.installation is None or found == self.installation.id:
            return connection
        connection.terminate()
        return None

    async def _leave_replaced(self) -> None:
        """Leave a database whose address leads to another one now, and begin there as at start."""
        for connection in self._open:
            connection.terminate()
        await self._lent.expire_connections()
        self._mark_unavailable(Cause(Kind.REPLACED, "no"))

    async def _open_connection(self) -> Session:
        """Return a new connection to the primary.

        Raises:
            StandbyError: the only host is a standby.
            what `open_session` and `open_pooled` raise.
        """
        arguments = {
            **self.settings.statement_arguments(),
            "command_timeout": self.settings.db_statement_seconds,
        }
        connection = await (open_pooled if self.settings.pooled else open_session)(arguments)
        if connection.is_standby():
            connection.terminate()
            raise StandbyError("is a standby")
        if connection.address != self._address:
            self._leave_other_hosts(connection.address)
        return connection

    def _leave_other_hosts(self, address: str) -> None:
        """Close the connections to a former primary.

        One that is frozen or cut off closes none itself; what it still commits may be lost.
        """
        if self._address is not None:
            log.warning("another host is the primary", address=address, was=self._address)
            # Those that are lent lead past a pooler, to an address of their own.
            lent = set() if self.settings.pooled else self._lent_open
            for connection in self._open | lent:
                if connection.address != address:
                    connection.terminate()
        self._address = address

    # -- unavailable, and available again -----------------------------------------------------

    def _handle_refusal(self, cause: Cause) -> None:
        """Go on with the open connections; without any, mark the database unavailable."""
        self._forget_closed()
        if not self._open and not self._connecting:
            self._mark_unavailable(cause)
            return
        self._connect_at = monotonic() + _pause_seconds(cause.kind, self._refusals + 2)
        self._refusals += 1
        self._refusal = cause
        self._log_cause("no further connection", cause)

    def _handle_failure(self, error: Exception, connection: Session) -> None:
        """Act on the error of an operation: for its connection, and for the database."""
        cause = cause_of(error) if isinstance(error, DatabaseUnavailable) else None
        if cause is None:
            return
        if cause.applied == "unknown":
            connection.terminate()
        if cause.kind in {Kind.NO_ANSWER, Kind.STANDBY}:
            self._mark_unavailable(cause)
        elif cause.kind is Kind.READ_ONLY:
            self._mark_read_only(cause)
        elif cause.kind is Kind.SCHEMA_LOST:
            if self._schema_check is None or self._schema_check.done():
                check = self._check_schema(cause)
                self._schema_check = asyncio.create_task(check, context=Context())
        elif cause.kind not in OF_A_STATEMENT:
            self._log_cause("the database failed", cause)

    def _mark_unavailable(self, cause: Cause) -> None:
        """Refuse every operation until the database can be used again."""
        if self._outage is None:
            log.warning(
                "database unavailable",
                **_for_log(cause),
                address=self.settings.database_address,
                waiting=len(self._queue),
            )
            # In a context of its own: what it logs is not about the request that met the failure.
            self._recovery = asyncio.create_task(self._connect_with_retry(), context=Context())
            self._outage = cause
        self._refuse_all(cause.sentence)

    async def _check_schema(self, cause: Cause) -> None:
        """Check that the tables are the same as at the last check; else migrate as at start."""
        with suppress(Exception):
            if await find(self.settings) == self.installation:
                return  # the statement is at fault
        self._mark_unavailable(cause)

    def _mark_read_only(self, cause: Cause) -> None:
        """Go on serving reads, and poll until writes are possible again."""
        if self._read_only is None:
            log.warning("database read-only", **_for_log(cause))
            self._read_only = cause
            self._writable = asyncio.create_task(self._wait_until_writable(), context=Context())

    def _log_cause(self, event: str, cause: Cause) -> None:
        """Log a cause once per `LOG_AGAIN_SECONDS`, not with each request that meets it."""
        now = monotonic()
        if now - self._logged.get(cause.kind, -LOG_AGAIN_SECONDS) >= LOG_AGAIN_SECONDS:
            self._logged[cause.kind] = now
            log.warning(event, **_for_log(cause))

    async def _connect_with_retry(self) -> None:
        """Try until the database can be used, and its schema is at this program's revision.

        Raises:
            UnusableDatabaseError: while this instance starts, when waiting can't help.
        """
        started, tries = monotonic(), 0
        logged = self._outage
        while True:
            try:
                connection = await self._migrate_and_connect()
                break
            except Exception as error:
                cause = _start_failure(error)
                # At start the error ends the instance; later an operator may remove the cause.
                if not self._serving and cause.kind in PERMANENT:
                    raise UnusableDatabaseError(f"{cause.sentence} {cause.text}") from error
                if not self._serving and cause.kind in {Kind.SCHEMA, Kind.UNEXPECTED}:
                    raise
            if logged is None or (cause.kind, cause.sentence) != (logged.kind, logged.sentence):
                tries, logged = 0, cause
                log.warning(
                    "waiting for the database",
                    **_for_log(cause),
                    address=self.settings.database_address,
                )
            self._outage = cause
            await asyncio.sleep(_pause_seconds(cause.kind, tries))
            tries += 1
        while (idle := self._take_idle()) is not None:
            idle.terminate()
        # One that is idle may lead to a server that is cut off, and find out when a job uses it.
        await self._lent.expire_connections()
        self._forget_closed()
        self._open.add(connection)
        self._idle = [connection]
        self._outage = self._refusal = None
        self._refusals, self._connect_at = 0, 0.0
        self._logged.clear()
        if self._serving:
            log.info("database available", after_seconds=round(monotonic() - started, 1))

    async def _migrate_and_connect(self) -> Session:
        """Migrate, and return a connection."""
        if self.settings.migrate_database_url is not None:
            await migrate(self.settings.as_owner(), self._report_migration)
        schema = await migrate(self.settings, self._report_migration)
        connection = await self._open_connection()
        try:
            self._check_server(await _server(connection))
            if self.settings.pooled:
                await _require_same(connection, schema.installation)
            await self._read_replication(connection)
        except BaseException:
            connection.terminate()
            raise
        self.installation = schema.installation
        return connection

    def _check_server(self, row: asyncpg.Record) -> None:
        """Log, once, what is wrong with the server's configuration.

        Raises:
            UnusableDatabaseError: while this instance starts, when the connections don't suffice.
        """
        warnings = [
            f"PostgreSQL runs with {name} = off: what it acknowledges can be lost when its machine "
            "stops, and its data destroyed."
            for name in ("fsync", "full_page_writes")
            if row[name] == "off"
        ]
        for warning in warnings:
            if warning not in self._server_warnings:
                log.error("PostgreSQL is not durable", reason=warning)
        if row["may_do"] is not None:
            warnings.append(MAY_DO_ALL.format(**row))
            if warnings[-1] not in self._server_warnings:
                log.warning("too many rights", role=row["role"], reason=warnings[-1])
        for whose in ("server", "role", "database"):
            shortage = _shortage(self.settings, whose, row)
            if shortage is None:
                continue
            if row[f"{whose}_limit"] < self.settings.connections_at_least and not self._serving:
                raise UnusableDatabaseError(shortage)
            warnings.append(shortage)
            if not self._serving:  # later the sentence changes with each check
                log.warning("few connections", reason=shortage)
        self._server_warnings = warnings
        if row["read_only"] and self._read_only is None:
            self._mark_read_only(Cause(Kind.READ_ONLY, "no"))

    def _report_migration(self, sentence: str) -> None:
        cause = Cause(Kind.SCHEMA, "no", text=sentence)
        if cause != self._outage:
            log.info("migration", state=sentence)
        self._outage = cause

    async def _wait_until_writable(self) -> None:
        """Poll with new sessions, as old ones may keep a default that has changed since."""
        tries = 0
        while True:
            await asyncio.sleep(_pause_seconds(Kind.READ_ONLY, tries))
            tries += 1
            try:
                connection = await self._open_connection()
                try:
                    if await connection.fetchval(READ_ONLY):
                        continue
                finally:
                    connection.terminate()
                break
            except StandbyError as error:  # the primary was demoted: what it reads may be old
                self._read_only = None
                self._mark_unavailable(Cause(Kind.STANDBY, "no", text=str(error)))
                return
            except Exception:  # noqa: BLE001, S110 - the workers handle any other failure
                pass
        log.info("database writable")
        self._read_only = None
        await self._lent.expire_connections()
        self._expired = {each for each in self._open if not each.is_closed()}
        while (idle := self._take_idle()) is not None:
            self._release(idle)


async def _server(connection: Session) -> asyncpg.Record:
    """Read what there is to check of the server.

    Raises:
        StandbyError: it is a standby (a pooler may not pass on what `is_standby` reads).
    """
    row = await connection.fetchrow(SERVER)
    if row is None or row["in_recovery"]:
        raise StandbyError("is a standby")
    return row


async def _require_same(connection: Session, migrated: Installation) -> None:
    """Check that a pooler leads to the database that was migrated past it.

    Raises:
        UnusableDatabaseError: it does not.
    """
    try:
        found = str(await connection.fetchval(INSTALLATION))
    except asyncpg.UndefinedTableError:
        found = ""
    if found != migrated.id:
        raise UnusableDatabaseError(
            "The pooler and DB_DIRECT_URL lead to different databases: name the same one in both."
        )


def _start_failure(error: Exception) -> Cause:
    if isinstance(error, UnusableDatabaseError):
        return Cause(Kind.SCHEMA, "no", text=str(error))
    return classify(error) or Cause(Kind.UNEXPECTED, "no", text=repr(error))


def _pause_seconds(kind: Kind, tries: int) -> float:
    """Return how long to wait, with jitter against other instances."""
    return pause_seconds(kind, tries) * random.uniform(0.5, 1)


def _is_cancelled() -> bool:
    """Return whether the task itself is cancelled, and not only what it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _for_log(cause: Cause) -> dict[str, str]:
    fields = {"cause": cause.kind.name.lower(), "reason": cause.kind.value}
    if cause.sqlstate is not None:
        fields["sqlstate"] = cause.sqlstate
    if cause.text:
        fields["error"] = cause.text
    return fields


def _terminate(connection: Connection) -> None:
    with suppress(asyncpg.InterfaceError):  # it is closed, and the pool has released it already
        if not connection.is_closed():
            connection.terminate()


MAY_DO_ALL: Final = (
    "This instance connects to its database as {may_do}: whoever gets at that connection can "
    "rewrite the ledger. docs/production.md says how to serve as a role that can't."
)

# Limits of role and database do not hold for a superuser; -1 is none. All other sessions that share
# a limit are counted, those of this instance too.
SERVER: Final = """
WITH others AS (
    SELECT usesysid, datname FROM pg_stat_activity
    WHERE usesysid IS NOT NULL AND pid <> pg_backend_pid()
)
SELECT pg_is_in_recovery() AS in_recovery,
       current_setting('transaction_read_only')::boolean AS read_only,
       current_setting('fsync') AS fsync,
       current_setting('full_page_writes') AS full_page_writes,
       current_setting('max_connections')::integer
       - current_setting('superuser_reserved_connections')::integer
       - coalesce(current_setting('reserved_connections', true)::integer, 0) AS server_limit,
       (SELECT count(*) FROM others) AS server_used,
       session_user::text AS role,
       CASE WHEN rolsuper THEN 'a superuser'
            WHEN pg_has_role(session_user, (SELECT relowner FROM pg_class
                                            WHERE oid = to_regclass('entries')), 'MEMBER')
            THEN 'the owner of the tables' END AS may_do,
       CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END AS role_limit,
       (SELECT count(*) FROM others WHERE usesysid = pg_roles.oid) AS role_used,
       CASE WHEN rolsuper THEN -1 ELSE datconnlimit END AS database_limit,
       (SELECT count(*) FROM others WHERE others.datname = pg_database.datname) AS database_used
FROM pg_roles, pg_database
WHERE rolname = session_user AND pg_database.datname = current_database()
"""


# Another one after a restore: see `maintenance/restoration.py`.
INSTALLATION: Final = "SELECT installation FROM balance_app_version"

READ_ONLY: Final = "SELECT current_setting('transaction_read_only')::boolean"


def _shortage(settings: Settings, whose: str, row: asyncpg.Record) -> str | None:
    """Return a sentence when a limit leaves fewer connections than are configured."""
    limit, used = row[f"{whose}_limit"], row[f"{whose}_used"]
    if limit < 0 or limit - used >= settings.connections_needed:
        return None
    return (
        f"The {whose}'s limit is {limit} connections, of which others use {used}: this instance "
        f"needs {settings.connections_at_least}, and may use {settings.connections_needed} "
        "(DB_POOL_SIZE, JOB_CONNECTIONS, and 2)."
    )


def _as_problem(error: Exception) -> Exception:
    """Return the problem of what the driver itself has sent (BEGIN); any other error as it is."""
    cause = classify(error)
    if cause is None:
        return error
    problem = _problem(cause)
    problem.__cause__ = error
    return problem


def _problem(cause: Cause) -> DatabaseUnavailable:
    """Return the problem of a request that met this cause while it changed something."""
    return DatabaseUnavailable(cause.sentence, applied=cause.applied)


async def write(connection: Connection, sql: str, *arguments: object) -> asyncpg.Record | None:
    """Run a statement that changes something, as one transaction; return its first row.

    Raises:
        DatabaseUnavailable: with `applied` "no" when the server rolled it back, "unknown" when the
            connection ended, or the time was up, before its answer.
    """
    rows = await write_rows(connection, sql, *arguments)
    return rows[0] if rows else None


async def write_rows(connection: Connection, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Run a statement that changes something, as `write` does; return all its rows."""
    try:
        return await connection.fetch(sql, *arguments)
    except Exception as error:
        cause = classify(error)
        if cause is None:
            raise
        raise _problem(cause) from error


async def read(connection: Connection, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Run a statement that changes nothing; return its rows.

    Raises:
        DatabaseUnavailable: always with `applied` "no".
    """
    try:
        return await connection.fetch(sql, *arguments)
    except Exception as error:
        cause = classify(error)
        if cause is None:
            raise
        raise DatabaseUnavailable(cause.sentence, applied="no") from error


# Without good statistics the planner may read and sort all rows of an index's range to find the
# first few. With sorting off it reads them from the index in order.
KEEP_TO_INDEX: Final = """
SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)
"""
# The same, whatever the arguments are: to plan for each of them takes longer than to read.
PLANNED_ONCE: Final = f"{KEEP_TO_INDEX}, set_config('plan_cache_mode', 'force_generic_plan', true)"


async def read_in_order(
    connection: Connection, sql: str, *arguments: object
) -> list[asyncpg.Record]:
    """Run a statement that reads a few rows in an index's order; return them.

    Raises:
        DatabaseUnavailable: as `read` does.
    """
    async with reading_in_order(connection):
        return await connection.fetch(sql, *arguments)


@asynccontextmanager
async def reading_in_order(connection: Connection) -> AsyncIterator[None]:
    """Keep the statements within to the order of an index, in one transaction.

    Raises:
        DatabaseUnavailable: as `read` does.
    """
    try:
        async with connection.transaction(isolation="read_committed", readonly=True):
            await connection.fetch(PLANNED_ONCE)
            yield
    except Exception as error:
        cause = classify(error)
        if cause is None:
            raise
        raise DatabaseUnavailable(cause.sentence, applied="no") from error


async def end_implicit_transaction(connection: Connection) -> None:
    """Release the locks of a statement that the caller has cut off.

    The driver prepares a statement without a Sync message: cut off there, it leaves a transaction
    open until the connection's next use, with the locks of the tables in the statement.
    """
    await connection.execute("SELECT")
