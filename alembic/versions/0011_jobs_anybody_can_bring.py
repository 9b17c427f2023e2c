"""Arguments of jobs, late ticks, schedules set at run time, limits of instances, logs of runs."""

from alembic import op

revision = "0011"
down_revision = "0010"

# Only added: a release before runs every tick, however late, by the declared schedule and with the
# declared arguments, and writes no limit and no log.
ADD = """
ALTER TABLE jobs
    ADD COLUMN args jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN start_within interval,
    ADD COLUMN requested_args jsonb,
    ADD COLUMN schedule_override text,
    ADD COLUMN overridden_by text,
    ADD COLUMN overridden_at timestamptz,
    ADD CONSTRAINT jobs_override_check CHECK (
        (schedule_override IS NULL) = (overridden_by IS NULL)
        AND (schedule_override IS NULL) = (overridden_at IS NULL)
    );
ALTER TABLE job_declarations
    ADD COLUMN args jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN start_within interval;
ALTER TABLE instances ADD COLUMN max_running integer;
ALTER TABLE job_runs ADD COLUMN args jsonb;
CREATE TABLE job_run_lines (
    job text NOT NULL,
    fence bigint NOT NULL,
    number bigint NOT NULL,
    logged_at timestamptz NOT NULL,
    level text NOT NULL,
    text text NOT NULL,
    PRIMARY KEY (job, fence, number),
    CONSTRAINT job_run_lines_job_fence_fkey
        FOREIGN KEY (job, fence) REFERENCES job_runs (job, fence) ON DELETE CASCADE
);
CREATE TABLE job_run_tracebacks (
    job text NOT NULL,
    fence bigint NOT NULL,
    text text NOT NULL,
    PRIMARY KEY (job, fence),
    CONSTRAINT job_run_tracebacks_job_fence_fkey
        FOREIGN KEY (job, fence) REFERENCES job_runs (job, fence) ON DELETE CASCADE
);
"""

DROP = """
DROP TABLE job_run_tracebacks;
DROP TABLE job_run_lines;
ALTER TABLE job_runs DROP COLUMN args;
ALTER TABLE instances DROP COLUMN max_running;
ALTER TABLE job_declarations DROP COLUMN start_within, DROP COLUMN args;
ALTER TABLE jobs
    DROP COLUMN overridden_at, DROP COLUMN overridden_by, DROP COLUMN schedule_override,
    DROP COLUMN requested_args, DROP COLUMN start_within, DROP COLUMN args;
"""


def upgrade() -> None:
    """Add columns and tables."""
    op.execute(ADD)


def downgrade() -> None:
    """Drop them."""
    op.execute(DROP)
