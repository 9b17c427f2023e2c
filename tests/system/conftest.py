"""The instances of these tests start as a user starts them."""

import pytest

from tests import fork_server


@pytest.fixture(autouse=True)
def _no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "running", [])
