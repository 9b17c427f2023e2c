"""Pictures of the tests are made apart from those of this checkout."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where a load test keeps its picture."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("BALANCE_APP_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "load.html"
