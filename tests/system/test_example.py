"""The example package works with the installed wheel and a PostgreSQL, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import pytest

TOP = Path(__file__).parents[2]
EXAMPLE = TOP / "examples" / "acme_jobs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which the wheels of service and example are installed."""
    built, site = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("site")
    for source in (TOP, EXAMPLE):
        python("-m", "hatchling", "build", "-t", "wheel", "-d", str(built), cwd=source)
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site))
    python(*install, *map(str, built.glob("*.whl")))
    return site


def python(*arguments: str, cwd: Path = TOP, **env: str) -> str:
    """Run Python; return what it prints, and fail where it does."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_its_own_tests_pass(site: Path, tmp_path: Path, database: dict[str, str]) -> None:
    """On an empty database, with no service."""
    tests = shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    place = {"host": database["DB_HOST"], "port": database.get("DB_PORT", "5432")}
    user, name = database.get("DB_USER", "postgres"), database["DB_NAME"]
    place |= {"user": user, "password": database.get("DB_PASSWORD", "")}
    printed = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)),
        cwd=tmp_path,
        PYTHONPATH=str(site),
        DATABASE_URL=f"postgresql:///{name}?{urlencode(place)}",
    )
    assert "4 passed" in printed


def test_its_jobs_are_found_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    """Beside the ten, with the entry point they come from."""
    command = ("-m", "balance_app", "jobs", "--json")
    found = {
        each["name"]: each["origin"]
        for each in json.loads(python(*command, cwd=tmp_path, PYTHONPATH=str(site)))
    }
    where = "acme_jobs (entry point acme of acme-jobs 1.0)"
    assert found["archive-orders"] == found["report-orders"] == where
    assert len(found) == 12
