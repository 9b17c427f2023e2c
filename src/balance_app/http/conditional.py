"""Conditional requests: `If-Match` and `If-None-Match` (RFC 9110, 13.1)."""

import re
from typing import Final

from starlette.requests import Request

from balance_app.errors import MalformedRequest
from balance_app.http.body import header_values

ANY: Final = ["*"]
_TAG: Final = re.compile(rb'(W/)?"([!#-~\x80-\xff]*)"')
_LIST: Final = re.compile(rb"[ \t]*%b(?:[ \t]*,[ \t]*%b)*[ \t]*" % (2 * (_TAG.pattern,)))


def if_match(request: Request) -> list[str] | None:
    """Return the entity tags of `If-Match`, `ANY` for `*`, None without the header.

    Weak ones are left out: they match nothing in the strong comparison.

    Raises:
        MalformedRequest: it is no list of entity tags.
    """
    tags = _tags(request, b"if-match")
    if tags is None or tags == ANY:
        return tags
    return [tag for tag in tags if not tag.startswith("W/")]


def matches_none(request: Request, tag: str) -> bool:
    """Return whether `If-None-Match` allows the answer, which has this entity tag.

    Raises:
        MalformedRequest: it is no list of entity tags.
    """
    tags = _tags(request, b"if-none-match")
    return tags is None or (tags != ANY and tag not in [each.removeprefix("W/") for each in tags])


def _tags(request: Request, name: bytes) -> list[str] | None:
    values = header_values(request, name)
    if not values:
        return None
    if [value.strip(b" \t") for value in values] == [b"*"]:
        return ANY
    # Several headers are one list.
    value = b",".join(values)
    if not _LIST.fullmatch(value):
        header = name.decode().title()
        raise MalformedRequest(f'{header} is * or entity tags in quotes, like "2.1.0".')
    return [weak.decode() + tag.decode("latin-1") for weak, tag in _TAG.findall(value)]
