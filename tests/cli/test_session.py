"""The command line: help, exit codes; an unavailable or faulty service."""

import asyncio
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from balance_app.formatting import ago, brief, duration, exact, visible
from tests.processes import Instance, connect, free_port, query
from tests.terminal import PATIENCE_SECONDS, Screen, answering, environment, http, run

pytestmark = pytest.mark.usefixtures("_fork_server")

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
        "Actions at a running service",
        "The database",
    ]
    commands = re.findall(r"^│ ([a-z][a-z-]+) +\S", out, re.MULTILINE)
    assert set(commands) == {
        *("up", "serve", "jobs", "healthcheck", "migrate", "psql", "reset", "logs", "restored"),
        *("status", "history", "run", "pause", "resume", "cancel", "schedule", "forget"),
        *("dismiss", "open"),
        *("audit", "seals", "change", "transfer", "hold", "capture", "void", "reverse"),
        *("balance", "user", "users", "statement", "holds", "daily-balances", "keys", "actions"),
    }
    assert re.findall(r"• (\d+): ", out) == ["0", "1", "2", "3", "4", "5", "6", "7", "130"]
    assert "\x1b" not in out
    for name in (*commands, "users set", "keys create", "keys list", "keys revoke"):
        code, out, _ = await run(*name.split(), "--help")
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
    ("balance 0", 2, "userId must be at least 1.\n"),
    ("balance", 2, "Missing argument 'USER'"),
    ("daily-balances 7", 1, "There is no user 7.\n"),
    ("daily-balances 1 --before 2026-02-30", 2, "before must be a date, such as 2026-05-31.\n"),
    ("change 7 5", 1, "There is no user 7.\n"),
    ("change 1 0", 2, "amount must not be 0.\n"),
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
    ("history NO", 2, "job must be the name of a job: "),
    ("transfer 1 1 5", 2, "toUserId must be another user: a transfer is between two.\n"),
    ("transfer 1 7 5", 1, "There is no user 7.\n"),
    ("transfer 1 2 -5", 2, "amount must be at least 1.\n"),
    ("transfer 1 2", 2, "Missing argument 'AMOUNT'"),
    ("hold 1 5", 2, "Missing option '--for'"),
    ("hold 1 5 --for 0", 2, "expiresInSeconds must be at least 1.\n"),
    ("hold 1 5 --for 60 --reference \u200b", 2, "reference must be 1 to 200 characters"),
    ("hold 1 20000 --for 60", 4, "needs 10000 more. Nothing was changed.\n"),
    ("capture 1-1", 1, "There is no such hold.\n"),
    ("capture x", 2, "holdId must be an id such as 1-2.\n"),
    ("void ..", 2, "holdId must be an id such as 1-2.\n"),
    ("holds 7", 1, "There is no user 7.\n"),
    ("holds 1 --state x", 2, "Invalid value for '--state'"),
    ("reverse 1 9", 1, "User 1 has no entry 9.\n"),
    ("user 7", 1, "There is no user 7.\n"),
    ("user 1 --at yesterday", 2, "'yesterday' is no time"),
    ("user 1 --at 0001-01-01T00:00+14:00", 2, "'0001-01-01T00:00+14:00' is no time"),
    ("user 1 --at 2020-01-01", 1, "User 1"),
    ("user 1 --at 2020-01-01 --version 1", 2, "give only one of --at and --version"),
    ("user 1 --version 9", 1, "User 1 has no entry 9.\n"),
    ("users --external-id nobody", 1, "There is no user with external id nobody.\n"),
    ("users set 7 --freeze", 1, "There is no user 7.\n"),
    ("users set 1", 2, "give what to change"),
    ("users set 1 --external-id x --no-external-id", 2, "give only one of --external-id"),
    ("users set 1 --external-id=", 2, "externalId must be 1 to 200 char"),
    ("users set 1 --floor 10001", 4, "less than a floor of 10001. Nothing was changed.\n"),
    ("statement 7", 1, "There is no user 7.\n"),
    ("statement 1 --csv --jsonl", 2, "give only one of --csv, --jsonl and"),
    ("statement 1 --csv --limit 5", 2, "--limit is for pages"),
    ("statement 1 --order up", 2, "Invalid value for '--order'"),
    ("statement 1 --from x", 2, "'x' is no time"),
    ("users --limit 0", 2, "Invalid value for '--limit'"),
    ("status --url nonsense", 2, "nonsense is not the URL of a service: "),
    ("status --url http://", 2, "http:// is not the URL of a service: "),
    ("status --url http://[::1", 2, "http://[::1 is not the URL of a service: "),
    ("migrate", 2, "No database is configured: "),
    ("audit", 2, "No database is configured, and none runs here: "),
    ("seals", 2, "No database is configured, and none runs here: "),
    ("audit --seal 00", 2, "a digest has 64 hexadecimal digits"),
    ("audit --url http://localhost", 2, "No such option: --url"),
    ("serve", 2, "No database is configured: "),
    ("moon", 2, "No such command 'moon'"),
]


async def test_a_refusal_is_reported_in_a_sentence(instance: Instance, tmp_path: Path) -> None:
    """On stderr, with an exit code that a script can act on; whatever runs in this checkout."""
    for line, code, message in REFUSED:
        env = {"BALANCE_APP_URL": instance.url, "BALANCE_APP_DATA": str(tmp_path)}
        found = await run(*line.split(" "), **env)
        assert (found[0], found[1]) == (code, ""), line
        assert message in found[2], found[2]
        assert found[2].count("\n") == 1 or "╭─ Error" in found[2]


async def test_invalid_settings_are_a_usage_error() -> None:
    """No request is sent without a valid address."""
    code, out, err = await run("status", PORT="none")
    assert (code, out) == (2, "")
    assert err.startswith("PORT: ")


@pytest.mark.parametrize(
    "line",
    [
        *("status", "balance 1", "change 1 -2", "run x", "history", "transfer 1 2 5"),
        *("void 1-1", "users set 1 --freeze", "statement 1 --csv"),
    ],
)
async def test_a_refused_connection_is_reported_in_a_sentence(line: str) -> None:
    """At once, one line on stderr and exit code 3; a default address is named as such."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    code, out, err = await run(*line.split(), "--url", f"{url}/")
    assert (code, out, err) == (3, "", f"No answer from {url}: Connection refused.\n")
    code, out, err = await run(*line.split(), PORT=str(port))
    assert (code, out) == (3, "")
    assert err.endswith("refused. --url (or BALANCE_APP_URL) says where the service is.\n")


@pytest.mark.parametrize(
    ("answer", "code", "sentence"),
    [
        (b"", 3, r"No answer from http://\S+: "),
        (http("200 OK", "OK"), 3, r"The server at \S+ is not this service: status 200"),
        (http("200 OK", "{}"), 3, r"The server at \S+ is not this service: status 200"),
        (http("404 No", "[]"), 3, r"The server at \S+ is not this service: status 404"),
        (http("404 No", '{"detail":5}'), 3, r"\S+ is not this service: status 404"),
        (UNAVAILABLE, 3, r"http://\S+ answers 503: It left\.$"),
        (http("500 No", '{"code":"internal-error","detail":"A mistake."}'), 1, "^A mistake.$"),
        (http("404 No", '{"code":"x","detail":"\\u001b[2J\\u0007no"}'), 1, r"^ \[2J no$"),
        (http("502 No", '{"detail":"No upstream."}'), 3, r"\S+ is not this service: status 502"),
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
    assert err.startswith("No answer from ")


async def test_migrate_reports_the_schemas_revision(database: dict[str, str]) -> None:
    """Exit code 0 with the revision; 3 if the database can't be reached."""
    code, out, _ = await run("migrate", **database)
    assert code == 0
    assert re.fullmatch(r"The schema is at \w+\.\n", out)
    code, _, err = await run("migrate", DB_HOST="127.0.0.1", DB_PORT=str(free_port()))
    assert code == 3
    assert err.startswith("The database can't be reached: ")


# -- on a terminal -----------------------------------------------------------------------------


async def test_colours_are_for_terminals_only(instance: Instance) -> None:
    """None with NO_COLOR, and none in a pipe."""
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    async with Screen("status", BALANCE_APP_URL=instance.url) as screen:
        assert await screen.end() == 0
    assert colour.search(screen.shown)
    async with Screen("status", BALANCE_APP_URL=instance.url, NO_COLOR="1") as screen:
        assert await screen.end() == 0
    assert "No instance is running jobs" in screen.shown
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
