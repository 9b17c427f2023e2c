"""The schema and its migrations."""

import asyncpg
import pytest
from alembic import command
from sqlalchemy.ext.asyncio import create_async_engine

from balance_app.migrations import alembic_config, migrate
from balance_app.settings import Settings, load_settings
from tests.processes import connect


def settings_for(database: dict[str, str]) -> Settings:
    return load_settings(**{name.lower(): value for name, value in database.items()})


async def test_the_tables_are_as_declared(database: dict[str, str]) -> None:
    """The migrations make exactly what `balances.tables` declares."""
    settings = settings_for(database)
    await migrate(settings)
    config = alembic_config()
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(**settings.connect_arguments()),
    )

    def check(connection: object) -> None:
        config.attributes["connection"] = connection
        command.check(config)

    async with engine.connect() as connection:
        await connection.run_sync(check)
    await engine.dispose()


@pytest.mark.parametrize(
    "rewriting",
    ["UPDATE entries SET amount = 1", "DELETE FROM entries", "TRUNCATE entries"],
)
async def test_the_ledger_is_append_only(database: dict[str, str], rewriting: str) -> None:
    """PostgreSQL itself refuses to rewrite an entry (M4)."""
    await migrate(settings_for(database))
    connection = await connect(database)
    with pytest.raises(asyncpg.RaiseError, match="append-only"):
        await connection.execute(rewriting)
    await connection.close()


@pytest.mark.parametrize("balance", [-1, 2**53])
async def test_the_check_is_the_last_net(database: dict[str, str], balance: int) -> None:
    """No statement, however wrong, can store a balance that must not be (M2)."""
    await migrate(settings_for(database))
    connection = await connect(database)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("UPDATE users SET balance = $1", balance)
    await connection.close()
