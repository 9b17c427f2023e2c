"""The primary, its standbys and what commits wait for are shown to people."""

import asyncio
import os
import sys
from typing import Any

import httpx
import pytest

from balance_app.db.pool import REPLICATION_SECONDS
from balance_app.db.replication import Replication, Standby
from balance_app.db.replication import _required as required
from balance_app.http.health import _replication as as_json
from tests.processes import connect, served
from tests.system.databases import hosts, kill, own_postgres, standby_of

SYNCHRONOUS = Standby(
    "b", "10.0.0.2", "streaming", synchronous=True, behind_bytes=0, behind_seconds=0
)
CATCHING_UP = SYNCHRONOUS._replace(state="catchup")
LATE = Standby("c", None, "streaming", synchronous=False, behind_bytes=5, behind_seconds=2.4)


@pytest.mark.parametrize(
    ("names", "number"),
    [
        ("", 0),
        ("*", 1),
        ("a, b", 1),
        ("FIRST 2 (a, b, c)", 2),
        ("any 3(a, b, c)", 3),
        ("2 (a, b)", 2),
        ("first_one", 1),
    ],
)
def test_how_many_standbys_a_commit_waits_for(names: str, number: int) -> None:
    """Each form of `synchronous_standby_names` is read."""
    assert required(names) == number


@pytest.mark.parametrize(
    ("standbys", "needed", "hidden", "warns"),
    [
        ((), 0, 0, False),
        ((LATE,), 0, 0, False),
        ((SYNCHRONOUS,), 1, 0, False),
        ((LATE,), 1, 0, True),
        ((CATCHING_UP,), 1, 0, True),
        ((SYNCHRONOUS, LATE), 2, 0, True),
        ((), 1, 1, False),
    ],
)
def test_a_missing_standby_is_warned_of(
    standbys: tuple[Standby, ...], needed: int, hidden: int, *, warns: bool
) -> None:
    """If commits wait for more than are connected, as far as this role may see them."""
    found = Replication("a port 5432", standbys, needed, 0, hidden)
    assert (found.warning() is not None) == warns


def test_standbys_are_described() -> None:
    """Each with its lag, and what commits wait for."""
    assert Replication("a port 1", (SYNCHRONOUS, LATE), 1, 0, 0).sentences() == (
        "a port 1 is the primary",
        "standby b (10.0.0.2): synchronous, under 1 s behind",
        "standby c: asynchronous, 2 s behind",
        "commits wait for 1 standby",
    )
    assert Replication("a port 1", (), 0, 0, 0).sentences()[1:] == (
        "no standby",
        "commits wait for no standby",
    )


def test_who_has_no_key_is_told_no_address() -> None:
    """Once there are keys; the lag and what commits wait for stay."""
    found = Replication("a port 1", (SYNCHRONOUS,), 1, 0, 0)
    with_key, without = as_json(found, details=True), as_json(found, details=False)
    assert (with_key["primary"], with_key["standbys"][0]["address"]) == ("a port 1", "10.0.0.2")
    assert "a port 1" not in str(without)
    assert "10.0.0.2" not in str(without)
    assert without["synchronous"] == with_key["synchronous"]


async def _until(client: httpx.AsyncClient, **synchronous: int) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            answer: dict[str, Any] = (await client.get("/readyz")).json()
            if answer.get("synchronous") == {"waiting": 0, **synchronous}:
                return answer
            await asyncio.sleep(0.1)


async def test_readyz_and_the_page_show_them() -> None:
    """Also that commits wait for a standby that is gone."""
    async with own_postgres() as primary, standby_of(primary) as standby:
        variables = hosts(primary, standby)
        async with served(variables) as client:
            answer = await _until(client, required=0, present=0)
            assert answer["primary"] == f"{primary.socket_directory} port 5432"
            (shown,) = answer["standbys"]
            assert (shown["name"], shown["state"]) == ("standby", "streaming")
            assert shown["synchronous"] is False
            admin = await connect(primary.environment())
            await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            await admin.execute("SELECT pg_reload_conf()")
            answer = await _until(client, required=1, present=1)
            assert "warnings" not in answer
            page = (await client.get("/")).text
            assert f"{primary.socket_directory} port 5432 is the primary" in page
            assert "standby standby: synchronous, under 1 s behind" in page
            await standby.stop()
            answer = await _until(client, required=1, present=0)
            assert answer["standbys"] == []
            assert any("none of them is connected" in each for each in answer["warnings"])
            verdict = (await client.get("/api/verdict")).json()
            assert [each["code"] for each in verdict["causes"]] == ["standby-missing"]
            assert verdict["sentence"] in (await client.get("/")).text
            await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await admin.execute("SELECT pg_reload_conf()")
            await _until(client, required=0, present=0)
            await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            await admin.execute("SELECT pg_reload_conf()")
            await _until(client, required=1, present=0)
            await admin.close()
            # While the primary is unavailable nothing is known; no earlier warning is reported.
            await kill(primary)
            await asyncio.sleep(REPLICATION_SECONDS)
            answer = (await client.get("/readyz")).json()
            assert answer["status"] == "unavailable"
            assert not any("is connected" in each for each in answer.get("warnings", []))


async def test_a_command_says_that_it_waits_for_a_standby() -> None:
    """Its commit is done when one is there, or none is asked for any more."""
    async with own_postgres() as server:
        for command in (("migrate",), ("restored", "--yes")):
            admin = await connect(server.environment())
            await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'absent'")
            await admin.execute("SELECT pg_reload_conf()")
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "balance_app", *command),
                env={**os.environ, **server.environment()},
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            assert process.stderr is not None
            async with asyncio.timeout(60):
                while not (line := await process.stderr.readline()).startswith(b"No change is"):
                    assert line, command
            await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await admin.execute("SELECT pg_reload_conf()")
            await admin.close()
            async with asyncio.timeout(60):
                await process.communicate()
            assert process.returncode == 0, command


async def test_a_role_without_the_right_sees_that_there_are_standbys() -> None:
    """It is ready, and warns of nothing that it can't see."""
    async with own_postgres() as primary, standby_of(primary):
        variables = primary.environment()
        async with served(variables) as client:
            admin = await connect(variables)
            await admin.execute("REVOKE pg_read_all_stats FROM balance_app_run")
            await admin.close()
            await asyncio.sleep(1.1)  # what was read is kept for a second
            answer = await client.get("/readyz")
            assert answer.status_code == 200
            assert answer.json()["standbys"] == []
            assert "warnings" not in answer.json()
