"""Versions of models have 64 bits, as in the contract: `20260131120000` is one."""

import sqlalchemy as sa
from alembic import op

revision = "0005_versions"
down_revision = "0004_doors"

COLUMNS = (
    ("usage", "version"),
    ("model_aliases", "version"),
    ("model_traffic", "version"),
    ("model_shadows", "version"),
    ("model_history", "from_version"),
    ("model_history", "to_version"),
)


def _retype(type_: type[sa.Integer]) -> None:
    if op.get_bind().dialect.name == "sqlite":  # whose integers have 64 bits by any name
        return
    for table, column in COLUMNS:
        op.alter_column(table, column, type_=type_)


def upgrade() -> None:
    """Widen the columns."""
    _retype(sa.BigInteger)


def downgrade() -> None:
    """Narrow them again, where no version is too large."""
    _retype(sa.Integer)
