"""The exit codes, and how a command ends that could not do what was requested."""

from enum import IntEnum
from typing import Final

from balance_app.client import (
    InvalidRequest,
    InvalidURL,
    OutcomeUnknown,
    Refused,
    ServiceFailure,
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


def remote_error(failure: ServiceFailure) -> RemoteError:
    """Return how a command ends by a failure of the client."""
    sentence = str(failure)
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
        sentence, Code.WRONG if isinstance(failure, InvalidURL) else Code.UNAVAILABLE
    )
