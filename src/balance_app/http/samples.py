"""Samples of each operation, in curl, Python and JavaScript, made from its description.

They are in the OpenAPI document as `x-codeSamples`, and shown at `/docs`. `ADDRESS` stands for the
one that the document is served from.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Final

ADDRESS: Final = "http://localhost:3000"

EVENTS: Final = "text/event-stream"
_JSON: Final = "application/json"
_LINE: Final = 90  # characters


@dataclass(frozen=True)
class _Call:
    """A request that succeeds, or would if what it names were there."""

    method: str
    url: str
    headers: dict[str, str]
    body: object
    answers: frozenset[str]  # the media types


def samples(
    path: str, method: str, operation: dict[str, Any], *, root: str, key: bool
) -> list[dict[str, str]]:
    """Return the samples of an operation as it is described; with `key` they send an API key."""
    call = _call(path, method, operation, root=root, key=key and bool(operation["security"]))
    return [
        {"lang": "Shell", "label": "curl", "source": _curl(call)},
        {"lang": "Python", "label": "Python", "source": _python(call)},
        {"lang": "JavaScript", "label": "JavaScript", "source": _javascript(call)},
    ]


def _call(path: str, method: str, operation: dict[str, Any], *, root: str, key: bool) -> _Call:
    sent = {
        (each["in"], each["name"]): _example(each, operation["operationId"])
        for each in operation.get("parameters", ())
        if each.get("required") or each["name"] == "Idempotency-Key"
    }
    values = {name: value for (place, name), value in sent.items() if place == "path"}
    query = "&".join(f"{name}={value}" for (place, name), value in sent.items() if place == "query")
    filled = re.sub(r"{(\w+)}", lambda found: values[found[1]], path)
    headers = {name: value for (place, name), value in sent.items() if place == "header"}
    if key:
        headers["Authorization"] = "Bearer ba_..."
    body = operation.get("requestBody", {})
    content = body.get("content", {}).get(_JSON, {}) if body.get("required") else {}
    example = content.get("example")
    if example is not None:
        needed = content["schema"].get("required", example)
        example = {name: example[name] for name in needed}
    answers = {
        kind
        for status, each in operation["responses"].items()
        if status.startswith("2")
        for kind in each.get("content", {})
    }
    return _Call(
        method.upper(),
        f"{ADDRESS}{root}{filled}{'?' if query else ''}{query}",
        headers,
        example,
        frozenset(answers),
    )


def _example(parameter: dict[str, Any], operation_id: str) -> str:
    if parameter["name"] == "Idempotency-Key":  # each belongs to one request
        return f"{operation_id.replace('_', '-')}-1"
    schema = parameter["schema"]
    examples = schema.get("examples") or [parameter.get("example", parameter["name"].lower())]
    return str(examples[0])


def _curl(call: _Call) -> str:
    lines = ["curl"]
    implied = "GET"
    if call.body is not None:
        lines[0] += f" --json {_quoted(json.dumps(call.body))}"
        implied = "POST"
    elif call.answers == {EVENTS}:
        lines[0] += " --no-buffer"
    if call.method != implied:
        lines[0] += f" -X {call.method}"
    lines += [f"-H {_quoted(f'{name}: {value}')}" for name, value in call.headers.items()]
    lines.append(_quoted(call.url))
    return (" " if sum(map(len, lines)) < _LINE else " \\\n  ").join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _python(call: _Call) -> str:
    arguments = [json.dumps(call.url)]
    if call.headers:
        arguments.append(f"headers={call.headers!r}".replace("'", '"'))
    if call.body is not None:
        arguments.append(f"json={call.body!r}".replace("'", '"'))
    if call.answers == {EVENTS}:
        given = ", ".join([json.dumps(call.method), *arguments, "timeout=None"])
        return (
            f"import httpx\n\nwith httpx.stream({given}) as answer:\n"
            "    for line in answer.iter_lines():\n        print(line)"
        )
    given = "".join(f"\n    {each}," for each in arguments)
    shown = "answer.json()" if _JSON in call.answers else "answer.text"
    return (
        f"import httpx\n\nanswer = httpx.{call.method.lower()}({given}\n)\n"
        f"print(answer.status_code, {shown})"
    )


def _javascript(call: _Call) -> str:
    if call.answers == {EVENTS} and not call.headers:
        return (
            f"const events = new EventSource({json.dumps(call.url)});\n"
            'events.addEventListener("status", (event) => console.log(JSON.parse(event.data)));'
        )
    headers = {**({"Content-Type": _JSON} if call.body is not None else {}), **call.headers}
    options = [] if call.method == "GET" else [f"method: {json.dumps(call.method)}"]
    if headers:
        options.append(f"headers: {json.dumps(headers)}")
    if call.body is not None:
        options.append(f"body: JSON.stringify({json.dumps(call.body)})")
    given = "".join(f"\n  {each}," for each in options)
    given = f", {{{given}\n}}" if options else ""
    shown = "json()" if _JSON in call.answers else "text()"
    return (
        f"const answer = await fetch({json.dumps(call.url)}{given});\n"
        f"console.log(answer.status, await answer.{shown});"
    )
