"""What all drills have in common as programs: their directory, their end, and its exit code."""

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_KEPT, EXIT_BROKEN, EXIT_NOT_RUN, EXIT_INTERRUPTED = 0, 1, 2, 130

Errors = tuple[type[Exception], ...]


@contextmanager
def working_directory(keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory; its logs are copied to `keep` before it is deleted."""
    with tempfile.TemporaryDirectory(
        prefix="balance-app-drill-", ignore_cleanup_errors=True
    ) as name:
        top = Path(name)
        top.chmod(0o711)  # as root, the servers run as another user
        try:
            yield top
        finally:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for log in [*top.glob("*.log"), *top.glob("*/postgres.log")]:
                    place = log.parent.name if log.name == "postgres.log" else ""
                    shutil.copy(log, keep / f"{place}{log.name}")


def run_drill(
    drill: Coroutine[object, object, bool], *, not_run: Errors, broken: Errors = ()
) -> int:
    """Run a drill, which returns whether every promise was kept; return the exit code.

    Errors that it may raise mean that it could not run, or that a promise was broken. Ctrl-C and
    SIGTERM end it in order.
    """
    try:
        return EXIT_KEPT if asyncio.run(_until_signalled(drill)) else EXIT_BROKEN
    except not_run as error:
        print(error, file=sys.stderr)
        return EXIT_NOT_RUN
    except broken as error:
        print(f"BROKEN: {error!r}", file=sys.stderr)
        return EXIT_BROKEN
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("Interrupted; everything is stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED


async def _until_signalled(drill: Coroutine[object, object, bool]) -> bool:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await drill
