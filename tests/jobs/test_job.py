"""An invalid declaration is refused with a sentence that names the value."""

import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from balance_app.jobs.job import DeclarationError, Job, Registry, job
from balance_app.jobs.schedule import Cron, Every
from balance_app.settings import BadSettingsError, load_settings

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


async def nothing(_run: object) -> None:
    """Do nothing."""


def in_thread(_run: object) -> None:
    """Do nothing, in a thread."""


def declare(function: Callable[[Any], Any] = nothing, /, **arguments: object) -> Job:
    return job(**cast("Any", {"name": "moon", **arguments}))(function)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an empty name": ({"name": "", "every": MINUTE}, "named ''"),
    "a capital": ({"name": "Moon", "every": MINUTE}, "named 'Moon'"),
    "an underscore": ({"name": "full_moon", "every": MINUTE}, "named 'full_moon'"),
    "a blank": ({"name": "full moon", "every": MINUTE}, "named 'full moon'"),
    "a digit first": ({"name": "1moon", "every": MINUTE}, "named '1moon'"),
    "a hyphen first": ({"name": "-moon", "every": MINUTE}, "named '-moon'"),
    "a line": ({"name": "moon\n", "every": MINUTE}, r"named 'moon\n'"),
    "a letter of elsewhere": ({"name": "m\u00f6nd", "every": MINUTE}, "named 'm\u00f6nd'"),
    "a long name": ({"name": "m" * 64, "every": MINUTE}, f"named '{'m' * 64}'"),
    "no schedule": ({}, "Job moon: give either every= or cron="),
    "two schedules": ({"every": MINUTE, "cron": "* * * * *"}, "give either every= or cron="),
    "a zone without cron": ({"every": MINUTE, "tz": "Europe/Berlin"}, "tz='Europe/Berlin'"),
    "UTC without cron": ({"every": MINUTE, "tz": "UTC"}, "tz='UTC'"),
    "below a second": ({"every": timedelta(microseconds=999_999)}, "(0.999999 s)"),
    "no interval": ({"every": timedelta(0)}, "(0 s)"),
    "a negative interval": ({"every": -MINUTE}, "(-60 s)"),
    "over a year": ({"every": timedelta(days=367)}, "(31708800 s)"),
    "no expression": ({"cron": ""}, "The cron expression ''"),
    "four fields": ({"cron": "0 3 * *"}, "'0 3 * *' has 4 fields"),
    "six fields": ({"cron": "0 0 3 * * *"}, "'0 0 3 * * *' has 6 fields"),
    "a minute too many": ({"cron": "60 3 * * *"}, "'60 3 * * *'"),
    "words": ({"cron": "at three every single day"}, "'at three every single day'"),
    "a day that never comes": ({"cron": "0 0 31 2 *"}, "'0 0 31 2 *'"),
    "no such zone": ({"cron": "0 3 * * *", "tz": "Europe/Moon"}, "'Europe/Moon'"),
    "a path for a zone": ({"cron": "0 3 * * *", "tz": "../../etc/passwd"}, "'../../etc/passwd'"),
    "a zone with a NUL": ({"cron": "0 3 * * *", "tz": "Europe\0"}, r"'Europe\x00'"),
    "no timeout": ({"every": MINUTE, "timeout": timedelta(0)}, "timeout is 0:00:00"),
    "a negative timeout": ({"every": MINUTE, "timeout": -SECOND}, "timeout is -1 day, 23:59:59"),
    "a retry at once": ({"every": MINUTE, "retry_after": timedelta(0)}, "retry_after is 0:00:00"),
    "a retry before": ({"every": MINUTE, "retry_after": -SECOND}, "retry_after is -1 day"),
    "a backoff that shrinks": (
        {"every": MINUTE, "retry_after": SECOND, "retry_backoff": 0.5},
        "retry_backoff is 0.5",
    ),
    "a backoff that is no number": (
        {"every": MINUTE, "retry_after": SECOND, "retry_backoff": float("nan")},
        "retry_backoff is nan",
    ),
    "a backoff in words": ({"every": MINUTE, "retry_backoff": "2"}, "retry_backoff is '2'"),
    "no retries": (
        {"every": MINUTE, "retry_after": SECOND, "max_retries": 0},
        "max_retries is 0",
    ),
    "half a retry": (
        {"every": MINUTE, "retry_after": SECOND, "max_retries": 0.5},
        "max_retries is 0.5",
    ),
    "retries without a wait": ({"every": MINUTE, "max_retries": 3}, "max_retries=3"),
    "a pause after no failure": (
        {"every": MINUTE, "pause_after_failures": True},
        "pause_after_failures is True",
    ),
    "a negative duration": (
        {"every": MINUTE, "min_duration": -SECOND},
        "min_duration is -1 day",
    ),
    "a negative jitter": ({"every": MINUTE, "jitter": -SECOND}, "jitter is -1 day, 23:59:59"),
    "jitter as long as the interval": ({"every": MINUTE, "jitter": MINUTE}, "jitter is 0:01:00"),
    "jitter over the interval": ({"every": MINUTE, "jitter": 2 * MINUTE}, "jitter is 0:02:00"),
    "a negative jitter of cron": ({"cron": "* * * * *", "jitter": -SECOND}, "jitter is -1 day"),
    "a name of another type": ({"name": 5, "every": MINUTE}, "named 5"),
    "no name": ({"name": None, "every": MINUTE}, "named None"),
    "seconds for an interval": ({"every": 60}, "every is 60; write a timedelta, like timedelta(s"),
    "text for an interval": ({"every": "60"}, "every is '60'; write a timedelta, like"),
    "a flag for an interval": ({"every": True}, "every is True"),
    "no number of seconds": ({"every": float("nan")}, "every is nan"),
    "seconds for a timeout": ({"every": MINUTE, "timeout": 4}, "timeout is 4; write a timedelta"),
    "seconds to try again": ({"every": MINUTE, "retry_after": 1.5}, "retry_after is 1.5;"),
    "seconds of a run": ({"every": MINUTE, "min_duration": 0}, "min_duration is 0;"),
    "no jitter": ({"every": MINUTE, "jitter": None}, "jitter is None;"),
    "a number for a zone": ({"cron": "* * * * *", "tz": 5}, "tz is 5, which is not a string"),
    "a number for cron": ({"cron": 5}, "cron is 5, which is not a string"),
    "bytes for cron": ({"cron": b"* * * * *"}, "cron is b'* * * * *', which is not a string"),
    "a long value": ({"every": "9" * 5000}, "every is ..."),
    "no zone": ({"cron": "* * * * *", "tz": ""}, "There is no time zone ''"),
    "a retry beyond all calendars": (
        {"every": MINUTE, "retry_after": timedelta.max},
        "it must be at most 366 days",
    ),
    "jitter of ages": ({"cron": "* * * * *", "jitter": timedelta.max}, "jitter is 999999999 days"),
    "a step beyond its range": ({"cron": "*/90 * * * *"}, "every=timedelta(minutes=90)"),
    "a timeout as long as a run": (
        {"every": MINUTE, "timeout": 9 * SECOND, "min_duration": 9 * SECOND},
        "timeout (0:00:09) must be above min_duration (0:00:09)",
    ),
    "a timeout below a run": (
        {"every": MINUTE, "timeout": 8 * SECOND, "min_duration": 9 * SECOND},
        "timeout (0:00:08) must be above min_duration (0:00:09)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_declaration_is_refused(what: str) -> None:
    """One sentence names the job, the fault and the value."""
    arguments, sentence = REFUSED[what]
    with pytest.raises(DeclarationError) as refusal:
        declare(**arguments)
    message = str(refusal.value)
    assert sentence in message
    assert "\n" not in message
    assert message.endswith(".")
    assert re.match(r"Job moon: |A job can't be named ", message)
    assert refusal.value.__cause__ is None  # the traceback shows one error only


@pytest.mark.parametrize("value", [None, 7, "moon", [nothing], object()])
def test_only_a_function_is_a_job(value: object) -> None:
    """A value that can't be called is refused and named."""
    with pytest.raises(DeclarationError, match=r"Job moon: .* is not a function") as refusal:
        declare(cast("Any", value), every=MINUTE)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_a_description_is_text_that_can_be_stored(character: str) -> None:
    """A docstring that PostgreSQL can't store is refused at its declaration; any other is taken."""

    def described(_run: object) -> None:
        pass

    described.__doc__ = f"Watch the moon{character}."
    with pytest.raises(DeclarationError, match=r"^Job moon: its description .* can't hold\.$"):
        declare(described, every=MINUTE)
    described.__doc__ = "Watch\x01 the \U0001f315, \ufffe, \U0010ffff."
    assert declare(described, every=MINUTE).description == described.__doc__


async def _yields(_run: object) -> AsyncIterator[int]:
    yield 1


def _yields_too(_run: object) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("function", [_yields, _yields_too])
def test_a_generator_is_no_job(function: Callable[[Any], Any]) -> None:
    """A call of a generator function does not run its body: the job would succeed without work."""
    with pytest.raises(DeclarationError, match="is not a function"):
        declare(function, every=MINUTE)


class Calls:
    async def __call__(self, _run: object) -> str:
        return "called"


def test_async_functions_are_recognized() -> None:
    """Coroutine functions, partials and objects with an async call run in the event loop."""
    assert declare(nothing, every=MINUTE).is_async
    assert declare(partial(nothing), every=MINUTE).is_async
    assert declare(Calls(), every=MINUTE).is_async
    assert not declare(in_thread, every=MINUTE).is_async
    assert not declare(partial(in_thread), every=MINUTE).is_async


def test_a_job_has_the_declared_values() -> None:
    """Durations are in seconds, missing options are None, the docstring is the description."""
    plain = declare(every=90 * SECOND)
    assert plain.schedule == Every(90 * SECOND)
    assert (plain.timeout_seconds, plain.retry_after_seconds, plain.min_seconds) == (None,) * 3
    assert plain.jitter_seconds == 0
    assert plain.description == "Do nothing."
    full = declare(
        in_thread,
        name="m" + "-9" * 31,
        cron="30 3 * * 1-5",
        tz="Europe/Berlin",
        timeout=3 * SECOND,
        retry_after=timedelta(milliseconds=1),
        min_duration=2 * SECOND,
        jitter=timedelta(days=2),
    )
    assert full.schedule == Cron("30 3 * * 1-5", "Europe/Berlin")
    assert (full.timeout_seconds, full.retry_after_seconds, full.min_seconds) == (3, 0.001, 2)
    assert full.jitter_seconds == 172_800
    assert declare(lambda _run: None, every=SECOND).description == ""


def test_cron_is_read_in_utc_unless_a_zone_is_given() -> None:
    """`tz` is the zone of the hours in `cron`."""
    noon = datetime(2025, 7, 1, 12, tzinfo=UTC)
    hours = {
        zone: declare(cron="0 3 * * *", tz=zone).schedule.next_after(noon, noon).hour
        for zone in (None, "UTC", "Europe/Berlin")
    }
    assert hours == {None: 3, "UTC": 3, "Europe/Berlin": 1}


def test_a_name_is_declared_once() -> None:
    """Two jobs with one name would share a row."""
    twice = [declare(nothing, every=MINUTE), declare(in_thread, every=SECOND)]
    with pytest.raises(DeclarationError, match="Two jobs are named moon"):
        Registry([declare(name="sun", every=MINUTE), *twice])


@pytest.mark.parametrize(
    ("timeout", "least", "default", "message"),
    [
        (120, None, 120, "its timeout (120 s) must be above its minimum duration (120 s"),
        (5, None, 120, "its timeout (5 s) must be above its minimum duration (120 s"),
        (121, None, 120, None),
        (5, 4, 120, None),  # its own minimum wins
        (None, None, 3600, None),
        (1, None, 0, None),
    ],
)
def test_a_run_must_be_able_to_succeed(
    timeout: float | None, least: float | None, default: float, message: str | None
) -> None:
    """A timeout within JOB_MIN_SECONDS is refused with both numbers and the variable's name."""
    registry = Registry(
        [
            declare(
                every=MINUTE,
                timeout=None if timeout is None else timedelta(seconds=timeout),
                min_duration=None if least is None else timedelta(seconds=least),
            )
        ]
    )
    if message is None:
        registry.check(min_seconds=default)
        return
    with pytest.raises(DeclarationError, match="JOB_MIN_SECONDS") as refusal:
        registry.check(min_seconds=default)
    assert str(refusal.value).startswith(f"Job moon: {message}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "\nraise ImportError('no way')",
            "acme_a can't be imported: ImportError: no way ({file}, line 2)",
        ),
        ("1 +", "acme_a can't be imported: SyntaxError: invalid syntax (acme_a.py, line 1)"),
        ("raise SystemExit(3)", "acme_a can't be imported: SystemExit: 3 ({file}, line 1)"),
        ("raise GeneratorExit", "acme_a can't be imported: GeneratorExit: ({file}, line 1)"),
        ("raise ValueError('a\\nb')", "acme_a can't be imported: ValueError: a b ({file}, line 1)"),
        ("jobs = []", "acme_a has no job: nothing in it was declared with @job."),
        (
            """
from datetime import timedelta
from balance_app.jobs import job
a = job(name="x", every=timedelta(minutes=1))(lambda run: None)
b = job(name="x", every=timedelta(minutes=2))(lambda run: None)
""",
            "Two jobs are named x: acme_a.<lambda> and acme_a.<lambda>.",
        ),
    ],
)
def test_a_module_that_has_no_usable_jobs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    """The sentence names the module, the reason and the line."""
    (tmp_path / "acme_a.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_a", raising=False)
    with pytest.raises(DeclarationError) as refusal:
        Registry.load("balance_app.maintenance, acme_a")
    expected = reason.format(file=tmp_path / "acme_a.py")
    assert str(refusal.value).removeprefix("JOBS_MODULES: ") == expected
    monkeypatch.delitem(sys.modules, "acme_a", raising=False)


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ("acme.py/jobs", "'acme.py/jobs' is not the name of a module: write it as after `import`"),
        (".jobs", "'.jobs' is not the name of a module"),
        ("acme jobs", "'acme jobs' is not the name of a module"),
        ("acme_nowhere.jobs", "acme_nowhere.jobs can't be imported: there is no module acme_nowhe"),
        ("json.nowhere", "json.nowhere can't be imported: there is no module json.nowhere."),
    ],
)
def test_a_module_that_there_is_not_is_named(modules: str, sentence: str) -> None:
    """Whether the name is no name, or nothing has it."""
    with pytest.raises(DeclarationError) as refusal:
        Registry.load(f"balance_app.maintenance,{modules}")
    assert str(refusal.value).startswith(f"JOBS_MODULES: {sentence}")


ACME = """
from datetime import timedelta
from balance_app.jobs import job
nothing = "no job"
one = job(name="acme-one", every=timedelta(minutes=1))(lambda run: None)
two = job(name="acme-two", every=timedelta(minutes=1))(lambda run: None)
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, *points: str) -> None:
    """Install a package that has the module acme_installed, as pip would."""
    metadata = directory / "acme_jobs-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: acme-jobs\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("\n".join(["[balance_app.jobs]", *points]))
    (directory / "acme_installed.py").write_text(ACME)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "acme_installed", raising=False)


@pytest.mark.parametrize(
    ("point", "names"),
    [
        ("acme = acme_installed", {"acme-one", "acme-two"}),
        ("acme = acme_installed:two", {"acme-two"}),
    ],
)
def test_installed_packages_bring_their_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, names: set[str]
) -> None:
    """An entry point names a module or a job; without `installed` it is not looked at."""
    install(tmp_path, monkeypatch, point)
    registry = Registry.load("balance_app.maintenance", installed=True)
    own = Registry.load("balance_app.maintenance")
    assert registry.keys() - own.keys() == names
    where = f"{point.removeprefix('acme = ')} (entry point acme of acme-jobs 1.2)"
    assert {registry.origins[name] for name in names} == {where}
    # What is named in JOBS_MODULES as well is the same job.
    assert set(Registry.load("acme_installed", installed=True)) == {"acme-one", "acme-two"}


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ("acme = acme_nowhere", "can't be imported: there is no module acme_nowhere. Install"),
        ("acme = acme_installed:three", "can't be imported: AttributeError: module 'acme_inst"),
        ("acme = acme_installed:nothing", "is 'no job': neither a module nor a job."),
        ("acme = json", "has no job: nothing in it was declared with @job."),
    ],
)
def test_an_entry_point_without_usable_jobs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, sentence: str
) -> None:
    """With its package and version."""
    install(tmp_path, monkeypatch, point)
    where = f"{point.removeprefix('acme = ')} (entry point acme of acme-jobs 1.2)"
    with pytest.raises(DeclarationError) as refusal:
        Registry.load("", installed=True)
    assert str(refusal.value).startswith(f"{where} {sentence}")


def test_a_job_that_two_modules_have_is_one() -> None:
    """A module that imports another module's job does not declare it again."""
    twice = Registry.load("balance_app.maintenance,,balance_app.maintenance.audits,")
    assert set(twice) == set(Registry.load("balance_app.maintenance"))


def test_the_ten_jobs_are_valid_with_the_default_settings() -> None:
    """No declaration of the service's own jobs is refused."""
    registry = Registry.load("balance_app.maintenance")
    registry.check(min_seconds=load_settings().job_min_seconds)
    assert registry["audit-ledger"].name == "audit-ledger"
    assert "moon" not in registry


@pytest.mark.parametrize(
    ("lease", "heartbeat"), [("6", "2.001"), ("5.9", "2"), ("3", "3"), ("0.5", "1")]
)
def test_a_lease_lasts_three_heartbeats(
    monkeypatch: pytest.MonkeyPatch, lease: str, heartbeat: str
) -> None:
    """A heartbeat above a third of the lease is refused; both are named with their values."""
    monkeypatch.setenv("JOB_LEASE_SECONDS", lease)
    monkeypatch.setenv("JOB_HEARTBEAT_SECONDS", heartbeat)
    both = rf"JOB_HEARTBEAT_SECONDS \({heartbeat}\).*JOB_LEASE_SECONDS \({lease}\)"
    with pytest.raises(BadSettingsError, match=both):
        load_settings()


@pytest.mark.parametrize(("lease", "heartbeat"), [("6", "2"), ("3", "1"), ("0.5", "0.1")])
def test_a_third_of_the_lease_is_enough(
    monkeypatch: pytest.MonkeyPatch, lease: str, heartbeat: str
) -> None:
    """The limit itself is allowed."""
    monkeypatch.setenv("JOB_LEASE_SECONDS", lease)
    monkeypatch.setenv("JOB_HEARTBEAT_SECONDS", heartbeat)
    assert load_settings().job_heartbeat_seconds == float(heartbeat)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JOB_LEASE_SECONDS", "0.4"),
        ("JOB_LEASE_SECONDS", "nan"),
        ("JOB_LEASE_SECONDS", "inf"),
        ("JOB_HEARTBEAT_SECONDS", "0"),
        ("JOB_HEARTBEAT_SECONDS", "nan"),
        ("JOB_MIN_SECONDS", "-1"),
        ("JOB_WARM_UP_SECONDS", "-0.1"),
        ("JOB_STEP_SECONDS", "61"),
        ("JOB_CONNECTIONS", "0"),
        ("JOBS_ENABLED", "perhaps"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """The sentence starts with the variable's name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=rf"(?m)^{name}: "):
        load_settings()
