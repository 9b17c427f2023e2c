"""The dashboard and the alert rules use existing metrics, and each metric is used."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from balance_app.db.pool import Database
from balance_app.jobs import Registry
from balance_app.jobs.leases import HeldLeases
from balance_app.metrics import FleetStats, JobStats, Metrics
from balance_app.settings import load_settings

JOBS: Final = Registry.load("balance_app.maintenance")
DEPLOY: Final = Path(__file__).parents[1] / "deploy"
SOURCE: Final = Path(__file__).parents[1] / "src"
ALERTS: Final = DEPLOY / "prometheus-alerts.yml"
README: Final = (DEPLOY / "README.md").read_text(encoding="utf-8")
DASHBOARD: Final[dict[str, Any]] = json.loads(
    (DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8")
)
RULES: Final[list[dict[str, Any]]] = [
    rule
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]

# Labels that Prometheus adds to every series, and its own series about a scrape.
TARGET: Final = {"job": "balance_app", "instance": "app1:3000"}
OF_PROMETHEUS: Final = {"up"}
STARTED: Final = "process_start_time_seconds"
VARIABLES: Final = {"$__rate_interval": "5m", "$instance": "app1:3000"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every query, with its place."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"]


QUERIES: Final = dict(expressions())


@pytest.fixture(scope="module")
async def series() -> dict[str, list[dict[str, str]]]:
    """The labels of every series of an instance that runs the ten jobs, by name."""
    metrics = Metrics(server="app1", version="0", jobs=list(JOBS))

    async def query() -> FleetStats:
        jobs = [JobStats(job.name, 1.0, 0.0, False, False, False) for job in JOBS.values()]  # noqa: FBT003 - a row
        return FleetStats(jobs, {"entries": 8192}, verdict=2, causes={"job-failing": 1})

    metrics.set_fleet_query(query)
    Database(load_settings(db_host="localhost"), metrics)  # never started
    text = (await metrics.render()).decode()
    found: dict[str, list[dict[str, str]]] = {name: [TARGET] for name in OF_PROMETHEUS}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**TARGET, **sample.labels})
    return found


def parse(query: str) -> list[promql_parser.Expr]:
    """Return all parts of a query; an invalid query raises."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    parts: list[promql_parser.Expr] = []
    promql_parser.walk(promql_parser.parse(query), parts.append)
    return parts


@pytest.mark.parametrize("where", QUERIES)
def test_every_selector_finds_something(
    where: str, series: dict[str, list[dict[str, str]]]
) -> None:
    """Each selected name, label and value exists."""
    selectors = [
        part for part in parse(QUERIES[where]) if isinstance(part, promql_parser.VectorSelector)
    ]
    assert selectors
    for selector in selectors:
        assert selector.name is not None
        assert selector.name in series
        for matcher in selector.matchers.matchers:
            values = {labels.get(matcher.name, "") for labels in series[selector.name]}
            match matcher.op:
                case promql_parser.MatchOp.Equal:
                    assert matcher.value in values
                case promql_parser.MatchOp.Re:
                    for each in matcher.value.split("|"):
                        assert any(re.fullmatch(each, value) for value in values), each
                case _:
                    pytest.fail(f"{matcher}: teach this test what it means")


@pytest.mark.parametrize("where", QUERIES)
def test_every_grouping_is_by_a_label_that_there_is(
    where: str, series: dict[str, list[dict[str, str]]]
) -> None:
    """Each label that is grouped by, joined on or copied exists on the series."""
    parts = parse(QUERIES[where])
    known = {
        label
        for part in parts
        if isinstance(part, promql_parser.VectorSelector)
        for labels in series[part.name or ""]
        for label in labels
    }
    for part in parts:
        named: list[str] = []
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            named += part.modifier.labels
        if isinstance(part, promql_parser.BinaryExpr) and part.modifier is not None:
            named += part.modifier.matching.labels if part.modifier.matching else []
            named += part.modifier.group_labels or []
        assert set(named) <= known


@pytest.mark.parametrize("where", QUERIES)
def test_counters_are_used_by_their_increase(where: str) -> None:
    """A counter's value depends on its instance's start; a gauge has no rate."""
    parts = parse(QUERIES[where])
    ranged = {
        part.vector_selector.name
        for part in parts
        if isinstance(part, promql_parser.MatrixSelector)
    }
    for part in parts:
        if isinstance(part, promql_parser.VectorSelector) and part.name is not None:
            counts = part.name.endswith(("_total", "_bucket", "_count", "_sum"))
            assert (part.name in ranged) == counts, part.name


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(balance_app_change_total[5m]))",
        'sum(rate(balance_app_changes_total{result="acepted"}[5m]))',
        'sum(rate(balance_app_changes_total{result=~"accepted|denied"}[5m]))',
        'balance_app_database_unavailable{pool="requests"}',
    ],
)
def test_a_selector_that_finds_nothing_fails(
    wrong: str, series: dict[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the first test: with a wrong name, value or label."""
    monkeypatch.setitem(QUERIES, "wrong", wrong)
    with pytest.raises(AssertionError):
        test_every_selector_finds_something("wrong", series)


def test_every_metric_is_on_the_dashboard_or_in_an_alert(
    series: dict[str, list[dict[str, str]]],
) -> None:
    """A metric without a use should not exist."""
    used = {
        part.name
        for query in QUERIES.values()
        for part in parse(query)
        if isinstance(part, promql_parser.VectorSelector)
    }
    ours = {_family(name) for name in series if name.startswith("balance_app_")}
    assert ours == {_family(name) for name in used if name and name.startswith("balance_app_")}


def test_the_table_has_every_metric(series: dict[str, list[dict[str, str]]]) -> None:
    """deploy/README.md lists each metric with its labels, and no others."""
    rows = re.findall(r"^\| `(balance_app_\w+)` \| (.*?) \|", README, re.MULTILINE)
    expected = {
        _family(name): sorted({label for each in found for label in each} - {*TARGET, "le"})
        for name, found in series.items()
        if name.startswith("balance_app_")
    }
    assert {name: sorted(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == expected


def test_the_table_has_every_result(series: dict[str, list[dict[str, str]]]) -> None:
    """Of a change, which are all there from the start."""
    row = r"^\| `balance_app_changes_total` \| `result` \| (.*)"
    (meaning,) = re.findall(row, README, re.MULTILINE)
    exported = {labels["result"] for labels in series["balance_app_changes_total"]}
    assert set(re.findall(r"`(\w+)`", meaning)) == exported


def _family(name: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_alerts_are_complete() -> None:
    """Each has a severity, a summary and advice; names are unique."""
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 10
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"].endswith(".")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_what_alerts_quote_of_the_log_is_logged() -> None:
    """Whoever searches the log for it would find nothing else."""
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    logged = set(re.findall(r'\blog\.\w+\(\s*"(.*?)"', source))
    texts = [rule["annotations"]["description"] for rule in RULES]
    quoted = [each for text in texts for each in re.findall(r'log has [^.]*?"(.+?)"', text)]
    assert len(quoted) == 2
    assert set(quoted) <= logged


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_alerts_use_labels_that_they_have(rule: dict[str, Any]) -> None:
    """The placeholders of the texts are labels of the expression's result."""
    sentences = " ".join(rule["annotations"].values())
    used = set(re.findall(r"\$labels\.(\w+)", sentences))
    kept = _kept(promql_parser.parse(rule["expr"]))
    assert {"job_name", "instance"} & kept == used, "no more, but who is concerned has to be named"


def _kept(part: promql_parser.Expr) -> set[str]:
    """Return the labels that an expression leaves on its results."""
    match part:
        case promql_parser.BinaryExpr():
            return _kept(part.lhs) | _kept(part.rhs)
        case promql_parser.ParenExpr():
            return _kept(part.expr)
        case promql_parser.AggregateExpr():
            return set(part.modifier.labels) if part.modifier is not None else set()
        case promql_parser.VectorSelector():
            return set(TARGET)
        case _:
            return set()


async def scraped(stats: FleetStats | None) -> list[Sample]:
    """Return what an instance exports; None: PostgreSQL does not answer."""
    metrics = Metrics(jobs=list(JOBS))

    async def query() -> FleetStats | None:
        return stats

    metrics.set_fleet_query(query)
    text = (await metrics.render()).decode()
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples]


async def test_which_alerts_read_what_a_new_fleet_lacks() -> None:
    """A rule on a metric that is missing never fires: each of these has a reason."""
    new = FleetStats([JobStats(name, None, 0.0, False, False, None) for name in JOBS], {}, 0)  # noqa: FBT003 - a row
    exported = {sample.name for sample in await scraped(new)} | OF_PROMETHEUS
    lacking = {
        rule["alert"]: part.name
        for rule in RULES
        for part in parse(rule["expr"])
        if isinstance(part, promql_parser.VectorSelector) and part.name not in exported
    }
    assert lacking == {
        # without a result of an audit, BalanceAppLedgerNotAudited fires
        "BalanceAppLedgerMismatch": "balance_app_fleet_job_audit_mismatch",
        # counts from the start of the oldest instance
        "BalanceAppLedgerNotAudited": "balance_app_fleet_job_last_success_timestamp_seconds",
        # there is a cause whenever the verdict is 2
        "BalanceAppNeedsAHand": "balance_app_fleet_verdict_causes",
    }


@pytest.mark.parametrize(
    ("audited", "started", "fires"),
    [(61, 99, True), (59, 99, False), (None, 61, True), (None, 59, False)],
)
async def test_a_ledger_that_is_not_audited_fires(
    audited: int | None, started: int, *, fires: bool
) -> None:
    """An hour after the last audit, or after the start if there was none: minutes ago."""
    (start,) = (each.value for each in await scraped(None) if each.name == STARTED)
    now = start + started * 60
    last = None if audited is None else now - audited * 60
    stats = FleetStats([JobStats("audit-ledger", last, 0.0, False, False, None)], {}, 0)  # noqa: FBT003 - a row
    (rule,) = (each for each in RULES if each["alert"] == "BalanceAppLedgerNotAudited")
    expression = promql_parser.parse(rule["expr"])
    found = evaluated(expression, await scraped(stats), now)
    assert found == ([(audited or started) * 60] if fires else [])
    assert evaluated(expression, await scraped(None), now) == [], "PostgreSQL does not answer"
    assert evaluated(expression, [], now) == [], "no instance is scraped"


OPERATORS: Final[dict[str, Callable[[list[float], list[float]], list[float]]]] = {
    "or": lambda left, right: left or right,
    "and": lambda left, right: left if right else [],
    "-": lambda left, right: [a - b for a in left for b in right],
    ">": lambda left, right: [a for a in left for b in right if a > b],
    "==": lambda left, right: [a for a in left for b in right if a == b],
}


def evaluated(part: promql_parser.Expr, samples: list[Sample], now: float) -> list[float]:
    """Evaluate an expression whose operands have at most one value each, or are aggregated."""
    values: list[float] = []
    match part:
        case promql_parser.NumberLiteral():
            values = [part.val]
        case promql_parser.ParenExpr():
            values = evaluated(part.expr, samples, now)
        case promql_parser.Call():
            assert part.func.name == "time"
            values = [now]
        case promql_parser.VectorSelector():
            values = [
                value
                for name, labels, value, *_ in samples
                if name == part.name
                and all({**TARGET, **labels}[m.name] == m.value for m in part.matchers.matchers)
            ]
        case promql_parser.AggregateExpr():
            if found := evaluated(part.expr, samples, now):
                values = [{"max": max, "min": min}[str(part.op)](found)]
        case promql_parser.BinaryExpr():
            values = OPERATORS[str(part.op)](
                evaluated(part.lhs, samples, now), evaluated(part.rhs, samples, now)
            )
        case _:
            pytest.fail(f"{part}: teach this test what it means")
    return values


@pytest.mark.parametrize(("heartbeat", "bound"), [(1.0, 0.3), (2.0, 0.2)], ids=["default", "third"])
def test_the_lease_margin_is_as_the_texts_say(heartbeat: float, bound: float) -> None:
    """A heartbeat in time leaves over a tenth more than the bound, a run is stopped below it."""
    settings = load_settings(db_host="localhost", job_heartbeat_seconds=heartbeat)
    leases = HeldLeases(settings, watchdog=False)
    in_time = (leases.trust_seconds - heartbeat) / settings.job_lease_seconds
    stopped = leases.margin_seconds / settings.job_lease_seconds
    assert stopped < bound < in_time - 0.1
    (panel,) = (each for each in DASHBOARD["panels"] if each["title"] == "Lease margin")
    rules = ALERTS.read_text(encoding="utf-8")
    assert f'le="{bound}"' in rules
    for share in (in_time, stopped):
        words = {2: "a half", 3: "a third", 6: "a sixth"}[round(1 / share)]
        assert words in panel["description"]
        assert words in rules


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """Its data source is a variable; panels have unique ids and do not overlap."""
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "instance"}
    panels = DASHBOARD["panels"]
    assert Counter(panel["id"] for panel in panels).most_common(1)[0][1] == 1
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"].endswith(".")
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
