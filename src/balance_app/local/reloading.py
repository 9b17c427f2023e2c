"""`balance-app up --reload`: which files are watched, and whether their code can be imported."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import balance_app
from balance_app.jobs.job import Registry

IMPORT_SECONDS: Final = 60.0
# A tool that writes many files, such as git, is done when nothing was written for so long.
QUIET_MILLISECONDS: Final = 200
CHECK: Final = ("-m", "balance_app", "serve", "--check")


class ReloadError(Exception):
    """Files can't be watched here; the message says what to do."""


class Places(NamedTuple):
    """What is watched: packages with all that is below them, and single files."""

    packages: frozenset[Path]
    files: frozenset[Path]


def places(registry: Registry) -> Places:
    """Return where the code of this program is, and that of its jobs, which are imported.

    Raises:
        ReloadError: the library that watches them is not installed.
    """
    if find_spec("watchfiles") is None:
        raise ReloadError("`--reload` needs the package watchfiles: install balance-app[local].")
    modules = {origin.partition(" ")[0].partition(":")[0] for origin in registry.origins.values()}
    modules |= {job.function.__module__ for job in registry.values()}
    packages, files = {Path(balance_app.__file__).parent.resolve()}, set()
    for top in {name.partition(".")[0] for name in modules}:
        module = sys.modules.get(top)
        if (folders := getattr(module, "__path__", None)) is not None:
            packages |= {Path(each).resolve() for each in folders}
        elif (file := getattr(module, "__file__", None)) is not None:
            files.add(Path(file).resolve())
    return Places(frozenset(packages), frozenset(files))


@dataclass(frozen=True, slots=True)
class Code:
    """The code of the instances: its changes, and whether they can import it."""

    places: Places
    # with what, and as which user, instances run
    environment: Mapping[str, str]
    user: str | None
    # the files of each save that `changes` has not yielded yet
    saved: asyncio.Queue[list[Path]] = field(default_factory=asyncio.Queue)

    async def changes(self) -> AsyncGenerator[list[Path], None]:
        """Yield the files of each save, until cancelled.

        Raises:
            ReloadError: they can't be watched any more.
        """
        from watchfiles import Change, DefaultFilter, awatch  # noqa: PLC0415 - optional

        ignored = DefaultFilter()  # caches, and what editors write beside a file

        def is_code(change: Change, path: str) -> bool:
            file = Path(path)
            return file in self.places.files or any(
                ignored(change, str(file.relative_to(package)))
                for package in self.places.packages
                if file.is_relative_to(package)
            )

        async def watch(directories: set[Path], *, recursive: bool) -> None:
            async for each in awatch(
                *directories,
                watch_filter=is_code,
                step=QUIET_MILLISECONDS,
                recursive=recursive,
            ):
                self.saved.put_nowait(sorted({Path(path) for _, path in each}))

        # A file's folder, as an editor may replace the file, but not what else is below that.
        watchers = [asyncio.create_task(watch(set(self.places.packages), recursive=True))]
        if folders := {file.parent for file in self.places.files}:
            watchers.append(asyncio.create_task(watch(folders, recursive=False)))
        try:
            while True:
                getting = asyncio.create_task(self.saved.get())
                await asyncio.wait({getting, *watchers}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():  # a watcher has failed
                    getting.cancel()
                    await asyncio.gather(*watchers)
                changed = {*getting.result()}
                while not self.saved.empty():  # saved while the last ones were handled
                    changed |= {*self.saved.get_nowait()}
                yield sorted(changed)
        except OSError as error:
            raise ReloadError(f"Files are not watched any more: {error}") from error
        finally:
            for each in watchers:
                each.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    async def import_error(self) -> str | None:
        """Return why an instance could not import its code as it is now; None: it can."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *CHECK),
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else [],
        )
        try:
            async with asyncio.timeout(IMPORT_SECONDS):
                _, said = await process.communicate()
        except TimeoutError:
            return f"It is not imported after {IMPORT_SECONDS:g} s."
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 0:
            return None
        lines = said.decode(errors="replace").strip().split("\n")
        frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
        return "\n".join(lines[frames[-1] :] if frames else lines)
