"""What the commands for jobs do: they send requests, wait, and report."""

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
from balance_app.cli.credentials import Credential
from balance_app.cli.errors import Code, RemoteError
from balance_app.cli.events import Event, follow
from balance_app.cli.session import Session
from balance_app.client.answers import Received
from balance_app.client.transport import Call
from balance_app.formatting import duration, exact, visible
from balance_app.states import Outcome, State

COMPLETION_SECONDS: Final = 0.7
_EXIT_CODES: Final = {"amber": Code.RECOVERED, "red": Code.NEEDS_A_HAND}
_RECOVERED: Final = "recovered"

# After any other outcome another run goes on with the tick.
_CONCLUSIVE: Final = {Outcome.SUCCEEDED, Outcome.FAILED, Outcome.TIMED_OUT, Outcome.CANCELLED}
_CONTROL_MESSAGES: Final = {
    "run": "Queued {name}. It starts within 2 seconds.",
    "pause": "{name} is paused by {by}.",
    "resume": "Resumed {name}.",
    "cancel": "Cancelling {name} on {server} (by {by}). It stops within a few seconds.",
    "cancel late": (
        "Nothing was cancelled: {name} on {server} had already finished its work. The run has "
        "succeeded, and ends now."
    ),
}


class JobSession(Session):
    """The use of a service's jobs."""

    def status(self, search: str | None = None, *, attention: bool = False) -> int:
        """Show the verdict, every job and every instance; return the exit code.

        Args:
            search: only jobs whose name contains this.
            attention: only jobs that a cause of the verdict is about.
        """
        verdict = self._verdict()
        if verdict is not None and not self._as_json:
            for line in output.verdict_lines(verdict, self._command, self._out):
                self._out.print(line)
        try:
            answer = self.read_status()
        except RemoteError as error:
            if error.code is not Code.UNAVAILABLE or verdict is None or verdict["level"] != "red":
                raise
            if self._as_json and error.answer is not None:
                output.print_json(error.answer)
            self._message(str(error))
            return Code.NEEDS_A_HAND  # the verdict says so, without the database, too
        if search is not None or attention:
            causes = [] if verdict is None else verdict["causes"]
            needing = {each["subject"] for each in causes if each["level"] == "red"}
            answer.body["jobs"] = [
                job
                for job in answer.body["jobs"]
                if (search or "") in job["name"] and (not attention or job["name"] in needing)
            ]
        text = to_json(answer.body).decode() if search is not None or attention else answer.text
        self._report(text, lambda: output.status_table(answer.body, self._out))
        return Code.DONE if verdict is None else _EXIT_CODES.get(verdict["level"], Code.DONE)

    def _verdict(self) -> dict[str, Any] | None:
        """Return the verdict; None: the release before has none."""
        try:
            return self._get("/api/verdict", "sentence").body
        except RemoteError as error:
            if error.problem == "not-found":
                return None
            raise

    def dismiss(self, server: str, *, by: str) -> None:
        """Dismiss the instances of a name that are gone, or what has recovered."""
        if server == _RECOVERED:
            answer = self._send("POST", "/api/verdict/dismiss", "dismissed", {"by": by}, None)
            self._report(answer.text, lambda: Text("Dismissed what has recovered."))
            return
        gone = [
            each
            for each in self.read_status().body["instances"]
            if each["server"] == server and not each["live"]
        ]
        if not gone:
            raise RemoteError(f"No instance {server} is gone.", Code.FAILED)
        for each in gone:
            path = f"/api/cron/instances/{each['id']}/dismiss"
            answer = self._send("POST", path, "dismissed", {"by": by}, None)
            self._report(answer.text, lambda: Text(visible(f"Dismissed {server}.")))

    def watch(self) -> None:
        """Show the same and keep it up to date, across restarts of the service, until Ctrl-C."""
        last: dict[str, Any] | None = None
        with suppress(KeyboardInterrupt), _display(self._out) as show:
            for event in self._each(follow(self._service.transport)):
                if event.kind == "status":
                    last = event.body
                    if self._as_json:
                        output.print_json(event.text)
                    else:
                        show(output.status_table(last, self._out))
                elif self._as_json:
                    self._message(_detail(event))
                else:
                    show(self._stale(last, _detail(event)))

    def history(self, job: str | None, outcome: str | None, before: int | None, limit: int) -> None:
        """Show runs, the latest first."""
        query = {"job": job, "outcome": outcome, "before": before, "limit": limit}
        answer = self._get("/api/cron/history", "runs", **query)
        runs = answer.body["runs"]
        self._report(
            answer.text,
            lambda: (
                output.history_table(runs, answer.now, self._out)
                if runs
                else Text("No runs match.")
            ),
        )
        if answer.body["next"] is not None:
            named = [] if job is None else [job]
            options = {"outcome": outcome, "before": answer.body["next"], "limit": limit}
            self._next_page("More", "history", *named, **options)

    def log(
        self, job: str | None, outcome: str | None, before: int | None, run: int | None
    ) -> None:
        """Show what a run said: this one, or the last of those that the history would show."""
        if run is None:
            run = self._last_run(job, outcome, before)
        answer = self._get(f"/api/cron/runs/{run}/log", "lines")
        if job is not None and answer.body["run"]["job"] != job:
            raise RemoteError(
                f"Run {run} is one of {answer.body['run']['job']}, not of {job}.", Code.FAILED
            )
        self._report(answer.text, lambda: output.run_log(answer.body, answer.now))

    def _last_run(self, job: str | None, outcome: str | None, before: int | None) -> int:
        query = {"job": job, "outcome": outcome, "before": before, "limit": 100}
        runs = self._get("/api/cron/history", "runs", **query).body["runs"]
        ran = (int(run["id"]) for run in runs if run["outcome"] != Outcome.SKIPPED)
        last = next(ran, None)
        if last is None:
            raise RemoteError("No runs match.", Code.FAILED)
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
        # The first request is kept; with a key its name counts.
        if verb == "pause" and answer.body["paused"] is not None:
            fields["by"] = answer.body["paused"]["by"]
        elif verb == "cancel":
            fields["by"] = answer.body["cancelRequestedBy"] or by
        late = verb == "cancel" and answer.body.get("workEndedAt") is not None
        sentence = _CONTROL_MESSAGES["cancel late" if late else verb]
        self._report(answer.text, lambda: Text(visible(sentence.format(**fields))))

    def show_schedule(self, name: str) -> None:
        """Show when a job is due, and whether that was set at run time."""
        status = self.read_status()
        job = _find_job(status.body, name)
        if job is None:
            raise RemoteError(f"There is no job {name}.", Code.FAILED)
        self._report_schedule(to_json(job).decode(), job, status.now)

    def set_schedule(self, job: str, schedule: dict[str, object] | None, *, by: str) -> None:
        """Set a job's schedule (`ScheduleRequest`); None: reset it to what its code declares."""
        answer = self._send(
            "DELETE" if schedule is None else "PUT",
            f"/api/cron/jobs/{quote(job, safe='')}/schedule",
            "schedule",
            {"by": by},
            schedule,
        )
        self._report_schedule(answer.text, answer.body, answer.now)

    def _report_schedule(self, json: str, job: dict[str, Any], now: datetime) -> None:
        self._report(json, lambda: Text(visible(output.schedule(job, now))))

    def forget(self, job: str, *, by: str) -> None:
        """Take a job off all lists; its history stays."""
        answer = self._control("forget", job, by, has="forgottenAt")
        who, at = answer.body["forgottenBy"], datetime.fromisoformat(answer.body["forgottenAt"])
        message = f"{job} was forgotten by {who} at {exact(at)} UTC. Its runs: "
        self._report(answer.text, lambda: Text(visible(message) + self._command("history", job)))

    def run_and_wait(self, job: str, *, by: str, args: dict[str, Any] | None = None) -> Code:
        """Run a job now, or join its run under way; show its end, return the exit code."""
        return self._report_run(*self._wait(job, self._request_run(job, by, args)))

    def read_status(self) -> Received:
        """Return what every job is doing."""
        return self._get("/api/cron/status", "jobs")

    def _control(  # noqa: PLR0913 - the parts of a request
        self,
        verb: str,
        job: str,
        by: str,
        reason: str | None = None,
        args: dict[str, Any] | None = None,
        *,
        has: str = "fence",
    ) -> Received:
        return self._send(
            "POST",
            f"/api/cron/jobs/{quote(job, safe='')}/{verb}",
            has,
            {"by": by, "reason": reason},
            {"args": args} if args else None,
        )

    def _send(
        self,
        method: str,
        path: str,
        has: str,
        params: dict[str, str | int | None],
        json: object,
    ) -> Received:
        return self._run(self._service.transport.send(Call(method, path, has, params, json)))

    def _request_run(self, name: str, by: str, args: dict[str, Any] | None) -> int:
        """Request a run; return its fence, or that of the run that is already under way."""
        before = _find_job(self.read_status().body, name)
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
        self._message(f"Queued {name}. Waiting for the run to end{expected}.")
        return fence + 1

    def _wait(self, name: str, fence: int) -> tuple[dict[str, Any], datetime]:
        """Show a job's runs from this fence on; return the first conclusive one, and when.

        Raises:
            RemoteError: the job was paused or does not exist any more.
        """
        with _display(self._err, transient=True) as show:
            shown = ""
            for event in self._each(follow(self._service.transport)):
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
                            f"{name} was paused by {job['paused']['by']} before it had run.",
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
        answer = self._get("/api/cron/history", "runs", job=name, limit=20)
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

    def _stale(self, status: dict[str, Any] | None, message: str) -> RenderableType:
        """Return the last known table with a message why it is old."""
        sentence = output.text(message, self._out, "red")
        if status is None or not self._out.is_terminal:
            return sentence
        return Group(output.status_table(status, self._out), Text(), sentence)


def job_names(url: str, credential: Credential) -> list[tuple[str, str]]:
    """Return the jobs of a service, each with what it does; the time limit is short."""
    with JobSession(
        url, credential=credential, as_json=True, timeout=COMPLETION_SECONDS
    ) as session:
        status = session.read_status()
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
        return " (the first run: how long it takes is not known)"
    return f"; the last one took {duration(last['seconds'])}"


def _tenths(progress: dict[str, Any] | None) -> int | None:
    """Return how many tenths of its work a run has done, if it reports that."""
    if progress is None or not progress["total"]:
        return None
    return int(10 * progress["done"] / progress["total"])


def _detail(event: Event) -> str:
    return visible(str(event.body.get("detail", "")))
