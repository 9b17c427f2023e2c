"""Seals: one running digest over the heads of all ledgers, to be noted outside of the database.

Nothing is rewritten.
"""

from alembic import op

revision = "0014"
down_revision = "0013"

# A seal covers the last entries (heads) of the users that had changed since the seal before, and
# that seal. Its parts are the batches of the run that made it, or of runs that were cut off before
# they made one. The hashes are in `entries`; `balances/seals.py` says what is digested.
#
# A head is in one part only, so there are no more of them than entries: about 6 bytes of each, as
# the numbers of an array are similar, and compressed.
SEALS = """
CREATE TABLE seals (
    number bigint NOT NULL, -- 1, 2, 3, ...
    at timestamptz NOT NULL,
    heads bigint NOT NULL,
    digest bytea NOT NULL,
    CONSTRAINT seals_pkey PRIMARY KEY (number),
    CONSTRAINT seals_digest_check CHECK (octet_length(digest) = 32)
);
CREATE TABLE seal_parts (
    seal bigint NOT NULL,
    part bigint NOT NULL, -- 1, 2, 3, ...
    user_ids bigint[] NOT NULL,
    versions bigint[] NOT NULL,
    digest bytea NOT NULL,
    CONSTRAINT seal_parts_pkey PRIMARY KEY (seal, part),
    CONSTRAINT seal_parts_digest_check CHECK (octet_length(digest) = 32)
);
CREATE TRIGGER seals_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON seals
FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();
CREATE TRIGGER seal_parts_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON seal_parts
FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();
"""

# Whether a seal covers the version that is noted; not while its account has no hash.
SEALED = """
ALTER TABLE daily_balances ADD COLUMN sealed boolean NOT NULL DEFAULT false;
"""

# An account that is created later has a hash from its first entry on. For a day after the
# migration an instance of the release before may still create one without. For a new database
# there is none: what this transaction has created gets its hash here.
# ast-grep-ignore: transaction-clock
CHAINED_FROM = """
UPDATE users SET hash = entry_hash(
    '', user_id, entries.version, amount, entries.balance, entries.held, at, key, by, other_user_id,
    other_version, reverses, hold, reference, note
)
FROM entries
WHERE id = 1 AND user_id = 1 AND entries.version = 1 AND users.version = 1 AND created_at >= now();
ALTER TABLE balance_app_version
    ADD COLUMN chained_from timestamptz NOT NULL DEFAULT clock_timestamp() + interval '1 day';
COMMENT ON COLUMN balance_app_version.chained_from IS
    'accounts that are created from here on always have a hash';
UPDATE balance_app_version SET chained_from = '-infinity'
WHERE NOT EXISTS (SELECT FROM users WHERE created_at < now());
"""

DROP = """
ALTER TABLE balance_app_version DROP COLUMN chained_from;
ALTER TABLE daily_balances DROP COLUMN sealed;
DROP TABLE seal_parts, seals;
"""


def upgrade() -> None:
    """Add tables and columns."""
    for statement in (SEALS, SEALED, CHAINED_FROM):
        op.execute(statement)


def downgrade() -> None:
    """Drop them: the seals are lost."""
    op.execute(DROP)
