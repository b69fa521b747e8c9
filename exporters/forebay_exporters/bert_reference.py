"""BERT in numpy, from the weights alone: what written graphs are compared with.

Written from the paper (Devlin et al. 2018) and the weights' names, one text at a time, in float64. It
shares nothing with `bert_graph`: no fused operators, no padding, no mask, no batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.special import erf

Array = NDArray[np.float64]


class BertReference:
    """A BERT encoder's forward pass.

    Args:
        weights: the safetensors file.
        config: config.json: num_hidden_layers, num_attention_heads, layer_norm_eps.
    """

    def __init__(self, weights: Path, config: dict[str, Any]) -> None:
        self._w = {
            k.removeprefix("bert."): v.astype(np.float64)
            for k, v in load_file(str(weights)).items()
        }
        self._layers = int(config["num_hidden_layers"])
        self._heads = int(config["num_attention_heads"])
        self._eps = float(config.get("layer_norm_eps", 1e-12))

    def hidden(self, ids: Sequence[int]) -> Array:
        """[length, hidden] of one text."""
        w = self._w
        embedded = (
            w["embeddings.word_embeddings.weight"][list(ids)]
            + w["embeddings.position_embeddings.weight"][: len(ids)]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(embedded, "embeddings.LayerNorm")
        for i in range(self._layers):
            p = f"encoder.layer.{i}"
            attended = self._linear(self._attention(x, p), f"{p}.attention.output.dense")
            x = self._norm(x + attended, f"{p}.attention.output.LayerNorm")
            wide = self._linear(x, f"{p}.intermediate.dense")
            active = wide * 0.5 * (1 + erf(wide / np.sqrt(2)))
            narrow = self._linear(active, f"{p}.output.dense")
            x = self._norm(x + narrow, f"{p}.output.LayerNorm")
        return x

    def sentence(self, ids: Sequence[int]) -> Array:
        """The mean over the tokens, of unit length."""
        mean = self.hidden(ids).mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _attention(self, x: Array, p: str) -> Array:
        length = len(x)

        def heads(which: str) -> Array:
            value = self._linear(x, f"{p}.attention.self.{which}")
            return value.reshape(length, self._heads, -1).transpose(1, 0, 2)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return (scores @ value).transpose(1, 0, 2).reshape(length, -1)

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self._w[f"{name}.weight"].T + self._w[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._eps)
        return centred / scale * self._w[f"{name}.weight"] + self._w[f"{name}.bias"]
