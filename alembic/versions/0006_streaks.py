"""What of a job's runs went wrong in a row, and no pause by the service that nobody ends."""

from alembic import op

revision = "0006"
down_revision = "0005"

# A program that does not know them leaves them as they are.
STREAKS = """
ALTER TABLE jobs
    -- of the tick that goes on: releases in a row that no instance's stop explains, and retries
    ADD COLUMN releases integer NOT NULL DEFAULT 0,
    ADD COLUMN retries integer NOT NULL DEFAULT 0,
    -- runs in a row that failed or timed out; a success ends it
    ADD COLUMN failure_streak integer NOT NULL DEFAULT 0
"""

# Jobs that were paused because their runs were lost stayed paused until somebody resumed them;
# now they would have been quarantined, which ends by itself.
LOST = """
UPDATE jobs
SET paused_at = NULL, paused_by = NULL, pause_reason = NULL, ready_at = clock_timestamp()
WHERE paused_by = 'balance_app' AND pause_reason = 'its last 3 runs were lost'
"""


def upgrade() -> None:
    """Add them."""
    op.execute(STREAKS)
    op.execute(LOST)


def downgrade() -> None:
    """Forget them."""
    op.execute(
        "ALTER TABLE jobs DROP COLUMN releases, DROP COLUMN retries, DROP COLUMN failure_streak"
    )
