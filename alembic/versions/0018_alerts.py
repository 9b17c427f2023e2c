"""The events that are sent to ALERT_URL, and what was reported to PING_URL.

Instances of the release before may run beside it. No table is rewritten.
"""

from alembic import op

revision = "0018"
down_revision = "0017"

# `raised` and `recovered` are one row each, in the order in which they are sent. A cause is open
# while its `raised` has no end; the index allows one for each subject.
ALERTS = """
CREATE TABLE alerts (
    id bigint GENERATED ALWAYS AS IDENTITY,
    event uuid NOT NULL DEFAULT gen_random_uuid(), -- what a receiver knows it by
    code text NOT NULL,
    subject text NOT NULL, -- the job or the instance; empty if it is neither
    status text NOT NULL,
    sentence text NOT NULL,
    since timestamptz NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    tries integer NOT NULL DEFAULT 0,
    refusals integer NOT NULL DEFAULT 0, -- tries that failed because of the event itself
    next_try_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    done_at timestamptz, -- accepted, or given up with an error
    error text,
    CONSTRAINT alerts_pkey PRIMARY KEY (id),
    CONSTRAINT alerts_status_check CHECK (status IN ('raised', 'recovered')),
    CONSTRAINT alerts_end_check CHECK (status = 'raised' OR ended_at IS NULL)
);
CREATE UNIQUE INDEX alerts_open_key ON alerts (code, subject)
WHERE status = 'raised' AND ended_at IS NULL;
CREATE INDEX alerts_waiting_idx ON alerts (id) WHERE done_at IS NULL;
"""

# The last phase that was reported of each job's runs; of the fleet in the row of the empty name.
PINGS = """
CREATE TABLE pings (
    target text NOT NULL,
    fence bigint NOT NULL,
    phase text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(), -- of a job: when its URL was last tried
    CONSTRAINT pings_pkey PRIMARY KEY (target),
    CONSTRAINT pings_phase_check CHECK (phase IN ('start', 'success', 'fail'))
);
"""

# More rows of the lists in `grant_to_instances`, whatever else a migration in between has put
# there.
GRANT = """
DO $grant$
DECLARE
    definition text := pg_get_functiondef('grant_to_instances'::regproc);
    tables text := '(''seals'', ''SELECT, INSERT''),';
    sequences text := '(''jobs'', ''number'', ''SELECT''),';
BEGIN
    IF strpos(definition, tables) = 0 OR strpos(definition, sequences) = 0 THEN
        RAISE EXCEPTION 'grant_to_instances has other lists than expected';
    END IF;
    definition := replace(definition, tables, tables || '
            (''alerts'', ''SELECT, INSERT (code, subject, status, sentence, since),
                        UPDATE (ended_at, tries, refusals, next_try_at, done_at, error),
                        DELETE''),
            (''pings'', ''SELECT, INSERT (target, fence, phase), UPDATE (fence, phase, at)''),');
    EXECUTE replace(definition, sequences, sequences || '
            (''alerts'', ''id'', ''SELECT''),');
END
$grant$;
"""

# `balance_app.run_role` is the setting DB_RUN_ROLE. Where there is no such role, migration 0015 or
# `balance-app migrate` says so.
ROLE = """
SELECT grant_to_instances(rolname) FROM pg_roles WHERE rolname = coalesce(
    nullif(current_setting('balance_app.run_role', true), ''), 'balance_app_run'
)
"""

REVOKE = """
DO $grant$
BEGIN
    EXECUTE regexp_replace(
        pg_get_functiondef('grant_to_instances'::regproc),
        '\\s*\\(''(alerts|pings)'', ''(SELECT[^'']*|id'', ''SELECT)''\\),', '', 'g'
    );
END
$grant$;
"""


def upgrade() -> None:
    """Add the tables, and their grants."""
    for statement in (ALERTS, PINGS, GRANT, ROLE):
        op.execute(statement)


def downgrade() -> None:
    """Drop them: what waits to be sent is lost."""
    for statement in (REVOKE, "DROP TABLE pings, alerts"):
        op.execute(statement)
