"""When a run that still goes on was requested to stop."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column; an older program leaves values in it that are older than the run."""
    op.execute("ALTER TABLE jobs ADD COLUMN stopping_at timestamptz")


def downgrade() -> None:
    """Drop it."""
    op.execute("ALTER TABLE jobs DROP COLUMN stopping_at")
