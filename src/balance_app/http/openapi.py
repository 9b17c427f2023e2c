"""The OpenAPI description, and the page at `/docs`, which works without the internet."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import fastapi_offline
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from balance_app.access.errors import (
    CrossSiteRequest,
    InsufficientScope,
    MisdirectedRequest,
    TooManyRequests,
    Unauthorized,
)
from balance_app.access.routes import NEEDS, OPEN, Needs
from balance_app.errors import (
    PROBLEM_JSON,
    SAFE_METHODS,
    DatabaseUnavailable,
    InvalidRequest,
    NotFound,
    Overloaded,
    Problem,
    all_problems,
    explain,
)

TEXT_PATTERN: Final = r"^[^\u0000]*$"

_TEXT: Final = {"type": "string"}
HEADERS: Final[dict[str, dict[str, Any]]] = {
    "X-Server-Id": {
        "description": "which instance answered",
        "required": True,
        "schema": _TEXT,
        "example": "app1",
    },
    "X-Request-Id": {
        "description": "the id of the request in the logs: the caller's, if it sent a valid one",
        "schema": _TEXT,
        "example": "3f0c1a52b7d94e6f8a1b2c3d4e5f6071",
    },
    "traceparent": {
        "description": "the request's place in the caller's trace, if it sent one",
        "schema": _TEXT,
        "example": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    },
    "Retry-After": {
        "description": "after how many seconds to send the request again",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
        "example": 1,
    },
    "WWW-Authenticate": {
        "description": "how to send a key",
        "required": True,
        "schema": _TEXT,
        "example": "Bearer",
    },
    "Idempotent-Replayed": {
        "description": "`true`: this repeats the first answer to this key",
        "schema": {"type": "string", "enum": ["true"]},
        "example": "true",
    },
    "ETag": {
        "description": "the account's entity tag, another after each change; no past one has it",
        "schema": {"type": "string", "pattern": r'^"[1-9][0-9]*\.[1-9][0-9]*\.[0-9]+"$'},
        "example": '"2.1.0"',
    },
    "Location": {
        "description": "the path of what was created",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
        "example": "/api/users/2",
    },
    "Content-Disposition": {
        "description": "of an export: the name of its file",
        "schema": _TEXT,
        "example": 'attachment; filename="user-1-entries.csv"',
    },
    "Vary": {
        "description": "which header of the request chose the format of the answer",
        "schema": _TEXT,
        "example": "Accept",
    },
    "Connection": {
        "description": "`close`: the connection ends with this answer",
        "schema": _TEXT,
        "example": "close",
    },
}

DESCRIPTION = """
Users' balances, changed in real time and never below zero. The state of all instances and jobs is
shown at [/]({root}/).

* Every error is a [problem](https://www.rfc-editor.org/rfc/rfc9457): `code` says which,
  `applied` whether anything took effect (`"no"` or `"unknown"`; absent if the request only reads).
  With an `Idempotency-Key` it covers all tries with that key: `"no"` only if the outcome is known.
  The list is at [/problems]({root}/problems).
* **422**: the request is wrong whatever the state; **409**: it is well formed, but the state
  refuses it; **503**: the database is unavailable, or the service overloaded: wait `Retry-After`
  seconds.
* `Allow` of a 405 names the methods that an address has; there is `HEAD` wherever there is `GET`.
* Send `Authorization: Bearer` and an API key; each operation names the scopes of which the key
  needs one. Until the first key is made (`balance-app keys create`), no request needs one.
* Send an `Idempotency-Key` with a change that you may have to repeat: it takes effect once, and
  the answer is the same every time.

In a terminal:

    curl --json '{{"userId": 1, "amount": -2}}' http://localhost:3000{root}/api/balance
"""

_DOCS: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="{root}/docs/assets/swagger-ui.css">
<link rel="icon" href="{root}/docs/assets/favicon.png">
</head>
<body>
<div id="swagger-ui" data-url="{root}/openapi.json"></div>
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

SECURITY_SCHEME: Final = "key"
SECURITY_SCHEMES: Final = {
    SECURITY_SCHEME: {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "API key",
        "description": "a key of `balance-app keys create`, such as `ba_...`",
    }
}

# `*`, or entity tags; `conditional` lets these through, and obsolete characters of headers.
_TAG: Final = '(W/)?"[!#-~]*"'
TAGS_PATTERN: Final = rf"^(\*|{_TAG}([ \t]*,[ \t]*{_TAG})*)$"


def problems(
    *kinds: type[Problem], always: tuple[type[Problem], ...] = (DatabaseUnavailable, Overloaded)
) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses for these problems and `always`, those of the database."""
    by_status: dict[int, list[type[Problem]]] = {}
    for kind in (*kinds, *always):
        by_status.setdefault(kind.status, []).append(kind)
    return {
        status: {
            **headers(*(name for kind in group for name in kind.example().headers or ())),
            "description": "; or ".join(f"`{kind.code}`: {explain(kind)[0]}" for kind in group),
            "content": {
                PROBLEM_JSON: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {kind.code: {"value": kind.example().body()} for kind in group},
                }
            },
        }
        for status, group in sorted(by_status.items())
    }


def headers(*names: str) -> dict[str, Any]:
    """Return the OpenAPI description of these headers of an answer."""
    return {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}}


def json_request(
    model: type[BaseModel],
    *,
    key_pattern: str | None = None,
    required: bool = True,
    parameters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the OpenAPI description of a request whose body `body.read_json` reads.

    With `key_pattern` the request may have an `Idempotency-Key` of that pattern; `parameters` are
    further ones that it may have.
    """
    schema = model.model_json_schema()
    _describe_text(schema)
    example = {
        name: field["examples"][0]
        for name, field in schema["properties"].items()
        if "examples" in field
    }
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "description": (
            "Makes the request safe to repeat; any text not used before. It is taken "
            'literally, quotes included: `"q-1"` and `q-1` are two keys.'
        ),
        "schema": {"type": "string", "pattern": key_pattern},
    }
    return {
        "requestBody": {
            "required": required,
            "content": {"application/json": {"schema": schema, "example": example}},
        },
        "parameters": [*([] if key_pattern is None else [key]), *parameters],
    }


def tags_parameter(name: str, description: str, *, required: bool = False) -> dict[str, Any]:
    """Return the OpenAPI description of a header that `http.conditional` reads."""
    return {
        "name": name,
        "in": "header",
        "required": required,
        "description": description,
        "schema": {"type": "string", "pattern": TAGS_PATTERN},
        "example": "*",
    }


def _describe_text(schema: object) -> None:
    """Document that no text contains NUL, as `body.parse_json` checks."""
    inside = schema if isinstance(schema, list) else []
    if isinstance(schema, dict):
        inside = list(schema.values())
        if schema.get("type") == "string" and not {"enum", "const", "format"} & schema.keys():
            schema.setdefault("pattern", TEXT_PATTERN)
    for each in inside:
        _describe_text(each)


def add_docs(app: FastAPI) -> None:
    """Add `/docs`, its assets, and the explanations of the problems."""
    assets = Path(fastapi_offline.__file__).parent / "static"
    files = StaticFiles(directory=assets, packages=[("balance_app.http", "static")])
    # ast-grep-ignore: route-out-of-sight - it has files only
    app.mount("/docs/assets", files, name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope["root_path"]
        return HTMLResponse(_DOCS.format(title=app.title, root=root), headers=_DOCS_HEADERS)

    @app.get("/problems", tags=["about"])
    async def list_problems() -> list[dict[str, Any]]:
        """List every problem that this service answers with."""
        return [_about(kind) for kind in all_problems()]

    @app.get(
        "/problems/{code}", tags=["about"], responses=problems(NotFound, InvalidRequest, always=())
    )
    async def explain_problem(code: str) -> dict[str, Any]:
        """Explain one problem: what it means and what to do about it."""
        for kind in all_problems():
            if kind.code == code:
                return _about(kind)
        raise NotFound("There is no such problem.")

    generate = app.openapi
    needs = {(method, _CONVERTER.sub("", path)): each for (method, path), each in NEEDS.items()}

    @cache
    def openapi() -> dict[str, Any]:
        described = generate()
        described["components"]["schemas"]["Problem"] = _problem_schema()
        described["components"]["headers"] = HEADERS
        described["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                _describe_access(operation, method.upper(), needs[method.upper(), path])
                _describe_headers(operation)
            for method in operations.keys() & {each.lower() for each in SAFE_METHODS}:
                _describe_read(operations[method])
        return described

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend it


_CONVERTER: Final = re.compile(r":\w+(?=\})")


def _describe_access(operation: dict[str, Any], method: str, needs: Needs) -> None:
    """Add the scopes that an operation needs, and what the middleware refuses it with."""
    if needs == OPEN:
        operation["security"] = []
        return
    operation["security"] = [{SECURITY_SCHEME: [scope]} for scope in needs]
    scopes = " or ".join(f"`{scope}`" for scope in needs)
    operation["description"] += f"\n\nThe key needs the scope {scopes}."
    kinds = [Unauthorized, InsufficientScope, MisdirectedRequest, TooManyRequests]
    if method not in SAFE_METHODS:
        kinds.append(CrossSiteRequest)
    answers = operation["responses"]
    for status, described in problems(*kinds, always=(DatabaseUnavailable,)).items():
        present = answers.setdefault(str(status), described)
        examples = present["content"][PROBLEM_JSON]["examples"]
        if not described["content"][PROBLEM_JSON]["examples"].keys() <= examples.keys():
            examples |= described["content"][PROBLEM_JSON]["examples"]
            present["description"] += f"; or {described['description']}"
    operation["responses"] = dict(sorted(answers.items()))


def _describe_read(operation: dict[str, Any]) -> None:
    """Replace the examples of problems by those of a request that only reads."""
    kinds = {kind.code: kind for kind in all_problems()}
    for answer in operation["responses"].values():
        examples = answer.get("content", {}).get(PROBLEM_JSON, {}).get("examples", {})
        for code, example in examples.items():
            example["value"] = kinds[code].example().body("GET")


def _describe_headers(operation: dict[str, Any]) -> None:
    """Add the headers that every answer with its status has."""
    is_keyed = any(each["name"] == "Idempotency-Key" for each in operation.get("parameters", ()))
    for status, answer in operation["responses"].items():
        names = ["X-Server-Id", "X-Request-Id", "traceparent"]
        if status == "503":  # of all kinds, as of those that are no problems
            names.append("Retry-After")
        if status[0] in "45":
            names.append("Connection")
        if is_keyed and status in {"200", "201", "409"}:
            names.append("Idempotent-Replayed")
        answer.setdefault("headers", {}).update(headers(*names)["headers"])


def _problem_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A problem (RFC 9457), with members of its kind beside these.",
        "required": ["type", "title", "status", "detail", "code"],
        "properties": {
            "type": {"type": "string", "description": "where this kind of problem is explained"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string", "description": "what happened here, for people"},
            "code": {"type": "string", "enum": [kind.code for kind in all_problems()]},
            "applied": {
                "type": "string",
                "enum": ["no", "unknown"],
                "description": "whether the request, or another try under its key, may have "
                "changed something; absent when it only reads",
            },
            "errors": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["pointer", "code"],
                    "properties": {"pointer": {"type": "string"}, "code": {"type": "string"}},
                },
            },
        },
    }


def _about(kind: type[Problem]) -> dict[str, Any]:
    what, advice = explain(kind)
    return {
        "type": kind.address(),
        "code": kind.code,
        "status": kind.status,
        "title": kind.title,
        "means": what,
        "advice": advice,
    }
