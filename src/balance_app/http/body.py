"""Strict JSON bodies: wrong input is refused, and never echoed."""

import json
import re
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails
from starlette.requests import Request

from balance_app.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedRequest,
    RequestTimeout,
    UnsupportedMediaType,
)
from balance_app.faults import Fault, code_of, fault, repeated, twice, unknown

# what `read_json` raises, for the documentation of a route
BODY_PROBLEMS: Final = (
    MalformedRequest,
    RequestTimeout,
    BodyTooLarge,
    UnsupportedMediaType,
    InvalidRequest,
)
MAX_BODY_BYTES: Final = 16 * 1024
MAX_BRACKETS: Final = 64
MAX_INTEGER: Final = 2**53 - 1  # the largest that every JSON reader keeps exact (RFC 8259, 6)

# NUL, and surrogates without their other half
_INVALID_TEXT: Final = re.compile("[\0\ud800-\udfff]")


class StrictModel(BaseModel):
    """A JSON object in camelCase: no unknown fields, no conversions (`2.0` is not an integer)."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=StrictModel)


async def read_json(request: Request, model: type[Model], *, key: str | None) -> Model:
    """Read the body as one `model`; `key` is the request's idempotency key, None without one.

    Raises:
        UnsupportedMediaType: it is not declared as JSON in UTF-8.
        BodyTooLarge: more than `MAX_BODY_BYTES`.
        RequestTimeout: it did not arrive in time.
        MalformedRequest: not JSON.
        InvalidRequest: JSON, but not this model.
    """
    types, encodings, too_large = [], [], False
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            types.append(value)
        elif name == b"content-encoding":
            encodings.append(value)
        elif name == b"content-length":
            too_large |= value.isdigit() and int(value[:20]) > MAX_BODY_BYTES
    _require_json(types)
    if encodings not in ([], [b"identity"]):
        raise UnsupportedMediaType("Send the body as it is, without a Content-Encoding.")
    if too_large:
        raise BodyTooLarge(f"The body may have at most {MAX_BODY_BYTES} bytes.")
    try:
        body = await read_body(request)
    except RequestTimeout as problem:
        problem.under(key)
        raise
    return parse_json(body, model)


async def read_optional_json(request: Request, model: type[Model]) -> Model:
    """Read the body as `read_json` does; return the model's defaults where there is none."""
    return await read_json(request, model, key=None) if has_body(request) else model()


def parse_json(raw: bytes, model: type[Model]) -> Model:
    """Parse `raw` as one `model`; raises as `read_json` does."""
    # The nesting that a parser allows differs between versions of Python; no body needs much.
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise MalformedRequest("The JSON in the body is nested too deeply.")
    try:
        value = _DECODER.decode(raw.decode())
    except _DuplicateKeyError as error:
        raise InvalidRequest(twice("", error.args[0])) from None
    except ValueError:
        raise MalformedRequest("The body is not JSON in UTF-8.") from None
    try:
        parsed = model.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(*_faults(error, model)) from None
    # Only an escape can write text that PostgreSQL can't store.
    if b"\\u" in raw and (place := _find_invalid_text(value, "")) is not None:
        raise InvalidRequest((place, "not-text"))
    return parsed


async def read_body(request: Request) -> bytes:
    """Read the request's body, of any type.

    Raises:
        BodyTooLarge: more than `MAX_BODY_BYTES`.
        RequestTimeout: it did not arrive in time, as `protocol` measures.
        MalformedRequest: it ended early, or its framing is wrong.
    """
    body = b""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise MalformedRequest("The body is incomplete.")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body may have at most {MAX_BODY_BYTES} bytes.")
        more = message.get("more_body", False)
    return body


def has_body(request: Request) -> bool:
    """Return whether the request has a body, for routes where it is optional."""
    lengths = header_values(request, b"content-length")
    return lengths not in ([], [b"0"]) or bool(header_values(request, b"transfer-encoding"))


def header_values(request: Request, name: bytes) -> list[bytes]:
    """Return each value of a header (`name` in lower case) as it was sent."""
    return [value for key, value in request.scope["headers"] if key == name]


def _require_json(declared: list[bytes]) -> None:
    if declared == [b"application/json"]:
        return
    media_type, _, parameters = (
        (declared[0] if len(declared) == 1 else b"").decode("latin-1").lower().partition(";")
    )
    media_type = media_type.strip()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType("Send the body as Content-Type: application/json.")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in {"utf-8", "utf8"}:
            raise UnsupportedMediaType("Send the body in UTF-8.")


class _DuplicateKeyError(Exception):
    """An object has a field twice; JSON readers differ in which one they take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DuplicateKeyError(repeated(name for name, _ in pairs))
    return fields


def _integer(digits: str) -> int:
    # Python refuses to read thousands of digits; beyond 20 the value no longer matters.
    return int(digits[:20])


def _refuse_constant(name: str) -> NoReturn:
    message = f"{name} is not JSON"
    raise ValueError(message)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_constant=_refuse_constant
)


def _find_invalid_text(value: object, place: str) -> str | None:
    """Return the place of a text, or of a field's name, that PostgreSQL can't store."""
    match value:
        case str():
            return place if _INVALID_TEXT.search(value) else None
        case dict():
            inside = [(value[name], f"{place}/{name}") for name in value]
            inside.extend((name, place) for name in value)
        case list():
            inside = [(each, f"{place}/{number}") for number, each in enumerate(value)]
        case _:
            return None
    return next(filter(None, (_find_invalid_text(*each) for each in inside)), None)


def _faults(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """Name each fault by place and kind; the caller's own values are never repeated."""
    return [_fault(each, model) for each in error.errors(include_url=False)]


def _fault(found: ErrorDetails, model: type[BaseModel]) -> Fault:
    location, kind = found["loc"], found["type"]
    if kind == "extra_forbidden":
        # An unknown field's name is the caller's text (any bytes it likes): its parent is named.
        known = [field.alias or name for name, field in model.model_fields.items()]
        return unknown(_pointer(location[:-1]), location[-1], () if location[1:] else known)
    # A lone surrogate: in a text, or in a field's name, which is then no field of the model.
    if kind == "string_unicode":
        return fault(_pointer(location), "not-text") if location else unknown("", None)
    return fault(_pointer(location), code_of(kind), found.get("ctx"), sent=found["input"])


def _pointer(location: tuple[int | str, ...]) -> str:
    return "".join(f"/{part}" for part in location)
