"""Routes of ledgers: a user's entries, and past balances."""

from typing import Any, Final

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.errors import TooManyRequests
from balance_app.balances.api.export import (
    CSV,
    EXPORT_CONTENT,
    JSON_LINES,
    Exporter,
    ExportResponse,
)
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
from balance_app.errors import InvalidRequest, NotAcceptable
from balance_app.http.negotiation import preferred
from balance_app.http.openapi import headers, problems
from balance_app.http.paging import cut_page
from balance_app.http.params import ONCE
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["ledger"])

JSON: Final = "application/json"


def _ledger(request: Request) -> LedgerRepository:
    return services(request)[LedgerRepository]


@router.get(
    "/users/{userId}/entries",
    summary="List or export entries",
    response_description="One page of the user's ledger, or an export.",
    response_model=EntriesAnswer,
    responses={
        200: {"content": EXPORT_CONTENT, **headers("Content-Disposition", "Vary")},
        **problems(UserNotFound, NotAcceptable, InvalidRequest, TooManyRequests),
    },
    dependencies=[ONCE],
)
async def list_entries(request: Request, user_id: PathUserId, page: EntriesPageQuery) -> Response:
    """List a user's ledger, the opening balance first; the version is the cursor.

    With `Accept: text/csv` or `application/jsonl` the answer is an export: all entries (of the same
    selection, in the same order, from `after` on) that are there when it begins, without `limit`.
    Its last line says that it is complete, and repeats the number of entries, the first and the
    last version, the sum of the amounts, and the balance after the last one. An export that broke
    off has no such line; `after` its last entry the next one goes on.

    In CSV the last line begins with `complete`, and has the rest in the column `note`. A key,
    reference, note or name that a spreadsheet would take for a formula, or that begins with an
    apostrophe, has one more apostrophe before it. JSON lines have every text as it is.
    """
    media_type = preferred(request, (JSON, CSV, JSON_LINES))
    selection = Selection(page.begin, page.end, page.reference)
    descending = page.order == "desc"
    if media_type != JSON:
        if "limit" in page.model_fields_set:
            raise InvalidRequest(("query:limit", "not-with-export"))
        pages = _ledger(request).export(user_id, selection, after=page.after, descending=descending)
        return ExportResponse(services(request)[Exporter], user_id, pages, media_type)
    entries = await _ledger(request).entries(
        user_id, selection, after=page.after, limit=page.limit + 1, descending=descending
    )
    shown, last = cut_page(entries, page.limit)
    body = {
        "entries": [entry_body(entry) for entry in shown],
        "next": None if last is None else last.version,
    }
    return Response(to_json(body), headers={"Vary": "Accept"}, media_type=JSON)


@router.get(
    "/users/{userId}/daily-balances",
    summary="List daily balances",
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
    shown, last = cut_page(days, page.limit)
    return {
        "daily_balances": shown,
        "next": None if last is None else last.day,
    }
