"""The composition root: the only place where the application's parts are put together."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from balance_app import __version__
from balance_app.access.actions import ActionRepository
from balance_app.access.gate import Gate, OpenToNetworkError
from balance_app.access.repository import KeyRepository
from balance_app.balances import accounts, holds, repository, state, together
from balance_app.balances.accounts import AccountRepository
from balance_app.balances.api import holds as holds_api
from balance_app.balances.api import movements, statement, users
from balance_app.balances.api.export import Exporter
from balance_app.balances.guard import Guard
from balance_app.balances.holds import HoldRepository
from balance_app.balances.ledger import LedgerRepository
from balance_app.balances.repository import BalanceRepository
from balance_app.db.migrations import UnusableDatabaseError
from balance_app.db.pool import Database
from balance_app.errors import (
    InternalError,
    InvalidRequest,
    MalformedRequest,
    NotFound,
    Problem,
)
from balance_app.formatting import url
from balance_app.http import actions, docs, health
from balance_app.http.health import Readiness
from balance_app.http.middleware import RequestMiddleware
from balance_app.http.params import request_fault
from balance_app.http.problem_pages import answer
from balance_app.http.samples import ADDRESS
from balance_app.http.seats import Seats
from balance_app.http.services import Services
from balance_app.jobs.api.controls import Controls
from balance_app.jobs.api.events import EventBroadcaster
from balance_app.jobs.api.history import History
from balance_app.jobs.api.router import router as jobs_router
from balance_app.jobs.api.router import verdict_router
from balance_app.jobs.api.stats import StatsReader
from balance_app.jobs.api.status import StatusReader
from balance_app.jobs.api.verdict_reader import VerdictReader
from balance_app.jobs.job import Registry
from balance_app.jobs.scheduler import Scheduler
from balance_app.maintenance.alerting import Alerting
from balance_app.maintenance.alerting.causes import CauseReader
from balance_app.maintenance.audits import AUDITS, LedgerMismatchError
from balance_app.maintenance.summaries import read_table_bytes
from balance_app.metrics import Metrics
from balance_app.settings import Settings
from balance_app.telemetry import Parts, choose
from balance_app.web.account_actions import router as account_actions_router
from balance_app.web.accounts import router as accounts_router
from balance_app.web.action_list import router as action_list_router
from balance_app.web.actions import router as actions_router
from balance_app.web.login import refusal_page
from balance_app.web.login import router as login_router
from balance_app.web.queries import PageQueries
from balance_app.web.router import router as pages_router
from balance_app.web.runs import router as runs_router
from balance_app.web.stream import PageStream

log = structlog.get_logger(__name__)

MAX_STREAMS = 1000  # of events

# The statements that lock an account until their commit.
LOCKING = (
    repository.CHANGE,
    repository.CHANGE_ONCE,
    together.CHANGE_TOGETHER,
    repository.TRANSFER,
    repository.HOLD,
    holds.CAPTURE,
    holds.VOID,
    state.EXPIRE,
    accounts.SET,
)


def create_app(
    settings: Settings,
    stopping: asyncio.Event,
    registry: Registry,
    *,
    closing: asyncio.Event | None = None,
) -> RequestMiddleware:
    """Return the application of one instance; its lifespan migrates, connects, and runs jobs.

    `stopping` is set by the server when the instance is to stop: it is not ready, its runs are
    released. `closing` is set when it listens no more, by default at once: what is under way ends.
    """
    Problem.root_path = settings.root_path
    alerting = Alerting(settings)
    registry = alerting.added_to(registry)
    metrics = Metrics(server=settings.server_id, version=__version__, jobs=registry)
    parts = choose(settings, os.environ)
    gate = Gate(settings, metrics)
    app = FastAPI(
        title="balance_app",
        summary="Exact balances in real time.",
        description=docs.DESCRIPTION.format(root=settings.root_path, address=ADDRESS),
        version=__version__,
        openapi_tags=docs.TAGS,
        generate_unique_id_function=docs.operation_id,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # Its own would be below ours, and tell what a wrong request has in it.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        lifespan=partial(
            _lifespan,
            *(settings, stopping, closing or stopping, registry, alerting, metrics, gate, parts),
        ),
    )
    for each in (movements, holds_api, users, statement):
        app.include_router(each.router)
    for router in (jobs_router, verdict_router, actions.router, health.router):
        app.include_router(router)
    for router in (pages_router, runs_router, login_router, accounts_router):
        app.include_router(router)
    for router in (actions_router, account_actions_router, action_list_router):
        app.include_router(router)
    docs.add_docs(app)
    app.add_exception_handler(Problem, _problem_response)
    app.add_exception_handler(RequestValidationError, _invalid_request_response)
    app.add_exception_handler(HTTPException, _http_error_response)
    app.add_exception_handler(Exception, _internal_error_response)
    return parts.middleware(
        app,
        gate=gate,
        direct={("POST", "/api/balance"): movements.change_balance},
        refusal_page=refusal_page,
        log_requests=settings.log_requests,
        root_path=settings.root_path,
        metrics=metrics,
    )


@asynccontextmanager
async def _lifespan(  # noqa: PLR0913, PLR0917 - the composition root
    settings: Settings,
    stopping: asyncio.Event,
    closing: asyncio.Event,
    registry: Registry,
    alerting: Alerting,
    metrics: Metrics,
    gate: Gate,
    parts: Parts,
    app: FastAPI,
) -> AsyncIterator[None]:
    database = parts.database(settings, metrics)
    scheduler = None
    if settings.jobs_enabled:
        scheduler = parts.scheduler(settings, database, registry, metrics)
    minimums = {
        name: settings.job_min_seconds if job.min_seconds is None else job.min_seconds
        for name, job in registry.items()
    }
    status_reader = StatusReader(database, settings, least_seconds=minimums)
    verdict_reader = VerdictReader(
        status_reader, database, [each.name for each in AUDITS], LedgerMismatchError.__name__
    )
    metrics.set_fleet_query(
        StatsReader(
            database, registry, AUDITS, LedgerMismatchError, read_table_bytes, verdict_reader.read
        ).read
    )
    alerting.connect(CauseReader(verdict_reader.look).read)
    streams = Seats("streams", most=MAX_STREAMS, per_client=settings.streams_per_client)
    queries = PageQueries(database, verdict_reader)
    guard = Guard(database, LOCKING)
    keys = KeyRepository(database)
    broadcaster = EventBroadcaster(status_reader.read, stopping, streams)
    page_stream = PageStream(
        status_reader, queries, stopping, streams, root_path=settings.root_path
    )
    for stream in (broadcaster, page_stream):
        gate.when_changed(stream.wake)
    app.state.services = Services(
        settings,
        metrics,
        database,
        gate,
        keys,
        ActionRepository(database),
        Readiness(
            database,
            stopping,
            informational={} if scheduler is None else {"jobs": scheduler.condition},
            shows_details=lambda: gate.shows_details,
        ),
        BalanceRepository(database, guard, metrics),
        HoldRepository(database, guard),
        AccountRepository(database, guard),
        LedgerRepository(database),
        Exporter(closing),
        *([] if scheduler is None else [scheduler]),
        status_reader,
        verdict_reader,
        broadcaster,
        Controls(database, status_reader, registry),
        History(database),
        queries,
        page_stream,
    )
    try:
        try:
            await database.start()
            await gate.start(keys)
        except (UnusableDatabaseError, OpenToNetworkError) as error:
            log.error("can't start", reason=str(error))  # noqa: TRY400 - the sentence suffices
            raise
        except Exception:
            log.exception("can't start")
            raise
        # With the default thresholds the collector scans ten thousand open sockets again and
        # again, and never finds anything to free.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        log.info("started", address=url(settings.host, settings.port), version=__version__)
        if scheduler is not None:
            scheduler.start()
        refusal = asyncio.create_task(_refuse_in_time(database, closing, settings.stop_seconds / 6))
        releasing = asyncio.create_task(_release_runs(scheduler, stopping))
        yield
        refusal.cancel()
        stopping.set()
        closing.set()
        await releasing
        if scheduler is not None:
            await scheduler.close()
    finally:
        await gate.stop()
        await database.stop()
        await parts.stop()
        log.info("stopped")


async def _refuse_in_time(database: Database, closing: asyncio.Event, seconds: float) -> None:
    """Refuse queued requests soon after no more come, so that time is left to answer all."""
    await closing.wait()
    await asyncio.sleep(seconds)
    database.refuse_requests()


async def _release_runs(scheduler: Scheduler | None, stopping: asyncio.Event) -> None:
    """Release the runs at once after the signal, while requests are still answered."""
    await stopping.wait()
    log.info("stopping")
    if scheduler is not None:
        await scheduler.stop()


async def _problem_response(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)  # noqa: S101 - registered for nothing else
    return answer(request, problem)


async def _internal_error_response(request: Request, _error: Exception) -> Response:
    return answer(request, InternalError())


async def _invalid_request_response(request: Request, error: Exception) -> Response:
    """Name the faults FastAPI found, without repeating the caller's input (it may be NaN)."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for nothing else
    faults = [request_fault(request, each) for each in error.errors()]
    return answer(request, InvalidRequest(*faults))


async def _http_error_response(request: Request, error: Exception) -> Response:
    """Turn the framework's own refusals into problems."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for nothing else
    match error.status_code:
        case 404:
            problem: Problem = NotFound("There is nothing at this address.")
        case _:
            problem = MalformedRequest("The request can't be read.")
    return answer(request, problem)
