"""The tables that only the jobs write, declared for alembic like those of the features."""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    func,
    text,
)

from balance_app.db.metadata import metadata

daily_totals = Table(
    "daily_totals",
    metadata,
    Column("day", Date, primary_key=True),
    Column("opened", BigInteger, nullable=False),
    Column("opening", Numeric, nullable=False),
    Column("changes", BigInteger, nullable=False),
    Column("deposited", Numeric, nullable=False),
    Column("withdrawn", Numeric, nullable=False),
    Column("active_users", BigInteger, nullable=False),
    Column("transfers", BigInteger, nullable=False, server_default="0"),
    Column("transferred", Numeric, nullable=False, server_default="0"),
)

counted_users = Table(
    "counted_users",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("day", Date),
)

table_sizes = Table(
    "table_sizes",
    metadata,
    Column("at", DateTime(timezone=True), nullable=False),
    Column("name", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("estimated_rows", BigInteger),
    PrimaryKeyConstraint("at", "name"),
)

seals = Table(
    "seals",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("heads", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
)

seal_parts = Table(
    "seal_parts",
    metadata,
    Column("seal", BigInteger, nullable=False),
    Column("part", BigInteger, nullable=False),
    Column("user_ids", ARRAY(BigInteger), nullable=False),
    Column("versions", ARRAY(BigInteger), nullable=False),
    Column("digest", LargeBinary, nullable=False),
    PrimaryKeyConstraint("seal", "part"),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
)

_NOW = func.clock_timestamp()

alerts = Table(
    "alerts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("event", Uuid, nullable=False, server_default=func.gen_random_uuid()),
    Column("code", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("sentence", Text, nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    Column("ended_at", DateTime(timezone=True)),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("refusals", Integer, nullable=False, server_default="0"),
    Column("next_try_at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    Column("done_at", DateTime(timezone=True)),
    Column("error", Text),
    CheckConstraint("status IN ('raised', 'recovered')", name="status"),
    CheckConstraint("status = 'raised' OR ended_at IS NULL", name="end"),
    Index(
        "alerts_open_key",
        "code",
        "subject",
        unique=True,
        postgresql_where=text("status = 'raised' AND ended_at IS NULL"),
    ),
    Index("alerts_waiting_idx", "id", postgresql_where=text("done_at IS NULL")),
)

pings = Table(
    "pings",
    metadata,
    Column("target", Text, primary_key=True),
    Column("fence", BigInteger, nullable=False),
    Column("phase", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    CheckConstraint("phase IN ('start', 'success', 'fail')", name="phase"),
)
