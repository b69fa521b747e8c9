"""The embedded engine: OpenVINO GenAI, in a process of its own.

Its steps hold Python's lock from beginning to end, so in the server's process it would stop all
else for the time of each. Why this engine: docs/adr/0020.
"""

from __future__ import annotations

import os
import sys

from forebay.errors import FailedPrecondition

from forebay_server.core.generation import Capabilities, GenerationSpec
from forebay_server.generation.process import ProcessEngine

OPTIONS = ("kv_cache_gb", "max_num_batched_tokens", "device", "properties", "prefix_caching")


class OpenVinoEngine(ProcessEngine):
    """See interfaces.GenerationEngine."""

    def __init__(self, spec: GenerationSpec) -> None:
        unknown = sorted(set(spec.options) - set(OPTIONS))
        if unknown:
            raise FailedPrecondition(
                f"model.yaml: engine_options: {unknown[0]!r} is not known; "
                f"known are {', '.join(OPTIONS)}",
                reason="MODEL_REJECTED",
            )
        super().__init__(
            spec,
            Capabilities(
                # Callers' grammars cannot be checked beforehand, and a bad one stops all.
                structures=frozenset({"json_schema", "json_object", "regex", "choice"}),
                logit_bias=False,
                top_logprobs=0,
            ),
            [sys.executable, "-m", "forebay_server.generation.openvino_worker"],
            {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            "the embedded engine",
        )
