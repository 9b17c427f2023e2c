"""Requests that no correct client sends, each with the refusal it has to get."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tests.processes import Instance, empty_database

MAX: Final = 2**53 - 1
CHANGE: Final = b'{"userId":1,"amount":-2}'
OPEN: Final = b'{"balance":7}'
TRANSFER: Final = b'{"fromUserId":1,"toUserId":404404,"amount":2}'
HOLD: Final = b'{"userId":1,"amount":2,"expiresInSeconds":3600}'


@asynccontextmanager
async def one_instance(
    postgres: dict[str, str], *, body_seconds: str = "5"
) -> AsyncIterator[tuple[Instance, dict[str, str]]]:
    """Run one instance on an empty database, to be shared by many tests."""
    async with (
        empty_database(postgres) as database,
        # Without jobs only the requests change rows.
        Instance(database, BODY_SECONDS=body_seconds, JOBS_ENABLED="false") as instance,
    ):
        yield instance, database


# -- sending raw bytes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The first answer on a connection, and all bytes after it until the connection closed.

    `status` 0: it closed without an answer.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes
    raw: bytes


async def exchange(port: int, *parts: bytes, pause_seconds: float = 0) -> Answer:
    """Send `parts`, read until the server closes, and return what it answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = bytearray()

    async def receive() -> None:
        try:
            while piece := await reader.read(65536):
                raw.extend(piece)
        except ConnectionError:
            pass  # the server closed before it had read everything

    async def send() -> None:
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_seconds)
        except ConnectionError:
            pass

    try:
        async with asyncio.timeout(20):
            sending = asyncio.create_task(send())
            await receive()
            sending.cancel()
            await asyncio.wait({sending})
    except TimeoutError:
        raise AssertionError(f"the connection stays open after {bytes(raw[:300])!r}") from None
    finally:
        writer.close()
    return _parse(bytes(raw))


def _parse(raw: bytes) -> Answer:
    head, separator, rest = raw.partition(b"\r\n\r\n")
    if not separator:
        return Answer(0, {}, b"", raw, raw)
    if head.startswith(b"HTTP/1.1 100 "):
        return _parse(rest)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        assert name not in headers, f"{name} is there twice"
        headers[name] = value
    length = int(headers.get("content-length", "0"))
    return Answer(int(first.split()[1]), headers, rest[:length], rest[length:], raw)


def request(
    method: str = "POST",
    path: str | bytes = "/api/balance",
    body: bytes = b"",
    *headers: str | bytes,
    content_type: str | None = "application/json",
    keep: bool = False,
) -> bytes:
    """Return the bytes of a request that asks for the connection to be closed after it."""
    lines: list[str | bytes] = ["Host: localhost"]
    if not keep:
        lines.append("Connection: close")
    if body or method in {"POST", "PUT", "PATCH"}:
        lines.append(f"Content-Length: {len(body)}")
        if content_type is not None:
            lines.append(f"Content-Type: {content_type}")
    return raw_request(method, path, *lines, *headers, body=body)


def raw_request(
    method: str, path: str | bytes, *headers: str | bytes, body: bytes = b"", version: str = "1.1"
) -> bytes:
    """Return the bytes of a request, with these headers and no others."""
    start = b"%b %b HTTP/%b" % (method.encode(), _bytes(path), version.encode())
    return b"\r\n".join([start, *map(_bytes, headers), b"", body])


def chunked(body: bytes, size: int = 4096) -> bytes:
    """Return `body` in the chunked transfer coding."""
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


# -- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A route that reads a body, and one that is right.

    `bare`: the answer without any body, where it is optional.
    """

    path: str
    good: bytes
    method: str = "POST"
    is_keyed: bool = False
    headers: tuple[str, ...] = ()
    bare: tuple[int, str] | None = None

    def send(
        self, body: bytes, *headers: str | bytes, content_type: str | None = "application/json"
    ) -> bytes:
        """Return the bytes of a request with this body."""
        more = (*self.headers, *headers)
        return request(self.method, self.path, body, *more, content_type=content_type)


# What a right request to them refers to is not there, so that none of them changes anything.
ROUTES: Final = (
    Route("/api/balance", CHANGE, is_keyed=True),
    Route("/api/users", OPEN, is_keyed=True),
    Route("/api/transfers", TRANSFER, is_keyed=True),
    Route("/api/holds", HOLD, is_keyed=True),
    Route("/api/holds/1-404404/capture", b'{"amount":2}', bare=(404, "hold-not-found")),
    Route(
        "/api/users/1/entries/404404/reverse",
        b'{"reference":"a"}',
        bare=(404, "entry-not-found"),
    ),
    Route("/api/users/404404", b'{"floor":-5}', "PATCH", headers=("If-Match: *",)),
    Route("/api/users/by-external-id/a", OPEN, "PUT", bare=(201, "")),
)
READS: Final = ("", "/entries", "/daily-balances", "/settings", "/holds")


@dataclass(frozen=True)
class Case:
    """One hostile request and its refusal.

    `code` None: the HTTP parser refuses it before the application.
    `fault`: pointer and code of the first of `errors`.
    `poison`: the hostile part, which no answer may repeat.
    """

    id: str
    request: bytes
    status: int
    code: str | None
    fault: tuple[str, str] | None = None
    poison: bytes = b""
    allow: frozenset[str] = frozenset()


MALFORMED: Final = (400, "malformed-request")
INVALID: Final = (422, "invalid-request")
MEDIA: Final = (415, "unsupported-media-type")
LARGE: Final = (413, "body-too-large")
NOWHERE: Final = (404, "not-found")
UNACCEPTABLE: Final = (406, "not-acceptable")
METHOD: Final = (405, "method-not-allowed")
PARSER: Final = (400, None)
CODING: Final = (501, None)

NOT_JSON_NUMBERS: Final = (
    *("NaN", "-NaN", "nan", "Nan", "Infinity", "-Infinity", "+Infinity", "infinity", "inf"),
    *("00", "01", "-01", "+1", "++1", "--1", "-", "1_0", "1 0", "1,0", "0x10", "0b1", "0o7", "10n"),
    *(".5", "5.", "1e", "1e+", "e1", "1f", "undefined", "None", "True", "'2'", "(1)", "1;", "٢"),
)
NOT_INTEGERS: Final = (
    *("1e400", "-1e400", "1e0", "1E2", "2.0", "-2.0", "0.0", "-0.0", "1e-400", "0.1", "1e15"),
    "1." + "0" * 400,
    *("true", "false", "null", '"2"', '"-2"', '""', '"NaN"', '"\\u0000"', '"\\ud800"', '"1e2"'),
    *("[]", "{}", "[1]", "[[[[1]]]]", '{"a":1}', '{"userId":1}', "[null]"),
)
TOO_BIG: Final = {
    "2^53": 2**53,
    "-2^53": -(2**53),
    "2^63-1": 2**63 - 1,
    "2^63": 2**63,
    "-2^63": -(2**63),
    "-2^63-1": -(2**63) - 1,
    "2^64": 2**64,
    "20 digits": 10**19,
    "400 digits": 10**399,
    "-400 digits": -(10**399),
    "4000 digits": 10**3999,
}
# By route, the fields that have numbers, in a body that is right but for the number.
NUMBERS: Final = {
    ROUTES[0]: (b'{"userId":%b,"amount":-2}', b'{"userId":1,"amount":%b}'),
    ROUTES[1]: (b'{"balance":%b}', b'{"floor":%b}'),
    ROUTES[2]: (
        b'{"fromUserId":%b,"toUserId":1,"amount":2}',
        b'{"fromUserId":1,"toUserId":%b,"amount":2}',
        b'{"fromUserId":1,"toUserId":404404,"amount":%b}',
    ),
    ROUTES[3]: (
        b'{"userId":%b,"amount":2,"expiresInSeconds":3600}',
        b'{"userId":1,"amount":%b,"expiresInSeconds":3600}',
        b'{"userId":1,"amount":2,"expiresInSeconds":%b}',
    ),
    ROUTES[4]: (b'{"amount":%b}',),
    ROUTES[6]: (b'{"floor":%b}',),
    ROUTES[7]: (b'{"balance":%b}', b'{"floor":%b}'),
}
# Those whose field may be null.
NULLABLE: Final = {(ROUTES[4], "amount"), (ROUTES[6], "floor")}


def numbers() -> Iterator[Case]:
    """Every invalid kind of number, as each of the numbers that this API reads."""
    for route, templates in NUMBERS.items():
        for template in templates:
            for literal in NOT_JSON_NUMBERS:
                yield _field(route, template, literal, MALFORMED, None)
            for literal in NOT_INTEGERS:
                if literal != "null" or (route, _name(template)) not in NULLABLE:
                    yield _field(route, template, literal, INVALID, "not-an-integer")
            for name, value in TOO_BIG.items():
                yield _field(route, template, str(value), INVALID, "out-of-range", name)
            digits = "1" + "0" * 4999
            yield _field(route, template, digits, INVALID, "out-of-range", "5000 digits")
            yield from _too_small(route, template)
    for literal in (str(365 * 24 * 3600 + 1), str(MAX)):
        yield _field(ROUTES[3], NUMBERS[ROUTES[3]][2], literal, INVALID, "out-of-range")


def _too_small(route: Route, template: bytes) -> Iterator[Case]:
    field = _name(template)
    fault = "out-of-range"
    literals = ["-1", str(-MAX), "0", "-0"]
    if field == "floor":
        literals = []
    elif field == "balance":
        literals = ["-1", str(-MAX)]
    elif (route.path, field) == ("/api/balance", "amount"):
        literals, fault = ["0", "-0"], "zero"
    for literal in literals:
        yield _field(route, template, literal, INVALID, fault)


def _name(template: bytes) -> str:
    """Return the field whose number a template lacks."""
    return template.partition(b"%b")[0].split(b'"')[-2].decode()


def refusals() -> Iterator[Case]:
    """Requests that are well formed, but the state says no."""
    most = b"%d" % MAX
    change, transfer, hold = (
        dict(enumerate(NUMBERS[route])) for route in ROUTES[:4] if route != ROUTES[1]
    )
    bodies = {
        "/api/balance": {
            "user": (change[0] % most, 404, "user-not-found"),
            "much": (change[1] % most, 409, "balance-limit-exceeded"),
            "little": (change[1] % (b"-" + most), 409, "insufficient-funds"),
        },
        "/api/transfers": {
            "payer": (transfer[0] % most, 404, "user-not-found"),
            "payee": (transfer[1] % most, 404, "user-not-found"),
            "both": (transfer[0].replace(b":1,", b":2,") % most, 404, "user-not-found"),
        },
        "/api/holds": {
            "user": (hold[0] % most, 404, "user-not-found"),
            "much": (hold[1] % most, 409, "insufficient-funds"),
        },
        "/api/users": {
            "floor": (b'{"balance":4,"floor":5}', 409, "floor-not-covered"),
            "floor alone": (b'{"floor":%b}' % most, 409, "floor-not-covered"),
        },
    }
    for path, kinds in bodies.items():
        for kind, (body, status, code) in kinds.items():
            yield Case(f"{path} refused {kind}", request(path=path, body=body), status, code)
    for path, code in {
        "/api/users/404404/entries/1/reverse": "user-not-found",
        "/api/users/1/entries/404404/reverse": "entry-not-found",
        f"/api/users/1/entries/{MAX}/reverse": "entry-not-found",
        "/api/holds/1-404404/capture": "hold-not-found",
        "/api/holds/404404-1/capture": "hold-not-found",
        "/api/holds/9999999999999999-9999999999999999/capture": "hold-not-found",
        "/api/holds/1-404404/void": "hold-not-found",
        "/api/holds/404404-1/void": "hold-not-found",
    }.items():
        yield Case(f"POST {path}", request(path=path), 404, code)
    same = request(path="/api/transfers", body=TRANSFER.replace(b"404404", b"1"))
    yield Case("a transfer to oneself", same, *INVALID, ("/toUserId", "same-user"))
    floor = request("PATCH", "/api/users/1", b'{"floor":10001}', "If-Match: *")
    yield Case("a floor that is not covered", floor, 409, "floor-not-covered")


def _field(  # noqa: PLR0913, PLR0917 - one row of the table
    route: Route,
    template: bytes,
    literal: str,
    refusal: tuple[int, str],
    fault: str | None,
    name: str | None = None,
) -> Case:
    field = _name(template)
    return Case(
        f"{route.path} {field}={name or literal[:24]}",
        route.send(template % literal.encode()),
        *refusal,
        fault=None if fault is None else (f"/{field}", fault),
        poison=literal.encode(),
    )


# Text that no field takes, as JSON, and the fault.
WRONG_TEXTS: Final = {
    "number": ("1", "not-a-string"),
    "true": ("true", "not-a-string"),
    "array": ('["poison"]', "not-a-string"),
    "object": ('{"poison":1}', "not-a-string"),
    "empty": ('""', "not-printable"),
    "line feed": ('"poison\\n"', "not-printable"),
    "control": ('"poison\\u001b[31m"', "not-printable"),
    "C1 control": ('"poison\\u0085"', "not-printable"),
    "delete": ('"poison\x7f"', "not-printable"),
    "NUL": ('"poison\\u0000"', "not-printable"),
    "right to left": ('"poison\u202etxt"', "not-printable"),
    "zero width": ('"poison\u200b"', "not-printable"),
    "line separator": ('"poison\u2028"', "not-printable"),
    "BOM": ('"\ufeffpoison"', "not-printable"),
    "no character": ('"poison\uffff"', "not-printable"),
    "surrogate": ('"poison\\ud800"', "not-text"),
    "half a pair": ('"poison\\udc00x"', "not-text"),
    "10 000 characters": (f'"{"poison" * 1667}"', "not-printable"),
}


def texts() -> Iterator[Case]:
    """Every invalid kind of text, as each of the texts that this API reads; and of frozen."""
    fields = {
        "reference": ROUTES[0:1] + ROUTES[2:6],
        "note": ROUTES[0:1] + ROUTES[2:6],
        "externalId": (ROUTES[1], ROUTES[6]),
    }
    for field, routes in fields.items():
        too_long = f'"{"p" * (501 if field == "note" else 201)}"'
        literals = {**WRONG_TEXTS, "too long": (too_long, "not-printable")}
        for route in routes:
            good = {} if f'"{field}"'.encode() in route.good else json.loads(route.good)
            for kind, (literal, fault) in literals.items():
                members = "".join(f'"{name}":{json.dumps(value)},' for name, value in good.items())
                yield Case(
                    f"{route.path} {field} {kind}",
                    route.send(f'{{{members}"{field}":{literal}}}'.encode()),
                    *INVALID,
                    (f"/{field}", fault),
                    b"poison",
                )
    for literal in ("0", "1", '"true"', '""', "[]", "{}", "[true]", "1.0"):
        sent = ROUTES[6].send(b'{"frozen":%b}' % literal.encode())
        yield Case(f"frozen={literal}", sent, *INVALID, ("/frozen", "not-a-boolean"))


def malformed_bodies() -> Iterator[Case]:
    """Bodies that are not one JSON text in UTF-8, on all routes that read a body."""
    for route in ROUTES:
        good = route.good
        name = b'"%b"' % re.findall(rb'"(\w+)":', good)[-1]
        bodies = {
            "empty": b"",
            "spaces": b" \t\r\n ",
            "NUL": b"\0",
            "word": b"poison",
            "form": b"userId=1&amount=-2",
            "xml": b"<userId>1</userId>",
            "yaml": b"userId: 1\namount: -2",
            "trailing word": good + b"poison",
            "trailing NUL": good + b"\0",
            "trailing comma": good + b",",
            "trailing brace": good + b"}",
            "two values": good + good,
            "two lines": good + b"\n" + good,
            "comma inside": good[:-1] + b",}",
            "comma first": b"{," + good[1:],
            "two commas": good[:-1] + b",," + b'"a":1}',
            "no end": good[:-1],
            "no start": good[1:],
            "no colon": good.replace(b":", b" ", 1),
            "two colons": good.replace(b":", b"::", 1),
            "equals": good.replace(b":", b"=", 1),
            "line comment": b"// poison\n" + good,
            "block comment": b"/* poison */" + good,
            "hash comment": good + b"# poison",
            "single quotes": good.replace(b'"', b"'"),
            "no quotes": good.replace(b'"', b""),
            "curly quotes": good.replace(b'"', "“".encode()),
            "open string": b'{"poison',
            "bad escape": b'{"\\x61":1,' + good[1:],
            "short escape": b'{"\\u12":1,' + good[1:],
            "newline in name": good.replace(name, name[:-1] + b'\n"'),
            "raw NUL in name": good.replace(name, name[:-1] + b'\0"'),
            "vertical tab": b"\x0b" + good,
            "form feed": b"\x0c" + good,
            "no-break space": "\u00a0".encode() + good,
            "line separator": "\u2028".encode() + good,
            "zero-width space": good + "\u200b".encode(),
            "BOM": b"\xef\xbb\xbf" + good,
            "UTF-16": good.decode().encode("utf-16"),
            "UTF-16LE": good.decode().encode("utf-16-le"),
            "UTF-16BE": good.decode().encode("utf-16-be"),
            "UTF-32": good.decode().encode("utf-32"),
            "UTF-7": b"+AHs-" + good[1:],
            "Latin-1 name": good.replace(name, name[:-1] + b'\xe9"'),
            "byte FF": good + b"\xff",
            "overlong NUL": good.replace(name, name[:-1] + b'\xc0\x80"'),
            "surrogate in UTF-8": good.replace(name, name[:-1] + b'\xed\xa0\x80"'),
            "beyond Unicode": good.replace(name, name[:-1] + b'\xf4\x90\x80\x80"'),
            "half a character": good.replace(name, name[:-1] + b'\xe2\x82"'),
            "deep arrays": b"[" * 8000,
            "65 arrays": b"[" * 65 + b"]" * 65,
            "500 arrays": b"[" * 500 + b"]" * 500,
            "deep arrays, closed": b"[" * 8000 + b"]" * 8000,
            "deep objects": b'{"a":' * 2000,
            "deep objects, closed": b'{"a":' * 2000 + b"1" + b"}" * 2000,
            "deep field": good[:-1] + b',"a":' + b"[" * 7000 + b"]" * 7000 + b"}",
            "gzip": bytes.fromhex("1f8b08000000000000ff"),
            "msgpack": bytes.fromhex("82a675736572496401a6616d6f756e74fe"),
        }
        for kind, body in bodies.items():
            if body or route.bare is None:
                yield Case(f"{route.path} {kind}", route.send(body), *MALFORMED, poison=b"poison")


def wrong_objects() -> Iterator[Case]:
    """JSON, but not the expected object."""
    for route in ROUTES:
        good = route.good
        values = {
            "null": b"null",
            "true": b"true",
            "number": b"1",
            "float": b"1e400",
            "string": b'"poison"',
            "array": b"[]",
            "array of one": b"[" + good + b"]",
            "array of fields": b'["userId","amount"]',
            "60 arrays": b"[" * 60 + b"]" * 60,
        }
        for kind, body in values.items():
            yield _body(route, f"top {kind}", body, ("", "not-an-object"))
        extra = {
            "poison": b"poison",
            "empty": b"",
            "long": b"poison" * 2000,
            "NUL": b"poison\\u0000",
            "control": b"poison\\u001b[31m",
            "markup": b"<script>alert(poison)</script>",
            "pointer": b"/poison/~0~1",
            "prototype": b"__proto__",
            "class": b"__class__",
            "emoji": "💰".encode(),
            "escaped pair": b"\\ud83d\\udcb0",
            "snake case": b"user_id",
            "upper case": b"AMOUNT",
            "title case": b"UserId",
            "lower case": b"userid",
            "space after": b"amount ",
            "fullwidth": "\uff41mount".encode(),
            "version": b"version",
        }
        for kind, field in extra.items():
            body = b'{"%b":1,%b' % (field, good[1:])
            poison = field[:30] if b"poison" in field or b"proto" in field else b""
            yield _body(route, f"unknown {kind}", body, ("", "unknown-field"), poison)
        for surrogate in (b"\\ud800", b"\\udfff", b"poison\\udc00x", b"\\udcff\\ud800"):
            body = b'{"%b":1,%b' % (surrogate, good[1:])
            yield _body(
                route, f"unknown {surrogate.decode()}", body, ("", "unknown-field"), b"poison"
            )
        first = good[1:-1].split(b",")[0]
        field = first.split(b":")[0]
        escaped = b'"\\u%04x%b' % (field[1], field[2:])
        twice = {
            "same": first,
            "other value": field + b":9",
            "null": field + b":null",
            "escaped": escaped + b":9",
            "nested": b'"a":{"b":1,"b":1}',
            "nested in array": b'"a":[[{"poison":1,"poison":2}]]',
            "empty": b'"":1,"":1',
            "surrogate": b'"\\ud800":1,"\\ud800":1',
            "normalized": b'"poison":1,"p\\u006fison":1',
        }
        for kind, addition in twice.items():
            body = good[:-1] + b"," + addition + b"}"
            yield _body(route, f"twice {kind}", body, ("", "duplicate-key"), b"poison")
    change, users, transfer, hold, capture, reversal, settings, _ = ROUTES
    bodies = {
        "nothing": (b"{}", ("/userId", "required")),
        "no userId": (b'{"amount":-2}', ("/userId", "required")),
        "no amount": (b'{"userId":1}', ("/amount", "required")),
        "both null": (b'{"userId":null,"amount":null}', ("/userId", "not-an-integer")),
        "in snake case": (b'{"user_id":1,"amount":-2}', None),
        "in capitals": (b'{"UserId":1,"Amount":-2}', None),
        "of the other route": (b'{"balance":7}', None),
        "wrapped": (b'{"body":{"userId":1,"amount":-2}}', None),
    }
    for kind, (body, fault) in bodies.items():
        yield _body(change, f"fields {kind}", body, fault)
    unknown = ("", "unknown-field")
    yield _body(users, "fields of the other route", CHANGE, unknown)
    yield _body(users, "fields wrapped", b'{"body":{"balance":7}}', unknown)
    yield _body(users, "fields id", b'{"id":1,"balance":7}', unknown)
    yield _body(users, "fields frozen", b'{"balance":7,"frozen":true}', unknown)
    for route in (transfer, hold):
        for name, value in json.loads(route.good).items():
            left = {key: each for key, each in json.loads(route.good).items() if key != name}
            body = json.dumps(left).encode()
            yield _body(route, f"fields without {name}", body, (f"/{name}", "required"))
            null = json.dumps({**left, name: None}).encode()
            yield _body(route, f"fields with {name} null", null, (f"/{name}", "not-an-integer"))
            text = json.dumps({**left, name: str(value)}).encode()
            yield _body(route, f"fields with {name} as text", text, (f"/{name}", "not-an-integer"))
    yield _body(capture, "fields expiresInSeconds", b'{"expiresInSeconds":9}', unknown)
    yield _body(reversal, "fields amount", b'{"amount":9}', unknown)
    for field in (b"balance", b"settingsVersion", b"by", b"userId"):
        yield _body(settings, f"fields {field.decode()}", b'{"%b":9}' % field, unknown)


def arguments() -> Iterator[Case]:
    """Odd arguments of a run; well-formed ones are refused: no such job, or no such parameter."""
    path = "/api/cron/jobs/a/run"
    bodies: dict[str, tuple[str, tuple[str, str] | None]] = {
        "nothing": ("{}", ("/args", "required")),
        "null": ('{"args":null}', ("/args", "not-an-object")),
        "array": ('{"args":["poison"]}', ("/args", "not-an-object")),
        "unknown": ('{"args":{},"poison":1}', ("", "unknown-field")),
        "twice": ('{"args":{"a":1,"a":2}}', ("", "duplicate-key")),
        "surrogate": ('{"args":{"a":"poison\\ud800"}}', ("/args/a", "not-text")),
        "NUL": ('{"args":{"a":"poison\\u0000"}}', ("/args/a", "not-text")),
        "good": ('{"args":{"poison":1}}', None),
        "none": ('{"args":{}}', None),
    }
    for kind, (body, fault) in bodies.items():
        refusal = (404, "job-not-found") if fault is None else INVALID
        sent = request("POST", path, body.encode(), content_type="application/json")
        yield Case(f"arguments {kind}", sent, *refusal, fault, b"poison")
    yield Case("arguments as text", request("POST", path, b"{}", content_type="text/plain"), *MEDIA)
    yield Case("arguments of 16 KiB", request("POST", path, b"{}".ljust(16 * 1024 + 1)), *LARGE)
    yield Case("arguments that are no JSON", request("POST", path, b"{"), *MALFORMED)
    for kind, args in {"long": f'"{"x" * 9000}"', "unknown": "1"}.items():
        sent = request(
            "POST", "/api/cron/jobs/audit-ledger/run", b'{"args":{"b":%b}}' % args.encode()
        )
        fault = ("/args/b", "wrong-argument")
        yield Case(f"arguments {kind} of a job", sent, 422, "invalid-arguments", fault)


def schedules() -> Iterator[Case]:
    """Odd schedules of a job; well-formed ones are refused because there is no such job."""
    path = "/api/cron/jobs/a/schedule"
    not_one = ("", "not-one-schedule")
    bodies: dict[str, tuple[str, tuple[str, str] | None]] = {
        "nothing": ("{}", not_one),
        "null": ("null", ("", "not-an-object")),
        "array": ('[{"everySeconds":60}]', ("", "not-an-object")),
        "zone alone": ('{"tz":"poison"}', not_one),
        "interval and cron": ('{"everySeconds":60,"cron":"poison"}', not_one),
        "interval and zone": ('{"everySeconds":60,"tz":"poison"}', not_one),
        "unknown": ('{"everySeconds":60,"poison":1}', ("", "unknown-field")),
        "snake case": ('{"every_seconds":60}', ("", "unknown-field")),
        "twice": ('{"everySeconds":60,"everySeconds":61}', ("", "duplicate-key")),
        "no text": ('{"cron":60}', ("/cron", "not-a-string")),
        "empty": ('{"cron":""}', ("/cron", "not-printable")),
        "long": (f'{{"cron":"{"poison " * 30}"}}', ("/cron", "not-printable")),
        "control": ('{"cron":"poison\\u001b[31m"}', ("/cron", "not-printable")),
        "NUL": ('{"cron":"poison\\u0000"}', ("/cron", "not-printable")),
        "surrogate": ('{"cron":"poison\\ud800"}', ("/cron", "not-text")),
        "zone of a surrogate": ('{"cron":"* * * * *","tz":"\\udfff"}', ("/tz", "not-text")),
        "directory": ('{"cron":"* * * * *","tz":"../poison"}', None),
        "interval beyond all": ('{"everySeconds":1' + "0" * 400 + "}", None),
    }
    for kind, (body, fault) in bodies.items():
        refusal = (404, "job-not-found") if fault is None else INVALID
        sent = request("PUT", path, body.encode(), content_type="application/json")
        yield Case(f"schedule {kind}", sent, *refusal, fault, b"poison")
    for literal in NOT_INTEGERS:
        sent = request("PUT", path, b'{"everySeconds":%b}' % literal.encode())
        yield Case(
            f"schedule every {literal[:20]}", sent, *INVALID, ("/everySeconds", "not-an-integer")
        )
    good = b'{"everySeconds":60}'
    yield Case("schedule as text", request("PUT", path, good, content_type="text/plain"), *MEDIA)
    yield Case("schedule of 16 KiB", request("PUT", path, good.ljust(16 * 1024 + 1)), *LARGE)
    yield Case("schedule of nobody", request("DELETE", path), 404, "job-not-found")
    yield Case("schedule without a body", request("PUT", path, b" "), *MALFORMED)


def _body(
    route: Route, name: str, body: bytes, fault: tuple[str, str] | None, poison: bytes = b""
) -> Case:
    return Case(f"{route.path} {name}", route.send(body), *INVALID, fault, poison)


def media_types() -> Iterator[Case]:
    """Bodies that are not declared as JSON in UTF-8."""
    types = (
        *("text/plain", "text/json", "text/html", "application/x-www-form-urlencoded", "poison"),
        *("multipart/form-data; boundary=x", "multipart/form-data", "application/xml", "image/png"),
        *("application/octet-stream", "application/jsonp", "application/json5", "*/*", "json", ""),
        *("application/json; charset=latin-1", "application/json; charset=utf-16", "application"),
        *('application/json; charset="utf-32"', "application/json; CHARSET=ISO-8859-1"),
        *("application/json, text/plain", "text/plain; a=application/json", "application/json/x"),
        *("application /json", "x-application/json", "application/json+xml", "\xe9/json", ";"),
    )
    for route in ROUTES:
        for media_type in types:
            yield Case(
                f"{route.path} as {media_type or 'empty'!r}",
                route.send(route.good, content_type=media_type),
                *MEDIA,
                poison=b"poison",
            )
        yield Case(f"{route.path} as nothing", route.send(route.good, content_type=None), *MEDIA)
        pairs = (("application/json", "text/plain"), ("text/plain", "application/json"))
        for one, two in pairs:
            sent = route.send(route.good, f"Content-Type: {two}", content_type=one)
            yield Case(f"{route.path} as {one} and {two}", sent, *MEDIA)
        for coding in ("gzip", "br", "poison"):
            sent = route.send(route.good, f"Content-Encoding: {coding}")
            yield Case(f"{route.path} encoded as {coding}", sent, *MEDIA, poison=b"poison")


def sizes() -> Iterator[Case]:
    """Bodies above 16 KiB, and oversized heads."""
    for route in ROUTES:
        for size in (16 * 1024 + 1, 17_000):
            body = route.good.ljust(size)
            yield Case(f"{route.path} {size} bytes", route.send(body), *LARGE)
            lines = ("Host: localhost", "Connection: close", "Content-Type: application/json")
            more = (*route.headers, "Transfer-Encoding: chunked")
            head = raw_request(route.method, route.path, *lines, *more)
            yield Case(f"{route.path} {size} bytes in chunks", head + chunked(body), *LARGE)
    for length in ("16385", "99999999999", str(2**63), str(2**64 - 1)):
        lines = ("Host: localhost", "Connection: close", "Content-Type: application/json")
        sent = raw_request("POST", "/api/balance", *lines, f"Content-Length: {length}")
        yield Case(f"declares {length} bytes, sends none", sent, *LARGE)


def methods() -> Iterator[Case]:
    """Methods that a path doesn't have, and words that are no methods."""
    addresses = {
        "/api/balance": {"POST"},
        "/api/users": {"GET", "POST"},
        "/api/users/1": {"GET", "PATCH"},
        "/api/actions": {"GET"},
        "/api/users/1/entries": {"GET"},
        "/api/users/1/entries/1/reverse": {"POST"},
        "/api/users/1/daily-balances": {"GET"},
        "/api/users/1/settings": {"GET"},
        "/api/users/1/holds": {"GET"},
        "/api/users/1/changes/k": {"GET"},
        "/api/users/by-external-id/a": {"PUT"},
        "/api/transfers": {"POST"},
        "/api/transfers/1-2": {"GET"},
        "/api/holds": {"POST"},
        "/api/holds/1-1": {"GET"},
        "/api/holds/1-1/capture": {"POST"},
        "/api/holds/1-1/void": {"POST"},
        "/api/cron/jobs/a/schedule": {"PUT", "DELETE"},
        "/api/cron/runs/1/log": {"GET"},
        "/problems": {"GET"},
        "/livez": {"GET"},
        "/docs": {"GET"},
        "/docs/assets/swagger-ui.css": {"GET"},
    }
    for path, allowed in addresses.items():
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
            if method not in allowed:
                sent = request(method, path, CHANGE if method != "GET" else b"")
                yield Case(f"{method} {path}", sent, *METHOD, allow=frozenset(allowed))
    for method in ("HEAD", "QUERY", "PURGE", "CONNECT"):
        yield Case(f"{method} /api/balance", request(method), *METHOD, allow=frozenset({"POST"}))
    for method in ("FOO", "post", "P0ST", "POST\t", "", "POST POST", "\xe9", "GET\0", "A" * 9000):
        head = b"\r\n".join(
            [method.encode("latin-1") + b" /api/users HTTP/1.1", b"Host: a", b"", b""]
        )
        yield Case(f"method {method[:10]!r}", head, *PARSER)
    yield Case("CONNECT poison:443", request("CONNECT", "poison:443"), *PARSER, poison=b"poison")
    yield Case("OPTIONS *", request("OPTIONS", "*"), *NOWHERE)


def keys() -> Iterator[Case]:
    """Invalid idempotency keys, in the header and in the path."""
    fault = ("header:Idempotency-Key", "not-a-key")
    values: dict[str, str | bytes] = {
        "empty": "",
        "space": " ",
        "256 characters": "k" * 256,
        "8000 characters": "k" * 8000,
        "space inside": "poison key",
        "tab inside": "poison\tkey",
        "Latin-1": b"poison\xe9",
        "UTF-8": "poison€".encode(),
        "invalid UTF-8": b"poison\xff\xfe",
        "no-break space": b"poison\xa0",
        "C1 control": b"poison\x85",
    }
    for path, good in {route.path: route.good for route in ROUTES if route.is_keyed}.items():
        for name, value in values.items():
            header = b"Idempotency-Key: " + _bytes(value)
            sent = request("POST", path, good, header)
            yield Case(f"{path} key {name}", sent, *INVALID, fault, b"poison")
        for name, first, second in (
            ("same", "poison", "poison"),
            ("other", "poison", "other"),
            ("empty", "poison", ""),
        ):
            two = (f"Idempotency-Key: {first}", f"idempotency-KEY: {second}")
            yield Case(
                f"{path} two keys, {name}", request("POST", path, good, *two), *INVALID, fault
            )
        for control in (b"\0", b"\x01", b"\x1f", b"\x7f", b"\r", b"\n", b"\x0b"):
            sent = request("POST", path, good, b"Idempotency-Key: poi%bson" % control)
            yield Case(f"{path} key with {control!r}", sent, *PARSER, poison=b"poison")
        sent = request("POST", path, good, "Idempotency-Key: poison", " folded")
        yield Case(f"{path} key folded", sent, *PARSER, poison=b"poison")
    wrong: tuple[str, ...] = (
        "",
        "%00",
        "poison%00",
        "poison%20key",
        "%20",
        "%09",
        "k" * 256,
        "k" * 5000,
        "x%0A",
        "poison%0Ak",
    )
    wrong += ("%C3%A9", "%F0%9F%92%B0", "%FF", "%ED%A0%80", "%7F")
    for key in wrong:
        sent = request("GET", f"/api/users/1/changes/{key}")
        at = ("path:key", "not-a-key")
        yield Case(f"change {key[:20]} ({len(key)})", sent, *INVALID, at, b"poison")
    for key in (
        "poison",
        "a/b/c",
        "..",
        "%2e%2e/x",
        "%2525",
        "~",
        "'--",
        "%22;",
        "k" * 255,
        "/",
    ):
        sent = request("GET", f"/api/users/1/changes/{key}")
        yield Case(f"no change {key[:20]}", sent, 404, "key-not-found", None, b"poison")


WRONG_TAGS: Final[dict[str, str | bytes]] = {
    "empty": "",
    "no quotes": "1.1.0",
    "open quotes": '"1.1.0',
    "single quotes": "'1.1.0'",
    "lower w": 'w/"1.1.0"',
    "two without comma": '"a" "b"',
    "comma": '"a",',
    "two commas": '"a",,"b"',
    "star and tag": '*, "a"',
    "two stars": "*, *",
    "space": '"poison a"',
    "UTF-8": "“poison”".encode(),
    "no tag": "poison" * 1700,
    "open quotes, 10 000 characters": '"' + "poison" * 1700,
    "list without end": '"poison",' * 1200,
}
OTHER_TAGS: Final[dict[str, str | bytes]] = {
    "other": '"1.1.1"',
    "prefix": '"1.1"',
    "version alone": '"1"',
    "leading zero": '"01.1.0"',
    "empty": '""',
    "star in quotes": '"*"',
    "weak": 'W/"1.1.0"',
    "weak in quotes": '"W/1.1.0"',
    "list": '"a", "2.2.0",W/"1.1.0"',
    "NULL": '"NULL"',
    "Latin-1": b'"\xe9\xff"',
    "10 000 characters": '"' + "poison" * 1700 + '"',
    "2 000 tags": ",".join(['"poison"'] * 1000),
}


def tags() -> Iterator[Case]:
    """Entity tags that are none, and those that the account does not have."""
    settings = b'{"frozen":true}'
    calls = {
        "/api/balance": ("POST", CHANGE),
        "/api/transfers": ("POST", TRANSFER),
        "/api/holds": ("POST", HOLD),
        "/api/users/1": ("PATCH", settings),
    }
    for path, (method, body) in calls.items():
        for name, value in WRONG_TAGS.items():
            sent = request(method, path, body, b"If-Match: " + _bytes(value))
            yield Case(f"{path} tag {name}", sent, *MALFORMED, None, b"poison")
        for name, value in OTHER_TAGS.items():
            if (method, name) == ("PATCH", "other"):
                continue  # the settings are the same
            sent = request(method, path, body, b"If-Match: " + _bytes(value))
            yield Case(f"{path} other tag {name}", sent, 412, "version-conflict", None, b"poison")
        for name, first, second in (
            ("both stars", "*", "*"),
            ("star and tag", "*", '"1.1.0"'),
            ("tag and star", '"1.1.0"', "*"),
            ("tag and none", '"1.1.0"', "1.1.0"),
            ("halves", '"', '"'),
        ):
            two = (f"If-Match: {first}", f"if-MATCH: {second}")
            sent = request(method, path, body, *two)
            yield Case(f"{path} two tags, {name}", sent, *MALFORMED)
        sent = request(method, path, body, 'If-Match: "a"', 'if-MATCH: W/"1.1.0"')
        yield Case(f"{path} two other tags", sent, 412, "version-conflict")
    patch = request("PATCH", "/api/users/1", settings)
    yield Case("settings without a tag", patch, 428, "precondition-required")
    nobody = request("PATCH", "/api/users/404404", settings, 'If-Match: "1.1.0"')
    yield Case("settings of nobody", nobody, 404, "user-not-found")
    for name, value in WRONG_TAGS.items():
        sent = request("GET", "/api/users/1", b"", b"If-None-Match: " + _bytes(value))
        yield Case(f"read, tag {name}", sent, *MALFORMED, None, b"poison")


def ids() -> Iterator[Case]:
    """Texts that are no id of a transfer or hold, and no external id; and ids of nothing."""
    wrong = (
        *("1", "1-", "-1", "-", "1--1", "1-1-1", "0-1", "1-0", "01-1", "1-01", "+1-1", "1-+1"),
        *("1_1", "1.1", "a-b", "1-b", "%D9%A1-1", "1-%C2%B2", "1-1%00", "1-1%0A", "%201-1"),
        *("1-1%20", "1%2D", "1%E2%80%901", "%00", "%FF", "poison", "poison-poison", "1'--", "*"),
        *("1" * 17 + "-1", "1-" + "1" * 17, "9" * 5000 + "-1", "1-" + "9" * 5000, "%zz"),
    )
    addresses = {
        "transfer": ("GET", "/api/transfers/{}"),
        "hold": ("GET", "/api/holds/{}"),
        "capture": ("POST", "/api/holds/{}/capture"),
        "void": ("POST", "/api/holds/{}/void"),
    }
    for what, (method, address) in addresses.items():
        place = "path:transferId" if what == "transfer" else "path:holdId"
        for text in wrong:
            yield Case(
                f"{what} {text[:20]} ({len(text)})",
                request(method, address.format(text)),
                *INVALID,
                (place, "not-an-id"),
                text.encode() if len(text) > 5 else b"",
            )
        nothing = (404, "transfer-not-found" if what == "transfer" else "hold-not-found")
        for text in ("1-1", "1-2", "404404-1", f"{MAX}-{MAX}", "9" * 16 + "-" + "9" * 16):
            yield Case(f"no {what} {text}", request(method, address.format(text)), *nothing)
    for text in (
        *(
            "",
            "%00",
            "poison%00",
            "%0A",
            "poison%0A",
            "poison%0Aa",
            "%1b",
            "%7F",
            "%C2%85",
            "%FF",
            "%ED%A0%80",
        ),
        *("%E2%80%AE", "%EF%BB%BF", "%EF%BF%BF", "x" * 201, "x" * 5000, "%C3%A9" * 201),
    ):
        at = ("path:externalId", "not-printable")
        name = f"external id {text[:20]} ({len(text)})"
        sent = request("PUT", f"/api/users/by-external-id/{text}", b"{}")
        yield Case(name, sent, *INVALID, at, b"poison")
        sent = request("GET", f"/api/users?externalId={text}")
        yield Case(f"find {name}", sent, *INVALID, ("query:externalId", "not-printable"))


def addresses() -> Iterator[Case]:
    """Invalid user ids in paths, invalid queries, and unknown paths."""
    wrong = (
        *(
            "0",
            "-1",
            "-0",
            "+1",
            "1.0",
            "1e3",
            "1_0",
            "0x1",
            "01",
            "abc",
            "poison",
            "null",
            "true",
            "NaN",
        ),
        *("%00", "1%00", "%201", "1%20", "1%0A", "%2e%2e", "%D9%A1", "%EF%BC%91", "%C2%B2", "%FF"),
        *(
            str(2**53),
            str(2**63),
            str(2**64),
            "9" * 400,
            "9" * 5000,
            "9" * 60_000,
            "1,2",
            "1;2",
            "*",
        ),
        *("%7BuserId%7D", "[1]", "1'--", "%25", "%zz", "1%", "@1", "$1", "(1)", "1:1"),
    )
    for user in wrong:
        paths = [("GET", f"/api/users/{user}{place}") for place in (*READS, "/changes/k")]
        paths += [("POST", f"/api/users/{user}/entries/1/reverse"), ("PATCH", f"/api/users/{user}")]
        for method, path in paths:
            yield Case(
                f"{method} {path.replace(user, user[:20])} ({len(user)})",
                request(method, path, b"{}" if method == "PATCH" else b"", "If-Match: *"),
                *INVALID,
                ("path:userId", "out-of-range" if _is_decimal(user) else "not-an-integer"),
                user.encode() if len(user) > 5 else b"",
            )
        yield Case(
            f"reverse {user[:20]} ({len(user)})",
            request("POST", f"/api/users/1/entries/{user}/reverse"),
            *INVALID,
            ("path:version", "out-of-range" if _is_decimal(user) else "not-an-integer"),
            user.encode() if len(user) > 5 else b"",
        )
        yield Case(
            f"GET run {user[:20]} ({len(user)})",
            request("GET", f"/api/cron/runs/{user}/log"),
            *INVALID,
            ("path:run", "out-of-range" if _is_decimal(user) else "not-an-integer"),
            user.encode() if len(user) > 5 else b"",
        )
    for missing in (404_404, MAX):
        for path in (f"/api/users/{missing}{place}" for place in READS):
            yield Case(f"GET {path}", request("GET", path), 404, "user-not-found")
        path = f"/api/users/{missing}/changes/k"
        yield Case(f"GET {path}", request("GET", path), 404, "key-not-found")
        path = f"/api/cron/runs/{missing}/log"
        yield Case(f"GET {path}", request("GET", path), 404, "run-not-found")
    nowhere = (
        *("/api", "/api/", "//", "//api/users", "/api//users", "/API/users", "/api/Users"),
        *("/api/users/1/", "/api/users/", "/api/balance/", "/api/users//entries", "/api/user"),
        *(
            "/api/users/1/entries/",
            "/api/users/1/entries/1",
            "/api/users/1/daily-balances/2026-11-21",
            "/api/users/1/daily_balances",
            "/api/users/1%2Fbalance",
            "/api/cron/runs/1",
            "/api/cron/runs/1/log/",
            "/api/poison",
        ),
        *("/api/balance%00", "/api/balance%20", "/api/balance;a=1", "/%61pi/poison", "/.env"),
        *("/docs/", "/docs/assets", "/docs/assets/", "/docs/poison", "/problems/poison"),
        *("/problems/", "/problems/%00", "/problems/..%2f", "/wp-login.php", "/poison" * 1000),
        *("/%FF", "/%00", "/%ED%A0%80", "/%", "/%0d%0aSet-Cookie:poison=1", "/..;/api/users"),
        *("/api/changes/k", "/api/changes/%0D%0Apoison:1", "/api/users/1/changes", "/api/transfer"),
        *("/api/holds/", "/api/transfers/", "/api/holds/1-1/", "/api/holds/1-1/release"),
        *("/api/users/1/holds/1", "/api/users/1/settings/1"),
    )
    for path in nowhere:
        yield Case(f"GET {path[:40]}", request("GET", path), *NOWHERE, poison=b"poison")
    yield Case("POST /api/balance/", request(path="/api/balance/", body=CHANGE), *NOWHERE)
    yield Case("POST /api/users/", request(path="/api/users/", body=OPEN), *NOWHERE)
    up = ("..", "%2e%2e", "%2E.", "..%2f", "..%5c", "....//", "..%00", "%252e%252e", "..%c0%af")
    for step in up:
        for target in ("etc/passwd", "__init__.py"):
            path = f"/docs/assets/{'/'.join([step] * 6)}/{target}"
            yield Case(f"GET {path}", request("GET", path), *NOWHERE)
    for path in (
        "//etc/passwd",
        "/%2fetc/passwd",
        "/%00",
        "/a%00.css",
        "/" + "a" * 5000,
        "/file:x",
    ):
        yield Case(f"GET assets {path[:20]}", request("GET", f"/docs/assets{path}"), *NOWHERE)
    for raw in (
        b"/api/users/\xe9",
        b"/api/users/\xff\xfe",
        b"/api/users?\xe9",
        b"api/users",
        b"http://",
    ):
        yield Case(f"target {raw!r}", request("GET", raw), *PARSER)
    yield Case("target of 100 kB", request("GET", "/" + "a" * 100_000), *PARSER)


def queries() -> Iterator[Case]:
    """Cursors and limits of every invalid kind."""
    numbers = (
        *(
            "-1",
            "-0",
            "+1",
            "00",
            "01",
            "%2B1",
            "abc",
            "poison",
            "",
            "%20",
            "1%20",
            "1_0",
            "1.0",
            "1e2",
            "0x1",
        ),
        *("null", "true", "NaN", "Infinity", "%00", "1%00", "%D9%A1", "%EF%BC%91", "%FF", "%C2%B9"),
        *("1,2", "1;limit=2", "[1]", "%zz", "%", "'", "1'--", "%F0%9F%92%B0"),
        *(str(2**53), str(2**63), str(2**64), "9" * 400, "9" * 5000),
    )
    lists = {
        "/api/users": "after",
        "/api/users/1/entries": "after",
        "/api/users/1/daily-balances": "before",
        "/api/users/1/settings": "after",
        "/api/users/1/holds": "after",
        "/api/actions": "before",
    }
    for path, cursor in lists.items():
        for name in ("limit",) if cursor == "before" else ("after", "limit"):
            for number in numbers:
                yield Case(
                    f"{path}?{name}={number[:20]} ({len(number)})",
                    request("GET", f"{path}?{name}={number}"),
                    *INVALID,
                    (
                        f"query:{name}",
                        "out-of-range" if _is_decimal(number) else "not-an-integer",
                    ),
                    number.encode() if len(number) > 5 else b"",
                )
        for limit in ("0", "1001", "1000000"):
            fault = ("query:limit", "out-of-range")
            yield Case(
                f"{path}?limit={limit}", request("GET", f"{path}?limit={limit}"), *INVALID, fault
            )
        unknown: tuple[str, ...] = (
            "poison=1",
            "poison",
            f"{cursor.upper()}=1",
            f"{cursor}[]=1",
            f"{cursor}%00=1",
            "=1",
            "%00=1",
            "%FF=1",
        )
        unknown += ("offset=1", "limit=1&poison=2", "__proto__=1", "a" * 8000 + "=1")
        unknown += (f" {cursor}=1", "before=2026-11-21" if cursor == "after" else "after=1")
        for query in unknown:
            sent = request("GET", f"{path}?{query.replace(' ', '+')}")
            yield Case(f"{path}?{query[:20]}", sent, *INVALID, None, b"poison")
        one, two = ("0", "1") if cursor == "after" else ("2026-11-20", "2026-11-21")
        for query in (
            f"{cursor}={one}&{cursor}={one}",
            f"{cursor}={two}&{cursor}={one}",
            f"limit=1&{cursor}={one}&limit=2",
        ):
            yield Case(f"{path}?{query}", request("GET", f"{path}?{query}"), *INVALID)


def times() -> Iterator[Case]:
    """Texts that are no time with a zone, or one out of range."""
    wrong = (
        *("2026-11-21", "2026-11-21T21:49:33", "2026-11-21%2021:49:33Z", "2026-11-21T21:49Z"),
        *("20261121T214933Z", "2026-W47-6T00:00:00Z", "2026-11-21T21:49:33z1", "T21:49:33Z"),
        *("2026-02-30T00:00:00Z", "2025-02-29T00:00:00Z", "2026-13-01T00:00:00Z"),
        *("2026-11-21T25:00:00Z", "2026-11-21T21:60:00Z", "2026-11-21T23:59:60Z"),
        *("2026-11-21T21:49:33%2B24:00", "2026-11-21T21:49:33%2B1:00", "2026-11-21T21:49:33UTC"),
        *("2026-11-21T21:49:33+01:00", "2026-11-21T21:49:33%2B0100", "2026-11-21T21:49:33%2B01"),
        *("0000-01-01T00:00:00Z", "0001-01-01T00:00:00%2B01:00", "9999-12-31T23:59:59-01:00"),
        *("10000-01-01T00:00:00Z", "-001-01-01T00:00:00Z", "2026-11-21T21:49:33.1234567Z"),
        *("2026-11-21T21:49:33.Z", "2026-11-21T21:49:33,5Z", "2026-11-21T21:49:33Z%0A"),
        *("2026-11-21T21:49:33Z%00", "%202026-11-21T21:49:33Z", "2026-11-21T21:49:33Z%20"),
        *("%D9%A2%D9%A0%D9%A2%D9%A6-11-21T21:49:33Z", "2026%E2%88%9211%E2%88%9221T21:49:33Z"),
        *("1700000000", "1700000000.5", "0", "-1", "1e9", "now", "infinity", "NaN", "null", ""),
        *("%00", "%FF", "poison", "9" * 5000, "2" * 400 + "-01-01T00:00:00Z"),
    )
    ledger = "/api/users/1/entries"
    for path, name in ((ledger, "from"), (ledger, "to"), ("/api/users/1", "at")):
        for time in wrong:
            yield Case(
                f"time {name}={time[:30]} ({len(time)})",
                request("GET", f"{path}?{name}={time}"),
                *INVALID,
                (f"query:{name}", "not-a-time"),
                time.encode() if len(time) > 10 else b"",
            )


def moments() -> Iterator[Case]:
    """A past moment of an account that is none, or of which there is no entry."""
    account, now = "/api/users/1", "2026-11-21T21:49:33Z"
    for version in ("0", "-1", "-0", "+1", "01", "1.0", "1e0", "", "poison", "%00", str(2**53)):
        at = ("query:version", "out-of-range" if _is_decimal(version) else "not-an-integer")
        sent = request("GET", f"{account}?version={version}")
        yield Case(f"past version={version}", sent, *INVALID, at, b"poison")
    both = request("GET", f"{account}?version=1&at={now}")
    yield Case("a time and a version", both, *INVALID, ("query:version", "not-with-at"))
    for query in (
        *("poison=1", "Version=1", f"AT={now}", "version[]=1", "balance=1", "at%00=1", "=1"),
        *("version=1&version=1", "version=1&version=2", f"at={now}&at={now}", "version=1&limit=1"),
    ):
        sent = request("GET", f"{account}?{query}")
        yield Case(f"{account}?{query}", sent, *INVALID, None, b"poison")
    past = (404, "entry-not-found")
    for query in ("version=404404", f"version={MAX}", "at=0001-01-01T00:00:00Z"):
        yield Case(f"{account}?{query}", request("GET", f"{account}?{query}"), *past)


def filters() -> Iterator[Case]:
    """Filters of lists that are none, and who changes settings."""
    ledger, now = "/api/users/1/entries", "2026-11-21T21:49:33Z"
    orders = ("", "ASC", "desc%20", "poison", "%00", "1", "null", "asc,desc")
    states = ("", "OPEN", "ended", "poison", "%00", "0", "null", "open,voided")
    for place, values in {f"{ledger}?order": orders, "/api/users/1/holds?state": states}.items():
        at = (f"query:{place.partition('?')[2]}", "unknown-value")
        for value in values:
            sent = request("GET", f"{place}={value}")
            yield Case(f"{place}={value}", sent, *INVALID, at, b"poison")
    for text in ("", "%00", "poison%0A", "%FF", "%E2%80%AE", "poison" * 1000, "x" * 201):
        at = ("query:reference", "not-printable")
        sent = request("GET", f"{ledger}?reference={text}")
        yield Case(f"reference={text[:20]} ({len(text)})", sent, *INVALID, at, b"poison")
    for query in ("order=asc&order=desc", f"from={now}&from={now}", "reference=a&reference=a"):
        yield Case(f"{ledger}?{query}", request("GET", f"{ledger}?{query}"), *INVALID)
    for query in ("by=", "by=%00", "by=%E2%80%AE", "by=" + "x" * 101, "by=a&by=b", "poison=1"):
        sent = request("PATCH", f"/api/users/1?{query}", b'{"frozen":true}', "If-Match: *")
        yield Case(f"settings ?{query[:20]}", sent, *INVALID, None, b"poison")


def days() -> Iterator[Case]:
    """Days that do not exist, or are not written as YYYY-MM-DD."""
    wrong = (
        *("0000-00-00", "0000-01-01", "-001-01-01", "10000-01-01", "99999-12-31", "2026-13-01"),
        *("2026-00-10", "2026-02-30", "2025-02-29", "2026-11-31", "2026-1-1", "26-11-21", "2026"),
        *("20261121", "2026-W47-6", "2026-325", "2026/11/21", "21.11.2026", "11-21-2026", "today"),
        *("2026-11-21T00:00:00Z", "2026-11-21T00:00:00", "2026-11-21%2000:00", "2026-11-21Z"),
        *("1700000000", "1", "0", "-1", "1e9", "infinity", "-infinity", "epoch", "NaN", "null"),
        *("", "%202026-11-21", "2026-11-21%20", "2026-11-21%0A", "2026-11-21%00", "%00", "%FF"),
        *("2026%E2%88%9211%E2%88%9221", "%D9%A2%D9%A0%D9%A2%D9%A6-%D9%A1%D9%A1-%D9%A2%D9%A1"),
        *("2026-11-21'--", "2026-11-21,2026-11-20", "[2026-11-21]", "poison", "%"),
        *("9" * 5000, "2" * 400 + "-01-01"),
    )
    path = "/api/users/1/daily-balances"
    for day in wrong:
        yield Case(
            f"{path}?before={day[:30]} ({len(day)})",
            request("GET", f"{path}?before={day}"),
            *INVALID,
            ("query:before", "not-a-date"),
            day.encode() if len(day) > 10 else b"",
        )


def formats() -> Iterator[Case]:
    """Formats that a ledger has not, and a page of an export."""
    entries = "/api/users/1/entries"
    for accept in ("text/plain", "poison", "*/csv", "*/*;q=0", "text/csv;q=poison", "x/" * 5000):
        sent = request("GET", entries, b"", f"Accept: {accept}")
        yield Case(f"{entries} as {accept[:20]}", sent, *UNACCEPTABLE, poison=b"poison")
    for accept in ("text/csv", "application/jsonl"):
        sent = request("GET", f"{entries}?limit=1", b"", f"Accept: {accept}")
        limit = ("query:limit", "not-with-export")
        yield Case(f"{entries}?limit=1 as {accept}", sent, *INVALID, limit)


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or not text.startswith("0"))


def framing() -> Iterator[Case]:
    """Ambiguous HTTP framing (request smuggling): refused, and the connection closed."""
    common = ("Host: localhost", "Content-Type: application/json")
    right = f"Content-Length: {len(CHANGE)}"
    lengths: dict[str, list[str | bytes]] = {
        "negative": ["Content-Length: -1"],
        "plus": [f"Content-Length: +{len(CHANGE)}"],
        "hexadecimal": ["Content-Length: 0x18"],
        "decimal point": [f"Content-Length: {len(CHANGE)}.0"],
        "list": [f"Content-Length: {len(CHANGE)}, {len(CHANGE)}"],
        "spaced": ["Content-Length: 2 4"],
        "word": ["Content-Length: poison"],
        "empty": ["Content-Length:"],
        "2^64": [f"Content-Length: {2**64}"],
        "400 digits": ["Content-Length: " + "9" * 400],
        "superscript": [b"Content-Length: 2\xb2"],
        "twice the same": [right, right],
        "twice, other": [right, "Content-Length: 0"],
        "twice, smaller first": ["Content-Length: 2", right],
        "space before colon": [f"Content-Length : {len(CHANGE)}"],
    }
    for name, lines in lengths.items():
        sent = raw_request("POST", "/api/balance", *common, *lines, body=CHANGE)
        yield Case(f"length {name}", sent, *PARSER, poison=b"poison")
    codings: dict[str, list[str | bytes]] = {
        "and length": ["Transfer-Encoding: chunked", right],
        "and length, other order": [right, "Transfer-Encoding: chunked"],
        "and length 0": ["Content-Length: 0", "Transfer-Encoding: chunked"],
        "unknown": ["Transfer-Encoding: poison"],
        "compressed": ["Transfer-Encoding: gzip, chunked"],
        "twice": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        "empty": ["Transfer-Encoding:"],
        "not last": ["Transfer-Encoding: chunked, gzip"],
        "prefixed": ["Transfer-Encoding: xchunked"],
        "in quotes": ['Transfer-Encoding: "chunked"'],
        "identity": ["Transfer-Encoding: identity"],
        "space before colon": ["Transfer-Encoding : chunked"],
        "tab before colon": ["Transfer-Encoding\t: chunked"],
        "vertical tab": [b"Transfer-Encoding: \x0bchunked"],
        "folded": ["Transfer-Encoding:", " chunked"],
    }
    for name, lines in codings.items():
        sent = raw_request("POST", "/api/balance", *common, *lines, body=chunked(CHANGE))
        refusal = CODING if name in {"unknown", "compressed", "prefixed", "identity"} else PARSER
        yield Case(f"coding {name}", sent, *refusal, poison=b"poison")
    size = b"%x" % len(CHANGE)
    chunks = {
        "no size": b"\r\n" + CHANGE,
        "negative": b"-" + size + b"\r\n" + CHANGE,
        "prefixed": b"0x" + size + b"\r\n" + CHANGE,
        "no digit": b"poison\r\n" + CHANGE,
        "64 bits": b"1" + b"0" * 16 + b"\r\n" + CHANGE,
        "spaced": size + b" 1\r\n" + CHANGE,
        "bare line feed": size + b"\n" + CHANGE + b"\n0\n\n",
        "too short": b"2\r\n" + CHANGE + b"\r\n0\r\n\r\n",
        "no end of chunk": size + b"\r\n" + CHANGE + b"0\r\n\r\n",
    }
    for name, body in chunks.items():
        sent = raw_request("POST", "/api/balance", *common, "Transfer-Encoding: chunked", body=body)
        yield Case(f"chunk {name}", sent, *PARSER, poison=b"poison")
    heads = {
        "nonsense": b"poison\r\n\r\n",
        "HTTP/1.10": b"GET /api/users HTTP/1.10\r\nHost: localhost\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/9.9": b"GET /api/users HTTP/9.9\r\nHost: localhost\r\n\r\n",
        "HTTPS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "line feeds alone": request(body=CHANGE).replace(b"\r\n", b"\n"),
        "no colon": b"GET /api/users HTTP/1.1\r\nHost localhost\r\n\r\n",
        "no name": b"GET /api/users HTTP/1.1\r\n: poison\r\n\r\n",
        "space in name": b"GET /api/users HTTP/1.1\r\nHo st: poison\r\n\r\n",
        "byte FF in name": b"GET /api/users HTTP/1.1\r\nHo\xffst: poison\r\n\r\n",
        "NUL in value": b"GET /api/users HTTP/1.1\r\nHost: poi\0son\r\n\r\n",
        "no host": b"GET /api/users HTTP/1.1\r\n\r\n",
        "two hosts": b"GET /api/users HTTP/1.1\r\nHost: a\r\nHost: poison\r\n\r\n",
        "the same host twice": b"GET /api/users HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n",
        "two hosts in one": b"GET /api/users HTTP/1.1\r\nHost: a, poison\r\n\r\n",
        "host with a path": b"GET /api/users HTTP/1.1\r\nHost: poison/x\r\n\r\n",
        "host with a user": b"GET /api/users HTTP/1.1\r\nHost: poison@a\r\n\r\n",
        "host with no port": b"GET /api/users HTTP/1.1\r\nHost: a:poison\r\n\r\n",
        "host beyond ASCII": b"GET /api/users HTTP/1.1\r\nHost: poison\xc3\xa9\r\n\r\n",
        "two hosts in HTTP/1.0": b"GET /api/users HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
        "coding in HTTP/1.0": b"POST /api/balance HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "first line folded": b"GET /api/users HTTP/1.1\r\n Host: poison\r\n\r\n",
    }
    for name, sent in heads.items():
        yield Case(f"head {name}", sent, *PARSER, poison=b"poison")


def headers() -> Iterator[Case]:
    """Other invalid headers: they have no effect, and are not repeated in the answer."""
    ids = (
        "poison id",
        "poison\ttab",
        b"poison\xe9",
        "poison" * 100,
        "",
        "a" * 101,
        "poison, poison",
    )
    for value in ids:
        line = b"X-Request-Id: " + _bytes(value)
        sent = request("GET", "/api/users/0", b"", line)
        yield Case(f"request id {value[:10]!r}", sent, *INVALID, None, _bytes(value))
    for name in ("Host", "Origin", "Referer", "X-Forwarded-Host", "X-Forwarded-Prefix", "Cookie"):
        sent = request("GET", "/nowhere/", b"", f"{name}: poison.example")
        if name == "Host":
            sent = raw_request("GET", "/nowhere/", "Host: poison.example", "Connection: close")
        refused = (421, "misdirected-request") if name == "Host" else NOWHERE
        yield Case(f"header {name}", sent, *refused, poison=b"poison")
    for name in ("X-HTTP-Method-Override", "X-Original-URL", "X-Rewrite-URL"):
        sent = request("GET", "/api/users/0", CHANGE, f"{name}: POST /api/balance")
        yield Case(f"header {name}", sent, *INVALID)
    many = [f"X-{number}: {number}" for number in range(1000)]
    yield Case("1000 headers", request("GET", "/api/users/0", b"", *many), *INVALID)


def all_cases() -> list[Case]:
    """Return the whole table."""
    groups = (
        *(numbers, texts, refusals, malformed_bodies, wrong_objects, arguments, schedules),
        *(media_types, sizes, methods),
    )
    more = (keys, tags, ids, addresses, queries, times, moments, filters, formats, days)
    http = (framing, headers)
    return [case for group in (*groups, *more, *http) for case in group()]
