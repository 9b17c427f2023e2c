"""The guard of balances reads the ledger itself, whatever the search_path of the session.

It named `entries` without its schema, so a session that may create a table of that name, if only a
temporary one, could make it look there. The grant says also where a role may create temporary
tables: PostgreSQL itself only warns of a REVOKE that revokes nothing.

Instances of the release before may run beside it. No table is rewritten.
"""

from alembic import op

revision = "0019"
down_revision = "0018"

QUALIFIED = """
DO $guard$
DECLARE
    definition text := pg_get_functiondef('require_entry'::regproc);
BEGIN
    IF strpos(definition, 'FROM entries') = 0 THEN
        RAISE EXCEPTION 'require_entry has another text than expected';
    END IF;
    EXECUTE replace(definition, 'FROM entries', format('FROM %I.entries', current_schema()));
END
$guard$;
"""

UNQUALIFIED = """
DO $guard$
BEGIN
    EXECUTE replace(
        pg_get_functiondef('require_entry'::regproc),
        format('FROM %I.entries', current_schema()), 'FROM entries'
    );
END
$guard$;
"""

# Before this comment in `grant_to_instances`, whatever else a migration in between has put there.
PLACE = "    -- for watch-limits: the transactions of other roles"
TEMPORARY = """\
    IF has_database_privilege(instances, current_database(), 'TEMPORARY') THEN
        RAISE WARNING USING ERRCODE = 'BL003', MESSAGE = format(
            'Not done, for lack of a right: REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC.',
            current_database()
        );
    END IF;
"""

WARN = f"""
DO $grant$
DECLARE
    definition text := pg_get_functiondef('grant_to_instances'::regproc);
    place text := '{PLACE}';
BEGIN
    IF strpos(definition, place) = 0 THEN
        RAISE EXCEPTION 'grant_to_instances has another text than expected';
    END IF;
    EXECUTE replace(definition, place, $text${TEMPORARY}$text$ || place);
END
$grant$;
"""

SILENT = f"""
DO $grant$
BEGIN
    EXECUTE replace(
        pg_get_functiondef('grant_to_instances'::regproc), $text${TEMPORARY}$text$, ''
    );
END
$grant$;
"""


def upgrade() -> None:
    """Change both functions."""
    for statement in (QUALIFIED, WARN):
        op.execute(statement)


def downgrade() -> None:
    """Make them as they were."""
    for statement in (UNQUALIFIED, SILENT):
        op.execute(statement)
