"""The jobs that audit: each planted fault is found and named, and no other."""

import asyncio
import re

import pytest

from balance_app.balances.accounts import Opening, Patch
from balance_app.maintenance import batches
from balance_app.maintenance.audits import LedgerMismatchError
from tests.maintenance.runner import JobRunner, days_as_counted, days_as_they_were
from tests.processes import Instance
from tests.system.accounts_client import AccountsLoad


async def test_a_sound_ledger_matches(runner: JobRunner) -> None:
    """The result states how much was checked."""
    await runner.populate(1000, 12)
    assert await runner.run("audit-ledger") == (
        "checked 12 000 entries of 1 000 users: all balances match"
    )
    assert runner.last is not None
    assert runner.last.seen[-1] == (12_000, 12_000, "entries and holds")


# A corruption of user 3 or 30 of 30 with 4 entries each, and the finding.
CORRUPTED = {
    "a balance": (
        "UPDATE users SET balance = 998 WHERE id = 3",
        "user 3: the balance is 998 at version 4, but entry 4, the last, left 997",
    ),
    "a version": (
        "UPDATE users SET version = 5 WHERE id = 30",
        "user 30: the balance is 997 at version 5, but entry 4, the last, left 997",
    ),
    "a missing entry": (
        "DELETE FROM entries WHERE user_id = 3 AND version = 2",
        "user 3: entry 2 is missing",
    ),
    "a missing first entry": (
        "DELETE FROM entries WHERE user_id = 30 AND version = 1",
        "user 30: entry 1 is missing",
    ),
    "a missing last entry": (
        "DELETE FROM entries WHERE user_id = 30 AND version = 4",
        "user 30: the balance is 997 at version 4, but entry 3, the last, left 998",
    ),
    "no entries": (
        "DELETE FROM entries WHERE user_id = 3",
        "user 3: there are no entries",
    ),
    "no entries of the last user": (
        "DELETE FROM entries WHERE user_id = 30",
        "user 30: there are no entries",
    ),
    "a running balance": (
        "UPDATE entries SET balance = 1 WHERE user_id = 3 AND version = 2",
        "user 3: entry 2 adds -1 to 1000 and leaves 1",
    ),
    "an amount": (
        "UPDATE entries SET amount = 9223372036854775807 WHERE user_id = 30 AND version = 3",
        "user 30: entry 3 adds 9223372036854775807 to 999 and leaves 998",
    ),
    "an opening": (
        "UPDATE entries SET balance = 1001 WHERE user_id = 3 AND version = 1",
        "user 3: entry 1 adds 1000 to 0 and leaves 1001",
    ),
    "an entry too many": (
        "INSERT INTO entries (user_id, version, amount, balance) VALUES (30, 5, 1, 998)",
        "user 30: the balance is 997 at version 4, but entry 5, the last, left 998",
    ),
    "a key that is gone": (
        "DELETE FROM idempotency_keys WHERE key = 'key-3-4'",
        "user 3: the key of entry 4 is not recorded",
    ),
    "a key that was refused": (
        "UPDATE idempotency_keys SET outcome = 'refused' WHERE key = 'key-3-4'",
        "user 3: the key of entry 4 is not recorded",
    ),
}


@pytest.mark.parametrize("what", CORRUPTED)
async def test_the_audit_names_the_user_that_differs(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Any fault is found, at any position in a batch, and no other user is named."""
    corrupt, message = CORRUPTED[what]
    await runner.populate(30, 4)
    await runner.rewrite(corrupt)
    for number_of_batches in (1, 17, 1000):
        monkeypatch.setattr(batches, "BATCHES", number_of_batches)
        with pytest.raises(LedgerMismatchError) as error:
            await runner.run("audit-ledger")
        assert str(error.value) == f"1 of 30 users differs: {message}"


# A corruption after `JobRunner.move_money`, and the finding of `audit-ledger`.
PLANTED = {
    "a time that goes back": (
        "UPDATE entries SET at = at - interval '1 hour' WHERE user_id = 3 AND version = 6",
        r"user 3: entry 6 is of [\d: .+-]+, before entry 5 of [\d: .+-]+",
    ),
    "no floor covered": (
        """
        ALTER TABLE users DROP CONSTRAINT users_balance_check;
        UPDATE users SET floor = 1005 WHERE id = 4;
        INSERT INTO user_settings (user_id, settings_version, floor, frozen)
        VALUES (4, 1, 1005, false)
        """,
        "user 4: 1004 is available, less than the floor 1005",
    ),
    "no floor covered beside the holds": (
        """
        ALTER TABLE users DROP CONSTRAINT users_balance_check;
        UPDATE users SET floor = 976 WHERE id = 3;
        UPDATE user_settings SET floor = 976 WHERE user_id = 3
        """,
        "user 3: 975 is available, less than the floor 976",
    ),
    "a key of another user": (
        """
        UPDATE idempotency_keys SET user_id = 4 WHERE key = 'paid';
        """,
        "user 3: the key of entry 5 is not recorded",
    ),
    "a key of another entry": (
        "UPDATE idempotency_keys SET version = 6 WHERE key = 'paid'",
        "user 3: the key of entry 5 is not recorded",
    ),
    "a key of a hold": (
        "UPDATE idempotency_keys SET hold = 1 WHERE key = 'paid'",
        "user 3: the key of entry 5 is not recorded",
    ),
    "a key of an opening that is gone": (
        "DELETE FROM opening_keys",
        "user 31: the key of entry 1 is not recorded",
    ),
    "a key of another opening": (
        "UPDATE opening_keys SET user_id = 3",
        "user 31: the key of entry 1 is not recorded",
    ),
    "half of a transfer": (
        """
        DELETE FROM entries WHERE user_id = 4 AND version = 7;
        UPDATE users SET version = 6, balance = 1008 WHERE id = 4
        """,
        "user 3: entry 10 is half of a transfer, but user 4 has no entry 7",
    ),
    "a transfer that names another entry": (
        "UPDATE entries SET other_version = 6 WHERE user_id = 3 AND version = 5",
        (
            "user 3: entry 5 is half of a transfer, but entry 6 of user 4 is not the other half; "
            "user 4: entry 5 is half of a transfer, but entry 5 of user 3 is not the other half"
        ),
    ),
    "a transfer that names no other half": (
        """
        UPDATE entries SET other_user_id = NULL, other_version = NULL
        WHERE user_id = 3 AND version = 5
        """,
        "user 4: entry 5 is half of a transfer, but entry 5 of user 3 is not the other half",
    ),
    "a transfer to oneself": (
        """
        UPDATE entries SET other_user_id = 5, other_version = version
        WHERE user_id = 5 AND version = 2
        """,
        "user 5: entry 2 is half of a transfer, but entry 2 of user 5 is not the other half",
    ),
    "a transfer of two amounts": (
        """
        UPDATE entries SET balance = balance + 1 WHERE user_id = 4 AND version >= 5;
        UPDATE entries SET amount = 8 WHERE user_id = 4 AND version = 5;
        UPDATE users SET balance = balance + 1 WHERE id = 4
        """,
        (
            "user 3: entry 5 of a transfer adds -7, but entry 5 of user 4 adds 8; "
            "user 4: entry 5 of a transfer adds 8, but entry 5 of user 3 adds -7"
        ),
    ),
    "a transfer of two times": (
        "UPDATE entries SET at = at + interval '1 us' WHERE user_id = 4 AND version = 5",
        (
            r"user 3: entry 5 of a transfer is of [^;]+, but entry 5 of user 4 is of [\d: .+-]+; "
            r"user 4: entry 5 of a transfer is of [^;]+, but entry 5 of user 3 is of [\d: .+-]+"
        ),
    ),
    "a reversal of nothing": (
        "UPDATE entries SET reverses = 99 WHERE user_id = 3 AND version = 8",
        "user 3: entry 8 reverses entry 99, but there is none before it",
    ),
    "a reversal of itself": (
        "UPDATE entries SET reverses = 8 WHERE user_id = 3 AND version = 8",
        "user 3: entry 8 reverses entry 8, but there is none before it",
    ),
    "a reversal of another amount": (
        "UPDATE entries SET reverses = 6 WHERE user_id = 3 AND version = 8",
        "user 3: entry 8 adds -20 and reverses entry 6, which adds -6",
    ),
    "a change that reverses another": (
        "UPDATE entries SET reverses = 4 WHERE user_id = 3 AND version = 7",
        "user 3: entry 7 adds 20 and reverses entry 4, which adds -1",
    ),
    "a reversed reversal": (
        "UPDATE entries SET reverses = 8 WHERE user_id = 3 AND version = 9",
        "user 3: entry 9 reverses entry 8, a reversal itself",
    ),
    "two reversals": (
        """
        DROP INDEX entries_reverses_key;
        UPDATE entries SET reverses = 7 WHERE user_id = 3 AND version = 9
        """,
        "user 3: entries 8 and 9 reverse entry 7",
    ),
    "a reversal of one half": (
        "UPDATE entries SET reverses = NULL WHERE user_id = 4 AND version = 7",
        "user 3: entry 10 reverses entry 9 alone, without the other half of the transfer",
    ),
    "a reversal of halves of two transfers": (
        """
        UPDATE entries SET amount = 7, balance = 1011 WHERE user_id = 4 AND version = 6;
        UPDATE entries SET amount = -7, balance = 977 WHERE user_id = 3 AND version = 9;
        UPDATE entries SET amount = -7 WHERE user_id = 4 AND version = 7;
        UPDATE entries SET amount = 7 WHERE user_id = 3 AND version = 10;
        UPDATE entries SET reverses = 5 WHERE user_id = 4 AND version = 7
        """,
        (
            "user 3: entry 10 reverses entry 9 alone, without the other half of the transfer; "
            "user 4: entry 7 reverses entry 5 alone, without the other half of the transfer"
        ),
    ),
    "a transfer that reverses a change": (
        """
        UPDATE entries SET reverses = NULL WHERE user_id = 3 AND version = 8;
        UPDATE entries SET amount = -4, balance = 1000 WHERE user_id = 3 AND version = 8;
        UPDATE entries SET balance = balance + 16 WHERE user_id = 3 AND version >= 9;
        UPDATE users SET balance = balance + 16 WHERE id = 3;
        UPDATE entries SET reverses = 8 WHERE user_id = 3 AND version = 10
        """,
        (
            "user 3: entry 10 reverses entry 8 alone, without the other half of the transfer; "
            "user 4: entry 7 reverses entry 6 alone, without the other half of the transfer"
        ),
    ),
    "a capture of nothing": (
        "UPDATE entries SET hold = 2 WHERE user_id = 3 AND version = 6",
        "user 3: entry 6 captures hold 2, which does not exist",
    ),
    "a capture of a voided hold": (
        "UPDATE entries SET hold = 3 WHERE user_id = 3 AND version = 6",
        "user 3: entry 6 captures hold 3, which is voided",
    ),
    "a capture of an open hold": (
        """
        UPDATE holds SET state = 'open', ended_at = NULL, captured = NULL, version = NULL
        WHERE number = 1
        """,
        "user 3: entry 6 captures hold 1, which is open",
    ),
    "a capture of another amount": (
        "UPDATE holds SET captured = 7 WHERE number = 1",
        "user 3: entry 6 adds -6 for hold 1, of which 7 was captured by entry 6",
    ),
    "a second capture": (
        "UPDATE entries SET hold = 1 WHERE user_id = 3 AND version = 4",
        "user 3: entry 4 adds -1 for hold 1, of which 6 was captured by entry 6",
    ),
    "other settings": (
        "UPDATE users SET frozen = false WHERE id = 30",
        "user 30: the settings are not those of their version 2",
    ),
    "settings that were not recorded": (
        "UPDATE users SET floor = -1 WHERE id = 4",
        "user 4: the settings are not those of their version 1",
    ),
    "a version of settings that was not recorded": (
        "UPDATE users SET settings_version = 2 WHERE id = 4",
        "user 4: the settings are not those of their version 2",
    ),
    "another external id": (
        "UPDATE external_ids SET external_id = 'four' WHERE user_id = 3",
        "user 3: the settings are not those of their version 2",
    ),
    "no holds": (
        "UPDATE users SET held = 1 WHERE id = 4",
        "user 4: 1 is held, but there are no holds",
    ),
    "more held": (
        "UPDATE users SET held = 10 WHERE id = 3",
        "user 3: 10 is held, but the open holds are 9",
    ),
    "nothing held": (
        "UPDATE users SET held = 0 WHERE id = 3",
        "user 3: 0 is held, but the open holds are 9",
    ),
    "a hold that is gone": (
        "DELETE FROM holds WHERE number = 8",
        "user 3: 9 is held, but the open holds are 8",
    ),
    "a hold that is due before it is expected": (
        "UPDATE users SET holds_due_at = 'infinity' WHERE id = 3",
        r"user 3: a hold expires at [\d: .+-]+, but none is expected to before infinity",
    ),
    "a key of a hold that is gone": (
        "DELETE FROM idempotency_keys WHERE key = 'open'",
        "user 3: the key of hold 7 is not recorded",
    ),
    "a key of another hold": (
        "UPDATE idempotency_keys SET hold = 8 WHERE key = 'open'",
        "user 3: the key of hold 7 is not recorded",
    ),
    "a capture without an entry": (
        "UPDATE entries SET hold = NULL WHERE user_id = 3 AND version = 6",
        "user 3: entry 6 is not the capture of hold 1",
    ),
    "a capture that says another balance": (
        "UPDATE holds SET balance = balance + 1 WHERE number = 1",
        "user 3: entry 6 is not the capture of hold 1",
    ),
    "a capture of another time": (
        "UPDATE holds SET ended_at = ended_at + interval '1 us' WHERE number = 1",
        "user 3: entry 6 is not the capture of hold 1",
    ),
    "an end at no version": (
        "UPDATE holds SET version = NULL WHERE number = 3",
        "user 3: hold 3 is voided, but there is no entry 0",
    ),
    "an end at another balance": (
        "UPDATE holds SET balance = 1 WHERE number = 3",
        "user 3: hold 3 is voided at the balance 1, but entry 6 left 984",
    ),
    "an end before its time": (
        "UPDATE holds SET expires_at = ended_at + interval '1 us' WHERE number = 5",
        r"user 3: hold 5 expired at [\d: .+-]+, before [\d: .+-]+",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
async def test_the_audit_knows_transfers_reversals_and_holds(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Any fault is found, at any position in a batch, and no other user is named."""
    corrupt, message = PLANTED[what]
    await runner.populate(30, 4)
    await runner.move_money()
    assert await runner.run("audit-ledger") == (
        "checked 130 entries and 5 holds of 31 users: all balances match"
    )
    await runner.rewrite(corrupt)
    users = len(re.findall(r"user \d+: ", message))
    verb = "differs" if users == 1 else "differ"
    for number_of_batches in (1, 60):
        monkeypatch.setattr(batches, "BATCHES", number_of_batches)
        with pytest.raises(LedgerMismatchError) as error:
            await runner.run("audit-ledger")
        assert re.fullmatch(f"{users} of 31 users {verb}: {message}", str(error.value))


async def test_the_clock_of_older_entries_may_have_been_set_back(runner: JobRunner) -> None:
    """An entry whose predecessor was made before times rose is no fault; a later one is."""
    await runner.populate(30, 4)
    await runner.rewrite(
        "UPDATE entries SET at = at - interval '1 hour' WHERE user_id = 3 AND version = 4",
        "UPDATE balance_app_version SET times_rise_from = clock_timestamp()",
    )
    assert (await runner.run("audit-ledger")).startswith("checked 120 entries")
    await runner.rewrite("UPDATE balance_app_version SET times_rise_from = '-infinity'")
    with pytest.raises(LedgerMismatchError, match="user 3: entry 4 is of "):
        await runner.run("audit-ledger")


async def test_the_audit_goes_on_after_the_first_fault(runner: JobRunner) -> None:
    """All users are checked; the first few that differ are named, the others counted."""
    await runner.populate(1200, 2)
    await runner.rewrite("UPDATE users SET balance = 5 WHERE id > 3")
    with pytest.raises(LedgerMismatchError) as error:
        await runner.run("audit-ledger")
    message = str(error.value)
    assert message.startswith("1 197 of 1 200 users differ: user 4: the balance is 5 at version 2")
    assert re.findall(r"user (\d+)", message) == ["4", "5", "6", "7", "8"]
    assert message.endswith("; and 1 192 more")


async def test_the_audits_find_no_fault_in_changes_under_way(
    runner: JobRunner,
    instance: Instance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However small the batches are, while five clients use accounts in each way."""
    await runner.populate(30, 4)
    await runner.move_money()
    for name in ("audit-ledger", "audit-keys"):
        await runner.run(name)
    monkeypatch.setattr(batches, "BATCHES", 8)
    async with AccountsLoad([instance.url], [3, 4, 5, 6], connections=5) as load:
        for number in range(4):
            await load.progress(30)
            opening = Opening(number, external_id=f"user-{number}")
            await runner.accounts.open(opening, f"opening-{number}")
            await runner.set(3, Patch(external_id=f"three-{number}", names=True))
            await runner.set(4, Patch(floor=-number))
            for name in ("audit-ledger", "audit-keys", "note-daily-balances", "total-days"):
                await runner.run(name)
            await runner.run("audit-daily-balances")
            await runner.run("prune-refused-keys")
        async with asyncio.timeout(60):
            for one, other in READ_TWICE:
                while await runner.rows(one) == await runner.rows(other):
                    pass
    assert not load.unexpected
    for one, other in READ_TWICE:
        assert await runner.rows(one) == await runner.rows(other)
    for name in ("audit-ledger", "audit-keys", "total-days"):
        await runner.run(name)
    assert await days_as_counted(runner) == await days_as_they_were(runner)
    kinds = """
        SELECT count(other_user_id), count(reverses), count(hold), count(reference) FROM entries
    """
    assert all((await runner.rows(kinds))[0])


# The control: users and entries, and users and holds, are read in two statements, as a naive audit
# would. In one snapshot both have the same rows.
READ_TWICE = (
    (
        "SELECT id, version FROM users ORDER BY id",
        "SELECT user_id, max(version) FROM entries GROUP BY 1 ORDER BY 1",
    ),
    (
        "SELECT id, held FROM users WHERE held > 0 ORDER BY id",
        """
        SELECT user_id, sum(amount)::bigint FROM holds WHERE state = 'open' GROUP BY 1 ORDER BY 1
        """,
    ),
)


# A corruption after `JobRunner.move_money`, and the finding of `audit-keys`.
PLANTED_KEYS = {
    "a balance": (
        "UPDATE idempotency_keys SET balance = 5 WHERE key = 'key-3-2'",
        "key key-3-2 of user 3: it has the balance 5, but entry 2 of user 3 left 999",
    ),
    "a version": (
        "UPDATE idempotency_keys SET version = 99 WHERE key = 'key-3-2'",
        "key key-3-2 of user 3: user 3 has no entry 99",
    ),
    "an amount": (
        "UPDATE idempotency_keys SET amount = -2 WHERE key = 'key-3-2'",
        "key key-3-2 of user 3: entry 2 of user 3 is not its change",
    ),
    "a time": (
        "UPDATE idempotency_keys SET at = at + interval '1 s' WHERE key = 'key-3-2'",
        "key key-3-2 of user 3: entry 2 of user 3 is not its change",
    ),
    "what is held": (
        "UPDATE idempotency_keys SET held = 1 WHERE key = 'paid'",
        "key paid of user 3: entry 5 of user 3 is not its change",
    ),
    "no request": (
        "UPDATE idempotency_keys SET request = NULL WHERE key = 'paid'",
        "key paid of user 3: entry 5 of user 3 is not its change",
    ),
    "another payee": (
        "UPDATE idempotency_keys SET request = replace(request, ':4', ':5') WHERE key = 'paid'",
        "key paid of user 3: entry 5 of user 3 is not its change",
    ),
    "another reference": (
        "UPDATE idempotency_keys SET request = replace(request, 'r-3', 'R') WHERE key = 'added'",
        "key added of user 3: entry 7 of user 3 is not its change",
    ),
    "another note": (
        "UPDATE entries SET note = 'a note' WHERE user_id = 3 AND version = 5",
        "key paid of user 3: entry 5 of user 3 is not its change",
    ),
    "a key of the entry of another": (
        """
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
        VALUES ('again', 'accepted', 3, -1, 999, 2)
        """,
        "key again of user 3: entry 2 of user 3 is not its change",
    ),
    "a refusal of what fits": (
        """
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
        VALUES ('a-no', 'refused', 3, -999, 999, 2)
        """,
        "key a-no of user 3: it refuses -999 to user 3, who had 999 available and the floor 0",
    ),
    "a refusal by a balance that never was": (
        """
        INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version)
        VALUES ('a-no', 'refused', 3, -999, 998, 2)
        """,
        "key a-no of user 3: it has the balance 998, but entry 2 of user 3 left 999",
    ),
    "a refusal above the floor": (
        "UPDATE idempotency_keys SET floor = -5000 WHERE key = 'no-change'",
        (
            "key no-change of user 3: it refuses -2000 to user 3, "
            "who had 975 available and the floor -5000"
        ),
    ),
    "a refusal without what is held": (
        "UPDATE idempotency_keys SET amount = -1030, held = 0 WHERE key = 'no-hold'",
        (
            "key no-hold of user 3: it refuses -1030 to user 3, "
            "who had 984 available and the floor -50"
        ),
    ),
    "a refusal of a deposit": (
        "UPDATE idempotency_keys SET amount = 2000 WHERE key = 'no-change'",
        (
            "key no-change of user 3: it refuses 2000 to user 3, "
            "who had 975 available and the floor -50"
        ),
    ),
    "a refusal without the freeze": (
        "UPDATE idempotency_keys SET frozen = false WHERE key = 'frozen' AND user_id = 3",
        "key frozen of user 3: it refuses 5 to user 30, who had 997 available and the floor 0",
    ),
    "a refusal by somebody else": (
        "UPDATE idempotency_keys SET refused_by = 29 WHERE refused_by = 30",
        "key frozen of user 3: it is refused by user 29, whom it does not pay",
    ),
    "a hold of another amount": (
        "UPDATE idempotency_keys SET amount = -11 WHERE key = 'held'",
        "key held of user 3: hold 1 of user 3 is not what it placed",
    ),
    "another hold": (
        "UPDATE idempotency_keys SET hold = 3 WHERE key = 'held'",
        "key held of user 3: hold 3 of user 3 is not what it placed",
    ),
    "a hold that is gone": (
        "DELETE FROM holds WHERE number = 7",
        "key open of user 3: hold 7 of user 3 is not what it placed",
    ),
    "a hold of another length": (
        "UPDATE holds SET expires_at = expires_at + interval '1 s' WHERE number = 7",
        "key open of user 3: hold 7 of user 3 is not what it placed",
    ),
    "an opening of nobody": (
        "UPDATE opening_keys SET user_id = 99",
        "opening key created: user 99 has no entry 1",
    ),
    "an opening of somebody else": (
        "UPDATE opening_keys SET user_id = 3",
        "opening key created: it is not the key of entry 1 of user 3",
    ),
    "an opening with another balance": (
        "UPDATE opening_keys SET request = replace(request, ':5', ':6')",
        "opening key created: user 31 was not created as it asks",
    ),
    "an opening with another floor": (
        "UPDATE user_settings SET floor = 0 WHERE user_id = 31",
        "opening key created: user 31 was not created as it asks",
    ),
    "an external id of nobody": (
        "UPDATE external_ids SET user_id = 99 WHERE external_id = 'three'",
        "external id three: there is no user 99",
    ),
}


@pytest.mark.parametrize("what", PLANTED_KEYS)
async def test_the_audit_names_a_key_that_differs(runner: JobRunner, what: str) -> None:
    """A key whose replay would contradict the ledger is found."""
    corrupt, message = PLANTED_KEYS[what]
    await runner.populate(30, 4)
    await runner.move_money()
    assert await runner.run("audit-keys") == (
        "checked 71 keys and external ids: all agree with the ledger"
    )
    await runner.rewrite(corrupt)
    with pytest.raises(LedgerMismatchError) as error:
        await runner.run("audit-keys")
    assert re.fullmatch(rf"1 of 7[12] keys and external ids differs: {message}", str(error.value))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (
            "UPDATE daily_balances SET balance = 5 WHERE user_id = 3",
            "the balance is 5, but entry 4 left 997",
        ),
        ("UPDATE daily_balances SET version = 7 WHERE user_id = 3", "there is no entry 7"),
    ],
)
async def test_the_audit_names_a_daily_balance_that_differs(
    runner: JobRunner, corrupt: str, message: str
) -> None:
    """A daily balance that contradicts the ledger is found."""
    await runner.populate(30, 4)
    await runner.run("note-daily-balances")
    await runner.connection.execute(corrupt)
    day = await runner.connection.fetchval("SELECT day::text FROM daily_balances WHERE user_id = 3")
    with pytest.raises(LedgerMismatchError) as error:
        await runner.run("audit-daily-balances")
    assert str(error.value) == f"1 of 30 daily balances differs: user 3 on {day}: {message}"
