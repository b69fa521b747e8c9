"""Settings for MLServer in the working folder, then `mlserver start`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import bench_arguments

if __name__ == "__main__":
    parser = bench_arguments.parser()
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--pool", type=int, default=0, help="processes that compute; 0 = this one")
    a = parser.parse_args()
    settings = {
        "host": "127.0.0.1",
        "http_port": a.http_port,
        "grpc_port": a.grpc_port,
        "parallel_workers": a.pool,
        "metrics_endpoint": None,
        "debug": False,
        "use_structured_logging": False,
        "logging_settings": {
            "version": 1,
            "disable_existing_loggers": True,
            "root": {"level": "WARNING"},
        },
    }
    model = {
        "name": a.kind,
        "implementation": "runtime.Served",
        "max_batch_size": a.batch,
        "max_batch_time": 0.002 if a.batch else 0,
        "parameters": {"extra": {"kind": a.kind, "folder": a.folder, "threads": a.threads}},
    }
    Path("settings.json").write_text(json.dumps(settings))
    Path("model-settings.json").write_text(json.dumps(model))
    os.execv(sys.executable, [sys.executable, "-m", "mlserver.cli.main", "start", "."])
