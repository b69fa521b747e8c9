"""`bentoml serve` on service.py, with its settings in the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bench_arguments

if __name__ == "__main__":
    parser = bench_arguments.parser()
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", action="store_true")
    a = parser.parse_args()
    os.environ.update(
        SERVED_KIND=a.kind,
        SERVED_FOLDER=a.folder,
        SERVED_THREADS=str(a.threads),
        SERVED_WORKERS=str(a.workers),
        SERVED_BATCH="1" if a.batch else "",
        BENTOML_HOME=os.getcwd(),
        BENTOML_DO_NOT_TRACK="1",
    )
    command = [sys.executable, "-m", "bentoml", "serve", "service:Served"]
    command += ["--working-dir", str(Path(__file__).parent), "--host", "127.0.0.1"]
    os.execv(sys.executable, [*command, "--port", str(a.http_port)])
