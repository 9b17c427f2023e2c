"""Jobs, the history of their runs, and the instances (table `copies`, renamed by 0010)."""

from alembic import op

revision = "0002"
down_revision = "0001"

JOBS = """
CREATE TABLE jobs (
    name text NOT NULL,
    -- in the order of first declaration; an instance claims only numbers that existed at its start
    number bigint GENERATED ALWAYS AS IDENTITY,
    -- as declared by the instance that started last
    schedule text NOT NULL,
    description text NOT NULL,
    -- the ticks of an interval are counted from here
    anchor_at timestamptz NOT NULL DEFAULT clock_timestamp(),

    -- the tick that waits or runs; a run that is taken over or tried again keeps it
    due_at timestamptz NOT NULL,
    -- when it may start: due, or later after a failure, or now by request
    ready_at timestamptz NOT NULL,
    -- the number of earlier runs of this tick
    attempt integer NOT NULL DEFAULT 0,
    requested_by text,
    -- when an instance in its warm-up first found it ready; the warm-up of all is counted from here
    seen_at timestamptz,

    paused_at timestamptz,
    paused_by text,
    pause_reason text,

    -- the run under way; the fence is raised at each claim, never lowered
    fence bigint NOT NULL DEFAULT 0,
    holder uuid,
    server text,
    started_at timestamptz,
    lease_until timestamptz,
    cancel_by text,
    -- its instance stops before the lease expires; the run then counts as released, not as lost
    parts boolean NOT NULL DEFAULT false,
    done bigint,
    total bigint,
    note text,
    -- where the next run resumes after a loss or a release
    checkpoint jsonb,

    -- the last heartbeat of any run; the fleet ran before instances that started later
    alive_at timestamptz,
    -- runs lost in a row; a job that kills its process must not take down the fleet
    lost_streak integer NOT NULL DEFAULT 0,
    -- the round of its last claim; an instance that has claimed in this round lets others go first
    round bigint NOT NULL DEFAULT 0,

    -- the last run that ended, so that the list of jobs need not read the history
    last_outcome text,
    last_server text,
    last_started_at timestamptz,
    last_ended_at timestamptz,
    last_result text,

    -- from when an instance may claim it
    claimable_at timestamptz GENERATED ALWAYS AS (
        CASE WHEN holder IS NOT NULL THEN lease_until
             WHEN paused_at IS NULL THEN ready_at END
    ) STORED,

    CONSTRAINT jobs_pkey PRIMARY KEY (name),
    CONSTRAINT jobs_number_key UNIQUE (number),
    CONSTRAINT jobs_run_check CHECK (
        (holder IS NULL) = (lease_until IS NULL)
        AND (holder IS NULL) = (started_at IS NULL)
        AND (holder IS NULL) = (server IS NULL)
        AND (holder IS NOT NULL OR (cancel_by IS NULL AND NOT parts))
    ),
    CONSTRAINT jobs_pause_check CHECK ((paused_at IS NULL) = (paused_by IS NULL))
) WITH (fillfactor = 70) -- each heartbeat updates the row
"""

JOBS_INDEXES = (
    # for each claim, and for the time until the next
    "CREATE INDEX jobs_claimable_at_idx ON jobs (claimable_at)",
    # for the latest round
    "CREATE INDEX jobs_round_idx ON jobs (round)",
)

RUNS = """
CREATE TABLE job_runs (
    -- in the order of the starts; the cursor of the history
    id bigint GENERATED ALWAYS AS IDENTITY,
    job text NOT NULL,
    -- the fence of its claim; none for ticks that did not run
    fence bigint,
    -- the tick, or the first tick of a range that did not run
    due_at timestamptz NOT NULL,
    last_due_at timestamptz,
    ticks bigint NOT NULL DEFAULT 1,
    attempt integer NOT NULL DEFAULT 0,
    holder uuid,
    server text,
    started_at timestamptz NOT NULL,
    ended_at timestamptz,
    -- none while it runs
    outcome text,
    -- its result, its error, or the reason why it ended
    result text,
    CONSTRAINT job_runs_pkey PRIMARY KEY (id),
    CONSTRAINT job_runs_job_fkey FOREIGN KEY (job) REFERENCES jobs (name),
    CONSTRAINT job_runs_job_fence_key UNIQUE (job, fence),
    CONSTRAINT job_runs_outcome_check CHECK (outcome IN (
        'succeeded', 'failed', 'timed_out', 'cancelled', 'interrupted', 'lost', 'skipped'
    )),
    CONSTRAINT job_runs_end_check CHECK ((outcome IS NULL) = (ended_at IS NULL)),
    CONSTRAINT job_runs_skipped_check CHECK (
        (fence IS NULL) = (outcome IS NOT DISTINCT FROM 'skipped')
        AND (fence IS NULL) = (last_due_at IS NOT NULL)
        AND ticks >= 1
    )
)
"""

RUNS_INDEXES = (
    "CREATE INDEX job_runs_job_id_idx ON job_runs (job, id)",
    "CREATE INDEX job_runs_outcome_id_idx ON job_runs (outcome, id)",
)

# For people only: no statement that shares out jobs reads it.
COPIES = """
CREATE TABLE copies (
    id uuid NOT NULL,
    server text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- it can run the jobs up to this number, except those in lacks
    knows_to bigint NOT NULL,
    lacks text[] NOT NULL,
    CONSTRAINT copies_pkey PRIMARY KEY (id)
)
"""

# Run before a commit, in the same message: the commit takes place only while the run holds its
# lease, and the row lock keeps other instances from claiming the job in between.
HOLD_LEASE = """
CREATE FUNCTION hold_lease() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE jobs
    SET checkpoint = coalesce(
        nullif(current_setting('balance_app.checkpoint', true), '')::jsonb, checkpoint
    )
    WHERE name = current_setting('balance_app.job')
      AND fence = current_setting('balance_app.fence')::bigint
      AND holder = current_setting('balance_app.holder')::uuid
      AND lease_until > clock_timestamp();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the run has lost its lease' USING ERRCODE = 'BL001';
    END IF;
END
$$
"""


def upgrade() -> None:
    """Create the tables; the instances fill them."""
    for statement in (JOBS, *JOBS_INDEXES, RUNS, *RUNS_INDEXES, COPIES, HOLD_LEASE):
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP FUNCTION hold_lease")
    op.execute("DROP TABLE copies, job_runs, jobs")
