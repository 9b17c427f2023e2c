"""API keys, sessions and recorded actions; who made each entry; a hash chain through each ledger.

A program of the release before can't work with it: what it writes would be no link of the chain.
After this migration it is not ready; see docs/upgrading.md. Entries that are there already have no
hash: a job computes the hash of each account's last one, from which the chain goes on.
"""

from alembic import op

revision = "0013"
down_revision = "0012"

# `generation` rises with each change of a key or session, in the order of the commits, as each
# change locks this row: an instance that has read it has read all changes up to it.
ACCESS = """
CREATE TABLE access_state (
    one boolean NOT NULL DEFAULT true,
    -- once a key was made, requests without one stay refused, even if every key is revoked
    keys_required boolean NOT NULL DEFAULT false,
    generation bigint NOT NULL DEFAULT 1,
    CONSTRAINT access_state_pkey PRIMARY KEY (one),
    CONSTRAINT access_state_one_check CHECK (one)
);
INSERT INTO access_state DEFAULT VALUES;
CREATE TABLE api_keys (
    id text NOT NULL, -- the part of the key that is no secret
    digest bytea NOT NULL, -- SHA-256 of the whole key
    name text NOT NULL, -- of the principal; never used again
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by text,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_on date, -- UTC
    CONSTRAINT api_keys_pkey PRIMARY KEY (id),
    CONSTRAINT api_keys_name_key UNIQUE (name),
    CONSTRAINT api_keys_digest_check CHECK (octet_length(digest) = 32),
    CONSTRAINT api_keys_scopes_check CHECK (
        scopes <@ ARRAY['read', 'withdraw', 'change', 'open', 'operate', 'metrics']
        AND scopes <> '{}'
    )
);
-- A login of a person at the page, with a key, whose scopes it has and without which it ends.
CREATE TABLE sessions (
    id text NOT NULL,
    digest bytea NOT NULL,
    key_id text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    CONSTRAINT sessions_pkey PRIMARY KEY (id),
    CONSTRAINT sessions_key_id_fkey FOREIGN KEY (key_id) REFERENCES api_keys (id),
    CONSTRAINT sessions_digest_check CHECK (octet_length(digest) = 32)
);
"""

# Written in the transaction of what it records. `by` is the principal: a key's name. Where nobody
# was asked it is who the request names, or NULL. `at` is the database's own: no statement gives it.
# Actions are kept; each list of them is an index read backwards.
ACTIONS = """
CREATE TABLE actions (
    id bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text,
    action text NOT NULL, -- such as 'key created', 'job paused', 'user settings changed'
    subject text NOT NULL, -- such as 'key till-1', 'job audit-ledger', 'user 7'
    before jsonb,
    after jsonb,
    CONSTRAINT actions_pkey PRIMARY KEY (id)
);
CREATE INDEX actions_by_id_idx ON actions (by, id);
CREATE INDEX actions_subject_id_idx ON actions (subject, id);
"""

BY = """
ALTER TABLE holds ADD COLUMN by text, ADD COLUMN ended_by text;
ALTER TABLE idempotency_keys ADD COLUMN by text;
ALTER TABLE opening_keys ADD COLUMN by text;
"""

# The hash of an entry covers all of it and the hash of the entry before. It travels in the row of
# the account, which a change locks: the snapshot of the change's statement may be older than the
# entry before. While the account's hash is NULL, so are those of its entries.
#
# The encoding is PostgreSQL's binary format of a row: the number of columns, and for each its
# type's OID, its length (-1: NULL) and its value, in network order; times in microseconds since
# 2000-01-01. The function is inlined; declared IMMUTABLE it could not be.
CHAIN = """
ALTER TABLE users ADD COLUMN hash bytea;
ALTER TABLE entries ADD COLUMN by text, ADD COLUMN hash bytea;
CREATE FUNCTION entry_hash(
    previous bytea, user_id bigint, version bigint, amount bigint, balance bigint, held bigint,
    at timestamptz, key text, by text, other_user_id bigint, other_version bigint, reverses bigint,
    hold bigint, reference text, note text
) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
SELECT sha256(previous || record_send(ROW(
    user_id, version, amount, balance, held, at, key, by, other_user_id, other_version, reverses,
    hold, reference, note
)))
$$;
UPDATE balance_app_version SET compatible_from = '0013';
"""

DROP = """
UPDATE balance_app_version SET compatible_from = '0012';
DROP FUNCTION entry_hash;
ALTER TABLE users DROP COLUMN hash;
ALTER TABLE entries DROP COLUMN by, DROP COLUMN hash;
ALTER TABLE holds DROP COLUMN by, DROP COLUMN ended_by;
ALTER TABLE idempotency_keys DROP COLUMN by;
ALTER TABLE opening_keys DROP COLUMN by;
DROP TABLE actions, sessions, api_keys, access_state;
"""


def upgrade() -> None:
    """Add tables and columns; no table is rewritten."""
    for statement in (ACCESS, ACTIONS, BY, CHAIN):
        op.execute(statement)


def downgrade() -> None:
    """Drop them: keys, and who did what, are lost."""
    op.execute(DROP)
