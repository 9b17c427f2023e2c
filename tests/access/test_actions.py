"""Who did it: what each route writes has the name of the key that the request came with."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import uuid4

import httpx
import pytest

from balance_app.access import routes
from balance_app.access.keys import ANONYMOUS
from balance_app.balances import repository
from balance_app.balances.api import holds as holds_api
from balance_app.jobs.api import controls
from balance_app.jobs.api import router as jobs_api
from balance_app.jobs.api import status as status_module
from balance_app.web import account_actions, accounts
from tests.access.application import client_at, keys_are_asked_for, serving
from tests.access.keyring import bearer, make_key
from tests.jobs.rows import Connection, add_instance, add_job, migrated, running
from tests.processes import connect

LIAR: Final = {"by": "somebody else"}

# The columns that say who did something.
COLUMNS: Final = (
    *("entries.by", "holds.by", "holds.ended_by", "idempotency_keys.by", "opening_keys.by"),
    *("user_settings.by", "actions.by", "jobs.requested_by", "jobs.paused_by"),
    *("jobs.cancel_requested_by", "jobs.overridden_by", "jobs.forgotten_by"),
)


class Given(NamedTuple):
    """A request, and in which columns its principal must be found."""

    path: str
    columns: tuple[str, ...]
    method: str = "POST"
    json: object = None
    form: dict[str, Any] | None = None
    headers: dict[str, str] | None = None
    query: dict[str, str] | None = None


class Scene(NamedTuple):
    """What the requests are sent to."""

    client: httpx.AsyncClient
    database: dict[str, str]
    connection: Connection
    # a key of its own, with which everything is prepared
    prepares: dict[str, str]

    async def hold(self, user: int = 1) -> str:
        body = {"userId": user, "amount": 1, "expiresInSeconds": 600}
        answer = await self.client.post("/api/holds", json=body, headers=self.prepares)
        return str(answer.json()["id"])

    async def entry(self) -> int:
        body = {"userId": 1, "amount": -1}
        answer = await self.client.post("/api/balance", json=body, headers=self.prepares)
        return int(answer.json()["version"])

    async def tag(self) -> str:
        answer = await self.client.get("/api/users/1", headers=self.prepares)
        return str(answer.headers["etag"]).strip('"')

    async def job(self, **columns: object) -> str:
        name = f"job-{uuid4().hex[:8]}"
        await add_job(self.connection, name, last_heartbeat_at=None, **columns)
        return name


@asynccontextmanager
async def scene(database: dict[str, str]) -> AsyncIterator[Scene]:
    """Serve an application with keys, two users, and an instance that has the code of all jobs."""
    connection = await connect(database)
    async with serving(database) as app, client_at(app, "10.1.0.1") as client:
        prepares = bearer(await make_key(database, name="stagehand"))
        await keys_are_asked_for(app)
        await client.post("/api/users", json={"balance": 1000}, headers=prepares)
        await add_instance(connection)
        try:
            yield Scene(client, database, connection, prepares)
        finally:
            await connection.close()


def paused() -> dict[str, object]:
    return {"paused_at": timedelta(), "paused_by": "stagehand"}


def overridden() -> dict[str, object]:
    return {
        "schedule_override": "every 60 s",
        "overridden_by": "stagehand",
        "overridden_at": timedelta(),
    }


async def of_job(on: Scene, prefix: str, verb: str) -> Given:
    """Return a control of a job, by the API or by the page's form."""
    columns: dict[str, tuple[str, dict[str, object]]] = {
        "run": ("jobs.requested_by", {}),
        "pause": ("jobs.paused_by", {}),
        "resume": ("", paused()),
        "cancel": ("jobs.cancel_requested_by", running(uuid4(), "app1")),
        "schedule": ("jobs.overridden_by", {}),
        "reset": ("", overridden()),
        "forget": ("jobs.forgotten_by", {}),
    }
    column, state = columns[verb]
    name = await on.job(**state)
    # nobody has the code of a job that is forgotten
    missing = [name] if verb == "forget" else []
    await on.connection.execute("UPDATE instances SET missing = missing || $1::text[]", missing)
    written = tuple(each for each in (column, "actions.by") if each)
    if prefix:
        path = {"reset": "schedule"}.get(verb, verb)
        method = {"schedule": "PUT", "reset": "DELETE"}.get(verb, "POST")
        json = {"everySeconds": 77} if verb == "schedule" else None
        return Given(f"{prefix}/jobs/{name}/{path}", written, method, json=json, query=LIAR)
    path = {"reset": "schedule/reset"}.get(verb, verb)
    every = {"every": "77"} if verb == "schedule" else {}
    return Given(f"/jobs/{name}/{path}", written, form={**LIAR, **every})


MONEY: Final = ("entries.by", "idempotency_keys.by")
OPENED: Final = ("entries.by", "user_settings.by", "actions.by")


async def of_account(on: Scene, do: str) -> Given:
    """Return a form of an account's page."""
    key = {"key": uuid4().hex}
    forms: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "change": (MONEY, {"what": "withdraw", "amount": "1", **key}),
        "transfer": (MONEY, {"to": "2", "amount": "1", **key}),
        "hold": (
            ("holds.by", "idempotency_keys.by"),
            {"amount": "1", "lasts": "1", "unit": "hours", **key},
        ),
        "capture": (("entries.by", "holds.ended_by"), {"amount": "1"}),
        "void": (("holds.ended_by",), {}),
        "reverse": (("entries.by",), {}),
        "settings": (("user_settings.by", "actions.by"), {"floor": "-7", **LIAR}),
        "freeze": (("user_settings.by", "actions.by"), LIAR),
        "thaw": (("user_settings.by", "actions.by"), LIAR),
    }
    columns, form = forms[do]
    if do in {"capture", "void"}:
        form = {**form, "hold": (await on.hold()).partition("-")[2]}
    if do == "reverse":
        form = {**form, "entry": str(await on.entry())}
    if do in {"settings", "freeze", "thaw"}:
        form = {**form, "tag": await on.tag()}
    return Given("/users/1", columns, form={"do": do, **form})


async def requests_of(  # noqa: C901, PLR0912, PLR0915 - a case each
    on: Scene, route: str
) -> AsyncIterator[Given]:
    """Yield requests to a route that change something."""
    key = {"Idempotency-Key": uuid4().hex}
    columns: tuple[str, ...]
    match route:
        case "POST /api/balance":
            body = {"userId": 1, "amount": -1}
            yield Given("/api/balance", ("entries.by",), json=body)
            yield Given("/api/balance", MONEY, json=body, headers=key)
            refused = {"userId": 1, "amount": -(10**9)}
            key = {"Idempotency-Key": uuid4().hex}
            yield Given("/api/balance", ("idempotency_keys.by",), json=refused, headers=key)
        case "POST /api/transfers":
            body = {"fromUserId": 1, "toUserId": 2, "amount": 1}
            yield Given("/api/transfers", MONEY, json=body, headers=key)
        case "POST /api/users/{userId}/entries/{version}/reverse":
            yield Given(f"/api/users/1/entries/{await on.entry()}/reverse", ("entries.by",))
        case "POST /api/holds":
            body = {"userId": 1, "amount": 1, "expiresInSeconds": 600}
            columns = ("holds.by", "idempotency_keys.by")
            yield Given("/api/holds", columns, json=body, headers=key)
        case "POST /api/holds/{holdId}/capture":
            columns = ("entries.by", "holds.ended_by")
            yield Given(f"/api/holds/{await on.hold()}/capture", columns)
        case "POST /api/holds/{holdId}/void":
            yield Given(f"/api/holds/{await on.hold()}/void", ("holds.ended_by",))
        case "POST /api/users":
            body = {"balance": 1, "floor": -1}
            columns = (*OPENED, "opening_keys.by")
            yield Given("/api/users", columns, json=body, headers=key)
        case "PUT /api/users/by-external-id/{externalId:text}":
            yield Given(f"/api/users/by-external-id/{uuid4().hex}", OPENED, "PUT")
        case "PATCH /api/users/{userId}":
            columns = ("user_settings.by", "actions.by")
            if_match = {"If-Match": "*"}
            floor = {"floor": -3}
            yield Given("/api/users/1", columns, "PATCH", floor, headers=if_match, query=LIAR)
        case "POST /change":
            form = {"user": "1", "what": "withdraw", "amount": "1", "key": uuid4().hex}
            yield Given("/change", MONEY, form=form)
        case "POST /users":
            form = {"balance": "1", "floor": "-1", "externalId": "", "key": uuid4().hex}
            yield Given("/users", (*OPENED, "opening_keys.by"), form=form)
        case "POST /users/{user_id}":
            for do in accounts.NEEDS:
                yield await of_account(on, do)
        case "DELETE /api/cron/jobs/{name}/schedule":
            yield await of_job(on, "/api/cron", "reset")
        case "POST /api/cron/instances/{instance}/dismiss" | "POST /instances/{instance}/dismiss":
            gone = await add_instance(on.connection, "app4", seen_seconds_ago=60)
            path = route.removeprefix("POST ").format(instance=gone)
            yield Given(path, ("actions.by",), query=LIAR, form=None if "/api/" in path else LIAR)
        case "POST /api/verdict/dismiss":
            yield Given("/api/verdict/dismiss", ("actions.by",), query=LIAR)
        case "POST /verdict/dismiss":
            yield Given("/verdict/dismiss", ("actions.by",), form=LIAR)
        case "POST /jobs/{name}/schedule/reset":
            yield await of_job(on, "", "reset")
        case _:
            parts = re.fullmatch(r"(?:POST|PUT) (/api/cron)?/jobs/\{name\}/(\w+)", route)
            assert parts is not None, f"{route} is not walked"
            yield await of_job(on, parts[1] or "", parts[2])


async def written_by(connection: Connection, name: str) -> set[str]:
    """Return which columns have a name."""
    found = set()
    for each in COLUMNS:
        table, _, column = each.partition(".")
        sql = f"SELECT count(*) FROM {table} WHERE {column} = $1"  # noqa: S608 - names from above
        if await connection.fetchval(sql, name):
            found.add(each)
    return found


# Logins are tested below.
CHANGING: Final = [
    f"{method} {path}"
    for method, path in routes.NEEDS
    if method not in {"GET", "HEAD"} and path not in {"/login", "/logout"}
]


async def walk(on: Scene) -> dict[str, set[str]]:
    """Send what changes something to every route; return what lacks the name of the key."""
    faults: dict[str, set[str]] = {}
    for number, route in enumerate(CHANGING):
        at = 0
        async for given in requests_of(on, route):
            at += 1
            name = f"key-{number}-{at}"
            headers = {**(given.headers or {}), **bearer(await make_key(on.database, name=name))}
            answer = await on.client.request(
                given.method,
                given.path,
                params=given.query,
                headers=headers,
                json=given.json,
                data=given.form,
            )
            form = given.form or {}
            refused = route == "POST /api/balance" and given.columns == ("idempotency_keys.by",)
            expected = {409} if refused else {200, 201, 202, 303}
            assert answer.status_code in expected, (route, given, answer.status_code, answer.text)
            found = await written_by(on.connection, name)
            if found != set(given.columns):
                faults[f"{route} {form.get('do', at)}"] = set(given.columns) ^ found
    return faults


async def test_whatever_changes_something_says_who_did(database: dict[str, str]) -> None:
    """Each route writes its principal wherever it writes who; what a request claims is ignored."""
    async with scene(database) as on:
        assert await walk(on) == {}
        assert await written_by(on.connection, LIAR["by"]) == set()


@pytest.mark.parametrize(
    ("module", "name", "instead", "routes_found"),
    [
        (holds_api, "principal", lambda _: ANONYMOUS, {"/api/holds"}),
        (jobs_api, "name_of", lambda _, claimed: claimed, {"/api/cron/", "/api/verdict/"}),
        (account_actions, "principal", lambda _: ANONYMOUS, {"/users", "/change"}),
    ],
)
async def test_a_route_that_drops_its_principal_is_noticed(  # noqa: PLR0913, PLR0917 - parameters
    database: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,  # noqa: ANN401 - a module
    name: str,
    instead: Callable[..., object],
    routes_found: set[str],
) -> None:
    """Control: without the principal the walk finds the routes that lack it."""
    monkeypatch.setattr(module, name, instead)
    async with scene(database) as on:
        faults = await walk(on)
    assert faults
    assert all(any(each in route for each in routes_found) for route in faults)


# -- keys of two principals --------------------------------------------------------------------


async def tell(answers: list[httpx.Response]) -> dict[str, int]:
    """Count answers by what they are."""
    kinds = [
        answer.json().get("code", "accepted") if answer.status_code != 409 else "refused"
        for answer in answers
    ]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def bodies() -> dict[str, tuple[str, dict[str, int]]]:
    return {
        "accepted change": ("/api/balance", {"userId": 1, "amount": -1}),
        "refused change": ("/api/balance", {"userId": 1, "amount": -(10**9)}),
        "accepted transfer": ("/api/transfers", {"fromUserId": 1, "toUserId": 2, "amount": 1}),
        "refused transfer": (
            "/api/transfers",
            {"fromUserId": 1, "toUserId": 2, "amount": 10**9},
        ),
        "accepted hold": ("/api/holds", {"userId": 1, "amount": 1, "expiresInSeconds": 600}),
        "refused hold": ("/api/holds", {"userId": 1, "amount": 10**9, "expiresInSeconds": 600}),
        "user": ("/api/users", {"balance": 5}),
    }


async def test_the_key_of_another_principal_tells_nothing(database: dict[str, str]) -> None:
    """Whatever its outcome was, the answer to another principal is the same; it changes nothing."""
    async with scene(database) as on:
        mine, other = [bearer(await make_key(database, name=name)) for name in ("mine", "other")]
        told = set()
        for key, (path, body) in bodies().items():
            name = {"Idempotency-Key": key.replace(" ", "-")}
            first = await on.client.post(path, json=body, headers={**mine, **name})
            again = await on.client.post(path, json=body, headers={**mine, **name})
            assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
            theirs = await on.client.post(path, json=body, headers={**other, **name})
            assert theirs.status_code == 422
            assert "idempotent-replayed" not in theirs.headers
            told.add(theirs.text)
        assert len(told) == 1
        assert '"idempotency-key-reused"' in told.pop()
        assert await written_by(on.connection, "other") == set()


async def test_a_key_from_before_there_were_keys_belongs_to_who_knows_it(
    database: dict[str, str],
) -> None:
    """Recorded without a principal, an outcome may be resolved by every one."""
    async with serving(database) as app, client_at(app, "127.0.0.1") as client:
        first = {}
        for key, (path, body) in bodies().items():
            if path == "/api/transfers":
                continue
            headers = {"Idempotency-Key": key.replace(" ", "-")}
            first[key] = await client.post(path, json=body, headers=headers)
        named = bearer(await make_key(database))
        await keys_are_asked_for(app)
        for key, answer in first.items():
            path, body = bodies()[key]
            headers = {"Idempotency-Key": key.replace(" ", "-"), **named}
            again = await client.post(path, json=body, headers=headers)
            assert (again.status_code, again.content) == (answer.status_code, answer.content)
            assert again.headers["idempotent-replayed"] == "true"


Send = Callable[[dict[str, str]], Awaitable[httpx.Response]]


async def race(on: Scene, path: str, body: dict[str, int]) -> list[dict[str, int]]:
    """Let two principals use one key fifty times each at once; return what each was answered."""
    both = [bearer(await make_key(on.database, name=f"racer-{uuid4().hex}")) for _ in range(2)]
    key = {"Idempotency-Key": uuid4().hex}
    for headers in both:  # a key is known to the instance once it was used
        await on.client.get("/api/users/1", headers=headers)

    async def use(headers: dict[str, str]) -> httpx.Response:
        return await on.client.post(path, json=body, headers={**headers, **key})

    answers = await asyncio.gather(*(use(both[number % 2]) for number in range(100)))
    return [await tell(list(answers[side::2])) for side in range(2)]


@pytest.mark.parametrize("what", ["accepted change", "refused change", "accepted hold", "user"])
async def test_of_two_principals_with_one_key_one_wins(database: dict[str, str], what: str) -> None:
    """All answers to the one are its outcome, all to the other say that the key is taken."""
    async with scene(database) as on:
        told = await race(on, *bodies()[what])
    outcome = "refused" if what.startswith("refused") else "accepted"
    expected = [{outcome: 50}, {"idempotency-key-reused": 50}]
    assert sorted(told, key=str) == sorted(expected, key=str)


async def test_without_the_comparison_both_win(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a key that forgets its principal tells both the outcome."""
    whole = repository.RECALL
    monkeypatch.setattr(repository, "RECALL", whole.replace("hold, by,", "hold, NULL AS by,"))
    assert whole != repository.RECALL
    async with scene(database) as on:
        told = await race(on, *bodies()["accepted change"])
    assert told == [{"accepted": 50}, {"accepted": 50}]


# -- actions -----------------------------------------------------------------------------------


async def actions_of(on: Scene, **query: str) -> list[dict[str, Any]]:
    """Return the actions of one page."""
    answer = await on.client.get("/api/actions", params=query, headers=on.prepares)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["actions"])


async def test_each_control_is_one_action(database: dict[str, str]) -> None:
    """It has what was before and after; repeated, where it changes nothing, it is none."""
    async with scene(database) as on:
        name = await on.job()
        jobs = f"/api/cron/jobs/{name}"
        requests: list[tuple[str, str, object]] = [
            ("POST", f"{jobs}/run", None),
            ("POST", f"{jobs}/pause?reason=why", None),
            ("POST", f"{jobs}/resume", None),
            ("PUT", f"{jobs}/schedule", {"everySeconds": 60}),
            ("DELETE", f"{jobs}/schedule", None),
        ]
        for method, path, body in requests:
            for _ in range(2):
                answer = await on.client.request(method, path, json=body, headers=on.prepares)
                assert answer.is_success, answer.text
        refused = await on.client.post(f"{jobs}/cancel", headers=on.prepares)
        assert refused.status_code == 409
        found = await actions_of(on, subject=f"job {name}")
        assert {each["by"] for each in found} == {"stagehand"}
        told = [(each["action"], each["before"], each["after"]) for each in reversed(found)]
        assert [action for action, _, _ in told] == [
            *("job run requested", "job paused", "job resumed"),
            *("job schedule set", "job schedule reset"),
        ]
        assert told[0][1]["dueAt"] > told[0][2]["dueAt"]
        assert told[1][1:] == (None, {"reason": "why"})
        assert told[2][1]["pausedBy"] == "stagehand"
        assert told[3][1:] == ({"schedule": "every 300 s"}, {"schedule": "every 60 s"})
        assert told[4][1:] == ({"schedule": "every 60 s"}, {"schedule": "every 300 s"})


# The statements of controls: the column that has who did, and what they take besides the job and
# who requests it.
AT_ONCE: Final[dict[str, tuple[str, list[object]]]] = {
    "RUN": ("requested_by", [timedelta(seconds=60), None, status_module.AHEAD]),
    "PAUSE": ("paused_by", [None]),
    "CANCEL": ("cancel_requested_by", []),
    "FORGET": ("forgotten_by", [timedelta(seconds=60), "no instance", status_module.AHEAD]),
}


async def control_at_once(database: dict[str, str], statement: str, sql: str) -> list[str]:
    """Let eight sessions control a job whose row was changed meanwhile; return who did by actions.

    Raises:
        AssertionError: the job does not name the first of them.
    """
    column, rest = AT_ONCE[statement]
    async with migrated(database) as (_, connection):
        instance = await add_instance(connection)
        state = running(instance, "app1") if statement == "CANCEL" else {}
        await add_job(connection, "moon", last_heartbeat_at=None, **state)
        if statement == "FORGET":
            await connection.execute("UPDATE instances SET missing = '{moon}'")
        sessions = [await connect(database) for _ in range(8)]
        pids = [each.get_server_pid() for each in sessions]
        async with connection.transaction():
            await connection.execute("UPDATE jobs SET lost_streak = 1")
            sent = [
                asyncio.create_task(each.fetch(sql, "moon", f"racer-{number}", *rest))
                for number, each in enumerate(sessions)
            ]
            async with asyncio.timeout(30):
                while await connection.fetchval(WAITING, pids) < len(sessions):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.02)
        await asyncio.gather(*sent)
        for each in sessions:
            await each.close()
        found = await connection.fetch("SELECT by FROM actions ORDER BY id")
        first = await connection.fetchval(f"SELECT {column} FROM jobs")  # noqa: S608 - from above
    assert first == found[0]["by"]
    return [each["by"] for each in found]


WAITING: Final = """
SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1) AND wait_event_type = 'Lock'
"""


@pytest.mark.parametrize("statement", AT_ONCE)
async def test_of_controls_at_once_one_is_an_action(
    database: dict[str, str], statement: str
) -> None:
    """The one that changed the job, which names who did; the others found it changed."""
    sql = getattr(controls, statement)
    assert len(await control_at_once(database, statement, sql)) == 1


async def test_without_a_lock_each_control_takes_itself_for_the_first(
    database: dict[str, str],
) -> None:
    """Control: what was before is read as it was when the statement began."""
    sql = controls.PAUSE.replace("FOR NO KEY UPDATE", "")
    assert len(await control_at_once(database, "PAUSE", sql)) == 8


async def test_users_and_their_settings_are_actions(database: dict[str, str]) -> None:
    """A new user and each change of settings is one; a replay, a refusal and no change are none."""
    async with scene(database) as on:
        headers = {**on.prepares, "Idempotency-Key": "open"}
        for _ in range(2):
            opened = await on.client.post("/api/users", json={"balance": 5}, headers=headers)
        user = opened.json()["userId"]
        headers = {**on.prepares, "If-Match": "*"}
        for body, status in (
            ({"floor": -5}, 200),
            ({"floor": -5}, 200),
            ({"floor": 6}, 409),
            ({"externalId": "a", "frozen": True}, 200),
        ):
            answer = await on.client.patch(f"/api/users/{user}", json=body, headers=headers)
            assert answer.status_code == status, answer.text
        found = await actions_of(on, subject=f"user {user}")
        floor = {"floor": -5, "frozen": False, "externalId": None}
        assert [(each["action"], each["before"], each["after"]) for each in reversed(found)] == [
            ("user created", None, {"balance": 5, "floor": 0, "externalId": None}),
            ("user settings changed", {**floor, "floor": 0}, floor),
            ("user settings changed", floor, {"floor": -5, "frozen": True, "externalId": "a"}),
        ]


async def test_a_refused_or_failed_statement_leaves_no_action(database: dict[str, str]) -> None:
    """An action is there exactly if what it records is: both are one statement."""
    async with scene(database) as on:
        before = await actions_of(on)
        await on.connection.execute("ALTER TABLE user_settings ADD CHECK (floor <> -13)")
        headers = {**on.prepares, "If-Match": "*"}
        failed = await on.client.patch("/api/users/1", json={"floor": -13}, headers=headers)
        assert failed.status_code == 500
        assert await actions_of(on) == before


async def test_logins_are_actions(database: dict[str, str]) -> None:
    """A login and a logout have the name of the key; a wrong key, and a second logout, are none."""
    async with scene(database) as on:
        key = await make_key(database, name="ada")
        for sent in (key.text, key.text[:-1]):
            answer = await on.client.post("/login", data={"key": sent})
        assert answer.status_code == 401
        for _ in range(2):
            await on.client.post("/logout")
        found = await actions_of(on, subject="key ada", by="ada")
        assert [each["action"] for each in found] == ["logged out", "logged in"]
        assert found[0]["before"]["session"] == found[1]["after"]["session"]


async def test_actions_are_listed_page_by_page(database: dict[str, str]) -> None:
    """The latest first; the pages of any filter together are the whole list."""
    async with scene(database) as on:
        other = bearer(await make_key(database, name="other"))
        for number in range(7):
            headers = other if number % 2 else on.prepares
            await on.client.post("/api/users", json={"balance": number}, headers=headers)
        filters: list[dict[str, str]] = [
            *({}, {"by": "other"}, {"subject": "user 3"}),
            *({"by": "other", "subject": "user 4"}, {"by": "nobody"}),
        ]
        whole = await actions_of(on)
        assert [each["id"] for each in whole] == sorted((a["id"] for a in whole), reverse=True)
        for given in filters:
            expected = [each for each in whole if all(each[name] == given[name] for name in given)]
            found: list[dict[str, Any]] = []
            cursor: dict[str, str] = {}
            while True:
                query = {**given, **cursor, "limit": "2"}
                answer = await on.client.get("/api/actions", params=query, headers=on.prepares)
                found += answer.json()["actions"]
                if answer.json()["next"] is None:
                    break
                cursor = {"before": str(answer.json()["next"])}
            assert found == expected
        shown = await on.client.get("/actions", params={"by": "other"}, headers=on.prepares)
        assert shown.status_code == 200
        assert ">other</a>" in shown.text
        assert ">stagehand</a>" not in shown.text.partition("<table")[2]


async def test_without_keys_actions_have_the_name_that_is_claimed(
    database: dict[str, str],
) -> None:
    """Where nobody is asked, a control has who the request names; a new user has nobody."""
    connection = await connect(database)
    async with serving(database) as app, client_at(app, "127.0.0.1") as client:
        await add_job(connection, "moon")
        await client.post("/api/cron/jobs/moon/pause", params={"by": "ada"})
        await client.post("/api/users", json={})
        found = (await client.get("/api/actions")).json()["actions"]
        assert [(each["by"], each["action"]) for each in found] == [
            (None, "user created"),
            ("ada", "job paused"),
        ]
    await connection.close()
