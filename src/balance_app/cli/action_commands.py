"""The command for what was done by whom; `action_session` executes it."""

from functools import partial
from typing import Annotated

import typer

from balance_app.cli.remote import Command, Json, Limit, Url, open_session

action_commands = typer.Typer()
_action = partial(
    action_commands.command, cls=Command, rich_help_panel="Actions at a running service"
)


@_action()
def actions(  # noqa: PLR0913 - each is an option
    *,
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="only those by this one: a key's name")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help='only those to this: "job NAME", "user ID", "key NAME"'),
    ] = None,
    before: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="start before N, which the page before prints"),
    ] = None,
    limit: Limit = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show who did what to jobs, users, settings and keys, the latest first.

    Who moved money is in each account's entries and holds.
    """
    from balance_app.cli.action_session import ActionSession  # noqa: PLC0415 - slow to import

    with open_session(ActionSession, url, as_json=json) as session:
        session.actions(by, subject, before, limit)
