"""The tables that only the jobs write, declared for alembic like those of the features."""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    LargeBinary,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from balance_app.db.migrations import metadata

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
