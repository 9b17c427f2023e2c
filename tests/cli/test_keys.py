"""`balance-app keys`: what it makes, lists and revokes, and what it refuses."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import httpx
import pytest

from balance_app.access.keys import digest_of, is_token
from tests.processes import Instance, connect, free_port, http_client, query
from tests.terminal import run

pytestmark = pytest.mark.usefixtures("_fork_server")


async def test_a_key_is_made_used_listed_and_revoked(
    instance: Instance, database: dict[str, str]
) -> None:
    """On a running service, at once; each step is an action, and only the key is on stdout."""
    async with http_client(instance.url) as client:
        assert (await client.get("/api/users/1")).status_code == 200
        code, key, err = await run(
            *("keys", "create", "till-1", "--scope=read", "--scope=change", "--expires=90d"),
            **database,
            LOGNAME="jürgen",
        )
        assert code == 0
        assert key.endswith("\n")
        key = key.strip()
        assert is_token(key.encode())
        assert "every request to the service needs a key" in err
        assert key not in err
        assert (await client.get("/api/users/1", headers=_bearer(key))).status_code == 200
        await _until(client, 401)

        in_ascii = {**database, "PYTHONIOENCODING": "ascii"}
        code, out, err = await run("keys", "list", "--json", **in_ascii)
        (listed,) = json.loads(out)
        assert (code, err) == (0, "")
        assert {name: listed[name] for name in ("name", "scopes", "state", "sessions")} == {
            "name": "till-1",
            "scopes": ["change", "read"],
            "state": "valid",
            "sessions": 0,
        }
        assert listed["createdBy"] == "cli:jürgen"
        shown = (await run("keys", "list", **database))[1]
        assert re.search(r"till-1 +valid +change read +\d{4}-\d\d-\d\d ", shown)
        for secret in (key, key.split("_")[2], digest_of(key.encode()).hex()):
            assert secret not in out + shown

        code, out, _ = await run("keys", "revoke", "till-1", **database)
        assert code == 0
        assert out.startswith("The key till-1 is revoked")
        await _until(client, 401, **_bearer(key))
        assert (await run("keys", "revoke", "till-1", **database))[1].endswith("already revoked.\n")
    rows = await query(database, "SELECT * FROM actions ORDER BY id")
    assert [(row["action"], row["subject"], row["by"][:4]) for row in rows] == [
        ("key created", "key till-1", "cli:"),
        ("key revoked", "key till-1", "cli:"),
    ]
    assert key not in str([dict(row) for row in rows])
    # Revoking the last key does not open the service; the owner can.
    state = await query(database, "SELECT * FROM access_state")
    assert (state[0]["keys_required"], state[0]["generation"]) == (True, 3)
    await query(
        database,
        "UPDATE access_state SET keys_required = false, generation = generation + 1 RETURNING one",
    )
    async with http_client(instance.url) as client:
        await _until(client, 200)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def _until(client: httpx.AsyncClient, status: int, **headers: str) -> None:
    async with asyncio.timeout(10):
        while (  # noqa: ASYNC110 - no event
            await client.get("/api/users/1", headers=headers)
        ).status_code != status:
            await asyncio.sleep(0.05)


async def test_a_session_counts_until_its_key_is_revoked(
    instance: Instance, database: dict[str, str]
) -> None:
    """Sessions belong to a key, and end with it."""
    del instance
    await run("keys", "create", "ada", "--scope=read", **database)
    await query(
        database,
        "INSERT INTO sessions (id, digest, key_id, expires_at)"
        " SELECT 's', sha256('s'), id, now() + '1 h' FROM api_keys RETURNING id",
    )
    assert [each["sessions"] for each in await _listed(database)] == [1]
    await run("keys", "revoke", "ada", **database)
    assert [each["sessions"] for each in await _listed(database)] == [0]


async def _listed(database: dict[str, str]) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads(
        (await run("keys", "list", "--json", **database))[1]
    )
    return listed


REFUSED = [
    ("create x", "Missing option '--scope'"),
    (
        "create x --scope raed",
        "'raed' is not a scope. Did you mean read? There are read,",
    ),
    ("create x --scope read,change", "repeat --scope for each"),
    ("create x --scope=", "'' is not a scope"),
    ("create a/b --scope read", "'a/b' is not a valid name for a key"),
    ("create cli:root --scope read", "is not a valid name for a key"),
    ("create \u0430da --scope read", "is not a valid name for a key"),
    (f"create {'x' * 64} --scope read", "is not a valid name for a key"),
    ("create x --scope read --expires 90", "is neither a time from now"),
    ("create x --scope read --expires 90m", "is neither a time from now"),
    ("create x --scope read --expires 0d", "'0d' is not between"),
    ("create x --scope read --expires 999999999d", "is not between"),
    ("create x --scope read --expires -1d", "is neither a time from now"),
    ("create x --scope read --expires 2020-01-01", "is in the past"),
    ("create x --scope read --expires 9999-12-31T23:59-14:00", "is neither a time from now"),
    ("create used --scope read", "There was a key used already, and a name is used only once"),
    ("revoke usde", "There is no key usde. Did you mean used?"),
    ("revoke nothing", "There is no key nothing.\n"),
]


async def test_what_can_t_be_made_or_revoked_changes_nothing(
    instance: Instance, database: dict[str, str]
) -> None:
    """It is refused in a sentence, with nothing on stdout."""
    del instance
    await run("keys", "create", "used", "--scope=read", **database)
    before = await _everything(database)
    for arguments, sentence in REFUSED:
        code, out, err = await run("keys", *arguments.split(" "), COLUMNS="300", **database)
        assert (code, out) == (1 if sentence.startswith("There") else 2, ""), (arguments, err)
        assert sentence in err, arguments
    assert await _everything(database) == before


async def test_a_key_that_can_t_be_printed_is_not_made(
    instance: Instance, database: dict[str, str]
) -> None:
    """A name would be lost with it."""
    del instance
    before = await _everything(database)
    with Path("/dev/full").open("wb") as full:  # noqa: ASYNC230 - it does not block
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balance_app", "keys", "create", "x", "--scope=read"),
            env={**os.environ, **database},
            stdout=full,
            stderr=asyncio.subprocess.PIPE,
        )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err == b"The key was not created: it can't be printed: No space left on device.\n"
    assert await _everything(database) == before


async def _everything(database: dict[str, str]) -> str:
    rows = [
        await query(database, f"SELECT * FROM {table}")  # noqa: S608 - our own names
        for table in ("access_state", "api_keys", "actions")
    ]
    return str(rows)


async def test_only_the_owner_makes_keys(instance: Instance, database: dict[str, str]) -> None:
    """Another role is told what to do; with MIGRATE_DATABASE_URL the owner's is used."""
    del instance
    role = f"serving_{os.getpid()}"
    connection = await connect(database)
    try:
        await connection.execute(
            f"CREATE ROLE {role} LOGIN PASSWORD 'geheim';"
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};"
            f"REVOKE ALL ON api_keys FROM {role}"
        )
        limited = {**database, "DB_USER": role, "DB_PASSWORD": "geheim"}
        owner = f"postgresql://{database.get('DB_USER', 'postgres')}@/{database['DB_NAME']}"
        owner += f"?host={database['DB_HOST']}&port={database['DB_PORT']}"
        for command in ("create x --scope=read", "list", "revoke x"):
            code, out, err = await run("keys", *command.split(), **limited)
            assert (code, out, err.count("\n")) == (1, "", 1), err
            assert "permission denied for table api_keys" in err
            assert "MIGRATE_DATABASE_URL" in err
            code, _, err = await run(
                "keys", *command.split(), **limited, MIGRATE_DATABASE_URL=owner
            )
            assert (code, "permission denied" in err) == (0, False), err
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await connection.close()


async def test_a_database_that_is_not_ready_is_reported(
    database: dict[str, str], tmp_path: Path
) -> None:
    """An old schema, an unavailable server, none at all: a sentence, and nothing is made."""
    code, out, err = await run("keys", "create", "x", "--scope=read", **database)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "`balance-app migrate` creates it" in err
    away = {"DB_HOST": "127.0.0.1", "DB_PORT": str(free_port())}
    code, out, err = await run("keys", "list", **away)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert err.startswith("The database can't be reached")
    code, out, err = await run("keys", "list", cwd=str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("There is no database: none is configured")
    assert not list(tmp_path.iterdir())
