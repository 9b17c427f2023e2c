"""What a job's function is called with, and what is refused."""

import json
from collections.abc import AsyncIterator
from datetime import date, timedelta
from typing import Any, Literal

import pytest

from balance_app.jobs.arguments import ArgumentsError, Parameters
from balance_app.jobs.job import DeclarationError, Job, job
from balance_app.jobs.run import Run
from balance_app.jobs.threads import ThreadRun
from tests.jobs.support import JobsDatabase, on

HOUR = timedelta(hours=1)


async def report(  # noqa: PLR0913 - each is of another type
    run: Run,
    city: str,
    *,
    days: int = 7,
    since: date | None = None,
    kind: Literal["long", "short"] = "short",
    json: list[int] | None = None,
) -> str:
    return f"{city} {days} {since!r} {kind} {json} {dict(run.args)}"


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        ({}, "city: it is missing"),
        ({"city": 1}, "city: input should be a valid string"),
        ({"city": "x", "days": "7"}, "days: input should be a valid integer"),
        ({"city": "x", "days": True}, "days: input should be a valid integer"),
        ({"city": "x", "days": 1.5}, "days: input should be a valid integer"),
        ({"city": "x", "since": "yesterday"}, "since: input should be a valid date"),
        ({"city": "x", "kind": "huge"}, "kind: input should be 'long' or 'short'"),
        ({"city": "x", "json": [1, "2"]}, "json.1: input should be a valid integer"),
        ({"city": "x", "run": 1}, "run: it has no such parameter"),
        ({"city": "x", "day": 1}, "day: it has no such parameter"),
        ({"city": "x\0"}, "no NUL"),
        ({"city": "x" * 9000}, "at most 8192 bytes"),
        ({"city": float("nan")}, "they must be JSON"),
        ({"city": object()}, "they must be JSON"),
        ({"city": "\ud800"}, "they must be JSON"),
        ({"city": "x", "days": float("inf")}, "they must be JSON"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any], refused: str) -> None:
    """By the same sentence where they are declared, and where they are requested."""
    with pytest.raises(ArgumentsError) as error:
        Parameters(report).check(args)
    assert refused in str(error.value)
    with pytest.raises(DeclarationError) as declaration:
        job(name="report", every=HOUR, args=args)(report)
    assert str(declaration.value) == f"Job report: args: {error.value}."


def test_arguments_are_of_the_hinted_types() -> None:
    """JSON has no dates: they are texts in it."""
    args = {"city": "Rome", "since": "2026-11-01", "json": [1]}
    assert Parameters(report).check(args) == args | {"since": date(2026, 11, 1)}


class Unknown:
    """No type that JSON can hold."""


def takes_unknown(_run: Run, _what: Unknown) -> None: ...
def takes_a_name_that_is_not_there(_run: Run, what: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def takes_it_by_position(_run: Run, what: int, /) -> None: ...


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (takes_unknown, "Unable to generate"),
        (takes_a_name_that_is_not_there, "its type hints can't be read"),
        (takes_it_by_position, "what can't be passed by name"),
    ],
)
def test_parameters_that_no_argument_can_fit_are_refused(function: Any, refused: str) -> None:  # noqa: ANN401
    """When the job is declared, not when it runs."""
    with pytest.raises(DeclarationError, match=refused):
        job(name="report", every=HOUR)(function)


@pytest.mark.parametrize("args", [[("a", 1)], "days", {1: 2}])
def test_arguments_have_names(args: Any) -> None:  # noqa: ANN401
    """They are a dict of texts."""
    with pytest.raises(DeclarationError, match="write a dict of names"):
        job(name="report", every=HOUR, args=args)(report)


def test_functions_of_any_arguments_and_of_none() -> None:
    """`**more` takes all names; a function of its run alone takes none, whatever its hint says."""

    def takes_all(_run: "Nowhere", **more: object) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def takes_none(_run: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert Parameters(takes_all).check({"x": [1]}) == {"x": [1]}
    assert Parameters(takes_none).check({}) == {}
    with pytest.raises(ArgumentsError, match="it takes no arguments, so not x"):
        Parameters(takes_none).check({"x": 1})


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


def in_thread(run: ThreadRun, *, days: int, more: str = "") -> str:
    return f"{days}{more} {dict(run.args)}"


async def request(jobs_db: JobsDatabase, name: str, args: dict[str, Any]) -> None:
    await jobs_db.admin.execute(
        "UPDATE jobs SET requested_by = 'ada', requested_args = $2, due_at = clock_timestamp(),"
        " ready_at = clock_timestamp() WHERE name = $1",
        name,
        json.dumps(args),
    )


@pytest.mark.parametrize("function", [report, in_thread])
async def test_a_request_replaces_declared_arguments_once(
    jobs_db: JobsDatabase,
    function: Any,  # noqa: ANN401
) -> None:
    """The history has what was requested; the run after it is as declared."""
    declared = {"days": 3} | ({"city": "Rome"} if function is report else {})
    moon: Job = job(name="moon", every=HOUR, args=declared)(function)
    async with jobs_db.scheduler([moon]):
        (first,) = await jobs_db.ended("moon")
        await request(jobs_db, "moon", {"days": 30})
        second = (await jobs_db.ended("moon", runs=2))[1]
        await jobs_db.ready("moon")
        third = (await jobs_db.ended("moon", runs=3))[2]
    assert [run["outcome"] for run in (first, second, third)] == ["succeeded"] * 3
    assert [run["args"] for run in (first, second, third)] == [None, '{"days": 30}', None]
    assert "30" in second["result"]
    assert first["result"] == third["result"]
    assert str(declared) in first["result"]
    row = await jobs_db.row("moon")
    assert (json.loads(row["args"]), row["requested_args"]) == (declared, None)


async def test_requested_arguments_that_do_not_fit_fail_the_run(jobs_db: JobsDatabase) -> None:
    """Where the instance that took the request could not check them."""
    moon = job(name="moon", every=HOUR, args={"days": 3})(in_thread)
    async with jobs_db.scheduler([moon]):
        await jobs_db.ended("moon")
        await request(jobs_db, "moon", {"days": "x", "week": 1})
        run = (await jobs_db.ended("moon", runs=2))[1]
    sentence = "days: input should be a valid integer; week: it has no such parameter"
    assert (run["outcome"], run["result"]) == ("failed", f"ArgumentsError: {sentence}")
