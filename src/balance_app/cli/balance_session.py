"""What the commands for balances do: they send requests until they are answered, and report."""

import sys
import uuid
from collections.abc import Callable, Coroutine
from datetime import datetime
from types import EllipsisType
from typing import Any, Final, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from balance_app.cli import balance_output as output
from balance_app.cli.errors import Code, RemoteError
from balance_app.cli.session import Session
from balance_app.client import (
    Account,
    Change,
    Hold,
    OutcomeUnknown,
    PastBalance,
    ServiceFailure,
    Transfer,
    VersionConflict,
)
from balance_app.client.answers import HoldState, Received
from balance_app.client.service import Format, Order
from balance_app.formatting import visible

ENTRIES_SHOWN: Final = 5

Answered = TypeVar("Answered", Account, Change, Hold, PastBalance, Transfer, Change | Transfer)


class BalanceSession(Session):
    """The use of a service's balances."""

    # -- moving money --------------------------------------------------------------------------

    def change(
        self, user: int, amount: int, *, key: str | None, reference: str | None, note: str | None
    ) -> None:
        """Change a balance once, however often the change must be sent."""
        key = str(uuid.uuid4()) if key is None else key
        self._make(
            self._service.change(user, amount, key=key, reference=reference, note=note),
            output.change,
            "This change was already made with this key.",
            *("change", user, amount),
            reference=reference,
            note=note,
            key=key,
        )

    def transfer(  # noqa: PLR0913 - the parts of a request
        self,
        payer: int,
        payee: int,
        amount: int,
        *,
        key: str | None,
        reference: str | None,
        note: str | None,
    ) -> None:
        """Move an amount from one user to another."""
        key = str(uuid.uuid4()) if key is None else key
        self._make(
            self._service.transfer(payer, payee, amount, key=key, reference=reference, note=note),
            output.transfer,
            "This transfer was already made with this key.",
            *("transfer", payer, payee, amount),
            reference=reference,
            note=note,
            key=key,
        )

    def hold(  # noqa: PLR0913 - the parts of a request
        self,
        user: int,
        amount: int,
        *,
        seconds: int,
        key: str | None,
        reference: str | None,
        note: str | None,
    ) -> None:
        """Reserve an amount."""
        key = str(uuid.uuid4()) if key is None else key
        self._make(
            self._service.hold(
                user, amount, expires_in_seconds=seconds, key=key, reference=reference, note=note
            ),
            output.placed_hold,
            "This hold was already placed with this key.",
            *("hold", user, amount),
            **{"for": seconds},
            reference=reference,
            note=note,
            key=key,
        )

    def capture(
        self, hold: str, amount: int | None, *, reference: str | None, note: str | None
    ) -> None:
        """Withdraw a hold's amount, or a part of it."""
        self._make(
            self._service.capture(hold, amount, reference=reference, note=note),
            output.ended_hold,
            "It was already captured.",
            *("capture", hold),
            amount=amount,
            reference=reference,
            note=note,
        )

    def void(self, hold: str) -> None:
        """Release a hold."""
        self._make(
            self._service.void(hold), output.ended_hold, "It was already voided.", "void", hold
        )

    def reverse(self, user: int, version: int, *, reference: str | None, note: str | None) -> None:
        """Undo an entry by an opposite one."""
        self._make(
            self._service.reverse(user, version, reference=reference, note=note),
            output.reversal,
            "It was already reversed.",
            *("reverse", user, version),
            reference=reference,
            note=note,
        )

    def _make(
        self,
        call: Coroutine[Any, Any, Answered],
        render: Callable[[Answered], str],
        before: str,
        *command: str | int,
        **options: str | int | None,
    ) -> None:
        """Send a request that takes effect once, and report what was done.

        `before` says that an earlier request did it; `command` sends it again.

        Raises:
            RemoteError: it is refused, or its outcome is not known.
        """
        how = "Send it again" + (" with its key" if "key" in options else "")
        again = f"{how}, and it takes effect once: {self._command(*command, **options)}"
        made = self._send(call, again)
        said = f" {before}" if _received(made).replayed else ""
        try:
            self._report(_received(made).text, lambda: Text(visible(render(made) + said)))
        except OSError as error:
            # It is done: by another exit code than 0 a script would do it once more.
            self._message(f"It was done, but that can't be printed: {error.strerror}. {again}")

    def _send(self, call: Coroutine[Any, Any, Answered], again: str) -> Answered:
        """Return the answer to a request; `again` says how to send it once more.

        Raises:
            RemoteError: it is refused, or its outcome is not known.
        """
        try:
            return self._runner.run(call)
        except KeyboardInterrupt:
            self._message(f"It is not known whether it was done. {again}")
            raise
        except OutcomeUnknown as failure:
            raise RemoteError(f"{failure} {again}", Code.UNKNOWN, answer=failure.answer) from None
        except ServiceFailure as failure:
            raise self._error(failure) from None
        except UnicodeError:
            raise RemoteError("What is sent has to be text in UTF-8.", Code.WRONG) from None
        except ValueError as error:
            raise RemoteError(str(error), Code.WRONG) from None

    # -- users ---------------------------------------------------------------------------------

    def users(self, after: int, limit: int) -> None:
        """Show users by id."""
        answer = self._get("/api/users", "users", after=after, limit=limit)
        accounts = answer.body["users"]
        self._report(
            answer.text,
            lambda: (
                output.users_table(accounts, self._out) if accounts else Text("No users match.")
            ),
        )
        if answer.body["next"] is not None:
            self._next_page("More", "users", after=answer.body["next"], limit=limit)

    def find_user(self, external_id: str) -> None:
        """Show the user with an external id."""
        account = self._run(self._service.user_by_external_id(external_id))
        if account is None:
            raise RemoteError(f"There is no user with external id {external_id}.", Code.FAILED)
        self._report_account(account)

    def user(self, user: int, *, at: datetime | None, version: int | None) -> None:
        """Show an account and its settings, or its balance at a past moment."""
        if at is None and version is None:
            self._report_account(self._run(self._service.user(user)))
            return
        past = self._run(self._service.past_balance(user, at=at, version=version))
        self._report(_received(past).text, lambda: Text(visible(output.past_balance(past, at))))

    def set_user(
        self,
        user: int,
        *,
        floor: int | None,
        frozen: bool | None,
        external_id: str | EllipsisType | None,
        by: str,
    ) -> None:
        """Change settings of an account, unless somebody else does so meanwhile.

        Raises:
            RemoteError: somebody did; the message says what is different.
        """
        account = self._run(self._service.user(user))
        try:
            changed = self._runner.run(
                self._service.change_settings(
                    account, floor=floor, frozen=frozen, external_id=external_id, by=by
                )
            )
        except VersionConflict as conflict:
            now = self._run(self._service.user(user))
            raise RemoteError(
                f"User {user} was changed meanwhile: {output.differences(account, now)}. "
                "Nothing was changed by this command; run it again to do so.",
                Code.FAILED,
                answer=conflict.answer,
                problem=conflict.code,
            ) from None
        except ServiceFailure as failure:
            raise self._error(failure) from None
        self._report_account(changed)

    def _report_account(self, account: Account) -> None:
        self._report(_received(account).text, lambda: Text(visible(output.account(account))))

    # -- ledgers and holds ---------------------------------------------------------------------

    def balance(self, user: int, entries: int | None) -> None:
        """Show a user's balance and latest entries; as JSON those only on request."""
        account = self._run(self._service.user(user))
        if self._as_json and entries is None:
            self._report(_received(account).text, Text)
            return
        shown = ENTRIES_SHOWN if entries is None else entries
        page = self._get(f"/api/users/{user}/entries", "entries", order="desc", limit=shown)
        latest = page.body["entries"]

        def render() -> RenderableType:
            line = Text(visible(output.balance(account)))
            if not latest:
                return line
            return Group(line, Text(), output.entries_table(latest, page.now, self._out))

        self._report(page.text, render)

    def entries(  # noqa: PLR0913 - each selects
        self,
        user: int,
        *,
        order: Order,
        begin: datetime | None,
        end: datetime | None,
        reference: str | None,
        after: int | None,
        limit: int,
    ) -> None:
        """Show a page of a user's ledger."""
        options: dict[str, str | int | None] = {
            "order": order,
            "from": None if begin is None else begin.isoformat(),
            "to": None if end is None else end.isoformat(),
            "reference": reference,
            "limit": limit,
        }
        page = self._get(f"/api/users/{user}/entries", "entries", after=after, **options)
        found = page.body["entries"]
        self._report(
            page.text,
            lambda: (
                output.entries_table(found, page.now, self._out)
                if found
                else Text("No entries match.")
            ),
        )
        if page.body["next"] is not None:
            self._next_page("More", "statement", str(user), after=page.body["next"], **options)

    def export(  # noqa: PLR0913 - each selects
        self,
        user: int,
        written: Format,
        *,
        order: Order,
        begin: datetime | None,
        end: datetime | None,
        reference: str | None,
        after: int | None,
    ) -> None:
        """Write a user's ledger to stdout.

        Raises:
            RemoteError: what was written is not complete.
        """
        pieces = self._service.statement(
            user, written, order=order, begin=begin, end=end, reference=reference, after=after
        )
        for piece in self._each(pieces):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    def daily_balances(self, user: int, before: str | None, limit: int) -> None:
        """Show a user's past balances, the latest day first."""
        path = f"/api/users/{user}/daily-balances"
        answer = self._get(path, "dailyBalances", before=before, limit=limit)
        days = answer.body["dailyBalances"]
        self._report(
            answer.text,
            lambda: (
                output.daily_balances_table(days, self._out)
                if days
                else Text("No daily balances match.")
            ),
        )
        if answer.body["next"] is not None:
            options = {"before": answer.body["next"], "limit": limit}
            self._next_page("More", "daily-balances", str(user), **options)

    def holds(self, user: int, state: HoldState | None, after: int, limit: int) -> None:
        """Show a user's holds in the order in which they were placed."""
        path = f"/api/users/{user}/holds"
        answer = self._get(path, "holds", state=state, after=after, limit=limit)
        found = answer.body["holds"]
        self._report(
            answer.text,
            lambda: (
                output.holds_table(found, answer.now, self._out)
                if found
                else Text("No holds match.")
            ),
        )
        if answer.body["next"] is not None:
            options = {"state": state, "after": answer.body["next"], "limit": limit}
            self._next_page("More", "holds", str(user), **options)


def _received(answer: Account | Change | Hold | PastBalance | Transfer) -> Received:
    assert answer.received is not None  # noqa: S101 - the answer to a call has it
    return answer.received
