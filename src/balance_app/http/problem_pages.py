"""Problems as pages: for people who meet one in a browser, wherever it is.

A page needs nothing but itself (its style is in it, and the only one that its Content-Security-
Policy allows), so that it is complete while the database is unavailable, or without a key.
Programs get the same problem as JSON: whoever does not prefer HTML in `Accept`.
"""

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.errors import TooManyRequests, Unauthorized
from balance_app.errors import (
    SAFE_METHODS,
    DatabaseUnavailable,
    InternalError,
    Overloaded,
    Problem,
    RequestTimeout,
    explain,
)
from balance_app.http.negotiation import prefers_html
from balance_app.logs import REQUEST_ID

_HERE: Final = Path(__file__).parent
_STYLE: Final = (_HERE / "static" / "problem.css").read_text()
_DIGEST: Final = b64encode(sha256(_STYLE.encode()).digest()).decode()
_HEADERS: Final = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_DIGEST}'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Vary": "Accept",
}
# The same request may succeed later.
_TEMPORARY: Final = (
    DatabaseUnavailable,
    Overloaded,
    RequestTimeout,
    TooManyRequests,
    InternalError,
)
_NO_CHANGE: Final = re.compile(r"^Nothing was changed( by it)?\. ?")


class Link(NamedTuple):
    """Where one may go from a page."""

    address: str
    text: str


def answer(request: Request, problem: Problem) -> Response:
    """Return the answer that carries a problem: a page for people, JSON for programs."""
    if wants_page(request):
        return _problem_page(request, problem)
    return json_answer(request.method, problem)


def json_answer(method: str, problem: Problem) -> Response:
    """Return the answer that carries a problem to a program."""
    response = problem.response(method)
    if method in SAFE_METHODS:
        response.headers["Vary"] = "Accept"
    return response


def wants_page(request: Request) -> bool:
    """Return whether a person gets the answer: the client prefers HTML to JSON.

    What changes something by JSON is sent by a program, whatever it accepts.
    """
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    if request.method not in SAFE_METHODS and path.startswith("/api/"):
        return False
    return prefers_html(request)


def advice_on(problem: Problem, method: str) -> str:
    """Return what to do about a problem, in Markdown's inline code."""
    advice = explain(type(problem))[1]
    return _NO_CHANGE.sub("", advice) if method in SAFE_METHODS else advice


def explanation(kind: type[Problem]) -> Response:
    """Return the page that explains a kind of problem."""
    means, advice = explain(kind)
    return _page(
        status=kind.status,
        code=kind.code,
        heading=kind.title,
        detail=means,
        faults=[],
        advice=advice,
        links=[Link(f"{Problem.root_path}/docs", "API"), *_all()],
        example=kind.example().body(),
        example_title="An example, as a program gets it",
    )


def index(kinds: Iterable[type[Problem]]) -> Response:
    """Return the page that lists all kinds of problems."""
    listed = [(each.status, each.code, each.address(), explain(each)[0]) for each in kinds]
    return _page(heading="Problems", problems=listed)


def _problem_page(request: Request, problem: Problem) -> Response:
    body = problem.body(request.method)
    return _page(
        answered=problem.status,
        headers=problem.headers,
        status=problem.status,
        code=problem.code,
        heading=problem.title,
        detail=body["detail"],
        faults=[each["detail"] for each in body.get("errors", ()) if "detail" in each],
        advice=advice_on(problem, request.method),
        links=[*_ways_out(request, problem), Link(problem.address(), "What this means")],
        example=body,
        example_title="The same, as a program gets it",
        request_id=REQUEST_ID.get(None),
    )


def _ways_out(request: Request, problem: Problem) -> list[Link]:
    """Return what to do at once: log in, or try again."""
    if request.method not in SAFE_METHODS:
        return []
    if isinstance(problem, Unauthorized):
        there = quote(request.scope["path"].removeprefix(Problem.root_path))
        if request.scope["query_string"]:
            there += f"?{request.scope['query_string'].decode('latin-1')}"
        return [Link(f"{Problem.root_path}/login?{urlencode({'next': there})}", "Log in")]
    return [Link("", "Try again")] if isinstance(problem, _TEMPORARY) else []


def _all() -> list[Link]:
    return [Link(f"{Problem.root_path}/problems", "All problems")]


def _page(
    *,
    heading: str,
    answered: int = 200,
    headers: Mapping[str, str] | None = None,
    example: dict[str, Any] | None = None,
    **view: object,
) -> Response:
    common = {
        "heading": heading,
        "root": Problem.root_path,
        "style": _STYLE,
        "example": json.dumps(from_json(to_json(example)), indent=2, ensure_ascii=False),
        "problems": None,
        "request_id": None,
    }
    html = _TEMPLATE.render({**common, **view})
    return Response(
        html, status_code=answered, media_type="text/html", headers={**(headers or {}), **_HEADERS}
    )


def marked(text: str) -> Markup:
    """Return a text as HTML; what is in backticks in it is code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one without its other half
        return escape(text)
    marked = (Markup("<code>{}</code>").format(each) for each in parts[1::2])
    return escape("").join(
        [escape(parts[0]), *(code + plain for code, plain in zip(marked, parts[2::2], strict=True))]
    )


def _template() -> Template:
    """Return the template of all pages here; it escapes every value that it gets."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["marked"] = marked
    return environment.from_string((_HERE / "templates" / "problem.html").read_text())


# Read at once: no file may be opened any more when clients hold all the descriptors there are.
_TEMPLATE: Final = _template()
