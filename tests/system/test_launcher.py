"""`balance-app up`: instances and their database on one machine, from start to stop."""

import asyncio
import os
import pwd
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import psutil
import pytest

from balance_app.local.postgres import SYSTEM_USER
from tests.processes import DATABASE_VARIABLES, free_ports, http_client
from tests.system.databases import own_postgres
from tests.system.sizes import report_figures

INSTANCES = 2
READY_SECONDS = 60
STOP_SECONDS = 5


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory that nobody else changes: each run of pytest closes its common one anew."""
    with tempfile.TemporaryDirectory(prefix="balance-app-test-", ignore_cleanup_errors=True) as top:
        yield Path(top)


async def test_a_killed_instance_is_restarted_and_ctrl_c_stops_everything(tmp_path: Path) -> None:
    """All instances serve one port, a killed one is replaced, Ctrl-C leaves no process."""
    async with _up(tmp_path) as launched:
        pids = {name: await launched.ready(name) for name in ("app1", "app2")}
        assert len(set(pids.values())) == INSTANCES
        # Started by root, they run as the user of their database.
        user = pwd.getpwnam(SYSTEM_USER).pw_uid if os.geteuid() == 0 else os.geteuid()
        assert {psutil.Process(pid).uids().real for pid in pids.values()} == {user}
        assert await launched.withdraw(2) == 9_998

        psutil.Process(pids["app1"]).kill()
        await launched.wait_for_output(r"app1 was ended by SIGKILL; restart in [\d.]+ s")
        assert await launched.ready("app1", but_not=pids["app1"])
        assert await launched.withdraw(2, instance=1) == 9_996

        family = launched.family()
        assert any(process.name() == "postgres" for process in family)
        took = await launched.end(signal.SIGINT)
        assert launched.process.returncode == 0
        await launched.wait_for_output("Stopped.")
    report_figures(f"everything stopped in {took:.2f} s")
    assert took < STOP_SECONDS
    assert _alive(family, within_seconds=0) == []


async def test_a_killed_launcher_leaves_data_but_no_process(tmp_path: Path) -> None:
    """Changes survive the end of all processes, until the data is reset."""
    async with _up(tmp_path) as launched:
        for name in ("app1", "app2"):
            await launched.ready(name)
        assert await launched.withdraw(5) == 9_995
        code, output = await _run(tmp_path, "reset", "--yes")
        assert code == 1
        assert output.startswith(f"PostgreSQL (pid {launched.postgres().pid}) is using {tmp_path}")
        family = launched.family()
        took = await launched.end(signal.SIGKILL)
        assert _alive(family, within_seconds=STOP_SECONDS) == []
    report_figures(f"the launcher was gone after {took:.2f} s")

    async with _up(tmp_path) as launched:
        await launched.ready("app1")
        assert await launched.withdraw(1, instance=1) == 9_994
        assert await launched.end(signal.SIGTERM) < STOP_SECONDS
        assert launched.process.returncode == 0

    assert await _run(tmp_path, "reset", "--yes") == (0, f"Deleted {tmp_path}/postgres.\n")
    assert not (tmp_path / "postgres").exists()


async def test_an_instance_has_stop_seconds_to_end(tmp_path: Path) -> None:
    """One that needs more than the default to end its requests is not killed."""
    async with _up(tmp_path, STOP_SECONDS="30", JOBS_ENABLED="false") as launched:
        instance = psutil.Process(await launched.ready("app1"))
        await launched.ready("app2")
        instance.suspend()
        launched.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(STOP_SECONDS)
        assert instance.is_running()
        instance.resume()
        async with asyncio.timeout(30):
            assert await launched.process.wait() == 0


async def test_an_interrupted_first_start_is_made_good(tmp_path: Path) -> None:
    """Killed while the data directory is made, it leaves nothing that the next start trips over."""
    place, new = tmp_path / "postgres", tmp_path / "postgres.new"
    async with _up(tmp_path) as launched:
        for _ in range(READY_SECONDS * 100):
            if (new / "PG_VERSION").exists():
                break
            await asyncio.sleep(0.01)
        family = launched.family()
        await launched.end(signal.SIGKILL)
        assert not place.exists()
        assert _alive(family, within_seconds=STOP_SECONDS) == []

    async with _up(tmp_path) as launched:
        await launched.ready("app1")
        assert await launched.withdraw(1, instance=1) == 9_999
    assert not new.exists()


async def test_an_incomplete_data_directory_is_reported(tmp_path: Path) -> None:
    """As earlier versions could leave it; the reported remedy works."""
    place = tmp_path / "postgres"
    place.mkdir()
    (place / "PG_VERSION").write_text("18\n")
    port = free_ports(INSTANCES + 1, below=32_000)
    code, output = await _run(tmp_path, "up", "--instances", str(INSTANCES), "--port", str(port))
    assert code == 1
    assert f"{place} is not a complete PostgreSQL data directory (global/pg_control is m" in output
    assert "Traceback" not in output
    assert await _run(tmp_path, "reset", "--yes") == (0, f"Deleted {place}.\n")
    assert not place.exists()


async def test_a_taken_port_is_reported(tmp_path: Path) -> None:
    """No process is started when a port is taken; one line names it and the remedy."""
    port = free_ports(INSTANCES + 1, below=32_000)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port + 2))
        other.listen()
        code, output = await _run(
            tmp_path, "up", "--instances", str(INSTANCES), "--port", str(port)
        )
    assert code == 1
    assert output.startswith(f"Can't listen on 127.0.0.1:{port + 2}: ")
    assert output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


async def test_what_is_open_to_the_network_without_keys_does_not_start(tmp_path: Path) -> None:
    """`up` starts nothing, not even PostgreSQL; its advice works; `serve` refuses the same."""
    port = str(free_ports(2, below=32_000))
    up = ("up", "--instances=1", f"--port={port}")
    everywhere = {"HOST": "0.0.0.0"}  # noqa: S104 - that is what is tested
    sentence = "HOST=0.0.0.0 is open to the network and there are no keys: create one"
    code, output = await _run(tmp_path, *up, **everywhere)
    assert (code, output.count("\n")) == (2, 1), output
    assert output.startswith(sentence)
    assert list(tmp_path.iterdir()) == []
    async with own_postgres() as server:
        database = server.environment()
        for command in (up, ("serve",)):
            code, output = await _run(tmp_path, *command, **everywhere, **database, PORT=port)
            assert code == 2, output
            lines = [line for line in output.splitlines() if line.startswith(sentence)]
            assert len(lines) == 1, output

    code, output = await _run(tmp_path, "keys", "create", "first", "--scope=read")
    assert code == 0, output
    assert re.search("^ba_", output, re.MULTILINE)
    async with _up(tmp_path, **everywhere) as launched:
        await launched.ready("app1")
        async with http_client(f"http://127.0.0.1:{launched.port}") as client:
            assert (await client.get("/api/users/1")).status_code == 401


A_JOB = """
import asyncio
from datetime import timedelta
from balance_app.jobs import Run, job

@job(name="linger", every=timedelta(seconds=1), min_duration=timedelta(0))
async def linger(run: Run) -> None:
    "Last longer than the test."
    print("printed by version {version}")
    await asyncio.sleep(600)
"""


async def test_a_save_restarts_the_instances_one_after_another(tmp_path: Path) -> None:
    """Jobs are released and taken over, requests are answered; wrong code changes nothing."""
    module = tmp_path / "lib" / "shop_jobs.py"
    module.parent.mkdir()
    module.write_text(A_JOB.format(version=1))
    env = {"PYTHONPATH": str(module.parent), "JOBS_MODULES": "shop_jobs", "JOBS_ENTRY_POINTS": "0"}
    async with _up(tmp_path, "--reload", **env) as launched:
        pids = {name: await launched.ready(name) for name in ("app1", "app2")}
        await launched.wait_for_output("printed by version 1")
        answers: list[int] = []
        asking = asyncio.create_task(launched.ask(answers))

        module.write_text(A_JOB.format(version=2))
        await launched.wait_for_output(r"lib/shop_jobs\.py changed\.")
        for name, pid in pids.items():
            pids[name] = await launched.ready(name, but_not=pid)
        await launched.wait_for_output("printed by version 2")
        assert {run["outcome"] for run in await launched.history("linger")} == {"released", None}

        module.write_text(A_JOB.format(version=3).replace("def ", "def: "))
        await launched.wait_for_output(r"shop_jobs can't be imported: SyntaxError: .*line 7")
        await launched.wait_for_output("The instances go on as they were, until the next save.")
        assert {psutil.Process(pid).status() for pid in pids.values()} <= {"sleeping", "running"}

        module.write_text(A_JOB.format(version=4))
        for name, pid in pids.items():
            await launched.ready(name, but_not=pid)
        await launched.wait_for_output("printed by version 4")
        assert not asking.done()
        asking.cancel()
        assert set(answers) == {200}
        assert await launched.end(signal.SIGTERM) < STOP_SECONDS
        assert launched.process.returncode == 0
    report_figures(f"{len(answers)} requests were answered meanwhile")


async def test_the_log_of_each_instance_is_kept(tmp_path: Path) -> None:
    """In a file that only its owner can read, with more than the console; also when `up` ended."""
    logs = tmp_path / "its logs"
    async with _up(tmp_path, f"--log-dir={logs}") as launched:
        pids = {name: await launched.ready(name) for name in ("app1", "app2")}
        assert {path.name for path in logs.iterdir()} == {"app1.log", "app2.log"}
        assert {path.stat().st_mode & 0o777 for path in logs.iterdir()} == {0o600}
        code, output = await _run(tmp_path, "logs", "app2")
        assert code == 0
        assert '"event": "started"' in output
        assert '"server": "app1"' not in output
        psutil.Process(pids["app1"]).kill()
        await launched.ready("app1", but_not=pids["app1"])
        shown = await launched.wait_for_output("app1 was ended by SIGKILL")
        assert '"event": "started"' not in shown.string
    code, output = await _run(tmp_path, "logs", "app1", "--lines=1000")
    assert code == 0
    assert output.count('"event": "started"') == 2
    assert output.index('"started"') < output.index("app1 was ended by SIGKILL; restart in")
    assert '"event": "stopped"' in output
    assert await _run(tmp_path, "logs", "app3") == (
        1,
        f"There is no log of app3 in {logs}; there are app1, app2.\n",
    )


async def test_where_no_log_can_be_kept(tmp_path: Path) -> None:
    """A directory that was named is needed; the default one is not."""
    (tmp_path / "logs").touch()
    async with _up(tmp_path) as launched:
        await launched.wait_for_output(f"logs can't be kept: {tmp_path}/logs: File exists")
        await launched.ready("app1")
    port = str(free_ports(2, below=32_000))
    code, output = await _run(
        tmp_path, "up", "--instances=1", f"--port={port}", f"--log-dir={tmp_path}/output/x"
    )
    assert code == 1
    assert f"The instances' logs can't be kept: {tmp_path}/output/x: Not a directory." in output
    assert "Traceback" not in output


class _Launched:
    """A running `balance-app up`, and its output."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, output: Path) -> None:
        self.process = process
        self.port = port
        self._output = output

    async def wait_for_output(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches."""
        deadline = monotonic() + READY_SECONDS
        while monotonic() < deadline:
            if found := re.search(pattern, self._output.read_text()):
                return found
            assert self.process.returncode is None, self._output.read_text()
            await asyncio.sleep(0.05)
        raise AssertionError(f"no output matches {pattern!r}:\n{self._output.read_text()}")

    async def ready(self, name: str, *, but_not: int = 0) -> int:
        """Wait until an instance is reported as ready; return its pid."""
        other = rf"(?!{but_not}\))"
        output = await self.wait_for_output(
            rf"{name} ready at http\S+ \([\d.]+ s, pid {other}(\d+)\)"
        )
        return int(output[1])

    async def withdraw(self, amount: int, *, instance: int = 0) -> int:
        """Withdraw from user 1 at the shared port or an instance's own; return the balance."""
        async with http_client(timeout=10) as http:
            answer = await http.post(
                f"http://127.0.0.1:{self.port + instance}/api/balance",
                json={"userId": 1, "amount": -amount},
            )
        return int(answer.raise_for_status().json()["balance"])

    async def ask(self, answers: list[int]) -> None:
        """Read a balance again and again, on a new connection each time; note the answers."""
        while True:
            async with http_client(f"http://127.0.0.1:{self.port}") as http:
                answers.append((await http.get("/api/users/1")).status_code)

    async def history(self, job: str) -> list[dict[str, str | None]]:
        """Return the runs of a job."""
        async with http_client(f"http://127.0.0.1:{self.port}") as http:
            answer = await http.get("/api/cron/history", params={"job": job})
        return list(answer.raise_for_status().json()["runs"])

    def family(self) -> list[psutil.Process]:
        """Return the launcher and all its descendant processes."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def postgres(self) -> psutil.Process:
        """Return the postmaster."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.name() == "postgres")

    async def end(self, number: int) -> float:
        """Signal the launcher alone, wait for its end; return the seconds it took."""
        asked = monotonic()
        self.process.send_signal(number)
        await asyncio.wait_for(self.process.wait(), 30)
        return monotonic() - asked


@asynccontextmanager
async def _up(data: Path, *options: str, **env: str) -> AsyncIterator[_Launched]:
    port = free_ports(INSTANCES + 1, below=32_000)
    output = data / "output"
    with output.open("wb") as stdout:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balance_app"),
            *("up", "--instances", str(INSTANCES), "--port", str(port), *options),
            env={**_environment(data), **env},
            cwd=data,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stdout,
            start_new_session=True,
        )
    launched = _Launched(process, port, output)
    try:
        yield launched
    finally:
        if process.returncode is None:
            family = launched.family()
            await launched.end(signal.SIGTERM)
            for process_left in _alive(family, within_seconds=1):
                process_left.kill()


async def _run(data: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Run `balance-app`; return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balance_app", *arguments),
        env={**_environment(data), **env},
        cwd=data,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode()


def _environment(data: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in DATABASE_VARIABLES}
    return {**inherited, "BALANCE_APP_DATA": str(data), "COLUMNS": "300"}


def _alive(family: list[psutil.Process], *, within_seconds: float) -> list[psutil.Process]:
    """Return the processes that have not ended in that time."""
    return list(psutil.wait_procs(family, timeout=within_seconds)[1])
