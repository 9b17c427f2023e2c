"""The statements that move a job from one state to another, each with the invariant it keeps.

Only PostgreSQL's clock decides, read when the statement runs (`clock_timestamp()`). `now()` is the
start of the transaction: a delayed transaction could take or revive a lease by it.
"""

from typing import Final

# The startup mark is written once each time a job becomes ready, by the first instance that starts;
# later instances can't move it. An instance that starts a warm-up or more after a mark ignores it,
# so a mark twice as old is obsolete and is replaced; so is a mark older than the job's last
# heartbeat. A job with a heartbeat after this instance's start gets no mark: the mark would remain
# when all instances have stopped, and those that start next would take it for their own. The jobs
# that have been ready longest are marked first, one batch per attempt. While instances warm up, no
# job is claimed before it is marked.
MARK_STARTUP: Final = """
WITH ready AS (
    SELECT name FROM jobs
    WHERE claimable_at <= (SELECT clock_timestamp() + $3::interval)
      AND (last_heartbeat_at <= $4) IS NOT FALSE
      AND (startup_marked_at IS NULL OR startup_marked_at <= clock_timestamp() - 2 * $3::interval
           OR startup_marked_at <= last_heartbeat_at)
      AND number <@ $1::int8multirange
    ORDER BY claimable_at LIMIT $2
    FOR UPDATE SKIP LOCKED
)
UPDATE jobs SET startup_marked_at = clock_timestamp() FROM ready WHERE jobs.name = ready.name
"""

# Claims at most one job, and only one without a live lease: it waits, or its lease has expired by
# the server's clock. The row is locked and checked again: a concurrent claim, renewal, pause or
# finish makes it claimable later, or not at all. A locked row is being changed by another session
# and is skipped. Each claim raises the fence, so writes that the previous run still sends are
# refused.
#
# The claim policy: an instance may claim a job at `claimable_at` plus its own backoff. A job that
# was marked at startup waits until `startup_marked_at` plus the warm-up, so that instances that
# start together share it: all use the time that the first of them wrote, not their own start. The
# mark does not delay an instance that was warmed up before it, nor a job with a heartbeat after
# this instance's start: other instances are running already. The tie break: of equally loaded
# instances, one that has claimed in this round waits a little longer. Rounds are the virtual time
# of start-time fair queueing (Goyal, Vin, Cheng 1996): under light load the instances alternate,
# and no instance has to count the others.
#
# $1 id, $2 server, $3 lease, $4 booted_at, $5 numbers, $6 the limit of losses,
# $7 backoff, $8 round, $9 tie break, $10 warmed up, $11 warm-up, $12 takes_over_until,
# $13 quarantine, $14 the longest, $15 and $16 the results of a released and of a lost run
CLAIM: Final = """
WITH own AS (  -- this instance's backoff, with the tie break if it has claimed in this round
    SELECT $7::interval
         + $9::interval * greatest(0, $8::bigint - (SELECT coalesce(max(round), 0) FROM jobs))
           AS backoff
), eligible AS NOT MATERIALIZED (  -- the policy: when this instance may claim each job, if known
    -- With a volatile function (clock_timestamp) it would be materialized, and all jobs be read.
    SELECT name, claimable_at, startup_marked_at, holder,
           CASE WHEN holder IS NULL AND attempt = 0 AND requested_by IS NULL
                THEN claimable_at + start_within END AS late_at,
           (SELECT backoff FROM own)
           + CASE WHEN last_heartbeat_at > $4 THEN claimable_at
                  WHEN startup_marked_at <= $4 + $11::interval
                  THEN greatest(claimable_at, startup_marked_at + $11)
                  WHEN $10 THEN claimable_at END AS eligible_at
    FROM jobs
    WHERE claimable_at IS NOT NULL AND number <@ $5::int8multirange
), candidate AS MATERIALIZED (  -- the job to claim, and how its previous run ended, if it was held
    SELECT jobs.name, fence, server, started_at, lease_expires_at,
           jobs.holder IS NOT NULL AS held,
           jobs.holder IS NOT NULL AND NOT releasing AS lost,
           CASE WHEN releasing THEN 'released' ELSE 'lost' END AS outcome,
           CASE WHEN releasing THEN $15 ELSE $16 END AS result,
           jobs.holder IS NOT NULL AND NOT releasing AND lost_streak + 1 >= $6 AS quarantined,
           jobs.holder IS NULL
           OR (paused_at IS NULL AND (releasing OR lost_streak + 1 < $6)) AS claimable
    FROM eligible JOIN jobs USING (name)
    WHERE eligible.claimable_at <= (SELECT clock_timestamp())
      AND (late_at < (SELECT clock_timestamp())) IS NOT TRUE
      AND eligible_at <= (SELECT clock_timestamp())
      AND (eligible.holder IS NULL OR clock_timestamp() <= $12::timestamptz)
      AND jobs.claimable_at <= eligible.claimable_at
      AND (jobs.startup_marked_at > eligible.startup_marked_at) IS NOT TRUE
    ORDER BY eligible.claimable_at
    LIMIT 1
    FOR UPDATE OF jobs SKIP LOCKED
), taken AS (  -- claimed by this instance, or freed if lost too often or while paused
    UPDATE jobs SET
        holder = CASE WHEN claimable THEN $1::uuid END,
        server = CASE WHEN claimable THEN $2::text END,
        started_at = CASE WHEN claimable THEN clock_timestamp() END,
        lease_expires_at = CASE WHEN claimable THEN clock_timestamp() + $3::interval END,
        fence = jobs.fence + claimable::integer,
        attempt = attempt + held::integer,
        releasing = false,
        cancel_requested_by = CASE WHEN claimable THEN cancel_requested_by END,
        done = NULL, total = NULL, note = NULL, startup_marked_at = NULL,
        last_heartbeat_at = CASE WHEN claimable THEN clock_timestamp() ELSE last_heartbeat_at END,
        lost_streak = lost_streak + lost::integer,
        round = greatest($8, (SELECT coalesce(max(round), 0) FROM jobs)),
        ready_at = CASE WHEN quarantined THEN clock_timestamp() + least(
            $14::interval, $13::interval * power(2, least(lost_streak + 1 - $6, 30)))
            ELSE ready_at END,
        last_outcome = CASE WHEN held THEN candidate.outcome ELSE last_outcome END,
        last_server = CASE WHEN held THEN candidate.server ELSE last_server END,
        last_started_at = CASE WHEN held THEN candidate.started_at ELSE last_started_at END,
        last_ended_at = CASE WHEN held THEN candidate.lease_expires_at ELSE last_ended_at END,
        last_result = CASE WHEN held THEN candidate.result ELSE last_result END
    FROM candidate WHERE jobs.name = candidate.name
    RETURNING jobs.name, claimable, jobs.fence, due_at, attempt, checkpoint AS resumed,
              cancel_requested_by, requested_args,
              coalesce(schedule_override, schedule) AS schedule, anchor_at, jobs.started_at, round,
              releases, retries, failure_streak, CASE WHEN held THEN outcome END AS ended
), ended AS (  -- end the previous run in the history
    UPDATE job_runs SET outcome = candidate.outcome, ended_at = candidate.lease_expires_at,
                        result = candidate.result
    FROM candidate
    WHERE held AND job = candidate.name AND job_runs.fence = candidate.fence
      AND job_runs.outcome IS NULL
), begun AS (  -- and insert the new one
    INSERT INTO job_runs (job, fence, due_at, attempt, holder, server, started_at, args)
    SELECT name, fence, due_at, attempt, $1, $2, started_at, requested_args
    FROM taken WHERE claimable
), head AS (  -- the first few jobs by the time at which they are ready or their lease expires
    SELECT * FROM eligible ORDER BY claimable_at LIMIT 20
), next AS (  -- when the next could be eligible here, or, if unknown, when to try again
    SELECT min(coalesce(eligible_at, claimable_at)) AS at, bool_or(holder IS NOT NULL) AS busy,
           coalesce(array_agg(name) FILTER (WHERE late_at < clock_timestamp()), '{}') AS late
    FROM head
)
SELECT clock_timestamp() AS now,
       extract(epoch FROM next.at - clock_timestamp())::float8 AS wait_seconds, next.busy,
       next.late, taken.*
FROM next LEFT JOIN taken ON true
"""

# A run frees only its own lease: fence and holder must still match. The freed job is then ready for
# its next tick, or for the same tick later or at once. A run with a request to cancel it is not
# released: its tick would run again elsewhere, although the request was accepted.
FINISH: Final = """
WITH freed AS (  -- ready for its next tick, or for the same tick again
    UPDATE jobs SET
        holder = NULL, server = NULL, started_at = NULL, lease_expires_at = NULL,
        cancel_requested_by = NULL,
        releasing = false, done = NULL, total = NULL, note = NULL, startup_marked_at = NULL,
        due_at = coalesce($7, due_at),
        ready_at = coalesce($8, clock_timestamp()),
        attempt = CASE WHEN $7::timestamptz IS NULL THEN attempt + 1 ELSE 0 END,
        requested_by = CASE WHEN $7::timestamptz IS NULL THEN requested_by END,
        requested_args = CASE WHEN $7::timestamptz IS NULL THEN requested_args END,
        checkpoint = CASE WHEN $9 THEN checkpoint END,
        last_heartbeat_at = clock_timestamp(),
        lost_streak = 0, releases = $15, retries = $16,
        failure_streak = CASE WHEN $4 IN ('failed', 'timed_out') THEN failure_streak + 1
                         WHEN $4 = 'succeeded' THEN 0 ELSE failure_streak END,
        paused_at = CASE WHEN $17::text IS NULL THEN paused_at
                    ELSE coalesce(paused_at, clock_timestamp()) END,
        paused_by = CASE WHEN $17::text IS NULL THEN paused_by
                    ELSE coalesce(paused_by, 'balance_app') END,
        pause_reason = CASE WHEN paused_at IS NULL THEN coalesce($17::text, pause_reason)
                       ELSE pause_reason END,
        last_outcome = $4, last_server = server, last_started_at = started_at,
        last_ended_at = clock_timestamp() - $6::interval, last_result = $5
    WHERE name = $1 AND fence = $2 AND holder = $3
      AND (coalesce(schedule_override, schedule) <> $14) IS NOT TRUE
      AND ($4 <> 'released' OR cancel_requested_by IS NULL)
    RETURNING last_ended_at
), ended AS (  -- end the run in the history
    UPDATE job_runs SET outcome = $4, ended_at = freed.last_ended_at, result = $5
    FROM freed WHERE job = $1 AND fence = $2
), skipped AS (  -- and insert the skipped ticks, as ranges
    INSERT INTO job_runs (job, due_at, last_due_at, ticks, started_at, ended_at, outcome, result)
    SELECT $1, first, last, ticks, clock_timestamp(), clock_timestamp(), 'skipped', reason
    FROM freed, unnest($10::timestamptz[], $11::timestamptz[], $12::bigint[], $13::text[])
         AS range (first, last, ticks, reason)
)
SELECT freed.last_ended_at IS NOT NULL AS freed,
       coalesce(schedule_override, schedule) AS schedule, cancel_requested_by
FROM jobs LEFT JOIN freed ON true
WHERE name = $1 AND fence = $2 AND holder = $3
"""

# A tick that nobody started in time, by its job's `start_within`: not one that had a run, and not
# what somebody has requested.
LATE: Final = """
SELECT name, coalesce(schedule_override, schedule) AS schedule, anchor_at, due_at, fence,
       start_within, clock_timestamp() AS now
FROM jobs
WHERE name = ANY ($1) AND holder IS NULL AND paused_at IS NULL AND attempt = 0
  AND requested_by IS NULL AND ready_at + start_within < clock_timestamp()
"""

# Only the tick that was found late is skipped, and only once: whoever has skipped, claimed, paused
# or requested it meanwhile has changed the row.
#
# $1 name, $2, $3 and $10 the row as it was, $4 and $5 its next tick, $6 to $8 the ticks that were
# missed, $9 why
SKIP_LATE: Final = """
WITH moved AS (
    UPDATE jobs SET due_at = $4, ready_at = $5, startup_marked_at = NULL, checkpoint = NULL
    WHERE name = $1 AND due_at = $2 AND fence = $3 AND holder IS NULL AND paused_at IS NULL
      AND attempt = 0 AND requested_by IS NULL AND coalesce(schedule_override, schedule) = $10
    RETURNING name
), skipped AS (
    INSERT INTO job_runs (job, due_at, last_due_at, ticks, started_at, ended_at, outcome, result)
    SELECT name, $6, $7, $8, clock_timestamp(), clock_timestamp(), 'skipped', $9 FROM moved
)
SELECT name FROM moved
"""

# A heartbeat in the future was written before the clock was set back. Its lease would last longer
# by that step. A live holder renews it by the new time, so an instance ends such a lease only after
# it has seen it unrenewed for longer than the lease's length, by its own monotonic clock.
AHEAD: Final = """
SELECT name, fence, last_heartbeat_at, lease_expires_at - last_heartbeat_at AS length FROM jobs
WHERE holder IS NOT NULL AND last_heartbeat_at > clock_timestamp() + interval '1 s'
"""

EXPIRE: Final = """
UPDATE jobs SET lease_expires_at = least(lease_expires_at, clock_timestamp())
WHERE name = $1 AND fence = $2 AND last_heartbeat_at = $3 AND holder IS NOT NULL
RETURNING name
"""

# PostgreSQL may execute a claim after its instance has stopped waiting for the response. The
# instance is the row's holder, so it can release the run that it never started.
ABANDONED: Final = """
SELECT name, fence, releases, retries FROM jobs
WHERE holder = $1
  AND (name, fence) NOT IN (SELECT * FROM unnest($2::text[], $3::bigint[]) AS run (name, fence))
"""

# An instance that takes over an expired lease can't know whether the holder died or could not reach
# the database: it records a loss, and a live holder retracts it. The update of the history row
# ensures that a loss is retracted once. A quarantine that retracted losses had caused ends at once.
# Only the latest thousand losses are searched.
RETRACT: Final = """
WITH retracted AS (  -- of the latest losses in the history, those of this instance
    UPDATE job_runs SET outcome = 'released', result = $2
    WHERE outcome = 'lost' AND id IN (
        SELECT id FROM (
            SELECT id, holder FROM job_runs
            WHERE (outcome, id) < ('lost', 9223372036854775807) AND (outcome, id) > ('lost', 0)
            ORDER BY outcome DESC, id DESC LIMIT 1000
        ) AS latest
        WHERE holder = $1
    )
    RETURNING job, started_at
), counted AS (  -- the retracted losses of each job
    SELECT job, count(*)::integer AS losses, max(started_at) AS started_at
    FROM retracted GROUP BY job
), corrected AS (  -- subtract them from the jobs' losses in a row
    UPDATE jobs SET
        lost_streak = greatest(lost_streak - losses, 0),
        ready_at = CASE WHEN holder IS NULL AND lost_streak >= $3 AND lost_streak - losses < $3
                   THEN least(ready_at, clock_timestamp()) ELSE ready_at END,
        last_outcome = CASE WHEN last_outcome = 'lost' AND last_started_at = counted.started_at
                       THEN 'released' ELSE last_outcome END,
        last_result = CASE WHEN last_outcome = 'lost' AND last_started_at = counted.started_at
                      THEN $2 ELSE last_result END
    FROM counted WHERE name = job
    RETURNING name
)
SELECT array_agg(name) AS jobs FROM corrected HAVING count(*) > 0
"""

# The run may still execute, so its job is not freed. Its lease is shortened, never extended.
MARK_RELEASING: Final = """
UPDATE jobs SET releasing = true,
                lease_expires_at = least(lease_expires_at, clock_timestamp() + $4::interval)
WHERE name = $1 AND fence = $2 AND holder = $3
"""

# For display only: a request to cancel such a run gets the response that nothing is left to cancel.
# The time counts only if it is after the run's start, so a claim need not reset it.
END_WORK: Final = """
UPDATE jobs SET work_ended_at = clock_timestamp() WHERE name = $1 AND fence = $2 AND holder = $3
"""

# A run that has lost its lease writes no checkpoint.
CHECKPOINT: Final = """
UPDATE jobs SET checkpoint = $4
WHERE name = $1 AND fence = $2 AND holder = $3 AND lease_expires_at > clock_timestamp()
RETURNING true
"""
