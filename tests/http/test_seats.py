"""Seats of long answers: so many at once, so many for one client."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from balance_app.access.errors import TooManyRequests
from balance_app.access.keys import Principal
from balance_app.errors import Overloaded
from balance_app.http.seats import Seats


def scope(address: str, key_id: str | None = None) -> dict[str, Any]:
    return {"client": (address, 1), "principal": Principal("ada", frozenset(), key_id)}


@pytest.fixture
def taken() -> Iterator[ExitStack]:
    """The seats that a test takes."""
    with ExitStack() as stack:
        yield stack


def others_get_in(seats: Seats, taken: ExitStack) -> bool:
    """Let one client take all that it can get; return whether there is a seat for another."""
    with suppress(TooManyRequests, Overloaded):
        while True:
            taken.enter_context(seats.take(scope("127.0.0.1")))
    try:
        taken.enter_context(seats.take(scope("127.0.0.2")))
    except Overloaded:
        return False
    return True


def test_addresses_of_one_ipv6_network_are_one_client(taken: ExitStack) -> None:
    """A host there has as many as it likes; the control is another network."""
    seats = Seats("streams", most=10, per_client=2)
    for address in ("2001:db8:1:2::1", "2001:db8:1:2:aaaa::9"):
        taken.enter_context(seats.take(scope(address)))
    with pytest.raises(TooManyRequests):
        taken.enter_context(seats.take(scope("2001:db8:1:2:ffff::")))
    taken.enter_context(seats.take(scope("2001:db8:1:3::1")))


def test_one_client_does_not_take_all(taken: ExitStack) -> None:
    """Without a limit for each client (the control) it does."""
    assert others_get_in(Seats("streams", most=10, per_client=3), taken)
    assert not others_get_in(Seats("streams", most=10, per_client=11), taken)


def test_a_client_is_an_address_and_a_key(taken: ExitStack) -> None:
    """Behind a proxy all have one address; and one without an address is a client, too."""
    seats = Seats("streams", most=10, per_client=1)
    for each in (scope("127.0.0.1"), scope("127.0.0.1", "a"), scope("127.0.0.1", "b"), {}):
        taken.enter_context(seats.take(each))
        with pytest.raises(TooManyRequests, match="1 streams"):
            taken.enter_context(seats.take(each))


def test_a_seat_is_free_again(taken: ExitStack) -> None:
    """However its answer has ended; what was refused has taken none."""
    seats = Seats("streams", most=2, per_client=1)
    for _ in range(5):
        with pytest.raises(RuntimeError), seats.take(scope("127.0.0.1")):
            raise RuntimeError
    taken.enter_context(seats.take(scope("127.0.0.1")))
    taken.enter_context(seats.take(scope("127.0.0.2")))
    for _ in range(3):
        with pytest.raises(Overloaded):
            taken.enter_context(seats.take(scope("127.0.0.3")))
    assert len(seats._taken) == 2
