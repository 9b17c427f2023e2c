"""The pages of users: finding them, an account's page, and its forms; without a browser."""

import re
from html import unescape
from secrets import token_hex
from typing import Any, Final

import httpx
import pytest

from tests.processes import served
from tests.system.databases import kill, own_postgres
from tests.web import site as pages
from tests.web.site import Site, Tags

HOSTILE: Final = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}&amp;"


def text(html: str, id_: str | None = None) -> str:
    """Return the text of a page, or of one element, with the minus sign of programs."""
    return pages.text(html, id_).replace("\N{MINUS SIGN}", "-")


def fields_of(html: str, do: str = "") -> dict[str, str]:
    """Return the fields of the form that does something, as a browser would send them.

    By default of that which creates a user.
    """
    (form,) = (
        form
        for form in re.findall(r"<form.*?</form>", html, re.DOTALL)
        if (f'value="{do}"' if do else 'aria-labelledby="open-title"') in form
    )
    given: dict[str, str] = {}
    select = ""
    for tag, attributes in Tags(form).found:
        name, value = attributes.get("name") or "", attributes.get("value") or ""
        if tag == "select":
            select = name
        elif tag == "option" and (select not in given or "selected" in attributes):
            given[select] = value
        elif name and (tag == "input" or (tag == "button" and value == do)):
            given[name] = value
        elif tag == "button" and name == "what":
            given.setdefault(name, value)  # what Enter does
    return given


async def submit(site: Site, user: str, do: str, /, **typed: str) -> httpx.Response:
    """Fill in a form of an account's page, and send it."""
    sent = {**fields_of(await site.page(f"/users/{user}"), do), **typed}
    return await site.send(f"/users/{user}", **sent)


async def follow(site: Site, answer: httpx.Response) -> str:
    """Return the page that a form's answer leads to."""
    assert answer.status_code == 303, answer.text
    return await site.page(answer.headers["location"])


async def account(site: Site, user: str) -> dict[str, Any]:
    return dict((await site.client.get(f"/api/users/{user}")).json())


async def patch(site: Site, user: str, **settings: object) -> None:
    answer = await site.client.patch(
        f"/api/users/{user}", json=settings, headers={"If-Match": "*"}, params={"by": "ada"}
    )
    assert answer.status_code == 200, answer.text


async def money(site: Site) -> list[Any]:
    """Return everything that a refused form must leave as it was."""
    return [
        [tuple(row) for row in await site.connection.fetch(f"SELECT * FROM {table} ORDER BY 1, 2")]  # noqa: S608 - written here
        for table in ("users", "entries", "holds", "user_settings", "external_ids")
    ]


# -- finding users ---------------------------------------------------------------------------


async def test_users_are_listed_page_by_page(site: Site) -> None:
    """By id, each with what it has; the next page begins after the last one."""
    for _ in range(26):
        await site.open(7)
    last = int(await site.open(12_345))
    await patch(site, str(last), frozen=True, externalId=f"name-{last}")
    seen: list[str] = []
    path = "/users"
    while path:
        html = await site.page(path)
        seen += re.findall(r'<th scope="row"><a href="/users/(\d+)"', html)
        more = re.search(r'href="([^"]+)"[^>]*>Next page', html)
        path = unescape(more[1]) if more else ""
    assert seen == sorted(set(seen), key=int)
    assert seen[-1] == str(last)
    row = text(html, f"user-{last}")
    assert f"User {last} name-{last} balance 12 345 held 0 available 12 345 " in row
    assert re.search(r"\d s ago ‖ frozen", row)
    assert "No more accounts." in text(await site.page(f"/users?after={last}"))


async def test_a_user_is_found_by_id_and_by_external_id(site: Site) -> None:
    """The only one at once; one whose external id is another's id beside that other."""
    first, second = await site.open(), await site.open()
    await patch(site, second, externalId=HOSTILE)
    for sought, user in ((first, first), (f" {second} ", second), (HOSTILE, second)):
        answer = await site.client.get("/users", params={"find": sought})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/users/{user}")
    html = await site.page(f"/users/{second}")
    assert "<script>alert(1)" not in html
    assert HOSTILE.replace("&amp;", "&amp;") in unescape(html)
    await patch(site, second, externalId=first)
    both = await site.page(f"/users?find={first}")
    assert re.findall(r'<a href="/users/(\d+)">User', both) == [first, second]


@pytest.mark.parametrize(
    "sought", ["nobody", "9007199254740992", "-1", "0", HOSTILE, "a\0b", "x" * 10_000, "\ud83d"]
)
async def test_who_is_not_found_is_reported(site: Site, sought: str) -> None:
    """With 404, and what was typed."""
    answer = await site.client.get(
        httpx.URL("/users", params={"find": sought.encode("utf-8", "replace")})
    )
    assert answer.status_code == 404, answer.text
    assert "No account has the id or external id" in text(answer.text)
    assert "<script>alert(1)" not in answer.text


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/users/me", 422, "A user id is a whole number, 1 or more."),
        ("/users/0", 422, "A user id is a whole number, 1 or more."),
        ("/users/-1", 422, "A user id is a whole number, 1 or more."),
        ("/users/1.5", 422, "A user id is a whole number, 1 or more."),
        ("/users/9007199254740992", 422, "A user id is a whole number, 1 or more."),
        ("/users/%00", 422, "A user id is a whole number, 1 or more."),
        ("/users/٣", 422, "A user id is a whole number, 1 or more."),
        ("/users/9007199254740991", 404, "There is no user 9007199254740991."),
        ("/users/1?before=x", 422, '"before" must be a whole number, 1 or more.'),
        ("/users/1?after=9007199254740992", 422, '"after" must be a whole number, 1 or more.'),
        ("/users/1?holds=-1", 422, '"holds" must be a whole number, 1 or more.'),
        ("/users/1?hold=7777", 404, "There is no such hold."),
        (
            "/users/1?reference=a%00b",
            422,
            "The reference may have at most 200 printable characters.",
        ),
        (f"/users/1?reference={'x' * 201}", 422, "The reference may have at most 200 printable"),
        ("/users?after=x", 422, '"after" must be a whole number, 1 or more.'),
        ("/users/1?did=change&entry=7777", 200, "User 1"),
        ("/users/1?did=hold&hold=x", 422, '"hold" must be a whole number, 1 or more.'),
        ("/users/1?reverse=<b>x", 200, "Reverse an entry"),
        ("/users/1?before=9007199254740991", 200, "opening balance"),
        ("/users/1?after=9007199254740991", 200, "No entries."),
    ],
)
async def test_wrong_addresses_have_a_sentence(
    site: Site, path: str, status: int, sentence: str
) -> None:
    """And the status of the API."""
    html = await site.page(path, status)
    assert sentence in text(html)
    assert "<b>x" not in html


# -- the account -----------------------------------------------------------------------------


async def test_an_account_is_shown_with_all_that_it_has(site: Site) -> None:
    """Figures, settings, line, and what each entry belongs to, with links."""
    user, other = await site.open(1000), await site.open(0)
    await patch(site, user, floor=-50, externalId="customer & co")
    post = site.client.post
    await post(
        "/api/transfers",
        json={"fromUserId": int(user), "toUserId": int(other), "amount": 30, "reference": "rent"},
    )
    holds = [
        (await post("/api/holds", json={"userId": int(user), "amount": 100, **each})).json()["id"]
        for each in ({"expiresInSeconds": 7200, "note": "two nights"}, {"expiresInSeconds": 60})
    ]
    await post(f"/api/holds/{holds[1]}/capture", json={"amount": 40})
    await post(f"/api/users/{user}/entries/2/reverse", json={"note": "wrong one"})
    html = await site.page(f"/users/{user}")
    shown = text(html)
    assert "balance 960 held 100 available 860 floor -50" in shown
    assert "● open · customer & co" in shown
    assert "version 4 entries" in shown
    assert re.search(r"[-\d]+ [:\d]+ ada floor -50 customer & co", text(html, "settings-history"))
    assert re.search(
        r"The balance from [-\d: ]+ UTC to [-\d: ]+ UTC: first 1 000, lowest 930, highest 1 000, "
        r"last 960\.",
        shown,
    )
    rows = {version: text(html, f"entry-{version}") for version in range(1, 5)}
    assert "+1 000 balance 1 000 opening balance" in rows[1]
    assert re.search(r"-30 balance 970 to user \d+ rent \N{EN DASH} reversed by entry 4$", rows[2])
    assert "-40 balance 930 100 held captures hold 2" in rows[3]
    assert re.search(r"\+30 .* reverses entry 2, from user \d+ wrong one", rows[4])
    links = [unescape(link) for link in re.findall(r'href="([^"]+)"', html)]
    for link in (
        f"/users/{other}?before=3#entry-2",
        f"/users/{other}?before=4#entry-3",
        f"/users/{user}?before=3#entry-2",
        f"/users/{user}?hold=2#hold-2",
        f"/users/{user}?reference=rent#statement",
        f"/users/{user}?reverse=3#reverse",
    ):
        assert link in links
    assert re.search(r"hold 1 100 in 1 h 59 min .* two nights", text(html, "hold-1"))
    ended = await site.page(f"/users/{user}?hold=2")
    assert re.search(r"hold 2 100 captured .* captured 40 by entry 3", text(ended, "hold-2"))
    assert f'"/users/{user}?before=4#entry-3"' in ended
    half = await site.page(f"/users/{other}?before=3")
    assert "+30 balance 30 from user" in text(half, "entry-2")


async def test_the_statement_is_paged_both_ways_and_filtered(site: Site) -> None:
    """Each entry once, the latest first; a page knows whether there are newer and older ones."""
    user = await site.open()
    for number in range(59):
        said = {"reference": "a & b"} if number % 2 else {}
        await site.client.post("/api/balance", json={"userId": int(user), "amount": 1, **said})
    for query, versions in (("", range(60, 0, -1)), ("reference=a+%26+b", range(59, 2, -2))):
        html = await site.page(f"/users/{user}?{query}")
        seen = shown(html)
        assert "Newer entries" not in html
        while "Older entries" in html:
            html = await site.page(linked(html, "Older entries"))
            assert "Newer entries" in html
            seen += shown(html)
        assert seen == list(versions)
        back = shown(html)
        while "Newer entries" in html:
            html = await site.page(linked(html, "Newer entries"))
            assert "Older entries" in html
            back += shown(html)
        assert sorted(back) == sorted(versions)
        assert shown(html)[0] == versions[0]
    assert "No entry has the reference “none”." in text(
        await site.page(f"/users/{user}?reference=none")
    )


def shown(html: str) -> list[int]:
    return [int(version) for version in re.findall(r'<tr id="entry-(\d+)"', html)]


def linked(html: str, label: str) -> str:
    (link,) = re.findall(rf'href="([^"]+)"[^>]*>{label}', html)
    return unescape(link)


async def test_more_holds_are_on_a_page_of_their_own(site: Site) -> None:
    """The oldest first."""
    user = await site.open()
    for _ in range(7):
        hold = {"userId": int(user), "amount": 1, "expiresInSeconds": 600}
        await site.client.post("/api/holds", json=hold)
    html = await site.page(f"/users/{user}")
    assert re.findall(r'<tr id="hold-(\d)"', html) == ["1", "2", "3", "4", "5"]
    html = await site.page(linked(html, "More holds"))
    assert re.findall(r'<tr id="hold-(\d)"', html) == ["6", "7"]
    assert "More holds" not in html
    refused = await site.send(f"/users/{user}", do="capture", hold="7", amount="2")
    assert "Not done: the hold is 1, so 2 can't be captured." in text(refused.text, "said-holds")
    row = refused.text[refused.text.index('id="hold-7"') :]
    assert 'value="2" autofocus' in row


async def test_a_hold_that_expires_is_not_held_any_more(site: Site) -> None:
    """No job runs here: the look at the account ends it."""
    user = await site.open(10)
    await submit(site, user, "hold", amount="4", lasts="1", unit="days")
    await site.connection.execute(
        "UPDATE holds SET expires_at = now() WHERE user_id = $1", int(user)
    )
    await site.connection.execute("UPDATE users SET holds_due_at = now() WHERE id = $1", int(user))
    html = await site.page(f"/users/{user}?hold=1")
    assert "held 0 available 10" in text(html)
    assert "expired" in text(html, "hold-1")


# -- forms -----------------------------------------------------------------------------------


async def test_each_form_does_what_it_says_once(site: Site) -> None:
    """Sent twice it has one effect, which the page then reports; a new page's form has another."""
    user, other = await site.open(1000), await site.open(0)
    steps: list[tuple[str, dict[str, str], str]] = [
        (
            "change",
            {"what": "add", "amount": "1 000"},
            "Added 1 000. User {} then had 2 000.",
        ),
        ("change", {"amount": "500"}, "Withdrew 500. User {} then had 1 500."),
        (
            "transfer",
            {"to": other, "amount": "100", "reference": "rent", "note": "May"},
            f"Transferred 100 to user {other}. User {{}} then had 1 400.",
        ),
        ("hold", {"amount": "50", "lasts": "2", "unit": "days"}, "Held 50 until "),
        ("capture", {"amount": "20"}, "Captured 20 of hold 1. User {} then had 1 380."),
        ("hold", {"amount": "60", "lasts": "90", "unit": "minutes"}, "(hold 3)."),
        ("void", {}, "Voided hold 3: 60 is available again."),
        (
            "reverse",
            {"entry": "4"},
            "Reversed entry 4 by entry 6. User {} then had 1 480.",
        ),
        (
            "settings",
            {"floor": "\N{MINUS SIGN}5 00", "externalId": "x-" + user, "by": "ada"},
            f"Done: the floor is -500, the external id is x-{user}, and the account is not frozen.",
        ),
        ("freeze", {"by": "ada"}, "and the account is frozen."),
        ("thaw", {"by": "bob"}, "and the account is not frozen."),
    ]
    for do, typed, said in steps:
        sent = {**fields_of(await site.page(f"/users/{user}"), do), **typed}
        first = await site.send(f"/users/{user}", **sent)
        after = await money(site)
        second = await site.send(f"/users/{user}", **sent)
        assert second.status_code == 303, (do, second.text)
        assert await money(site) == after, do
        if do != "reverse":  # it says that it was reversed before
            assert second.headers["location"] == first.headers["location"]
        html = await follow(site, first)
        place = first.headers["location"].partition("#")[2]
        assert said.format(user) in text(html, f"said-{place}"), (do, text(html))
        assert f'id="{place}"' in html
    again = text(await follow(site, await submit(site, user, "reverse", entry="4")), "said-reverse")
    assert again == "Entry 4 had already been reversed by entry 6."
    # Control: another form has another key.
    before = (await account(site, user))["balance"]
    for _ in range(2):
        assert (await submit(site, user, "change", amount="1")).status_code == 303
    assert (await account(site, user))["balance"] == before - 2
    assert (await account(site, other))["balance"] == 0
    who = "SELECT string_agg(by, ' ' ORDER BY settings_version) FROM user_settings"
    assert await site.value(f"{who} WHERE user_id = $1", int(user)) == "ada ada bob"


REFUSALS: Final = [
    (
        "change",
        {"amount": "50"},
        409,
        (
            "Not done: user {} has 30 available (100, of which 70 is held), so 50 can't be "
            "withdrawn (20 short). Nothing was changed."
        ),
    ),
    ("change", {"amount": "9007199254740991", "what": "add"}, 409, "would exceed the largest"),
    ("change", {"amount": "0"}, 422, "Not done: the amount must be a whole number from 1 to 9 007"),
    ("change", {"amount": "1e3"}, 422, "Not done: the amount must be a whole number from 1"),
    ("change", {"amount": "1", "reference": "x" * 201}, 422, "the reference may have at most 200"),
    (
        "change",
        {"amount": "1", "note": "a\0b"},
        422,
        "Not done: the note may have at most 500 printable",
    ),
    ("change", {"amount": "1", "what": "double"}, 422, "Not done."),
    ("change", {"amount": "1", "key": "a b"}, 400, "The form is incomplete."),
    ("change", {"amount": "1", "do": "steal"}, 400, "The form is incomplete."),
    ("transfer", {"to": "2", "amount": "31"}, 409, "so 31 can't be transferred (1 short)"),
    ("transfer", {"to": "404404", "amount": "1"}, 404, "Not done. There is no user 404404."),
    ("transfer", {"to": "me", "amount": "1"}, 422, "Not done: the user id must be a whole number"),
    ("transfer", {"to": "{}", "amount": "1"}, 422, "Not done: choose another user"),
    ("hold", {"amount": "31"}, 409, "so 31 can't be held (1 short)."),
    (
        "hold",
        {"amount": "1", "lasts": "366", "unit": "days"},
        422,
        "a hold may last from one second",
    ),
    ("hold", {"amount": "1", "lasts": "0"}, 422, "Not done: a hold may last from one second"),
    ("hold", {"amount": "1", "unit": "years"}, 422, "Not done: a hold may last from one second"),
    ("capture", {"amount": "71"}, 409, "Not done: the hold is 70, so 71 can't be captured."),
    ("capture", {"amount": "x"}, 422, "Not done: the amount must be a whole number"),
    ("capture", {"hold": "7777"}, 404, "Not done. There is no such hold."),
    ("void", {"hold": "x"}, 400, "The form is incomplete."),
    ("reverse", {"entry": "1"}, 409, "so 100 can't be taken back (70 short)."),
    ("reverse", {"entry": "7777"}, 404, "Not done. User {} has no entry 7777."),
    ("reverse", {"entry": ""}, 422, "Not done: the entry must be a whole number, 1 or more."),
    ("settings", {"floor": "31"}, 409, "which is less than a floor of 31. Nothing was changed."),
    ("settings", {"floor": "much"}, 422, "Not done: the floor must be a whole number"),
    ("settings", {"floor": "9007199254740992"}, 422, "Not done: the floor must be a whole number"),
    ("settings", {"externalId": "taken"}, 409, "Not done: another user has this external id."),
    ("settings", {"externalId": "a\u202eb"}, 422, "Not done: the external id may have at most 200"),
    ("settings", {"by": "x" * 101}, 422, "Not done: the name may have at most 100 printable"),
    ("settings", {"tag": "1"}, 400, "The form is incomplete."),
    ("freeze", {"tag": HOSTILE}, 400, "The form is incomplete."),
    ("freeze", {"tag": "7.7.7"}, 412, "Somebody else changed the settings"),
]


@pytest.mark.parametrize(("do", "typed", "status", "sentence"), REFUSALS)
async def test_a_refusal_is_a_sentence_and_loses_nothing(
    site: Site, do: str, typed: dict[str, str], status: int, sentence: str
) -> None:
    """Beside the form, which has what was typed; nothing is changed."""
    user = await site.open(100)
    hold = {"userId": int(user), "amount": 70, "expiresInSeconds": 600}
    await site.client.post("/api/holds", json=hold)
    await site.client.put("/api/users/by-external-id/taken")
    typed = {name: value.replace("{}", user) for name, value in typed.items()}
    before = await money(site)
    answer = await submit(site, user, do, **typed)
    assert answer.status_code == status, answer.text
    assert sentence.format(user).replace("{}", user) in text(answer.text)
    assert answer.headers["content-type"].startswith("text/html")
    assert await money(site) == before
    assert "<script>alert(1)" not in answer.text
    if status not in {400, 404} or "to" in typed:
        kept = fields_of(answer.text, do)
        for name, value in typed.items():
            # A select has the value that it can have; a tag is that of the new page.
            if name in kept and name not in {"tag", "what", "unit"}:
                assert unescape(kept[name]) == value.replace("\0", "\0"), name


async def test_a_frozen_account_says_so(site: Site) -> None:
    """Also the one that is to receive; then a thaw is the form that is offered."""
    user, other = await site.open(), await site.open()
    await patch(site, other, frozen=True)
    answer = await submit(site, user, "transfer", to=other, amount="1")
    assert answer.status_code == 409
    assert f"Not done: user {other} is frozen, and no money moves" in text(answer.text)
    html = await site.page(f"/users/{other}")
    assert "‖ frozen" in text(html)
    assert 'value="thaw"' in html
    assert 'value="freeze"' not in html


async def test_a_refused_form_has_a_new_key_and_a_wrong_one_the_same(site: Site) -> None:
    """A refusal is recorded under its key; a form that was not decided is the same request."""
    user = await site.open(10)
    for amount, same in (("11", False), ("x", True)):
        sent = {**fields_of(await site.page(f"/users/{user}"), "change"), "amount": amount}
        kept = fields_of((await site.send(f"/users/{user}", **sent)).text, "change")
        assert (kept["key"] == sent["key"]) is same
    key = token_hex(8)
    assert (await submit(site, user, "change", amount="1", key=key)).status_code == 303
    other = await submit(site, user, "change", amount="2", key=key)
    assert other.status_code == 422
    assert "this form was already sent with other values" in text(other.text)
    assert fields_of(other.text, "change")["key"] != key


async def test_settings_that_somebody_else_changed_are_not_overwritten_unseen(site: Site) -> None:
    """The page says who and what; the form keeps what was typed, and its new tag may change it.

    Movements of money meanwhile are no conflict.
    """
    user = await site.open(100)
    sent = {**fields_of(await site.page(f"/users/{user}"), "settings"), "floor": "5"}
    await patch(site, user, floor=-7, externalId="mine")
    answer = await site.send(f"/users/{user}", **sent)
    assert answer.status_code == 412
    assert "etag" not in answer.headers
    said = text(answer.text, "said-settings")
    assert re.match(
        r"Not done\. Somebody else changed the settings in the meantime "
        r"\(ada, [-\d: ]+ UTC\)\. Now the floor is -7, the external id is mine, and the account is "
        r"not frozen\. Nothing was changed; press the button again to overwrite them\.",
        said,
    )
    assert (await account(site, user))["floor"] == -7
    kept = fields_of(answer.text, "settings")
    assert kept["floor"] == "5"
    await site.client.post("/api/balance", json={"userId": int(user), "amount": 1})
    again = await site.send(f"/users/{user}", **kept)
    assert again.status_code == 303
    assert (await account(site, user))["floor"] == 5


async def test_a_user_is_created_once_by_a_form(site: Site) -> None:
    """However often the form is sent; a refusal keeps what was typed."""
    name, before = token_hex(8), await site.value("SELECT count(*) FROM users")
    typed = {"balance": "1 000", "floor": "-50", "externalId": f" {name} "}
    sent = {**fields_of(await site.page("/users")), **typed}
    made = [await site.send("/users", **sent) for _ in range(3)]
    assert len({answer.headers["location"] for answer in made}) == 1
    html = await follow(site, made[0])
    user = re.search(r"/users/(\d+)", made[0].headers["location"])
    assert user is not None
    assert text(html, "message") == f"Created user {user[1]} with a balance of 1 000."
    found = await account(site, user[1])
    assert (found["balance"], found["floor"], found["externalId"]) == (1000, -50, name)
    assert await site.value("SELECT count(*) FROM users") == before + 1
    for change, status, sentence in (
        ({"balance": "2 000"}, 422, "this form was already sent with other values"),
        ({"key": token_hex(8)}, 409, "another user has this external id"),
        ({"balance": "-1"}, 422, "the opening balance must be a whole number from 0 to"),
        ({"balance": "x"}, 422, "the opening balance must be a whole number from 0 to"),
        ({"balance": str(2**53)}, 422, "the opening balance must be a whole number from 0 to"),
        ({"floor": "1e3"}, 422, "the floor must be a whole number"),
        (
            {"floor": "2000", "key": token_hex(8)},
            409,
            "the new user has 1 000, which is less than a floor of 2 000",
        ),
        ({"externalId": "a\nb"}, 422, "the external id may have at most 200 printable characters"),
        ({"key": ""}, 400, "The form is incomplete."),
    ):
        answer = await site.send("/users", **{**sent, **change})
        assert answer.status_code == status, change
        assert sentence in text(answer.text)
        if status != 400:
            kept = fields_of(answer.text)
            assert kept["balance"] == {**sent, **change}["balance"]
            assert (kept["key"] == {**sent, **change}["key"]) == (change != {"balance": "2 000"})
    assert await site.value("SELECT count(*) FROM users") == before + 1


async def test_changes_of_settings_are_listed_page_by_page(site: Site) -> None:
    """The latest first, with who made them; none for an account that has had none."""
    user = await site.open()
    assert "Settings history" not in text(await site.page(f"/users/{user}"))
    for floor in range(1, 13):
        await patch(site, user, floor=-floor)
    path, seen = f"/users/{user}", []
    while path:
        html = await site.page(path)
        seen.append(re.findall(r"ada floor -(\d+) \S", text(html, "settings-history")))
        older = re.search(r'href="([^"]+)">Earlier settings', html)
        path = older[1] if older else ""
    assert seen == [["12", "11", "10", "9", "8"], ["7", "6", "5", "4", "3"], ["2", "1"]]
    assert "Wrong" not in text(await site.page(f"/users/{user}?settings=x", 422), "message")
    assert "ada floor -12" in text(
        await site.page(f"/users/{user}?settings=99"), "settings-history"
    )


async def test_without_keys_and_tags_forms_are_not_safe(database: dict[str, str]) -> None:
    """Control: a form that is sent twice takes effect twice, and overwrites settings unseen."""
    mutant = ("-m", "tests.mutants", "page-forms")
    async with served(database, program=mutant) as client:
        sent = {**fields_of((await client.get("/users")).text), "balance": "5"}
        made = {(await client.post("/users", data=sent)).headers["location"] for _ in range(2)}
        assert len(made) == 2
        html = (await client.get("/users/1")).text
        sent = {**fields_of(html, "change"), "amount": "5"}
        for _ in range(2):
            assert (await client.post("/users/1", data=sent)).status_code == 303
        await client.patch("/api/users/1", json={"floor": 7}, headers={"If-Match": "*"})
        typed = {**fields_of(html, "settings"), "floor": "3"}
        assert (await client.post("/users/1", data=typed)).status_code == 303
        left = (await client.get("/api/users/1")).json()
        assert (left["balance"], left["floor"]) == (9990, 3)


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://elsewhere.example"}],
)
async def test_forms_of_other_sites_are_refused(site: Site, headers: dict[str, str]) -> None:
    """With a page; the same form from this site is accepted."""
    user = await site.open()
    sent = {**fields_of(await site.page(f"/users/{user}"), "change"), "amount": "5"}
    before = await money(site)
    answer = await site.client.post(f"/users/{user}", data=sent, headers=headers)
    assert answer.status_code == 403
    assert await money(site) == before
    assert (await site.send(f"/users/{user}", **sent)).status_code == 303
    assert (await site.send("/users/x", **sent)).status_code == 422
    assert (await site.send("/users/404404", **sent)).status_code == 404


async def test_without_its_database_a_form_keeps_what_was_typed_and_its_key() -> None:
    """Sent again when the database is back, it takes effect once."""
    async with own_postgres() as server, served(server.environment()) as client:
        html = (await client.get("/users/1")).text
        forms = {
            "change": {"amount": "7", "reference": "typed & kept"},
            "settings": {"floor": "\N{MINUS SIGN}9", "externalId": "typed"},
            "capture": {"hold": "1", "amount": "3", "do": "capture"},
        }
        sent = {
            do: {**(fields_of(html, do) if do != "capture" else {}), **typed}
            for do, typed in forms.items()
        }
        await kill(server)
        for do, fields in sent.items():
            answer = await client.post("/users/1", data=fields)
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "1"
            assert "The account can't be read right now." in text(answer.text)
            assert fields_of(answer.text, do) == fields
        assert (await client.get("/users/1")).status_code == 503
        assert (await client.get("/users")).status_code == 503
        await server.start()
        for _ in range(200):
            answer = await client.post("/users/1", data=sent["change"])
            if answer.status_code == 303:
                break
        assert (await client.post("/users/1", data=sent["change"])).status_code == 303
        assert (await client.get("/api/users/1")).json()["balance"] == 9993


async def test_accounts_are_sorted_by_balance_and_by_latest_change(site: Site) -> None:
    """The highest and the latest first, page by page; the order is in the address."""
    poor, rich = await site.open(3), await site.open(8_000_000_000_000_000)
    await site.client.post("/api/balance", json={"userId": int(poor), "amount": 1})
    for sort, first in (("balance", rich), ("changed", poor)):
        path, seen = f"/users?sort={sort}", []
        while path:
            html = await site.page(path)
            seen += re.findall(r'<th scope="row"><a href="/users/(\d+)"', html)
            more = re.search(r'href="([^"]+)"[^>]*>Next page', html)
            path = unescape(more[1]) if more else ""
        assert seen[0] == first
        assert len(seen) == len(set(seen)) == await site.value("SELECT count(*) FROM users")
    assert 'aria-current="true">balance' in await site.page("/users?sort=balance")
    # Control: by id it is another order.
    assert f'href="/users/{rich}"' not in (await site.page("/users"))[:3000]
