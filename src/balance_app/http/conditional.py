"""Conditional requests: `If-Match` and `If-None-Match` (RFC 9110, 13.1)."""

import re
from typing import Final, Literal, TypeAlias

from starlette.requests import Request

from balance_app.errors import MalformedRequest
from balance_app.http.body import header_values

ANY: Final = "*"
_TAG: Final = re.compile(rb'(W/)?"([!#-~\x80-\xff]*)"')
_LIST: Final = re.compile(rb"[ \t]*%b(?:[ \t]*,[ \t]*%b)*[ \t]*" % (2 * (_TAG.pattern,)))

# Each tag, and whether it is weak.
_Tags: TypeAlias = list[tuple[str, bool]]


def if_match(request: Request) -> list[str] | Literal["*"] | None:
    """Return the entity tags of `If-Match`, `ANY` for `*`, None without the header.

    Weak ones are left out: they match nothing in the strong comparison.

    Raises:
        MalformedRequest: it is no list of entity tags.
    """
    tags = _tags(request, b"if-match")
    if tags is None or tags == ANY:
        return tags
    return [tag for tag, weak in tags if not weak]


def matches_none(request: Request, tag: str) -> bool:
    """Return whether `If-None-Match` allows the answer, which has this entity tag.

    Raises:
        MalformedRequest: it is no list of entity tags.
    """
    tags = _tags(request, b"if-none-match")
    return tags is None or (tags != ANY and all(each != tag for each, _ in tags))


def _tags(request: Request, name: bytes) -> _Tags | Literal["*"] | None:
    values = header_values(request, name)
    if not values:
        return None
    if [value.strip(b" \t") for value in values] == [b"*"]:
        return ANY
    if not all(_LIST.fullmatch(value) for value in values):
        header = name.decode().title()
        raise MalformedRequest(f'{header} is * or entity tags in quotes, like "2.1.0".')
    # Several headers are one list.
    return [
        (tag.decode("latin-1"), bool(weak)) for value in values for weak, tag in _TAG.findall(value)
    ]
