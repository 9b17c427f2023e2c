"""Movements of money: changes, transfers, holds and reversals, each decided by one statement.

No lock of a row is held while the service thinks: a movement is one statement and one transaction,
so an instance that is frozen or killed stops nobody.
"""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from time import perf_counter
from typing import Any, Final, TypeAlias

import asyncpg

from balance_app.balances.errors import (
    EntryNotFound,
    IdempotencyKeyReused,
    KeyNotFound,
    NotReversible,
    TransferNotFound,
    UserNotFound,
    VersionConflict,
)
from balance_app.balances.guard import Guard
from balance_app.balances.model import (
    Accepted,
    Entry,
    Hold,
    Movement,
    Outcome,
    Recorded,
    Refused,
    State,
)
from balance_app.balances.state import MAX_RACES, lost_every_race, read_state
from balance_app.balances.together import GroupCommit
from balance_app.db.pool import Connection, Database, read, write, write_rows
from balance_app.errors import DatabaseUnavailable, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.metrics import Metrics, Result

# Accounts whose last refusal is remembered.
REMEMBERED: Final = 1000
# For how long the refusals of keys are kept.
REFUSALS_KEPT: Final = timedelta(days=7)
KEYS_PKEY: Final = "idempotency_keys_pkey"
REVERSES_KEY: Final = "entries_reverses_key"

# An attempt at a movement: one statement. None: the account does not allow it, or it raced.
Attempt: TypeAlias = Callable[[Connection], Awaitable[Accepted | None]]


class BalanceRepository:
    """Movements of money, and their outcomes; every call is one transaction or none."""

    def __init__(self, database: Database, guard: Guard, metrics: Metrics | None = None) -> None:
        self._database = database
        self._guard = guard
        grouped = database.settings.balance_group_commit
        self._together = GroupCommit(database, guard) if grouped else None
        # The states that refused last, by account, until a change of it is accepted.
        self._refusing: dict[int, State] = {}
        self._metrics = metrics or Metrics()

    async def change(self, movement: Movement) -> Outcome:
        """Add an amount (negative withdraws) to a balance, at most once per key.

        Returns:
            The accepted or refused outcome; for a key used before, the recorded one.

        Raises:
            UserNotFound: there is no such user.
            VersionConflict: the account has none of the movement's entity tags.
            IdempotencyKeyReused: the key belongs to another request.
            DatabaseUnavailable, Overloaded: see `balance_app.db.pool`; the outcome of earlier tries
                with this key is unknown.
        """
        is_first = True

        async def attempt(connection: Connection) -> Accepted | None:
            nonlocal is_first
            refusing = self._refusing.get(movement.user_id)
            if is_first and refusing is not None and not refusing.allows(movement.amount):
                is_first = False
                return None  # it is refused if the state, which is read next, is still such a one
            return await _change(connection, movement)

        outcome = await self._decide(movement, attempt, self._together)
        if isinstance(outcome, Accepted):
            self._refusing.pop(movement.user_id, None)
        elif not outcome.replayed:
            self._refusing[movement.user_id] = outcome.state
            if len(self._refusing) > REMEMBERED:
                del self._refusing[next(iter(self._refusing))]
        return outcome

    async def transfer(self, movement: Movement) -> Outcome:
        """Move an amount from one user to another; raises as `change` does.

        A refusal has the state of the user who does not allow it.
        """
        return await self._decide(movement, lambda con: _transfer(con, movement))

    async def hold(self, movement: Movement) -> Outcome:
        """Reserve an amount for some seconds; raises as `change` does."""
        return await self._decide(movement, lambda con: _hold(con, movement))

    async def reverse(
        self,
        user_id: int,
        version: int,
        *,
        reference: str | None,
        note: str | None,
        by: str | None = None,
    ) -> Outcome:
        """Undo an entry by an opposite one, at most once; of a transfer both halves.

        Raises:
            UserNotFound, EntryNotFound: there is none.
            NotReversible: it is a reversal itself.
            DatabaseUnavailable, Overloaded: as for `change`.
        """
        first = await self._database.run(lambda con: _entry(con, user_id, version))
        if first.reverses is not None or not first.amount:
            raise NotReversible(user_id=user_id, version=version, reverses=first.reverses)
        payer, payee = first, None
        if first.other_user_id is not None and first.other_version is not None:
            other = await self._database.run(
                lambda con: _entry(con, first.other_user_id or 0, first.other_version or 0)
            )
            # The one who was paid pays back.
            payer, payee = (first, other) if first.amount > 0 else (other, first)
        movement = Movement(
            payer.user_id,
            -payer.amount,
            reference=reference,
            note=note,
            to_user_id=None if payee is None else payee.user_id,
            by=by,
        )

        async def attempt(connection: Connection) -> Accepted | None:
            reversal = await _reversal(connection, payer)
            if reversal is not None:
                return reversal
            try:
                if payee is None:
                    return await _change(connection, movement, reverses=payer.version)
                return await _transfer(
                    connection, movement, reverses=(payer.version, payee.version)
                )
            except asyncpg.UniqueViolationError as error:
                if error.constraint_name != REVERSES_KEY:
                    raise
                return await _reversal(connection, payer)

        outcome = await self._decide(movement, attempt)
        if isinstance(outcome, Refused):
            # The state that refuses this try may be that after another one.
            made = await self._database.run(lambda con: _reversal(con, payer))
            return made or outcome
        return outcome

    async def transfer_of(self, user_id: int, version: int) -> tuple[Accepted, Accepted | None]:
        """Return a transfer by its payer's entry, and the one that reverses it, if any.

        Raises:
            TransferNotFound: this entry is not the payer's half of one.
        """
        return await self._database.run(lambda con: _transfer_of(con, user_id, version))

    async def recorded(self, user_id: int, key: str) -> Recorded:
        """Return the request with this key of the user, and its outcome.

        Raises:
            KeyNotFound: nothing is recorded under it.
        """
        found = await self._database.run(lambda con: _recorded(con, user_id, key))
        if found is None:
            raise KeyNotFound
        return found

    async def _decide(
        self, movement: Movement, attempt: Attempt, together: GroupCommit | None = None
    ) -> Outcome:
        started = perf_counter()
        payee = movement.to_user_id
        users = (movement.user_id,) if payee is None else (movement.user_id, payee)
        try:
            outcome = None if together is None else await together.change(movement)
            if outcome is None:
                outcome = await self._guard.run(
                    lambda con: _decide(con, movement, attempt), *users, key=movement.key
                )
        except Exception as error:
            if isinstance(error, Problem):
                error.under(movement.key)
            self._metrics.changes.inc(_failure(error))
            raise
        result: Result = "accepted" if isinstance(outcome, Accepted) else "refused"
        self._metrics.changes.inc("replayed" if outcome.replayed else result)
        self._metrics.change_seconds.observe(perf_counter() - started)
        return outcome


async def _decide(connection: Connection, movement: Movement, attempt: Attempt) -> Outcome:
    """Make a movement, or find what refuses it: a recorded outcome, a tag, or a state.

    A refusal proves itself: the state in it was read in a snapshot taken after the attempt changed
    nothing. (The attempt's own snapshot may be older than the state that refused it.)
    """
    for _ in range(MAX_RACES):
        try:
            made = await attempt(connection)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != KEYS_PKEY:
                raise
            made = None
        if made is not None:
            return made
        first = await _recall(connection, movement)
        if first is not None:
            return first
        refused = await _refusal(connection, movement)
        if refused is not None and movement.key is not None:
            refused = await _refuse_once(connection, movement, refused)
        if refused is not None:
            return refused
        # Another change was committed between the statements, and now this one fits.
    raise lost_every_race()


async def _recall(connection: Connection, movement: Movement) -> Outcome | None:
    """Return the recorded outcome of a movement's key, if there is one."""
    if movement.key is None:
        return None
    first = await _recorded(connection, movement.user_id, movement.key)
    if first is None:
        return None
    if (first.amount, first.request) != (movement.amount, movement.request):
        raise IdempotencyKeyReused
    # Where nobody was asked who he is, whoever knows the key may have sent it.
    if first.by not in {None, movement.by}:
        raise IdempotencyKeyReused
    return first.outcome


async def _refusal(connection: Connection, movement: Movement) -> Refused | None:
    """Return the refusal by one of the movement's accounts, None if both now allow it."""
    refused = None
    for user_id, amount in movement.sides:
        state = await read_state(connection, user_id)
        if user_id == movement.user_id:
            state.require(movement.tags)
        if refused is None and not state.allows(amount):
            refused = Refused(state, amount)
    return refused


# What is available never falls below the floor, and the balance never passes the largest one ($3):
# waiting for the row's lock, PostgreSQL checks the condition again on the row as the change before
# left it. Balance, version and entry change together or not at all. An entry's time is that of the
# statement, which is the same wherever it stands in it, or just after `changed_at` if that is
# later. Whatever locks the account raises `changed_at`: so the times of its entries, holds and
# settings rise in the order of their locks (those of one batch of group commit are equal). No row
# means: no such user, the change does not fit, a hold is overdue, or the account has none of the
# entity tags $4.
# ast-grep-ignore: transaction-clock - greatest() keeps the order
CHANGE: Final = """
WITH changed AS (
    UPDATE users SET balance = balance + $2, version = version + 1,
                     changed_at = greatest(changed_at + interval '1 microsecond',
                                           statement_timestamp()),
                     hash = chain_hash(hash, $9, version + 1, balance + $2, held,
                                       greatest(changed_at + interval '1 microsecond',
                                                statement_timestamp()))
    WHERE id = $1 AND balance - held + $2 >= floor AND balance + $2 <= $3 AND NOT frozen
      AND holds_due_at > clock_timestamp()
      AND ($4::text[] IS NULL
           OR concat_ws('.', version, settings_version, hold_events) = ANY ($4))
    RETURNING id, version, balance, held, changed_at, hash
)
INSERT INTO entries
    (user_id, version, amount, balance, held, at, reverses, reference, note, by, hash)
SELECT id, version, $2, balance, held, changed_at, $5, $6, $7, $8, hash FROM changed
RETURNING version, balance, held, at
"""

# As CHANGE, and the key is written in the same statement: its uniqueness makes the whole statement
# fail when another transaction has written the key meanwhile.
# ast-grep-ignore: transaction-clock - greatest() keeps the order
CHANGE_ONCE: Final = """
WITH changed AS (
    UPDATE users SET balance = balance + $2, version = version + 1,
                     changed_at = greatest(changed_at + interval '1 microsecond',
                                           statement_timestamp()),
                     hash = chain_hash(hash, $10, version + 1, balance + $2, held,
                                       greatest(changed_at + interval '1 microsecond',
                                                statement_timestamp()))
    WHERE id = $1 AND balance - held + $2 >= floor AND balance + $2 <= $3 AND NOT frozen
      AND holds_due_at > clock_timestamp()
      AND ($4::text[] IS NULL
           OR concat_ws('.', version, settings_version, hold_events) = ANY ($4))
      AND NOT EXISTS (SELECT FROM idempotency_keys WHERE user_id = $1 AND key = $7)
    RETURNING id, version, balance, held, changed_at, hash
), entry AS (
    INSERT INTO entries
        (user_id, version, amount, balance, held, at, key, reference, note, by, hash)
    SELECT id, version, $2, balance, held, changed_at, $7, $5, $6, $9, hash FROM changed
    RETURNING user_id, version, amount, balance, held, at, key, by
)
INSERT INTO idempotency_keys
    (user_id, key, outcome, amount, request, balance, held, version, at, by)
SELECT user_id, key, 'accepted', amount, $8, balance, held, version, at, by FROM entry
RETURNING version, balance, held, at
"""


async def _change(
    connection: Connection, movement: Movement, *, reverses: int | None = None
) -> Accepted | None:
    asked = movement.user_id, movement.amount, MAX_INTEGER, movement.tags
    said = movement.reference, movement.note
    if movement.key is None:
        who = movement.by, movement.content(reverses)
        row = await write(connection, CHANGE, *asked, reverses, *said, *who)
    else:
        once = movement.key, movement.request, movement.by, movement.content()
        row = await write(connection, CHANGE_ONCE, *asked, *said, *once)
    if row is None:
        return None
    return Accepted(
        Entry(
            movement.user_id,
            amount=movement.amount,
            key=movement.key,
            reverses=reverses,
            reference=movement.reference,
            note=movement.note,
            by=movement.by,
            **row,
        )
    )


# Both rows are locked in the order of ids, so that no two transfers wait for each other, and only
# then decided on, as the transactions before left them. The UPDATE starts from the rows as they are
# in the statement's snapshot: it takes all that the CHECKs compare from the locked rows instead, or
# a state of the past would violate them. Each half names the other; a half alone would violate a
# CHECK of entries.
#
# $1 payer, $2 payee, $3 amount, $4 largest balance, $5 entity tags of the payer, $6 and $7 the
# entries of payer and payee that are reversed, $8 key, $9 request, $10 reference, $11 note, $12 who
TRANSFER: Final = """
WITH locked AS MATERIALIZED (
    SELECT * FROM users WHERE id IN ($1, $2) ORDER BY id FOR NO KEY UPDATE
), decided AS MATERIALIZED (
    SELECT count(*) = 2
           AND bool_and(CASE id WHEN $1 THEN balance - held - $3 >= floor
                                ELSE balance + $3 <= $4 END)
           AND bool_and(NOT frozen AND holds_due_at > clock_timestamp())
           AND bool_and(id <> $1 OR $5::text[] IS NULL
                        OR concat_ws('.', version, settings_version, hold_events) = ANY ($5))
           AND NOT EXISTS (SELECT FROM idempotency_keys WHERE user_id = $1 AND key = $8)
           AS fits,
           greatest(max(changed_at) + interval '1 microsecond', clock_timestamp()) AS at
    FROM locked
), half AS MATERIALIZED (
    -- each account after the transfer, and its entry
    SELECT own.id, own.version + 1 AS version, amount, own.balance + amount AS balance, own.held,
           own.floor, own.hash, decided.at, CASE own.id WHEN $1 THEN $8::text END AS key,
           other.id AS other_id, other.version + 1 AS other_version,
           CASE own.id WHEN $1 THEN $6::bigint ELSE $7 END AS reverses
    FROM locked AS own JOIN locked AS other ON other.id <> own.id
    CROSS JOIN LATERAL (SELECT CASE own.id WHEN $1 THEN -$3 ELSE $3 END AS amount) AS moving
    CROSS JOIN decided
    WHERE fits
), moved AS (
    UPDATE users SET balance = half.balance, held = half.held, floor = half.floor,
                     version = half.version, changed_at = half.at,
                     hash = chain_hash(half.hash,
                                       entry_content(half.id, half.amount, half.key, $12,
                                                     half.other_id, half.other_version,
                                                     half.reverses, NULL, $10, $11),
                                       half.version, half.balance, half.held, half.at)
    FROM half
    WHERE users.id = half.id
    RETURNING half.*, users.hash AS entry_hash
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance, held, at, key, other_user_id,
                         other_version, reverses, reference, note, by, hash)
    SELECT id, version, amount, balance, held, at, key, other_id, other_version, reverses,
           $10, $11, $12, entry_hash
    FROM moved
    RETURNING *
), recorded AS (
    INSERT INTO idempotency_keys
        (user_id, key, outcome, amount, request, balance, held, version, at, by)
    SELECT user_id, key, 'accepted', amount, $9, balance, held, version, at, by FROM entry
    WHERE key IS NOT NULL
)
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       reference, note, by
FROM entry ORDER BY amount
"""


async def _transfer(
    connection: Connection,
    movement: Movement,
    *,
    reverses: tuple[int | None, int | None] = (None, None),
) -> Accepted | None:
    rows = await write_rows(
        connection,
        TRANSFER,
        movement.user_id,
        movement.to_user_id,
        -movement.amount,
        MAX_INTEGER,
        movement.tags,
        *reverses,
        movement.key,
        movement.request,
        movement.reference,
        movement.note,
        movement.by,
    )
    if not rows:
        return None
    payer, payee = rows
    return Accepted(Entry(**payer), Entry(**payee))


# As CHANGE for `held`: what is available never falls below the floor. The hold's number is that of
# its event, unique for the account as it is given under the row's lock.
#
# $1 user, $2 amount, $3 entity tags, $4 seconds, $5 key, $6 request, $7 reference, $8 note, $9 who
HOLD: Final = """
WITH placed AS (
    UPDATE users SET held = held + $2, hold_events = hold_events + 1,
                     (changed_at, holds_due_at) = (
        SELECT at, least(holds_due_at, at + $4)
        FROM (
            SELECT greatest(changed_at + interval '1 microsecond', clock_timestamp()) AS at OFFSET 0
        ) AS now
    )
    WHERE id = $1 AND balance - held - $2 >= floor AND NOT frozen
      AND holds_due_at > clock_timestamp()
      AND ($3::text[] IS NULL
           OR concat_ws('.', version, settings_version, hold_events) = ANY ($3))
      AND NOT EXISTS (SELECT FROM idempotency_keys WHERE user_id = $1 AND key = $5)
    RETURNING id, hold_events, balance, held, floor, frozen, version, settings_version,
              changed_at AS at
), hold AS (
    INSERT INTO holds (user_id, number, amount, at, expires_at, key, reference, note, by)
    SELECT id, hold_events, $2, at, at + $4::interval, $5, $7, $8, $9 FROM placed
    RETURNING number, expires_at
), recorded AS (
    INSERT INTO idempotency_keys
        (user_id, key, outcome, amount, request, balance, held, floor, version, at, hold, by)
    SELECT id, $5, 'accepted', -$2, $6, balance, held, floor, version, at, hold_events, $9
    FROM placed
    WHERE $5 IS NOT NULL
)
SELECT * FROM placed CROSS JOIN hold
"""


async def _hold(connection: Connection, movement: Movement) -> Accepted | None:
    row = await write(
        connection,
        HOLD,
        movement.user_id,
        -movement.amount,
        movement.tags,
        timedelta(seconds=movement.seconds or 0),
        movement.key,
        movement.request,
        movement.reference,
        movement.note,
        movement.by,
    )
    if row is None:
        return None
    hold = Hold(
        movement.user_id,
        row["number"],
        -movement.amount,
        row["at"],
        row["expires_at"],
        movement.key,
        movement.reference,
        movement.note,
        movement.by,
    )
    return Accepted(hold=hold, state=_state(row, movement.user_id))


# A refusal is as final as an acceptance: the first outcome written under a key is the key's. It is
# written with the state that refuses, in one snapshot. No row means: the key is taken, or the state
# allows it now.
#
# $1 user, $2 key, $3 amount, $4 request, $5 the user whose state refuses, $6 the amount there,
# $7 largest balance, $8 who
REFUSE_ONCE: Final = """
INSERT INTO idempotency_keys
    (user_id, key, outcome, amount, request, balance, held, floor, frozen, version, refused_by, by)
SELECT $1::bigint, $2::text, 'refused', $3::bigint, $4, balance, held, floor, frozen, version,
       nullif($5::bigint, $1), $8
FROM users
WHERE id = $5 AND holds_due_at > clock_timestamp()
  AND (frozen OR balance + $6 > $7 OR $6 < 0 AND balance - held + $6 < floor)
ON CONFLICT (user_id, key) DO NOTHING
RETURNING balance, held, floor, frozen, version
"""


async def _refuse_once(
    connection: Connection, movement: Movement, refused: Refused
) -> Refused | None:
    row = await write(
        connection,
        REFUSE_ONCE,
        movement.user_id,
        movement.key,
        movement.amount,
        movement.request,
        refused.state.user_id,
        refused.amount,
        MAX_INTEGER,
        movement.by,
    )
    if row is None:
        return None
    return Refused(_state(row, refused.state.user_id), refused.amount)


# A replay must not acknowledge what is not durable: a bare SELECT can see a commit that a failover
# would still lose. The message, which nobody reads, makes this a transaction that writes: its
# commit waits until the log (and a synchronous standby) has it, and all that came before it, as
# did every outcome that this statement can see. No row is locked: a replay neither waits for
# changes of the account nor delays them.
RECALL: Final = """
SELECT outcome, amount, request, balance, held, floor, frozen, version, refused_by, hold, by,
       pg_logical_emit_message(true, 'balance_app', '')
FROM idempotency_keys
WHERE user_id = $1 AND key = $2
"""


async def _recorded(connection: Connection, user_id: int, key: str) -> Recorded | None:
    row = await write(connection, RECALL, user_id, key)
    if row is None:
        return None
    amount = row["amount"]
    outcome: Outcome
    if row["outcome"] == "refused":
        by = row["refused_by"]
        outcome = Refused(
            _state(row, by or user_id), amount if by is None else -amount, replayed=True
        )
    elif row["hold"] is not None:
        (found,) = await read(connection, PLACED, user_id, row["hold"])
        outcome = Accepted(hold=Hold(**found), state=_state(row, user_id), replayed=True)
    else:
        entry = await _entry(connection, user_id, row["version"])
        outcome = (await _with_other(connection, entry))._replace(replayed=True)
    return Recorded(amount, row["request"], row["by"], outcome)


PLACED: Final = """
SELECT user_id, number, amount, at, expires_at, key, reference, note, by FROM holds
WHERE user_id = $1 AND number = $2
"""

ENTRY: Final = """
SELECT user_id, version, amount, balance, held, at, key, other_user_id, other_version, reverses,
       hold, reference, note, by
FROM entries WHERE user_id = $1 AND version = $2
"""

REVERSAL: Final = "SELECT version FROM entries WHERE user_id = $1 AND reverses = $2"

# As durable as RECALL, to be answered in place of a second reversal.
MADE_REVERSAL: Final = """
SELECT version, pg_logical_emit_message(true, 'balance_app', '') FROM entries
WHERE user_id = $1 AND reverses = $2
"""


async def _entry(connection: Connection, user_id: int, version: int) -> Entry:
    rows = await read(connection, ENTRY, user_id, version)
    if rows:
        return Entry(**rows[0])
    await read_state(connection, user_id)
    raise EntryNotFound(f"User {user_id} has no entry {version}.", user_id=user_id)


async def _with_other(connection: Connection, entry: Entry) -> Accepted:
    """Return what made an entry; of a transfer with its other half, the payer's first."""
    if entry.other_user_id is None or entry.other_version is None:
        return Accepted(entry)
    other = await _entry(connection, entry.other_user_id, entry.other_version)
    return Accepted(entry, other) if entry.amount < 0 else Accepted(other, entry)


async def _reversal(connection: Connection, entry: Entry) -> Accepted | None:
    """Return the reversal of an entry that was made before, if there is one."""
    row = await write(connection, MADE_REVERSAL, entry.user_id, entry.version)
    if row is None:
        return None
    reversal = await _entry(connection, entry.user_id, row["version"])
    return (await _with_other(connection, reversal))._replace(replayed=True)


async def _transfer_of(
    connection: Connection, user_id: int, version: int
) -> tuple[Accepted, Accepted | None]:
    try:
        entry = await _entry(connection, user_id, version)
    except (UserNotFound, EntryNotFound):
        raise TransferNotFound from None
    if entry.other_user_id is None or entry.amount > 0:
        raise TransferNotFound
    rows = await read(connection, REVERSAL, entry.user_id, entry.version)
    # The payer's entry is undone by the payee's half of the reversal.
    reversal = await _entry(connection, entry.user_id, rows[0]["version"]) if rows else None
    made = await _with_other(connection, entry)
    return made, None if reversal is None else await _with_other(connection, reversal)


def _state(row: asyncpg.Record, user_id: int) -> State:
    members: dict[str, Any] = {
        name: row[name] for name in ("balance", "held", "floor", "frozen", "version")
    }
    return State(user_id, **members)


def _failure(error: Exception) -> Result:
    """Return the metrics' result of a movement that ended in this error."""
    match error:
        case UserNotFound():
            return "no_user"
        case IdempotencyKeyReused():
            return "key_reused"
        case VersionConflict():
            return "version_conflict"
        case Overloaded():
            return "overloaded"
        case DatabaseUnavailable():
            return "unavailable" if error.applied == "no" else "unknown"
        case _:
            return "error"
