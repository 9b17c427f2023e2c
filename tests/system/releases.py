"""Earlier revisions of this program, from its own history."""

import re
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


class NoReleaseError(Exception):
    """There is no such revision here; the message says why."""


def unpack(commit: str, place: Path) -> Path:
    """Unpack the source of a commit into a directory; return it.

    Raises:
        NoReleaseError: this clone has no such commit.
    """
    archived = _git("archive", commit)
    if archived.returncode:
        raise NoReleaseError(f"commit {commit} is not in this clone")
    subprocess.run(
        ["tar", "--extract", "--directory", place],  # noqa: S607 - whichever tar there is
        input=archived.stdout,
        check=True,
    )
    return place


def oldest_compatible() -> str:
    """Return the oldest commit whose program works on this schema: the one that completed it.

    Raises:
        NoReleaseError: none before this program does, or this is no clone.
    """
    versions = [each.read_text() for each in (ROOT / "alembic" / "versions").glob("*.py")]
    compatible = max(re.findall(r"SET compatible_from = '(\d{4})'", "".join(versions)))
    schema, program = (
        _git("log", "-1", "--format=%h", "--", path).stdout.decode().strip()
        for path in (f"alembic/versions/{compatible}_*.py", "src")
    )
    if not schema:
        raise NoReleaseError("this is no clone")
    if schema == program:
        raise NoReleaseError(f"no program before this one works on the schema of {schema}")
    return schema


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["git", "-C", ROOT, *arguments],  # noqa: S607 - whichever git there is
        capture_output=True,
        check=False,
    )
