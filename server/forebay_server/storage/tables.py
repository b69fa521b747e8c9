"""The relational schema. Change it by a new migration in `migrations/versions/`, never in place."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData()

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    # SHA-256 of a 256-bit random secret: nothing to guess, so no slow hash is needed.
    Column("secret_hash", LargeBinary(32), nullable=False),
    Column("scopes", String(128), nullable=False),
    Column("models", String, nullable=False),
    Column("requests_per_second", Float),
    Column("burst", Integer),
    Column("tokens_per_minute", BigInteger),
    Column("max_concurrency", Integer),
    Column("budget_tokens", BigInteger),
    Column("budget_money", Float),
    Column("budget_period", String(8)),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

usage = Table(
    "usage",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("day", String(10), primary_key=True),
    # The caller's own user; empty where it named none.
    Column("user", String(256), primary_key=True, server_default=""),
    Column("calls", BigInteger, nullable=False),
    Column("items", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("cancelled", BigInteger, nullable=False),
    Column("engine_ms", Float, nullable=False),
    Column("cost", Float, nullable=False, server_default="0"),
    Index("usage_day", "day"),
)

#: Which journal segments are in `usage` already: a replay after a crash adds nothing twice.
usage_segments = Table("usage_segments", metadata, Column("segment", String(64), primary_key=True))

model_aliases = Table(
    "model_aliases",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("alias", String(64), primary_key=True),
    Column("version", BigInteger, nullable=False),
)

model_traffic = Table(
    "model_traffic",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("weight", Integer, nullable=False),
)

model_shadows = Table(
    "model_shadows",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("fraction", Float, nullable=False),
)

model_history = Table(
    "model_history",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model", String(128), nullable=False, index=True),
    Column("time", Float, nullable=False),
    Column("action", String(16), nullable=False),
    Column("from_version", BigInteger, nullable=False),
    Column("to_version", BigInteger, nullable=False),
    Column("key_id", String(32), nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("key_id", String(32), nullable=False),
    Column("method", String(128), nullable=False),
    Column("token", String(256), nullable=False),
    Column("request_hash", LargeBinary(32), nullable=False),
    Column("response", LargeBinary),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("key_id", "method", "token", name="idempotency_token"),
)

collections = Table(
    "collections",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("config", String, nullable=False),
    # Every write of a point takes the next label; none is ever given twice.
    Column("next_label", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)

collection_points = Table(
    "collection_points",
    metadata,
    Column("collection_id", Integer, primary_key=True),
    Column("label", BigInteger, primary_key=True),
    Column("point_id", String(256), nullable=False),
    Column("payload", LargeBinary, nullable=False),
    # Little-endian float32; null in collections without vectors.
    Column("vector", LargeBinary),
    UniqueConstraint("collection_id", "point_id", name="collection_point_id"),
)

# What writes of the last while removed, where servers share the database: others take it out of their
# indexes without a look at all labels.
collection_removals = Table(
    "collection_removals",
    metadata,
    Column("collection_id", Integer, primary_key=True),
    # The first label that the write was given.
    Column("label", BigInteger, primary_key=True),
    # The labels that it removed: little-endian int64.
    Column("removed", LargeBinary, nullable=False),
    # By the database's clock.
    Column("created_at", Float, nullable=False),
)

collection_snapshots = Table(
    "collection_snapshots",
    metadata,
    Column("collection_id", Integer, primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("points", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
)

knowledge_bases = Table(
    "knowledge_bases",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("config", String, nullable=False),
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)

knowledge_documents = Table(
    "knowledge_documents",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("base_id", Integer, nullable=False),
    Column("name", String, nullable=False),
    Column("media_type", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("metadata", String, nullable=False),
    # Whose usage its embedding is.
    Column("key_id", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Float, nullable=False),
    Column("reason", String(32), nullable=False),
    Column("message", String, nullable=False),
    # JSON list: where each page begins in the text; empty for formats without pages.
    Column("pages", String, nullable=False),
    Column("characters", BigInteger, nullable=False),
    Column("chunks", BigInteger, nullable=False),
    # Counts ingests: chunks of an older one are removed when a newer one is ready.
    Column("generation", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    # Where servers share the database: which one works on it, and until when its word holds.
    Column("owner", String(32)),
    Column("owned_until", Float),
    UniqueConstraint("base_id", "sha256", name="knowledge_document_content"),
    Index("knowledge_document_status", "status"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32), nullable=False),
    Column("name", String(256), nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index("files_key", "key_id", "created_at"),
    Index("files_expiry", "expires_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32), nullable=False),
    # `receiving` until all items are stored; then the contract's, in lower case.
    Column("status", String(16), nullable=False),
    Column("header", LargeBinary, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    # Tokens of its answers: prompt, completion, cached, reasoning.
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("in_progress_at", Float),
    Column("finalizing_at", Float),
    Column("cancelling_at", Float),
    Column("ended_at", Float),
    Column("expires_at", Float, nullable=False),
    # When results are removed; until the batch has ended, seconds from then on (null = as configured).
    Column("results_expire_at", Float),
    # Which server runs it, and until when it has said so.
    Column("owner", String(32)),
    Column("owned_until", Float),
    Index("batches_key", "key_id", "created_at"),
    Index("batches_status", "status"),
)

batch_items = Table(
    "batch_items",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("custom_id", String(512), nullable=False),
    # A BatchItem; emptied when the item has its result.
    Column("item", LargeBinary, nullable=False),
    # `waiting`, `completed` or `failed`.
    Column("status", String(16), nullable=False),
    # A BatchResult.
    Column("result", LargeBinary),
    Index("batch_items_status", "batch_id", "status", "number"),
)

responses = Table(
    "responses",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32), nullable=False),
    Column("previous_id", String(64)),
    Column("status", String(16), nullable=False),
    # The CreateResponseRequest, its input included.
    Column("request", LargeBinary, nullable=False),
    # The Response, without its request.
    Column("response", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    # Which server makes it in the background, and until when it has said so.
    Column("owner", String(32)),
    Column("owned_until", Float),
    Index("responses_expiry", "expires_at"),
    Index("responses_status", "status"),
)
