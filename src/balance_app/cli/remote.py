"""What the commands share: options, and how those for a running service reach it."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from balance_app.formatting import typed_moment
from balance_app.formatting import url as address
from balance_app.settings import Settings, is_in_environment, load_settings

if TYPE_CHECKING:
    from balance_app.cli.credentials import Credential
    from balance_app.cli.session import Session

    Used = TypeVar("Used", bound=Session)


def _completed(params: list[Any], context: Any) -> list[Any]:  # noqa: ANN401 - of the library
    """Return parameters as all commands have them.

    The help shows flags without a type. What takes a URL and `--json` is for a running service, and
    takes `--key-file`, too.
    """
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    names = {each.name for each in params}
    if {"url", "json"} <= names and "key_file" not in names:
        params.insert(-1, _key_file(context))
    return params


class Command(TyperCommand):
    """A command of this program."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        return _completed(super().get_params(ctx), ctx)


class Group(TyperGroup):
    """A group of commands of this program."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        return _completed(super().get_params(ctx), ctx)


def _key_file(context: Any) -> Any:  # noqa: ANN401 - of the library
    """Return the program's own option, as one of a command."""

    def remember(context: object, option: object, value: str | None) -> None:
        del context, option
        global_options["key_file"] = value or global_options.get("key_file")

    program = context.find_root().command
    option = copy(next(each for each in program.params if each.name == "key_file"))
    option.callback, option.expose_value = remember, False
    return option


# the options that were given before the command's name
global_options: dict[str, Any] = {}

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="where the service is; by default BALANCE_APP_URL, or this machine (HOST, PORT)",
    ),
]
KeyFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="has the key; by default BALANCE_APP_KEY, or what is in ~/.config/balance-app/key",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print the service's own JSON")]
By = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="who requests it, for people to read; by default your login"),
]
Limit = Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="maximum rows")]


@contextmanager
def open_session(
    kind: "type[Used]", url: str | None, *, as_json: bool, patience: float = 0
) -> "Iterator[Used]":
    """Yield a session with a service; a refusal is reported, and ends the program."""
    from balance_app.cli.errors import Code, RemoteError, remote_error  # noqa: PLC0415 - slow
    from balance_app.cli.output import print_json  # noqa: PLC0415 - the same
    from balance_app.client import KeyNotSent  # noqa: PLC0415 - the same
    from balance_app.client.transport import without_user  # noqa: PLC0415 - the same

    url = url or global_options.get("url")
    as_json = as_json or bool(global_options.get("json"))
    named = {
        "url": without_user(url) if url else None,
        "key-file": global_options.get("key_file"),
    }
    reached_by = tuple(f"--{name}={value}" for name, value in named.items() if value)
    try:
        with kind(
            service_url(url),
            credential=credential_for(url),
            as_json=as_json,
            reached_by=reached_by,
            patience=patience,
        ) as session:
            yield session
    except KeyNotSent as error:
        fail(str(error), code=remote_error(error).code)
    except RemoteError as error:
        if as_json and error.answer is not None:
            with suppress(OSError):  # the sentence has the key that resolves an unknown outcome
                print_json(error.answer)
        guessed = not url and load_settings().balance_app_url is None
        guessed = guessed and error.code is Code.UNAVAILABLE and error.answer is None
        hint = " --url (or BALANCE_APP_URL) says where the service is." if guessed else ""
        fail(f"{error}{hint}", code=error.code)


def credential_for(given: str | None) -> "Credential":
    """Return the key for the service that `service_url` returns.

    Raises:
        KeyNotSent: it can't be used, or must not be sent there.
    """
    from balance_app.cli.credentials import Setting, find_credential  # noqa: PLC0415 - slow

    settings, url = load_settings(), service_url(given)
    of_file = not (given or is_in_environment("BALANCE_APP_URL"))
    key = settings.balance_app_key
    return find_credential(
        Setting(url, of_file and settings.balance_app_url is not None),
        Setting(
            None if key is None else key.get_secret_value(),
            not is_in_environment("BALANCE_APP_KEY"),
        ),
        global_options.get("key_file"),
    )


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


def read_moment(text: str) -> datetime:
    """Read a moment; without a zone it is in UTC, as all that is shown."""
    try:
        return typed_moment(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time: write it like 2026-11-21 or 2026-11-21T21:49:33Z."
        ) from None


def fail(sentence: str, *, code: int = 1) -> NoReturn:
    """Report why the program ends, and end it: with this code, even if nobody can read why."""
    with suppress(OSError):
        typer.echo(sentence, err=True)
    raise typer.Exit(code)


def fail_for_database(error: Exception, address: str | None = None) -> NoReturn:
    """End the program with what an error of the database means; raise one of another kind.

    The exit code is 3 if waiting may help.
    """
    from balance_app.db.outages import PERMANENT, classify  # noqa: PLC0415 - slow to import

    cause = classify(error)
    if cause is None:
        raise error
    text = cause.text if address is None else f"{address}: {cause.text}"
    fail(f"{cause.sentence} ({text})", code=1 if cause.kind in PERMANENT else 3)
