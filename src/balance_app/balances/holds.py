"""The ends of holds: captured, voided, or expired; and how they are read.

A hold ends once: whoever ends it has locked its account before, and finds it open under that lock.
For an account with an overdue hold these statements change nothing: `state.EXPIRE` comes first.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import asyncpg

from balance_app.balances.errors import CaptureExceedsHold, HoldEnded, HoldNotFound, UserNotFound
from balance_app.balances.guard import Guard
from balance_app.balances.model import Accepted, Hold, Refused, State
from balance_app.balances.state import MAX_RACES, is_up_to_date, lost_every_race, read_state
from balance_app.db.pool import Connection, Database, read, write

# An attempt to end a hold: one statement. None: the account does not allow it, or it raced.
Attempt: TypeAlias = Callable[[Connection], Awaitable[asyncpg.Record | None]]


class HoldRepository:
    """The holds of accounts; every call is one transaction or none."""

    def __init__(self, database: Database, guard: Guard) -> None:
        self._database = database
        self._guard = guard

    async def capture(  # noqa: PLR0913 - the parts of a request
        self,
        user_id: int,
        number: int,
        *,
        amount: int | None,
        reference: str | None,
        note: str | None,
        by: str | None = None,
    ) -> Accepted | Refused:
        """Withdraw an amount of a hold (by default all of it), and release the rest.

        A second capture of the same amount has the outcome of the first.

        Raises:
            HoldNotFound: there is no such hold.
            HoldEnded: it has ended otherwise.
            CaptureExceedsHold: it is smaller.
            DatabaseUnavailable, Overloaded: see `BalanceRepository.change`.
        """

        async def attempt(connection: Connection) -> asyncpg.Record | None:
            return await write(connection, CAPTURE, user_id, number, amount, reference, note, by)

        return await self._guard.run(
            lambda con: _end(con, user_id, number, attempt, amount=amount, captures=True), user_id
        )

    async def void(self, user_id: int, number: int, *, by: str | None = None) -> Accepted | Refused:
        """Release a hold; a second time has the outcome of the first; raises as `capture` does."""

        async def attempt(connection: Connection) -> asyncpg.Record | None:
            return await write(connection, VOID, user_id, number, by)

        return await self._guard.run(
            lambda con: _end(con, user_id, number, attempt, amount=None, captures=False), user_id
        )

    async def hold(self, user_id: int, number: int) -> Hold:
        """Return a hold.

        Raises:
            HoldNotFound: there is no such hold.
        """
        return await self._database.run(lambda con: _hold(con, user_id, number))

    async def holds(self, user_id: int, *, state: str | None, after: int, limit: int) -> list[Hold]:
        """Return up to `limit` holds with numbers above `after`, in order.

        Raises:
            UserNotFound: there is no such user.
        """

        async def find(connection: Connection) -> list[Hold]:
            await is_up_to_date(connection, user_id)
            rows = await read(connection, HOLDS, user_id, state, after, limit)
            return [Hold(**row) for row in rows]

        return await self._database.run(find)


# The account is locked first, then the hold: so both are as the transactions before left them,
# whatever the statement's snapshot shows. The amount leaves the balance and the hold together, so
# what is available never falls. What the CHECKs compare is taken from the locked row, as in
# `repository.TRANSFER`.
#
# $1 user, $2 number, $3 amount (NULL: all), $4 reference, $5 note, $6 who
CAPTURE: Final = """
WITH locked AS MATERIALIZED (
    SELECT * FROM users WHERE id = $1 FOR NO KEY UPDATE
), hold AS MATERIALIZED (
    SELECT amount, coalesce($3, amount) AS captured,
           greatest(locked.changed_at + interval '1 microsecond', clock_timestamp()) AS at
    FROM locked JOIN holds ON user_id = id
    WHERE number = $2 AND state = 'open'
    FOR NO KEY UPDATE OF holds
), account AS (
    UPDATE users SET balance = locked.balance - captured, held = locked.held - amount,
                     floor = locked.floor, version = locked.version + 1,
                     hold_events = locked.hold_events + 1, changed_at = hold.at,
                     hash = chain_hash(locked.hash,
                                       entry_content(locked.id, -captured, NULL, $6, NULL, NULL,
                                                     NULL, $2, $4, $5),
                                       locked.version + 1, locked.balance - captured,
                                       locked.held - amount, hold.at)
    FROM locked CROSS JOIN hold
    WHERE users.id = locked.id AND captured <= amount AND NOT locked.frozen
      AND locked.holds_due_at > clock_timestamp()
    RETURNING users.id, captured, users.balance, users.held, users.version, users.changed_at,
              users.hash
), entry AS (
    INSERT INTO entries
        (user_id, version, amount, balance, held, at, hold, reference, note, by, hash)
    SELECT id, version, -captured, balance, held, changed_at, $2, $4, $5, $6, hash FROM account
)
UPDATE holds SET state = 'captured', captured = account.captured, ended_at = changed_at,
                 ended_by = $6,
                 balance = account.balance, held = account.held, version = account.version
FROM account WHERE user_id = account.id AND number = $2
RETURNING user_id, number, amount, at, expires_at, key, reference, note, by, state, ended_at,
          ended_by, holds.captured, holds.balance, holds.held, holds.version
"""

# $1 user, $2 number, $3 who
VOID: Final = """
WITH locked AS MATERIALIZED (
    SELECT * FROM users WHERE id = $1 FOR NO KEY UPDATE
), hold AS MATERIALIZED (
    SELECT amount FROM locked JOIN holds ON user_id = id
    WHERE number = $2 AND state = 'open'
    FOR NO KEY UPDATE OF holds
), account AS (
    UPDATE users SET balance = locked.balance, held = locked.held - amount, floor = locked.floor,
                     hold_events = locked.hold_events + 1,
                     changed_at = greatest(locked.changed_at + interval '1 microsecond',
                                           clock_timestamp())
    FROM locked CROSS JOIN hold
    WHERE users.id = locked.id AND locked.holds_due_at > clock_timestamp()
    RETURNING users.id, users.balance, users.held, users.version, users.changed_at AS at
)
UPDATE holds SET state = 'voided', ended_at = account.at, ended_by = $3, balance = account.balance,
                 held = account.held, version = account.version
FROM account WHERE user_id = account.id AND number = $2
RETURNING user_id, number, amount, holds.at, expires_at, key, reference, note, by, state, ended_at,
          ended_by, captured, holds.balance, holds.held, holds.version
"""

# An end that is reported must be durable, as in `repository.RECALL`.
ENDED: Final = """
SELECT user_id, number, amount, at, expires_at, key, reference, note, by, state, ended_at,
       ended_by, captured, balance, held, version, pg_logical_emit_message(true, 'balance_app', '')
FROM holds WHERE user_id = $1 AND number = $2
"""

HOLDS: Final = """
SELECT user_id, number, amount, at, expires_at, key, reference, note, by, state, ended_at,
       ended_by, captured, balance, held, version
FROM holds
WHERE user_id = $1 AND ($2::text IS NULL OR state = $2) AND number > $3 ORDER BY number LIMIT $4
"""

HOLD: Final = """
SELECT user_id, number, amount, at, expires_at, key, reference, note, by, state, ended_at,
       ended_by, captured, balance, held, version
FROM holds WHERE user_id = $1 AND number = $2
"""


async def _end(  # noqa: PLR0913 - the parts of a request
    connection: Connection,
    user_id: int,
    number: int,
    attempt: Attempt,
    *,
    amount: int | None,
    captures: bool,
) -> Accepted | Refused:
    """End a hold, or find why it can't end so."""
    for _ in range(MAX_RACES):
        made = await attempt(connection)
        if made is not None:
            hold = Hold(**made)
            return Accepted(hold=hold, state=_after(hold))
        row = await write(connection, ENDED, user_id, number)
        if row is None:
            raise HoldNotFound
        hold = _of(row)
        if hold.state == "open":
            state = await read_state(connection, user_id)
            if amount is not None and amount > hold.amount:
                raise CaptureExceedsHold(amount=amount, held=hold.amount)
            if captures and state.frozen:
                return Refused(state, -(amount or hold.amount))
            continue  # a hold of the account was overdue, or this one was just placed
        asked = (amount or hold.amount) if captures else None
        if hold.state == ("captured" if captures else "voided") and hold.captured == asked:
            return Accepted(hold=hold, state=_after(hold), replayed=True)
        raise HoldEnded(state=hold.state, ended_at=hold.ended_at, captured=hold.captured)
    raise lost_every_race()


async def _hold(connection: Connection, user_id: int, number: int) -> Hold:
    try:
        await is_up_to_date(connection, user_id)
    except UserNotFound:
        raise HoldNotFound from None
    rows = await read(connection, HOLD, user_id, number)
    if not rows:
        raise HoldNotFound
    return Hold(**rows[0])


def _of(row: asyncpg.Record) -> Hold:
    members: dict[str, Any] = {name: row[name] for name in Hold._fields}
    return Hold(**members)


def _after(hold: Hold) -> State:
    """Return the account just after the end of a hold."""
    return State(hold.user_id, hold.balance or 0, hold.held or 0, 0, False, hold.version or 0)  # noqa: FBT003 - its floor and freeze are not kept
