"""A database that is dropped and recreated under running instances, and one for two services."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from time import monotonic

import asyncpg
import pytest

from tests.jobs.fleet import Span, each_job_runs, overlaps, read_event_logs
from tests.processes import Instance, connect, empty_database, http_client, running
from tests.system.sizes import report_figures

JOBS = 3
LEASE = 3


def _fleet(
    database: dict[str, str], event_logs: Path, names: list[str], **env: str
) -> list[Instance]:
    settings = {
        "FLEET_EVENT_LOGS": str(event_logs),
        "FLEET_JOBS": str(JOBS),
        "FLEET_EVERY": "1",
        "FLEET_SECONDS": "1",
        "JOB_MIN_SECONDS": "0",
        "JOB_WARM_UP_SECONDS": "0.5",
        "JOB_LEASE_SECONDS": str(LEASE),
        "JOB_HEARTBEAT_SECONDS": "0.5",
        **env,
    }
    return [
        Instance(database, name, log=None, program=("-m", "tests.jobs.fleet"), **settings)
        for name in names
    ]


async def drop(connection: "asyncpg.Connection[asyncpg.Record]", sql: str) -> None:
    """Drop tables that the service uses: it takes their locks in another order than a drop does."""
    async with asyncio.timeout(30):
        while True:
            try:
                await connection.execute(sql)
            except asyncpg.DeadlockDetectedError:
                await connection.execute("ROLLBACK")
            else:
                return


async def _drop_database(database: dict[str, str]) -> None:
    admin = await connect({**database, "DB_NAME": "postgres"})
    await admin.execute(f'DROP DATABASE "{database["DB_NAME"]}" WITH (FORCE)')
    await asyncio.sleep(1)
    await admin.execute(f'CREATE DATABASE "{database["DB_NAME"]}"')
    await admin.close()


async def _drop_schema(database: dict[str, str]) -> None:
    connection = await connect(database)
    await drop(connection, "DROP SCHEMA public CASCADE")  # the service makes it again
    await connection.close()


async def _drop_a_table(database: dict[str, str]) -> None:
    connection = await connect(database)
    await drop(connection, "DROP TABLE entries CASCADE")
    await asyncio.sleep(1)  # an incomplete schema: the service creates nothing in it
    await drop(connection, "DROP SCHEMA public CASCADE")
    await connection.close()


async def _drop_and_make_schema(database: dict[str, str]) -> None:
    connection = await connect(database)
    await drop(connection, "BEGIN; DROP SCHEMA public CASCADE; CREATE SCHEMA public; COMMIT")
    await connection.close()


@pytest.mark.parametrize(
    "lose", [_drop_database, _drop_schema, _drop_a_table, _drop_and_make_schema]
)
async def test_a_recreated_database_is_migrated_as_at_start(
    database: dict[str, str],
    tmp_path: Path,
    lose: Callable[[dict[str, str]], Coroutine[None, None, None]],
) -> None:
    """Requests get a 503, never a 500; then all recovers, jobs too, without an overlap."""
    async with (
        running(_fleet(database, tmp_path, ["app1", "app2"])) as instances,
        http_client(timeout=20) as http,
    ):
        await each_job_runs(tmp_path, JOBS)
        for instance in instances:
            answer = await http.post(
                f"{instance.url}/api/balance", json={"userId": 1, "amount": -1}
            )
            assert answer.status_code == 200
        losing = asyncio.create_task(lose(database))
        answers = set()
        async with asyncio.timeout(60):
            back: set[str] = set()
            while not losing.done() or len(back) < len(instances):
                for instance in instances:
                    answer = await http.post(
                        f"{instance.url}/api/balance", json={"userId": 1, "amount": -1}
                    )
                    answers.add(answer.status_code)
                    assert answer.status_code in {200, 503}, answer.text
                    ready = (await http.get(f"{instance.url}/readyz")).is_success
                    if losing.done() and ready and answer.is_success:
                        back.add(instance.name)
                await asyncio.sleep(0.02)
        await losing
        assert 503 in answers
        connection = await connect(database)
        assert await connection.fetchval("SELECT count(*) FROM users") == 1
        assert await connection.fetchval("SELECT balance + version FROM users") == 10_001
        await connection.close()
        await each_job_runs(tmp_path, JOBS)
        assert {each.process and each.process.returncode for each in instances} == {None}
    assert overlaps(_runs(tmp_path)) == []


# A run has time enough to meet the recreated tables, and ends before its trust does.
RUN_SECONDS = 8
RUN_LEASE = 11
ANEW = """
BEGIN; DROP SCHEMA public CASCADE; CREATE SCHEMA public;
CREATE TABLE fenced (job text, fence bigint, begun float8);
GRANT ALL ON fenced TO PUBLIC; COMMIT
"""


async def _writes_anew(postgres: dict[str, str], event_logs: Path, mutant: str) -> tuple[int, int]:
    """Recreate the tables under runs; return the writes in them by earlier runs and by new ones."""
    event_logs.mkdir()
    settings = {
        "FLEET_KIND": "ignores-cancel",
        "FLEET_EVERY": "3600",
        "FLEET_SECONDS": str(RUN_SECONDS),
        "FLEET_MUTANTS": mutant,
        "JOB_LEASE_SECONDS": str(RUN_LEASE),
        "JOB_CLOCK_RESERVE_SECONDS": "0",
    }
    async with empty_database(postgres) as database:
        connection = await connect(database)
        await connection.execute(ANEW)
        async with running(_fleet(database, event_logs, ["app1"], **settings)), asyncio.timeout(60):
            began = "SELECT count(DISTINCT job) FROM fenced"
            while await connection.fetchval(began) < JOBS:  # noqa: ASYNC110 - of a database
                await asyncio.sleep(0.05)
            assert await connection.fetchval("SELECT max(fence) FROM fenced") == 1
            await drop(connection, ANEW)
            anew_at = monotonic()
            began += " WHERE begun > $1"
            while await connection.fetchval(began, anew_at) < JOBS:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert await connection.fetchval("SELECT max(fence) FROM fenced") == 1
            counts = "SELECT count(*) FILTER (WHERE begun <= $1), count(*) FROM fenced"
            before, written = await connection.fetchrow(counts, anew_at) or (0, 0)
        await connection.close()
    return before, written - before


async def test_an_earlier_run_writes_nothing_into_recreated_tables(
    postgres: dict[str, str], tmp_path: Path
) -> None:
    """Fences restart there, and the holder is the same: in the control such a run can write."""
    guarded, control = await asyncio.gather(
        _writes_anew(postgres, tmp_path / "1", ""), _writes_anew(postgres, tmp_path / "2", "anew")
    )
    report_figures(f"writes of earlier runs, and of new ones: {guarded}, control {control}")
    assert guarded[0] == 0
    assert guarded[1] > 0
    assert control[0] > 0


async def test_two_services_in_two_schemas_do_not_disturb_each_other(
    database: dict[str, str], tmp_path: Path
) -> None:
    """Each has its own tables, balances, page, and jobs with the same names."""
    connection = await connect(database)
    event_logs = {schema: tmp_path / schema for schema in ("public", "other")}
    fleets = []
    for schema, event_log in event_logs.items():
        event_log.mkdir()
        fleets += _fleet(database, event_log, [schema], DB_SCHEMA=schema, FLEET_KIND="paced,writes")
    for schema in event_logs:
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        await connection.execute(f"CREATE TABLE {schema}.fenced (job text, fence bigint)")
        await connection.execute(f"GRANT ALL ON {schema}.fenced TO PUBLIC")
    async with running(fleets), http_client(timeout=20) as http:
        for number, instance in enumerate(fleets, start=1):
            for _ in range(number):
                change = {"userId": 1, "amount": -1}
                answer = await http.post(f"{instance.url}/api/balance", json=change)
                assert answer.status_code == 200
            page = await http.get(f"{instance.url}/")
            assert page.status_code == 200
            status = (await http.get(f"{instance.url}/api/cron/status")).json()
            assert len(status["jobs"]) == JOBS
        await asyncio.gather(*(each_job_runs(event_log, JOBS) for event_log in event_logs.values()))
    for number, (schema, event_log) in enumerate(event_logs.items(), start=1):
        await connection.execute(f"SET search_path = {schema}")
        assert await connection.fetchval("SELECT balance FROM users") == 10_000 - number
        assert await connection.fetchval("SELECT count(*) FROM fenced") > 0
        failed = "SELECT count(*) FROM job_runs WHERE outcome IN ('failed', 'lost')"
        assert await connection.fetchval(failed) == 0
        assert {span.server for span in read_event_logs(event_log)} == {schema}
    await connection.close()


def _runs(event_logs: Path) -> list[Span]:
    """Return all runs, each from its start: in recreated tables fences are repeated."""
    runs = []
    for span in read_event_logs(event_logs):
        starts = [i for i, line in enumerate(span.lines) if line["what"] == "start"]
        for first, after in zip(starts, [*starts[1:], len(span.lines)], strict=True):
            lines = span.lines[first:after]
            run = replace(span, begin=lines[0]["at"], end=lines[-1]["at"], lines=lines)
            runs.append(run)
    return sorted(runs, key=lambda run: run.begin)
