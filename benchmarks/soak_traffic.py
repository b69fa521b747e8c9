"""Traffic of the soak beside that of the generator: downloads, and requests by HTTP."""

from __future__ import annotations

import hashlib
import http.client
import json
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
from forebay.v1 import file_pb2, file_pb2_grpc, tabular_pb2, tabular_pb2_grpc
from google.protobuf.json_format import ParseDict

from benchmarks.openloop.live import Served

PREDICT = "/api/v1/tabular:predict"
ROW = {
    "longitude": -122.23,
    "latitude": 37.88,
    "housing_median_age": 41,
    "total_rooms": 880,
    "total_bedrooms": 129,
    "population": 322,
    "households": 126,
    "median_income": 8.3252,
    "ocean_proximity": "NEAR BAY",
}


class Streams:
    """Downloads of a file beside the load, as server streams: each whole file is checked, each second
    one is taken back after its first message, every twentieth is read slowly."""

    EVERY_S = 0.05

    def __init__(self, server: Served) -> None:
        self.calls = {"offered": 0, "ok": 0, "wrong": 0}
        self._done = threading.Event()
        self._channel = grpc.insecure_channel(server.target)
        self._stub = file_pb2_grpc.FileServiceStub(self._channel)
        pieces = [np.random.default_rng(i).bytes(64 << 10) for i in range(16)]
        self._sha256 = hashlib.sha256(b"".join(pieces)).hexdigest()
        parts = [file_pb2.UploadFileRequest(header={"purpose": "user_data"})]
        parts += [file_pb2.UploadFileRequest(chunk={"path": "f", "data": p}) for p in pieces]
        self._file = self._stub.UploadFile(iter(parts)).file.id
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """No more."""
        self._done.set()
        self._thread.join()
        self._channel.close()

    def _run(self) -> None:
        request = file_pb2.DownloadFileRequest(file=self._file)
        while not self._done.wait(self.EVERY_S):
            self.calls["offered"] += 1
            n = self.calls["offered"]
            stream = self._stub.DownloadFile(request, timeout=60)
            seen = hashlib.sha256()
            try:
                for piece in stream:
                    seen.update(piece.data)
                    if n % 2:
                        stream.cancel()
                        break
                    if n % 20 == 0:
                        time.sleep(0.02)
                else:
                    self.calls["ok"] += 1
                    self.calls["wrong"] += seen.hexdigest() != self._sha256
            except grpc.RpcError:
                self.calls["wrong"] += 1


class Requests:
    """Predictions by HTTP from several connections: each answer must be its own request's, by value and by
    request id. Some bodies come in pieces, some connections are left before the answer."""

    CALLERS, EVERY_S = 3, 0.02

    def __init__(self, server: Served, port: int) -> None:
        self.calls = {"offered": 0, "ok": 0, "wrong": 0}
        self._port = port
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._rows = [{**ROW, "total_rooms": 300 + 40 * i} for i in range(64)]
        with grpc.insecure_channel(server.target) as channel:
            stub = tabular_pb2_grpc.TabularServiceStub(channel)
            body = {"model": "housing", "rows": self._rows}
            answer = stub.Predict(ParseDict(body, tabular_pb2.PredictRequest()))
        self._right = [p.value for p in answer.predictions]
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(self.CALLERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, n in more.items():
                self.calls[name] += n

    def _run(self, caller: int) -> None:
        connection, n = None, 0
        while not self._done.wait(self.EVERY_S):
            n += 1
            at, name = (n * 7 + caller) % len(self._rows), f"{caller}-{n}"
            self._count(offered=1)
            connection = connection or http.client.HTTPConnection(
                "127.0.0.1", self._port, timeout=60
            )
            body = json.dumps({"model": "housing", "rows": [self._rows[at]]}).encode()
            headers = {"x-request-id": name}
            pieces = n % 13 == 0
            connection.request(
                "POST", PREDICT, _pieces(body) if pieces else body, headers, encode_chunked=pieces
            )
            if n % 50 == 0:  # leaves
                connection.close()
                connection = None
                continue
            answer = connection.getresponse()
            said = json.loads(answer.read())
            right = (
                answer.status == 200
                and answer.headers["x-request-id"] == name
                and [p["value"] for p in said["predictions"]] == [self._right[at]]
            )
            self._count(ok=right, wrong=not right)
        if connection is not None:
            connection.close()


def _pieces(body: bytes) -> Iterator[bytes]:
    yield body[:10]
    yield body[10:]
