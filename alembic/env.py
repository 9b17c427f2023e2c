"""Run the migrations: on the connection given by the program, or on one of their own.

Copies that start together take turns: `balance_app.migrations.migrate` holds an advisory lock.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection

import balance_app.balances.tables
import balance_app.jobs.records
import balance_app.jobs.tables  # noqa: F401 - the same
from balance_app.migrations import metadata, migrate
from balance_app.settings import load_settings


def run(connection: Connection) -> None:
    """Run what is missing, in one transaction."""
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    asyncio.run(migrate(load_settings()))
