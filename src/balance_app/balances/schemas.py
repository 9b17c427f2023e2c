"""The JSON bodies and parameters of requests, and the JSON bodies of answers."""

import re
from datetime import date, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from balance_app.balances.repository import Outcome, refusal
from balance_app.errors import InvalidRequest
from balance_app.http.body import MAX_INTEGER, StrictModel, header_values
from balance_app.http.params import DECIMAL, Limit, QueryModel

KEY_PATTERN: Final = r"^[!-~]{1,255}$"
_KEY: Final = re.compile(KEY_PATTERN.encode())
_DATE: Final = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _not_zero(amount: int) -> int:
    if amount == 0:
        raise PydanticCustomError("zero", "a change of 0 is no change")
    return amount


def _is_date(value: object) -> object:
    """Let only `YYYY-MM-DD` through: pydantic alone also reads times, and numbers of seconds."""
    if isinstance(value, str):
        try:
            return date.fromisoformat(value if _DATE.fullmatch(value) else "")
        except ValueError:
            raise PydanticCustomError("date_parsing", "not a date") from None
    return value


UserId = Annotated[int, Field(ge=1, le=MAX_INTEGER, examples=[1])]
PathUserId = Annotated[int, Path(alias="userId", ge=1, le=MAX_INTEGER, examples=[1]), DECIMAL]
PathKey = Annotated[
    str,
    Path(
        pattern=KEY_PATTERN,
        description="the `Idempotency-Key` that the change was sent with",
        examples=["order-42"],
    ),
]


class ChangeRequest(StrictModel):
    """A change of one user's balance."""

    user_id: UserId
    amount: Annotated[
        int,
        Field(
            ge=-MAX_INTEGER,
            le=MAX_INTEGER,
            description="added to the balance; negative withdraws; not 0",
            json_schema_extra={"not": {"const": 0}},
            examples=[-2],
        ),
        AfterValidator(_not_zero),
    ]


class OpenRequest(StrictModel):
    """A new user."""

    balance: Annotated[
        int, Field(ge=0, le=MAX_INTEGER, description="the opening balance", examples=[10000])
    ] = 0


class Page(QueryModel):
    """Which part of a list: the items after a cursor."""

    after: Annotated[
        int,
        Field(ge=0, le=MAX_INTEGER, description="the `next` of the page before; 0: the first page"),
        DECIMAL,
    ] = 0
    limit: Limit = 100


class DaysPage(QueryModel):
    """Which part of a list by days: those before a cursor."""

    before: Annotated[
        date,
        Field(
            description="the `next` of the page before; by default the first page",
            examples=["2026-11-21"],
        ),
        BeforeValidator(_is_date),
    ] = date.max
    limit: Limit = 100


PageQuery = Annotated[Page, Query()]
DaysPageQuery = Annotated[DaysPage, Query()]


Instant = Annotated[datetime, Field(examples=["2026-11-21T21:49:33.940623Z"])]
AnyUserId = Annotated[int, Field(examples=[1])]
AnyBalance = Annotated[int, Field(examples=[9998])]
AnyVersion = Annotated[int, Field(examples=[2], description="how many entries the user has")]
AnyAmount = Annotated[int, Field(examples=[-2])]
AnyKey = Annotated[str | None, Field(examples=["order-42"], description="its Idempotency-Key")]
Cursor = Annotated[int | None, Field(examples=[None], description="`after` of the next page")]


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True)


class ChangeDetails(_Answer):
    """The change itself."""

    amount: AnyAmount
    at: Instant
    key: AnyKey


class ChangeAnswer(_Answer):
    """The balance after an accepted change."""

    user_id: AnyUserId
    balance: AnyBalance
    version: AnyVersion
    change: ChangeDetails


class AccountAnswer(_Answer):
    """A user's account."""

    user_id: AnyUserId
    balance: AnyBalance
    version: AnyVersion
    created_at: Instant


class AccountsAnswer(_Answer):
    """A page of accounts; `next` is the cursor of the page after it, null on the last."""

    users: list[AccountAnswer]
    next: Cursor


class EntryAnswer(_Answer):
    """One entry: `balance` is the balance after it; version 1 is the opening balance."""

    version: AnyVersion
    amount: AnyAmount
    balance: AnyBalance
    at: Instant
    key: AnyKey


class EntriesAnswer(_Answer):
    """A page of entries; `next` is the cursor of the page after it, null on the last."""

    entries: list[EntryAnswer]
    next: Cursor


class DailyBalanceAnswer(_Answer):
    """The balance of a user on a UTC day, as last read on that day: at `at`."""

    day: Annotated[date, Field(examples=["2026-11-21"])]
    balance: AnyBalance
    version: AnyVersion
    at: Instant


class DailyBalancesAnswer(_Answer):
    """A page of daily balances; `next` is the cursor of the page after it, null on the last."""

    daily_balances: list[DailyBalanceAnswer]
    next: Annotated[date | None, Field(examples=[None], description="`before` of the next page")]


class KeyAnswer(_Answer):
    """The outcome of the request with a key: the status and the body of its answer."""

    key: Annotated[str, Field(examples=["order-42"])]
    outcome: Annotated[Literal["opened", "accepted", "refused"], Field(examples=["accepted"])]
    status: Annotated[int, Field(examples=[200])]
    answer: Annotated[
        dict[str, Any], Field(examples=[{"userId": 1, "balance": 9998, "version": 2}])
    ]


def idempotency_key(request: Request) -> str | None:
    """Return the request's `Idempotency-Key`.

    Raises:
        InvalidRequest: it is not 1 to 255 visible ASCII characters, or sent twice.
    """
    keys = header_values(request, b"idempotency-key")
    if not keys:
        return None
    key = keys[0].strip(b" \t")  # not part of a header's value (RFC 9110, 5.5)
    if len(keys) > 1 or not _KEY.fullmatch(key):
        raise InvalidRequest(("header:Idempotency-Key", "not-a-key"))
    return key.decode("ascii")


def outcome_status(outcome: Outcome) -> int:
    """Return the HTTP status of this outcome."""
    return {"opened": 201, "accepted": 200, "refused": 409}[outcome.kind]


def outcome_body(outcome: Outcome) -> dict[str, Any]:
    """Return the body of this outcome; a replay has an equal one."""
    if outcome.kind == "refused":
        return refusal(outcome).body()
    state = {"userId": outcome.user_id, "balance": outcome.balance, "version": outcome.version}
    if outcome.kind == "opened":
        return {**state, "createdAt": outcome.at}
    change = {"amount": outcome.amount, "at": outcome.at, "key": outcome.key}
    return {**state, "change": change}
