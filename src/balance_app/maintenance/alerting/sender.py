"""The job that sends alerts and pings, on one instance at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from time import monotonic
from typing import Final

from pydantic import SecretStr

from balance_app.jobs.job import Job, Registry, job
from balance_app.jobs.run import Run
from balance_app.maintenance.alerting import events, pings
from balance_app.maintenance.alerting.events import Cause, Event, Waiting
from balance_app.maintenance.alerting.pings import FLEET, Ping
from balance_app.maintenance.alerting.receiver import (
    NotAcceptedError,
    Receivers,
    as_json,
    as_slack,
)
from balance_app.maintenance.batches import count
from balance_app.settings import Settings
from balance_app.webhook_url import job_urls

NAME: Final = "send-alerts"
# Not of a module of jobs: it is there if its settings are.
ORIGIN: Final = "balance_app.maintenance.alerting"
EVERY: Final = timedelta(seconds=30)
# While a receiver is down, a run goes on: each run that fails is a line of the history.
LONGEST_SECONDS: Final = 300.0
# Then the pings' turn comes.
SENT_AT_ONCE: Final = 50
SENDING_SECONDS: Final = 20.0
PINGS_SECONDS: Final = 20.0
PINGS_SIDE_BY_SIDE: Final = 8
# A receiver that refuses an event itself, so often, gets the next one.
REFUSALS: Final = frozenset({400, 413, 422})
MOST_REFUSALS: Final = 10

# what is wrong, of which the causes given are known; None: that can't be read
ReadCauses = Callable[[Collection[Cause]], Awaitable[Sequence[Cause] | None]]


class AlertsNotSentError(Exception):
    """The receiver of the alerts has not accepted them for minutes."""


@dataclass
class _Done:
    """What a run has done."""

    alerts: int = 0
    given_up: int = 0
    pings: int = 0


class Alerting:
    """Sends what is wrong to ALERT_URL, and pings; its job is one of an instance's if it is set."""

    def __init__(self, settings: Settings) -> None:
        self._url = _text(settings.alert_url)
        self._body = as_slack if settings.alert_format == "slack" else as_json
        self._fleet_url = _text(settings.ping_url)
        self._job_urls = job_urls(_text(settings.job_ping_urls) or "")
        self._read_causes: ReadCauses | None = None

    def connect(self, read_causes: ReadCauses) -> None:
        """Set what tells what is wrong now."""
        self._read_causes = read_causes

    def added_to(self, registry: Registry) -> Registry:
        """Return the jobs, with that of alerts and pings if one of their settings is set.

        Raises:
            DeclarationError: another job has its name.
        """
        if self._url is None and self._fleet_url is None and not self._job_urls.all:
            return registry
        # It may be among them already, of the same settings.
        others = [each for each in registry.values() if registry.origins.get(each.name) != ORIGIN]
        return Registry([*others, self.job], {**registry.origins, NAME: ORIGIN})

    @property
    def job(self) -> Job:
        """The job. It is quick: the minimum duration is one of work that takes its time."""
        declare = job(name=NAME, every=EVERY, min_duration=timedelta(0))

        async def send_alerts(run: Run) -> str:
            """Report what is wrong, and what has recovered, to ALERT_URL; send pings."""
            receivers = Receivers()
            try:
                return await self._send_all(run, receivers)
            finally:
                await receivers.close()

        return declare(send_alerts)

    async def _send_all(self, run: Run, receivers: Receivers) -> str:
        """Send until nothing waits; while the receiver is down, for `LONGEST_SECONDS`."""
        started = monotonic()
        done = _Done()
        while True:
            causes = await self._causes(run)
            if self._url is not None:
                await self._send_events(run, receivers, self._url, done)
            done.pings += await self._ping(run, receivers, causes)
            if self._url is None:
                return _result(causes, done)
            async with run.transaction() as connection:
                left = await events.waiting(connection)
            if left is None:
                return _result(causes, done)
            sentence = _waiting_sentence(left)
            run.progress(done.alerts, done.alerts + left.events, sentence)
            rest = started + LONGEST_SECONDS - monotonic()
            # What waits though it was not tried yet is from before the clock was set back.
            if (left.tries or left.seconds) and left.seconds > rest:
                raise AlertsNotSentError(sentence)
            await asyncio.sleep(min(left.seconds, EVERY.total_seconds()))

    async def _causes(self, run: Run) -> Sequence[Cause] | None:
        """Return what is wrong, and record it if there is a receiver; None: it can't be read."""
        assert self._read_causes is not None  # noqa: S101 - connected before a job runs
        if self._url is None:
            return await self._read_causes([])
        # Read anew each time: another instance may have reported since.
        async with run.transaction() as connection:
            known = await events.open_causes(connection)
        causes = await self._read_causes(known)
        if causes is not None:
            # That alerts are not sent can't be sent: the page shows it, and the fleet's ping.
            others = [each for each in causes if each.subject != NAME]
            async with run.transaction() as connection:
                await events.record(connection, others)
        return causes

    async def _send_events(self, run: Run, receivers: Receivers, url: str, done: _Done) -> None:
        """Send what may be sent now, in order."""
        until = monotonic() + SENDING_SECONDS
        for _ in range(SENT_AT_ONCE):
            # Committed while this run holds its lease, and before it is sent: so no other instance
            # sends it now, nor when this one has died on the way, before the pause is over.
            async with run.transaction() as connection:
                event = await events.next_to_try(connection)
            if event is None or not await self._send(run, receivers, url, event, done):
                break
            if monotonic() >= until:
                break

    async def _send(
        self, run: Run, receivers: Receivers, url: str, event: Event, done: _Done
    ) -> bool:
        """Send an event; return whether the next one may be sent."""
        try:
            await receivers.post(url, event, self._body(event))
        except NotAcceptedError as error:
            refused = error.status in REFUSALS
            gives_up = refused and event.refusals + 1 >= MOST_REFUSALS
            # Once for each outage of the receiver: the others wait behind this one.
            log = run.log.warning if event.tries == 1 or gives_up else run.log.info
            sentence = "alert given up" if gives_up else "alert not accepted"
            log(sentence, reason=str(error), id=str(event.id))
            async with run.transaction() as connection:
                if gives_up:
                    await events.end(connection, event, str(error))
                else:
                    await events.fail(connection, event, str(error), refused=refused)
            done.given_up += gives_up
            return gives_up
        async with run.transaction() as connection:
            await events.end(connection, event)
        done.alerts += 1
        run.log.info("alert sent", id=str(event.id), what=f"{event.code} {event.status}")
        return True

    # -- pings --------------------------------------------------------------------------------

    async def _ping(self, run: Run, receivers: Receivers, causes: Sequence[Cause] | None) -> int:
        """Send the pings that are due; return how many were accepted.

        Of the fleet none is while nobody knows whether it is well.
        """
        due: list[Ping] = []
        async with run.transaction() as connection:
            if self._fleet_url is not None and causes is not None:
                due += await pings.fleet(connection, is_well=not causes)
            if self._job_urls.all:
                jobs = None if self._job_urls.for_all else self._job_urls.by_job
                due += await pings.unreported(connection, jobs, NAME)
        if not due:
            return 0
        sent, tried = await self._send_pings(run, receivers, due)
        async with run.transaction() as connection:
            await pings.reported(connection, sent)
            await pings.tried(connection, tried - {FLEET})
        return len(sent)

    async def _send_pings(
        self, run: Run, receivers: Receivers, due: Iterable[Ping]
    ) -> tuple[list[Ping], set[str]]:
        """Send pings, those of one target in order, several targets side by side.

        Return those that were accepted, and the targets that were tried.
        """
        sent: list[Ping] = []
        tried: set[str] = set()
        failures: list[str] = []
        seats = asyncio.Semaphore(PINGS_SIDE_BY_SIDE)

        async def send(of_target: list[Ping]) -> None:
            async with seats:
                for each in of_target:
                    is_fleet = each.target == FLEET
                    url = self._fleet_url if is_fleet else self._job_urls.of(each.target)
                    if url is None:
                        return
                    tried.add(each.target)
                    try:
                        await receivers.ping(url, each.phase)
                    except NotAcceptedError as error:
                        failures.append(str(error))
                        return
                    sent.append(each)

        try:
            async with asyncio.timeout(PINGS_SECONDS), asyncio.TaskGroup() as tasks:
                for _, of_target in groupby(due, key=lambda each: each.target):
                    tasks.create_task(send(list(of_target)))
        except TimeoutError:
            failures.append(f"not all within {PINGS_SECONDS:g} s")
        if failures:
            run.log.info("pings not accepted", number=len(failures), first=failures[0])
        return sent, tried


def _text(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _result(causes: Sequence[Cause] | None, done: _Done) -> str:
    if causes is None:
        wrong = "what is wrong can't be read"
    else:
        wrong = f"{count(len(causes), 'thing')} wrong" if causes else "nothing is wrong"
    sentence = f"{wrong}, sent {count(done.alerts, 'alert')}"
    if done.pings:
        sentence += f" and {count(done.pings, 'ping')}"
    return f"{sentence}, gave up {count(done.given_up, 'alert')}" if done.given_up else sentence


def _waiting_sentence(left: Waiting) -> str:
    reason = f": {left.error}" if left.error else ""
    return f"{count(left.events, 'alert')} not sent yet{reason}"
