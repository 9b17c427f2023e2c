"""The live picture: rendered once a tick for all who watch this copy, sent as what has changed.

The picture is made of items, the elements that can change by themselves: a tile, a server, a row of
a job. Each remembers with which version it changed last. What a viewer is sent depends only on the
version it has: items that changed after it come whole, all others as empty elements marked
`data-same`, which its browser leaves as they are. Viewers who have the same version are sent the
same bytes, made and compressed once.

No item says anything that changes with time alone. Clocks are written as the moment that they count
from: a page is sent with the clocks filled in, and a browser lets them tick by itself.
"""

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from functools import partial
from html import escape
from itertools import chain
from pathlib import Path
from secrets import token_hex
from time import monotonic
from typing import Any, Final, NamedTuple

import structlog
from fastapi.sse import EventSourceResponse, format_sse_event
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from balance_app import pictures, views
from balance_app.errors import Problem
from balance_app.jobs.board import Board, Snapshot
from balance_app.jobs.feed import Feed
from balance_app.overview import Around, Overview

log = structlog.get_logger(__name__)

JOBS_SHOWN: Final = 50
CARDS_SHOWN: Final = 60
BARS_SHOWN: Final = 30  # of a lane; earlier runs are in the job's history
AROUND_SECONDS: Final = 4.0  # what is around the board is asked for as often, or when runs change
AUDIT: Final = "audit-ledger"
COUNT: Final = "total-days"

templates: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
templates.filters |= {
    "duration": views.duration,
    "exact": views.exact,
    "clock_time": views.clock_time,
    "iso": views.iso,
    "number": views.number,
    "rate": views.rate,
    "stamp": lambda moment: f"{views.seconds_of(moment):.1f}",
}
templates.globals |= {
    "state_of": views.state_of,
    "outcome_of": views.outcome_of,
    "why": views.why,
    "share": views.share,
}

_CLOCK: Final = re.compile(r'(data-(for|ago|in)="([0-9.]+)">)')
_SHIFT: Final = re.compile(r"data-shift=\"\"")
_GROWING: Final = re.compile(r'data-from="([0-9.-]+)"')


class Item(NamedTuple):
    """An element of the picture: what it was made from, its HTML, its version."""

    seed: object
    html: str
    version: int


class Section(NamedTuple):
    """A list of items in their order, and the version of that order."""

    # the elements: of the list, and of each item in it
    tag: str
    item_tag: str
    ids: tuple[str, ...] = ()
    version: int = 0


class Live:
    """The picture as this copy knows it."""

    def __init__(self, board: Board, overview: Overview, stopping: asyncio.Event) -> None:
        self._board = board
        self._overview = overview
        self._turn = asyncio.Lock()
        # Versions of one boot of one copy say nothing to another.
        self._boot = token_hex(4)
        self._version = 0
        self._items: dict[str, Item] = {}
        self._sections = {
            "strip": Section("dl", "div"),
            "servers-list": Section("ul", "li"),
            "jobs-list": Section("tbody", "tr"),
            "lanes": Section("ol", "li"),
            "failures-list": Section("ul", "li"),
            "totals": Section("dl", "div"),
        }
        self._snapshot: Snapshot | None = None
        self._around: Around | None = None
        self._asked_at = 0.0
        self._asked_last = True
        # of each job that is shown, what its last runs depend on
        self._told: dict[str, object] = {}
        self._origin = 0.0
        self.title = "balance_app"
        self._watched: Counter[str] = Counter()
        self._events: dict[tuple[int | None, str | None], bytes] = {}
        self._feed = Feed(self._tick, stopping)
        self._pieces = templates.get_template("pieces.html").module

    @property
    def version(self) -> str:
        """The version of the picture, which a browser that has it may name."""
        return f"{self._boot}.{self._version}"

    @property
    def snapshot(self) -> Snapshot | None:
        """The look at the board that the picture shows."""
        return self._snapshot

    @property
    def known(self) -> bool:
        """Whether there is a picture at all."""
        return self._version > 0

    async def refresh(self) -> Snapshot:
        """Bring the picture up to this moment.

        Raises:
            DatabaseAway: it can't be reached; the picture stays as it was.
        """
        snapshot = await self._board.look()
        async with self._turn:
            if self._around is None or self._due(snapshot):
                await self._ask(snapshot)
            self._show(snapshot)
        return snapshot

    async def _tick(self) -> Snapshot:
        """Bring the picture on by one statement: a look, or what is around it, never both."""
        async with self._turn:
            snapshot = self._snapshot
            if snapshot is None or self._asked_last or not self._due(snapshot):
                snapshot = await self._board.look()
                self._asked_last = False
            else:
                await self._ask(snapshot)
            self._show(snapshot)
            self._events.clear()
            return snapshot

    def _due(self, snapshot: Snapshot) -> bool:
        late = monotonic() - self._asked_at > AROUND_SECONDS
        return late or any(self._seed(snapshot, name) != self._told.get(name) for name in self._names(snapshot))

    async def _ask(self, snapshot: Snapshot) -> None:
        """Ask what is around the board; of the jobs only for those whose runs have changed."""
        names = self._names(snapshot)
        told = {name: self._seed(snapshot, name) for name in names}
        changed = [name for name in names if told[name] != self._told.get(name)]
        self._around = await self._overview.around(names, changed)
        self._told = told
        self._asked_at = monotonic()
        self._asked_last = True

    def _names(self, snapshot: Snapshot) -> list[str]:
        return views.jobs_of(snapshot.lines.items(), JOBS_SHOWN)

    def _seed(self, snapshot: Snapshot, name: str) -> object:
        line = snapshot.lines[name]
        return _runs_seed(line.text)

    # -- the picture -------------------------------------------------------------------------

    def _show(self, snapshot: Snapshot) -> None:
        """Render what has changed since the last time."""
        self._snapshot = snapshot
        now = snapshot.now.timestamp()
        around = self._around
        version = self._version + 1
        if now - self._origin > 2 * pictures.LANE_SECONDS:
            self._origin = now - pictures.LANE_SECONDS
        names = self._names(snapshot)
        jobs = {
            name: _job(snapshot, name)
            for name in chain(names, self._watched)
            if name in snapshot.lines
        }
        job_of = partial(_job_of, snapshot, jobs)
        cards = self._cards(snapshot, now, job_of)
        failed = None if around is None else around.failed
        self.title = views.title(snapshot.counts, cards, failed)
        shown: dict[str, list[tuple[str, object, Callable[[], str]]]] = {
            "strip": [
                (f"tile-{tile.id}", tile, partial(self._pieces.tile, tile))
                for tile in views.strip(snapshot.counts, cards, failed)
            ],
            "servers-list": [
                (f"server-{card.server}", card, partial(self._pieces.card, card)) for card in cards
            ]
            or [_nothing(self._pieces, "no-servers")],
            "jobs-list": [self._row(jobs[name], around) for name in names]
            or [_nothing(self._pieces, "no-jobs")],
            "lanes": [self._lane(name, around, now) for name in names],
            "failures-list": [
                (f"failure-{run['id']}", None, partial(self._pieces.failure, run))
                for run in (() if around is None else around.failures)
            ]
            or [_nothing(self._pieces, "no-failures")],
            "totals": self._totals(around, job_of),
        }
        for name in self._watched:
            if name in jobs and name not in names:
                self._keep(*self._row(jobs[name], around), version=version)
        kept: set[str] = {f"job-{name}" for name in jobs}
        for section, items in shown.items():
            ids = tuple(id_ for id_, _, _ in items)
            for each in items:
                self._keep(*each, version=version)
            kept.update(ids)
            if ids != self._sections[section].ids:
                self._sections[section] = self._sections[section]._replace(
                    ids=ids, version=version
                )
                self._version = version
        if len(self._items) > len(kept):
            self._items = {id_: item for id_, item in self._items.items() if id_ in kept}

    def _keep(self, id_: str, seed: object, render: Callable[[], str], *, version: int) -> None:
        known = self._items.get(id_)
        if known is None or known.seed != seed:
            html = str(render())
            if known is None or known.html != html:
                self._version = version
                self._items[id_] = Item(seed, html, version)
            else:
                self._items[id_] = known._replace(seed=seed)

    def _cards(
        self, snapshot: Snapshot, now: float, job_of: Callable[[str], views.Job | None]
    ) -> list[views.Card]:
        held: dict[str, list[str]] = {}
        for name, line in snapshot.lines.items():
            if line.sums.holder is not None:
                held.setdefault(line.sums.holder, []).append(name)
        lost = [] if self._around is None else self._around.lost
        return views.cards_of(snapshot.copies, lost, now, held, job_of)[:CARDS_SHOWN]

    def _row(
        self, job: views.Job, around: Around | None
    ) -> tuple[str, object, Callable[[], str]]:
        runs = [] if around is None else around.runs.get(job["name"], [])
        ended = tuple((run["id"], run["outcome"]) for run in runs if run["outcome"] is not None)

        def render() -> str:
            return str(self._pieces.job_row(job, pictures.spark(runs)))

        return f"job-{job['name']}", (job, ended), render

    def _lane(
        self, name: str, around: Around | None, now: float
    ) -> tuple[str, object, Callable[[], str]]:
        runs = [] if around is None else around.runs.get(name, [])
        seen = [run for run in runs if pictures.in_lane(run, now)][-BARS_SHOWN:]
        seed = (self._origin, tuple((run["id"], run["ended"]) for run in seen))

        def render() -> str:
            return str(self._pieces.lane(name, pictures.lane(seen, self._origin)))

        return f"lane-{name}", seed, render

    def _totals(
        self, around: Around | None, job_of: Callable[[str], views.Job | None]
    ) -> list[tuple[str, object, Callable[[], str]]]:
        audit = views.last_audit(job_of(AUDIT))
        counted = views.last_audit(job_of(COUNT))
        totals = None if around is None else around.totals
        when = None if totals is None else views.totals_words(totals, counted and counted["endedAt"])
        return [
            ("totals-numbers", (totals, when), partial(self._pieces.totals, totals, when)),
            ("totals-audit", audit, partial(self._pieces.audit, audit, AUDIT)),
        ]

    # -- what is sent ------------------------------------------------------------------------

    def sections(self, now: float) -> dict[str, Markup]:
        """Return each list as HTML, with its clocks filled in for `now`."""
        return {
            name: Markup(self._fill(self._html(name, None), now))  # noqa: S704 - rendered escaped
            for name in self._sections
        }

    def row(self, name: str, now: float) -> Markup:
        """Return the row of a job that is shown or watched."""
        return Markup(self._fill(self._items[f"job-{name}"].html, now))  # noqa: S704 - the same

    def _html(self, name: str, since: int | None) -> str:
        section = self._sections[name]
        parts = [f'<{section.tag} id="{name}" data-origin="{self._origin:.1f}">']
        for id_ in section.ids:
            item = self._items[id_]
            parts.append(
                item.html
                if since is None or item.version > since
                else f'<{section.item_tag} id="{escape(id_)}" data-same></{section.item_tag}>'
            )
        return "".join([*parts, f"</{section.tag}>"])

    def _fill(self, html: str, now: float) -> str:
        shift = pictures.percent(now - pictures.LANE_SECONDS - self._origin)
        html = _CLOCK.sub(lambda clock: clock[1] + views.CLOCKS[clock[2]](now - float(clock[3])), html)
        html = _SHIFT.sub(f'data-shift="" x="{-shift}%"', html)
        return _GROWING.sub(
            lambda bar: f'{bar[0]} width="{max(0.35, round(100 + shift - float(bar[1]), 2))}%"', html
        )

    def _event(self, since: int | None, job: str | None) -> bytes:
        """Return the event for all who have the version `since`, or nothing yet."""
        known = self._events.get((since, job))
        if known is None:
            known = self._events[since, job] = self._write_event(since, job)
        return known

    def _write_event(self, since: int | None, job: str | None) -> bytes:
        assert self._snapshot is not None  # noqa: S101 - a tick came before
        html: dict[str, str] = {}
        if job is not None:
            item = self._items.get(f"job-{job}")
            if item is not None and (since is None or item.version > since):
                html[f"job-{job}"] = item.html
        else:
            for name, section in self._sections.items():
                newest = max((self._items[id_].version for id_ in section.ids), default=0)
                if since is None or max(section.version, newest) > since:
                    html[name] = self._html(name, since)
        data = {"now": self._snapshot.now.timestamp(), "title": self.title, "html": html}
        return format_sse_event(event="status", data_str=to_json(data).decode(), id=self.version)

    @contextmanager
    def watching(self, job: str | None) -> Any:  # noqa: ANN401 - a generator's
        """Keep a job in the picture while somebody looks at its own page."""
        with self._feed.viewer():
            if job is not None:
                self._watched[job] += 1
            try:
                yield
            finally:
                if job is not None:
                    self._watched[job] -= 1
                    self._watched = +self._watched

    async def events(self, since: str | None, job: str | None) -> AsyncIterator[bytes]:
        """Yield what is new to a viewer who has the version `since`, at each tick."""
        boot, _, number = (since or "").partition(".")
        has = int(number) if boot == self._boot and number.isdecimal() else None
        async for event in self._feed.events():
            if event.startswith(b"event: status"):
                yield self._event(has, job)
                has = self._version
            else:  # how soon to come again, or that the database is away
                yield event


def _runs_seed(text: bytes) -> object:
    job = from_json(text)
    last = job["lastRun"]
    return job["fence"], job["state"], None if last is None else last["endedAt"]


def _job(snapshot: Snapshot, name: str) -> views.Job:
    """Return a job without what changes with time alone."""
    job: views.Job = from_json(snapshot.lines[name].text)
    del job["elapsedSeconds"]
    return job


def _job_of(snapshot: Snapshot, jobs: dict[str, views.Job], name: str) -> views.Job | None:
    if name in jobs:
        return jobs[name]
    return _job(snapshot, name) if name in snapshot.lines else None


def _nothing(pieces: Any, id_: str) -> tuple[str, object, Callable[[], str]]:  # noqa: ANN401 - a template's
    return id_, None, partial(pieces.nothing, id_)


class LiveResponse(EventSourceResponse):
    """The stream to one viewer, compressed if its browser can read that.

    Each event is a run of blocks that refer to nothing before them: compressed once, it is good
    for every viewer's stream.
    """

    def __init__(self, live: Live, *, since: str | None, job: str | None, compress: bool) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept-Encoding"}
        events = live.events(since, job)
        if compress:
            headers["Content-Encoding"] = "gzip"
            events = _gzip(events)
        super().__init__(events, headers=headers)
        self._watching = live.watching(job)

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._watching:
            await super().__call__(scope, receive, send)


_packed: dict[bytes, bytes] = {}


def _pack(event: bytes) -> bytes:
    known = _packed.get(event)
    if known is None:
        if len(_packed) > 20:  # noqa: PLR2004 - those of a tick or two
            _packed.clear()
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        known = _packed[event] = packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH)
    return known


async def _gzip(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Compress a stream as RFC 1952 says: a head, blocks, the last block, and what to check."""
    check, size = 0, 0
    yield b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    async for event in events:
        check, size = zlib.crc32(event, check), size + len(event)
        yield _pack(event)
    yield b"\x03\x00" + check.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")
