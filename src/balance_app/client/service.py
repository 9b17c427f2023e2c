"""The calls of the service."""

import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import datetime
from types import EllipsisType, TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import httpx
from pydantic_core import from_json

from balance_app.client.answers import (
    Account,
    Change,
    Entry,
    Hold,
    HoldState,
    Made,
    PastBalance,
    Received,
    Settings,
    Transfer,
    parse,
)
from balance_app.client.failures import (
    IncompleteExport,
    NotTheService,
    Unavailable,
    VersionConflict,
    refusal,
)
from balance_app.client.transport import Call, Transport

Order = Literal["asc", "desc"]
Format = Literal["csv", "jsonl"]

_KEY: Final = re.compile("[!-~]{1,255}")
_MEDIA_TYPES: Final[dict[Format, str]] = {"csv": "text/csv", "jsonl": "application/jsonl"}
_LAST_LINE_BYTES: Final = 4096  # no last line is as long
_PAGE: Final = 1000


class Service:
    """The service at one URL; use it as `async with Service(url) as service`.

    A call is sent again while there is no answer, the service is unavailable (after as long as it
    asks for), or the outcome is not known: the last time `patience` seconds after the first. Money
    is moved with an idempotency key, so it takes effect once; a key of your own, kept before the
    call, also repeats it in another process. Every call may raise a `ServiceFailure`: `Refused` (of
    one class per problem), `Unavailable` (nothing was changed), `OutcomeUnknown` or
    `NotTheService`.
    """

    def __init__(  # noqa: PLR0913 - each is an option
        self,
        url: str,
        *,
        key: str | None = None,
        patience: float = 30,
        timeout: float | None = None,
        http: httpx.AsyncClient | None = None,
        on_retry: Callable[[Unavailable], None] | None = None,
    ) -> None:
        """`timeout`: how many seconds a try may wait for the next part of its answer.

        `key` is the API key, by default BALANCE_APP_KEY of the environment; it is sent to an https
        URL and to this machine only. `http` is a client of your own, which has its own
        certificates, proxies and authentication, so that only a given `key` is sent, and anywhere;
        you close it. `on_retry` is called with the failure of a try before the wait for the next
        one; what it raises ends the call.

        Raises:
            InvalidURL: the URL is none of a service.
            KeyNotSent: the key is none, or others could read it on its way.
        """
        self.transport = Transport(
            url, key=key, patience=patience, timeout=timeout, http=http, on_retry=on_retry
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # -- moving money --------------------------------------------------------------------------

    async def change(  # noqa: PLR0913 - the parts of a request
        self,
        user_id: int,
        amount: int,
        *,
        reference: str | None = None,
        note: str | None = None,
        key: str | None = None,
        if_match: str | None = None,
    ) -> Change:
        """Add an amount to a balance, or withdraw a negative one.

        With `if_match`, the `tag` of an account, only if the account has not changed since.

        Raises:
            InsufficientFunds, BalanceLimitExceeded, UserFrozen, UserNotFound, VersionConflict,
            IdempotencyKeyReused: it is refused.
        """
        json = {"userId": user_id, "amount": amount, "reference": reference, "note": note}
        return _read(
            Change,
            await self._move("balance", "change", json, user_id=user_id, key=key, tag=if_match),
        )

    async def transfer(  # noqa: PLR0913 - the parts of a request
        self,
        from_user_id: int,
        to_user_id: int,
        amount: int,
        *,
        reference: str | None = None,
        note: str | None = None,
        key: str | None = None,
        if_match: str | None = None,
    ) -> Transfer:
        """Move an amount from one user to another: both balances change, or none.

        The key and `if_match` belong to the paying user.

        Raises:
            InsufficientFunds, BalanceLimitExceeded, UserFrozen: by the account of their `user_id`.
        """
        json = {
            "fromUserId": from_user_id,
            "toUserId": to_user_id,
            "amount": amount,
            "reference": reference,
            "note": note,
        }
        received = await self._move(
            "transfers", "id", json, user_id=from_user_id, key=key, tag=if_match
        )
        return _read(Transfer, received)

    async def hold(  # noqa: PLR0913 - the parts of a request
        self,
        user_id: int,
        amount: int,
        *,
        expires_in_seconds: int,
        reference: str | None = None,
        note: str | None = None,
        key: str | None = None,
        if_match: str | None = None,
    ) -> Hold:
        """Reserve an amount, until it is captured, voided, or expires.

        Raises:
            InsufficientFunds, UserFrozen, UserNotFound, VersionConflict, IdempotencyKeyReused: it
                is refused.
        """
        json = {
            "userId": user_id,
            "amount": amount,
            "expiresInSeconds": expires_in_seconds,
            "reference": reference,
            "note": note,
        }
        return _read(
            Hold, await self._move("holds", "account", json, user_id=user_id, key=key, tag=if_match)
        )

    async def capture(
        self,
        hold_id: str,
        amount: int | None = None,
        *,
        reference: str | None = None,
        note: str | None = None,
    ) -> Hold:
        """Withdraw a hold's amount, or a part of it, and release the rest; once.

        Raises:
            HoldEnded: it was voided, has expired, or another amount of it was captured.
            CaptureExceedsHold, HoldNotFound, UserFrozen: it is refused.
        """
        json = {"amount": amount, "reference": reference, "note": note}
        path = f"/api/holds/{_segment(hold_id)}/capture"
        return _read(Hold, await self._send("POST", path, "account", json))

    async def void(self, hold_id: str) -> Hold:
        """Release a hold; once.

        Raises:
            HoldEnded: it was captured, or has expired.
            HoldNotFound: it is refused.
        """
        path = f"/api/holds/{_segment(hold_id)}/void"
        return _read(Hold, await self._send("POST", path, "account"))

    async def reverse(
        self, user_id: int, version: int, *, reference: str | None = None, note: str | None = None
    ) -> Change | Transfer:
        """Undo an entry by an opposite one, once; of a transfer both halves.

        Raises:
            InsufficientFunds, BalanceLimitExceeded, UserFrozen: by the account of their `user_id`.
            EntryNotFound, NotReversible, UserNotFound: it is refused.
        """
        path = f"/api/users/{_segment(user_id)}/entries/{_segment(version)}/reverse"
        received = await self._send("POST", path, None, {"reference": reference, "note": note})
        if "change" in received.body:
            return _read(Change, received)
        return _read(Transfer, received)

    async def outcome(self, user_id: int, key: str) -> Change | Transfer | Hold:
        """Return the answer to the request that was sent with this key of the user, or raise it.

        Raises:
            Refused: that request was refused, so.
            KeyNotFound: none has taken effect so far. While a try may be under way, this proves
                nothing: send the request again with its key.
        """
        path = f"/api/users/{_segment(user_id)}/changes/{_segment(key)}"
        received = await self._send("GET", path, "outcome")
        answer = received.body["answer"]
        if received.body["outcome"] != "accepted":
            raise refusal(answer, received.text)
        if "change" in answer:
            return _read(Change, received, answer)
        if "expiresAt" in answer:
            return _read(Hold, received, answer)
        return _read(Transfer, received, answer)

    # -- users ---------------------------------------------------------------------------------

    async def create_user(
        self,
        balance: int = 0,
        *,
        floor: int = 0,
        external_id: str | None = None,
        key: str | None = None,
    ) -> Account:
        """Create a user with an opening balance.

        Raises:
            ExternalIdTaken, FloorNotCovered, IdempotencyKeyReused: it is refused.
        """
        json = {"balance": balance, "floor": floor, "externalId": external_id}
        return _read(Account, await self._move("users", "balance", json, key=key))

    async def create_user_once(
        self, external_id: str, balance: int = 0, *, floor: int = 0
    ) -> Account:
        """Create the user with this external id, or return the one who is there, unchanged."""
        path = f"/api/users/by-external-id/{_segment(external_id)}"
        json = {"balance": balance, "floor": floor}
        return _read(Account, await self._send("PUT", path, "balance", json))

    async def user(self, user_id: int) -> Account:
        """Return a user's account.

        Raises:
            UserNotFound: there is no such user.
        """
        return _read(Account, await self._send("GET", f"/api/users/{_segment(user_id)}", "balance"))

    async def user_by_external_id(self, external_id: str) -> Account | None:
        """Return the account of the user with this external id, if there is one."""
        page = await self._get("/api/users", "users", externalId=external_id)
        return await self.user(page.body["users"][0]["userId"]) if page.body["users"] else None

    async def past_balance(
        self, user_id: int, *, at: datetime | None = None, version: int | None = None
    ) -> PastBalance:
        """Return the account as it was at a time (which has a zone), or after an entry.

        Raises:
            EntryNotFound: there was none yet.
            UserNotFound: there is no such user.
        """
        if (at is None) == (version is None):
            raise ValueError("give either a time or a version")
        path = f"/api/users/{_segment(user_id)}"
        return _read(PastBalance, await self._get(path, "balance", at=_time(at), version=version))

    async def users(self, *, after: int = 0) -> AsyncIterator[Account]:
        """Yield all accounts, by id, from above one on; they have no `tag`."""
        async for item in self._pages("/api/users", "users", after=after):
            yield parse(Account, item)

    async def change_settings(
        self,
        account: Account,
        *,
        floor: int | None = None,
        frozen: bool | None = None,
        external_id: str | EllipsisType | None = ...,
        by: str | None = None,
    ) -> Account:
        """Change settings of an account that was read by `user`, if they are still those.

        What is left out stays; None as external id removes it. `by` says who does so, for people.

        Raises:
            VersionConflict: somebody else has changed the settings meanwhile.
            ValueError: the account has no tag.
            FloorNotCovered, ExternalIdTaken: it is refused.
        """
        given = {"floor": floor, "frozen": frozen}
        json: dict[str, object] = {n: value for n, value in given.items() if value is not None}
        if external_id is not ...:
            json["externalId"] = external_id
        wanted = {
            "floor": account.floor,
            "frozen": account.frozen,
            "externalId": account.external_id,
            **json,
        }
        path = f"/api/users/{account.user_id}"
        call = Call("PATCH", path, "balance", {"by": by}, json, tag=f'"{account.tag}"')
        try:
            return _read(Account, await self.transport.send(call))
        except VersionConflict as conflict:
            # The try that has no answer may be the one that changed them.
            if conflict.doubtful and await self._is_set(account, wanted):
                return await self.user(account.user_id)
            raise

    async def settings(self, user_id: int, *, after: int = 0) -> AsyncIterator[Settings]:
        """Yield the changes of an account's settings, the oldest first.

        Raises:
            UserNotFound: there is no such user.
        """
        path = f"/api/users/{_segment(user_id)}/settings"
        async for item in self._pages(path, "settings", after=after):
            yield parse(Settings, item)

    # -- ledgers and holds ---------------------------------------------------------------------

    async def entries(  # noqa: PLR0913 - each selects
        self,
        user_id: int,
        *,
        order: Order = "asc",
        begin: datetime | None = None,
        end: datetime | None = None,
        reference: str | None = None,
        after: int | None = None,
    ) -> AsyncIterator[Entry]:
        """Yield a user's entries: made from `begin` on and before `end`, with this reference.

        Raises:
            UserNotFound: there is no such user.
        """
        path = f"/api/users/{_segment(user_id)}/entries"
        selection = _selection(order=order, begin=begin, end=end, reference=reference, after=after)
        async for item in self._pages(path, "entries", **selection):
            yield parse(Entry, item)

    async def statement(  # noqa: PLR0913 - each selects
        self,
        user_id: int,
        written: Format,
        *,
        order: Order = "asc",
        begin: datetime | None = None,
        end: datetime | None = None,
        reference: str | None = None,
        after: int | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the same entries as one export, piece by piece, as CSV or JSON lines.

        It has been read to its end, whatever its size, only if nothing was raised.

        Raises:
            IncompleteExport: it ended without the line that says that it is complete.
            UserNotFound: there is no such user.
        """
        path = f"/api/users/{_segment(user_id)}/entries"
        selection = _selection(order=order, begin=begin, end=end, reference=reference, after=after)
        tail = b""
        try:
            async with self.transport.stream(path, _MEDIA_TYPES[written], selection) as answer:
                async for piece in answer.aiter_bytes():
                    tail = (tail + piece)[-_LAST_LINE_BYTES:]
                    yield piece
        except Unavailable as error:
            if not tail:
                raise
            raise IncompleteExport(f"The export broke off: it is not complete. {error}") from error
        if not _is_complete(tail, written):
            raise IncompleteExport(
                "The export is not complete: it ended without the line that says so."
            )

    async def read_transfer(self, transfer_id: str) -> Transfer:
        """Return a transfer, and what both accounts had just after it.

        Raises:
            TransferNotFound: there is no such transfer.
        """
        return _read(Transfer, await self._get(f"/api/transfers/{_segment(transfer_id)}", "id"))

    async def read_hold(self, hold_id: str) -> Hold:
        """Return a hold, and how it has ended.

        Raises:
            HoldNotFound: there is no such hold.
        """
        return _read(Hold, await self._get(f"/api/holds/{_segment(hold_id)}", "id"))

    async def holds(
        self, user_id: int, *, state: HoldState | None = None, after: int = 0
    ) -> AsyncIterator[Hold]:
        """Yield a user's holds in the order in which they were placed.

        Raises:
            UserNotFound: there is no such user.
        """
        path = f"/api/users/{_segment(user_id)}/holds"
        async for item in self._pages(path, "holds", state=state, after=after):
            yield parse(Hold, item)

    # -- requests ------------------------------------------------------------------------------

    async def _move(  # noqa: PLR0913 - the parts of a request
        self,
        path: str,
        has: str,
        json: dict[str, Any],
        *,
        user_id: int | None = None,
        key: str | None,
        tag: str | None = None,
    ) -> Received:
        """Send a request that takes effect once by its key."""
        key = str(uuid.uuid4()) if key is None else key
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"The key {key!r} can't be sent: 1 to 255 visible ASCII characters can."
            )
        tag = tag if tag in {None, "*"} else f'"{tag}"'
        return await self.transport.send(
            Call("POST", f"/api/{path}", has, json=json, key=key, user_id=user_id, tag=tag)
        )

    async def _send(
        self, method: str, path: str, has: str | None, json: dict[str, Any] | None = None
    ) -> Received:
        """Send a request that takes effect once by itself."""
        return await self.transport.send(Call(method, path, has, json=json))

    async def _get(self, path: str, has: str, **params: str | int | None) -> Received:
        return await self.transport.send(Call("GET", path, has, params))

    async def _pages(
        self, path: str, has: str, **params: str | int | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the items of a list, page by page."""
        more = True
        while more:
            page = await self._get(path, has, **{**params, "limit": _PAGE})
            for item in page.body[has]:
                yield item
            params["after"] = page.body["next"]
            more = page.body["next"] is not None

    async def _is_set(self, account: Account, wanted: dict[str, Any]) -> bool:
        """Return whether the change of settings after an account's is the wanted one."""
        path = f"/api/users/{account.user_id}/settings"
        page = await self._get(path, "settings", after=account.settings_version, limit=1)
        first = page.body["settings"][:1]
        return bool(first) and {name: first[0].get(name) for name in wanted} == wanted


def _read(kind: type[Made], received: Received, body: dict[str, Any] | None = None) -> Made:
    try:
        return parse(kind, received.body if body is None else body, received)
    except (KeyError, ValueError) as error:
        raise NotTheService(
            f"The service's answer is no {kind.__name__} that this client knows."
        ) from error


def _selection(
    *,
    order: Order,
    begin: datetime | None,
    end: datetime | None,
    reference: str | None,
    after: int | None,
) -> dict[str, str | int | None]:
    return {
        "order": order,
        "from": _time(begin),
        "to": _time(end),
        "reference": reference,
        "after": after,
    }


def _time(moment: datetime | None) -> str | None:
    if moment is not None and moment.tzinfo is None:
        raise ValueError("a time needs a zone: datetime(..., tzinfo=UTC)")
    return None if moment is None else moment.isoformat()


def _segment(value: object) -> str:
    """Return one segment of a path; dots alone would lead elsewhere."""
    text = str(value)
    return "%2E" * len(text) if text in {".", ".."} else quote(text, safe="")


def _is_complete(tail: bytes, written: Format) -> bool:
    """Return whether an export that ends so has its last line."""
    line = tail.removesuffix(b"\n").rpartition(b"\n")[2]
    if not tail.endswith(b"\n"):
        return False
    if written == "csv":
        return line.startswith(b"complete,")
    try:
        return from_json(line).get("complete") is True
    except (ValueError, AttributeError):
        return False
