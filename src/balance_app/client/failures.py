"""What calls raise: one class per way in which a call can end without its answer."""

from typing import Any, Final, Literal

from pydantic.alias_generators import to_camel

Applied = Literal["no", "unknown"]


class ServiceFailure(Exception):  # noqa: N818 - the names of its subclasses are those of problems
    """A call did not get its answer; the text is a sentence for people."""


class InvalidURL(ServiceFailure):
    """This is not the URL of a service."""


class KeyNotSent(ServiceFailure):
    """The key is none, or others could read it on the way to this URL; nothing was sent."""


class NotTheService(ServiceFailure):
    """Something else answers at the URL."""


class Unavailable(ServiceFailure):
    """There is no answer, or the service can't do anything at present.

    `applied` is `"no"` where it is certain that no try of this call has changed anything. `answer`
    is the service's answer, as JSON; None: it sent none. `reached`: there was somebody to connect
    to. `retry_after` is in seconds.
    """

    def __init__(
        self,
        sentence: str,
        *,
        applied: Applied,
        reached: bool = True,
        answer: str | None = None,
        retry_after: float = 0,
    ) -> None:
        super().__init__(sentence)
        self.reached = reached
        self.applied = applied
        self.answer = answer
        self.retry_after = retry_after


class TooManyRequests(Unavailable):
    """The key, or wrong keys from this address, came too often: wait `retry_after` seconds.

    The request was not executed.
    """


class OutcomeUnknown(ServiceFailure):
    """It is not known whether the call took effect.

    The same call with the same `key` takes effect once, also later and from elsewhere, and
    `Service.outcome(user_id, key)` asks without sending it. Without a key (None) the call is one
    that takes effect once by itself: make it again.
    """

    def __init__(
        self, sentence: str, *, key: str | None, user_id: int | None, answer: str | None = None
    ) -> None:
        super().__init__(sentence)
        self.key = key
        self.user_id = user_id
        self.answer = answer


class IncompleteExport(ServiceFailure):
    """An export broke off: what came of it is no complete statement."""


class Refused(ServiceFailure):
    """The service answered with a problem, and nothing was changed.

    `code` is the problem's, explained at `/problems/{code}`; `members` is all of it, as JSON.
    Problems that have a class of their own have their members as attributes, too.
    """

    code: str = ""
    # an earlier try of the same call had no answer, and may have taken effect
    doubtful = False

    def __init__(self, problem: dict[str, Any], answer: str = "") -> None:
        super().__init__(str(problem.get("detail", "")))
        self.members = problem
        self.answer = answer
        self.status = int(problem.get("status") or 0)
        self.code = str(problem.get("code", ""))
        for name in attributes(type(self)):
            setattr(self, name, problem[to_camel(name)])


class Unauthorized(Refused):
    """The service needs a key, or this one is wrong, expired or revoked."""

    code = "unauthorized"


class InsufficientScope(Refused):
    """The key may not do this: it `needs` one of these scopes."""

    code = "insufficient-scope"
    needs: list[str]


class MisdirectedRequest(Refused):
    """The service asks for no keys, and is not known under the name in the URL (ALLOWED_HOSTS)."""

    code = "misdirected-request"


class _AccountRefused(Refused):
    """The state of an account refused: `available` may not fall below `floor`."""

    user_id: int
    balance: int
    held: int
    available: int
    floor: int
    version: int
    amount: int


class InsufficientFunds(_AccountRefused):
    """What is available does not suffice; `shortfall` is the amount missing."""

    code = "insufficient-funds"
    shortfall: int


class BalanceLimitExceeded(_AccountRefused):
    """The balance would pass 2^53-1, by `excess`."""

    code = "balance-limit-exceeded"
    excess: int


class UserFrozen(_AccountRefused):
    """The account is frozen: no money moves."""

    code = "user-frozen"


class FloorNotCovered(Refused):
    """The account has less available than the new floor."""

    code = "floor-not-covered"
    available: int
    floor: int


class VersionConflict(Refused):
    """The account has changed since its tag was read."""

    code = "version-conflict"
    user_id: int
    balance: int
    held: int
    available: int
    version: int


class ExternalIdTaken(Refused):
    """The external id belongs to another user."""

    code = "external-id-taken"


class HoldEnded(Refused):
    """The hold has ended before: `state` is captured, voided or expired."""

    code = "hold-ended"
    state: str
    captured: int | None


class CaptureExceedsHold(Refused):
    """A hold can't be captured beyond its amount, `held`."""

    code = "capture-exceeds-hold"
    amount: int
    held: int


class NotReversible(Refused):
    """The entry is a reversal itself, or moved nothing."""

    code = "not-reversible"


class UserNotFound(Refused):
    """There is no such user."""

    code = "user-not-found"
    user_id: int


class EntryNotFound(Refused):
    """There is no such entry, or none so early."""

    code = "entry-not-found"


class TransferNotFound(Refused):
    """There is no such transfer."""

    code = "transfer-not-found"


class HoldNotFound(Refused):
    """There is no such hold."""

    code = "hold-not-found"


class KeyNotFound(Refused):
    """Nothing is recorded under the key: no request with it has taken effect so far."""

    code = "key-not-found"


class IdempotencyKeyReused(Refused):
    """The key belongs to a request with other content."""

    code = "idempotency-key-reused"


class InvalidRequest(Refused):
    """The request is wrong whatever the state; `errors` lists each fault."""

    code = "invalid-request"
    errors: list[dict[str, str]]


# The request was refused before the service looked whether an earlier try was accepted.
NOT_ADMITTED: Final = frozenset({401, 403, 421, 429})
# By a later state of the account another try of the same request may be accepted.
ACCOUNT_REFUSED: Final = _AccountRefused


def attributes(kind: type[Refused]) -> list[str]:
    """Return the members that a kind of refusal declares."""
    return [
        name
        for each in kind.__mro__
        if each is not Refused and issubclass(each, Refused)
        for name in vars(each).get("__annotations__", {})
    ]


def _kinds(kind: type[Refused]) -> dict[str, type[Refused]]:
    found = {kind.code: kind} if kind.code else {}
    for each in kind.__subclasses__():
        found |= _kinds(each)
    return found


_KINDS: Final[dict[str, type[Refused]]] = _kinds(Refused)


def refusal(problem: dict[str, Any], answer: str) -> Refused:
    """Return the error for a problem; a plain `Refused` for one that this client does not know."""
    kind = _KINDS.get(str(problem.get("code")), Refused)
    if any(to_camel(name) not in problem for name in attributes(kind)):
        kind = Refused
    return kind(problem, answer)
