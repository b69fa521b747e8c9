"""Collections, their points and snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0002_collections"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "collections",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("config", sa.String, nullable=False),
        sa.Column("next_label", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "collection_points",
        sa.Column("collection_id", sa.Integer, primary_key=True),
        sa.Column("label", sa.BigInteger, primary_key=True),
        sa.Column("point_id", sa.String(256), nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("vector", sa.LargeBinary),
        sa.UniqueConstraint("collection_id", "point_id", name="collection_point_id"),
    )
    op.create_table(
        "collection_snapshots",
        sa.Column("collection_id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("points", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("collection_snapshots", "collection_points", "collections"):
        op.drop_table(table)
