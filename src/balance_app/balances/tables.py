"""The tables, declared for alembic, which compares them with the migrations."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    PrimaryKeyConstraint,
    Table,
    Text,
    func,
    text,
)

from balance_app.db.migrations import metadata
from balance_app.http.body import MAX_INTEGER

users = Table(
    "users",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("balance", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column(
        "created_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    CheckConstraint(f"balance BETWEEN 0 AND {MAX_INTEGER}", name="balance"),
    CheckConstraint("version >= 1", name="version"),
    postgresql_with={"fillfactor": 70},
)

entries = Table(
    "entries",
    metadata,
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("key", Text),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    PrimaryKeyConstraint("user_id", "version"),
    CheckConstraint("balance >= 0", name="balance"),
    CheckConstraint("amount <> 0 OR version = 1", name="amount"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", Text, primary_key=True),
    Column("outcome", Text, nullable=False),
    Column("user_id", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    CheckConstraint("outcome IN ('opened', 'accepted', 'refused')", name="outcome"),
    Index("idempotency_keys_refused_at_idx", "at", postgresql_where=text("outcome = 'refused'")),
)

# Written by a job of `maintenance`.
daily_balances = Table(
    "daily_balances",
    metadata,
    Column("user_id", BigInteger, nullable=False),
    Column("day", Date, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("user_id", "day"),
)
