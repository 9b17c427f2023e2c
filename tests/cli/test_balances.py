"""The commands for balances: what they do, print, and say of what is refused or not known."""

import asyncio
import csv
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

import httpx
import pytest

from tests.processes import Instance, connect
from tests.terminal import (
    PATIENCE_SECONDS,
    Screen,
    answering,
    command,
    environment,
    http,
    losing,
    replacing,
    run,
)

pytestmark = pytest.mark.usefixtures("_fork_server")

DONE: Final = http(
    "200 OK",
    json.dumps(
        {
            "userId": 1,
            "balance": 9998,
            "held": 0,
            "available": 9998,
            "version": 2,
            "change": {
                "amount": -2,
                "at": "2026-11-21T21:49:33Z",
                "key": "k",
                "reference": None,
                "note": None,
                "reverses": None,
            },
        }
    ),
)
UNKNOWN: Final = http(
    "503 Unavailable", '{"code":"database-unavailable","detail":"It left.","applied":"unknown"}'
)
UNAVAILABLE: Final = http(
    "503 Unavailable", '{"code":"database-unavailable","detail":"It left.","applied":"no"}'
)


async def test_a_change_and_its_refusal_are_reported(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """The new balance; the shortfall, with exit code 4; and both as the service's JSON."""
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run("change", "1", "-2", "--key", "k1", **environment)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"User 1 has 9998 after -2 \(version 2, \d{4}-.{14} UTC\)\.\n", out)
    again = await run("change", "1", "-2", "--key=k1", **environment)
    assert again == (0, f"{out[:-1]} This change was already made with this key.\n", "")
    assert (await run("change", "1", "3", "--key", "k1", **environment))[0] == 1

    refused = "Refused: User 1 has 9998; withdrawing 10000 needs 2 more. Nothing was changed.\n"
    assert await run("change", "1", "-10000", **environment) == (4, "", refused)
    code, out, err = await run("change", "1", "-10000", "--key", "k2", "--json", **environment)
    assert (code, err) == (4, refused)
    assert json.loads(out) == (await client.get("/api/users/1/changes/k2")).json()["answer"]
    code, out, _ = await run("change", "1", "9007199254740991", **environment)
    assert (code, out) == (4, "")
    code, out, err = await run("change", "--json", "1", "+7", **environment)
    assert (code, err, json.loads(out)["balance"]) == (0, "", 10005)


async def test_balances_are_shown(instance: Instance, client: httpx.AsyncClient) -> None:
    """A user with the latest entries; users by pages; with --json the service's answer."""
    environment = {"BALANCE_APP_URL": instance.url}
    for number in range(1, 8):
        await client.post(
            "/api/balance",
            json={"userId": 1, "amount": -number},
            headers={"Idempotency-Key": f"key-{number}"},
        )
    await client.post("/api/users", json={"balance": 5})
    code, out, err = await run("balance", "1", **environment)
    assert (code, err) == (0, "")
    first, _, header, *lines = out.splitlines()
    assert first == "User 1 has 9972 at version 8."
    assert re.split(r"  +", header.strip()) == [
        *("VERSION", "AMOUNT", "BALANCE", "HELD", "MADE (UTC)", "AGO", "WHAT"),
        *("REFERENCE", "NOTE", "KEY", "BY"),
    ]
    assert [line.split()[0] for line in lines] == ["8", "7", "6", "5", "4"]
    assert re.fullmatch(r" +8 +-7 +9972 +0 +\d{4}-.{14} +\d+ s ago +change +key-7 +- *", lines[0])
    code, out, _ = await run("balance", "1", "--entries", "1", **environment)
    assert len(out.splitlines()) == 4

    for line, path in {
        "balance 1": "/api/users/1",
        "balance 1 --entries 2": "/api/users/1/entries?order=desc&limit=2",
        "users": "/api/users?after=0&limit=20",
        "users --after 1": "/api/users?after=1&limit=20",
    }.items():
        body = (await client.get(path)).text
        assert await run(*line.split(), "--json", **environment) == (0, f"{body}\n", "")

    code, out, err = await run("users", "--limit", "1", **environment)
    assert (code, err) == (0, "More: balance-app users --after=1 --limit=1\n")
    assert [line.split()[:6] for line in out.splitlines()][1:] == [
        ["1", "9972", "0", "9972", "0", "8"]
    ]
    assert await run("users", "--after=9", **environment) == (0, "No users match.\n", "")
    assert (await run("users", "--limit=1", "--url", instance.url))[2] == (
        f"More: balance-app users --after=1 --limit=1 --url={instance.url}\n"
    )
    code, out, err = await run(*shlex.split(err)[2:], **environment)
    assert (code, err) == (0, "")
    assert [line.split()[:6] for line in out.splitlines()][1:] == [["2", "5", "0", "5", "0", "1"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
async def test_json_loses_no_character(
    instance: Instance, client: httpx.AsyncClient, encoding: str
) -> None:
    """Whatever the terminal's encoding has; in text for people they are replaced (the control)."""
    change = {"userId": 1, "amount": -2, "note": "für 5 €"}
    await client.post("/api/balance", json=change)
    environment = {"BALANCE_APP_URL": instance.url, "PYTHONIOENCODING": encoding}
    body = (await client.get("/api/users/1/entries?order=asc&limit=20")).text
    assert await run("statement", "1", "--json", **environment) == (0, f"{body}\n", "")
    if encoding == "ascii":
        assert "f?r 5 ?" in (await run("statement", "1", **environment))[1]


async def test_past_balances_are_shown(
    instance: Instance, client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """By pages, the latest day first; an empty list is no failure."""
    environment = {"BALANCE_APP_URL": instance.url}
    nothing = (0, "No daily balances match.\n", "")
    assert await run("daily-balances", "1", **environment) == nothing
    connection = await connect(database)
    await connection.execute("""
        INSERT INTO daily_balances (user_id, day, version, balance, at)
        SELECT 1, '2026-01-01'::date + n, n, 100 + n,
               timestamptz '2026-01-01 23:50Z' + n * interval '1 day'
        FROM generate_series(1, 3) AS n
    """)
    await connection.close()
    code, out, err = await run("daily-balances", "1", "--limit=2", **environment)
    assert code == 0
    assert [re.split(r"  +", line.strip()) for line in out.splitlines()] == [
        ["DAY", "BALANCE", "VERSION", "READ (UTC)"],
        ["2026-01-04", "103", "3", "2026-01-04 23:50:00"],
        ["2026-01-03", "102", "2", "2026-01-03 23:50:00"],
    ]
    assert err == ("More: balance-app daily-balances 1 --before=2026-01-03 --limit=2\n")
    code, out, err = await run(*shlex.split(err)[2:], "--json", **environment)
    assert (code, err) == (0, "")
    page = "/api/users/1/daily-balances?before=2026-01-03&limit=2"
    assert out == (await client.get(page)).text + "\n"
    assert [day["day"] for day in json.loads(out)["dailyBalances"]] == ["2026-01-02"]


async def test_a_change_whose_answer_is_lost_is_made_once(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """It is sent again with the same key, until an answer arrives; it takes effect once."""
    async with losing(2, instance.port) as proxy:
        code, out, err = await run("change", "1", "-2", BALANCE_APP_URL=proxy.url)
    assert code == 0
    assert out.startswith("User 1 has 9998 after -2 (version 2, ")
    assert err.endswith("Sending it again: it takes effect once.\n")
    assert len(err.splitlines()) == 1
    assert len(proxy.keys) == 3
    assert len(set(proxy.keys)) == 1
    assert (await client.get("/api/users/1")).json()["version"] == 2


async def test_an_unknown_outcome_is_reported_with_its_key(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """Exit code 5, and a command that repeats the request: it takes effect only once."""
    async with losing(100, instance.port) as proxy:
        code, out, err = await run("change", "1", "-2", "--patience=0", BALANCE_APP_URL=proxy.url)
    assert (code, out) == (5, "")
    assert "It is not known whether it was done. Send it again with its key" in err
    again = shlex.split(err.rpartition(": ")[2])
    assert again == ["balance-app", "change", "1", "-2", f"--key={proxy.keys[0]}"]
    code, out, _ = await run(*again[1:], BALANCE_APP_URL=instance.url)
    assert code == 0
    assert out.endswith("This change was already made with this key.\n")
    assert (await client.get("/api/users/1")).json()["version"] == 2


@pytest.mark.parametrize(
    ("answers", "patience", "code", "sent"),
    [
        ([UNKNOWN, UNAVAILABLE, DONE], 20, 0, 3),
        ([UNAVAILABLE, DONE], 20, 0, 2),
        ([UNAVAILABLE], 0, 3, 1),
        ([UNKNOWN], 0, 5, 1),
        # a "no" to the second try is not about the first
        ([UNKNOWN, UNAVAILABLE], 0.5, 5, None),
        ([http("502 Bad Gateway", "<html>"), DONE], 20, 0, 2),
        ([http("500 No", '{"detail":"A mistake.","applied":"unknown"}')], 0, 5, 1),
        ([http("404 No", "<html>"), DONE], 20, 3, 1),
        ([http("200 OK", "{}")], 20, 3, 1),
    ],
)
async def test_a_change_is_sent_again_while_its_outcome_is_unknown(
    answers: list[bytes], patience: float, code: int, sent: int | None
) -> None:
    """Until it is known or the time is over; another service is not sent it twice."""
    async with answering(*answers) as other:
        found, _, err = await run(
            "change", "1", "-2", f"--patience={patience}", BALANCE_APP_URL=other.url
        )
    assert found == code, err
    # without a Retry-After it is sent again soon, until --patience ends
    assert len(other.requests) == sent or (sent is None and len(other.requests) > 1)
    assert len(set(other.keys)) == 1


@asynccontextmanager
async def _unwritable(kind: str) -> AsyncIterator[int]:
    """Yield a file to which nothing can be written: on a full disk, or a pipe that nobody reads."""
    if kind == "full":
        file = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, file = os.pipe()
        os.close(reader)
    try:
        yield file
    finally:
        os.close(file)


async def _run_with(
    *arguments: str, out: int, err: int = asyncio.subprocess.PIPE, url: str
) -> tuple[int | None, str]:
    """Run `balance-app` with this output; return its exit code (of the interpreter) and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", *arguments),
        env=environment(BALANCE_APP_URL=url),
        stdout=out,
        stderr=err,
    )
    _, said = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    return process.returncode, (said or b"").decode()


@pytest.mark.parametrize("kind", ["full", "closed"])
async def test_a_change_that_cannot_be_printed_is_done(
    instance: Instance, client: httpx.AsyncClient, kind: str
) -> None:
    """Exit code 0: `|| retry` would make it twice. A command on stderr shows it."""
    async with _unwritable(kind) as output:
        for version, options in enumerate(([], ["--json"]), 2):
            code, err = await _run_with(
                *("change", "1", "-2", *options), out=output, url=instance.url
            )
            assert code == 0, err
            assert err.startswith("It was done, but that can't be printed: ")
            assert err.count("\n") == 1
            again = shlex.split(err.rpartition(": ")[2])
            code, said, _ = await run(*again[1:], BALANCE_APP_URL=instance.url)
            assert code == 0
            assert said.endswith("This change was already made with this key.\n")
            assert (await client.get("/api/users/1")).json()["version"] == version
        code, _ = await _run_with("change", "1", "-2", out=output, err=output, url=instance.url)
        assert code == 0
        assert (await client.get("/api/users/1")).json()["version"] == 4
        # Control: what only reads has failed.
        code, _ = await _run_with("users", out=output, url=instance.url)
        assert code == 1


@pytest.mark.parametrize("kind", ["full", "closed"])
async def test_an_output_that_cannot_be_written_changes_no_exit_code(kind: str) -> None:
    """An unknown outcome stays one, with its key; a retry that can't be announced is made."""
    async with _unwritable(kind) as output:
        async with answering(UNKNOWN) as other:
            change = ("change", "1", "-2", "--patience=0", "--json")
            code, err = await _run_with(*change, out=output, url=other.url)
            assert (code, f"--key={other.keys[0]}\n" in err) == (5, True)
            code, _ = await _run_with(*change, out=output, err=output, url=other.url)
            assert code == 5
        async with answering(UNKNOWN, DONE) as other:
            code, _ = await _run_with(
                *("change", "1", "-2"), out=asyncio.subprocess.DEVNULL, err=output, url=other.url
            )
            assert (code, len(set(other.keys)), len(other.requests)) == (0, 1, 2)


# -- transfers, holds, reversals ---------------------------------------------------------------


async def test_money_is_moved_and_reported(instance: Instance, client: httpx.AsyncClient) -> None:
    """In a sentence with both accounts, what is held and what is available; once."""
    environment = {"BALANCE_APP_URL": instance.url}
    await client.post("/api/users", json={"balance": 5})

    async def said(line: str, code: int = 0) -> str:
        found, out, err = await run(*shlex.split(line), **environment)
        assert (found, err if code == 0 else out) == (code, ""), (line, out, err)
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "TIME", out + err)

    transfer = "transfer 1 2 5 --key t --reference 'invoice 117' --note thanks"
    moved = (
        "Transfer 1-2: 5 from user 1 to user 2 (TIME). User 1 has 9995 (version 2). "
        "User 2 has 10 (version 2)."
    )
    assert await said(transfer) == f"{moved}\n"
    assert await said(transfer) == f"{moved} This transfer was already made with this key.\n"
    assert await said("transfer 2 1 50", 4) == (
        "Refused: User 2 has 10; withdrawing 50 needs 40 more. Nothing was changed.\n"
    )
    assert await said("hold 1 20 --for 3600 --key h") == (
        "Hold 1-1 reserves 20 until TIME. User 1 has 9995 (version 2); 20 is held, 9975 available."
        "\n"
    )
    assert await said("change 1 -1") == (
        "User 1 has 9994 after -1 (version 3, TIME); 20 is held, 9974 available.\n"
    )
    assert await said("change 1 -9980", 4) == (
        "Refused: User 1 has 9994, of which 20 is held; withdrawing 9980 needs 6 more. "
        "Nothing was changed.\n"
    )
    first = (await said("balance 1")).splitlines()[0]
    assert first == "User 1 has 9994 at version 3; 20 is held, 9974 available."
    captured = "Hold 1-1 is captured: 12 of 20 is withdrawn. User 1 has 9982 (version 4)."
    assert await said("capture 1-1 --amount 12") == f"{captured}\n"
    assert await said("capture 1-1 --amount 12") == f"{captured} It was already captured.\n"
    assert await said("void 1-1", 4) == "Refused: The hold is captured. Nothing was changed.\n"
    await said("hold 1 3 --for 60")
    assert await said("capture 1-3 --amount 4", 4) == (
        "Refused: The hold is 3, less than 4. Nothing was changed.\n"
    )
    voided = "Hold 1-3 is voided. User 1 has 9982 (version 4)."
    assert await said("void 1-3") == f"{voided}\n"
    assert await said("void 1-3") == f"{voided} It was already voided.\n"
    await said("hold 1 4 --for 60 --reference r")
    rows = [line.split() for line in (await said("holds 1")).splitlines()]
    assert rows[1][:5] == ["1-1", "20", "12", "✓", "captured"]
    assert rows[2][:4] == ["1-3", "3", "■", "voided"]
    code, out, err = await run("holds", "1", "--limit=1", "--state=open", **environment)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["HOLD", "1-5"]
    assert (await run("holds", "1", "--limit=2", **environment))[2] == (
        "More: balance-app holds 1 --after=3 --limit=2\n"
    )
    reversed_ = await said("reverse 1 2")
    assert reversed_.startswith("Transfer 1-2 is reversed. Transfer 2-3: 5 from user 2 to user 1 ")
    assert await said("reverse 1 2") == f"{reversed_[:-1]} It was already reversed.\n"
    assert (await said("reverse 1 3 --note wrong")).startswith(
        "Entry 3 is reversed. User 1 has 9988 after +1 (version 6, TIME); 4 is held"
    )
    assert await said("reverse 1 6", 4) == (
        "Refused: Entry 6 of user 1 is the reversal of entry 3. Nothing was changed.\n"
    )
    what = [
        re.split(r"  +", line.strip())[6:8]
        for line in (await said("statement 1 --order desc")).splitlines()[1:]
    ]
    assert [row[0] for row in what] == [
        *("reverses 3", "reverses 2", "captures 1-1", "change", "to 2", "opening"),
    ]
    assert what[4] == ["to 2", "invoice 117"]
    for line, path in {
        "statement 1 --reference 'invoice 117'": (
            "/api/users/1/entries?order=asc&reference=invoice+117&limit=20"
        ),
        "holds 1 --state open": "/api/users/1/holds?state=open&after=0&limit=20",
        "user 1": "/api/users/1",
        "user 1 --version 2": "/api/users/1?version=2",
    }.items():
        body = (await client.get(path)).text
        assert await run(*shlex.split(line), "--json", **environment) == (0, f"{body}\n", "")
    made = (await client.get("/api/users/1/changes/t")).json()["answer"]
    code, out, _ = await run(*shlex.split(transfer), "--json", **environment)
    assert (code, json.loads(out)) == (0, made)
    assert (await said("statement 1 --from 2020-01-01 --to 2021-01-01")) == ("No entries match.\n")
    assert (await run("statement", "1", "--limit=1", **environment))[2] == (
        "More: balance-app statement 1 --after=1 --order=asc --limit=1\n"
    )


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("transfer 1 2 5 --note=x", "transfer 1 2 5 --note=x --key={key}"),
        ("hold 1 5 --for=60", "hold 1 5 --for=60 --key={key}"),
        ("capture 1-1 --amount=2", "capture 1-1 --amount=2"),
        ("void 1-1", "void 1-1"),
        ("reverse 1 1 --reference=r", "reverse 1 1 --reference=r"),
    ],
)
async def test_an_unknown_outcome_has_the_command_that_resolves_it(line: str, again: str) -> None:
    """Exit code 5; with its key where it has one."""
    async with answering(UNKNOWN) as other:
        code, out, err = await run(*line.split(), "--patience=0", BALANCE_APP_URL=other.url)
    assert (code, out) == (5, "")
    key = other.keys[0] if other.keys else ""
    assert err.endswith(f"takes effect once: balance-app {again.format(key=key)}\n")


async def test_an_interrupted_change_has_the_command_that_resolves_it() -> None:
    """Ctrl-C while it is under way: the key that it was sent with is not lost."""
    requests: asyncio.Queue[str] = asyncio.Queue()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.put_nowait((await reader.readuntil(b"\r\n\r\n")).decode())
        await reader.read()
        writer.close()

    server = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    process = await command("change", "1", "-2", BALANCE_APP_URL=url)
    async with asyncio.timeout(PATIENCE_SECONDS):
        sent = await requests.get()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    server.close()
    key = sent.lower().partition("idempotency-key: ")[2].split()[0]
    assert (process.returncode, out) == (130, b"")
    assert "It is not known whether it was done. Send it again with its key" in err.decode()
    assert f"takes effect once: balance-app change 1 -2 --key={key}\n" in err.decode()


async def test_a_narrow_terminal_leaves_out_what_is_not_needed(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """Nothing is cut that a person looks for: amounts, what an entry is of, its reference."""
    change = {"userId": 1, "amount": -2, "reference": "invoice 7", "note": "thanks"}
    await client.post("/api/balance", json=change)
    async with Screen("statement", "1", BALANCE_APP_URL=instance.url, COLUMNS="80") as screen:
        assert await screen.end() == 0
    assert "invoice 7" in screen.shown
    assert "thanks" not in screen.shown
    async with Screen("statement", "1", BALANCE_APP_URL=instance.url, COLUMNS="120") as screen:
        assert await screen.end() == 0
    assert "thanks" in screen.shown


# -- users -------------------------------------------------------------------------------------


async def test_settings_are_changed_and_shown(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """Each alone; who did it is kept; a frozen account refuses with exit code 4."""
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run(
        *("users", "set", "1", "--floor", "-500", "--freeze", "--external-id=customer 7"),
        *("--by", "ada"),
        **environment,
    )
    assert (code, err) == (0, "")
    assert out.startswith(
        "User 1 has 10000 at version 1. It is frozen. Its floor is -500, it has external id "
        "customer 7 (settings version 2), and was created at "
    )
    assert await run("users", "--external-id", "customer 7", **environment) == (0, out, "")
    assert await run("user", "1", **environment) == (0, out, "")
    assert (await run("change", "1", "-2", **environment))[::2] == (
        *(4, "Refused: User 1 is frozen. Nothing was changed.\n"),
    )
    row = (await run("users", **environment))[1].splitlines()[1]
    assert re.split(r"  +", row.strip())[4:8] == ["-500", "1", "‖ frozen", "customer 7"]
    code, out, _ = await run("users", "set", "1", "--unfreeze", "--no-external-id", **environment)
    assert code == 0
    assert "Its floor is -500, it has no external id (settings version 3)" in out
    kept = (await client.get("/api/users/1/settings")).json()["settings"]
    assert kept[0]["by"] == "ada"
    code, out, _ = await run("users", "set", "1", "--json", "--floor=0", **environment)
    assert (code, json.loads(out)) == (0, (await client.get("/api/users/1")).json())


async def test_options_before_a_command_of_users_count(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """The service's URL and --json; what only the list has is refused, and changes nothing."""
    nowhere = {"BALANCE_APP_URL": "http://127.0.0.1:9"}
    code, out, err = await run(
        *("users", "--url", instance.url, "--json", "set", "1", "--floor=-500"), **nowhere
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == (await client.get("/api/users/1")).json()
    for option in ("--external-id=7", "--after=1", "--limit=20"):
        code, out, err = await run(
            *("users", f"--url={instance.url}", option, "set", "1", "--floor=0"), **nowhere
        )
        assert (code, out) == (2, "")
        assert option.partition("=")[0] in err
        assert "it is for the list" in err
    assert (await client.get("/api/users/1")).json()["floor"] == -500


async def test_a_conflict_of_settings_says_what_is_different(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """Between reading and setting somebody else set them: nothing is overwritten."""
    account = await client.get("/api/users/1")
    await client.patch(
        "/api/users/1",
        json={"floor": -7, "frozen": True},
        headers={"If-Match": account.headers["etag"]},
    )
    stale = http("200 OK", account.text).replace(
        b"Content-Length", f"ETag: {account.headers['etag']}\r\nContent-Length".encode()
    )
    async with replacing(
        instance.port, lambda number, answer: stale if number == 0 else answer
    ) as proxy:
        code, out, err = await run("users", "set", "1", "--floor=-5", BALANCE_APP_URL=proxy.url)
    assert (code, out) == (1, ""), err
    assert err == (
        "User 1 was changed meanwhile: floor was 0, is -7; frozen was no, is yes. Nothing was "
        "changed by this command; run it again to do so.\n"
    )
    assert (await client.get("/api/users/1")).json()["floor"] == -7


async def test_a_past_balance_is_shown(instance: Instance, client: httpx.AsyncClient) -> None:
    """At a time, which is in UTC without a zone, and after an entry."""
    environment = {"BALANCE_APP_URL": instance.url}
    made = (await client.post("/api/balance", json={"userId": 1, "amount": -2})).json()["change"]
    await client.post("/api/balance", json={"userId": 1, "amount": -3})
    at = datetime.fromisoformat(made["at"])
    moment = f"{at:%Y-%m-%d %H:%M:%S}"
    for given in (made["at"], made["at"].removesuffix("Z"), made["at"].replace("T", " ")):
        assert await run("user", "1", "--at", given, **environment) == (
            *(0, f"User 1 had 9998 at {moment} UTC, after entry 2 ({moment} UTC).\n", ""),
        )
    code, out, _ = await run("user", "1", "--version=1", **environment)
    assert (code, out.startswith("User 1 had 10000, after entry 1 (")) == (0, True)


# -- exports -----------------------------------------------------------------------------------


async def test_a_statement_is_written(instance: Instance, client: httpx.AsyncClient) -> None:
    """As CSV and as JSON lines, byte for byte as the service sends it."""
    environment = {"BALANCE_APP_URL": instance.url}
    for number in range(1, 4):
        change = {"userId": 1, "amount": -number, "reference": f"r{number % 2}", "note": "ünd, =1"}
        await client.post("/api/balance", json=change)
    for option, media_type in {"--csv": "text/csv", "--jsonl": "application/jsonl"}.items():
        for selection, query in {
            "": "order=asc",
            "--order desc --reference r1": "order=desc&reference=r1",
        }.items():
            code, out, err = await run("statement", "1", option, *selection.split(), **environment)
            assert (code, err) == (0, "")
            path = f"/api/users/1/entries?{query}"
            assert out == (await client.get(path, headers={"Accept": media_type})).text
    rows = list(csv.reader(io.StringIO((await run("statement", "1", "--csv", **environment))[1])))
    assert [row[0] for row in rows] == ["version", "1", "2", "3", "4", "complete"]
    assert await run("statement", "7", "--csv", **environment) == (1, "", "There is no user 7.\n")


async def test_a_statement_that_broke_off_is_reported() -> None:
    """With exit code 3 and a sentence, after what was written."""
    lines = "version,amount\r\n1,10\r\n"
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nContent-Length: {}\r\n\r\n"
    for length, sentence in {
        len(lines): "The export is not complete: it ended without the line that says so.\n",
        1000: "The export broke off: it is not complete. No answer from ",
    }.items():
        async with answering((head.format(length) + lines).encode()) as other:
            code, out, err = await run("statement", "1", "--csv", BALANCE_APP_URL=other.url)
        assert (code, out) == (3, lines)
        assert err.startswith(sentence)
