"""The oldest revision whose program works on the schema, and the id of the installation."""

from alembic import op

revision = "0005"
down_revision = "0004"

# A database that is created anew under running instances is another installation: what they have
# in memory is of the one before.
INSTALLATION = """
ALTER TABLE balance_app_version ADD COLUMN installation uuid NOT NULL DEFAULT gen_random_uuid()
"""

# A program older than the schema goes on working if it is at least this revision's. A migration
# that an older program can't work with raises it.
COMPATIBLE_FROM = """
ALTER TABLE balance_app_version ADD COLUMN compatible_from varchar(32) NOT NULL DEFAULT '0003'
"""

# The release before reads its revision here; it has no setting for another schema.
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
    """Add the columns, and the table that the release before reads."""
    op.execute(COMPATIBLE_FROM)
    op.execute(INSTALLATION)
    op.execute(FOR_THE_RELEASE_BEFORE)


def downgrade() -> None:
    """Drop the columns; the table that the release before reads stays."""
    op.execute(
        "ALTER TABLE balance_app_version DROP COLUMN compatible_from, DROP COLUMN installation"
    )
