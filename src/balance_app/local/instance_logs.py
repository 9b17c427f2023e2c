"""What each instance of `balance-app up` prints, in a file of its own.

`up` copies it, so that all of it is there: also what is printed past the log, such as the traceback
of an instance that can't start. A file has a bounded size, and one before it is kept. They outlive
`up`, for `balance-app logs`.
"""

import asyncio
import fcntl
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import sleep
from typing import BinaryIO, Final

from balance_app.local.merged_console import MergedConsole
from balance_app.settings import Settings

MAX_BYTES: Final = 10_000_000
MAX_LINE: Final = 65536
PIPE_BYTES: Final = 1 << 20  # the most that Linux allows every user
POLL_SECONDS: Final = 0.2
LAST_LINES_SECONDS: Final = 0.05
_COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")
# Where `up --log-dir` has noted its directory, in the data directory.
_NOTE: Final = "log-directory"


def open_directory(settings: Settings, given: Path | None) -> Path:
    """Make the directory of the logs, and note it for `find_directory`; return it.

    Raises:
        OSError: it can't be made.
    """
    data = Path(settings.balance_app_data).absolute()
    directory = data / "logs" if given is None else given.absolute()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    note = data / _NOTE
    with suppress(OSError):  # then `logs` has to be told
        if given is None:
            note.unlink(missing_ok=True)
        else:
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            note.write_bytes(os.fsencode(directory))
    return directory


def find_directory(settings: Settings) -> Path:
    """Return the directory in which the latest `up` with this data directory keeps its logs."""
    data = Path(settings.balance_app_data).absolute()
    with suppress(OSError):
        return Path(os.fsdecode((data / _NOTE).read_bytes()))
    return data / "logs"


class InstanceLog:
    """The file of one instance, which its owner alone can read.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, directory: Path, name: str, *, max_bytes: int = MAX_BYTES) -> None:
        self.name: Final = name
        self.path = directory / f"{name}.log"
        self._max_bytes = max_bytes
        self._file = self._open()

    def _open(self) -> BinaryIO:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o600)
        os.fchmod(descriptor, 0o600)  # it may be older
        return os.fdopen(descriptor, "ab", buffering=0)

    def write(self, lines: bytes) -> None:
        """Append lines, without their colours.

        Raises:
            OSError: the disk is full, or the like.
        """
        if self._file.tell() >= self._max_bytes:
            with suppress(FileNotFoundError):  # it was moved, and the next one not opened
                self.path.replace(_older(self.path))
            newer = self._open()
            self._file.close()
            self._file = newer
        self._file.write(_COLOUR.sub(b"", lines))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Output:
    """The output of one instance: all of it goes to its log, to the console what belongs there.

    Its pipes outlive the process, as the next one writes into them, too.
    """

    def __init__(
        self, log: InstanceLog, report: Callable[[str], None], console: MergedConsole
    ) -> None:
        self._log = log
        self._report = report
        self._console = console
        self._is_written = True
        self._copies: list[asyncio.Task[None]] = []
        # what the instance has as its standard output and error
        self.descriptors: tuple[int, ...] = ()

    async def open(self) -> None:
        """Begin to copy.

        Raises:
            OSError: too many files are open.
        """
        loop = asyncio.get_running_loop()
        for console in (sys.stdout, sys.stderr):
            read, write = os.pipe()
            self.descriptors += (write,)
            # An instance that writes into a full pipe stands still: `up` may be stopped by Ctrl-Z.
            with suppress(OSError, AttributeError):  # it is Linux's
                fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            reader = asyncio.StreamReader()
            await loop.connect_read_pipe(
                partial(asyncio.StreamReaderProtocol, reader), os.fdopen(read, "rb")
            )
            self._copies.append(asyncio.create_task(self._copy(reader, console.buffer)))

    async def note(self, line: str) -> None:
        """Write a line about the instance's end, after its own last ones."""
        await asyncio.sleep(LAST_LINES_SECONDS)
        self._keep(f"{line}\n".encode())
        self._console.forget(self._log.name, sys.stderr.buffer)

    async def close(self) -> None:
        """Copy what is left; a process that the instance has left behind is not waited for."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        if self._copies:
            await asyncio.wait(self._copies, timeout=LAST_LINES_SECONDS)
        for copy in self._copies:
            copy.cancel()
        self._log.close()

    async def _copy(self, reader: asyncio.StreamReader, console: BinaryIO) -> None:
        def put(lines: list[bytes]) -> None:
            self._keep(b"".join(line + b"\n" for line in lines))
            self._console.write(self._log.name, lines, console)

        rest = b""
        while chunk := await reader.read(MAX_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= MAX_LINE:
                lines, rest = [*lines, rest], b""
            put(lines)
        put([rest] if rest else [])

    def _keep(self, lines: bytes) -> None:
        try:
            self._log.write(lines)
        except OSError as error:
            if self._is_written:
                self._report(f"{self._log.path} can't be written: {error.strerror}")
            self._is_written = False
        else:
            self._is_written = True


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


# -- what `balance-app logs` reads -------------------------------------------------------------


def names(directory: Path) -> list[str]:
    """Return the instances that have a log, app2 before app10."""
    found = {path.stem for path in directory.glob("*.log")}
    return sorted(found, key=lambda name: (re.sub(r"\d+$", "", name), len(name), name))


class Tail:
    """The end of one instance's log, and what is appended to it.

    Raises:
        OSError: it can't be read.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / f"{name}.log"
        self._file = self._path.open("rb")
        self._partial = b""

    def last(self, number: int) -> list[str]:
        """Return the last lines, and go to the end."""
        lines = deque(self._complete(), number)
        if len(lines) < number:
            with suppress(OSError), _older(self._path).open("rb") as older:
                rest = [_text(line) for line in older]
                lines.extendleft(reversed(rest[len(lines) - number :]))
        return list(lines)

    def new(self) -> list[str]:
        """Return the lines that were appended since the last call."""
        lines = self._complete()
        with suppress(OSError):
            if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                lines += self._complete()  # of before it was renamed
                self._file.close()
                self._file = self._path.open("rb")
                lines += self._complete()
        return lines

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _complete(self) -> list[str]:
        *lines, self._partial = (self._partial + self._file.read()).split(b"\n")
        return [_text(line) for line in lines]


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\n")


def follow(directory: Path, tails: dict[str, Tail], *, others: bool) -> Iterator[tuple[str, str]]:
    """Yield lines with their instances as they are written, for ever.

    With `others`, also of instances that get a log meanwhile.
    """
    while True:
        for name in names(directory) if others else ():
            if name not in tails:
                with suppress(OSError):
                    tails[name] = Tail(directory, name)
        for name, tail in tails.items():
            yield from ((name, line) for line in tail.new())
        sleep(POLL_SECONDS)
