"""The hash of an entry in two parts; the service computes the first before it locks the account.

`entry_content` is what is known of an entry before: who, how much, and what is said of it. Only
`chain_hash`, of that and of what the locked row decides, is evaluated in the UPDATE of an account;
and once more where another session has changed the row meanwhile. `entry_hash` of migration 0013
set up a row of 14 columns in each such evaluation. It stays: the hashes of entries that are older
than this were made by it, and are checked by it.

Audits of the release before do not know the hashes that are made from now on, so its instances are
not ready any more. No table is rewritten.
"""

from alembic import op

revision = "0020"
down_revision = "0019"

# Both are inlined; declared IMMUTABLE they could not be.
HASHES = """
CREATE FUNCTION entry_content(
    user_id bigint, amount bigint, key text, by text, other_user_id bigint, other_version bigint,
    reverses bigint, hold bigint, reference text, note text
) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
SELECT sha256(record_send(ROW(
    user_id, amount, key, by, other_user_id, other_version, reverses, hold, reference, note
)))
$$;
CREATE FUNCTION chain_hash(
    previous bytea, content bytea, version bigint, balance bigint, held bigint, at timestamptz
) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
SELECT sha256(previous || content || int8send(version) || int8send(balance) || int8send(held)
              || timestamptz_send(at))
$$;
UPDATE balance_app_version SET compatible_from = '0020';
"""

# Of a batch the service computes the contents, too: in `change_together`, before and after.
TOGETHER = (
    ("principals text[])", "principals text[], contents bytea[])"),
    ("notes, principals", "notes, principals, contents"),
    ("note, principal)", "note, principal, content)"),
    (
        """entry_hash(
                    account.hash, account_id, account.version, asked.amount, account.balance,
                    account.held, account.changed_at, asked.key, asked.principal, NULL, NULL,
                    NULL, NULL, asked.reference, asked.note
                )""",
        """chain_hash(
                    account.hash, asked.content, account.version, account.balance, account.held,
                    account.changed_at
                )""",
    ),
)

# The arguments change, so the function is made anew.
REPLACE = """
DO $together$
DECLARE
    before CONSTANT oid := 'change_together'::regproc;
    definition text := pg_get_functiondef(before);
    texts CONSTANT text[] := {texts};
BEGIN
    FOR number IN 1 .. array_length(texts, 1) LOOP
        IF strpos(definition, texts[number][1]) = 0 THEN
            RAISE EXCEPTION 'change_together has another text than expected';
        END IF;
        definition := replace(definition, texts[number][1], texts[number][2]);
    END LOOP;
    EXECUTE format('DROP FUNCTION %s', before::regprocedure);
    EXECUTE definition;
END
$together$;
"""

# Who may call it is not kept by a function that is made anew, and default privileges may have been
# changed since the others were made.
GRANT = "GRANT EXECUTE ON FUNCTION {} TO PUBLIC"

# Audits of the release before report the entries that were hashed meanwhile.
DROP = """
DROP FUNCTION chain_hash, entry_content;
UPDATE balance_app_version SET compatible_from = '0013';
"""


def _replace(*, back: bool) -> str:
    pairs = [pair[::-1] if back else pair for pair in TOGETHER]
    rows = ", ".join(f"ARRAY[$text${one}$text$, $text${two}$text$]" for one, two in pairs)
    return REPLACE.format(texts=f"ARRAY[{rows}]")


def upgrade() -> None:
    """Add the functions, and use them."""
    for statement in (HASHES, _replace(back=False)):
        op.execute(statement)
    op.execute(GRANT.format("change_together, chain_hash, entry_content"))


def downgrade() -> None:
    """Hash as before, and drop them."""
    for statement in (_replace(back=True), DROP):
        op.execute(statement)
    op.execute(GRANT.format("change_together"))
