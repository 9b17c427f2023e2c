"""`If-Match` and `If-None-Match`: which are read how, and which are refused."""

from typing import Final, Literal

import pytest
from starlette.requests import Request

from balance_app.errors import MalformedRequest
from balance_app.http.conditional import ANY, if_match, matches_none

TAG: Final = "2.1.0"

MALFORMED: Final = (
    *("", " ", "\t", "2.1.0", '"2.1.0', '2.1.0"', "'2.1.0'", '"', '"""', '"a""b"', '"a" "b"'),
    *(
        'w/"a"',
        'W /"a"',
        'W/ "a"',
        "W/",
        "W/a",
        '"a b"',
        '"a\tb"',
        '"a\x7f"',
        '"a\0"',
        "\xe2\x80\x9ca\xe2\x80\x9d",
    ),
    *("**", "*, *", '*, "a"', '"a", *', '"*" *', ",", '"a",', ',"a"', '"a",,"b"', '"a";"b"'),
    *('"a"\n', '"a"\r\n"b"', '"a"\x0b', '"a"\xa0', "null", '["a"]', '"a"=1', "x" * 10_000),
    *('"' + "x" * 10_000, '"a",' * 2_500, '"a" ' * 2_500, " " * 10_000, "," * 10_000),
)
READ: Final[dict[str, list[str] | Literal["*"]]] = {
    '"2.1.0"': [TAG],
    ' \t"2.1.0"\t ': [TAG],
    '"a","2.1.0"': ["a", TAG],
    '"a" \t, \t "2.1.0"': ["a", TAG],
    'W/"a", "2.1.0"': [TAG],
    'W/"2.1.0"': [],
    'W/"2.1.0",W/"a"': [],
    '""': [""],
    '"*"': ["*"],
    '"W/"': ["W/"],
    '"W/2.1.0"': ["W/2.1.0"],
    '"a,b", "c"': ["a,b", "c"],
    '"!#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~"': ["!#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"],
    '"\xe9\xff"': ["\xe9\xff"],
    '"' + "x" * 10_000 + '"': ["x" * 10_000],
    ",".join(['"a"'] * 2_500): ["a"] * 2_500,
    "*": ANY,
    " \t* ": ANY,
}


def request(name: str, *values: str) -> Request:
    """Return a request with a header of this name for each of the values."""
    headers = [(name.encode(), value.encode("latin-1")) for value in values]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize("value", MALFORMED, ids=lambda value: ascii(value)[:20])
def test_what_is_no_list_of_tags_is_refused(value: str) -> None:
    """In either header, and whatever the other headers of the same name are."""
    for values in ([value], ['"2.1.0"', value], [value, '"2.1.0"'], [value, value]):
        with pytest.raises(MalformedRequest, match=r"^If-Match is \* or entity tags"):
            if_match(request("if-match", *values))
        with pytest.raises(MalformedRequest, match=r"^If-None-Match is \* or entity tags"):
            matches_none(request("if-none-match", *values), TAG)


@pytest.mark.parametrize("value", READ, ids=lambda value: ascii(value)[:20])
def test_what_is_read(value: str) -> None:
    """Weak tags match nothing strong; for reading again they are as good as others."""
    assert if_match(request("if-match", value)) == READ[value]
    matches = READ[value] == ANY or f'"{TAG}"' in value
    assert matches_none(request("if-none-match", value), TAG) is not matches


def test_several_headers_are_one_list() -> None:
    """As RFC 9110 says of lists; `*` is no tag of a list."""
    assert if_match(request("if-match", '"a"', 'W/"b"', '"c", "d"')) == ["a", "c", "d"]
    assert not matches_none(request("if-none-match", '"a"', f'W/"{TAG}"'), TAG)
    for values in (("*", "*"), ("*", '"a"'), ('"a"', "*")):
        with pytest.raises(MalformedRequest):
            if_match(request("if-match", *values))


def test_without_the_header_nothing_is_compared() -> None:
    """The other header's tags are none of this one."""
    assert if_match(request("if-none-match", '"a"')) is None
    assert matches_none(request("if-match", f'"{TAG}"'), TAG)


def test_quotes_make_a_tag() -> None:
    """`"*"` is a tag that no account has, and not any; `"W/2.1.0"` is not weak."""
    assert if_match(request("if-match", '"*"')) != ANY
    assert matches_none(request("if-none-match", '"*"', '"W/2.1.0"'), TAG)
