"""What the commands for a running service share: options, and how they reach it."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from balance_app.formatting import url as address
from balance_app.settings import Settings, load_settings

if TYPE_CHECKING:
    from balance_app.cli.session import Session

    Used = TypeVar("Used", bound=Session)


def _without_types(params: list[Any]) -> list[Any]:
    """Return parameters; the help shows flags without a type."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help shows flags without a type."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands whose help shows flags without a type."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


# the options that were given before the command's name
global_options: dict[str, Any] = {}

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="where the service is; by default BALANCE_APP_URL, or this machine (HOST, PORT)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print the service's own JSON")]
By = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="who requests it, for people to read; by default your login"),
]
Limit = Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="at most so many")]


@contextmanager
def open_session(
    kind: "type[Used]", url: str | None, *, as_json: bool, patience: float = 0
) -> "Iterator[Used]":
    """Yield a session with a service; a refusal is reported, and ends the program."""
    from balance_app.cli.errors import Code, RemoteError  # noqa: PLC0415 - slow; see below

    url = url or global_options.get("url")
    as_json = as_json or bool(global_options.get("json"))
    settings = None if url else load_settings()
    reached_by = (f"--url={url}",) if url else ()
    try:
        with kind(
            service_url(url), as_json=as_json, reached_by=reached_by, patience=patience
        ) as session:
            yield session
    except RemoteError as error:
        if as_json and error.answer is not None:
            typer.echo(error.answer)
        guessed = settings is not None and settings.balance_app_url is None
        guessed = guessed and error.code is Code.UNAVAILABLE and error.answer is None
        hint = " --url (or BALANCE_APP_URL) says where the service is." if guessed else ""
        fail(f"{error}{hint}", code=error.code)


def own_url(settings: Settings) -> str:
    """Return where the instance that is configured here answers."""
    return address(settings.host, settings.port)


def service_url(given: str | None) -> str:
    """Return the service's URL: an option's, BALANCE_APP_URL, or this machine's instance."""
    if given:
        return given
    settings = load_settings()
    return settings.balance_app_url or own_url(settings)


def login_name() -> str:
    """Return the name of the user who runs the program."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as containers have
        return "command line"


def fail(sentence: str, *, code: int = 1) -> NoReturn:
    """Report why the program ends, and end it."""
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
