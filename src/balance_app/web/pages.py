"""What all pages share: problems as pages, messages, and what a page needs of its request."""

import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import override

from balance_app.access.gate import Gate
from balance_app.access.keys import ANYBODY, Principal, principal
from balance_app.access.routes import READ, Needs
from balance_app.errors import SAFE_METHODS, DatabaseUnavailable, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.http.negotiation import prefers_html
from balance_app.http.problem_pages import advice_on
from balance_app.http.services import services
from balance_app.settings import Settings
from balance_app.web.rendering import page
from balance_app.web.stream import PageStream

NO_USER: Final = "A user id is a whole number, 1 or more."

_NUMBER: Final = re.compile(r"[0-9]{1,16}", re.ASCII)


class Message(NamedTuple):
    """A sentence about the outcome of a request; its tone is `good` or `bad`.

    Attributes:
        ends: with what the message goes: `live`, when the page is up to date again.
        toast: the job whose row shows the outcome too, and what it then is: `audit-keys:paused`.
        undo: the address of the form that undoes it, and the fields of that form.
    """

    tone: str
    sentence: str
    ends: str | None = None
    toast: str | None = None
    undo: tuple[str, Mapping[str, str]] | None = None


class PageRoute(APIRoute):
    """A route that returns problems as pages too, to people."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_for_people(request: Request) -> Response:
            try:
                who = principal(request)
                if who is not ANYBODY:  # a form that is refused is answered with the whole page
                    who.require(*READ)
                return await handle(request)
            except Problem as problem:
                if request.method in SAFE_METHODS and not prefers_html(request):
                    raise  # a program reads it
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
        "advice": advice_on(problem, request.method),
        "code": problem.code,
        "reconnects": temporary,
    }
    if isinstance(problem, DatabaseUnavailable):
        view["icon"] = "red"
    return respond(request, "problem.html", view, status=problem.status, headers=problem.headers)


def sentence(problem: Problem, method: str) -> str:
    """Return what a problem means for a request of this method, as a sentence."""
    body = problem.body(method)
    if body.get("applied") == "unknown":
        return f"We don't know whether it was done. {problem.detail}"
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


def sender(request: Request) -> Principal:
    """Return who sends the request, also where nobody is asked."""
    known = cast("Principal", request.scope.get("principal", ANYBODY))
    if known is not ANYBODY:
        return known
    return services(request)[Gate].sender(dict(request.headers.raw))


def may(request: Request, needs: Needs) -> bool:
    """Say whether who sends the request may do what needs one of these scopes."""
    return not sender(request).scopes.isdisjoint(needs)


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
    """Return a page with what all pages have; without `read` it has nothing of the service."""
    stream, settings = stream_of(request), services(request)[Settings]
    fragments = stream.fragments
    reads = may(request, READ)
    is_anonymous = services(request)[Gate].is_anonymous
    common = {
        "message": None,
        "title": fragments.title if reads else "balance_app",
        "now": fragments.snapshot.now.timestamp() if reads and fragments.snapshot else None,
        "server": settings.server_id,
        "icon": stream.level if reads else "none",
        "nav_at": "/" + path_of(request, request.scope["path"]).split("/")[1],
        "sender": sender(request),
        "reads": reads,
        "may": lambda scope: may(request, (scope,)),
        # where it listens, if anybody who reaches it may do everything
        "open_at": settings.host if is_anonymous and not settings.is_loopback else None,
    }
    return page(request, template, {**common, **view}, status=status, headers=headers)
