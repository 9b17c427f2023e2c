"""Group commit: changes of one account that wait for each other go in one statement.

With BALANCE_GROUP_COMMIT=true the first change that finds no batch of its account begins one, and
takes the account's turn in the pool wait queue for it. Whatever arrives before that turn joins. On
the connection the batch is closed and sent as one statement and one transaction, which judges its
changes in the order of arrival: what each of them waits for is one row lock and one flush, instead
of one for each. No timer and no delay: where nothing else of the account is under way, a change is
sent at once, alone.

A failure of the statement is that of each of its changes. What the statement leaves aside (a key
that is known, a user who is not, an overdue hold), and what can't be sent together, is decided one
by one as without group commit: then a key that another session uses concerns no other change, and
while an account is locked what is recorded under a key is still answered.
"""

import asyncio
import copy
import re
from contextvars import Context
from typing import Final, NamedTuple

import asyncpg
import structlog

from balance_app.balances.guard import Guard, waits_for_key
from balance_app.balances.model import Accepted, Entry, Movement, Outcome, Refused, State
from balance_app.db.pool import Connection, Database, write_rows
from balance_app.errors import Overloaded, Problem
from balance_app.http.body import MAX_INTEGER

log = structlog.get_logger(__name__)

# How many changes one statement has at most.
AT_ONCE: Final = 512
_TAG: Final = re.compile(r"\d+\.\d+\.\d+", re.ASCII)

# One row per change, in their order: see migration 0016.
#
# $1 user, $2 largest balance, and of each change $3 amount, $4 entity tags, $5 key, $6 request,
# $7 reference, $8 note, $9 who, $10 the digest of its entry's content
CHANGE_TOGETHER: Final = """
SELECT verdict, (account).balance, (account).held, (account).floor, (account).frozen,
       (account).version, (account).settings_version, (account).hold_events,
       (account).changed_at AS at
FROM change_together($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
"""


class _Member(NamedTuple):
    """A change that waits in a batch; None answers it if it is to be decided alone."""

    movement: Movement
    content: bytes
    answer: asyncio.Future[Outcome | None]


class GroupCommit:
    """The batches of changes that gather, one for each account."""

    def __init__(self, database: Database, guard: Guard) -> None:
        self._database = database
        self._guard = guard
        self._gathering: dict[int, list[_Member]] = {}
        self._waiting = 0
        self._sending: set[asyncio.Task[None]] = set()

    async def change(self, movement: Movement) -> Outcome | None:
        """Decide a change with others of its account; None: it is to be decided alone.

        Raises:
            VersionConflict: the account has none of the movement's entity tags.
            DatabaseUnavailable, Overloaded: as `Guard.run`.
        """
        if self._guard.refuses_key(movement.user_id, movement.key):
            return None
        if self._waiting >= self._database.settings.max_waiting:
            raise Overloaded(f"Too many requests are waiting ({self._waiting}).")
        answer = asyncio.get_running_loop().create_future()
        # computed here, what can't be encoded fails alone
        member = _Member(movement, movement.content(), answer)
        batch = self._gathering.get(movement.user_id)
        if batch is not None and len(batch) < AT_ONCE:
            batch.append(member)
        else:
            # In a context and a task of its own: the request that begins it may be cut off.
            batch = self._gathering[movement.user_id] = [member]
            task = asyncio.create_task(self._decide(movement.user_id, batch), context=Context())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        self._waiting += 1
        try:
            return await member.answer
        finally:
            self._waiting -= 1

    async def _decide(self, user_id: int, batch: list[_Member]) -> None:
        """Send a batch when it is its turn, and answer its members."""
        members = batch

        async def send(connection: Connection) -> list[Outcome | Exception | None]:
            nonlocal members
            if members is batch:
                self._close(user_id, batch)
                members = [each for each in batch if not each.answer.done()]
            return await _change_together(connection, user_id, members)

        try:
            outcomes = await self._guard.run(send, user_id)
        except Problem as problem:
            undone = problem.applied == "no"
            alone = undone and waits_for_key(problem)
            outcomes = [
                None if alone or (undone and each.movement.key is not None) else copy.copy(problem)
                for each in members
            ]
        except asyncpg.PostgresError as error:  # rolled back: each meets its own when sent alone
            log.warning("changes not sent together", user=user_id, error=repr(error))
            outcomes = [None] * len(members)
        except Exception as error:  # noqa: BLE001 - it is that of each; the changes may be made
            outcomes = [error] * len(members)
        self._close(user_id, batch)  # where it was not sent
        for member, outcome in zip(members, outcomes, strict=True):
            if member.answer.done():  # its client has gone
                continue
            if isinstance(outcome, Exception):
                member.answer.set_exception(outcome)
            else:
                member.answer.set_result(outcome)

    def _close(self, user_id: int, batch: list[_Member]) -> None:
        """Let no more changes join a batch."""
        if self._gathering.get(user_id) is batch:
            del self._gathering[user_id]


async def _change_together(
    connection: Connection, user_id: int, members: list[_Member]
) -> list[Outcome | Exception | None]:
    if not members:
        return []
    movements = [member.movement for member in members]
    rows = await write_rows(
        connection,
        CHANGE_TOGETHER,
        user_id,
        MAX_INTEGER,
        [each.amount for each in movements],
        [_joined(each.tags) for each in movements],
        [each.key for each in movements],
        [each.request for each in movements],
        [each.reference for each in movements],
        [each.note for each in movements],
        [each.by for each in movements],
        [member.content for member in members],
    )
    if not rows:
        return [None] * len(movements)
    outcomes: list[Outcome | Exception | None] = []
    for movement, row in zip(movements, rows, strict=True):
        verdict, balance, held, floor, frozen, version, settings_version, hold_events, at = row
        if verdict == "accepted":
            entry = Entry(
                user_id,
                version,
                movement.amount,
                balance,
                held,
                at,
                key=movement.key,
                reference=movement.reference,
                note=movement.note,
                by=movement.by,
            )
            outcomes.append(Accepted(entry))
            continue
        state = State(user_id, balance, held, floor, frozen, version, settings_version, hold_events)
        if verdict == "refused":
            outcomes.append(Refused(state, movement.amount))
        elif verdict == "conflict":
            outcomes.append(state.conflict())
        else:
            outcomes.append(None)
    return outcomes


def _joined(tags: list[str] | None) -> str | None:
    """Return entity tags with commas between; one that no account can have is left out."""
    return None if tags is None else ",".join(tag for tag in tags if _TAG.fullmatch(tag))
