"""Jobs, the history of their runs, and the copies that are seen."""

from alembic import op

revision = "0002"
down_revision = "0001"

JOBS = """
CREATE TABLE jobs (
    name text NOT NULL,
    -- in the order of first declaration: a copy claims only numbers it knew when it started
    number bigint GENERATED ALWAYS AS IDENTITY,
    -- as declared by the copy that started last
    schedule text NOT NULL,
    description text NOT NULL,
    -- the ticks of an interval are counted from here
    anchor_at timestamptz NOT NULL DEFAULT clock_timestamp(),

    -- the tick that waits or runs; a run that is taken over or tried again keeps it
    due_at timestamptz NOT NULL,
    -- when it may start: due, or later after a failure, or now by request
    ready_at timestamptz NOT NULL,
    -- how many runs this tick had before
    attempt integer NOT NULL DEFAULT 0,
    requested_by text,
    -- when a copy that had just come up first saw it ready: a start of all copies settles from here
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
    -- its copy ends before the lease does, on purpose: then the run was handed back, not lost
    parts boolean NOT NULL DEFAULT false,
    done bigint,
    total bigint,
    note text,
    -- what the next owner goes on from after a loss or a hand-back
    checkpoint jsonb,

    -- the last sign of life of any run: the fleet is up if it is younger than a copy
    alive_at timestamptz,
    -- runs lost in a row; a job that kills its process must not take down the fleet
    lost_streak integer NOT NULL DEFAULT 0,
    -- the round in which it was claimed last: who claimed in this round lets others go first
    round bigint NOT NULL DEFAULT 0,

    -- the last run that ended, so that the list needs no look into the history
    last_outcome text,
    last_server text,
    last_started_at timestamptz,
    last_ended_at timestamptz,
    last_result text,

    -- the one question of every claim: from when may somebody take it?
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
) WITH (fillfactor = 70) -- a heartbeat writes the row anew every few seconds
"""

JOBS_INDEXES = (
    # every claim, and how long until the next
    "CREATE INDEX jobs_claimable_at_idx ON jobs (claimable_at)",
    # the newest round
    "CREATE INDEX jobs_round_idx ON jobs (round)",
)

RUNS = """
CREATE TABLE job_runs (
    -- in the order of starting: the cursor of the history
    id bigint GENERATED ALWAYS AS IDENTITY,
    job text NOT NULL,
    -- of which claim; none for ticks that did not run
    fence bigint,
    -- the tick; of a range that did not run, the first
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
    -- what the run said at its end: its result, its error, or why it ended
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

# For people alone: nothing is decided by who is listed here.
COPIES = """
CREATE TABLE copies (
    id uuid NOT NULL,
    server text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- it can run the jobs up to this number, but for those it lacks
    knows_to bigint NOT NULL,
    lacks text[] NOT NULL,
    CONSTRAINT copies_pkey PRIMARY KEY (id)
)
"""

# Run before a commit, in the same message: the commit takes place only while the run holds its
# lease, and the lock on the row keeps everybody from taking the job in between.
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
    """Make the tables; the copies fill them."""
    for statement in (JOBS, *JOBS_INDEXES, RUNS, *RUNS_INDEXES, COPIES, HOLD_LEASE):
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP FUNCTION hold_lease")
    op.execute("DROP TABLE copies, job_runs, jobs")
