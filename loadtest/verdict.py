"""Checks the answers, the user and the entries against arithmetic.

The service decides the requests in some order; each accepted one makes the next version. So with
version `v0` and balance `b0` before the burst, version v can only have the balance
`b0 + amount * (v - v0)`. Every check here applies this rule, or compares a count.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice

from pydantic import ValidationError

from loadtest.accounts import MAX_INTEGER, Account, Entry, Ledger, Model, ServiceModel
from loadtest.burst import Answer, NoAnswer, Outcome
from loadtest.preconditions import CannotRunError

_EXAMPLES_SHOWN = 3
_INSUFFICIENT_FUNDS = "insufficient-funds"


class Refusal(ServiceModel):
    """The body of an insufficient-funds problem: the state that refused, and the shortfall."""

    code: str
    user_id: int
    balance: int
    version: int
    amount: int
    shortfall: int
    applied: str
    held: int = 0
    floor: int = 0


class Problem(ServiceModel):
    """Any problem body, read for its code only."""

    code: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """The result of `requests` changes of `amount` on a user that no other client changes.

    Raises:
        CannotRunError: other refusals than for insufficient funds are right, too.
    """

    before: Account
    amount: int
    requests: int

    def __post_init__(self) -> None:
        """Refuse a user whose changes the arithmetic here can't predict."""
        user = f"User {self.before.user_id}"
        if self.before.frozen:
            raise CannotRunError(f"{user} is frozen, and refuses every change: unfreeze it first.")
        if self.before.balance + max(0, self.amount) * self.requests > MAX_INTEGER:
            raise CannotRunError(
                f"{user} has {self.before.balance}, and {self.requests} deposits of {self.amount} "
                "would pass the largest balance, 2^53-1: deposit less."
            )

    @property
    def accepted(self) -> int:
        """Return how many must be accepted."""
        if self.amount > 0:
            return self.requests
        return min(self.requests, self.before.spendable // -self.amount)

    @property
    def refused(self) -> int:
        """Return how many must be refused."""
        return self.requests - self.accepted

    @property
    def versions(self) -> range:
        """Return the versions that the user has had, from before the burst to after it."""
        return range(self.before.version, self.before.version + self.accepted + 1)

    @property
    def balance(self) -> int:
        """Return the balance after the burst."""
        return self.balance_at(self.before.version + self.accepted)

    def balance_at(self, version: int) -> int:
        """Return the only balance that this version can have."""
        return self.before.balance + self.amount * (version - self.before.version)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The counts of a burst; `problems` are sentences, empty exactly when all is right.

    `others` counts by status and problem code, or by the reason for no answer. `balance` and
    `new_entries` are None when they could not be read.
    """

    accepted: int
    refused: int
    others: Counter[str]
    balance: int | None
    new_entries: int | None
    problems: list[str]

    @property
    def passed(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems


def evaluate(
    expected: Expectation, outcomes: Sequence[Outcome], ledger: Ledger | CannotRunError
) -> Verdict:
    """Compare the outcomes and the ledger (or why it could not be read) with the expectation."""
    accepted: list[Account] = []
    refused: list[Refusal] = []
    others: Counter[str] = Counter()
    for outcome in outcomes:
        match classify(outcome):
            case Account() as acceptance:
                accepted.append(acceptance)
            case Refusal() as refusal:
                refused.append(refusal)
            case str() as other:
                others[other] += 1
    problems = [
        *_wrong_counts(expected, len(accepted), len(refused), others),
        *_wrong_acceptances(expected, accepted),
        *_wrong_refusals(expected, refused),
    ]
    balance = new_entries = None
    if isinstance(ledger, CannotRunError):
        problems.append(f"The state after the burst could not be read: {ledger}")
    else:
        balance, new_entries = ledger.account.balance, len(ledger.new_entries)
        problems += _wrong_account(expected, ledger.account)
        problems += _wrong_entries(expected, ledger.new_entries, accepted)
    return Verdict(len(accepted), len(refused), others, balance, new_entries, problems)


def classify(outcome: Outcome) -> Account | Refusal | str:
    """Return the state that accepted or refused a request, or in words how else it ended."""
    match outcome:
        case NoAnswer(reason):
            return reason
        case Answer(status=HTTPStatus.OK, body=body):
            acceptance = _parsed(Account, body)
            return acceptance or "200 with a body that is no acceptance"
        case Answer(status=status, body=body):
            refusal = _parsed(Refusal, body) if status == HTTPStatus.CONFLICT else None
            if refusal is not None and refusal.code == _INSUFFICIENT_FUNDS:
                return refusal
            problem = _parsed(Problem, body)
            return f"{status} {problem.code if problem else 'without a problem code'}"


def _wrong_counts(
    expected: Expectation, accepted: int, refused: int, others: Counter[str]
) -> Iterator[str]:
    if accepted != expected.accepted:
        yield f"{accepted} were accepted instead of {expected.accepted}."
    if refused != expected.refused:
        yield f"{refused} were refused for insufficient funds instead of {expected.refused}."
    for kind, count in others.most_common():
        yield f"{count} ended otherwise: {kind}."


def _wrong_acceptances(expected: Expectation, accepted: list[Account]) -> Iterator[str]:
    first = expected.before.version + 1
    versions = [acceptance.version for acceptance in accepted]
    yield from _gaps_and_repeats("Accepted answers", versions, range(first, first + len(versions)))
    yield from _some(
        "accepted answers contradict the chain of balances",
        (
            f"version {acceptance.version} of user {acceptance.user_id} with balance "
            f"{acceptance.balance}, not {expected.balance_at(acceptance.version)}"
            for acceptance in accepted
            if acceptance.balance != expected.balance_at(acceptance.version)
            or acceptance.user_id != expected.before.user_id
        ),
    )


def _wrong_refusals(expected: Expectation, refused: list[Refusal]) -> Iterator[str]:
    yield from _some(
        "refusals do not prove themselves",
        (
            f"balance {refusal.balance} at version {refusal.version}, amount {refusal.amount}, "
            f"held {refusal.held}, floor {refusal.floor}, shortfall {refusal.shortfall}, "
            f"applied {refusal.applied!r}"
            for refusal in refused
            if not _proves_itself(expected, refusal)
        ),
    )


def _proves_itself(expected: Expectation, refusal: Refusal) -> bool:
    before = expected.before
    after = refusal.balance - refusal.held + refusal.amount
    return (
        after < refusal.floor
        and refusal.shortfall == refusal.floor - after
        and refusal.applied == "no"
        and refusal.amount == expected.amount
        and refusal.user_id == before.user_id
        and (refusal.held, refusal.floor) == (before.held, before.floor)
        # Past the last version the chain of balances goes on below what may be withdrawn.
        and refusal.version in expected.versions
        and refusal.balance == expected.balance_at(refusal.version)
    )


def _wrong_account(expected: Expectation, after: Account) -> Iterator[str]:
    before = expected.before
    if after.balance != expected.balance:
        yield f"The final balance is {after.balance} instead of {expected.balance}."
    version = expected.versions[-1]
    if after.version != version:
        yield f"The final version is {after.version} instead of {version}."
    if (after.held, after.floor, after.frozen) != (before.held, before.floor, before.frozen):
        yield (
            f"A hold ended or settings changed meanwhile: held {after.held}, floor {after.floor}, "
            f"frozen {after.frozen} instead of {before.held}, {before.floor}, {before.frozen}."
        )


def _wrong_entries(
    expected: Expectation, entries: list[Entry], accepted: list[Account]
) -> Iterator[str]:
    if len(entries) != expected.accepted:
        yield f"There are {len(entries)} new entries instead of {expected.accepted}."
    first = expected.before.version + 1
    versions = [entry.version for entry in entries]
    yield from _gaps_and_repeats("New entries", versions, range(first, first + len(versions)))
    yield from _some(
        "entries contradict the chain of balances",
        (
            f"version {entry.version} with amount {entry.amount} and balance {entry.balance}"
            for entry in entries
            if entry.amount != expected.amount
            or entry.balance != expected.balance_at(entry.version)
        ),
    )
    lost = {acceptance.version for acceptance in accepted} - set(versions)
    yield from _some(
        "acknowledged changes have no entry", (f"version {version}" for version in sorted(lost))
    )


def _gaps_and_repeats(what: str, versions: list[int], dense: range) -> Iterator[str]:
    repeated = [version for version, times in Counter(versions).items() if times > 1]
    if repeated:
        yield f"{what} share a version, as {repeated[0]}; {len(repeated)} versions are repeated."
    strays = set(versions).difference(dense)
    if strays:
        yield (
            f"{what} skip a version: {min(strays)} lies outside "
            f"{dense.start} to {dense.stop - 1}, which {len(versions)} of them must fill."
        )


def _some(what: str, examples: Iterable[str]) -> Iterator[str]:
    """Yield one sentence that counts the examples and shows the first few, if there are any."""
    remaining = iter(examples)
    shown = list(islice(remaining, _EXAMPLES_SHOWN))
    if shown:
        count = len(shown) + sum(1 for _ in remaining)
        yield f"{count} {what}: {'; '.join(shown)}{' and others' if count > len(shown) else ''}."


def _parsed(model: type[Model], body: bytes) -> Model | None:
    try:
        return model.model_validate_json(body)
    except ValidationError:
        return None
