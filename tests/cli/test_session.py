"""The command line: help, exit codes, balances; an unavailable or faulty service."""

import asyncio
import json
import re
import shlex
import sys
from datetime import UTC, datetime, timedelta
from typing import Final

import httpx
import pytest

from balance_app.formatting import ago, brief, duration, exact, visible
from tests.processes import Instance, connect, free_port, query
from tests.terminal import PATIENCE_SECONDS, Screen, answering, environment, http, losing, run

pytestmark = pytest.mark.usefixtures("_fork_server")

DONE = '{"userId":1,"balance":9998,"version":2,"change":{"amount":-2,"at":"2026-11-21T21:49:33Z"}}'
UNKNOWN = http(
    "503 Unavailable", '{"code":"database-unavailable","detail":"It left.","applied":"unknown"}'
)
UNAVAILABLE = http(
    "503 Unavailable", '{"code":"database-unavailable","detail":"It left.","applied":"no"}'
)


# -- help and completion -----------------------------------------------------------------------


async def test_the_help_has_every_command_under_its_heading() -> None:
    """In groups, each with a description; with the exit codes, and without colours in a pipe."""
    code, out, err = await run("--help")
    assert (code, err) == (0, "")
    groups = re.findall(r"╭─ ([\w ]+) ─.*?╰", out, re.DOTALL)
    assert groups == [
        "Options",
        "The service",
        "Jobs of a running service",
        "Balances of a running service",
        "The database",
    ]
    commands = re.findall(r"^│ ([a-z][a-z-]+) +\S", out, re.MULTILINE)
    assert set(commands) == {
        *("up", "serve", "jobs", "healthcheck", "migrate", "psql", "reset"),
        *("status", "history", "run", "pause", "resume", "cancel", "schedule", "forget"),
        *("balance", "daily-balances", "change", "users", "audit"),
    }
    assert re.findall(r"• (\d+): ", out) == ["0", "1", "2", "3", "4", "5", "130"]
    assert "\x1b" not in out
    for name in commands:
        code, out, _ = await run(name, "--help")
        assert code == 0
        assert "<bool>" not in out


async def test_jobs_are_completed_from_the_running_service(
    instance: Instance, database: dict[str, str]
) -> None:
    """Their names at the given URL; nothing if the service is unavailable."""
    connection = await connect(database)
    for name in ("audit-x", "audit-y", "prune-z"):
        await connection.execute(
            "INSERT INTO jobs (name, schedule, description, due_at, ready_at)"
            " VALUES ($1, 'every 300 s', 'Is it.', now(), now())",
            name,
        )
    await connection.close()

    async def complete(line: str, **env: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        code, out, err = await run(**words, _BALANCE_APP_COMPLETE="complete_bash", **env)
        assert (code, err) == (0, "")
        return out.split()

    environment = {"BALANCE_APP_URL": instance.url}
    assert await complete("balance-app run audit-", **environment) == ["audit-x", "audit-y"]
    assert await complete("balance-app history p", **environment) == ["prune-z"]
    line = f"balance-app pause --url {instance.url} "
    assert await complete(line, PORT="1") == ["audit-x", "audit-y", "prune-z"]
    assert (
        await complete("balance-app run ", BALANCE_APP_URL=f"http://127.0.0.1:{free_port()}") == []
    )
    async with answering(http("200 OK", "[]")) as other:
        assert await complete("balance-app run ", BALANCE_APP_URL=other.url) == []
    assert await complete("balance-app run ", PORT="none") == []


# -- exit codes --------------------------------------------------------------------------------


REFUSED: Final = [
    ("balance 7", 1, "There is no user 7.\n"),
    ("balance x", 2, "Invalid value for 'USER'"),
    ("balance 0", 2, "Wrong in path:userId: out-of-range.\n"),
    ("balance", 2, "Missing argument 'USER'"),
    ("daily-balances 7", 1, "There is no user 7.\n"),
    ("daily-balances 1 --before 2026-02-30", 2, "Wrong in query:before: not-a-date.\n"),
    ("change 7 5", 1, "There is no user 7.\n"),
    ("change 1 0", 2, "Wrong in /amount: zero.\n"),
    ("change 1 --kye k", 2, "Invalid value for 'AMOUNT'"),
    (
        "change 1 -2 --key é",
        2,
        "The key 'é' can't be sent: 1 to 255 visible ASCII characters can.\n",
    ),
    ("run nothing", 1, "There is no job nothing.\n"),
    ("run nothing --wait", 1, "There is no job nothing.\n"),
    ("run ..", 1, "There is no"),
    ("schedule nothing", 1, "There is no job nothing.\n"),
    ("schedule nothing --every 60", 1, "There is no job nothing.\n"),
    ("schedule nothing --reset", 1, "There is no job nothing.\n"),
    ("schedule x --every 60 --reset", 2, "give only one of --every, --cron and"),
    ("schedule x --every 60 --tz UTC", 2, "--tz has a meaning only with --cron"),
    ("schedule x --every 1.5", 2, "Invalid value for '--every'"),
    ("history --outcome x", 2, "Invalid value for '--outcome'"),
    ("history NO", 2, "Wrong in query:job: not-a-name.\n"),
    ("audit", 1, "There is no job audit-ledger.\n"),
    ("users --limit 0", 2, "Invalid value for '--limit'"),
    ("status --url nonsense", 2, "nonsense is not the URL of a service: "),
    ("status --url http://", 2, "http:// is not the URL of a service: "),
    ("status --url http://[::1", 2, "http://[::1 is not the URL of a service: "),
    ("migrate", 2, "No database is configured: "),
    ("serve", 2, "No database is configured: "),
    ("moon", 2, "No such command 'moon'"),
]


async def test_a_refusal_is_reported_in_a_sentence(instance: Instance) -> None:
    """On stderr, with an exit code that a script can act on."""
    for line, code, message in REFUSED:
        found = await run(*line.split(" "), BALANCE_APP_URL=instance.url)
        assert (found[0], found[1]) == (code, ""), line
        assert message in found[2], found[2]
        assert found[2].count("\n") == 1 or "╭─ Error" in found[2]


async def test_invalid_settings_are_a_usage_error() -> None:
    """No request is sent without a valid address."""
    code, out, err = await run("status", PORT="none")
    assert (code, out) == (2, "")
    assert err.startswith("PORT: ")


@pytest.mark.parametrize("line", ["status", "balance 1", "change 1 -2", "run x", "audit --now"])
async def test_a_refused_connection_is_reported_in_a_sentence(line: str) -> None:
    """At once, one line on stderr and exit code 3; a default address is named as such."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    code, out, err = await run(*line.split(), "--url", f"{url}/")
    assert (code, out, err) == (3, "", f"Nobody answers at {url}: Connection refused.\n")
    code, out, err = await run(*line.split(), PORT=str(port))
    assert (code, out) == (3, "")
    assert err.endswith("refused. --url (or BALANCE_APP_URL) says where the service is.\n")


@pytest.mark.parametrize(
    ("answer", "code", "sentence"),
    [
        (b"", 3, r"Nobody answers at http://\S+: "),
        (http("200 OK", "OK"), 3, r"The server at \S+ is not this service: status 200"),
        (http("200 OK", "{}"), 3, r"The server at \S+ is not this service: status 200"),
        (http("404 No", "[]"), 3, r"The server at \S+ is not this service: status 404"),
        (http("404 No", '{"detail":5}'), 3, r"\S+ is not this service: status 404"),
        (UNAVAILABLE, 3, r"http://\S+ answers 503: It left\.$"),
        (http("500 No", '{"detail":"A mistake.","applied":"no"}'), 1, "^A mistake.$"),
        (http("404 No", '{"detail":"\\u001b[2J\\u0007no"}'), 1, r"^ \[2J no$"),
    ],
)
async def test_an_invalid_answer_is_reported_in_a_sentence(
    answer: bytes, code: int, sentence: str
) -> None:
    """One line on stderr, without terminal control sequences."""
    async with answering(answer) as other:
        found, out, err = await run("status", BALANCE_APP_URL=other.url)
    assert (found, out) == (code, "")
    assert re.search(sentence, err), err
    assert len(err.splitlines()) == 1


async def test_a_health_check_reports_ready_not_ready_or_unavailable(
    instance: Instance, database: dict[str, str]
) -> None:
    """By exit codes 0, 1 and 3, of the instance on this machine, whatever BALANCE_APP_URL is."""
    env = {"PORT": str(instance.port), "BALANCE_APP_URL": "http://127.0.0.1:1"}
    code, out, _ = await run("healthcheck", **env)
    assert (code, json.loads(out)["status"]) == (0, "ok")
    await query(database, "UPDATE balance_app_version SET version_num = '0002'")
    code, out, _ = await run("healthcheck", **env)
    assert (code, json.loads(out)["status"]) == (1, "unavailable")
    code, out, err = await run("healthcheck", "--url", f"http://127.0.0.1:{free_port()}")
    assert (code, out) == (3, "")
    assert err.startswith("Nobody answers at ")


async def test_migrate_reports_the_schemas_revision(database: dict[str, str]) -> None:
    """Exit code 0 with the revision; 3 if the database can't be reached."""
    code, out, _ = await run("migrate", **database)
    assert code == 0
    assert re.fullmatch(r"The schema is at \w+\.\n", out)
    code, _, err = await run("migrate", DB_HOST="127.0.0.1", DB_PORT=str(free_port()))
    assert code == 3
    assert err.startswith("The database can't be reached: ")


# -- balances ----------------------------------------------------------------------------------


async def test_a_change_and_its_refusal_are_reported(
    instance: Instance, client: httpx.AsyncClient
) -> None:
    """The new balance; the shortfall, with exit code 4; and both as the service's JSON."""
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run("change", "1", "-2", "--key", "k1", **environment)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"User 1 has 9998 after -2 \(version 2, \d{4}-.{14} UTC\)\.\n", out)
    again = await run("change", "1", "-2", "--key=k1", **environment)
    assert again == (0, f"{out[:-1]} This key's change was made before.\n", "")
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
        *("VERSION", "AMOUNT", "BALANCE", "MADE (UTC)", "AGO", "KEY"),
    ]
    assert [line.split()[0] for line in lines] == ["8", "7", "6", "5", "4"]
    assert re.fullmatch(r" +8 +-7 +9972 +\d{4}-.{14} +\d+ s ago +key-7 *", lines[0])
    code, out, _ = await run("balance", "1", "--entries", "1", **environment)
    assert len(out.splitlines()) == 4

    for line, path in {
        "balance 1": "/api/users/1",
        "balance 1 --entries 2": "/api/users/1/entries?after=6&limit=2",
        "users": "/api/users?after=0&limit=20",
        "users --after 1": "/api/users?after=1&limit=20",
    }.items():
        body = (await client.get(path)).text
        assert await run(*line.split(), "--json", **environment) == (0, f"{body}\n", "")

    code, out, err = await run("users", "--limit", "1", **environment)
    assert (code, err) == (0, "More: balance-app users --after=1 --limit=1\n")
    assert [line.split()[:3] for line in out.splitlines()][1:] == [["1", "9972", "8"]]
    assert (await run("users", "--limit=1", "--url", instance.url))[2] == (
        f"More: balance-app users --after=1 --limit=1 --url={instance.url}\n"
    )
    code, out, err = await run(*shlex.split(err)[2:], **environment)
    assert (code, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines()][1:] == [["2", "5", "1"]]


async def test_past_balances_are_shown(
    instance: Instance, client: httpx.AsyncClient, database: dict[str, str]
) -> None:
    """By pages, the latest day first; an empty list is no failure."""
    environment = {"BALANCE_APP_URL": instance.url}
    nothing = (0, "There are no such daily balances.\n", "")
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
    assert err == ("Earlier ones: balance-app daily-balances 1 --before=2026-01-03 --limit=2\n")
    code, out, err = await run(*shlex.split(err)[3:], "--json", **environment)
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
    assert err.endswith("Sending it again with the same key.\n")
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
    assert "It is not known whether the change was made." in err
    again = shlex.split(err.rpartition(": ")[2])
    assert again == ["balance-app", "change", "1", "-2", f"--key={proxy.keys[0]}"]
    code, out, _ = await run(*again[1:], BALANCE_APP_URL=instance.url)
    assert code == 0
    assert out.endswith("This key's change was made before.\n")
    assert (await client.get("/api/users/1")).json()["version"] == 2


@pytest.mark.parametrize(
    ("answers", "patience", "code", "sent"),
    [
        ([UNKNOWN, UNAVAILABLE, http("200 OK", DONE)], 20, 0, 3),
        ([UNAVAILABLE, http("200 OK", DONE)], 20, 0, 2),
        ([UNAVAILABLE], 0, 3, 1),
        ([UNKNOWN], 0, 5, 1),
        # a "no" to the second try is not about the first
        ([UNKNOWN, UNAVAILABLE], 1.9, 5, 2),
        ([http("502 Bad Gateway", "<html>"), http("200 OK", DONE)], 20, 0, 2),
        ([http("500 No", '{"detail":"A mistake.","applied":"unknown"}')], 0, 5, 1),
        ([http("404 No", "<html>"), http("200 OK", DONE)], 20, 3, 1),
        ([http("200 OK", "{}")], 20, 3, 1),
    ],
)
async def test_a_change_is_sent_again_while_its_outcome_is_unknown(
    answers: list[bytes], patience: float, code: int, sent: int
) -> None:
    """Until it is known or the time is over; another service is not sent it twice."""
    async with answering(*answers) as other:
        found, _, err = await run(
            "change", "1", "-2", f"--patience={patience}", BALANCE_APP_URL=other.url
        )
    assert (found, len(other.requests)) == (code, sent), err
    assert len(set(other.keys)) == 1


# -- on a terminal -----------------------------------------------------------------------------


async def test_colours_are_for_terminals_only(instance: Instance) -> None:
    """None with NO_COLOR, and none in a pipe."""
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    async with Screen("status", BALANCE_APP_URL=instance.url) as screen:
        assert await screen.end() == 0
    assert colour.search(screen.shown)
    async with Screen("status", BALANCE_APP_URL=instance.url, NO_COLOR="1") as screen:
        assert await screen.end() == 0
    assert "No instance that runs jobs" in screen.shown
    assert not colour.search(screen.shown)
    _, out, _ = await run("status", BALANCE_APP_URL=instance.url)
    assert "\x1b" not in out


async def test_a_closed_pipe_is_no_error(instance: Instance) -> None:
    """It ends the command without a traceback."""
    process = await asyncio.create_subprocess_exec(  # the interpreter has the last word
        *(sys.executable, "-m", "balance_app", "status", "--watch", "--json"),
        env=environment(BALANCE_APP_URL=instance.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(await process.stdout.readline())["jobs"] == []
    process.stdout._transport.close()  # type: ignore[attr-defined]
    err = await asyncio.wait_for(process.stderr.read(), PATIENCE_SECONDS)
    assert await process.wait() == 1
    assert err == b""


def test_durations_and_moments_are_formatted() -> None:
    """A duration in its two largest units, an age in one; no date if it is today."""
    assert [duration(n) for n in (-1, 0.9, 59, 61, 7300, 180_000)] == [
        *("0 s", "0 s", "59 s", "1 min 1 s", "2 h 1 min", "2 d 2 h"),
    ]
    assert [ago(n) for n in (-1, 59.9, 60, 7300, 180_000)] == [
        *("0 s ago", "59 s ago", "1 min ago", "2 h ago", "2 d ago"),
    ]
    moment = datetime(2026, 11, 21, 21, 49, 33, 940623, tzinfo=UTC)
    assert exact(moment) == "2026-11-21 21:49:33"
    assert brief(moment, moment + timedelta(hours=12)) == "21:49:33"
    assert brief(moment, moment + timedelta(hours=13)) == "2026-11-21 21:49:33"
    assert visible("a\x1b[2J\nb\u202e") == "a [2J b "
