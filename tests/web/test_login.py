"""The page with keys: logging in and out, what each key sees, and the end of sessions."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html import unescape
from time import monotonic
from typing import Final
from urllib.parse import quote

import httpx
import pytest

from balance_app.access.keys import Token
from tests.access.keyring import bearer, cookie, log_in, log_out, make_key, revoke, unknown
from tests.balances.hostile import one_instance
from tests.jobs.rows import Connection, add_instance, add_job, running
from tests.processes import Instance, connect, http_client
from tests.system.databases import kill, own_postgres
from tests.web.site import Tags, text
from tests.web.test_stream import Watch

BROWSER: Final = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
WITHIN_SECONDS: Final = 2


@dataclass(frozen=True)
class Locked:
    """An instance that asks for keys."""

    instance: Instance
    database: dict[str, str]
    connection: Connection

    @asynccontextmanager
    async def browser(self, *scopes: str, name: str | None = None) -> AsyncIterator["Visitor"]:
        """Open a browser that has logged in with a new key."""
        async with http_client(self.instance.url) as client:
            client.headers.update(BROWSER)
            key = await make_key(self.database, *scopes, name=name)
            visitor = Visitor(self, client, key)
            if scopes:
                assert (await visitor.log_in(key.text)).status_code == 303
            yield visitor


@dataclass(frozen=True)
class Visitor:
    """A browser without scripts, and a key."""

    site: Locked
    client: httpx.AsyncClient
    key: Token

    async def send(self, path: str, **fields: str) -> httpx.Response:
        """Send a form, as a browser does."""
        origin = {"Origin": self.site.instance.url, "Sec-Fetch-Site": "same-origin"}
        return await self.client.post(path, data=fields, headers=origin)

    async def log_in(self, key: str, there: str = "/") -> httpx.Response:
        """Send the form of the login."""
        return await self.send("/login", key=key, next=there)

    async def page(self, path: str = "/") -> str:
        """Get a page."""
        answer = await self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text


@asynccontextmanager
async def locked(instance: Instance, database: dict[str, str]) -> AsyncIterator[Locked]:
    """Make a first key, and wait until the instance asks for one."""
    connection = await connect(database)
    await make_key(database, "metrics")
    async with http_client(instance.url) as client:
        while (await client.get("/api/users")).status_code != 401:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)
    yield Locked(instance, database, connection)
    await connection.close()


@pytest.fixture(scope="module")
async def site(postgres: dict[str, str]) -> AsyncIterator[Locked]:
    """An instance that asks for keys, for this file, with a job in each state."""
    async with one_instance(postgres) as (instance, database), locked(instance, database) as site:
        ada = await add_instance(site.connection, "app1")
        await add_job(site.connection, "job-running", **running(ada, "app1"))
        await add_job(site.connection, "job-waiting")
        yield site


# -- logging in and out ----------------------------------------------------------------------


async def test_a_key_logs_in_and_out(site: Locked) -> None:
    """The cookie is a session, which ends; the key is in no page and no address."""
    async with site.browser(name="ada & co") as visitor:
        sent_off = await visitor.client.get("/jobs?state=failed&name=a")
        assert sent_off.status_code == 303
        assert sent_off.headers["location"] == "/login?next=%2Fjobs%3Fstate%3Dfailed%26name%3Da"
        form = await visitor.page(sent_off.headers["location"])
        (field,) = [each for _, each in Tags(form).found if each.get("name") == "key"]
        assert (field["type"], field["autocomplete"]) == ("password", "current-password")
        hidden = {each["name"]: each["value"] for _, each in Tags(form).found if "value" in each}
        assert hidden == {"next": "/jobs?state=failed&name=a"}
        entered = await visitor.log_in(f" {visitor.key.text}\n", hidden["next"] or "")
        assert entered.status_code == 303, text(entered.text)
        assert entered.headers["location"] == hidden["next"]
        (given,) = [
            each for each in entered.headers.get_list("set-cookie") if "Max-Age=0" not in each
        ]
        value, *attributes = given.split("; ")
        assert set(attributes) == {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"}
        assert re.fullmatch(r"ba=bs_\w{12}_[\w-]{43}_[\w-]{6}", value)
        html = await visitor.page(entered.headers["location"])
        assert "logged in as ada & co Log out" in text(html)
        for shown in (form, html, entered.text, str(entered.headers)):
            assert visitor.key.text not in shown
            assert visitor.key.text.split("_")[2] not in shown
        again = await visitor.client.get("/login?next=/users")
        assert (again.status_code, again.headers["location"]) == (303, "/users")
        out = await visitor.send("/logout")
        assert (out.status_code, out.headers["location"]) == (303, "/login?out=1")
        assert len(out.headers.get_list("set-cookie")) == 2
        assert visitor.client.cookies == {}
        assert "You are logged out." in text(await visitor.page("/login?out=1"))
        session = {"Cookie": value, "Accept": "text/html"}
        began = monotonic()
        while (await visitor.client.get("/", headers=session)).status_code != 303:
            assert monotonic() - began < WITHIN_SECONDS
            await asyncio.sleep(0.05)
        ended = await visitor.client.get("/login", headers=session)
        assert "Your session has ended. Log in again." in text(ended.text)


async def test_under_tls_the_cookie_is_of_this_host_and_secure(site: Locked) -> None:
    """The form's Origin says so, wherever TLS ends; what a proxy would say is not believed."""
    host = site.instance.url.partition("//")[2]
    async with site.browser() as visitor:
        for origin, name in (("https", "__Host-ba"), ("http", "ba")):
            answer = await visitor.client.post(
                "/login",
                data={"key": visitor.key.text},
                headers={"Origin": f"{origin}://{host}", "X-Forwarded-Proto": "https"},
            )
            set_: dict[str, str] = {}
            for each in answer.headers.get_list("set-cookie"):
                set_[each.partition("=")[0]] = each
            forgotten = next(each for each in ("ba", "__Host-ba") if each != name)
            assert "Max-Age=43200" in set_[name]
            assert ("Secure" in set_[name]) == (origin == "https")
            assert "Max-Age=0" in set_[forgotten]
            assert "Domain" not in str(set_)
            token = set_[name].partition(";")[0]
            later = await visitor.client.get("/", headers={"Cookie": f"ba=x; {token}"})
            assert (later.status_code == 200) == (name == "__Host-ba")


@pytest.mark.parametrize(
    ("there", "goes"),
    [
        ("/users/1?before=3#entry-2", "/users/1?before=3#entry-2"),
        ("/", "/"),
        *(
            (evil, "/")
            for evil in (
                *("", "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example"),
                *("https://evil.example", "https:evil.example", "javascript:alert(1)", "evil"),
                *("/\t/evil.example", "\t//evil.example", "/\n/evil.example", " //evil.example"),
                *("/users\r\nSet-Cookie: a=b", "/users\r\n\r\n<script>", "/\x00", "/ü", "/" * 3000),
                *("/login", "/login?next=/login", "/logout", "/live?since=1", "//", "/\\"),
            )
        ),
    ],
)
async def test_the_login_leads_to_this_service_alone(site: Locked, there: str, goes: str) -> None:
    """To where one wanted to go, or to the first page."""
    async with site.browser() as visitor:
        entered = await visitor.log_in(visitor.key.text, there)
        assert (entered.status_code, entered.headers["location"]) == (303, goes)
        assert "a" not in entered.cookies


async def test_what_is_no_valid_key_gets_the_form_again(site: Locked) -> None:
    """With a sentence, and without the key."""
    async with site.browser() as visitor:
        revoked = await make_key(site.database)
        session = await log_in(site.database, visitor.key)
        await revoke(site.database, revoked)
        wrong = "Not logged in. The key is wrong, expired or revoked."
        for key, status, sentence in (
            (unknown().text, 401, wrong),
            (revoked.text, 401, wrong),
            ((await make_key(site.database, seconds=-1)).text, 401, wrong),
            (session.text, 401, wrong),
            (visitor.key.text[:-1], 401, wrong),
            ("<script>ü\x00", 401, wrong),
            ("", 401, wrong),
            ((await make_key(site.database, "operate")).text, 403, 'lacks the scope "read"'),
        ):
            answer = await visitor.log_in(key, "/users")
            assert answer.status_code == status, key
            assert sentence in text(answer.text, "message")
            assert answer.headers["content-type"].startswith("text/html")
            assert "set-cookie" not in answer.headers
            assert 'name="next" value="/users"' in answer.text
            assert not key or key not in answer.text


async def test_wrong_keys_are_slowed_per_address(database: dict[str, str]) -> None:
    """Ten at once, then as many in a second; a right key from there is not among them."""
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        locked(instance, database) as own,
        own.browser("read") as visitor,
    ):
        answers = [await visitor.log_in("ba_wrong") for _ in range(20)]
        assert {each.status_code for each in answers} == {401, 429}
        slowed = next(each for each in answers if each.status_code == 429)
        assert "Too many wrong keys came from this address." in text(slowed.text, "message")
        assert slowed.headers["retry-after"] == "1"
        assert (await visitor.log_in(visitor.key.text)).status_code == 303


async def test_a_key_has_a_hundred_sessions(site: Locked) -> None:
    """One more ends the oldest of them, and no session of another key."""
    async with site.browser("read") as other, site.browser("read") as visitor:
        first = visitor.client.cookies["ba"]
        sql = "SELECT count(*) FROM sessions WHERE key_id = $1"
        for number in range(2, 103):
            visitor.client.cookies.clear()
            assert (await visitor.log_in(visitor.key.text)).status_code == 303
            assert await site.connection.fetchval(sql, visitor.key.id) == min(number, 100)
        assert await visitor.page()
        assert await other.page()
        began = monotonic()
        old = {"Cookie": f"ba={first}"}
        visitor.client.cookies.clear()
        while (await visitor.client.get("/", headers=old)).status_code != 303:
            assert monotonic() - began < WITHIN_SECONDS
            await asyncio.sleep(0.05)


async def test_a_session_is_known_to_every_instance_at_once(database: dict[str, str]) -> None:
    """And its end within two seconds."""
    async with (
        Instance(database, "app1", JOBS_ENABLED="false") as one,
        Instance(database, "app2", JOBS_ENABLED="false") as two,
        locked(one, database) as first,
        locked(two, database),
        first.browser("read") as visitor,
    ):
        token = visitor.client.cookies["ba"]
        on_two = f"{two.url}/users"
        assert (
            await visitor.client.get(on_two, headers={"Cookie": f"ba={token}"})
        ).status_code == 200
        await visitor.send("/logout")
        began = monotonic()
        while (
            await visitor.client.get(on_two, headers={"Cookie": f"ba={token}"})
        ).status_code != 303:
            assert monotonic() - began < WITHIN_SECONDS
            await asyncio.sleep(0.05)


# -- without a session -----------------------------------------------------------------------


async def test_people_are_sent_to_the_login_and_programs_are_not(site: Locked) -> None:
    """Streams, and addresses of programs, get a problem; what is no page, the same as a page."""
    async with site.browser() as visitor:
        for path in ("/", "/users/1", "/jobs/none", "/nothing", "/users/1%0d%0aX:%20y"):
            answer = await visitor.client.get(path)
            assert answer.status_code == 303
            assert answer.headers["location"].startswith("/login?next=%2F")
            assert answer.headers["cache-control"] == "no-store"
        for path, accept in (
            ("/", "*/*"),
            ("/live", "text/event-stream"),
            *((each, "application/json") for each in ("/api/users", "/metrics", "/api/nothing")),
        ):
            answer = await visitor.client.get(path, headers={"Accept": accept})
            assert answer.status_code == 401
            assert answer.json()["code"] == "unauthorized"
        for path in ("/api/users", "/metrics", "/api/nothing"):
            answer = await visitor.client.get(path, headers=BROWSER)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert f'href="/login?next={quote(path, safe="")}"' in answer.text


async def test_a_form_without_a_session_is_answered_with_the_login(site: Locked) -> None:
    """Which leads back to the page that has the form; other refusals are pages, too."""
    async with site.browser("read") as reader, site.browser() as visitor:
        referer = {"Referer": f"{site.instance.url}/users/1?before=2"}
        answer = await visitor.client.post("/users/1", data={"do": "change"}, headers=referer)
        assert answer.status_code == 401
        assert "Not done: you are logged out. Log in and send it again." in text(answer.text)
        assert 'name="next" value="/users/1"' in answer.text
        refused = await reader.send("/jobs/job-waiting/pause", by="page")
        assert refused.status_code == 403
        assert "The key lacks the scope operate." in text(refused.text)
        confirm = await reader.client.get("/jobs/job-running/cancel")
        assert (confirm.status_code, "Insufficient scope" in text(confirm.text)) == (403, True)
        missing = await reader.client.get("/nothing")
        assert (missing.status_code, "There is nothing" in text(missing.text)) == (404, True)
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            for path in ("/users/1", "/login", "/logout"):
                cross = await reader.client.post(path, data={"key": "x"}, headers=headers)
                assert cross.status_code == 403
                assert "The request comes from a page of another site." in text(cross.text)
        assert await reader.page()


async def test_nothing_is_shown_to_who_may_not_read(site: Locked) -> None:
    """Neither by the login, nor by a refusal: no title with counts, no server, no link."""
    withdraw = await make_key(site.database, "withdraw")
    async with site.browser() as visitor:
        for path, headers, status in (
            ("/login", {}, 200),
            ("/static/none", {}, 404),
            ("/users", bearer(withdraw), 403),
        ):
            answer = await visitor.client.get(path, headers=headers)
            assert answer.status_code == status
            assert "served by" not in answer.text
            assert "1 running" not in answer.text
            assert 'href="/users"' not in answer.text
            assert re.search(r'data-now=""', answer.text)
        assert (
            "served by app1"
            in (await visitor.client.get("/users", headers=bearer(visitor.key))).text
        )


# -- what each key sees ----------------------------------------------------------------------

SEEN: Final = {
    # what is done: where, and the form or link that does it
    "add": ("/", 'name="what" value="add"'),
    "withdraw": ("/", 'action="/change"'),
    "change": ("/users/1", 'name="do" value="change"'),
    "hold": ("/users/1", 'name="do" value="hold"'),
    "void": ("/users/1", 'value="void"'),
    "transfer": ("/users/1", 'name="do" value="transfer"'),
    "reverse": ("/users/1", 'name="do" value="reverse"'),
    "reverse entry": ("/users/1", "?reverse="),
    "settings": ("/users/1", 'name="do" value="settings"'),
    "freeze": ("/users/1", 'value="freeze"'),
    "open": ("/users", 'action="/users" class="fields" aria-labelledby="open-title"'),
    "pause": ("/", 'formaction="/jobs/job-waiting/pause"'),
    "run": ("/jobs/job-waiting", 'formaction="/jobs/job-waiting/run"'),
    "schedule": ("/jobs/job-waiting", 'action="/jobs/job-waiting/schedule"'),
    "cancel": ("/", 'formaction="/jobs/job-running/cancel"'),
}
LESSEN: Final = {"withdraw", "change", "hold", "void"}
BUTTONS: Final = {
    "read": set(),
    "withdraw": LESSEN,
    "change": LESSEN | {"add", "transfer", "reverse", "reverse entry"},
    "open": {"settings", "freeze", "open"},
    "operate": {"pause", "run", "schedule", "cancel"},
}


@pytest.mark.parametrize("scope", BUTTONS)
async def test_the_page_shows_what_its_key_may_do(site: Locked, scope: str) -> None:
    """No form and no button more; there is no name to type, as the key has one."""
    async with site.browser("read", "change") as other:
        hold = {"userId": 1, "amount": 1, "expiresInSeconds": 600}
        made = await other.client.post("/api/holds", json=hold, headers=bearer(other.key))
        assert made.status_code == 201
    async with site.browser("read", scope) as visitor:
        pages = {path: await visitor.page(path) for path in {path for path, _ in SEEN.values()}}
        found = {name for name, (path, form) in SEEN.items() if form in pages[path]}
        assert found == BUTTONS[scope]
        for path, html in pages.items():
            posts = [each for tag, each in Tags(html).found if each.get("method") == "post"]
            assert scope != "read" or [each["action"] for each in posts] == ["/logout"], path
            assert "Your name" not in html


async def test_without_the_guards_the_page_shows_all_and_leads_anywhere(
    database: dict[str, str],
) -> None:
    """Control: nothing else hides a button, or keeps the login from leading elsewhere.

    What a form may do is decided by the gate all the same.
    """
    mutant = ("-m", "tests.mutants", "page-scopes")
    async with (
        Instance(database, JOBS_ENABLED="false", program=mutant) as instance,
        locked(instance, database) as own,
        own.browser("read") as visitor,
    ):
        await add_job(own.connection, "job-waiting")
        assert 'formaction="/jobs/job-waiting/pause"' in await visitor.page()
        async with visitor.client.stream("GET", "/live") as answer:
            event = await Watch(answer).event()
            assert "formaction" in "".join(event["html"].values())
        entered = await visitor.log_in(visitor.key.text, "//evil.example")
        assert entered.headers["location"] == "//evil.example"
        assert (await visitor.send("/jobs/job-waiting/pause", by="x")).status_code == 403
        assert (await visitor.send("/users/1", do="freeze", tag="1.1.1")).status_code == 403


@pytest.mark.parametrize("job", ["", "?job=job-waiting"])
async def test_the_stream_has_buttons_for_operators_alone(site: Locked, job: str) -> None:
    """Also while both watch."""
    async with site.browser("read") as reader, site.browser("read", "operate") as operator:
        rows = []
        for visitor in (operator, reader, operator, reader):
            async with visitor.client.stream("GET", f"/live{job}") as answer:
                event = await Watch(answer).event()
                rows.append("".join(event["html"].values()))
        assert ["formaction" in row for row in rows] == [True, False, True, False]
        assert all("job-waiting" in row for row in rows)


async def test_a_control_is_done_in_the_name_of_the_key(site: Locked) -> None:
    """Whatever name is sent with it."""
    async with site.browser("read", "operate", name="key-of-ada") as visitor:
        await add_job(site.connection, "job-named")
        answer = await visitor.send("/jobs/job-named/pause", by="eve", reason="x")
        assert answer.status_code == 303
        sql = "SELECT paused_by FROM jobs WHERE name = 'job-named'"
        assert await site.connection.fetchval(sql) == "key-of-ada"


# -- streams ---------------------------------------------------------------------------------


async def _ends(chunks: AsyncIterator[bytes]) -> float:
    """Return after how many seconds a stream ends."""
    began = monotonic()
    async with asyncio.timeout(10):
        async for _ in chunks:
            pass
    return monotonic() - began


@pytest.mark.parametrize("path", ["/live", "/live?job=job-waiting", "/api/cron/events"])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("ending", ["revoked", "logged out", "expired"])
async def test_a_stream_ends_with_its_session(
    site: Locked, path: str, encoding: str, ending: str
) -> None:
    """Within two seconds, while nothing changes; the stream of another key goes on."""
    key, other = await make_key(site.database, "read"), await make_key(site.database, "read")
    session = await log_in(site.database, key, seconds=1.5 if ending == "expired" else 60)
    compress = {"Accept-Encoding": encoding}
    async with (
        http_client(site.instance.url) as client,
        client.stream("GET", path, headers={**cookie(session), **compress}) as answer,
        client.stream("GET", path, headers={**bearer(other), **compress}) as stays,
    ):
        assert (answer.status_code, stays.status_code) == (200, 200)
        began = monotonic()
        if ending == "revoked":
            await revoke(site.database, key)
        elif ending == "logged out":
            await log_out(site.database, session)
        took = await _ends(answer.aiter_raw()) - (1.5 if ending == "expired" else 0)
        assert took < WITHIN_SECONDS
        watch = Watch(stays)
        for _ in range(3):
            assert (await watch.event())["kind"] == "status"
        print(f"{path} ended {monotonic() - began:.2f} s after its session was {ending}")


async def test_without_its_check_a_stream_outlives_its_session(database: dict[str, str]) -> None:
    """Control: nothing else ends it."""
    mutant = ("-m", "tests.mutants", "key-of-stream")
    async with (
        Instance(database, JOBS_ENABLED="false", program=mutant) as instance,
        locked(instance, database) as own,
        own.browser("read") as visitor,
        visitor.client.stream("GET", "/live") as answer,
    ):
        watch = Watch(answer)
        await watch.event()
        await revoke(own.database, visitor.key)
        while (await visitor.client.get("/users")).status_code != 303:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)
        for _ in range(3):
            await watch.event()


async def test_the_stream_of_an_anonymous_viewer_ends_with_the_first_key(
    database: dict[str, str],
) -> None:
    """From then on everybody is asked."""
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
        client.stream("GET", "/live") as answer,
    ):
        chunks = answer.aiter_raw()
        await anext(chunks)
        await make_key(database)
        assert await _ends(chunks) < WITHIN_SECONDS
        assert (await client.get("/")).status_code == 401


# -- without keys, and without a database ----------------------------------------------------


async def test_without_keys_nobody_logs_in(database: dict[str, str]) -> None:
    """Nor out; where others can reach the instance, each page says in red what that means."""
    async with (
        Instance(database, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
    ):
        html = (await client.get("/login")).text
        assert "No API key exists yet" in text(html)
        for path in ("/", "/users", "/users/1", "/jobs"):
            html = (await client.get(path)).text
            assert "Log out" not in html
            assert "Anybody" not in html
    exposed = Instance(database, JOBS_ENABLED="false", HOST="0.0.0.0", ALLOW_ANONYMOUS="true")  # noqa: S104
    async with exposed, http_client(exposed.url) as client:
        for path in ("/", "/users", "/users/1", "/jobs", "/login", "/jobs/none"):
            html = (await client.get(path, headers=BROWSER)).text
            assert "can use this page without a key" in text(html)
        rebound = {**BROWSER, "Host": "evil.example"}
        refused = await client.get("/", headers=rebound)
        assert refused.status_code == 421
        assert "The Host header names no host of this service" in text(refused.text)
        assert "served by" not in refused.text


async def test_without_its_database_the_login_says_so() -> None:
    """And a logout makes the browser forget the session all the same."""
    async with (
        own_postgres() as server,
        Instance(server.environment(), JOBS_ENABLED="false") as instance,
        locked(instance, server.environment()) as own,
        own.browser("read") as visitor,
    ):
        await kill(server)
        entered = await visitor.log_in(visitor.key.text)
        assert entered.status_code == 503
        assert "Not logged in." in text(entered.text, "message")
        assert "retry-after" in entered.headers
        out = await visitor.send("/logout")
        assert out.status_code == 503
        assert "This browser is logged out, but the session could not be ended" in text(
            out.text, "message"
        )
        assert visitor.client.cookies == {}
        await server.start()


async def test_behind_a_prefix_the_login_leads_back(database: dict[str, str]) -> None:
    """Each address has ROOT_PATH, once; the cookie is for the whole host, as its name demands."""
    async with (
        Instance(database, JOBS_ENABLED="false", ROOT_PATH="/bank") as instance,
        locked(instance, database) as own,
        own.browser() as visitor,
    ):
        for path in ("/bank/users?after=3", "/users?after=3"):
            sent_off = (await visitor.client.get(path)).headers["location"]
            assert sent_off == "/bank/login?next=%2Fusers%3Fafter%3D3"
        html = await visitor.page(unescape(sent_off))
        assert 'action="/bank/login"' in html
        assert 'name="next" value="/users?after=3"' in html
        entered = await visitor.send("/bank/login", key=visitor.key.text, next="/users?after=3")
        assert entered.headers["location"] == "/bank/users?after=3"
        assert "Path=/;" in entered.headers["set-cookie"]
        assert 'action="/bank/logout"' in await visitor.page("/bank/users")
