"""Calls of methods that the server does not have, as by a client that is newer than it."""

from __future__ import annotations

from typing import Any, cast

import forebay
import grpc
from forebay.errors import Unimplemented
from grpc import aio

from forebay_server.transport.ordinary import DETAILS


class UnknownMethods(grpc.GenericRpcHandler):
    """Refuses every method. Comes after the handlers of those that there are."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """See grpc.GenericRpcHandler."""
        method = cast(str, handler_call_details.method)

        async def refuse(_: Any, context: aio.ServicerContext) -> None:
            error = Unimplemented(
                f"{method} is no method of this server, which is forebay {forebay.__version__}; "
                "server reflection lists those that it has"
            )
            details = ((DETAILS, error.to_status().SerializeToString()),)
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, error.message, details)

        # Nothing is read of what comes: all kinds of calls are refused alike.
        return grpc.stream_stream_rpc_method_handler(cast(Any, refuse))
