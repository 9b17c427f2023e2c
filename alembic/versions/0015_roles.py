"""The grants of the role as which instances serve, and what even that role's rights can't undo.

Instances of the release before may run beside it. No table is rewritten.
"""

from alembic import op

revision = "0015"
down_revision = "0014"

# One place for all grants: exactly what the statements of the program need. A migration that adds
# a table or column replaces the function, and calls it.
#
# It can be called again, for any role, by the owner of the tables; `balance-app migrate` does. What
# the owner has no right to give is left out with a sentence (BL003), and the job that needs it says
# so too. The role is one of the whole server: another database's service may make it at once.
GRANT = """
CREATE FUNCTION grant_to_instances(instances name) RETURNS void LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
DECLARE
    version integer := current_setting('server_version_num');
    each record;
    missing text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = instances) THEN
        BEGIN
            -- before PostgreSQL 16 a role that does not inherit could not use pg_read_all_stats
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE %s', instances,
                           CASE WHEN version >= 160000 THEN 'NOINHERIT' ELSE 'INHERIT' END);
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN NULL;
            WHEN insufficient_privilege THEN
                RAISE WARNING USING ERRCODE = 'BL003', MESSAGE = format(
                    'There is no role "%s" for instances, and "%s" may not create it: create it, '
                    'and run `balance-app migrate` again.', instances, current_user
                );
                RETURN;
        END;
    END IF;
    IF EXISTS (
        SELECT FROM pg_class WHERE oid = 'entries'::regclass
        AND pg_has_role(instances, relowner, 'USAGE')
    ) THEN
        RAISE WARNING USING ERRCODE = 'BL003', MESSAGE = format(
            'The role "%s" owns the tables, or is a superuser: nothing is granted to it.', instances
        );
        RETURN;
    END IF;
    FOR each IN
        SELECT * FROM (VALUES
            ('balance_app_version', 'SELECT'),
            ('access_state', 'SELECT, UPDATE (generation)'),
            ('api_keys', 'SELECT, UPDATE (last_used_on)'),
            ('sessions', 'SELECT, INSERT (id, digest, key_id, expires_at), UPDATE (revoked_at),
                          DELETE'),
            ('actions', 'SELECT, INSERT (by, action, subject, before, after)'),
            ('users', 'SELECT,
                       INSERT (id, balance, version, floor, created_at, changed_at, hash),
                       UPDATE (balance, version, changed_at, hash, held, hold_events, holds_due_at,
                               floor, frozen, settings_version)'),
            ('entries', 'SELECT, INSERT'),
            ('holds', 'SELECT,
                       INSERT (user_id, number, amount, at, expires_at, key, reference, note, by),
                       UPDATE (state, captured, ended_at, ended_by, balance, held, version)'),
            ('idempotency_keys', 'SELECT, INSERT, DELETE'),
            ('opening_keys', 'SELECT, INSERT'),
            ('external_ids', 'SELECT, INSERT, UPDATE (external_id), DELETE'),
            ('user_settings', 'SELECT, INSERT'),
            ('jobs', 'SELECT,
                      INSERT (name, schedule, description, args, start_within, anchor_at, due_at,
                              ready_at),
                      UPDATE (schedule, description, other_schedules, anchor_at, due_at, ready_at,
                              attempt, requested_by, startup_marked_at, paused_at, paused_by,
                              pause_reason, fence, holder, server, started_at, lease_expires_at,
                              cancel_requested_by, releasing, done, total, note, checkpoint,
                              last_heartbeat_at, lost_streak, releases, retries, failure_streak,
                              round, last_outcome, last_server, last_started_at, last_ended_at,
                              last_result, forgotten_at, forgotten_by, work_ended_at,
                              stop_requested_at, args, start_within, requested_args,
                              schedule_override, overridden_by, overridden_at)'),
            ('job_runs', 'SELECT,
                          INSERT (job, fence, due_at, last_due_at, ticks, attempt, holder, server,
                                  started_at, ended_at, outcome, result, args),
                          UPDATE (outcome, ended_at, result), DELETE'),
            ('job_run_lines', 'SELECT, INSERT, DELETE'),
            ('job_run_tracebacks', 'SELECT, INSERT'),
            ('job_declarations', 'SELECT,
                                  INSERT (job, digest, schedule, description, args, start_within),
                                  UPDATE (last_declared_at)'),
            ('instances', 'SELECT, INSERT (id, server, highest_number, missing, max_running),
                           UPDATE (last_heartbeat_at), DELETE'),
            ('daily_balances', 'SELECT, INSERT, UPDATE (version, balance, at, sealed)'),
            ('daily_totals', 'SELECT, INSERT,
                              UPDATE (opened, opening, changes, deposited, withdrawn, transfers,
                                      transferred, active_users)'),
            ('counted_users', 'SELECT, INSERT, UPDATE (version, day)'),
            ('table_sizes', 'SELECT, INSERT, DELETE'),
            ('seals', 'SELECT, INSERT'),
            ('seal_parts', 'SELECT, INSERT')
        ) AS listed (name, rights)
    LOOP
        EXECUTE format('REVOKE ALL ON %I FROM %I', each.name, instances);
        EXECUTE format('GRANT %s ON %I TO %I', each.rights, each.name, instances);
        -- for refresh-statistics; older servers leave ANALYZE to the owner
        IF version >= 170000 AND each.name <> 'balance_app_version' THEN
            EXECUTE format('GRANT MAINTAIN ON %I TO %I', each.name, instances);
        END IF;
    END LOOP;
    -- The id of a user is drawn by the statement; how far each sequence is, watch-limits reads.
    FOR each IN
        SELECT sequence, rights FROM (VALUES
            ('users', 'id', 'SELECT, USAGE'),
            ('jobs', 'number', 'SELECT'),
            ('job_runs', 'id', 'SELECT'),
            ('actions', 'id', 'SELECT')
        ) AS listed (name, of, rights),
        LATERAL pg_get_serial_sequence(name, of) AS sequence
    LOOP
        EXECUTE format('REVOKE ALL ON SEQUENCE %s FROM %I', each.sequence, instances);
        EXECUTE format('GRANT %s ON SEQUENCE %s TO %I', each.rights, each.sequence, instances);
    END LOOP;
    -- What follows may take rights that the tables' owner lacks.
    FOREACH missing IN ARRAY ARRAY[
        format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), instances),
        format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC', current_schema()),
        format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database())
    ] LOOP
        BEGIN
            EXECUTE missing;
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING USING ERRCODE = 'BL003', MESSAGE =
                format('Not done, for lack of a right: %s.', missing);
        END;
    END LOOP;
    -- A role that may revoke nothing there gets a warning of PostgreSQL's own, and no error: the
    -- schema public is the owner's from PostgreSQL 15 on.
    IF has_schema_privilege(instances, current_schema()::text, 'CREATE') THEN
        RAISE WARNING USING ERRCODE = 'BL003', MESSAGE = format(
            'Not done, for lack of a right: REVOKE CREATE ON SCHEMA %I FROM PUBLIC.',
            current_schema()
        );
    END IF;
    -- for watch-limits: the transactions of other roles
    IF NOT pg_has_role(instances, 'pg_read_all_stats', 'USAGE') THEN
        missing := format('GRANT pg_read_all_stats TO %I', instances)
            || CASE WHEN version >= 160000 THEN ' WITH INHERIT TRUE' ELSE '' END;
        BEGIN
            EXECUTE missing;
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE WARNING USING ERRCODE = 'BL003', MESSAGE =
                    format('Not done, for lack of a right: %s.', missing);
            WHEN unique_violation THEN NULL; -- a service in another database has granted it
        END;
    END IF;
END
$$;
REVOKE ALL ON FUNCTION grant_to_instances FROM PUBLIC;
"""

# `balance_app.run_role` is the setting DB_RUN_ROLE.
ROLE = """
SELECT grant_to_instances(coalesce(
    nullif(current_setting('balance_app.run_role', true), ''), 'balance_app_run'
)::name)
"""

# The statements of the program write balance, version and entry at once, so the entry is there when
# this fires, at the end of the statement. Versions are dense: a balance of the past has an entry,
# too. A lookup by the primary key is its cost; what changes no balance costs nothing.
#
# A program of an older release would leave an entry without a hash behind others, for ever. After
# the error of an undefined column it compares the schema with itself, and finds itself too old.
BALANCES = """
CREATE FUNCTION require_entry() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    entry_hash bytea;
BEGIN
    SELECT hash INTO entry_hash FROM entries
    WHERE user_id = NEW.id AND version = NEW.version AND balance = NEW.balance;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user % has no entry % with balance %', NEW.id, NEW.version, NEW.balance
            USING ERRCODE = 'BL004';
    ELSIF entry_hash IS DISTINCT FROM NEW.hash THEN
        RAISE EXCEPTION 'user % has another hash than entry %', NEW.id, NEW.version
            USING ERRCODE = 'undefined_column';
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF NEW.version <> OLD.version + 1 THEN
            RAISE EXCEPTION 'version % of user % does not follow %',
                NEW.version, NEW.id, OLD.version USING ERRCODE = 'BL004';
        END IF;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER users_opened_with_entry AFTER INSERT ON users
FOR EACH ROW EXECUTE FUNCTION require_entry();
CREATE TRIGGER users_changed_with_entry AFTER UPDATE ON users
FOR EACH ROW WHEN (OLD.balance <> NEW.balance OR OLD.version <> NEW.version)
EXECUTE FUNCTION require_entry();
"""

# Without its key an accepted change could be made twice. The days are those of REFUSALS_KEPT in
# `balances/repository.py`; a test compares them, as a trigger takes no parameter.
KEYS = """
CREATE FUNCTION refuse_forgetting() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.outcome <> 'refused' OR OLD.at >= clock_timestamp() - interval '7 days' THEN
        RAISE EXCEPTION 'the key of a change that was % at % is kept', OLD.outcome, OLD.at
            USING ERRCODE = 'BL004';
    END IF;
    RETURN OLD;
END
$$;
CREATE TRIGGER idempotency_keys_kept BEFORE DELETE ON idempotency_keys
FOR EACH ROW EXECUTE FUNCTION refuse_forgetting();
"""

DROP = """
DROP TRIGGER idempotency_keys_kept ON idempotency_keys;
DROP TRIGGER users_opened_with_entry ON users;
DROP TRIGGER users_changed_with_entry ON users;
DROP FUNCTION refuse_forgetting, require_entry, grant_to_instances;
"""


def upgrade() -> None:
    """Add the guards, and grant."""
    for statement in (BALANCES, KEYS, GRANT, ROLE):
        op.execute(statement)


def downgrade() -> None:
    """Drop the guards; the role keeps what was granted to it."""
    op.execute(DROP)
