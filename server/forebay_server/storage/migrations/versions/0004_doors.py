"""Files, batches, responses; usage by the caller's own user."""

import sqlalchemy as sa
from alembic import op

revision = "0004_doors"
down_revision = "0003_knowledge"

KEY = ("key_id", "model", "version", "day")
NUMBERS = ("calls", "items", "tokens", "cached", "errors", "cancelled")


def _usage(name: str, user: bool) -> None:
    columns = [
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
    ]
    if user:
        columns.append(sa.Column("user", sa.String(256), primary_key=True, server_default=""))
    columns += [sa.Column(n, sa.BigInteger, nullable=False) for n in NUMBERS]
    op.create_table(
        name,
        *columns,
        sa.Column("engine_ms", sa.Float, nullable=False),
        sa.Column("cost", sa.Float, nullable=False, server_default="0"),
    )


def _replace_usage(user: bool) -> None:
    """A primary key is changed by a new table: SQLite knows no other way."""
    _usage("usage_new", user)
    names = (*KEY, *NUMBERS, "engine_ms", "cost")
    old = sa.table("usage", *(sa.column(n) for n in names))
    new = sa.table("usage_new", *(sa.column(n) for n in names))
    keys = [old.c[c] for c in KEY]
    sums = [sa.func.sum(old.c[c]) for c in (*NUMBERS, "engine_ms", "cost")]
    rows = sa.select(*keys, *sums).group_by(*keys)
    op.execute(sa.insert(new).from_select(list(names), rows))
    op.drop_index("usage_day", "usage")
    op.drop_table("usage")
    op.rename_table("usage_new", "usage")
    op.create_index("usage_day", "usage", ["day"])


def upgrade() -> None:
    """Make the tables."""
    _replace_usage(user=True)
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("purpose", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
    )
    op.create_index("files_key", "files", ["key_id", "created_at"])
    op.create_index("files_expiry", "files", ["expires_at"])
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("header", sa.LargeBinary, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("in_progress_at", sa.Float),
        sa.Column("finalizing_at", sa.Float),
        sa.Column("cancelling_at", sa.Float),
        sa.Column("ended_at", sa.Float),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("results_expire_at", sa.Float),
        sa.Column("owner", sa.String(32)),
        sa.Column("owned_until", sa.Float),
    )
    op.create_index("batches_key", "batches", ["key_id", "created_at"])
    op.create_index("batches_status", "batches", ["status"])
    op.create_table(
        "batch_items",
        sa.Column("batch_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True),
        sa.Column("custom_id", sa.String(512), nullable=False),
        sa.Column("item", sa.LargeBinary, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("result", sa.LargeBinary),
    )
    op.create_index("batch_items_status", "batch_items", ["batch_id", "status", "number"])
    op.create_table(
        "responses",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("previous_id", sa.String(64)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("request", sa.LargeBinary, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("owner", sa.String(32)),
        sa.Column("owned_until", sa.Float),
    )
    op.create_index("responses_expiry", "responses", ["expires_at"])
    op.create_index("responses_status", "responses", ["status"])


def downgrade() -> None:
    """Drop the tables; users' rows are added up."""
    for table in ("responses", "batch_items", "batches", "files"):
        op.drop_table(table)
    _replace_usage(user=False)
