"""The receivers of alerts and pings: what is sent to them, and what their answers mean.

An URL is a secret: who has it can write there. No text of this module has more of it than the host.
"""

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import urlsplit

from pydantic_core import to_json

from balance_app import __version__
from balance_app.formatting import duration, exact
from balance_app.maintenance.alerting.events import Event

if TYPE_CHECKING:
    import httpx

POST_SECONDS: Final = 5.0
HEADERS: Final = {"User-Agent": f"balance_app/{__version__}"}
Phase = Literal["start", "success", "fail"]


class NotAcceptedError(Exception):
    """A receiver has not accepted what was sent; the message says why, in a few words."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Receivers:
    """Sends to receivers, one request at a time for each call."""

    def __init__(self) -> None:
        self._http: httpx.AsyncClient | None = None

    async def post(self, url: str, event: Event, body: bytes) -> None:
        """Send an event.

        Raises:
            NotAcceptedError: there was no answer, or no 2xx.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(event.id)}
        await self._send("POST", url, headers, body)

    async def ping(self, url: str, phase: Phase) -> None:
        """Report that something starts, has succeeded or failed: URL/start, URL, URL/fail.

        Raises:
            NotAcceptedError: there was no answer, or no 2xx.
        """
        await self._send("GET", url, {}, None, phase)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    async def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
        phase: Phase = "success",
    ) -> None:
        import httpx  # noqa: PLC0415 - imported with the settings, where there is a receiver

        if self._http is None:
            self._http = httpx.AsyncClient(
                headers=HEADERS, timeout=POST_SECONDS, follow_redirects=False
            )
        host = urlsplit(url).hostname
        try:
            address = ping_url(url, phase)
            # httpx limits each step alone. What the receiver answers is not read.
            async with (
                asyncio.timeout(POST_SECONDS),
                self._http.stream(method, address, headers=headers, content=body) as answer,
            ):
                status = answer.status_code
        except (TimeoutError, httpx.TimeoutException):
            raise NotAcceptedError(f"{host} did not answer within {POST_SECONDS:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            # A host that IDNA refuses is a ValueError. The text may have the address in it.
            reason = "can't be reached" if isinstance(error, httpx.ConnectError) else "broke off"
            raise NotAcceptedError(f"{host} {reason}") from None
        if answer.has_redirect_location:
            raise NotAcceptedError(f"{host} answered {status}, a redirect", status)
        if not answer.is_success:
            raise NotAcceptedError(f"{host} answered {status}", status)


def ping_url(url: str, phase: Phase) -> "httpx.URL":
    """Return the address of a phase; that of success is the URL itself."""
    import httpx  # noqa: PLC0415 - the same

    given = httpx.URL(url)
    if phase == "success":
        return given
    path, question_mark, query = given.raw_path.partition(b"?")
    raw_path = path.rstrip(b"/") + f"/{phase}".encode() + question_mark + query
    return given.copy_with(raw_path=raw_path)


def as_json(event: Event) -> bytes:
    """Return an event as JSON; each try has the same bytes."""
    return to_json(
        {
            "id": str(event.id),
            "event": event.status,
            "cause": event.code,
            "subject": event.subject or None,
            "text": text(event),
            "since": _iso(event.since),
            "at": _iso(event.at),
        }
    )


def as_slack(event: Event) -> bytes:
    """Return an event as the message of an incoming webhook of Slack (or Mattermost, Discord)."""
    line = text(event)
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(character, instead)
    symbol = "✓" if event.status == "recovered" else "✕"
    return to_json({"text": f"{symbol} {line}"})


def text(event: Event) -> str:
    """Return an event in a line, with the time of its begin once."""
    if event.status == "recovered":
        lasted = duration((event.at - event.since).total_seconds())
        return f"Recovered after {lasted}: {event.sentence}"
    since = f"{exact(event.since.astimezone(UTC))} UTC"
    return event.sentence if since in event.sentence else f"{event.sentence} (since {since})"


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
