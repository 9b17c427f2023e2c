"""${message}."""

from alembic import op

revision = "${up_revision}"
down_revision = "${down_revision}"


def upgrade() -> None:
    """${message}; the release before goes on working."""
    op.execute("ALTER TABLE ...")


def downgrade() -> None:
    """Undo it."""
    op.execute("ALTER TABLE ...")
