"""The hash chain through each ledger, and the seals over all of them.

Computed here without the database's own function, which its owner can replace.

The hash of an entry is SHA-256 of the hash of the entry before (of nothing, for the first one) and
of the entry itself, in PostgreSQL's binary format of a row: the number of columns, and for each its
type's OID, its length (-1: NULL) and its value, in network order; times in microseconds since
2000-01-01. The account has the hash of its last entry. `entry_hash` of migration 0013 computes the
same.

Accounts that are older than the chain begin without hashes. A job computes the hash of their last
entry, from which the chain goes on: so entries without a hash are the first of a ledger.

A seal covers the heads (last entries) of the ledgers that have changed since the seal before, and
that seal: whoever knows the digest of one can tell later whether anything it covers was rewritten.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from struct import Struct
from typing import Any, Final, Protocol

EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)

_BIGINT, _TEXT, _TIMESTAMPTZ = 20, 25, 1184
_NULL: Final = -1
# user_id, version, amount, balance, held, at: none of them is NULL
_BEGIN: Final = Struct(">i" + "iiq" * 6)
_NUMBER: Final = Struct(">iiq")
_COLUMN: Final = Struct(">ii")
_PAIR: Final = Struct(">qq")
_INT: Final = Struct(">q")
_TEXTS: Final = ("key", "by")
_NUMBERS: Final = ("other_user_id", "other_version", "reverses", "hold")
_MORE_TEXTS: Final = ("reference", "note")
_COLUMNS: Final = 14


class Row(Protocol):
    """A row of entries."""

    def __getitem__(self, column: str, /) -> Any: ...  # noqa: ANN401


def entry_hash(previous: bytes, entry: Row) -> bytes:
    """Return the hash of an entry after one with the hash `previous`."""
    hashed = sha256(previous)
    hashed.update(
        _BEGIN.pack(
            _COLUMNS,
            *(_BIGINT, 8, entry["user_id"]),
            *(_BIGINT, 8, entry["version"]),
            *(_BIGINT, 8, entry["amount"]),
            *(_BIGINT, 8, entry["balance"]),
            *(_BIGINT, 8, entry["held"]),
            *(_TIMESTAMPTZ, 8, microseconds(entry["at"])),
        )
    )
    for name in _TEXTS:
        hashed.update(_text(entry[name]))
    for name in _NUMBERS:
        number = entry[name]
        hashed.update(
            _COLUMN.pack(_BIGINT, _NULL) if number is None else _NUMBER.pack(_BIGINT, 8, number)
        )
    for name in _MORE_TEXTS:
        hashed.update(_text(entry[name]))
    return hashed.digest()


def microseconds(moment: datetime | int) -> int:
    """Return a time as PostgreSQL sends it; a number is one already."""
    return moment if isinstance(moment, int) else (moment - EPOCH) // MICROSECOND


def moment(sent: int) -> datetime:
    """Return a time that PostgreSQL sent as a number; year 1 or 9999 for one beyond them."""
    try:
        return EPOCH + sent * MICROSECOND
    except OverflowError:
        return datetime(9999 if sent > 0 else 1, 1, 1, tzinfo=UTC)


def _text(text: str | None) -> bytes:
    if text is None:
        return _COLUMN.pack(_TEXT, _NULL)
    encoded = text.encode()
    return _COLUMN.pack(_TEXT, len(encoded)) + encoded


def part_digest(previous: bytes, heads: Iterable[tuple[int, int, bytes]]) -> bytes:
    """Return the digest of a seal's part: of the digest before it, and of heads in their order.

    A head is the last entry of a ledger: its user, version and hash.
    """
    digest = sha256(previous)
    for user_id, version, hashed in heads:
        digest.update(_PAIR.pack(user_id, version))
        digest.update(hashed)
    return digest.digest()


def seal_digest(last_part: bytes, number: int, heads: int, at: datetime | int) -> bytes:
    """Return the digest of a seal: of its last part, and of what is stored of the seal itself."""
    return sha256(last_part + _PAIR.pack(number, heads) + _INT.pack(microseconds(at))).digest()
