"""The API key that the requests carry, if the service needs one: read from where it is kept.

Never from an argument, which every user of the machine can read. It stands in no message.
"""

import os
import re
import stat
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

from loadtest.preconditions import CannotRunError

NEEDED: Final = (
    "its scopes must be open, change and read (with --user: change and read). Set BALANCE_APP_KEY, "
    "or name a file with --key-file."
)
_KEY: Final = re.compile("[!-~]{1,1000}")


def find_key(key_file: Path | None, *, urls_are_given: bool) -> str | None:
    """Return the key of the file, of BALANCE_APP_KEY, or of `.env` for a URL that is from there.

    Raises:
        CannotRunError: it can't be used.
    """
    written = dotenv_values(".env", encoding="utf-8-sig")
    url_is_written = not urls_are_given and bool(
        not os.environ.get("BALANCE_APP_URL") and written.get("BALANCE_APP_URL")
    )
    key = _read(key_file) if key_file else os.environ.get("BALANCE_APP_KEY") or None
    if key is not None and url_is_written:
        raise CannotRunError(
            "The key is not sent to an address that .env in this directory names: give the URL as "
            "an argument."
        )
    if key is None:
        key = written.get("BALANCE_APP_KEY") or None
    if key is not None and not _KEY.fullmatch(key):
        raise CannotRunError("The key is none of this service: it is one word, in ASCII.")
    return key


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise CannotRunError(
                    f"The key in {path} is not used, as others can read it: `chmod 600 {path}`."
                )
            return file.read(4096).decode("ascii", "replace").strip()
    except OSError as error:
        raise CannotRunError(f"The key can't be read from {path}: {error.strerror}.") from None
