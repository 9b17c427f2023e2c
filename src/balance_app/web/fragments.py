"""The page's fragments: HTML that all viewers share, rendered when its data changes.

A fragment is an element that changes separately: a tile, a server, a row of a job. Each has the
version of the page with which it changed last. A viewer is sent the fragments that changed after
the version it has, and for all others empty elements marked `data-same`, which its browser leaves
as they are.

No fragment depends on the present time. A clock is written as the moment from which it counts: the
server fills it in when it sends a page, and the browser keeps it up to date.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from typing import Any, Final, NamedTuple

from markupsafe import Markup
from pydantic_core import from_json

from balance_app.db.replication import Replication
from balance_app.jobs.api.status import StatusSnapshot
from balance_app.web import charts, view_models
from balance_app.web.queries import Activity
from balance_app.web.rendering import templates

JOBS_SHOWN: Final = 50
CARDS_SHOWN: Final = 60
BARS_SHOWN: Final = 30  # of a lane; earlier runs are in the job's history
AUDIT: Final = "audit-ledger"
COUNT: Final = "total-days"

_CLOCK: Final = re.compile(r'(data-(for|ago|in)="([0-9.]+)">)')
_SHIFT: Final = 'data-shift=""'
_GROWING: Final = re.compile(r'data-from="([0-9.-]+)"')


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


class Fragments:
    """All fragments of an instance's page; every change makes a new version."""

    def __init__(self) -> None:
        self._macros: Any = templates().get_template("fragments.html").module
        self._rendered: dict[str, Fragment] = {}
        self._sections = {
            "strip": Section("dl", "div"),
            "servers-list": Section("ul", "li"),
            "jobs-list": Section("tbody", "tr"),
            "lanes": Section("ol", "li"),
            "failures-list": Section("ul", "li"),
            "totals": Section("dl", "div"),
        }
        self._origin = 0.0
        self.version = 0
        self.title = "balance_app"
        # the jobs that have a row and a lane, and those that have a row for their own pages
        self.shown: list[str] = []
        self.jobs: dict[str, view_models.Job] = {}
        self.snapshot: StatusSnapshot | None = None
        # the primary and its standbys; None: not known
        self.replication: Replication | None = None

    def update(self, snapshot: StatusSnapshot, watched: Iterable[str]) -> None:
        """Set the snapshot, which jobs are shown, and what each of them does."""
        self.snapshot = snapshot
        self.shown = view_models.jobs_of(snapshot.jobs, JOBS_SHOWN)
        self.jobs = {
            name: _job(snapshot, name)
            for name in dict.fromkeys([*self.shown, *watched])
            if name in snapshot.jobs
        }

    def render(self, activity: Activity | None) -> None:
        """Render what has changed since the last time."""
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - `update` came before
        now = snapshot.now.timestamp()
        if now - self._origin > 2 * charts.LANE_SECONDS:
            self._origin = now - charts.LANE_SECONDS
        version = self.version + 1
        rows = {f"job-{name}": self._row(job, activity) for name, job in self.jobs.items()}
        kept = set(rows)
        changed = sum([self._store(row, version) for row in rows.values()])
        for name, drafts in self._drafts(snapshot, activity, now).items():
            ids = tuple(draft.id for draft in drafts)
            changed += sum([self._store(draft, version) for draft in drafts])
            kept.update(ids)
            if ids != self._sections[name].ids:
                self._sections[name] = self._sections[name]._replace(ids=ids, version=version)
                changed += 1
        if len(self._rendered) > len(kept):
            self._rendered = {
                id_: fragment for id_, fragment in self._rendered.items() if id_ in kept
            }
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

    def _drafts(
        self, snapshot: StatusSnapshot, activity: Activity | None, now: float
    ) -> dict[str, list[Draft]]:
        macros = self._macros
        cards = self._cards(snapshot, activity, now)
        failed = None if activity is None else activity.failed
        failures = [] if activity is None else activity.failures
        self.title = view_models.title(snapshot.counts, cards, failed)
        return {
            "strip": [
                Draft(f"tile-{tile.id}", tile, partial(macros.tile, tile))
                for tile in view_models.strip(snapshot.counts, cards, failed)
            ],
            "servers-list": [
                Draft(f"server-{card.server}", card, partial(macros.card, card)) for card in cards
            ]
            or [self._nothing("no-servers")],
            "jobs-list": [self._row(self.jobs[name], activity) for name in self.shown]
            or [self._nothing("no-jobs")],
            "lanes": [self._lane(name, activity, now) for name in self.shown],
            "failures-list": [
                Draft(f"failure-{run['id']}", None, partial(macros.failure, run))
                for run in failures
            ]
            or [self._nothing("no-failures")],
            "totals": self._totals(activity),
        }

    def _nothing(self, id_: str) -> Draft:
        return Draft(id_, None, partial(self._macros.nothing, id_))

    def _cards(
        self, snapshot: StatusSnapshot, activity: Activity | None, now: float
    ) -> list[view_models.Card]:
        held: dict[str, list[str]] = {}
        for name, status in snapshot.jobs.items():
            if status.summary.holder is not None:
                held.setdefault(status.summary.holder, []).append(name)
        lost = [] if activity is None else activity.lost
        return view_models.cards_of(snapshot.instances, lost, now, held, self._job)[:CARDS_SHOWN]

    def _row(self, job: view_models.Job, activity: Activity | None) -> Draft:
        runs = [] if activity is None else activity.runs.get(job["name"], [])
        ended = tuple((run["id"], run["outcome"]) for run in runs if run["outcome"] is not None)
        return Draft(
            f"job-{job['name']}",
            (job, ended),
            lambda: str(self._macros.job_row(job, charts.spark(runs), buttons=True)),
            lambda: str(self._macros.job_row(job, charts.spark(runs), buttons=False)),
        )

    def _lane(self, name: str, activity: Activity | None, now: float) -> Draft:
        runs = [] if activity is None else activity.runs.get(name, [])
        seen = [run for run in runs if charts.in_lane(run, now)][-BARS_SHOWN:]
        return Draft(
            f"lane-{name}",
            (self._origin, tuple((run["id"], run["ended"]) for run in seen)),
            lambda: str(self._macros.lane(name, charts.lane(seen, self._origin))),
        )

    def _totals(self, activity: Activity | None) -> list[Draft]:
        audit = view_models.last_run(self._job(AUDIT))
        counted = view_models.last_run(self._job(COUNT))
        totals = None if activity is None else activity.totals
        at = None if counted is None else counted["endedAt"]
        replication = self.replication
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

    def _job(self, name: str) -> view_models.Job | None:
        if name in self.jobs:
            return self.jobs[name]
        if self.snapshot is None or name not in self.snapshot.jobs:
            return None
        return _job(self.snapshot, name)

    # -- what is sent ------------------------------------------------------------------------

    def sections(self, now: float, *, buttons: bool) -> dict[str, Markup]:
        """Return each list as HTML, with its clocks filled in for `now`."""
        return {
            name: self._fill(self._list(name, None, buttons=buttons), now)
            for name in self._sections
        }

    def row(self, name: str, now: float, *, buttons: bool) -> Markup:
        """Return the row of a job that is shown or watched, with its clocks filled in."""
        return self._fill(self._rendered[f"job-{name}"].shown(buttons=buttons), now)

    def changes(self, since: int | None, job: str | None, *, buttons: bool) -> dict[str, str]:
        """Return the elements that changed after the version `since`, by their ids.

        None: all of them. With `job` the row of that job alone.
        """
        if job is not None:
            row = self._rendered.get(f"job-{job}")
            new = row is not None and (since is None or row.version > since)
            return {f"job-{job}": row.shown(buttons=buttons)} if row is not None and new else {}
        return {
            name: self._list(name, since, buttons=buttons)
            for name, section in self._sections.items()
            if since is None
            or section.version > since
            or any(self._rendered[id_].version > since for id_ in section.ids)
        }

    def _list(self, name: str, since: int | None, *, buttons: bool) -> str:
        section = self._sections[name]
        origin = f' data-origin="{self._origin:.1f}"' if name == "lanes" else ""
        fragments = "".join(
            self._rendered[id_].shown(buttons=buttons)
            if since is None or self._rendered[id_].version > since
            else f'<{section.fragment_tag} id="{escape(id_)}" data-same></{section.fragment_tag}>'
            for id_ in section.ids
        )
        return f'<{section.tag} id="{name}"{origin}>{fragments}</{section.tag}>'

    def _fill(self, html: str, now: float) -> Markup:
        shift = charts.percent(now - charts.LANE_SECONDS - self._origin)
        html = _CLOCK.sub(
            lambda clock: clock[1] + view_models.CLOCKS[clock[2]](now - float(clock[3])), html
        )
        html = html.replace(_SHIFT, f'{_SHIFT} x="{-shift}%"')
        # Fragments are escaped when they are rendered.
        return Markup(  # noqa: S704  # nosec
            _GROWING.sub(
                lambda bar: f'{bar[0]} width="{charts.growing(100 + shift - float(bar[1]))}%"', html
            )
        )


def _job(snapshot: StatusSnapshot, name: str) -> view_models.Job:
    """Return a job without the member that changes with time alone."""
    job: view_models.Job = from_json(snapshot.jobs[name].text)
    del job["elapsedSeconds"]
    return job
