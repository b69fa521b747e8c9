"""A document in work says which server works on it, and until when its word holds."""

import sqlalchemy as sa
from alembic import op

revision = "0006_document_claims"
down_revision = "0005_versions"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("knowledge_documents", sa.Column("owner", sa.String(32)))
    op.add_column("knowledge_documents", sa.Column("owned_until", sa.Float))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("knowledge_documents") as table:
        table.drop_column("owned_until")
        table.drop_column("owner")
