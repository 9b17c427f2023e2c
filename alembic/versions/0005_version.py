"""From which revision on programs work on a schema, and which installation it is."""

from alembic import op

revision = "0005"
down_revision = "0004"

# A database that is made anew under running instances is another installation: what they know of
# the one before is void.
INSTALLATION = """
ALTER TABLE balance_app_version ADD COLUMN installation uuid NOT NULL DEFAULT gen_random_uuid()
"""

# A program older than the schema goes on when it is at least this revision's. Who adds a migration
# that an older program can't work with raises it there.
COMPATIBLE_FROM = """
ALTER TABLE balance_app_version ADD COLUMN compatible_from varchar(32) NOT NULL DEFAULT '0003'
"""

# The release before looks for its revision here; of a schema of its own it knows nothing.
FOR_THE_RELEASE_BEFORE = """
DO $$
BEGIN
    IF current_schema() = 'public' THEN
        CREATE TABLE IF NOT EXISTS alembic_version (
            version_num varchar(32) NOT NULL,
            CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
        );
        DELETE FROM alembic_version;
        INSERT INTO alembic_version VALUES ('0003');
    END IF;
END
$$
"""


def upgrade() -> None:
    """Say it, and leave the release before what it looks for."""
    op.execute(COMPATIBLE_FROM)
    op.execute(INSTALLATION)
    op.execute(FOR_THE_RELEASE_BEFORE)


def downgrade() -> None:
    """Take it back; the release before finds what it looks for."""
    op.execute(
        "ALTER TABLE balance_app_version DROP COLUMN compatible_from, DROP COLUMN installation"
    )
