"""A running instance logs no key, wherever a client puts it, and no password."""

import asyncio
import json
from pathlib import Path

import httpx

from tests.access.keyring import bearer, cookie, log_in, make_key, unknown
from tests.processes import SERVE, Instance, http_client

MUTANT = ("tests.mutants", "masks")
PASSWORD = "a-pass-word"  # noqa: S105 - of no role: the server asks for none
LOUD = {"LOG_LEVEL": "debug", "LOG_REQUESTS": "true", "DB_PASSWORD": PASSWORD}


async def logged(database: dict[str, str], log: Path, program: tuple[str, ...]) -> list[str]:
    """Use keys in every way, and return those that the instance has logged."""
    async with Instance(
        database, log=log, program=program, JOBS_ENABLED="false", **LOUD
    ) as instance:
        key = await make_key(database)
        session, wrong = await log_in(database, key), unknown()
        async with http_client(instance.url) as client:
            async with asyncio.timeout(10):
                while (await client.get("/api/users/1", headers=bearer(key))).status_code != 200:  # noqa: ASYNC110 - of the instance
                    await asyncio.sleep(0.1)
            for token in (key, session, wrong):
                for headers in (bearer(token), cookie(token), {"Authorization": token.text}):
                    await use(client, token.text, {**headers, **bearer(key)})
                    await use(client, token.text, headers)
                await garbage(instance.port, token.text)
    output = log.read_text()
    log.unlink()  # or all logs are found to have secrets, after the last test
    assert output.count("GET") > 10 or output.count("request") > 10
    secrets = [token.text[16:60] for token in (key, session, wrong)]
    return [each for each in (*secrets, PASSWORD) if each in output]


async def use(client: httpx.AsyncClient, text: str, headers: dict[str, str]) -> None:
    """Send a key in all parts of a request."""
    for path in (
        *(f"/api/users/{text}", f"/api/users/1?after={text}", f"/{text}"),
        *(f"/api/users/1/changes/{text}", f"/jobs/{text}", f"/live?since={text}&job={text}"),
    ):
        async with client.stream("GET", path, headers={**headers, "X-Request-Id": text}):
            pass
    body = json.dumps({"userId": 1, "amount": -1, "note": text, text: text})
    for kind in ("application/json", text):
        await client.post(
            "/api/balance",
            content=body,
            headers={**headers, "Content-Type": kind, "Idempotency-Key": text},
        )


async def garbage(port: int, text: str) -> None:
    """Send a key in what is no request."""
    for sent in (f"{text}\r\n\r\n", f"GET / HTTP/1.1\r\nHost: {text}\r\nHost: b\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent.encode())
        await reader.read()
        writer.close()


async def test_no_key_and_no_password_is_logged(database: dict[str, str], tmp_path: Path) -> None:
    """With all that an instance logs; without the masks (the control) keys are found."""
    assert await logged(database, tmp_path / "log", SERVE) == []


async def test_without_the_masks_keys_are_logged(database: dict[str, str], tmp_path: Path) -> None:
    """The control."""
    assert await logged(database, tmp_path / "unmasked", MUTANT) != []
