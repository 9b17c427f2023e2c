"""Routes that move money, and one of them that must be fast."""

from typing import Any

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.keys import principal
from balance_app.balances.api.schemas import (
    KEY_PATTERN,
    ChangeAnswer,
    ChangeRequest,
    Described,
    KeyAnswer,
    PathKey,
    PathTransferId,
    PathUserId,
    PathVersion,
    TransferAnswer,
    TransferRequest,
    accepted_body,
    accepted_status,
    idempotency_key,
    split_id,
    transfer_body,
)
from balance_app.balances.errors import (
    BalanceLimitExceeded,
    EntryNotFound,
    IdempotencyKeyReused,
    InsufficientFunds,
    KeyNotFound,
    NotReversible,
    TransferNotFound,
    UserFrozen,
    UserNotFound,
    VersionConflict,
)
from balance_app.balances.model import Accepted, Movement, Outcome, kind_of
from balance_app.balances.repository import BalanceRepository
from balance_app.errors import InvalidRequest
from balance_app.http.body import BODY_PROBLEMS, read_json, read_optional_json
from balance_app.http.conditional import ANY, if_match
from balance_app.http.openapi import headers, json_request, problems, tags_parameter
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["balances"])

REFUSALS = (UserNotFound, InsufficientFunds, BalanceLimitExceeded, UserFrozen)
IF_MATCH = tags_parameter(
    "If-Match", "The `ETag` of the account, several, or `*`; with another nothing is changed."
)
MOVEMENT_PROBLEMS = (*BODY_PROBLEMS, *REFUSALS, VersionConflict, IdempotencyKeyReused)


def _repository(request: Request) -> BalanceRepository:
    return services(request)[BalanceRepository]


@router.post(
    "/balance",
    summary="Change a balance",
    response_description="The change is made and durable.",
    response_model=ChangeAnswer,
    responses={200: headers("Idempotent-Replayed"), **problems(*MOVEMENT_PROBLEMS)},
    openapi_extra=json_request(ChangeRequest, key_pattern=KEY_PATTERN, parameters=[IF_MATCH]),
)
async def change_balance(request: Request) -> Response:
    """Change a user's balance now: add `amount`, or withdraw when it is negative.

    The answer has the account after exactly this change, and the `version` of its entry in the
    user's ledger. With an `Idempotency-Key` the request may be sent any number of times: it takes
    effect once, and every answer is the first one, byte for byte. With `If-Match` it is only made
    if the account has not changed since its `ETag` was read.
    """
    key = idempotency_key(request)
    tags = wanted_tags(request)
    body = await read_json(request, ChangeRequest, key=key)
    sender = principal(request)
    if body.amount > 0:
        sender.require("change")
    movement = Movement(
        body.user_id, body.amount, key, body.reference, body.note, tags=tags, by=sender.name
    )
    return outcome_response(await _repository(request).change(movement))


@router.post(
    "/transfers",
    summary="Transfer",
    response_description="Both accounts are changed, durably.",
    response_model=TransferAnswer,
    responses={200: headers("Idempotent-Replayed"), **problems(*MOVEMENT_PROBLEMS)},
    openapi_extra=json_request(TransferRequest, key_pattern=KEY_PATTERN, parameters=[IF_MATCH]),
)
async def transfer(request: Request) -> Response:
    """Move an amount from one user to another: both accounts change, or none.

    The `Idempotency-Key` belongs to the paying user, as does the entity tag in `If-Match`. A
    refusal names the user whose account does not allow it.
    """
    key = idempotency_key(request)
    tags = wanted_tags(request)
    body = await read_json(request, TransferRequest, key=key)
    if body.from_user_id == body.to_user_id:
        raise InvalidRequest(("/toUserId", "same-user"))
    movement = Movement(
        body.from_user_id,
        -body.amount,
        key,
        body.reference,
        body.note,
        to_user_id=body.to_user_id,
        tags=tags,
        by=principal(request).name,
    )
    return outcome_response(await _repository(request).transfer(movement))


@router.get(
    "/transfers/{transferId}",
    summary="Read a transfer",
    response_description="The transfer.",
    response_model=TransferAnswer,
    responses=problems(TransferNotFound, InvalidRequest),
)
async def read_transfer(request: Request, transfer_id: PathTransferId) -> dict[str, Any]:
    """Read a transfer, and what both accounts had just after it."""
    made, reversal = await _repository(request).transfer_of(*split_id(transfer_id))
    assert made.entry is not None and made.other is not None  # noqa: S101, PT018 - its halves
    return transfer_body(made.entry, made.other, reversal and reversal.entry)


@router.post(
    "/users/{userId}/entries/{version}/reverse",
    summary="Reverse an entry",
    response_description="The entry is undone by an opposite one, durably.",
    response_model=ChangeAnswer | TransferAnswer,
    responses={
        200: headers("Idempotent-Replayed"),
        **problems(*BODY_PROBLEMS, *REFUSALS, EntryNotFound, NotReversible),
    },
    openapi_extra=json_request(Described, required=False),
)
async def reverse(request: Request, user_id: PathUserId, version: PathVersion) -> Response:
    """Undo an entry by an opposite one that names it; of a transfer both halves.

    It needs no `Idempotency-Key`: an entry is reversed once, and every further try is answered with
    the first reversal. It is refused where the account no longer has the money.
    """
    body = await read_optional_json(request, Described)
    outcome = await _repository(request).reverse(
        user_id,
        version,
        reference=body.reference,
        note=body.note,
        by=principal(request).name,
    )
    return outcome_response(outcome)


@router.get(
    "/users/{userId}/changes/{key:text}",
    summary="Read the outcome of a key",
    response_description="The outcome of the request.",
    response_model=KeyAnswer,
    responses=problems(KeyNotFound, InvalidRequest),
)
async def read_outcome(request: Request, user_id: PathUserId, key: PathKey) -> dict[str, Any]:
    """Return the outcome of the user's request with this key; resolves an `applied: "unknown"`.

    Without the scope `read` only that of one's own requests.
    """
    recorded = await _repository(request).recorded(user_id, key)
    outcome, sender = recorded.outcome, principal(request)
    if "read" not in sender.scopes and recorded.by not in {None, sender.name}:
        raise KeyNotFound
    answer: dict[str, Any]
    if isinstance(outcome, Accepted):
        answer = {
            "outcome": "accepted",
            "status": accepted_status(outcome),
            "answer": accepted_body(outcome),
        }
    else:
        problem = outcome.problem
        answer = {"outcome": "refused", "status": problem.status, "answer": problem.body()}
    return {"key": key, "kind": kind_of(recorded.request), "by": recorded.by, **answer}


def wanted_tags(request: Request) -> list[str] | None:
    """Return the entity tags of which the account must have one, None for any."""
    tags = if_match(request)
    return None if tags == ANY else tags


def outcome_response(outcome: Outcome) -> Response:
    """Return the answer to a request that moves money, or ends a hold."""
    replayed = {"Idempotent-Replayed": "true"} if outcome.replayed else {}
    if not isinstance(outcome, Accepted):
        response = outcome.problem.response()
        response.headers.update(replayed)
        return response
    if outcome.hold is not None and outcome.hold.state == "open":
        replayed["Location"] = f"/api/holds/{outcome.hold.user_id}-{outcome.hold.number}"
    return Response(
        to_json(accepted_body(outcome)),
        status_code=accepted_status(outcome),
        headers=replayed,
        media_type="application/json",
    )
