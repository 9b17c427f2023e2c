"""Numbers and texts of callers are bounded: none of them causes more than a 4xx."""

from typing import Any, Final

import httpx
import pytest
from pydantic import Field

from balance_app.errors import InvalidRequest
from balance_app.http.body import StrictModel, parse_json
from balance_app.http.openapi import json_request
from tests.processes import Instance
from tests.web.test_stream import version, watch

NUMBERS: Final = (
    *("9" * 20, "9" * 400, "9" * 4301, "9" * 5000, "0" * 5000, "-" + "9" * 5000, "1" + "0" * 5000),
    *("1e999", "%D9%A1" * 9, "%C2%B2", "%F0%9D%9F%8F" * 99, "NaN", "1.5", "0x10", "+1"),
)
TEXTS: Final = (
    "%00",
    "a%00b",
    "%ED%A0%80",
    "%FF",
    "%C3%28",
    "a" * 9000,
    "%F4%90%80%80",
    "%1B",
    "%0A",
)
QUERIES: Final = (
    *("/?user={}", "/?user=1&before={}", "/?user=1&entry={}", "/?did=run&job={}", "/?did={}&job=a"),
    *("/jobs?name={}", "/jobs?state={}", "/jobs?after={}", "/static/app.css?v={}"),
    *(
        "/api/users?after={}",
        "/api/users?limit={}",
        "/api/users/{}",
        "/api/users/1/entries?after={}",
    ),
    *("/api/users/{}/entries", "/api/users/1/entries?limit={}", "/problems/{}"),
    *(
        "/api/users/1/entries?order={}",
        "/api/users/1/entries?from={}",
        "/api/users/1/entries?to={}",
    ),
    *("/api/users/1/entries?reference={}", "/api/users/1?at={}", "/api/users/1?version={}"),
    *("/api/users?externalId={}", "/api/users/{}/settings", "/api/users/1/settings?after={}"),
    *("/api/users/{}/holds", "/api/users/1/holds?state={}", "/api/users/1/holds?after={}"),
    *("/api/users/{}/changes/k", "/api/users/1/changes/{}", "/api/transfers/{}", "/api/holds/{}"),
    *("/api/cron/history?before={}", "/api/cron/history?limit={}", "/api/cron/history?job={}"),
    *(
        "/api/cron/history?outcome={}",
        "/jobs/{}",
        "/jobs/{}/cancel",
        "/jobs/{}/runs/1",
        "/jobs/a/runs/{}",
        "/api/cron/runs/{}/log",
        "/jobs/a?before={}",
        "/static/{}",
    ),
    *("/docs/assets/{}", "/{}"),
)
STEERING: Final = (
    *("/api/cron/jobs/{}/run", "/api/cron/jobs/{}/pause", "/api/cron/jobs/{}/resume"),
    *("/api/cron/jobs/{}/cancel", "/api/cron/jobs/a/run?by={}", "/api/cron/jobs/a/pause?reason={}"),
)
MOVING: Final = (
    *("/api/users/{}/entries/1/reverse", "/api/users/404404/entries/{}/reverse"),
    *("/api/holds/{}/capture", "/api/holds/{}/void"),
)
FORMS: Final = (
    *("/jobs/{}/run", "/jobs/{}/pause", "/jobs/{}/resume", "/jobs/{}/cancel"),
    *("/jobs/a/pause|by={}", "/jobs/a/pause|by=a&reason={}", "/jobs/a/run|back={}&by=a"),
    *("/change|user={}", "/change|user=1&what=add&key=k&amount={}", "/change|user=1&what={}&key=k"),
    *("/change|user=1&what=add&amount=1&key={}", "/change|{}=1"),
)
HEADERS: Final = (
    *("X-Request-Id", "traceparent", "Idempotency-Key", "Cookie", "Accept-Encoding", "Referer"),
    *("Origin", "Sec-Fetch-Site", "If-None-Match", "If-Match", "Range", "Content-Encoding"),
)


@pytest.mark.parametrize("values", [NUMBERS, TEXTS], ids=["numbers", "texts"])
async def test_no_hostile_value_gets_a_5xx(
    client: httpx.AsyncClient, values: tuple[str, ...]
) -> None:
    """In paths, queries, forms and headers, wherever a value is read."""
    form = "application/x-www-form-urlencoded"
    for value in values:
        for template in QUERIES:
            answer = await client.get(template.format(value))
            assert answer.status_code < 500, (template, value[:20], answer.text[:200])
        for template in STEERING:
            answer = await client.post(template.format(value))
            assert 400 <= answer.status_code < 500, (template, value[:20], answer.text[:200])
        for template in MOVING:
            answer = await client.post(template.format(value))
            assert answer.status_code < 500, (template, value[:20], answer.text[:200])
        answer = await client.put(f"/api/users/by-external-id/{value}")
        assert answer.status_code < 500, (value[:20], answer.text[:200])
        for template in FORMS:
            path, _, body = template.format(value).partition("|")
            answer = await client.post(path, content=body, headers={"Content-Type": form})
            assert answer.status_code < 500, (template, value[:20], answer.text[:200])
        for name in HEADERS:
            for method, path in (("GET", "/api/users/1"), ("PATCH", "/api/users/1")):
                answer = await client.request(method, path, headers={name: value})
                assert answer.status_code < 500, (name, value[:20], answer.text[:200])


async def test_a_stream_version_of_any_length_is_accepted(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """An unknown version, however long, gets all fragments."""
    boot = version((await client.get("/")).text).partition(".")[0]
    for number in ("9" * 5000, "9" * 17, "\u0661", "-1", "1e3", ""):
        query = f"?since={boot}.{number}"
        async with watch(instance.url, query) as viewer:
            assert "jobs-list" in (await viewer.event())["html"], number
        if number.isascii():
            async with watch(instance.url, last_id=f"{boot}.{number}") as viewer:
                assert "jobs-list" in (await viewer.event())["html"], number


class _Inner(StrictModel):
    words: list[str] = Field(default_factory=list)


class _Noted(StrictModel):
    """A model without any validation of its own."""

    note: str | None = None
    plain: str = ""
    patterned: str = Field("", pattern="^.*$")
    inner: _Inner = _Inner()
    by_name: dict[str, str] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (r'{"note":"a\u0000b"}', "/note"),
        (r'{"plain":"\u0000"}', "/plain"),
        (r'{"patterned":"\u0000"}', "/patterned"),
        (r'{"inner":{"words":["a","\u0000"]}}', "/inner/words/1"),
        (r'{"byName":{"a":"\u0000"}}', "/byName/a"),
        (r'{"byName":{"\u0000":"a"}}', "/byName"),
        (r'{"note":"\ud800"}', "/note"),
        (r'{"plain":"a\udfff"}', "/plain"),
        (r'{"inner":{"words":["\udc00\ud800"]}}', "/inner/words/0"),
    ],
)
def test_a_text_that_can_not_be_stored_is_refused(body: str, place: str) -> None:
    """NUL and lone surrogates, in any text of any model, future ones included."""
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body.encode(), _Noted)
    faults: Any = caught.value.members["errors"]
    assert [(each["pointer"], each["code"]) for each in faults] == [(place, "not-text")]


def test_other_texts_are_accepted() -> None:
    """Control: an escaped backslash before u0000, and any other character."""
    body = r'{"note":"\\u0000 \ud83d\udcb0 \u0001\n €"}'
    assert parse_json(body.encode(), _Noted).note == "\\u0000 \U0001f4b0 \x01\n €"
    schema = json_request(_Noted, key_pattern="x")["requestBody"]["content"]["application/json"]
    assert schema["schema"]["properties"]["plain"]["pattern"] == r"^[^\u0000]*$"
    assert schema["schema"]["properties"]["patterned"]["pattern"] == "^.*$"
