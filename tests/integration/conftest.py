"""What integration tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conftest import Live
from tests.integration.gateway import Gateway
from tests.integration.server_process import ServerProcess, StartProcess


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    """A gateway of the module's server."""
    running = Gateway(live)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, of the module's gateway."""
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def hang_ups() -> Iterator[None]:
    """Processes that a test starts begin with SIGHUP's own action, under `nohup` too."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[StartProcess]:
    """Starts servers on one home, see ServerProcess, and waits until they serve; none outlives the test."""
    running: list[ServerProcess] = []

    def start(*command: str, **environ: str) -> ServerProcess:
        running.append(ServerProcess(tmp_path / "home", *command, **environ))
        running[-1].wait()
        return running[-1]

    yield start
    for server in running:
        server.kill()
