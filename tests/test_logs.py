"""The log: nobody writes lines or colours of his own into it, and no secret gets there."""

import asyncio
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import quote

import pytest
import structlog

from balance_app import logs
from balance_app.access.keys import new_token
from balance_app.logs import configure_logs
from balance_app.masks import mask_keys
from balance_app.settings import load_settings

COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
EVIL: Final = "\x1b[2J\x1b]0;title\x07a\rb\n2026-01-01T00:00:00Z [info] all is well\x9b\u202e\x00"
KEY: Final = new_token("ba")
SESSION: Final = new_token("bs")
PASSWORD: Final = "pass/w@rd with ünicode"  # noqa: S105 - it is to be masked
BASIC: Final = "Basic YWRhOnNlY3JldA"
SECRETS: Final = (KEY.text[16:], SESSION.text[16:], PASSWORD, quote(PASSWORD, safe=""), BASIC)

Write = Callable[[str], None]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], io.StringIO]]:
    """Configure the log in a format; what it writes is returned."""
    root, before = logging.getLogger(), (logging.getLogger().handlers, logging.getLogger().level)
    stream = io.StringIO()

    def configure(log_format: str, **settings: str) -> io.StringIO:
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("DB_PASSWORD", PASSWORD)
        configure_logs(load_settings(log_format=log_format, log_level="debug", **settings))
        return stream

    yield configure
    root.handlers, _ = before
    root.setLevel(before[1])
    structlog.reset_defaults()


def in_a_field(text: str) -> None:
    structlog.get_logger("a").warning("seen", text=text)


def in_the_event(text: str) -> None:
    structlog.get_logger("a").warning(text)


def in_a_name(text: str) -> None:
    structlog.get_logger("a").warning("seen", **{text: 1})


def inside_of_values(text: str) -> None:
    structlog.get_logger("a").warning("seen", texts=[{"a": (text, {text: {text}})}, b"x", 1, None])


def in_an_object(text: str) -> None:
    class Custom:
        def __repr__(self) -> str:
            return text

    structlog.get_logger("a").warning("seen", it=Custom(), several={"a": Custom()})


def in_an_error(text: str) -> None:
    try:
        try:
            raise ValueError(text)  # noqa: TRY301
        except ValueError as cause:
            cause.add_note(text)
            raise ExceptionGroup(text, [RuntimeError(text)]) from cause
    except ExceptionGroup:
        structlog.get_logger("a").exception("failed")
        logging.getLogger("uvicorn.error").critical("failed", exc_info=sys.exc_info())


def of_a_library(text: str) -> None:
    logging.getLogger("uvicorn.error").critical("failed: %s", text)
    logging.getLogger("alembic").error(text)


def of_the_event_loop(text: str) -> None:
    loop = asyncio.new_event_loop()
    loop.call_exception_handler({"message": text, "exception": ValueError(text)})
    loop.close()


WRITERS: Final = (
    *(in_a_field, in_the_event, in_a_name, inside_of_values, in_an_object, in_an_error),
    *(of_a_library, of_the_event_loop),
)


def is_harmless(text: str) -> bool:
    """Return whether nothing of it is obeyed by a terminal, or begins a line of its own."""
    lines = COLOUR.sub("", text).split("\n")
    return all(line.isprintable() for line in lines) and not any(
        line.startswith("2026-01-01") for line in lines
    )


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_what_does_not_print_is_not_printed(
    configured: Callable[[str], io.StringIO], log_format: str, write: Write
) -> None:
    """Wherever it stands; JSON keeps it, escaped."""
    stream = configured(log_format)
    write(EVIL)
    text = stream.getvalue()
    assert "all is well" in text
    assert is_harmless(text)
    if log_format == "json":
        assert all(json.loads(line) for line in text.splitlines())


@pytest.mark.parametrize("write", [in_the_event, in_an_error, of_the_event_loop])
def test_without_the_cleaner_it_is(
    configured: Callable[[str], io.StringIO], monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """The control."""
    monkeypatch.setattr(logs, "visible", str)
    stream = configured("console")
    write(EVIL)
    assert not is_harmless(stream.getvalue())


TEXTS: Final = (
    f"the password is {PASSWORD}.",
    f"postgresql://me:{quote(PASSWORD, safe='')}@db/x",
    f"GET /api/users?key={KEY.text} HTTP/1.1",
    f"Cookie: ba={SESSION.text}; theme=dark",
    f"{{'authorization': 'Bearer {KEY.text}', 'x': 1}}",
    f"[(b'authorization', b'Bearer {KEY.text[5:]}'), (b'host', b'a')]",
    f"Authorization: {BASIC}==",
    f"sent Bearer {KEY.text[3:]}",
)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_secret_is_logged(
    configured: Callable[[str], io.StringIO], log_format: str, write: Write
) -> None:
    """Not a password of the settings, not a key or a session, not what a header authorizes with."""
    stream = configured(log_format)
    for text in TEXTS:
        write(text)
    output = stream.getvalue()
    assert "***" in output
    assert [each for each in SECRETS if each in output] == []
    assert json.dumps(PASSWORD)[1:-1] not in output


def test_without_the_masks_they_are(
    configured: Callable[[str], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(logs, "mask_of", lambda _: str)
    stream = configured("console")
    for text in TEXTS:
        in_a_field(text)
    assert [each for each in SECRETS if each in stream.getvalue()] == list(SECRETS)


def test_fields_of_secrets_are_masked_whatever_they_look_like(
    configured: Callable[[str], io.StringIO],
) -> None:
    """Also inside of other values."""
    stream = configured("json")
    values: dict[str, Any] = {"Authorization": "abc", "inside": {"cookie": "abc", "host": "a"}}
    structlog.get_logger("a").warning("seen", **values)
    line = json.loads(stream.getvalue())
    assert line["Authorization"] == "***"
    assert line["inside"] == {"cookie": "***", "host": "a"}


def test_what_is_no_secret_stays() -> None:
    """The id of a key says which one it was; words that resemble one are left alone."""
    assert mask_keys(f"key {KEY.text} revoked") == f"key {KEY.text[:16]}*** revoked"
    for text in ("bearer of bad news", "ba_short", "authorization is required", "basic auth"):
        assert mask_keys(text) == text


def test_a_value_without_a_text_loses_no_line(configured: Callable[[str], io.StringIO]) -> None:
    """Its line says of what type it is."""

    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    stream = configured("console")
    structlog.get_logger("a").warning("seen", it=Mute())
    assert "Mute" in stream.getvalue()
