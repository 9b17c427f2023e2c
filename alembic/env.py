"""Run the migrations: as SQL for `balance_app.db.migrations.migrate`, or on a given connection."""

import asyncio

from alembic import context
from sqlalchemy import Connection

import balance_app.access.tables
import balance_app.balances.tables
import balance_app.jobs.tables
import balance_app.maintenance.tables  # noqa: F401 - each declares tables in `metadata`
from balance_app.db.metadata import metadata
from balance_app.db.migrations import VERSION_TABLE, migrate
from balance_app.settings import load_settings


def write() -> None:
    """Write the SQL of the missing migrations; the program sends it as one transaction."""
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # other styles double a %
        version_table=VERSION_TABLE,
        literal_binds=True,
    )
    # On a line of its own: a statement may end in a comment.
    context.get_context().impl.command_terminator = "\n;"
    context.run_migrations()


def run(connection: Connection) -> None:
    """Run the missing migrations, in one transaction."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_name=lambda name, _type, _parents: name != "alembic_version",
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if context.is_offline_mode():
    write()
elif given is not None:
    run(given)
else:
    asyncio.run(migrate(load_settings()))
