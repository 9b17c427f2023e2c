"""Exports of a ledger: all entries of a selection, as CSV or as JSON lines, in flat memory.

Entries are read and sent a page at a time. The last line alone says that the export is complete:
one that breaks off (PostgreSQL becomes unavailable, the instance stops, the client reads too
slowly) has none, and its connection ends without the end of the HTTP message.
"""

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import override

from balance_app.balances.api.schemas import entry_body
from balance_app.balances.model import Entry
from balance_app.errors import Problem
from balance_app.http.seats import Seats

log = structlog.get_logger(__name__)

Pages = AsyncGenerator[list[Entry], None]

CSV: Final = "text/csv"
JSON_LINES: Final = "application/jsonl"
MAX_EXPORTS: Final = 8
EXPORTS_PER_CLIENT: Final = 4
READER_SECONDS: Final = 30.0

COLUMNS: Final = (
    *("version", "amount", "balance", "held", "at", "key", "reference", "note", "by"),
    *("transfer", "otherUserId", "reverses", "hold"),
)
# A spreadsheet takes a cell that begins so for a formula, or drops the character.
_FORMULA: Final = tuple("=+-@\t\r\n＝＋－＠'")  # noqa: RUF001 - their fullwidth forms, too


@dataclass(slots=True)
class Totals:
    """What the last line says: how many entries, which, and where they led."""

    entries: int = 0
    first: Entry | None = None
    last: Entry | None = None
    sum: int = 0

    def add(self, page: list[Entry]) -> None:
        """Count some more entries, in either order of versions."""
        self.entries += len(page)
        self.sum += sum(entry.amount for entry in page)
        for entry in (*page[:1], *page[-1:]):
            if self.first is None or entry.version < self.first.version:
                self.first = entry
            if self.last is None or entry.version > self.last.version:
                self.last = entry

    def body(self) -> dict[str, Any]:
        """Return the last line; `balance` is the one after the last of these entries."""
        return {
            "complete": True,
            "entries": self.entries,
            "firstVersion": self.first and self.first.version,
            "lastVersion": self.last and self.last.version,
            "sum": self.sum,
            "balance": self.last and self.last.balance,
        }


@dataclass(frozen=True, slots=True)
class Format:
    """How an export is written."""

    media_type: str
    suffix: str
    head: bytes
    lines: Callable[[list[Entry]], bytes]
    last_line: Callable[[Totals], bytes]


def _json_lines(page: list[Entry]) -> bytes:
    return b"".join([to_json(entry_body(entry)) + b"\n" for entry in page])


def _csv(rows: list[list[object]]) -> bytes:
    """Write rows as RFC 4180 says, in UTF-8."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _cells(entry: Entry) -> list[object]:
    body = entry_body(entry)
    body["at"] = entry.at.isoformat().replace("+00:00", "Z")
    for name in ("key", "reference", "note", "by"):
        if (text := body[name]) is not None and text.startswith(_FORMULA):
            body[name] = f"'{text}"
    return [body[name] for name in COLUMNS]


def _last_row(totals: Totals) -> list[object]:
    """Return a row that leaves the columns of numbers empty: their sums stay right."""
    said = "; ".join(
        f"{name}={'' if value is None else value}"
        for name, value in totals.body().items()
        if name != "complete"
    )
    row = dict.fromkeys(COLUMNS, "") | {"version": "complete", "note": said}
    return list(row.values())


FORMATS: Final = {
    CSV: Format(
        f"{CSV}; charset=utf-8; header=present",
        "csv",
        head=_csv([list(COLUMNS)]),
        lines=lambda page: _csv([_cells(entry) for entry in page]),
        last_line=lambda totals: _csv([_last_row(totals)]),
    ),
    JSON_LINES: Format(
        JSON_LINES,
        "jsonl",
        head=b"",
        lines=_json_lines,
        last_line=lambda totals: to_json(totals.body()) + b"\n",
    ),
}


_EXAMPLES: Final = (
    Entry(1, 1, 10_000, 10_000, 0, datetime(2026, 11, 21, 21, 49, 33, 940623, tzinfo=UTC)),
    Entry(
        *(1, 2, -2, 9_998, 0, datetime(2026, 11, 21, 21, 49, 34, 102938, tzinfo=UTC), "order-42"),
        reference="invoice 2026-117",
    ),
)


def _example(written: Format) -> str:
    totals = Totals()
    totals.add([*_EXAMPLES])
    return (written.head + written.lines([*_EXAMPLES]) + written.last_line(totals)).decode()


EXPORT_CONTENT: Final[dict[str, Any]] = {
    CSV: {"schema": {"type": "string"}, "example": _example(FORMATS[CSV])},
    JSON_LINES: {
        "itemSchema": {
            "anyOf": [
                {"$ref": "#/components/schemas/EntryAnswer"},
                {
                    "type": "object",
                    "description": "the last line of a complete export",
                    "required": list(Totals().body()),
                    "properties": {
                        "complete": {"const": True},
                        "entries": {"type": "integer", "minimum": 0},
                        "sum": {"type": "integer", "description": "of the amounts"},
                        **{
                            name: {"type": ["integer", "null"]}
                            for name in ("firstVersion", "lastVersion", "balance")
                        },
                    },
                },
            ]
        },
        "example": _example(FORMATS[JSON_LINES]),
    },
}


class Exporter:
    """The exports under way on this instance; they end when it stops."""

    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        self.seats = Seats("exports", most=MAX_EXPORTS, per_client=EXPORTS_PER_CLIENT)

    async def pieces(self, pages: Pages, written: Format) -> AsyncGenerator[bytes, None]:
        """Yield an export of these pages piece by piece.

        Raises:
            BrokenOffError, Problem: it can't be completed, or not even begin.
        """
        totals = Totals()
        head = written.head
        async with aclosing(pages):
            async for page in pages:
                if totals.entries and self._stopping.is_set():
                    raise BrokenOffError("This instance is stopping.")
                totals.add(page)
                yield head + written.lines(page)
                head = b""
        yield head + written.last_line(totals)


class BrokenOffError(Exception):
    """An export can't be completed; the message says why."""


class ExportResponse(StreamingResponse):
    """An export, which breaks off if its client takes none of it for `READER_SECONDS`."""

    def __init__(self, exporter: Exporter, user_id: int, pages: Pages, media_type: str) -> None:
        written = FORMATS[media_type]
        pieces = exporter.pieces(pages, written)
        super().__init__(
            pieces,
            media_type=written.media_type,
            headers={
                "Cache-Control": "no-store",
                "Content-Disposition": (
                    f'attachment; filename="user-{user_id}-entries.{written.suffix}"'
                ),
                "Vary": "Accept",
            },
        )
        self._exporter = exporter
        self._pieces = pieces
        self._user_id = user_id

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(READER_SECONDS):
                    await send(message)
            except TimeoutError:
                raise BrokenOffError("The client reads too slowly.") from None

        async with aclosing(self._pieces) as pieces:
            with self._exporter.seats.take(scope):
                # What can't even begin is answered with a problem.
                first = await anext(pieces)
                self.body_iterator = _with_first(first, pieces)
                try:
                    await super().__call__(scope, receive, send_in_time)
                except (BrokenOffError, Problem) as error:
                    # Without the end of the message, the server closes the connection.
                    log.warning("export broken off", user_id=self._user_id, reason=str(error))


async def _with_first(first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in others:
        yield piece
