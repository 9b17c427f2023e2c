"""The classes that make spans: of requests, of statements, and of the runs of jobs.

A statement has a span if it is sent for a request or a run. What an instance does by itself all
the time (heartbeats, claims that find nothing) has none: each would be a trace of one span. A span
never has a parameter of a statement, and instead of its text the name that it has here, as a job's
own statement may have values in it.

Spans are handed to a thread of the SDK's, which drops them when it can't send them. Nothing waits
for it, but the stop of an instance for a second.
"""

import asyncio
import inspect
import logging
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from importlib.metadata import entry_points
from time import monotonic, time_ns
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
import structlog
from opentelemetry import context, propagate, trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode
from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import override

from balance_app import __version__
from balance_app.access.routes import template_of
from balance_app.db.pool import Connection, Database
from balance_app.db.wait_queue import Lane
from balance_app.errors import PROBLEM_JSON, Problem
from balance_app.http.middleware import RequestMiddleware
from balance_app.jobs import scope as jobs_scope
from balance_app.jobs import statements
from balance_app.jobs.job import Job
from balance_app.jobs.repository import Claimed
from balance_app.jobs.run import Run
from balance_app.jobs.runner import RunResult
from balance_app.jobs.scheduler import Scheduler
from balance_app.logs import TRACE, Trace
from balance_app.masks import mask_of
from balance_app.sessions import Session
from balance_app.settings import Settings

log = structlog.get_logger(__name__)
tracer = trace.get_tracer("balance_app", __version__)
Result = TypeVar("Result")

FLUSH_SECONDS: Final = 1.0
REPORT_SECONDS: Final = 60.0
FIRST_SERVER_ERROR: Final = 500
PROBLEM: Final = "balance_app.problem"
_WORD: Final = re.compile(r"\s*([A-Za-z]+)")
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


Classes: TypeAlias = tuple[
    type[RequestMiddleware], type[Database], type[Scheduler], Callable[[], Awaitable[None]]
]


def begin(settings: Settings, exporters: Sequence[str]) -> Classes:
    """Make the provider of traces that the environment describes; return the classes that use it.

    The last one returned is what sends the last spans, when the instance stops.

    Raises:
        LookupError: an exporter is not installed.
    """
    kinds = {each.name: each for each in entry_points(group="opentelemetry_traces_exporter")}
    missing = [name for name in exporters if name not in kinds]
    if missing:
        raise LookupError(f"there is no exporter {', '.join(missing)}; there are {sorted(kinds)}")
    own = {
        "service.name": "balance_app",
        "service.version": __version__,
        "service.instance.id": settings.server_id,
    }
    named = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME wins
    provider = TracerProvider(
        resource=Resource.create({**own, **named}),
        shutdown_on_exit=False,  # it might wait for half a minute
    )
    _report_in_own_words(settings)
    for name in exporters:
        provider.add_span_processor(BatchSpanProcessor(kinds[name].load()()))
    return use(provider)


def use(provider: TracerProvider) -> Classes:
    """Return the classes whose spans this provider gets, beside those of the code of jobs."""
    trace.set_tracer_provider(provider)
    jobs_scope.Scope.new_context = staticmethod(_context_of_run)
    _STATEMENTS.update(_named_statements())

    async def stop() -> None:
        # Neither the executor's threads nor `atexit`: both would be waited for.
        sent = asyncio.Event()
        loop = asyncio.get_running_loop()

        def send() -> None:
            provider.shutdown()
            with suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, name="last-spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await sent.wait()

    return TracedRequests, TracedDatabase, TracedScheduler, stop


class _OncePerMinute(logging.Handler):
    """Logs why spans are not sent, not with each of them."""

    def __init__(self, mask: Callable[[str], str]) -> None:
        super().__init__(logging.WARNING)
        self._mask = mask
        self._again_at = 0.0

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if monotonic() < self._again_at:
            return
        self._again_at = monotonic() + REPORT_SECONDS
        log.warning("spans are not sent", reason=self._mask(record.getMessage())[:500])


def _report_in_own_words(settings: Settings) -> None:
    library = logging.getLogger("opentelemetry")
    library.propagate = False
    library.handlers = [_OncePerMinute(mask_of(settings))]


# -- requests ----------------------------------------------------------------------------------


class TracedRequests(RequestMiddleware):
    """Makes a span of each request, in its caller's trace or in one of its own."""

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        route = template_of(method, scope["path"].removeprefix(self._root_path))
        span = tracer.start_span(
            method if route is None else f"{method} {route}",
            _context_of_caller(scope),
            SpanKind.SERVER,
            {
                "http.request.method": method,
                "url.scheme": scope["scheme"],
                "url.path": scope["path"],
                **({} if route is None else {"http.route": route}),
            },
        )
        _replace_traceparent(scope, span.get_span_context())
        reads_problem = False

        async def send_traced(message: Message) -> None:
            nonlocal reads_problem
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= FIRST_SERVER_ERROR:
                    span.set_status(StatusCode.ERROR)
                reads_problem = (b"content-type", PROBLEM_JSON.encode()) in message["headers"]
            elif reads_problem:
                reads_problem = False
                with suppress(ValueError):
                    span.set_attribute(PROBLEM, from_json(message["body"])["code"])
            await send(message)

        token = context.attach(trace.set_span_in_context(span))
        try:
            await super().__call__(scope, receive, send_traced)
        finally:
            context.detach(token)
            span.end()

    @override
    def new_span_id(self) -> int:
        return int(trace.get_current_span().get_span_context().span_id)

    @override
    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes], problem: Problem) -> Response:
        trace.get_current_span().set_attribute(PROBLEM, problem.code)  # it may be shown as a page
        return super()._refusal(scope, headers, problem)


def _context_of_caller(scope: Scope) -> context.Context:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        # One that came twice names no trace.
        known = headers.get(name.decode("latin-1"))
        headers[name.decode("latin-1")] = text if known is None else f"{known}, {text}"
    return propagate.extract(headers, context.Context())


def _replace_traceparent(scope: Scope, span: SpanContext) -> None:
    """Name the span's own trace, so that log and answer do."""
    own = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    scope["headers"] = [
        *(each for each in scope["headers"] if each[0] != b"traceparent"),
        (b"traceparent", own.encode()),
    ]


# -- statements --------------------------------------------------------------------------------

# The names of this program's statements, by their texts.
_STATEMENTS: Final[dict[str, str]] = {}


def _named_statements() -> dict[str, str]:
    """Return the names of the constants that hold statements, with the modules that define them."""
    found: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("balance_app."):
            continue
        source = ""
        texts = {each: of for of, each in vars(module).items() if _is_constant(of, each)}
        with suppress(OSError):  # there is no source here
            source = inspect.getsource(module)
        for text, of in texts.items():
            if text in source or text not in found:
                found[text] = f"{name.removeprefix('balance_app.')}.{of.lstrip('_')}"
    return found


def _is_constant(name: str, value: object) -> bool:
    return name.isupper() and isinstance(value, str) and " " in value


def _name_of(statement: str) -> str:
    """Return a statement's name, or the first word of one that has none."""
    name = _STATEMENTS.get(statement)
    if name is None:
        word = _WORD.match(statement)
        name = "statement" if word is None else word[1].upper()
    return name


def _of_database(name: str) -> dict[str, str]:
    # The second is the present name of the first.
    return {"db.system": "postgresql", "db.system.name": "postgresql", "db.query.summary": name}


def _record(query: "asyncpg.connection.LoggedQuery") -> None:
    """Make the span of a statement that has ended."""
    if not trace.get_current_span().is_recording():
        return
    end = time_ns()
    name = _name_of(query.query)
    span = tracer.start_span(
        name,
        kind=SpanKind.CLIENT,
        attributes=_of_database(name),
        start_time=end - int(query.elapsed * 1e9),
    )
    if query.exception is not None:
        kind = getattr(query.exception, "sqlstate", None) or type(query.exception).__name__
        span.set_attribute("error.type", kind)
        span.set_status(StatusCode.ERROR)
    span.end(end)


async def _under(here: context.Context, work: Awaitable[Result]) -> Result:
    """Await something that runs in another context as if it ran in this one."""
    token = context.attach(here)
    try:
        return await work
    finally:
        context.detach(token)


class TracedDatabase(Database):
    """Makes a span of each statement that is sent for a request or a run."""

    @override
    async def run(
        self,
        operation: Callable[[Connection], Awaitable[Result]],
        *,
        priority: bool = False,
        lane: Lane | None = None,
    ) -> Result:
        here = context.get_current()
        if not trace.get_current_span().is_recording():
            return await super().run(operation, priority=priority, lane=lane)
        # A worker executes it, which serves many requests.
        return await super().run(
            lambda connection: _under(here, operation(connection)), priority=priority, lane=lane
        )

    @override
    async def _open_connection(self) -> Session:
        connection = await super()._open_connection()
        connection.add_query_logger(_record)
        return connection

    @override
    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        async with super().lend() as connection:
            connection.add_query_logger(_record)
            try:
                yield connection
            finally:
                with suppress(asyncpg.InterfaceError):  # it is closed
                    connection.remove_query_logger(_record)


# -- runs --------------------------------------------------------------------------------------


class TracedScheduler(Scheduler):
    """Makes a span of each run, with a link to that of its claim."""

    @override
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._claims: dict[tuple[str, int], SpanContext] = {}

    @override
    def _start(self, claimed: Claimed, sent_at: float) -> None:
        end = time_ns()
        name = _name_of(statements.CLAIM)
        span = tracer.start_span(
            name,
            context.Context(),
            SpanKind.CLIENT,
            {**_of_database(name), **_of_run(claimed)},
            start_time=end - int((monotonic() - sent_at) * 1e9),
        )
        span.end(end)
        self._claims[claimed.name, claimed.fence] = span.get_span_context()
        super()._start(claimed, sent_at)

    @override
    async def _execute(self, run: Run, job: Job, claimed: Claimed) -> None:
        links = [Link(self._claims.pop((claimed.name, claimed.fence)))]
        attributes = {**_of_run(claimed), "job.attempt": claimed.attempt}
        with tracer.start_as_current_span(
            f"job {run.name}",
            attributes=attributes,
            links=links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            own = span.get_span_context()
            TRACE.set(Trace(f"{own.trace_id:032x}", f"{own.span_id:016x}"))
            await super()._execute(run, job, claimed)

    @override
    async def _record(
        self, run: Run, job: Job, claimed: Claimed, run_result: RunResult, ended: float
    ) -> None:
        span = trace.get_current_span()
        span.set_attribute("job.outcome", run_result.outcome)
        if run_result.outcome in {"failed", "timed_out"}:
            span.set_status(StatusCode.ERROR)
        await super()._record(run, job, claimed, run_result, ended)


def _of_run(claimed: Claimed) -> dict[str, str | int]:
    return {"job.name": claimed.name, "job.fence": claimed.fence}


def _context_of_run() -> Context:
    """Return a context that has nothing but the run's span, also as that of its log lines."""
    fresh = Context()
    fresh.run(context.attach, context.get_current())
    fresh.run(TRACE.set, TRACE.get())
    return fresh
