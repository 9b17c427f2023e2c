"""One person, or program, that uses a service: what the commands share.

For programs a command prints the service's own JSON; every other message goes to stderr.
"""

import asyncio
import shlex
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from rich.console import RenderableType
from rich.text import Text

from balance_app.cli import output
from balance_app.cli.credentials import Credential
from balance_app.cli.errors import RemoteError, remote_error
from balance_app.client import Service, ServiceFailure, Unavailable
from balance_app.client.answers import Received
from balance_app.client.transport import Call
from balance_app.formatting import visible

T = TypeVar("T")

_END: Final = object()


class Session:
    """The use of a service by one command.

    Every method prints the service's answer, and raises RemoteError where it is a refusal.
    """

    def __init__(  # noqa: PLR0913 - each is an option
        self,
        url: str,
        *,
        credential: Credential,
        as_json: bool,
        reached_by: tuple[str, ...] = (),
        patience: float = 0,
        timeout: float | None = None,
    ) -> None:
        """`reached_by`: the arguments with which another command uses the same service.

        `patience` is how many seconds a request that changes something is sent again.
        """
        try:
            self._service = Service(
                url,
                key=credential.key,
                patience=patience,
                timeout=timeout,
                on_retry=self._report_retry,
            )
        except ServiceFailure as failure:
            raise remote_error(failure) from None
        self._credential = credential
        self._runner = asyncio.Runner()
        self._retry_is_reported = False
        self._as_json = as_json
        self._reached_by = reached_by
        self._out = output.console()
        self._err = output.console(stderr=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._runner:
            self._runner.run(self._service.close())

    # -- requests ------------------------------------------------------------------------------

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the answer to a call of the service."""
        try:
            return self._runner.run(call)
        except ServiceFailure as failure:
            raise self._error(failure) from None
        except asyncio.CancelledError:
            # Only Ctrl-C cancels a call; the runner says so unless a time limit cancelled it, too.
            raise KeyboardInterrupt from None

    def _error(self, failure: ServiceFailure) -> RemoteError:
        return remote_error(failure, self._credential)

    def _each(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield what a call of the service yields."""

        async def following() -> object:
            return await anext(items, _END)

        async def close() -> None:
            await items.aclose()

        try:
            while (item := self._run(following())) is not _END:
                yield item  # type: ignore[misc]
        finally:
            # After Ctrl-C the step that it ended may not have left the generator yet.
            with suppress(RuntimeError):
                self._run(close())

    def _get(self, path: str, has: str, **params: str | int | None) -> Received:
        """Read something: a JSON object that has this member."""
        return self._run(self._service.transport.send(Call("GET", path, has, params)))

    def _report_retry(self, error: Unavailable) -> None:
        """Report once that a request is sent again, if there was an answer or may be an effect.

        Raises:
            Unavailable: nobody is there, and there is no earlier try that may have had an effect.
        """
        harmless = error.applied == "no"
        if harmless and not error.reached:
            raise error
        if not (harmless and error.answer is None) and not self._retry_is_reported:
            self._message(f"{error} Sending it again: it takes effect once.")
            self._retry_is_reported = True

    # -- reporting -----------------------------------------------------------------------------

    def _report(self, json: str, render: Callable[[], RenderableType]) -> None:
        if self._as_json:
            output.print_json(json)
        else:
            shown = render()
            self._out.print(shown, soft_wrap=isinstance(shown, Text))

    def _message(self, sentence: str) -> None:
        # Where it can't be printed the command goes on: it may be moving money.
        with suppress(OSError):
            self._err.print(Text(visible(sentence)), soft_wrap=True)

    def _next_page(self, what: str, *arguments: str, **options: str | int | None) -> None:
        """Print the command that shows the page after this one."""
        if not self._as_json:
            self._message(f"{what}: {self._command(*arguments, **options)}")

    def _command(self, *arguments: str | int, **options: str | int | None) -> str:
        """Return a command for the same service."""
        given = (
            f"--{name.replace('_', '-')}={value}"
            for name, value in options.items()
            if value is not None
        )
        return shlex.join(["balance-app", *map(str, arguments), *given, *self._reached_by])
