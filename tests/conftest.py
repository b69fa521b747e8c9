"""What tests share: the data folder, the starter models, a running server."""

from __future__ import annotations

import asyncio
import getpass
import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import pytest
from forebay.settings import Settings, load_settings
from forebay_cli.up import free_port

# Slow machines fail no test: how long an example takes is nobody's promise.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent
#: Starter models are made once and kept between runs.
KEPT = ROOT / ".forebay"


def data_folder() -> Path | None:
    """The folder with real data, where it is."""
    given = os.environ.get("FOREBAY_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data() -> Path:
    """Real data; the test skips where there is none."""
    folder = data_folder()
    if folder is None:
        pytest.skip("no data folder: set FOREBAY_DATA, or put it at ../shared/data")
    return folder


@pytest.fixture(scope="session")
def starters() -> Path:
    """A model repository with all starter models, made by the product's own code."""
    from forebay_exporters.starters import make_starters

    faults = make_starters(KEPT / "models", KEPT / "cache", data_folder())
    assert not faults, faults
    return KEPT / "models"


def copy_models(source: Path, target: Path, *names: str) -> Path:
    """A repository of its own with some of the models."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copytree(source / name, target / name, copy_function=os.link)
    return target


@pytest.fixture(scope="session")
def embedder(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with minilm alone, for tests of what is around models: it starts in half of the time."""
    return copy_models(starters, tmp_path_factory.mktemp("embedder"), "minilm")


#: Makes an empty database and gives its URL.
NewDatabase = Callable[[], str]


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[NewDatabase]:
    """Databases in a PostgreSQL server of our own; the test skips saying why there is none."""
    pytest.importorskip("asyncpg", reason="no asyncpg: pip install asyncpg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    which = shutil.which("initdb")
    if not found and not which:
        pytest.skip("no PostgreSQL: apt install postgresql")
    binaries = found[-1] if found else Path(str(which)).parent
    # Not in pytest's own folder, which another user than its own cannot pass.
    root = Path(tempfile.mkdtemp(prefix="forebay-postgres-"))
    request.addfinalizer(lambda: shutil.rmtree(root, ignore_errors=True))
    as_user: list[str] = []
    if getpass.getuser() == "root":  # PostgreSQL refuses to run as root
        if not shutil.which("setpriv"):
            pytest.skip(
                "PostgreSQL does not run as root, and there is no setpriv: apt install util-linux"
            )
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(root, "postgres", "postgres")

    log = root / "log"

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*as_user, str(binaries / program), *map(str, arguments)]
        # Not by pipes: the server that pg_ctl starts would keep them open.
        with log.open("a+") as out:
            return subprocess.run(command, stdout=out, stderr=out, text=True, cwd="/")

    if run("initdb", "-D", root / "data", "-A", "trust", "-U", "forebay").returncode:
        pytest.skip(f"initdb failed: {log.read_text()[-200:]}")
    port = free_port()
    options = f"-p {port} -k {root} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = ("-D", root / "data", "-w", "-t", "60")
    assert run("pg_ctl", *control, "-o", options, "start").returncode == 0, log.read_text()
    numbers = itertools.count()

    def new() -> str:
        name = f"forebay{next(numbers)}"
        made = run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "forebay", name)
        assert made.returncode == 0, log.read_text()[-1000:]
        return f"postgresql+asyncpg://forebay@127.0.0.1:{port}/{name}"

    yield new
    run("pg_ctl", *control, "-m", "immediate", "stop")


class Live:
    """A server on a loop of its own thread. On the fast lane it has an HTTP port too, as by `forebay up`;
    a gateway belongs behind it, see `integration.gateway.Gateway`."""

    def __init__(self, settings: Settings) -> None:
        from forebay_cli.serve import http_port
        from forebay_server.app import Server
        from forebay_server.transport.lanes import choose

        self.gateway_socket = ""
        if choose(settings.grpc) == "fast":
            # Not in a test's own folder: a socket's path has 107 bytes at most.
            self.gateway_socket = f"{tempfile.mkdtemp(prefix='forebay-')}/gateway.sock"
            http = {"gateway": self.gateway_socket, "port": 0}
            settings = settings.model_copy(update={"http": settings.http.model_copy(update=http)})
        self.settings = settings
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server = Server(settings, http_port(settings))
        self.run(self.server.start(), 300)  # a language model may take minutes
        self.target = f"127.0.0.1:{self.server.port}"
        self.channel = grpc.insecure_channel(self.target)

    def run(self, work: Any, timeout: float = 60) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def stop(self) -> None:
        """Drain and stop. Idempotent."""
        if not self.loop.is_running():
            return
        self.channel.close()
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        if self.gateway_socket:
            shutil.rmtree(Path(self.gateway_socket).parent, ignore_errors=True)


Start = Callable[..., Live]


#: Every test on a running server runs once by lane.
LANES = ["fast", "ordinary"] if importlib.util.find_spec("forebay_native") else ["ordinary"]


@pytest.fixture(scope="module", params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    """The lane of the transport that serves."""
    return request.param


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, lane: str) -> Iterator[Start]:
    """Starts servers: `start(models_root, **settings)`; they stop after the module."""
    running: list[Live] = []

    def run(models: Path, **flags: Any) -> Live:
        home = flags.pop("home", None) or tmp_path_factory.mktemp("home")
        values = {"home": home, "models.root": models, "grpc.port": 0, "models.poll_s": 3600}
        values["grpc.lane"] = lane
        values |= {k.replace("__", "."): v for k, v in flags.items()}
        live = Live(load_settings(values, environ={}).settings)
        running.append(live)
        return live

    yield run
    for live in running:
        live.stop()


@pytest.fixture(scope="module")
def live(starters: Path, start: Start) -> Live:
    """A server with the starter models."""
    return start(starters)
