"""The problems of requests that the state of an account or a key refuses."""

from typing import ClassVar

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
    """The balance is too small for this withdrawal.

    Nothing was changed. `balance` and `version` are the state that refused it, `shortfall` is the
    amount missing. With an `Idempotency-Key` the refusal is kept for 7 days; try again with a new
    key.
    """

    status, code, title = 409, "insufficient-funds", "Insufficient funds"
    sample: ClassVar = {"user_id": 1, "balance": 0, "version": 5001, "amount": -2}

    def __init__(self, *, user_id: int, balance: int, version: int, amount: int) -> None:
        shortfall = -(balance + amount)
        super().__init__(
            f"User {user_id} has {balance}; withdrawing {-amount} needs {shortfall} more.",
            userId=user_id,
            balance=balance,
            version=version,
            amount=amount,
            shortfall=shortfall,
        )


class BalanceLimitExceeded(Problem):
    """The balance would pass 2^53-1, the largest integer that JSON carries exactly everywhere.

    Nothing was changed. `balance` and `version` are the state that refused it, `excess` is the
    amount above the limit.
    """

    status, code, title = 409, "balance-limit-exceeded", "Balance limit exceeded"
    sample: ClassVar = {"user_id": 1, "balance": MAX_INTEGER, "version": 2, "amount": 1}

    def __init__(self, *, user_id: int, balance: int, version: int, amount: int) -> None:
        excess = balance + amount - MAX_INTEGER
        super().__init__(
            f"User {user_id} has {balance}; {amount} more would pass the limit by {excess}.",
            userId=user_id,
            balance=balance,
            version=version,
            amount=amount,
            excess=excess,
        )


class IdempotencyKeyReused(Problem):
    """This idempotency key belongs to a request with different content.

    Nothing was changed. Use a new key for every new request, and the same one only to repeat it.
    """

    status, code, title = 422, "idempotency-key-reused", "Idempotency key reused"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used before, with different content.")


def too_slow(seconds: float) -> Overloaded:
    """Return the problem of a request that was not decided within this time."""
    return Overloaded(f"Too slow: {seconds:g} s did not suffice for all requests before it.")
