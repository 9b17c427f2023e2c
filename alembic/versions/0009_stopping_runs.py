"""Since when a run that goes on has been told to stop."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column; what an older program leaves in it is older than the run."""
    op.execute("ALTER TABLE jobs ADD COLUMN stopping_at timestamptz")


def downgrade() -> None:
    """Drop it."""
    op.execute("ALTER TABLE jobs DROP COLUMN stopping_at")
