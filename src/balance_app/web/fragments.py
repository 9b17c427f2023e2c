"""The picture: what all who watch see, made of items that are rendered when they change.

An item is an element that can change by itself: a tile, a server, a row of a job. Each remembers
with which version of the picture it changed last. What a viewer is sent depends only on the version
it has: items that changed after it come whole, all others as empty elements marked `data-same`,
which its browser leaves as they are.

No item says anything that changes with time alone. Clocks are written as the moment that they count
from: a page is sent with the clocks filled in, and a browser lets them tick by itself.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from typing import Any, Final, NamedTuple

from markupsafe import Markup
from pydantic_core import from_json

from balance_app.jobs.api.status import Snapshot
from balance_app.web import charts as bars
from balance_app.web import view_models as views
from balance_app.web.queries import Around
from balance_app.web.rendering import templates

JOBS_SHOWN: Final = 50
CARDS_SHOWN: Final = 60
BARS_SHOWN: Final = 30  # of a lane; earlier runs are in the job's history
AUDIT: Final = "audit-ledger"
COUNT: Final = "total-days"

_CLOCK: Final = re.compile(r'(data-(for|ago|in)="([0-9.]+)">)')
_SHIFT: Final = 'data-shift=""'
_GROWING: Final = re.compile(r'data-from="([0-9.-]+)"')


class Item(NamedTuple):
    """An element: what it was made from, its HTML, the version that changed it."""

    seed: object
    html: str
    version: int


class Section(NamedTuple):
    """A list of items in their order, and the version that changed the order."""

    # the elements: of the list, and of each item in it
    tag: str
    item_tag: str
    ids: tuple[str, ...] = ()
    version: int = 0


class Draft(NamedTuple):
    """An item that may have to be rendered."""

    id: str
    seed: object
    render: Callable[[], str]


class Picture:
    """What an instance has to show; a new version for every change."""

    def __init__(self) -> None:
        self._pieces: Any = templates().get_template("pieces.html").module
        self._items: dict[str, Item] = {}
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
        self.jobs: dict[str, views.Job] = {}
        self.snapshot: Snapshot | None = None

    def take(self, snapshot: Snapshot, watched: Iterable[str]) -> None:
        """Take over a look: which jobs are shown, and what each of them does."""
        self.snapshot = snapshot
        self.shown = views.jobs_of(snapshot.lines, JOBS_SHOWN)
        self.jobs = {
            name: _job(snapshot, name)
            for name in dict.fromkeys([*self.shown, *watched])
            if name in snapshot.lines
        }

    def draw(self, around: Around | None) -> None:
        """Render what has changed since the last time."""
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - there was a look
        now = snapshot.now.timestamp()
        if now - self._origin > 2 * bars.LANE_SECONDS:
            self._origin = now - bars.LANE_SECONDS
        version = self.version + 1
        rows = {f"job-{name}": self._row(job, around) for name, job in self.jobs.items()}
        kept = set(rows)
        changed = sum([self._keep(row, version) for row in rows.values()])
        for name, drafts in self._drafts(snapshot, around, now).items():
            ids = tuple(draft.id for draft in drafts)
            changed += sum([self._keep(draft, version) for draft in drafts])
            kept.update(ids)
            if ids != self._sections[name].ids:
                self._sections[name] = self._sections[name]._replace(ids=ids, version=version)
                changed += 1
        if len(self._items) > len(kept):
            self._items = {id_: item for id_, item in self._items.items() if id_ in kept}
        self.version += bool(changed)

    def _keep(self, draft: Draft, version: int) -> bool:
        known = self._items.get(draft.id)
        if known is not None and known.seed == draft.seed:
            return False
        html = str(draft.render())
        if known is not None and known.html == html:
            self._items[draft.id] = known._replace(seed=draft.seed)
            return False
        self._items[draft.id] = Item(draft.seed, html, version)
        return True

    def _drafts(
        self, snapshot: Snapshot, around: Around | None, now: float
    ) -> dict[str, list[Draft]]:
        pieces = self._pieces
        cards = self._cards(snapshot, around, now)
        failed = None if around is None else around.failed
        failures = [] if around is None else around.failures
        self.title = views.title(snapshot.counts, cards, failed)
        return {
            "strip": [
                Draft(f"tile-{tile.id}", tile, partial(pieces.tile, tile))
                for tile in views.strip(snapshot.counts, cards, failed)
            ],
            "servers-list": [
                Draft(f"server-{card.server}", card, partial(pieces.card, card)) for card in cards
            ]
            or [self._nothing("no-servers")],
            "jobs-list": [self._row(self.jobs[name], around) for name in self.shown]
            or [self._nothing("no-jobs")],
            "lanes": [self._lane(name, around, now) for name in self.shown],
            "failures-list": [
                Draft(f"failure-{run['id']}", None, partial(pieces.failure, run))
                for run in failures
            ]
            or [self._nothing("no-failures")],
            "totals": self._totals(around),
        }

    def _nothing(self, id_: str) -> Draft:
        return Draft(id_, None, partial(self._pieces.nothing, id_))

    def _cards(self, snapshot: Snapshot, around: Around | None, now: float) -> list[views.Card]:
        held: dict[str, list[str]] = {}
        for name, line in snapshot.lines.items():
            if line.sums.holder is not None:
                held.setdefault(line.sums.holder, []).append(name)
        lost = [] if around is None else around.lost
        return views.cards_of(snapshot.instances, lost, now, held, self._job)[:CARDS_SHOWN]

    def _row(self, job: views.Job, around: Around | None) -> Draft:
        runs = [] if around is None else around.runs.get(job["name"], [])
        ended = tuple((run["id"], run["outcome"]) for run in runs if run["outcome"] is not None)
        return Draft(
            f"job-{job['name']}",
            (job, ended),
            lambda: str(self._pieces.job_row(job, bars.spark(runs))),
        )

    def _lane(self, name: str, around: Around | None, now: float) -> Draft:
        runs = [] if around is None else around.runs.get(name, [])
        seen = [run for run in runs if bars.in_lane(run, now)][-BARS_SHOWN:]
        return Draft(
            f"lane-{name}",
            (self._origin, tuple((run["id"], run["ended"]) for run in seen)),
            lambda: str(self._pieces.lane(name, bars.lane(seen, self._origin))),
        )

    def _totals(self, around: Around | None) -> list[Draft]:
        audit = views.last_run(self._job(AUDIT))
        counted = views.last_run(self._job(COUNT))
        totals = None if around is None else around.totals
        at = None if counted is None else counted["endedAt"]
        return [
            Draft("totals-numbers", (totals, at), partial(self._pieces.totals, totals, at)),
            Draft("totals-audit", audit, partial(self._pieces.audit, audit, AUDIT)),
        ]

    def _job(self, name: str) -> views.Job | None:
        if name in self.jobs:
            return self.jobs[name]
        if self.snapshot is None or name not in self.snapshot.lines:
            return None
        return _job(self.snapshot, name)

    # -- what is sent ------------------------------------------------------------------------

    def sections(self, now: float) -> dict[str, Markup]:
        """Return each list as HTML, with its clocks filled in for `now`."""
        return {name: self._fill(self._list(name, None), now) for name in self._sections}

    def row(self, name: str, now: float) -> Markup:
        """Return the row of a job that is shown or watched, in the same way."""
        return self._fill(self._items[f"job-{name}"].html, now)

    def news(self, since: int | None, job: str | None) -> dict[str, str]:
        """Return the elements that changed after the version `since`, by their ids.

        None: all of them. With `job` the row of that job alone.
        """
        if job is not None:
            row = self._items.get(f"job-{job}")
            new = row is not None and (since is None or row.version > since)
            return {f"job-{job}": row.html} if row is not None and new else {}
        return {
            name: self._list(name, since)
            for name, section in self._sections.items()
            if since is None
            or section.version > since
            or any(self._items[id_].version > since for id_ in section.ids)
        }

    def _list(self, name: str, since: int | None) -> str:
        section = self._sections[name]
        origin = f' data-origin="{self._origin:.1f}"' if name == "lanes" else ""
        items = "".join(
            self._items[id_].html
            if since is None or self._items[id_].version > since
            else f'<{section.item_tag} id="{escape(id_)}" data-same></{section.item_tag}>'
            for id_ in section.ids
        )
        return f'<{section.tag} id="{name}"{origin}>{items}</{section.tag}>'

    def _fill(self, html: str, now: float) -> Markup:
        shift = bars.percent(now - bars.LANE_SECONDS - self._origin)
        html = _CLOCK.sub(
            lambda clock: clock[1] + views.CLOCKS[clock[2]](now - float(clock[3])), html
        )
        html = html.replace(_SHIFT, f'{_SHIFT} x="{-shift}%"')
        return Markup(  # noqa: S704 - its items were escaped when they were rendered
            _GROWING.sub(
                lambda bar: f'{bar[0]} width="{bars.growing(100 + shift - float(bar[1]))}%"', html
            )
        )


def _job(snapshot: Snapshot, name: str) -> views.Job:
    """Return a job without what changes with time alone."""
    job: views.Job = from_json(snapshot.lines[name].text)
    del job["elapsedSeconds"]
    return job
