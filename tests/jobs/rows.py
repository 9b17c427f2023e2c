"""Jobs and instances as rows, for tests of what is shown of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID, uuid4

import asyncpg

from balance_app.db.pool import Database
from balance_app.jobs.api import status
from balance_app.settings import Settings, load_settings
from tests.processes import as_instance, connect

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# Nobody sends heartbeats for the instances of these rows: theirs lie ahead, and here, as in forked
# processes, that is live. This is how far ahead one may lie otherwise.
AHEAD = status.AHEAD
vars(status)["AHEAD"] = timedelta(hours=2)

EVER = 10**6  # an instance that knows jobs up to this number knows all


def settings_for(database: dict[str, str], **more: object) -> Settings:
    """Settings of an instance on this database."""
    return load_settings(
        **{name.lower(): value for name, value in as_instance(database).items()}, **more
    )


@asynccontextmanager
async def migrated(database: dict[str, str]) -> AsyncIterator[tuple[Database, Connection]]:
    """Migrate a database as an instance does; yield it, and a connection to it."""
    running = Database(settings_for(database))
    await running.start()
    connection = await connect(database)
    try:
        yield running, connection
    finally:
        await connection.close()
        await running.stop()


async def add_job(connection: Connection, name: str, **columns: object) -> None:
    """Add a job. A timedelta becomes a time, relative to now by the database's clock."""
    values = {
        "schedule": "every 300 s",
        "description": f"Is {name}.",
        "due_at": timedelta(seconds=100),
        **columns,
    }
    values.setdefault("ready_at", values["due_at"])
    await insert(connection, "jobs", name=name, **values)


def running(holder: UUID, server: str, *, seconds: float = 40) -> dict[str, object]:
    """The columns of a job that has been running for some seconds."""
    return {
        "due_at": timedelta(seconds=-seconds),
        "fence": 7,
        "holder": holder,
        "server": server,
        "started_at": timedelta(seconds=-seconds),
        "lease_expires_at": timedelta(seconds=3600),
    }


async def add_instance(  # noqa: PLR0913 - a column each
    connection: Connection,
    server: str = "app1",
    *,
    up_seconds: float = 600,
    seen_seconds_ago: float = -3600,
    highest_number: int = EVER,
    missing: tuple[str, ...] = (),
) -> UUID:
    """Add an instance; it stays live for the whole test unless its last heartbeat is given."""
    instance = uuid4()
    await insert(
        connection,
        "instances",
        id=instance,
        server=server,
        started_at=timedelta(seconds=-up_seconds),
        last_heartbeat_at=timedelta(seconds=-seen_seconds_ago),
        highest_number=highest_number,
        missing=list(missing),
    )
    return instance


async def insert(connection: Connection, table: str, **columns: object) -> None:
    """Insert a row; timedeltas become times relative to one common now."""
    values = [
        f"now() + ${number}::interval" if isinstance(value, timedelta) else f"${number}"
        for number, value in enumerate(columns.values(), start=1)
    ]
    await connection.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(values)})",  # noqa: S608
        *columns.values(),
    )
