"""Several changes of an account in one statement.

Instances of the release before may run beside it. No table is rewritten.
"""

from alembic import op

revision = "0016"
down_revision = "0015"

# The changes are judged one after another, in the order of the arrays, each on the account as those
# before it left it: as if each were a statement of its own, behind one wait for the row's lock and
# one commit. What is accepted gets its own version, entry and hash, and all of them one time. Each
# statement in here has its own snapshot, taken after the lock: so the keys that are recorded are
# all seen.
#
# Each row is the verdict on a change, and the account after it:
#   accepted, refused   and recorded under its key, if it has one
#   conflict            the account has none of its entity tags, here separated by commas
#   known               its key is recorded, or of another change of the same call: left alone
# No rows: there is no such user, or a hold is overdue; nothing was changed.
CHANGE_TOGETHER = """
CREATE FUNCTION known_keys(account_id bigint, keys text[]) RETURNS text[] LANGUAGE plpgsql AS $$
BEGIN
    IF array_remove(keys, NULL) = '{}' THEN
        RETURN '{}';
    END IF;
    RETURN ARRAY(SELECT key FROM idempotency_keys WHERE user_id = account_id AND key = ANY (keys));
END
$$;
CREATE FUNCTION change_together(
    account_id bigint, largest bigint, amounts bigint[], entity_tags text[], keys text[],
    requests text[], "references" text[], notes text[], principals text[]
) RETURNS TABLE (verdict text, account users) LANGUAGE plpgsql AS $$
DECLARE
    asked record;
    one entries;
    made entries[] := '{}';
    of_key idempotency_keys;
    recorded idempotency_keys[] := '{}';
    known text[];
BEGIN
    -- what is recorded is answered although the account may be locked
    known := known_keys(account_id, keys);
    IF keys <@ known THEN
        RETURN QUERY SELECT 'known', NULL::users FROM unnest(keys);
        RETURN;
    END IF;
    SELECT * INTO account FROM users WHERE id = account_id FOR NO KEY UPDATE;
    IF NOT FOUND OR account.holds_due_at <= clock_timestamp() THEN
        RETURN;
    END IF;
    account.changed_at := greatest(
        account.changed_at + interval '1 microsecond', clock_timestamp()
    );
    one.user_id := account_id;
    one.held := account.held;
    one.at := account.changed_at;
    of_key.user_id := account_id;
    of_key.held := account.held;
    of_key.floor := account.floor;
    of_key.frozen := account.frozen;
    of_key.at := account.changed_at;
    known := known_keys(account_id, keys);
    FOR asked IN
        SELECT * FROM unnest(
            amounts, entity_tags, keys, requests, "references", notes, principals
        ) AS given (amount, tags, key, request, reference, note, principal)
    LOOP
        IF asked.key = ANY (known) THEN
            verdict := 'known';
        ELSIF asked.tags IS NOT NULL AND NOT concat_ws(
            '.', account.version, account.settings_version, account.hold_events
        ) = ANY (string_to_array(asked.tags, ',')) THEN
            verdict := 'conflict';
        ELSE
            IF NOT account.frozen AND account.balance + asked.amount <= largest
               AND account.balance - account.held + asked.amount >= account.floor THEN
                verdict := 'accepted';
                account.balance := account.balance + asked.amount;
                account.version := account.version + 1;
                account.hash := entry_hash(
                    account.hash, account_id, account.version, asked.amount, account.balance,
                    account.held, account.changed_at, asked.key, asked.principal, NULL, NULL,
                    NULL, NULL, asked.reference, asked.note
                );
                one.version := account.version;
                one.amount := asked.amount;
                one.balance := account.balance;
                one.key := asked.key;
                one.reference := asked.reference;
                one.note := asked.note;
                one.by := asked.principal;
                one.hash := account.hash;
                made := made || one;
            ELSE
                verdict := 'refused';
            END IF;
            IF asked.key IS NOT NULL THEN
                known := known || asked.key;
                of_key.key := asked.key;
                of_key.outcome := verdict;
                of_key.amount := asked.amount;
                of_key.request := asked.request;
                of_key.balance := account.balance;
                of_key.version := account.version;
                of_key.by := asked.principal;
                recorded := recorded || of_key;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
    IF recorded <> '{}' THEN
        INSERT INTO idempotency_keys SELECT * FROM unnest(recorded);
    END IF;
    IF made <> '{}' THEN
        INSERT INTO entries SELECT * FROM unnest(made);
        UPDATE users SET balance = account.balance, version = account.version, hash = account.hash,
                         changed_at = account.changed_at
        WHERE id = account_id;
    END IF;
END
$$;
"""

# As in 0015, for another rule of which versions may not follow one another.
REQUIRE_ENTRY = """
CREATE OR REPLACE FUNCTION require_entry() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    entry_hash bytea;
BEGIN
    SELECT hash INTO entry_hash FROM entries
    WHERE user_id = NEW.id AND version = NEW.version AND balance = NEW.balance;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user % has no entry % with balance %', NEW.id, NEW.version, NEW.balance
            USING ERRCODE = 'BL004';
    ELSIF entry_hash IS DISTINCT FROM NEW.hash THEN
        RAISE EXCEPTION 'user % has another hash than entry %', NEW.id, NEW.version
            USING ERRCODE = 'undefined_column';
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF NEW.version <> OLD.version + 1 THEN
            IF {faulty} THEN
                RAISE EXCEPTION 'version % of user % does not follow %',
                    NEW.version, NEW.id, OLD.version USING ERRCODE = 'BL004';
            END IF;
        END IF;
    END IF;
    RETURN NULL;
END
$$;
"""

# An UPDATE may raise the version by more than one if all entries between exist. The query stands in
# an IF of its own, as a condition with a query in it costs each change that.
ENTRIES_MISSING = """NEW.version <= OLD.version OR NEW.version - OLD.version <> (
                SELECT count(*) FROM entries
                WHERE user_id = NEW.id AND version > OLD.version AND version <= NEW.version
            )"""


def upgrade() -> None:
    """Add the function, and let the guard of balances pass what it writes."""
    for statement in (REQUIRE_ENTRY.format(faulty=ENTRIES_MISSING), CHANGE_TOGETHER):
        op.execute(statement)


def downgrade() -> None:
    """Drop the function, and make the guard as it was."""
    op.execute("DROP FUNCTION change_together, known_keys")
    op.execute(REQUIRE_ENTRY.format(faulty="true"))
