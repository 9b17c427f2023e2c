"""The metrics of an instance, for Prometheus at `/metrics`.

Each metric is this instance's own since its start, to be summed over the instances. The metrics
named `balance_app_fleet_...` describe the whole fleet and are the same from each instance: they are
queried from PostgreSQL, at most once a second. While it does not answer in time they are left out,
and `balance_app_fleet_scrape_success` is 0: an alert on metrics that are missing never fires.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextvars import Context
from itertools import accumulate
from time import monotonic
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

from prometheus_client import (
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector, CollectorRegistry
from typing_extensions import override

from balance_app.states import Outcome

# accepted, refused by the balance, replayed; no such user, key of another request, `If-Match` of
# another state; 503 with applied "no", with "unknown", an overload; 500
Result = Literal[
    "accepted",
    "refused",
    "replayed",
    "no_user",
    "key_reused",
    "version_conflict",
    "unavailable",
    "unknown",
    "overloaded",
    "error",
]
RESULTS: Final[tuple[Result, ...]] = get_args(Result)
# These are 0 from the start, so that the first answer with one is seen as an increase.
STATUSES: Final = (200, 409, 422, 500, 503)
FRESH_SECONDS: Final = 1.0
PATIENCE_SECONDS: Final = 1.0

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_DELAY_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_TENTHS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class JobStats(NamedTuple):
    """The statistics of one job in PostgreSQL, whichever instance runs it."""

    name: str
    # Unix time; None: it never succeeded
    last_success_at: float | None
    # how long it has been ready, or its lease expired, and no instance has claimed it
    overdue_seconds: float
    paused: bool
    last_run_failed: bool
    # None: not an audit, or no audit has had a result yet
    mismatch: bool | None
    failures_in_a_row: int = 0
    losses_in_a_row: int = 0
    schedule_overridden: bool = False


class FleetStats(NamedTuple):
    """The statistics of the whole fleet in PostgreSQL."""

    jobs: list[JobStats]
    # bytes by table, of the tables that were measured
    table_bytes: Mapping[str, int]
    # the verdict (0 green, 1 amber, 2 red), and how many causes it has of each kind
    verdict: int | None = None
    causes: Mapping[str, int] = {}


NOTHING: Final = FleetStats([], {})


LabelValue = TypeVar("LabelValue")


class Tally(Collector, Generic[LabelValue]):
    """A counter with one label and no lock, for the event loop only.

    Every request increments one; a counter with a lock costs ten times as much.
    """

    def __init__(self, name: str, text: str, *, label: str, values: Iterable[LabelValue]) -> None:
        self._name, self._text, self._label = name, text, label
        self._counts = dict.fromkeys(values, 0)

    def inc(self, value: LabelValue) -> None:
        """Increment the counter of a label's value."""
        self._counts[value] = self._counts.get(value, 0) + 1

    def count(self, value: LabelValue) -> int:
        """Return the count of a label's value so far."""
        return self._counts.get(value, 0)

    @override
    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for value, count in self._counts.items():
            family.add_metric([str(value)], count)
        yield family


class Durations(Collector):
    """A histogram of seconds without a lock, for the event loop only."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    @override
    def collect(self) -> Iterator[Metric]:
        bounds = [*(str(float(each)) for each in _SECONDS), "+Inf"]
        yield HistogramMetricFamily(
            self._name,
            self._text,
            buckets=list(zip(bounds, accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )


FleetQuery: TypeAlias = Callable[[], Coroutine[Any, Any, FleetStats | None]]


class Metrics:
    """The metrics of one instance.

    Labels have few values: `job_name` is a job that the code declares (Prometheus has labels `job`
    and `instance` of its own for what it scrapes), `status` one that the service answers with.
    """

    def __init__(self, *, server: str = "", version: str = "", jobs: Iterable[str] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # it has no annotations
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("balance_app", "The instance.", registry=registry).info(
            {"server": server, "version": version}
        )
        self.requests: Final = Tally[int](
            "balance_app_requests",
            "Requests answered, by HTTP status (0: the client had disconnected).",
            label="status",
            values=STATUSES,
        )
        self.changes: Final = Tally[Result](
            "balance_app_changes",
            "Requested changes of a balance, by result.",
            label="result",
            values=RESULTS,
        )
        self.change_seconds: Final = Durations(
            "balance_app_change_seconds",
            "From a well-formed change to its outcome (accepted, refused, replayed).",
        )
        self.connection_wait: Final = Durations(
            "balance_app_connection_wait_seconds",
            "How long requests were in the pool wait queue before they got a connection.",
        )
        for each in (self.requests, self.changes, self.change_seconds, self.connection_wait):
            registry.register(each)
        self.refused_keys: Final = Counter(
            "balance_app_refused_keys",
            "Requests whose key was wrong, expired or revoked.",
            registry=registry,
        )
        self.connections_in_use: Final = Gauge(
            "balance_app_connections_in_use",
            "Connections in use: for requests, or lent to transactions of jobs.",
            ["pool"],
            registry=registry,
        )
        self.connections_limit: Final = Gauge(
            "balance_app_connections_limit",
            "The largest number of connections allowed.",
            ["pool"],
            registry=registry,
        )
        self.requests_waiting: Final = Gauge(
            "balance_app_requests_waiting",
            "Requests in the pool wait queue.",
            registry=registry,
        )
        self.database_unavailable: Final = Gauge(
            "balance_app_database_unavailable",
            "1 while this instance can't use its database.",
            registry=registry,
        )
        self.jobs_running: Final = Gauge(
            "balance_app_jobs_running", "Runs on this instance.", registry=registry
        )
        self.jobs_undeclared: Final = Gauge(
            "balance_app_jobs_undeclared",
            "Jobs of this instance's code that it could not declare in the database.",
            registry=registry,
        )
        self.start_delay: Final = Histogram(
            "balance_app_job_start_delay_seconds",
            "How long after its tick a run started, by PostgreSQL's clock (first runs of a tick).",
            buckets=_DELAY_SECONDS,
            registry=registry,
        )
        self.lease_margin: Final = Histogram(
            "balance_app_lease_margin_ratio",
            "The share of the shortest lease that was left when a heartbeat renewed it.",
            buckets=_TENTHS,
            registry=registry,
        )
        self._runs = Counter(
            "balance_app_job_runs",
            "Runs that this instance ended, or found lost.",
            ["job_name", "outcome"],
            registry=registry,
        )
        self.takeovers: Final = Counter(
            "balance_app_job_takeovers",
            "Jobs that this instance took from one that sent no heartbeat.",
            ["job_name"],
            registry=registry,
        )
        self.ticks_skipped: Final = Counter(
            "balance_app_job_ticks_skipped",
            "Ticks skipped because no instance was free or the run before still ran; not those of a"
            " pause.",
            ["job_name"],
            registry=registry,
        )
        for name in jobs:
            self.takeovers.labels(name)
            self.ticks_skipped.labels(name)
            for outcome in set(Outcome) - {Outcome.SKIPPED}:
                self._runs.labels(name, outcome)
        self._fleet = _Fleet()
        registry.register(self._fleet)
        self._fleet_query: FleetQuery | None = None
        self._running_query: asyncio.Task[FleetStats | None] | None = None
        self._fresh_until = 0.0

    def run_ended(self, name: str, outcome: str | None) -> None:
        """Count a run whose outcome this instance recorded; None: it recorded none."""
        if outcome is not None:
            self._runs.labels(name, outcome).inc()

    def set_fleet_query(self, query: FleetQuery) -> None:
        """Set the query of the fleet; it returns None while PostgreSQL is unavailable."""
        self._fleet_query = query

    async def render(self, *, as_openmetrics: bool = False) -> bytes:
        """Return all metrics, in Prometheus's text format or as OpenMetrics."""
        if self._fleet_query is not None:
            stats = await self._query_fleet(self._fleet_query)
            self._fleet.stats, self._fleet.success = stats or NOTHING, stats is not None
        if as_openmetrics:
            return cast("bytes", openmetrics.generate_latest(self._registry))  # type: ignore[no-untyped-call] # it has no annotations
        return generate_latest(self._registry)

    async def _query_fleet(self, query: FleetQuery) -> FleetStats | None:
        """Return the statistics, queried at most once a second; None without an answer in time."""
        running = self._running_query
        if running is None or (running.done() and monotonic() >= self._fresh_until):
            # In a context of its own: many requests share it.
            self._running_query = running = asyncio.create_task(query(), context=Context())
            self._fresh_until = monotonic() + FRESH_SECONDS
        await asyncio.wait({running}, timeout=PATIENCE_SECONDS)
        return running.result() if running.done() else None


class _Fleet(Collector):
    """The statistics of the fleet as last queried."""

    def __init__(self) -> None:
        self.stats = NOTHING
        # whether the query was answered in time; None: no query is set
        self.success: bool | None = None

    @override
    def collect(self) -> Iterator[Metric]:
        if self.success is not None:
            yield GaugeMetricFamily(
                "balance_app_fleet_scrape_success",
                "1 if PostgreSQL answered in time; if 0, the other balance_app_fleet metrics are"
                " missing from this scrape.",
                value=self.success,
            )
        # (name, help, value); None: not known
        gauges: tuple[tuple[str, str, Callable[[JobStats], float | None]], ...] = (
            (
                "last_success_timestamp_seconds",
                "When the job last succeeded, on any instance.",
                lambda job: job.last_success_at,
            ),
            (
                "overdue_seconds",
                "How long the job has been ready (or its lease expired) without being claimed.",
                lambda job: job.overdue_seconds,
            ),
            ("paused", "1 while the job is paused.", lambda job: job.paused),
            (
                "schedule_overridden",
                "1 while the job's schedule is one that was set at run time.",
                lambda job: job.schedule_overridden,
            ),
            (
                "last_run_failed",
                "1 if the job's last run failed, timed out or was lost.",
                lambda job: job.last_run_failed,
            ),
            (
                "failures_in_a_row",
                "Runs of the job that failed or timed out since it last succeeded.",
                lambda job: job.failures_in_a_row,
            ),
            (
                "losses_in_a_row",
                "Runs of the job lost with their process in a row; too many quarantine it.",
                lambda job: job.losses_in_a_row,
            ),
            (
                "audit_mismatch",
                "1 if the last audit with a result found a mismatch with the ledger.",
                lambda job: job.mismatch,
            ),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(f"balance_app_fleet_job_{name}", text, labels=["job_name"])
            for job in self.stats.jobs:
                number = value(job)
                if number is not None:
                    family.add_metric([job.name], float(number))
            yield family
        verdict, causes = self.stats.verdict, self.stats.causes
        if verdict is not None:
            yield GaugeMetricFamily(
                "balance_app_fleet_verdict",
                "The verdict: 0 green, 1 amber (healed by itself lately), 2 red (needs a hand).",
                value=verdict,
            )
        family = GaugeMetricFamily(
            "balance_app_fleet_verdict_causes",
            "How many causes of each kind the verdict has.",
            labels=["code"],
        )
        for code, number in causes.items():
            family.add_metric([code], number)
        yield family
        family = GaugeMetricFamily(
            "balance_app_fleet_table_bytes",
            "How large the table was when it was last measured, with its indexes.",
            labels=["table"],
        )
        for table, size in self.stats.table_bytes.items():
            family.add_metric([table], size)
        yield family
