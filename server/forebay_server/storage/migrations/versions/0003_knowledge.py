"""Knowledge bases and their documents."""

import sqlalchemy as sa
from alembic import op

revision = "0003_knowledge"
down_revision = "0002_collections"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "knowledge_bases",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("config", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "knowledge_documents",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("base_id", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("media_type", sa.String(128), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("metadata", sa.String, nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("message", sa.String, nullable=False),
        sa.Column("pages", sa.String, nullable=False),
        sa.Column("characters", sa.BigInteger, nullable=False),
        sa.Column("chunks", sa.BigInteger, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.UniqueConstraint("base_id", "sha256", name="knowledge_document_content"),
    )
    op.create_index("knowledge_document_status", "knowledge_documents", ["status"])


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("knowledge_documents")
    op.drop_table("knowledge_bases")
