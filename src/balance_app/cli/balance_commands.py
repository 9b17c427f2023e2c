"""The commands for the balances of a running service; `balance_session` executes them."""

from contextlib import AbstractContextManager
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from balance_app.cli.remote import (
    By,
    Command,
    Group,
    Json,
    Limit,
    Url,
    global_options,
    login_name,
    open_session,
    read_moment,
)

if TYPE_CHECKING:
    from balance_app.cli.balance_session import BalanceSession

PANEL: Final = "Balances of a running service"

balance_commands = typer.Typer()
users_commands = typer.Typer(cls=Group, invoke_without_command=True)
balance_commands.add_typer(users_commands, name="users", rich_help_panel=PANEL)
_balance = partial(balance_commands.command, cls=Command, rich_help_panel=PANEL)
# -2 is an amount, not an option
_amount = partial(_balance, context_settings={"ignore_unknown_options": True})


class HoldState(StrEnum):
    """The state of a hold."""

    OPEN = "open"
    CAPTURED = "captured"
    VOIDED = "voided"
    EXPIRED = "expired"


class Order(StrEnum):
    """The order of entries."""

    ASC = "asc"
    DESC = "desc"


UserId = Annotated[int, typer.Argument(metavar="USER", help="the user's id")]
HoldId = Annotated[str, typer.Argument(metavar="HOLD", help="the hold's id, as `hold` prints it")]
Positive = Annotated[int, typer.Argument(metavar="AMOUNT", help="how much; above zero")]
Reference = Annotated[
    str | None, typer.Option(metavar="TEXT", help="what it is about, for finding it again")
]
Note = Annotated[str | None, typer.Option(metavar="TEXT", help="more about it, for people")]
Key = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="idempotency key: what is sent again with it is done once"),
]
Patience = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="how long to retry while the outcome is unknown"),
]
After = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="start after N, which the page before prints"),
]
PATIENCE: Final = 15.0


# -- moving money ------------------------------------------------------------------------------


@_amount()
def change(  # noqa: PLR0913 - each is an option
    user: UserId,
    amount: Annotated[
        int, typer.Argument(metavar="AMOUNT", help="what is added; negative withdraws")
    ],
    *,
    reference: Reference = None,
    note: Note = None,
    key: Key = None,
    patience: Patience = PATIENCE,
    json: Json = False,
    url: Url = None,
) -> None:
    """Change a user's balance, once: `balance-app change 1 -2`.

    It is sent with an idempotency key, and again with the same key while its outcome is unknown.
    If it is still unknown when --patience ends, the exit code is 5, and the message has the command
    that sends it again. The exit code is 4 when the account does not allow the change.
    """
    with _open(url, as_json=json, patience=patience) as session:
        session.change(user, amount, key=key, reference=reference, note=note)


@_amount()
def transfer(  # noqa: PLR0913 - each is an option
    payer: Annotated[int, typer.Argument(metavar="FROM", help="the id of the user who pays")],
    payee: Annotated[int, typer.Argument(metavar="TO", help="the id of the user who gets it")],
    amount: Positive,
    *,
    reference: Reference = None,
    note: Note = None,
    key: Key = None,
    patience: Patience = PATIENCE,
    json: Json = False,
    url: Url = None,
) -> None:
    """Move an amount from one user to another, once: `balance-app transfer 1 2 5`.

    Both balances change, or none. Keys, --patience and exit codes are as of `change`.
    """
    with _open(url, as_json=json, patience=patience) as session:
        session.transfer(payer, payee, amount, key=key, reference=reference, note=note)


@_amount()
def hold(  # noqa: PLR0913 - each is an option
    user: UserId,
    amount: Positive,
    *,
    seconds: Annotated[
        int, typer.Option("--for", metavar="SECONDS", help="it expires after so long")
    ],
    reference: Reference = None,
    note: Note = None,
    key: Key = None,
    patience: Patience = PATIENCE,
    json: Json = False,
    url: Url = None,
) -> None:
    """Reserve an amount, once: `balance-app hold 1 20 --for 3600`.

    It stays in the balance and can't be spent, until `capture`, `void`, or its time is over. Keys,
    --patience and exit codes are as of `change`.
    """
    with _open(url, as_json=json, patience=patience) as session:
        session.hold(user, amount, seconds=seconds, key=key, reference=reference, note=note)


@_balance()
def capture(  # noqa: PLR0913 - each is an option
    hold: HoldId,
    *,
    amount: Annotated[
        int | None, typer.Option(metavar="AMOUNT", help="how much of it; by default all")
    ] = None,
    reference: Reference = None,
    note: Note = None,
    patience: Patience = PATIENCE,
    json: Json = False,
    url: Url = None,
) -> None:
    """Withdraw what a hold reserves, or a part of it, and release the rest; once."""
    with _open(url, as_json=json, patience=patience) as session:
        session.capture(hold, amount, reference=reference, note=note)


@_balance()
def void(
    hold: HoldId, *, patience: Patience = PATIENCE, json: Json = False, url: Url = None
) -> None:
    """Release what a hold reserves; once."""
    with _open(url, as_json=json, patience=patience) as session:
        session.void(hold)


@_balance()
def reverse(  # noqa: PLR0913 - each is an option
    user: UserId,
    version: Annotated[
        int, typer.Argument(metavar="VERSION", help="of the entry, as `statement` shows it")
    ],
    *,
    reference: Reference = None,
    note: Note = None,
    patience: Patience = PATIENCE,
    json: Json = False,
    url: Url = None,
) -> None:
    """Undo an entry by an opposite one, once; of a transfer both halves."""
    with _open(url, as_json=json, patience=patience) as session:
        session.reverse(user, version, reference=reference, note=note)


# -- reading -----------------------------------------------------------------------------------


@_balance()
def balance(
    user: UserId,
    *,
    entries: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="how many entries (default: 5); with --json, print only these",
        ),
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show a user's balance and latest entries."""
    with _open(url, as_json=json) as session:
        session.balance(user, entries)


@_balance()
def user(
    user: UserId,
    *,
    at: Annotated[
        datetime | None,
        typer.Option(parser=read_moment, metavar="TIME", help="the balance at this time; UTC"),
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="the balance after this entry")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show a user's account and its settings, or its balance at a past moment."""
    if at is not None and version is not None:
        raise typer.BadParameter("give only one of --at and --version")
    with _open(url, as_json=json) as session:
        session.user(user, at=at, version=version)


@_balance()
def statement(  # noqa: PLR0913 - each is an option
    user: UserId,
    *,
    csv: Annotated[bool, typer.Option("--csv", help="write all entries as CSV")] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="write all entries as JSON, one a line")
    ] = False,
    begin: Annotated[
        datetime | None,
        typer.Option(
            "--from", parser=read_moment, metavar="TIME", help="made at this time or later; UTC"
        ),
    ] = None,
    end: Annotated[
        datetime | None,
        typer.Option("--to", parser=read_moment, metavar="TIME", help="made before this time; UTC"),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="TEXT", help="with exactly this reference")
    ] = None,
    order: Annotated[Order, typer.Option(help="the oldest first, or the latest")] = Order.ASC,
    after: After = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=1000, metavar="N", help="maximum rows (20)")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show a user's entries page by page, or write all of them with --csv or --jsonl.

    The last line of what is written says that it is complete. The exit code is 3, and stderr has a
    sentence, when it broke off before that.
    """
    if csv + jsonl + json > 1:
        raise typer.BadParameter("give only one of --csv, --jsonl and --json")
    if (csv or jsonl) and limit is not None:
        raise typer.BadParameter("--limit is for pages: all entries are written")
    with _open(url, as_json=json) as session:
        if csv or jsonl:
            session.export(
                user,
                "csv" if csv else "jsonl",
                order=order.value,
                begin=begin,
                end=end,
                reference=reference,
                after=after,
            )
        else:
            session.entries(
                user,
                order=order.value,
                begin=begin,
                end=end,
                reference=reference,
                after=after,
                limit=limit or 20,
            )


@_balance()
def holds(  # noqa: PLR0913 - each is an option
    user: UserId,
    *,
    state: Annotated[HoldState | None, typer.Option(help="only in this state")] = None,
    after: After = None,
    limit: Limit = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """List a user's holds in the order in which they were placed."""
    with _open(url, as_json=json) as session:
        session.holds(user, None if state is None else state.value, after or 0, limit)


@_balance()
def daily_balances(
    user: UserId,
    *,
    before: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="before this day")
    ] = None,
    limit: Limit = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show a user's balance at the end of each day (UTC) that it changed on, the latest first."""
    with _open(url, as_json=json) as session:
        session.daily_balances(user, before, limit)


# -- users -------------------------------------------------------------------------------------


@users_commands.callback()
def users(  # noqa: PLR0913 - each is an option
    context: typer.Context,
    *,
    external_id: Annotated[
        str | None, typer.Option(metavar="TEXT", help="only the user with this external id")
    ] = None,
    after: Annotated[int, typer.Option(min=0, metavar="ID", help="start after this id")] = 0,
    limit: Limit = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """List users by id, or find one by its external id; `users set` changes settings."""
    if context.invoked_subcommand is not None:
        for name in ("external_id", "after", "limit"):
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise typer.BadParameter(
                    f"it is for the list; options of `{context.invoked_subcommand}` come after it.",
                    param_hint=f"--{name.replace('_', '-')}",
                )
        global_options.update(
            url=url or global_options.get("url"), json=json or global_options.get("json")
        )
        return
    with _open(url, as_json=json) as session:
        if external_id is None:
            session.users(after, limit)
        else:
            session.find_user(external_id)


@users_commands.command(name="set", cls=Command)
def set_user(  # noqa: PLR0913 - each is an option
    user: UserId,
    *,
    floor: Annotated[
        int | None,
        typer.Option(
            metavar="AMOUNT",
            help="what is available may not fall below it; negative allows an overdraft",
        ),
    ] = None,
    frozen: Annotated[
        bool | None,
        typer.Option(
            "--freeze/--unfreeze",
            " /--thaw",
            help="stop all movements of money, or allow them again",
        ),
    ] = None,
    external_id: Annotated[
        str | None, typer.Option(metavar="TEXT", help="the user's id in another system")
    ] = None,
    no_external_id: Annotated[
        bool, typer.Option("--no-external-id", help="remove the external id")
    ] = False,
    by: By = None,
    patience: Patience = PATIENCE,
    json: Json = False,
    url: Url = None,
) -> None:
    """Change settings of an account: its floor, whether it is frozen, its external id.

    If somebody else changes them at the same time nothing is changed, and the message says what is
    different.
    """
    if external_id is not None and no_external_id:
        raise typer.BadParameter("give only one of --external-id and --no-external-id")
    if floor is None and frozen is None and external_id is None and not no_external_id:
        raise typer.BadParameter("give what to change: --floor, --freeze, --external-id, ...")
    with _open(url, as_json=json, patience=patience) as session:
        session.set_user(
            user,
            floor=floor,
            frozen=frozen,
            external_id=None if no_external_id else ... if external_id is None else external_id,
            by=by or login_name(),
        )


# -- shared ------------------------------------------------------------------------------------


def _open(
    url: str | None, *, as_json: bool, patience: float = 0
) -> "AbstractContextManager[BalanceSession]":
    from balance_app.cli.balance_session import BalanceSession  # noqa: PLC0415 - slow to import

    return open_session(BalanceSession, url, as_json=as_json, patience=patience)
