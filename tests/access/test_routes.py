"""Every route with every kind of key, against the table of what each may do."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any, Final

from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from balance_app.http.middleware import RequestMiddleware
from tests.access.application import client_at, keys_are_asked_for, serving
from tests.access.keyring import bearer, cookie, log_in, log_out, make_key, revoke, unknown

# Written out here, and not taken from the program: who may do what is decided twice.
ANYBODY: Final = frozenset({"anybody"})
READ: Final = frozenset({"read"})
LESSEN: Final = frozenset({"change", "withdraw"})
MOVE: Final = frozenset({"change"})
MAKE: Final = frozenset({"open"})
OPERATE: Final = frozenset({"operate"})
METRICS: Final = frozenset({"metrics"})


def shown(scopes: frozenset[str]) -> frozenset[str]:
    """Return what a form needs: if it is refused, the answer is a page with everything on it."""
    return frozenset(f"read {scope}" for scope in scopes)


MAY: Final = {
    "GET /livez": ANYBODY,
    "GET /readyz": ANYBODY,
    "GET /health": ANYBODY,
    "GET /static/{name}": ANYBODY,
    "GET /login": ANYBODY,
    "POST /login": ANYBODY,
    "POST /logout": ANYBODY,
    "GET /problems": ANYBODY,
    "GET /problems/{code}": ANYBODY,
    "GET /docs": ANYBODY,
    "GET /docs/assets/{file:path}": ANYBODY,
    "GET /openapi.json": ANYBODY,
    "POST /api/balance": LESSEN,
    "POST /api/transfers": MOVE,
    "GET /api/transfers/{transferId}": READ,
    "POST /api/users/{userId}/entries/{version}/reverse": MOVE,
    "GET /api/users/{userId}/changes/{key:text}": READ | LESSEN,
    "POST /api/holds": LESSEN,
    "GET /api/holds/{holdId}": READ,
    "POST /api/holds/{holdId}/capture": LESSEN,
    "POST /api/holds/{holdId}/void": LESSEN,
    "GET /api/users/{userId}/holds": READ,
    "POST /api/users": MAKE,
    "GET /api/users": READ,
    "PUT /api/users/by-external-id/{externalId:text}": MAKE,
    "GET /api/users/{userId}": READ,
    "PATCH /api/users/{userId}": MAKE,
    "GET /api/users/{userId}/settings": READ,
    "GET /api/users/{userId}/entries": READ,
    "GET /api/users/{userId}/daily-balances": READ,
    "GET /api/actions": READ,
    "GET /api/cron/status": READ,
    "GET /api/cron/events": READ,
    "GET /api/cron/history": READ,
    "GET /api/cron/runs/{run}/log": READ,
    "POST /api/cron/jobs/{name}/run": OPERATE,
    "POST /api/cron/jobs/{name}/pause": OPERATE,
    "POST /api/cron/jobs/{name}/resume": OPERATE,
    "POST /api/cron/jobs/{name}/cancel": OPERATE,
    "PUT /api/cron/jobs/{name}/schedule": OPERATE,
    "DELETE /api/cron/jobs/{name}/schedule": OPERATE,
    "POST /api/cron/jobs/{name}/forget": OPERATE,
    "POST /api/cron/instances/{instance}/dismiss": OPERATE,
    "GET /api/verdict": READ,
    "POST /api/verdict/dismiss": OPERATE,
    "GET /metrics": METRICS,
    "GET /": READ,
    "GET /live": READ,
    "GET /actions": READ,
    "GET /jobs": READ,
    "GET /jobs/{name}": READ,
    "GET /jobs/{name}/cancel": shown(OPERATE),
    "GET /jobs/{name}/forget": shown(OPERATE),
    "GET /jobs/{name}/runs/{run}": READ,
    "GET /runs": READ,
    "GET /runs/{run}": READ,
    "POST /jobs/{name}/run": shown(OPERATE),
    "POST /jobs/{name}/pause": shown(OPERATE),
    "POST /jobs/{name}/resume": shown(OPERATE),
    "POST /jobs/{name}/cancel": shown(OPERATE),
    "POST /jobs/{name}/schedule": shown(OPERATE),
    "POST /jobs/{name}/schedule/reset": shown(OPERATE),
    "POST /instances/{instance}/dismiss": shown(OPERATE),
    "POST /verdict/dismiss": shown(OPERATE),
    "POST /jobs/{name}/forget": shown(OPERATE),
    "GET /users": READ,
    "POST /users": shown(MAKE),
    "GET /users/{user_id}": READ,
    "POST /change": shown(LESSEN),
    "POST /users/{user_id}": shown(MOVE | LESSEN | MAKE),
}
# Answers without an end: of these the head is asked for.
STREAMS: Final = {"GET /live", "GET /api/cron/events"}
SCOPES: Final = ("read", "withdraw", "change", "open", "operate", "metrics")
KEYS: Final = (*SCOPES, *(f"read {scope}" for scope in SCOPES[1:]))
# Nothing is found by them, so that what may pass changes nothing.
VALUES: Final = {"userId": "999", "user_id": "999", "version": "1", "run": "1", "holdId": "999-1"}


def routes_of(app: FastAPI) -> set[str]:
    """Return what the application answers, as `GET /path/{parameter}`."""

    def walk(routes: Any) -> Iterator[str]:  # noqa: ANN401 - FastAPI's own
        for route in routes:
            inside = getattr(route, "original_router", None) or getattr(route, "router", None)
            if inside is not None:
                yield from walk(inside.routes)
            elif getattr(route, "methods", None):
                yield from (f"{method} {route.path}" for method in route.methods - {"HEAD"})
            else:  # static files
                yield f"GET {route.path}/{{file:path}}"

    return set(walk(app.router.routes))


async def refusals(app: RequestMiddleware, database: dict[str, str]) -> dict[str, set[str]]:
    """Send a request to every route with each kind of key; return who is refused where.

    What is refused is checked to be refused for the right reason.
    """
    keys = {scopes: await make_key(database, *scopes.split()) for scopes in KEYS}
    sessions = {scopes: await log_in(database, keys[scopes]) for scopes in KEYS}
    revoked = await make_key(database)
    of_revoked = await log_in(database, revoked)
    await revoke(database, revoked)
    ended = await log_in(database, keys["read"])
    await log_out(database, ended)
    known = {
        **{scopes: bearer(key) for scopes, key in keys.items()},
        **{f"session of {scopes}": cookie(session) for scopes, session in sessions.items()},
        "all": bearer(await make_key(database)),
    }
    sent = unknown().text
    strange = {
        "none": {},
        "wrong": bearer(unknown()),
        "wrong checksum": {"Authorization": f"Bearer {sent[:-1]}{'B' if sent[-1] == 'A' else 'A'}"},
        "no key": {"Authorization": "Bearer"},
        "basic": {"Authorization": "Basic " + "YTpi"},
        "expired": bearer(await make_key(database, seconds=-1)),
        "revoked": bearer(revoked),
        "wrong session": cookie(unknown("bs")),
        "expired session": cookie(await log_in(database, keys["read"], seconds=-1)),
        "ended session": cookie(ended),
        "session of a revoked key": cookie(of_revoked),
        "id alone": {"Authorization": f"Bearer {keys['read'].id}"},
    }
    await keys_are_asked_for(app)
    found: dict[str, set[str]] = {}

    async def ask(number: int, route: str) -> None:
        found[route] = set()
        method, template = route.split(" ")
        path = re.sub(r"\{(\w+)(:\w+)?\}", lambda part: VALUES.get(part[1], "none"), template)
        if route in STREAMS:
            method = "HEAD"
        clients = [client_at(app, f"10.0.{number}.{last}") for last in range(2)]
        for at, (who, headers) in enumerate({**strange, **known}.items()):
            response = await clients[at % 2].request(method, path, headers=headers)
            status, problem = response.status_code, response.headers.get("content-type")
            assert status < 500, (route, who, response.text)
            assert status != 429, (route, who)
            if status not in {401, 403}:
                continue
            found[route].add(who)
            assert (status == 401) == (who in strange), (route, who, response.text)
            if status == 401:
                assert response.headers["www-authenticate"] == "Bearer"
            if problem == "application/problem+json" and method != "HEAD":
                expected = "unauthorized" if status == 401 else "insufficient-scope"
                assert response.json()["code"] == expected

    ends_sessions = "POST /logout"
    others = [route for route in MAY if route != ends_sessions]
    await asyncio.gather(*(ask(number, route) for number, route in enumerate(others)))
    await ask(len(others), ends_sessions)
    return found


def expected_refusals(route: str) -> set[str]:
    """Return who is refused at a route, by the table above."""
    if MAY[route] == ANYBODY:
        return set()
    strange = {
        *("none", "wrong", "wrong checksum", "no key", "basic", "expired", "revoked", "id alone"),
        *("wrong session", "expired session", "ended session", "session of a revoked key"),
    }
    lacking = {
        scopes
        for scopes in KEYS
        if not any(set(scopes.split()) >= set(enough.split()) for enough in MAY[route])
    }
    return strange | lacking | {f"session of {scopes}" for scopes in lacking}


async def test_each_route_asks_for_its_scope(database: dict[str, str]) -> None:
    """Every route refuses whoever is not in its row, and nobody else."""
    async with serving(database) as app:
        assert routes_of(app.app) <= set(MAY), "a route without a row in MAY"
        found = await refusals(app, database)
    assert found == {route: expected_refusals(route) for route in MAY}


async def test_a_route_without_a_row_is_refused_and_noticed(database: dict[str, str]) -> None:
    """Control: what the table does not name is closed to every key, and the walk above finds it."""
    async with serving(database) as app:

        @app.app.get("/api/secret")
        async def secret() -> PlainTextResponse:
            return PlainTextResponse("42")

        assert routes_of(app.app) - set(MAY) == {"GET /api/secret"}
        key = bearer(await make_key(database))
        await keys_are_asked_for(app)
        async with client_at(app, "10.0.0.1") as client:
            assert (await client.get("/api/secret", headers=key)).status_code == 404
            assert (await client.get("/api/secret")).status_code == 401


async def test_what_is_no_route_tells_nothing_without_a_key(database: dict[str, str]) -> None:
    """Without a key every address looks the same, and no spelling of a path gets past the gate."""
    async with serving(database) as app, client_at(app, "10.0.0.1") as client:
        await make_key(database)
        await keys_are_asked_for(app)
        for method, path in [
            *(("GET", path) for path in ("/nothing", "/api", "/api/users/", "//api/users")),
            *(("GET", path) for path in ("/API/users", "/api//users", "/livez/../api/users")),
            *(("GET", path) for path in ("/livez/api/users", "/livez%2f", "/livez%0a", "/%2e/")),
            *(("GET", path) for path in ("/static/../api/users", "/static/a/b", "/api/users%00")),
            *((method, "/api/users/1") for method in ("DELETE", "OPTIONS", "TRACE", "get", "X")),
        ]:
            response = await client.request(method, path)
            assert response.status_code == 401, (method, path)
