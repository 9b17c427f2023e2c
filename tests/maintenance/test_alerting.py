"""Alerts and pings: sent in order, at least once, and by one instance at a time."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr

from balance_app.jobs import transaction
from balance_app.jobs.job import DeclarationError, Registry, job
from balance_app.jobs.repository import Completion
from balance_app.jobs.run import Run
from balance_app.jobs.transaction import LeaseLostError
from balance_app.maintenance.alerting import Alerting, Cause, events, pings, receiver, sender
from balance_app.maintenance.alerting.events import Event
from balance_app.maintenance.alerting.receiver import NotAcceptedError, Receivers, ping_url, text
from balance_app.maintenance.alerting.sender import AlertsNotSentError
from balance_app.settings import Settings
from balance_app.states import Outcome
from tests.jobs.support import Instance, JobsDatabase, on
from tests.maintenance.receiver import PATH, Receiver, receiving
from tests.mutants import replaced

SINCE = datetime(2026, 11, 29, 4, 5, 6, tzinfo=UTC)
FAILING = Cause("job-failing", "moon", "moon failed 3 times in a row: no light", SINCE)
GONE = Cause("instance-gone", "app4", "app4 stopped responding: no heartbeat", SINCE)
PAUSED = Cause("job-paused", "sun", "sun is paused: its last 5 runs failed", SINCE)


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


@pytest.fixture(autouse=True)
async def _empty(jobs_db: JobsDatabase) -> None:
    await jobs_db.admin.execute("TRUNCATE alerts, pings RESTART IDENTITY")


@pytest.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiving() as hook:
        yield hook


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a try follow soon, and a run whose receiver is down end soon."""
    monkeypatch.setattr(events, "FIRST_PAUSE", timedelta(milliseconds=20))
    monkeypatch.setattr(events, "LONGEST_PAUSE", timedelta(milliseconds=50))
    monkeypatch.setattr(sender, "LONGEST_SECONDS", 0.3)


class Fleet:
    """Instances that send alerts of what the test says is wrong."""

    def __init__(self, jobs_db: JobsDatabase, **settings: object) -> None:
        values = {**jobs_db.settings.model_dump(exclude_unset=True), **settings}
        self.alerting = Alerting(Settings.model_validate(values))
        self.alerting.connect(self._read)
        # None: it can't be read
        self.wrong: list[Cause] | None = []
        self.known: Collection[Cause] = []
        self._jobs_db = jobs_db

    async def _read(self, known: Collection[Cause]) -> list[Cause] | None:
        self.known = known
        return self.wrong

    async def send(self, *wrong: Cause) -> str:
        """Run the job once on a new instance; return its result."""
        self.wrong = list(wrong)
        return await self.turn()

    async def turn(self) -> str:
        """Run the job once, whatever is wrong; return its result."""
        instance, run = await self.claim()
        try:
            return await self.execute(run)
        finally:
            done = Completion(outcome="released", result=None, seconds_ago=0, keeps_checkpoint=True)
            await instance.jobs.finish(run.name, run.fence, done)

    async def execute(self, run: Run) -> str:
        result = await self.alerting.job.function(run)
        assert isinstance(result, str)
        return result

    async def claim(self) -> tuple[Instance, Run]:
        """Return a run of the job, on a new instance."""
        instance = self._jobs_db.instance()
        await instance.declare(sender.NAME)
        await self._jobs_db.ready(sender.NAME)
        return instance, instance.run(await instance.claim())


def secret(url: str) -> SecretStr:
    return SecretStr(url)


@pytest.fixture
def fleet(jobs_db: JobsDatabase, hook: Receiver) -> Fleet:
    return Fleet(jobs_db, alert_url=secret(hook.url))


# -- events --------------------------------------------------------------------------------------


async def test_what_is_wrong_is_sent_once_and_when_it_has_recovered(
    fleet: Fleet, hook: Receiver
) -> None:
    """One POST for each; nothing while it stays as it is; and anew when it comes again."""
    assert await fleet.send() == "nothing is wrong, sent 0 alerts"
    assert await fleet.send(FAILING, GONE) == "2 things wrong, sent 2 alerts"
    assert await fleet.send(FAILING, GONE) == "2 things wrong, sent 0 alerts"
    # Another sentence, as with one failure more, is the same event.
    more = FAILING._replace(sentence="moon failed 4 times in a row", since=SINCE + timedelta(1))
    assert await fleet.send(more) == "1 thing wrong, sent 1 alert"
    assert await fleet.send() == "nothing is wrong, sent 1 alert"
    assert await fleet.send(FAILING) == "1 thing wrong, sent 1 alert"
    assert hook.told == [
        ("raised", "instance-gone", "app4"),
        ("raised", "job-failing", "moon"),
        ("recovered", "instance-gone", "app4"),
        ("recovered", "job-failing", "moon"),
        ("raised", "job-failing", "moon"),
    ]
    assert len({each["id"] for each in hook.alerts}) == 5


async def test_a_job_that_gets_worse_has_not_recovered(
    fleet: Fleet, hook: Receiver, jobs_db: JobsDatabase
) -> None:
    """It has one cause at a time; what is sent last is that it has none any more."""
    failing = FAILING._replace(subject="sun")
    await fleet.send(failing, GONE)
    await fleet.send(PAUSED, GONE)
    # An instance that has the name of a job is something else.
    await fleet.send(PAUSED._replace(subject="app4"), PAUSED)
    assert await jobs_db.admin.fetchval(OPEN) == ["job-paused app4", "job-paused sun"]
    await fleet.send(failing)
    await fleet.send()
    assert hook.told == [
        ("raised", "instance-gone", "app4"),
        ("raised", "job-failing", "sun"),
        ("raised", "job-paused", "sun"),
        ("recovered", "instance-gone", "app4"),
        ("raised", "job-paused", "app4"),
        ("recovered", "job-paused", "app4"),
        ("raised", "job-failing", "sun"),
        ("recovered", "job-failing", "sun"),
    ]


OPEN = """
SELECT array_agg(code || ' ' || subject ORDER BY code, subject) FROM alerts
WHERE status = 'raised' AND ended_at IS NULL
"""


async def test_what_gets_worse_without_room_is_still_known(
    fleet: Fleet, hook: Receiver, jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cause before ends only when the new one is recorded: else nothing would ever recover."""
    await fleet.send(FAILING)
    monkeypatch.setattr(events, "MOST_WAITING", 0)
    worse = PAUSED._replace(subject="moon")
    await fleet.send(worse)
    assert await jobs_db.admin.fetchval(OPEN) == ["job-failing moon"]
    monkeypatch.setattr(events, "MOST_WAITING", 10)
    await fleet.send(worse)
    assert await jobs_db.admin.fetchval(OPEN) == ["job-paused moon"]
    assert len(hook.requests) == 2


async def test_what_is_known_is_in_the_rows(fleet: Fleet) -> None:
    """So it is what all instances have reported, wherever the job ran."""
    await fleet.send(FAILING, GONE)
    await fleet.send(GONE)
    assert list(fleet.known) == [GONE, FAILING]
    await fleet.send(GONE)
    assert list(fleet.known) == [GONE]


async def test_what_can_not_be_read_has_not_recovered(
    jobs_db: JobsDatabase, hook: Receiver
) -> None:
    """Nothing is recorded, and no ping says that all is well; what waits is sent."""
    fleet = Fleet(jobs_db, alert_url=secret(hook.url), ping_url=secret(hook.url))
    await hook.stop()
    with pytest.raises(AlertsNotSentError):
        await fleet.send(GONE)
    await hook.start()
    fleet.wrong = None
    assert await fleet.turn() == "what is wrong can't be read, sent 1 alert"
    assert hook.told == [("raised", "instance-gone", "app4")]
    assert hook.pings == []


async def test_an_event_is_an_object_of_its_own(fleet: Fleet, hook: Receiver) -> None:
    """Bounded, with an id that is its idempotency key, too."""
    for n, character in enumerate("x\x01🌙"):
        await fleet.send(FAILING._replace(subject=str(n), sentence=character * 100_000))
    assert all(len(each.body) < 4000 for each in hook.requests)
    request = hook.requests[0]
    assert request.path == PATH
    assert request.headers["content-type"] == "application/json"
    assert request.headers["idempotency-key"] == request.json["id"]
    assert request.headers["user-agent"].startswith("balance_app/")
    assert list(request.json) == ["id", "event", "cause", "subject", "text", "since", "at"]
    assert request.json["since"] == "2026-11-29T04:05:06.000Z"


EXAMPLE = Event(
    number=1,
    id=UUID("0c0e3fbd-6d1c-4f0e-9d6c-0e0f6f1f3d0a"),
    code="job-failing",
    subject="import-prices",
    status="raised",
    sentence="import-prices failed 3 times in a row: OSError: the exchange answers 502",
    since=datetime(2026, 11, 29, 5, 16, 20, tzinfo=UTC),
    at=datetime(2026, 11, 29, 5, 16, 31, 104_000, tzinfo=UTC),
    tries=1,
)


def test_the_documented_event_is_what_is_sent() -> None:
    """Member for member."""
    page = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text("utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert json.loads(receiver.as_json(EXAMPLE)) == json.loads(example)


def test_the_time_of_the_begin_is_there_once() -> None:
    """Also where the sentence has it, as that of an instance which stopped responding."""
    sentence = "app4 stopped responding (last heartbeat at 2026-11-29 05:16:20 UTC)"
    assert text(EXAMPLE._replace(sentence=sentence)) == sentence


async def test_slack_gets_a_message(jobs_db: JobsDatabase, hook: Receiver) -> None:
    """One line, in which nothing of a sentence is markup."""
    fleet = Fleet(jobs_db, alert_url=secret(hook.url), alert_format="slack")
    await fleet.send(FAILING._replace(sentence="<!channel> & all"))
    await fleet.send()
    first, second = hook.alerts
    assert first == {"text": "✕ &lt;!channel&gt; &amp; all (since 2026-11-29 04:05:06 UTC)"}
    assert second["text"].startswith("✓ Recovered after ")


def test_a_recovery_says_how_long_it_lasted() -> None:
    """From the cause's begin."""
    event = Event(1, None, "c", "", "recovered", "X.", SINCE, SINCE + timedelta(minutes=3), 1)  # type: ignore[arg-type]
    assert text(event) == "Recovered after 3 min 0 s: X."


async def test_what_happened_while_the_receiver_was_down_arrives_in_order(
    fleet: Fleet, hook: Receiver, jobs_db: JobsDatabase
) -> None:
    """All of it, once, also what has recovered meanwhile; and the job says why it waits."""
    await hook.stop()
    for wrong in ([FAILING], [FAILING, GONE], [GONE], []):
        with pytest.raises(AlertsNotSentError, match=r"not sent yet: 127\.0\.0\.1 can't be"):
            await fleet.send(*wrong)
    ids = [row["event"] for row in await jobs_db.admin.fetch("SELECT * FROM alerts ORDER BY id")]
    await hook.start()
    assert await fleet.send() == "nothing is wrong, sent 4 alerts"
    assert hook.told == [
        ("raised", "job-failing", "moon"),
        ("raised", "instance-gone", "app4"),
        ("recovered", "job-failing", "moon"),
        ("recovered", "instance-gone", "app4"),
    ]
    assert [each["id"] for each in hook.alerts] == [str(each) for each in ids]


async def test_a_try_has_the_same_id_and_bytes_as_the_one_before(
    fleet: Fleet, hook: Receiver
) -> None:
    """A receiver that answers 503 gets the event again; the next one waits behind it."""
    hook.status = "503 Service Unavailable"
    while len(hook.requests) < 3:
        with pytest.raises(AlertsNotSentError, match=r"2 alerts not sent yet: 127.* answered 503"):
            await fleet.send(FAILING, PAUSED)
    hook.status = "200 OK"
    await fleet.send(FAILING, PAUSED)
    *again, last = hook.requests
    assert len({each.body for each in again}) == 1
    assert last.json["id"] != again[0].json["id"]


PAUSE = "SELECT extract(epoch FROM next_try_at - clock_timestamp()) FROM alerts"


async def test_the_pauses_between_tries_grow(
    fleet: Fleet, jobs_db: JobsDatabase, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5, 10, 20 s, and so on, up to 2 min."""
    monkeypatch.undo()
    monkeypatch.setattr(sender, "LONGEST_SECONDS", 0)
    await hook.stop()
    pauses = []
    for _ in range(8):
        with pytest.raises(AlertsNotSentError):
            await fleet.send(FAILING)
        pauses.append(await jobs_db.admin.fetchval(PAUSE))
        # Not before the pause is over.
        with pytest.raises(AlertsNotSentError):
            await fleet.send(FAILING)
        await jobs_db.admin.execute("UPDATE alerts SET next_try_at = clock_timestamp()")
    # What is left of each when it is looked at: more than the one before had.
    longest = [5, 10, 20, 40, 80, 120, 120, 120]
    assert all(most / 2 < left <= most for left, most in zip(pauses, longest, strict=True)), pauses
    assert await jobs_db.admin.fetchval("SELECT tries FROM alerts") == 8


# What was written before PostgreSQL's clock was set back lies ahead of it.
ALERTS_AHEAD = "UPDATE alerts SET next_try_at = next_try_at + interval '1 hour'"
PINGS_AHEAD = "UPDATE pings SET at = at + interval '1 hour'"


@pytest.mark.parametrize("tried", [True, False])
async def test_no_alert_waits_for_a_clock_that_was_set_back(
    fleet: Fleet,
    hook: Receiver,
    jobs_db: JobsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tried: bool,
) -> None:
    """A try further ahead than the longest pause is due: in this go, or in the next one."""
    monkeypatch.setattr(sender, "SENDING_SECONDS", 0)
    if tried:
        await hook.stop()
        with pytest.raises(AlertsNotSentError):
            await fleet.send(FAILING, GONE)
        await hook.start()
    else:
        await events.record(jobs_db.admin, [FAILING, GONE])
    await jobs_db.admin.execute(ALERTS_AHEAD)
    async with asyncio.timeout(20):
        assert await fleet.send(FAILING, GONE) == "2 things wrong, sent 2 alerts"
    assert [subject for _, _, subject in hook.told] == ["app4", "moon"]


async def test_a_run_ends_whatever_the_clock_says(
    fleet: Fleet, hook: Receiver, jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time that has passed, also if what waits was not tried yet."""
    monkeypatch.setattr(events, "LONGEST_PAUSE", timedelta(hours=2))
    await events.record(jobs_db.admin, [FAILING])
    await jobs_db.admin.execute(ALERTS_AHEAD)
    async with asyncio.timeout(20):
        with pytest.raises(AlertsNotSentError, match=r"^1 alert not sent yet$"):
            await fleet.send(FAILING)
    assert hook.requests == []


async def test_an_event_that_is_refused_for_good_holds_up_no_other(
    fleet: Fleet, hook: Receiver, jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten refusals of its body the next one is sent; its row has the reason."""
    monkeypatch.setattr(events, "LONGEST_PAUSE", timedelta(0))
    monkeypatch.setattr(sender, "LONGEST_SECONDS", 60)
    hook.status = "400 Bad Request"
    await fleet.send(FAILING)
    assert len(hook.requests) == sender.MOST_REFUSALS
    hook.status = "204 No Content"
    await fleet.send(FAILING, GONE)
    assert hook.told[-1] == ("raised", "instance-gone", "app4")
    rows = await jobs_db.admin.fetch("SELECT error, done_at FROM alerts ORDER BY id")
    assert [row["error"] for row in rows] == ["127.0.0.1 answered 400", None]
    assert all(row["done_at"] for row in rows)


async def test_what_was_given_up_was_not_sent(
    fleet: Fleet, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only refusals count: not the tries while the receiver was down."""
    monkeypatch.setattr(sender, "MOST_REFUSALS", 3)
    hook.status = "503 Service Unavailable"
    while len(hook.requests) < sender.MOST_REFUSALS:
        with pytest.raises(AlertsNotSentError):
            await fleet.send(FAILING)
    before = len(hook.requests)
    hook.status = "400 Bad Request"
    monkeypatch.setattr(sender, "LONGEST_SECONDS", 60)
    assert await fleet.send(FAILING) == "1 thing wrong, sent 0 alerts, gave up 1 alert"
    assert len(hook.requests) - before == 3


async def test_sending_leaves_time_for_pings(
    jobs_db: JobsDatabase, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many alerts to a slow receiver are sent in several goes, with pings between them."""
    monkeypatch.setattr(sender, "SENDING_SECONDS", 0)
    fleet = Fleet(jobs_db, alert_url=secret(hook.url), ping_url=secret(hook.url))
    assert await fleet.send(FAILING, GONE, PAUSED) == "3 things wrong, sent 3 alerts and 2 pings"
    assert [each.method for each in hook.requests] == ["POST", "GET", "GET", "POST", "POST"]


async def test_a_ping_that_fails_keeps_no_alert_back(
    jobs_db: JobsDatabase, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its error is."""

    async def fails(*_: object) -> None:
        raise ValueError("not foreseen")

    monkeypatch.setattr(Receivers, "ping", fails)
    fleet = Fleet(jobs_db, alert_url=secret(hook.url), ping_url=secret(hook.url))
    with pytest.raises(ExceptionGroup):
        await fleet.send(GONE)
    assert hook.told == [("raised", "instance-gone", "app4")]


async def test_as_many_wait_as_may(
    fleet: Fleet, hook: Receiver, jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong when there is room again is sent then; old events are deleted."""
    monkeypatch.setattr(events, "MOST_WAITING", 3)
    monkeypatch.setattr(events, "KEPT", 2)
    wrong = [FAILING._replace(subject=f"job-{n}") for n in range(5)]
    await hook.stop()
    for _ in range(2):
        with pytest.raises(AlertsNotSentError):
            await fleet.send(*wrong)
    assert await jobs_db.admin.fetchval("SELECT count(*) FROM alerts") == 3
    await hook.start()
    assert await fleet.send(*wrong) == "5 things wrong, sent 3 alerts"
    assert await fleet.send(*wrong) == "5 things wrong, sent 2 alerts"
    assert await fleet.send() == "nothing is wrong, sent 3 alerts"
    await fleet.send()
    await fleet.send()
    assert [each["subject"] for each in hook.alerts] == [f"job-{n}" for n in range(5)] * 2
    assert await jobs_db.admin.fetchval("SELECT count(*) FROM alerts") == 2


async def test_of_itself_it_sends_no_alert(jobs_db: JobsDatabase, hook: Receiver) -> None:
    """That alerts are not sent can't be sent; the fleet's ping says that something is wrong."""
    fleet = Fleet(jobs_db, alert_url=secret(hook.url), ping_url=secret(hook.url))
    await fleet.send(FAILING._replace(subject=sender.NAME))
    assert hook.told == []
    assert hook.pings == [f"{PATH}/start", f"{PATH}/fail"]


# -- one instance at a time ----------------------------------------------------------------------


async def at_once(fleet: Fleet, hook: Receiver) -> list[str]:
    """Let two instances send at once, the second one after the first one's lease; return ids.

    The receiver holds its answers back until all that will come has come.
    """
    fleet.wrong = [FAILING]
    hook.answers.clear()
    _, first_run = await fleet.claim()
    first = asyncio.create_task(fleet.execute(first_run))
    await hook.arrived.wait()
    await fleet._jobs_db.expire(sender.NAME)
    _, second_run = await fleet.claim()
    second = asyncio.create_task(fleet.execute(second_run))
    for _ in range(50):
        await asyncio.sleep(0.01)
        if len(hook.requests) > 1 or second.done():
            break
    hook.answers.set()
    await asyncio.gather(first, second, return_exceptions=True)
    return [each["id"] for each in hook.alerts]


TRIES_ANYTHING = (
    """ AND done_at IS NULL
  AND next_try_at NOT BETWEEN clock_timestamp() AND clock_timestamp() + $2::interval
""",
    "\n",
)


async def test_no_two_instances_send_an_event_at_once(
    fleet: Fleet, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance that takes over leaves the event to the one that may still be sending it."""
    monkeypatch.setattr(events, "FIRST_PAUSE", timedelta(minutes=1))
    monkeypatch.setattr(events, "LONGEST_PAUSE", timedelta(minutes=1))
    assert len(await at_once(fleet, hook)) == 1


async def test_without_the_state_of_its_row_an_event_is_sent_twice_at_once(
    fleet: Fleet, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(events, "TRY", replaced(events.TRY, *TRIES_ANYTHING))
    ids = await at_once(fleet, hook)
    assert len(ids) > len(set(ids)) == 1


@pytest.mark.parametrize("fenced", [True, False])
async def test_a_run_that_has_lost_its_lease_sends_nothing(
    fleet: Fleet, hook: Receiver, monkeypatch: pytest.MonkeyPatch, *, fenced: bool
) -> None:
    """The control, without the fence, sends."""
    if not fenced:
        monkeypatch.setattr(
            transaction, "COMMIT", replaced(transaction.COMMIT, "SELECT hold_lease();", "")
        )
        condition = " AND fence = $2 AND holder = $3 AND lease_expires_at > clock_timestamp()"
        given = " AND $2::bigint > 0 AND $3::uuid IS NOT NULL"
        enter = replaced(transaction.ENTER, condition, given)
        monkeypatch.setattr(transaction, "ENTER", enter)
    fleet.wrong = [FAILING]
    _, run = await fleet.claim()
    await fleet._jobs_db.expire(sender.NAME)
    if fenced:
        with pytest.raises(LeaseLostError):
            await fleet.execute(run)
    else:
        await fleet.execute(run)
    assert bool(hook.requests) is not fenced


async def test_an_event_whose_answer_was_not_recorded_is_sent_again(
    fleet: Fleet, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an instance dies before its commit: with the same id, so a receiver can tell."""

    async def dies(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(events, "end", dies)
        with pytest.raises(asyncio.CancelledError):
            await fleet.send(FAILING)
    await fleet.send(FAILING)
    first, again = hook.requests
    assert first.body == again.body


# -- the receiver --------------------------------------------------------------------------------

EVENT = Event(1, SINCE, "c", "s", "raised", "X.", SINCE, SINCE, 1)  # type: ignore[arg-type]


def _redirects(hook: Receiver) -> None:
    hook.status, hook.headers = "302 Found", f"Location: {hook.url}/else\r\n"


def _is_silent(hook: Receiver) -> None:
    hook.answers.clear()


def _speaks_otherwise(hook: Receiver) -> None:
    hook.status = "what?\r\n\r\n"


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (_redirects, "127.0.0.1 answered 302, a redirect"),
        (_is_silent, "127.0.0.1 did not answer within 0.2 s"),
        (_speaks_otherwise, "127.0.0.1 broke off"),
    ],
)
async def test_what_a_receiver_may_do_is_bounded(
    hook: Receiver,
    does: Callable[[Receiver], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No redirect is followed, no answer waited for long, and the URL stays a secret."""
    monkeypatch.setattr(receiver, "POST_SECONDS", 0.2)
    does(hook)
    receivers = Receivers()
    with pytest.raises(NotAcceptedError) as error:
        await receivers.post(hook.url, EVENT, b"{}")
    await receivers.close()
    assert str(error.value) == reason
    assert error.value.__context__ is None or error.value.__suppress_context__
    assert len(hook.requests) == 1


@pytest.mark.parametrize("host", ["a..example", "xn--", "256.1.1.1"])
async def test_a_host_that_can_not_be_one_is_not_reached(host: str) -> None:
    """It is refused at the start; here it is as one that is not there."""
    receivers = Receivers()
    for sending in (
        receivers.post(f"http://{host}/T0PSECRET", EVENT, b"{}"),
        receivers.ping(f"http://{host}/T0PSECRET", "start"),
    ):
        with pytest.raises(NotAcceptedError, match=f"^{host} "):
            await sending
    await receivers.close()


async def test_a_host_that_is_not_there_is_named_without_its_path() -> None:
    """The host is no secret."""
    receivers = Receivers()
    with pytest.raises(NotAcceptedError, match=r"^hooks\.invalid can't be reached$"):
        await receivers.post("http://hooks.invalid/T0PSECRET", EVENT, b"{}")
    await receivers.close()


# -- pings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "start"),
    [
        ("https://a.example/x", "https://a.example/x/start"),
        ("https://a.example/x/", "https://a.example/x/start"),
        ("https://a.example", "https://a.example/start"),
        ("https://a.example/x?key=1", "https://a.example/x/start?key=1"),
        ("https://a.example/%2Fx", "https://a.example/%2Fx/start"),
    ],
)
def test_the_phase_is_the_end_of_the_path(url: str, start: str) -> None:
    """Success is the URL itself."""
    assert str(ping_url(url, "start")) == start
    assert str(ping_url(url, "success")) == url


AGED = "UPDATE pings SET at = at - $1::interval"


async def test_the_fleet_is_reported(jobs_db: JobsDatabase, hook: Receiver) -> None:
    """When it starts, and about every half minute whether all is well."""
    fleet = Fleet(jobs_db, ping_url=secret(hook.url))
    assert await fleet.send() == "nothing is wrong, sent 0 alerts and 2 pings"
    await fleet.send()  # too soon
    assert hook.pings == [f"{PATH}/start", PATH]
    for wrong, minutes in (([FAILING], 1), ([], 1), ([], 6)):
        await jobs_db.admin.execute(AGED, timedelta(minutes=minutes))
        await fleet.send(*wrong)
    assert hook.pings[2:] == [f"{PATH}/fail", PATH, f"{PATH}/start", PATH]
    # A receiver that is down fails no run: the watcher sees that nothing comes.
    await hook.stop()
    await jobs_db.admin.execute(AGED, timedelta(minutes=1))
    assert await fleet.send() == "nothing is wrong, sent 0 alerts"


async def test_the_fleet_is_reported_though_the_clock_was_set_back(
    jobs_db: JobsDatabase, hook: Receiver
) -> None:
    """A watcher that gets no ping until the clock has caught up would take the fleet for dead."""
    fleet = Fleet(jobs_db, ping_url=secret(hook.url))
    await fleet.send()
    await jobs_db.admin.execute(PINGS_AHEAD)
    for _ in range(2):  # the second time it is too soon
        await fleet.send()
    assert hook.pings == [f"{PATH}/start", PATH, PATH]


async def test_the_runs_of_jobs_are_reported(jobs_db: JobsDatabase, hook: Receiver) -> None:
    """Each start and end once; a run that was released or cancelled says nothing."""
    fleet = Fleet(jobs_db, job_ping_urls=secret(f"{hook.url}/{{job}} sun={hook.url}/other"))
    instance = jobs_db.instance("worker")
    await instance.declare("moon", "sun")

    async def begin(name: str) -> None:
        await jobs_db.admin.execute(
            "UPDATE jobs SET ready_at = clock_timestamp() + interval '1 h'"
            " WHERE name <> $1 AND holder IS NULL",
            name,
        )
        await jobs_db.ready(name)
        await instance.claim()

    async def end(name: str, outcome: Outcome) -> None:
        fence = (await jobs_db.row(name))["fence"]
        done = Completion(outcome=outcome.value, result=None, seconds_ago=0, ready_at=SINCE)
        await instance.jobs.finish(name, fence, done)

    seen: list[str] = []

    async def new() -> list[str]:
        await fleet.send()
        found = [each.removeprefix(PATH) for each in hook.pings[len(seen) :]]
        seen.extend(found)
        return sorted(found) if len({each.split("/")[1] for each in found}) > 1 else found

    await begin("moon")
    assert await new() == ["/moon/start"]
    assert await new() == []
    await begin("sun")
    await end("moon", Outcome.SUCCEEDED)
    assert await new() == ["/moon", "/other/start"]
    # The next run has begun when the end of the one before is reported.
    await begin("moon")
    assert await new() == ["/moon/start"]
    await end("moon", Outcome.FAILED)
    await begin("moon")
    assert await new() == ["/moon/fail", "/moon/start"]
    await end("moon", Outcome.RELEASED)
    await end("sun", Outcome.TIMED_OUT)
    assert await new() == ["/other/fail"]
    # What has ended long ago is not reported any more.
    await begin("moon")
    await end("moon", Outcome.SUCCEEDED)
    await jobs_db.admin.execute("UPDATE job_runs SET ended_at = ended_at - interval '11 min'")
    assert await new() == []


async def test_only_the_named_jobs_are_reported(jobs_db: JobsDatabase, hook: Receiver) -> None:
    """Without a URL for all."""
    fleet = Fleet(jobs_db, job_ping_urls=secret(f"sun={hook.url}"))
    instance = jobs_db.instance("worker")
    await instance.declare("moon", "sun")
    for name in ("moon", "sun"):
        await jobs_db.ready(name)
        await instance.claim()
    await fleet.send()
    assert hook.pings == [f"{PATH}/start"]


async def test_targets_that_do_not_answer_leave_the_others_their_turn(
    jobs_db: JobsDatabase, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was tried longest ago is next."""
    monkeypatch.setattr(pings, "AT_ONCE", 1)
    names = ["jupiter", "moon", "sun"]
    fleet = Fleet(jobs_db, job_ping_urls=secret(f"{hook.url}/{{job}}"))
    instance = jobs_db.instance("worker")
    await instance.declare(*names)
    for name in names:
        await jobs_db.ready(name)
        await instance.claim()
    hook.status = "503 Service Unavailable"
    for _ in range(4):
        await fleet.send()
    tried = [each.split("/")[-2] for each in hook.pings]
    assert sorted(tried[:3]) == names
    assert tried[3] == tried[0]
    # That they were tried does not count as reported.
    hook.status = "204 No Content"
    for _ in range(4):
        await fleet.send()
    assert sorted(each.split("/")[-2] for each in hook.pings[4:]) == names


# -- the eleventh job ----------------------------------------------------------------------------


def test_the_job_is_there_if_a_setting_is(jobs_db: JobsDatabase) -> None:
    """The exercise's ten stay ten, of two minutes each; this one is quick."""
    ten = Registry.load("balance_app.maintenance")
    assert set(Fleet(jobs_db).alerting.added_to(ten)) == set(ten)
    assert len(ten) == 10
    assert {each.min_seconds for each in ten.values()} == {None}
    for name in ("alert_url", "ping_url", "job_ping_urls"):
        url = secret("https://a.example/{job}" if name == "job_ping_urls" else "https://a.example")
        alerting = Fleet(jobs_db, **{name: url}).alerting
        eleven = alerting.added_to(ten)
        assert set(eleven) - set(ten) == {sender.NAME}
        assert eleven[sender.NAME].min_seconds == 0
        assert len(alerting.added_to(eleven)) == 11


def test_another_job_can_not_have_its_name(jobs_db: JobsDatabase) -> None:
    """It is said when the program starts."""

    async def other(_run: Run) -> None: ...

    mine = Registry([job(name=sender.NAME, every=timedelta(hours=1))(other)], {})
    with pytest.raises(DeclarationError, match="Two jobs are named send-alerts"):
        Fleet(jobs_db, alert_url=secret("https://a.example")).alerting.added_to(mine)


def test_a_body_is_json() -> None:
    """As a control of the fixture."""
    assert json.loads(receiver.as_json(EVENT))["text"] == "X. (since 2026-11-29 04:05:06 UTC)"
