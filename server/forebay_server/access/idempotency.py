"""Idempotency keys for calls that change state: a retry gets the first answer, and acts once.

Scoped by API key and method. The token is taken by a unique row before the work and filled with the
answer afterwards. The work goes on when its caller is gone: a lost connection is the very case that
callers retry for. A failed call gives its token back; one that died with the server keeps it for
`STALE_S`, because nobody knows how far it came.

An answer may hold a secret (that of a new API key), and secrets are not stored. So the table has
the token's hash, and the answer sealed under the token, which only its caller has. Who reads the
database can open it only by guessing the token: callers should use random ones (UUIDs), as they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from forebay.errors import Aborted, InvalidArgument
from sqlalchemy.exc import IntegrityError

from forebay_server.storage.database import Database
from forebay_server.storage.tables import idempotency

log = logging.getLogger("forebay.access")

#: Seconds for which answers are kept, and after which an unfinished call no longer blocks.
KEEP_S, STALE_S = 24 * 3600.0, 60.0
MAX_TOKEN = 256
_SALT, _TAG = 16, 16


class IdempotencyStore:
    """See the module. Used on one event loop; several servers may share the database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._running: set[asyncio.Task[bytes]] = set()

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
        row = (key_id, method, hashlib.sha256(token.encode()).hexdigest())
        earlier = await self._take(row, digest)
        if earlier is not None:
            return _open(token, earlier)
        task = asyncio.create_task(self._act(row, token, work))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Wait for work whose callers have gone."""
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[bytes]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone: nobody else would fetch it

    async def _act(
        self, row: tuple[str, str, str], token: str, work: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        heart = asyncio.create_task(self._beat(row))
        try:
            response = await work()
        except BaseException:
            async with self._database.begin() as db:
                await db.execute(sa.delete(idempotency).where(_is(row)))
            raise
        finally:
            heart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await heart
        done = sa.update(idempotency).where(_is(row))
        async with self._database.begin() as db:
            await db.execute(done.values(response=_seal(token, response), created_at=self._clock()))
        return response

    async def _beat(self, row: tuple[str, str, str]) -> None:
        """Keep a long call's token from going stale: loading a model may take minutes."""
        while True:
            await asyncio.sleep(STALE_S / 4)
            try:
                await self.touch(row)
            except Exception:  # the work goes on, and its answer must not be lost to this
                log.exception("a running call's token could not be kept fresh; it is tried again")

    async def touch(self, row: tuple[str, str, str]) -> None:
        """Say that the work of a token still goes on."""
        async with self._database.begin() as db:
            now = self._clock()
            await db.execute(sa.update(idempotency).where(_is(row)).values(created_at=now))

    async def _take(self, row: tuple[str, str, str], digest: bytes) -> bytes | None:
        """Take the token; the earlier answer, sealed, when there is one."""
        t, now = idempotency, self._clock()
        stale = (t.c.created_at < now - KEEP_S) | (
            t.c.response.is_(None) & (t.c.created_at < now - STALE_S)
        )
        new = t.insert().values(
            key_id=row[0], method=row[1], token=row[2], request_hash=digest, created_at=now
        )
        try:
            async with self._database.begin() as db:
                await db.execute(sa.delete(t).where(stale))
                await db.execute(new)
            return None
        except IntegrityError:
            pass  # it is taken: see by whom
        async with self._database.read() as db:
            found = (await db.execute(sa.select(t).where(_is(row)))).first()
        if found is not None and found.request_hash != digest:
            raise InvalidArgument.at(
                "idempotency-key",
                "was used with another request",
                reason="IDEMPOTENCY_KEY_REUSED",
            )
        if found is None or found.response is None:
            raise Aborted(
                "a call with this idempotency key is running",
                reason="IDEMPOTENCY_IN_PROGRESS",
                retry_after_s=1.0,
            )
        return found.response


def _is(row: tuple[str, str, str]) -> sa.ColumnElement[bool]:
    t = idempotency
    return (t.c.key_id == row[0]) & (t.c.method == row[1]) & (t.c.token == row[2])


def _seal(token: str, data: bytes) -> bytes:
    """Encrypt by a keystream of SHAKE-256 over token and a fresh salt, and authenticate."""
    salt = secrets.token_bytes(_SALT)
    return salt + _tag(token, salt, data) + _keystream(token, salt, data)


def _open(token: str, sealed: bytes) -> bytes:
    salt, tag = sealed[:_SALT], sealed[_SALT : _SALT + _TAG]
    data = _keystream(token, salt, sealed[_SALT + _TAG :])
    if not hmac.compare_digest(tag, _tag(token, salt, data)):
        raise Aborted("the stored answer cannot be read", reason="IDEMPOTENCY_RECORD_DAMAGED")
    return data


def _keystream(token: str, salt: bytes, data: bytes) -> bytes:
    key = hashlib.shake_256(b"forebay idempotency\0" + salt + token.encode()).digest(len(data))
    mixed = int.from_bytes(data, "big") ^ int.from_bytes(key, "big")
    return mixed.to_bytes(len(data), "big")


def _tag(token: str, salt: bytes, data: bytes) -> bytes:
    return hmac.new(salt + token.encode(), data, hashlib.sha256).digest()[:_TAG]
