"""The Redis or Valkey server that replicas share, for limits and for the cache."""

from __future__ import annotations

from typing import Any

from forebay.settings import SettingsError


def connect(url: str, timeout_s: float) -> Any:
    """A client, which connects at its first use.

    Raises:
        SettingsError: the URL, of which nothing is shown, is none of Redis, or its client is missing.
    """
    try:
        import redis
    except ModuleNotFoundError:
        raise SettingsError(
            "storage.redis needs the package redis, which is not installed (extra `redis`)"
        ) from None
    try:
        return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    except ValueError:
        raise SettingsError(
            "storage.redis is no URL of a Redis server; allowed are redis://, rediss:// and unix://"
        ) from None
