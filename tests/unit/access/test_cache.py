"""The response cache: bounded, never across versions, and never in the way."""

from __future__ import annotations

from forebay_server.access.cache import ENTRY_BYTES, REST_S, ProcessCache, RedisCache
from hypothesis import given
from hypothesis import strategies as st

from .conftest import Clock, RedisServer


def test_answers_never_cross_models_or_versions() -> None:
    cache = ProcessCache(1 << 20)
    cache.put_many("m", 1, {b"k": b"one"})
    assert cache.get_many("m", 1, [b"k", b"x"]) == [b"one", None]
    assert cache.get_many("m", 2, [b"k"]) == [None]
    assert cache.get_many("m1", 1, [b"k"]) == [None]


def test_the_least_recently_used_goes_first() -> None:
    cache = ProcessCache(3 * (ENTRY_BYTES + 1))
    cache.put_many("m", 1, {b"a": b"1", b"b": b"2", b"c": b"3"})
    cache.get_many("m", 1, [b"a"])
    cache.put_many("m", 1, {b"d": b"4"})
    assert cache.get_many("m", 1, [b"a", b"b", b"c", b"d"]) == [b"1", None, b"3", b"4"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 900)), max_size=60))
def test_it_never_exceeds_its_bytes_and_forgets_only_for_room(puts: list[tuple[int, int]]) -> None:
    most = 2000
    cache, kept = ProcessCache(most), {}
    for key, size in puts:
        cache.put_many("m", 1, {b"%d" % key: bytes(size)})
        kept[key] = size
        assert cache.size_bytes <= most
    found = {k: v for k in kept if (v := cache.get_many("m", 1, [b"%d" % k])[0]) is not None}
    assert all(len(v) == kept[k] for k, v in found.items())
    assert cache.size_bytes == sum(len(v) + ENTRY_BYTES for v in found.values())
    if sum(s + ENTRY_BYTES for s in kept.values()) <= most and len(kept) == len(puts):
        assert set(found) == set(kept)


def test_hits_and_misses_are_told() -> None:
    told: list[tuple[str, int, int]] = []
    cache = ProcessCache(1 << 20, lambda m, h, x: told.append((m, h, x)))
    cache.put_many("m", 1, {b"a": b"1"})
    cache.get_many("m", 1, [b"a", b"b", b"c"])
    assert told == [("m", 1, 2)]


def test_a_cache_without_bytes_keeps_nothing() -> None:
    cache = ProcessCache(0)
    assert not cache.enabled
    cache.put_many("m", 1, {b"a": b"1"})
    assert cache.get_many("m", 1, [b"a"]) == [None]


def test_servers_share_values_in_redis(redis_server: RedisServer) -> None:
    one, two = RedisCache(redis_server.url, 60), RedisCache(redis_server.url, 60)
    one.put_many("m", 1, {b"\x00\xff": b"value", b"b": b""})
    one.flush()
    assert two.get_many("m", 1, [b"\x00\xff", b"x", b"b"]) == [b"value", None, b""]
    assert two.get_many("m", 2, [b"b"]) == [None]
    assert two.get_many("m", 1, []) == []
    assert 0 < two._redis.ttl(b"forebay:cache:m:1:b") <= 60
    one.close()
    two.close()


def test_redis_away_is_a_miss_and_a_metric(redis_server: RedisServer) -> None:
    clock, bypassed = Clock(), []
    cache = RedisCache(redis_server.url, 60, clock=clock, bypassed=lambda: bypassed.append(1))
    cache.put_many("m", 1, {b"a": b"1"})
    cache.flush()
    redis_server.stop()
    assert cache.get_many("m", 1, [b"a"]) == [None]
    assert not cache.enabled
    cache.put_many("m", 1, {b"a": b"1"})
    cache.flush()
    assert len(bypassed) == 2
    clock.now += REST_S
    assert cache.enabled
    cache.close()
