"""The parts of the running application; routes find them by type, or one it extends."""

from typing import TypeVar, cast

from starlette.requests import Request

Part = TypeVar("Part")


class Services:
    """One object of each type, put together in `main` and kept in `app.state.services`."""

    def __init__(self, *parts: object) -> None:
        self._parts = {kind: part for part in parts for kind in type(part).__mro__[:-1]}

    def get(self, kind: type[Part]) -> Part | None:
        """Return the part of a type, None if there is none."""
        return cast("Part | None", self._parts.get(kind))

    def __getitem__(self, kind: type[Part]) -> Part:
        """Return the part of a type, which there must be."""
        return cast("Part", self._parts[kind])


def services(request: Request) -> Services:
    """Return the parts of the application that serves the request."""
    return cast("Services", request.scope["app"].state.services)
