"""Queries of the page beside the status: recent runs, failures, totals; each is cheap.

They are for people alone: no decision depends on their results.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg
from pydantic_core import from_json

from balance_app.balances.accounts import Account
from balance_app.db.pool import Connection, Database, read, read_in_order, reading_in_order
from balance_app.db.replication import Replication
from balance_app.http.body import MAX_INTEGER
from balance_app.jobs.api.verdict import Recent
from balance_app.jobs.api.verdict_reader import VerdictReader
from balance_app.states import Outcome

# The jobs whose results are shown with the balances.
AUDIT: Final = "audit-ledger"
COUNT: Final = "total-days"
RUNS_KEPT: Final = 20  # of each job that is shown
FLEET_RUNS: Final = 1000  # at most in the lanes
RUNS_OF_DAY: Final = 4000  # and in those of a day
LONG_SECONDS: Final = 3600.0
RUNS_AGAIN: Final = 30  # transactions that are older may have a lower id than a run that is known
RETRACTED_SECONDS: Final = 300.0  # so long after a loss it may be taken back
USERS_COUNTED: Final = 10_000  # summed up by each query; above it, the job `total-days` did that
RUNS_SEARCHED: Final = 20_000  # by one page of runs, where no index has the filter
ACCOUNTS_SORTED: Final = 200_000  # by balance or by change, at most
ATTEMPTS_SHOWN: Final = 20  # of a tick, before a run and after it

Runs = list[dict[str, Any]]


class RunFilter(NamedTuple):
    """Which runs are listed; None: all. The outcome `running` is of those that have none yet."""

    job: str | None = None
    outcome: str | None = None
    server: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class FoundRuns(NamedTuple):
    """A page of runs, the latest first, and the cursor of the next page.

    `searched` is how many runs were looked at, if that is all that one page may look at.
    """

    runs: Runs
    next: int | None
    searched: int | None

    def servers(self) -> set[str]:
        """Return the instances that these runs ran on."""
        return {run["server"] for run in self.runs if run["server"] is not None}


class ListedAccount(NamedTuple):
    """An account in a list, and when it changed last; not `current`: a hold of it has expired."""

    account: Account
    changed_at: datetime | None
    current: bool = True

    @property
    def user_id(self) -> int:
        """The user's id."""
        return self.account.user_id


class Totals(NamedTuple):
    """All balances together; `exact` as of now, else as the job `total-days` last counted."""

    users: int
    balance: int
    exact: bool


class Activity(NamedTuple):
    """Recent runs and totals at one moment; times are seconds since 1970."""

    now: float
    # the last runs of each job that is shown, the oldest first
    runs: dict[str, Runs]
    # the runs of all jobs in the longest lane that is looked at, the oldest first
    fleet: Runs
    totals: Totals
    # the accounts that changed last: id, version and balance
    changed: list[tuple[int, int, int]]
    # the last run of `AUDIT` and of `COUNT` that succeeded, and the last that failed
    concluded: Runs
    # what has recovered lately
    recent: Recent = Recent()
    # the primary and its standbys; None: not known
    replication: Replication | None = None
    # runs of the lanes that began before this moment were too many to read; None: all are there
    cut: float | None = None
    # whether an account has changed since the activity before
    busy: bool = False


class PageQueries:
    """What the page shows beside the status."""

    def __init__(self, database: Database, verdict_reader: VerdictReader) -> None:
        self._database = database
        self._verdict_reader = verdict_reader
        self._changed: list[tuple[int, int, int]] = []
        self._runs: dict[str, Runs] = {}
        # of the lanes: the runs by their ids, and how long ago they may have ended
        self._fleet: dict[int, dict[str, Any]] = {}
        self._span = 0.0
        self._cut: float | None = None

    async def activity(self, shown: Iterable[str], changed: Iterable[str], span: float) -> Activity:
        """Return the recent activity; runs are read again only of the jobs in `changed`.

        Of the lanes, `span` seconds long, only the runs that were not known yet, or had not ended.
        """
        names = set(shown)
        stale = sorted(names & set(changed) | (names - self._runs.keys()))
        if span > self._span:
            self._fleet.clear()
            self._cut = None
        self._span = span
        row, recent = await self._read_activity(stale, span)
        fleet = from_json(row["fleet"])
        if self._fleet and max(self._fleet) not in {run["id"] for run in fleet}:
            # It is no longer there, as in a database that was restored.
            self._fleet.clear()
            row, recent = await self._read_activity(stale, span)
            fleet = from_json(row["fleet"])
        replication = await self._database.replication()
        self._runs = {name: runs for name, runs in self._runs.items() if name in names}
        self._runs.update((name, []) for name in stale)
        for run in from_json(row["runs"]):
            self._runs[run["job"]].append(run)
        now = row["now"].timestamp()
        self._fleet.update((run["id"], run) for run in fleet)
        self._fleet = {
            id_: run
            for id_, run in sorted(self._fleet.items())
            if run["ended"] is None or run["ended"] > now - span
        }
        if row["cut"] is not None:
            self._cut = row["cut"]
        elif self._cut is not None and self._cut < now - span:
            self._cut = None
        exact = row["users"] <= USERS_COUNTED
        before = self._changed
        # Of more users only some were looked at, and not those that change most.
        latest = from_json(row["latest"]) if exact else []
        self._changed = [(each["id"], each["version"], each["balance"]) for each in latest]
        return Activity(
            now=now,
            runs=dict(self._runs),
            fleet=list(self._fleet.values()),
            totals=Totals(
                users=row["users"] if exact else row["counted_users"],
                balance=int(row["balance"] if exact else row["counted_balance"]),
                exact=exact,
            ),
            changed=self._changed,
            concluded=from_json(row["concluded"]),
            recent=recent.on(replication),
            replication=replication,
            cut=self._cut,
            busy=self._changed != before,
        )

    async def _read_activity(self, stale: list[str], span: float) -> tuple[asyncpg.Record, Recent]:
        known = max(self._fleet, default=0) - RUNS_AGAIN
        # What ended may still become another outcome: a loss that its instance takes back.
        newest = max((run["ended"] or 0.0 for run in self._fleet.values()), default=0.0)
        under_way = [
            id_
            for id_, run in self._fleet.items()
            if run["ended"] is None
            or (run["outcome"] == Outcome.LOST and run["ended"] > newest - RETRACTED_SECONDS)
        ]
        most = RUNS_OF_DAY if span > LONG_SECONDS else FLEET_RUNS

        async def find(connection: Connection) -> tuple[asyncpg.Record, Recent]:
            async with reading_in_order(connection):
                (row,) = await connection.fetch(
                    ACTIVITY, stale, RUNS_KEPT, known, under_way, most, span, [AUDIT, COUNT]
                )
                return row, await self._verdict_reader.fetch_recent(connection)

        # With priority, as the status: there is one such query at a time.
        return await self._database.run(find, priority=True)

    async def checkpoint(self, job: str) -> str | None:
        """Return the checkpoint from which the next run of a job resumes, as JSON."""
        rows = await self._database.run(lambda con: read(con, CHECKPOINT, job))
        return rows[0]["checkpoint"] if rows else None

    async def last_runs(self, job: str, limit: int) -> Runs:
        """Return the last runs of a job, the oldest first, as `Activity.runs` has them."""
        (row,) = await self._database.run(lambda con: read_in_order(con, LAST_RUNS, [job], limit))
        return list(from_json(row["runs"]))

    async def runs(self, of: RunFilter, *, before: int | None, limit: int) -> FoundRuns:
        """Return the runs that pass a filter, with ids below `before`.

        A filter without an index looks at no more than `RUNS_SEARCHED` runs; then the next page
        continues there.
        """
        upto = MAX_INTEGER if before is None else before
        if of.until is not None:
            (after,) = await self._database.run(
                lambda con: read_in_order(con, FIRST_AFTER, of.until)
            )
            upto = min(upto, after["id"])
        outcome = None if of.outcome == "running" else of.outcome
        # What has no index is searched for; all else is just read.
        searches = of.server is not None or of.outcome == "running"
        most = RUNS_SEARCHED if searches else limit + 1
        (row,) = await self._database.run(
            lambda con: read_in_order(
                con,
                SEARCH,
                upto,
                most,
                limit + 1,
                of.job,
                outcome,
                of.server,
                of.since,
                of.outcome == "running",
            )
        )
        found: Runs = from_json(row["runs"])
        if len(found) > limit:
            return FoundRuns(found[:limit], found[limit - 1]["id"], None)
        more = searches and row["searched"] == RUNS_SEARCHED and not row["reached"]
        return FoundRuns(found, row["last"] if more else None, RUNS_SEARCHED if more else None)

    async def can_sort_accounts(self) -> bool:
        """Say whether there are few enough accounts to sort all of them for a page."""
        rows = await self._database.run(lambda con: read(con, ACCOUNTS_KNOWN))
        return bool(rows[0]["known"] <= ACCOUNTS_SORTED)

    async def accounts(self, *, sort: str, after: int | None, limit: int) -> list[ListedAccount]:
        """Return accounts by id, by `balance` or by when they `changed`, the highest first.

        `after` is the last account of the page before: its place is where it is now.
        """
        sql = {"balance": BY_BALANCE, "changed": BY_CHANGE}.get(sort, BY_ID)
        rows = await self._database.run(lambda con: read(con, sql, after, limit))
        return [
            ListedAccount(
                Account(**{name: row[name] for name in Account.__slots__}),
                # of an account that has not changed since a release that did not note it: unknown
                None if row["changed_at"].year < 2000 else row["changed_at"],  # noqa: PLR2004
                row["current"],
            )
            for row in rows
        ]

    async def attempts(self, run: int) -> Runs:
        """Return the runs of the same tick as a run, itself among them, the first one first."""
        (row,) = await self._database.run(
            lambda con: read_in_order(con, ATTEMPTS, run, ATTEMPTS_SHOWN)
        )
        return list(from_json(row["runs"]))


# Each CTE reads a bounded number of rows by an index, however long the history is: a job's runs
# begin in the order of their fences (skipped ticks have none), the row comparisons keep the plan to
# the index with this order (see `jobs/api/history.py`), and at most 10 001 users are looked at.
#
# $1 the jobs whose runs are read, $2 how many of each; of the lanes: $3 the last run that is known,
# $4 known ones that had not ended, $5 how many new ones, $6 how long ago they may have ended;
# $7 the jobs whose last results are read
ACTIVITY: Final = """
WITH moment AS (
    SELECT clock_timestamp() AS now
), runs AS (
    SELECT run.* FROM unnest($1::text[]) AS shown(name) CROSS JOIN LATERAL (
        SELECT * FROM job_runs
        WHERE (job, fence) < (shown.name, 9223372036854775807) AND (job, fence) > (shown.name, 0)
        ORDER BY job DESC, fence DESC LIMIT $2
    ) AS run
), latest AS (
    SELECT * FROM job_runs WHERE id > $3 AND $6::float8 > 0 ORDER BY id DESC LIMIT $5
), fleet AS (
    SELECT * FROM (
        SELECT * FROM latest UNION ALL SELECT * FROM job_runs WHERE id = ANY ($4::bigint[])
    ) AS recent, moment
    WHERE fence IS NOT NULL
      AND (ended_at IS NULL OR ended_at > now - make_interval(secs => $6::float8))
), concluded AS (
    SELECT run.* FROM unnest($7::text[]) AS named(name)
    CROSS JOIN unnest(ARRAY['succeeded', 'failed']) AS how(ended)
    CROSS JOIN LATERAL (
        SELECT id, job, outcome, result, ended_at FROM job_runs
        WHERE (job, outcome, id) < (named.name, how.ended, 9223372036854775807)
          AND (job, outcome, id) > (named.name, how.ended, 0)
        ORDER BY job DESC, outcome DESC, id DESC LIMIT 1
    ) AS run
), few AS MATERIALIZED (
    SELECT id, balance, version, changed_at FROM users LIMIT 10001
), counted AS (
    SELECT coalesce(sum(opened), 0)::bigint AS counted_users,
           coalesce(sum(opening + deposited - withdrawn), 0)::bigint::text AS counted_balance
    FROM daily_totals
)
SELECT now, counted.*,
    (SELECT extract(epoch FROM min(started_at))::float8 FROM latest HAVING count(*) >= $5) AS cut,
    (SELECT count(*) FROM few) AS users,
    (SELECT coalesce(sum(balance), 0)::text FROM few) AS balance,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'version', version, 'balance', balance
    )), '[]')::text FROM (
        SELECT * FROM few, moment AS m WHERE changed_at > m.now - interval '3 minutes'
        ORDER BY changed_at DESC LIMIT 10
    ) AS lately) AS latest,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'job', job, 'server', server, 'outcome', outcome,
        'result', left(result, 200),
        'started', extract(epoch FROM started_at)::float8,
        'ended', extract(epoch FROM ended_at)::float8
    ) ORDER BY id), '[]')::text FROM runs) AS runs,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'job', job, 'server', server, 'outcome', outcome,
        'result', CASE WHEN outcome <> 'succeeded' THEN left(result, 120) END,
        'due', extract(epoch FROM due_at)::float8,
        'started', extract(epoch FROM started_at)::float8,
        'ended', extract(epoch FROM ended_at)::float8
    ) ORDER BY id), '[]')::text FROM fleet) AS fleet,
    (SELECT coalesce(json_agg(json_build_object(
        'job', job, 'outcome', outcome, 'result', left(result, 200),
        'ended', extract(epoch FROM ended_at)::float8
    ) ORDER BY id), '[]')::text FROM concluded) AS concluded
FROM moment CROSS JOIN counted
"""

# $1 jobs, $2 how many runs of each
LAST_RUNS: Final = """
SELECT coalesce(json_agg(json_build_object(
    'id', id, 'job', job, 'server', server, 'outcome', outcome,
    'result', left(result, 200),
    'started', extract(epoch FROM started_at)::float8,
    'ended', extract(epoch FROM ended_at)::float8
) ORDER BY id), '[]')::text AS runs
FROM unnest($1::text[]) AS shown(name) CROSS JOIN LATERAL (
    SELECT * FROM job_runs
    WHERE (job, fence) < (shown.name, 9223372036854775807) AND (job, fence) > (shown.name, 0)
    ORDER BY job DESC, fence DESC LIMIT $2
) AS run
"""

# The ids of runs rise with their starts, so the first run after a moment is found by bisection
# along the primary key: each step reads one row.
#
# $1 the moment
FIRST_AFTER: Final = """
WITH RECURSIVE bisection(low, high) AS (
    SELECT 0::bigint, (SELECT coalesce(max(id), 0) + 1 FROM job_runs)
    UNION ALL
    SELECT CASE WHEN probe.started_at <= $1 THEN middle + 1 ELSE low END,
           CASE WHEN probe.started_at <= $1 THEN high ELSE middle END
    FROM (SELECT low, high, (low + high) / 2 AS middle FROM bisection WHERE low < high) AS step
    LEFT JOIN LATERAL (
        SELECT started_at FROM job_runs WHERE id >= middle ORDER BY id LIMIT 1
    ) AS probe ON true
)
SELECT max(low) AS id FROM bisection
"""

# At most $2 runs with ids below $1 are looked at, and $3 of them returned: the instance ($6) and
# "under way" ($8) have no index. Of the four parts the one runs that has the index of the filters
# for the job ($4) and the outcome ($5); the row comparisons keep it to that index (see
# `jobs/api/history.py`). $7 the first moment of a start.
SEARCH: Final = """
WITH looked_at AS MATERIALIZED (
    (SELECT * FROM job_runs WHERE $4::text IS NULL AND $5::text IS NULL AND id < $1
     ORDER BY id DESC LIMIT $2)
    UNION ALL
    (SELECT * FROM job_runs
     WHERE $5 IS NULL AND (job, id) < ($4, $1) AND (job, id) > ($4, 0)
     ORDER BY job DESC, id DESC LIMIT $2)
    UNION ALL
    (SELECT * FROM job_runs
     WHERE $4 IS NULL AND (outcome, id) < ($5, $1) AND (outcome, id) > ($5, 0)
     ORDER BY outcome DESC, id DESC LIMIT $2)
    UNION ALL
    (SELECT * FROM job_runs
     WHERE (job, outcome, id) < ($4, $5, $1) AND (job, outcome, id) > ($4, $5, 0)
     ORDER BY job DESC, outcome DESC, id DESC LIMIT $2)
), found AS (
    SELECT * FROM looked_at
    WHERE ($6::text IS NULL OR server = $6) AND ($7::timestamptz IS NULL OR started_at >= $7)
      AND (NOT $8::boolean OR outcome IS NULL)
    ORDER BY id DESC LIMIT $3
)
SELECT (SELECT count(*) FROM looked_at) AS searched, (SELECT min(id) FROM looked_at) AS last,
    (SELECT coalesce(bool_or(started_at < $7), false) FROM looked_at) AS reached,
    (SELECT coalesce(json_agg(json_build_object(
        'id', id, 'job', job, 'server', server, 'outcome', outcome, 'attempt', attempt,
        'ticks', ticks, 'due', extract(epoch FROM due_at)::float8,
        'lastDue', extract(epoch FROM last_due_at)::float8,
        'result', left(result, 300),
        'started', CASE WHEN fence IS NOT NULL THEN extract(epoch FROM started_at)::float8 END,
        'seconds', CASE WHEN fence IS NOT NULL THEN greatest(0, extract(
            epoch FROM coalesce(ended_at, clock_timestamp()) - started_at
        ))::float8 END
    ) ORDER BY id DESC), '[]')::text FROM found) AS runs
"""

# The runs of one tick have consecutive fences, and the number of each in `attempt`.
#
# $1 a run, $2 how many before and after it
ATTEMPTS: Final = """
SELECT coalesce(json_agg(json_build_object(
    'id', run.id, 'job', run.job, 'server', run.server, 'outcome', run.outcome,
    'attempt', run.attempt, 'result', left(run.result, 300),
    'started', extract(epoch FROM run.started_at)::float8,
    'ended', extract(epoch FROM run.ended_at)::float8
) ORDER BY run.id), '[]')::text AS runs
FROM job_runs AS this JOIN job_runs AS run
    ON run.id = this.id OR (run.job, run.due_at) = (this.job, this.due_at)
    AND run.fence BETWEEN this.fence - $2::bigint AND this.fence + $2::bigint
WHERE this.id = $1
"""

# $1 the last account of the page before (null: the first page), $2 how many
BY_ID: Final = """
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       external_id, created_at, changed_at, holds_due_at > clock_timestamp() AS current
FROM (
    SELECT * FROM users WHERE id > coalesce($1::bigint, 0) ORDER BY id LIMIT $2
) AS page LEFT JOIN external_ids ON user_id = id ORDER BY id
"""

# These have no index: one by balance or by change would cost every change its upkeep. They read the
# whole table, so a page asks for them only while it is small.
BY_BALANCE: Final = """
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       external_id, created_at, changed_at, holds_due_at > clock_timestamp() AS current
FROM (
    SELECT * FROM users
    WHERE $1::bigint IS NULL
       OR (balance, -id) < (SELECT this.balance, -this.id FROM users AS this WHERE this.id = $1)
    ORDER BY balance DESC, id LIMIT $2
) AS page LEFT JOIN external_ids ON user_id = id ORDER BY balance DESC, id
"""

BY_CHANGE: Final = """
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       external_id, created_at, changed_at, holds_due_at > clock_timestamp() AS current
FROM (
    SELECT * FROM users
    WHERE $1::bigint IS NULL
       OR (changed_at, -id)
          < (SELECT this.changed_at, -this.id FROM users AS this WHERE this.id = $1)
    ORDER BY changed_at DESC, id LIMIT $2
) AS page LEFT JOIN external_ids ON user_id = id ORDER BY changed_at DESC, id
"""

# The planner's estimate: counting them would read them all.
ACCOUNTS_KNOWN: Final = """
SELECT greatest(reltuples, 0)::bigint AS known FROM pg_class WHERE oid = 'users'::regclass
"""

CHECKPOINT: Final = "SELECT checkpoint::text FROM jobs WHERE name = $1"
