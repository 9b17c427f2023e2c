"""The page of the actions that were recorded: who did what, to what."""

import re
from typing import Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.actions import ActionRepository
from balance_app.errors import InvalidRequest
from balance_app.http.actions import LONGEST_NAME, LONGEST_SUBJECT
from balance_app.http.body import MAX_INTEGER
from balance_app.http.paging import cut_page
from balance_app.http.params import PRINTABLE_PATTERN
from balance_app.http.services import services
from balance_app.web.pages import PageRoute, is_number, respond, stream_of

ACTIONS_ON_PAGE: Final = 50

_PAGES: Final = {"job": "/jobs/", "user": "/users/"}

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/actions")
async def list_actions(request: Request) -> Response:
    """List actions, the latest first: all, those by one principal, those to one subject."""
    given = {
        name: _filter(request, name, longest)
        for name, longest in (("by", LONGEST_NAME), ("subject", LONGEST_SUBJECT))
    }
    before = request.query_params.get("before", "")
    if before and not is_number(before):
        raise InvalidRequest(
            ("query:before", "not-an-integer"),
            sentence='Wrong address: "before" must be a whole number, 1 or more.',
        )
    await stream_of(request).refresh()
    found = await services(request)[ActionRepository].page(
        by=given["by"] or None,
        subject=given["subject"] or None,
        before=int(before or MAX_INTEGER),
        limit=ACTIONS_ON_PAGE + 1,
    )
    shown, last = cut_page(found, ACTIONS_ON_PAGE)
    named = {name: text for name, text in given.items() if text}
    view = {
        **given,
        "actions": shown,
        "first": urlencode(named) if before else None,
        "next": None if last is None else urlencode({**named, "before": last.id}),
        "filtered": lambda name, text: urlencode({name: text}),
        "page_of": _page_of,
        "members": _members,
    }
    return respond(request, "actions.html", view)


def _filter(request: Request, name: str, longest: int) -> str:
    text = request.query_params.get(name, "").strip()
    if text and (len(text) > longest or not re.fullmatch(PRINTABLE_PATTERN, text)):
        raise InvalidRequest(
            (f"query:{name}", "not-printable"),
            sentence=f"This filter has at most {longest} printable characters.",
        )
    return text


def _page_of(subject: str) -> str | None:
    """Return the address of a subject's page, if it has one."""
    kind, _, name = subject.partition(" ")
    return None if kind not in _PAGES else _PAGES[kind] + name


def _members(state: dict[str, Any] | None) -> str:
    """Return what something was or is, as a clause."""
    return ", ".join(f"{name}: {_text(value)}" for name, value in (state or {}).items())


def _text(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else to_json(value).decode()
