"""Structured logs: coloured lines on a terminal, one JSON object per line elsewhere.

Texts of others come into them, in errors and in paths. No secret does; and on a terminal, what does
not print is shown as a space (JSON escapes it), so that nobody can write lines, or colours, of his
own.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, NamedTuple, TextIO

import structlog

from balance_app.formatting import visible
from balance_app.masks import SECRET_FIELDS, Mask, mask_of
from balance_app.settings import Settings


class Trace(NamedTuple):
    """The place of a request in its caller's trace (W3C Trace Context)."""

    trace_id: str
    # this request's span, not the caller's
    span_id: str


REQUEST_ID: ContextVar[str] = ContextVar("request_id")
TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)


def _add_ids(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    request_id = REQUEST_ID.get(None)
    if request_id is not None:
        event.setdefault("request_id", request_id)
    trace = TRACE.get()
    if trace is not None:
        event.update(trace._asdict())
    return event


def configure_logs(settings: Settings) -> None:
    """Send structlog's and the standard library's records through one formatter to stderr.

    Every line carries the server's name; while a request is answered also the request's id, and
    its place in the caller's trace, if there is one.
    """
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )

    def add_server(
        _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event["server"] = settings.server_id
        return event

    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(allow=[]),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_server,
        _add_ids,
    ]
    mask = mask_of(settings)
    last: list[structlog.types.Processor] = (
        [
            cleaner(lambda text: visible(mask(text))),
            structlog.dev.ConsoleRenderer(exception_formatter=partial(_write_traceback, mask)),
        ]
        if console
        else [
            structlog.processors.ExceptionRenderer(partial(format_traceback, mask=mask)),
            cleaner(mask),
            structlog.processors.JSONRenderer(),
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    # They log each step; the application's own lines suffice.
    for chatty in ("alembic", "httpx", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    # The application logs its own failures, with their reason; uvicorn would add a traceback.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


# Characters of a traceback in the log: an error may quote megabytes of its input.
MAX_TRACEBACK_LINE = 2000
MAX_TRACEBACK = 50_000


def format_traceback(exc_info: structlog.typing.ExcInfo, mask: Callable[[str], str] = str) -> str:
    """Return a traceback, less what `mask` replaces, and cut where an error quotes its input."""
    lines = mask("".join(traceback.format_exception(*exc_info))).rstrip().split("\n")
    text = "\n".join(_cut(line, MAX_TRACEBACK_LINE) for line in lines)
    return _cut(text, MAX_TRACEBACK)


def _cut(text: str, limit: int) -> str:
    """Leave out the middle of a text that is longer than `limit`."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} [{len(text) - limit} characters] {text[-limit // 2 :]}"


def _write_traceback(mask: Mask, file: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    # Indented: an error's text may have lines that look like those of a log.
    file.writelines(f"\n  {visible(line)}" for line in format_traceback(exc_info, mask).split("\n"))


# What every line has, and no client; `exc_info` has a renderer of its own.
_OWN: Final = frozenset({"level", "logger", "server", "timestamp", "exc_info"})
DEEPEST: Final = 5  # values inside values


def _text_of(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - the rest of the line is still of use
        return f"a {type(value).__name__} without a text ({type(error).__name__})"


def cleaner(clean: Callable[[str], str]) -> structlog.types.Processor:
    """Return a processor that cleans all texts of a line, those inside of other values, too."""

    def cleaned(value: object, depth: int = 0) -> object:
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth < DEEPEST and isinstance(value, Mapping):
            return {clean(str(name)): field(name, each, depth) for name, each in value.items()}
        if depth < DEEPEST and isinstance(value, list | tuple):
            return [cleaned(each, depth + 1) for each in value]
        return clean(value if isinstance(value, str) else _text_of(value))

    def field(name: object, value: object, depth: int) -> object:
        return "***" if str(name).lower() in SECRET_FIELDS else cleaned(value, depth + 1)

    def clean_line(
        _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        return {
            clean(name): value if name in _OWN else field(name, value, 0)
            for name, value in event.items()
        }

    return clean_line
