"""What an account refused last is remembered, and read anew before it is refused again."""

from collections.abc import AsyncIterator

import pytest

from balance_app.balances import repository
from balance_app.balances.accounts import Patch
from balance_app.balances.errors import VersionConflict
from balance_app.balances.model import Accepted, Movement, Refused
from balance_app.db.pool import Connection
from tests.balances.repositories import Repositories, repositories


@pytest.fixture
async def instances(database: dict[str, str]) -> AsyncIterator[list[Repositories]]:
    """Two instances on one database."""
    async with repositories(database, 2) as both:
        yield both


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Movement]:
    """The changes that were attempted."""
    made: list[Movement] = []
    change = repository._change

    async def counted(
        connection: Connection, movement: Movement, *, reverses: int | None = None
    ) -> Accepted | None:
        made.append(movement)
        return await change(connection, movement, reverses=reverses)

    monkeypatch.setattr(repository, "_change", counted)
    return made


async def test_what_another_instance_has_covered_is_accepted(
    instances: list[Repositories],
) -> None:
    """The remembered state only decides what is sent first."""
    first, second = instances
    user = await first.opened(1)
    assert isinstance(await first.balances.change(Movement(user, -2)), Refused)
    await second.balances.change(Movement(user, 1))
    assert isinstance(await first.balances.change(Movement(user, -2)), Accepted)


@pytest.mark.single
async def test_a_refusal_from_memory_is_caught(
    instances: list[Repositories], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: refused by the state that is remembered."""

    async def remembered(_connection: Connection, movement: Movement) -> Refused | None:
        state = instances[0].balances._refusing.get(movement.user_id)
        return None if state is None else Refused(state, movement.amount)

    first, second = instances
    user = await first.opened(1)
    assert isinstance(await first.balances.change(Movement(user, -2)), Refused)
    monkeypatch.setattr(repository, "_refusal", remembered)
    await second.balances.change(Movement(user, 1))
    assert isinstance(await first.balances.change(Movement(user, -2)), Refused)


@pytest.mark.single
async def test_a_refusal_that_is_expected_is_not_attempted(
    instances: list[Repositories], attempts: list[Movement]
) -> None:
    """Only what the remembered state does not allow, and until a change is accepted."""
    balances = instances[0].balances
    user = await instances[0].opened(3)
    sent = [
        (Movement(user, -4), 0, 1),  # nothing is remembered
        (Movement(user, -5), 0, 0),
        (Movement(user, -4, "k"), 0, 0),
        (Movement(user, -4, "k"), 0, 0),  # its replay
        (Movement(user, -3), 1, 1),  # the state that refused -4 allows it
        (Movement(user, -3), 0, 1),
        (Movement(user, 2), 1, 1),
        (Movement(user, -3), 0, 1),
    ]
    for movement, accepted, attempted in sent:
        attempts.clear()
        outcome = await balances.change(movement)
        assert isinstance(outcome, Accepted) == bool(accepted), movement
        assert len(attempts) == attempted, movement


async def test_keys_tags_and_settings_are_judged_as_ever(instances: list[Repositories]) -> None:
    """Also while a refusal is remembered."""
    first, second = instances
    user = await first.opened(1)
    kept = Movement(user, -1, "kept")
    made = await first.balances.change(kept)
    assert isinstance(made, Accepted)
    assert isinstance(await first.balances.change(Movement(user, -1)), Refused)
    # a key that was accepted before is replayed, though the account refuses it now
    assert await first.balances.change(kept) == made._replace(replayed=True)
    # a refusal is recorded under its key, and stays it
    keyed = Movement(user, -2, "refused")
    refused = await first.balances.change(keyed)
    assert isinstance(refused, Refused)
    await second.balances.change(Movement(user, 5))
    assert await first.balances.change(keyed) == refused._replace(replayed=True)
    with pytest.raises(VersionConflict):
        await first.balances.change(Movement(user, -9, tags=["1.1.0"]))
    # a floor is lowered, and an account thawed, by the other instance
    assert isinstance(await first.balances.change(Movement(user, -9)), Refused)
    await second.set(user, Patch(floor=-9))
    assert isinstance(await first.balances.change(Movement(user, -9)), Accepted)
    await second.set(user, Patch(frozen=True))
    assert isinstance(await first.balances.change(Movement(user, 1)), Refused)
    await second.set(user, Patch(frozen=False))
    assert isinstance(await first.balances.change(Movement(user, 1)), Accepted)


async def test_what_is_remembered_is_bounded(
    instances: list[Repositories], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account that refused longest ago is forgotten."""
    monkeypatch.setattr(repository, "REMEMBERED", 2)
    balances = instances[0].balances
    users = [await instances[0].opened() for _ in range(3)]
    for user in users:
        await balances.change(Movement(user, -1))
    assert [*balances._refusing] == users[1:]
