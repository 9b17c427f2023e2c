"""What the OpenAPI document says of requests, answers, and who may send them."""

from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel

from balance_app.access.errors import (
    CrossSiteRequest,
    InsufficientScope,
    MisdirectedRequest,
    TooManyRequests,
    Unauthorized,
)
from balance_app.access.routes import OPEN, Needs
from balance_app.errors import (
    PROBLEM_JSON,
    SAFE_METHODS,
    DatabaseUnavailable,
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
    needed = schema.get("required", ())
    example = {
        name: schema["properties"][name]["examples"][0]
        for name in (*needed, *(each for each in schema["properties"] if each not in needed))
        if "examples" in schema["properties"][name]
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


def describe_access(operation: dict[str, Any], method: str, needs: Needs) -> None:
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


def describe_read(operation: dict[str, Any]) -> None:
    """Replace the examples of problems by those of a request that only reads."""
    kinds = {kind.code: kind for kind in all_problems()}
    for answer in operation["responses"].values():
        examples = answer.get("content", {}).get(PROBLEM_JSON, {}).get("examples", {})
        for code, example in examples.items():
            example["value"] = kinds[code].example().body("GET")


def describe_headers(operation: dict[str, Any]) -> None:
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


def problem_schema() -> dict[str, Any]:
    """Return the schema of a problem."""
    return {
        "type": "object",
        "description": "A problem (RFC 9457); its kind may have more members than these.",
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
                    "properties": {
                        "pointer": {"type": "string", "description": "where it is"},
                        "code": {"type": "string", "description": "what it is"},
                        "detail": {"type": "string", "description": "what to send instead"},
                    },
                },
            },
        },
    }
