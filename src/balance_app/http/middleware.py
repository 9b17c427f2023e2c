"""The outermost layer of each request: its ids, its principal, its log line, its problem.

Plain ASGI, as Starlette's `BaseHTTPMiddleware` costs more than a change of a balance. It calls the
function of the hot route itself, without the router's search for it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from random import randrange
from time import perf_counter
from typing import Final
from uuid import uuid4

import structlog
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from balance_app.access.gate import Gate
from balance_app.access.keys import Principal
from balance_app.errors import InternalError, MethodNotAllowed, NotFound, Problem
from balance_app.http.answer_headers import NO_STORE, is_event_stream
from balance_app.http.problem_pages import answer, json_answer, wants_page
from balance_app.logs import REQUEST_ID, TRACE, Trace
from balance_app.metrics import Metrics

log = structlog.get_logger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
# Returns a refusal as a page for people; None: its address is for programs.
RefusalPage = Callable[[Request, Problem], Response | None]

_BOOT: Final = uuid4().hex[:12]  # makes the request ids of this process unique
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,100}")
# version, trace, the caller's span, flags; later versions may say more
_TRACEPARENT: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?"
)
FIRST_PROBLEM: Final = 400  # the least status of one
_KNOWN_FLAGS: Final = 0b11  # sampled, and a trace id that is random


class _RevokedError(Exception):
    """The key of a streamed answer is not valid any more."""


class RequestMiddleware:
    """The ASGI application that the server calls; it wraps the FastAPI application."""

    def __init__(  # noqa: PLR0913 - from the composition root
        self,
        app: FastAPI,
        *,
        gate: Gate,
        direct: Mapping[tuple[str, str], Handler],
        refusal_page: RefusalPage = lambda _request, _problem: None,
        log_requests: bool,
        root_path: str = "",
        metrics: Metrics | None = None,
    ) -> None:
        self.app = app
        self.gate = gate
        self._answers = (metrics or Metrics()).requests
        self._direct = {route: _as_app(handler, app) for route, handler in direct.items()}
        self._refusal_page = refusal_page
        self._log_requests = log_requests
        self._root_path = root_path
        self._ids = (f"{_BOOT}-{number:x}".encode() for number in count(1))

    async def __call__(  # noqa: C901, PLR0915 - functions of their own would cost each request
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = _headers_of(scope)
        request_id = _callers_id(received) or next(self._ids)
        headers = [(b"x-request-id", request_id)]
        REQUEST_ID.set(request_id.decode())
        traceparent = received.get(b"traceparent")
        if traceparent is None:
            TRACE.set(None)
        else:
            headers.extend(_join(traceparent, self.new_span_id()))
        status = 0
        sent: list[tuple[bytes, bytes]] = []
        started = perf_counter()
        method = scope["method"]
        if method == "HEAD" or self._root_path:
            scope, send = self._adapt(scope, send)
        principal: Principal | None = None
        path = scope["path"].removeprefix(self._root_path)
        app: ASGIApp = self.app

        async def send_with_ids(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = message["headers"]
                # An answer of a direct route has none yet.
                if app is not self.app or (
                    (status >= FIRST_PROBLEM or path.startswith("/api/"))
                    and not any(name == b"cache-control" for name, _ in sent)
                ):
                    sent.append(NO_STORE)
                sent.extend(headers)
            elif message.get("more_body") and principal and not self.gate.is_valid(principal):
                # The end of an export would say that it is complete.
                if is_event_stream(sent):
                    await send({"type": "http.response.body", "body": b""})
                raise _RevokedError
            await send(message)

        try:
            principal = self.gate.admit_known(method, path, received)
            if principal is None:
                principal = await self.gate.admit(method, path, received, scope["client"])
            scope["principal"] = principal
            app = self._direct.get((scope["method"], path), self.app)
            await app(scope, receive, send_with_ids)
        except _RevokedError:
            log.info("stream ended: its key is not valid any more", path=scope["path"])
        except Problem as problem:
            problem.under(_idempotency_key(received))
            await self._refusal(scope, received, problem)(scope, receive, send_with_ids)
        except Exception:
            log.exception("internal error", method=method, path=scope["path"])
            if not status:
                mistake = answer(Request(scope), InternalError())
                await mistake(scope, receive, send_with_ids)
        finally:
            self._answers.inc(status)
            if self._log_requests:
                log.info(
                    "request",
                    method=method,
                    path=scope["path"],
                    status=status,
                    client=_address_of(scope),
                    milliseconds=round((perf_counter() - started) * 1000, 1),
                )

    def new_span_id(self) -> int:
        """Return the id of this request's span, for a caller who traces it."""
        return randrange(1, 2**64)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes], problem: Problem) -> Response:
        """Return the answer that carries a problem, for a browser as a page."""
        if b"text/" not in headers.get(b"accept", b""):
            return json_answer(scope["method"], problem)
        scope["app"] = self.app
        scope.setdefault("principal", self.gate.sender(headers))
        request = Request(scope)
        if wants_page(request) and not isinstance(problem, NotFound | MethodNotAllowed):
            page = self._refusal_page(request, problem)
            if page is not None:
                return page
        return answer(request, problem)

    def count_refusal(self, status: int, scope: Scope | None) -> bytes:
        """Count an answer of the protocol's own; return the id of its request.

        `scope` is None if the request can't be read.
        """
        self._answers.inc(status)
        callers_id = None if scope is None else _callers_id(_headers_of(scope))
        return callers_id or next(self._ids)

    def _adapt(self, scope: Scope, send: Send) -> tuple[Scope, Send]:
        """Make HEAD a GET without a body, and add a prefix (`root_path`) that a proxy has stripped.

        ASGI's paths begin with the prefix.
        """
        scope = {**scope, "root_path": self._root_path}
        if scope["method"] == "HEAD":
            scope["method"], send = "GET", _head_of(send)
        root = self._root_path
        if root:
            send = _with_locations_under(root.encode(), send)
            if scope["path"] != root and not scope["path"].startswith(f"{root}/"):
                scope["path"] = root + scope["path"]
        return scope, send


def _as_app(handler: Handler, behind: FastAPI) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = behind
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)

    return answer


def _with_locations_under(root: bytes, send: Send) -> Send:
    async def send_placed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                (name, root + value if name == b"location" and value[:1] == b"/" else value)
                for name, value in message["headers"]
            ]
        await send(message)

    return send_placed


def _head_of(send: Send) -> Send:
    """Send only the head of an answer, and end it there: a stream would have no end."""
    is_done = False

    async def send_head(message: Message) -> None:
        nonlocal is_done
        if is_done:
            return
        await send(message)
        if message["type"] == "http.response.start":
            is_done = True
            await send({"type": "http.response.body", "body": b""})

    return send_head


def _headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Return the request's headers by name; the values of one that came twice are joined."""
    headers = dict(scope["headers"])
    if len(headers) < len(scope["headers"]):
        values: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name, []).append(value)
        for name, each in values.items():
            headers[name] = (b"; " if name == b"cookie" else b", ").join(each)
    return headers


def _address_of(scope: Scope) -> str | None:
    """Return the client's address, as far as proxies that are trusted have said it."""
    return scope["client"][0] if scope["client"] else None


def _idempotency_key(headers: Mapping[bytes, bytes]) -> str | None:
    key = headers.get(b"idempotency-key")
    return None if key is None else key.decode("latin-1")


def _callers_id(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the caller's `X-Request-Id`, if it is valid."""
    request_id = headers.get(b"x-request-id")
    if request_id is None or not _REQUEST_ID.fullmatch(request_id):
        return None
    return bytes(request_id)


def _join(traceparent: bytes, span_id: int) -> list[tuple[bytes, bytes]]:
    """Make this request a span of the caller's trace, if the header names one.

    Returns:
        The `traceparent` header for the answer, none if the caller's names no trace.
    """
    named = _TRACEPARENT.fullmatch(traceparent)
    if named is None or (named[1] == b"00" and named[4]):
        TRACE.set(None)
        return []
    trace = Trace(named[2].decode(), f"{span_id:016x}")
    TRACE.set(trace)
    flags = int(named[3], 16) & _KNOWN_FLAGS
    return [(b"traceparent", f"00-{trace.trace_id}-{trace.span_id}-{flags:02x}".encode())]
