"""Why a form did nothing, as a sentence for the person who sent it."""

from typing import Any, Final

from balance_app.balances.errors import (
    BalanceLimitExceeded,
    CaptureExceedsHold,
    ExternalIdTaken,
    FloorNotCovered,
    HoldEnded,
    IdempotencyKeyReused,
    InsufficientFunds,
    NotReversible,
    UserFrozen,
)
from balance_app.errors import DatabaseUnavailable, InvalidRequest, Overloaded, Problem
from balance_app.http.body import MAX_INTEGER
from balance_app.web.pages import sentence
from balance_app.web.view_models import exact, number

_FAULTS: Final = {
    "/user": "the user id must be a whole number, 1 or more.",
    "/amount": f"the amount must be a whole number from 1 to {number(MAX_INTEGER)}.",
    "/to": "the user id must be a whole number, 1 or more.",
    "/same": "choose another user: a transfer needs two different users.",
    "/reference": "the reference may have at most 200 printable characters.",
    "/note": "the note may have at most 500 printable characters.",
    "/lasts": "a hold may last from one second to one year.",
    "/entry": "the entry must be a whole number, 1 or more.",
    "/balance": f"the opening balance must be a whole number from 0 to {number(MAX_INTEGER)}.",
    "/floor": "the floor must be a whole number; a negative one allows an overdraft.",
    "/externalId": "the external id may have at most 200 printable characters.",
    "/by": "the name may have at most 100 printable characters.",
}
_AGAIN: Final = " Press the button again: it can't be applied twice."


def refusal(problem: Problem, done: str) -> str:
    """Return why a form did nothing, or that this is not known.

    `done` says what would have been done with an amount: "withdrawn".
    """
    if isinstance(problem, DatabaseUnavailable | Overloaded):
        return sentence(problem, "POST") + (_AGAIN if problem.applied == "unknown" else "")
    members: dict[str, Any] = problem.members
    if isinstance(problem, InvalidRequest):
        why = _FAULTS.get(members["errors"][0]["pointer"])
        return f"Not done. {problem.detail}" if why is None else f"Not done: {why}"
    why = _of_account(problem, members, done) or _of_request(problem, members)
    return f"Not done. {problem.detail}" if why is None else f"Not done: {why} Nothing was changed."


def _of_account(problem: Problem, has: dict[str, Any], done: str) -> str | None:
    """Return what the state of the account does not allow."""
    match problem:
        case InsufficientFunds():
            return (
                f"{_has(has)}, so {number(-has['amount'])} can't be {done} "
                f"({number(has['shortfall'])} short)."
            )
        case BalanceLimitExceeded():
            return (
                f"user {has['userId']} has {number(has['balance'])}, and {number(has['amount'])} "
                f"more would exceed the largest balance by {number(has['excess'])}."
            )
        case UserFrozen():
            return (
                f"user {has['userId']} is frozen, and no money moves into or out of this account "
                "until it is unfrozen."
            )
        case FloorNotCovered():
            return f"{_has(has)}, which is less than a floor of {number(has['floor'])}."
        case _:
            return None


def _of_request(problem: Problem, members: dict[str, Any]) -> str | None:
    """Return what is wrong with the request, whatever the account has."""
    match problem:
        case ExternalIdTaken():
            return "another user has this external id."
        case NotReversible():
            entry, reverses = number(members["version"]), members["reverses"]
            return f"entry {entry} " + (
                "moved nothing, so there is nothing to reverse."
                if reverses is None
                else f"is itself the reversal of entry {number(reverses)}."
            )
        case CaptureExceedsHold():
            hold, amount = number(members["held"]), number(members["amount"])
            return f"the hold is {hold}, so {amount} can't be captured."
        case HoldEnded():
            how = {"captured": "was captured", "voided": "was voided"}.get(
                members["state"], "expired"
            )
            part = f" with {number(members['captured'])}" if members["captured"] else ""
            return f"the hold {how}{part} at {exact(members['endedAt'])}."
        case IdempotencyKeyReused():
            return (
                "this form was already sent with other values (see the statement). Press the "
                "button again to send these as well."
            )
        case _:
            return None


def _has(state: dict[str, Any]) -> str:
    """Return what a user has, and why not all of it may be spent."""
    user, balance, held = state.get("userId"), number(state["balance"]), state["held"]
    has = "the new user" if user is None else f"user {user}"
    has = f"{has} has {balance}"
    if held:
        has = (
            f"user {user} has {number(state['available'])} available "
            f"({balance}, of which {number(held)} is held)"
        )
    if "amount" not in state or not state["floor"]:
        return has
    floor = state["floor"]
    return f"{has} and " + (
        f"may go down to {number(floor)}" if floor < 0 else f"has to keep {number(floor)}"
    )
