"""Mutants of the service, each with one guard removed: `python -m tests.mutants GUARD`.

A safety test that passes without the guard proves nothing. Each mutant is an implementation that
looks right.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from secrets import token_hex
from types import ModuleType

from balance_app import logs, open_files, proxies, server, sessions
from balance_app.access import gate
from balance_app.balances import accounts, holds, ledger, repository, state
from balance_app.balances.accounts import Patch
from balance_app.balances.model import Accepted, Entry, Movement, Outcome, Refused, State
from balance_app.balances.repository import CHANGE_ONCE, RECALL
from balance_app.db import migrations
from balance_app.db import pool as database
from balance_app.db.pool import Connection, read, write
from balance_app.http import middleware, protocol
from balance_app.http.body import MAX_INTEGER
from balance_app.http.protocol import LimitedProtocol
from balance_app.jobs.job import Registry
from balance_app.settings import Settings, load_settings
from balance_app.web import account_actions, login, pages, router
from balance_app.web import accounts as accounts_page


def put(module: ModuleType, name: str, instead: object) -> None:
    """Replace an existing attribute of a module."""
    assert name in vars(module), f"{module.__name__} has no {name}"
    vars(module)[name] = instead


def replaced(text: str, guard: str, instead: str) -> str:
    """Return a statement with one of its guards replaced; it must contain the guard."""
    assert guard in text, f"{guard!r} is not in {text}"
    return text.replace(guard, instead)


READ_FIRST = "SELECT balance, version FROM users WHERE id = $1"

THEN_WRITE = """
WITH changed AS (
    UPDATE users SET balance = $3, version = version + 1, hash = NULL WHERE id = $1
    RETURNING id, version, balance
)
INSERT INTO entries (user_id, version, amount, balance)
SELECT id, version, $2, balance FROM changed
RETURNING balance, version, at
"""

OWN_SNAPSHOT = """
WITH seen AS (
    SELECT balance, version FROM users WHERE id = $1
), changed AS (
    UPDATE users SET balance = balance + $2, version = version + 1, hash = NULL
    WHERE id = $1 AND balance + $2 BETWEEN 0 AND $3
    RETURNING id, version, balance
), entry AS (
    INSERT INTO entries (user_id, version, amount, balance)
    SELECT id, version, $2, balance FROM changed
    RETURNING balance, version, at
)
SELECT e.balance, e.version, e.at, s.balance AS seen_balance, s.version AS seen_version
FROM seen s LEFT JOIN entry e ON true
"""


async def read_then_write(
    connection: Connection, movement: Movement, *, reverses: int | None = None
) -> Accepted | None:
    """Decide in Python, between two statements."""
    user_id, amount = movement.user_id, movement.amount
    balance = (await read(connection, READ_FIRST, user_id))[0]["balance"]
    if not 0 <= balance + amount <= MAX_INTEGER:
        return None
    row = await write(connection, THEN_WRITE, user_id, amount, balance + amount)
    assert row is not None
    return Accepted(Entry(user_id, amount=amount, held=0, reverses=reverses, **row))


async def own_snapshot(connection: Connection, movement: Movement, _attempt: object) -> Outcome:
    """Refuse with the state of the statement's own snapshot."""
    user_id, amount = movement.user_id, movement.amount
    row = await write(connection, OWN_SNAPSHOT, user_id, amount, MAX_INTEGER)
    assert row is not None
    balance, version, at, seen_balance, seen_version = row
    if at is None:
        return Refused(
            State(user_id, seen_balance, 0, 0, frozen=False, version=seen_version), amount
        )
    return Accepted(Entry(user_id, version, amount, balance, 0, at, movement.key))


def condition() -> None:
    """Withdraw without the condition in the UPDATE: the lost update."""
    put(repository, "_change", read_then_write)


def fresh_snapshot() -> None:
    """Refuse without a second statement."""
    put(repository, "_decide", own_snapshot)


def key() -> None:
    """Accept without storing keys."""
    unique = "AND NOT EXISTS (SELECT FROM idempotency_keys WHERE user_id = $1 AND key = $7)"
    change, _, _ = replaced(CHANGE_ONCE, unique, "").partition("INSERT INTO idempotency_keys")
    rest = "SELECT version, balance, held, at FROM entry WHERE $8::text IS NULL OR true"
    put(repository, "CHANGE_ONCE", change + rest)


def recall() -> None:
    """Replay an outcome without waiting until it is durable."""
    waits = "pg_logical_emit_message(true, 'balance_app', '')"
    put(repository, "RECALL", replaced(RECALL, waits, "0"))


def warnings() -> None:
    """Take a commit for durable of which PostgreSQL warns that the standby may lack it."""
    del sessions.Session._process_log_message


NOT_OVERDUE = "AND holds_due_at > clock_timestamp()"


def expiry() -> None:
    """Take the stored state of an account for the present one."""
    for module, names, guard in (
        (repository, ("CHANGE", "CHANGE_ONCE", "HOLD", "REFUSE_ONCE"), NOT_OVERDUE),
        (holds, ("CAPTURE", "VOID"), NOT_OVERDUE.replace("AND ", "AND locked.")),
        (accounts, ("SET", "ACCOUNT"), NOT_OVERDUE),
    ):
        for name in names:
            put(module, name, replaced(vars(module)[name], guard, ""))
    both = "bool_and(NOT frozen AND holds_due_at > clock_timestamp())"
    put(repository, "TRANSFER", replaced(repository.TRANSFER, both, "bool_and(NOT frozen)"))
    overdue = "holds_due_at <= clock_timestamp() AS overdue"
    put(state, "STATE", replaced(state.STATE, overdue, "false AS overdue"))
    put(
        accounts,
        "OVERDUE",
        replaced(accounts.OVERDUE, "WHERE holds_due_at <=", "WHERE id < 0 AND holds_due_at <="),
    )


async def two_transactions(
    connection: Connection, movement: Movement, **_reverses: object
) -> Accepted | None:
    """Withdraw from the payer, then deposit with the payee."""
    payer = await guarded_change(
        connection, Movement(movement.user_id, movement.amount, movement.key)
    )
    await asyncio.sleep(0.05)
    payee = payer and await guarded_change(
        connection, Movement(movement.to_user_id or 0, -movement.amount)
    )
    if payer is None or payee is None:
        return None
    assert payer.entry is not None
    half = payer.entry._replace(other_user_id=movement.to_user_id, other_version=1)
    return Accepted(half, payee.entry)


guarded_change = repository._change


def halves() -> None:
    """Make a transfer by two statements in two transactions."""
    put(repository, "_transfer", two_transactions)


async def lock_and_think(
    connection: Connection, movement: Movement, **reverses: object
) -> Accepted | None:
    """Lock both accounts, decide, then transfer."""
    async with connection.transaction():
        await connection.execute(
            "SELECT FROM users WHERE id IN ($1, $2) ORDER BY id FOR NO KEY UPDATE",
            movement.user_id,
            movement.to_user_id,
        )
        await asyncio.sleep(0.005)
        return await guarded_transfer(connection, movement, **reverses)  # type: ignore[arg-type]


guarded_transfer = repository._transfer


def statement() -> None:
    """Make a transfer by several statements in one transaction."""
    put(repository, "_transfer", lock_and_think)


def migration_lock() -> None:
    """Migrate without the lock, all instances at the time MIGRATE_AT (epoch seconds)."""
    guarded = migrations.migrate
    moment = float(os.environ["MIGRATE_AT"])
    time.sleep(max(0.0, moment - 2 - time.time()))

    async def migrate(settings: Settings) -> None:
        await asyncio.sleep(max(0.0, moment - time.time()))
        put(migrations, "MIGRATION_LOCK", os.getpid())  # a lock that no other instance takes
        await guarded(settings)

    put(database, "migrate", migrate)


def log_all() -> None:
    """Log texts as they are, secrets and all."""
    put(logs, "mask_of", lambda _: str)
    logs.configure_logs(load_settings())


def bare() -> None:
    """Answer without the headers that all answers have."""
    put(server, "ALWAYS", ())
    for each in (middleware, protocol):
        put(each, "NO_STORE", (b"x-nothing", b""))


def stay() -> None:
    """Refuse new connections, although there are idle ones."""
    LimitedProtocol._make_room = lambda self: False  # type: ignore[method-assign] # noqa: ARG005


def reserve() -> None:
    """Let clients use every file descriptor."""
    put(open_files, "for_clients", lambda _settings, limit: limit * 2)


def durability() -> None:
    """Leave synchronous_commit at the server's default."""
    default = "current_setting('synchronous_commit')"
    raised = f"nullif({default}, 'off')"
    put(sessions, "AFTER_CONNECTING", replaced(sessions.AFTER_CONNECTING, raised, default))


def open_connections() -> None:
    """Mark the database unavailable when one more connection can't be made."""
    database.Database._handle_refusal = database.Database._mark_unavailable  # type: ignore[method-assign]


def page_forms() -> None:
    """Take neither a key nor an entity tag from the forms of an account's page."""
    put(account_actions, "key_of", lambda _form: token_hex(8))
    put(account_actions, "Patch", lambda **patch: Patch(**{**patch, "settings_versions": None}))


def page_scopes() -> None:
    """Show each form and button to whoever may read, and go wherever the login is told to."""
    for module in (accounts_page, pages, router):
        put(module, "may", lambda *_: True)
    put(login, "own_path", str)


def key_refresh() -> None:
    """Read the keys at the start only."""
    put(gate, "REFRESH_SECONDS", 1e6)


def key_of_stream() -> None:
    """Check the key of a stream at its beginning only."""
    gate.Gate.is_valid = lambda *_: True  # type: ignore[method-assign]


def abrupt_stop() -> None:
    """Stop at once: reset what waits to be accepted, and close what seems idle."""
    put(server, "refuse_new", lambda _listener: None)
    put(server, "ACCEPT_SECONDS", 0)
    for guard in ("_is_new", "_has_input"):
        assert hasattr(LimitedProtocol, guard)
        setattr(LimitedProtocol, guard, lambda _self: False)


def every_proxy() -> None:
    """Believe what anybody says who is behind it."""
    proxies.Proxies.trust = lambda *_: True  # type: ignore[method-assign]


def last_spans() -> None:
    """Wait until the last spans are sent, however long that takes."""
    from balance_app import traced  # noqa: PLC0415 - it imports the SDK

    put(traced, "FLUSH_SECONDS", 3600.0)


def export_page() -> None:
    """Read all entries of an export at once."""
    put(ledger, "EXPORT_PAGE", MAX_INTEGER)


def server_version() -> None:
    """Serve on every version of PostgreSQL."""
    put(sessions, "OLDEST_SERVER", 0)


GUARDS: dict[str, Callable[[], None]] = {
    "condition": condition,
    "fresh-snapshot": fresh_snapshot,
    "key": key,
    "recall": recall,
    "warnings": warnings,
    "expiry": expiry,
    "halves": halves,
    "statement": statement,
    "migration-lock": migration_lock,
    "open-files": reserve,
    "giving-way": stay,
    "masks": log_all,
    "answer-headers": bare,
    "durability": durability,
    "open-connections": open_connections,
    "page-forms": page_forms,
    "page-scopes": page_scopes,
    "export-page": export_page,
    "every-proxy": every_proxy,
    "abrupt-stop": abrupt_stop,
    "key-refresh": key_refresh,
    "key-of-stream": key_of_stream,
    "server-version": server_version,
    "last-spans": last_spans,
}

if __name__ == "__main__":
    GUARDS[sys.argv[1]]()
    server.serve(load_settings(), Registry([]))
