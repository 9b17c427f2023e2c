"""What was done by whom: keys, controls of jobs, new users, and settings of accounts.

Each statement that does such a thing writes the row itself, so that there is none without the
other. What changes nothing has no row: a refusal, a replay, the pause of a paused job. Movements of
money are not among them: entries and holds say by themselves who made them.
"""

from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg
from pydantic_core import from_json

from balance_app.db.pool import Database, read_in_order


class Action(NamedTuple):
    """Something that was done; `before` and `after` are what it changed, None if that is nothing.

    `by` is the principal; where no keys are needed, who the request names, or None.
    """

    id: int
    at: datetime
    by: str | None
    action: str
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ActionRepository:
    """Reads actions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, *, by: str | None, subject: str | None, before: int, limit: int
    ) -> list[Action]:
        """Return up to `limit` actions with ids below `before`, the latest first."""
        given = [each for each in (subject, by) if each is not None]
        sql = PAGES[subject is not None, by is not None]
        rows = await self._database.run(lambda con: read_in_order(con, sql, before, limit, *given))
        return [_action(row) for row in rows]


# Each reads its own index backwards, whatever the planner's statistics: with a row comparison only
# the index that begins with these columns has the order. One subject has few actions: those of one
# principal among them are found by reading them.
ACTIONS: Final = """
SELECT id, at, by, action, subject, before, after FROM actions
WHERE id < $1 ORDER BY id DESC LIMIT $2
"""

OF_SUBJECT: Final = """
SELECT id, at, by, action, subject, before, after FROM actions
WHERE (subject, id) < ($3, $1) AND (subject, id) > ($3, 0)
ORDER BY subject DESC, id DESC LIMIT $2
"""

BY_ONE: Final = """
SELECT id, at, by, action, subject, before, after FROM actions
WHERE (by, id) < ($3, $1) AND (by, id) > ($3, 0)
ORDER BY by DESC, id DESC LIMIT $2
"""

OF_SUBJECT_BY_ONE: Final = """
SELECT id, at, by, action, subject, before, after FROM actions
WHERE (subject, id) < ($3, $1) AND (subject, id) > ($3, 0) AND by = $4
ORDER BY subject DESC, id DESC LIMIT $2
"""

PAGES: Final = {
    (False, False): ACTIONS,
    (True, False): OF_SUBJECT,
    (False, True): BY_ONE,
    (True, True): OF_SUBJECT_BY_ONE,
}


def _action(row: asyncpg.Record) -> Action:
    members: dict[str, Any] = dict(row)
    for name in ("before", "after"):
        members[name] = members[name] and from_json(members[name])
    return Action(**members)
