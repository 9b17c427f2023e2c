"""Tables that the jobs fill: daily balances, daily totals, sizes of tables."""

from alembic import op

revision = "0003"
down_revision = "0002"

# Without a foreign key to users, which would lock their rows: users are never deleted.
DAILY_BALANCES = """
CREATE TABLE daily_balances (
    user_id bigint NOT NULL,
    day date NOT NULL, -- in UTC; on a day without a row the balance did not change
    version bigint NOT NULL,
    balance bigint NOT NULL,
    at timestamptz NOT NULL, -- the last read on this day that found a change
    CONSTRAINT daily_balances_pkey PRIMARY KEY (user_id, day)
)
"""

# Sums of balances may be larger than any balance: numeric has no limit.
DAILY_TOTALS = """
CREATE TABLE daily_totals (
    day date NOT NULL, -- in UTC
    opened bigint NOT NULL,
    opening numeric NOT NULL,
    changes bigint NOT NULL,
    deposited numeric NOT NULL,
    withdrawn numeric NOT NULL,
    active_users bigint NOT NULL, -- users that had a change or were created
    CONSTRAINT daily_totals_pkey PRIMARY KEY (day)
)
"""

# Entries are counted by version, not by time, so that one that is committed late is not missed.
COUNTED_USERS = """
CREATE TABLE counted_users (
    user_id bigint NOT NULL,
    version bigint NOT NULL, -- the entries up to this one are in daily_totals
    day date,                -- of the last of them
    CONSTRAINT counted_users_pkey PRIMARY KEY (user_id)
)
"""

TABLE_SIZES = """
CREATE TABLE table_sizes (
    at timestamptz NOT NULL,
    name text NOT NULL,
    bytes bigint NOT NULL,
    estimated_rows bigint, -- none before the first ANALYZE
    CONSTRAINT table_sizes_pkey PRIMARY KEY (at, name)
)
"""


def upgrade() -> None:
    """Create the tables; the jobs fill them."""
    for statement in (DAILY_BALANCES, DAILY_TOTALS, COUNTED_USERS, TABLE_SIZES):
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP TABLE table_sizes, counted_users, daily_totals, daily_balances")
