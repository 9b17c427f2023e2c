"""The user under test: the calls before and after the burst."""

from collections.abc import Awaitable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from loadtest.key import NEEDED
from loadtest.preconditions import CannotRunError, Target

_CALL_TIMEOUT_SECONDS = 30
_ENTRIES_PER_PAGE = 1000
MAX_INTEGER = 2**53 - 1  # the largest balance, amount and id


class ServiceModel(BaseModel):
    """A JSON object of the service: camelCase, exactly the declared types, unknown members ignored.

    Strict, so that a balance given as "9998" or 9998.0 is not taken for an integer.
    """

    model_config = ConfigDict(strict=True, frozen=True, alias_generator=to_camel)


Model = TypeVar("Model", bound=ServiceModel)


class Account(ServiceModel):
    """A user's balance as of a version; the version counts the user's entries.

    Of the balance `held` is reserved; what is left may not fall below the floor. The answer to a
    change has neither floor nor `frozen`.
    """

    user_id: int
    balance: int
    version: int
    held: int = 0
    floor: int = 0
    frozen: bool = False

    @property
    def spendable(self) -> int:
        """Return how much may be withdrawn."""
        return self.balance - self.held - self.floor


class Entry(ServiceModel):
    """One ledger entry of the user: the change and the balance after it."""

    version: int
    amount: int
    balance: int


class EntriesPage(ServiceModel):
    """Entries in ascending order of version; `next` is the cursor of the next page, if any."""

    entries: list[Entry]
    next: int | None


@dataclass(frozen=True, slots=True)
class Ledger:
    """The user after the burst, and the entries made since it began."""

    account: Account
    new_entries: list[Entry]


class Accounts:
    """Creates and reads users of the service at one target.

    Every method raises CannotRunError, with one sentence, when the service is unavailable, refuses,
    or breaks its contract.
    """

    def __init__(self, target: Target, api_key: str | None = None) -> None:
        self._target = target
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def create(self, balance: int) -> Account:
        """Create a user with an opening balance, which is entry 1.

        Another one than was asked for would move what is expected of the burst.
        """
        async with self._client() as client:
            call = client.post("/api/users", json={"balance": balance})
            account = await self._read(Account, call, HTTPStatus.CREATED)
        opening = {"balance": balance, "version": 1, "held": 0, "floor": 0, "frozen": False}
        if account != account.model_copy(update=opening):
            raise CannotRunError(
                f"{self._target.url} breaks its contract: asked for a user with balance {balance}, "
                f"it created {account!r}."
            )
        return account

    async def find(self, user_id: int) -> Account:
        """Read a user."""
        async with self._client() as client:
            return await self._read(Account, client.get(f"/api/users/{user_id}"))

    async def ledger(self, before: Account, *, at_most: int) -> Ledger:
        """Read the user again, and the entries made since `before`: about `at_most`, in pages."""
        entries: list[Entry] = []
        cursor: int | None = before.version
        path = f"/api/users/{before.user_id}"
        async with self._client() as client:
            account = await self._read(Account, client.get(path))
            for _ in range(at_most // _ENTRIES_PER_PAGE + 2):
                query = f"?after={cursor}&limit={_ENTRIES_PER_PAGE}"
                page = await self._read(EntriesPage, client.get(f"{path}/entries{query}"))
                entries += page.entries
                cursor = page.next
                if cursor is None:
                    break
        return Ledger(account, entries)

    def _client(self) -> httpx.AsyncClient:
        # trust_env=False: no proxy of the environment for a loopback address.
        return httpx.AsyncClient(
            base_url=self._target.url,
            headers=self._headers,
            timeout=_CALL_TIMEOUT_SECONDS,
            trust_env=False,
        )

    async def _read(
        self,
        model: type[Model],
        call: Awaitable[httpx.Response],
        expected: HTTPStatus = HTTPStatus.OK,
    ) -> Model:
        try:
            response = await call
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise CannotRunError(f"{_place(error.request)} got no answer: {reason}.") from error
        if response.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            given = "This key does not suffice" if self._headers else "The service needs a key"
            raise CannotRunError(f"{given} ({response.text[:300]}): {NEEDED}")
        if response.status_code != expected:
            raise CannotRunError(
                f"{_place(response.request)} answered {response.status_code} instead of "
                f"{expected.value}: {response.text[:300]}"
            )
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise CannotRunError(
                f"{self._target.url} does not speak this service's contract: "
                f"{response.text[:200]!r} is no {model.__name__}."
            ) from error


def _place(request: httpx.Request) -> str:
    return f"{request.method} {request.url}"
