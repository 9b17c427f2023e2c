"""The forms that move money, place and end holds, and change the settings of an account.

A form is safe to send twice. Changes, transfers and holds have a key, reversals and the ends of
holds happen once by themselves. Settings have the entity tag that the page was made with: what
somebody else has changed meanwhile is not overwritten unseen.
"""

import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import urlencode

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.keys import principal
from balance_app.balances.accounts import Account, AccountRepository, Opening, Patch
from balance_app.balances.api.schemas import LONGEST_HOLD_SECONDS, OpenRequest, SettingsRequest
from balance_app.balances.errors import IdempotencyKeyReused, VersionConflict
from balance_app.balances.holds import HoldRepository
from balance_app.balances.model import Accepted, Movement, Outcome, Refusal, Refused
from balance_app.balances.repository import BalanceRepository
from balance_app.errors import (
    DatabaseUnavailable,
    InvalidRequest,
    MalformedRequest,
    Overloaded,
    Problem,
)
from balance_app.http.body import parse_json
from balance_app.http.params import name_of
from balance_app.http.services import services
from balance_app.web.accounts import (
    NEEDS,
    PLACES,
    Attempt,
    OpeningAttempt,
    account_page,
    number_of,
    settings_of,
    users_page,
)
from balance_app.web.forms import (
    INCOMPLETE,
    described,
    go_to,
    key_of,
    positive,
    read_form,
    who,
    whole,
)
from balance_app.web.pages import Message, PageRoute
from balance_app.web.refusals import refusal
from balance_app.web.router import ChangeAttempt, overview_page
from balance_app.web.view_models import exact

UNITS: Final = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 24 * 3600}
# What would have been done with the amount of a form that is refused.
_WORDS: Final = {"add": "added", "transfer": "transferred", "hold": "held", "reverse": "taken back"}
_TAG: Final = re.compile(r"[0-9]{1,16}\.([0-9]{1,16})\.[0-9]{1,16}", re.ASCII)

Form: TypeAlias = Mapping[str, str]
# What a form did: the query of the page that shows it, or the refusal.
Done: TypeAlias = dict[str, object] | Refused

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.post("/change")
async def change_balance(request: Request) -> Response:
    """Change a balance from the overview."""
    form = await read_form(request)
    form["user"] = re.sub(r"\s", "", form.get("user", ""))
    try:
        key_of(form)
        user_id = positive(form, "user")
        done = await _change(request, user_id, form)
        if not isinstance(done, Refused):
            return go_to(f"/?user={user_id}&entry={done['entry']}#balances")
        raise done.problem
    except MalformedRequest:
        raise
    except Problem as problem:
        attempt = ChangeAttempt(
            form, _message(problem, form), problem.status, keep_key=_keeps_key(problem)
        )
    return await overview_page(request, attempt=attempt)


@router.post("/users/{user_id}")
async def change_account(request: Request, user_id: str) -> Response:
    """Do what a form of the account's page says.

    All of them are sent to the page's own address, so that it stays when a form is refused.
    """
    form = await read_form(request)
    user = number_of(user_id)
    do = form.get("do", "")
    action = _ACTIONS.get(do)
    if action is None:
        raise MalformedRequest(INCOMPLETE)
    principal(request).require(*NEEDS[do])
    try:
        done = await action(request, user, form)
        if not isinstance(done, Refused):
            query = urlencode({"did": do, **done})
            return go_to(f"/users/{user}?{query}#{PLACES[do]}")
        raise done.problem
    except MalformedRequest:
        raise
    except Problem as problem:
        undecided = isinstance(problem, DatabaseUnavailable | Overloaded)
        attempt = Attempt(
            form,
            _message(problem, form),
            problem.status,
            headers=problem.headers if undecided else None,
            keep_key=_keeps_key(problem),
        )
    return await account_page(request, user, attempt)


@router.post("/users")
async def open_account(request: Request) -> Response:
    """Create a user, once however often the form is sent; go to the account's page."""
    form = await read_form(request)
    key = key_of(form)
    try:
        given = {
            "balance": whole(form, "balance"),
            "floor": whole(form, "floor"),
            "externalId": form.get("externalId", "").strip() or None,
        }
        asked = parse_json(to_json(given), OpenRequest)
        opened = await services(request)[AccountRepository].open(
            Opening(asked.balance, asked.floor, asked.external_id), key, principal(request).name
        )
    except Problem as problem:
        undecided = isinstance(problem, DatabaseUnavailable | Overloaded)
        attempt = OpeningAttempt(
            form,
            Message("bad", refusal(problem, "")),
            problem.status,
            headers=problem.headers if undecided else None,
            keep_key=_keeps_key(problem),
        )
        return await users_page(request, attempt)
    return go_to(f"/users/{opened.account.user_id}?did=open")


def _message(problem: Problem, form: Form) -> Message:
    do = form.get("do") or form.get("what", "")
    return Message("bad", refusal(problem, _WORDS.get(do, "withdrawn")))


def _keeps_key(problem: Problem) -> bool:
    """Say whether a form keeps its key: nothing is recorded under it, or that is not known."""
    return not isinstance(problem, Refusal | IdempotencyKeyReused | VersionConflict)


# -- money -----------------------------------------------------------------------------------


async def _change(request: Request, user_id: int, form: Form) -> Done:
    amount, what = positive(form, "amount"), form.get("what")
    if what not in {"withdraw", "add"}:
        raise InvalidRequest(("/what", "not-withdraw-or-add"))
    if what == "add":
        principal(request).require("change")
    return await _move(
        request, BalanceRepository.change, form, user_id, amount if what == "add" else -amount
    )


async def _transfer(request: Request, user_id: int, form: Form) -> Done:
    to_user_id = positive(form, "to")
    if to_user_id == user_id:
        raise InvalidRequest(("/same", "same-user"))
    amount = -positive(form, "amount")
    return await _move(
        request, BalanceRepository.transfer, form, user_id, amount, to_user_id=to_user_id
    )


async def _hold(request: Request, user_id: int, form: Form) -> Done:
    amount = -positive(form, "amount")
    seconds = positive(form, "lasts") * UNITS.get(form.get("unit", ""), 0)
    if not 1 <= seconds <= LONGEST_HOLD_SECONDS:
        raise InvalidRequest(("/lasts", "out-of-range"))
    return await _move(request, BalanceRepository.hold, form, user_id, amount, seconds=seconds)


async def _move(  # noqa: PLR0913 - the parts of a movement
    request: Request,
    method: Callable[[BalanceRepository, Movement], Coroutine[Any, Any, Outcome]],
    form: Form,
    user_id: int,
    amount: int,
    *,
    to_user_id: int | None = None,
    seconds: int | None = None,
) -> Done:
    said = described(form)
    movement = Movement(
        user_id,
        amount,
        key_of(form),
        said.reference,
        said.note,
        to_user_id=to_user_id,
        seconds=seconds,
        by=principal(request).name,
    )
    return _made(await method(services(request)[BalanceRepository], movement), user_id)


async def _reverse(request: Request, user_id: int, form: Form) -> Done:
    said = described(form)
    outcome = await services(request)[BalanceRepository].reverse(
        user_id,
        positive(form, "entry"),
        reference=said.reference,
        note=said.note,
        by=principal(request).name,
    )
    done = _made(outcome, user_id)
    if isinstance(outcome, Accepted) and outcome.replayed and isinstance(done, dict):
        return {**done, "again": 1}
    return done


async def _capture(request: Request, user_id: int, form: Form) -> Done:
    said = described(form)
    return _made(
        await services(request)[HoldRepository].capture(
            user_id,
            _hold_of(form),
            amount=positive(form, "amount"),
            reference=said.reference,
            note=said.note,
            by=principal(request).name,
        ),
        user_id,
    )


async def _void(request: Request, user_id: int, form: Form) -> Done:
    by = principal(request).name
    ended = await services(request)[HoldRepository].void(user_id, _hold_of(form), by=by)
    return _made(ended, user_id)


def _hold_of(form: Form) -> int:
    try:
        return positive(form, "hold")
    except InvalidRequest:
        raise MalformedRequest(INCOMPLETE) from None


def _made(outcome: Outcome, user_id: int) -> Done:
    """Return where the page shows what was done to a user: an entry, or a hold."""
    if isinstance(outcome, Refused):
        return outcome
    hold = outcome.hold
    if hold is not None:
        return {"entry": hold.version} if hold.captured is not None else {"hold": hold.number}
    halves = [half for half in (outcome.entry, outcome.other) if half is not None]
    return {"entry": next(half.version for half in halves if half.user_id == user_id)}


# -- settings --------------------------------------------------------------------------------


async def _settings(request: Request, user_id: int, form: Form) -> Done:
    given = {
        "floor": whole(form, "floor"),
        "externalId": form.get("externalId", "").strip() or None,
    }
    asked = parse_json(to_json(given), SettingsRequest)
    patch = Patch(
        floor=asked.floor,
        external_id=asked.external_id,
        names=True,
        settings_versions=[_settings_version(form)],
    )
    return await _set(request, user_id, patch, form)


async def _freeze(request: Request, user_id: int, form: Form) -> Done:
    patch = Patch(
        frozen=form["do"] == "freeze",
        settings_versions=[_settings_version(form)],
    )
    return await _set(request, user_id, patch, form)


async def _set(request: Request, user_id: int, patch: Patch, form: Form) -> Done:
    """Change settings; they may have been changed so before, as when a form is sent twice."""
    accounts, by = services(request)[AccountRepository], name_of(request, who(form))
    try:
        await accounts.change_settings(user_id, patch, by)
    except VersionConflict as conflict:
        account = await accounts.account(user_id)
        if not _has(account, patch):
            conflict.detail = await _conflict(accounts, account)
            raise
    return {}


def _has(account: Account, patch: Patch) -> bool:
    return (
        patch.floor in {None, account.floor}
        and patch.frozen in {None, account.frozen}
        and (not patch.names or patch.external_id == account.external_id)
    )


async def _conflict(accounts: AccountRepository, account: Account) -> str:
    changes = await accounts.settings(account.user_id, after=account.settings_version - 1, limit=1)
    who_and_when = "".join(f" ({each.by or 'api'}, {exact(each.at)})" for each in changes)
    return (
        f"Somebody else changed the settings in the meantime{who_and_when}. Now "
        f"{settings_of(account)}. Nothing was changed; press the button again to overwrite them."
    )


def _settings_version(form: Form) -> int:
    tag = _TAG.fullmatch(form.get("tag", ""))
    if tag is None:
        raise MalformedRequest(INCOMPLETE)
    return int(tag[1])


_ACTIONS: Final[dict[str, Callable[[Request, int, Form], Coroutine[Any, Any, Done]]]] = {
    "change": _change,
    "transfer": _transfer,
    "hold": _hold,
    "reverse": _reverse,
    "capture": _capture,
    "void": _void,
    "settings": _settings,
    "freeze": _freeze,
    "thaw": _freeze,
}
