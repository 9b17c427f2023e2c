"""Query and path parameters that the features share."""

import re
from typing import Annotated, Final

from fastapi import Depends
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from balance_app.errors import InvalidRequest


def _decimal(value: object) -> object:
    """Let only plain decimal digits through: pydantic alone also reads `1_0`, `+1` and `1.0`."""
    if isinstance(value, str) and not re.fullmatch(r"0|[1-9][0-9]*", value, re.ASCII):
        raise PydanticCustomError("int_parsing", "not an integer")
    return value


DECIMAL: Final = BeforeValidator(_decimal)

Limit = Annotated[int, Field(ge=1, le=1000, description="items on the page"), DECIMAL]


class QueryModel(BaseModel):
    """Query parameters; unknown ones are refused. A route that takes a model depends on `ONCE`."""

    model_config = ConfigDict(extra="forbid")


async def _refuse_repeated(request: Request) -> None:
    """Refuse a parameter that is sent twice."""
    if len(request.query_params) != len(request.query_params.multi_items()):
        raise InvalidRequest(("query:", "duplicate-parameter"))


ONCE: Final = Depends(_refuse_repeated)
