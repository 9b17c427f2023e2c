from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import pytest

from tests.accounts.check import RULES, Rule, check_accounts
from tests.accounts.index import Index
from tests.accounts.kinds import AccountsKind
from tests.accounts.model import (
    Account,
    Capture,
    Change,
    Done,
    Ended,
    Entry,
    Exceeded,
    Hold,
    HoldRead,
    Operation,
    Past,
    PastRead,
    Place,
    Read,
    Refused,
    Reverse,
    Seen,
    State,
    Transfer,
    Try,
    Undecided,
    Void,
)
from tests.history import LARGEST, Kind

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def seen(user_id: int, version: int, balance: int, held: int = 0) -> Seen:
    return Seen(user_id, version, balance, held, balance - held)


# A transfer of 20 while 30 are held, of which 10 are captured; a hold that is voided, one that
# expires; the reversal of the transfer, and of a change.
ACCOUNTS = {
    1: Account(
        (
            Entry(1, 100, 100, None, at(0)),
            Entry(2, -20, 80, "t", at(2), held=30, other=(2, 2)),
            Entry(3, -10, 70, None, at(3), hold=1),
            Entry(4, 20, 90, None, at(10), other=(2, 3), reverses=2),
        ),
        (
            Hold(1, 30, "h", at(1), at(99), "captured", at(3), captured=10),
            Hold(3, 5, "g", at(4), at(99), "voided", at(5)),
            Hold(5, 7, "x", at(6), at(8), "expired", at(9)),
        ),
        State(4, 90),
    ),
    2: Account(
        (
            Entry(1, 50, 50, None, at(0)),
            Entry(2, 20, 70, None, at(2), other=(1, 2)),
            Entry(3, -20, 50, None, at(10), other=(1, 4), reverses=2),
            Entry(4, 6, 56, "c", at(11)),
            Entry(5, -6, 50, None, at(12), reverses=4),
            Entry(6, 1, 51, "o", at(13)),
        ),
        (Hold(1, 9, "k", at(14), at(99)),),
        State(6, 51, 9),
    ),
}

HOLD = Try(Place(1, 30, "h"), Done((seen(1, 1, 100, 30),), at(1), 1), 1, 1.5)
TRANSFER = Try(Transfer(1, 2, 20, "t"), Done((seen(1, 2, 80, 30), seen(2, 2, 70)), at(2)), 2, 2.5)
TOO_MUCH = Try(Transfer(1, 2, 51, "u"), Refused(seen(1, 2, 80, 30), -51), 2.6, 2.7)
EXCEEDED = Try(Capture(1, 1, 31), Exceeded(30), 2.8, 2.9)
CAPTURE = Try(Capture(1, 1, 10), Done((seen(1, 3, 70),), at(3)), 3, 3.5)
PLACED = Try(Place(1, 5, "g"), Done((seen(1, 3, 70, 5),), at(4), 3), 4, 4.5)
OPEN = HoldRead(1, 3, "open", 4.6, 4.7)
VOID = Try(Void(1, 3), Done((seen(1, 3, 70),), at(5)), 5, 5.5)
ENDED = Try(Capture(1, 3), Ended("voided", at(5)), 5.6, 5.7)
EXPIRING = Try(Place(1, 7, "x"), Undecided.UNKNOWN, 6, 6.5)
EXPIRED = HoldRead(1, 5, "expired", 9, 9.5)
REVERSED = Try(Reverse(1, 2), Done((seen(1, 4, 90), seen(2, 3, 50)), at(10)), 10, 10.5)
CHANGE = Try(Change(2, 6, "c"), Done((seen(2, 4, 56),), at(11)), 11, 11.5)
UNDONE = Try(Reverse(2, 4), Undecided.UNKNOWN, 12, 12.5)
ONE = Try(Change(2, 1, "o"), Done((seen(2, 6, 51),), at(13)), 13, 13.5)
KEPT = Try(Place(2, 9, "k"), Done((seen(2, 6, 51, 9),), at(14), 1), 14, 14.5)
REFUSED_HOLD = Try(Place(2, 43, "l"), Refused(seen(2, 6, 51, 9), -43), 15, 15.5)
SNAPSHOT = Read((seen(1, 4, 90), seen(2, 6, 51, 9)), 16, 16.5)
PAST = PastRead(1, at(2.5), Past(2, 80, 30, at(2)), 17, 17.5)
VERSION = PastRead(1, 3, Past(3, 70, 0, at(3)), 17, 17.5)
BEFORE = PastRead(1, at(-1), None, 17, 17.5)
FULL = Try(Transfer(1, 2, LARGEST, "m"), Refused(seen(1, 4, 90), -LARGEST), 18, 18.5)

OPERATIONS: tuple[Operation, ...] = (
    HOLD,
    TRANSFER,
    TOO_MUCH,
    EXCEEDED,
    CAPTURE,
    PLACED,
    OPEN,
    VOID,
    ENDED,
    EXPIRING,
    EXPIRED,
    REVERSED,
    CHANGE,
    UNDONE,
    ONE,
    KEPT,
    REFUSED_HOLD,
    SNAPSHOT,
    PAST,
    VERSION,
    BEFORE,
    FULL,
)


def operations(
    *changed: tuple[Operation, Operation | None], more: tuple[Operation, ...] = ()
) -> list[Operation]:
    """Return the example with some operations changed (or removed: None) and some more."""
    new = dict(changed)
    kept = [new.get(op, op) for op in OPERATIONS]
    return [op for op in kept if op is not None] + list(more)


def entry(user_id: int, version: int, **changes: Any) -> dict[int, Account]:  # noqa: ANN401
    """Return the example's accounts with an entry changed."""
    account = ACCOUNTS[user_id]
    entries = [
        replace(each, **changes) if each.version == version else each for each in account.entries
    ]
    return {**ACCOUNTS, user_id: replace(account, entries=tuple(entries))}


def hold(user_id: int, number: int, **changes: Any) -> dict[int, Account]:  # noqa: ANN401
    """Return the example's accounts with a hold changed."""
    account = ACCOUNTS[user_id]
    holds = [replace(each, **changes) if each.number == number else each for each in account.holds]
    return {**ACCOUNTS, user_id: replace(account, holds=tuple(holds))}


def more(
    user_id: int,
    *rows: Entry | Hold,
    accounts: dict[int, Account] = ACCOUNTS,
    **changes: Any,  # noqa: ANN401
) -> dict[int, Account]:
    """Return accounts with more rows of a user, and another final state or floor."""
    account = accounts[user_id]
    entries = tuple(row for row in rows if isinstance(row, Entry))
    holds = tuple(row for row in rows if isinstance(row, Hold))
    grown = replace(account, entries=account.entries + entries, holds=account.holds + holds)
    return {**accounts, user_id: replace(grown, **changes)}


def done(op: Try, *states: Seen, **changes: Any) -> Try:  # noqa: ANN401
    """Return an acknowledged try with another answer."""
    assert isinstance(op.outcome, Done)
    return replace(op, outcome=replace(op.outcome, **({"states": states} if states else changes)))


def kinds(accounts: dict[int, Account], operations: list[Operation]) -> set[StrEnum]:
    return {violation.kind for violation in check_accounts(accounts, operations)}


K = AccountsKind
# What follows another hold in time, so that the states before stay as they are.
PLACED_TWICE = more(2, Hold(2, 9, "k", at(15), at(99)), final=State(6, 51, 18))
A_THIRD = {
    **ACCOUNTS,
    3: Account((Entry(1, 0, 0, None, at(0)), Entry(2, 3, 3, "z", at(14))), (), State(2, 3)),
}

WRONG: dict[str, tuple[dict[int, Account], list[Operation], set[StrEnum]]] = {
    "half of a transfer is missing": (
        more(
            1,
            Entry(5, -1, 89, "p", at(20), other=(2, 7)),
            final=State(5, 89),
        ),
        operations(more=(Try(Transfer(1, 2, 1, "p"), Undecided.UNKNOWN, 20, 21),)),
        {K.HALF_MISSING},
    ),
    "an entry names a half that names another": (
        entry(2, 6, other=(1, 2), key="o"),
        operations((ONE, None)),
        {K.HALVES_DIFFER, Kind.KEY_TWICE},
    ),
    "the halves have different times": (
        entry(2, 2, at=at(2.1)),
        operations(),
        {K.HALVES_DIFFER, K.ANSWER_DIFFERS},
    ),
    "the halves have different amounts": (
        more(
            2,
            Entry(7, 2, 53, None, at(20), held=9, other=(1, 5)),
            accounts=more(1, Entry(5, -1, 89, "p", at(20), other=(2, 7)), final=State(5, 89)),
            final=State(7, 53, 9),
        ),
        operations(more=(Try(Transfer(1, 2, 1, "p"), Undecided.UNKNOWN, 20, 21),)),
        {K.HALVES_DIFFER, Kind.PHANTOM},
    ),
    "an acknowledged transfer is in no ledger": (
        ACCOUNTS,
        operations(
            more=(
                Try(
                    Transfer(1, 2, 1, "p"),
                    Done((seen(1, 5, 89), seen(2, 7, 52, 9)), at(20)),
                    20,
                    21,
                ),
            )
        ),
        {Kind.LOST_CHANGE},
    ),
    "a transfer was answered with another balance of the payee": (
        ACCOUNTS,
        operations((TRANSFER, done(TRANSFER, seen(1, 2, 80, 30), seen(2, 2, 71)))),
        {Kind.ALTERED_CHANGE},
    ),
    "a transfer was answered with one side only": (
        ACCOUNTS,
        operations((TRANSFER, done(TRANSFER, seen(1, 2, 80, 30)))),
        {K.ANSWER_DIFFERS, Kind.PHANTOM},
    ),
    "a transfer was answered with another time": (
        ACCOUNTS,
        operations((TRANSFER, done(TRANSFER, at=at(2.1)))),
        {K.ANSWER_DIFFERS},
    ),
    "a transfer was answered with something else held": (
        ACCOUNTS,
        operations((TRANSFER, done(TRANSFER, seen(1, 2, 80, 31), seen(2, 2, 70)))),
        {K.ANSWER_DIFFERS},
    ),
    "what is available and held is not the balance": (
        ACCOUNTS,
        operations((HOLD, done(HOLD, Seen(1, 1, 100, 30, 71)))),
        {K.AVAILABLE_DIFFERS},
    ),
    "a transfer was refused by the payee for the payer's funds": (
        ACCOUNTS,
        operations((TOO_MUCH, replace(TOO_MUCH, outcome=Refused(seen(2, 2, 70), -51)))),
        {K.WRONG_SIDE, Kind.GROUNDLESS_REFUSAL},
    ),
    "a transfer was refused by a third account": (
        A_THIRD,
        operations(
            (TOO_MUCH, replace(TOO_MUCH, outcome=Refused(seen(3, 1, 0), -51))),
            more=(Try(Change(3, 3, "z"), Undecided.UNKNOWN, 14, 15),),
        ),
        {K.WRONG_SIDE},
    ),
    "a transfer was refused by one side, and again by the other": (
        ACCOUNTS,
        operations(
            more=(replace(FULL, outcome=Refused(seen(2, 6, 51, 9), LARGEST), sent=20, answered=21),)
        ),
        {Kind.REPLAY_DIFFERS},
    ),
    "a transfer was refused, though enough was available": (
        ACCOUNTS,
        operations(
            (
                TOO_MUCH,
                replace(
                    TOO_MUCH,
                    request=Transfer(1, 2, 50, "u"),
                    outcome=Refused(seen(1, 2, 80, 30), -50),
                ),
            )
        ),
        {Kind.GROUNDLESS_REFUSAL},
    ),
    "a hold was refused, though enough was available": (
        ACCOUNTS,
        operations(
            (
                REFUSED_HOLD,
                replace(
                    REFUSED_HOLD,
                    request=Place(2, 42, "l"),
                    outcome=Refused(seen(2, 6, 51, 9), -42),
                ),
            )
        ),
        {Kind.GROUNDLESS_REFUSAL},
    ),
    "a refused transfer took effect": (
        ACCOUNTS,
        operations((TRANSFER, replace(TOO_MUCH, request=Transfer(1, 2, 51, "t")))),
        {Kind.REFUSED_IN_LEDGER, Kind.PHANTOM},
    ),
    "a snapshot has one half of a transfer": (
        ACCOUNTS,
        operations(more=(Read((seen(1, 1, 100, 30), seen(2, 2, 70)), 2, 2.5),)),
        {K.TORN_SNAPSHOT},
    ),
    "a read has something held that never was": (
        ACCOUNTS,
        operations(more=(Read((seen(1, 2, 80, 29),), 2, 2.5),)),
        {Kind.NO_SUCH_STATE},
    ),
    "an entry has another time than the order of versions": (
        entry(2, 5, at=at(10.5)),
        operations(),
        {K.TIME_WENT_BACK},
    ),
    "a hold ended before it was placed": (
        hold(1, 5, at=at(9.7), ended_at=at(9.5), expires_at=at(9)),
        operations(),
        {K.TIME_WENT_BACK},
    ),
    "an entry has something else held": (entry(1, 4, held=1), operations(), {K.HELD_DIFFERS}),
    "the account has something else held than its open holds": (
        more(2, final=State(6, 51, 8)),
        operations(),
        {K.HELD_DIFFERS},
    ),
    "what is available is below the floor": (
        more(1, floor=60),
        operations(),
        {Kind.BELOW_FLOOR},
    ),
    "an acknowledged hold is not there": (
        ACCOUNTS,
        operations(more=(Try(Place(1, 1, "n"), Done((seen(1, 4, 90, 1),), at(20), 7), 20, 21),)),
        {K.HOLD_LOST},
    ),
    "a hold that was read is not there": (
        ACCOUNTS,
        operations((EXPIRED, replace(EXPIRED, number=6, state="open"))),
        {K.HOLD_LOST},
    ),
    "a hold was acknowledged with another number": (
        ACCOUNTS,
        operations((KEPT, done(KEPT, number=2))),
        {K.HOLD_ALTERED},
    ),
    "no try can have placed a hold": (ACCOUNTS, operations((EXPIRING, None)), {K.HOLD_PHANTOM}),
    "an unknown try placed another amount": (
        ACCOUNTS,
        operations((EXPIRING, replace(EXPIRING, request=Place(1, 8, "x")))),
        {K.HOLD_PHANTOM},
    ),
    "a refused hold was placed": (
        ACCOUNTS,
        operations((KEPT, replace(REFUSED_HOLD, request=Place(2, 43, "k")))),
        {Kind.REFUSED_IN_LEDGER},
    ),
    "a hold was placed though it was not applied": (
        ACCOUNTS,
        operations(more=(replace(EXPIRING, outcome=Undecided.NOT_APPLIED, sent=7, answered=8),)),
        {Kind.NOT_APPLIED_IN_LEDGER},
    ),
    "a key placed two holds": (PLACED_TWICE, operations(), {Kind.KEY_TWICE}),
    "a hold was placed with another state than acknowledged": (
        ACCOUNTS,
        operations((HOLD, done(HOLD, seen(1, 1, 100, 31)))),
        {K.ANSWER_DIFFERS},
    ),
    "an acknowledged void has no effect": (
        ACCOUNTS,
        operations(more=(Try(Void(2, 1), Done((seen(2, 6, 51),), at(20)), 20, 21),)),
        {K.END_LOST},
    ),
    "no try can have voided a hold": (ACCOUNTS, operations((VOID, None)), {K.END_PHANTOM}),
    "no try can have captured a hold": (ACCOUNTS, operations((CAPTURE, None)), {Kind.PHANTOM}),
    "a hold that was captured was voided too": (
        ACCOUNTS,
        operations(more=(Try(Void(1, 1), Done((seen(1, 3, 70),), at(3)), 3, 3.5),)),
        {K.ENDED_TWICE},
    ),
    "a hold was captured after its expiry was seen": (
        ACCOUNTS,
        operations(more=(HoldRead(1, 1, "expired", 2.6, 2.7),)),
        {K.ENDED_TWICE},
    ),
    "a capture was refused, since the hold had ended in another way": (
        ACCOUNTS,
        operations((ENDED, replace(ENDED, outcome=Ended("expired", at(5))))),
        {K.ENDED_TWICE},
    ),
    "a capture was refused, since the hold had ended at another time": (
        ACCOUNTS,
        operations((ENDED, replace(ENDED, outcome=Ended("voided", at(5.1))))),
        {K.ANSWER_DIFFERS},
    ),
    "a capture was refused, though the hold is open": (
        ACCOUNTS,
        operations(more=(Try(Capture(2, 1), Ended("voided", at(20)), 20, 21),)),
        {K.END_LOST},
    ),
    "a capture was refused before the hold had ended": (
        ACCOUNTS,
        operations((ENDED, replace(ENDED, sent=4.6, answered=4.7))),
        {K.NO_ORDER},
    ),
    "a capture was refused as too large for a hold that is large enough": (
        ACCOUNTS,
        operations((EXCEEDED, replace(EXCEEDED, request=Capture(1, 1, 30)))),
        {Kind.GROUNDLESS_REFUSAL},
    ),
    "a hold expired before its time": (
        hold(1, 5, expires_at=at(9.5)),
        operations(),
        {K.EXPIRED_EARLY},
    ),
    "a hold was voided when its time was known to have come": (
        hold(1, 3, expires_at=at(4)),
        operations(),
        {K.OVERDUE},
    ),
    "a hold was open when its time was known to have come": (
        hold(1, 5, expires_at=at(5)),
        operations(more=(HoldRead(1, 5, "open", 8, 8.5),)),
        {K.OVERDUE},
    ),
    "a captured hold has no entry": (
        hold(2, 1, state="captured", ended_at=at(20), captured=9),
        operations(),
        {K.CAPTURE_DIFFERS, K.HELD_DIFFERS},
    ),
    "another amount was captured than the entry's": (
        hold(1, 1, captured=11),
        operations(),
        {K.CAPTURE_DIFFERS},
    ),
    "more was captured than was held": (
        hold(1, 1, amount=9),
        operations(),
        {
            K.CAPTURE_DIFFERS,
            K.HOLD_ALTERED,
            K.ANSWER_DIFFERS,
            K.HELD_DIFFERS,
            Kind.NO_SUCH_STATE,
            Kind.GROUNDLESS_REFUSAL,
        },
    ),
    "a voided hold has an entry": (
        more(1, Entry(5, -5, 85, None, at(20), hold=3), final=State(5, 85)),
        operations(more=(Try(Capture(1, 3), Undecided.UNKNOWN, 20, 21),)),
        {K.CAPTURE_DIFFERS, K.HELD_DIFFERS},
    ),
    "an entry is of a hold that is not there": (
        entry(2, 6, hold=7, key=None),
        operations((ONE, replace(ONE, request=Capture(2, 7, -1)))),
        {K.CAPTURE_DIFFERS, K.HOLD_LOST},
    ),
    "a hold was captured twice": (
        more(1, Entry(5, -10, 80, None, at(20), hold=1), final=State(5, 80)),
        operations(),
        {Kind.KEY_TWICE, K.HELD_DIFFERS},
    ),
    "an entry was reversed twice": (
        more(2, Entry(7, -6, 45, None, at(13.5), reverses=4), final=State(7, 45, 9)),
        operations(
            (KEPT, done(KEPT, seen(2, 7, 45, 9))),
            (REFUSED_HOLD, None),
            (SNAPSHOT, None),
        ),
        {Kind.KEY_TWICE},
    ),
    "a reversal has another amount": (
        entry(2, 5, reverses=1),
        operations((UNDONE, replace(UNDONE, request=Reverse(2, 1)))),
        {K.REVERSAL_DIFFERS, Kind.PHANTOM},
    ),
    "a reversal was reversed": (
        more(2, Entry(7, 6, 57, None, at(20), reverses=5, held=9), final=State(7, 57, 9)),
        operations(more=(Try(Reverse(2, 5), Undecided.UNKNOWN, 20, 21),)),
        {K.REVERSAL_DIFFERS},
    ),
    "one half of a transfer was reversed": (
        more(2, Entry(7, -20, 31, None, at(20), reverses=2, held=9), final=State(7, 31, 9)),
        operations(more=(Try(Reverse(2, 2), Undecided.UNKNOWN, 20, 21),)),
        {K.REVERSAL_DIFFERS, Kind.KEY_TWICE},
    ),
    "a past state is that of another version": (
        ACCOUNTS,
        operations((PAST, replace(PAST, found=Past(1, 100, 0, at(0))))),
        {K.PAST_DIFFERS},
    ),
    "a past state has another balance": (
        ACCOUNTS,
        operations((VERSION, replace(VERSION, found=Past(3, 71, 0, at(3))))),
        {K.PAST_DIFFERS},
    ),
    "a past state is missing": (
        ACCOUNTS,
        operations((PAST, replace(PAST, found=None))),
        {K.PAST_DIFFERS},
    ),
    "there is a state before the first": (
        ACCOUNTS,
        operations((BEFORE, replace(BEFORE, found=Past(1, 100, 0, at(0))))),
        {K.PAST_DIFFERS},
    ),
    "a read is older than an acknowledged transfer to the account": (
        ACCOUNTS,
        operations(more=(Read((seen(2, 1, 50),), 3, 4),)),
        {Kind.STALE_READ},
    ),
    "a hold was not seen after it was acknowledged": (
        ACCOUNTS,
        operations(more=(Read((seen(1, 3, 70),), 4.6, 4.7), Read((seen(1, 1, 100),), 1.6, 1.7))),
        {K.NO_ORDER},
    ),
    "a hold was open after it was voided": (
        ACCOUNTS,
        operations((OPEN, replace(OPEN, sent=6, answered=7))),
        {K.NO_ORDER},
    ),
    "a hold was voided before the try that placed it": (
        ACCOUNTS,
        operations((PLACED, replace(PLACED, sent=5.6, answered=5.7)), (OPEN, None)),
        {K.NO_ORDER},
    ),
    "two snapshots have two changes in the opposite order": (
        A_THIRD,
        operations(
            more=(
                Try(Change(3, 3, "z"), Undecided.UNKNOWN, 13, 15),
                Read((seen(3, 1, 0), seen(2, 6, 51)), 12.9, 15.1),
                Read((seen(3, 2, 3), seen(2, 5, 50)), 12.9, 15.1),
            )
        ),
        {K.NO_ORDER},
    ),
    "two accounts have two transfers in the opposite order": (
        {
            4: Account(
                (
                    Entry(1, 5, 5, None, at(0)),
                    Entry(2, -1, 4, "p", at(1), other=(5, 3)),
                    Entry(3, 2, 6, None, at(1), other=(5, 2)),
                ),
                (),
                State(3, 6),
            ),
            5: Account(
                (
                    Entry(1, 5, 5, None, at(0)),
                    Entry(2, -2, 3, "q", at(1), other=(4, 3)),
                    Entry(3, 1, 4, None, at(1), other=(4, 2)),
                ),
                (),
                State(3, 4),
            ),
        },
        [
            Try(Transfer(4, 5, 1, "p"), Undecided.UNKNOWN, 1, 2),
            Try(Transfer(5, 4, 2, "q"), Undecided.UNKNOWN, 1, 2),
        ],
        {K.NO_ORDER},
    ),
    "a change comes by a transfer after another that was sent later": (
        {
            4: Account(
                (
                    Entry(1, 5, 5, None, at(0)),
                    Entry(2, 1, 6, "a", at(1)),
                    Entry(3, -1, 5, "p", at(2), other=(5, 2)),
                ),
                (),
                State(3, 5),
            ),
            5: Account(
                (
                    Entry(1, 5, 5, None, at(0)),
                    Entry(2, 1, 6, None, at(2), other=(4, 3)),
                    Entry(3, 1, 7, "b", at(3)),
                ),
                (),
                State(3, 7),
            ),
        },
        [
            Try(Change(5, 1, "b"), Done((seen(5, 3, 7),), at(3)), 1, 2),
            Try(Change(4, 1, "a"), Done((seen(4, 2, 6),), at(1)), 3, 4),
            Try(Transfer(4, 5, 1, "p"), Undecided.UNKNOWN, 0, 5),
        ],
        {K.NO_ORDER},
    ),
}

RIGHT: dict[str, tuple[dict[int, Account], list[Operation]]] = {
    "the example": (ACCOUNTS, operations()),
    "the operations in another order": (ACCOUNTS, operations()[::-1]),
    "replays of all that was done or refused": (
        ACCOUNTS,
        operations(
            more=tuple(
                replace(op, sent=30, answered=31, replayed=True)
                for op in OPERATIONS
                if isinstance(op, Try) and isinstance(op.outcome, Done | Refused)
            )
        ),
    ),
    "tries that never took effect": (
        ACCOUNTS,
        operations(
            more=tuple(
                Try(request, outcome, 30, 31)
                for request in (
                    Change(1, 1, "never"),
                    Transfer(1, 2, 1, "never"),
                    Place(1, 1, "held never"),
                    Capture(2, 1),
                    Void(2, 1),
                    Reverse(2, 6),
                    Reverse(2, 7),
                )
                for outcome in Undecided
            )
        ),
    ),
    "a floor below zero": (more(1, floor=-1), operations((TOO_MUCH, None))),
    "a reversal that was refused at first": (
        more(
            2,
            Entry(7, -42, 9, "e", at(20), held=9),
            Entry(8, 1, 10, "d", at(21), held=9),
            Entry(9, -1, 9, None, at(22), held=9, reverses=8),
            final=State(9, 9, 9),
        ),
        operations(
            more=(
                Try(Change(2, -42, "e"), Undecided.UNKNOWN, 20, 21),
                Try(Reverse(2, 6), Refused(seen(2, 7, 9, 9), -1), 20, 21),
                Try(Change(2, 1, "d"), Undecided.UNKNOWN, 20, 21),
                Try(Reverse(2, 8), Refused(seen(2, 7, 9, 9), -1), 20, 21),
                Try(Reverse(2, 8), Done((seen(2, 9, 9, 9),), at(22)), 22, 23),
            )
        ),
    ),
    "a past read that overlaps the entry": (
        ACCOUNTS,
        operations(more=(PastRead(2, at(13.5), Past(5, 50, 0, at(12)), 13, 13.5),)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_has_one_kind_of_violation(name: str) -> None:
    """Each fault is found, and no other kind is reported with it."""
    accounts, operations, expected = WRONG[name]
    assert kinds(accounts, operations) == expected


@pytest.mark.parametrize("name", RIGHT)
def test_right_history_passes(name: str) -> None:
    """A correct history of any shape has no violation."""
    assert check_accounts(*RIGHT[name]) == []


def test_every_kind_has_an_example() -> None:
    """No kind of violation is left without a history that shows it."""
    shown = set().union(*(expected for _, _, expected in WRONG.values()))
    assert set(AccountsKind) <= shown


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.strip("_"))
def test_each_rule_is_needed(rule: Rule) -> None:
    """Without the rule, the fault of some history is not found, or called something else."""
    others = [each for each in RULES if each is not rule]
    assert any(
        {
            violation.kind
            for each in others
            for violation in each(Index(accounts, tuple(operations)))
        }
        != expected - {K.NO_ORDER}
        for accounts, operations, expected in WRONG.values()
    )
