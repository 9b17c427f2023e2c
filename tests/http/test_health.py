"""What the checks of readiness cost the database."""

import asyncio
from typing import Any, cast

from balance_app.db.pool import Database
from balance_app.http.health import Readiness


class Slow:
    """A database that answers when it is let."""

    def __init__(self) -> None:
        self.queries = 0
        self.may_answer = asyncio.Event()

    async def run(self, _operation: object, *, priority: bool) -> list[Any]:
        assert priority
        self.queries += 1
        await self.may_answer.wait()
        return []


async def test_those_who_ask_during_a_check_share_its_query() -> None:
    """Anybody may ask, and a check goes before all requests: the queue has one of them."""
    database = Slow()
    readiness = Readiness(cast("Database", database), asyncio.Event(), informational={})
    asking = [asyncio.create_task(readiness.check()) for _ in range(1000)]
    await asyncio.sleep(0)
    # one who gives up takes the answer from nobody
    asking.pop(0).cancel()
    await asyncio.sleep(0)
    database.may_answer.set()
    answers = await asyncio.gather(*asking)
    assert database.queries == 1
    assert {checks["database"] for checks, _ in answers} == {"ok"}
    # the control: the next one asks again
    await readiness.check()
    assert database.queries == 2
