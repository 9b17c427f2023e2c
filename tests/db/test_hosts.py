"""Of several hosts of the database the primary is found, and a former one is left."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import asyncpg
import pytest

from balance_app import sessions
from balance_app.db.outages import Kind, classify
from balance_app.local.postgres import EmbeddedPostgres
from balance_app.sessions import StandbyError, connect, open_session
from balance_app.settings import Settings, load_settings
from tests.processes import free_port
from tests.system.databases import freeze, hosts, own_postgres, promote, standby_of, thaw


@pytest.fixture
async def pair() -> AsyncIterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A primary and its standby."""
    async with own_postgres() as primary, standby_of(primary) as standby:
        yield primary, standby


def settings_of(variables: dict[str, str], **overrides: object) -> Settings:
    return load_settings(**{name.lower(): value for name, value in variables.items()}, **overrides)


@contextmanager
def frozen_host() -> Iterator[int]:
    """A server that accepts connections, and answers nothing; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_the_primary_is_found(pair: tuple[EmbeddedPostgres, EmbeddedPostgres]) -> None:
    """Behind a frozen host, one that refuses, and a standby; asyncpg's own search ends before."""
    primary, standby = pair
    with frozen_host() as frozen:
        settings = settings_of(
            {
                **primary.environment(),
                "DB_HOST": f"127.0.0.1,127.0.0.1,{standby.socket_directory},"
                f"{primary.socket_directory}",
                "DB_PORT": f"{frozen},{free_port()},5432,5432",
            },
            db_connect_seconds=1.0,
        )
        with pytest.raises(TimeoutError):
            await asyncpg.connect(
                **settings.connect_arguments() | {"target_session_attrs": "primary"}
            )
        connection = await open_session(settings.connect_arguments())
        try:
            assert not await connection.fetchval("SELECT pg_is_in_recovery()")
            assert connection.address == f"{primary.socket_directory} port 5432"
        finally:
            connection.terminate()
        # Now the frozen one is not asked first: each host would have no time at all.
        arguments = {**settings.connect_arguments(), "timeout": 30.0}
        async with asyncio.timeout(20):
            (await connect(**arguments)).terminate()


async def test_the_most_telling_error_is_raised(
    pair: tuple[EmbeddedPostgres, EmbeddedPostgres],
) -> None:
    """A standby that answers says more than a host that refuses; the text has each."""
    _, standby = pair
    port = free_port()
    place = {"DB_HOST": f"127.0.0.1,{standby.socket_directory}", "DB_PORT": f"{port},5432"}
    settings = settings_of({**standby.environment(), **place})
    with pytest.raises(StandbyError) as raised:
        await connect(**settings.connect_arguments())
    cause = classify(raised.value)
    assert cause is not None
    assert cause.kind is Kind.STANDBY
    assert f"127.0.0.1 port {port}: [Errno 111]" in cause.text
    assert cause.text.endswith(f"{standby.socket_directory} port 5432: is a standby")
    nobody = settings_of({**standby.environment(), **place, "DB_USER": "nobody"})
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await connect(**nobody.connect_arguments())


async def test_a_primary_that_can_be_written_to_comes_first(
    pair: tuple[EmbeddedPostgres, EmbeddedPostgres],
) -> None:
    """A read-only primary is taken only while no other host can be written to."""
    primary, standby = pair
    arguments = settings_of(hosts(primary, standby)).connect_arguments()
    connection = await connect(**arguments)
    await connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    await connection.execute("SELECT pg_reload_conf()")
    connection.terminate()
    async with asyncio.timeout(30):
        while not (connection := await connect(**arguments)).is_read_only():
            connection.terminate()
    assert connection.address == f"{primary.socket_directory} port 5432"
    await promote(standby)
    found = await connect(**arguments)
    assert found.address == f"{standby.socket_directory} port 5432"
    assert not connection.is_current()
    found.terminate()
    connection.terminate()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
async def test_a_former_primary_is_not_taken_again(
    pair: tuple[EmbeddedPostgres, EmbeddedPostgres],
    monkeypatch: pytest.MonkeyPatch,
    *,
    guarded: bool,
) -> None:
    """It has come back as a primary, and the present one does not answer; the control takes it."""
    primary, standby = pair
    arguments = settings_of(hosts(primary, standby), db_connect_seconds=1.0).connect_arguments()
    (await connect(**arguments)).terminate()
    await freeze(primary)
    await promote(standby)
    (await connect(**arguments)).terminate()
    await thaw(primary)
    await freeze(standby)
    if not guarded:
        monkeypatch.setattr(sessions, "_primaries", {})
    if guarded:
        with pytest.raises(StandbyError) as raised:
            await connect(**arguments)
        assert f"{primary.socket_directory} port 5432: is a former primary" in "".join(
            raised.value.__notes__
        )
    else:
        (await connect(**arguments)).terminate()
    await thaw(standby)
    async with asyncio.timeout(30):
        while True:
            with suppress(TimeoutError, StandbyError):
                connection = await connect(**arguments)
                break
    connection.terminate()
    expected = standby if guarded else primary
    assert connection.address == f"{expected.socket_directory} port 5432"
