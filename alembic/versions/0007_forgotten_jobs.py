"""Forgotten jobs, and runs whose function has returned before their shortest duration is over."""

from alembic import op

revision = "0007"
down_revision = "0006"

COLUMNS = """
ALTER TABLE jobs
    -- a person took a job without code off the lists; its history stays. A later run, by an
    -- instance that has the code, undoes it.
    ADD COLUMN forgotten_at timestamptz,
    ADD COLUMN forgotten_by text,
    -- when the function of the current run returned; the run lasts until its shortest duration
    ADD COLUMN work_ended_at timestamptz,
    ADD CONSTRAINT jobs_forgotten_check CHECK ((forgotten_at IS NULL) = (forgotten_by IS NULL))
"""


def upgrade() -> None:
    """Add the columns; an older program does not use them."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Drop them."""
    op.execute(
        "ALTER TABLE jobs DROP COLUMN forgotten_at, DROP COLUMN forgotten_by,"
        " DROP COLUMN work_ended_at"
    )
