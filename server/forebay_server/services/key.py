"""KeyService: API keys."""

from __future__ import annotations

import time
from typing import cast

from forebay.errors import InvalidArgument
from forebay.v1 import key_pb2 as pb

from forebay_server.access.keys import ApiKey, KeyStore, Limits
from forebay_server.core.call import Call
from forebay_server.services.base import Service
from forebay_server.services.model import timestamp
from forebay_server.services.paging import Page

_SCOPES = {
    pb.KEY_SCOPE_INFER: "infer",
    pb.KEY_SCOPE_READ: "read",
    pb.KEY_SCOPE_ADMIN: "admin",
}
_PERIODS = {
    pb.BUDGET_PERIOD_DAY: "day",
    pb.BUDGET_PERIOD_MONTH: "month",
    pb.BUDGET_PERIOD_TOTAL: "total",
}
_PERIOD_MESSAGES = {v: k for k, v in _PERIODS.items()}
_MESSAGES = {v: k for k, v in _SCOPES.items()}


class KeyService(Service):
    """See protos/forebay/v1/key.proto."""

    name = "forebay.v1.KeyService"

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def create_key(self, call: Call) -> pb.CreateKeyResponse:
        """CreateKey."""
        request = cast(pb.CreateKeyRequest, call.request)
        for i, scope in enumerate(request.scopes):
            if scope == pb.KEY_SCOPE_UNSPECIFIED:
                raise InvalidArgument.at(f"scopes[{i}]", "is KEY_SCOPE_UNSPECIFIED; name a scope")
        expires = (
            request.expires_at.ToNanoseconds() / 1e9 if request.HasField("expires_at") else None
        )
        if expires is not None and expires <= time.time():
            raise InvalidArgument.at("expires_at", "lies in the past")
        scopes = tuple(dict.fromkeys(_SCOPES[s] for s in request.scopes)) or ("infer", "read")
        key, secret = await self._keys.create(
            request.name, scopes, tuple(request.models), _limits(request.limits), expires
        )
        return pb.CreateKeyResponse(key=_message(key), secret=secret)

    async def list_keys(self, call: Call) -> pb.ListKeysResponse:
        """ListKeys."""
        request = cast(pb.ListKeysRequest, call.request)
        keys = self._keys.list(request.include_inactive)
        chosen, token = Page(request, 50, float, str).of(keys, lambda k: (-k.created_at, k.id))
        return pb.ListKeysResponse(keys=[_message(k) for k in chosen], next_page_token=token)

    async def revoke_key(self, call: Call) -> pb.RevokeKeyResponse:
        """RevokeKey."""
        request = cast(pb.RevokeKeyRequest, call.request)
        return pb.RevokeKeyResponse(key=_message(await self._keys.revoke(request.id)))

    async def set_limits(self, call: Call) -> pb.SetLimitsResponse:
        """SetLimits."""
        request = cast(pb.SetLimitsRequest, call.request)
        key = await self._keys.set_limits(request.id, _limits(request.limits))
        return pb.SetLimitsResponse(key=_message(key))


def _limits(m: pb.KeyLimits) -> Limits:
    def given(name: str) -> bool:
        return m.HasField(name)

    return Limits(
        m.requests_per_second if given("requests_per_second") else None,
        m.burst if given("burst") else None,
        m.tokens_per_minute if given("tokens_per_minute") else None,
        m.max_concurrency if given("max_concurrency") else None,
        m.budget_tokens if given("budget_tokens") else None,
        m.budget_money if given("budget_money") else None,
        _PERIODS.get(m.budget_period),
    )


def _message(key: ApiKey) -> pb.Key:
    limits = key.limits
    out = pb.Key(
        id=key.id,
        name=key.name,
        scopes=[_MESSAGES[s] for s in key.scopes],
        models=key.models,
        limits=pb.KeyLimits(
            requests_per_second=limits.requests_per_second,
            burst=limits.burst,
            tokens_per_minute=limits.tokens_per_minute,
            max_concurrency=limits.max_concurrency,
            budget_tokens=limits.budget_tokens,
            budget_money=limits.budget_money,
            budget_period=_PERIOD_MESSAGES.get(limits.budget_period or ""),
        ),
        created_at=timestamp(key.created_at),
    )
    if key.expires_at is not None:
        out.expires_at.CopyFrom(timestamp(key.expires_at))
    if key.revoked_at is not None:
        out.revoked_at.CopyFrom(timestamp(key.revoked_at))
    return out
