"""Idempotency keys for calls that change state: a retry gets the first answer, and acts once.

Scoped by API key and method. The token is taken by a unique row before the work and filled with the
answer afterwards. A failed call gives its token back; one that died with the server keeps it for
`STALE_S`, because nobody knows how far it came.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from forebay.errors import Aborted, InvalidArgument
from sqlalchemy.exc import IntegrityError

from forebay_server.storage.database import Database
from forebay_server.storage.tables import idempotency

#: Seconds for which answers are kept, and after which an unfinished call no longer blocks.
KEEP_S, STALE_S = 24 * 3600.0, 60.0
MAX_TOKEN = 256


class IdempotencyStore:
    """See the module."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def once(
        self,
        key_id: str,
        method: str,
        token: str,
        request: bytes,
        work: Callable[[], Awaitable[bytes]],
    ) -> bytes:
        """The answer of `work`, or that of the earlier call with this token.

        Raises:
            Aborted: the earlier call is still running.
            InvalidArgument: the token was used with another request.
        """
        if len(token) > MAX_TOKEN:
            raise InvalidArgument.at("idempotency-key", f"is longer than {MAX_TOKEN} characters")
        digest = hashlib.sha256(request).digest()
        earlier = await self._take(key_id, method, token, digest)
        if earlier is not None:
            return earlier
        t = idempotency
        mine = (t.c.key_id == key_id) & (t.c.method == method) & (t.c.token == token)
        try:
            response = await work()
        except BaseException:
            async with self._database.begin() as db:
                await db.execute(sa.delete(t).where(mine))
            raise
        async with self._database.begin() as db:
            await db.execute(sa.update(t).where(mine).values(response=response))
        return response

    async def _take(self, key_id: str, method: str, token: str, digest: bytes) -> bytes | None:
        """Take the token; the earlier answer when there is one."""
        t, now = idempotency, self._clock()
        mine = (t.c.key_id == key_id) & (t.c.method == method) & (t.c.token == token)
        stale = (t.c.created_at < now - KEEP_S) | (
            t.c.response.is_(None) & (t.c.created_at < now - STALE_S)
        )
        async with self._database.begin() as db:
            await db.execute(sa.delete(t).where(stale))
        try:
            async with self._database.begin() as db:
                await db.execute(
                    t.insert().values(
                        key_id=key_id,
                        method=method,
                        token=token,
                        request_hash=digest,
                        response=None,
                        created_at=now,
                    )
                )
            return None
        except IntegrityError:
            pass
        async with self._database.begin() as db:
            row = (await db.execute(sa.select(t).where(mine))).first()
        if row is None or row.response is None:
            raise Aborted(
                "a call with this idempotency key is running",
                reason="IDEMPOTENCY_IN_PROGRESS",
                retry_after_s=1.0,
            )
        if row.request_hash != digest:
            raise InvalidArgument.at(
                "idempotency-key",
                "was used with another request",
                reason="IDEMPOTENCY_KEY_REUSED",
            )
        return row.response
