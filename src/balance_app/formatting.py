"""The format of durations, moments and addresses for people; moments are in UTC, as everywhere."""

from datetime import UTC, datetime, timedelta
from typing import Final

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86400
HALF_A_DAY: Final = timedelta(hours=12)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "2 min 31 s"."""
    whole = max(0, int(seconds))
    for length, unit, rest_length, rest_unit in (
        (DAY, "d", HOUR, "h"),
        (HOUR, "h", MINUTE, "min"),
        (MINUTE, "min", 1, "s"),
    ):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // rest_length} {rest_unit}"
    return f"{whole} s"


def rough(seconds: float) -> str:
    """Return a duration in its largest unit: "2 min"."""
    whole = max(0, int(seconds))
    for length, unit in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if whole >= length:
            return f"{whole // length} {unit}"
    return f"{whole} s"


def ago(seconds: float) -> str:
    """Return how long ago something was, in its largest unit: "4 min ago"."""
    return f"{rough(seconds)} ago"


def exact(moment: datetime) -> str:
    """Return a moment to the second: "2026-11-21 21:49:33"."""
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def brief(moment: datetime, now: datetime) -> str:
    """Return a moment to the second, without its date if it is within half a day of `now`."""
    return f"{moment:%H:%M:%S}" if abs(moment - now) <= HALF_A_DAY else exact(moment)


def typed_moment(text: str) -> datetime:
    """Return a moment that somebody has typed, in UTC, where it also is without a zone.

    Raises:
        ValueError: it is none, or out of range in UTC.
    """
    moment = datetime.fromisoformat(text)
    try:
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(text) from error


def visible(text: str) -> str:
    """Return text with spaces for what does not print, such as control codes of a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def url(host: str, port: int) -> str:
    """Return the URL, on this machine, of a server that listens on `host`, or on all addresses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound  # nosec
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
