"""Actions on the command line: who did what, and where the list goes on."""

import re

import httpx
import pytest

from tests.processes import Instance
from tests.terminal import run


@pytest.fixture
def environment(instance: Instance) -> dict[str, str]:
    """The environment of commands for the instance."""
    return {"BALANCE_APP_URL": instance.url}


async def test_actions_are_listed(client: httpx.AsyncClient, environment: dict[str, str]) -> None:
    """A line each, the latest first; the filters of the API; JSON is the service's own."""
    await client.post("/api/users", json={"balance": 5})
    patched = {"json": {"floor": -7}, "headers": {"If-Match": "*"}}
    await client.patch("/api/users/2?by=ada", **patched)  # type: ignore[arg-type]
    code, out, err = await run("actions", **environment)
    assert (code, err) == (0, "")
    head, changed, created = out.splitlines()
    assert head.split() == ["DONE", "(UTC)", "BY", "WHAT", "TO", "BEFORE", "AFTER"]
    assert re.search(
        r' ada +user settings changed +user 2 +\{.*"floor":0.*\} +\{.*"floor":-7.*\}', changed
    )
    assert re.search(r' - +user created +user 2 +- +\{.*"balance":5.*\}', created)
    assert (await run("actions", "--by=ada", **environment))[1].splitlines() == [head, changed]
    _, out, err = await run("actions", "--subject=user 2", "--limit=1", **environment)
    assert out.splitlines()[1] == changed
    assert re.fullmatch(
        r"More: balance-app actions '--subject=user 2' --before=\d+ --limit=1\n", err
    )
    body = (await client.get("/api/actions?limit=20")).text
    assert await run("actions", "--json", **environment) == (0, f"{body}\n", "")
    nothing = await run("actions", "--by=nobody", **environment)
    assert nothing == (0, "No actions match.\n", "")
