"""Sentences about what is wrong with a request: each names the field and the cure."""

import re
from string import Formatter
from typing import Final

import pytest

from balance_app.errors import InvalidRequest
from balance_app.faults import FAULT_CODES, SENTENCES, fault, summary, twice, unknown
from balance_app.http.body import StrictModel, parse_json


class _Model(StrictModel):
    amount: int
    note: str = ""
    frozen: bool = False


WRONG: Final = [
    ('{"amount":2.0}', "amount must be an integer, without decimals."),
    ('{"amount":2.5}', "amount must be an integer, without decimals."),
    ('{"amount":1e400}', "amount must be an integer, without decimals."),
    ('{"amount":"2"}', "amount must be an integer, without quotes."),
    ('{"amount":true}', "amount must be an integer, not true or false."),
    ('{"amount":null}', "amount must be an integer, not null."),
    ('{"amount":[2]}', "amount must be an integer, not a list."),
    ('{"amount":{}}', "amount must be an integer, not an object."),
    ("{}", "amount is required."),
    ("[]", "The body must be a JSON object."),
    ("2", "The body must be a JSON object."),
    ('{"amount":2,"ammount":2}', 'Unknown field "ammount". Did you mean amount?'),
    ('{"amount":2,"x":2}', 'Unknown field "x". Known: amount, frozen, note.'),
    ('{"amount":2,"<b>":2}', "Unknown field. Known: amount, frozen, note."),
    ('{"amount":2,"amount":3}', 'The field "amount" is there twice. Send it once.'),
    ('{"amount":2,"":1,"":1}', "A field is there twice. Send each once."),
    ('{"amount":2,"note":3}', "note must be a text in quotes."),
    ('{"amount":2,"frozen":1}', "frozen must be true or false, without quotes."),
    (
        '{"amount":2,"note":"\\u0000"}',
        "note has a character that can't be stored: NUL, or half of a surrogate pair.",
    ),
    ('{"amount":"2","note":3}', "amount must be an integer, without quotes. note must be a text "),
]


@pytest.mark.parametrize(("body", "sentence"), WRONG)
def test_a_sentence_names_the_field_and_the_cure(body: str, sentence: str) -> None:
    """In `detail`, and each fault its own in `errors`."""
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body.encode(), _Model)
    assert caught.value.detail.startswith(sentence)
    assert caught.value.body()["errors"][0]["detail"] in caught.value.detail


def test_every_code_has_a_sentence() -> None:
    """A sentence that needs nothing but the name, and ends with a full stop."""
    assert set(FAULT_CODES.values()) <= SENTENCES.keys()
    for code, text in SENTENCES.items():
        assert {name for _, name, _, _ in Formatter().parse(text) if name} <= {"name"}, code
        assert re.fullmatch(r"\S.*\.", text), code


def test_limits_are_named() -> None:
    """The one that was passed; without a limit that is known, that there is one."""
    assert fault("/a", "out-of-range", {"ge": 1}).detail == "a must be at least 1."
    assert fault("query:limit", "out-of-range", {"le": 9}).detail == "limit must be at most 9."
    assert fault("/a", "out-of-range").detail == "a is out of range."
    choice = {"expected": "'asc' or 'desc'"}
    assert fault("query:order", "unknown-value", choice).detail == "order must be 'asc' or 'desc'."


@pytest.mark.parametrize("name", ["<b>", "a b", "", "\x1b[31m", "é", "x" * 41, "__proto__", 7])
def test_only_a_plain_name_is_repeated(name: object) -> None:
    """Whatever else is sent as a name is in no sentence."""
    for found in (unknown("query:", name), twice("", name), fault(f"/args/{name}", "not-text")):
        assert not name or str(name) not in found.detail.replace("characters", "")


def test_many_faults_are_one_short_text() -> None:
    """Three of them, and how many there are beside."""
    faults = [fault(f"/f{number}", "required") for number in range(5)]
    assert summary(faults) == "f0 is required. f1 is required. f2 is required. (2 more.)"
