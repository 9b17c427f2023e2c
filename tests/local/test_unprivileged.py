"""The user that instances run as when root starts them: not root, if it can run them."""

import os
from pathlib import Path

import pytest

from balance_app.local import unprivileged
from balance_app.local.unprivileged import why_root

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="as root only")
PORT = 30_000


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of root's alone, in which the instances are started; it has a `.env`."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o700)
    monkeypatch.chdir(place)
    (place / ".env").write_text("PORT=9\n")
    (place / ".env").chmod(0o644)
    return place


async def test_instances_need_no_root(closed: Path) -> None:
    """Also in a directory of root's, which stays closed to all others."""
    assert await why_root(PORT, os.environ) is None
    assert closed.stat().st_mode & 0o007 == 0


async def test_without_passing_its_directory_they_need_root(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    assert closed.exists()
    monkeypatch.setattr(unprivileged, "let_pass", lambda *_: None)
    assert await why_root(PORT, os.environ) is not None


async def test_what_only_root_can_read_is_named(closed: Path) -> None:
    """It keeps the instances root, and the reason is said."""
    (closed / ".env").chmod(0o600)
    assert ".env can't be read: Permission denied" in (await why_root(PORT, os.environ) or "")


async def test_a_port_of_root_is_named(
    closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may allow some to everybody."""
    assert closed.exists()
    first = tmp_path / "first"
    monkeypatch.setattr(unprivileged, "_PRIVILEGED_PORTS", first)
    assert "port 80" in (await why_root(80, os.environ) or "")
    first.write_text("80\n")
    assert await why_root(80, os.environ) is None
