"""The command line of the load test: `python -m loadtest --help`."""

import asyncio
import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from rich.console import Console

from loadtest.accounts import Account, Accounts, Ledger
from loadtest.burst import BurstConfig, Progress, fire
from loadtest.preconditions import CannotRunError, Target, allow_open_files, find, locate
from loadtest.progress import shown
from loadtest.report import Report
from loadtest.verdict import Expectation, evaluate

EXIT_PASSED, EXIT_FAILED, EXIT_NOT_RUN, EXIT_INTERRUPTED = 0, 1, 2, 130

_LONGEST_TIMEOUT_SECONDS = 3600
_REQUESTS_AT_MOST = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one load test and return the exit code: 0 passed, 1 failed, 2 could not run."""
    options = _parser().parse_args(arguments)
    # What can't be encoded for this terminal is replaced, never raised.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            report = runner.run(_run(options))
    except CannotRunError as error:
        if options.json:
            print(json.dumps({"verdict": "not-run", "problems": [str(error)]}))
        print(error, file=sys.stderr)
        return EXIT_NOT_RUN
    except KeyboardInterrupt:
        print("Interrupted: no verdict.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if options.json:
        print(report.as_json())
    else:
        report.print(Console(highlight=False, soft_wrap=not sys.stdout.isatty()))
    return EXIT_PASSED if report.verdict.passed else EXIT_FAILED


async def _run(options: Namespace) -> Report:
    targets = [Target.parse(url) for url in [*options.urls, *options.url]]
    connections = min(options.connections or options.requests, options.requests)
    allow_open_files(connections)
    targets = [await locate(target) for target in targets] or await find()
    accounts = Accounts(targets[0])
    before = await (
        accounts.create(options.balance) if options.user is None else accounts.find(options.user)
    )
    config = BurstConfig(
        targets=targets,
        user_id=before.user_id,
        amount=options.amount,
        requests=options.requests,
        connections=connections,
        keyed=options.keys,
        timeout_seconds=options.timeout,
    )
    progress = Progress()
    async with shown(progress, config, Console(stderr=True, quiet=options.json)):
        result = await fire(config, progress)
    expected = Expectation(before, options.amount, options.requests)
    ledger = await _ledger(accounts, before, options.requests)
    return Report(config, expected, result, evaluate(expected, result.outcomes, ledger))


async def _ledger(accounts: Accounts, before: Account, requests: int) -> Ledger | CannotRunError:
    """Read the state after the burst; a service that died of it is a verdict, not an exit."""
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


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m loadtest",
        description="Fire many balance changes at one moment and check whether every answer, the "
        "balance and the entries are exactly right.",
        epilog="Exit code: 0 all right, 1 something is wrong, 2 the test could not run.",
    )
    add = parser.add_argument
    add(
        "urls",
        nargs="*",
        metavar="URL",
        help="base URLs of the service, fired at in turn; loopback only (default: BALANCE_APP_URL "
        "or PORT, of the environment or `.env`; if nobody is there, the ports of the containers)",
    )
    add("--url", action="append", default=[], help="the same as an option; may be repeated")
    add("--requests", type=_count, default=10_000, help="how many (default %(default)s)")
    add(
        "--amount",
        type=_non_zero,
        default=-2,
        help="the change each makes; negative withdraws (default %(default)s)",
    )
    add(
        "--balance",
        type=_not_negative,
        default=10_000,
        help="opening balance of the user that is created for the test (default %(default)s)",
    )
    add(
        "--user",
        type=_positive,
        metavar="ID",
        help="use this user as it is instead of creating one; nobody else may change it meanwhile",
    )
    add(
        "--connections",
        type=_positive,
        metavar="N",
        help="send over N kept-alive connections, one request after the other on each "
        "(default: one connection for each request)",
    )
    add("--keys", action="store_true", help="send a unique Idempotency-Key with each request")
    add(
        "--timeout",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="bound on opening and firing together (default %(default)g)",
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _positive(text: str) -> int:
    if (number := _not_negative(text)) == 0:
        raise ArgumentTypeError("must be at least 1")
    return number


def _count(text: str) -> int:
    if (number := _positive(text)) > _REQUESTS_AT_MOST:
        raise ArgumentTypeError(f"must be at most {_REQUESTS_AT_MOST}: all answers are kept")
    return number


def _not_negative(text: str) -> int:
    if (number := int(text)) < 0:
        raise ArgumentTypeError("must not be negative")
    return number


def _non_zero(text: str) -> int:
    if (number := int(text)) == 0:
        raise ArgumentTypeError("must not be 0: it would change nothing")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= _LONGEST_TIMEOUT_SECONDS:
        raise ArgumentTypeError(f"must be above 0 and at most {_LONGEST_TIMEOUT_SECONDS} seconds")
    return number


if __name__ == "__main__":
    sys.exit(main())
