"""The standbys of the primary: how far behind they are, and whether commits wait for them.

For people alone: the primary decides for what a commit waits, and no request depends on this.
"""

import re
from typing import Any, Final, NamedTuple

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from pydantic_core import from_json


class Standby(NamedTuple):
    """A server, or an archiver, that receives the log of the primary."""

    name: str
    # None: by a socket on the primary's machine
    address: str | None
    # `streaming`, or what comes before that
    state: str
    # whether commits wait for it now, or for others of which it is one
    synchronous: bool
    # how much of the primary's log it would lack if that failed now, and for how long
    behind_bytes: int
    behind_seconds: float


class Replication(NamedTuple):
    """The standbys at one moment."""

    primary: str
    standbys: tuple[Standby, ...]
    # of how many standbys each commit waits until they have it
    required: int
    # how many commits wait at this moment
    waiting: int
    # how many standbys there are of which this role may not read more
    hidden: int

    @property
    def present(self) -> int:
        """How many standbys there are for which commits wait."""
        return sum(each.synchronous and each.state == "streaming" for each in self.standbys)

    def shortage(self) -> str | None:
        """Return, in a few words, what is missing if commits wait for standbys that are not there.

        A role that may not read about them does not know.
        """
        if self.hidden or self.present >= self.required:
            return None
        return (
            f"No change is acknowledged: each commit waits for {_standbys(self.required)}, "
            f"and {self.present or 'none'} of them is connected"
        )

    def warning(self) -> str | None:
        """Return a sentence if commits wait for standbys that are not there."""
        shortage = self.shortage()
        return None if shortage is None else f"{shortage} (synchronous_standby_names)."

    def sentences(self) -> tuple[str, ...]:
        """Return what there is to show, for people."""
        shown = [f"{self.primary} is the primary"]
        for each in self.standbys:
            place = f" ({each.address})" if each.address else ""
            kind = "synchronous" if each.synchronous else "asynchronous"
            lag = f"{each.behind_seconds:.0f} s" if each.behind_seconds >= 1 else "under 1 s"
            behind = f"{lag} behind" if each.state == "streaming" else each.state
            shown.append(f"standby {each.name}{place}: {kind}, {behind}")
        if self.hidden:
            shown.append(f"{_standbys(self.hidden)}, which this role may not read about")
        elif not self.standbys:
            shown.append("no standby")
        waits = f"commits wait for {_standbys(self.required)}" if self.required else None
        return (*shown, waits or "commits wait for no standby")


def _standbys(number: int) -> str:
    return f"{number} {'standby' if number == 1 else 'standbys'}"


# Logical replication and base backups are no standbys. A role that may not read the statistics of
# others sees that there are standbys, but not their state. Lags are NULL when nothing was to send.
REPLICATION: Final = """
WITH standbys AS (
    SELECT application_name AS name, host(client_addr) AS address, state, sync_state,
           CASE WHEN NOT pg_is_in_recovery()
           THEN pg_wal_lsn_diff(pg_current_wal_flush_lsn(), flush_lsn) END AS bytes,
           extract(epoch FROM flush_lag)::float8 AS seconds
    FROM pg_stat_replication AS sender
    WHERE state IS DISTINCT FROM 'backup' AND NOT EXISTS (
        SELECT FROM pg_replication_slots WHERE active_pid = sender.pid AND slot_type = 'logical'
    )
)
SELECT current_setting('synchronous_standby_names') AS names,
       current_setting('synchronous_commit') NOT IN ('off', 'local') AS waits,
       (SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep') AS waiting,
       (SELECT count(*) FROM standbys WHERE state IS NULL) AS hidden,
       (SELECT coalesce(json_agg(standbys ORDER BY name, address), '[]')::text FROM standbys
        WHERE state IS NOT NULL) AS standbys
"""


async def read_replication(
    connection: "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]",
    address: str,
) -> Replication:
    """Read the standbys of the server at `address`.

    Raises:
        what the driver raises.
    """
    row = await connection.fetchrow(REPLICATION)
    assert row is not None  # noqa: S101 - it always has a row
    found: list[dict[str, Any]] = from_json(row["standbys"])
    return Replication(
        primary=address,
        standbys=tuple(
            Standby(
                name=each["name"],
                address=each["address"],
                state=each["state"],
                synchronous=each["sync_state"] in {"sync", "quorum"},
                behind_bytes=max(0, int(each["bytes"] or 0)),
                behind_seconds=each["seconds"] or 0.0,
            )
            for each in found
        ),
        required=_required(row["names"]) if row["waits"] else 0,
        waiting=row["waiting"],
        hidden=row["hidden"],
    )


async def shortage_on(connection: "asyncpg.Connection[asyncpg.Record]") -> str | None:
    """Return a sentence if what this connection commits will wait for a standby; else None."""
    found = await read_replication(connection, "")
    return found.warning()


def _required(names: str) -> int:
    """Return for how many standbys a commit waits: of `a, b`, `FIRST 2 (a, b)`, `ANY 2 (...)`."""
    if not names.strip():
        return 0
    number = re.match(r"\s*(?:first|any)?\s*([0-9]+)\s*\(", names, re.IGNORECASE)
    return int(number[1]) if number else 1
