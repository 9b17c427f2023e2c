"""The JSON bodies and parameters of requests, and the JSON bodies of answers."""

import re
from datetime import date, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from balance_app.balances.accounts import Account
from balance_app.balances.model import Accepted, Entry, Hold, State
from balance_app.errors import InvalidRequest
from balance_app.http.body import MAX_INTEGER, StrictModel, header_values
from balance_app.http.paging import Limit
from balance_app.http.params import DECIMAL, QueryModel, Time, printable, printable_schema

KEY_PATTERN: Final = r"^[!-~]{1,255}$"
_KEY: Final = re.compile(KEY_PATTERN.encode())
_DATE: Final = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
ID_PATTERN: Final = r"^[1-9][0-9]{0,15}-[1-9][0-9]{0,15}$"
_ID: Final = re.compile(ID_PATTERN, re.ASCII)
LONGEST_HOLD_SECONDS: Final = 365 * 24 * 3600


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


def _is_id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise PydanticCustomError("not-an-id", "not an id")
    return text


def split_id(text: str) -> tuple[int, int]:
    """Return the user's id and the number in the id of a transfer or a hold."""
    user_id, _, number = text.partition("-")
    return int(user_id), int(number)


UserId = Annotated[int, Field(ge=1, le=MAX_INTEGER, examples=[1])]
PathUserId = Annotated[int, Path(alias="userId", ge=1, le=MAX_INTEGER, examples=[1]), DECIMAL]
PathVersion = Annotated[int, Path(ge=1, le=MAX_INTEGER, examples=[2]), DECIMAL]
PathKey = Annotated[
    str,
    Path(
        pattern=KEY_PATTERN,
        description="the `Idempotency-Key` that the request was sent with",
        examples=["order-42"],
    ),
]
PathTransferId = Annotated[
    str,
    Path(
        alias="transferId",
        description="the payer's id and the version of the payer's entry",
        json_schema_extra={"pattern": ID_PATTERN},
        examples=["1-2"],
    ),
    AfterValidator(_is_id),
]
PathHoldId = Annotated[
    str,
    Path(
        alias="holdId",
        description="the user's id and the hold's number",
        json_schema_extra={"pattern": ID_PATTERN},
        examples=["1-1"],
    ),
    AfterValidator(_is_id),
]
PathExternalId = Annotated[
    str,
    Path(
        alias="externalId",
        description="the user's id in another system",
        json_schema_extra=printable_schema(200),
        examples=["customer-7"],
    ),
    printable(200),
]
Reference = Annotated[
    str | None,
    Field(
        description="what it is about, for finding it again",
        json_schema_extra=printable_schema(200),
        examples=["invoice 2026-117"],
    ),
    printable(200),
]
Positive = Annotated[int, Field(ge=1, le=MAX_INTEGER, examples=[2])]
Floor = Annotated[
    int,
    Field(
        ge=-MAX_INTEGER,
        le=MAX_INTEGER,
        description="what is available may not fall below it; negative allows an overdraft",
        examples=[-500],
    ),
]
ExternalId = Annotated[
    str | None,
    Field(
        description="the user's id in another system; unique",
        json_schema_extra=printable_schema(200),
        examples=["customer-7"],
    ),
    printable(200),
]


class Described(StrictModel):
    """What a movement of money is about."""

    reference: Reference = None
    note: Annotated[
        str | None,
        Field(
            description="more about it, for people",
            json_schema_extra=printable_schema(500),
            examples=["second try"],
        ),
        printable(500),
    ] = None


class ChangeRequest(Described):
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


class TransferRequest(Described):
    """A transfer from one user to another."""

    from_user_id: UserId
    to_user_id: Annotated[int, Field(ge=1, le=MAX_INTEGER, examples=[2])]
    amount: Positive


class HoldRequest(Described):
    """A reservation of an amount, for a time."""

    user_id: UserId
    amount: Positive
    expires_in_seconds: Annotated[int, Field(ge=1, le=LONGEST_HOLD_SECONDS, examples=[3600])]


class CaptureRequest(Described):
    """How much of a hold is withdrawn."""

    amount: Annotated[
        int | None,
        Field(ge=1, le=MAX_INTEGER, description="by default all of it", examples=[2]),
    ] = None


class OnceRequest(StrictModel):
    """A new user, who may be there already."""

    balance: Annotated[
        int, Field(ge=0, le=MAX_INTEGER, description="the opening balance", examples=[10000])
    ] = 0
    floor: Floor = 0


class OpenRequest(OnceRequest):
    """A new user."""

    external_id: ExternalId = None


class SettingsRequest(StrictModel):
    """Settings of an account to change; what is left out stays."""

    floor: Annotated[
        int | None,
        Field(
            ge=-MAX_INTEGER,
            le=MAX_INTEGER,
            description="what is available may not fall below it; negative allows an overdraft",
            examples=[-500],
        ),
    ] = None
    frozen: Annotated[
        bool | None, Field(description="whether no money may be moved", examples=[True])
    ] = None
    external_id: Annotated[
        ExternalId, Field(description="the user's id in another system; null removes it")
    ] = None


class Page(QueryModel):
    """Which part of a list: the items after a cursor."""

    after: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_INTEGER,
            description="start after this id, the `next` of the page before; 0: the first page",
        ),
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


class UsersPage(Page):
    """Which users: those after a cursor, or the one with an external id."""

    external_id: Annotated[
        str | None,
        Field(
            alias="externalId",
            description="only the user with this external id",
            json_schema_extra=printable_schema(200),
            examples=["customer-7"],
        ),
        printable(200),
    ] = None


class HoldsPage(Page):
    """Which holds of a user: those after a cursor."""

    state: Annotated[
        Literal["open", "captured", "voided", "expired"] | None,
        Field(description="only holds in this state", examples=["open"]),
    ] = None


class EntriesPage(QueryModel):
    """Which entries of a user, in which order."""

    order: Annotated[
        Literal["asc", "desc"], Field(description="the oldest first, or the latest")
    ] = "asc"
    begin: Annotated[
        Time | None, Field(alias="from", description="only entries made at this time or later")
    ] = None
    end: Annotated[
        Time | None, Field(alias="to", description="only entries made before this time")
    ] = None
    reference: Annotated[
        str | None,
        Field(
            description="only entries with exactly this reference",
            json_schema_extra=printable_schema(200),
            examples=["invoice 2026-117"],
        ),
        printable(200),
    ] = None
    after: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_INTEGER,
            description="the `next` of the page before, in the same order; by default the first",
        ),
        DECIMAL,
    ] = None
    limit: Limit = 100


class PastQuery(QueryModel):
    """Which moment of an account; by default the present."""

    at: Annotated[Time | None, Field(description="the account as it was at this time")] = None
    version: Annotated[
        int | None,
        Field(ge=1, le=MAX_INTEGER, description="the account after this entry"),
        DECIMAL,
    ] = None


PageQuery = Annotated[Page, Query()]
UsersPageQuery = Annotated[UsersPage, Query()]
HoldsPageQuery = Annotated[HoldsPage, Query()]
EntriesPageQuery = Annotated[EntriesPage, Query()]
PastQueryParams = Annotated[PastQuery, Query()]
DaysPageQuery = Annotated[DaysPage, Query()]


Instant = Annotated[datetime, Field(examples=["2026-11-21T21:49:33.940623Z"])]
AnyUserId = Annotated[int, Field(examples=[1])]
AnyBalance = Annotated[int, Field(examples=[9998])]
AnyHeld = Annotated[int, Field(examples=[0], description="what open holds reserve of it")]
AnyAvailable = Annotated[
    int, Field(examples=[9998], description="the balance without what is held")
]
AnyVersion = Annotated[int, Field(examples=[2], description="how many entries the user has")]
AnyAmount = Annotated[int, Field(examples=[-2])]
AnyKey = Annotated[str | None, Field(examples=["order-42"], description="its Idempotency-Key")]
AnyReference = Annotated[str | None, Field(examples=["invoice 2026-117"])]
AnyNote = Annotated[str | None, Field(examples=[None])]
AnyBy = Annotated[
    str | None,
    Field(
        examples=["till-1"],
        description="the name of the key that the request came with; null where none was needed",
    ),
]
AnyExternalId = Annotated[str | None, Field(examples=["customer-7"])]
TransferId = Annotated[str, Field(examples=["1-2"], description="the payer's id and entry")]
HoldId = Annotated[str, Field(examples=["1-1"], description="the user's id and a number")]
Cursor = Annotated[int | None, Field(examples=[None], description="`after` of the next page")]


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True)


class StateAnswer(_Answer):
    """An account just after something."""

    user_id: AnyUserId
    balance: AnyBalance
    held: AnyHeld
    available: AnyAvailable
    version: AnyVersion


class ChangeDetails(_Answer):
    """The change itself; `reverses` is the version of the entry that it undoes."""

    amount: AnyAmount
    at: Instant
    key: AnyKey
    reference: AnyReference
    note: AnyNote
    by: AnyBy
    reverses: Annotated[int | None, Field(examples=[None])]


class ChangeAnswer(StateAnswer):
    """The account after an accepted change."""

    change: ChangeDetails


class TransferAnswer(_Answer):
    """A transfer, and both accounts just after it."""

    id: TransferId
    amount: Annotated[int, Field(examples=[2])]
    at: Instant
    key: AnyKey
    reference: AnyReference
    note: AnyNote
    by: AnyBy
    payer: Annotated[StateAnswer, Field(alias="from")]
    payee: Annotated[StateAnswer, Field(alias="to")]
    reverses: Annotated[
        str | None, Field(examples=[None], description="the id of the transfer that it undoes")
    ]
    reversed_by: Annotated[
        str | None, Field(examples=[None], description="the id of the transfer that undoes it")
    ]


class HoldAnswer(_Answer):
    """A hold; `captured` is what was withdrawn of it."""

    id: HoldId
    user_id: AnyUserId
    amount: Annotated[int, Field(examples=[2])]
    state: Annotated[Literal["open", "captured", "voided", "expired"], Field(examples=["open"])]
    at: Instant
    expires_at: Instant
    ended_at: Annotated[datetime | None, Field(examples=[None])]
    ended_by: Annotated[
        str | None,
        Field(examples=[None], description="as `by`; null also for a hold that has expired"),
    ]
    captured: Annotated[int | None, Field(examples=[None])]
    key: AnyKey
    reference: AnyReference
    note: AnyNote
    by: AnyBy


class HoldStateAnswer(HoldAnswer):
    """A hold, and the account just after it was placed or ended."""

    account: StateAnswer


class HoldsAnswer(_Answer):
    """A page of holds; `next` is the cursor of the page after it, null on the last."""

    holds: list[HoldAnswer]
    next: Cursor


class AccountAnswer(StateAnswer):
    """A user's account."""

    floor: Annotated[int, Field(examples=[0])]
    frozen: Annotated[bool, Field(examples=[False])]
    settings_version: Annotated[int, Field(examples=[1])]
    external_id: AnyExternalId
    created_at: Instant


class PastAnswer(_Answer):
    """An account after an entry, which was made at `at`."""

    user_id: AnyUserId
    version: AnyVersion
    balance: AnyBalance
    held: AnyHeld
    at: Instant


class AccountsAnswer(_Answer):
    """A page of accounts; `next` is the cursor of the page after it, null on the last."""

    users: list[AccountAnswer]
    next: Cursor


class SettingsAnswer(_Answer):
    """The settings of an account as one request left them, and whose request that was."""

    settings_version: Annotated[int, Field(examples=[2])]
    floor: Annotated[int, Field(examples=[-500])]
    frozen: Annotated[bool, Field(examples=[False])]
    external_id: AnyExternalId
    at: Instant
    by: Annotated[str | None, Field(examples=["ada"])]


class SettingsPageAnswer(_Answer):
    """A page of changes of settings; `next` is the cursor of the page after it, or null."""

    settings: list[SettingsAnswer]
    next: Cursor


class EntryAnswer(_Answer):
    """One entry: `balance` is the balance after it; version 1 is the opening balance.

    `reverses` is the version of the entry that it undoes, `transfer` the transfer it is half of,
    `hold` the hold that it captures.
    """

    version: AnyVersion
    amount: AnyAmount
    balance: AnyBalance
    held: AnyHeld
    at: Instant
    key: AnyKey
    reference: AnyReference
    note: AnyNote
    by: AnyBy
    transfer: Annotated[str | None, Field(examples=[None])]
    other_user_id: Annotated[int | None, Field(examples=[None])]
    reverses: Annotated[int | None, Field(examples=[None])]
    hold: Annotated[str | None, Field(examples=[None])]


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
    kind: Annotated[Literal["change", "transfer", "hold"], Field(examples=["change"])]
    by: AnyBy
    outcome: Annotated[Literal["accepted", "refused"], Field(examples=["accepted"])]
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


def state_body(state: State | Entry) -> dict[str, Any]:
    """Return the account after something."""
    return {
        "userId": state.user_id,
        "balance": state.balance,
        "held": state.held,
        "available": state.balance - state.held,
        "version": state.version,
    }


def change_body(entry: Entry) -> dict[str, Any]:
    """Return the answer to an accepted change; a replay has an equal one."""
    change = {
        "amount": entry.amount,
        "at": entry.at,
        "key": entry.key,
        "reference": entry.reference,
        "note": entry.note,
        "by": entry.by,
        "reverses": entry.reverses,
    }
    return {**state_body(entry), "change": change}


def transfer_body(payer: Entry, payee: Entry, reversed_by: Entry | None = None) -> dict[str, Any]:
    """Return a transfer by its halves; `reversed_by` is the payer's half of its reversal."""
    undone = payee.user_id, payee.reverses
    return {
        "id": f"{payer.user_id}-{payer.version}",
        "amount": payee.amount,
        "at": payer.at,
        "key": payer.key,
        "reference": payer.reference,
        "note": payer.note,
        "by": payer.by,
        "from": state_body(payer),
        "to": state_body(payee),
        "reverses": None if payee.reverses is None else "{}-{}".format(*undone),
        "reversedBy": None
        if reversed_by is None
        else f"{reversed_by.user_id}-{reversed_by.version}",
    }


def hold_body(hold: Hold, state: State | None = None) -> dict[str, Any]:
    """Return a hold; with the account after it was placed or ended."""
    body = {
        "id": f"{hold.user_id}-{hold.number}",
        "userId": hold.user_id,
        "amount": hold.amount,
        "state": hold.state,
        "at": hold.at,
        "expiresAt": hold.expires_at,
        "endedAt": hold.ended_at,
        "endedBy": hold.ended_by,
        "captured": hold.captured,
        "key": hold.key,
        "reference": hold.reference,
        "note": hold.note,
        "by": hold.by,
    }
    return body if state is None else {**body, "account": state_body(state)}


def account_body(account: Account) -> dict[str, Any]:
    """Return an account."""
    return {
        "userId": account.user_id,
        "balance": account.balance,
        "held": account.held,
        "available": account.available,
        "version": account.version,
        "floor": account.floor,
        "frozen": account.frozen,
        "settingsVersion": account.settings_version,
        "externalId": account.external_id,
        "createdAt": account.created_at,
    }


def entry_body(entry: Entry) -> dict[str, Any]:
    """Return an entry of a ledger."""
    transfer = None
    if entry.other_user_id is not None:
        payer = entry.user_id, entry.version
        if entry.amount > 0:
            payer = entry.other_user_id, entry.other_version or 0
        transfer = "{}-{}".format(*payer)
    return {
        "version": entry.version,
        "amount": entry.amount,
        "balance": entry.balance,
        "held": entry.held,
        "at": entry.at,
        "key": entry.key,
        "reference": entry.reference,
        "note": entry.note,
        "by": entry.by,
        "transfer": transfer,
        "otherUserId": entry.other_user_id,
        "reverses": entry.reverses,
        "hold": None if entry.hold is None else f"{entry.user_id}-{entry.hold}",
    }


def accepted_body(made: Accepted) -> dict[str, Any]:
    """Return the answer to an accepted movement, of whichever kind."""
    if made.hold is not None:
        return hold_body(made.hold, made.state)
    assert made.entry is not None  # noqa: S101 - what is no hold has an entry
    if made.other is not None:
        return transfer_body(made.entry, made.other)
    return change_body(made.entry)


def accepted_status(made: Accepted) -> int:
    """Return the HTTP status of the answer to an accepted movement."""
    return 201 if made.hold is not None and made.hold.state == "open" else 200
