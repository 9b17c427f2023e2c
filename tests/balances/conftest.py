"""Every test of balances runs twice: each change a statement of its own, and with group commit."""

import pytest


@pytest.fixture(params=["false", "true"], ids=["single", "together"])
def database(request: pytest.FixtureRequest, database: dict[str, str]) -> dict[str, str]:
    """The DB_* variables of an empty database, and the mode."""
    return {**database, "BALANCE_GROUP_COMMIT": str(request.param)}
