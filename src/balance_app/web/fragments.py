"""The page's fragments: HTML that all viewers share, rendered when its data changes.

A fragment is an element that changes separately: a lane, a heartbeat, a row of a job. Each has the
version of the page with which it changed last. A viewer is sent the fragments that changed after
the version it has, and for all others empty elements marked `data-same`, which its browser leaves
as they are. Viewers may see different lists (`View`); what two lists have in common is rendered
once.

No fragment depends on the present time. A clock is written as the moment from which it counts: the
server fills it in when it sends a page, and the browser keeps it up to date.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from html import escape
from typing import Any, Final, NamedTuple
from zlib import crc32

from markupsafe import Markup
from pydantic_core import from_json

from balance_app.jobs.api.status import StatusSnapshot
from balance_app.jobs.api.verdict import Recent
from balance_app.states import Outcome
from balance_app.web import charts, view_models
from balance_app.web.job_list import JOBS_ON_PAGE, JobFilter, JobList, JobSelection
from balance_app.web.queries import AUDIT, COUNT, Activity
from balance_app.web.rendering import templates
from balance_app.web.verdict import NO_VERDICT, UNAVAILABLE, decide

LANES_SHOWN: Final = 60

_CLOCK: Final = re.compile(r'(data-(for|ago|in)="([0-9.]+)"[^>]*>)')
_GROWING: Final = re.compile(r'data-from="([0-9.-]+)"')


class View(NamedTuple):
    """What a viewer sees: the overview, a page of the list of jobs, or one job."""

    kind: str = "overview"
    jobs: JobFilter = JobFilter()
    # of the lanes: how long they are, and whether they are of jobs
    span: str = "30"
    by_job: bool = False
    job: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "View":
        """Read a view from the query of a page, or of its stream; unknown values are left out."""
        if query.get("page") == "jobs":
            return cls("jobs", JobFilter.of(query, JOBS_ON_PAGE))
        if query.get("job") and query.get("page") != "overview":
            return cls("job", job=query["job"])
        span = query.get("span", "30")
        return cls(span=span if span in charts.SPANS else "30", by_job=query.get("lanes") == "job")

    @property
    def seconds(self) -> float:
        """How long its lanes are; 0: it has none."""
        return charts.SPANS[self.span] if self.kind == "overview" else 0.0

    def query(self) -> str:
        """Return the query that the view's stream is asked for with."""
        if self.kind == "job":
            return f"job={self.job}"
        if self.kind == "jobs":
            more = self.jobs.query(after=self.jobs.after)
            return f"page=jobs{'&' if more else ''}{more}"
        return f"page=overview&span={self.span}&lanes={'job' if self.by_job else 'instance'}"


class Fragment(NamedTuple):
    """An element: the data it was made from, its HTML, the version that changed it.

    `quiet` is the HTML without buttons, for those who may not control jobs.
    """

    seed: object
    html: str
    quiet: str
    version: int

    def shown(self, *, buttons: bool) -> str:
        """Return the HTML for a viewer."""
        return self.html if buttons else self.quiet


class Section(NamedTuple):
    """A list of fragments in their order, and the version that changed the order."""

    # the elements: of the list, and of each fragment in it
    tag: str
    fragment_tag: str
    ids: tuple[str, ...] = ()
    version: int = 0


class Draft(NamedTuple):
    """A fragment that may have to be rendered; `quietly` without buttons, if it has some."""

    id: str
    seed: object
    render: Callable[[], str]
    quietly: Callable[[], str] | None = None


_TAGS: Final = {
    "verdict": ("div", "div"),
    "lanes": ("ol", "li"),
    "beats": ("ol", "li"),
    "resumed": ("div", "svg"),
    "changes": ("div", "figure"),
    "totals": ("dl", "div"),
    "chips": ("ul", "li"),
    "jobs-list": ("tbody", "tr"),
}


class Fragments:
    """All fragments of an instance's page; every change makes a new version."""

    def __init__(self) -> None:
        self._macros: Any = templates().get_template("fragments.html").module
        self._rendered: dict[str, Fragment] = {}
        self._sections: dict[View, dict[str, Section]] = {}
        self._lists: dict[View, JobList] = {}
        self._selection = JobSelection()
        # of the lanes of each length: the moment from which places are counted; and the row of each
        # run of an instance
        self._origins: dict[str, float] = {}
        self._rows: dict[str, dict[int, int]] = {}
        self.version = 0
        self.title = "balance_app"
        self.verdict = NO_VERDICT
        # the jobs that have a row
        self.jobs: dict[str, view_models.Job] = {}
        self.snapshot: StatusSnapshot | None = None
        # the last audit that came to a result; None: not known
        self._audit: dict[str, Any] | None = None
        # recent runs and totals; None: not read yet
        self.activity: Activity | None = None
        self.series = view_models.Series()

    @property
    def level(self) -> str:
        """The level of the verdict: green, amber or red; none: not known yet."""
        return self.verdict.level

    def update(self, snapshot: StatusSnapshot, views: Iterable[View]) -> None:
        """Set the snapshot, the views that are looked at, and so the jobs that are shown."""
        self.snapshot = snapshot
        self._decide(snapshot)
        attention = self.verdict.attention
        self._lists = {
            view: JobList([view.job] if view.job in snapshot.jobs else [], None, 1, ())
            if view.kind == "job"
            else self._selection.select(snapshot.jobs, view.jobs, attention)
            for view in views
        }
        shown = dict.fromkeys(name for found in self._lists.values() for name in found.names)
        self.jobs = {name: self._read(snapshot, name) for name in shown}

    def add(self, activity: Activity) -> None:
        """Set what was read after the snapshot."""
        self.activity = activity
        assert self.snapshot is not None  # noqa: S101 - `update` came before
        self._decide(self.snapshot)

    def _decide(self, snapshot: StatusSnapshot) -> None:
        recent = Recent() if self.activity is None else self.activity.recent
        self._audit = view_models.last_result(snapshot, self.activity, AUDIT, view_models.RESULTS)
        self.verdict = decide(snapshot, recent, self._audit)

    def job_list(self, view: View) -> JobList:
        """Return the list of jobs of a view that is looked at."""
        return self._lists[view]

    def render(self) -> None:
        """Render what has changed since the last time."""
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - `update` came before
        now = snapshot.now.timestamp()
        version = self.version + 1
        self.series.add(snapshot, self.activity)
        rows = {name: self._row(job) for name, job in self.jobs.items()}
        kept = {draft.id for draft in rows.values()}
        changed = sum([self._store(draft, version) for draft in rows.values()])
        sections: dict[View, dict[str, Section]] = {}
        for view in self._lists:
            known = self._sections.get(view, {})
            sections[view] = {}
            for name, drafts in self._drafts(view, now, rows).items():
                ids = tuple(draft.id for draft in drafts)
                changed += sum(
                    [self._store(draft, version) for draft in drafts if draft.id not in kept]
                )
                kept.update(ids)
                section = known.get(name, Section(*_TAGS[name]))
                if ids != section.ids:
                    section = section._replace(ids=ids, version=version)
                    changed += 1
                sections[view][name] = section
        self._sections = sections
        if len(self._rendered) > len(kept):
            self._rendered = {
                id_: fragment for id_, fragment in self._rendered.items() if id_ in kept
            }
        self.title = f"{self.verdict.title} · balance_app"
        self.version += bool(changed)

    def _store(self, draft: Draft, version: int) -> bool:
        current = self._rendered.get(draft.id)
        if current is not None and current.seed == draft.seed:
            return False
        html = str(draft.render())
        if current is not None and current.html == html:
            self._rendered[draft.id] = current._replace(seed=draft.seed)
            return False
        quiet = html if draft.quietly is None else str(draft.quietly())
        self._rendered[draft.id] = Fragment(draft.seed, html, quiet, version)
        return True

    def _drafts(self, view: View, now: float, rows: Mapping[str, Draft]) -> dict[str, list[Draft]]:
        if view.kind == "job":
            return {}
        found = self._lists[view]
        none = "no-jobs" if view.jobs.search or view.jobs.state else "none"
        shown = {
            "chips": [self._chip(view, chip) for chip in found.chips],
            "jobs-list": [rows[name] for name in found.names] or [self._nothing(none)],
        }
        if view.kind == "jobs":
            return shown
        return {
            "verdict": [self._verdict()],
            **self._fleet(view, now),
            "changes": [self._changes(now)],
            "totals": self._totals(),
            **shown,
        }

    def _nothing(self, id_: str) -> Draft:
        return Draft(id_, None, partial(self._macros.nothing, id_))

    def _verdict(self) -> Draft:
        verdict = self.verdict
        return Draft(
            "verdict-now",
            verdict,
            partial(self._macros.verdict, verdict, buttons=True),
            partial(self._macros.verdict, verdict, buttons=False),
        )

    def _chip(self, view: View, chip: Any) -> Draft:  # noqa: ANN401
        # Every list has its own: a chip keeps the list's search and order.
        id_ = f"chip-{chip.state or 'all'}-{crc32(view.query().encode()):x}"
        return Draft(id_, chip, partial(self._macros.chip, id_, chip))

    def _row(self, job: view_models.Job) -> Draft:
        name = job["name"]
        runs = [] if self.activity is None else self.activity.runs.get(name, [])
        seen = tuple((run["id"], run["outcome"]) for run in runs[-charts.SQUARES :])
        attention = "bad" if name in self.verdict.attention else ""

        def render(*, buttons: bool) -> str:
            return str(self._macros.job_row(job, charts.squares(runs), attention, buttons=buttons))

        return Draft(
            f"job-{name}",
            (job, seen, attention),
            partial(render, buttons=True),
            partial(render, buttons=False),
        )

    # -- the fleet -----------------------------------------------------------------------------

    def _fleet(self, view: View, now: float) -> dict[str, list[Draft]]:
        """Return the lanes, the heartbeats beside them, and the lines over them."""
        assert self.snapshot is not None  # noqa: S101 - `update` came before
        span, activity = view.seconds, self.activity
        if now - self._origins.get(view.span, 0.0) > 2 * span:
            self._origins[view.span] = now - span
        origin = self._origins[view.span]
        runs = [] if activity is None else activity.fleet
        runs = [run for run in runs if charts.in_lane(run, now, span)]
        kind = f"{view.span}-{'j' if view.by_job else 'i'}"
        prefix = f"lane-{kind}"
        lanes = (
            view_models.lanes_of_jobs(self.snapshot, self._lists[view].names, runs, prefix)
            if view.by_job
            else view_models.lanes_of_instances(self.snapshot, runs, now, prefix)
        )
        more, cut = len(lanes) - LANES_SHOWN, None if activity is None else activity.cut
        del lanes[LANES_SHOWN:]
        drafts: dict[str, list[Draft]] = {"lanes": [], "beats": []}
        middles: dict[str, float] = {}
        height = 0.0
        for lane in lanes:
            # The runs of a job never overlap.
            known = self._rows.get(lane.id, {})
            rows = {run["id"]: 0 for run in lane.runs}
            in_parts = charts.is_in_parts(lane.runs, span)
            if not view.by_job:
                rows = charts.rows_of(lane.runs, known, span)
                self._rows[lane.id] = {} if in_parts else rows
            high = charts.lane_rows(rows, lane.runs)
            middles[lane.name] = height + charts.ROW * high / 2
            height += charts.ROW * high + 1
            seed = (
                origin,
                lane.gone,
                lane.marks,
                lane.gaps,
                tuple(
                    (run["id"], run["ended"], run["outcome"], rows[run["id"]]) for run in lane.runs
                ),
                now // (span / charts.PARTS) if in_parts else None,
            )
            drafts["lanes"].append(
                Draft(lane.id, seed, partial(self._lane, lane, rows, origin, view, now))
            )
            beat = lane._replace(id=f"beat{lane.id[4:]}", runs=[], gaps=(), rows=high)
            drafts["beats"].append(
                Draft(
                    beat.id,
                    beat,
                    partial(self._macros.beat, beat, buttons=True),
                    partial(self._macros.beat, beat, buttons=False),
                )
            )
        shown = {lane.id for lane in lanes}
        self._rows = {
            id_: rows
            for id_, rows in self._rows.items()
            if id_ in shown or not id_.startswith(prefix)
        }
        found = tuple(
            charts.Handover(lost, middles[first], resumed, middles[second])
            for lost, first, resumed, second in view_models.handovers(runs)
            if not view.by_job and first in middles and second in middles and first != second
        )
        drafts["resumed"] = [
            Draft(
                f"resumed-{kind}",
                (origin, found, height),
                partial(charts.handovers, f"resumed-{kind}", found, origin, span, height),
            )
        ]
        if not lanes:
            drafts["lanes"] = [self._nothing("no-lanes")]
        elif more > 0 or cut is not None:
            note = partial(self._macros.lanes_note, f"more-{kind}", more, cut)
            drafts["lanes"].append(Draft(f"more-{kind}", (more, cut), note))
        return drafts

    def _lane(
        self,
        lane: view_models.Lane,
        rows: Mapping[int, int],
        origin: float,
        view: View,
        now: float,
    ) -> str:
        chart = charts.lane(
            lane.runs,
            rows,
            origin,
            view.seconds,
            by_job=view.by_job,
            now=now,
            marks=lane.marks,
            gaps=lane.gaps,
        )
        return str(self._macros.lane(lane, chart))

    # -- balances ------------------------------------------------------------------------------

    def _changes(self, now: float) -> Draft:
        shown = self.series.shown(now)
        return Draft("changes-chart", shown, partial(charts.changes, shown))

    def _totals(self) -> list[Draft]:
        assert self.snapshot is not None  # noqa: S101 - `update` came before
        activity = self.activity
        audit = self._audit
        counted = view_models.last_result(self.snapshot, activity, COUNT, (Outcome.SUCCEEDED,))
        totals = None if activity is None else activity.totals
        at = None if counted is None else counted["ended"]
        replication = None if activity is None else activity.replication
        servers = () if replication is None else replication.sentences()
        missing = None if replication is None else replication.warning()
        return [
            Draft("totals-numbers", (totals, at), partial(self._macros.totals, totals, at)),
            Draft("totals-audit", audit, partial(self._macros.audit, audit, AUDIT)),
            Draft(
                "totals-database",
                (servers, missing),
                partial(self._macros.database, servers, missing),
            ),
        ]

    def job(self, name: str) -> view_models.Job | None:
        """Return a job of the snapshot."""
        if name in self.jobs:
            return self.jobs[name]
        if self.snapshot is None or name not in self.snapshot.jobs:
            return None
        return self._read(self.snapshot, name)

    def _read(self, snapshot: StatusSnapshot, name: str) -> view_models.Job:
        """Return a job without the member that changes with time alone."""
        job: view_models.Job = from_json(snapshot.jobs[name].text)
        del job["elapsedSeconds"]
        return job

    # -- what is sent ------------------------------------------------------------------------

    def sections(self, view: View, now: float, *, buttons: bool) -> dict[str, Markup]:
        """Return each list of a view as HTML, with its clocks filled in for `now`."""
        return {
            name: self._fill(self._list(view, name, None, buttons=buttons), view, now)
            for name in self._sections[view]
        }

    def unavailable(self) -> Markup:
        """Return what stands in the place of the verdict while the database is unavailable."""
        html = self._macros.verdict(UNAVAILABLE, buttons=False)
        return Markup('<div id="verdict">{}</div>').format(Markup(html))  # noqa: S704  # nosec

    def row(self, name: str, now: float, *, buttons: bool) -> Markup:
        """Return the row of a job that is shown, with its clocks filled in."""
        return self._fill(self._rendered[f"job-{name}"].shown(buttons=buttons), View(), now)

    def changes(self, since: int | None, view: View, *, buttons: bool) -> dict[str, str]:
        """Return the elements that changed after the version `since`, by their ids.

        None: all of them. Of a job's own page its row alone.
        """
        if view.kind == "job":
            row = self._rendered.get(f"job-{view.job}")
            new = row is not None and (since is None or row.version > since)
            return (
                {f"job-{view.job}": row.shown(buttons=buttons)} if row is not None and new else {}
            )
        return {
            name: self._list(view, name, since, buttons=buttons)
            for name, section in self._sections.get(view, {}).items()
            if since is None
            or section.version > since
            or any(self._rendered[id_].version > since for id_ in section.ids)
        }

    def _list(self, view: View, name: str, since: int | None, *, buttons: bool) -> str:
        section = self._sections[view][name]
        more = ""
        if name == "lanes":
            more = f' data-origin="{self._origins[view.span]:.1f}" data-span="{view.seconds:.0f}"'
        fragments = "".join(
            self._rendered[id_].shown(buttons=buttons)
            if since is None or self._rendered[id_].version > since
            else f'<{section.fragment_tag} id="{escape(id_)}" data-same></{section.fragment_tag}>'
            for id_ in section.ids
        )
        return f'<{section.tag} id="{name}"{more}>{fragments}</{section.tag}>'

    def _fill(self, html: str, view: View, now: float) -> Markup:
        html = _CLOCK.sub(
            lambda clock: clock[1] + view_models.CLOCKS[clock[2]](now - float(clock[3])), html
        )
        if view.seconds:
            span = view.seconds
            shift = charts.percent(now - span - self._origins.get(view.span, now - span), span)
            mark = f'data-shift="{span:.0f}"'
            html = html.replace(mark, f'{mark} x="{-shift}%"')
            html = _GROWING.sub(
                lambda bar: f'{bar[0]} width="{charts.growing(100 + shift - float(bar[1]))}%"', html
            )
        # Fragments are escaped when they are rendered.
        return Markup(html)  # noqa: S704  # nosec
