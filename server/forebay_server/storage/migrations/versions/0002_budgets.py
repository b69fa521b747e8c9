"""Budgets of keys, and the cost of use."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("budget_tokens", sa.BigInteger))
        table.add_column(sa.Column("budget_money", sa.Float))
        table.add_column(sa.Column("budget_period", sa.String(8)))
    with op.batch_alter_table("usage") as table:
        table.add_column(sa.Column("cost", sa.Float, nullable=False, server_default="0"))


def downgrade() -> None:
    """Take them away."""
    with op.batch_alter_table("usage") as table:
        table.drop_column("cost")
    with op.batch_alter_table("api_keys") as table:
        for name in ("budget_tokens", "budget_money", "budget_period"):
            table.drop_column(name)
