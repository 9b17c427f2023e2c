"""What the rows of several accounts are, and what their clients ask and are answered.

`tests.history_accounts` checks one against the other.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum, unique


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the ledger; `other` is the user and version of a transfer's other half."""

    version: int
    amount: int
    balance: int
    key: str | None
    at: datetime
    held: int = 0
    other: tuple[int, int] | None = None
    reverses: int | None = None
    hold: int | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """A row of the holds."""

    number: int
    amount: int
    key: str | None
    at: datetime
    expires_at: datetime
    state: str = "open"
    ended_at: datetime | None = None
    captured: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The row of an account."""

    version: int
    balance: int
    held: int = 0


@dataclass(frozen=True, slots=True)
class Account:
    """The whole ledger, all holds and the state of an account, read in one snapshot at the end.

    Entries up to `opening_version` existed before the first operation was sent, holds did not.
    """

    entries: tuple[Entry, ...]
    holds: tuple[Hold, ...]
    final: State
    floor: int = 0
    opening_version: int = 1


@dataclass(frozen=True, slots=True)
class Seen:
    """A state of an account in an answer."""

    user_id: int
    version: int
    balance: int
    held: int
    available: int


@dataclass(frozen=True, slots=True)
class Change:
    """A request to change a balance."""

    user_id: int
    amount: int
    key: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """A request to move an amount from the payer's account to the payee's."""

    payer: int
    payee: int
    amount: int
    key: str


@dataclass(frozen=True, slots=True)
class Reverse:
    """A request to reverse an entry, of a transfer both."""

    user_id: int
    version: int


@dataclass(frozen=True, slots=True)
class Place:
    """A request to hold an amount."""

    user_id: int
    amount: int
    key: str


@dataclass(frozen=True, slots=True)
class Capture:
    """A request to withdraw what is held, or a part of it."""

    user_id: int
    number: int
    amount: int | None = None


@dataclass(frozen=True, slots=True)
class Void:
    """A request to release a hold."""

    user_id: int
    number: int


Request = Change | Transfer | Reverse | Place | Capture | Void


@dataclass(frozen=True, slots=True)
class Done:
    """The request took effect at a time, and made these states; a new hold has a number."""

    states: tuple[Seen, ...]
    at: datetime
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The state of an account refused an amount."""

    state: Seen
    amount: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The hold had ended."""

    state: str
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Exceeded:
    """The hold is of a smaller amount than was to be captured."""

    amount: int


@unique
class Undecided(StrEnum):
    """No outcome of the request is known, or none of its key until now."""

    UNKNOWN = "unknown"
    NOT_APPLIED = "not applied"


Outcome = Done | Refused | Ended | Exceeded | Undecided


@dataclass(frozen=True, slots=True)
class Try:
    """A request that was sent once, and its outcome; `replayed` as in `tests.history`."""

    request: Request
    outcome: Outcome
    sent: float
    answered: float
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """The states of one or more accounts in one snapshot."""

    states: tuple[Seen, ...]
    sent: float
    answered: float


@dataclass(frozen=True, slots=True)
class HoldRead:
    """The state of a hold that was read."""

    user_id: int
    number: int
    state: str
    sent: float
    answered: float


@dataclass(frozen=True, slots=True)
class Past:
    """A past state of an account: the version, and when it was made."""

    version: int
    balance: int
    held: int
    at: datetime


@dataclass(frozen=True, slots=True)
class PastRead:
    """The state that an account had at a time, or as a version; None before its first entry."""

    user_id: int
    asked: datetime | int
    found: Past | None
    sent: float
    answered: float


Operation = Try | Read | HoldRead | PastRead
