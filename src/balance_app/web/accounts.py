"""The pages of users: finding them, and an account with its statement, holds and forms."""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from secrets import token_urlsafe
from typing import Final, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from balance_app.access.routes import CHANGE, MAKE, WITHDRAW, Needs
from balance_app.balances.accounts import Account, AccountRepository, Settings
from balance_app.balances.errors import HoldNotFound, UserNotFound
from balance_app.balances.holds import HoldRepository
from balance_app.balances.ledger import LedgerRepository, Selection
from balance_app.balances.model import Entry, Hold
from balance_app.errors import DatabaseUnavailable, InvalidRequest, Overloaded, Problem
from balance_app.http.paging import cut_page
from balance_app.http.params import PRINTABLE_PATTERN
from balance_app.http.services import services
from balance_app.web import charts
from balance_app.web.forms import go_to
from balance_app.web.pages import (
    NO_USER,
    Message,
    PageRoute,
    is_number,
    may,
    respond,
    stream_of,
)
from balance_app.web.queries import ListedAccount, PageQueries
from balance_app.web.view_models import exact, number

USERS_ON_PAGE: Final = 25
ENTRIES_ON_PAGE: Final = 25
HOLDS_ON_PAGE: Final = 5
DAYS_DRAWN: Final = 90
ENTRIES_DRAWN: Final = 100
SETTINGS_ON_PAGE: Final = 5
REFRESH_SECONDS: Final = 3  # how often a list or an account is loaded again while it is looked at
SORTS: Final = {"": "account", "balance": "balance", "changed": "latest change"}
# What an external id and a reference may be.
LONGEST_TEXT: Final = 200

_NO_REFERENCE: Final = "The reference may have at most 200 printable characters."


class Attempt(NamedTuple):
    """What a form of the account's page requested, and its outcome."""

    form: Mapping[str, str]
    message: Message
    status: int
    headers: Mapping[str, str] | None = None
    # nothing is recorded under its key, or that is not known: the form keeps its key and its tag,
    # so that it is safe to send it again
    keep_key: bool = False


class OpeningAttempt(NamedTuple):
    """What the form that creates a user requested, and its outcome."""

    form: Mapping[str, str]
    message: Message
    status: int
    headers: Mapping[str, str] | None = None
    keep_key: bool = False


class Statement(NamedTuple):
    """Entries of a page, the latest first, and the queries of the pages beside it."""

    entries: list[Entry]
    # the reversals of those entries that are reversed, by their versions
    reversals: dict[int, int]
    newer: str | None
    older: str | None


class SettingsHistory(NamedTuple):
    """Changes of settings, the latest first, and the query of the earlier ones."""

    changes: list[Settings]
    older: str | None


class Holds(NamedTuple):
    """Open holds of an account, the oldest first; `shown` is one that was asked for."""

    open: list[Hold]
    more: str | None
    shown: Hold | None


router = APIRouter(route_class=PageRoute, include_in_schema=False)


# -- users -----------------------------------------------------------------------------------


@router.get("/users")
async def list_users(request: Request) -> Response:
    """List users by id, or find them by id or external id; go to the page of the only one."""
    return await users_page(request)


async def users_page(request: Request, attempt: OpeningAttempt | None = None) -> Response:
    """Return the list of users, also with the outcome of the form that creates one.

    When they can't be read, the page of a form that was sent has that form alone.

    Raises:
        InvalidRequest: a parameter of the query is invalid.
    """
    query = request.query_params
    sought, after = query.get("find", "").strip(), _cursor(request, "after")
    sort = query.get("sort", "") if query.get("sort", "") in SORTS else ""
    accounts = services(request)[AccountRepository]
    queries = services(request)[PageQueries]
    found: list[ListedAccount] | None
    can_sort = True
    try:
        await stream_of(request).refresh()
        if sought:
            matching = await _find(accounts, sought)
            if len(matching) == 1:
                return go_to(f"/users/{matching[0].user_id}")
            found = [ListedAccount(account, None) for account in matching]
        else:
            can_sort = await queries.can_sort_accounts()
            sort = sort if can_sort else ""
            found = await queries.accounts(sort=sort, after=after, limit=USERS_ON_PAGE + 1)
            # Who looks at an account ends its holds that have expired.
            found = [
                each
                if each.current
                else each._replace(account=await accounts.account(each.user_id))
                for each in found
            ]
    except (DatabaseUnavailable, Overloaded):
        if attempt is None:
            raise
        found = None
    shown, last = cut_page(found or [], USERS_ON_PAGE)
    form: Mapping[str, str] = attempt.form if attempt else {}
    sorted_by = {"sort": sort} if sort else {}
    view = {
        "users": shown,
        "are_known": found is not None,
        "sought": sought,
        "after": after,
        "sort": sort,
        "sorts": SORTS if can_sort and not sought else {},
        "first": urlencode(sorted_by),
        "next": None if last is None else urlencode({**sorted_by, "after": last.user_id}),
        "refresh_seconds": "" if after or sought or attempt else REFRESH_SECONDS,
        "form": form,
        "said": attempt.message if attempt else None,
        "key": form["key"] if attempt and attempt.keep_key else f"page-{token_urlsafe(16)}",
    }
    if attempt is not None:
        return respond(request, "users.html", view, status=attempt.status, headers=attempt.headers)
    return respond(request, "users.html", view, status=404 if found == [] and sought else 200)


async def _find(accounts: AccountRepository, sought: str) -> list[Account]:
    """Return the user with this id, and the one with this external id, which may be a number."""
    found: dict[int, Account] = {}
    if is_number(sought):
        with suppress(UserNotFound):
            found[int(sought)] = await accounts.account(int(sought))
    if is_printable(sought):
        named = await accounts.by_external_id(sought)
        if named is not None:
            found[named.user_id] = named
    return list(found.values())


def is_printable(text: str) -> bool:
    """Say whether a text can be an external id or a reference."""
    return len(text) <= LONGEST_TEXT and re.fullmatch(PRINTABLE_PATTERN, text) is not None


# -- one account -----------------------------------------------------------------------------


@router.get("/users/{user_id}")
async def show_account(request: Request, user_id: str) -> Response:
    """Show an account: what it has, its past, its statement, its holds, and forms to change it."""
    return await account_page(request, number_of(user_id))


def number_of(user_id: str) -> int:
    """Return the id in a path.

    Raises:
        InvalidRequest: it is no user's number.
    """
    if not is_number(user_id):
        raise InvalidRequest(("path:userId", "not-an-integer"), sentence=NO_USER)
    return int(user_id)


async def account_page(request: Request, user_id: int, attempt: Attempt | None = None) -> Response:
    """Return an account's page, also with the outcome of one of its forms.

    When the account can't be read, the page of a form that was sent has that form alone.

    Raises:
        UserNotFound, HoldNotFound: there is none.
        InvalidRequest: a parameter of the query is invalid.
    """
    form: Mapping[str, str] = attempt.form if attempt else {}
    view: dict[str, object] = {"user": user_id, "account": None, "attempt": attempt}
    try:
        await stream_of(request).refresh()
        view |= await _account(request, user_id, form.get("hold", ""))
        done = None if attempt else await _done(request, user_id)
    except (DatabaseUnavailable, Overloaded):
        if attempt is None:
            raise
        done = None
    did = form.get("do", "") if attempt else request.query_params.get("did", "")
    place = PLACES.get(did, "reverse" if "reverse" in request.query_params else "change")
    message = attempt.message if attempt else done

    def typed(name: str, field: str, default: object = "") -> object:
        """Return what was typed into a field of a form, if this form was sent."""
        if PLACES.get(form.get("do", "")) == name:
            return form.get(field, default)
        return default

    view |= {
        "offered": {do for do, needs in NEEDS.items() if may(request, needs)},
        "place": place,
        "message": message if did == "open" else None,
        "said": None if did == "open" else message,
        "typed": typed,
        "keep_key": attempt is not None and attempt.keep_key,
        "new_key": lambda: f"page-{token_urlsafe(16)}",
        # a form that was refused, or reported, is left as it is
        "refresh_seconds": "" if attempt or _is_past(request) else REFRESH_SECONDS,
        "to_reverse": request.query_params.get("reverse", "")[:16],
    }
    status = attempt.status if attempt else 200
    headers = attempt.headers if attempt else None
    return respond(request, "account.html", view, status=status, headers=headers)


def _is_past(request: Request) -> bool:
    """Say whether the address is of a part of the account that later changes do not change."""
    return "before" in request.query_params


# What a form does, and the part of the page that has the form and its outcome.
PLACES: Final = {
    "change": "change",
    "transfer": "transfer",
    "hold": "hold",
    "capture": "holds",
    "void": "holds",
    "reverse": "reverse",
    "settings": "settings",
    "freeze": "freeze",
    "thaw": "freeze",
}


# What a form needs: what the API's route for the same does.
NEEDS: Final[dict[str, Needs]] = {
    "change": WITHDRAW,
    "transfer": CHANGE,
    "hold": WITHDRAW,
    "capture": WITHDRAW,
    "void": WITHDRAW,
    "reverse": CHANGE,
    "settings": MAKE,
    "freeze": MAKE,
    "thaw": MAKE,
}


async def _account(request: Request, user_id: int, tried: str) -> dict[str, object]:
    account = await services(request)[AccountRepository].account(user_id)
    ledger = services(request)[LedgerRepository]
    recent = await ledger.entries(
        user_id, Selection(), after=None, limit=ENTRIES_DRAWN, descending=True
    )
    days = await ledger.daily_balances(user_id, before=date.max, limit=DAYS_DRAWN)
    past = {day.version: (day.at.timestamp(), day.balance) for day in days}
    past |= {entry.version: (entry.at.timestamp(), entry.balance) for entry in recent}
    return {
        "account": account,
        "history": await _settings(request, account),
        "line": charts.balances([past[version] for version in sorted(past)]),
        "statement": await _statement(request, account),
        "reference": _reference(request),
        "holds": await _holds(request, account, tried),
    }


def _reference(request: Request) -> str:
    reference = request.query_params.get("reference", "").strip()
    if reference and not is_printable(reference):
        raise InvalidRequest(("query:reference", "not-printable"), sentence=_NO_REFERENCE)
    return reference


def _cursor(request: Request, name: str) -> int | None:
    text = request.query_params.get(name, "")
    if text and not is_number(text):
        raise InvalidRequest(
            (f"query:{name}", "not-an-integer"),
            sentence=f'Wrong address: "{name}" must be a whole number, 1 or more.',
        )
    return int(text) if text else None


async def _statement(request: Request, account: Account) -> Statement:
    """Return the entries before or after a version, by default the latest."""
    ledger = services(request)[LedgerRepository]
    reference = _reference(request)
    selection = Selection(reference=reference or None)
    before, after = _cursor(request, "before"), _cursor(request, "after")
    upwards = after is not None
    entries = await ledger.entries(
        account.user_id,
        selection,
        after=after if upwards else before,
        limit=ENTRIES_ON_PAGE + 1,
        descending=not upwards,
    )
    more, entries = len(entries) > ENTRIES_ON_PAGE, entries[:ENTRIES_ON_PAGE]
    if upwards:
        entries.reverse()
    # What is beyond the end that the page began at.
    beyond: list[Entry] = []
    if entries and (before or after) is not None:
        edge = entries[-1 if upwards else 0].version
        beyond = await ledger.entries(
            account.user_id, selection, after=edge, limit=1, descending=upwards
        )
    newer, older = (more, bool(beyond)) if upwards else (bool(beyond), more)
    named = {"reference": reference} if reference else {}
    return Statement(
        entries,
        await ledger.reversals(account.user_id, [entry.version for entry in entries]),
        urlencode({**named, "after": entries[0].version}) if newer else None,
        urlencode({**named, "before": entries[-1].version}) if older else None,
    )


async def _settings(request: Request, account: Account) -> SettingsHistory:
    """Return the latest changes of settings, or those up to a version."""
    upto = min(_cursor(request, "settings") or account.settings_version, account.settings_version)
    found = await services(request)[AccountRepository].settings(
        account.user_id, after=max(0, upto - SETTINGS_ON_PAGE - 1), limit=SETTINGS_ON_PAGE + 1
    )
    changes = [each for each in reversed(found) if each.settings_version <= upto]
    older = changes[SETTINGS_ON_PAGE:]
    return SettingsHistory(
        changes[:SETTINGS_ON_PAGE],
        urlencode({"settings": older[0].settings_version}) if older else None,
    )


async def _holds(request: Request, account: Account, tried: str) -> Holds:
    """Return the open holds after a number, and one that was asked for or `tried` to end."""
    holds = services(request)[HoldRepository]
    after, sought = _cursor(request, "holds"), _cursor(request, "hold")
    found = await holds.holds(
        account.user_id, state="open", after=after or 0, limit=HOLDS_ON_PAGE + 1
    )
    shown, last = cut_page(found, HOLDS_ON_PAGE)
    one = None
    if sought is not None and sought not in [hold.number for hold in shown]:
        one = await holds.hold(account.user_id, sought)
    elif is_number(tried) and int(tried) not in [hold.number for hold in shown]:
        with suppress(HoldNotFound):
            one = await holds.hold(account.user_id, int(tried))
    more = None if last is None else urlencode({"holds": last.number})
    return Holds(shown, more, one)


# -- what was done ---------------------------------------------------------------------------


async def _done(request: Request, user_id: int) -> Message | None:
    """Report what a form did, as the account now has it."""
    query = request.query_params
    did, entry, hold = query.get("did"), query.get("entry", ""), query.get("hold", "")
    try:
        if did in {"change", "transfer", "capture", "reverse"} and is_number(entry):
            ledger = services(request)[LedgerRepository]
            made = await ledger.past(user_id, version=int(entry))
            again = "again" in query
            undo = None
            if made.reverses is None and made.hold is None and may(request, NEEDS["reverse"]):
                undo = (f"/users/{user_id}", {"do": "reverse", "entry": str(made.version)})
            return Message("good", _made(made, again=again), undo=undo)
        if did in {"hold", "void"} and is_number(hold):
            found = await services(request)[HoldRepository].hold(user_id, int(hold))
            return Message("good", _placed(found))
        if did == "open":
            opened = await services(request)[LedgerRepository].past(user_id, version=1)
            return Message(
                "good", f"Created user {user_id} with a balance of {number(opened.balance)}."
            )
        if did in {"settings", "freeze", "thaw"}:
            account = await services(request)[AccountRepository].account(user_id)
            return Message("good", f"Done: {settings_of(account)}.")
    except Problem:
        return None
    return None


def _made(entry: Entry, *, again: bool) -> str:
    amount = number(abs(entry.amount))
    has = f"User {entry.user_id} then had {number(entry.balance)}."
    if entry.reverses is not None:
        reverses = f"entry {number(entry.reverses)}"
        by = f"by entry {number(entry.version)}"
        if again:
            return f"{reverses.capitalize()} had already been reversed {by}."
        return f"Reversed {reverses} {by}. {has}"
    if entry.hold is not None:
        return f"Captured {amount} of hold {number(entry.hold)}. {has}"
    if entry.other_user_id is not None:
        return f"Transferred {amount} to user {entry.other_user_id}. {has}"
    return f"{'Added' if entry.amount > 0 else 'Withdrew'} {amount}. {has}"


def _placed(hold: Hold) -> str:
    name, amount = f"hold {number(hold.number)}", number(hold.amount)
    if hold.state == "open":
        return f"Held {amount} until {exact(hold.expires_at)} ({name})."
    if hold.state == "voided":
        return f"Voided {name}: {amount} is available again."
    return f"{name.capitalize()} has already ended ({hold.state})."


def settings_of(account: Account) -> str:
    """Return the settings of an account, as a clause."""
    named = "there is no external id"
    if account.external_id is not None:
        named = f"the external id is {account.external_id}"
    frozen = "frozen" if account.frozen else "not frozen"
    return f"the floor is {number(account.floor)}, {named}, and the account is {frozen}"
