"""The schema: the tables' registry, the newest revision, and the upgrade to it at start."""

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, pool
from sqlalchemy.ext.asyncio import create_async_engine

from balance_app.sessions import open_session
from balance_app.settings import Settings

MIGRATION_LOCK: Final = 0x62616C616E6365  # "balance"; any number no other program here uses

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


def alembic_config() -> Config:
    """Return alembic's configuration, in a checkout or in an installed package."""
    here = Path(__file__).parent
    scripts = here / "_alembic"
    config = Config()
    config.set_main_option("path_separator", "os")
    config.set_main_option(
        "script_location", str(scripts if scripts.is_dir() else here.parents[1] / "alembic")
    )
    return config


def alembic_head() -> str | None:
    """Return the newest revision that this program knows."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


async def migrate(settings: Settings) -> None:
    """Bring the schema to this program's head; any number of copies may try at once."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: open_session(settings.connect_arguments()),
        poolclass=pool.NullPool,
    )
    config = alembic_config()

    def upgrade(connection: object) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    # The lock has a connection of its own: it outlives every transaction of the migrations.
    guard = await open_session(settings.connect_arguments())
    try:
        await guard.execute("SET lock_timeout = 0")
        await guard.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
        async with engine.connect() as connection:
            await connection.run_sync(upgrade)
    finally:
        guard.terminate()
        await engine.dispose()
