"""Logging in with a key, and out. A session is a key of its own, in a cookie.

The cookie is sent with requests from this site alone (SameSite), and no script can read it. Under
TLS its name makes browsers take it from this host alone (`__Host-`) and send it over TLS alone.
"""

import re
from typing import Final
from urllib.parse import quote, urlencode

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.errors import InsufficientScope, Unauthorized
from balance_app.access.gate import Gate
from balance_app.access.keys import Principal
from balance_app.access.repository import SESSION_TIME, KeyRepository
from balance_app.access.routes import READ
from balance_app.errors import SAFE_METHODS, Problem
from balance_app.http.services import services
from balance_app.web.forms import go_to, read_form
from balance_app.web.pages import (
    Message,
    PageRoute,
    came_from,
    may,
    path_of,
    problem_page,
    respond,
    sender,
    sentence,
)

COOKIE: Final = "ba"
COOKIE_UNDER_TLS: Final = "__Host-ba"

# A path of this service, and nothing that a browser takes for another host: `//host`, `/\host`, or
# these with characters that it leaves out.
_OWN: Final = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}", re.ASCII)
# Addresses of programs, which get their refusals as problems.
_OF_PROGRAMS: Final = re.compile(r"/(api/.*|metrics|openapi\.json|livez|readyz|health)", re.DOTALL)

_LOGGED_OUT: Final = Message("good", "You are logged out.")
_ENDED: Final = Message("bad", "Your session has ended. Log in again.")
_NOT_SENT: Final = Message("bad", "Not done: you are logged out. Log in and send it again.")

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/login")
async def show_login(request: Request) -> Response:
    """Ask for a key, or go on if the session is valid."""
    query = request.query_params
    there = own_path(query.get("next", ""))
    if "next" in query and may(request, READ):
        return go_to(there)
    message = None
    if "out" in query:
        message = _LOGGED_OUT
    elif _sessions(request) and not sender(request).scopes:
        message = _ENDED
    again = None
    if request.headers.get("sec-fetch-site") == "cross-site":
        again = urlencode({"next": there})
    return _login_page(request, there, message, again=again)


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Begin a session with a key, and go where one wanted to go."""
    form = await read_form(request)
    there = own_path(form.get("next", ""))
    keys = services(request)[KeyRepository]
    try:
        key = await services(request)[Gate].identify(
            form.get("key", "").strip().encode(), request.scope["client"]
        )
        _check(key)
        former = sender(request).session_id
        session, _ = await keys.log_in(key)
        if former is not None:
            await keys.log_out(former)
    except Problem as problem:
        message = Message("bad", _refusal(problem))
        return _login_page(request, there, message, problem=problem)
    response = go_to(there)
    name = COOKIE_UNDER_TLS if _is_tls(request) else COOKIE
    _forget(response, {COOKIE, COOKIE_UNDER_TLS} - {name})
    response.set_cookie(
        name,
        session.text,
        max_age=int(SESSION_TIME.total_seconds()),
        secure=name == COOKIE_UNDER_TLS,
        httponly=True,
        samesite="strict",
    )
    return response


@router.post("/logout")
async def log_out(request: Request) -> Response:
    """End the session, and forget its cookie, also when the session can't be ended now."""
    gate, keys = services(request)[Gate], services(request)[KeyRepository]
    response = go_to("/login?out=1")
    for token in _sessions(request):
        try:
            session_id = (await gate.identify(token.encode(), request.scope["client"])).session_id
            if session_id is not None:
                await keys.log_out(session_id)
        except Unauthorized:
            continue  # it has ended
        except Problem as problem:
            message = Message(
                "bad",
                f"{problem.detail} This browser is logged out, but the session could not be ended "
                "on the server: it expires within 12 hours.",
            )
            response = _login_page(request, "/", message, problem=problem)
    _forget(response, {COOKIE, COOKIE_UNDER_TLS})
    return response


def refusal_page(request: Request, problem: Problem) -> Response | None:
    """Return what a person sees of a request that the gate refuses; None: it is a program's."""
    path = path_of(request, request.scope["path"])
    if _OF_PROGRAMS.fullmatch(path):
        return None
    if not isinstance(problem, Unauthorized):
        return problem_page(request, problem)
    if request.method in SAFE_METHODS:
        query = request.scope["query_string"].decode("latin-1")
        there = quote(path) + (f"?{query}" if query else "")
        return go_to(f"/login?{urlencode({'next': there})}")
    return _login_page(request, own_path(quote(came_from(request))), _NOT_SENT, problem=problem)


def own_path(text: str) -> str:
    """Return where to go after the login; `/` if it is no page of this service."""
    if not _OWN.fullmatch(text) or re.match(r"/(login|logout|live)(?![^?#])", text):
        return "/"
    return text


def _login_page(
    request: Request,
    there: str,
    message: Message | None,
    *,
    problem: Problem | None = None,
    again: str | None = None,
) -> Response:
    view = {
        "message": message,
        "next": there,
        "again": again,
        "needed": not services(request)[Gate].is_anonymous,
    }
    if problem is None:
        return respond(request, "login.html", view)
    return respond(request, "login.html", view, status=problem.status, headers=problem.headers)


def _check(key: Principal) -> None:
    """Check that this key may begin a session.

    Raises:
        Unauthorized: it is a session itself.
        InsufficientScope: it may not read.
    """
    if key.session_id is not None:
        raise Unauthorized("The key is wrong, expired or revoked.")
    key.require(*READ)


def _refusal(problem: Problem) -> str:
    if isinstance(problem, InsufficientScope):
        return 'Not logged in: this key lacks the scope "read", which the page needs.'
    return f"Not logged in. {sentence(problem, 'GET')}"


def _is_tls(request: Request) -> bool:
    """Say whether the browser came over TLS, which a proxy may have ended.

    Its own header says so, for the page that has the form; and so does a trusted proxy.
    """
    return "https" in {request.scope["scheme"], request.headers.get("origin", "").partition(":")[0]}


def _sessions(request: Request) -> list[str]:
    return [request.cookies[name] for name in (COOKIE_UNDER_TLS, COOKIE) if name in request.cookies]


def _forget(response: Response, names: set[str]) -> None:
    """Make the browser forget sessions; an old one of the other name would be sent, too."""
    for name in sorted(names):
        secure = name == COOKIE_UNDER_TLS
        response.delete_cookie(name, secure=secure, httponly=True, samesite="strict")
