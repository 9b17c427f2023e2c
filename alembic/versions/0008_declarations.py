"""Each version's declaration of a job; of the live ones, the latest counts."""

from alembic import op

revision = "0008"
down_revision = "0007"

DECLARATIONS = """
CREATE TABLE job_declarations (
    job text NOT NULL,
    digest text NOT NULL, -- of schedule and description
    schedule text NOT NULL,
    description text NOT NULL,
    -- of the live declarations, the latest counts
    first_declared_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- when an instance last made it; it is live if that is not long ago
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT job_declarations_pkey PRIMARY KEY (job, digest),
    CONSTRAINT job_declarations_job_fkey FOREIGN KEY (job) REFERENCES jobs (name) ON DELETE CASCADE
)
"""

# The declarations of earlier versions come before all later ones.
DECLARED_SO_FAR = """
INSERT INTO job_declarations (job, digest, schedule, description)
SELECT name, encode(sha256(convert_to(schedule || E'\\n' || description, 'UTF8')), 'hex'),
       schedule, description
FROM jobs
"""

# The schedules of the other live declarations.
OTHERS = "ALTER TABLE jobs ADD COLUMN other_schedules text[] NOT NULL DEFAULT '{}'"


def upgrade() -> None:
    """Add the table, with the declarations so far, and the column."""
    for statement in (DECLARATIONS, DECLARED_SO_FAR, OTHERS):
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    op.execute("ALTER TABLE jobs DROP COLUMN other_schedules")
    op.execute("DROP TABLE job_declarations")
