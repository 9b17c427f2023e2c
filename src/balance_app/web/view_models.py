"""View models: how numbers, moments, states and lost runs are shown."""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from balance_app import formatting
from balance_app.formatting import ago, duration
from balance_app.jobs.api.status import JobStatus
from balance_app.states import Reason, State, outcome_sign
from balance_app.web.queries import Runs

JOBS_OF_INSTANCE: Final = 5

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


def rate(value: float | None) -> str:
    """Return a rate per second: "0.4", "1 312"."""
    return number(value, digits=1 if value and value < 10 else 0)  # noqa: PLR2004


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
            return f"Requested to stop{by} at {exact(job['stopRequestedAt'])}."
        if job["cancelRequestedBy"] is not None:
            return f"Cancellation requested by {job['cancelRequestedBy']}."
        if job["workEndedAt"] is not None:
            return "Its work is done; it lasts until its minimum duration."
        return None if job["paused"] is None else f"Paused by {job['paused']['by']}."
    if job["waiting"]["reason"] == Reason.NOT_DUE:
        failures = job["failuresInARow"]
        return f"Its last {failures} runs failed." if failures > 1 else None
    return str(job["waiting"]["sentence"])


def share(job: Job) -> float | None:
    """Return how much of its work a run has done, in percent."""
    progress = job["progress"]
    if progress is None or not progress["total"]:
        return None
    return float(min(100, round(100 * progress["done"] / progress["total"], 1)))


class Tile(NamedTuple):
    """A number at the top of the page."""

    id: str
    value: str
    label: str
    tone: str
    href: str


def strip(counts: Mapping[str, int], cards: Iterable["Card"], failed: int | None) -> list[Tile]:
    """Return the most important numbers."""
    cards = list(cards)
    live = sum(card.live for card in cards)
    overdue = counts["overdue"]
    return [
        Tile(
            "instances",
            f"{live} / {len(cards)}",
            "instances live",
            "bad" if live < len(cards) or not live else "",
            "#servers",
        ),
        Tile("running", number(counts["running"]), "running", "", "#jobs"),
        Tile("waiting", number(counts["waiting"]), "waiting", "", "#jobs"),
        *(
            [Tile("paused", number(counts["paused"]), "paused", "", "#jobs")]
            if counts["paused"]
            else []
        ),
        Tile("overdue", number(overdue), "overdue", "warn" if overdue else "", "#jobs"),
        Tile(
            "failed",
            number(failed),
            "failed in 24 h",
            "bad" if failed else "",
            "#failures",
        ),
    ]


def title(counts: Mapping[str, int], cards: Iterable["Card"], failed: int | None) -> str:
    """Return the title of the browser's tab, the problems first."""
    cards = list(cards)
    lost = sum(not card.live for card in cards)
    problems = [
        f"{number} {label}"
        for number, label in (
            (lost, "lost" if lost == 1 else "instances lost"),
            (counts["overdue"], "overdue"),
            (failed or 0, "failed"),
        )
        if number
    ]
    return " · ".join([*problems, f"{counts['running']} running", "balance_app"])


class Loss(NamedTuple):
    """A lost run, and what became of its job."""

    job: str
    at: float
    became: str


class Card(NamedTuple):
    """A server by its name: its instances, the jobs they run, and the runs lost with them."""

    server: str
    live: bool
    # the last heartbeat
    seen: float | None
    up_since: float | None
    live_instances: int
    jobs: list[dict[str, Any]]
    more: int
    losses: list[Loss]


def cards_of(
    instances: Iterable[dict[str, Any]],
    lost: Runs,
    now: float,
    held: Mapping[str, list[str]],
    job_of: Callable[[str], Job | None],
) -> list[Card]:
    """Return a card for each server, by name.

    Args:
        instances: an `InstanceAnswer` each; one server may have several.
        lost: the runs that were lost lately.
        now: the moment of the snapshot.
        held: the names of the jobs that each instance runs, by its id.
        job_of: returns a job by its name.
    """
    by_server: dict[str, list[dict[str, Any]]] = {}
    for instance in instances:
        by_server.setdefault(instance["server"], []).append(instance)
    losses: dict[str, Runs] = {}
    for run in lost:
        losses.setdefault(run["server"], []).append(run)
    cards = []
    for server in sorted(by_server.keys() | losses.keys()):
        seen = by_server.get(server, [])
        live = [instance for instance in seen if instance["live"]]
        newest = min(live or seen, key=lambda instance: instance["seenSecondsAgo"], default=None)
        names = [name for instance in seen for name in held.get(instance["id"], ())]
        jobs = [job for name in names[:JOBS_OF_INSTANCE] if (job := job_of(name)) is not None]
        cards.append(
            Card(
                server=server,
                live=bool(live),
                seen=(
                    max(run["ended"] for run in losses[server])
                    if newest is None
                    # Rounded, so that one heartbeat is the same moment in every snapshot.
                    else tenth(now - newest["seenSecondsAgo"])
                ),
                up_since=(None if newest is None else tenth(seconds_of(newest["startedAt"]))),
                live_instances=len(live),
                jobs=[
                    {"name": job["name"], "since": seconds_of(job["startedAt"])}
                    for job in jobs
                    if job["startedAt"] is not None
                ],
                more=max(0, len(names) - JOBS_OF_INSTANCE),
                losses=[
                    Loss(run["job"], run["ended"], _became(run, job_of(run["job"])))
                    for run in losses.get(server, [])[:JOBS_OF_INSTANCE]
                ],
            )
        )
    return cards


def _became(run: dict[str, Any], job: Job | None) -> str:
    """Return what became of a job whose run was lost."""
    if job is None:
        return "does not exist any more"
    if job["state"] == State.RUNNING:
        return f"runs on {job['server']}"
    last = job["lastRun"]
    if last is not None and seconds_of(last["startedAt"]) > run["started"] + 0.001:
        return f"{outcome_sign(last['outcome']).label} on {last['server']}"
    if job["state"] == State.PAUSED:
        return "is paused"
    return "waits for an instance"


def last_run(job: Job | None) -> dict[str, Any] | None:
    """Return a job's last run, if there was one."""
    return None if job is None else job["lastRun"]


def jobs_of(jobs: Mapping[str, JobStatus], limit: int) -> list[str]:
    """Return the names of the jobs to show: all in their order, or those that matter most."""
    if len(jobs) <= limit:
        return list(jobs)
    ranks: list[list[str]] = [[], [], [], []]
    for name, status in jobs.items():
        summary = status.summary
        running = summary.state == State.RUNNING
        ranks[(summary.overdue, summary.failed, running, True).index(True)].append(name)
    return list(islice(chain.from_iterable(ranks), limit))
