"""Directories of these tests' own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory that nobody else changes: each run of pytest closes its common one anew."""
    with tempfile.TemporaryDirectory(prefix="balance-app-test-", ignore_cleanup_errors=True) as top:
        yield Path(top)
