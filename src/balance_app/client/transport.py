"""Sends requests to the service at one URL until they are answered.

Nothing here logs a request. A password in the URL and the key are sent as they should be, and shown
nowhere.
"""

import asyncio
import ipaddress
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, Final, TypeVar

import httpx
from pydantic_core import from_json

from balance_app.client.answers import Received
from balance_app.client.failures import (
    ACCOUNT_REFUSED,
    NOT_ADMITTED,
    Applied,
    InvalidURL,
    KeyNotSent,
    NotTheService,
    OutcomeUnknown,
    Refused,
    ServiceFailure,
    TooManyRequests,
    Unavailable,
    refusal,
)
from balance_app.formatting import visible

Got = TypeVar("Got")

CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 10.0
CHANGE_SECONDS: Final = 30.0  # a change may wait in a queue before it is made
FIRST_WAIT_SECONDS: Final = 0.1
LONGEST_WAIT_SECONDS: Final = 5.0

_TOO_MANY_REQUESTS: Final = 429
_RETRIABLE: Final = frozenset({408, _TOO_MANY_REQUESTS, 503})
# what HTTP calls a token68 or a word
_KEY: Final = re.compile("[!-~]{1,1000}")
_TAG: Final = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """A request whose answer is a JSON object that has the member `has` (None: any).

    `user_id` is the user to whom its `key` belongs. `tag` is sent as `If-Match`.
    """

    method: str
    path: str
    has: str | None
    params: Mapping[str, str | int | None] | None = None
    json: object = None
    key: str | None = None
    user_id: int | None = None
    tag: str | None = None
    media_type: str = "application/json"

    @property
    def reads(self) -> bool:
        """Whether it changes nothing."""
        return self.method == "GET"

    @property
    def headers(self) -> dict[str, str]:
        """Its own headers."""
        sent = {"Accept": self.media_type, "Idempotency-Key": self.key, "If-Match": self.tag}
        return {name: value for name, value in sent.items() if value is not None}


class Transport:
    """The connections to the service at one URL."""

    def __init__(  # noqa: PLR0913 - the options of the service
        self,
        url: str,
        *,
        key: str | None,
        patience: float,
        timeout: float | None,
        http: httpx.AsyncClient | None,
        on_retry: Callable[[Unavailable], None] | None,
    ) -> None:
        self.url, self._auth = split_url(url)
        if key is None and http is None and self._auth is httpx.USE_CLIENT_DEFAULT:
            key = os.environ.get("BALANCE_APP_KEY")
        self._headers = _authorization(key, self.url, self._auth, checked=http is None)
        self._patience = patience
        self._timeout = timeout
        self._on_retry = on_retry
        self._http = http
        self._is_ours = http is None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None and self._is_ours:
            await self._http.aclose()
            self._http = None

    async def send(self, call: Call) -> Received:
        """Send a request until it is answered.

        No try begins later than `patience` seconds after the first one.

        Raises:
            Refused: with a problem, which is certain.
            OutcomeUnknown: there was no certain answer; one of the tries may have had an effect.
            Unavailable, NotTheService: the same, but none had.
        """
        return await self._retry(call, lambda: self._try(call))

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        media_type: str,
        params: Mapping[str, str | int | None] | None = None,
        *,
        silence_seconds: float = CHANGE_SECONDS,
    ) -> AsyncIterator[httpx.Response]:
        """Open an answer that is read piece by piece; reading ends after so long a silence.

        Raises:
            Refused, Unavailable, NotTheService: it is not that; also within the block.
        """
        call = Call("GET", path, None, params, media_type=media_type)
        answer = await self._retry(call, lambda: self._open(call, silence_seconds))
        try:
            with self._reporting(call):
                yield answer
        finally:
            await answer.aclose()

    async def _retry(self, call: Call, attempt: Callable[[], Awaitable[Got]]) -> Got:
        deadline = time.monotonic() + self._patience
        doubtful = False
        for number in count():
            try:
                return await attempt()
            except Unavailable as error:
                doubtful = doubtful or error.applied == "unknown"
                error.applied = "unknown" if doubtful else "no"
                wait = _wait_seconds(number, error.retry_after)
                if time.monotonic() + wait > deadline:
                    if doubtful:
                        raise _unknown(call, error) from error
                    raise
                if self._on_retry is not None:
                    self._on_retry(error)
                await asyncio.sleep(wait)
            except Refused as error:
                error.doubtful = doubtful
                # Without a key to record it, a refusal by the state is one of this try alone; so is
                # one that came before the service looked for a record.
                of_this_try = error.status in NOT_ADMITTED or (
                    call.key is None and isinstance(error, ACCOUNT_REFUSED)
                )
                if doubtful and of_this_try:
                    raise _unknown(call, error) from error
                raise
            except NotTheService as error:
                if doubtful:
                    raise _unknown(call, error) from error
                raise
        raise AssertionError("the tries do not end")

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            # The authorities take as long to load as all else that a short command does.
            self._http = httpx.AsyncClient(
                trust_env=False, verify=self.url.startswith("https:"), limits=_LIMITS
            )
        return self._http

    async def _try(self, call: Call) -> Received:
        """Send a request once; return its answer."""
        seconds = self._timeout or (READ_SECONDS if call.reads else CHANGE_SECONDS)
        with self._reporting(call):
            async with asyncio.timeout(2 * seconds):  # httpx limits each part alone
                answer = await self._send(call, seconds)
        body = _object(answer.content)
        if not answer.is_success or not (body if call.has is None else call.has in body):
            raise self._failure(call, answer)
        tag = _TAG.fullmatch(answer.headers.get("etag", ""))
        return Received(
            body,
            answer.text,
            _date(answer),
            answer.headers.get("idempotent-replayed") == "true",
            tag[1] if tag else None,
        )

    async def _open(self, call: Call, silence_seconds: float) -> httpx.Response:
        """Send a request once; return its answer, of which only the head is read."""
        with self._reporting(call):
            answer = await self._send(call, silence_seconds, stream=True)
            media_type = answer.headers.get("content-type", "").partition(";")[0]
            if answer.is_success and media_type == call.media_type:
                return answer
            try:
                await answer.aread()
            finally:
                await answer.aclose()
        raise self._failure(call, answer)

    async def _send(self, call: Call, seconds: float, *, stream: bool = False) -> httpx.Response:
        http = self._client()
        given = (call.params or {}).items()
        request = http.build_request(
            call.method,
            self.url + call.path,
            params={name: value for name, value in given if value is not None},
            json=call.json,
            headers={**self._headers, **call.headers},
            timeout=httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
        )
        return await http.send(request, stream=stream, auth=self._auth, follow_redirects=False)

    @contextmanager
    def _reporting(self, call: Call) -> Iterator[None]:
        """Raise Unavailable where there is no answer."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            reason = _reason(error)
            sentence = visible(f"No answer from {self.url}: {reason.rstrip('.')}.")
            sent = not isinstance(error, _UNSENT)
            applied: Applied = "unknown" if sent and not call.reads else "no"
            raise Unavailable(sentence, applied=applied, reached=sent) from error

    def _failure(self, call: Call, answer: httpx.Response) -> ServiceFailure:
        """Return the error for an answer that is not the one that was asked for."""
        body, status = _object(answer.content), answer.status_code
        retry_after = _retry_after(answer)
        if not _is_problem(body, call):
            sentence = f"The server at {self.url} is not this service: status {status}."
            # A proxy that lost the service can't say whether a request was executed.
            if answer.is_server_error and not call.reads:
                return Unavailable(sentence, applied="unknown", retry_after=retry_after)
            if answer.is_server_error or status in _RETRIABLE:
                return Unavailable(sentence, applied="no", retry_after=retry_after)
            return NotTheService(sentence)
        detail = body["detail"]
        # There `applied` covers earlier calls with the key, of which this one knows nothing.
        unknown = body.get("applied") == "unknown" and status not in NOT_ADMITTED
        if unknown or status in _RETRIABLE:
            kind = TooManyRequests if status == _TOO_MANY_REQUESTS else Unavailable
            return kind(
                visible(f"{self.url} answers {status}: {detail}"),
                applied="unknown" if unknown else "no",
                answer=answer.text,
                retry_after=retry_after,
            )
        return refusal({**body, "detail": visible(detail)}, answer.text)


_LIMITS: Final = httpx.Limits(max_connections=100, max_keepalive_connections=20)
_UNSENT: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
)


def split_url(url: str) -> tuple[str, Any]:
    """Return a service's URL, and apart from it the user and password that are in it."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL:
        parsed = httpx.URL()
    is_one = parsed.scheme in {"http", "https"} and parsed.host
    # With a / in a password its rest would be a path, and its beginning the host or the port.
    if not is_one or parsed.query or parsed.fragment or b"@" in parsed.raw_path:
        hint = ", and a / in a password as %2F" if "@" in url else ""
        raise InvalidURL(
            f"{without_user(url)} is not the URL of a service: write it like "
            f"http://127.0.0.1:3000{hint}."
        )
    auth = httpx.BasicAuth(parsed.username, parsed.password) if parsed.userinfo else None
    return str(parsed.copy_with(userinfo=b"")).rstrip("/"), auth or httpx.USE_CLIENT_DEFAULT


def without_user(url: str) -> str:
    """Return a URL for people: without the user and password in it, even if it is wrong."""
    return visible(re.sub(r"\A(\w+:/+)?.*@", r"\1", url, flags=re.DOTALL))


def _authorization(key: str | None, url: str, auth: object, *, checked: bool) -> dict[str, str]:
    """Return the header with which a key is sent; none without one.

    Raises:
        KeyNotSent: it can't be sent, or, if `checked`, others could read it.
    """
    if not key:
        return {}
    if not _KEY.fullmatch(key):
        raise KeyNotSent("The key is none of this service: it is one word of visible characters.")
    if auth is not httpx.USE_CLIENT_DEFAULT:
        raise KeyNotSent("A URL with a user and a password leaves no room for a key: omit one.")
    if checked and not is_private(url):
        raise KeyNotSent(
            f"The key is not sent to {visible(url)}, others could read it on the way: use https."
        )
    return {"Authorization": f"Bearer {key}"}


def is_private(url: str) -> bool:
    """Return whether nobody can read what is sent to a URL: by TLS, or within this machine."""
    parsed = httpx.URL(url)
    if parsed.scheme == "https" or parsed.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(parsed.host).is_loopback
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    """Return what the system said, or else the library: the former is deep among the causes."""
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return "no answer in time"
    reason = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, OSError) and cause.strerror:
            # asyncio has its own words for what has a number
            number = cause.errno or 0
            reason = os.strerror(number) if number > 0 else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return reason


def _unknown(call: Call, error: Unavailable | Refused | NotTheService) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"{error} It is not known whether it was done.",
        key=call.key,
        user_id=call.user_id,
        answer=None if isinstance(error, NotTheService) else error.answer,
    )


def _wait_seconds(attempt: int, retry_after: float) -> float:
    """Return how long to wait before the next try: at random, so that not all come at once."""
    wait = max(retry_after, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(attempt, 10)))
    return max(retry_after, wait / 2) + random.uniform(0, wait / 2)


def _retry_after(answer: httpx.Response) -> float:
    text: str = answer.headers.get("retry-after", "")
    return float(text) if re.fullmatch("[0-9]{1,9}", text) else 0.0


def _object(text: bytes | str) -> dict[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    try:
        body = from_json(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _is_problem(body: dict[str, Any], call: Call) -> bool:
    """Return whether an answer's body is a problem of the service.

    Gateways and other programs have a `detail`, too. The service's problems have a `code`, and say
    to what changes something whether it was applied.
    """
    is_one = all(isinstance(body.get(name), str) for name in ("detail", "code"))
    return is_one and (call.reads or body.get("applied") in ("no", "unknown"))


def _date(answer: httpx.Response) -> datetime:
    """Return the service's time; its clock may differ from this machine's."""
    try:
        return parsedate_to_datetime(answer.headers["date"]).astimezone(UTC)
    except (KeyError, ValueError):
        return datetime.now(UTC)
