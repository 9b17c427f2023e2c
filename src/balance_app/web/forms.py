"""Forms: reading them, and the values of their fields; each is text, as it was typed."""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from balance_app.balances.api.schemas import KEY_PATTERN, Described
from balance_app.errors import InvalidRequest, MalformedRequest, UnsupportedMediaType
from balance_app.http.body import header_values, parse_json, read_body
from balance_app.http.params import Who
from balance_app.web.pages import is_number

FIELDS: Final = 20
INCOMPLETE: Final = "The form is incomplete. Reload the page."

_TYPE: Final = b"application/x-www-form-urlencoded"
_WHOLE: Final = re.compile(r"-?[0-9]{1,16}", re.ASCII)


async def read_form(request: Request) -> dict[str, str]:
    """Read the fields of a form; all are text.

    Raises:
        UnsupportedMediaType: it is not a form.
        MalformedRequest: it can't be read, or names a field twice.
        BodyTooLarge, RequestTimeout: as `read_body` says.
    """
    declared = header_values(request, b"content-type")
    if [value.partition(b";")[0].strip().lower() for value in declared] != [_TYPE]:
        raise UnsupportedMediaType("Send the form as application/x-www-form-urlencoded.")
    raw = await read_body(request)
    try:
        pairs = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, max_num_fields=FIELDS, errors="strict"
        )
    except ValueError:
        raise MalformedRequest("The form can't be read.") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise MalformedRequest("A field was sent twice.")
    return fields


def positive(form: Mapping[str, str], name: str) -> int:
    """Return the number in a field; spaces between its digits are allowed.

    Raises:
        InvalidRequest: it is no whole number from 1 to 2^53-1.
    """
    text = re.sub(r"\s", "", form.get(name, ""))
    if not is_number(text):
        raise InvalidRequest((f"/{name}", "not-an-integer"))
    return int(text)


def whole(form: Mapping[str, str], name: str) -> int:
    """Return the number in a field, which may be 0 or negative.

    Raises:
        InvalidRequest: it is no whole number.
    """
    text = re.sub(r"\s", "", form.get(name, "")).replace("\N{MINUS SIGN}", "-")
    if not _WHOLE.fullmatch(text):
        raise InvalidRequest((f"/{name}", "not-an-integer"))
    return int(text)


def described(form: Mapping[str, str]) -> Described:
    """Return the reference and the note in a form; an empty field has none.

    Raises:
        InvalidRequest: one of them is not printable, or too long.
    """
    given = {name: form.get(name, "").strip() for name in ("reference", "note")}
    return parse_json(to_json({name: text or None for name, text in given.items()}), Described)


def who(form: Mapping[str, str]) -> str:
    """Return the name that a form was sent with.

    Raises:
        InvalidRequest: it is not printable, or too long.
    """
    try:
        return Who(by=form.get("by", "").strip() or "page").by
    except ValidationError:
        raise InvalidRequest(("/by", "not-printable")) from None


def key_of(form: Mapping[str, str]) -> str:
    """Return the form's idempotency key.

    Raises:
        MalformedRequest: it has none.
    """
    key = form.get("key", "")
    if not re.fullmatch(KEY_PATTERN, key, re.ASCII):
        raise MalformedRequest(INCOMPLETE)
    return key


def go_to(where: str) -> Response:
    """Return the redirect to the page that shows what a form did."""
    return RedirectResponse(where, status_code=303, headers={"Cache-Control": "no-store"})
