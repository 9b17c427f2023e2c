"""What all pages share: problems as pages, messages, and what a page needs of its request."""

import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import override

from balance_app.access.keys import ANYBODY, principal
from balance_app.errors import DatabaseUnavailable, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.http.services import services
from balance_app.settings import Settings
from balance_app.web.rendering import page
from balance_app.web.stream import PageStream

NO_USER: Final = "A user's number is a whole number above 0."

_NUMBER: Final = re.compile(r"[0-9]{1,16}", re.ASCII)


class Message(NamedTuple):
    """A sentence about the outcome of a request; its tone is `good` or `bad`."""

    tone: str
    sentence: str


class PageRoute(APIRoute):
    """A route that returns problems as pages too."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_for_people(request: Request) -> Response:
            try:
                sender = principal(request)
                if sender is not ANYBODY:  # a form that is refused is answered with the whole page
                    sender.require("read")
                return await handle(request)
            except Problem as problem:
                return problem_page(request, problem)

        return handle_for_people


def problem_page(request: Request, problem: Problem) -> Response:
    """Return a problem as a page; at `/` a temporary one reconnects by itself."""
    temporary = path_of(request, request.scope["path"]) == "/" and isinstance(
        problem, DatabaseUnavailable | Overloaded
    )
    reconnects = " This page reconnects by itself." if temporary else ""
    view = {
        "heading": problem.title,
        "sentence": sentence(problem, request.method) + reconnects,
        "reconnects": temporary,
    }
    return respond(request, "problem.html", view, status=problem.status, headers=problem.headers)


def sentence(problem: Problem, method: str) -> str:
    """Return what a problem means for a request of this method, as a sentence."""
    body = problem.body(method)
    if body.get("applied") == "unknown":
        return f"It is not known whether it was done. {problem.detail}"
    return str(body["detail"])


def is_number(text: str) -> bool:
    """Say whether a text is a whole number from 1 to 2^53-1."""
    return _NUMBER.fullmatch(text) is not None and 1 <= int(text) <= MAX_INTEGER


def came_from(request: Request) -> str:
    """Return the path of the page that a request was sent from, by its Referer."""
    return path_of(request, urlsplit(request.headers.get("referer", "")).path)


def path_of(request: Request, path: str) -> str:
    """Return a path without ROOT_PATH."""
    return path.removeprefix(request.scope["root_path"])


def stream_of(request: Request) -> PageStream:
    """Return the page's event stream, with its fragments."""
    return services(request)[PageStream]


def respond(
    request: Request,
    template: str,
    view: Mapping[str, object],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a page with what all pages have."""
    fragments = stream_of(request).fragments
    common = {
        "message": None,
        "title": fragments.title,
        "now": fragments.snapshot.now.timestamp() if fragments.snapshot else None,
        "server": services(request)[Settings].server_id,
    }
    return page(request, template, {**common, **view}, status=status, headers=headers)
