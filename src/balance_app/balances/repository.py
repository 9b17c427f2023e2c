"""The statements on users, entries and idempotency keys, each with the invariant it keeps."""

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from time import perf_counter
from typing import Final, Literal, NamedTuple

import asyncpg

from balance_app.balances.errors import (
    BalanceLimitExceeded,
    IdempotencyKeyReused,
    InsufficientFunds,
    KeyNotFound,
    UserIdTaken,
    UserNotFound,
)
from balance_app.balances.guard import Guard
from balance_app.db.pool import Connection, Database, read, write
from balance_app.errors import DatabaseUnavailable, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.metrics import Metrics

MAX_RACES: Final = 1000
# For how long the refusals of keys are kept.
REFUSALS_KEPT: Final = timedelta(days=7)
KEYS_PKEY: Final = "idempotency_keys_pkey"


@dataclass(frozen=True, slots=True)
class Account:
    """A user's balance after `version` entries."""

    user_id: int
    balance: int
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a user's ledger; `balance` is the balance after it."""

    version: int
    amount: int
    balance: int
    at: datetime
    key: str | None


@dataclass(frozen=True, slots=True)
class DailyBalance:
    """A user's balance on a UTC day, as last read on that day: at `at`."""

    day: date
    balance: int
    version: int
    at: datetime


class Outcome(NamedTuple):
    """The outcome of a request: the state after it, or the state that refused it."""

    kind: Literal["opened", "accepted", "refused"]
    user_id: int
    amount: int
    balance: int
    version: int
    at: datetime | None = None
    key: str | None = None
    replayed: bool = False


class BalanceRepository:
    """Reads and changes of balances; every call is one transaction or none."""

    def __init__(self, database: Database, metrics: Metrics | None = None) -> None:
        self._database = database
        self._metrics = metrics or Metrics()
        self._guard = Guard(database, (CHANGE, CHANGE_ONCE))

    async def change(self, user_id: int, amount: int, key: str | None) -> Outcome:
        """Add `amount` (negative withdraws) to a balance, at most once per `key`.

        Returns:
            The accepted or refused outcome; for a key used before, the recorded one.

        Raises:
            UserNotFound: there is no such user.
            IdempotencyKeyReused: the key belongs to another request.
            DatabaseUnavailable, Overloaded: see `balance_app.db.pool`; the outcome of earlier tries
                with this key is unknown.
        """
        started = perf_counter()
        try:
            if key is None:
                outcome = await self._guard.run(
                    lambda con: _change(con, user_id, amount), user_id=user_id
                )
            else:
                outcome = await self._guard.run(
                    lambda con: _change_once(con, user_id, amount, key), user_id=user_id, key=key
                )
        except Exception as error:
            if isinstance(error, Problem):
                error.under(key)
            self._metrics.changes.inc(_failure(error))
            raise
        self._metrics.changes.inc("replayed" if outcome.replayed else outcome.kind)
        self._metrics.change_seconds.observe(perf_counter() - started)
        return outcome

    async def open(self, balance: int, key: str | None) -> Outcome:
        """Create a user with an opening `balance`, at most once per `key`.

        Raises:
            IdempotencyKeyReused: the key belongs to another request.
            UserIdTaken: the next id belongs to an existing user.
            DatabaseUnavailable, Overloaded: as for `change`.
        """
        try:
            if key is None:
                return await self._database.run(lambda con: _open(con, balance, None))
            return await self._guard.run(lambda con: _open(con, balance, key), key=key)
        except Problem as problem:
            problem.under(key)
            raise

    async def outcome(self, key: str) -> Outcome:
        """Return the outcome of the request with this key.

        Raises:
            KeyNotFound: nothing is recorded under it.
        """
        outcome = await self._database.run(lambda con: _recall(con, key))
        if outcome is None:
            raise KeyNotFound
        return outcome

    async def account(self, user_id: int) -> Account:
        """Return a user's account.

        Raises:
            UserNotFound: there is no such user.
        """
        rows = await self._database.run(lambda con: read(con, ACCOUNT, user_id))
        if not rows:
            raise UserNotFound(user_id)
        return Account(**rows[0])

    async def accounts(self, *, after: int, limit: int) -> list[Account]:
        """Return up to `limit` accounts with ids above `after`, in order."""
        rows = await self._database.run(lambda con: read(con, ACCOUNTS, after, limit))
        return [Account(**row) for row in rows]

    async def entries(self, user_id: int, *, after: int, limit: int) -> list[Entry]:
        """Return up to `limit` entries with versions above `after`, in order.

        Raises:
            UserNotFound: there is no such user.
        """
        rows = await self._database.run(lambda con: read(con, ENTRIES, user_id, after, limit))
        if not rows:
            await self.account(user_id)
        return [Entry(**row) for row in rows]

    async def daily_balances(self, user_id: int, *, before: date, limit: int) -> list[DailyBalance]:
        """Return up to `limit` daily balances of days before `before`, the latest first.

        A day without one ended with the balance of the day before it.

        Raises:
            UserNotFound: there is no such user.
        """
        rows = await self._database.run(
            lambda con: read(con, DAILY_BALANCES, user_id, before, limit)
        )
        if not rows:
            await self.account(user_id)
        return [DailyBalance(**row) for row in rows]


# The balance is never negative and never passes the largest one ($3): waiting for the row's lock,
# PostgreSQL checks the condition again on the row as the change before left it. Balance, version
# and entry change together or not at all. No row means: no such user, or the change does not fit.
CHANGE: Final = """
WITH changed AS (
    UPDATE users SET balance = balance + $2, version = version + 1
    WHERE id = $1 AND balance + $2 BETWEEN 0 AND $3
    RETURNING id, version, balance
)
INSERT INTO entries (user_id, version, amount, balance)
SELECT id, version, $2, balance FROM changed
RETURNING balance, version, at
"""

# A refusal proves itself: its balance and version are read together, in a snapshot taken after the
# UPDATE changed nothing. (The UPDATE's own snapshot may be older than the state that refused it.)
STATE: Final = "SELECT balance, version FROM users WHERE id = $1"


async def _change(connection: Connection, user_id: int, amount: int) -> Outcome:
    for _ in range(MAX_RACES):
        row = await write(connection, CHANGE, user_id, amount, MAX_INTEGER)
        if row is not None:
            return Outcome("accepted", user_id, amount, row["balance"], row["version"], row["at"])
        states = await read(connection, STATE, user_id)
        if not states:
            raise UserNotFound(user_id)
        balance, version = states[0]["balance"], states[0]["version"]
        if not 0 <= balance + amount <= MAX_INTEGER:
            return Outcome("refused", user_id, amount, balance, version)
        # Another change was committed between the two statements, and now this one fits.
    raise _lost_every_race()


# As CHANGE, and the key is written in the same statement: its uniqueness makes the whole statement
# fail when another transaction has written the key meanwhile.
CHANGE_ONCE: Final = """
WITH changed AS (
    UPDATE users SET balance = balance + $2, version = version + 1
    WHERE id = $1 AND balance + $2 BETWEEN 0 AND $3
      AND NOT EXISTS (SELECT FROM idempotency_keys WHERE key = $4)
    RETURNING id, version, balance
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance, key)
    SELECT id, version, $2, balance, $4 FROM changed
    RETURNING user_id, version, amount, balance, key, at
)
INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
SELECT key, 'accepted', user_id, amount, balance, version, at FROM entry
RETURNING balance, version, at
"""

# A refusal is as final as an acceptance: the first outcome written under a key is the key's.
REFUSE_ONCE: Final = """
INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
SELECT $4::text, 'refused', id, $2::bigint, balance, version FROM users
WHERE id = $1 AND NOT balance + $2 BETWEEN 0 AND $3
ON CONFLICT (key) DO NOTHING
RETURNING balance, version, at
"""

# A replay must not acknowledge what is not durable: a bare SELECT can see a commit that a failover
# would still lose. The message, which nobody reads, makes this a transaction that writes: its
# commit waits until the log (and a synchronous standby) has it, and all that came before it, as
# did every outcome that this statement can see. No row is locked: a replay neither waits for
# changes of the account nor delays them.
RECALL: Final = """
SELECT outcome AS kind, user_id, amount, balance, version, at, key,
       pg_logical_emit_message(true, 'balance_app', '')
FROM idempotency_keys
WHERE key = $1
"""


async def _change_once(connection: Connection, user_id: int, amount: int, key: str) -> Outcome:
    for _ in range(MAX_RACES):
        try:
            row = await write(connection, CHANGE_ONCE, user_id, amount, MAX_INTEGER, key)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != KEYS_PKEY:
                raise
            row = None
        if row is not None:
            return Outcome("accepted", user_id, amount, key=key, **row)
        first = await _recall(connection, key)
        if first is not None:
            if first.kind == "opened" or (first.user_id, first.amount) != (user_id, amount):
                raise IdempotencyKeyReused
            return first
        row = await write(connection, REFUSE_ONCE, user_id, amount, MAX_INTEGER, key)
        if row is not None:
            return Outcome("refused", user_id, amount, key=key, **row)
        if not await read(connection, STATE, user_id):
            raise UserNotFound(user_id)
    raise _lost_every_race()


async def _recall(connection: Connection, key: str) -> Outcome | None:
    row = await write(connection, RECALL, key)
    if row is None:
        return None
    members = {name: row[name] for name in Outcome._fields if name != "replayed"}
    return Outcome(**members, replayed=True)


# The opening balance is entry 1, so that a user's entries always sum to the balance. No row means:
# the next id belongs to an existing user.
OPEN: Final = """
WITH opened AS (
    INSERT INTO users (balance, version) VALUES ($1, 1)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, balance, version, created_at
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance, key, at)
    SELECT id, version, balance, balance, $2::text, created_at FROM opened
), recorded AS (
    INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
    SELECT $2, 'opened', id, balance, balance, version, created_at FROM opened
    WHERE $2 IS NOT NULL
)
SELECT id AS user_id, balance, version, created_at AS at FROM opened
"""


async def _open(connection: Connection, balance: int, key: str | None) -> Outcome:
    for _ in range(MAX_RACES):
        first = None if key is None else await _recall(connection, key)
        if first is not None:
            if first.kind != "opened" or first.amount != balance:
                raise IdempotencyKeyReused
            return first
        try:
            row = await write(connection, OPEN, balance, key)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != KEYS_PKEY:
                raise
            continue  # another request with this key was faster: recall its outcome
        if row is None:
            (ids,) = await read(connection, IDS)
            raise UserIdTaken(ids["next"], highest=ids["highest"])
        return Outcome("opened", amount=balance, key=key, **row)
    raise _lost_every_race()


# The next id of the sequence, and the highest id of a user.
IDS: Final = """
SELECT pg_sequence_last_value(pg_get_serial_sequence('users', 'id')::regclass) + 1 AS next,
       (SELECT max(id) FROM users) AS highest
"""

ACCOUNT: Final = """
SELECT id AS user_id, balance, version, created_at FROM users WHERE id = $1
"""

ACCOUNTS: Final = """
SELECT id AS user_id, balance, version, created_at FROM users
WHERE id > $1 ORDER BY id LIMIT $2
"""

ENTRIES: Final = """
SELECT version, amount, balance, at, key FROM entries
WHERE user_id = $1 AND version > $2 ORDER BY version LIMIT $3
"""

DAILY_BALANCES: Final = """
SELECT day, balance, version, at FROM daily_balances
WHERE user_id = $1 AND day < $2 ORDER BY day DESC LIMIT $3
"""


def refusal(outcome: Outcome) -> InsufficientFunds | BalanceLimitExceeded:
    """Return the problem that reports a refused outcome."""
    problem = InsufficientFunds if outcome.amount < 0 else BalanceLimitExceeded
    return problem(
        user_id=outcome.user_id,
        balance=outcome.balance,
        version=outcome.version,
        amount=outcome.amount,
    )


def _failure(error: Exception) -> str:
    """Return the metrics' result of a change that ended in this error."""
    match error:
        case UserNotFound():
            return "no_user"
        case IdempotencyKeyReused():
            return "key_reused"
        case Overloaded():
            return "overloaded"
        case DatabaseUnavailable():
            return "unavailable" if error.applied == "no" else "unknown"
        case _:
            return "error"


def _lost_every_race() -> Overloaded:
    return Overloaded(f"The account changed under each of {MAX_RACES} tries.")
