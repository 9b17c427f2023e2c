"""What each version of the program declares of a job, so that the latest of those alive counts."""

from alembic import op

revision = "0008"
down_revision = "0007"

DECLARATIONS = """
CREATE TABLE job_declarations (
    job text NOT NULL,
    digest text NOT NULL, -- of schedule and description
    schedule text NOT NULL,
    description text NOT NULL,
    -- of those that are alive, the latest counts
    first_declared_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- when an instance last made it: alive if that is not long ago
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT job_declarations_pkey PRIMARY KEY (job, digest),
    CONSTRAINT job_declarations_job_fkey FOREIGN KEY (job) REFERENCES jobs (name) ON DELETE CASCADE
)
"""

# What instances of the version before have declared comes before all that is declared from now on.
DECLARED_SO_FAR = """
INSERT INTO job_declarations (job, digest, schedule, description)
SELECT name, encode(sha256(convert_to(schedule || E'\\n' || description, 'UTF8')), 'hex'),
       schedule, description
FROM jobs
"""

# The schedules that are alive beside the one that counts.
OTHERS = "ALTER TABLE jobs ADD COLUMN other_schedules text[] NOT NULL DEFAULT '{}'"


def upgrade() -> None:
    """Begin to write down who declares what."""
    for statement in (DECLARATIONS, DECLARED_SO_FAR, OTHERS):
        op.execute(statement)


def downgrade() -> None:
    """Forget it."""
    op.execute("ALTER TABLE jobs DROP COLUMN other_schedules")
    op.execute("DROP TABLE job_declarations")
