"""Two replicas behind a real NGINX with the configuration of deploy/: calls spread, and a replica
that is killed in the middle of a stream is a clean error, after which the next call succeeds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay_cli.up import free_port

from tests.conftest import ROOT
from tests.integration.chats import user
from tests.integration.language_models import random_openvino

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


class Replica:
    """`forebay up` in a group of its own."""

    def __init__(self, home: Path, models: Path) -> None:
        self.grpc, self.http = free_port(), free_port()
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")},
            "FOREBAY_HOME": str(home),
            "FOREBAY_MODELS__ROOT": str(models),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_GRPC_PORT": str(self.grpc),
            "FOREBAY_HTTP_PORT": str(self.http),
            "FOREBAY_OBSERVABILITY__METRICS_PORT": str(free_port()),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self._processes = [
            subprocess.Popen([sys.executable, "-m", "forebay_cli", what], env=env, cwd=ROOT)
            for what in ("serve", "gateway")
        ]
        self.server = self._processes[0]

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.http}/readyz", timeout=3).is_success
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


class Balancer:
    """NGINX on deploy/nginx/nginx.conf, with the replicas' addresses in it."""

    def __init__(self, folder: Path, replicas: list[Replica]) -> None:
        self.grpc, self.http = free_port(), free_port()
        text = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
        for i, replica in enumerate(replicas):
            text = text.replace(f"forebay-{i}:50051", f"127.0.0.1:{replica.grpc}")
            text = text.replace(f"forebay-{i}:8080", f"127.0.0.1:{replica.http}")
        text = text.replace("listen 50051", f"listen 127.0.0.1:{self.grpc}")
        text = text.replace("listen 8080", f"listen 127.0.0.1:{self.http}")
        assert "forebay-" not in re.sub(r"#.*", "", text)
        paths = "".join(
            f"{kind}_temp_path {folder}/temp;\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = text.replace("http {\n", f"http {{\naccess_log off;\n{paths}", 1)
        config = folder / "nginx.conf"
        config.write_text(f"load_module {MODULE};\npid {folder}/pid;\ndaemon off;\n{text}")
        command = ["nginx", "-c", str(config), "-e", str(folder / "error.log")]
        done = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self._process = subprocess.Popen(command)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def nginx() -> None:
    if shutil.which("nginx") is None or not MODULE.exists():
        pytest.skip("no NGINX with its stream module: apt install nginx libnginx-mod-stream")


@pytest.fixture
def pool(
    nginx: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Balancer, list[Replica]]]:
    models = random_openvino(tmp_path_factory.mktemp("models"))
    replicas = [Replica(tmp_path_factory.mktemp(f"home{i}"), models) for i in range(2)]
    balancer = None
    try:
        deadline = time.monotonic() + 120
        while not all(r.ready() for r in replicas):
            assert time.monotonic() < deadline, "the replicas do not get ready"
            time.sleep(0.2)
        balancer = Balancer(tmp_path_factory.mktemp("nginx"), replicas)
        yield balancer, replicas
    finally:
        if balancer is not None:
            balancer.stop()
        for replica in replicas:
            replica.stop()


#: Tokens of an answer that takes a while, and how many of them go on at once.
LONG, AT_ONCE = 1500, 10


def calls_of(replica: Replica, method: str = "ChatStream") -> float:
    """Calls that a replica has answered, by its own metrics."""
    text = httpx.get(f"http://127.0.0.1:{replica.http}/metrics", timeout=5).text
    name = rf'forebay_rpc_server_duration_seconds_count\{{.*/{method}".*\}} (\S+)'
    return sum(float(v) for v in re.findall(name, text))


def open_stream(balancer: Balancer, tokens: int) -> tuple[grpc.Channel, grpc.Call]:
    """A stream on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{balancer.grpc}", options=options)
    request = user("Count to 30", max_tokens=tokens, ignore_eos=True)
    stub = rpc.GenerationServiceStub(channel)
    return channel, stub.ChatStream(pb.ChatStreamRequest(request=request), wait_for_ready=True)


def end_of(call: Any) -> grpc.StatusCode:
    """How a stream ends."""
    try:
        list(call)
    except grpc.RpcError as e:
        return e.code()
    return grpc.StatusCode.OK


def test_calls_spread_and_a_killed_replica_is_a_clean_error(
    pool: tuple[Balancer, list[Replica]],
) -> None:
    balancer, replicas = pool
    channels = []
    for _ in range(6):
        channel, call = open_stream(balancer, 4)
        assert any(e.HasField("finish") for e in call)
        channels.append(channel)  # open connections are what NGINX counts
    assert [calls_of(r) for r in replicas] == [3, 3]
    # Several at once: alone, the model would be done before it is looked at.
    streams = [open_stream(balancer, LONG) for _ in range(AT_ONCE)]
    for _, call in streams:
        assert next(call).WhichOneof("event")
    os.kill(replicas[0].server.pid, signal.SIGKILL)
    ends = [end_of(call) for _, call in streams]
    assert set(ends) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    channel = streams[ends.index(grpc.StatusCode.UNAVAILABLE)][0]
    channels += [c for c, _ in streams if c is not channel]
    # The same client, then a new one: both are served by the replica that is left.
    stub = rpc.GenerationServiceStub(channel)
    answer = stub.Chat(user("Hello", max_tokens=4), timeout=30, wait_for_ready=True)
    assert answer.choices
    for _ in range(4):
        other, call = open_stream(balancer, 4)
        assert any(e.HasField("finish") for e in call)
        channels.append(other)
    for opened in (*channels, channel):
        opened.close()


def test_events_pass_as_they_come_and_a_killed_server_ends_them_with_an_error(
    pool: tuple[Balancer, list[Replica]],
) -> None:
    balancer, replicas = pool
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Count to 30"}],
        "max_tokens": LONG,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"http://127.0.0.1:{balancer.http}"
    # A page that came from here may ask here: NGINX passes on the host with its port.
    page = {"origin": url}
    short = body | {"stream": False, "max_tokens": 4}
    asked = httpx.post(f"{url}/v1/chat/completions", json=short, headers=page)
    assert asked.status_code == 200, asked.text
    # An engine's first call takes long: the streams of the other would end before.
    for replica in replicas:
        path = f"http://127.0.0.1:{replica.http}/v1/chat/completions"
        assert httpx.post(path, json=short, timeout=60).status_code == 200
    begun = threading.Barrier(AT_ONCE + 1)

    def events() -> list[str]:
        """The last two lines of a stream; the others wait until all have begun."""
        seen: list[str] = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            for line in filter(None, response.iter_lines()):
                seen.append(line)
                if len(seen) == 2:
                    begun.wait(60)
        return seen[-2:]

    with ThreadPoolExecutor(AT_ONCE) as workers:
        futures = [workers.submit(events) for _ in range(AT_ONCE)]
        begun.wait(60)
        os.kill(replicas[0].server.pid, signal.SIGKILL)
        ends = [f.result(90) for f in futures]
    failed = [end for end in ends if end[0] == "event: error"]
    assert 0 < len(failed) < AT_ONCE
    for end in ends:
        if end in failed:
            assert json.loads(end[1].removeprefix("data: "))["error"]["code"]
        else:
            assert end[1] == "data: [DONE]"
    # The gateway of the killed server says 503; NGINX is told by readiness, clients try again.
    statuses = {httpx.get(f"{url}/readyz", timeout=5).status_code for _ in range(4)}
    assert 200 in statuses
