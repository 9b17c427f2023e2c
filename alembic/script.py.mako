"""${message}."""

from alembic import op

revision = "${up_revision}"
down_revision = "${down_revision}"


def upgrade() -> None:
    """${message}; the release before works on."""
    op.execute("ALTER TABLE ...")


def downgrade() -> None:
    """Take it back."""
    op.execute("ALTER TABLE ...")
