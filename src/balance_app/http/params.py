"""What the query and path parameters of every feature have in common."""

import re
from typing import Final

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from balance_app.errors import InvalidRequest


def _decimal(value: object) -> object:
    """Let only plain decimal digits through: pydantic alone also reads `1_0`, `+1` and `1.0`."""
    if isinstance(value, str) and not re.fullmatch(r"0|[1-9][0-9]*", value, re.ASCII):
        raise PydanticCustomError("int_parsing", "not an integer")
    return value


DECIMAL: Final = BeforeValidator(_decimal)


def refuse_repeated(request: Request) -> None:
    """Refuse a parameter that is sent twice: it requests two things.

    Raises:
        InvalidRequest: one is.
    """
    if len(request.query_params) != len(request.query_params.multi_items()):
        raise InvalidRequest(("query:", "duplicate-parameter"))
