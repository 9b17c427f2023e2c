"""The errors that the service answers with: problem details (RFC 9457), listed at `/problems`.

An error is a class. Its first docstring line says what happened, the rest what to do about it;
both are shown by `GET /problems/{code}` and on the docs page.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Self

from pydantic_core import to_json
from starlette.responses import Response
from typing_extensions import override

from balance_app.faults import Fault, fault, summary

Applied = Literal["no", "unknown"]
PROBLEM_JSON = "application/problem+json"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """The request failed or was refused.

    `applied` says whether the request may have changed something. It covers all tries under the
    request's idempotency key, not only this one. A request that only reads can't have changed
    anything, so its problems have no `applied`.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    # the arguments of an example for the docs page; None: the docstring's first sentence
    sample: ClassVar[Mapping[str, Any] | None] = None
    # the prefix of this service's paths behind a proxy; set by `main.create_app`
    root_path: ClassVar[str] = ""
    # False: the request was not decided. `detail` is the cause alone; in the answer to a request
    # that changes something, what `applied` means is added to it.
    decides: ClassVar[bool] = True
    applied: Applied = "no"

    def __init__(
        self, detail: str, *, headers: Mapping[str, str] | None = None, **members: object
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers
        self.members = members

    def __copy__(self) -> Self:
        """Return another one, for another request that the same failure answers."""
        other = type(self).__new__(type(self), *self.args)
        vars(other).update(vars(self))
        other.__cause__ = self.__cause__
        return other

    def under(self, key: str | None) -> None:
        """Make `applied` cover all tries with an idempotency key.

        When this try was not decided, an earlier one may still have had an effect.
        """
        if key is not None and not self.decides:
            self.applied = "unknown"

    def body(self, method: str = "POST") -> dict[str, Any]:
        """Return the problem object for a request of this method; equal ones give equal bytes."""
        reads = method in SAFE_METHODS
        detail = self.detail
        if not (self.decides or reads):
            detail += f" {_MEANS[self.applied]}"
        return {
            "type": self.address(),
            "title": self.title,
            "status": self.status,
            "detail": detail,
            "code": self.code,
            **self.members,
            **({} if reads else {"applied": self.applied}),
        }

    @classmethod
    def address(cls) -> str:
        """Return the path at which this kind is explained."""
        return f"{cls.root_path}/problems/{cls.code}"

    @classmethod
    def example(cls) -> Self:
        """Return one such problem for the docs page."""
        return cls(**({"detail": explain(cls)[0]} if cls.sample is None else cls.sample))

    def response(self, method: str = "POST") -> Response:
        """Return the answer that carries this problem, for a request of this method."""
        return Response(
            to_json(self.body(method)),
            status_code=self.status,
            headers=self.headers,
            media_type=PROBLEM_JSON,
        )


_MEANS: Final[dict[Applied, str]] = {
    "no": "Nothing was changed.",
    "unknown": "Whether anything was changed is not known.",
}


class MalformedRequest(Problem):
    """The request can't be read: it is not HTTP/1.1, or its body is not JSON in UTF-8.

    Nothing was changed. Send one Host header, and one JSON value encoded in UTF-8.
    """

    status, code, title = 400, "malformed-request", "Malformed request"


class InvalidRequest(Problem):
    """The request is wrong whatever the state: sending it again can't help.

    Nothing was changed. Correct what the sentences name, and send it again. In JSON `errors` lists
    each fault: `pointer` says where (a JSON Pointer into the body, or `header:`, `query:` or
    `path:` and a name), `code` says what, and `detail` what to send instead.
    """

    status, code, title = 422, "invalid-request", "Invalid request"

    def __init__(self, *errors: tuple[str, str] | Fault, sentence: str | None = None) -> None:
        """`sentence` replaces that of the first fault; it may repeat printable text."""
        faults = [each if isinstance(each, Fault) else fault(*each) for each in errors]
        if sentence is not None and faults:
            faults[0] = faults[0]._replace(detail=sentence)
        super().__init__(
            summary(faults) or "The request is not valid.",
            errors=[each._asdict() for each in faults],
        )

    @classmethod
    @override
    def example(cls) -> Self:
        return cls(("/amount", "not-an-integer"))


class NotFound(Problem):
    """There is nothing at this address.

    `/docs` lists what there is.
    """

    status, code, title = 404, "not-found", "Not found"


class MethodNotAllowed(Problem):
    """The address exists, but not for this method.

    The `Allow` header names the methods it has.
    """

    status, code, title = 405, "method-not-allowed", "Method not allowed"
    sample: ClassVar = {"methods": {"GET", "HEAD"}}

    def __init__(self, methods: Iterable[str]) -> None:
        allowed = ", ".join(sorted(methods))
        super().__init__(
            f"This address does not take this method, only {allowed}.", headers={"Allow": allowed}
        )


class NotAcceptable(Problem):
    """The client accepts none of the formats that this address has.

    `formats` lists them. Name one in `Accept`, or send none for the first.
    """

    status, code, title = 406, "not-acceptable", "Not acceptable"
    sample: ClassVar = {"formats": ("application/json", "text/csv", "application/jsonl")}

    def __init__(self, formats: Sequence[str]) -> None:
        super().__init__(
            f"There is only {', '.join(formats)} here.",
            headers={"Vary": "Accept"},
            formats=list(formats),
        )


class RequestTimeout(Problem):
    """The request did not arrive in time.

    Nothing was changed by it. Send the request again. With an `Idempotency-Key` `applied` is
    `unknown`: an earlier try with it may have had an effect.
    """

    status, code, title = 408, "request-timeout", "Request timeout"
    decides = False


class BodyTooLarge(Problem):
    """The body of the request is larger than 16 KiB.

    Nothing was changed. No request of this service needs as much.
    """

    status, code, title = 413, "body-too-large", "Body too large"


class HeadTooLarge(Problem):
    """The head of the request (its first line and its headers) is larger than 64 KiB.

    Nothing was changed. No request of this service needs as much.
    """

    status, code, title = 431, "head-too-large", "Request header fields too large"


class UnsupportedTransferCoding(Problem):
    """The body comes in a transfer coding other than `chunked`.

    Nothing was changed. Send the body as it is, with a `Content-Length` or in chunks.
    """

    status, code, title = 501, "unsupported-transfer-coding", "Unsupported transfer coding"


class UnsupportedMediaType(Problem):
    """The body is not declared as JSON.

    Nothing was changed. Send `Content-Type: application/json` (`curl --json` does).
    """

    status, code, title = 415, "unsupported-media-type", "Unsupported media type"


class DatabaseUnavailable(Problem):
    """The database can't be reached, or did not answer in time.

    `applied` says whether the request may have had an effect: `no`, or `unknown`; with an
    `Idempotency-Key` always `unknown`, as an earlier try with it may have had one; a request that
    only reads has no `applied`. Wait `Retry-After` seconds and send the request again; after
    `unknown` with the same `Idempotency-Key`, so that it takes effect once. `GET
    /api/users/{userId}/changes/{key}` shows a recorded outcome; while a try may still be under way,
    a missing one proves nothing.
    """

    status, code, title = 503, "database-unavailable", "Database unavailable"
    sample: ClassVar = {"detail": "The database can't be reached.", "applied": "no"}
    decides = False

    def __init__(self, detail: str, *, applied: Applied) -> None:
        super().__init__(detail, headers={"Retry-After": "1"})
        self.applied = applied


class Overloaded(Problem):
    """Too many requests are waiting: the service can't answer in time.

    Nothing was changed by it. Wait `Retry-After` seconds and send the request again. With an
    `Idempotency-Key` `applied` is `unknown`: an earlier try with it may have had an effect.
    """

    status, code, title = 503, "overloaded", "Overloaded"
    decides = False

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "1"})


class InternalError(Problem):
    """The service failed unexpectedly; its log has the details under the id in `X-Request-Id`.

    `applied` is `unknown` for a request that changes something. Please report it.
    """

    status, code, title = 500, "internal-error", "Internal error"
    sample: ClassVar = {}
    decides = False
    applied = "unknown"

    def __init__(self) -> None:
        super().__init__(
            "The service failed unexpectedly; its log has the details under this request's id."
        )


def all_problems() -> Iterator[type[Problem]]:
    """Yield every kind of problem this program can answer with, by status and code."""

    def below(kind: type[Problem]) -> Iterator[type[Problem]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    yield from sorted(below(Problem), key=lambda kind: (kind.status, kind.code))


def explain(kind: type[Problem]) -> tuple[str, str]:
    """Return what happened (one sentence) and what to do about it, from the class's docstring."""
    what, _, advice = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    return what, " ".join(advice.split())
