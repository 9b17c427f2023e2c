"""Routes of holds: amounts that are reserved for a time."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.keys import principal
from balance_app.balances.api.movements import (
    IF_MATCH,
    MOVEMENT_PROBLEMS,
    outcome_response,
    wanted_tags,
)
from balance_app.balances.api.schemas import (
    KEY_PATTERN,
    CaptureRequest,
    HoldAnswer,
    HoldRequest,
    HoldsAnswer,
    HoldsPageQuery,
    HoldStateAnswer,
    PathHoldId,
    PathUserId,
    hold_body,
    idempotency_key,
    split_id,
)
from balance_app.balances.errors import (
    CaptureExceedsHold,
    HoldEnded,
    HoldNotFound,
    UserFrozen,
    UserNotFound,
)
from balance_app.balances.holds import HoldRepository
from balance_app.balances.model import Movement
from balance_app.balances.repository import BalanceRepository
from balance_app.errors import InvalidRequest
from balance_app.http.body import BODY_PROBLEMS, read_json, read_optional_json
from balance_app.http.openapi import headers, json_request, problems
from balance_app.http.paging import cut_page
from balance_app.http.params import ONCE
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["holds"])


def _holds(request: Request) -> HoldRepository:
    return services(request)[HoldRepository]


@router.post(
    "/holds",
    summary="Place a hold",
    response_description="The amount is reserved.",
    status_code=201,
    response_model=HoldStateAnswer,
    responses={201: headers("Idempotent-Replayed", "Location"), **problems(*MOVEMENT_PROBLEMS)},
    openapi_extra=json_request(HoldRequest, key_pattern=KEY_PATTERN, parameters=[IF_MATCH]),
)
async def place_hold(request: Request) -> Response:
    """Reserve an amount: it stays in the balance, and can't be spent otherwise.

    It ends once: captured, voided, or expired after `expiresInSeconds` by the database's clock.
    """
    key = idempotency_key(request)
    tags = wanted_tags(request)
    body = await read_json(request, HoldRequest, key=key)
    movement = Movement(
        body.user_id,
        -body.amount,
        key,
        body.reference,
        body.note,
        seconds=body.expires_in_seconds,
        tags=tags,
        by=principal(request).name,
    )
    return outcome_response(await services(request)[BalanceRepository].hold(movement))


@router.get(
    "/holds/{holdId}",
    summary="Read a hold",
    response_description="The hold.",
    response_model=HoldAnswer,
    responses=problems(HoldNotFound, InvalidRequest),
)
async def read_hold(request: Request, hold_id: PathHoldId) -> dict[str, Any]:
    """Read a hold, and how it has ended."""
    return hold_body(await _holds(request).hold(*split_id(hold_id)))


@router.post(
    "/holds/{holdId}/capture",
    summary="Capture a hold",
    response_description="The amount is withdrawn and the rest released, durably.",
    response_model=HoldStateAnswer,
    responses={
        200: headers("Idempotent-Replayed"),
        **problems(*BODY_PROBLEMS, HoldNotFound, HoldEnded, CaptureExceedsHold, UserFrozen),
    },
    openapi_extra=json_request(CaptureRequest, required=False),
)
async def capture_hold(request: Request, hold_id: PathHoldId) -> Response:
    """Withdraw a hold's amount, or a part of it, and release the rest.

    It needs no `Idempotency-Key`: a hold ends once, and a further try to capture the same amount is
    answered as the first one.
    """
    body = await read_optional_json(request, CaptureRequest)
    outcome = await _holds(request).capture(
        *split_id(hold_id),
        amount=body.amount,
        reference=body.reference,
        note=body.note,
        by=principal(request).name,
    )
    return outcome_response(outcome)


@router.post(
    "/holds/{holdId}/void",
    summary="Void a hold",
    response_description="The amount is released.",
    response_model=HoldStateAnswer,
    responses={
        200: headers("Idempotent-Replayed"),
        **problems(HoldNotFound, HoldEnded, InvalidRequest),
    },
)
async def void_hold(request: Request, hold_id: PathHoldId) -> Response:
    """Release a hold; a further try is answered as the first one."""
    by = principal(request).name
    return outcome_response(await _holds(request).void(*split_id(hold_id), by=by))


@router.get(
    "/users/{userId}/holds",
    summary="List holds",
    response_description="One page of the user's holds.",
    response_model=HoldsAnswer,
    responses=problems(UserNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def list_holds(request: Request, user_id: PathUserId, page: HoldsPageQuery) -> dict[str, Any]:
    """List a user's holds in the order in which they were placed."""
    found = await _holds(request).holds(
        user_id, state=page.state, after=page.after, limit=page.limit + 1
    )
    shown, last = cut_page(found, page.limit)
    return {
        "holds": [hold_body(hold) for hold in shown],
        "next": None if last is None else last.number,
    }
