"""Many concurrent changes around a balance of zero: every answer fits into one history."""

from collections.abc import Sequence
from random import choice, random

from tests.history import Kind, Violation, check
from tests.processes import Instance, running
from tests.system.client import Load, open_account, read_ledger
from tests.system.databases import own_postgres
from tests.system.sizes import size

CHANGES = size(small=3_000, full=100_000)
CONNECTIONS = 32
OPENING_BALANCE = 21


class MixedLoad(Load):
    """A given number of deposits and withdrawals of 7, with some reads between them."""

    def __init__(self, urls: Sequence[str], user_id: int, changes: int) -> None:
        super().__init__(urls, user_id, connections=CONNECTIONS)
        self._left = changes

    async def _work(self) -> None:
        while self._left:
            self._left -= 1
            # More withdrawals than deposits: the balance stays near zero, so that some are refused.
            await self._decide(next(self.keys), choice((-7, -7, 7)))
            if random() < 0.05:
                await self._read()


async def run_mixed_load(changes: int, *program: str) -> tuple[list[Violation], MixedLoad, str]:
    """Run the load on three instances; return the violations, the load, and the server's log."""
    async with own_postgres() as server:
        instances = [
            Instance(server.environment(), f"app{number}", program=program) for number in (1, 2, 3)
        ]
        async with running(instances):
            started = len(server.log.read_text())  # one instance's upgrade may refuse another's
            account = await open_account(instances[0].url, OPENING_BALANCE)
            async with MixedLoad(
                [instance.url for instance in instances], account, changes
            ) as load:
                pass
            ledger = await read_ledger(instances[0].url, account)
        log = server.log.read_text()[started:]
    print(f"{changes} changes of 7: {load.figures()}")
    return check(ledger, load.operations), load, log


async def test_every_answer_fits_into_one_history() -> None:
    """No 5xx, no deadlock, no CHECK violation, and no two answers that contradict each other."""
    violations, load, log = await run_mixed_load(CHANGES, "-m", "balance_app", "serve")
    assert load.unexpected == []
    assert set(load.answers) == {"200", "409", "GET 200"}
    assert violations == []
    assert "deadlock" not in log
    assert "violates check constraint" not in log
    assert "ERROR" not in log


async def test_a_refusal_from_the_updates_own_snapshot_is_caught() -> None:
    """The control: without the second statement some refusals contradict themselves."""
    violations, _, _ = await run_mixed_load(3_000, "-m", "tests.mutants", "fresh-snapshot")
    assert {Kind.GROUNDLESS_REFUSAL, Kind.STALE_REFUSAL} & {each.kind for each in violations}
