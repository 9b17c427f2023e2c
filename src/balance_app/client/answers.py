"""What calls return. Amounts and balances are integers, times have a zone."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, SkipValidation, TypeAdapter
from pydantic.alias_generators import to_camel

HoldState = Literal["open", "captured", "voided", "expired"]


class Received(NamedTuple):
    """An answer as it came: `now` is the service's time, `replayed`: it repeats the first one."""

    body: dict[str, Any]
    text: str
    now: datetime
    replayed: bool
    tag: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    __pydantic_config__: ClassVar = ConfigDict(alias_generator=to_camel)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Single(_Answer):
    received: Annotated[Received | None, SkipValidation] = field(
        default=None, repr=False, compare=False
    )

    @property
    def replayed(self) -> bool:
        """Whether this took effect by an earlier try or call."""
        return self.received is not None and self.received.replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class State(_Answer):
    """An account just after something: `available` is the balance without what is held."""

    user_id: int
    balance: int
    held: int
    available: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account(_Single):
    """A user's account; `available` never falls below `floor`.

    `tag` changes with each change of the account.
    """

    user_id: int
    balance: int
    held: int
    available: int
    floor: int
    frozen: bool
    version: int
    settings_version: int
    external_id: str | None
    created_at: datetime

    @property
    def tag(self) -> str:
        """The entity tag, for `if_match`.

        Raises:
            ValueError: the account is one of a list, which has no tags: read it by `Service.user`.
        """
        if self.received is None or self.received.tag is None:
            raise ValueError("an account of a list has no tag: read it by `user`")
        return self.received.tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Change(_Single):
    """A change of one balance; `reverses` is the version of the entry that it undoes."""

    account: State
    amount: int
    at: datetime
    key: str | None
    reference: str | None
    note: str | None
    by: str | None = None
    reverses: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer(_Single):
    """A transfer, and both accounts just after it; `reverses` is the id of the one it undoes."""

    id: str
    amount: int
    at: datetime
    key: str | None
    reference: str | None
    note: str | None
    by: str | None = None
    payer: State
    payee: State
    reverses: str | None
    reversed_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(_Single):
    """A hold; `captured` is what was withdrawn of it, `account` the state just after its call."""

    id: str
    user_id: int
    amount: int
    state: HoldState
    at: datetime
    expires_at: datetime
    ended_at: datetime | None
    ended_by: str | None = None
    captured: int | None
    key: str | None
    reference: str | None
    note: str | None
    by: str | None = None
    account: State | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PastBalance(_Single):
    """An account after entry `version`, which was made at `at`."""

    user_id: int
    version: int
    balance: int
    held: int
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(_Answer):
    """An entry of a ledger; `balance` and `held` are those after it, version 1 is the opening.

    `transfer` is the id of the transfer that it is half of, with `other_user_id`; `reverses` the
    version of the entry that it undoes; `hold` the id of the hold that it captures.
    """

    version: int
    amount: int
    balance: int
    held: int
    at: datetime
    key: str | None
    reference: str | None
    note: str | None
    by: str | None = None
    transfer: str | None
    other_user_id: int | None
    reverses: int | None
    hold: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_Answer):
    """The settings of an account as one request left them, and whose request that was."""

    settings_version: int
    floor: int
    frozen: bool
    external_id: str | None
    at: datetime
    by: str | None


Made = TypeVar("Made", Account, Change, Transfer, Hold, PastBalance, Entry, Settings)

_KINDS: Final = (Account, Change, Transfer, Hold, PastBalance, Entry, Settings)
_ADAPTERS: Final[dict[type, TypeAdapter[Any]]] = {kind: TypeAdapter(kind) for kind in _KINDS}


def parse(kind: type[Made], body: dict[str, Any], received: Received | None = None) -> Made:
    """Return an answer; members that this client does not know are left out.

    Raises:
        ValueError: it is not of this kind.
    """
    if kind is Change:
        body = {"account": body, **body["change"]}
    elif kind is Transfer:
        body = {**body, "payer": body["from"], "payee": body["to"]}
    made: Made = _ADAPTERS[kind].validate_python(
        body if received is None else {**body, "received": received}
    )
    return made
