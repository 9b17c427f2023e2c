"""Proactive content negotiation by `Accept` (RFC 9110, 12.5.1)."""

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple
from urllib.request import parse_http_list

from starlette.requests import Request

from balance_app.errors import PROBLEM_JSON, NotAcceptable
from balance_app.http.body import header_values

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - of HTTP's grammar
_PARAMETER: Final = rf'[ \t]*;[ \t]*(?:({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*"))?'
_RANGE: Final = re.compile(rf"({_TOKEN})/({_TOKEN})((?:{_PARAMETER})*)")
_PARAMETERS: Final = re.compile(_PARAMETER)
_WEIGHT: Final = re.compile(r"0(?:\.[0-9]{0,3})?|\.[0-9]{1,3}|1(?:\.0{0,3})?")


class _Range(NamedTuple):
    """A media range that a client accepts, with `*` for any; of `weight` 0: does not accept."""

    kind: str
    subtype: str
    weight: float

    def precision(self, offer: str) -> int | None:
        """Return how precisely it names a media type, None if it does not."""
        kind, _, subtype = offer.partition("/")
        if self.kind == kind and self.subtype in {subtype, "*"}:
            return 1 if self.subtype == "*" else 2
        return 0 if self.kind == self.subtype == "*" else None


def preferred(request: Request, offers: Sequence[str]) -> str:
    """Return the media type that the client prefers, the first of those that it likes equally.

    The most precise range that names a type has its weight. Without `Accept`, or with an empty one,
    it is the first. Ranges that can't be read are left out, and parameters are not compared.

    Raises:
        NotAcceptable: the client accepts none of them.
    """
    accept = b",".join(header_values(request, b"accept")).decode("latin-1")
    if not accept.strip(" \t,"):
        return offers[0]
    ranges = list(_ranges(accept))
    weights = {offer: _weight(ranges, offer) for offer in offers}
    best = max(offers, key=weights.__getitem__)
    if not weights[best]:
        raise NotAcceptable(offers)
    return best


def prefers_html(request: Request) -> bool:
    """Return whether the client prefers HTML to JSON, as browsers do; `*/*` prefers neither."""
    accept = b",".join(header_values(request, b"accept")).decode("latin-1")
    if "text/" not in accept.lower():  # almost all programs
        return False
    ranges = list(_ranges(accept))
    json = max(_weight(ranges, offer) for offer in ("application/json", PROBLEM_JSON))
    return _weight(ranges, "text/html") > json


def _weight(ranges: list[_Range], offer: str) -> float:
    named = [
        (precision, each.weight)
        for each in ranges
        if (precision := each.precision(offer)) is not None
    ]
    return max(named, default=(0, 0.0))[1]


def _ranges(accept: str) -> Iterator[_Range]:
    for item in parse_http_list(accept):
        # Some clients write `*` for `*/*`.
        text = re.sub(r"^\*(?!/)", "*/*", item.strip(" \t").lower())
        found = _RANGE.fullmatch(text)
        if found is None:
            continue
        given = dict(_PARAMETERS.findall(found[3]))
        weight = given.get("q", "1")
        if _WEIGHT.fullmatch(weight):
            yield _Range(found[1], found[2], float(weight))
