"""The picture of a burst: what it shows, where it is, and that it is text alone."""

import asyncio
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from jinja2 import Environment
from typer.testing import CliRunner, Result

from loadtest.__main__ import EXIT_PASSED, cli
from loadtest.accounts import Account
from loadtest.burst import Answer, BurstConfig, BurstResult, NoAnswer, Outcome
from loadtest.picture import draw
from loadtest.preconditions import CannotRunError, Target
from loadtest.report import Report
from loadtest.timeline import timeline
from loadtest.verdict import Expectation, evaluate
from tests.loadtest.fake_service import FakeService, Json
from tests.web.browser import chromium

KEY = "the-secret-of-this-test"
HOSTILE = "<script>alert(1)</script>\"'&"
MOST_BYTES = 300_000


def body(**members: Any) -> bytes:  # noqa: ANN401 - as JSON has them
    return json.dumps({"userId": 7, **members}).encode()


def accepted(balance: int, version: int, after: float, server: str = "app1") -> Answer:
    return Answer(200, server, body(balance=balance, version=version), after, after)


def refused(balance: int, version: int, after: float, server: str = "app1") -> Answer:
    members = {"code": "insufficient-funds", "amount": -2, "applied": "no"}
    content = body(balance=balance, version=version, shortfall=2 - balance, **members)
    return Answer(409, server, content, after, after)


def burst(pairs: int, instances: int = 1) -> list[Outcome]:
    """Return as many acceptances as refusals, one each 100 microseconds."""
    answers: list[Outcome] = []
    for n in range(2 * pairs):
        server = f"app{n % instances + 1}"
        if n < pairs:
            answers.append(accepted(2 * (pairs - n - 1), n + 2, (n + 1) / 1e4, server))
        else:
            answers.append(refused(0, pairs + 1, (n + 1) / 1e4, server))
    return answers


def report(outcomes: list[Outcome], *, connections: int | None = None) -> Report:
    number = len(outcomes)
    config = BurstConfig(
        targets=[Target("127.0.0.1", 3000)],
        user_id=7,
        amount=-2,
        requests=number,
        connections=connections or number,
        keyed=False,
        timeout_seconds=9,
        api_key=KEY,
    )
    last = max((each.after_seconds for each in outcomes if isinstance(each, Answer)), default=0.0)
    before = Account.model_validate({"userId": 7, "balance": number, "version": 1})
    expected = Expectation(before, -2, number)
    verdict = evaluate(expected, outcomes, CannotRunError(f"Not read: {HOSTILE}"))
    return Report(config, expected, BurstResult(outcomes, 0.1, last, 0.1), verdict)


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.all if name == tag)

    def paths(self, classes: str) -> list[str]:
        return [each["d"] for each in self.named("path") if each["class"] == classes]


def counts_of_dots(page: str) -> dict[str, int]:
    elements = Elements(page)
    names = ("accepted", "refused", "other")
    dots = {name: "".join(elements.paths(f"dots {name}")).count("h0") for name in names}
    return {name: count for name, count in dots.items() if count}


def counts_of_instances(page: str) -> dict[str, tuple[int, int]]:
    found = re.findall(
        r"<h3>(.*?)</h3>.*?<figcaption>(\d+) accepted, (\d+) refused", page, re.DOTALL
    )
    return {name: (int(yes), int(no)) for name, yes, no in found}


def counts_of_rows(page: str) -> list[int]:
    rows = re.findall(r"<td>(\d+)</td><td>(\d+)</td><td>(\d+)</td></tr>", page)
    return [sum(map(int, column)) for column in zip(*rows, strict=True)]


async def fire(service: FakeService, *options: str) -> Result:
    """Send 200 withdrawals of 2 to a user with 200."""
    async with service.running():
        arguments = [service.url, "--requests=200", "--balance=200", *options]
        return await asyncio.to_thread(CliRunner().invoke, cli, arguments)


@pytest.mark.parametrize("options", [(), ("--connections=7",)])
async def test_it_shows_each_answer_once(tmp_path: Path, options: tuple[str, ...]) -> None:
    """As many dots, and as many counted over time and by instance, as the table has answers."""

    class Overloaded(FakeService):
        def change(self, amount: int) -> tuple[int, Json] | None:
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked in {10, 20, 30}:
                return 503, {"code": "overloaded", "applied": "no"}
            return super().change(amount)

    file = tmp_path / "picture.html"
    result = await fire(Overloaded(), "--json", f"--picture={file}", *options)
    measured = json.loads(result.stdout)
    page = file.read_text()
    assert measured["picture"] == str(file)
    counts = [measured["accepted"]["measured"], measured["refused"]["measured"], 3]
    assert counts == [100, 97, 3]
    assert list(counts_of_dots(page).values()) == counts
    assert counts_of_rows(page) == counts
    assert list(counts_of_instances(page).values()) == [tuple(counts[:2])]
    assert list(measured["requestsPerInstance"].values()) == [sum(counts)]
    assert "FAIL" in Elements(page).text
    assert "503 overloaded" in Elements(page).text


def test_an_answer_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the counts: a picture that loses an answer has others."""
    outcomes = burst(100)
    whole = draw(report(outcomes))
    assert counts_of_dots(whole) == {"accepted": 100, "refused": 100}
    assert counts_of_rows(whole) == [100, 100, 0]
    monkeypatch.setattr("loadtest.picture.timeline", lambda outcomes: timeline(outcomes)[1:])
    lossy = draw(report(outcomes))
    assert counts_of_dots(lossy) != counts_of_dots(whole)
    assert counts_of_rows(lossy) != counts_of_rows(whole)


def test_each_instance_has_its_own() -> None:
    """What an instance accepted and refused, as many times as there are instances."""
    page = draw(report(burst(100, instances=4)))
    assert counts_of_instances(page) == {f"app{n}": (25, 25) for n in range(1, 5)}


def test_a_dot_stands_at_its_time_and_number() -> None:
    """To the right with time, up with the number of the request, or with the latency."""
    outcomes: list[Outcome] = [accepted(2 * (4 - n), n + 2, 0.1 * (n + 1)) for n in range(5)]
    one_each = Elements(draw(report(outcomes))).paths("dots accepted")[0]
    places = [tuple(map(int, place)) for place in re.findall(r"M(\d+) (\d+)h0", one_each)]
    assert places == sorted(places)
    assert [down for _, down in places] == [1000, 800, 600, 400, 200]
    again: list[Outcome] = [
        Answer(200, "app1", body(balance=8 - 2 * n, version=n + 2), 0.1, 0.1 * (n + 1))
        for n in range(5)
    ]
    kept = Elements(draw(report(again, connections=1))).paths("dots accepted")[0]
    assert [down for _, down in re.findall(r"M(\d+) (\d+)h0", kept)] == ["0"] * 5


@pytest.mark.parametrize(("lowest", "is_below"), [(0, False), (-2, True)])
def test_a_balance_below_zero_would_be_seen(*, lowest: int, is_below: bool) -> None:
    """The line crosses that of 0, and a mark stands there, exactly when an answer is below it."""
    elements = Elements(draw(report([accepted(2, 2, 0.1), accepted(lowest, 3, 0.2)])))
    (zero,) = (int(each) for each in re.findall(r"M0 (\d+)H", elements.paths("zero")[0]))
    line = elements.paths("line")[0]
    assert (max(map(int, re.findall(r"V(\d+)", line))) > zero) is is_below
    assert elements.paths("dots below")[0].count("h0") == is_below
    assert f"{lowest} at the lowest" in elements.text
    assert ("never below 0" in elements.text) is not is_below


def test_what_the_service_sent_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of instances, codes and problems are shown and never markup; the control lets them."""
    outcomes = [
        *burst(10),
        accepted(0, 2, 0.1, server=HOSTILE),
        Answer(500, HOSTILE, body(code=HOSTILE), 0.2, 0.2),
    ]
    elements = Elements(draw(report(outcomes)))
    assert not list(elements.named("script"))
    assert elements.text.count(HOSTILE) >= 4
    monkeypatch.setattr(
        "loadtest.picture.Environment",
        lambda **options: Environment(**{**options, "autoescape": False}),  # noqa: S701 - control
    )
    assert list(Elements(draw(report(outcomes))).named("script"))


def test_it_needs_nothing_from_elsewhere_and_has_no_secret() -> None:
    """No script, no address to load from, and no key."""
    page = draw(report(burst(100)))
    elements = Elements(page)
    assert not [tag for tag, _ in elements.all if tag in {"script", "img", "iframe", "object"}]
    loaded = [
        value
        for _, attributes in elements.all
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "data"}
    ]
    assert loaded == ["data:,"]
    assert not re.search(r"url\(|@import", page)
    assert KEY not in page


@pytest.mark.parametrize(
    ("outcomes", "drawn"),
    [
        (burst(5_000, instances=5), 10_000),
        (burst(10_000, instances=40), 15_000),
        ([accepted(0, 2, n / 1e4) for n in range(10_000)], 10_000),
        (
            [
                Answer(500, f"{n:x}" * 40, body(code=HOSTILE * 9 + str(n % 500)), n / 9e4, n / 9e4)
                for n in range(20_000)
            ],
            15_000,
        ),
    ],
    ids=["the burst", "large", "accepted", "odd"],
)
def test_it_stays_small(outcomes: list[Outcome], drawn: int) -> None:
    """Of very many answers not all are drawn, and it is said how many are."""
    page = draw(report(outcomes))
    dots = sum(counts_of_dots(page).values())
    assert 0.6 * drawn <= dots <= drawn
    assert (f"{dots} of the {len(outcomes)} answers are drawn" in page) is (dots < len(outcomes))
    assert len(page.encode()) <= MOST_BYTES


def test_a_burst_without_answers_has_no_charts() -> None:
    """It says so, with the verdict."""
    page = draw(report([NoAnswer("connection reset")] * 3))
    text = Elements(page).text
    assert "no request was answered" in text
    assert "FAIL" in text
    assert "<svg" not in page
    assert "1 requests got no answer" in draw(report([*burst(1), NoAnswer("connection reset")]))


async def test_it_is_kept_for_its_owner_and_made_anew_each_time(picture: Path) -> None:
    """Beside the data of `make run`, in a directory that is made; the table says where."""
    for _ in range(2):
        result = await fire(FakeService())
        assert result.exit_code == EXIT_PASSED
        assert str(picture) in result.stdout
        assert picture.stat().st_mode & 0o777 == 0o600
        assert picture.parent.stat().st_mode & 0o777 == 0o700
        assert "PASS" in picture.read_text()
        picture.write_text("older")


async def test_nobody_looks_at_it_in_ci(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None where CI is set, with --json and with --no-picture, unless a file is named."""
    named = tmp_path / "named.html"
    assert json.loads((await fire(FakeService(), "--json")).stdout)["picture"] is None
    assert "picture" not in (await fire(FakeService(), "--no-picture")).stdout
    monkeypatch.setenv("CI", "true")
    assert "picture" not in (await fire(FakeService())).stdout
    assert not picture.parent.exists()
    assert str(named) in (await fire(FakeService(), f"--picture={named}")).stdout
    assert named.exists()


async def test_one_that_cannot_be_written_changes_no_verdict(picture: Path) -> None:
    """The table says why; with --json a line on stderr does."""
    picture.parent.write_text("a file, no directory")
    result = await fire(FakeService())
    assert result.exit_code == EXIT_PASSED
    assert "not written to" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("PASS")
    result = await fire(FakeService(), "--json", f"--picture={picture}")
    assert (result.exit_code, json.loads(result.stdout)["picture"]) == (EXIT_PASSED, None)
    assert "The picture is not written to" in result.stderr


async def test_a_browser_shows_it(tmp_path: Path) -> None:
    """On a phone too, without scrolling sideways; its policy refuses nothing; axe is silent."""
    file = tmp_path / "picture.html"
    outcomes = [*burst(500, instances=5), Answer(500, HOSTILE * 5, b"", 0.05, 0.05)]
    file.write_text(draw(report(outcomes)))
    themes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    faults: list[str] = []
    async with chromium() as browser:
        for theme in themes:
            page = await browser.new_page(
                viewport={"width": 360, "height": 800}, color_scheme=theme
            )
            page.on("console", lambda line: faults.append(line.text))
            await page.goto(file.as_uri())
            assert await page.evaluate("document.documentElement.scrollWidth") == 360
            strokes = await page.eval_on_selector_all(
                ".dots:not(.below)", "all => all.map(each => getComputedStyle(each).stroke)"
            )
            assert len(set(strokes)) == 3
            assert (await Axe().run(page)).response["violations"] == []
            assert faults == []
            await page.close()
