"""What the statements on accounts take and return."""

import json
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

from balance_app.balances.chain import entry_content
from balance_app.balances.errors import (
    BalanceLimitExceeded,
    InsufficientFunds,
    UserFrozen,
    VersionConflict,
)
from balance_app.http.body import MAX_INTEGER

Refusal: TypeAlias = InsufficientFunds | BalanceLimitExceeded | UserFrozen


class State(NamedTuple):
    """An account at one moment; `available`, what may be spent, is never below the floor."""

    user_id: int
    balance: int
    held: int
    floor: int
    frozen: bool
    version: int
    settings_version: int = 1
    hold_events: int = 0
    # whether a hold has to be ended first
    overdue: bool = False

    @property
    def available(self) -> int:
        """The balance without what is held."""
        return self.balance - self.held

    @property
    def tag(self) -> str:
        """Its entity tag: each change of the account raises one of its numbers, none ever falls."""
        return f"{self.version}.{self.settings_version}.{self.hold_events}"

    def allows(self, amount: int) -> bool:
        """Return whether `amount` may be added to what is available."""
        return (
            not self.frozen
            and (amount > 0 or self.balance - self.held + amount >= self.floor)
            and self.balance + amount <= MAX_INTEGER
        )

    def refusal(self, amount: int) -> Refusal:
        """Return the problem of adding an `amount` that it does not allow."""
        members = {
            "user_id": self.user_id,
            "balance": self.balance,
            "held": self.held,
            "floor": self.floor,
            "version": self.version,
            "amount": amount,
        }
        if self.frozen:
            return UserFrozen(**members)
        return InsufficientFunds(**members) if amount < 0 else BalanceLimitExceeded(**members)

    def require(self, tags: list[str] | None) -> None:
        """Check an `If-Match`.

        Raises:
            VersionConflict: the account has none of these entity tags.
        """
        if tags is not None and self.tag not in tags:
            raise self.conflict()

    def conflict(self) -> VersionConflict:
        """Return the problem of a condition that it does not meet."""
        return VersionConflict(
            user_id=self.user_id,
            balance=self.balance,
            held=self.held,
            version=self.version,
            tag=self.tag,
        )


class Entry(NamedTuple):
    """An entry of a user's ledger; `balance` and `held` are those after it.

    Of a transfer each half names the other; `reverses` is the version of the entry that it undoes,
    `hold` the number of the hold that it captures. `by` is the principal, None where nobody was
    asked.
    """

    user_id: int
    version: int
    amount: int
    balance: int
    held: int
    at: datetime
    key: str | None = None
    other_user_id: int | None = None
    other_version: int | None = None
    reverses: int | None = None
    hold: int | None = None
    reference: str | None = None
    note: str | None = None
    by: str | None = None


class Hold(NamedTuple):
    """An amount that is reserved until the hold ends; `captured` is what was withdrawn of it.

    The last three members are the account just after it ended.
    """

    user_id: int
    number: int
    amount: int
    at: datetime
    expires_at: datetime
    key: str | None = None
    reference: str | None = None
    note: str | None = None
    by: str | None = None
    state: Literal["open", "captured", "voided", "expired"] = "open"
    ended_at: datetime | None = None
    ended_by: str | None = None
    captured: int | None = None
    balance: int | None = None
    held: int | None = None
    version: int | None = None


class Movement(NamedTuple):
    """A request that moves money, or reserves it.

    `amount` is added to what `user_id` has available. A transfer names who gets it, a hold for how
    many seconds. It is only accepted while the account has one of the entity tags `tags`.
    """

    user_id: int
    amount: int
    key: str | None = None
    reference: str | None = None
    note: str | None = None
    to_user_id: int | None = None
    seconds: int | None = None
    tags: list[str] | None = None
    # the principal; None where nobody was asked
    by: str | None = None

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Each account that it changes, and by what amount."""
        own = (self.user_id, self.amount)
        return (own,) if self.to_user_id is None else (own, (self.to_user_id, -self.amount))

    @property
    def request(self) -> str | None:
        """What it asks for beside the amount, for comparison with another request of its key."""
        members = {
            "transfer": self.to_user_id,
            "hold": self.seconds,
            "reference": self.reference,
            "note": self.note,
        }
        given = {name: value for name, value in members.items() if value is not None}
        return json.dumps(given, separators=(",", ":"), ensure_ascii=False) if given else None

    def content(self, reverses: int | None = None) -> bytes:
        """Return the digest of its entry's content, which the hash of the entry covers."""
        said = (self.key, self.by, None, None, reverses, None, self.reference, self.note)
        return entry_content(self.user_id, self.amount, said)


class Accepted(NamedTuple):
    """A movement that was made.

    The entry (of a transfer also the payee's), or the hold; of a hold also the account after it.
    """

    entry: Entry | None = None
    other: Entry | None = None
    hold: Hold | None = None
    state: State | None = None
    replayed: bool = False


class Refused(NamedTuple):
    """A movement that was refused, and the state that did: it does not take this amount."""

    state: State
    amount: int
    replayed: bool = False

    @property
    def problem(self) -> Refusal:
        """The problem that reports it."""
        return self.state.refusal(self.amount)


Outcome = Accepted | Refused


class Recorded(NamedTuple):
    """What was asked with an idempotency key, by whom, and its outcome."""

    amount: int
    request: str | None
    by: str | None
    outcome: Outcome


def kind_of(request: str | None) -> Literal["change", "transfer", "hold"]:
    """Return which kind of movement a recorded request is."""
    given = {} if request is None else json.loads(request)
    return "transfer" if "transfer" in given else "hold" if "hold" in given else "change"
