"""Jobs on the command line: status, history, watching and controls."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Final

import httpx
import pytest

from tests.jobs.rows import Connection, add_instance, add_job, insert, running
from tests.processes import Instance, connect, http_client
from tests.system.databases import kill, own_postgres
from tests.terminal import PATIENCE_SECONDS, Screen, command, run

SECOND: Final = timedelta(seconds=1)
HOSTILE: Final = "[red]user 7[/red]\x1b[2J differs"
SHOWN: Final = re.escape("[red]user 7[/red] [2J differs")


@pytest.fixture
async def connection(database: dict[str, str]) -> AsyncIterator[Connection]:
    """A connection to the database of `instance`."""
    connection = await connect(database)
    yield connection
    await connection.close()


async def fill(connection: Connection) -> None:
    one, other = await add_instance(connection, "app1"), await add_instance(connection, "app2")
    await add_instance(connection, "app3", seen_seconds_ago=25)
    await add_job(
        connection, "at-work", **running(one, "app1", seconds=200), done=4, total=16, note="users"
    )
    await add_job(connection, "at-end", **running(other, "app2"), cancel_requested_by="ada", done=3)
    await add_job(
        connection,
        "later",
        due_at=7300 * SECOND,
        last_outcome="failed",
        last_server="app2",
        last_started_at=-90 * SECOND,
        last_ended_at=-61 * SECOND,
        last_result=HOSTILE,
    )
    await add_job(connection, "late", due_at=-90 * SECOND)
    await add_job(connection, "off", paused_at=-SECOND, paused_by="ada", pause_reason="so")


async def add_run(connection: Connection, job: str, fence: int | None, **columns: object) -> None:
    values = {"due_at": -30 * SECOND, "started_at": -20 * SECOND, "server": "app1", **columns}
    if values.get("outcome"):
        values.setdefault("ended_at", -5 * SECOND)
    await insert(connection, "job_runs", job=job, fence=fence, **values)


def assert_lines(out: str, patterns: list[str]) -> None:
    """Check each line against its pattern, with ` | ` for the space between columns."""
    lines = [re.sub(r"  +", " | ", line.rstrip()) for line in out.splitlines()]
    assert len(lines) == len(patterns), out
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


# -- status and history ------------------------------------------------------------------------


async def test_the_table_shows_jobs_and_instances(
    instance: Instance, connection: Connection
) -> None:
    """A line per job, running ones first; a line per instance; no terminal control sequences."""
    await fill(connection)
    code, out, err = await run("status", BALANCE_APP_URL=f"{instance.url}/")
    assert (code, err) == (7, "")
    moment = r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"  # with its date around midnight
    last = rf"✕ 1 min ago \({moment}\) failed on app2 in 29 s: {SHOWN}"
    assert_lines(
        out,
        [
            r"✕ app3 stopped responding; 1 job needs you\.",
            r" \| app3 stopped responding \(last heartbeat at .+\) \(balance-app dismiss app3\)",
            r" \| late is overdue: no instance has started it \(balance-app run late\)",
            r"2 running, 2 waiting \(1 overdue\), 1 paused · \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC",
            r"",
            r"JOB \| STATE \| SERVER \| NOW \| LAST RUN",
            r"at-end \| ▶ cancelling \| app2 \| 4\d s \| 3",
            r"at-work \| ▶ running \| app1 \| 3 min 2\d s \| 4/16 \(25 %\) users",
            rf"late \| ! overdue \| since 1 min 3\d s \({moment}\)",
            rf"later \| ○ waiting \| in 2 h 1 min \({moment}\) \| {last}",
            rf"off \| ‖ paused \| by ada \d+ s ago \({moment}\): so",
            r"",
            r"app1: 1 running \(at-work\), up 10 min \d+ s",
            r"app2: 1 running \(at-end\), up 10 min \d+ s",
            r"app3: 0 running, stopped responding \d\d s ago",
        ],
    )
    assert "\x1b" not in out


async def test_why_a_job_waits_is_reported(instance: Instance, connection: Connection) -> None:
    """Requested, released, tried again, lost, or without an instance that has its code."""
    one = await add_instance(connection, "app1", missing=("strange",))
    over = {**running(one, "app1"), "lease_expires_at": -SECOND}
    late = {"due_at": -2 * SECOND, "attempt": 1, "last_server": "app1"}
    ended = {"last_started_at": -9 * SECOND, "last_ended_at": -5 * SECOND}
    await add_job(connection, "asked", due_at=-2 * SECOND, requested_by="ada")
    await add_job(connection, "back", **late, **ended, last_outcome="released")
    await add_job(connection, "gone", **over)
    await add_job(connection, "once-more", **late, **ended, last_outcome="failed")
    await add_job(connection, "strange")
    code, out, _ = await run("status", BALANCE_APP_URL=instance.url)
    assert code == 7
    for pattern in (
        r"asked +◔ requested +Queued by ada\. It starts within 2 seconds\.",
        r"back +◔ released +app1 released it\. Another instance resumes the run\. +↷ \d+ s ago",
        r"gone +✕ lost +app1 stopped responding",
        r"once-more +↻ retry +The last run failed\. It starts within 2 seconds\. +✕ \d+ s ago",
        r"strange +\? no code +No running instance has the code of this job\.",
    ):
        assert re.search(pattern, re.sub(r", overdue", "", out)), (pattern, out)


@pytest.mark.usefixtures("_fork_server")
async def test_a_database_that_is_unavailable_needs_a_hand() -> None:
    """The verdict and why there is no table; the exit code is the verdict's, also for programs."""
    async with (
        own_postgres() as server,
        Instance(server.environment(), JOBS_ENABLED="false") as instance,
    ):
        assert (await run("status", BALANCE_APP_URL=instance.url))[0] == 0
        await kill(server)
        code, out, err = await run("status", BALANCE_APP_URL=instance.url)
        assert code == 7, (out, err)
        assert out.startswith("✕ ")
        assert "JOB" not in out
        assert "database" in err
        assert err.count("\n") == 1
        code, out, err = await run("status", "--json", BALANCE_APP_URL=instance.url)
        assert (code, json.loads(out)["code"]) == (7, "database-unavailable"), err
    # Control: without an answer there is no verdict, either.
    assert (await run("status", BALANCE_APP_URL=instance.url))[0] == 3


async def test_without_utf_8_symbols_are_ascii(instance: Instance, connection: Connection) -> None:
    """The whole table is, whatever letters a job's result has."""
    await fill(connection)
    await connection.execute("UPDATE jobs SET last_result = 'süß' WHERE name = 'later'")
    code, out, err = await run("status", BALANCE_APP_URL=instance.url, PYTHONIOENCODING="ascii")
    assert (code, err) == (7, "")
    assert "* running" in out
    assert "= paused" in out
    assert "29 s: s??" in out


async def test_the_port_selects_the_service(instance: Instance, connection: Connection) -> None:
    """Without a URL it is the instance on this machine; a status without jobs is reported."""
    code, out, _ = await run("status", PORT=str(instance.port), HOST="0.0.0.0")  # noqa: S104
    assert code == 0
    assert "No instance is running jobs." in out
    await connection.execute("SELECT 1")


async def test_programs_get_the_services_json(
    instance: Instance, connection: Connection, client: httpx.AsyncClient
) -> None:
    """With --json the output is the service's answer, unchanged."""
    await fill(connection)
    await add_run(connection, "later", 1, outcome="failed", result=HOSTILE)
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run("status", "--json", **environment)
    assert (code, err) == (7, "")
    ours, theirs = json.loads(out), (await client.get("/api/cron/status")).json()
    assert [job["name"] for job in ours["jobs"]] == [job["name"] for job in theirs["jobs"]]
    assert ours.keys() == theirs.keys()
    body = (await client.get("/api/cron/history?limit=20")).text
    assert await run("history", "--json", **environment) == (0, f"{body}\n", "")


async def test_the_history_shows_the_outcome_of_every_run(
    instance: Instance, connection: Connection
) -> None:
    """The latest first; with the command for earlier ones; skipped ticks are shown as ranges."""
    await add_job(connection, "one")
    await add_job(connection, "two")
    skipped = {"server": None, "last_due_at": -10 * SECOND, "ticks": 3, "result": "paused by ada"}
    await add_run(connection, "one", 1, outcome="failed", result=HOSTILE)
    await add_run(connection, "two", None, outcome="skipped", **skipped)
    await add_run(connection, "one", 2, outcome="released")
    await add_run(connection, "one", 3)
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run("history", **environment)
    assert (code, err) == (0, "")
    start = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| \d+ s ago"
    assert_lines(
        out,
        [
            r"STARTED \(UTC\) \| AGO \| JOB \| OUTCOME \| SERVER \| LASTED \| RESULT",
            rf"{start} \| one \| ▶ running \| app1 \| 2\d s",
            rf"{start} \| one \| ↷ released \| app1 \| 15 s",
            rf"{start} \| two \| □ skipped \| 3 ticks to [-:\d ]+: paused by ada",
            rf"{start} \| one \| ✕ failed \| app1 \| 15 s \| {SHOWN}",
        ],
    )
    code, out, err = await run("history", "one", "--limit", "2", **environment)
    assert (code, len(out.splitlines())) == (0, 3)
    assert re.fullmatch(r"More: balance-app history one --before=\d+ --limit=2\n", err), err
    code, out, err = await run(*err.split()[2:], **environment)
    assert (code, len(out.splitlines()), err) == (0, 2, "")
    code, out, err = await run("history", "one", "--outcome", "lost", **environment)
    assert (code, out, err) == (0, "No runs match.\n", "")


async def test_what_a_run_said_is_shown(instance: Instance, connection: Connection) -> None:
    """Of the last run, or of one by its id; nothing that a terminal obeys; the same as JSON."""
    await add_job(connection, "one")
    await add_job(connection, "two")
    await add_run(connection, "one", 1, outcome="failed", result="ValueError: no such mailbox")
    await add_run(connection, "one", 2)
    skipped = {"server": None, "last_due_at": -10 * SECOND, "ticks": 3, "result": "paused by ada"}
    await add_run(connection, "one", None, outcome="skipped", **skipped)
    await add_run(connection, "two", None, outcome="skipped", **skipped)
    for fence, number, level, said in (
        (1, 5, "info", f"sent {HOSTILE}"),
        (1, 6, "error", "not stored\nOSError: no disk"),
        (2, 1, "info", "begun"),
    ):
        line = {"number": number, "logged_at": -SECOND, "level": level, "text": said}
        await insert(connection, "job_run_lines", job="one", fence=fence, **line)
    await insert(connection, "job_run_tracebacks", job="one", fence=1, text="Traceback:\n  x\ny")
    environment = {"BALANCE_APP_URL": instance.url}
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    code, out, err = await run("history", "one", "--log", **environment)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"one runs on app1 since {moment}\.\n[\d:]{{8}} info     begun\n", out)
    failed = (await query_ids(connection))[0]
    code, out, err = await run("history", "--log", f"--run={failed}", **environment)
    assert (code, err) == (0, "")
    assert_lines(
        out,
        [
            rf"one failed \d+ s ago \({moment}\) on app1 in 15 s\.",
            r"ValueError: no such mailbox",
            r"\(The first 4 lines were not kept\.\)",
            rf"[\d:]{{8}} info \| sent {SHOWN}",
            r"[\d:]{8} error \| not stored",
            r" \| OSError: no disk",
            r"Traceback:",
            r" \| x",
            r"y",
        ],
    )
    again = (await run("history", "one", "--log", "--outcome=failed", **environment))[1]
    ago = r" \d+ s ago "
    assert re.sub(ago, " ", out) == re.sub(ago, " ", again)
    async with http_client(instance.url) as client:
        body = (await client.get(f"/api/cron/runs/{failed}/log")).text
    assert (await run("history", "--json", "--log", f"--run={failed}", **environment))[1] == (
        f"{body}\n"
    )
    code, out, _ = await run("history", "--log", f"--run={failed + 2}", **environment)
    assert re.fullmatch(rf"one did not run \({moment}\)\.\npaused by ada\nNo log lines\.\n", out)
    for arguments, code, sentence in (
        (("two", "--log"), 1, "No runs match.\n"),
        (("two", "--log", f"--run={failed}"), 1, f"Run {failed} is one of one, not of two.\n"),
        (("--log", "--run=404404"), 1, "There is no run 404404.\n"),
    ):
        assert await run("history", *arguments, **environment) == (code, "", sentence)
    code, _, err = await run("history", "--run=1", **environment)
    assert code == 2
    assert "it needs --log" in err


async def query_ids(connection: Connection) -> list[int]:
    return [row["id"] for row in await connection.fetch("SELECT id FROM job_runs ORDER BY id")]


# -- watching ----------------------------------------------------------------------------------


async def test_watching_survives_a_restart(instance: Instance, connection: Connection) -> None:
    """The table is shown again after "Reconnecting"; Ctrl-C ends it with code 0."""
    await add_job(connection, "first")
    watcher = await command("status", "--watch", BALANCE_APP_URL=instance.url)
    assert watcher.stdout is not None
    stdout = watcher.stdout

    async def line() -> str:
        return (await stdout.readline()).decode()

    try:
        await _until(line, lambda shown: "first" in shown)
        await instance.stop()
        await _until(line, lambda shown: "Reconnecting" in shown)
        await instance.launch()
        await instance.ready()
        await add_job(connection, "second")
        await _until(line, lambda shown: "second" in shown)
        watcher.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(watcher.communicate(), PATIENCE_SECONDS)
        assert (watcher.returncode, err) == (0, b"")
    finally:
        if watcher.returncode is None:
            watcher.kill()
            await watcher.wait()


async def test_programs_can_watch(instance: Instance, connection: Connection) -> None:
    """Each line is a status; an unavailable service is reported on stderr."""
    await add_job(connection, "first")
    watcher = await command("status", "--watch", "--json", BALANCE_APP_URL=instance.url)
    assert watcher.stdout is not None
    assert watcher.stderr is not None
    stderr = watcher.stderr
    try:
        for _ in range(2):
            status = json.loads(await asyncio.wait_for(watcher.stdout.readline(), 30))
            assert [job["name"] for job in status["jobs"]] == ["first"]
        await instance.stop()

        async def line() -> str:
            return (await stderr.readline()).decode()

        await _until(line, lambda shown: shown.endswith("Reconnecting.\n"))
        watcher.send_signal(signal.SIGINT)
        out, _ = await asyncio.wait_for(watcher.communicate(), PATIENCE_SECONDS)
        assert all(json.loads(text)["jobs"] for text in out.splitlines())
        assert watcher.returncode == 0
    finally:
        if watcher.returncode is None:
            watcher.kill()
            await watcher.wait()


async def _until(line: Callable[[], Awaitable[str]], found: Callable[[str], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not found(shown := await line()):
            assert shown, "it has ended"


async def test_on_a_terminal_the_table_is_redrawn_in_place(
    instance: Instance, connection: Connection, client: httpx.AsyncClient
) -> None:
    """With colours; at the end the cursor is visible again."""
    await fill(connection)
    async with Screen("status", "--watch", BALANCE_APP_URL=instance.url) as screen:
        await screen.until("at-work")
        assert "\x1b[" in screen.shown
        assert "━━────────" in screen.shown
        await client.post("/api/cron/jobs/later/pause")
        await screen.until("2 paused")
        assert "\x1b[1A" in screen.shown or "\x1b[2K" in screen.shown
        screen.process.send_signal(signal.SIGINT)
        assert await screen.end() == 0, screen.shown[-3000:]
    assert screen.shown.rindex("\x1b[?25h") > screen.shown.rindex("2 paused")


async def test_a_narrow_terminal_keeps_what_matters(
    instance: Instance, connection: Connection
) -> None:
    """At 80 columns no line is broken, and state, server, time and outcome are shown."""
    await fill(connection)
    async with Screen("status", BALANCE_APP_URL=instance.url, COLUMNS="80", NO_COLOR="1") as screen:
        assert await screen.end() == 7, screen.shown[-3000:]
    lines = [re.sub(r"\x1b\[[0-9;?]*\w", "", line).rstrip() for line in screen.shown.splitlines()]
    assert max(len(line) for line in lines) <= 80
    table = {line.split()[0]: line for line in lines[6:11]}
    assert re.search(r"▶ running +app1 +3 min 2\d s +25 %", table["at-work"])
    assert re.search(r"○ waiting +in 2 h \(.+\) +✕ 1 min ago failed", table["later"])
    assert re.search(r"! overdue +since 1 min \(", table["late"])


# -- controls ----------------------------------------------------------------------------------


async def test_jobs_are_controlled(instance: Instance, connection: Connection) -> None:
    """Each answer is a sentence, or the service's JSON; a control that the state forbids fails."""
    one = await add_instance(connection, "app1")
    await add_job(connection, "idle")
    await add_job(connection, "busy", **running(one, "app1"))
    await add_job(connection, "done", **running(one, "app1"), work_ended_at=-SECOND)
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run("run", "busy", **environment)
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"busy was not started: it is already running on app1 \(since [0-9: -]+ UTC\)\.\n", err
    )
    paused = r"idle is paused \(by ada, since [0-9: -]+ UTC\)\. Resume it first\.\n"
    await run("pause", "idle", "--by", "ada", "--reason", "so", **environment)
    for options in ((), ("--wait",)):
        code, out, err = await run("run", "idle", *options, **environment)
        assert (code, out) == (1, "")
        assert re.fullmatch(paused, err)
    nothing = "idle is not running (it is {}), so there is nothing to cancel.\n"
    cancelled = "Cancelling busy on app1 (by ada). It stops within a few seconds.\n"
    for line, answer in {
        "pause idle --by ada --reason so": (0, "idle is paused by ada.\n", ""),
        "pause idle --by bob": (0, "idle is paused by ada.\n", ""),
        "resume idle": (0, "Resumed idle.\n", ""),
        "run idle --by ada": (0, "Queued idle. It starts within 2 seconds.\n", ""),
        "cancel idle": (1, "", nothing.format("waiting")),
        "cancel busy --by ada": (0, cancelled, ""),
        "pause busy --by bob": (0, "busy is paused by bob.\n", ""),
        "cancel busy --by bob": (0, cancelled, ""),
        "cancel done": (
            0,
            (
                "Nothing was cancelled: done on app1 had already finished its work. "
                "The run has succeeded, and ends now.\n"
            ),
            "",
        ),
        "forget idle --yes": (
            1,
            "",
            "idle can't be forgotten: a running instance has its code, and would run it again.\n",
        ),
    }.items():
        assert await run(*line.split(), **environment) == answer, line
    code, out, err = await run("pause", "idle", "--json", LOGNAME="mrs-x", **environment)
    assert (code, err) == (0, "")
    assert json.loads(out)["paused"]["by"] == "mrs-x"
    code, out, err = await run("cancel", "idle", "--json", **environment)
    assert (code, err) == (
        1,
        nothing.format("paused"),
    )
    assert json.loads(out)["code"] == "job-not-running"


async def test_a_schedule_is_shown_set_and_reset(
    instance: Instance, connection: Connection
) -> None:
    """The message says when it is due, who set that, and what its code declares."""
    await add_job(connection, "audit")
    moment = r"\d+ s ago \((\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d\)"
    declared = "audit is due every 5 minutes, as its code declares."
    set_by = rf"set by WHO {moment}. Its code declares: every 5 minutes."
    berlin = "at 03:30 every day, Europe/Berlin"
    cron = ("--cron", "30 3 * * *", "--tz", "Europe/Berlin", "--by", "eve")
    for arguments, pattern in (
        ((), declared),
        (
            ("--every", "60", "--by", "ada"),
            f"audit is due every minute: {set_by.replace('WHO', 'ada')}",
        ),
        ((), f"audit is due every minute: {set_by.replace('WHO', 'ada')}"),
        (cron, f"audit is due {berlin}: {set_by.replace('WHO', 'eve')}"),
        (("--reset",), declared),
    ):
        code, out, err = await run("schedule", "audit", *arguments, BALANCE_APP_URL=instance.url)
        assert (code, err) == (0, "")
        assert re.fullmatch(f"{pattern}\n", out), out
    code, out, err = await run(
        "schedule", "audit", "--cron", "* * * *", BALANCE_APP_URL=instance.url
    )
    assert (code, out) == (2, "")
    assert err.startswith("The cron expression '* * * *' has 4 fields; it must have 5 ")
    code, out, _ = await run(
        "schedule", "audit", "--every", "90", "--json", BALANCE_APP_URL=instance.url
    )
    assert (code, json.loads(out)["schedule"]["text"]) == (0, "every 90 s")


async def test_the_table_marks_schedules_that_were_set(
    instance: Instance, connection: Connection
) -> None:
    """A line each, with what the code declares; and none where there are none."""
    await add_job(connection, "audit", other_schedules=["every 7200 s"])
    _, before, _ = await run("status", BALANCE_APP_URL=instance.url)
    assert "is due" not in before
    await run("schedule", "audit", "--every", "60", "--by", "ada", BALANCE_APP_URL=instance.url)
    _, after, _ = await run("status", BALANCE_APP_URL=instance.url)
    (line,) = (line for line in after.splitlines() if "is due" in line)
    assert line.startswith("audit is due every minute: set by ada ")
    assert line.endswith(
        "Its code declares: every 5 minutes. Instances with other versions declare: every 2 hours."
    )


async def test_a_job_is_forgotten_after_a_confirmation(
    instance: Instance, connection: Connection
) -> None:
    """Without a yes nothing is done; then it is off the list, and the output names its history."""
    await add_job(connection, "moon")
    environment = {"BALANCE_APP_URL": instance.url}
    code, out, err = await run("forget", "moon", **environment)
    assert code == 1
    assert "Forget moon?" in err
    assert await connection.fetchval("SELECT forgotten_at FROM jobs") is None
    code, out, err = await run("forget", "moon", "--yes", "--by=ada", **environment)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"moon was forgotten by ada at [0-9: -]+ UTC\. Its runs: balance-app history moon\n", out
    )
    code, out, _ = await run("status", **environment)
    assert "moon" not in out


async def _waits(
    instance: Instance, connection: Connection, *arguments: str
) -> asyncio.Task[tuple[int | None, str, str]]:
    """Request a run of `one`, and wait until it is requested."""
    task = asyncio.create_task(
        run("run", "one", "--wait", *arguments, "--by=ada", BALANCE_APP_URL=instance.url)
    )
    asked = "SELECT requested_by FROM jobs WHERE name = 'one'"
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await connection.fetchval(asked) != "ada":
            assert not task.done(), task.result()
            await asyncio.sleep(0.05)
    return task


async def test_run_wait_waits_for_the_end_of_the_run(
    instance: Instance, connection: Connection
) -> None:
    """An earlier run does not count, nor a released one; exit code 1 if the run fails."""
    await add_instance(connection, "app1")
    await add_job(connection, "one", fence=4)
    await add_run(connection, "one", 4, outcome="succeeded", result="before")
    for outcome, code in (("succeeded", 0), ("failed", 1)):
        fence = await connection.fetchval("SELECT max(fence) FROM job_runs")
        waits = await _waits(instance, connection, "--json")
        await add_run(connection, "one", fence + 1, outcome="released")
        await asyncio.sleep(1.5)  # a few polls
        assert not waits.done(), waits.result()
        await add_run(connection, "one", fence + 2, outcome=outcome, result="all is said")
        await connection.execute("UPDATE jobs SET fence = $1, requested_by = NULL", fence + 2)
        found, out, err = await waits
        assert found == code
        assert json.loads(out)["fence"] == fence + 2
        assert json.loads(out)["result"] == "all is said"
        assert "▶ one" not in err


async def test_run_wait_ends_when_the_job_is_paused(
    instance: Instance, connection: Connection
) -> None:
    """With a sentence, as the run will not start."""
    await add_instance(connection, "app1")
    await add_job(connection, "one")
    waits = await _waits(instance, connection)
    await connection.execute("UPDATE jobs SET paused_at = now(), paused_by = 'bob'")
    code, out, err = await waits
    assert (code, out) == (1, "")
    assert err.endswith("one was paused by bob before it had run.\n")


async def test_a_run_under_way_is_joined(instance: Instance, connection: Connection) -> None:
    """The output says so, and reports the end of that run, also over a restart of the service."""
    one = await add_instance(connection, "app1")
    await add_job(connection, "one", **running(one, "app1"))
    process = await command("run", "one", "--wait", BALANCE_APP_URL=instance.url)
    assert process.stderr is not None
    stderr = process.stderr

    async def line() -> str:
        return (await stderr.readline()).decode()

    try:
        joined = r"one was not started: .* on app1 \(since .* UTC\)\. Waiting for that run .*\n"
        await _until(line, lambda shown: re.fullmatch(joined, shown) is not None)
        await _until(line, lambda shown: shown.startswith("▶ one running on app1, 4"))
        await instance.stop()
        await _until(line, lambda shown: shown.endswith("Reconnecting.\n"))
        await add_run(connection, "one", 7, outcome="succeeded", result=HOSTILE)
        await connection.execute(
            "UPDATE jobs SET holder = NULL, lease_expires_at = NULL, started_at = NULL,"
            " server = NULL"
        )
        await instance.launch()
        await instance.ready()
        out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    first, second = out.decode().splitlines()
    assert re.fullmatch(r"one succeeded \d+ s ago \([-:\d ]+ UTC\) on app1 in 15 s\.", first)
    assert re.fullmatch(SHOWN, second)
