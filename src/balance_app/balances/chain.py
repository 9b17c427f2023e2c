"""The hash chain through each ledger, and the seals over all of them.

Computed here without the database's own function, which its owner can replace.

The hash of an entry is SHA-256 of the hash of the entry before (of nothing, for the first one), the
digest of its content, and what the account's locked row decided: version, balance, held and time,
each 8 bytes in network order; times in microseconds since 2000-01-01. The content is what is known
before: the other columns, in PostgreSQL's binary format of a row (their number, and for each its
type's OID, its length, -1 for NULL, and its value). So a change has its digest computed here, and a
statement evaluates little for each row. The account has the hash of its last entry.
`entry_content` and `chain_hash` of migration 0020 compute the same.

Entries that programs of before that migration made have hashes of the first format: of the hash
before, and all columns as one row. Neither format has messages as long as the other's.

Accounts that are older than the chain begin without hashes. A job computes the hash of their last
entry, in the first format, from which the chain goes on: so entries without a hash are the first of
a ledger.

A seal covers the heads (last entries) of the ledgers that have changed since the seal before, and
that seal: whoever knows the digest of one can tell later whether anything it covers was rewritten.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from struct import Struct
from typing import Any, Final, Protocol, TypeAlias

EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)

_BIGINT, _TEXT, _TIMESTAMPTZ = 20, 25, 1184
_NULL: Final = -1
# the number of columns; and user_id and amount, or user_id, version, amount, balance, held and at:
# none of them is NULL
_CONTENT: Final = Struct(">i" + "iiq" * 2)
_WHOLE: Final = Struct(">i" + "iiq" * 6)
_NUMBER: Final = Struct(">iiq")
_COLUMN: Final = Struct(">ii")
_PAIR: Final = Struct(">qq")
_INT: Final = Struct(">q")
_DECIDED: Final = Struct(">qqqq")
_COLUMNS: Final = 10
_ALL_COLUMNS: Final = 14
_NO_TEXT: Final = _COLUMN.pack(_TEXT, _NULL)
_NO_NUMBER: Final = _COLUMN.pack(_BIGINT, _NULL)

# What may be NULL, at the end of both formats: key, by, other_user_id, other_version, reverses,
# hold, reference, note.
Said: TypeAlias = tuple[
    str | None,
    str | None,
    int | None,
    int | None,
    int | None,
    int | None,
    str | None,
    str | None,
]


class Row(Protocol):
    """A row of entries."""

    def __getitem__(self, column: str, /) -> Any: ...  # noqa: ANN401


def entry_content(user_id: int, amount: int, said: Said) -> bytes:
    """Return the digest of what is known of an entry before the account is locked."""
    begin = _CONTENT.pack(_COLUMNS, _BIGINT, 8, user_id, _BIGINT, 8, amount)
    return sha256(begin + _encoded(said)).digest()


def entry_hash(previous: bytes, entry: Row) -> bytes:
    """Return the hash of an entry after one with the hash `previous`."""
    content = entry_content(entry["user_id"], entry["amount"], _said(entry))
    at = microseconds(entry["at"])
    decided = _DECIDED.pack(entry["version"], entry["balance"], entry["held"], at)
    return sha256(previous + content + decided).digest()


def first_format_hash(previous: bytes, entry: Row) -> bytes:
    """Return what the hash of an entry was before migration 0020."""
    begin = _WHOLE.pack(
        _ALL_COLUMNS,
        *(_BIGINT, 8, entry["user_id"]),
        *(_BIGINT, 8, entry["version"]),
        *(_BIGINT, 8, entry["amount"]),
        *(_BIGINT, 8, entry["balance"]),
        *(_BIGINT, 8, entry["held"]),
        *(_TIMESTAMPTZ, 8, microseconds(entry["at"])),
    )
    return sha256(previous + begin + _encoded(_said(entry))).digest()


def is_hash(hashed: bytes, previous: bytes, entry: Row) -> bool:
    """Return whether a hash is that of an entry after `previous`, in either format."""
    return hashed == entry_hash(previous, entry) or hashed == first_format_hash(previous, entry)


def microseconds(moment: datetime | int) -> int:
    """Return a time as PostgreSQL sends it; a number is one already."""
    return moment if isinstance(moment, int) else (moment - EPOCH) // MICROSECOND


def moment(sent: int) -> datetime:
    """Return a time that PostgreSQL sent as a number; year 1 or 9999 for one beyond them."""
    try:
        return EPOCH + sent * MICROSECOND
    except OverflowError:
        return datetime(9999 if sent > 0 else 1, 1, 1, tzinfo=UTC)


def _said(entry: Row) -> Said:
    return (
        entry["key"],
        entry["by"],
        entry["other_user_id"],
        entry["other_version"],
        entry["reverses"],
        entry["hold"],
        entry["reference"],
        entry["note"],
    )


def _encoded(said: Said) -> bytes:
    key, by, other_user_id, other_version, reverses, hold, reference, note = said
    ids = _number(other_user_id) + _number(other_version) + _number(reverses) + _number(hold)
    return _text(key) + _text(by) + ids + _text(reference) + _text(note)


def _text(text: str | None) -> bytes:
    if text is None:
        return _NO_TEXT
    encoded = text.encode()
    return _COLUMN.pack(_TEXT, len(encoded)) + encoded


def _number(number: int | None) -> bytes:
    return _NO_NUMBER if number is None else _NUMBER.pack(_BIGINT, 8, number)


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
