"""Why the database can't be used is classified and reported, and retried in time."""

import asyncio
import json
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from balance_app.db.outages import PERMANENT, Kind, classify, is_fatal, pause_seconds
from balance_app.db.pool import Database
from balance_app.sessions import OldServerError, PoolerError, StandbyError
from tests.jobs.rows import settings_for
from tests.processes import Instance, connect, http_client, query, served
from tests.system.databases import own_postgres

POOLED = "unsupported startup parameter: default_transaction_isolation"  # PgBouncer 1.18


def server_error(state: str, severity: str = "ERROR", text: str = "") -> asyncpg.PostgresError:
    fields = {"S": {"ERROR": "FEHLER"}.get(severity, severity), "V": severity}
    error = asyncpg.PostgresError.new({**fields, "C": state, "M": text})
    assert isinstance(error, asyncpg.PostgresError)
    return error


def hung_up(error: asyncpg.PostgresError) -> asyncpg.PostgresError:
    """Return what the driver raises when a connection ends after an error."""
    ended = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    ended.__cause__ = error
    return ended


MEANINGS: list[tuple[BaseException, Kind | None, str | None]] = [
    (server_error("28P01", "FATAL"), Kind.PASSWORD, "unknown"),
    (server_error("28000", "FATAL"), Kind.NOT_ALLOWED, "unknown"),
    (server_error("3D000", "FATAL"), Kind.NO_DATABASE, "unknown"),
    (server_error("55000", "FATAL"), Kind.CLOSED, "unknown"),
    (server_error("53300", "FATAL"), Kind.FULL, "no"),
    (server_error("57P03", "FATAL"), Kind.STARTING, "no"),
    (server_error("57P01", "FATAL"), Kind.ENDED, "unknown"),
    (server_error("25P03", "FATAL"), Kind.TIME_LIMIT, "unknown"),
    (server_error("XX000", "FATAL"), Kind.ENDED, "unknown"),
    (server_error("08P01", "FATAL", POOLED), Kind.POOLER, "no"),
    (server_error("08P01", "FATAL", "query_wait_timeout"), Kind.FULL, "no"),
    (hung_up(server_error("08P01", "FATAL", "query_wait_timeout")), Kind.FULL, "no"),
    (hung_up(server_error("08P01", "FATAL", "server conn crashed?")), Kind.CUT_OFF, "unknown"),
    (hung_up(server_error("57P01", "FATAL")), Kind.CUT_OFF, "unknown"),
    (
        server_error("08P01", "FATAL", "no more connections allowed (max_client_conn)"),
        Kind.FULL,
        "no",
    ),
    (server_error("08P01", "FATAL", "server login failed: FATAL no"), Kind.NO_SERVER, "no"),
    (server_error("08P01", "FATAL", "no such database: x"), Kind.NO_DATABASE, "no"),
    (server_error("08P01", "FATAL", "password authentication failed"), Kind.PASSWORD, "no"),
    (server_error("08P01", "FATAL", "SASL authentication failed"), Kind.NOT_ALLOWED, "no"),
    (server_error("08P01", "FATAL", "query_timeout"), Kind.CUT_OFF, "unknown"),
    (StandbyError("is a standby"), Kind.STANDBY, "no"),
    (server_error("25006"), Kind.READ_ONLY, "no"),
    (server_error("42501"), Kind.PRIVILEGE, "no"),
    (server_error("53100"), Kind.DISK_FULL, "no"),
    (server_error("40001"), Kind.CONFLICT, "no"),
    (server_error("55P03"), Kind.LOCKED, "no"),
    (server_error("57014"), Kind.TIME_LIMIT, "no"),
    (server_error("23505"), None, None),
    (server_error("55000"), None, None),
    (PoolerError(), Kind.POOLER, "unknown"),
    (OldServerError(), Kind.TOO_OLD, "unknown"),
    (socket.gaierror(-2, "Name or service not known"), Kind.UNKNOWN_HOST, "unknown"),
    (ssl.SSLCertVerificationError(1, "certificate verify failed"), Kind.TLS, "unknown"),
    (
        ConnectionError("PostgreSQL server at ... rejected SSL upgrade"),
        Kind.TLS_NOT_OFFERED,
        "unknown",
    ),
    (ConnectionRefusedError(111, "refused"), Kind.REFUSED, "unknown"),
    (OSError(24, "Too many open files"), Kind.FILES, "unknown"),
    (
        OSError("Multiple exceptions: [Errno 24] Too many, [Errno 24] Too many"),
        Kind.FILES,
        "unknown",
    ),
    (OSError("Multiple exceptions: [Errno 111] no, [Errno 111] no"), Kind.REFUSED, "unknown"),
    (OSError(113, "No route to host"), Kind.UNREACHABLE, "unknown"),
    (ConnectionResetError(104, "reset"), Kind.CUT_OFF, "unknown"),
    (TimeoutError(), Kind.NO_ANSWER, "unknown"),
    (asyncpg.InterfaceError("connection is closed"), Kind.CUT_OFF, "unknown"),
    (asyncpg.DataError("an argument of the wrong type"), None, None),
    (asyncpg.ClientConfigurationError("sslmode"), Kind.SETTINGS, "unknown"),
]


@pytest.mark.parametrize(("error", "kind", "applied"), MEANINGS, ids=lambda each: repr(each)[:50])
def test_an_error_has_one_meaning(
    error: BaseException, kind: Kind | None, applied: str | None
) -> None:
    """Each kind of error is distinguished from the others, in any language of the server."""
    cause = classify(error)
    assert (cause and cause.kind, cause and cause.applied) == (kind, applied)


def test_severity_is_read_in_english() -> None:
    """FATAL is recognized from a server with translated messages."""
    error = server_error("57P01", "FATAL")
    error.severity = "TÖDLICH"
    assert is_fatal(error)
    error = server_error("40001")
    assert not is_fatal(error)


def test_retry_intervals_grow_to_their_limit() -> None:
    """A cause that needs an operator is retried ever less often; a transient one soon."""
    for kind in Kind:
        pauses = [pause_seconds(kind, tries) for tries in range(20)]
        assert pauses == sorted(pauses)
        assert pauses[0] == 0.1
    assert {pause_seconds(kind, 99) for kind in PERMANENT} == {5.0}
    for kind in (Kind.REFUSED, Kind.STARTING, Kind.NO_ANSWER, Kind.CUT_OFF):
        assert pause_seconds(kind, 99) <= 0.5


@asynccontextmanager
async def a_role(database: dict[str, str], options: str = "") -> AsyncIterator[dict[str, str]]:
    """An ordinary role that owns the database, and the DB_* variables with it."""
    role = f"plain_{database['DB_NAME']}"
    await query(database, f'CREATE ROLE "{role}" LOGIN {options}')
    await query(database, f'ALTER DATABASE "{database["DB_NAME"]}" OWNER TO "{role}"')
    try:
        yield {**database, "DB_USER": role}
    finally:
        admin = await connect(database)
        await admin.execute(f'ALTER DATABASE "{database["DB_NAME"]}" OWNER TO CURRENT_USER')
        await admin.execute(f'DROP OWNED BY "{role}" CASCADE')
        await admin.execute(f'DROP ROLE "{role}"')
        await admin.close()


async def fire(client: httpx.AsyncClient, requests: int) -> Counter[str]:
    """Send this many reads and withdrawals at once; count statuses and details."""

    async def request(number: int) -> str:
        if number % 2:  # reads of one account use all connections at once, changes do not
            answer = await client.get("/api/users/1")
        else:
            answer = await client.post("/api/balance", json={"userId": 1, "amount": -1})
        return str(answer.status_code) if answer.is_success else answer.json()["detail"]

    return Counter(await asyncio.gather(*(request(number) for number in range(requests))))


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_limit_of_connections_refuses_no_request(
    database: dict[str, str], tmp_path: Path, *, guarded: bool
) -> None:
    """With fewer connections than configured requests wait for the available ones.

    The control marks the database unavailable when one more connection can't be made.
    """
    program = (
        ("-m", "balance_app", "serve") if guarded else ("-m", "tests.mutants", "open-connections")
    )
    log = tmp_path / "log"
    async with (
        a_role(database) as plain,
        served(plain, log=log, program=program, DB_POOL_SIZE="5") as client,
    ):
        admin = await connect(database)
        await admin.execute(f'ALTER ROLE "{plain["DB_USER"]}" CONNECTION LIMIT 2')
        answers: Counter[str] = Counter()
        for _ in range(4):
            async with admin.transaction():  # so that the two are busy, and a third is needed
                await admin.execute("LOCK TABLE users")
                burst = asyncio.create_task(fire(client, 100))
                await asyncio.sleep(0.3)
            answers += await burst
        ready = (await client.get("/readyz")).json()
        await admin.close()
    if not guarded:
        assert set(answers) - {"200"}
        return
    assert answers == {"200": 400}
    assert "53300" in str(ready["warnings"])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    logged = [line for line in lines if line["event"] == "no further connection"]
    assert len(logged) == 1
    assert (logged[0]["sqlstate"], logged[0]["cause"]) == ("53300", "full")


@pytest.mark.parametrize(("limit", "jobs", "starts"), [(1, "true", False), (4, "true", True)])
async def test_too_few_connections_are_reported_at_start(
    database: dict[str, str], tmp_path: Path, limit: int, jobs: str, *, starts: bool
) -> None:
    """An instance that could never work exits with a sentence; one that can warns, and serves."""
    log = tmp_path / "log"
    async with a_role(database, f"CONNECTION LIMIT {limit}") as plain:
        instance = Instance(plain, log=log, JOBS_ENABLED=jobs)
        await instance.launch()
        assert instance.process is not None
        if starts:
            await instance.ready()
            async with http_client(instance.url) as client:
                assert await fire(client, 60) == {"200": 60}
                warnings = (await client.get("/readyz")).json()["warnings"]
            assert "role's limit is 4 connections" in str(warnings)
        else:
            assert await asyncio.wait_for(instance.process.wait(), 30) == 3
        await instance.stop()
    assert f"The role's limit is {limit} connections" in log.read_text()
    assert "Traceback" not in log.read_text()


async def test_a_full_server_makes_a_job_wait(database: dict[str, str]) -> None:
    """A job's transaction waits for a connection; the database counts as available."""
    async with a_role(database) as plain:
        served = Database(settings_for(plain))
        await served.start()
        admin = await connect(database)
        await served.run(lambda con: con.fetchval("SELECT 1"))
        await admin.execute(f'ALTER ROLE "{plain["DB_USER"]}" CONNECTION LIMIT 1')

        async def work() -> int:
            async with served.lend() as connection:
                return int(await connection.fetchval("SELECT 2"))

        waits = asyncio.create_task(work())
        done, _ = await asyncio.wait({waits}, timeout=1)
        assert not done
        await admin.execute(f'ALTER ROLE "{plain["DB_USER"]}" CONNECTION LIMIT 2')
        assert await asyncio.wait_for(waits, 10) == 2
        await admin.close()
        await served.stop()


async def test_a_read_only_server_serves_reads(database: dict[str, str], tmp_path: Path) -> None:
    """Reads go on, writes are refused with that reason, and both recover without a restart."""
    log = tmp_path / "log"
    async with served(database, log=log) as client:
        await fire(client, 10)
        hold = {"userId": 1, "amount": 1, "expiresInSeconds": 1}
        assert (await client.post("/api/holds", json=hold)).status_code == 201
        admin = await connect({**database, "DB_NAME": "postgres"})
        name = database["DB_NAME"]
        await admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        await _end_sessions(admin, name)
        await asyncio.sleep(1.1)
        reads: list[int] = []
        for _ in range(20):
            refused = (await client.post("/api/balance", json={"userId": 1, "amount": -1})).json()
            reads += [
                answer.status_code
                for answer in await asyncio.gather(*(client.get("/api/users/1") for _ in range(8)))
            ]
        assert reads.count(200) >= len(reads) - 16  # those whose session was ended
        assert set(reads[16:]) == {200}
        # A hold that is overdue stays, as nothing can be changed: what is available is no less.
        account = (await client.get("/api/users/1")).json()
        assert account["held"] == 1
        assert (await client.get("/api/users")).json()["users"][0] == account
        (open_hold,) = (await client.get("/api/users/1/holds")).json()["holds"]
        assert (await client.get("/api/holds/1-1")).json() == open_hold
        assert open_hold["state"] == "open"
        assert "read-only" in refused["detail"]
        assert refused["applied"] == "no"
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert "read-only" in ready.json()["warnings"][0]
        await admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
        async with asyncio.timeout(10):
            while (await fire(client, 3)) != {"200": 3}:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)
        await admin.close()
        assert (await client.get("/api/users/1")).json()["held"] == 0
        assert "warnings" not in (await client.get("/readyz")).json()
    events = Counter(json.loads(line)["event"] for line in log.read_text().splitlines())
    assert events["database read-only"] <= 2
    assert events["database writable"] == events["database read-only"]


async def _end_sessions(admin: Any, name: str) -> None:  # noqa: ANN401 - a connection
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
    )


OUTAGES = {
    "role": ('ALTER ROLE "{role}" NOLOGIN', 'ALTER ROLE "{role}" LOGIN', "28000", "not_allowed"),
    "limit": (
        'ALTER ROLE "{role}" CONNECTION LIMIT 0',
        'ALTER ROLE "{role}" CONNECTION LIMIT -1',
        "53300",
        "full",
    ),
    "closed": (
        'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false',
        'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true',
        "55000",
        "closed",
    ),
}


@pytest.mark.parametrize("what", OUTAGES)
async def test_the_cause_of_an_outage_is_reported(
    database: dict[str, str], tmp_path: Path, what: str
) -> None:
    """In the answer, in /readyz, and once in the log, with the server's code."""
    begin, end, state, kind = OUTAGES[what]
    log = tmp_path / "log"
    async with (
        a_role(database) as plain,
        Instance(plain, log=log, JOBS_ENABLED="false") as instance,
        http_client(instance.url) as client,
    ):
        names = {"role": plain["DB_USER"], "name": database["DB_NAME"]}
        await fire(client, 10)
        admin = await connect({**database, "DB_NAME": "postgres"})
        await admin.execute(begin.format(**names))
        await _end_sessions(admin, database["DB_NAME"])
        async with asyncio.timeout(10):
            while (await client.get("/readyz")).is_success:  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        ready = await client.get("/readyz")
        refused = await client.post("/api/balance", json={"userId": 1, "amount": -1})
        assert state in ready.json()["checks"]["database"]
        assert state in refused.json()["detail"]
        assert refused.json()["applied"] == "no"
        await admin.execute(end.format(**names))
        await instance.ready(within_seconds=15)
        await admin.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    logged = [line for line in lines if line.get("sqlstate") == state]
    assert 1 <= len(logged) <= 2
    assert {line["cause"] for line in logged} == {kind}


async def test_a_wrong_password_is_not_tried_all_the_time() -> None:
    """A rotated password causes a few failed log-ins, at growing intervals."""
    async with own_postgres(log_connections="on") as server:
        admin = await connect(server.environment())
        hba = Path(await admin.fetchval("SHOW hba_file"))
        await admin.execute("CREATE ROLE app LOGIN SUPERUSER PASSWORD 'old'")
        hba.write_text(
            "local all app scram-sha-256\nhost all app all scram-sha-256\n" + hba.read_text()
        )
        await admin.execute("SELECT pg_reload_conf()")
        plain = {**server.environment(), "DB_USER": "app", "DB_PASSWORD": "old"}
        async with served(plain) as client:
            await admin.execute("ALTER ROLE app PASSWORD 'new'")
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
            )
            await fire(client, 5)
            before = server.log.read_text(errors="replace").count("password authentication failed")
            await asyncio.sleep(3)
            tried = server.log.read_text(errors="replace").count("password authentication failed")
            assert tried - before <= 8
            check = (await client.get("/readyz")).json()["checks"]["database"]
            assert "password" in check
            assert "28P01" in check
        await admin.close()


async def test_a_server_that_does_not_flush_is_reported() -> None:
    """An instance serves with `fsync = off`, but reports it."""
    async with (
        own_postgres(fsync="off", full_page_writes="off") as server,
        served(server.environment()) as client,
    ):
        ready = await client.get("/readyz")
    assert ready.status_code == 200
    assert [
        "fsync" in ready.json()["warnings"][0],
        "full_page_writes" in ready.json()["warnings"][1],
    ]
