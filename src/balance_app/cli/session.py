"""What the command line does with a running service: it sends requests, waits, and reports.

For programs it prints the service's own JSON; every other message goes to stderr.
"""

import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from textwrap import shorten
from typing import Any, Final
from urllib.parse import quote

from pydantic_core import to_json
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from balance_app.cli import output
from balance_app.cli.client import (
    RETRY_SECONDS,
    Answer,
    Code,
    Event,
    RemoteError,
    Service,
)
from balance_app.formatting import duration, exact, visible
from balance_app.states import Outcome, State

AUDIT: Final = "audit-ledger"
ENTRIES_SHOWN: Final = 5
COMPLETION_SECONDS: Final = 0.7

_KEY: Final = re.compile(r"[!-~]{1,255}")
# After any other outcome another run goes on with the tick.
_CONCLUSIVE: Final = {Outcome.SUCCEEDED, Outcome.FAILED, Outcome.TIMED_OUT, Outcome.CANCELLED}
_AUDIT_OUTCOMES: Final = {Outcome.SUCCEEDED, Outcome.FAILED}
_CONTROL_MESSAGES: Final = {
    "run": "{name} is ready to run: an instance claims it.",
    "pause": "{name} is paused by {by}.",
    "resume": "{name} is not paused any more.",
    "cancel": "The run of {name} on {server} stops within a heartbeat, as {by} requested.",
    "cancel late": (
        "Nothing was cancelled: the work of {name} on {server} was done already. Its run has "
        "succeeded, and ends now."
    ),
}


class Terminal:
    """One person, or program, that uses a service.

    Every method prints the service's answer, and raises RemoteError where it is a refusal.
    """

    def __init__(self, service: Service, *, as_json: bool, reached_by: tuple[str, ...]) -> None:
        """`reached_by`: the arguments with which another command uses the same service."""
        self._service = service
        self._as_json = as_json
        self._reached_by = reached_by
        self._out = output.console()
        self._err = output.console(stderr=True)

    # -- jobs ----------------------------------------------------------------------------------

    def status(self) -> None:
        """Show every job and every instance."""
        answer = self._status()
        self._report(answer.text, lambda: output.status_table(answer.body, self._out))

    def watch(self) -> None:
        """Show the same and keep it up to date, across restarts of the service, until Ctrl-C."""
        last: dict[str, Any] | None = None
        with suppress(KeyboardInterrupt), _display(self._out) as show:
            for event in self._service.follow():
                if event.kind == "status":
                    last = event.body
                    if self._as_json:
                        _print(event.text)
                    else:
                        show(output.status_table(last, self._out))
                elif self._as_json:
                    self._message(_detail(event))
                else:
                    show(self._stale(last, _detail(event)))

    def history(self, job: str | None, outcome: str | None, before: int | None, limit: int) -> None:
        """Show runs, the latest first."""
        query = {"job": job, "outcome": outcome, "before": before, "limit": limit}
        answer = self._service.get("/api/cron/history", "runs", query)
        runs = answer.body["runs"]
        self._report(
            answer.text,
            lambda: (
                output.history_table(runs, answer.now, self._out)
                if runs
                else Text("There is no such run.")
            ),
        )
        if answer.body["next"] is not None:
            named = [] if job is None else [job]
            options = {"outcome": outcome, "before": answer.body["next"], "limit": limit}
            self._next_page("Earlier ones", "history", *named, **options)

    def log(
        self, job: str | None, outcome: str | None, before: int | None, run: int | None
    ) -> None:
        """Show what a run said: this one, or the last of those that the history would show."""
        if run is None:
            run = self._last_run(job, outcome, before)
        answer = self._service.get(f"/api/cron/runs/{run}/log", "lines")
        if job is not None and answer.body["run"]["job"] != job:
            raise RemoteError(
                f"Run {run} is one of {answer.body['run']['job']}, not of {job}.", Code.FAILED
            )
        self._report(answer.text, lambda: output.run_log(answer.body, answer.now))

    def _last_run(self, job: str | None, outcome: str | None, before: int | None) -> int:
        query = {"job": job, "outcome": outcome, "before": before, "limit": 100}
        runs = self._service.get("/api/cron/history", "runs", query).body["runs"]
        ran = (int(run["id"]) for run in runs if run["outcome"] != Outcome.SKIPPED)
        last = next(ran, None)
        if last is None:
            raise RemoteError("There is no such run.", Code.FAILED)
        return last

    def control(
        self,
        verb: str,
        job: str,
        *,
        by: str,
        reason: str | None = None,
        args: dict[str, Any] | None = None,
    ) -> None:
        """Run, pause, resume or cancel a job."""
        answer = self._control(verb, job, by, reason, args)
        fields = {"server": answer.body["server"], "by": by, "name": job}
        if answer.body["paused"] is not None:
            fields["by"] = answer.body["paused"]["by"]
        late = verb == "cancel" and answer.body.get("workEndedAt") is not None
        sentence = _CONTROL_MESSAGES["cancel late" if late else verb]
        self._report(answer.text, lambda: Text(visible(sentence.format(**fields))))

    def show_schedule(self, name: str) -> None:
        """Show when a job is due, and whether that was set at run time."""
        status = self._status()
        job = _find_job(status.body, name)
        if job is None:
            raise RemoteError(f"There is no job {name}.", Code.FAILED)
        self._report_schedule(to_json(job).decode(), job, status.now)

    def set_schedule(self, job: str, schedule: dict[str, object] | None, *, by: str) -> None:
        """Set a job's schedule (`ScheduleRequest`); None: reset it to what its code declares."""
        answer = self._service.send(
            "DELETE" if schedule is None else "PUT",
            f"/api/cron/jobs/{quote(job, safe='')}/schedule",
            "schedule",
            params={"by": by},
            json=schedule,
        )
        self._report_schedule(answer.text, answer.body, answer.now)

    def _report_schedule(self, json: str, job: dict[str, Any], now: datetime) -> None:
        self._report(json, lambda: Text(visible(output.schedule(job, now))))

    def forget(self, job: str, *, by: str) -> None:
        """Take a job off all lists; its history stays."""
        answer = self._control("forget", job, by, has="forgottenAt")
        who, at = answer.body["forgottenBy"], datetime.fromisoformat(answer.body["forgottenAt"])
        message = f"{job} is forgotten, by {who} at {exact(at)} UTC. Its runs: "
        self._report(answer.text, lambda: Text(visible(message) + self._command("history", job)))

    def run_and_wait(self, job: str, *, by: str, args: dict[str, Any] | None = None) -> Code:
        """Run a job now, or join its run under way; show its end, return the exit code."""
        return self._report_run(*self._wait(job, self._request_run(job, by, args)))

    def audit_now(self, *, by: str) -> Code:
        """Request an audit of the ledger, show what it finds, return the exit code."""
        return self.run_and_wait(AUDIT, by=by)

    def audit(self) -> Code:
        """Show what the last audit of the ledger found; return the exit code."""
        answer = self._service.get("/api/cron/history", "runs", {"job": AUDIT, "limit": 100})
        found = (run for run in answer.body["runs"] if run["outcome"] in _AUDIT_OUTCOMES)
        run = next(found, None)
        if run is None:
            raise RemoteError("The ledger was not audited yet: request it with --now.", Code.FAILED)
        return self._report_run(run, answer.now)

    def _status(self) -> Answer:
        return self._service.get("/api/cron/status", "jobs")

    def _control(  # noqa: PLR0913 - the parts of a request
        self,
        verb: str,
        job: str,
        by: str,
        reason: str | None = None,
        args: dict[str, Any] | None = None,
        *,
        has: str = "fence",
    ) -> Answer:
        return self._service.send(
            "POST",
            f"/api/cron/jobs/{quote(job, safe='')}/{verb}",
            has,
            params={"by": by, "reason": reason},
            json={"args": args} if args else None,
        )

    def _request_run(self, name: str, by: str, args: dict[str, Any] | None) -> int:
        """Request a run; return its fence, or that of the run that is already under way."""
        before = _find_job(self._status().body, name)
        fence = 0 if before is None else int(before["fence"])
        try:
            self._control("run", name, by, args=args)
        except RemoteError as error:
            # With other arguments the run under way is another one.
            if error.problem != "job-running" or before is None or args:
                raise
            self._message(f"{error} Waiting for that run{_expected_duration(before)}.")
            return fence + int(before["state"] != State.RUNNING)
        expected = _expected_duration(before)
        self._message(f"{name} is requested. Waiting for the end of its run{expected}.")
        return fence + 1

    def _wait(self, name: str, fence: int) -> tuple[dict[str, Any], datetime]:
        """Show a job's runs from this fence on; return the first conclusive one, and when.

        Raises:
            RemoteError: the job was paused or does not exist any more.
        """
        with _display(self._err, transient=True) as show:
            shown = ""
            for event in self._service.follow():
                line = Text(_detail(event), style="red")
                if event.kind == "status":
                    job = _find_job(event.body, name)
                    if job is None:
                        raise RemoteError(f"There is no job {name} any more.", Code.FAILED)
                    line = output.job_line(job, event.body["now"], self._err)
                    if job["state"] != State.RUNNING:
                        with suppress(RemoteError):  # as the stream reports it
                            ended = self._ended(name, fence)
                            if ended is not None:
                                return ended
                    if job["state"] == State.PAUSED:
                        raise RemoteError(
                            f"Job {name} was paused by {job['paused']['by']} before it had run.",
                            Code.FAILED,
                        )
                    state = f"{job['state']} {job['server']} {_tenths(job['progress'])}"
                else:
                    state = event.kind
                # On a terminal the line is updated; elsewhere only a new state or tenth adds one.
                if self._err.is_terminal or state != shown:
                    show(line)
                shown = state
        raise AssertionError("the events do not end")

    def _ended(self, name: str, fence: int) -> tuple[dict[str, Any], datetime] | None:
        answer = self._service.get("/api/cron/history", "runs", {"job": name, "limit": 20})
        ended = (
            (run, answer.now)
            for run in reversed(answer.body["runs"])
            if (run["fence"] or 0) >= fence and run["outcome"] in _CONCLUSIVE
        )
        return next(ended, None)

    def _report_run(self, run: dict[str, Any], now: datetime) -> Code:
        def render() -> RenderableType:
            line = output.run_line(run, now)
            return Group(line, Text(visible(run["result"]))) if run["result"] else line

        self._report(to_json(run).decode(), render)
        return Code.DONE if run["outcome"] == Outcome.SUCCEEDED else Code.FAILED

    # -- balances ------------------------------------------------------------------------------

    def balance(self, user: int, entries: int | None) -> None:
        """Show a user's balance and latest entries; as JSON those only on request."""
        account = self._service.get(f"/api/users/{user}", "balance")
        if self._as_json and entries is None:
            _print(account.text)
            return
        shown = ENTRIES_SHOWN if entries is None else entries
        version = account.body["version"]
        page = self._service.get(
            f"/api/users/{user}/entries",
            "entries",
            {"after": max(0, version - shown), "limit": shown},
        )
        latest = page.body["entries"][::-1]

        def render() -> RenderableType:
            body = account.body
            line = Text(f"User {body['userId']} has {body['balance']} at version {version}.")
            if not latest:
                return line
            return Group(line, Text(), output.entries_table(latest, page.now, self._out))

        self._report(page.text, render)

    def daily_balances(self, user: int, before: str | None, limit: int) -> None:
        """Show a user's past balances, the latest day first."""
        query = {"before": before, "limit": limit}
        answer = self._service.get(f"/api/users/{user}/daily-balances", "dailyBalances", query)
        days = answer.body["dailyBalances"]
        self._report(
            answer.text,
            lambda: (
                output.daily_balances_table(days, self._out)
                if days
                else Text("There are no such daily balances.")
            ),
        )
        if answer.body["next"] is not None:
            options = {"before": answer.body["next"], "limit": limit}
            self._next_page("Earlier ones", "daily-balances", str(user), **options)

    def change(self, user: int, amount: int, key: str | None, patience_seconds: float) -> None:
        """Change a balance once, however often the change must be sent."""
        key = str(uuid.uuid4()) if key is None else key
        if not _KEY.fullmatch(key):
            raise RemoteError(
                f"The key {key!r} can't be sent: 1 to 255 visible ASCII characters can.", Code.WRONG
            )
        answer = self._send_until_known(user, amount, key, patience_seconds)

        def render() -> RenderableType:
            body, change = answer.body, answer.body["change"]
            at = exact(datetime.fromisoformat(change["at"]))
            before = " This key's change was made before." if answer.replayed else ""
            return Text(
                f"User {body['userId']} has {body['balance']} after {change['amount']:+d} "
                f"(version {body['version']}, {at} UTC).{before}"
            )

        self._report(answer.text, render)

    def users(self, after: int, limit: int) -> None:
        """Show users by id."""
        answer = self._service.get("/api/users", "users", {"after": after, "limit": limit})
        accounts = answer.body["users"]
        self._report(answer.text, lambda: output.users_table(accounts, self._out))
        if answer.body["next"] is not None:
            self._next_page("More", "users", after=answer.body["next"], limit=limit)

    def _send_until_known(
        self, user: int, amount: int, key: str, patience_seconds: float
    ) -> Answer:
        """Send a change until its outcome is known, or patience ends."""
        deadline = time.monotonic() + patience_seconds
        unknown = reported = False
        while True:
            try:
                return self._service.send(
                    "POST",
                    "/api/balance",
                    "change",
                    json={"userId": user, "amount": amount},
                    headers={"Idempotency-Key": key},
                )
            except RemoteError as error:
                unknown = unknown or error.code is Code.UNKNOWN
                # Without any answer there is nothing to retry, unless the change may be made.
                if error.code not in {Code.UNKNOWN, Code.UNAVAILABLE} or not (
                    unknown or error.answer
                ):
                    raise
                if time.monotonic() + RETRY_SECONDS > deadline:
                    if not unknown:
                        raise
                    raise RemoteError(
                        f"{error} It is not known whether the change was made. Send it again with "
                        "its key, and it is made once: "
                        + self._command("change", user, amount, key=key),
                        Code.UNKNOWN,
                        answer=error.answer,
                    ) from None
                if not reported:
                    self._message(f"{error} Sending it again with the same key.")
                    reported = True
            time.sleep(RETRY_SECONDS)

    # -- reporting -----------------------------------------------------------------------------

    def _report(self, json: str, render: Callable[[], RenderableType]) -> None:
        if self._as_json:
            _print(json)
        else:
            shown = render()
            self._out.print(shown, soft_wrap=isinstance(shown, Text))

    def _message(self, sentence: str) -> None:
        self._err.print(Text(visible(sentence)), soft_wrap=True)

    def _next_page(self, what: str, *arguments: str, **options: str | int | None) -> None:
        """Print the command that shows the page after this one."""
        if not self._as_json:
            self._message(f"{what}: {self._command(*arguments, **options)}")

    def _command(self, *arguments: str | int, **options: str | int | None) -> str:
        """Return a command for the same service."""
        given = (f"--{name}={value}" for name, value in options.items() if value is not None)
        return shlex.join(["balance-app", *map(str, arguments), *given, *self._reached_by])

    def _stale(self, status: dict[str, Any] | None, message: str) -> RenderableType:
        """Return the last known table with a message why it is old."""
        sentence = output.text(message, self._out, "red")
        if status is None or not self._out.is_terminal:
            return sentence
        return Group(output.status_table(status, self._out), Text(), sentence)


def job_names(url: str) -> list[tuple[str, str]]:
    """Return the jobs of a service, each with what it does; the time limit is short."""
    status = Service(url).get("/api/cron/status", "jobs", seconds=COMPLETION_SECONDS)
    return [
        (visible(job["name"]), shorten(visible(job["description"]), 60, placeholder=" ..."))
        for job in status.body["jobs"]
    ]


@contextmanager
def _display(
    console: Console, *, transient: bool = False
) -> Iterator[Callable[[RenderableType], None]]:
    """Yield a function that prints, on a terminal in the place of what it printed before."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield console.print
        return
    with Live(console=console, auto_refresh=False, transient=transient) as live:
        yield lambda shown: live.update(shown, refresh=True)


def _find_job(status: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a job of `/api/cron/status`."""
    return next((job for job in status["jobs"] if job["name"] == name), None)


def _expected_duration(job: dict[str, Any] | None) -> str:
    """Return how long a run of a job may take, as far as is known."""
    last = None if job is None else job["lastRun"]
    if last is None:
        return ", which is the first: how long it takes is not known"
    return f"; the last one took {duration(last['seconds'])}"


def _tenths(progress: dict[str, Any] | None) -> int | None:
    """Return how many tenths of its work a run has done, if it reports that."""
    if progress is None or not progress["total"]:
        return None
    return int(10 * progress["done"] / progress["total"])


def _print(json: str) -> None:
    print(json, flush=True)  # noqa: T201 - rich would break its lines


def _detail(event: Event) -> str:
    return visible(str(event.body.get("detail", "")))
