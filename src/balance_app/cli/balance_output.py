"""Formats the service's answers about balances: sentences, and tables."""

from datetime import UTC, datetime
from typing import Final

from rich.console import Console, RenderableType
from rich.text import Text

from balance_app.cli.output import STYLES, Json, is_roomy, make_table, moment, text
from balance_app.client import Account, Change, Hold, PastBalance, State, Transfer
from balance_app.formatting import ago, brief, exact
from balance_app.states import Tone

Row = dict[str, str | Text]  # by the titles of columns

_HOLDS: Final = {"open": "◔", "captured": "✓", "voided": "■", "expired": "□"}


def balance(account: Account) -> str:
    """Return what a user has, and what keeps it from being spent."""
    frozen = " It is frozen." if account.frozen else ""
    return (
        f"User {account.user_id} has {account.balance} at version {account.version}"
        f"{_held(account)}.{frozen}"
    )


def account(account: Account) -> str:
    """Return what a user has, and the settings of the account."""
    named = "no external id"
    if account.external_id is not None:
        named = f"external id {account.external_id}"
    return (
        f"{balance(account)} Its floor is {account.floor}, it has {named} "
        f"(settings version {account.settings_version}), and was created at "
        f"{exact(account.created_at)} UTC."
    )


def past_balance(past: PastBalance, at: datetime | None) -> str:
    """Return what a user had at a moment."""
    when = "" if at is None else f" at {exact(at.astimezone(UTC))} UTC"
    held = f", of which {past.held} was held" if past.held else ""
    return (
        f"User {past.user_id} had {past.balance}{held}{when}, after entry {past.version} "
        f"({exact(past.at)} UTC)."
    )


def change(made: Change) -> str:
    """Return what a change has left."""
    return f"{_after(made.account, made.amount, made.at)}."


def transfer(made: Transfer) -> str:
    """Return what a transfer has left to both users."""
    return (
        f"Transfer {made.id}: {made.amount} from user {made.payer.user_id} to user "
        f"{made.payee.user_id} ({exact(made.at)} UTC). {_has(made.payer)}. {_has(made.payee)}."
    )


def reversal(made: Change | Transfer) -> str:
    """Return what a reversal has undone, and left."""
    if isinstance(made, Transfer):
        return f"Transfer {made.reverses} is reversed. {transfer(made)}"
    return f"Entry {made.reverses} is reversed. {change(made)}"


def placed_hold(hold: Hold) -> str:
    """Return what a hold reserves, and until when."""
    return (
        f"Hold {hold.id} reserves {hold.amount} until {exact(hold.expires_at)} UTC.{_account(hold)}"
    )


def ended_hold(hold: Hold) -> str:
    """Return how a hold has ended."""
    of = "" if hold.captured is None else f": {hold.captured} of {hold.amount} is withdrawn"
    return f"Hold {hold.id} is {hold.state}{of}.{_account(hold)}"


def differences(before: Account, after: Account) -> str:
    """Return which settings of an account are different."""
    named = {"floor": "floor", "frozen": "frozen", "external_id": "external id"}
    found = [
        f"{label} was {_value(was)}, is {_value(now)}"
        for name, label in named.items()
        if (was := getattr(before, name)) != (now := getattr(after, name))
    ]
    return "; ".join(found) or "its settings were set to the same values"


def users_table(accounts: list[Json], on: Console) -> RenderableType:
    """Return a line per account."""
    rows: list[Row] = [
        {
            "USER": str(each["userId"]),
            "BALANCE": str(each["balance"]),
            "HELD": str(each["held"]),
            "AVAILABLE": str(each["available"]),
            "FLOOR": str(each["floor"]),
            "VERSION": str(each["version"]),
            "STATE": text("‖ frozen" if each["frozen"] else "", on, STYLES[Tone.WARN]),
            "EXTERNAL ID": text(each["externalId"] or "", on),
            "CREATED (UTC)": text(exact(moment(each["createdAt"])), on),
        }
        for each in accounts
    ]
    return _rows(rows, on, cut=("EXTERNAL ID",), roomy=("CREATED (UTC)",), numbers=6)


def entries_table(ledger: list[Json], now: datetime, on: Console) -> RenderableType:
    """Return a line per entry."""
    rows: list[Row] = [
        {
            "VERSION": str(entry["version"]),
            "AMOUNT": f"{entry['amount']:+d}",
            "BALANCE": str(entry["balance"]),
            "HELD": str(entry["held"]),
            "MADE (UTC)": _when(entry["at"], now, on),
            "AGO": _ago(entry["at"], now, on),
            "WHAT": text(_what(entry), on),
            "REFERENCE": text(entry["reference"] or "", on),
            "NOTE": text(entry["note"] or "", on),
            "KEY": text(entry["key"] or "", on),
            "BY": text(entry["by"] or "-", on),
        }
        for entry in ledger
    ]
    cut = ("REFERENCE", "NOTE", "KEY", "BY")
    return _rows(rows, on, cut=cut, roomy=("AGO", "NOTE", "KEY", "BY"), numbers=4)


def holds_table(holds: list[Json], now: datetime, on: Console) -> RenderableType:
    """Return a line per hold."""
    rows: list[Row] = [
        {
            "HOLD": hold["id"],
            "AMOUNT": str(hold["amount"]),
            "CAPTURED": "" if hold["captured"] is None else str(hold["captured"]),
            "STATE": text(f"{_HOLDS.get(hold['state'], '?')} {hold['state']}", on),
            "PLACED (UTC)": _when(hold["at"], now, on),
            "EXPIRES (UTC)": _when(hold["expiresAt"], now, on),
            "ENDED": _ago(hold["endedAt"], now, on),
            "REFERENCE": text(hold["reference"] or "", on),
            "NOTE": text(hold["note"] or "", on),
            "BY": text(hold["by"] or "-", on),
            "ENDED BY": text(hold["endedBy"] or "-" if hold["endedAt"] else "", on),
        }
        for hold in holds
    ]
    cut = ("REFERENCE", "NOTE", "BY", "ENDED BY")
    roomy = ("PLACED (UTC)", "ENDED", "NOTE", "BY", "ENDED BY")
    return _rows(rows, on, cut=cut, roomy=roomy, numbers=3)


def daily_balances_table(days: list[Json], on: Console) -> RenderableType:
    """Return a line per day."""
    table = make_table(("DAY", "BALANCE", "VERSION", "READ (UTC)"), numbers=3)
    for day in days:
        table.add_row(
            day["day"],
            str(day["balance"]),
            str(day["version"]),
            text(exact(moment(day["at"])), on),
        )
    return table


def _rows(
    rows: list[Row],
    on: Console,
    *,
    cut: tuple[str, ...],
    roomy: tuple[str, ...],
    numbers: int,
) -> RenderableType:
    """Return rows (there are some) as a table; a narrow terminal shows no columns `roomy`."""
    titles = [title for title in rows[0] if is_roomy(on) or title not in roomy]
    table = make_table(tuple(titles), cut=cut, numbers=numbers)
    for row in rows:
        table.add_row(*(row[title] for title in titles))
    return table


def _when(at: str, now: datetime, on: Console) -> Text:
    return text(brief(moment(at), now) if on.is_terminal else exact(moment(at)), on)


def _ago(at: str | None, now: datetime, on: Console) -> Text:
    return text("" if at is None else ago((now - moment(at)).total_seconds()), on)


def _what(entry: Json) -> str:
    """Return what an entry is of."""
    if entry["reverses"] is not None:
        return f"reverses {entry['reverses']}"
    if entry["otherUserId"] is not None:
        return f"{'from' if entry['amount'] > 0 else 'to'} {entry['otherUserId']}"
    if entry["hold"] is not None:
        return f"captures {entry['hold']}"
    return "opening" if entry["version"] == 1 else "change"


def _has(state: State) -> str:
    return f"User {state.user_id} has {state.balance} (version {state.version}){_held(state)}"


def _after(state: State, amount: int, at: datetime) -> str:
    return (
        f"User {state.user_id} has {state.balance} after {amount:+d} "
        f"(version {state.version}, {exact(at)} UTC){_held(state)}"
    )


def _account(hold: Hold) -> str:
    return "" if hold.account is None else f" {_has(hold.account)}."


def _held(state: State | Account) -> str:
    return f"; {state.held} is held, {state.available} available" if state.held else ""


def _value(setting: object) -> str:
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    return "none" if setting is None else str(setting)
