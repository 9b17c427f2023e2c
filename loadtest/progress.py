"""Shows the progress of a burst on stderr: bars on a terminal, a line every 2 s elsewhere.

It runs in the burst's own event loop, so it is drawn seldom: see `_BARS_EVERY_SECONDS`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from loadtest.burst import BurstConfig, Progress

_BARS_EVERY_SECONDS = 0.25  # ten times a second costs 2 % of a core
_LINES_EVERY_SECONDS = 2.0


@asynccontextmanager
async def shown(progress: Progress, config: BurstConfig, console: Console) -> AsyncIterator[None]:
    """Show a burst's progress for as long as the block runs; a quiet console shows nothing."""
    if console.quiet:
        yield
        return
    show = _show_bars if console.is_terminal else _show_lines
    task = asyncio.create_task(show(progress, config, console))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _show_bars(progress: Progress, config: BurstConfig, console: Console) -> None:
    # No refresh thread of rich: it would contend with the burst for the interpreter.
    bars = Bars(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )
    opened = bars.add_task("connections opened", total=config.connections)
    answered = bars.add_task("answers received", total=config.requests, start=False, visible=False)
    with bars:
        try:
            while True:
                bars.update(opened, completed=progress.opened)
                if progress.opened >= config.connections:
                    bars.start_task(answered)
                    bars.update(answered, completed=progress.answered, visible=True)
                bars.refresh()
                await asyncio.sleep(_BARS_EVERY_SECONDS)
        finally:
            bars.update(opened, completed=progress.opened)
            bars.update(answered, completed=progress.answered, refresh=True)


async def _show_lines(progress: Progress, config: BurstConfig, console: Console) -> None:
    while True:
        await asyncio.sleep(_LINES_EVERY_SECONDS)
        console.print(
            f"{progress.opened} of {config.connections} connections opened, "
            f"{progress.answered} of {config.requests} answers received"
        )
