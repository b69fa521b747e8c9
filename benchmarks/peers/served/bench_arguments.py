"""Arguments that every peer's server takes."""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
    """model kind, its folder, ports on loopback, threads of ONNX Runtime."""
    out = argparse.ArgumentParser()
    out.add_argument("kind", choices=["forest", "minilm"])
    out.add_argument("folder")
    out.add_argument("--grpc-port", type=int, required=True)
    out.add_argument("--http-port", type=int, required=True)
    out.add_argument("--threads", type=int, default=1)
    return out
