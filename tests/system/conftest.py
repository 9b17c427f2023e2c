"""The instances of these tests start as a user starts them."""

import pytest

from tests import fork_server


@pytest.fixture(params=["false", "true"], ids=["single", "together"])
def mode(request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables of instances without and with group commit, for what changes balances."""
    return {"BALANCE_GROUP_COMMIT": str(request.param)}


@pytest.fixture(autouse=True)
def _no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "running", [])
