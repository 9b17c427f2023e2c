"""The database and the event logs of instances as processes, and queries of both."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs.fleet import Span, read_event_logs
from tests.processes import FLEET, Instance, connect, empty_database

Database = dict[str, str]


@dataclass
class JobsDatabase:
    """An empty database, and a directory for the event logs of the instances that use it."""

    database: Database
    directory: Path

    def instances(
        self, count: int, env: dict[str, str], *, name: str = "app", forked: bool = True
    ) -> list[Instance]:
        names = [f"{name}{number}" for number in range(1, count + 1)]
        env = {"FLEET_EVENT_LOGS": str(self.event_logs), **env}
        return [
            Instance(
                self.database,
                name,
                log=self.log,
                program=FLEET if forked else ("-m", *FLEET),
                **env,
            )
            for name in names
        ]

    @property
    def event_logs(self) -> Path:
        return self.directory / "event-logs"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def spans(self, since: float = 0) -> list[Span]:
        return [span for span in read_event_logs(self.event_logs) if span.begin >= since]

    async def until(self, spans: int, since: float = 0) -> list[Span]:
        """Wait until this many runs have begun; return them."""
        async with asyncio.timeout(120):
            while len(found := self.spans(since)) < spans:  # noqa: ASYNC110 - of other processes
                await asyncio.sleep(0.1)
        return found

    async def until_fact(self, sql: str) -> None:
        """Wait until a statement returns rows."""
        async with asyncio.timeout(60):
            while not await self.rows(sql):  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.05)

    async def rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        connection = await connect(self.database)
        try:
            return [tuple(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()

    async def column(self, sql: str, *arguments: object) -> list[Any]:
        return [row[0] for row in await self.rows(sql, *arguments)]

    async def value(self, sql: str, *arguments: object) -> Any:  # noqa: ANN401 - a row's
        return (await self.column(sql, *arguments))[0]


_numbers = itertools.count(1)


@asynccontextmanager
async def jobs_db(postgres: Database, top: Path) -> AsyncIterator[JobsDatabase]:
    directory = top / str(next(_numbers))
    (directory / "event-logs").mkdir(parents=True)
    async with empty_database(postgres) as database:
        yield JobsDatabase(database, directory)


async def end(instances: Iterable[Instance], number: int = signal.SIGKILL) -> None:
    await asyncio.gather(
        *(instance.stop(number) for instance in instances if instance.process is not None)
    )
