"""`up --reload`: what is watched, which changes count, and what is said of code that is wrong."""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

import balance_app
from balance_app.jobs.job import Registry
from balance_app.local import reloading
from balance_app.local.reloading import Code, Places, ReloadError, places

PATIENCE_SECONDS = 60
A_JOB = """
from datetime import timedelta
from balance_app.jobs import job

@job(name="{name}", every=timedelta(minutes=1), min_duration=timedelta(0))
def {name}(run):
    pass
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module and a package that have jobs."""
    before = set(sys.modules)
    (tmp_path / "alone.py").write_text(A_JOB.format(name="alone"))
    (tmp_path / "shop" / "deep").mkdir(parents=True)
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "deep" / "jobs.py").write_text(A_JOB.format(name="shop"))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path.resolve()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"alone", "shop"}:
            del sys.modules[name]


def test_the_code_of_the_program_and_of_the_jobs_is_watched(modules: Path) -> None:
    """Of a package all of it; of a module that is alone its file."""
    registry = Registry.load("balance_app.maintenance,alone,shop.deep.jobs")
    assert places(registry) == Places(
        frozenset({Path(balance_app.__file__).parent.resolve(), modules / "shop"}),
        frozenset({modules / "alone.py"}),
    )


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that has it."""
    monkeypatch.setattr(reloading, "find_spec", lambda _name: None)
    with pytest.raises(ReloadError, match=r"needs the package watchfiles: install balance-app\[lo"):
        places(Registry([]))


async def test_a_save_is_seen_however_an_editor_writes(modules: Path) -> None:
    """In place, or by a new file that takes its name; caches and what is beside it do not count."""
    code = Code(Places(frozenset({modules / "shop"}), frozenset({modules / "alone.py"})), {}, None)
    jobs, template = modules / "shop/deep/jobs.py", modules / "shop/page.html"
    async with aclosing(code.changes()) as changes:

        async def saved(path: Path, *, replaced: bool = False) -> None:
            """Save until it is seen: the watcher may not have begun, or a save be seen twice."""
            next_one = asyncio.ensure_future(anext(changes))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    if replaced:
                        (modules / "new").write_text("x = 2\n")
                        (modules / "new").replace(path)
                    else:
                        path.write_text("x = 1\n")
                    await asyncio.wait({next_one}, timeout=1)
                    if next_one.done() and path in next_one.result():
                        assert next_one.result() == [path]
                        return
                    if next_one.done():
                        next_one = asyncio.ensure_future(anext(changes))

        await saved(jobs)
        await saved(modules / "alone.py")
        await saved(modules / "alone.py", replaced=True)
        await saved(modules / "alone.py")  # the new file is watched, too
        (modules / "other.py").touch()
        (modules / "below").mkdir()
        (modules / "below/alone.py").touch()
        (modules / "shop/__pycache__").mkdir()
        (modules / "shop/__pycache__/jobs.pyc").touch()
        (modules / "shop/.jobs.py.swp").touch()
        await saved(template)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def f(:\n", "JOBS_MODULES: alone can't be imported: SyntaxError"),
        ("import nothing_like_it\n", "JOBS_MODULES: alone can't be imported: ModuleNotFoundError"),
        ("x = 1\n", "JOBS_MODULES: alone has no job"),
        ("raise SystemExit(0)\n", "JOBS_MODULES: alone can't be imported: SystemExit: 0"),
        (A_JOB.format(name="alone"), None),
    ],
)
async def test_code_that_can_not_be_imported_is_explained(
    modules: Path, text: str, reason: str | None
) -> None:
    """In a process of its own, by the sentence with which an instance would end."""
    (modules / "alone.py").write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(modules), os.environ.get("PYTHONPATH", "")]),
        "JOBS_MODULES": "alone",
    }
    error = await Code(Places(frozenset(), frozenset()), environment, None).import_error()
    if reason is None:
        assert error is None
    else:
        assert error is not None
        assert error.startswith(reason)
        assert "\n" not in error


async def test_of_a_traceback_the_place_is_shown(tmp_path: Path) -> None:
    """An error of the program's own code, whose import has no sentence."""
    (tmp_path / "uvloop.py").write_text("x = (1,\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    error = await Code(Places(frozenset(), frozenset()), environment, None).import_error()
    assert error is not None
    lines = error.split("\n")
    assert lines[0] == f'  File "{tmp_path}/uvloop.py", line 1'
    assert lines[-1].startswith("SyntaxError: ")
