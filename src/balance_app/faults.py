"""What is wrong with a request, as sentences: each names the field, and what it must be.

All of them stand here. A value of the request is never repeated; the name of a parameter or field
that does not exist is, if it is a plain word.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

# What may be repeated: it means nothing in HTML, in a terminal, or in a log.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}", re.ASCII)


class Fault(NamedTuple):
    """Where a request is wrong, what it is, and the sentence that says what to send instead.

    `pointer` is a JSON Pointer into the body, or `header:`, `query:` or `path:` and a name.
    """

    pointer: str
    code: str
    detail: str


# The codes of the kinds of faults that pydantic finds; a check of ours raises the code itself.
FAULT_CODES: Final = {
    "extra_forbidden": "unknown-field",
    "string_pattern_mismatch": "not-a-key",  # idempotency keys alone have a pattern
    "missing": "required",
    "int_type": "not-an-integer",
    "int_from_float": "not-an-integer",
    "int_parsing": "not-an-integer",
    "int_parsing_size": "out-of-range",
    "greater_than": "out-of-range",
    "greater_than_equal": "out-of-range",
    "less_than": "out-of-range",
    "less_than_equal": "out-of-range",
    "model_type": "not-an-object",
    "dict_type": "not-an-object",
    "model_attributes_type": "not-an-object",
    "date_parsing": "not-a-date",
    "date_type": "not-a-date",
    "datetime_type": "not-a-time",
    "string_type": "not-a-string",
    "literal_error": "unknown-value",
    "bool_type": "not-a-boolean",
    "finite_number": "not-an-integer",
    "string_unicode": "not-text",
}

# By code; {name} is the field.
SENTENCES: Final[dict[str, str]] = {
    "required": "{name} is required.",
    "not-an-integer": "{name} must be an integer, without decimals.",
    "out-of-range": "{name} is out of range.",
    "zero": "{name} must not be 0.",
    "not-an-object": "{name} must be a JSON object.",
    "not-a-string": "{name} must be a text in quotes.",
    "not-a-boolean": "{name} must be true or false, without quotes.",
    "not-a-date": "{name} must be a date, such as 2026-05-31.",
    "not-a-time": "{name} must be a time with its zone, such as 2026-05-31T09:30:00Z.",
    "not-a-key": "{name} must be 1 to 255 visible ASCII characters, sent once.",
    "not-an-id": "{name} must be an id such as 1-2.",
    "not-a-name": "{name} must be the name of a job: a letter, then letters, digits or hyphens, "
    "all lower case.",
    "not-an-outcome": "{name} must be the outcome of a run, such as succeeded or failed.",
    "not-printable": "{name} must have at least one character, and printable ones only.",
    "not-text": "{name} has a character that can't be stored: NUL, or half of a surrogate pair.",
    "not-json": "{name} must be JSON.",
    "unknown-value": "{name} has a value that is not known.",
    "unknown-field": "There is a field that is not known.",
    "duplicate-key": "A field is there twice. Send each once.",
    "duplicate-parameter": "A query parameter is there twice. Send each once.",
    "same-user": "{name} must be another user: a transfer is between two.",
    "not-with-at": "Send at or version, not both.",
    "not-with-export": "An export has all entries: send no {name}.",
    "not-one-schedule": "Send either everySeconds, or cron, with or without tz.",
    "not-a-schedule": "{name} is no schedule.",
    "not-withdraw-or-add": "{name} must be withdraw or add.",
    "wrong-argument": "{name} is not what the job's function takes.",
    "not-valid": "{name} is not valid.",
}

# More precise ones, if the limit or the choice is known.
_PRECISE: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "out-of-range": (
        ("ge", "{name} must be at least {ge}."),
        ("le", "{name} must be at most {le}."),
        ("gt", "{name} must be more than {gt}."),
        ("lt", "{name} must be less than {lt}."),
    ),
    "not-printable": (("limit", "{name} must be 1 to {limit} characters, all of them printable."),),
    "unknown-value": (("expected", "{name} must be {expected}."),),
    "not-an-integer": (("sent", "{name} must be an integer, {sent}."),),
}
_INTEGERS: Final[dict[type, str]] = {
    str: "without quotes",
    bool: "not true or false",
    type(None): "not null",
    list: "not a list",
    dict: "not an object",
}


def code_of(kind: str) -> str:
    """Return this service's code of a kind of fault that pydantic, or a check of ours, found."""
    code = FAULT_CODES.get(kind, kind)
    return code if code in SENTENCES else "not-valid"


def fault(
    pointer: str,
    code: str,
    context: Mapping[str, object] | None = None,
    *,
    sent: object = 0.0,
) -> Fault:
    """Return a fault with its sentence.

    `context` has the limit that was passed, as pydantic names it. Of the value that was `sent` only
    its type counts.
    """
    known: dict[str, object] = {**(context or {}), "name": _name(pointer)}
    if (instead := _INTEGERS.get(type(sent))) is not None:
        known["sent"] = instead
    text = SENTENCES.get(code, SENTENCES["not-valid"])
    for member, precise in _PRECISE.get(code, ()):
        if member in known:
            text = precise
            break
    sentence = text.format_map(known)
    if " " in str(known["name"]):  # no field: a sentence begins so
        sentence = sentence[:1].upper() + sentence[1:]
    return Fault(pointer, code, sentence)


def unknown(pointer: str, name: object, known: Iterable[str] = ()) -> Fault:
    """Return the fault of a field or query parameter that does not exist."""
    kind = "query parameter" if pointer.startswith("query:") else "field"
    names = sorted(known)
    if not (isinstance(name, str) and _PLAIN_NAME.fullmatch(name)):
        return Fault(pointer, "unknown-field", f"Unknown {kind}.{_choice(names)}")
    near = difflib.get_close_matches(name, names, n=1)
    cure = f" Did you mean {near[0]}?" if near else _choice(names)
    return Fault(pointer, "unknown-field", f'Unknown {kind} "{name}".{cure}')


def twice(pointer: str, name: object) -> Fault:
    """Return the fault of a field or query parameter that was sent twice."""
    kind, code = "field", "duplicate-key"
    if pointer.startswith("query:"):
        kind, code = "query parameter", "duplicate-parameter"
    if not (isinstance(name, str) and _PLAIN_NAME.fullmatch(name)):
        return fault(pointer, code)
    return Fault(pointer, code, f'The {kind} "{name}" is there twice. Send it once.')


def summary(faults: Iterable[Fault]) -> str:
    """Return one text about all faults of a request."""
    details = [each.detail for each in faults]
    shown = " ".join(dict.fromkeys(details[:3]))
    return f"{shown} ({len(details) - 3} more.)" if len(details) > 3 else shown  # noqa: PLR2004


def _choice(names: list[str]) -> str:
    return f" Known: {', '.join(names)}." if names else ""


def _name(pointer: str) -> str:
    """Return what people call the place: "amount", "args/days", "the body"."""
    place = pointer.partition(":")[2] if pointer[:1] != "/" else pointer[1:]
    if all(_PLAIN_NAME.fullmatch(part) for part in place.split("/")):
        return place
    return "a text" if place else "the body"  # in arguments of jobs names are the caller's


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
