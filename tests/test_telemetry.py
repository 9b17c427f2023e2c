"""Traces by OpenTelemetry: what has a span, what is in none, and that nothing depends on them."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import override

from balance_app import telemetry, traced
from balance_app.access.routes import NEEDS, template_of
from balance_app.db.pool import Database
from balance_app.http.middleware import RequestMiddleware
from balance_app.jobs.scheduler import Scheduler
from balance_app.logs import TRACE
from balance_app.settings import load_settings
from balance_app.traced import TracedDatabase, TracedRequests
from tests.access.gates import OpenGate
from tests.processes import SERVE, Instance, as_instance, http_client, query

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
PATIENCE_SECONDS = 60
SECRETS = ("a-secret-note", "a-secret-key", "a-secret-reference", "secret-of-a-job")
A_JOB = """
import asyncio
from datetime import timedelta
from balance_app.jobs import Run, job

@job(name="well", every=timedelta(days=1), min_duration=timedelta(0))
async def well(run: Run) -> str:
    run.log.info("from a run")
    async with run.transaction() as connection:
        await connection.fetchval("SELECT 'secret-of-a-job', $1::text", "secret-of-a-job")
    await run.checkpoint({"user": 1})
    return "done"

@job(name="badly", every=timedelta(days=1), min_duration=timedelta(0))
def badly(run) -> None:
    with run.transaction() as connection:
        connection.execute("SELECT 1")
    raise RuntimeError("secret-of-a-job")
"""


class Receiver:
    """A receiver of traces (OTLP over HTTP) on a port of its own."""

    def __init__(self) -> None:
        self.raw = b""
        self.resource: dict[str, str] = {}
        self.spans: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                receiver.take(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            @override
            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, body: bytes) -> None:
        self.raw += body
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = _values(each.resource.attributes)
            for scope in each.scope_spans:
                self.spans += [
                    {
                        "name": span.name,
                        "kind": span.kind,
                        "trace": span.trace_id.hex(),
                        "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "links": [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                        "error": span.status.code == 2,
                        "events": len(span.events),
                        **_values(span.attributes),
                    }
                    for span in scope.spans
                ]

    async def until(self, name: str, **attributes: object) -> dict[str, Any]:
        """Wait until there is such a span; return it."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                for span in list(self.spans):
                    if span["name"] == name and attributes.items() <= span.items():
                        return span
                await asyncio.sleep(0.05)

    def below(self, span: dict[str, Any]) -> list[str]:
        """Return the names of the spans of which this is the parent."""
        return [each["name"] for each in self.spans if each["parent"] == span["id"]]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _values(attributes: Any) -> dict[str, Any]:  # noqa: ANN401 - of the library
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver of traces."""
    running = Receiver()
    yield running
    running.close()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Keeps the spans that this process makes."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traced, "tracer", provider.get_tracer("tests"))
    return exporter


@pytest.mark.parametrize("guarded", [True, False])
async def test_a_statement_belongs_to_whom_sent_it(
    database: dict[str, str],
    kept: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    *,
    guarded: bool,
) -> None:
    """Few connections serve many; control: where a worker keeps its own context, to nobody."""
    if not guarded:
        monkeypatch.setattr(TracedDatabase, "run", Database.run)
    settings = load_settings(**{name.lower(): value for name, value in database.items()})
    connections = TracedDatabase(settings)
    await connections.start()

    async def send(number: int) -> None:
        with traced.tracer.start_as_current_span(f"request {number}"):
            await connections.run(lambda one: one.fetchval("SELECT $1::int", number))
            async with connections.lend() as one:
                await one.execute("SET LOCAL lock_timeout = 1")

    try:
        await connections.run(lambda one: one.fetchval("SELECT 0"))
        async with connections.lend() as one:
            await one.fetchval("SELECT 0")
        await asyncio.gather(*(send(number) for number in range(50)))
        await asyncio.sleep(0)
    finally:
        await connections.stop()
    spans = kept.get_finished_spans()
    names = {span.context.span_id: span.name for span in spans}
    found = Counter((span.name, names[span.parent.span_id]) for span in spans if span.parent)
    requests = [f"request {number}" for number in range(50)]
    assert len(spans) == len(requests) + len(found)
    expected = {("SET", request) for request in requests}
    expected |= {("SELECT", request) for request in requests} if guarded else set()
    assert found == dict.fromkeys(expected, 1)


async def test_requests_at_one_time_have_spans_of_their_own(kept: InMemorySpanExporter) -> None:
    """Whether they are answered by a route, refused, or nobody knows their addresses."""

    async def handler(_request: Request) -> Response:
        inside = trace.get_current_span().get_span_context()
        await asyncio.sleep(0.01)
        assert trace.get_current_span().get_span_context() == inside
        return JSONResponse({"span": f"{inside.span_id:016x}"})

    app = FastAPI()
    app.router.add_route("/api/users/{userId}", handler)
    requests = TracedRequests(app, gate=OpenGate(), direct={}, log_requests=False)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(requests), base_url="http://here"
    ) as client:
        answers = await asyncio.gather(*(client.get(f"/api/users/{each}") for each in range(50)))
    ids = [answer.headers["traceparent"].split("-")[2] for answer in answers]
    assert [answer.json()["span"] for answer in answers] == ids
    spans = kept.get_finished_spans()
    assert {f"{span.context.span_id:016x}" for span in spans} == set(ids)
    assert len({span.context.trace_id for span in spans}) == len(ids)
    assert {span.name for span in spans} == {"GET /api/users/{userId}"}
    assert TRACE.get() is None


@asynccontextmanager
async def _served(
    database: dict[str, str], log: Path, program: Sequence[str] = SERVE, **env: str
) -> AsyncIterator[tuple[Instance, Callable[..., Any]]]:
    """Run an instance that traces; yield it, and what sends it a request."""
    async with (
        Instance(database, log=log, program=program, LOG_REQUESTS="true", **env) as instance,
        http_client(instance.url) as client,
    ):
        yield instance, client.request


async def test_a_request_is_a_span_with_its_statements(
    database: dict[str, str], receiver: Receiver, tmp_path: Path
) -> None:
    """In the caller's trace; with the route's template, the status, a problem's code."""
    log = tmp_path / "log"
    async with _served(database, log, JOBS_ENABLED="false", **receiver.environment) as (_, send):
        changed = await send(
            "POST",
            "/api/balance",
            json={"userId": 1, "amount": -2, "note": SECRETS[0], "reference": SECRETS[2]},
            headers={
                "traceparent": f"00-{TRACE_ID}-{PARENT}-01",
                "Idempotency-Key": SECRETS[1],
            },
        )
        assert changed.status_code == 200
        span = await receiver.until("POST /api/balance")
        assert (span["trace"], span["parent"], span["kind"]) == (TRACE_ID, PARENT, 2)
        assert (span["http.route"], span["http.response.status_code"]) == ("/api/balance", 200)
        assert "balance_app.problem" not in span
        assert changed.headers["traceparent"] == f"00-{TRACE_ID}-{span['id']}-01"
        statement = await receiver.until("balances.repository.CHANGE_ONCE")
        assert (statement["parent"], statement["trace"]) == (span["id"], TRACE_ID)
        assert (statement["kind"], statement["db.system"]) == (3, "postgresql")
        assert statement["db.query.summary"] == "balances.repository.CHANGE_ONCE"

        refused = await send("POST", "/api/balance", json={"userId": 1, "amount": -20_000})
        span = await receiver.until("POST /api/balance", **{"http.response.status_code": 409})
        assert (span["balance_app.problem"], span["error"]) == ("insufficient-funds", False)
        # A trace of its own, which answer and log name.
        assert span["parent"] == ""
        assert refused.headers["traceparent"] == f"00-{span['trace']}-{span['id']}-03"
        for method, path, name, code in (
            ("GET", "/api/users/1?at=then", "GET /api/users/{userId}", "invalid-request"),
            ("HEAD", "/api/users/2", "HEAD /api/users/{userId}", "user-not-found"),
            ("GET", "/nowhere/1", "GET", "not-found"),
            ("PROPFIND", "/nowhere/2", "_OTHER", "not-found"),
        ):
            await send(method, path)
            span = await receiver.until(name, **{"url.path": path.partition("?")[0]})
            # The answer to HEAD has no body to read it from.
            assert span.get("balance_app.problem") == (None if method == "HEAD" else code)
    assert receiver.resource["service.name"] == "balance_app"
    assert receiver.resource["service.instance.id"] == "app1"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = {line["span_id"]: line for line in lines if line["event"] == "request"}
    spans = {span["id"]: span for span in receiver.spans if span["kind"] == 2}
    assert set(requests) <= set(spans)
    assert all(spans[each]["trace"] == requests[each]["trace_id"] for each in requests)
    assert not [each for each in SECRETS if each.encode() in receiver.raw]
    # Nothing of what the instance does by itself.
    assert all(span["parent"] for span in receiver.spans if span["kind"] == 3)


async def test_an_error_of_the_server_is_one_of_its_span(
    database: dict[str, str], receiver: Receiver, tmp_path: Path
) -> None:
    """A statement has the SQLSTATE of its error, and nothing of its text."""
    async with _served(
        database, tmp_path / "log", JOBS_ENABLED="false", **receiver.environment
    ) as (_, send):
        await query(database, "ALTER TABLE users RENAME TO true_users")
        await query(
            database,
            "CREATE VIEW users AS SELECT id, balance / (id - id) AS balance, version, created_at,"
            "held, floor, frozen, settings_version, hold_events, holds_due_at, changed_at"
            " FROM true_users",
        )
        await query(database, "GRANT SELECT ON users TO PUBLIC")
        assert (await send("GET", "/api/users/1")).status_code == 500
        span = await receiver.until("GET /api/users/{userId}")
        assert (span["error"], span["balance_app.problem"]) == (True, "internal-error")
        assert span["events"] == 0
        failed = next(each for each in receiver.spans if each.get("error.type"))
        assert (failed["error.type"], failed["error"], failed["events"]) == ("22012", True, 0)
        assert failed["parent"] == span["id"]


async def test_what_the_caller_does_not_sample_is_not_sent(
    database: dict[str, str], receiver: Receiver, tmp_path: Path
) -> None:
    """Nor are its statements; the answer names the trace all the same."""
    async with _served(
        database, tmp_path / "log", JOBS_ENABLED="false", **receiver.environment
    ) as (_, send):
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT}-00"}
        answer = await send("GET", "/api/users/1", headers=headers)
        assert answer.headers["traceparent"].startswith(f"00-{TRACE_ID}-")
        assert answer.headers["traceparent"].endswith("-00")
        await send("GET", "/api/users")
        await receiver.until("GET /api/users")
    assert TRACE_ID not in {span["trace"] for span in receiver.spans}


async def test_a_run_is_a_span_with_a_link_to_its_claim(
    database: dict[str, str], receiver: Receiver, tmp_path: Path
) -> None:
    """Its statements are below it, those of its thread too; its log lines name it."""
    (tmp_path / "traced_jobs.py").write_text(A_JOB)
    log = tmp_path / "log"
    root = str(Path(__file__).parents[1])
    async with _served(
        database,
        log,
        ("-m", "balance_app", "serve"),  # not forked: it has a path of its own
        JOBS_MODULES="traced_jobs",
        JOBS_ENTRY_POINTS="false",
        PYTHONPATH=f"{tmp_path}:{root}",
        **receiver.environment,
    ):
        well = await receiver.until("job well")
        badly = await receiver.until("job badly")
    assert (well["job.outcome"], well["error"]) == ("succeeded", False)
    assert (badly["job.outcome"], badly["error"], badly["events"]) == ("failed", True, 0)
    for run in (well, badly):
        claims = [each for each in receiver.spans if each["name"] == "jobs.statements.CLAIM"]
        (claim,) = [each for each in claims if each["job.name"] == run["job.name"]]
        assert run["links"] == [(claim["trace"], claim["id"])]
        assert (run["parent"], claim["parent"]) == ("", "")
        assert run["trace"] != claim["trace"]
    of_a_run = {"BEGIN", "SELECT", "jobs.transaction.COMMIT", "jobs.statements.FINISH"}
    assert of_a_run <= set(receiver.below(badly))
    assert of_a_run | {"jobs.statements.CHECKPOINT"} <= set(receiver.below(well))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    said = {
        (line["event"], line["trace_id"], line["span_id"])
        for line in lines
        if line.get("job") == "well"
    }
    events = ("run started", "from a run", "run ended")
    assert said == {(event, well["trace"], well["id"]) for event in events}
    assert b"secret-of-a-job" not in receiver.raw


async def _until_logged(log: Path, event: str) -> None:
    for _ in range(PATIENCE_SECONDS * 10):
        if event in log.read_text():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_receiver_that_is_away_disturbs_nothing(
    database: dict[str, str], tmp_path: Path, *, hangs: bool
) -> None:
    """Requests are answered, the stop is in order, and the log says why, once."""
    log = tmp_path / "log"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            listener.listen()
        async with _served(
            database,
            log,
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{listener.getsockname()[1]}",
            OTEL_EXPORTER_OTLP_TIMEOUT="60" if hangs else "1",
            OTEL_BSP_SCHEDULE_DELAY="10",
            OTEL_BSP_MAX_QUEUE_SIZE="20",
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="5",
        ) as (instance, send):
            answers = [await send("GET", "/api/users/1") for _ in range(100)]
            assert {answer.status_code for answer in answers} == {200}
            if not hangs:
                await _until_logged(log, "spans are not sent")
            # By SIGKILL it would be another one.
            assert await instance.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len([line for line in lines if line["event"] == "spans are not sent"]) == 1
    assert lines[-1]["event"] == "stopped"


async def test_control_without_a_limit_the_last_spans_hold_up_the_stop(
    database: dict[str, str], tmp_path: Path
) -> None:
    """It ends by SIGKILL where the receiver does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with _served(
            database,
            tmp_path / "log",
            ("tests.mutants", "last-spans"),
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{listener.getsockname()[1]}",
            OTEL_EXPORTER_OTLP_TIMEOUT="60",
        ) as (instance, send):
            await send("GET", "/api/users/1")
            assert await instance.stop() == -signal.SIGKILL


PROGRAM = """
import asyncio, os, sys
{before}
from balance_app.jobs import Registry
from balance_app.main import create_app
from balance_app.settings import load_settings
import balance_app.server, balance_app.maintenance
app = create_app(load_settings(), asyncio.Event(), Registry([]))
from balance_app.jobs.scope import Scope
ours = set(("balance_app.traced", "opentelemetry.sdk"))
print(type(app).__name__, sorted(sys.modules.keys() & ours),
      Scope.new_context.__name__)
"""
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


def _chosen(before: str = "", **env: str) -> tuple[str, str]:
    """Return the classes of a program with these variables, and what it logs."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**as_instance({}), "PATH": "", **env},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    *logged, chosen = ended.stdout.strip().split("\n")
    return chosen, "\n".join(logged) + ended.stderr


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_SERVICE_NAME": "shop"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "True"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_while_it_is_off_nothing_is_imported_and_all_is_as_before(env: dict[str, str]) -> None:
    """The classes are those that know of no traces."""
    assert _chosen(**env)[0] == "RequestMiddleware [] Context"
    assert telemetry.choose(None, env) == telemetry.Parts()  # type: ignore[arg-type] # not used
    assert telemetry.Parts()[:3] == (RequestMiddleware, Database, Scheduler)


def test_it_is_on_where_an_exporter_is_named() -> None:
    """Control: what the test before looks at does change."""
    chosen = "TracedRequests ['balance_app.traced', 'opentelemetry.sdk'] _context_of_run"
    assert _chosen(**ENDPOINT)[0] == chosen


def test_why_there_are_no_traces_is_logged() -> None:
    """An instance serves all the same."""
    missing = "sys.modules['opentelemetry.sdk'] = None"
    chosen, logged = _chosen(missing, **ENDPOINT)
    assert chosen.startswith("RequestMiddleware")
    assert "The SDK of OpenTelemetry is missing: install balance-app[otel]." in logged
    chosen, logged = _chosen(OTEL_TRACES_EXPORTER="zipkin")
    assert chosen.startswith("RequestMiddleware")
    assert "there is no exporter zipkin; there are ['console', 'otlp_proto_http']" in logged


@pytest.mark.parametrize(
    ("variables", "exporters"),
    [
        ({}, []),
        ({"EXPORTER_OTLP_ENDPOINT": " "}, []),
        ({"EXPORTER_OTLP_ENDPOINT": "http://x"}, ["otlp_proto_http"]),
        ({"EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, ["otlp_proto_http"]),
        ({"EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}, []),
        ({"TRACES_EXPORTER": "OTLP"}, ["otlp_proto_http"]),
        ({"TRACES_EXPORTER": "otlp, console,otlp"}, ["otlp_proto_http", "console"]),
        ({"TRACES_EXPORTER": "none", "EXPORTER_OTLP_ENDPOINT": "http://x"}, []),
        ({"TRACES_EXPORTER": "otlp", "EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        (
            {
                "TRACES_EXPORTER": "otlp",
                "EXPORTER_OTLP_PROTOCOL": "grpc",
                "EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            ["otlp_proto_http"],
        ),
        ({"TRACES_EXPORTER": "otlp", "SDK_DISABLED": "TRUE"}, []),
        ({"TRACES_EXPORTER": "otlp", "SDK_DISABLED": "false"}, ["otlp_proto_http"]),
    ],
)
def test_which_exporters_the_environment_names(
    variables: dict[str, str], exporters: list[str]
) -> None:
    """By the variables that OpenTelemetry specifies."""
    assert telemetry.wanted({f"OTEL_{name}": value for name, value in variables.items()}) == (
        exporters
    )


@pytest.mark.parametrize(("method", "template"), NEEDS)
def test_each_route_has_its_template(method: str, template: str) -> None:
    """Whatever stands in the place of its parameters."""
    shown = template.replace(":text", "").replace(":path", "")
    assert template_of(method, template.replace("{", "").replace("}", "").replace(":", "-")) == (
        shown
    )
