"""The tables, declared for alembic, which compares them with the migrations."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    Interval,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from balance_app.db.metadata import metadata

_ZERO = text("0")

jobs = Table(
    "jobs",
    metadata,
    Column("name", Text, primary_key=True),
    Column("number", BigInteger, Identity(always=True), nullable=False),
    Column("schedule", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("other_schedules", ARRAY(Text), nullable=False, server_default="{}"),
    Column(
        "anchor_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column("due_at", DateTime(timezone=True), nullable=False),
    Column("ready_at", DateTime(timezone=True), nullable=False),
    Column("attempt", Integer, nullable=False, server_default=_ZERO),
    Column("requested_by", Text),
    Column("startup_marked_at", DateTime(timezone=True)),
    Column("paused_at", DateTime(timezone=True)),
    Column("paused_by", Text),
    Column("pause_reason", Text),
    Column("fence", BigInteger, nullable=False, server_default=_ZERO),
    Column("holder", Uuid),
    Column("server", Text),
    Column("started_at", DateTime(timezone=True)),
    Column("lease_expires_at", DateTime(timezone=True)),
    Column("cancel_requested_by", Text),
    Column("releasing", Boolean, nullable=False, server_default=false()),
    Column("done", BigInteger),
    Column("total", BigInteger),
    Column("note", Text),
    Column("checkpoint", JSONB),
    Column("last_heartbeat_at", DateTime(timezone=True)),
    Column("lost_streak", Integer, nullable=False, server_default=_ZERO),
    Column("releases", Integer, nullable=False, server_default=_ZERO),
    Column("retries", Integer, nullable=False, server_default=_ZERO),
    Column("failure_streak", Integer, nullable=False, server_default=_ZERO),
    Column("round", BigInteger, nullable=False, server_default=_ZERO),
    Column("last_outcome", Text),
    Column("last_server", Text),
    Column("last_started_at", DateTime(timezone=True)),
    Column("last_ended_at", DateTime(timezone=True)),
    Column("last_result", Text),
    Column("forgotten_at", DateTime(timezone=True)),
    Column("forgotten_by", Text),
    Column("work_ended_at", DateTime(timezone=True)),
    Column("stop_requested_at", DateTime(timezone=True)),
    Column("args", JSONB, nullable=False, server_default="{}"),
    Column("start_within", Interval),
    Column("requested_args", JSONB),
    Column("schedule_override", Text),
    Column("overridden_by", Text),
    Column("overridden_at", DateTime(timezone=True)),
    Column(
        "claimable_at",
        DateTime(timezone=True),
        Computed(
            "CASE WHEN holder IS NOT NULL THEN lease_expires_at"
            " WHEN paused_at IS NULL THEN ready_at END",
            persisted=True,
        ),
    ),
    UniqueConstraint("number"),
    CheckConstraint(
        "(holder IS NULL) = (lease_expires_at IS NULL)"
        " AND (holder IS NULL) = (started_at IS NULL)"
        " AND (holder IS NULL) = (server IS NULL)"
        " AND (holder IS NOT NULL OR (cancel_requested_by IS NULL AND NOT releasing))",
        name="run",
    ),
    CheckConstraint("(paused_at IS NULL) = (paused_by IS NULL)", name="pause"),
    CheckConstraint("(forgotten_at IS NULL) = (forgotten_by IS NULL)", name="forgotten"),
    CheckConstraint(
        "(schedule_override IS NULL) = (overridden_by IS NULL)"
        " AND (schedule_override IS NULL) = (overridden_at IS NULL)",
        name="override",
    ),
    Index(None, "claimable_at"),
    Index(None, "round"),
    postgresql_with={"fillfactor": 70},
)

job_runs = Table(
    "job_runs",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("job", ForeignKey("jobs.name"), nullable=False),
    Column("fence", BigInteger),
    Column("due_at", DateTime(timezone=True), nullable=False),
    Column("last_due_at", DateTime(timezone=True)),
    Column("ticks", BigInteger, nullable=False, server_default=text("1")),
    Column("attempt", Integer, nullable=False, server_default=_ZERO),
    Column("holder", Uuid),
    Column("server", Text),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),
    Column("outcome", Text),
    Column("result", Text),
    Column("args", JSONB),
    UniqueConstraint("job", "fence", name="job_runs_job_fence_key"),
    CheckConstraint(
        "outcome IN ('succeeded', 'failed', 'timed_out', 'cancelled', 'released', 'lost',"
        " 'skipped')",
        name="outcome",
    ),
    CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="end"),
    CheckConstraint(
        "(fence IS NULL) = (outcome IS NOT DISTINCT FROM 'skipped')"
        " AND (fence IS NULL) = (last_due_at IS NOT NULL) AND ticks >= 1",
        name="skipped",
    ),
    Index("job_runs_job_id_idx", "job", "id"),
    Index("job_runs_outcome_id_idx", "outcome", "id"),
    Index("job_runs_job_outcome_id_idx", "job", "outcome", "id"),
)

job_run_lines = Table(
    "job_run_lines",
    metadata,
    Column("job", Text, primary_key=True),
    Column("fence", BigInteger, primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("logged_at", DateTime(timezone=True), nullable=False),
    Column("level", Text, nullable=False),
    Column("text", Text, nullable=False),
    ForeignKeyConstraint(
        ["job", "fence"],
        ["job_runs.job", "job_runs.fence"],
        ondelete="CASCADE",
        name="job_run_lines_job_fence_fkey",
    ),
)

job_run_tracebacks = Table(
    "job_run_tracebacks",
    metadata,
    Column("job", Text, primary_key=True),
    Column("fence", BigInteger, primary_key=True),
    Column("text", Text, nullable=False),
    ForeignKeyConstraint(
        ["job", "fence"],
        ["job_runs.job", "job_runs.fence"],
        ondelete="CASCADE",
        name="job_run_tracebacks_job_fence_fkey",
    ),
)

job_declarations = Table(
    "job_declarations",
    metadata,
    Column("job", ForeignKey("jobs.name", ondelete="CASCADE"), primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("schedule", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column(
        "first_declared_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column(
        "last_declared_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column("args", JSONB, nullable=False, server_default="{}"),
    Column("start_within", Interval),
)

instances = Table(
    "instances",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("server", Text, nullable=False),
    Column(
        "started_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column(
        "last_heartbeat_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column("highest_number", BigInteger, nullable=False),
    Column("missing", ARRAY(Text), nullable=False),
    Column("max_running", Integer),
    Column("accepted", BigInteger, nullable=False, server_default=_ZERO),
    Column("refused", BigInteger, nullable=False, server_default=_ZERO),
    Column("silences", ARRAY(DateTime(timezone=True)), nullable=False, server_default="{}"),
)
