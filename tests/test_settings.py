"""The environment is checked once, and wrong values are named."""

import pytest

from balance_app.settings import BadSettingsError, load_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "0"),
        ("PORT", "http"),
        ("DB_POOL_SIZE", "0"),
        ("DB_STATEMENT_SECONDS", "-1"),
        ("DB_CONNECT_SECONDS", "nan"),
        ("SERVER_ID", "two words"),
        ("LOG_LEVEL", "loud"),
        ("DATABASE_URL", "mysql://somewhere/db"),
        ("DATABASE_URL", "postgresql://[half/db"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """The sentence starts with the variable's name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=f"^{name}: "):
        load_settings()


def test_a_lock_wait_must_end_before_the_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings that contradict each other are named together, with their values."""
    monkeypatch.setenv("DB_LOCK_SECONDS", "9")
    with pytest.raises(BadSettingsError, match=r"DB_LOCK_SECONDS \(9\).*DB_STATEMENT_SECONDS"):
        load_settings()


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a good nor a bad setting prints a password."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@db/x")
    assert "hunter2" not in repr(load_settings())
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@[db/x")
    with pytest.raises(BadSettingsError) as error:
        load_settings()
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_the_usual_urls_are_understood(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The spellings of other tools lead to the same database."""
    monkeypatch.setenv("DATABASE_URL", f"{scheme}://me:pw@db:5433/x")
    arguments = load_settings().connect_arguments()
    assert (arguments["user"], arguments["password"]) == ("me", "pw")
    assert (arguments["host"], arguments["port"], arguments["database"]) == (["db"], [5433], "x")


def test_the_reserve_leaves_time_for_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is never more than a third of the lease; said to be more, it is refused."""
    assert load_settings().clock_reserve_seconds == 2
    monkeypatch.setenv("JOB_LEASE_SECONDS", "3")
    assert load_settings().clock_reserve_seconds == 1
    monkeypatch.setenv("JOB_CLOCK_RESERVE_SECONDS", "1.1")
    with pytest.raises(BadSettingsError, match=r"JOB_CLOCK_RESERVE_SECONDS \(1.1\).*a third"):
        load_settings()
