"""Tests of balances run twice: each change a statement of its own, and with group commit."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test both modes; what replaces a statement of the first has only that one."""
    if "group_commit" in metafunc.fixturenames:
        single = metafunc.definition.get_closest_marker("single")
        modes = ["false"] if single else ["false", "true"]
        names = {"false": "single", "true": "together"}
        metafunc.parametrize("group_commit", modes, ids=names.get)


@pytest.fixture
def database(group_commit: str, database: dict[str, str]) -> dict[str, str]:
    """The DB_* variables of an empty database, and the mode."""
    return {**database, "BALANCE_GROUP_COMMIT": group_commit}
