"""What an instance's heartbeat tells people beside its time: its changes, and its silences.

Instances of the release before may run beside it. No table is rewritten.
"""

from alembic import op

revision = "0017"
down_revision = "0016"

# Since the instance's start: changes of balances that it accepted, and that a balance refused. Each
# heartbeat writes its row anyway. `silences` are pairs of times, the latest first: from when to
# when it sent no heartbeat for longer than a lease, and was not dead. What all instances have in
# common of them is an outage of the database.
COLUMNS = """
ALTER TABLE instances
    ADD COLUMN accepted bigint NOT NULL DEFAULT 0,
    ADD COLUMN refused bigint NOT NULL DEFAULT 0,
    ADD COLUMN silences timestamptz[] NOT NULL DEFAULT '{}';
"""

# The list in `grant_to_instances`, whatever else a migration has changed there.
GRANT = """
DO $grant$
DECLARE
    definition text := pg_get_functiondef('grant_to_instances'::regproc);
    inserted text := 'INSERT (id, server, highest_number, missing, max_running)';
    updated text := 'UPDATE (last_heartbeat_at), DELETE';
BEGIN
    IF strpos(definition, inserted) = 0 OR strpos(definition, updated) = 0 THEN
        RAISE EXCEPTION 'grant_to_instances has another list than expected';
    END IF;
    definition := replace(definition, inserted,
        'INSERT (id, server, highest_number, missing, max_running, accepted, refused)');
    EXECUTE replace(definition, updated,
        'UPDATE (last_heartbeat_at, accepted, refused, silences), DELETE');
END
$grant$;
"""

# `balance_app.run_role` is the setting DB_RUN_ROLE. Where there is no such role, migration 0015 or
# `balance-app migrate` says so.
ROLE = """
SELECT grant_to_instances(rolname) FROM pg_roles WHERE rolname = coalesce(
    nullif(current_setting('balance_app.run_role', true), ''), 'balance_app_run'
)
"""

REVOKE = """
DO $grant$
BEGIN
    EXECUTE replace(
        replace(pg_get_functiondef('grant_to_instances'::regproc),
            'INSERT (id, server, highest_number, missing, max_running, accepted, refused)',
            'INSERT (id, server, highest_number, missing, max_running)'),
        'UPDATE (last_heartbeat_at, accepted, refused, silences), DELETE',
        'UPDATE (last_heartbeat_at), DELETE');
END
$grant$;
"""

DROP = "ALTER TABLE instances DROP COLUMN accepted, DROP COLUMN refused, DROP COLUMN silences"


def upgrade() -> None:
    """Add the columns, and grant."""
    for statement in (COLUMNS, GRANT, ROLE):
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    for statement in (REVOKE, DROP):
        op.execute(statement)
