"""The problems of requests that the state of an account or a key refuses."""

from typing import Any, ClassVar

from balance_app.errors import Overloaded, Problem
from balance_app.http.body import MAX_INTEGER


class UserNotFound(Problem):
    """There is no user with this id.

    Nothing was changed. `POST /api/users` creates one, `GET /api/users` lists them.
    """

    status, code, title = 404, "user-not-found", "User not found"
    sample: ClassVar = {"user_id": 404}

    def __init__(self, user_id: int) -> None:
        super().__init__(f"There is no user {user_id}.", userId=user_id)


class UserIdTaken(Problem):
    """The next id for a new user is taken already.

    Users were imported with their ids, and the sequence of new ids was not moved past them. The
    operator moves it in the database: `SELECT setval(pg_get_serial_sequence('users', 'id'),
    max(id)) FROM users`. Then send the request again.
    """

    status, code, title = 409, "user-id-taken", "User id taken"
    sample: ClassVar = {"user_id": 2, "highest": 1000}
    decides = False

    def __init__(self, user_id: int, *, highest: int) -> None:
        super().__init__(
            f"New users get ids from {user_id} on, but ids are taken up to {highest}: "
            "the sequence of users.id has to be moved.",
            userId=user_id,
            highest=highest,
        )


class KeyNotFound(Problem):
    """Nothing is recorded under this idempotency key.

    No request with it has taken effect so far. If one may still be under way, send it again with
    the same key: then exactly one takes effect.
    """

    status, code, title = 404, "key-not-found", "Key not found"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("Nothing is recorded under this key.")


class InsufficientFunds(Problem):
    """What is available does not suffice for this withdrawal, transfer or hold.

    Nothing was changed. Ask for less, or deposit `shortfall` first. `balance`, `held`, `floor` and
    `version` are the state that refused it: `available` is the balance without what is held, and
    may not fall below the floor. With an `Idempotency-Key` the refusal is kept for 7 days; try
    again with a new key.
    """

    status, code, title = 409, "insufficient-funds", "Insufficient funds"
    sample: ClassVar = {
        "user_id": 1,
        "balance": 0,
        "held": 0,
        "floor": 0,
        "version": 5001,
        "amount": -2,
    }

    def __init__(  # noqa: PLR0913 - a state and an amount
        self, *, user_id: int, balance: int, held: int, floor: int, version: int, amount: int
    ) -> None:
        shortfall = floor - (balance - held + amount)
        has = f"User {user_id} has {balance}"
        if held:
            has += f", of which {held} is held"
        if floor:
            has += f", and may go down to {floor}"
        super().__init__(
            f"{has}; withdrawing {-amount} needs {shortfall} more.",
            **_state(user_id, balance, held, floor, version),
            amount=amount,
            shortfall=shortfall,
        )


class BalanceLimitExceeded(Problem):
    """The balance would pass 2^53-1, the largest integer that JSON carries exactly everywhere.

    Nothing was changed. Deposit at least `excess` less: it is the amount above the limit. `balance`
    and `version` are the state that refused it.
    """

    status, code, title = 409, "balance-limit-exceeded", "Balance limit exceeded"
    sample: ClassVar = {
        "user_id": 1,
        "balance": MAX_INTEGER,
        "held": 0,
        "floor": 0,
        "version": 2,
        "amount": 1,
    }

    def __init__(  # noqa: PLR0913 - a state and an amount
        self, *, user_id: int, balance: int, held: int, floor: int, version: int, amount: int
    ) -> None:
        excess = balance + amount - MAX_INTEGER
        super().__init__(
            f"User {user_id} has {balance}; {amount} more would pass the limit by {excess}.",
            **_state(user_id, balance, held, floor, version),
            amount=amount,
            excess=excess,
        )


class UserFrozen(Problem):
    """The account is frozen: no money moves into it or out of it.

    Nothing was changed. `PATCH /api/users/{userId}` with `{"frozen": false}` unfreezes it.
    Meanwhile it can be read, and its holds can be voided, and expire.
    """

    status, code, title = 409, "user-frozen", "User frozen"
    sample: ClassVar = {
        "user_id": 1,
        "balance": 9998,
        "held": 0,
        "floor": 0,
        "version": 2,
        "amount": -2,
    }

    def __init__(  # noqa: PLR0913 - a state and an amount
        self, *, user_id: int, balance: int, held: int, floor: int, version: int, amount: int
    ) -> None:
        super().__init__(
            f"User {user_id} is frozen.",
            **_state(user_id, balance, held, floor, version),
            amount=amount,
        )


class FloorNotCovered(Problem):
    """The account has less available than the new floor.

    Nothing was changed. Choose a floor of at most `available`.
    """

    status, code, title = 409, "floor-not-covered", "Floor not covered"
    sample: ClassVar = {"user_id": 1, "balance": 10, "held": 4, "version": 2, "floor": 7}

    def __init__(
        self, *, user_id: int | None, balance: int, held: int, version: int, floor: int
    ) -> None:
        """`user_id` is None for a user who would be created so."""
        who = "The new user" if user_id is None else f"User {user_id}"
        super().__init__(
            f"{who} has {balance - held} available, less than a floor of {floor}.",
            **_state(user_id, balance, held, floor, version),
        )


class ExternalIdTaken(Problem):
    """This external id belongs to another user.

    Nothing was changed. `GET /api/users?externalId=` finds that user.
    """

    status, code, title = 409, "external-id-taken", "External id taken"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("This externalId belongs to another user.")


class VersionConflict(Problem):
    """The account has changed since the entity tag in `If-Match` was read.

    Nothing was changed. Read the account, and decide again.
    """

    status, code, title = 412, "version-conflict", "Version conflict"
    sample: ClassVar = {"user_id": 1, "balance": 9998, "held": 0, "version": 2, "tag": "2.1.0"}

    def __init__(self, *, user_id: int, balance: int, held: int, version: int, tag: str) -> None:
        super().__init__(
            f'User {user_id} has the entity tag "{tag}", which If-Match does not name.',
            headers={"ETag": f'"{tag}"'},
            userId=user_id,
            balance=balance,
            held=held,
            available=balance - held,
            version=version,
        )


class PreconditionRequired(Problem):
    """Settings are changed only from a state that the request names.

    Nothing was changed. Read the account, and send its `ETag` as `If-Match`, so that nobody else's
    change is lost; `If-Match: *` changes whatever state it has.
    """

    status, code, title = 428, "precondition-required", "Precondition required"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("Send If-Match with the account's ETag, or with *.")


class EntryNotFound(Problem):
    """The user's ledger has no such entry.

    `GET /api/users/{userId}/entries` lists what there is.
    """

    status, code, title = 404, "entry-not-found", "Entry not found"
    sample: ClassVar = {"detail": "User 1 has no entry 3.", "user_id": 1}

    def __init__(self, detail: str, *, user_id: int) -> None:
        super().__init__(detail, userId=user_id)


class NotReversible(Problem):
    """This entry can't be reversed: it is a reversal itself, or moved nothing.

    Nothing was changed. What a reversal did is done again by a change or a transfer.
    """

    status, code, title = 409, "not-reversible", "Not reversible"
    sample: ClassVar = {"user_id": 1, "version": 3, "reverses": 2}

    def __init__(self, *, user_id: int, version: int, reverses: int | None) -> None:
        why = "moved nothing" if reverses is None else f"is the reversal of entry {reverses}"
        super().__init__(
            f"Entry {version} of user {user_id} {why}.",
            userId=user_id,
            version=version,
            reverses=reverses,
        )


class TransferNotFound(Problem):
    """There is no transfer with this id.

    `POST /api/transfers` makes one; the entries of both users name its id.
    """

    status, code, title = 404, "transfer-not-found", "Transfer not found"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("There is no such transfer.")


class HoldNotFound(Problem):
    """There is no hold with this id.

    `POST /api/holds` places one, `GET /api/users/{userId}/holds` lists a user's.
    """

    status, code, title = 404, "hold-not-found", "Hold not found"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("There is no such hold.")


class HoldEnded(Problem):
    """The hold has already ended, and a hold ends only once.

    Nothing was changed. `state` says how it ended, `captured` how much was withdrawn.
    """

    status, code, title = 409, "hold-ended", "Hold ended"
    sample: ClassVar = {
        "state": "captured",
        "ended_at": "2026-11-21T21:49:33.940623Z",
        "captured": 2,
    }

    def __init__(self, *, state: str, ended_at: object, captured: int | None = None) -> None:
        super().__init__(f"The hold is {state}.", state=state, endedAt=ended_at, captured=captured)


class CaptureExceedsHold(Problem):
    """A hold can't be captured beyond its amount.

    Nothing was changed. Capture at most `held`; withdraw the rest by a change.
    """

    status, code, title = 409, "capture-exceeds-hold", "Capture exceeds hold"
    sample: ClassVar = {"amount": 5, "held": 2}

    def __init__(self, *, amount: int, held: int) -> None:
        super().__init__(f"The hold is {held}, less than {amount}.", amount=amount, held=held)


class IdempotencyKeyReused(Problem):
    """This idempotency key belongs to another request: with different content, or another API key.

    Nothing was changed. Use a new key for every new request, and the same one only to repeat it.
    """

    status, code, title = 422, "idempotency-key-reused", "Idempotency key reused"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used before, by another request.")


def _state(
    user_id: int | None, balance: int, held: int, floor: int, version: int
) -> dict[str, Any]:
    return {
        "userId": user_id,
        "balance": balance,
        "held": held,
        "available": balance - held,
        "floor": floor,
        "version": version,
    }


def too_slow(seconds: float) -> Overloaded:
    """Return the problem of a request that was not decided within this time."""
    return Overloaded(
        f"Too many requests are waiting: this one was not reached within {seconds:g} s."
    )
