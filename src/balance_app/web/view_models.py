"""View models: how numbers, moments, states, the verdict and the fleet are shown."""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from pydantic_core import from_json

from balance_app import formatting
from balance_app.formatting import ago, duration, rough
from balance_app.jobs.api.fleet import Outage
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.states import Outcome, Reason, State
from balance_app.web.queries import Activity, Runs

Job = dict[str, Any]


def due(seconds: float) -> str:
    """Return when something is due, "in 41 s", or how long it has been: "since 41 s"."""
    return f"in {duration(seconds)}" if seconds > 0 else f"since {duration(-seconds)}"


# The text of a clock, by the seconds since its moment. `static/app.js` has the same texts: it
# updates in the browser what the server has written.
CLOCKS: Final[dict[str, Callable[[float], str]]] = {
    "for": duration,
    "ago": ago,
    "in": lambda seconds: due(-seconds),
}


def number(value: float | None, digits: int = 0) -> str:
    """Return a number with its thousands separated: "12 000"."""
    if value is None:
        return "…"
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "\N{MINUS SIGN}")


def seconds_of(moment: float | str | datetime) -> float:
    """Return a moment as seconds since 1970."""
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return moment.timestamp() if isinstance(moment, datetime) else moment


def tenth(seconds: float) -> float:
    """Return a moment rounded down to a tenth of a second."""
    return math.floor(10 * seconds) / 10


def exact(moment: float | str | datetime) -> str:
    """Return a moment to the second, with its zone."""
    return f"{formatting.exact(datetime.fromtimestamp(seconds_of(moment), UTC))} UTC"


def clock_time(moment: float | str | datetime) -> str:
    """Return a moment's time of day, UTC."""
    return f"{datetime.fromtimestamp(seconds_of(moment), UTC):%H:%M:%S}"


def iso(moment: float | str | datetime) -> str:
    """Return a moment in ISO 8601."""
    return f"{datetime.fromtimestamp(seconds_of(moment), UTC):%Y-%m-%dT%H:%M:%SZ}"


def why(job: Job) -> str | None:
    """Return the sentence that explains a state, where the other columns do not."""
    if job["state"] == State.RUNNING:
        if job["stopRequestedAt"] is not None:
            by = f" by {job['cancelRequestedBy']}" if job["cancelRequestedBy"] is not None else ""
            return f"Stop requested{by} at {exact(job['stopRequestedAt'])}."
        if job["cancelRequestedBy"] is not None:
            return f"Cancellation requested by {job['cancelRequestedBy']}."
        return None if job["paused"] is None else f"Paused by {job['paused']['by']}."
    if job["waiting"]["reason"] == Reason.NOT_DUE:
        failures = job["failuresInARow"]
        return f"The last {failures} runs failed." if failures > 1 else None
    return str(job["waiting"]["sentence"])


def share(job: Job) -> float | None:
    """Return how much of its work a run has done, in percent; None also when all is done."""
    progress = job["progress"]
    if progress is None or not progress["total"] or job["holdingUntil"] or job["workEndedAt"]:
        return None
    return float(min(100, round(100 * progress["done"] / progress["total"], 1)))


def progress_of(job: Job) -> str:
    """Return how far a run is, in words."""
    if job["holdingUntil"] is not None:
        least = seconds_of(job["holdingUntil"]) - seconds_of(job["startedAt"])
        return f"Work done, holding to {(duration if least % 60 else rough)(least)}."
    if job["workEndedAt"] is not None:
        return "Work done."
    progress = job["progress"]
    if progress is None:
        return ""
    if progress["note"]:
        return str(progress["note"])
    total = f" of {number(progress['total'])}" if progress["total"] else ""
    return f"{number(progress['done'])}{total} done"


def is_now(job: Job) -> str:
    """Return what a job is, as words that a confirmation waits for."""
    words = [str(job["state"])]
    if job["paused"] is not None and job["state"] != State.PAUSED:
        words.append("paused")
    if job["paused"] is None:
        words.append("resumed")
    if job["state"] != State.RUNNING or job["cancelRequestedBy"] is not None:
        words.append("cancelled")
    return " ".join(words)


# -- the fleet -------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A place in a lane where its instance stopped responding."""

    at: float
    label: str


class Gap(NamedTuple):
    """A time in a lane without heartbeats, which its instance survived."""

    since: float
    until: float
    label: str


class Lane(NamedTuple):
    """A lane: an instance, or a job, with its runs."""

    id: str
    name: str
    href: str
    runs: Runs
    # of an instance: its last heartbeat, and whether it stopped responding
    seen: float | None = None
    gone: bool = False
    silent: bool = False
    # the instance to dismiss
    dismiss: str | None = None
    note: str = ""
    marks: tuple[Mark, ...] = ()
    gaps: tuple[Gap, ...] = ()
    rows: int = 1


def lanes_of_jobs(
    snapshot: StatusSnapshot, names: Iterable[str], runs: Runs, prefix: str
) -> list[Lane]:
    """Return a lane for each of these jobs."""
    by_job: dict[str, Runs] = {}
    for run in runs:
        by_job.setdefault(run["job"], []).append(run)
    outages = tuple(_outage(each) for each in snapshot.outages)
    return [
        Lane(f"{prefix}-{name}", name, f"/jobs/{name}", by_job.get(name, []), gaps=outages)
        for name in sorted(names)
        if name in snapshot.jobs
    ]


def lanes_of_instances(snapshot: StatusSnapshot, runs: Runs, now: float, prefix: str) -> list[Lane]:
    """Return a lane for each server, by name: a server that started again has one lane."""
    by_server: dict[str, Runs] = {}
    for run in runs:
        by_server.setdefault(run["server"], []).append(run)
    instances: dict[str, list[dict[str, Any]]] = {}
    for instance in snapshot.instances:
        instances.setdefault(instance["server"], []).append(instance)
    lanes = []
    for server, seen in sorted(instances.items()):
        href = f"/runs?{urlencode({'server': server})}"
        ran = by_server.get(server, [])
        live = [instance for instance in seen if instance["live"]]
        newest = min(live or seen, key=lambda instance: instance["seenSecondsAgo"])
        running = sum(instance["running"] for instance in seen)
        notes = [f"{running} running" if running else "idle"] if live else []
        if len(live) > 1:
            notes.append(f"{len(live)} instances use this name (SERVER_ID)")
        # Rounded, so that one heartbeat is the same moment in every snapshot.
        seen_at = tenth(now - newest["seenSecondsAgo"])
        gone = newest["state"] == "gone"
        lanes.append(
            Lane(
                f"{prefix}-{server}",
                server,
                href,
                ran,
                seen=seen_at,
                gone=gone,
                silent=newest["state"] == "silent",
                dismiss=newest["id"] if gone else None,
                note=", ".join(notes),
                marks=_deaths(server, ran, seen_at if gone else None),
                gaps=_gaps(newest, snapshot.outages),
            )
        )
    return lanes


def _outage(outage: Outage) -> Gap:
    since, until = outage.since.timestamp(), outage.until.timestamp()
    label = f"database unavailable from {clock_time(since)} to {clock_time(until)} UTC"
    return Gap(since, until, f"{label} ({duration(until - since)})")


def _gaps(instance: Mapping[str, Any], outages: Iterable[Outage]) -> tuple[Gap, ...]:
    """Return when an instance sent no heartbeat: in an outage of the database, or by itself."""
    gaps = []
    for silence in instance["silences"]:
        since, until = silence["from"], silence["until"]
        outage = next((each for each in outages if each.since < until and each.until > since), None)
        if outage is not None:
            gaps.append(_outage(outage))
            continue
        start, end = since.timestamp(), until.timestamp()
        label = f"{instance['server']} sent no heartbeat from {clock_time(start)} to "
        label += f"{clock_time(end)} UTC ({duration(end - start)})"
        gaps.append(Gap(start, end, label))
    return tuple(gaps)


def _deaths(server: str, runs: Runs, seen: float | None) -> tuple[Mark, ...]:
    """Return where an instance stopped responding, by the runs that it lost: one mark a moment.

    Of one that is gone, and was idle: where it was `seen` last.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        if run["outcome"] == Outcome.LOST:
            found.setdefault(int(run["ended"] // 10), []).append(run)
    marks = [
        Mark(
            max(run["ended"] for run in lost),
            f"{server} stopped responding before "
            f"{clock_time(max(run['ended'] for run in lost))} UTC; "
            f"lost: {', '.join(run['job'] for run in lost)}",
        )
        for lost in found.values()
    ]
    if seen is not None and all(mark.at < seen for mark in marks):
        marks.append(Mark(seen, f"{server} stopped responding after {clock_time(seen)} UTC"))
    return tuple(marks)


def handovers(runs: Runs) -> list[tuple[float, str, float, str]]:
    """Return each lost run's end and server, and those of the start that resumed it."""
    found = []
    last: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["id"]):
        before = last.get(run["job"])
        if before is not None and before["outcome"] == Outcome.LOST and run["due"] == before["due"]:
            found.append((before["ended"], before["server"], run["started"], run["server"]))
        last[run["job"]] = run
    return found


# -- balances --------------------------------------------------------------------------------

SERIES_SECONDS: Final = 180.0
BAR_SECONDS: Final = 4.0
LONGEST_GAP_SECONDS: Final = 15.0


class Bar(NamedTuple):
    """How many changes were accepted and refused from a moment on."""

    at: float
    accepted: int
    refused: int


class Changes(NamedTuple):
    """The changes of the last minutes, and a balance as places in them."""

    seconds: float
    bars: tuple[Bar, ...]
    user: int | None
    line: tuple[tuple[float, int], ...]


class Series:
    """What the last snapshots said of changes: their counts, and the balances that changed."""

    def __init__(self) -> None:
        # when and how the counters of each instance were last seen, by its id
        self._totals: dict[str, tuple[float, int, int]] = {}
        self._bars: dict[int, list[int]] = {}
        # by user: moments and balances; and how often each changed
        self._balances: dict[int, list[tuple[float, int]]] = {}
        self._versions: dict[int, list[tuple[float, int]]] = {}
        # the status that was added last
        self._added: float | None = None
        # the last activity that is in it
        self._noted = 0.0

    def add(self, snapshot: StatusSnapshot, activity: Activity | None) -> None:
        """Note the counters of all instances, and the accounts that changed last."""
        now = snapshot.now.timestamp()
        last, self._added = self._added, now
        for instance in snapshot.instances:
            # What an instance had counted when it is first seen is of before, unless it is new.
            is_new = (
                last is not None
                and now - last <= LONGEST_GAP_SECONDS
                and seconds_of(instance["startedAt"]) > last
            )
            total = (instance["accepted"], instance["refused"])
            self._count(instance["id"], total, now, (0, 0) if is_new else total)
        if activity is not None and activity.now > self._noted:
            self._noted = activity.now
            for user, version, balance in activity.changed:
                self._versions.setdefault(user, []).append((activity.now, version))
                line = self._balances.setdefault(user, [])
                if not line or line[-1][1] != balance:
                    line.append((activity.now, balance))
        self._forget(now)

    def _count(self, name: str, total: tuple[int, int], at: float, first: tuple[int, int]) -> None:
        """Add what has been counted since the last time; a counter that fell began anew.

        After a while without viewers nobody knows when that was: it is not drawn.
        """
        seen, *before = self._totals.get(name, (at, *first))
        if at - seen > LONGEST_GAP_SECONDS:
            before = [*total]
        bar = self._bars.setdefault(int(at // BAR_SECONDS), [0, 0])
        for kind in (0, 1):
            bar[kind] += max(0, total[kind] - before[kind])
        self._totals[name] = (at, *total)

    def _forget(self, now: float) -> None:
        oldest = now - SERIES_SECONDS
        self._totals = {name: seen for name, seen in self._totals.items() if seen[0] >= oldest}
        for place in [each for each in self._bars if each < oldest // BAR_SECONDS]:
            del self._bars[place]
        for user, versions in list(self._versions.items()):
            while len(versions) > 1 and versions[1][0] < oldest:
                versions.pop(0)
            line = self._balances[user]
            while len(line) > 1 and line[1][0] < oldest:
                line.pop(0)
            if versions[-1][0] < oldest:
                del self._versions[user], self._balances[user]

    def shown(self, now: float) -> Changes:
        """Return what is drawn; it changes once in the length of a bar."""
        last = int(now // BAR_SECONDS)
        count = int(SERIES_SECONDS / BAR_SECONDS)
        bars = tuple(
            Bar(place * BAR_SECONDS, *self._bars.get(place, (0, 0)))
            for place in range(last - count + 1, last + 1)
        )
        first = (last - count + 1) * BAR_SECONDS
        user = max(
            (user for user, versions in self._versions.items() if _rise(versions)),
            key=lambda user: _rise(self._versions[user]),
            default=None,
        )
        line = (
            ()
            if user is None
            else tuple(
                (max(0.0, round((moment - first) / SERIES_SECONDS, 3)), balance)
                for moment, balance in self._balances[user]
            )
        )
        return Changes(SERIES_SECONDS, bars, user, line)


def _rise(versions: list[tuple[float, int]]) -> int:
    return versions[-1][1] - versions[0][1]


RESULTS: Final = (Outcome.SUCCEEDED, Outcome.FAILED)


def last_result(
    snapshot: StatusSnapshot, activity: Activity | None, name: str, outcomes: tuple[str, ...]
) -> dict[str, Any] | None:
    """Return the last run of a job that had one of these outcomes, by its history if need be."""
    status = snapshot.jobs.get(name)
    last = None if status is None else from_json(status.text)["lastRun"]
    if last is not None and last["outcome"] in outcomes:
        return {**last, "ended": seconds_of(last["endedAt"])}
    runs = [] if activity is None else activity.concluded
    found = [run for run in runs if run["job"] == name and run["outcome"] in outcomes]
    return found[-1] if found else None
