"""The contract of transfers, holds, reversals and settings, call by call."""

from typing import Any

import httpx
import pytest

ANYHOW = {"If-Match": "*"}


async def open_user(client: httpx.AsyncClient, balance: int = 10, **more: object) -> int:
    """Create a user; return the id."""
    opened = await client.post("/api/users", json={"balance": balance, **more})
    assert opened.status_code == 201, opened.text
    return int(opened.json()["userId"])


async def account(client: httpx.AsyncClient, user: int) -> dict[str, Any]:
    """Return a user's account."""
    found: dict[str, Any] = (await client.get(f"/api/users/{user}")).json()
    return found


async def hold(client: httpx.AsyncClient, user: int, amount: int) -> str:
    """Place a hold; return its id."""
    body = {"userId": user, "amount": amount, "expiresInSeconds": 3600}
    placed = await client.post("/api/holds", json=body)
    assert placed.status_code == 201, placed.text
    return str(placed.json()["id"])


# -- transfers --------------------------------------------------------------------------------


async def test_a_transfer_is_two_entries_that_name_each_other(client: httpx.AsyncClient) -> None:
    """The answer has both accounts after it; it can be read again; only the payer has the key."""
    payee = await open_user(client)
    body = {"fromUserId": 1, "toUserId": payee, "amount": 3, "reference": "rent", "note": "May"}
    made = await client.post("/api/transfers", json=body, headers={"Idempotency-Key": "k"})
    transfer = made.json()
    at = transfer.pop("at")
    assert transfer == {
        "id": "1-2",
        "amount": 3,
        "key": "k",
        "reference": "rent",
        "note": "May",
        "by": None,
        "from": {"userId": 1, "balance": 9997, "held": 0, "available": 9997, "version": 2},
        "to": {"userId": payee, "balance": 13, "held": 0, "available": 13, "version": 2},
        "reverses": None,
        "reversedBy": None,
    }
    assert (await client.get("/api/transfers/1-2")).content == made.content
    for user, other, amount, key in ((1, payee, -3, "k"), (payee, 1, 3, None)):
        entry = (await client.get(f"/api/users/{user}/entries")).json()["entries"][-1]
        assert (entry["amount"], entry["transfer"], entry["otherUserId"]) == (amount, "1-2", other)
        assert (entry["at"], entry["key"], entry["reference"]) == (at, key, "rent")
    for nothing in (f"{payee}-2", "1-1", "1-3", "404404-1"):
        answer = await client.get(f"/api/transfers/{nothing}")
        assert (answer.status_code, answer.json()["code"]) == (404, "transfer-not-found")


async def test_a_refused_transfer_names_the_side_that_refuses(client: httpx.AsyncClient) -> None:
    """The payer without the money, the payee who would pass the limit, and whoever is frozen."""
    poor, rich = await open_user(client, 1), await open_user(client, 2**53 - 2)

    async def transfer(payer: int, payee: int, amount: int) -> dict[str, Any]:
        body = {"fromUserId": payer, "toUserId": payee, "amount": amount}
        answer = await client.post("/api/transfers", json=body)
        assert answer.status_code == 409
        refusal: dict[str, Any] = answer.json()
        return {name: refusal[name] for name in ("code", "userId", "balance", "amount")}

    few = {"code": "insufficient-funds", "userId": poor, "balance": 1, "amount": -2}
    full = {"code": "balance-limit-exceeded", "userId": rich, "balance": 2**53 - 2, "amount": 2}
    assert await transfer(poor, 1, 2) == few
    assert await transfer(1, rich, 2) == full
    assert await transfer(poor, rich, 2) == few
    await client.patch(f"/api/users/{poor}", json={"frozen": True}, headers=ANYHOW)
    frozen = {"code": "user-frozen", "userId": poor, "balance": 1}
    assert await transfer(poor, 1, 1) == {**frozen, "amount": -1}
    assert await transfer(1, poor, 1) == {**frozen, "amount": 1}
    assert (await account(client, poor))["version"] == 1


# -- reversals --------------------------------------------------------------------------------


async def test_a_change_is_reversed_once(client: httpx.AsyncClient) -> None:
    """The second try is answered with the first reversal, whatever its body says."""
    await client.post("/api/balance", json={"userId": 1, "amount": -4})
    address = "/api/users/1/entries/2/reverse"
    first = await client.post(address, json={"reference": "wrong", "note": None})
    change = first.json()["change"]
    assert (first.status_code, first.json()["balance"]) == (200, 10_000)
    assert (change["amount"], change["reverses"], change["reference"]) == (4, 2, "wrong")
    for again in (await client.post(address), await client.post(address, json={"note": "x"})):
        assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
    assert (await account(client, 1))["version"] == 3


async def test_what_can_not_be_reversed_is_refused(client: httpx.AsyncClient) -> None:
    """A reversal, an opening of 0, and what the account no longer has."""
    empty, user = await open_user(client, 0), await open_user(client, 5)
    await client.post("/api/balance", json={"userId": user, "amount": -1})
    await client.post(f"/api/users/{user}/entries/2/reverse")
    for address, reverses in ((f"{empty}/entries/1", None), (f"{user}/entries/3", 2)):
        answer = await client.post(f"/api/users/{address}/reverse")
        assert (answer.status_code, answer.json()["code"]) == (409, "not-reversible")
        assert answer.json()["reverses"] == reverses
    await client.post("/api/balance", json={"userId": user, "amount": -1})
    poor = await client.post(f"/api/users/{user}/entries/1/reverse")
    assert (poor.status_code, poor.json()["code"]) == (409, "insufficient-funds")
    assert (poor.json()["amount"], poor.json()["shortfall"]) == (-5, 1)
    await client.post("/api/balance", json={"userId": user, "amount": 1})
    opening = await client.post(f"/api/users/{user}/entries/1/reverse")
    assert (opening.status_code, opening.json()["balance"]) == (200, 0)


@pytest.mark.parametrize("side", ["from", "to"])
async def test_both_halves_of_a_transfer_are_reversed(client: httpx.AsyncClient, side: str) -> None:
    """Whichever half is named; both transfers name each other."""
    payee = await open_user(client)
    body = {"fromUserId": 1, "toUserId": payee, "amount": 3}
    first = (await client.post("/api/transfers", json=body)).json()
    half = first[side]
    address = f"/api/users/{half['userId']}/entries/{half['version']}/reverse"
    made = (await client.post(address)).json()
    assert (made["from"]["userId"], made["to"]["userId"], made["amount"]) == (payee, 1, 3)
    assert (made["from"]["balance"], made["to"]["balance"]) == (10, 10_000)
    assert (made["id"], made["reverses"]) == (f"{payee}-3", first["id"])
    for other in ("from", "to"):
        half = first[other]
        again = await client.post(f"/api/users/{half['userId']}/entries/{half['version']}/reverse")
        assert (again.json(), again.headers["idempotent-replayed"]) == (made, "true")
    undone = (await client.get(f"/api/transfers/{first['id']}")).json()
    assert undone == {**first, "reversedBy": made["id"]}
    assert (await client.get(f"/api/transfers/{made['id']}")).json() == made
    for user in (1, payee):
        answer = await client.post(f"/api/users/{user}/entries/3/reverse")
        assert answer.json()["code"] == "not-reversible"


# -- holds ------------------------------------------------------------------------------------


async def test_a_hold_reserves_until_it_is_captured(client: httpx.AsyncClient) -> None:
    """What is held can't be spent; a capture withdraws a part, and releases the rest."""
    user = await open_user(client)
    place = {"userId": user, "amount": 6, "expiresInSeconds": 3600, "reference": "room 7"}
    placed = await client.post("/api/holds", json=place)
    body = placed.json()
    assert body.pop("account") == {
        "userId": user,
        "balance": 10,
        "held": 6,
        "available": 4,
        "version": 1,
    }
    assert (body["state"], body["amount"], body["captured"]) == ("open", 6, None)
    assert placed.headers["location"] == f"/api/holds/{body['id']}" == f"/api/holds/{user}-1"
    assert (await client.get(placed.headers["location"])).json() == body
    for path, spend in (
        ("balance", {"userId": user, "amount": -5}),
        ("transfers", {"fromUserId": user, "toUserId": 1, "amount": 5}),
        ("holds", {**place, "amount": 5}),
    ):
        refused = (await client.post(f"/api/{path}", json=spend)).json()
        assert refused["code"] == "insufficient-funds"
        assert (refused["held"], refused["available"], refused["shortfall"]) == (6, 4, 1)
        assert refused["detail"].startswith(f"User {user} has 10, of which 6 is held; ")
    capture = f"/api/holds/{user}-1/capture"
    beyond = (await client.post(capture, json={"amount": 7})).json()
    assert (beyond["code"], beyond["amount"], beyond["held"]) == ("capture-exceeds-hold", 7, 6)
    captured = await client.post(capture, json={"amount": 2, "note": "breakfast"})
    assert captured.json()["account"] == {
        "userId": user,
        "balance": 8,
        "held": 0,
        "available": 8,
        "version": 2,
    }
    assert (captured.json()["state"], captured.json()["captured"]) == ("captured", 2)
    entry = (await client.get(f"/api/users/{user}/entries")).json()["entries"][-1]
    assert (entry["amount"], entry["hold"], entry["note"]) == (-2, f"{user}-1", "breakfast")
    again = await client.post(capture, json={"amount": 2})
    assert (again.content, again.headers["idempotent-replayed"]) == (captured.content, "true")
    for path, other in (("capture", {}), ("capture", {"amount": 3}), ("void", {})):
        ended = await client.post(f"/api/holds/{user}-1/{path}", json=other)
        assert (ended.status_code, ended.json()["code"]) == (409, "hold-ended")
        assert (ended.json()["state"], ended.json()["captured"]) == ("captured", 2)


async def test_a_voided_hold_releases_all(client: httpx.AsyncClient) -> None:
    """Also of a frozen account, which captures nothing; a second time is the first again."""
    user = await open_user(client)
    await hold(client, user, 6)
    await client.patch(f"/api/users/{user}", json={"frozen": True}, headers=ANYHOW)
    refused = await client.post(f"/api/holds/{user}-1/capture")
    assert (refused.status_code, refused.json()["code"]) == (409, "user-frozen")
    assert refused.json()["amount"] == -6
    first, again = [await client.post(f"/api/holds/{user}-1/void") for _ in range(2)]
    assert (first.json()["state"], first.json()["account"]["available"]) == ("voided", 10)
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
    late = await client.post(f"/api/holds/{user}-1/capture")
    assert (late.json()["code"], late.json()["state"]) == ("hold-ended", "voided")


async def test_holds_are_listed_by_number(client: httpx.AsyncClient) -> None:
    """The number is the cursor, and the state a filter; an end has a number as well."""
    user = await open_user(client)
    ids = [await hold(client, user, 1) for _ in range(3)]
    await client.post(f"/api/holds/{ids[1]}/void")
    ids.append(await hold(client, user, 1))
    assert ids == [f"{user}-{number}" for number in (1, 2, 3, 5)]
    address = f"/api/users/{user}/holds"
    first = (await client.get(address, params={"limit": 2})).json()
    assert ([each["id"] for each in first["holds"]], first["next"]) == (ids[:2], 2)
    rest = (await client.get(address, params={"limit": 2, "after": 2})).json()
    assert ([each["id"] for each in rest["holds"]], rest["next"]) == (ids[2:], None)
    for state, found in {"open": [ids[0], *ids[2:]], "voided": [ids[1]], "captured": []}.items():
        page = (await client.get(address, params={"state": state})).json()
        assert [each["id"] for each in page["holds"]] == found


# -- settings ---------------------------------------------------------------------------------


async def test_a_floor_below_zero_is_an_overdraft(client: httpx.AsyncClient) -> None:
    """What is available may fall to the floor and not below it; a floor must be covered."""
    user = await open_user(client, 10, floor=-5)
    spent = await client.post("/api/balance", json={"userId": user, "amount": -15})
    assert spent.json()["balance"] == -5
    refused = (await client.post("/api/balance", json={"userId": user, "amount": -1})).json()
    assert (refused["balance"], refused["floor"], refused["shortfall"]) == (-5, -5, 1)
    for floor in (-4, 0, 5):
        answer = await client.patch(f"/api/users/{user}", json={"floor": floor}, headers=ANYHOW)
        assert (answer.status_code, answer.json()["code"]) == (409, "floor-not-covered")
        assert (answer.json()["available"], answer.json()["floor"]) == (-5, floor)
    poor = await client.post("/api/users", json={"balance": 4, "floor": 5})
    assert (poor.status_code, poor.json()["code"]) == (409, "floor-not-covered")


async def test_each_change_of_settings_is_kept(client: httpx.AsyncClient) -> None:
    """With who and when; what is left out stays, and only `externalId` can be null."""
    user = await open_user(client, 10, floor=-5, externalId="a")
    address = f"/api/users/{user}"
    for body, by in (
        ({"frozen": True}, {"by": "ada"}),
        ({"floor": 3, "frozen": None, "externalId": "b"}, {}),
        ({"externalId": None}, {}),
    ):
        answer = await client.patch(address, json=body, params=by, headers=ANYHOW)
        assert answer.status_code == 200
        assert answer.json() == await account(client, user)
    page = (await client.get(f"{address}/settings")).json()
    members = ("settingsVersion", "floor", "frozen", "externalId", "by")
    assert [tuple(each[name] for name in members) for each in page["settings"]] == [
        (1, -5, False, "a", None),
        (2, -5, True, "a", "ada"),
        (3, 3, True, "b", "api"),
        (4, 3, True, None, "api"),
    ]
    part = (await client.get(f"{address}/settings", params={"after": 1, "limit": 2})).json()
    assert (part["settings"], part["next"]) == (page["settings"][1:3], 3)


async def test_a_user_is_found_by_an_external_id(client: httpx.AsyncClient) -> None:
    """It is unique; a `PUT` creates the user once, and leaves one who is there as it is."""
    name = "Kunde/7 é"
    address = "/api/users/by-external-id/Kunde%2F7%20%C3%A9"
    created = await client.put(address, json={"balance": 7, "floor": -1})
    assert (created.status_code, created.json()["externalId"]) == (201, name)
    user = created.json()["userId"]
    assert created.headers["location"] == f"/api/users/{user}"
    for again in (await client.put(address), await client.put(address, json={"balance": 9})):
        assert (again.status_code, again.json()) == (200, created.json())
    found = (await client.get("/api/users", params={"externalId": name})).json()
    assert found == {"users": [created.json()], "next": None}
    nobody = (await client.get("/api/users", params={"externalId": "kunde/7 é"})).json()
    assert nobody == {"users": [], "next": None}
    taken = [
        await client.post("/api/users", json={"externalId": name}),
        await client.patch("/api/users/1", json={"externalId": name}, headers=ANYHOW),
    ]
    assert {(each.status_code, each.json()["code"]) for each in taken} == {
        (409, "external-id-taken")
    }
    await client.patch(f"/api/users/{user}", json={"externalId": None}, headers=ANYHOW)
    renamed = await client.patch("/api/users/1", json={"externalId": name}, headers=ANYHOW)
    assert renamed.json()["externalId"] == name


# -- conditions -------------------------------------------------------------------------------


async def test_a_change_is_made_only_from_the_state_that_was_read(
    client: httpx.AsyncClient,
) -> None:
    """Any change of the account gives it another tag: of its balance, its settings, its holds."""
    payee = await open_user(client)
    change = {"userId": 1, "amount": -1}
    requests: list[tuple[str, dict[str, int]]] = [
        ("balance", change),
        ("transfers", {"fromUserId": 1, "toUserId": payee, "amount": 1}),
        ("holds", {"userId": 1, "amount": 1, "expiresInSeconds": 3600}),
    ]
    seen = {str((await client.get("/api/users/1")).headers["etag"])}
    for path, body in requests:
        tag = (await client.get("/api/users/1")).headers["etag"]
        headers = {"If-Match": f'"a", {tag}'}
        made = await client.post(f"/api/{path}", json=body, headers=headers)
        assert made.is_success
        before = await account(client, 1)
        for stale, request in requests:
            answer = await client.post(f"/api/{stale}", json=request, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (412, "version-conflict")
            assert answer.json()["balance"] == before["balance"]
            assert answer.json()["version"] == before["version"]
            now = (await client.get("/api/users/1")).headers["etag"]
            assert answer.headers["etag"] == now
        seen.add(now)
        assert await account(client, 1) == before
    await client.patch("/api/users/1", json={"floor": -1}, headers={"If-Match": now})
    seen.add(str((await client.get("/api/users/1")).headers["etag"]))
    assert len(seen) == 5
    assert (await client.post("/api/balance", json=change, headers=ANYHOW)).status_code == 200


async def test_a_replay_is_answered_whatever_the_tag(client: httpx.AsyncClient) -> None:
    """The first try had matched: a client that repeats it sends the same header."""
    tag = (await client.get("/api/users/1")).headers["etag"]
    headers = {"If-Match": tag, "Idempotency-Key": "k"}
    change = {"userId": 1, "amount": -1}
    first, again = [
        await client.post("/api/balance", json=change, headers=headers) for _ in range(2)
    ]
    assert (again.status_code, again.content) == (200, first.content)
    # what did not match is no outcome of its key
    headers = {"If-Match": tag, "Idempotency-Key": "l"}
    assert (await client.post("/api/balance", json=change, headers=headers)).status_code == 412
    assert (await client.get("/api/users/1/changes/l")).status_code == 404


async def test_settings_are_changed_from_a_busy_account(client: httpx.AsyncClient) -> None:
    """Only the settings in the tag are compared; without a tag nothing is changed."""
    tag = (await client.get("/api/users/1")).headers["etag"]
    bare = await client.patch("/api/users/1", json={"floor": -1})
    assert (bare.status_code, bare.json()["code"]) == (428, "precondition-required")
    await client.post("/api/balance", json={"userId": 1, "amount": -1})
    await hold(client, 1, 1)
    changed = await client.patch("/api/users/1", json={"floor": -1}, headers={"If-Match": tag})
    assert (changed.status_code, changed.headers["etag"]) == (200, '"2.2.1"')
    stale = await client.patch("/api/users/1", json={"floor": -2}, headers={"If-Match": tag})
    assert (stale.status_code, stale.json()["code"]) == (412, "version-conflict")
    weak = await client.patch("/api/users/1", json={"floor": -2}, headers={"If-Match": 'W/"2.2.1"'})
    assert weak.status_code == 412


async def test_what_has_not_changed_is_not_sent_again(client: httpx.AsyncClient) -> None:
    """304 without a body, for the tag, a weak one, one of several, or any."""
    tag = (await client.get("/api/users/1")).headers["etag"]
    for same in (tag, f"W/{tag}", f'"a", {tag}', "*"):
        answer = await client.get("/api/users/1", headers={"If-None-Match": same})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == tag
    for other in ('"1.1.1"', '"*"', '""'):
        answer = await client.get("/api/users/1", headers={"If-None-Match": other})
        assert (answer.status_code, answer.json()["version"]) == (200, 1)
    past = await client.get("/api/users/1", params={"version": 1}, headers={"If-None-Match": tag})
    assert (past.status_code, past.json()["balance"]) == (200, 10_000)
