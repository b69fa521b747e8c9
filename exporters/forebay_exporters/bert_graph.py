"""A BERT encoder's ONNX graph, written straight from its safetensors: no torch, no transformers.

The graph uses ONNX Runtime's fused operators (com.microsoft), so it needs no optimizer pass:
EmbedLayerNormalization, Attention, SkipLayerNormalization, BiasGelu (the exact erf form).
Source of the architecture: Devlin et al. 2018, and the weights' own names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

OPSET = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]


class BertGraph:
    """Builds the graph: `input_ids`, `attention_mask` (INT64 [batch, length]) to pooled vectors.

    Args:
        weights: the safetensors file.
        config: config.json: num_hidden_layers, num_attention_heads, hidden_size, layer_norm_eps.
    """

    def __init__(self, weights: Path, config: dict[str, Any]) -> None:
        tensors = load_file(str(weights))
        self._w = {
            k.removeprefix("bert."): v.astype(np.float32)
            for k, v in tensors.items()
            if v.dtype != np.int64
        }
        self._config = config
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        domain = attributes.pop("domain", "")
        self._nodes.append(
            helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)
        )
        return output

    def _fused(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        return self._node(op, inputs, output, domain="com.microsoft", **attributes)

    def build(self, head: tuple[NDArray[Any], NDArray[Any]] | None = None) -> onnx.ModelProto:
        """The model. Output `sentence_embedding` [batch, hidden], the mean over real tokens.

        Args:
            head: weights [hidden, labels] and bias [labels] of a linear classifier on the unit-length
                vector; with it the output is `logits` [batch, labels].
        """
        hidden = self._encode()
        output = self._mean(hidden)
        if head is not None:
            output = self._classify(output, *head)
        width = int(head[1].shape[0]) if head is not None else int(self._config["hidden_size"])
        ints = [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "length"])
            for n in ("input_ids", "attention_mask")
        ]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", width])
        graph = helper.make_graph(self._nodes, "bert", ints, [result], self._constants)
        model = helper.make_model(graph, opset_imports=OPSET, ir_version=9)
        model.producer_name = "forebay"
        return model

    def _encode(self) -> str:
        w, config = self._w, self._config
        eps = float(config.get("layer_norm_eps", 1e-12))
        ids = self._node("Cast", ["input_ids"], "ids", to=TensorProto.INT32)
        mask = self._node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        # Single texts have token type 0 throughout: its vector is added to every position's.
        positions = w["embeddings.position_embeddings.weight"]
        positions = positions + w["embeddings.token_type_embeddings.weight"][0]
        self._nodes.append(
            helper.make_node(
                "EmbedLayerNormalization",
                [
                    ids,
                    "",
                    self._constant("words", w["embeddings.word_embeddings.weight"]),
                    self._constant("positions", positions),
                    "",
                    self._constant("embed.gamma", w["embeddings.LayerNorm.weight"]),
                    self._constant("embed.beta", w["embeddings.LayerNorm.bias"]),
                ],
                ["embedded", "embed.mask_index"],
                name="embed",
                domain="com.microsoft",
                epsilon=eps,
            )
        )
        hidden = "embedded"
        for i in range(int(config["num_hidden_layers"])):
            hidden = self._layer(i, hidden, mask, eps)
        return hidden

    def _layer(self, i: int, hidden: str, mask: str, eps: float) -> str:
        w, p = self._w, f"encoder.layer.{i}"
        parts = ("query", "key", "value")
        qkv = np.concatenate([w[f"{p}.attention.self.{n}.weight"].T for n in parts], axis=1)
        bias = np.concatenate([w[f"{p}.attention.self.{n}.bias"] for n in parts])
        attended = self._fused(
            "Attention",
            [
                hidden,
                self._constant(f"l{i}.qkv", qkv),
                self._constant(f"l{i}.qkv_bias", bias),
                mask,
            ],
            f"l{i}.attention",
            num_heads=int(self._config["num_attention_heads"]),
        )
        projected = self._linear(f"{p}.attention.output.dense", attended, f"l{i}.projected")
        normed = self._skip(i, "a", projected, hidden, f"{p}.attention.output", eps)
        wide = self._linear(f"{p}.intermediate.dense", normed, f"l{i}.wide")
        wide_bias = self._constant(f"l{i}.wide_bias", w[f"{p}.intermediate.dense.bias"])
        active = self._fused("BiasGelu", [wide, wide_bias], f"l{i}.gelu")
        narrow = self._linear(f"{p}.output.dense", active, f"l{i}.narrow")
        return self._skip(i, "b", narrow, normed, f"{p}.output", eps)

    def _linear(self, prefix: str, value: str, output: str) -> str:
        weight = self._constant(f"{output}.weight", self._w[f"{prefix}.weight"].T)
        return self._node("MatMul", [value, weight], output)

    def _skip(self, i: int, which: str, value: str, skip: str, prefix: str, eps: float) -> str:
        w, name = self._w, f"l{i}.norm_{which}"
        return self._fused(
            "SkipLayerNormalization",
            [
                value,
                skip,
                self._constant(f"{name}.gamma", w[f"{prefix}.LayerNorm.weight"]),
                self._constant(f"{name}.beta", w[f"{prefix}.LayerNorm.bias"]),
                self._constant(f"{name}.bias", w[f"{prefix}.dense.bias"]),
            ],
            name,
            epsilon=eps,
        )

    def _mean(self, hidden: str) -> str:
        weights = self._node("Cast", ["attention_mask"], "weights", to=TensorProto.FLOAT)
        row = self._node(
            "Unsqueeze", [weights, self._constant("axis1", np.array([1], np.int64))], "weights_row"
        )
        total = self._node("MatMul", [row, hidden], "total_row")
        flat = self._node("Squeeze", [total, "axis1"], "total")
        count = self._node("ReduceSum", [weights, "axis1"], "count", keepdims=1)
        return self._node("Div", [flat, count], "sentence_embedding")

    def _classify(self, vector: str, weights: NDArray[Any], bias: NDArray[Any]) -> str:
        norm = self._node("ReduceL2", [vector], "norm", axes=[1], keepdims=1)
        unit = self._node("Div", [vector, norm], "unit")
        return self._node(
            "Gemm",
            [
                unit,
                self._constant("head.weight", cast(Any, weights).astype(np.float32)),
                self._constant("head.bias", cast(Any, bias).astype(np.float32)),
            ],
            "logits",
        )
