"""`balance-app logs`: what instances of `up` have printed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from balance_app.local.instance_logs import InstanceLog
from tests.terminal import Screen, run

pytestmark = pytest.mark.usefixtures("_fork_server")


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[dict[str, InstanceLog]]:
    """The logs of three instances in the default place."""
    (tmp_path / "logs").mkdir()
    found = {name: InstanceLog(tmp_path / "logs", name) for name in ("app1", "app2", "app10")}
    for name, log in found.items():
        log.write("".join(f"{name} line {number}\n" for number in range(150)).encode())
    yield found
    for log in found.values():
        log.close()


@pytest.mark.usefixtures("logs")
async def test_the_last_lines_of_one_or_of_each(tmp_path: Path) -> None:
    """A hundred, or as many as requested; of several each line with its instance."""
    data = str(tmp_path)
    code, out, err = await run("logs", "app10", BALANCE_APP_DATA=data)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"app10 line {number}" for number in range(50, 150)]
    code, out, _ = await run("logs", "app1", "--lines", "1000", BALANCE_APP_DATA=data)
    assert (code, len(out.splitlines())) == (0, 150)
    assert await run("logs", "app1", "--lines=0", BALANCE_APP_DATA=data) == (0, "", "")
    code, out, _ = await run("logs", "--lines=1", f"--log-dir={tmp_path}/logs")
    assert code == 0
    assert out.splitlines() == [
        "app1  | app1 line 149",
        "app2  | app2 line 149",
        "app10 | app10 line 149",
    ]


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize("name", ["app3", "", "../logs/app1", "app1.log", "app\x1b[2J"])
async def test_an_unknown_instance_is_named_with_those_there_are(tmp_path: Path, name: str) -> None:
    """In one sentence; a path is no name."""
    code, out, err = await run("logs", name, BALANCE_APP_DATA=str(tmp_path))
    shown = name.replace("\x1b", " ")
    sentence = f"There is no log of {shown} in {tmp_path}/logs; there are app1, app2, app10.\n"
    assert (code, out, err) == (1, "", sentence)


async def test_where_no_up_was_there_are_none(tmp_path: Path) -> None:
    """The sentence names the directory, and what writes into it."""
    code, out, err = await run("logs", BALANCE_APP_DATA=str(tmp_path / "x"))
    assert (code, out) == (1, "")
    assert err.startswith(f"There are no logs in {tmp_path}/x/logs: `balance-app up` writes them")
    (tmp_path / "file").touch()
    code, out, err = await run("logs", f"--log-dir={tmp_path}/file")
    assert (code, out) == (2, "")


async def test_new_lines_are_shown_until_ctrl_c(
    tmp_path: Path, logs: dict[str, InstanceLog]
) -> None:
    """Of an instance that comes later, too; codes of a terminal in them do nothing."""
    async with Screen("logs", "--follow", "--lines=1", BALANCE_APP_DATA=str(tmp_path)) as screen:
        await screen.until("app10 | app10 line 149")
        logs["app2"].write(b"one more\x07 (app2)\n")
        await screen.until("app2  | one more  (app2)")
        (tmp_path / "logs/app11.log").write_text("from the start\n")
        await screen.until("app11 | from the start")
        screen.process.send_signal(signal.SIGINT)
        assert await screen.end() == 0
