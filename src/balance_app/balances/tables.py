"""The tables, declared for alembic, which compares them with the migrations."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)

from balance_app.db.metadata import metadata
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
    Column("held", BigInteger, nullable=False, server_default="0"),
    Column("floor", BigInteger, nullable=False, server_default="0"),
    Column("frozen", Boolean, nullable=False, server_default="false"),
    Column("settings_version", BigInteger, nullable=False, server_default="1"),
    # how often a hold was placed or ended
    Column("hold_events", BigInteger, nullable=False, server_default="0"),
    # no open hold expires before it
    Column("holds_due_at", DateTime(timezone=True), nullable=False, server_default="infinity"),
    # the time of the last entry, hold or change of settings: each later one comes after it
    Column("changed_at", DateTime(timezone=True), nullable=False, server_default="-infinity"),
    # of the last entry
    Column("hash", LargeBinary),
    CheckConstraint(
        f"held >= 0 AND balance - held >= floor AND balance <= {MAX_INTEGER} AND version >= 1",
        name="balance",
    ),
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
    # what was held of the balance
    Column("held", BigInteger, nullable=False, server_default="0"),
    # the other half of a transfer
    Column("other_user_id", BigInteger),
    Column("other_version", BigInteger),
    # the entry that it undoes, the hold that it captures
    Column("reverses", BigInteger),
    Column("hold", BigInteger),
    Column("reference", Text),
    Column("note", Text),
    Column("by", Text),
    # covers the entry and the hash of the one before
    Column("hash", LargeBinary),
    PrimaryKeyConstraint("user_id", "version"),
    CheckConstraint(
        "(amount <> 0 OR version = 1) AND (other_user_id IS NULL) = (other_version IS NULL)",
        name="amount",
    ),
    Index(
        "entries_reverses_key",
        "user_id",
        "reverses",
        unique=True,
        postgresql_where=text("reverses IS NOT NULL"),
    ),
    Index(
        "entries_reference_idx",
        "user_id",
        "reference",
        "version",
        postgresql_where=text("reference IS NOT NULL"),
    ),
)

holds = Table(
    "holds",
    metadata,
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("key", Text),
    Column("reference", Text),
    Column("note", Text),
    Column("state", Text, nullable=False, server_default="open"),
    # the account just after it ended
    Column("ended_at", DateTime(timezone=True)),
    Column("captured", BigInteger),
    Column("balance", BigInteger),
    Column("held", BigInteger),
    Column("version", BigInteger),
    # who placed it, and who ended it; nobody, if it expired
    Column("by", Text),
    Column("ended_by", Text),
    PrimaryKeyConstraint("user_id", "number"),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint("state IN ('open', 'captured', 'voided', 'expired')", name="state"),
    CheckConstraint(
        "(state = 'open') = (ended_at IS NULL)"
        " AND (state = 'captured') = (captured IS NOT NULL)"
        " AND captured BETWEEN 1 AND amount",
        name="ended",
    ),
    Index("holds_open_idx", "user_id", "expires_at", postgresql_where=text("state = 'open'")),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("user_id", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    # what the request asks for beside the amount, as JSON; NULL: nothing
    Column("request", Text),
    # the state of the answer, with `balance` and `version`, and whose it is if not the user's
    Column("held", BigInteger, nullable=False, server_default="0"),
    Column("floor", BigInteger, nullable=False, server_default="0"),
    Column("frozen", Boolean, nullable=False, server_default="false"),
    Column("refused_by", BigInteger),
    Column("hold", BigInteger),
    Column("by", Text),
    PrimaryKeyConstraint("user_id", "key"),
    CheckConstraint("outcome IN ('accepted', 'refused')", name="outcome"),
    Index("idempotency_keys_refused_at_idx", "at", postgresql_where=text("outcome = 'refused'")),
)

# The keys of requests that create users: they have no account to belong to yet.
opening_keys = Table(
    "opening_keys",
    metadata,
    Column("key", Text, primary_key=True),
    Column("user_id", BigInteger, nullable=False),
    Column("request", Text, nullable=False),
    Column("by", Text),
)

# A directory of users, apart from the money.
external_ids = Table(
    "external_ids",
    metadata,
    Column("external_id", Text, primary_key=True),
    Column("user_id", BigInteger, nullable=False),
    UniqueConstraint("user_id"),
)

user_settings = Table(
    "user_settings",
    metadata,
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("settings_version", BigInteger, nullable=False),
    Column("floor", BigInteger, nullable=False),
    Column("frozen", Boolean, nullable=False),
    Column("external_id", Text),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("by", Text),
    PrimaryKeyConstraint("user_id", "settings_version"),
    CheckConstraint(f"floor BETWEEN -{MAX_INTEGER} AND {MAX_INTEGER}", name="floor"),
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
    # whether a seal covers this version
    Column("sealed", Boolean, nullable=False, server_default="false"),
    PrimaryKeyConstraint("user_id", "day"),
)
