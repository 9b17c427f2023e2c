"""TLS to the database: what is verified, and each reason for a failure in a sentence.

The embedded server is built without TLS: these tests need a distribution's.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from balance_app.db.outages import PERMANENT, Kind, classify
from balance_app.local import postgres
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.sessions import open_session
from balance_app.settings import load_settings
from tests.processes import Instance, connect, free_port, http_client
from tests.system import databases
from tests.system.databases import own_postgres

OPENSSL = shutil.which("openssl")
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
pytestmark = pytest.mark.skipif(
    OPENSSL is None or PROGRAMS is None,
    reason="needs the openssl program, and a PostgreSQL with TLS in /usr/lib/postgresql",
)


@pytest.fixture(autouse=True)
def _with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "binaries", lambda: PROGRAMS)
    monkeypatch.setattr(databases, "PROGRAMS", None)
    monkeypatch.setattr(postgres, "_HBA", HBA)


HBA = """\
local all all trust
hostssl all needs_certificate all trust clientcert=verify-ca
host all all all trust
"""


class Authority:
    """Signs certificates."""

    def __init__(self, directory: Path, name: str) -> None:
        self.certificate, self._key = directory / f"{name}.crt", directory / f"{name}.key"
        self._directory = directory
        _openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", self._key, "-out", self.certificate, "-days", "2"),
        )

    def sign(self, name: str, *, host: str = "localhost", days: int = 2) -> tuple[Path, Path]:
        """Return a new certificate of a host, and its key; valid to now with `days` 0."""
        place = self._directory / name
        certificate, key = place.with_suffix(".crt"), place.with_suffix(".key")
        request, extensions = place.with_suffix(".csr"), place.with_suffix(".ext")
        extensions.write_text(f"subjectAltName=DNS:{host}\n")
        _openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key),
            *("-CAcreateserial", "-days", str(days), "-extfile", extensions, "-out", certificate),
        )
        return certificate, key


def _openssl(*arguments: str | Path) -> None:
    assert OPENSSL is not None
    subprocess.run([OPENSSL, *arguments], check=True, capture_output=True)


class Server:
    """A PostgreSQL server that listens on localhost, with TLS or without."""

    def __init__(self, server: EmbeddedPostgres, port: int) -> None:
        self._postgres = server
        self._port = str(port)

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the DB_* variables with which to connect by TCP."""
        place = {"DB_HOST": "localhost", "DB_PORT": self._port}
        return {**self._postgres.environment(), **place, **variables}

    async def use(self, certificate: tuple[Path, Path] | None, root: Path | None = None) -> None:
        """Set certificate and key, and who signs those of clients; None: no TLS."""
        socket = {**self._postgres.environment(), "DB_PORT": self._port}
        admin = await connect(socket)
        for name, file in zip(("server.crt", "server.key"), certificate or (), strict=False):
            self._copy(file, name)
        if root is not None:
            self._copy(root, "root.crt")
            await admin.execute("ALTER SYSTEM SET ssl_ca_file = 'root.crt'")
        await admin.execute(f"ALTER SYSTEM SET ssl = {'off' if certificate is None else 'on'}")
        await admin.execute("SELECT pg_reload_conf()")
        expected = "off" if certificate is None else "on"
        async with asyncio.timeout(30):
            while await admin.fetchval("SHOW ssl") != expected:  # noqa: ASYNC110 - of the server
                await asyncio.sleep(0.02)
        await admin.close()

    def _copy(self, file: Path, name: str) -> None:
        owner = self._postgres.data.stat()
        copy = self._postgres.data / name
        copy.write_bytes(file.read_bytes())
        copy.chmod(0o600)
        os.chown(copy, owner.st_uid, owner.st_gid)


@asynccontextmanager
async def listening_postgres() -> AsyncIterator[Server]:
    port = free_port()
    async with own_postgres(listen_addresses="localhost", port=str(port)) as server:
        yield Server(server, port)


async def outcome(environment: dict[str, str]) -> Kind | str:
    """Return why no connection can be made, or whether it has TLS."""
    settings = load_settings(**{name.lower(): value for name, value in environment.items()})
    # The server takes new certificates when its main process has read them.
    try:
        connection = await open_session(settings.connect_arguments())
    except Exception as error:
        cause = classify(error)
        if cause is None:
            raise
        return cause.kind
    try:
        has = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        return "TLS" if await connection.fetchval(has) else "plain"
    finally:
        connection.terminate()


async def until(environment: dict[str, str], expected: Kind | str) -> None:
    """Wait until connecting has this outcome."""
    async with asyncio.timeout(30):
        while (found := await outcome(environment)) != expected:
            assert found in {"TLS", "plain", *Kind}
            await asyncio.sleep(0.1)


async def test_each_failure_has_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong root, another host, an expired certificate, none at all, and those of clients."""
    monkeypatch.setenv("HOME", str(tmp_path))
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    good, other = ours.sign("good"), ours.sign("other", host="db.example")
    expired = ours.sign("expired", days=0)
    client, wrong_client = ours.sign("client"), theirs.sign("wrong-client")
    expired_client = ours.sign("expired-client", days=0)
    root = str(ours.certificate)
    require = {"DB_SSLMODE": "require"}
    full = {"DB_SSLMODE": "verify-full", "DB_SSLROOTCERT": root}

    def shows(files: tuple[Path, Path]) -> dict[str, str]:
        user = {"DB_USER": "needs_certificate", **full}
        return {**user, "DB_SSLCERT": str(files[0]), "DB_SSLKEY": str(files[1])}

    async with listening_postgres() as server:
        at = server.environment
        await server.use(None)
        await until(at(), "plain")
        await until(at(**require), Kind.TLS_NOT_OFFERED)
        await server.use(good, ours.certificate)
        await until(at(), "TLS")
        assert await outcome(at(**require)) == "TLS"
        assert await outcome(at(DB_SSLMODE="disable")) == "plain"
        assert await outcome(at(**full)) == "TLS"
        wrong_root = {**full, "DB_SSLROOTCERT": str(theirs.certificate)}
        assert await outcome(at(**wrong_root)) is Kind.TLS_ISSUER
        by_url = f"postgresql://postgres@127.0.0.1:{at()['DB_PORT']}/postgres"
        assert await outcome({"DATABASE_URL": by_url, **full}) is Kind.TLS_HOST
        assert await outcome({"DATABASE_URL": by_url, **full, "DB_SSLMODE": "verify-ca"}) == "TLS"
        # certificates of this service
        role = await connect(at())
        await role.execute("CREATE ROLE needs_certificate LOGIN")
        await role.close()
        assert await outcome(at(DB_USER="needs_certificate", **full)) is Kind.NOT_ALLOWED
        assert await outcome(at(**shows(client))) == "TLS"
        assert await outcome(at(**shows(wrong_client))) is Kind.TLS_CLIENT
        assert await outcome(at(**shows(expired_client))) is Kind.TLS_CLIENT
        await server.use(other)
        await until(at(**full), Kind.TLS_HOST)
        assert await outcome(at(**require)) == "TLS"
        await server.use(expired)
        await until(at(**full), Kind.TLS_EXPIRED)
    permanent = {Kind.TLS_NOT_OFFERED, Kind.TLS_ISSUER, Kind.TLS_HOST, Kind.NOT_ALLOWED}
    assert permanent <= PERMANENT
    assert not {Kind.TLS_EXPIRED, Kind.TLS_CLIENT, Kind.TLS} & PERMANENT


async def test_an_instance_ends_or_waits(tmp_path: Path) -> None:
    """A wrong root ends its start with a sentence; an expired certificate can be replaced."""
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    good, expired = ours.sign("good"), ours.sign("expired", days=0)
    full = {"DB_SSLMODE": "verify-full", "DB_SSLROOTCERT": str(ours.certificate)}
    log = tmp_path / "log"
    async with listening_postgres() as server:
        await server.use(expired)
        wrong = {**full, "DB_SSLROOTCERT": str(theirs.certificate)}
        instance = Instance(server.environment(**wrong), "wrong", log=log)
        await instance.launch()
        assert instance.process is not None
        async with asyncio.timeout(60):
            code = await instance.process.wait()
        assert (code, Kind.TLS_ISSUER.value in log.read_text()) == (3, True)
        waiting = Instance(server.environment(**full), "waiting", log=log)
        await waiting.launch()
        try:
            assert await _database_check(waiting.url) == Kind.TLS_EXPIRED.value
            await server.use(good)
            await waiting.ready()
        finally:
            await waiting.stop()


async def _database_check(url: str) -> str:
    """Return what an instance reports of its database, once it listens."""
    async with http_client(url) as client, asyncio.timeout(60):
        while True:
            with suppress(httpx.ConnectError):
                return str((await client.get("/readyz")).json()["checks"]["database"])
            await asyncio.sleep(0.1)
