"""The public client: its answers and refusals, what it sends again, and what that does."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast

import httpx
import pytest

from balance_app.client import (
    Account,
    CaptureExceedsHold,
    Change,
    EntryNotFound,
    ExternalIdTaken,
    FloorNotCovered,
    Hold,
    HoldEnded,
    HoldNotFound,
    IdempotencyKeyReused,
    IncompleteExport,
    InsufficientFunds,
    InsufficientScope,
    InvalidRequest,
    InvalidURL,
    KeyNotFound,
    KeyNotSent,
    MisdirectedRequest,
    NotReversible,
    NotTheService,
    OutcomeUnknown,
    Refused,
    Service,
    ServiceFailure,
    TooManyRequests,
    Transfer,
    TransferNotFound,
    Unauthorized,
    Unavailable,
    UserFrozen,
    UserNotFound,
    VersionConflict,
    service,
)
from balance_app.client.failures import refusal
from balance_app.client.service import Format
from balance_app.client.transport import Call, _is_problem, _wait_seconds
from balance_app.errors import all_problems
from tests.access.keyring import keys_are_needed, make_key, revoke
from tests.processes import Instance, free_port, served
from tests.terminal import ROOT, answering, http, losing, replacing

pytestmark = pytest.mark.usefixtures("_fork_server")

UNAVAILABLE: Final = http(
    "503 Unavailable", '{"code":"overloaded","detail":"Too many.","applied":"no"}'
)
UNKNOWN: Final = http(
    "503 Unavailable", '{"code":"database-unavailable","detail":"It left.","applied":"unknown"}'
)
TOO_MANY: Final = http(
    "429 Too Many", '{"code":"too-many-requests","detail":"Too often.","applied":"unknown"}'
)
# What stands between client and service may answer by itself, also with a problem (RFC 9457).
GATEWAYS: Final = '{"title":"No upstream","status":502,"detail":"No upstream."}'
OWN: Final = '{"code":"some-problem","detail":"No."'
FROZEN: Final = http(
    "409 Conflict",
    '{"code":"user-frozen","detail":"Frozen.","userId":1,"balance":5,"held":0,"available":5,'
    '"floor":0,"version":1,"amount":2,"applied":"no"}',
)


# -- answers and refusals ----------------------------------------------------------------------


async def test_every_call_has_a_typed_answer(  # noqa: PLR0915 - one call after the other
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of changes, transfers, holds, reversals, users, settings, ledgers and past balances."""
    monkeypatch.setattr(service, "_PAGE", 2)
    async with Service(instance.url) as client:
        payee = await client.create_user(5, floor=-10, external_id="customer/7", key="open")
        assert (payee.balance, payee.floor, payee.external_id) == (5, -10, "customer/7")
        assert (await client.create_user(5, floor=-10, external_id="customer/7", key="open")) == (
            payee
        )
        once = await client.create_user_once("customer/7", 100)
        assert once == payee
        named = await client.user_by_external_id("customer/7")
        assert named is not None
        assert (named, named.tag) == (payee, once.tag)
        assert await client.user_by_external_id("nobody") is None
        assert (await client.create_user_once("..")).external_id == ".."

        before = await client.user(1)
        made = await client.change(
            1, -2, reference="invoice 1", note="a note", key="k", if_match=before.tag
        )
        assert (made.amount, made.key, made.reference, made.note) == (
            -2,
            "k",
            "invoice 1",
            "a note",
        )
        assert (made.account.user_id, made.account.balance, made.account.version) == (1, 9998, 2)
        assert (made.replayed, made.at.tzinfo is not None) == (False, True)
        again = await client.change(1, -2, reference="invoice 1", note="a note", key="k")
        assert (again, again.replayed) == (made, True)
        assert await client.outcome(1, "k") == made

        moved = await client.transfer(1, payee.user_id, 10, key="t")
        assert (moved.id, moved.amount) == ("1-3", 10)
        assert (moved.payer.balance, moved.payee.balance) == (9988, 15)
        assert await client.outcome(1, "t") == moved == await client.read_transfer("1-3")
        back = await client.reverse(1, 3)
        assert isinstance(back, Transfer)
        assert (back.reverses, back.payee.balance) == ("1-3", 9998)
        assert (await client.read_transfer("1-3")).reversed_by == back.id
        undone = await client.reverse(1, 2, note="wrong")
        assert isinstance(undone, Change)
        assert (undone.reverses, undone.account.balance, undone.note) == (2, 10000, "wrong")
        assert (await client.reverse(1, 2)).replayed

        held = await client.hold(1, 20, expires_in_seconds=3600, key="h")
        assert (held.id, held.state, held.amount) == ("1-1", "open", 20)
        assert held.account is not None
        assert (held.account.held, held.account.available) == (20, 9980)
        assert held.expires_at - held.at == timedelta(hours=1)
        assert isinstance(await client.outcome(1, "h"), Hold)
        part = await client.capture(held.id, 12)
        assert (part.state, part.captured, part.account and part.account.held) == (
            *("captured", 12, 0),
        )
        assert (await client.capture(held.id, 12)).replayed
        other = await client.hold(1, 3, expires_in_seconds=60)
        assert (await client.void(other.id)).state == "voided"
        assert (await client.read_hold(other.id)).state == "voided"
        third = await client.hold(1, 1, expires_in_seconds=60)
        assert [hold.id async for hold in client.holds(1)] == ["1-1", "1-3", "1-5"]
        assert [hold.id async for hold in client.holds(1, state="open")] == [third.id]

        account = await client.user(1)
        frozen = await client.change_settings(account, frozen=True, by="ada")
        assert (frozen.frozen, frozen.floor, frozen.external_id) == (True, 0, None)
        thawed = await client.change_settings(frozen, frozen=False, external_id="one", floor=-5)
        assert (thawed.frozen, thawed.floor, thawed.external_id) == (False, -5, "one")
        bare = await client.change_settings(thawed, external_id=None)
        assert (bare.external_id, bare.floor) == (None, -5)
        kept = [(each.settings_version, each.by) async for each in client.settings(1)]
        assert kept == [(2, "ada"), (3, "api"), (4, "api")]

        entries = [entry async for entry in client.entries(1)]
        assert [entry.version for entry in entries] == [1, 2, 3, 4, 5, 6]
        assert sum(entry.amount for entry in entries) == (await client.user(1)).balance
        assert entries[2].transfer == "1-3"
        assert (entries[4].reverses, entries[5].hold) == (2, "1-1")
        backwards = [entry async for entry in client.entries(1, order="desc", after=6)]
        assert backwards == entries[-2::-1]
        referred = client.entries(1, reference="invoice 1")
        assert [entry.version async for entry in referred] == [2]
        late = client.entries(1, begin=entries[1].at, end=entries[4].at)
        assert [entry.version async for entry in late] == [2, 3, 4]
        past = await client.past_balance(1, at=entries[1].at)
        assert (past.version, past.balance) == (2, 9998)
        assert await client.past_balance(1, version=2) == past

        listed = [account async for account in client.users()]
        assert [account.user_id for account in listed] == [1, 2, 3]
        with pytest.raises(ValueError, match="has no tag"):
            await client.change_settings(listed[0], floor=1)


async def test_every_refusal_has_a_class(  # noqa: PLR0915 - one call after the other
    instance: Instance,
) -> None:
    """With the members of its problem; nothing was changed."""
    async with Service(instance.url) as client:
        two = await client.create_user(5, external_id="two")
        opened = await client.user(1)
        held = await client.hold(1, 20, expires_in_seconds=3600)
        with pytest.raises(InsufficientFunds) as poor:
            await client.transfer(2, 1, 7, key="t")
        refused = poor.value
        assert (refused.user_id, refused.balance, refused.held, refused.available) == (2, 5, 0, 5)
        assert (refused.floor, refused.version, refused.amount, refused.shortfall) == (0, 1, -7, 2)
        assert (refused.code, refused.status) == ("insufficient-funds", 409)
        assert str(refused) == "User 2 has 5; withdrawing 7 needs 2 more."
        with pytest.raises(InsufficientFunds) as recalled:
            await client.outcome(2, "t")
        assert recalled.value.shortfall == 2
        with pytest.raises(IdempotencyKeyReused):
            await client.change(2, 1, key="t")
        with pytest.raises(VersionConflict) as conflict:
            await client.change(1, -2, if_match=opened.tag)
        assert (conflict.value.version, conflict.value.held) == (1, 20)
        with pytest.raises(VersionConflict):
            await client.change_settings(
                await _changed_meanwhile(client, two), floor=-1, external_id=None
            )
        with pytest.raises(FloorNotCovered) as above:
            await client.change_settings(await client.user(2), floor=6)
        assert (above.value.available, above.value.floor) == (5, 6)
        with pytest.raises(ExternalIdTaken):
            await client.change_settings(await client.user(1), external_id="two")
        with pytest.raises(CaptureExceedsHold) as beyond:
            await client.capture(held.id, 21)
        assert (beyond.value.amount, beyond.value.held) == (21, 20)
        await client.void(held.id)
        with pytest.raises(HoldEnded) as ended:
            await client.capture(held.id)
        assert ended.value.state == "voided"
        await client.change_settings(await client.user(1), frozen=True)
        with pytest.raises(UserFrozen) as cold:
            await client.transfer(2, 1, 1)
        assert (cold.value.user_id, cold.value.amount) == (1, 1)
        await client.change(2, -1)
        await client.reverse(2, 2)
        with pytest.raises(InvalidRequest) as invalid:
            await client.change(2, 0)
        assert invalid.value.errors == [
            {"pointer": "/amount", "code": "zero", "detail": "amount must not be 0."}
        ]
        others: list[tuple[type[Refused], Callable[[], Awaitable[object]]]] = [
            (UserNotFound, lambda: client.change(9, 1)),
            (UserNotFound, lambda: anext(aiter(client.entries(9)))),
            (EntryNotFound, lambda: client.reverse(2, 9)),
            (EntryNotFound, lambda: client.past_balance(2, version=9)),
            (NotReversible, lambda: client.reverse(2, 3)),
            (TransferNotFound, lambda: client.read_transfer("1-9")),
            (HoldNotFound, lambda: client.void("1-9")),
            (KeyNotFound, lambda: client.outcome(1, "a/../b")),
            (InvalidRequest, lambda: client.void("..")),
            (Refused, lambda: client.void("../users")),
            (InvalidRequest, lambda: client.change(2, 1, reference="\x00")),
        ]
        for kind, call in others:
            with pytest.raises(kind):
                await call()
        with pytest.raises(ValueError, match="can't be sent"):
            await client.change(2, 1, key="é")
        with pytest.raises(ValueError, match="needs a zone"):
            await client.past_balance(2, at=datetime(2026, 11, 21))  # noqa: DTZ001 - that is it
        assert (await client.user(2)).balance == 5


async def _changed_meanwhile(client: Service, account: Account) -> Account:
    """Let somebody else change the settings of an account that is returned as it was."""
    await client.change_settings(account, floor=-3, by="ada")
    return account


def test_an_unknown_refusal_is_a_plain_one() -> None:
    """As is one of a known code without the members that belong to it."""
    new = refusal({"code": "new-kind", "detail": "No.", "status": 409, "limit": 3}, "")
    assert (type(new), new.code, new.members["limit"]) == (Refused, "new-kind", 3)
    bare = refusal({"code": "insufficient-funds", "detail": "No.", "status": 409}, "")
    assert (type(bare), bare.code) == (Refused, "insufficient-funds")


# -- unknown outcomes --------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [True, False])
async def test_a_change_whose_answer_is_lost_is_made_once(
    instance: Instance,
    monkeypatch: pytest.MonkeyPatch,
    guarded: bool,  # noqa: FBT001 - the control
) -> None:
    """100 times: the connection is cut after the request has reached the service.

    Control: without the key a change is made again.
    """
    if not guarded:
        monkeypatch.setattr(Call, "headers", property(lambda _: {}))
    lost = iter([True, False] * 1000)
    async with (
        replacing(instance.port, lambda _, answer: b"" if next(lost) else answer) as proxy,
        Service(proxy.url) as client,
    ):
        made = [await client.change(1, -1) for _ in range(100)]
    async with Service(instance.url) as client:
        entries = [entry async for entry in client.entries(1)]
    if not guarded:
        assert len(entries) > 101
        return
    assert len(proxy.requests) == 200
    assert all(each.replayed for each in made)
    assert [each.account.version for each in made] == list(range(2, 102))
    assert [entry.key for entry in entries[1:]] == [each.key for each in made]


async def test_simultaneous_changes_through_a_faulty_network_are_made_once(
    instance: Instance,
) -> None:
    """100 at once: answers are lost, replaced by a proxy's, or by a 503 that has done nothing."""
    dice = random.Random(11)

    def instead(_: int, answer: bytes) -> bytes:
        return dice.choice([answer, answer, b"", UNKNOWN, http("502 Bad Gateway", "<html>")])

    async with (
        replacing(instance.port, instead) as proxy,
        Service(proxy.url, patience=60) as client,
    ):
        await asyncio.gather(*(client.change(1, -1) for _ in range(100)))
    async with Service(instance.url) as client:
        assert ((await client.user(1)).version, (await client.user(1)).balance) == (101, 9900)


async def test_every_call_takes_effect_once(instance: Instance) -> None:
    """Whatever it is: its first answer is lost, and the second try finds what the first did."""
    lost = iter([True, False] * 100)
    async with (
        replacing(instance.port, lambda _, answer: b"" if next(lost) else answer) as proxy,
        Service(proxy.url) as client,
    ):
        two = await client.create_user(7)
        assert two.user_id == 2
        assert (await client.create_user_once("three", 5)).user_id == 3
        assert (await client.transfer(1, 2, 10)).payer.version == 2
        assert (await client.reverse(1, 2)).replayed
        held = await client.hold(1, 20, expires_in_seconds=60)
        assert (await client.capture(held.id, 5)).captured == 5
        other = await client.hold(1, 20, expires_in_seconds=60)
        assert (await client.void(other.id)).state == "voided"
        changed = await client.change_settings(await client.user(1), floor=-5, external_id="one")
        assert (changed.settings_version, changed.floor, changed.external_id) == (2, -5, "one")
    async with Service(instance.url) as client:
        account = await client.user(1)
        assert (account.version, account.balance, account.held) == (4, 9995, 0)
        assert [user.user_id async for user in client.users()] == [1, 2, 3]
        assert len([each async for each in client.settings(1)]) == 1


async def test_a_change_of_settings_is_not_taken_for_anothers(instance: Instance) -> None:
    """After a lost answer a conflict is one if what was set is not what was wanted."""
    async with (
        losing(0, instance.port) as proxy,
        Service(proxy.url) as other,
    ):
        account = await other.user(1)
        await other.change_settings(account, floor=-7)
    conflict = '{"code":"version-conflict","detail":"Changed.","userId":1,"balance":10000,"held":0,'
    conflict += '"available":10000,"version":1,"applied":"no"}'
    answers = {0: UNKNOWN, 1: http("412 Precondition Failed", conflict)}
    async with (
        replacing(instance.port, answers.get) as proxy,
        Service(proxy.url) as client,
    ):
        with pytest.raises(VersionConflict):
            await client.change_settings(account, floor=-5)
        assert len(proxy.requests) == 3


async def test_an_outcome_that_stays_unknown_has_the_key_that_resolves_it(
    instance: Instance,
) -> None:
    """By asking for it, and by the same call with the key."""
    async with losing(100, instance.port) as proxy, Service(proxy.url, patience=0.3) as client:
        with pytest.raises(OutcomeUnknown) as error:
            await client.change(1, -2)
        with pytest.raises(OutcomeUnknown) as keyless:
            await client.reverse(1, 2)
    assert len(set(proxy.keys)) == 1
    unknown = error.value
    assert unknown.key is not None
    assert unknown.user_id == 1
    assert keyless.value.key is None
    async with Service(instance.url) as client:
        made = await client.outcome(unknown.user_id, unknown.key)
        assert made == await client.change(1, -2, key=unknown.key)
        assert [entry.amount async for entry in client.entries(1)] == [10000, -2, 2]


@pytest.mark.parametrize(
    ("answers", "call", "expected"),
    [
        # a "no" to the second try is not about the first
        ([UNKNOWN, UNAVAILABLE], "change", OutcomeUnknown),
        ([UNAVAILABLE], "change", Unavailable),
        ([UNKNOWN, http("404 No", "<html>")], "change", OutcomeUnknown),
        ([http("500 No", '{"detail":"A mistake.","applied":"unknown"}')], "void", OutcomeUnknown),
        ([http("502 Bad Gateway", "<html>")], "void", OutcomeUnknown),
        ([http("502 Bad Gateway", "<html>")], "user", Unavailable),
        ([http("429 Too Many", "<html>")], "change", Unavailable),
        # its "unknown" is about earlier calls with the key
        ([TOO_MANY], "change", TooManyRequests),
        ([UNKNOWN, TOO_MANY], "change", OutcomeUnknown),
        ([TOO_MANY, UNKNOWN, TOO_MANY], "change", OutcomeUnknown),
        # a gateway's error may be a problem, too; the service's own says what was applied
        ([http("502 Bad Gateway", GATEWAYS)], "change", OutcomeUnknown),
        ([http("503 Unavailable", GATEWAYS)], "change", OutcomeUnknown),
        ([http("504 Timeout", GATEWAYS)], "void", OutcomeUnknown),
        ([http("504 Timeout", GATEWAYS)], "outcome", Unavailable),
        ([http("404 No", GATEWAYS)], "change", NotTheService),
        ([UNKNOWN, http("404 No", GATEWAYS)], "change", OutcomeUnknown),
        ([http("502 Bad Gateway", f"{OWN}}}")], "change", OutcomeUnknown),
        ([http("501 No", f'{OWN},"applied":"no"}}')], "change", Refused),
        ([http("500 No", f'{OWN},"applied":"unknown"}}')], "change", OutcomeUnknown),
        ([http("500 No", f"{OWN}}}")], "user", Refused),
        # a refusal is recorded under the key; without one the first try may still be made
        ([UNKNOWN, FROZEN], "change", UserFrozen),
        ([UNKNOWN, FROZEN], "reverse", OutcomeUnknown),
        ([FROZEN], "reverse", UserFrozen),
    ],
)
async def test_only_what_is_certain_is_raised_as_such(
    answers: list[bytes], call: str, expected: type[ServiceFailure]
) -> None:
    """Of all tries of a call, not only of the last."""
    async with answering(*answers) as other, Service(other.url, patience=0.3) as client:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "change": lambda: client.change(1, -2),
            "void": lambda: client.void("1-1"),
            "user": lambda: client.user(1),
            "reverse": lambda: client.reverse(1, 2),
            "outcome": lambda: client.outcome(1, "k"),
        }
        with pytest.raises(ServiceFailure) as error:
            await calls[call]()
    assert type(error.value) is expected, error.value


@pytest.mark.parametrize("method", ["POST", "PATCH", "GET"])
def test_every_problem_of_the_service_is_known_as_one(method: str) -> None:
    """Whoever answers: a route, the middleware, or the protocol before either."""
    problems = [*all_problems()]
    assert {"internal-error", "head-too-large", "insufficient-funds"} <= {p.code for p in problems}
    call = Call(method, "/api/balance", None)
    assert [p.code for p in problems if not _is_problem(p.example().body(method), call)] == []


# -- retries -----------------------------------------------------------------------------------


async def test_a_storm_of_503_is_waited_out(instance: Instance) -> None:
    """100 changes at once, of which the first 300 answers are 503: each is made once."""

    def instead(number: int, answer: bytes) -> bytes:
        return UNKNOWN if number < 300 else answer

    async with replacing(instance.port, instead) as proxy, Service(proxy.url) as client:
        made = await asyncio.gather(*(client.change(1, -1) for _ in range(100)))
    assert sorted(each.account.version for each in made) == list(range(2, 102))
    assert len(proxy.requests) >= 400


async def test_a_retry_waits_as_long_as_it_is_asked_to() -> None:
    """Beyond the patience it is not made at all."""
    later = UNAVAILABLE.replace(b"Content-Length", b"Retry-After: 3600\r\nContent-Length")
    async with answering(later) as other, Service(other.url) as client:
        with pytest.raises(Unavailable) as error:
            await client.change(1, -2)
    assert (error.value.retry_after, error.value.applied, len(other.requests)) == (3600, "no", 1)
    assert {_wait_seconds(number, 2) >= 2 for number in range(9)} == {True}
    waits = [_wait_seconds(5000, 0) for _ in range(100)]
    assert all(2.5 <= wait <= 5 for wait in waits)
    assert len(set(waits)) > 90


async def test_what_a_caller_raises_ends_the_retries() -> None:
    """It is called before each wait."""

    def give_up(error: Unavailable) -> None:
        raise error

    async with answering(UNAVAILABLE) as other, Service(other.url, on_retry=give_up) as client:
        with pytest.raises(Unavailable):
            await client.change(1, -2)
    assert len(other.requests) == 1


async def test_nobody_answers() -> None:
    """It is certain that nothing was changed, and a service that comes up meanwhile is reached."""
    port = free_port()
    async with Service(f"http://127.0.0.1:{port}", patience=0.2) as client:
        with pytest.raises(Unavailable, match="No answer from http") as error:
            await client.change(1, -2)
    assert (error.value.applied, error.value.answer) == ("no", None)
    tried = asyncio.Event()
    async with answering(UNAVAILABLE) as other:
        url = other.url
    async with Service(url, on_retry=lambda _: tried.set()) as client:
        waiting = asyncio.create_task(client.user(1))
        await tried.wait()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(http("404 No", '{"code":"user-not-found","detail":"No.","userId":1}'))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", httpx.URL(url).port)
        with pytest.raises(UserNotFound):
            await waiting
        server.close()


# -- URLs and secrets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("", "nonsense", "http://", "http://[::1", "ftp://h", "//h", "http://h:x", "h:3000"),
        *("http://h/?token=hidden", "http://h/#x", "http://u:hidden@", "http://u:hidden@h:99999x"),
    ],
)
def test_a_wrong_url_is_refused(url: str) -> None:
    """At once, without repeating a password."""
    with pytest.raises(InvalidURL, match="is not the URL of a service") as error:
        Service(url)
    assert "u:hidden" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://ada:ge/heim@h", "http://ada:1/geheim@h", "http://ada/geheim@h", "ada:geheim@h"),
        *("http://ada:ge@heim@h:x", "http://ada:ge?heim@h", "http://ada:ge#heim@h", "//ada:ge@h"),
        *("http://ada:ge\nheim@h", "ftp://ada:ge@heim@h", "http:ada:geheim@h"),
    ],
)
def test_a_password_in_a_wrong_url_is_not_repeated(url: str) -> None:
    """Whatever is in it; nor is it sent to a host that is its beginning."""
    with pytest.raises(InvalidURL, match="a / in a password as %2F") as error:
        Service(url)
    said = str(error.value)
    assert not {part for part in ("ada", "ge", "heim") if part in said.partition(" is not ")[0]}
    Service("http://ada:ge@heim%2F@h")


@pytest.mark.parametrize(
    "answer",
    [
        http("200 OK", "OK"),
        http("200 OK", "{}"),
        http("200 OK", '{"userId":1,"balance":"x"}'),
        http("404 No", "[]"),
        http("404 No", '{"detail":5}'),
        http("301 Moved", "").replace(b"Content-Length", b"Location: /\r\nContent-Length"),
    ],
)
async def test_another_server_is_not_the_service(answer: bytes) -> None:
    """Whatever it answers; it is not sent a change twice."""
    async with answering(answer) as other, Service(other.url) as client:
        with pytest.raises(NotTheService):
            await client.user(1)
        with pytest.raises(NotTheService):
            await client.change(1, -2)
    assert len(other.requests) == 2


async def test_no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The password of a URL is sent, and is in no log line and no error."""
    caplog.set_level(logging.DEBUG)
    failures: list[ServiceFailure] = []
    answers = (b"", UNAVAILABLE, http("404 No", "<html>"))
    async with answering(*answers) as other:
        url = other.url.replace("//", "//ada:geheim@")
        for _ in answers:
            async with Service(url, patience=0) as client:
                try:
                    await client.change(1, -2)
                except ServiceFailure as error:
                    failures.append(error)
    assert "authorization: basic" in "".join(other.requests).lower()
    assert len(failures) == 3
    assert "geheim" not in caplog.text + repr(failures) + "".join(map(str, failures))


async def test_a_client_of_the_callers_own_is_used() -> None:
    """With what it sends; it stays open."""
    async with httpx.AsyncClient(headers={"X-Own": "1"}, trust_env=False, verify=False) as own:  # noqa: S501 - no TLS here
        async with (
            answering(http("404 No", "<html>")) as other,
            Service(other.url, http=own) as (client),
        ):
            with pytest.raises(NotTheService):
                await client.user(1)
        assert not own.is_closed
    assert "x-own: 1" in other.requests[0].lower()


# -- exports -----------------------------------------------------------------------------------


def _export(media_type: str, body: str, *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n"
    return (head + body).encode()


CSV_LINES: Final = "version,amount\r\n1,10\r\n"
COMPLETE_CSV: Final = CSV_LINES + "complete,,entries=1\r\n"
JSON_LINES: Final = '{"version":1,"amount":10}\n'
COMPLETE_JSON: Final = JSON_LINES + '{"complete":true,"entries":1}\n'


@pytest.mark.parametrize(
    ("written", "answer", "complete"),
    [
        ("csv", _export("text/csv; charset=utf-8", COMPLETE_CSV), True),
        ("csv", _export("text/csv", CSV_LINES), False),
        ("csv", _export("text/csv", COMPLETE_CSV, length=1000), False),
        ("csv", _export("text/csv", COMPLETE_CSV[:-1]), False),
        ("csv", _export("text/csv", ""), False),
        ("jsonl", _export("application/jsonl", COMPLETE_JSON), True),
        ("jsonl", _export("application/jsonl", JSON_LINES), False),
        ("jsonl", _export("application/jsonl", COMPLETE_JSON[:-3]), False),
        ("jsonl", _export("application/jsonl", JSON_LINES + "[]\n"), False),
    ],
)
async def test_an_export_is_complete_or_not(
    written: Format, answer: bytes, *, complete: bool
) -> None:
    """By its last line, and by the end of the HTTP message."""
    got = b""
    async with answering(answer) as other, Service(other.url) as client:
        try:
            async for piece in client.statement(1, written):
                got += piece
        except IncompleteExport:
            assert not complete
        else:
            assert complete
    assert answer.endswith(got)
    assert got or not complete


async def test_an_export_of_the_service_is_complete(instance: Instance) -> None:
    """In both formats, of a selection, and of nothing."""
    async with Service(instance.url) as client:
        for number in range(5):
            await client.change(1, -1, reference=f"r{number % 2}")
        for written, first in {"csv": b"version,", "jsonl": b'{"version":2,'}.items():
            pieces = client.statement(1, cast("Format", written), reference="r0")
            got = b"".join([piece async for piece in pieces])
            assert got.startswith(first)
            assert len(got.splitlines()) == 3 + 1 + (written == "csv")
            nothing = client.statement(1, cast("Format", written), after=6)
            assert b"complete" in b"".join([piece async for piece in nothing])
        with pytest.raises(UserNotFound):
            await anext(client.statement(9, "csv"))


async def test_an_export_that_does_not_begin_is_waited_for() -> None:
    """As every call; another server's answer is none."""
    full = _export("text/csv", COMPLETE_CSV)
    async with answering(UNAVAILABLE, full) as other, Service(other.url) as client:
        assert b"".join([piece async for piece in client.statement(1, "csv")]) == (
            COMPLETE_CSV.encode()
        )
    async with answering(http("200 OK", "{}")) as other, Service(other.url) as client:
        with pytest.raises(NotTheService):
            await anext(client.statement(1, "csv"))


# -- the documentation -------------------------------------------------------------------------


async def test_the_documented_program_runs(instance: Instance) -> None:
    """As it is in docs/use-the-client.md."""
    text = Path(ROOT, "docs/use-the-client.md").read_text()
    program = text.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {"__name__": "documented"}
    exec(compile(program, "use-the-client.md", "exec"), scope)  # noqa: S102 - our own
    assert await scope["pay"](instance.url) == "1-2"
    async with Service(instance.url) as client:
        assert (await client.user(1)).balance == 9995
        assert (await client.user(1)).created_at < datetime.now(UTC) + timedelta(days=1)


# -- keys --------------------------------------------------------------------------------------


async def test_a_key_that_does_not_suffice_has_a_class(
    instance: Instance, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, a wrong one, one without the scope, a revoked one; BALANCE_APP_KEY is one, too."""
    monkeypatch.delenv("BALANCE_APP_KEY", raising=False)
    reading = await make_key(database, "read")
    await keys_are_needed(instance.url)
    async with Service(instance.url, key=reading.text) as client:
        assert (await client.user(1)).balance == 10_000
        with pytest.raises(InsufficientScope) as refused:
            await client.change(1, -2)
        assert sorted(refused.value.needs) == ["change", "withdraw"]
        async with Service(instance.url, key="") as nobody:
            with pytest.raises(Unauthorized, match="key is needed"):
                await nobody.user(1)
        async with Service(instance.url, key=reading.text[:-1] + "!") as wrong:
            with pytest.raises(Unauthorized, match="wrong, expired or revoked"):
                await wrong.change(1, -2, key="k")
        monkeypatch.setenv("BALANCE_APP_KEY", reading.text)
        async with Service(instance.url) as other:
            assert (await other.user(1)).balance == 10_000
        async with (
            httpx.AsyncClient() as http_client,
            Service(instance.url, http=http_client) as own,
        ):
            with pytest.raises(Unauthorized):
                await own.user(1)
        await revoke(database, reading)
        with pytest.raises(Unauthorized):
            await _until_refused(client)


async def _until_refused(client: Service) -> None:
    async with asyncio.timeout(10):
        while True:
            await client.user(1)


async def test_a_name_that_is_not_the_services_has_a_class(instance: Instance) -> None:
    """Without keys only names of this machine are accepted."""
    async with (
        httpx.AsyncClient(headers={"Host": "evil.example"}) as http_client,
        Service(instance.url, http=http_client) as client,
    ):
        with pytest.raises(MisdirectedRequest, match="ALLOWED_HOSTS"):
            await client.user(1)


async def test_a_key_that_comes_too_often_waits_as_long_as_it_is_told(
    database: dict[str, str],
) -> None:
    """All calls succeed while there is patience; else it is TooManyRequests, and not executed."""
    async with served(database, RATE_PER_KEY="2") as http_client:
        url, key = str(http_client.base_url), (await make_key(database)).text
        await keys_are_needed(url)
        async with Service(url, key=key, patience=30) as client:
            made = await asyncio.gather(*(client.change(1, -1) for _ in range(5)))
        assert sorted(each.account.balance for each in made) == list(range(9995, 10_000))
        async with Service(url, key=key, patience=0) as client:
            calls = [call for _ in range(8) for call in (client.user(1), client.change(1, -1))]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in answers if isinstance(each, TooManyRequests)]
        assert refused
        assert not any(isinstance(each, OutcomeUnknown) for each in answers)
        assert {(each.applied, each.retry_after) for each in refused} == {("no", 1.0)}


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "421 Misdirected"])
async def test_a_key_refused_after_a_lost_answer_leaves_the_outcome_unknown(
    instance: Instance, status: str
) -> None:
    """The first try took effect: the refusal of the second says nothing about it."""
    code = {"401": "unauthorized", "403": "insufficient-scope", "421": "misdirected-request"}
    refusal = http(
        status,
        f'{{"code":"{code[status[:3]]}","detail":"No.","status":{status[:3]},"needs":["change"],'
        '"applied":"unknown"}',
    )
    async with (
        replacing(instance.port, lambda number, _: b"" if number == 0 else refusal) as proxy,
        Service(proxy.url) as client,
    ):
        with pytest.raises(OutcomeUnknown) as unknown:
            await client.change(1, -2)
        assert unknown.value.key == proxy.keys[0]
    async with Service(instance.url) as client:
        assert (await client.outcome(1, unknown.value.key or "")).amount == -2
        # Where no answer was lost, it is what it is.
        async with answering(refusal) as stand_in, Service(stand_in.url) as refused:
            with pytest.raises((Unauthorized, InsufficientScope, MisdirectedRequest)):
                await refused.change(1, -2, key="mine")
            assert len(stand_in.requests) == 1


async def test_a_key_that_others_could_read_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is none; nothing shows it. A client of one's own answers for its way itself."""
    monkeypatch.setenv("BALANCE_APP_KEY", "geheim")
    for url, key in (
        ("http://bank.example", "geheim"),
        ("http://bank.example", None),
        ("http://10.0.0.1:3000", "geheim"),
        ("https://bank.example", "geheim\r\nX-More: 1"),
        ("https://bank.example", "geheim 2"),
        ("https://bank.example", "geh\u00e9im"),
        ("https://user:password@bank.example", "geheim"),
    ):
        with pytest.raises(KeyNotSent) as refused:
            Service(url, key=key)
        assert "geh" not in str(refused.value)
        assert "password@" not in str(refused.value)
    Service("https://user:password@bank.example")
    Service("http://bank.example", key="")
    async with answering(http("200 OK", "{}")) as stand_in:
        mounts = {"all://": httpx.AsyncHTTPTransport(proxy=stand_in.url)}
        async with (
            httpx.AsyncClient(mounts=mounts) as own,
            Service("http://bank.example", key="geheim", http=own, patience=0) as client,
        ):
            with pytest.raises(ServiceFailure):
                await client.user(1)
        assert "authorization: bearer geheim" in stand_in.requests[0].lower()
