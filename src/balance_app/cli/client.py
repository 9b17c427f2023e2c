"""An HTTP client of a running service, and the errors for its refusals.

It knows the service by its HTTP contract alone, as any client does.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import IntEnum
from typing import Any, Final, NamedTuple

import httpx
from pydantic_core import from_json

from balance_app.formatting import visible

TIMEOUT_SECONDS: Final = 10.0
STREAM_SECONDS: Final = 5.0  # an event comes every second
RETRY_SECONDS: Final = 1.0
CHANGE_SECONDS: Final = 30.0  # a change may wait in a queue before it is made

_BY_THE_BALANCE: Final = {"insufficient-funds", "balance-limit-exceeded"}


class Code(IntEnum):
    """The program's exit codes."""

    DONE = 0
    FAILED = 1
    WRONG = 2
    UNAVAILABLE = 3
    REFUSED = 4
    UNKNOWN = 5


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


class Answer(NamedTuple):
    """An answer of the service; `now` is the service's time, `replayed`: it repeats the first."""

    body: dict[str, Any]
    text: str
    now: datetime
    replayed: bool


class Event(NamedTuple):
    """An event: the service's `status`, `unavailable` with a problem, or the client's `broken`."""

    kind: str
    body: dict[str, Any]
    text: str


class Service:
    """The service at one URL.

    Every method raises RemoteError when nobody answers, or the answer is an error.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise RemoteError(
                f"{url} is not the URL of a service: write it like http://127.0.0.1:3000.",
                Code.WRONG,
            )
        # The authorities take as long to load as all else that a short command does.
        self._verify = parsed.scheme == "https"

    def get(
        self,
        path: str,
        has: str,
        params: Mapping[str, str | int | None] | None = None,
        *,
        seconds: float = TIMEOUT_SECONDS,
    ) -> Answer:
        """Read something: a JSON object that has this member."""
        with self._reporting_failure(Code.UNAVAILABLE):
            answer = httpx.get(
                self.url + path,
                params=_given(params),
                timeout=seconds,
                trust_env=False,
                verify=self._verify,
            )
        return self._read(answer, has)

    def send(  # noqa: PLR0913 - the parts of a request
        self,
        method: str,
        path: str,
        has: str,
        *,
        params: Mapping[str, str | int | None] | None = None,
        json: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Change something; the answer is a JSON object that has this member."""
        with self._reporting_failure(Code.UNKNOWN):
            answer = httpx.request(
                method,
                self.url + path,
                params=_given(params),
                json=json,
                headers=headers,
                timeout=httpx.Timeout(CHANGE_SECONDS, connect=TIMEOUT_SECONDS),
                trust_env=False,
                verify=self._verify,
            )
        return self._read(answer, has)

    def events(self) -> Iterator[Event]:
        """Yield the events of the stream until it ends."""
        with (
            self._reporting_failure(Code.UNAVAILABLE),
            httpx.stream(
                "GET",
                f"{self.url}/api/cron/events",
                timeout=STREAM_SECONDS,
                trust_env=False,
                verify=self._verify,
            ) as answer,
        ):
            if not answer.is_success or not _is(answer, "text/event-stream"):
                answer.read()
                raise self._refusal(answer)
            kind, data = "", ""
            for line in answer.iter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    kind = value
                elif field == "data":
                    data += value
                elif not line and data:
                    yield Event(kind, _object(data), data)
                    kind, data = "", ""

    def follow(self) -> Iterator[Event]:
        """Yield the events for ever; between two streams `broken`, with a `detail` that says so."""
        while True:
            message = "The stream ended."
            try:
                yield from self.events()
            except RemoteError as error:
                message = str(error)
            yield Event("broken", {"detail": f"{message} Reconnecting."}, "")
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def _reporting_failure(self, unclear: Code) -> Iterator[None]:
        """Raise RemoteError without an answer; `unclear`: its code if the request may be sent."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            if isinstance(error, httpx.TimeoutException):
                reason = "no answer in time."
            else:
                reason = str(error).partition("] ")[2] or str(error) or type(error).__name__
                reason = f"{reason.rstrip('.')}."
            code = Code.UNAVAILABLE if unsent else unclear
            if code is Code.UNKNOWN:
                reason = f"{reason.rstrip('.')}; whether it was done is not known."
            raise RemoteError(f"Nobody answers at {self.url}: {reason}", code) from None

    def _read(self, answer: httpx.Response, has: str) -> Answer:
        body = _object(answer.content)
        if not answer.is_success or has not in body:
            raise self._refusal(answer)
        replayed = answer.headers.get("idempotent-replayed") == "true"
        return Answer(body, answer.text, _date(answer), replayed)

    def _refusal(self, answer: httpx.Response) -> RemoteError:
        """Return the error for an answer that can't be used."""
        body, status = _object(answer.content), answer.status_code
        detail, code = body.get("detail"), body.get("code")
        if not isinstance(detail, str):
            # A proxy that lost the service can't say whether a request was executed.
            broke = answer.is_server_error and answer.request.method != "GET"
            return RemoteError(
                f"The server at {self.url} is not this service: status {status}.",
                Code.UNKNOWN if broke else Code.UNAVAILABLE,
            )
        if code in _BY_THE_BALANCE:
            exit_code, message = Code.REFUSED, f"Refused: {detail} Nothing was changed."
        elif body.get("applied") == "unknown":
            exit_code, message = Code.UNKNOWN, f"{self.url} answers {status}: {detail}"
        elif status == httpx.codes.SERVICE_UNAVAILABLE:
            exit_code, message = Code.UNAVAILABLE, f"{self.url} answers {status}: {detail}"
        else:
            exit_code, message = Code.WRONG if code == "invalid-request" else Code.FAILED, detail
        return RemoteError(message, exit_code, answer=answer.text, problem=code)


def _given(params: Mapping[str, str | int | None] | None) -> dict[str, str | int]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _object(text: bytes | str) -> dict[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    try:
        body = from_json(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _is(answer: httpx.Response, media_type: str) -> bool:
    return bool(answer.headers.get("content-type", "").startswith(media_type))


def _date(answer: httpx.Response) -> datetime:
    """Return the service's time; its clock may differ from this machine's."""
    try:
        return parsedate_to_datetime(answer.headers["date"]).astimezone(UTC)
    except (KeyError, ValueError):
        return datetime.now(UTC)
