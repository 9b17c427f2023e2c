"""The routes of balances, and the one of them that must be fast."""

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.balances.errors import (
    BalanceLimitExceeded,
    IdempotencyKeyReused,
    InsufficientFunds,
    KeyNotFound,
    UserIdTaken,
    UserNotFound,
)
from balance_app.balances.repository import Account, BalanceRepository, Outcome
from balance_app.balances.schemas import (
    KEY_PATTERN,
    AccountAnswer,
    AccountsAnswer,
    ChangeAnswer,
    ChangeRequest,
    DailyBalancesAnswer,
    DaysPageQuery,
    EntriesAnswer,
    KeyAnswer,
    OpenRequest,
    PageQuery,
    PathKey,
    PathUserId,
    idempotency_key,
    outcome_body,
    outcome_status,
)
from balance_app.errors import PROBLEM_JSON, InvalidRequest
from balance_app.http.body import BODY_PROBLEMS, read_json
from balance_app.http.openapi import headers, json_request, problems
from balance_app.http.params import ONCE
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["balances"])


def _repository(request: Request) -> BalanceRepository:
    return services(request)[BalanceRepository]


@router.post(
    "/balance",
    summary="Change a balance",
    response_description="The change is made, and on disk.",
    response_model=ChangeAnswer,
    responses={
        200: headers("ETag"),
        **problems(
            *BODY_PROBLEMS,
            UserNotFound,
            InsufficientFunds,
            BalanceLimitExceeded,
            IdempotencyKeyReused,
        ),
    },
    openapi_extra=json_request(ChangeRequest, key_pattern=KEY_PATTERN),
)
async def change_balance(request: Request) -> Response:
    """Change a user's balance now: add `amount`, or withdraw when it is negative.

    The answer has the balance after exactly this change, and the `version` of its entry in the
    user's ledger. With an `Idempotency-Key` the request may be sent any number of times: it takes
    effect once, and every answer is the first one, byte for byte.
    """
    key = idempotency_key(request)
    body = await read_json(request, ChangeRequest, key=key)
    return _outcome_response(await _repository(request).change(body.user_id, body.amount, key))


@router.post(
    "/users",
    summary="Create a user",
    response_description="The user exists.",
    status_code=201,
    response_model=AccountAnswer,
    responses={
        201: headers("ETag", "Location"),
        **problems(*BODY_PROBLEMS, IdempotencyKeyReused, UserIdTaken),
    },
    openapi_extra=json_request(OpenRequest, key_pattern=KEY_PATTERN),
)
async def open_account(request: Request) -> Response:
    """Create a user; the opening balance becomes entry 1 of the ledger."""
    key = idempotency_key(request)
    body = await read_json(request, OpenRequest, key=key)
    return _outcome_response(await _repository(request).open(body.balance, key))


@router.get(
    "/users",
    summary="List users",
    response_description="One page of users.",
    response_model=AccountsAnswer,
    responses=problems(InvalidRequest),
    dependencies=[ONCE],
)
async def list_accounts(request: Request, page: PageQuery) -> dict[str, object]:
    """List users by id; `next` is the `after` of the following page."""
    accounts = await _repository(request).accounts(after=page.after, limit=page.limit + 1)
    shown = accounts[: page.limit]
    return {
        "users": shown,
        "next": shown[-1].user_id if len(accounts) > page.limit else None,
    }


@router.get(
    "/users/{userId}",
    summary="Read a user",
    response_description="The user's account.",
    response_model=AccountAnswer,
    responses={200: headers("ETag"), **problems(UserNotFound, InvalidRequest)},
)
async def read_account(request: Request, response: Response, user_id: PathUserId) -> Account:
    """Read a user's balance; the `ETag` is its version."""
    account = await _repository(request).account(user_id)
    response.headers["ETag"] = f'"{account.version}"'
    return account


@router.get(
    "/users/{userId}/entries",
    summary="Read a ledger",
    response_description="One page of the user's ledger.",
    response_model=EntriesAnswer,
    responses=problems(UserNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def list_entries(request: Request, user_id: PathUserId, page: PageQuery) -> dict[str, object]:
    """List a user's ledger, starting with the opening balance; the version is the cursor."""
    entries = await _repository(request).entries(user_id, after=page.after, limit=page.limit + 1)
    shown = entries[: page.limit]
    return {
        "entries": shown,
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
) -> dict[str, object]:
    """List a user's balances at the end of UTC days, the latest day first.

    A job records them every ten minutes, for users whose balance has changed: a day that is not
    listed ended with the balance of the day before it. `next` is the `before` of the next page.
    """
    days = await _repository(request).daily_balances(
        user_id, before=page.before, limit=page.limit + 1
    )
    shown = days[: page.limit]
    return {
        "daily_balances": shown,
        "next": shown[-1].day if len(days) > page.limit else None,
    }


@router.get(
    "/changes/{key:path}",
    summary="Read an outcome",
    response_description="The outcome of the request.",
    response_model=KeyAnswer,
    responses=problems(KeyNotFound, InvalidRequest),
)
async def read_outcome(request: Request, key: PathKey) -> dict[str, object]:
    """Return the outcome of the request with this key; resolves an `applied: "unknown"`."""
    outcome = await _repository(request).outcome(key)
    return {
        "key": key,
        "outcome": outcome.kind,
        "status": outcome_status(outcome),
        "answer": outcome_body(outcome),
    }


def _outcome_response(outcome: Outcome) -> Response:
    """Return the answer to a request that changes something."""
    refused = outcome.kind == "refused"
    headers = {} if refused else {"ETag": f'"{outcome.version}"'}
    if outcome.kind == "opened":
        headers["Location"] = f"/api/users/{outcome.user_id}"
    if outcome.replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(
        to_json(outcome_body(outcome)),
        status_code=outcome_status(outcome),
        headers=headers,
        media_type=PROBLEM_JSON if refused else "application/json",
    )
