"""The exit codes, and how a command ends that could not do what was requested."""

from enum import IntEnum
from typing import Final

from balance_app.cli.credentials import Credential
from balance_app.client import (
    InsufficientScope,
    InvalidRequest,
    InvalidURL,
    KeyNotSent,
    OutcomeUnknown,
    Refused,
    ServiceFailure,
    Unauthorized,
    Unavailable,
)
from balance_app.formatting import visible


class Code(IntEnum):
    """The program's exit codes."""

    DONE = 0
    FAILED = 1
    WRONG = 2
    UNAVAILABLE = 3
    REFUSED = 4
    UNKNOWN = 5
    # of `status`, as others are of what went wrong with a command
    RECOVERED = 6
    NEEDS_A_HAND = 7


# Problems by the state of an account or a hold.
_BY_THE_STATE: Final = frozenset(
    {
        "insufficient-funds",
        "balance-limit-exceeded",
        "user-frozen",
        "floor-not-covered",
        "hold-ended",
        "capture-exceeds-hold",
        "not-reversible",
    }
)


class RemoteError(Exception):
    """The service did not do what was requested; the message is a sentence for the user.

    `answer` is the service's answer, as JSON, and `problem` the code in it; None: it sent none.
    """

    def __init__(
        self, sentence: str, code: Code, *, answer: str | None = None, problem: str | None = None
    ) -> None:
        super().__init__(visible(sentence))
        self.code = code
        self.answer = answer
        self.problem = problem


def remote_error(failure: ServiceFailure, credential: Credential | None = None) -> RemoteError:
    """Return how a command ends by a failure of the client; its key was this one."""
    sentence = str(failure)
    if credential is not None:
        sentence += _advice(failure, credential)
    if isinstance(failure, Refused):
        code = Code.WRONG if isinstance(failure, InvalidRequest) else Code.FAILED
        if failure.code in _BY_THE_STATE:
            code, sentence = Code.REFUSED, f"Refused: {sentence} Nothing was changed."
        return RemoteError(sentence, code, answer=failure.answer, problem=failure.code)
    if isinstance(failure, OutcomeUnknown):
        return RemoteError(sentence, Code.UNKNOWN, answer=failure.answer)
    if isinstance(failure, Unavailable):
        return RemoteError(sentence, Code.UNAVAILABLE, answer=failure.answer)
    return RemoteError(
        sentence,
        Code.WRONG if isinstance(failure, InvalidURL | KeyNotSent) else Code.UNAVAILABLE,
    )


def _advice(failure: ServiceFailure, credential: Credential) -> str:
    """Return what helps against a refusal of the key, as further sentences."""
    if isinstance(failure, Unauthorized):
        return (
            f" It was that of {credential.origin}." if credential.key else f" {credential.origin}"
        )
    if isinstance(failure, InsufficientScope):
        scopes = " or ".join(f"--scope {each}" for each in failure.needs)
        return (
            f" It was that of {credential.origin}; the operator creates one that has it: "
            f"`balance-app keys create NAME {scopes}`."
        )
    return ""
