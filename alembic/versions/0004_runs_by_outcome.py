"""The latest run of a job with an outcome is found by an index, however long the history is."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the index; while it is built (a second for a million runs) runs can't begin or end."""
    op.execute("CREATE INDEX job_runs_job_outcome_id_idx ON job_runs (job, outcome, id)")


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP INDEX job_runs_job_outcome_id_idx")
