"""Query and path parameters that the features share."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Depends, Query
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request

from balance_app.access.keys import principal
from balance_app.errors import InvalidRequest
from balance_app.faults import Fault, code_of, fault, repeated, twice, unknown


def _decimal(value: object) -> object:
    """Let only plain decimal digits through: pydantic alone also reads `1_0`, `+1` and `1.0`."""
    if isinstance(value, str) and not re.fullmatch(r"0|[1-9][0-9]*", value, re.ASCII):
        raise PydanticCustomError("int_parsing", "not an integer")
    return value


DECIMAL: Final = BeforeValidator(_decimal)

# No control characters, and none that are invisible or change the direction of text.
PRINTABLE_PATTERN: Final = (
    r"^[^\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\uffff]+$"
)
_PRINTABLE: Final = re.compile(PRINTABLE_PATTERN)


# The rest of a path, as `path` of the framework, which loses a line feed at its end.
class _RestOfPath(PathConvertor):
    regex = "(?s:.*)"


register_url_convertor("text", _RestOfPath())
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def printable(limit: int) -> AfterValidator:
    """Return a check of text that people read: 1 to `limit` printable characters, or None."""

    def check(text: str | None) -> str | None:
        if text is not None and (len(text) > limit or not _PRINTABLE.fullmatch(text)):
            raise PydanticCustomError(
                "not-printable", "not printable, empty, or longer than {limit}", {"limit": limit}
            )
        return text

    return AfterValidator(check)


def printable_schema(limit: int) -> dict[str, Any]:
    """Return the JSON schema of text that `printable` lets through."""
    return {"minLength": 1, "maxLength": limit, "pattern": PRINTABLE_PATTERN}


def _time(value: object) -> object:
    """Let only times with a zone through: pydantic alone also reads numbers of seconds."""
    if isinstance(value, str):
        try:
            if not _TIME.fullmatch(value):
                raise ValueError  # noqa: TRY301 - both mean the same
            # The comparison with times of the database needs it in range in UTC, too.
            return datetime.fromisoformat(value.upper()).astimezone(UTC)
        except (ValueError, OverflowError):
            raise PydanticCustomError("not-a-time", "not a time with a zone") from None
    return value


Time = Annotated[datetime, Field(examples=["2026-11-21T21:49:33Z"]), BeforeValidator(_time)]


class QueryModel(BaseModel):
    """Query parameters; unknown ones are refused. A route that takes a model depends on `ONCE`."""

    model_config = ConfigDict(extra="forbid")


class Who(QueryModel):
    """Who requests a control."""

    by: Annotated[
        str,
        Field(
            description="who requests it, for display; with a key its name counts instead",
            json_schema_extra=printable_schema(100),
            examples=["ada"],
        ),
        printable(100),
    ] = "api"


WhoQuery = Annotated[Who, Query()]


def name_of(request: Request, claimed: str) -> str:
    """Return who requests a control: the principal, where there is one, whatever else is said."""
    return principal(request).name or claimed


async def _refuse_repeated(request: Request) -> None:
    """Refuse a parameter that is sent twice."""
    if len(request.query_params) != len(request.query_params.multi_items()):
        name = repeated(name for name, _ in request.query_params.multi_items())
        raise InvalidRequest(twice("query:", name))


ONCE: Final = Depends(_refuse_repeated)


def request_fault(request: Request, found: Mapping[str, Any]) -> Fault:
    """Return a fault that the framework has found in the query, the path or a header."""
    place, *names = (str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return unknown(f"{place}:", names[-1] if names else None, _query_names(request))
    sent = found.get("input")
    # All that is sent here is text: only a number's decimals tell what went wrong.
    return fault(
        f"{place}:{'/'.join(names[:1])}",
        code_of(found["type"]),
        found.get("ctx"),
        sent=0.0 if isinstance(sent, str) else sent,
    )


def _query_names(request: Request) -> Iterator[str]:
    """Yield the query parameters that the request's route has."""
    route = request.scope.get("route")
    for parameter in route.dependant.query_params if isinstance(route, APIRoute) else ():
        kind = parameter.field_info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from (field.alias or name for name, field in kind.model_fields.items())
        else:
            yield parameter.alias
