"""The tables, declared for alembic, which compares them with the migrations."""

from sqlalchemy import (
    ARRAY,
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
)
from sqlalchemy.dialects.postgresql import JSONB

from balance_app.db.metadata import metadata

access_state = Table(
    "access_state",
    metadata,
    Column("one", Boolean, primary_key=True, server_default="true"),
    # whether requests need a key
    Column("keys_required", Boolean, nullable=False, server_default="false"),
    # rises with each change of a key or session
    Column("generation", BigInteger, nullable=False, server_default="1"),
    CheckConstraint("one", name="one"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("name", Text, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column(
        "created_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column("created_by", Text),
    Column("expires_at", DateTime(timezone=True)),
    Column("revoked_at", DateTime(timezone=True)),
    Column("last_used_on", Date),
    UniqueConstraint("name"),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
    CheckConstraint(
        "scopes <@ ARRAY['read', 'withdraw', 'change', 'open', 'operate', 'metrics']"
        " AND scopes <> '{}'",
        name="scopes",
    ),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("key_id", ForeignKey("api_keys.id"), nullable=False),
    Column(
        "created_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
    ),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("revoked_at", DateTime(timezone=True)),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
)

actions = Table(
    "actions",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("by", Text),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("before", JSONB),
    Column("after", JSONB),
    PrimaryKeyConstraint("id"),
    Index("actions_by_id_idx", "by", "id"),
    Index("actions_subject_id_idx", "subject", "id"),
)
