"""The command line of the load test: `python -m loadtest --help`."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from loadtest import picture
from loadtest.accounts import MAX_INTEGER, Account, Accounts, Ledger
from loadtest.burst import BurstConfig, Progress, fire
from loadtest.key import find_key
from loadtest.preconditions import CannotRunError, Target, allow_open_files, find, locate
from loadtest.progress import shown
from loadtest.report import Report
from loadtest.verdict import Expectation, evaluate

EXIT_PASSED, EXIT_FAILED, EXIT_NOT_RUN, EXIT_INTERRUPTED = 0, 1, 2, 130

_LONGEST_TIMEOUT_SECONDS = 3600
_REQUESTS_AT_MOST = 1_000_000  # all answers are kept

cli = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _not_zero(amount: int) -> int:
    if amount == 0:
        raise typer.BadParameter("0 would change nothing")
    return amount


@cli.command(epilog="Exit code: 0 all right, 1 something is wrong, 2 the test could not run.")
def main(  # noqa: PLR0913 - each is an option
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="URL",
            help="base URLs of the service, fired at in turn; loopback only (default: "
            "BALANCE_APP_URL or PORT, from the environment or `.env`; if nothing listens there, "
            "the ports of the containers)",
        ),
    ] = None,
    *,
    requests: Annotated[
        int, typer.Option(min=1, max=_REQUESTS_AT_MOST, help="number of requests")
    ] = 10_000,
    amount: Annotated[
        int,
        typer.Option(
            min=-MAX_INTEGER,
            max=MAX_INTEGER,
            callback=_not_zero,
            help="the change each makes; negative withdraws",
        ),
    ] = -2,
    balance: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_INTEGER,
            help="opening balance of the user that is created for the test",
        ),
    ] = 10_000,
    user: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_INTEGER,
            metavar="ID",
            help="use this user as it is, with its floor and holds, instead of creating one; no "
            "other client may change it, and no hold of it end, meanwhile",
        ),
    ] = None,
    connections: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="send over N kept-alive connections, one request after another on each "
            "(default: one connection for each request)",
        ),
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="send a unique Idempotency-Key with each request")
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="has the API key, if the service needs one (default: BALANCE_APP_KEY, from the "
            "environment or `.env`)",
        ),
    ] = None,
    timeout: Annotated[
        int,
        typer.Option(
            min=1,
            max=_LONGEST_TIMEOUT_SECONDS,
            metavar="SECONDS",
            help="limit for opening and sending together",
        ),
    ] = 120,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object and nothing else")
    ] = False,
    picture_file: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            dir_okay=False,
            writable=True,
            help="where to draw all answers over time, as HTML (default: load.html in "
            "BALANCE_APP_DATA, that is .balance-app; none with --json, or where CI is set)",
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="draw none")] = False,
) -> None:
    """Send many balance changes at once; check every answer, the balance and the entries."""
    # A character that this terminal can't encode is replaced, never raised.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    connections = min(connections or requests, requests)
    try:
        config = partial(
            BurstConfig,
            amount=amount,
            requests=requests,
            connections=connections,
            keyed=keys,
            timeout_seconds=timeout,
            api_key=find_key(key_file, urls_are_given=bool(urls)),
        )
        allow_open_files(connections)
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            report = runner.run(_run(config, urls or [], user=user, balance=balance, quiet=as_json))
    except CannotRunError as error:
        if as_json:
            print(json.dumps({"verdict": "not-run", "problems": [str(error)]}))
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_NOT_RUN) from error
    except KeyboardInterrupt as interrupt:
        print("Interrupted: no verdict.", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt
    if picture_file is None and not (as_json or os.environ.get("CI")):
        picture_file = picture.default_path()
    drawn, where = _draw(report, None if no_picture else picture_file)
    if as_json:
        print(report.as_json(drawn))
        if drawn is None and where is not None:
            print(f"The picture is {where}", file=sys.stderr)
    else:
        report.print(Console(highlight=False, soft_wrap=not sys.stdout.isatty()), where)
    raise typer.Exit(EXIT_PASSED if report.verdict.passed else EXIT_FAILED)


async def _run(
    config_for: partial[BurstConfig],
    urls: list[str],
    *,
    user: int | None,
    balance: int,
    quiet: bool,
) -> Report:
    targets = [Target.parse(url) for url in urls]
    targets = [await locate(target) for target in targets] or await find()
    accounts = Accounts(targets[0], config_for.keywords["api_key"])
    before = await (accounts.create(balance) if user is None else accounts.find(user))
    config = config_for(targets=targets, user_id=before.user_id)
    expected = Expectation(before, config.amount, config.requests)
    progress = Progress()
    async with shown(progress, config, Console(stderr=True, quiet=quiet)):
        result = await fire(config, progress)
    ledger = await _ledger(accounts, before, config.requests)
    return Report(config, expected, result, evaluate(expected, result.outcomes, ledger))


def _draw(report: Report, path: Path | None) -> tuple[Path | None, Text | None]:
    """Draw the picture; return its path if there is one, and the words for the table.

    A picture that can't be written changes no verdict.
    """
    if path is None:
        return None, None
    try:
        picture.write(path, picture.draw(report))
    except OSError as error:
        return None, Text(f"not written to {path}: {error.strerror}", style="red")
    return path, Text(str(path), style=f"link {path.absolute().as_uri()}")


async def _ledger(accounts: Accounts, before: Account, requests: int) -> Ledger | CannotRunError:
    """Read the state after the burst; a service that crashed fails the test, it is no exit 2."""
    try:
        return await accounts.ledger(before, at_most=requests)
    except CannotRunError as error:
        return error


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop  # noqa: PLC0415 - optional: absent where it does not build
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


if __name__ == "__main__":
    cli(prog_name="python -m loadtest")
