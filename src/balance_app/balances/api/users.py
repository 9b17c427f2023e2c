"""Routes of users: creating them, finding them, and the settings of their accounts."""

import re
from typing import Any, Final

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.keys import principal
from balance_app.balances.accounts import Account, AccountRepository, Opening, Patch
from balance_app.balances.api.schemas import (
    KEY_PATTERN,
    AccountAnswer,
    AccountsAnswer,
    OnceRequest,
    OpenRequest,
    PageQuery,
    PastAnswer,
    PastQueryParams,
    PathExternalId,
    PathUserId,
    SettingsPageAnswer,
    SettingsRequest,
    UsersPageQuery,
    account_body,
    idempotency_key,
)
from balance_app.balances.errors import (
    EntryNotFound,
    ExternalIdTaken,
    FloorNotCovered,
    IdempotencyKeyReused,
    PreconditionRequired,
    UserIdTaken,
    UserNotFound,
    VersionConflict,
)
from balance_app.balances.ledger import LedgerRepository
from balance_app.errors import InvalidRequest, MalformedRequest
from balance_app.http.body import BODY_PROBLEMS, read_json, read_optional_json
from balance_app.http.conditional import ANY, if_match, matches_none
from balance_app.http.openapi import headers, json_request, problems, tags_parameter
from balance_app.http.paging import cut_page
from balance_app.http.params import ONCE, WhoQuery, name_of
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["users"])

# of an account, as `State.tag`; the part of its settings is the group
_TAG: Final = re.compile(r"[1-9][0-9]{0,15}\.([1-9][0-9]{0,15})\.(?:0|[1-9][0-9]{0,15})", re.ASCII)


def _accounts(request: Request) -> AccountRepository:
    return services(request)[AccountRepository]


@router.post(
    "/users",
    summary="Create a user",
    response_description="The user exists.",
    status_code=201,
    response_model=AccountAnswer,
    responses={
        201: headers("ETag", "Location", "Idempotent-Replayed"),
        **problems(
            *BODY_PROBLEMS, IdempotencyKeyReused, ExternalIdTaken, FloorNotCovered, UserIdTaken
        ),
    },
    openapi_extra=json_request(OpenRequest, key_pattern=KEY_PATTERN),
)
async def open_account(request: Request) -> Response:
    """Create a user; the opening balance becomes entry 1 of the ledger.

    The `Idempotency-Key` is one of the whole service, as there is no account yet that it could
    belong to.
    """
    key = idempotency_key(request)
    body = await read_json(request, OpenRequest, key=key)
    opening = Opening(body.balance, body.floor, body.external_id)
    opened = await _accounts(request).open(opening, key, principal(request).name)
    replayed = {"Idempotent-Replayed": "true"} if opened.replayed else {}
    return _response(opened.account, status=201, **replayed)


@router.get(
    "/users",
    summary="List users",
    response_description="One page of users.",
    response_model=AccountsAnswer,
    responses=problems(InvalidRequest),
    dependencies=[ONCE],
)
async def list_accounts(request: Request, page: UsersPageQuery) -> dict[str, Any]:
    """List users by id; `next` is the `after` of the following page."""
    accounts = _accounts(request)
    if page.external_id is not None:
        named = await accounts.by_external_id(page.external_id)
        found = [] if named is None or named.user_id <= page.after else [named]
    else:
        found = await accounts.accounts(after=page.after, limit=page.limit + 1)
    shown, last = cut_page(found, page.limit)
    return {
        "users": [account_body(account) for account in shown],
        "next": None if last is None else last.user_id,
    }


@router.put(
    "/users/by-external-id/{externalId:text}",
    summary="Create a user once",
    response_description="The user already existed.",
    response_model=AccountAnswer,
    responses={
        200: headers("ETag"),
        201: {
            "description": "The user was created.",
            "model": AccountAnswer,
            **headers("ETag", "Location"),
        },
        **problems(*BODY_PROBLEMS, FloorNotCovered, UserIdTaken),
    },
    openapi_extra=json_request(OnceRequest, required=False),
)
async def open_account_once(request: Request, external_id: PathExternalId) -> Response:
    """Create the user with this external id, or return the one who is there already.

    An account that is there is not changed, whatever the body says.
    """
    body = await read_optional_json(request, OnceRequest)
    account, created = await _accounts(request).open_once(
        Opening(body.balance, body.floor, external_id), principal(request).name
    )
    return _response(account, status=201 if created else 200)


@router.get(
    "/users/{userId}",
    summary="Read a user",
    response_description="The user's account.",
    response_model=AccountAnswer | PastAnswer,
    responses={
        200: headers("ETag"),
        304: {
            "description": "It still has the entity tag in `If-None-Match`.",
            **headers("ETag"),
        },
        **problems(UserNotFound, EntryNotFound, InvalidRequest, MalformedRequest),
    },
    dependencies=[ONCE],
    openapi_extra={
        "parameters": [
            tags_parameter("If-None-Match", "An `ETag` of the account that need not be sent again.")
        ]
    },
)
async def read_account(request: Request, user_id: PathUserId, moment: PastQueryParams) -> Response:
    """Read a user's account; its `ETag` changes with each change of it.

    With `at` or `version` it is a past balance, read from the ledger: that after the last entry up
    to a time, or after one entry.
    """
    if moment.at is None and moment.version is None:
        account = await _accounts(request).account(user_id)
        if not matches_none(request, account.tag):
            return Response(status_code=304, headers={"ETag": f'"{account.tag}"'})
        return _response(account)
    if moment.at is not None and moment.version is not None:
        raise InvalidRequest(("query:version", "not-with-at"))
    entry = await services(request)[LedgerRepository].past(
        user_id, at=moment.at, version=moment.version
    )
    past = {
        "userId": user_id,
        "version": entry.version,
        "balance": entry.balance,
        "held": entry.held,
        "at": entry.at,
    }
    return Response(to_json(past), media_type="application/json")


@router.patch(
    "/users/{userId}",
    summary="Change settings",
    response_description="The account with its new settings.",
    response_model=AccountAnswer,
    responses={
        200: headers("ETag"),
        **problems(
            *BODY_PROBLEMS,
            UserNotFound,
            FloorNotCovered,
            ExternalIdTaken,
            VersionConflict,
            PreconditionRequired,
        ),
    },
    dependencies=[ONCE],
    openapi_extra=json_request(
        SettingsRequest,
        parameters=[
            tags_parameter("If-Match", "The `ETag` of the account, several, or `*`.", required=True)
        ],
    ),
)
async def change_settings(request: Request, user_id: PathUserId, who: WhoQuery) -> Response:
    """Change an account's floor, freeze or unfreeze it, or name it.

    `If-Match` has the account's `ETag`; only the settings in it need to be still the same, so that
    a busy account can be changed, too.
    """
    tags = if_match(request)
    if tags is None:
        raise PreconditionRequired
    body = await read_json(request, SettingsRequest, key=None)
    patch = Patch(
        body.floor,
        body.frozen,
        body.external_id,
        names="external_id" in body.model_fields_set,
        settings_versions=None if tags == ANY else [_settings_version(tag) for tag in tags],
    )
    return _response(
        await _accounts(request).change_settings(user_id, patch, name_of(request, who.by))
    )


@router.get(
    "/users/{userId}/settings",
    summary="List changes of settings",
    response_description="One page of changes.",
    response_model=SettingsPageAnswer,
    responses=problems(UserNotFound, InvalidRequest),
    dependencies=[ONCE],
)
async def list_settings(request: Request, user_id: PathUserId, page: PageQuery) -> dict[str, Any]:
    """List the settings that an account had, and who set them; `settingsVersion` is the cursor."""
    found = await _accounts(request).settings(user_id, after=page.after, limit=page.limit + 1)
    shown, last = cut_page(found, page.limit)
    return {
        "settings": shown,
        "next": None if last is None else last.settings_version,
    }


def _settings_version(tag: str) -> int:
    """Return the settings' version of an entity tag; 0, which none has, for one of another form."""
    parts = _TAG.fullmatch(tag)
    return 0 if parts is None else int(parts[1])


def _response(account: Account, *, status: int = 200, **more: str) -> Response:
    sent = {"ETag": f'"{account.tag}"', **more}
    if status == 201:  # noqa: PLR2004 - created
        sent["Location"] = f"/api/users/{account.user_id}"
    return Response(
        to_json(account_body(account)),
        status_code=status,
        headers=sent,
        media_type="application/json",
    )
