"""The outermost layer of each request: its id, its log line, its problem when it fails.

Plain ASGI, because a layer of the usual kind costs more here than the change itself. The one route
that ten thousand clients call at one moment is answered from here too: the same function that the
router has, without the search for it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from time import perf_counter
from typing import Final
from uuid import uuid4

import structlog
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from balance_app.errors import InternalError, Problem
from balance_app.logs import REQUEST_ID

log = structlog.get_logger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

_BOOT: Final = uuid4().hex[:12]  # makes the numbers of this process unlike any other's
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,100}")


class Front:
    """The ASGI application that a server calls; all else of the application is behind it."""

    def __init__(
        self, app: FastAPI, *, direct: Mapping[tuple[str, str], Handler], log_requests: bool
    ) -> None:
        self.app = app
        self._direct = direct
        self._log_requests = log_requests
        self._ids = (f"{_BOOT}-{number:x}".encode() for number in count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _callers_id(scope) or next(self._ids)
        header = (b"x-request-id", request_id)
        REQUEST_ID.set(request_id.decode())
        status = 0
        started = perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append(header)
            await send(message)

        try:
            handler = self._direct.get((scope["method"], scope["path"]))
            if handler is None:
                await self.app(scope, receive, send_with_id)
            else:
                scope["app"] = self.app
                response = await handler(Request(scope, receive))
                await response(scope, receive, send_with_id)
        except Problem as problem:
            await problem.response()(scope, receive, send_with_id)
        except Exception:
            log.exception("internal error", method=scope["method"], path=scope["path"])
            if not status:
                mistake = InternalError.after(scope["method"])
                await mistake.response()(scope, receive, send_with_id)
        finally:
            if self._log_requests:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round((perf_counter() - started) * 1000, 1),
                )


def _callers_id(scope: Scope) -> bytes | None:
    """Return the caller's `X-Request-Id` when it is sane."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return None
