"""Answers that take long: so many at once, and so many for one client, who must not take all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from starlette.types import Scope

from balance_app.access.errors import TooManyRequests
from balance_app.errors import Overloaded
from balance_app.proxies import prefix_of

Client: TypeAlias = tuple[str, str | None]


class Seats:
    """At most `most` at once, at most `per_client` of them for one client.

    A client is an address (of IPv6: a prefix) and a key: behind a proxy that is not trusted all
    have its address. `what` they are is for the refusal: "streams".
    """

    def __init__(self, what: str, *, most: int, per_client: int) -> None:
        self._what = what
        self._most = most
        self._per_client = per_client
        self._taken: Counter[Client] = Counter()
        self._all = 0

    @contextmanager
    def take(self, scope: Scope) -> Iterator[None]:
        """Take a seat within the block, for the client of a request.

        Raises:
            Overloaded: all are taken.
            TooManyRequests: this client has as many as it may have.
        """
        client = _client_of(scope)
        if self._taken.get(client, 0) >= self._per_client:
            raise TooManyRequests(
                f"This client already has {self._per_client} {self._what} open on this instance.",
                seconds=1,
            )
        if self._all >= self._most:
            raise Overloaded(f"This instance already has {self._all} {self._what} open.")
        self._taken[client] += 1
        self._all += 1
        try:
            yield
        finally:
            self._all -= 1
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]


def _client_of(scope: Scope) -> Client:
    address, principal = scope.get("client"), scope.get("principal")
    return prefix_of(address[0]) if address else "", principal.key_id if principal else None
