"""What writes removed from collections, for the other servers of a PostgreSQL."""

import sqlalchemy as sa
from alembic import op

revision = "0007_collection_removals"
down_revision = "0006_document_claims"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "collection_removals",
        sa.Column("collection_id", sa.Integer, primary_key=True),
        sa.Column("label", sa.BigInteger, primary_key=True),
        sa.Column("removed", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("collection_removals")
