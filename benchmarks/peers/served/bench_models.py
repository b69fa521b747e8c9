"""The two models as every peer's server runs them: same files, tokenizer and arithmetic.

Imported in the peers' own environments: numpy, onnxruntime and tokenizers are all it needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def session(path: str, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Forest:
    """The random forest: float32 [n, features] to [n, 1]."""

    def __init__(self, folder: str, threads: int = 1) -> None:
        self._session = session(os.path.join(folder, "model.onnx"), threads)
        self._input = self._session.get_inputs()[0].name

    def predict(self, rows: Any) -> Any:
        """Predictions of rows."""
        values = np.ascontiguousarray(rows, np.float32)
        return np.asarray(self._session.run(None, {self._input: values})[0]).reshape(len(values), 1)


class Encoder:
    """MiniLM: texts to unit vectors [n, 384], padded to the longest of the batch."""

    def __init__(self, folder: str, threads: int = 2) -> None:
        self._session = session(os.path.join(folder, "model.onnx"), threads)
        self._tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self._tokenizer.enable_truncation(256)
        self._tokenizer.enable_padding()

    def embed(self, texts: Sequence[str]) -> Any:
        """Embeddings of texts."""
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([e.ids for e in encoded], np.int64)
        mask = np.array([e.attention_mask for e in encoded], np.int64)
        (out,) = self._session.run(None, {"input_ids": ids, "attention_mask": mask})
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def load(kind: str, folder: str, threads: int) -> Any:
    """`forest` or `minilm`."""
    return Forest(folder, threads) if kind == "forest" else Encoder(folder, threads)
