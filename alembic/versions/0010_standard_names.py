"""Standard names for instances, heartbeats, leases and released runs.

A program of the release before can't work with them: after this migration it is not ready. It
answers requests as before, but its runs end, and newer instances take its jobs over; see
docs/upgrading.md. Each table is locked for a moment; the check of the outcomes reads the history
once (a second for three million runs).
"""

from alembic import op

revision = "0010"
down_revision = "0009"

# (table, old name, new name)
COLUMNS = (
    ("jobs", "seen_at", "startup_marked_at"),
    ("jobs", "lease_until", "lease_expires_at"),
    ("jobs", "cancel_by", "cancel_requested_by"),
    ("jobs", "parts", "releasing"),
    ("jobs", "alive_at", "last_heartbeat_at"),
    ("jobs", "stopping_at", "stop_requested_at"),
    ("job_declarations", "seen_at", "last_declared_at"),
    ("instances", "seen_at", "last_heartbeat_at"),
    ("instances", "knows_to", "highest_number"),
    ("instances", "lacks", "missing"),
)

OUTCOMES = """
ALTER TABLE job_runs DROP CONSTRAINT job_runs_outcome_check;
UPDATE job_runs SET outcome = '{new}' WHERE outcome = '{old}';
UPDATE jobs SET last_outcome = '{new}' WHERE last_outcome = '{old}';
ALTER TABLE job_runs ADD CONSTRAINT job_runs_outcome_check CHECK (outcome IN (
    'succeeded', 'failed', 'timed_out', 'cancelled', '{new}', 'lost', 'skipped'
))
"""

# As in 0002, with the new name of the column.
HOLD_LEASE = """
CREATE OR REPLACE FUNCTION hold_lease() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE jobs
    SET checkpoint = coalesce(
        nullif(current_setting('balance_app.checkpoint', true), '')::jsonb, checkpoint
    )
    WHERE name = current_setting('balance_app.job')
      AND fence = current_setting('balance_app.fence')::bigint
      AND holder = current_setting('balance_app.holder')::uuid
      AND {lease} > clock_timestamp();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the run has lost its lease' USING ERRCODE = 'BL001';
    END IF;
END
$$
"""

# The first release reads its revision in `alembic_version`, and is not ready without it.
COMPATIBLE_FROM = """
UPDATE balance_app_version SET compatible_from = '0010';
DROP TABLE IF EXISTS alembic_version
"""


def upgrade() -> None:
    """Rename them; no row is lost, and leases stay valid."""
    op.execute("ALTER TABLE copies RENAME TO instances")
    op.execute("ALTER INDEX copies_pkey RENAME TO instances_pkey")
    for table, old, new in COLUMNS:
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    op.execute(OUTCOMES.format(old="interrupted", new="released"))
    op.execute(HOLD_LEASE.format(lease="lease_expires_at"))
    op.execute(COMPATIBLE_FROM)


def downgrade() -> None:
    """Rename them back."""
    op.execute(HOLD_LEASE.format(lease="lease_until"))
    op.execute(OUTCOMES.format(old="released", new="interrupted"))
    for table, old, new in COLUMNS:
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {new} TO {old}")
    op.execute("ALTER INDEX instances_pkey RENAME TO copies_pkey")
    op.execute("ALTER TABLE instances RENAME TO copies")
    op.execute("UPDATE balance_app_version SET compatible_from = '0003'")
