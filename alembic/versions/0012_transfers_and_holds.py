"""Transfers, holds, reversals, floors, references; idempotency keys belong to an account.

A program of the release before can't work with it: it takes a key for one of the whole service,
and knows no holds. After this migration it is not ready; see docs/upgrading.md. The keys get a new
primary key, and the entries a CHECK and two partial indexes, each of which reads its table once
(seconds for millions of rows); meanwhile they can't be written.
"""

from alembic import op

revision = "0012"
down_revision = "0011"

# What an account has, beside its balance. `available` is balance - held, and never below the floor.
USERS = """
ALTER TABLE users
    ADD COLUMN held bigint NOT NULL DEFAULT 0,
    ADD COLUMN floor bigint NOT NULL DEFAULT 0,
    ADD COLUMN frozen boolean NOT NULL DEFAULT false,
    ADD COLUMN settings_version bigint NOT NULL DEFAULT 1,
    -- how often a hold was placed or ended
    ADD COLUMN hold_events bigint NOT NULL DEFAULT 0,
    -- no open hold expires before it
    ADD COLUMN holds_due_at timestamptz NOT NULL DEFAULT 'infinity',
    -- the time of the last entry, which no later one goes before
    ADD COLUMN changed_at timestamptz NOT NULL DEFAULT '-infinity',
    DROP CONSTRAINT users_version_check,
    DROP CONSTRAINT users_balance_check,
    -- never fires: the conditional UPDATE refuses first; one constraint, as each costs every UPDATE
    ADD CONSTRAINT users_balance_check CHECK (
        held >= 0 AND balance - held >= floor AND balance <= 9007199254740991 AND version >= 1
    );
"""

# A transfer is its two entries, each of which names the other.
ENTRIES = """
ALTER TABLE entries
    ADD COLUMN held bigint NOT NULL DEFAULT 0,
    ADD COLUMN other_user_id bigint,
    ADD COLUMN other_version bigint,
    ADD COLUMN reverses bigint,
    ADD COLUMN hold bigint,
    ADD COLUMN reference text,
    ADD COLUMN note text,
    DROP CONSTRAINT entries_balance_check,
    DROP CONSTRAINT entries_amount_check,
    ADD CONSTRAINT entries_amount_check CHECK (
        (amount <> 0 OR version = 1) AND (other_user_id IS NULL) = (other_version IS NULL)
    );
CREATE UNIQUE INDEX entries_reverses_key ON entries (user_id, reverses)
    WHERE reverses IS NOT NULL;
CREATE INDEX entries_reference_idx ON entries (user_id, reference, version)
    WHERE reference IS NOT NULL;
"""

HOLDS = """
CREATE TABLE holds (
    user_id bigint NOT NULL,
    number bigint NOT NULL, -- users.hold_events after it was placed
    amount bigint NOT NULL,
    at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    key text,
    reference text,
    note text,
    state text NOT NULL DEFAULT 'open',
    -- the account just after it ended; `captured` is what was withdrawn, by entry `version`
    ended_at timestamptz,
    captured bigint,
    balance bigint,
    held bigint,
    version bigint,
    CONSTRAINT holds_pkey PRIMARY KEY (user_id, number),
    CONSTRAINT holds_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT holds_amount_check CHECK (amount > 0),
    CONSTRAINT holds_state_check CHECK (state IN ('open', 'captured', 'voided', 'expired')),
    CONSTRAINT holds_ended_check CHECK (
        (state = 'open') = (ended_at IS NULL)
        AND (state = 'captured') = (captured IS NOT NULL)
        AND captured BETWEEN 1 AND amount
    )
);
CREATE INDEX holds_open_idx ON holds (user_id, expires_at) WHERE state = 'open';
"""

# The keys of POST /api/users have no account to belong to yet.
KEYS = """
CREATE TABLE opening_keys (
    key text NOT NULL,
    user_id bigint NOT NULL,
    request text NOT NULL,
    CONSTRAINT opening_keys_pkey PRIMARY KEY (key)
);
INSERT INTO opening_keys (key, user_id, request)
SELECT key, user_id, format('{"balance":%s}', amount)
FROM idempotency_keys WHERE outcome = 'opened';
DELETE FROM idempotency_keys WHERE outcome = 'opened';
ALTER TABLE idempotency_keys
    DROP CONSTRAINT idempotency_keys_pkey,
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (user_id, key),
    DROP CONSTRAINT idempotency_keys_outcome_check,
    ADD CONSTRAINT idempotency_keys_outcome_check CHECK (outcome IN ('accepted', 'refused')),
    -- what the request asks for beside the amount, as JSON; NULL: nothing
    ADD COLUMN request text,
    -- the state of the answer, with `balance` and `version`, and whose it is if not the user's
    ADD COLUMN held bigint NOT NULL DEFAULT 0,
    ADD COLUMN floor bigint NOT NULL DEFAULT 0,
    ADD COLUMN frozen boolean NOT NULL DEFAULT false,
    ADD COLUMN refused_by bigint,
    ADD COLUMN hold bigint;
"""

SETTINGS = """
CREATE TABLE external_ids (
    external_id text NOT NULL,
    user_id bigint NOT NULL,
    CONSTRAINT external_ids_pkey PRIMARY KEY (external_id),
    CONSTRAINT external_ids_user_id_key UNIQUE (user_id)
);
CREATE TABLE user_settings (
    user_id bigint NOT NULL,
    settings_version bigint NOT NULL,
    floor bigint NOT NULL,
    frozen boolean NOT NULL,
    external_id text,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text,
    CONSTRAINT user_settings_pkey PRIMARY KEY (user_id, settings_version),
    CONSTRAINT user_settings_floor_check
        CHECK (floor BETWEEN -9007199254740991 AND 9007199254740991),
    CONSTRAINT user_settings_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id)
);
UPDATE balance_app_version SET compatible_from = '0012';
"""

# Older entries have the clock's time, also where it was set back.
TIMES = """
ALTER TABLE balance_app_version
    ADD COLUMN times_rise_from timestamptz NOT NULL DEFAULT clock_timestamp();
COMMENT ON COLUMN balance_app_version.times_rise_from IS
    'no entry has an earlier time than the one before it, if that is from then on';
"""

# Apart from what is deposited and withdrawn: a transfer changes nothing in total.
TOTALS = """
ALTER TABLE daily_totals
    ADD COLUMN transfers bigint NOT NULL DEFAULT 0,
    ADD COLUMN transferred numeric NOT NULL DEFAULT 0;
"""

DROP = """
UPDATE balance_app_version SET compatible_from = '0010';
ALTER TABLE balance_app_version DROP COLUMN times_rise_from;
ALTER TABLE daily_totals DROP COLUMN transfers, DROP COLUMN transferred;
DROP TABLE user_settings, external_ids;
ALTER TABLE idempotency_keys
    DROP COLUMN request, DROP COLUMN held, DROP COLUMN floor, DROP COLUMN frozen,
    DROP COLUMN refused_by, DROP COLUMN hold,
    DROP CONSTRAINT idempotency_keys_pkey,
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (key),
    DROP CONSTRAINT idempotency_keys_outcome_check,
    ADD CONSTRAINT idempotency_keys_outcome_check
        CHECK (outcome IN ('opened', 'accepted', 'refused'));
INSERT INTO idempotency_keys (key, outcome, user_id, amount, balance, version, at)
SELECT opening_keys.key, 'opened', user_id, amount, balance, version, at
FROM opening_keys JOIN entries USING (user_id) WHERE version = 1;
DROP TABLE opening_keys, holds;
DROP INDEX entries_reverses_key, entries_reference_idx;
ALTER TABLE entries
    DROP CONSTRAINT entries_amount_check,
    DROP COLUMN held, DROP COLUMN other_user_id, DROP COLUMN other_version,
    DROP COLUMN reverses, DROP COLUMN hold, DROP COLUMN reference, DROP COLUMN note,
    ADD CONSTRAINT entries_amount_check CHECK (amount <> 0 OR version = 1),
    ADD CONSTRAINT entries_balance_check CHECK (balance >= 0);
ALTER TABLE users
    DROP CONSTRAINT users_balance_check,
    DROP COLUMN held, DROP COLUMN floor, DROP COLUMN frozen, DROP COLUMN settings_version,
    DROP COLUMN hold_events, DROP COLUMN holds_due_at, DROP COLUMN changed_at,
    ADD CONSTRAINT users_version_check CHECK (version >= 1),
    ADD CONSTRAINT users_balance_check CHECK (balance BETWEEN 0 AND 9007199254740991);
"""


def upgrade() -> None:
    """Add columns and tables; no row is lost."""
    for statement in (USERS, ENTRIES, HOLDS, KEYS, SETTINGS, TIMES, TOTALS):
        op.execute(statement)


def downgrade() -> None:
    """Drop them; fails where a key is used by two accounts, or a balance is negative."""
    op.execute(DROP)
