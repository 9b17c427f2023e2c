"""The history of runs, read page by page, the latest first."""

from typing import Final

import asyncpg
from pydantic_core import from_json

from balance_app.db.pool import Connection, Database, read, read_in_order
from balance_app.http.paging import cut_page
from balance_app.jobs.api.errors import JobNotFound, RunNotFound
from balance_app.jobs.api.schemas import HistoryAnswer, LogLineAnswer, RunAnswer, RunLogAnswer
from balance_app.jobs.run_log import LINES, TRACEBACK


class History:
    """Reads the history of runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, *, job: str | None, outcome: str | None, before: int, limit: int
    ) -> HistoryAnswer:
        """Return up to `limit` runs with ids below `before`.

        Raises:
            JobNotFound: there is no such job.
        """
        # Four statements, so that each is planned for its own index.
        given = [each for each in (job, outcome) if each is not None]
        sql = PAGES[job is not None, outcome is not None]
        rows = await self._database.run(
            lambda con: read_in_order(con, sql, before, limit + 1, *given)
        )
        if job is not None and not rows:
            found = await self._database.run(lambda con: read(con, JOB, job))
            if not found:
                raise JobNotFound(job)
        shown, last = cut_page(rows, limit)
        return HistoryAnswer(
            runs=[_run(row) for row in shown],
            next=None if last is None else last["id"],
        )

    async def log(self, run_id: int) -> RunLogAnswer:
        """Return what a run has said so far; ticks that did not run have said nothing.

        Raises:
            RunNotFound: there is no such run.
        """

        async def ask(connection: Connection) -> RunLogAnswer:
            found = await read(connection, RUN, run_id)
            if not found:
                raise RunNotFound(run_id)
            of_run = (found[0]["job"], found[0]["fence"])
            lines = await read_in_order(connection, LINES, *of_run)
            traceback = await read(connection, TRACEBACK, *of_run)
            return RunLogAnswer(
                run=_run(found[0]),
                lines=[LogLineAnswer(**line) for line in lines],
                dropped=lines[0]["number"] - 1 if lines else 0,
                traceback=traceback[0]["text"] if traceback else None,
            )

        return await self._database.run(ask)


# Each reads no more rows than it returns, whatever the planner's statistics. With
# `job = $3 ORDER BY id` the planner may walk the primary key backwards through millions of other
# jobs' runs; so it may with `ORDER BY job, id`, as it drops a column with an equality from the
# order. With a row comparison only the index that begins with these columns has the order. Before
# PostgreSQL 18 a comparison ends a scan by its first column alone: so what follows the runs of one
# job and outcome is cut off by the limit, and left out.
RUNS: Final = """
SELECT *, clock_timestamp() AS now FROM job_runs WHERE id < $1 ORDER BY id DESC LIMIT $2
"""

RUNS_OF_JOB: Final = """
SELECT *, clock_timestamp() AS now FROM job_runs
WHERE (job, id) < ($3, $1) AND (job, id) > ($3, 0)
ORDER BY job DESC, id DESC LIMIT $2
"""

RUNS_BY_OUTCOME: Final = """
SELECT *, clock_timestamp() AS now FROM job_runs
WHERE (outcome, id) < ($3, $1) AND (outcome, id) > ($3, 0)
ORDER BY outcome DESC, id DESC LIMIT $2
"""

RUNS_OF_JOB_BY_OUTCOME: Final = """
SELECT *, clock_timestamp() AS now FROM (
    SELECT * FROM job_runs
    WHERE (job, outcome, id) < ($3, $4, $1) AND (job, outcome, id) > ($3, '', 0)
    ORDER BY job DESC, outcome DESC, id DESC LIMIT $2
) AS next
WHERE outcome = $4
ORDER BY id DESC
"""

PAGES: Final = {
    (False, False): RUNS,
    (True, False): RUNS_OF_JOB,
    (False, True): RUNS_BY_OUTCOME,
    (True, True): RUNS_OF_JOB_BY_OUTCOME,
}

RUN: Final = "SELECT *, clock_timestamp() AS now FROM job_runs WHERE id = $1"

JOB: Final = "SELECT FROM jobs WHERE name = $1"


def _run(row: asyncpg.Record) -> RunAnswer:
    run = dict(row)
    if row["fence"] is None:  # skipped: its row has a start, but nothing ran
        run["started_at"] = run["seconds"] = None
    else:
        seconds = ((row["ended_at"] or row["now"]) - row["started_at"]).total_seconds()
        run["seconds"] = round(max(seconds, 0.0), 3)
    run["args"] = row["args"] and from_json(row["args"])
    return RunAnswer.model_validate(run)
