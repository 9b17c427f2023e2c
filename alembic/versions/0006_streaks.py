"""Failures, retries and releases in a row; pauses because of lost runs end."""

from alembic import op

revision = "0006"
down_revision = "0005"

# An older program leaves them as they are.
STREAKS = """
ALTER TABLE jobs
    -- of the current tick; releases in a row without a stop of the instance, and retries
    ADD COLUMN releases integer NOT NULL DEFAULT 0,
    ADD COLUMN retries integer NOT NULL DEFAULT 0,
    -- runs in a row that failed or timed out; a success ends it
    ADD COLUMN failure_streak integer NOT NULL DEFAULT 0
"""

# Before, a job whose runs were lost was paused until a person resumed it; now it is quarantined,
# which ends by itself.
LOST = """
UPDATE jobs
SET paused_at = NULL, paused_by = NULL, pause_reason = NULL, ready_at = clock_timestamp()
WHERE paused_by = 'balance_app' AND pause_reason = 'its last 3 runs were lost'
"""


def upgrade() -> None:
    """Add the columns, and end the pauses."""
    op.execute(STREAKS)
    op.execute(LOST)


def downgrade() -> None:
    """Drop the columns."""
    op.execute(
        "ALTER TABLE jobs DROP COLUMN releases, DROP COLUMN retries, DROP COLUMN failure_streak"
    )
