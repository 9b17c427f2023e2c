"""Makes a restored database safe against what is older: an instance, a lease, a number.

A backup holds the state of an earlier moment. Since then the old server has given numbers that the
restored one would give again: a run of then could renew its lease and complete, a session that has
ended would be valid, an id would name another user. So all such numbers are raised far above what
can have been given since, leases and sessions end, and the installation gets another id.
"""

from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

# More numbers than are given between a backup's moment and its restore, and a nine-millionth of
# those that stay exact in JSON.
LEAP: Final = 1_000_000_000
RESULT: Final = "the database was restored from a backup"

# No loss can be retracted: the row no longer says whose run it was.
#
# $1 the result of the runs
END_RUNS: Final = """
WITH ended AS (
    UPDATE job_runs SET outcome = 'lost', ended_at = clock_timestamp(), result = $1, holder = NULL
    WHERE outcome IS NULL
    RETURNING job, server
)
SELECT job, server FROM ended ORDER BY job
"""

# Whatever a run of before the restore sends, with whatever fence it has, matches no row: neither
# that of its own claim, nor that of a claim made here. No job is claimed for the length of a lease,
# or of a longer one that stands in the backup, as runs may go on for that long on an old server
# that has just been stopped. A tick that is too late to start (see LATE in `jobs/statements.py`)
# stays as it is, to be skipped.
#
# $1 the leap, $2 the length of a lease, $3 the result of the runs
RAISE_FENCES: Final = """
UPDATE jobs SET
    fence = fence + $1,
    attempt = attempt + (holder IS NOT NULL)::integer,
    last_outcome = CASE WHEN holder IS NULL THEN last_outcome ELSE 'lost' END,
    last_server = CASE WHEN holder IS NULL THEN last_server ELSE server END,
    last_started_at = CASE WHEN holder IS NULL THEN last_started_at ELSE started_at END,
    last_ended_at = CASE WHEN holder IS NULL THEN last_ended_at ELSE clock_timestamp() END,
    last_result = CASE WHEN holder IS NULL THEN last_result ELSE $3 END,
    holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL, releasing = false,
    cancel_requested_by = NULL, done = NULL, total = NULL, note = NULL, startup_marked_at = NULL,
    ready_at = CASE
        WHEN holder IS NULL AND attempt = 0 AND requested_by IS NULL
             AND ready_at + start_within < clock_timestamp()
        THEN ready_at ELSE greatest(ready_at, clock_timestamp() + greatest(
            $2::interval, (SELECT max(lease_expires_at - last_heartbeat_at) FROM jobs)
        )) END
"""

# For people alone; those that live are listed again by their next heartbeat.
FORGET_INSTANCES: Final = "DELETE FROM instances"

# An instance that has seen a generation of the old server must not take one given here for it.
RAISE_GENERATION: Final = "UPDATE access_state SET generation = generation + $1"

# Whoever has logged out since the backup's moment would be logged in again.
END_SESSIONS: Final = """
WITH ended AS (
    UPDATE sessions SET revoked_at = clock_timestamp()
    WHERE revoked_at IS NULL AND expires_at > clock_timestamp()
    RETURNING id
)
SELECT count(*) FROM ended
"""

# Neither the id of a user who was opened since nor the number of a job that was declared since is
# given to another one; nor is a cursor into lists of runs or actions.
RAISE_SEQUENCES: Final = """
SELECT setval(sequence, coalesce(pg_sequence_last_value(sequence), 0) + $1)
FROM (VALUES ('users', 'id'), ('jobs', 'number'), ('job_runs', 'id'), ('actions', 'id'))
     AS listed (name, of),
     LATERAL (SELECT pg_get_serial_sequence(name, of)::regclass AS sequence) AS found
"""

# Instances that are connected again compare it (`Database.installation`). The action is the first
# one with an id above the leap.
#
# $1 who, $2 the leap, $3 how many runs were lost, $4 how many sessions ended
RENEW_INSTALLATION: Final = """
WITH old AS (
    SELECT installation FROM balance_app_version
), renewed AS (
    UPDATE balance_app_version SET installation = gen_random_uuid() RETURNING installation
), recorded AS (
    INSERT INTO actions (by, action, subject, before, after)
    SELECT $1, 'database restored', 'database',
           jsonb_build_object('installation', old.installation),
           jsonb_build_object('installation', renewed.installation, 'raisedBy', $2::bigint,
                              'runsLost', $3::bigint, 'sessionsEnded', $4::bigint)
    FROM old, renewed
)
SELECT installation FROM renewed
"""


class Restored(NamedTuple):
    """What was ended in a restored database."""

    # job and server of each run that was under way at the backup's moment
    runs: list[tuple[str, str | None]]
    # how many logins at the page
    sessions: int
    installation: UUID


async def make_safe(
    connection: "asyncpg.Connection[Any]", *, by: str, lease: timedelta
) -> Restored:
    """Make the database of this connection safe against what is older, in one transaction.

    Args:
        connection: of the owner of the tables.
        by: who does it, for the list of actions.
        lease: the length of the instances' leases.

    Raises:
        asyncpg.InsufficientPrivilegeError: the role does not own the tables.
        asyncpg.ReadOnlySQLTransactionError: the server is still in recovery.
    """
    async with connection.transaction(isolation="read_committed"):
        # The row of the generation first, as whatever changes keys does.
        await connection.execute(RAISE_GENERATION, LEAP)
        sessions: int = await connection.fetchval(END_SESSIONS)
        await connection.execute(RAISE_FENCES, LEAP, lease, RESULT)
        runs = await connection.fetch(END_RUNS, RESULT)
        await connection.execute(FORGET_INSTANCES)
        await connection.fetch(RAISE_SEQUENCES, LEAP)
        installation: UUID = await connection.fetchval(
            RENEW_INSTALLATION, by, LEAP, len(runs), sessions
        )
    return Restored([(row["job"], row["server"]) for row in runs], sessions, installation)
