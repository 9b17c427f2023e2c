"""Jobs that are forgotten, and runs whose work is done before their least duration is over."""

from alembic import op

revision = "0007"
down_revision = "0006"

COLUMNS = """
ALTER TABLE jobs
    -- nobody has its code any more, and somebody had it taken off the lists; its history stays.
    -- A run of a later moment (of an instance that does not know of this) takes it back.
    ADD COLUMN forgotten_at timestamptz,
    ADD COLUMN forgotten_by text,
    -- of the run that began before: its function returned, it only lasts on
    ADD COLUMN work_ended_at timestamptz,
    ADD CONSTRAINT jobs_forgotten_check CHECK ((forgotten_at IS NULL) = (forgotten_by IS NULL))
"""


def upgrade() -> None:
    """Add the columns; an older program knows nothing of them."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Drop them."""
    op.execute(
        "ALTER TABLE jobs DROP COLUMN forgotten_at, DROP COLUMN forgotten_by,"
        " DROP COLUMN work_ended_at"
    )
