"""ServerService: facts about the server."""

from __future__ import annotations

import os

import forebay
from forebay.methods import methods
from forebay.settings import Settings
from forebay.v1 import server_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.engines import providers
from forebay_server.services.base import Service
from forebay_server.services.model import timestamp

#: Version of the contract. A new major number breaks clients; there is none so far.
CONTRACT_VERSION = "1.0"


class ServerService(Service):
    """See protos/forebay/v1/server.proto."""

    name = "forebay.v1.ServerService"

    def __init__(self, settings: Settings, started_at: float, lane: str) -> None:
        self._settings = settings
        self._started_at = started_at
        self._lane = lane

    async def get_server_info(self, call: Call) -> pb.GetServerInfoResponse:
        """GetServerInfo."""
        devices = [f"cpu: {os.cpu_count()} cores"]
        gpu = providers.gpu_name(0)
        if gpu != "none":
            devices.append(gpu)
        return pb.GetServerInfoResponse(
            version=forebay.__version__,
            contract_version=CONTRACT_VERSION,
            started_at=timestamp(self._started_at),
            services=sorted({m.service for m in methods().values()}),
            providers=providers.available(),
            devices=devices,
            lane=self._lane,
            limits=pb.ServerLimits(
                max_message_bytes=self._settings.grpc.max_message_bytes,
                max_items_per_call=self._settings.grpc.max_items_per_call,
                model_memory_budget_bytes=self._settings.models.memory_budget_bytes,
            ),
        )
