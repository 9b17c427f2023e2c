"""The route of the actions that were recorded: who did what, to what."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.requests import Request

from balance_app.access.actions import ActionRepository
from balance_app.errors import InvalidRequest
from balance_app.http.body import MAX_INTEGER
from balance_app.http.openapi import problems
from balance_app.http.paging import BeforeId, Limit, cut_page
from balance_app.http.params import ONCE, QueryModel, printable, printable_schema
from balance_app.http.services import services

router = APIRouter(prefix="/api", tags=["actions"])

LONGEST_NAME = 100
LONGEST_SUBJECT = 200


class ActionsPage(QueryModel):
    """Which actions: those with ids below a cursor."""

    by: Annotated[
        str | None,
        Field(
            description="only those by this one: the name of a key",
            json_schema_extra=printable_schema(LONGEST_NAME),
            examples=["till-1"],
        ),
        printable(LONGEST_NAME),
    ] = None
    subject: Annotated[
        str | None,
        Field(
            description="only those that changed this: `job NAME`, `user ID` or `key NAME`",
            json_schema_extra=printable_schema(LONGEST_SUBJECT),
            examples=["job audit-ledger"],
        ),
        printable(LONGEST_SUBJECT),
    ] = None
    before: BeforeId = MAX_INTEGER
    limit: Limit = 100


ActionsPageQuery = Annotated[ActionsPage, Query()]


class ActionAnswer(BaseModel):
    """One action, what it was before, and what it is after it."""

    id: Annotated[int, Field(examples=[7])]
    at: Annotated[datetime, Field(examples=["2026-11-21T21:49:33.940623Z"])]
    by: Annotated[
        str | None,
        Field(
            examples=["till-1"],
            description="the name of the key; where none is needed, who the request names, or null",
        ),
    ]
    action: Annotated[str, Field(examples=["job schedule set"])]
    subject: Annotated[str, Field(examples=["job audit-ledger"])]
    before: Annotated[dict[str, Any] | None, Field(examples=[{"schedule": "every 300 s"}])]
    after: Annotated[dict[str, Any] | None, Field(examples=[{"schedule": "every 60 s"}])]


class ActionsAnswer(BaseModel):
    """A page of actions; `next` is the `before` of the page after it, null on the last."""

    actions: list[ActionAnswer]
    next: Annotated[int | None, Field(examples=[None])]


@router.get(
    "/actions",
    summary="List actions",
    response_description="One page of actions.",
    response_model=ActionsAnswer,
    responses=problems(InvalidRequest),
    dependencies=[ONCE],
)
async def list_actions(request: Request, page: ActionsPageQuery) -> dict[str, Any]:
    """List what was done to keys, jobs, users and their settings, the latest first.

    What changed nothing is not among them. Movements of money are not either: entries and holds
    have their own `by`.
    """
    found = await services(request)[ActionRepository].page(
        by=page.by, subject=page.subject, before=page.before, limit=page.limit + 1
    )
    shown, last = cut_page(found, page.limit)
    return {
        "actions": [action._asdict() for action in shown],
        "next": None if last is None else last.id,
    }
