"""Seals: one running digest over the heads of all ledgers, for a witness outside of the database.

A seal has parts, a batch of a run each, in the order of ids. Each part includes the digest of the
one before, and the first one that of the seal before. A part is written in the transaction of its
batch. So a run that is cut off, or goes on from its checkpoint elsewhere, leaves the parts of what
it has committed, and whatever run ends next makes the seal over them.
"""

from typing import Final, NamedTuple

from balance_app.balances import chain
from balance_app.db.pool import Connection

# The last seal, and the last part since then.
LAST: Final = """
SELECT coalesce(last.number, 0) AS number, last.digest AS seal, coalesce(added.part, 0) AS part,
       coalesce(added.digest, last.digest, '') AS digest
FROM (SELECT) AS always LEFT JOIN LATERAL (
    SELECT number, digest FROM seals ORDER BY number DESC LIMIT 1
) AS last ON true LEFT JOIN LATERAL (
    SELECT part, digest FROM seal_parts
    WHERE seal = coalesce(last.number, 0) + 1 ORDER BY part DESC LIMIT 1
) AS added ON true
"""

ADD_PART: Final = """
INSERT INTO seal_parts (seal, part, user_ids, versions, digest) VALUES ($1, $2, $3, $4, $5)
"""

# $1 the number of the seal
HEADS: Final = """
SELECT coalesce(sum(cardinality(user_ids)), 0)::bigint AS heads, clock_timestamp() AS at
FROM seal_parts WHERE seal = $1
"""

SEAL: Final = "INSERT INTO seals (number, at, heads, digest) VALUES ($1, $2, $3, $4)"


class Sealed(NamedTuple):
    """The seal that a run made, or found, for people and logs."""

    number: int
    digest: str
    # how many heads it adds to those of the seals before
    heads: int


async def add_part(
    connection: Connection, user_ids: list[int], versions: list[int], hashes: list[bytes]
) -> None:
    """Add heads to the next seal; their order stays."""
    if not user_ids:
        return
    last = await connection.fetchrow(LAST)
    assert last is not None  # noqa: S101 - the statement always has one
    heads = zip(user_ids, versions, hashes, strict=True)
    digest = chain.part_digest(last["digest"], heads)
    number, part = last["number"] + 1, last["part"] + 1
    await connection.execute(ADD_PART, number, part, user_ids, versions, digest)


async def seal(connection: Connection) -> Sealed | None:
    """Seal the parts since the last seal; without any, return that with no heads, if there is one.

    The transaction holds the job's lease when it commits, so seals are made one after the other.
    """
    last = await connection.fetchrow(LAST)
    assert last is not None  # noqa: S101 - the statement always has one
    if not last["part"]:
        return Sealed(last["number"], last["seal"].hex(), 0) if last["number"] else None
    number = last["number"] + 1
    made = await connection.fetchrow(HEADS, number)
    assert made is not None  # noqa: S101 - an aggregate always has one
    digest = chain.seal_digest(last["digest"], number, made["heads"], made["at"])
    await connection.execute(SEAL, number, made["at"], made["heads"], digest)
    return Sealed(number, digest.hex(), made["heads"])
