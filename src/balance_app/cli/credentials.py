"""The key with which a command reaches a service: where it is found, and where it is not sent.

It is never an argument, which every user of the machine can read, and stands in no message.
"""

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

import httpx
from typing_extensions import override

from balance_app.client import KeyNotSent
from balance_app.client.transport import is_private, without_user
from balance_app.formatting import visible

_NOT_THE_OWNERS: Final = stat.S_IRWXG | stat.S_IRWXO
_LARGEST: Final = 4096  # bytes of a file with a key


class Credential(NamedTuple):
    """A key ("": none), and where it is from or why there is none, for people."""

    key: str
    origin: str

    @override
    def __repr__(self) -> str:
        """Return its origin alone."""
        return f"Credential({self.origin})"


HOW: Final = (
    "Set BALANCE_APP_KEY, or keep the key in {file} (chmod 600), or name a file with --key-file."
)


def default_file() -> Path:
    """Return the file in which a user keeps the key."""
    home = os.environ.get("XDG_CONFIG_HOME") or ""
    base = Path(home) if home.startswith("/") else Path(os.path.expanduser("~/.config"))  # noqa: PTH111 - Path's raises
    return base / "balance-app" / "key"


class Setting(NamedTuple):
    """A setting for commands, and whether it is from `.env` in the current directory."""

    value: str | None
    from_file: bool


def find_credential(url: Setting, key: Setting, key_file: str | None) -> Credential:
    """Return the key for a service: of an option, of BALANCE_APP_KEY, or of the user's file.

    Raises:
        KeyNotSent: the file can't be used, or the key must not be sent to this service.
    """
    if key_file is not None:
        found = Credential(_read(Path(key_file)), f"--key-file={visible(key_file)}")
        refused = _refused(url, key_from_file=False)
    elif key.value is not None:
        origin = "BALANCE_APP_KEY" + (" in .env" if key.from_file else "")
        found = Credential(key.value, origin)
        refused = _refused(url, key_from_file=key.from_file)
    else:
        return _of_the_user(url)
    if refused is not None:
        raise KeyNotSent(f"The key of {found.origin} is not sent to {_shown(url)}{refused}")
    return found


def _of_the_user(url: Setting) -> Credential:
    """Return the key in the user's file; it was not named for this service: it may go without."""
    path = default_file()
    if not os.path.lexists(path):
        return Credential("", HOW.format(file=path))
    if refused := _refused(url, key_from_file=False):
        return Credential("", f"The key in {path} was not sent to {_shown(url)}{refused}")
    return Credential(_read(path), str(path))


def _refused(url: Setting, *, key_from_file: bool) -> str | None:
    """Return why a key is not sent to a service, as the end of a sentence."""
    # Whoever wrote the `.env` of a directory would get the key of whoever calls a command there.
    if url.from_file and not key_from_file:
        return ", which .env in this directory names: give --url, or set BALANCE_APP_URL."
    try:
        if httpx.URL(url.value or "").userinfo:
            return ": its URL has a user and a password."
        private = is_private(url.value or "")
    except httpx.InvalidURL:
        return None  # it will be reported
    return None if private else ", others could read it on the way: use https."


def _shown(url: Setting) -> str:
    """Return a URL without a password in it."""
    return without_user(url.value or "")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_mode & _NOT_THE_OWNERS:
                raise KeyNotSent(
                    f"The key in {path} is not used, as other users can read it: "
                    f"`chmod 600 {path}`, and make another key if they may have."
                )
            text = file.read(_LARGEST + 1)
    except OSError as error:
        raise KeyNotSent(f"The key can't be read from {path}: {error.strerror}.") from None
    words = text.decode("ascii", "replace").split()
    if len(words) != 1 or len(text) > _LARGEST:
        raise KeyNotSent(f"{path} has no key: it should have one, and nothing else.")
    return words[0]
