"""The repositories of several instances in the test's own process, on one real database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from balance_app.balances.accounts import AccountRepository, Opening, Patch
from balance_app.balances.guard import Guard
from balance_app.balances.holds import HoldRepository
from balance_app.balances.repository import BalanceRepository
from balance_app.db.pool import Database
from balance_app.main import LOCKING
from tests.db.test_pool import settings_for


@dataclass(frozen=True, slots=True)
class Repositories:
    """What one instance of the service changes accounts by."""

    database: Database
    balances: BalanceRepository
    holds: HoldRepository
    accounts: AccountRepository

    async def opened(self, balance: int = 0, floor: int = 0) -> int:
        """Create a user; return the id."""
        return (await self.accounts.open(Opening(balance, floor), None)).account.user_id

    async def set(self, user_id: int, patch: Patch) -> None:
        """Change settings of an account."""
        await self.accounts.change_settings(user_id, patch, None)


@asynccontextmanager
async def repositories(
    variables: dict[str, str], number: int = 1, **settings: object
) -> AsyncIterator[list[Repositories]]:
    """Run the repositories of several instances."""
    loaded = settings_for({**variables, **{k: str(v) for k, v in settings.items()}})
    databases = [Database(loaded) for _ in range(number)]
    try:
        for database in databases:
            await database.start()
        yield [_repositories(database) for database in databases]
    finally:
        for database in databases:
            await database.stop()


def _repositories(database: Database) -> Repositories:
    guard = Guard(database, LOCKING)
    return Repositories(
        database,
        BalanceRepository(database, guard),
        HoldRepository(database, guard),
        AccountRepository(database, guard),
    )
