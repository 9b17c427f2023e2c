"""Routes of ledgers: a user's entries, and past balances."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from balance_app.balances.api.schemas import (
    DailyBalancesAnswer,
    DaysPageQuery,
    EntriesAnswer,
    EntriesPageQuery,
    PathUserId,
    entry_body,
)
from balance_app.balances.errors import UserNotFound
from balance_app.balances.ledger import LedgerRepository, Selection
from balance_app.errors import InvalidRequest
from balance_app.http.openapi import problems
from balance_app.http.params import ONCE
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["ledger"])


def _ledger(request: Request) -> LedgerRepository:
    return services(request)[LedgerRepository]


@router.get(
    "/users/{userId}/entries",
    summary="Read a ledger",
    response_description="One page of the user's ledger.",
    response_model=EntriesAnswer,
    responses=problems(UserNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def list_entries(
    request: Request, user_id: PathUserId, page: EntriesPageQuery
) -> dict[str, Any]:
    """List a user's ledger, the opening balance first; the version is the cursor."""
    entries = await _ledger(request).entries(
        user_id,
        Selection(page.begin, page.end, page.reference),
        after=page.after,
        limit=page.limit + 1,
        descending=page.order == "desc",
    )
    shown = entries[: page.limit]
    return {
        "entries": [entry_body(entry) for entry in shown],
        "next": shown[-1].version if len(entries) > page.limit else None,
    }


@router.get(
    "/users/{userId}/daily-balances",
    summary="Read past balances",
    response_description="One page of the user's daily balances.",
    response_model=DailyBalancesAnswer,
    responses=problems(UserNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def list_daily_balances(
    request: Request, user_id: PathUserId, page: DaysPageQuery
) -> dict[str, Any]:
    """List a user's balances at the end of UTC days, the latest day first.

    A job records them every ten minutes, for users whose balance has changed: a day that is not
    listed ended with the balance of the day before it. `next` is the `before` of the next page.
    """
    days = await _ledger(request).daily_balances(user_id, before=page.before, limit=page.limit + 1)
    shown = days[: page.limit]
    return {
        "daily_balances": shown,
        "next": shown[-1].day if len(days) > page.limit else None,
    }
