"""The OpenAPI document, the page at `/docs`, and the explanations at `/problems`.

The page works without the internet: Swagger UI is a file of a package. What it shows beside that
(samples, a dark theme, the way home) is in `static/docs.js` and `static/docs.css`.
"""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import fastapi_offline
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from balance_app.access.gate import Gate
from balance_app.access.routes import NEEDS
from balance_app.errors import (
    SAFE_METHODS,
    InvalidRequest,
    NotFound,
    Problem,
    all_problems,
    explain,
)
from balance_app.http import problem_pages
from balance_app.http.negotiation import prefers_html
from balance_app.http.openapi import (
    HEADERS,
    SECURITY_SCHEMES,
    describe_access,
    describe_headers,
    describe_read,
    problem_schema,
    problems,
)
from balance_app.http.samples import ADDRESS, samples
from balance_app.http.services import services

DESCRIPTION: Final = """
Users' balances, changed in real time and never below zero; and the jobs that run beside them. The
[overview]({root}/) shows all instances, jobs and balances, live.

* Every error is a [problem](https://www.rfc-editor.org/rfc/rfc9457): `code` says which,
  `applied` whether anything took effect (`"no"` or `"unknown"`; absent if the request only reads).
  With an `Idempotency-Key` it covers all tries with that key: `"no"` only if the outcome is known.
  [All problems]({root}/problems), each with what to do. In a browser a problem is a page.
* **422**: the request is wrong whatever the state; **409**: it is well formed, but the state
  refuses it; **503**: the database is unavailable, or the service overloaded: wait `Retry-After`
  seconds.
* `Allow` of a 405 names the methods that an address has; there is `HEAD` wherever there is `GET`.
* Send `Authorization: Bearer` and an API key; each operation names the scopes of which the key
  needs one. Until the first key is created (`balance-app keys create`), no request needs one.
* Send an `Idempotency-Key` with a change that you may have to repeat: it takes effect once, and
  the answer is the same every time. Use a new key for each new change.

In a terminal:

    curl --json '{{"userId": 1, "amount": -2}}' {address}{root}/api/balance
"""

TAGS: Final = [
    {"name": "balances", "description": "Change a balance, transfer, reverse: now, and durably."},
    {"name": "holds", "description": "Reserve an amount, then withdraw it or let it go."},
    {"name": "ledger", "description": "Every change of an account; exports; past balances."},
    {"name": "users", "description": "Accounts: create, find, read, freeze, set a floor."},
    {"name": "jobs", "description": "Background jobs: what runs where, history, logs, controls."},
    {"name": "actions", "description": "Who did what to jobs, accounts, settings and keys."},
    {"name": "health", "description": "For load balancers, containers and Prometheus."},
    {"name": "about", "description": "What each problem means, and what to do."},
]

_DOCS: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>API · {title}</title>
<link rel="stylesheet" href="{root}/docs/assets/swagger-ui.css">
<link rel="stylesheet" href="{root}/docs/assets/docs.css">
<link rel="icon" href="{root}/static/icon-none.svg" type="image/svg+xml">
</head>
<body>
<header class="home"><a href="{root}/">{title}</a>
<nav aria-label="More"><a href="{root}/">Overview</a> <a href="{root}/problems">All problems</a> \
<a href="{root}/openapi.json">OpenAPI document</a></nav></header>
<main id="swagger-ui" data-root="{root}"><noscript><p>This page needs JavaScript. The \
<a href="{root}/openapi.json">OpenAPI document</a> and the <a href="{root}/problems">list of \
problems</a> do not.</p></noscript></main>
<script src="{root}/docs/assets/swagger-ui-bundle.js"></script>
<script src="{root}/docs/assets/docs.js"></script>
</body>
</html>
"""

# Swagger UI writes styles into its elements, and has its icons in its style sheet.
_DOCS_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "Referrer-Policy": "same-origin",
}
_AS_PAGE: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}}
}
_CONVERTER: Final = re.compile(r":\w+(?=\})")
_HOST: Final = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")


def operation_id(route: APIRoute) -> str:
    """Return the id of an operation: the name of its function, as `change_balance`."""
    return route.name


def add_docs(app: FastAPI) -> None:
    """Add `/docs` with its assets, `/openapi.json`, and `/problems`."""
    assets = Path(fastapi_offline.__file__).parent / "static"
    files = StaticFiles(directory=assets, packages=[("balance_app.http", "static")])
    # ast-grep-ignore: route-out-of-sight - it has files only
    app.mount("/docs/assets", files, name="docs-assets")
    _add_problems(app)
    document = _document_of(app)
    app.openapi = partial(document, keyed=False)  # type: ignore[method-assign] # FastAPI's own way

    @cache
    def as_json(*, keyed: bool) -> bytes:
        return to_json(document(keyed=keyed))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope["root_path"]
        return HTMLResponse(_DOCS.format(title=app.title, root=root), headers=_DOCS_HEADERS)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        """Return the document, with the address that it is read from in its examples."""
        text = as_json(keyed=not services(request)[Gate].is_anonymous)
        address = _address(request).encode()
        return Response(
            text.replace(ADDRESS.encode(), address),
            media_type="application/json",
            headers={"Cache-Control": "no-cache"},
        )


def _address(request: Request) -> str:
    """Return the address by which a client knows this service, as far as it says so."""
    host = request.headers.get("host", "")
    known = _HOST.fullmatch(host) is not None
    return f"{request.scope['scheme']}://{host}" if known else ADDRESS


def _document_of(app: FastAPI) -> Callable[..., dict[str, Any]]:
    generate = app.openapi
    needs = {(method, _CONVERTER.sub("", path)): each for (method, path), each in NEEDS.items()}

    @cache
    def document(*, keyed: bool) -> dict[str, Any]:
        """Return the document; its samples send an API key if keys are needed."""
        described = deepcopy(generate())  # parts of it belong to the routes
        root = Problem.root_path
        if root:
            described["servers"] = [{"url": root}]
        described["components"]["schemas"]["Problem"] = problem_schema()
        described["components"]["headers"] = HEADERS
        described["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                describe_access(operation, method.upper(), needs[method.upper(), path])
                describe_headers(operation)
                operation["x-codeSamples"] = samples(path, method, operation, root=root, key=keyed)
            for method in operations.keys() & {each.lower() for each in SAFE_METHODS}:
                describe_read(operations[method])
        return described

    return document


def _add_problems(app: FastAPI) -> None:
    @app.get("/problems", tags=["about"], response_model=list[dict[str, Any]], responses=_AS_PAGE)
    async def list_problems(request: Request, response: Response) -> Any:  # noqa: ANN401 - both
        """List every problem that this service answers with; in a browser as a page."""
        if prefers_html(request):
            return problem_pages.index(all_problems())
        response.headers["Vary"] = "Accept"
        return [_about(kind) for kind in all_problems()]

    @app.get(
        "/problems/{code}",
        tags=["about"],
        response_model=dict[str, Any],
        responses={**_AS_PAGE, **problems(NotFound, InvalidRequest, always=())},
    )
    async def explain_problem(request: Request, response: Response, code: str) -> Any:  # noqa: ANN401
        """Explain one problem: what it means, and what to do; in a browser as a page."""
        kind = _kind_of(code, all_problems())
        if prefers_html(request):
            return problem_pages.explanation(kind)
        response.headers["Vary"] = "Accept"
        return _about(kind)


def _kind_of(code: str, kinds: Iterable[type[Problem]]) -> type[Problem]:
    for kind in kinds:
        if kind.code == code:
            return kind
    raise NotFound("There is no such problem.")


def _about(kind: type[Problem]) -> dict[str, Any]:
    what, advice = explain(kind)
    return {
        "type": kind.address(),
        "code": kind.code,
        "status": kind.status,
        "title": kind.title,
        "means": what,
        "advice": advice,
        "example": kind.example().body(),
    }
