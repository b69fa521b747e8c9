"""Unload is proven: 200 cycles of load and unload, failed loads among them, in processes."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import pytest
from forebay.errors import ForebayError
from forebay_server.engines.process import resident_bytes
from forebay_server.repository import Defaults
from forebay_server.repository.loading import load
from forebay_server.repository.manifest import read_config

CYCLES = int(os.environ.get("FOREBAY_LOAD_CYCLES", "40"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resident_memory_ends_where_it_began(starters: Path, tmp_path: Path) -> None:
    """FOREBAY_LOAD_CYCLES=200 is the full run. Every fifth load fails."""
    good = shutil.copytree(starters / "iris" / "1", tmp_path / "iris" / "1")
    bad = shutil.copytree(starters / "iris" / "1", tmp_path / "iris" / "2")
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["files"] = {}
    (bad / "manifest.json").write_text(json.dumps(manifest))
    (bad / "model.onnx").write_bytes((good / "model.onnx").read_bytes()[:300])
    (tmp_path / "iris" / "model.yaml").write_text("execution: {isolation: process}\n")
    config = read_config(tmp_path / "iris" / "model.yaml")

    def cycle(i: int) -> None:
        if i % 5 == 4:
            with pytest.raises(ForebayError, match=r"model\.onnx"):
                load("iris", 2, bad, config, Defaults(), lambda *_: None)
            return
        model = load("iris", 1, good, config, Defaults(), lambda *_: None)
        pid = model.client.engines[0].info()["pid"]
        model.client.close()
        assert not Path(f"/proc/{pid}").exists()

    for i in range(10):  # imports and pools settle
        cycle(i)
    gc.collect()
    before = resident_bytes(os.getpid())
    descriptors = len(os.listdir("/proc/self/fd"))
    for i in range(CYCLES):
        cycle(i)
    gc.collect()
    after = resident_bytes(os.getpid())
    assert after < before * 1.05, f"{before} bytes became {after}"
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
