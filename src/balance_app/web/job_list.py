"""Which jobs a list shows, in which order: filters, their counts, and pages.

Jobs that need attention come first, so that nobody has to look for them. Everything that chooses a
list is in its address.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from pydantic_core import from_json

from balance_app.jobs.api.status import JobStatus
from balance_app.states import State
from balance_app.web.view_models import seconds_of

LONGEST_SEARCH: Final = 63
JOBS_ON_OVERVIEW: Final = 50
JOBS_ON_PAGE: Final = 100
SORTS: Final = ("", "name", "next", "last")
STATES: Final = {
    "": "All",
    "attention": "Needs attention",
    "running": "Running",
    "waiting": "Waiting",
    "paused": "Paused",
}
# Filters that have no chip: links of other pages and of people have them.
MORE_STATES: Final = ("overdue", "failed")


class JobFilter(NamedTuple):
    """A list of jobs as its address has it; `after` is the last job of the page before."""

    search: str = ""
    state: str = ""
    sort: str = ""
    after: str = ""
    limit: int = JOBS_ON_OVERVIEW

    @classmethod
    def of(cls, query: Mapping[str, str], limit: int) -> "JobFilter":
        """Read a filter from a query; what has no meaning there filters nothing."""
        state, sort = query.get("state", ""), query.get("sort", "")
        return cls(
            search=query.get("search", "").strip().lower()[:LONGEST_SEARCH],
            state=state if state in {*STATES, *MORE_STATES} else "",
            sort=sort if sort in SORTS else "",
            after=query.get("after", "")[:LONGEST_SEARCH],
            limit=limit,
        )

    def query(self, **changes: str) -> str:
        """Return the query of this list, or of one that differs, from its first page on."""
        given = {**self._replace(after="")._asdict(), **changes}
        del given["limit"]
        return urlencode({name: text for name, text in given.items() if text})


class Chip(NamedTuple):
    """A filter by state, and how many jobs pass it."""

    state: str
    label: str
    number: int
    query: str
    current: bool


class JobList(NamedTuple):
    """A page of jobs: their names, the cursor of the next page, and how many there are in all."""

    names: list[str]
    next: str | None
    found: int
    chips: tuple[Chip, ...]


class JobTimes(NamedTuple):
    """When a job runs next and when its last run ended, as seconds since 1970; 0: never."""

    next: float
    last: float


class JobSelection:
    """Selects jobs of a snapshot; what it reads of a job's JSON is kept until the job changes."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[JobStatus, JobTimes]] = {}

    def select(
        self, jobs: Mapping[str, JobStatus], of: JobFilter, attention: frozenset[str]
    ) -> JobList:
        """Return the jobs of a list; those in `attention` need it."""
        self._known = {name: known for name, known in self._known.items() if name in jobs}
        matching = [name for name in jobs if of.search in name] if of.search else list(jobs)
        counts: Counter[str] = Counter()
        found = []
        for name in matching:
            status = jobs[name]
            counts[status.summary.state] += 1
            if _passes(name, status, of.state, attention):
                found.append(name)
        counts[""] = len(matching)
        counts["attention"] = sum(name in attention for name in matching)
        key = self._key(jobs, of, attention, len(found))

        def place(name: str) -> tuple[Any, str]:
            return key(name), name

        found.sort(key=place)
        # The last job of the page before may no longer pass the filter: its place is where it was.
        begin = bisect_right(found, place(of.after), key=place) if of.after in jobs else 0
        names = found[begin : begin + of.limit]
        return JobList(
            names,
            names[-1] if len(found) > begin + of.limit else None,
            len(found),
            tuple(
                Chip(state, label, counts[state], of.query(state=state), state == of.state)
                for state, label in STATES.items()
            ),
        )

    def _key(
        self, jobs: Mapping[str, JobStatus], of: JobFilter, attention: frozenset[str], found: int
    ) -> Callable[[str], Any]:
        """Return the key of the order; jobs of one key are in the order of their names."""
        if of.sort == "name":
            return str
        if of.sort == "next":
            return lambda name: (
                jobs[name].summary.state == State.PAUSED,
                self._times(name, jobs[name]).next,
            )
        if of.sort == "last":
            return lambda name: -self._times(name, jobs[name]).last
        # With more than one page the running jobs come before those that wait.
        many = found > of.limit

        def rank(name: str) -> tuple[bool, bool, bool]:
            summary = jobs[name].summary
            return (
                name not in attention,
                name in attention and not summary.overdue,
                many and summary.state != State.RUNNING,
            )

        return rank

    def _times(self, name: str, status: JobStatus) -> JobTimes:
        known = self._known.get(name)
        if known is None or known[0].text != status.text:
            job: dict[str, Any] = from_json(status.text)
            last = job["lastRun"]
            ended = 0.0 if last is None else seconds_of(last["endedAt"])
            known = self._known[name] = status, JobTimes(seconds_of(job["readyAt"]), ended)
        return known[1]


def _passes(name: str, status: JobStatus, state: str, attention: frozenset[str]) -> bool:
    match state:
        case "":
            return True
        case "attention":
            return name in attention
        case "overdue":
            return status.summary.overdue
        case "failed":
            return status.summary.failed
        case _:
            return state == status.summary.state
