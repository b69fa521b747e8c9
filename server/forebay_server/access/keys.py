"""API keys: made, revoked and limited in the database, checked against a copy in memory.

A key is `fbk_<id>_<secret>`. The secret has 256 random bits and is stored as its SHA-256: a slow
hash protects guessable passwords, and there is nothing to guess here. Checking a call is a
dictionary look-up; the copy is renewed after every change here, and every few seconds for changes
that other processes made.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import sqlalchemy as sa
from forebay.errors import NotFound, PermissionDenied, Unauthenticated

from forebay_server.core.call import ANONYMOUS, Principal
from forebay_server.storage.database import Database
from forebay_server.storage.tables import api_keys

log = logging.getLogger("forebay.access")

SCOPES = ("infer", "read", "admin")
#: Seconds until a reload is given up that the database does not answer: a connection that hangs must
#: not keep revoked keys in force.
RELOAD_S = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """A key's limits; None = no limit."""

    requests_per_second: float | None = None
    burst: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    budget_tokens: int | None = None
    budget_money: float | None = None
    budget_period: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. Times are seconds since the epoch."""

    id: str
    name: str
    secret_hash: bytes
    scopes: tuple[str, ...]
    models: tuple[str, ...]
    limits: Limits
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def active(self, now: float) -> bool:
        """Whether it may be used."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyStore:
    """See the module.

    Args:
        required: whether calls need a key. Without, a call that brings none is anonymous and may
            do all; one that brings a wrong key is refused all the same.
        clock: seconds since the epoch.
    """

    def __init__(
        self, database: Database, required: bool, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self.required = required
        self._clock = clock
        # Replaced as a whole, so that other threads see keys and principals of one moment.
        self._keys: dict[str, tuple[ApiKey, Principal]] = {}
        # One reload at a time: an older look at the table must not end up over a newer one, which
        # would bring a key back that was just revoked.
        self._reloading = asyncio.Lock()
        #: Is called, on the loop, as soon as a change of a key is in force.
        self.on_change: Callable[[], None] = lambda: None

    async def reload(self) -> None:
        """Read all keys anew."""
        async with self._reloading:
            async with self._database.read() as db:
                keys = [_from_row(r) for r in await db.execute(sa.select(api_keys))]
            before = self._keys
            self._keys = {
                k.id: (k, Principal(k.id, frozenset(k.scopes), frozenset(k.models))) for k in keys
            }
            if self._keys != before:
                self.on_change()

    async def keep_fresh(self, every_s: float) -> None:
        """Reload for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                async with asyncio.timeout(RELOAD_S):
                    await self.reload()
            except Exception:
                log.exception("reloading the keys failed; the old ones stay in force")

    def authenticate(self, authorization: str) -> Principal | None:
        """Who calls. None: without a key, where none is needed.

        Raises:
            Unauthenticated: no key where one is needed, or one that is not good.
        """
        if not authorization:
            if self.required:
                raise Unauthenticated(
                    "this call needs a key: send `authorization: Bearer <key>`",
                    reason="KEY_MISSING",
                )
            return None
        kind, _, token = authorization.partition(" ")
        token = token.lstrip(" ")  # there may be several (RFC 6750, 2.1)
        # Without keys in force, SDKs that insist on sending one may send anything.
        if not self.required and not token.startswith("fbk_"):
            return None
        key_id, _, secret = token.removeprefix("fbk_").partition("_")
        key, principal = self._keys.get(key_id, (None, None))
        given = hashlib.sha256(secret.encode()).digest()
        good = hmac.compare_digest(given, key.secret_hash if key else b"\0" * 32)
        if kind.lower() != "bearer" or key is None or principal is None or not good:
            raise Unauthenticated("the key is not known", reason="KEY_UNKNOWN")
        if not key.active(self._clock()):
            raise Unauthenticated("the key was revoked or has expired", reason="KEY_INACTIVE")
        return principal

    def principal(self, key_id: str) -> Principal:
        """Who left work behind under this key. Raises Unauthenticated when it may not go on."""
        if key_id == ANONYMOUS.key_id and not self.required:
            return ANONYMOUS
        key, principal = self._keys.get(key_id, (None, None))
        if key is None or principal is None or not key.active(self._clock()):
            raise Unauthenticated("the key was revoked or has expired", reason="KEY_INACTIVE")
        return principal

    def limits(self, key_id: str) -> Limits | None:
        """A key's limits; None for strangers."""
        known = self._keys.get(key_id)
        return known[0].limits if known else None

    def list(self, include_inactive: bool) -> list[ApiKey]:
        """Keys, newest first."""
        now = self._clock()
        keys = [k for k, _ in self._keys.values() if include_inactive or k.active(now)]
        return sorted(keys, key=lambda k: (-k.created_at, k.id))

    async def create(
        self,
        name: str,
        scopes: tuple[str, ...],
        models: tuple[str, ...] = (),
        limits: Limits | None = None,
        expires_at: float | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is stored nowhere."""
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        key = ApiKey(
            key_id,
            name,
            hashlib.sha256(secret.encode()).digest(),
            scopes,
            models,
            limits or Limits(),
            self._clock(),
            expires_at,
        )
        async with self._database.begin() as db:
            await db.execute(api_keys.insert().values(**_to_row(key)))
        await self.reload()
        return key, f"fbk_{key_id}_{secret}"

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke at once and for good. A key that is revoked keeps its first time."""
        when = sa.func.coalesce(api_keys.c.revoked_at, self._clock())
        return await self._update(key_id, {"revoked_at": when})

    async def set_limits(self, key_id: str, limits: Limits) -> ApiKey:
        """Replace a key's limits."""
        return await self._update(key_id, asdict(limits))

    async def _update(self, key_id: str, columns: dict[str, Any]) -> ApiKey:
        """Change only these columns: another process may be changing others of the same key."""
        changed = sa.update(api_keys).where(api_keys.c.id == key_id).values(**columns)
        async with self._database.begin() as db:
            if (await db.execute(changed)).rowcount == 0:
                raise NotFound("key", key_id)
        await self.reload()
        return self._keys[key_id][0]


def require_scope(principal: Principal, scope: str) -> None:
    """Raise PermissionDenied unless the key holds the scope."""
    if scope != "public" and scope not in principal.scopes:
        raise PermissionDenied(
            f"this key lacks the scope {scope!r}; it holds {', '.join(sorted(principal.scopes))}",
            reason="SCOPE_MISSING",
            metadata={"scope": scope},
        )


def _to_row(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "secret_hash": key.secret_hash,
        "scopes": ",".join(key.scopes),
        "models": json.dumps(key.models),
        **asdict(key.limits),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _from_row(row: sa.Row[tuple[object, ...]]) -> ApiKey:
    r = row._mapping
    return ApiKey(
        r["id"],
        r["name"],
        r["secret_hash"],
        tuple(s for s in r["scopes"].split(",") if s),
        tuple(json.loads(r["models"])),
        Limits(**{f.name: r[f.name] for f in fields(Limits)}),
        r["created_at"],
        r["expires_at"],
        r["revoked_at"],
    )
