"""The whole load test against a minimal service that is right, or wrong in exactly one way."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.__main__ import EXIT_FAILED, EXIT_NOT_RUN, EXIT_PASSED, cli
from tests.loadtest.fake_service import FakeService, Json

REQUESTS = 200
EXITS = {"pass": EXIT_PASSED, "fail": EXIT_FAILED, "not-run": EXIT_NOT_RUN}


async def run_loadtest(service: FakeService, *options: str) -> Json:
    """Run the load test with 200 withdrawals of 2 from 200; return its JSON."""
    async with service.running():
        arguments = [service.url, f"--requests={REQUESTS}", "--balance=200", "--json"]
        # In a thread: the load test runs an event loop of its own, as it does on the command line.
        result = await asyncio.to_thread(CliRunner().invoke, cli, [*arguments, *options])
    report: Json = json.loads(result.stdout)
    assert result.exit_code == EXITS[report["verdict"]]
    return report


def assert_failed(report: Json, *fragments: str) -> None:
    """Check that the verdict is a failure and its problems contain the fragments."""
    assert report["verdict"] == "fail"
    problems = "\n".join(report["problems"])
    for fragment in fragments:
        assert fragment in problems


async def test_right_service_passes() -> None:
    """A correct service passes, with one connection for each request."""
    service = FakeService()
    report = await run_loadtest(service)
    assert report["verdict"] == "pass", report["problems"]
    assert report["problems"] == []
    assert report["accepted"] == report["refused"] == {"measured": 100, "expected": 100}
    assert report["balance"] == {"measured": 0, "expected": 0}
    assert report["newEntries"] == {"measured": 100, "expected": 100}
    assert list(report["requestsPerInstance"].values()) == [REQUESTS]
    assert sum(band["answers"] for band in report["latencyBands"]) == REQUESTS
    assert len(service.peers) == REQUESTS
    assert service.keys == []


async def test_few_connections_and_keys() -> None:
    """Kept-alive connections are reused for all requests, each with a key of its own."""
    service = FakeService()
    report = await run_loadtest(service, "--connections=7", "--keys")
    assert report["verdict"] == "pass", report["problems"]
    assert len(service.peers) == 7
    assert len(set(service.keys)) == REQUESTS


async def test_existing_user() -> None:
    """For an existing user the expected numbers come from the balance read before."""
    service = FakeService()
    service.balance, service.version = 31, 4
    report = await run_loadtest(service, "--user=7")
    assert report["verdict"] == "pass", report["problems"]
    assert report["accepted"]["expected"] == 15
    assert report["balance"] == {"measured": 1, "expected": 1}


@pytest.mark.parametrize(
    ("held", "floor", "accepted", "left"), [(20, 0, 5, 21), (0, -10, 20, -9), (20, 5, 3, 25)]
)
async def test_existing_user_with_a_hold_and_a_floor(
    held: int, floor: int, accepted: int, left: int
) -> None:
    """What is held, and what lies below the floor, is not withdrawn; an overdraft is."""
    service = FakeService()
    service.balance, service.held, service.floor = 31, held, floor
    report = await run_loadtest(service, "--user=7")
    assert report["verdict"] == "pass", report["problems"]
    assert report["accepted"]["measured"] == accepted
    assert report["balance"]["measured"] == left


async def test_a_hold_that_is_withdrawn_fails() -> None:
    """A service that spends what is held fails."""

    class Spending(FakeService):
        def affords(self, amount: int) -> bool:
            return self.balance + amount >= 0

    service = Spending()
    service.balance, service.held = 31, 20
    assert_failed(await run_loadtest(service, "--user=7"), "15 were accepted instead of 5")


@pytest.mark.parametrize("invented", [{"held": 2}, {"floor": 2}], ids=str)
async def test_refusal_by_a_hold_or_floor_that_is_not_there_fails(invented: Json) -> None:
    """Also where its shortfall counts it."""

    class Inventing(FakeService):
        def refuse(self, amount: int) -> tuple[int, Json]:
            status, body = super().refuse(amount)
            return status, body | invented | {"shortfall": body["shortfall"] + 2}

    assert_failed(await run_loadtest(Inventing()), "100 refusals do not prove themselves")


@pytest.mark.parametrize(("member", "value"), [("held", 1), ("floor", 1), ("frozen", True)])
async def test_another_hold_or_setting_after_the_burst_fails(member: str, value: int) -> None:
    """A hold that ends meanwhile moves what is expected; the problem names it."""

    class Changing(FakeService):
        def refuse(self, amount: int) -> tuple[int, Json]:
            setattr(self, member, value)
            return super().refuse(amount)

    assert_failed(await run_loadtest(Changing()), "A hold ended or settings changed meanwhile")


@pytest.mark.parametrize(
    ("member", "value", "option", "reason"),
    [
        ("frozen", True, "--amount=-2", "User 7 is frozen"),
        ("balance", 2**53 - REQUESTS, "--amount=1", "would pass the largest balance"),
    ],
)
async def test_a_user_that_refuses_for_another_reason_is_not_judged(
    member: str, value: int, option: str, reason: str
) -> None:
    """A right service refuses changes of it, too, so none is sent."""
    service = FakeService()
    setattr(service, member, value)
    report = await run_loadtest(service, "--user=7", option)
    assert report["verdict"] == "not-run"
    assert reason in report["problems"][0]
    assert service.peers == set()


async def test_deposits_up_to_the_largest_balance() -> None:
    """They are sent, and all accepted."""
    service = FakeService()
    service.balance = 2**53 - 1 - REQUESTS
    report = await run_loadtest(service, "--user=7", "--amount=1")
    assert report["verdict"] == "pass", report["problems"]
    assert report["balance"]["measured"] == 2**53 - 1


@pytest.mark.parametrize(("balance", "version"), [(0, 1), (398, 1), (200, 2)])
async def test_another_opening_than_was_asked_for_is_no_base(balance: int, version: int) -> None:
    """It would move what is expected: nothing accepted of a balance of 0 would pass."""

    class Another(FakeService):
        async def answer(self, method: str, path: str, body: Json) -> tuple[int, Json] | None:
            if path == "/api/users":
                self.balance, self.version = balance, version
                return 201, self.user()
            return await super().answer(method, path, body)

    service = Another()
    report = await run_loadtest(service)
    assert report["verdict"] == "not-run"
    (problem,) = report["problems"]
    assert "asked for a user with balance 200, it created" in problem
    assert f"balance={balance}, version={version}" in problem
    assert service.peers == set(), "no change was sent"


async def test_several_pages_of_entries() -> None:
    """Entries are read to the last page."""
    report = await run_loadtest(FakeService(), "--requests=2100", "--balance=4200")
    assert report["verdict"] == "pass", report["problems"]
    assert report["newEntries"]["measured"] == 2100


async def test_deposits() -> None:
    """Every deposit must be accepted."""
    report = await run_loadtest(FakeService(), "--amount=3")
    assert report["verdict"] == "pass", report["problems"]
    assert report["balance"] == {"measured": 800, "expected": 800}


async def test_two_urls_take_turns() -> None:
    """Several base URLs are fired at in turn."""
    service = FakeService()
    async with service.running():
        report = await run_loadtest(service, service.url)
    assert report["verdict"] == "pass", report["problems"]
    assert list(report["requestsPerInstance"].values()) == [REQUESTS // 2, REQUESTS // 2]


async def test_one_accept_too_many_fails() -> None:
    """A service that lets the balance go below zero once fails."""

    class Generous(FakeService):
        def affords(self, amount: int) -> bool:
            return self.balance + amount >= -2

    report = await run_loadtest(Generous())
    assert_failed(report, "101 were accepted instead of 100", "final balance is -2", "101 new")


async def test_wrong_refusal_code_fails() -> None:
    """A refusal with another problem code is not counted as insufficient funds."""

    class Vague(FakeService):
        def refuse(self, amount: int) -> tuple[int, Json]:
            status, body = super().refuse(amount)
            return status, body | {"code": "conflict"}

    report = await run_loadtest(Vague())
    assert report["others"] == {"409 conflict": 100}
    assert_failed(report, "0 were refused", "100 ended otherwise: 409 conflict")


async def test_refusal_that_could_be_afforded_fails() -> None:
    """A refusal whose own balance would have sufficed fails."""

    class Contradicting(FakeService):
        def refuse(self, amount: int) -> tuple[int, Json]:
            status, body = super().refuse(amount)
            return status, body | {"balance": 2, "version": self.version - 1}

    assert_failed(await run_loadtest(Contradicting()), "100 refusals do not prove themselves")


async def test_refusal_by_a_version_that_never_was_fails() -> None:
    """Also where its balance of -2 is what the chain of balances would go on with."""

    class Inventing(FakeService):
        def refuse(self, amount: int) -> tuple[int, Json]:
            status, body = super().refuse(amount)
            body |= {"balance": self.balance + amount, "version": self.version + 1}
            return status, body | {"shortfall": -(self.balance + 2 * amount)}

    assert_failed(await run_loadtest(Inventing()), "100 refusals do not prove themselves")


async def test_lost_entry_fails() -> None:
    """A service that acknowledges a change without an entry fails."""

    class Forgetful(FakeService):
        def accept(self, amount: int) -> tuple[int, Json]:
            answer = super().accept(amount)
            self.entries = [entry for entry in self.entries if entry["version"] != 50]
            return answer

    report = await run_loadtest(Forgetful())
    assert report["newEntries"] == {"measured": 99, "expected": 100}
    assert_failed(report, "99 new entries", "1 acknowledged changes have no entry: version 50")


async def test_duplicate_version_fails() -> None:
    """Two accepted answers with the same version fail, though all counts are right."""

    class Repeating(FakeService):
        def accept(self, amount: int) -> tuple[int, Json]:
            status, body = super().accept(amount)
            if body["version"] == 50:
                body |= {"version": 49, "balance": body["balance"] + 2}
            return status, body

    report = await run_loadtest(Repeating())
    assert report["accepted"]["measured"] == 100
    assert_failed(report, "Accepted answers share a version, as 49")


async def test_skipped_version_fails() -> None:
    """Accepted answers that skip a version fail."""

    class Skipping(FakeService):
        def accept(self, amount: int) -> tuple[int, Json]:
            self.version += self.version == 50
            return super().accept(amount)

    assert_failed(await run_loadtest(Skipping()), "Accepted answers skip a version")


async def test_answered_balance_off_by_two_fails() -> None:
    """One accepted answer with a balance that its version cannot have fails."""

    class Miscounting(FakeService):
        def accept(self, amount: int) -> tuple[int, Json]:
            status, body = super().accept(amount)
            return status, body | {"balance": body["balance"] + 2 * (body["version"] == 50)}

    assert_failed(await run_loadtest(Miscounting()), "1 accepted answers contradict the chain")


async def test_final_balance_off_by_two_fails() -> None:
    """A final balance that the accepted changes do not add up to fails."""

    class Drifting(FakeService):
        def user(self) -> Json:
            return super().user() | {"balance": self.balance or 2}

    assert_failed(await run_loadtest(Drifting()), "final balance is 2 instead of 0")


async def test_wrong_entry_fails() -> None:
    """An entry whose balance does not follow from the one before fails."""

    class Misnoting(FakeService):
        def page(self, after: int, limit: int) -> tuple[int, Json]:
            self.entries[10]["balance"] += 2
            return super().page(after, limit)

    assert_failed(await run_loadtest(Misnoting()), "1 entries contradict the chain")


async def test_dropped_connection_fails() -> None:
    """A connection that is closed without an answer is counted and fails."""

    class Dropping(FakeService):
        def change(self, amount: int) -> tuple[int, Json] | None:
            answer = super().change(amount)
            return None if self.version == 50 else answer

    report = await run_loadtest(Dropping())
    assert report["others"] == {"connection closed before an answer": 1}
    assert_failed(report, "99 were accepted instead of 100")


async def test_unavailable_fails() -> None:
    """A 503 is an outcome of its own, never taken for a refusal."""

    class Overloaded(FakeService):
        def refuse(self, amount: int) -> tuple[int, Json]:
            del amount
            return 503, {"code": "overloaded", "applied": "no"}

    report = await run_loadtest(Overloaded())
    assert report["refused"]["measured"] == 0
    assert_failed(report, "100 ended otherwise: 503 overloaded")


async def test_silence_fails_within_the_timeout() -> None:
    """If a service stops answering, the test ends at the timeout and counts the unanswered."""

    class Silent(FakeService):
        async def answer(self, method: str, path: str, body: Json) -> tuple[int, Json] | None:
            if path == "/api/balance" and self.version >= 50:
                await asyncio.sleep(1.5)
                return None
            return await super().answer(method, path, body)

    report = await run_loadtest(Silent(), "--timeout=1")
    assert report["others"] == {"no answer within the time limit": 151}
    assert_failed(report, "49 were accepted instead of 100", "49 new entries instead of 100")


async def test_unreadable_state_after_the_burst_fails() -> None:
    """A service that cannot be read afterwards fails, and the answers are still reported."""

    class Dying(FakeService):
        def page(self, after: int, limit: int) -> tuple[int, Json]:
            del after, limit
            return 503, {"code": "database-unavailable"}

    report = await run_loadtest(Dying())
    assert report["accepted"]["measured"] == 100
    assert report["newEntries"]["measured"] is None
    assert_failed(report, "The state after the burst could not be read", "answered 503")


async def test_plain_text_when_piped(picture: Path) -> None:
    """Without a terminal the report is plain text that ends with the verdict; times are seconds."""
    service = FakeService()
    async with service.running():
        arguments = [service.url, f"--requests={REQUESTS}", "--balance=200"]
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
    assert result.exit_code == EXIT_PASSED
    text = result.stdout
    assert "\x1b" not in text
    counts = re.findall(r"^ *[\d.]+ to [\d.]+ s +(\d+)  █* *$", text, re.MULTILINE)
    assert sum(map(int, counts)) == REQUESTS
    spans = re.findall(r"^(\w+)\b.* 100 +100  ok +[\d.]+ s to [\d.]+ s *$", text, re.MULTILINE)
    assert spans == ["accepted", "refused"]
    assert re.search(rf"^picture +{re.escape(str(picture))} *$", text, re.MULTILINE)
    assert text.splitlines()[-1] == (
        "PASS  100 accepted, 100 refused for insufficient funds, balance 0, 100 new entries"
    )
