"""The present state of an account, without holds that are overdue.

A hold expires when somebody looks at the account after its time: EXPIRE ends it under the row's
lock, by PostgreSQL's clock. So all sessions see the hold end at one moment, before or after each
other change of the account, although no job has to run for it.
"""

from typing import Final

import asyncpg

from balance_app.balances.errors import UserNotFound
from balance_app.balances.model import State
from balance_app.db.pool import Connection, read, write
from balance_app.errors import DatabaseUnavailable, Overloaded

MAX_RACES: Final = 1000
# How many overdue holds of an account are ended by one statement.
HOLDS_AT_ONCE: Final = 1000

STATE: Final = """
SELECT id AS user_id, balance, held, floor, frozen, version, settings_version, hold_events,
       holds_due_at <= clock_timestamp() AS overdue
FROM users WHERE id = $1
"""

# Whoever places or ends a hold also raises `hold_events` of the account. A statement that read
# holds in its snapshot, and then finds this number unchanged under the row's lock, has read them as
# they are. Otherwise it changes nothing, and is sent again. Of many overdue holds it ends the first
# ones, so that it takes no longer than a statement may; the account is overdue until none is left.
#
# $1 user, $2 how many holds at most
EXPIRE: Final = """
WITH overdue AS MATERIALIZED (
    SELECT id, hold_events, clock_timestamp() AS at FROM users
    WHERE id = $1 AND holds_due_at <= clock_timestamp()
), first AS MATERIALIZED (
    SELECT number, amount FROM overdue JOIN holds ON user_id = id
    WHERE state = 'open' AND expires_at <= overdue.at ORDER BY expires_at LIMIT $2
), rest AS MATERIALIZED (
    SELECT expires_at AS due_at FROM holds WHERE user_id = $1 AND state = 'open'
    ORDER BY expires_at OFFSET (SELECT count(*) FROM first) LIMIT 1
), account AS (
    UPDATE users SET held = held - (SELECT coalesce(sum(amount), 0) FROM first),
                     hold_events = users.hold_events + (SELECT count(*) FROM first),
                     holds_due_at = coalesce((SELECT due_at FROM rest), 'infinity'),
                     changed_at = greatest(changed_at + interval '1 microsecond', clock_timestamp())
    FROM overdue
    WHERE users.id = overdue.id AND users.hold_events = overdue.hold_events
    RETURNING users.id, balance, held, version, changed_at AS at
)
UPDATE holds SET state = 'expired', ended_at = account.at, balance = account.balance,
                 held = account.held, version = account.version
FROM account CROSS JOIN first
WHERE user_id = account.id AND holds.number = first.number
"""


async def read_state(connection: Connection, user_id: int) -> State:
    """Return the state of an account, after the end of holds that are overdue.

    Raises:
        UserNotFound: there is no such user.
        Overloaded: its holds change all the time.
    """
    for _ in range(MAX_RACES):
        rows = await read(connection, STATE, user_id)
        if not rows:
            raise UserNotFound(user_id)
        state = State(**rows[0])
        if not state.overdue:
            return state
        await write(connection, EXPIRE, user_id, HOLDS_AT_ONCE)
    raise lost_every_race()


async def is_up_to_date(connection: Connection, user_id: int) -> bool:
    """End the overdue holds of an account that is only read; False: the server is read-only.

    Nothing can change there, so its holds stay open until one of their accounts can be written.

    Raises:
        UserNotFound, Overloaded: as `read_state`.
    """
    try:
        await read_state(connection, user_id)
    except DatabaseUnavailable as problem:
        if not isinstance(problem.__cause__, asyncpg.ReadOnlySQLTransactionError):
            raise
        return False
    return True


def lost_every_race() -> Overloaded:
    """Return the problem of a request that other changes were always faster than."""
    return Overloaded(
        f"The account was changed by others at the same time, {MAX_RACES} times in a row."
    )
